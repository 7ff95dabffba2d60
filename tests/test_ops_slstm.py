"""The sLSTM op: the fast worker against the definition, and the laws of its state."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import outputs_and_gradients, slstm_inputs, slstm_state
from tolerances import FLOAT32, assert_identical, assert_same
from torch import Tensor

from modeling_xlstm import SLSTMState, ops_common, ops_slstm_torch, slstm
from modeling_xlstm.ops_slstm_reference import slstm_recurrent
from modeling_xlstm.ops_slstm_torch import slstm_recurrent_torch

GATES = st.sampled_from(["exp", "sigmoid", "exp_both"])
BACKENDS = ["torch", "reference"]


@pytest.mark.parametrize("numbers", ["numpy", "torch"])  # on another device than the CPU it is torch
@given(
    T=st.integers(1, 12),
    input_gate=GATES,
    output_tanh=st.booleans(),
    fresh=st.booleans(),
    resets=st.booleans(),
    lengths=st.none() | st.lists(st.integers(0, 12), min_size=2, max_size=2),
    block=st.sampled_from([1, 5 * 12, ops_common.BLOCK]),  # a token has 12 numbers
    seen=st.sampled_from([slice(None), *(slice(i, i + 1) for i in range(5))]),  # by a loss: of output, c, n, m, h
)
def test_the_torch_worker_equals_the_definition_with_states_and_all_gradients(
    numbers: str, T: int, input_gate: str, output_tanh: bool, fresh: bool, resets: bool, lengths: list[int] | None,
    block: int, seen: slice,
) -> None:  # fmt: skip
    xs, state = slstm_inputs(T), None if fresh else slstm_state()
    rows = None if lengths is None else torch.tensor(lengths).clamp(max=T)
    real = torch.ones(2, T, dtype=torch.bool) if rows is None else torch.arange(T) < rows[:, None]
    # Outputs after the real tokens are the workers' own business; the door makes them zero.
    options: dict[str, Any] = {
        "lengths": rows,
        "reset": (torch.rand(2, T) < 0.2) & real if resets else None,
        "input_gate": input_gate,
        "output_tanh": output_tanh,
    }
    results = []
    choose = ops_slstm_torch._numbers if numbers == "numpy" else lambda _: (torch, lambda tensor: tensor)
    assert numbers == choose(xs[0].detach())[0].__name__
    with mock.patch.object(ops_common, "BLOCK", block), mock.patch.object(ops_slstm_torch, "_numbers", choose):
        for worker in (slstm_recurrent_torch, slstm_recurrent):
            h, after = worker(*xs, state, **options)
            results.append(outputs_and_gradients(h * real[..., None, None], after, [*xs, *(state or ())], seen))
        with torch.no_grad():
            given, end = slstm_recurrent_torch(*xs, state, **options)
            assert_same((given * real[..., None, None], end), (h * real[..., None, None], after))
    assert_same(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@given(T=st.integers(2, 12), cut=st.integers(1, 11), input_gate=GATES)
def test_splitting_a_sequence_anywhere_changes_nothing(backend: str, T: int, cut: int, input_gate: str) -> None:
    *gates, R = slstm_inputs(T)
    cut = min(cut, T - 1)
    options: dict[str, Any] = {"input_gate": input_gate, "backend": backend}
    whole = outputs_and_gradients(*slstm(*gates, R, **options), [*gates, R])
    first, middle = slstm(*(x[:, :cut] for x in gates), R, **options)
    second, end = slstm(*(x[:, cut:] for x in gates), R, middle, **options)
    assert_same(outputs_and_gradients(torch.cat([first, second], 1), end, [*gates, R]), whole)


@pytest.mark.parametrize("seen", ["outputs", "outputs and state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_that_only_later_tokens_see_owes_its_stabiliser_nothing(dtype: torch.dtype, seen: str) -> None:
    """Rounding alone is not carried back through the tokens before, whose steps are longer for it."""
    gates, owed = [x.to(dtype) for x in slstm_inputs(9)], []
    run = ops_slstm_torch._backward

    def note(dgates: Tensor, dh: Tensor, d_ends: list[Any], *rest: Any) -> Any:
        owed.extend(ends[2] is not None for ends in d_ends if ends is not None)
        return run(dgates, dh, d_ends, *rest)

    parts, state = [], None
    for x in zip(*(gate.split(3, 1) for gate in gates[:4]), strict=True):
        h, state = slstm(*x, gates[4], state, backend="torch")
        parts.append(h)
    assert state is not None
    with mock.patch.object(ops_slstm_torch, "_backward", note):
        loss = torch.cat(parts, 1).square().sum() + (state.m.sum() if "state" in seen else 0.0)
        loss.backward()
    assert len(owed) == (3 if "state" in seen else 2)  # the last part's state is seen by no token
    assert any(owed) == ("state" in seen)


@pytest.mark.parametrize("backend", BACKENDS)
@given(lengths=st.lists(st.integers(0, 9), min_size=2, max_size=2))
def test_padding_changes_no_real_token_and_no_state(backend: str, lengths: list[int]) -> None:
    *gates, R = slstm_inputs(9)
    state = slstm_state()
    h, after = slstm(*gates, R, state, lengths=torch.tensor(lengths), backend=backend)
    for row, length in enumerate(lengths):
        real = [x[row : row + 1, :length] for x in gates]
        before = SLSTMState(*(x[row : row + 1] for x in state))
        alone = slstm(*real, R, before, backend=backend) if length else (h[row : row + 1, :0], before)
        assert_same((h[row : row + 1, :length], [x[row : row + 1] for x in after]), (alone[0], list(alone[1])))
        assert_identical(h[row, length:], torch.zeros_like(h[row, length:]))


@pytest.mark.parametrize("backend", BACKENDS)
@given(cuts=st.sets(st.integers(1, 10)), first=st.booleans(), input_gate=GATES)
def test_packed_documents_equal_separate_ones(backend: str, cuts: set[int], first: bool, input_gate: str) -> None:
    T, state = 11, slstm_state()
    *gates, R = slstm_inputs(T)
    options: dict[str, Any] = {"input_gate": input_gate, "backend": backend}
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[:, [*cuts, *([0] if first else [])]] = True
    wrt = [*gates, R, *state]
    packed = outputs_and_gradients(*slstm(*gates, R, state, reset=reset, **options), wrt)
    edges = [0, *sorted(cuts), T]
    outputs = []
    after: SLSTMState | None = None if first else state
    for start, stop in itertools.pairwise(edges):
        h, after = slstm(*(x[:, start:stop] for x in gates), R, after if start == 0 else None, **options)
        outputs.append(h)
    assert_same(packed, outputs_and_gradients(torch.cat(outputs, 1), after, wrt))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid", "exp_both"])
@pytest.mark.parametrize("i_tilde", [-80.0, 0.0, 80.0])
@pytest.mark.parametrize("f_tilde", [-80.0, 0.0, 80.0])
def test_extreme_gates_stay_finite_and_right_in_float32(
    backend: str, input_gate: str, i_tilde: float, f_tilde: float
) -> None:
    xs = slstm_inputs(21, gate_std=1.0)
    xs = [x.detach() for x in (xs[0] + i_tilde, xs[1] + f_tilde, *xs[2:4], 0.1 * xs[4])]
    narrow = [x.float().requires_grad_() for x in xs]
    wide = [x.double() for x in narrow]
    h, state = slstm(*narrow, input_gate=input_gate, backend=backend)
    expected = slstm(*wide, input_gate=input_gate, backend="reference")
    assert_same((h.double(), [x.double() for x in state]), (expected[0], list(expected[1])), FLOAT32)
    gradients = torch.autograd.grad(h.square().sum() + state.c.sum() + state.m.sum(), narrow)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fresh_row_beside_a_running_one_equals_the_row_alone(backend: str) -> None:
    """The official cell asks whether the whole batch is fresh; with a closed input gate it then divides 0 by 0."""
    *gates, R = slstm_inputs(4)
    gates = [gates[0] - 800.0, *gates[1:]]
    running = slstm_state()  # its first row is fresh
    h, state = slstm(*gates, R, running, backend=backend)
    alone, _ = slstm(*(x[:1] for x in gates), R, None, backend=backend)
    assert_same(h[:1], alone)
    assert all(x.isfinite().all() for x in (h, *state))


def test_gates_and_states_of_a_bfloat16_model_are_float32() -> None:
    xs = [x.detach().bfloat16() for x in slstm_inputs(7)]
    h, state = slstm(*xs)
    assert h.dtype == torch.bfloat16
    assert {x.dtype for x in state} == {torch.float32}
    assert_identical(h, slstm(*(x.float() for x in xs))[0].bfloat16())


def test_autocast_leaves_the_cell_in_float32() -> None:
    xs = [x.detach().float() for x in slstm_inputs(7)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = slstm(*xs)
    assert_identical(inside, slstm(*xs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_passed_in_is_not_modified(backend: str) -> None:
    state = slstm_state()
    before = [x.clone() for x in state]
    slstm(*slstm_inputs(5), state, backend=backend)
    assert_identical(list(state), before)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"z_tilde": torch.zeros(2, 5, 2, 4)}, r"`z_tilde` must be .* with P = 3"),
        ({"recurrent": torch.zeros(3, 2, 3, 3)}, r"`recurrent` must be \[4, H, P, P\]; got shape"),
        ({"lengths": torch.zeros(1, dtype=torch.long)}, "`lengths` must be"),
        ({"reset": torch.zeros(2, 4, dtype=torch.bool)}, "`reset` must be"),
        ({"input_gate": "tanh"}, "`input_gate` must be"),
        ({"backend": "cuda"}, "`backend` must be one of"),
    ],
)
def test_bad_arguments_are_named(fault: dict[str, Any], message: str) -> None:
    names = ("i_tilde", "f_tilde", "z_tilde", "o_tilde", "recurrent")
    arguments = dict(zip(names, slstm_inputs(5), strict=True)) | fault
    with pytest.raises(ValueError, match=message):
        slstm(**arguments)
