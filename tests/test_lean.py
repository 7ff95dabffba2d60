"""What training keeps for its backward pass: less than PyTorch's own operations, and the gradients are theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import STYLES, slstm_inputs, tiny_config
from peft import LoraConfig, get_peft_model
from tolerances import TOLERANCES, assert_identical, assert_same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_xlstm import XLSTMForCausalLM, ops_common, ops_lean, slstm
from modeling_xlstm.layers_xlstm import FeedForward, MLSTMLayer, UpMLSTMLayer
from modeling_xlstm.memory_xlstm import enable_checkpointing
from modeling_xlstm.ops_lean import causal_conv, cross_entropy, make_again, project, rms_norm, soft_cap
from modeling_xlstm.states_xlstm import Call


def kept(run: Callable[[], Any], *given: Any) -> int:
    """Bytes kept for the backward pass of a run, beside tensors and modules that were there before."""
    there = {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
    there |= {p.untyped_storage().data_ptr() for m in given if isinstance(m, nn.Module) for p in m.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        seen.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    del result
    return sum(storage.nbytes() for pointer, storage in seen.items() if pointer not in there)


def gradients(y: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad(y, xs, weights)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def plain_soft_cap(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


def plain_conv(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor, document: Tensor | None) -> Tensor:
    """Torch's own convolution, of one document after the other."""
    (D, W), T, rows = weight.shape, x.shape[1], []
    seen = torch.cat([past, x], 1)
    for b in range(len(x)):
        numbers = torch.zeros(W - 1 + T, dtype=torch.long) if document is None else document[b]
        row = torch.zeros_like(x[b])
        for number in numbers.unique():
            is_here = (numbers == number)[:, None]
            made = F.conv1d((seen[b] * is_here).T[None], weight[:, None], groups=D)[0].T
            row = row + made * is_here[W - 1 :]
        rows.append(row)
    return torch.stack(rows) + bias


@pytest.mark.parametrize("tokens", [1, 3, 99])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_convolution_is_the_plain_one_in_blocks_too_and_keeps_its_inputs(
    dtype: torch.dtype, documents: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops_common, "BLOCK", tokens * 2 * 8)
    shapes = (2, 7, 8), (2, 3, 8), (8, 4), (8,)
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    document = torch.randint(2, (2, 10)).cumsum(1) if documents else None
    wide = [v.detach().double().requires_grad_() for v in inputs]
    judge = plain_conv(*wide, document)
    y = causal_conv(*inputs, document)
    got = [v.double() for v in (y, *gradients(y, *inputs))]
    assert_same(got, [judge, *gradients(judge, *wide)], TOLERANCES[dtype])
    assert kept(lambda: causal_conv(*inputs, document), *inputs, document) == 0


def test_an_slstm_keeps_eight_numbers_for_each_of_its_outputs() -> None:
    *gates, R = slstm_inputs(64)
    made = kept(lambda: slstm(*gates, R, backend="torch"), *gates, R)
    assert 8 <= made / gates[0].nbytes < 9  # four gates, c, n, m and h; the rest does not grow with T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_and_soft_cap_are_the_plain_ones_and_keep_one_tensor(dtype: torch.dtype) -> None:
    x, weight = (torch.randn(3, 7, 8) * 5).to(dtype).requires_grad_(), torch.randn(8).to(dtype).requires_grad_()
    y, capped = rms_norm(x, weight, 1e-6), soft_cap(x, 3.0)
    assert_identical(y, plain_rms_norm(x, weight, 1e-6))
    assert_identical(capped, plain_soft_cap(x, 3.0))
    wide = [v.detach().double().requires_grad_() for v in (x, weight)]
    judges = gradients(plain_rms_norm(wide[0], wide[1], 1e-6), *wide), gradients(plain_soft_cap(wide[0], 3.0), wide[0])
    for got, judge in zip((gradients(y, x, weight), gradients(capped, x)), judges, strict=True):
        assert_same([g.double() for g in got], list(judge), TOLERANCES[dtype])
    assert kept(lambda: rms_norm(x, weight, 1e-6), x, weight) == 0
    assert kept(lambda: soft_cap(x, 3.0), x) == x.nbytes
    assert kept(lambda: plain_rms_norm(x, weight, 1e-6), x, weight) > x.nbytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_is_cross_entropy_and_keeps_no_more_than_logits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops_lean, "PIECE", 50)  # several pieces, the last one shorter
    logits, targets = (torch.randn(37, 11) * 4).to(dtype).requires_grad_(), torch.randint(11, (37,))
    targets[::5] = -100
    wide = logits.detach().double().requires_grad_()
    loss, judge = cross_entropy(logits, targets, -100), F.cross_entropy(wide, targets, reduction="sum")
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert_same(loss.double(), judge, TOLERANCES[dtype])
    assert_same(
        torch.autograd.grad(loss / 3, logits)[0].double(), torch.autograd.grad(judge / 3, wide)[0], TOLERANCES[dtype]
    )
    assert kept(lambda: cross_entropy(logits, targets, -100), logits, targets) == 0
    assert kept(lambda: F.cross_entropy(logits.float(), targets), logits, targets) >= logits.numel() * 4


def test_the_loss_refuses_targets_outside_the_vocabulary_and_of_nothing_is_not_a_number() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(IndexError, match="out of bounds"):
        cross_entropy(logits, torch.tensor([0, 5, 1]), -100)
    model = XLSTMForCausalLM(tiny_config())
    ids = torch.randint(3, 61, (2, 5))
    assert model(ids, labels=torch.full_like(ids, -100)).loss.isnan()


def test_a_model_keeps_logits_once_whether_or_not_it_computes_the_loss() -> None:
    model = XLSTMForCausalLM(tiny_config(vocab_size=4000)).train()
    ids = torch.randint(3, 61, (2, 50))
    logits = 2 * 50 * 4000 * 4
    assert logits <= kept(lambda: model(ids, labels=ids), model) < 1.5 * logits
    assert logits <= kept(lambda: model(ids), model) < 1.5 * logits


@pytest.mark.parametrize(("style", "widths"), [("large", 2), ("residual", 1)])
def test_feed_forward_keeps_its_input_and_what_it_activates(style: str, widths: int) -> None:
    layer = FeedForward(tiny_config(style))
    x, up = torch.randn(2, 10, 16, requires_grad=True), layer.up_proj(torch.zeros(2, 10, 16))
    assert kept(lambda: layer(x), x, layer) == widths * up.nbytes


@pytest.mark.parametrize("kind", [FeedForward, MLSTMLayer, UpMLSTMLayer])
def test_layers_that_make_again_have_the_gradients_of_layers_that_keep(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("neurips" if kind is UpMLSTMLayer else "large")
    layer = kind(config).double() if kind is FeedForward else kind(config, 0).double()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = layer(x) if kind is FeedForward else layer(x, Call())[0]
        return y, gradients(y, x, *layer.parameters())

    def count() -> int:
        return kept(lambda: layer(x) if kind is FeedForward else layer(x, Call())[0], x, layer)

    lean, fewer = run(), count()
    monkeypatch.setattr("modeling_xlstm.ops_lean.make_again", lambda make, modules, *inputs: make(*inputs))
    assert_identical(run(), lean)
    assert fewer < count()


class Counted(nn.Linear):
    """A projection that is more than `nn.Linear`."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_only_a_plain_projection_is_entered_twice() -> None:
    x = torch.randn(5, 4, requires_grad=True)
    linear, counted, hooked = nn.Linear(4, 3), Counted(4, 3), nn.Linear(4, 3)
    calls: list[int] = []
    hooked.register_forward_pre_hook(lambda *_: calls.append(1))
    for module in (linear, counted, hooked):
        module.load_state_dict(linear.state_dict())
        y = project(module, lambda x: x.sigmoid().square(), (), x)
        plain = linear(x.sigmoid().square())
        assert_identical(y, plain)
        assert_identical(gradients(y, x, *module.parameters()), gradients(plain, x, *linear.parameters()))
    assert (counted.calls, len(calls)) == (1, 1)
    sizes = [
        kept(lambda module=module: project(module, torch.sigmoid, (), x), x, module) for module in (linear, counted)
    ]  # type: ignore[misc]
    assert sizes == [0, x.nbytes]


class Computed(TorchDispatchMode):
    """The operations that are computed, not only asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_product_itself_is_not_computed_again() -> None:
    x, linear = torch.randn(5, 4, requires_grad=True), nn.Linear(4, 3)
    y = project(linear, torch.sigmoid, (), x)
    with Computed() as computed:
        y.sum().backward()
    assert "sigmoid" in computed.names
    assert "addmm" not in computed.names  # that of the forward pass
    assert computed.names.count("mm") == 2  # the gradients of input and weight


def scaled(norm: nn.Module, x: Tensor) -> Tensor:
    return make_again(lambda x: norm(x).sigmoid(), (norm,), x)


def test_the_backward_pass_takes_the_weights_of_the_forward_pass() -> None:
    x, norm = torch.randn(5, 4, requires_grad=True), nn.LayerNorm(4)
    other = {"weight": torch.full((4,), 2.0, requires_grad=True), "bias": torch.ones(4, requires_grad=True)}
    plain = F.layer_norm(x, (4,), *other.values()).sigmoid()
    with torch.nn.utils.stateless._reparametrize_module(norm, other):
        y = scaled(norm, x)
    own = norm.weight
    assert_identical(gradients(y, x, *other.values()), gradients(plain, x, *other.values()))
    assert norm.weight is own


def test_weights_written_over_before_the_backward_pass_raise() -> None:
    x, norm = torch.randn(5, 4, requires_grad=True), nn.LayerNorm(4)
    y = scaled(norm, x)
    with torch.no_grad():
        norm.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["down_proj", "act"])
def test_hooks_are_called_once(name: str) -> None:
    layer, calls = FeedForward(tiny_config()), []
    layer.get_submodule(name).register_forward_pre_hook(lambda *_: calls.append(1))
    layer(torch.randn(2, 5, 16, requires_grad=True)).sum().backward()
    assert calls == [1]


def test_nothing_is_made_again_without_gradients() -> None:
    calls: list[int] = []
    with torch.no_grad():
        make_again(lambda x: calls.append(1) or x.sigmoid(), (), torch.ones(2, requires_grad=True))  # type: ignore[func-returns-value]
    assert calls == [1]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_goes_around_what_is_made_again(style: str, reentrant: bool) -> None:
    model: Any = XLSTMForCausalLM(tiny_config(style)).double().train()
    ids = torch.randint(3, 61, (2, 11))

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain, size = run(), kept(lambda: model(ids, labels=ids), model)
    enable_checkpointing(model, use_reentrant=reentrant)
    assert_same(run(), plain)
    assert kept(lambda: model(ids, labels=ids), model) < size


# PEFT asks for it by Transformers' older name, which the newest Transformers warns about.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("style", STYLES)
def test_adapters_train_as_they_do_where_everything_is_kept(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = get_peft_model(
        XLSTMForCausalLM(tiny_config(style)).double(),  # type: ignore[arg-type]
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    ).train()
    ids = torch.randint(3, 61, (2, 11))

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    lean = run()
    monkeypatch.setattr("modeling_xlstm.ops_lean.make_again", lambda make, modules, *inputs: make(*inputs))
    assert_identical(run(), lean)


def test_mixed_precision_has_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = XLSTMForCausalLM(tiny_config()).train()
    ids = torch.randint(3, 61, (2, 11))

    def run() -> dict[str, Tensor | None]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    lean = run()
    monkeypatch.setattr("modeling_xlstm.ops_lean.make_again", lambda make, modules, *inputs: make(*inputs))
    assert_identical(run(), lean)
