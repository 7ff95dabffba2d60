"""The mixer layers: the laws of states, each with its outputs, states and all gradients."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import outputs_and_gradients, rows, tiny_model
from tolerances import assert_identical, assert_same
from torch import Tensor, nn

from modeling_xlstm import LayerState, XLSTMModel, ops_common
from modeling_xlstm.layers_xlstm import last_inputs
from modeling_xlstm.states_xlstm import Call

D, T = 16, 9
KINDS = {
    "large mlstm": ("large", "mlstm", 0),
    "neurips mlstm": ("neurips", "mlstm", 0),
    "residual mlstm": ("residual", "mlstm", 0),
    "slstm with convolution": ("neurips", "slstm", 4),
    "slstm without convolution": ("large", "slstm", 0),
}
every_layer = pytest.mark.parametrize("kind", KINDS)
RESETS = st.sets(st.integers(0, T - 1), max_size=4)
LENGTHS = st.lists(st.integers(0, T), min_size=2, max_size=2)


def build(kind: str) -> nn.Module:
    style, variant, window = KINDS[kind]
    model = tiny_model(XLSTMModel, style, variant, num_hidden_layers=1, slstm_conv_kernel_size=window)
    mixer = model.layers[0].mixer
    assert isinstance(mixer, nn.Module)
    return mixer


def frames(B: int = 2, length: int = T) -> Tensor:
    return torch.randn(B, length, D, dtype=torch.float64, requires_grad=True)


def started(layer: nn.Module, B: int = 2) -> LayerState:
    """The state after three tokens, ready for gradients."""
    return of([x.detach().requires_grad_() for x in tensors(layer(frames(B, 3), Call())[1])], layer)


def tensors(state: LayerState | None) -> tuple[Tensor, ...]:
    return () if state is None else rows([state], slice(None))[0]


def of(values: Any, layer: nn.Module) -> LayerState:
    """The inverse of `tensors`."""
    like = layer(frames(1, 1), Call())[1]
    count = len(like.cell)
    return LayerState(type(like.cell)(*values[:count]), values[count] if len(values) > count else None)


def row(state: LayerState, index: Any, layer: nn.Module) -> LayerState:
    return of([x[index] for x in tensors(state)], layer)


def judge(layer: nn.Module, y: Tensor, state: LayerState, x: Tensor, before: LayerState | None) -> Any:
    """Outputs, states, and gradients of input, first state and every parameter."""
    return outputs_and_gradients(y, tensors(state), [x, *tensors(before), *layer.parameters()])


@every_layer
@settings(max_examples=10)
@given(cuts=st.sets(st.integers(1, T - 1), min_size=1, max_size=3), fresh=st.booleans())
def test_splitting_a_sequence_anywhere_changes_nothing(kind: str, cuts: set[int], fresh: bool) -> None:
    layer, x = build(kind), frames()
    before = None if fresh else started(layer)
    whole = judge(layer, *layer(x, Call(before)), x, before)
    state, parts = before, []
    for start, stop in itertools.pairwise([0, *sorted(cuts), T]):
        y, state = layer(x[:, start:stop], Call(state))
        parts.append(y)
    assert state is not None
    assert_same(judge(layer, torch.cat(parts, 1), state, x, before), whole)


@every_layer
@settings(max_examples=10)
@given(lengths=LENGTHS, resets=RESETS)
def test_padding_changes_no_real_token_no_state_and_no_gradient(
    kind: str, lengths: list[int], resets: set[int]
) -> None:
    layer, x = build(kind), frames()
    before, real = started(layer), torch.arange(T) < torch.tensor(lengths)[:, None]
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[:, list(resets)] = True
    y, after = layer(x, Call(before, torch.tensor(lengths), reset & real))
    parts, ends = [], []
    for b, length in enumerate(lengths):
        alone, end = row(before, slice(b, b + 1), layer), None
        if length:
            part, end = layer(x[b : b + 1, :length], Call(alone, None, reset[b : b + 1, :length]))
            parts.append(nn.functional.pad(part, (0, 0, 0, T - length)))
        else:
            parts.append(torch.zeros(1, T, D, dtype=torch.float64))
        ends.append(tensors(end or alone))
    separate = of([torch.cat(pieces) for pieces in zip(*ends, strict=True)], layer)
    padded = judge(layer, y * real[..., None], after, x, before)
    assert_same(padded, judge(layer, torch.cat(parts), separate, x, before))


@every_layer
@settings(max_examples=10)
@given(tokens=st.integers(1, T), fresh=st.booleans(), lengths=st.none() | LENGTHS, resets=RESETS)
def test_making_few_tokens_at_a_time_changes_nothing(
    kind: str, tokens: int, fresh: bool, lengths: list[int] | None, resets: set[int]
) -> None:
    layer, x = build(kind), frames()
    before = None if fresh else started(layer)
    real = torch.ones(2, T, dtype=torch.bool) if lengths is None else torch.arange(T) < torch.tensor(lengths)[:, None]
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[:, list(resets)] = True
    call = Call(before, None if lengths is None else torch.tensor(lengths), reset & real if resets else None)
    whole = judge(layer, *layer(x, call), x, before)
    with mock.patch.object(ops_common, "BLOCK", tokens * x[:, 0].numel()):
        assert_same(judge(layer, *layer(x, call), x, before), whole)
        with torch.no_grad():
            y, state = layer(x, call)
    assert_same((y, tensors(state)), whole[:2])


@pytest.mark.parametrize("watched", ["hook", "tape", "nothing", "nothing, with gradients"])
def test_a_part_is_run_on_few_tokens_at_a_time_where_nobody_can_tell(watched: str) -> None:
    layer, sizes = build("slstm with convolution"), []
    if watched == "hook":
        layer.get_submodule("norm").register_forward_hook(lambda *_: None)
    original = layer._mix
    with (
        mock.patch.object(ops_common, "BLOCK", 4 * 2 * D),
        mock.patch.object(layer, "_mix", lambda x, call: (sizes.append(x.shape[1]), original(x, call))[1]),
        torch.set_grad_enabled("gradients" in watched),
    ):
        layer(frames(), Call(record=watched == "tape"))
    assert sizes == ([4, 4, 1] if "nothing" in watched else [T])


def test_the_window_that_a_packed_row_leaves_keeps_no_row_for_the_backward_pass() -> None:
    kept: list[int] = []
    x, reset = frames(), torch.zeros(2, T, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(lambda y: (kept.append(y.numel()), y)[1], lambda y: y):
        last_inputs(x, None, 4, torch.tensor([T, T - 1]), reset)
    assert kept
    assert max(kept) < x.numel()


@every_layer
def test_no_tokens_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ValueError, match="needs at least one token; got T = 0"):
        build(kind)(frames()[:, :0], Call())


def test_what_is_dropped_at_random_is_the_same_with_and_without_gradients() -> None:
    """As checkpointing needs it, which runs a part first without them and then with them."""
    layer, ys = build("slstm with convolution").train(), []
    layer.get_submodule("dropout").p = 0.5
    for with_gradients in (False, True):
        torch.manual_seed(0)
        with mock.patch.object(ops_common, "BLOCK", 4 * 2 * D), torch.set_grad_enabled(with_gradients):
            ys.append(layer(frames(), Call())[0].detach())
    assert_identical(*ys)
    assert not ys[0].all()


@every_layer
@settings(max_examples=10)
@given(resets=RESETS)
def test_packed_documents_equal_separate_ones(kind: str, resets: set[int]) -> None:
    """At any position, the first and the last token included."""
    layer, x = build(kind), frames()
    before, reset = started(layer), torch.zeros(2, T, dtype=torch.bool)
    reset[:, list(resets)] = True
    packed = judge(layer, *layer(x, Call(before, None, reset)), x, before)
    state, parts = before, []
    for start, stop in itertools.pairwise(sorted({0, T} | resets)):
        y, state = layer(x[:, start:stop], Call(None if start in resets else state))
        parts.append(y)
    assert_same(packed, judge(layer, torch.cat(parts, 1), state, x, before))


@every_layer
@settings(max_examples=10)
@given(order=st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_rows_taken_in_any_order_and_number_give_what_they_gave(kind: str, order: list[int]) -> None:
    layer, x = build(kind), frames(3)
    before = started(layer, 3)
    y, after = layer(x, Call(before))
    y_taken, after_taken = layer(x[order], Call(row(before, order, layer)))
    assert_same((y_taken, tensors(after_taken)), (y[order], tensors(row(after, order, layer))))


@every_layer
def test_a_state_can_be_continued_from_many_times_and_is_never_written_to(kind: str) -> None:
    layer = build(kind)
    before = started(layer)
    kept = [x.detach().clone() for x in tensors(before)]
    x, other = frames(), frames()
    first = layer(x, Call(before))
    layer(other, Call(before, record=True))
    again = layer(x, Call(before))
    assert_identical((again[0], tensors(again[1])), (first[0], tensors(first[1])))
    assert_identical([x.detach() for x in tensors(before)], kept)


@every_layer
@settings(max_examples=10)
@given(lengths=st.none() | LENGTHS, resets=RESETS, back=st.integers(0, T), fresh=st.booleans())
def test_rewinding_a_tape_gives_the_state_after_that_token(
    kind: str, lengths: list[int] | None, resets: set[int], back: int, fresh: bool
) -> None:
    layer, x = build(kind), frames()
    before, kept = None if fresh else started(layer), T - back
    counted = None if lengths is None else torch.tensor(lengths)
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[:, list(resets)] = True
    if counted is not None:
        reset &= torch.arange(T) < counted[:, None]
    tape = layer(x, Call(before, counted, reset, record=True))[1].tape
    fewer = None if counted is None else counted.clamp(max=kept)
    expected = layer(x[:, :kept], Call(before, fewer, reset[:, :kept]))[1] if kept else before
    assert_same(tensors(tape.rewind(kept, fewer)), tensors(expected))
