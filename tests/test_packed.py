"""Weights kept once more in the CPU's own order: the same numbers, of the weights as they are now."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import STYLES, tiny_model, tokens
from tolerances import BFLOAT16, assert_same
from torch import Tensor, nn

from modeling_xlstm import XLSTMForCausalLM, ops_products
from modeling_xlstm.ops_linear import linear
from modeling_xlstm.ops_products import MOST_PACKED, WAYS, Packed, is_packable, pack, packed_together

pytestmark = pytest.mark.skipif("onednn" not in WAYS, reason="needs oneDNN")
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(not is_packable(torch.bfloat16), reason="needs oneDNN's bfloat16")
    ),
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of any size are packed."""
    monkeypatch.setattr(ops_products, "LEAST", 1)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Packed]:
    """What was multiplied with instead of weights, from now on."""
    seen: list[Packed] = []
    times = Packed.times

    def noted(self: Packed, *given: Any) -> Tensor:
        seen.append(self)
        return times(self, *given)

    monkeypatch.setattr(Packed, "times", noted)
    return seen


def model_of(style: str = "large", dtype: torch.dtype = torch.float32) -> XLSTMForCausalLM:
    model: XLSTMForCausalLM = tiny_model(XLSTMForCausalLM, style, "mixed", hidden_size=32).to(dtype).eval()
    return model


@torch.no_grad()
def decode(model: XLSTMForCausalLM, ids: Tensor) -> Tensor:
    cache = model(ids[:, :-3], use_cache=True).past_key_values
    steps = [model(token, past_key_values=cache).logits for token in ids[:, -3:].split(1, 1)]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("style", STYLES)
def test_packed_weights_decode_to_the_same_logits(
    style: str, rows: int, dtype: torch.dtype, read: list[Packed]
) -> None:
    model, ids = model_of(style, dtype), tokens(rows, 6)
    expected = decode(model, ids)
    assert not read
    model.pack_weights()
    assert_same(decode(model, ids), expected, tolerance=BFLOAT16 if dtype == torch.bfloat16 else None)
    # One row of float32 reads as fast in any order; the prompt has three and rows more.
    assert len(set(read)) > 1
    model.pack_weights(False)
    read.clear()
    assert torch.equal(decode(model, ids), expected)
    assert not read


def written(weight: Tensor) -> None:
    with torch.no_grad():
        weight[-1, -1] += 1.0


def written_unseen(weight: Tensor) -> None:
    weight.data.mul_(2.0)


def moved(weight: Tensor) -> None:
    weight.data = 3.0 * weight.data


@pytest.mark.parametrize("change", [written, written_unseen, moved])
@pytest.mark.parametrize("name", ["lm_head", "model.layers.0.mixer.v_proj", "model.layers.1.ffn.down_proj"])
def test_a_weight_that_changes_is_what_the_next_token_reads(name: str, change: Callable[[Tensor], None]) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, "large", "mlstm", hidden_size=32).float(), tokens(3, 5)
    model.pack_weights()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        before = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
        change(model.get_submodule(name).weight)
        after = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
        expected = copy.deepcopy(model)(ids[:, :1], past_key_values=cache).logits
    assert_same(after, expected)
    assert not torch.equal(after, before)


class Gone:
    """A sample of memory that was given back."""

    def tobytes(self) -> bytes:
        raise AssertionError("memory was read that is gone")


@torch.no_grad()
def test_of_weights_moved_to_shared_memory_the_old_memory_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = nn.Parameter(torch.randn(32, 32)), torch.randn(2, 32)
    packed = Packed([weight])
    monkeypatch.setattr(packed, "_samples", [Gone()])
    with pytest.raises(AssertionError, match="that is gone"):
        packed.times(x, [weight])
    weight.share_memory_()
    assert_same(packed.times(x, [weight]), x @ weight.t())


@pytest.mark.parametrize(
    "undo", [lambda model: model.train(), lambda model: model.double(), lambda model: model.bfloat16()]
)
def test_training_and_converting_undo_it(undo: Callable[[Any], Any], read: list[Packed]) -> None:
    model = model_of()
    model.pack_weights()
    undo(model)
    decode(model.eval(), tokens(3, 6))
    assert not read


def test_copies_and_what_is_saved_know_nothing_of_it(read: list[Packed]) -> None:
    model, ids = model_of(), tokens(3, 6)
    saved = {name: x.clone() for name, x in model.state_dict().items()}
    model.pack_weights()
    expected = decode(model, ids)
    assert_same(model.state_dict(), saved)
    read.clear()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(decode(other, ids), expected)
    assert not read


def test_weights_that_die_take_what_was_packed_with_them() -> None:
    before, model = len(ops_products._packed), model_of()
    model.pack_weights()
    assert len(ops_products._packed) > before
    del model
    assert len(ops_products._packed) == before


@pytest.mark.parametrize("rows", [1, 2, MOST_PACKED, MOST_PACKED + 1])
def test_only_rows_that_gain_read_it_and_none_with_gradients(rows: int, read: list[Packed]) -> None:
    layer, x = nn.Linear(32, 48), torch.randn(rows, 32)
    assert pack(layer.weight)
    expected = layer(x)
    assert_same(linear(x, layer.weight, layer.bias), expected)
    assert not read
    with torch.no_grad():
        assert_same(linear(x, layer.weight, layer.bias), expected)
    assert len(read) == (1 < rows <= MOST_PACKED)
    with torch.inference_mode():
        assert_same(linear(x, layer.weight, layer.bias), expected)
        assert packed_together(2, [layer.weight, layer.weight.double()]) is None


def test_a_model_without_such_weights_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"`pack_weights` needs .* got torch.float64 on cpu"):
        model_of(dtype=torch.float64).pack_weights()
    monkeypatch.setattr(ops_products, "LEAST", 2**30)
    with pytest.raises(ValueError, match=r"`pack_weights` needs .* got torch.float32 on cpu"):
        model_of().pack_weights()
