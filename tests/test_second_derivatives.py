"""Derivatives of gradients: right where torch's operations make them, an error where a cell makes them by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import STYLES, mlstm_inputs, mlstm_state, slstm_inputs, slstm_state, tiny_model, tokens
from test_lean import plain_conv
from tolerances import FLOAT32, assert_identical, assert_same
from torch import Tensor, nn

from modeling_xlstm import MLSTM, SLSTM, MLSTMState, SLSTMState, XLSTMForCausalLM, mlstm, slstm
from modeling_xlstm.memory_xlstm import enable_checkpointing
from modeling_xlstm.ops_lean import causal_conv, cross_entropy, rms_norm, soft_cap
from modeling_xlstm.ops_linear import _Linear, _Products

REFUSED = "constants for autograd; a derivative of them was asked for.*kernel_backend='reference'"


def squared(tensors: Any) -> Tensor:
    return torch.stack([x.square().sum() for x in tensors]).sum()


def second_derivatives(loss: Tensor, by: list[Tensor], then: list[Tensor]) -> tuple[Tensor, ...]:
    """Of the squares of the gradients."""
    return torch.autograd.grad(squared(torch.autograd.grad(loss, by, create_graph=True)), then)


def run_cell(name: str, leaves: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    if name == "mlstm":
        h, state = mlstm(*leaves[:5], MLSTMState(*leaves[5:]), chunk_size=4, **options)
    else:
        h, state = slstm(*leaves[:5], SLSTMState(*leaves[5:]), **options)
    return h, *state


def cell_inputs(name: str, T: int, size: int = 3) -> list[Tensor]:
    if name == "mlstm":
        return [*mlstm_inputs(T, 2, 1, size, size), *mlstm_state(2, 1, size, size)]
    return [*slstm_inputs(T, 2, 1, size), *slstm_state(2, 1, size)]


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "padded and packed"])
@pytest.mark.parametrize("cell", ["mlstm", "slstm"])
def test_a_second_derivative_of_a_cell_by_any_two_inputs_raises(cell: str, marked: bool) -> None:
    marks = {"lengths": torch.tensor([9, 4]), "reset": torch.arange(18).view(2, 9) == 3} if marked else {}
    leaves = cell_inputs(cell, 9)
    for one, other in product(leaves, leaves):
        with pytest.raises(NotImplementedError, match=REFUSED):
            second_derivatives(squared(run_cell(cell, leaves, **marks)), [one], [other])


@pytest.mark.parametrize("cell", ["mlstm", "slstm"])
def test_a_second_derivative_of_a_kernel_by_any_input_raises(cell: str, kernel_device: torch.device) -> None:
    leaves = [x.detach().to(kernel_device, torch.float32).requires_grad_() for x in cell_inputs(cell, 5, 16)]
    for one in leaves:
        with pytest.raises(NotImplementedError, match=REFUSED):
            second_derivatives(squared(run_cell(cell, leaves, backend="triton")), leaves, [one])


@pytest.mark.parametrize("cell", ["mlstm", "slstm"])
def test_a_second_derivative_through_a_gradient_that_is_given_raises(cell: str) -> None:
    leaves = cell_inputs(cell, 5)
    h, *_ = run_cell(cell, leaves)
    dh = torch.ones_like(h).requires_grad_()
    gradients = torch.autograd.grad(h, leaves, dh, create_graph=True)
    with pytest.raises(NotImplementedError, match=REFUSED):
        torch.autograd.grad(squared(gradients), dh)


@pytest.mark.parametrize("cell", ["mlstm", "slstm"])
def test_first_derivatives_that_could_be_differentiated_are_the_same_and_may_be_written_over(cell: str) -> None:
    leaves = cell_inputs(cell, 9)
    expected, gradients = (
        torch.autograd.grad(squared(run_cell(cell, leaves)), leaves, create_graph=again) for again in (False, True)
    )
    assert_identical(gradients, expected)
    for x in gradients:
        x.mul_(2)
    assert_identical(gradients, tuple(2 * x for x in expected))


@pytest.mark.parametrize("cell", ["mlstm", "slstm"])
def test_one_token_has_second_derivatives(cell: str) -> None:
    leaves = cell_inputs(cell, 1)
    expected, got = (
        second_derivatives(squared(run_cell(cell, leaves, backend=backend)), leaves, leaves)
        for backend in ("reference", "torch")
    )
    assert_same(got, expected)


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


DOCUMENT = torch.tensor([[0] * 5 + [1] * 4, [0] * 2 + [1] * 3 + [2] * 4])
TARGETS = torch.tensor([3, 0, -100, 6, 1])
CONVOLVED = (2, 6, 4), (2, 3, 4), (4, 4), (4,)
LEAN: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "norm": (lambda x, w: rms_norm(x, w, 0.1), lambda x, w: F.rms_norm(x, (8,), w, 0.1), ((2, 3, 8), (8,))),
    "cap": (lambda x: soft_cap(x, 2.0), lambda x: 2.0 * torch.tanh(x / 2.0), ((5, 3),)),
    "convolution": (lambda *xs: causal_conv(*xs, None), lambda *xs: plain_conv(*xs, None), CONVOLVED),
    "of documents": (lambda *xs: causal_conv(*xs, DOCUMENT), lambda *xs: plain_conv(*xs, DOCUMENT), CONVOLVED),
    "loss": (
        lambda x: cross_entropy(x, TARGETS, -100),
        lambda x: F.cross_entropy(x, TARGETS, reduction="sum"),
        ((5, 7),),
    ),
    "linear": (lambda *xs: _Linear.apply(*xs, False), F.linear, ((2, 3, 4), (5, 4), (5,))),
    "without bias": (lambda *xs: _Linear.apply(*xs, None, False), F.linear, ((2, 3, 4), (5, 4))),
    "products": (_Products.apply, torch.bmm, ((2, 3, 4), (2, 4, 5))),
}  # fmt: skip


@pytest.mark.parametrize("op", LEAN)
def test_what_keeps_less_has_the_second_derivatives_of_what_keeps_all(op: str) -> None:
    ours, plain, shapes = LEAN[op]
    dtype = torch.float32 if op in ("linear", "without bias", "products") else torch.float64
    leaves = [x.to(dtype).requires_grad_() for x in draw(*shapes)]

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        # The first input is made of the others, as a layer's is of weights that it shares with the one before.
        x = leaves[0] * torch.stack([other.mean() for other in [*leaves[1:], leaves[0]]]).sum()
        return second_derivatives(function(x, *leaves[1:]).square().sum(), leaves, leaves)

    assert_same(run(ours), run(plain), FLOAT32 if dtype is torch.float32 else None)


def model_and_loss(style: str, **fields: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = tiny_model(XLSTMForCausalLM, style, output_logit_soft_cap=5.0, **fields)
    ids = tokens(2, 9)
    return model, lambda: model(ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("style", STYLES)
def test_a_second_derivative_of_a_model_raises_by_all_its_weights_and_by_one(style: str, checkpointing: bool) -> None:
    model, loss = model_and_loss(style)
    if checkpointing:
        enable_checkpointing(model.train())
    weights = list(model.parameters())
    expected = torch.autograd.grad(loss(), weights)
    assert_same(torch.autograd.grad(loss(), weights, create_graph=True), expected)
    for some in (weights, weights[:1]):
        with pytest.raises(NotImplementedError, match=REFUSED):
            second_derivatives(loss(), some, some)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("style", STYLES)
def test_a_model_on_the_reference_has_the_second_derivatives_of_plain_operations(
    style: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loss = model_and_loss(style, kernel_backend="reference")
    weights = list(model.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # then nothing of ours is made by hand
        expected = second_derivatives(loss(), weights, weights)
    if checkpointing:
        enable_checkpointing(model.train())
    assert_same(second_derivatives(loss(), weights, weights), expected)


@pytest.mark.parametrize("layers", [MLSTM, SLSTM])
def test_layers_called_as_an_lstm_have_second_derivatives_on_the_reference_and_token_by_token(layers: Any) -> None:
    x = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    fast, reference = layers(4, 6).double(), layers(4, 6, backend="reference").double()
    reference.load_state_dict(fast.state_dict())
    with pytest.raises(NotImplementedError, match=REFUSED):
        second_derivatives(fast(x)[0].square().sum(), [x], [x])
    outputs, state = [], None
    for x_t in x.split(1, 1):
        h, state = fast(x_t, state)
        outputs.append(h)
    got = second_derivatives(reference(x)[0].square().sum(), [x], [x])
    assert_same(got, second_derivatives(torch.cat(outputs, 1).square().sum(), [x], [x]))
