"""The mLSTM op: every form and worker against the recurrent definition, and the laws of its state."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import PRODUCTS, mlstm_inputs, mlstm_state, outputs_and_gradients
from tolerances import FLOAT32, assert_identical, assert_same
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modeling_xlstm import MLSTMState, mlstm, ops_mlstm_chunks, ops_mlstm_tokens, ops_mlstm_weights
from modeling_xlstm.ops_mlstm_reference import mlstm_chunkwise, mlstm_parallel, mlstm_recurrent
from modeling_xlstm.ops_mlstm_torch import mlstm_chunkwise_torch, mlstm_step_torch

BOUNDED_GATES = st.sampled_from(["exp", "sigmoid"])  # a forget gate of at most 1, which resets need
GATES = BOUNDED_GATES | st.just("exp_both")
LENGTH = st.integers(1, 20)
CHUNK = st.sampled_from([1, 2, 3, 7, 16, 64])
EPS = st.sampled_from([1e-6, 0.05])
SEEN = [slice(None), slice(1), slice(1, None), slice(1, 2), slice(2, 3)]  # by a loss: of h, C, n, m


def run(
    worker: Any, xs: list[Tensor], state: MLSTMState | None, seen: slice = slice(None), **options: Any
) -> tuple[Any, ...]:
    h, after = worker(*xs, state, **options)
    return outputs_and_gradients(h, after, [*xs, *(state or ())], seen)


def in_float32(xs: list[Tensor], chunk_size: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What float32 gives for inputs rounded to it, widened, and what the definition gives for them in float64."""
    narrow = [x.float().requires_grad_() for x in xs]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    h, state, gradients = run(mlstm, narrow, None, chunk_size=chunk_size)
    actual = h.double(), MLSTMState(*(x.double() for x in state)), [g.double() for g in gradients]
    return actual, run(mlstm, wide, None, backend="reference")


@pytest.mark.parametrize("form", ["parallel", "chunkwise", "torch"])
@given(
    T=LENGTH,
    chunk_size=CHUNK,
    input_gate=GATES,
    eps=EPS,
    fresh=st.booleans(),
    resets=st.booleans(),
    seen=st.sampled_from(SEEN),
)
def test_every_form_equals_the_recurrent_one_with_states_and_all_gradients(
    form: str, T: int, chunk_size: int, input_gate: str, eps: float, fresh: bool, resets: bool, seen: slice
) -> None:
    xs, state = mlstm_inputs(T), None if fresh else mlstm_state()
    options: dict[str, Any] = {
        "seen": seen,
        "reset": torch.rand(2, T) < 0.2 if resets and input_gate != "exp_both" else None,
        "eps": eps,
        "input_gate": input_gate,
    }
    expected = run(mlstm_recurrent, xs, state, **options)
    if form == "parallel":
        actual = run(mlstm_parallel, xs, state, **options)
    else:
        worker = mlstm_chunkwise if form == "chunkwise" else mlstm_chunkwise_torch
        actual = run(worker, xs, state, chunk_size=chunk_size, **options)
    assert_same(actual, expected)


@pytest.mark.parametrize("block", [1, 48, 100, 150, 300])
@pytest.mark.parametrize("resets", [False, True])
def test_what_is_computed_together_never_changes_the_result(
    block: int, resets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One head of one row at a time, all heads of one row, of one and of two, or everything."""
    xs, state = mlstm_inputs(10, B=3), mlstm_state(B=3)
    reset = torch.rand(3, 10) < 0.3 if resets else None
    results = []
    for size in (ops_mlstm_tokens.GROUP, block):
        monkeypatch.setattr(ops_mlstm_tokens, "GROUP", size)
        results.append(run(mlstm, xs, state, reset=reset, chunk_size=1))
    assert_same(*results)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize(("rise", "expected"), [(-1.0, {False}), (4.0, {False, True}), (500.0, {True})])
def test_a_chunk_whose_weights_are_taken_apart_gives_what_one_with_a_weight_per_pair_gives(
    rise: float, expected: set[bool], seen: slice, fresh: bool, resets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    xs, state = mlstm_inputs(24, gate_std=1.0), None if fresh else mlstm_state()
    reset = torch.rand(2, 24) < 0.15 if resets else None
    kinds = set()
    weigh = ops_mlstm_weights.weigh

    def note(*given: Any) -> Any:
        numbers, near = weigh(*given)
        kinds.update(near)
        return numbers, near

    monkeypatch.setattr(ops_mlstm_chunks, "weigh", note)
    monkeypatch.setitem(ops_mlstm_weights.NEAR, torch.float64, rise)
    actual = run(mlstm, xs, state, seen, reset=reset, chunk_size=1)
    assert kinds == expected
    assert_same(actual, run(mlstm_recurrent, xs, state, seen, reset=reset, eps=1e-6, input_gate="exp"))


@pytest.mark.parametrize("rise", [30.0, 60.0])  # without and with a weight per pair
def test_without_eps_nothing_written_under_open_gates_reads_as_zero(rise: float) -> None:
    """What bounds the normaliser then is exp(-95): no normal number in float32, nor is one divided by it."""
    q, _, v, i_tilde, f_tilde = (x.detach().float() for x in mlstm_inputs(64, gate_std=0.01))
    opening = torch.linspace(95.0 - rise, 95.0, 64)[None, :, None]
    h, _ = mlstm(q, torch.zeros_like(q), v, i_tilde + opening, f_tilde + 20.0, eps=0.0, backend="torch")
    assert_identical(h, torch.zeros_like(h))


@pytest.mark.parametrize("log_f", [-0.3, -0.62, -0.65])
def test_weights_that_are_just_taken_apart_are_as_exact_in_float32_as_others(log_f: float) -> None:
    """Over a chunk of 128 tokens M rises by 38.1, over one of 64 by 39.1 and 41.0: twice below `NEAR`, once above."""
    q, k, v, i_tilde, f_tilde = (x.detach() for x in mlstm_inputs(384, gate_std=0.01))
    actual, exact = in_float32([q, k, v, i_tilde, f_tilde - math.log(math.expm1(-log_f))], chunk_size=32)
    assert_same(actual, exact, FLOAT32)


def test_neighbours_are_weighed_exactly_in_float32_however_much_was_forgotten_before_them() -> None:
    """Every fourth token forgets all: after 250 the sum of logs is -5,000, of which float32 has a two-thousandth."""
    q, k, v, i_tilde, f_tilde = (x.detach() for x in mlstm_inputs(300, gate_std=1.0))
    f_tilde = f_tilde + torch.where(torch.arange(300) % 4 == 0, -80.0, 20.0)[:, None]
    (*actual, of), (*exact, of_exact) = in_float32([q, k, v, i_tilde, f_tilde], chunk_size=128)
    # Those of the forget gates are sums that cancel: 1e-15, where their terms are 1.
    assert_same((*actual, of[:4]), (*exact, of_exact[:4]), FLOAT32)


@given(input_gate=GATES, eps=EPS, fresh=st.booleans(), resets=st.booleans())
def test_one_token_equals_the_definition_with_states_and_all_gradients(
    input_gate: str, eps: float, fresh: bool, resets: bool
) -> None:
    xs, state = mlstm_inputs(1), None if fresh else mlstm_state()
    reset = torch.tensor([[True], [False]]) if resets and input_gate != "exp_both" else None
    options: dict[str, Any] = {"reset": reset, "eps": eps, "input_gate": input_gate}
    assert_same(run(mlstm_step_torch, xs, state, **options), run(mlstm_recurrent, xs, state, **options))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@given(T=st.integers(2, 20), cut=st.integers(1, 19), chunk_size=CHUNK, input_gate=GATES)
def test_splitting_a_sequence_anywhere_changes_nothing(
    backend: str, T: int, cut: int, chunk_size: int, input_gate: str
) -> None:
    xs, cut = mlstm_inputs(T), min(cut, T - 1)
    options: dict[str, Any] = {"chunk_size": chunk_size, "input_gate": input_gate, "backend": backend}
    whole = outputs_and_gradients(*mlstm(*xs, **options), xs)
    first, middle = mlstm(*(x[:, :cut] for x in xs), **options)
    second, end = mlstm(*(x[:, cut:] for x in xs), middle, **options)
    assert_same(outputs_and_gradients(torch.cat([first, second], 1), end, xs), whole)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@given(
    lengths=st.lists(st.integers(0, 12), min_size=2, max_size=2),
    chunk_size=CHUNK,
    fresh=st.booleans(),
    input_gate=GATES,
)
def test_padding_changes_no_real_token_no_state_and_no_gradient(
    backend: str, lengths: list[int], chunk_size: int, fresh: bool, input_gate: str
) -> None:
    xs, state = mlstm_inputs(12), None if fresh else mlstm_state()
    options: dict[str, Any] = {"chunk_size": chunk_size, "input_gate": input_gate, "backend": backend}
    h, after = mlstm(*xs, state, lengths=torch.tensor(lengths), **options)
    start = state or MLSTMState.zeros(2, 2, 4, 6, like=xs[0])
    for row, length in enumerate(lengths):
        real = [x[row : row + 1, :length] for x in xs]
        before = MLSTMState(*(x[row : row + 1] for x in start))
        alone = mlstm(*real, before, **options) if length else (h[row : row + 1, :0], before)
        assert_same((h[row : row + 1, :length], [x[row : row + 1] for x in after]), (alone[0], list(alone[1])))
        assert_identical(h[row, length:], torch.zeros_like(h[row, length:]))
    if any(lengths):
        gradients = torch.autograd.grad(h.sum() + after.C.sum(), xs)
        for row, length in enumerate(lengths):
            assert all(not g[row, length:].any() for g in gradients)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@given(cuts=st.sets(st.integers(1, 15)), first=st.booleans(), chunk_size=CHUNK, input_gate=BOUNDED_GATES)
def test_packed_documents_equal_separate_ones(
    backend: str, cuts: set[int], first: bool, chunk_size: int, input_gate: str
) -> None:
    T, xs, state = 16, mlstm_inputs(16), mlstm_state()
    options: dict[str, Any] = {"chunk_size": chunk_size, "input_gate": input_gate, "backend": backend}
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[:, [*cuts, *([0] if first else [])]] = True
    wrt = [*xs, *state]
    packed = outputs_and_gradients(*mlstm(*xs, state, reset=reset, **options), wrt)
    edges = [0, *sorted(cuts), T]
    outputs = []
    after: MLSTMState | None = None if first else state  # the state passed in belongs to the first document
    for start, stop in itertools.pairwise(edges):
        h, after = mlstm(*(x[:, start:stop] for x in xs), after if start == 0 else None, **options)
        outputs.append(h)
    assert_same(packed, outputs_and_gradients(torch.cat(outputs, 1), after, wrt))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("i_tilde", [-80.0, 0.0, 80.0])
@pytest.mark.parametrize("f_tilde", [-80.0, 0.0, 80.0])
def test_extreme_gates_stay_finite_and_right_in_float32(
    backend: str, input_gate: str, i_tilde: float, f_tilde: float
) -> None:
    xs = mlstm_inputs(37, gate_std=1.0)
    xs = [x.detach() for x in (*xs[:3], xs[3] + i_tilde, xs[4] + f_tilde)]
    narrow = [x.float().requires_grad_() for x in xs]
    wide = [x.double().requires_grad_() for x in narrow]
    h, state = mlstm(*narrow, input_gate=input_gate, backend=backend, chunk_size=16)
    expected = mlstm(*wide, input_gate=input_gate, backend="reference")
    assert_same((h.double(), [x.double() for x in state]), (expected[0], list(expected[1])), FLOAT32)
    gradients = torch.autograd.grad(h.square().sum() + state.C.sum() + state.m.sum(), narrow)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    ("input_gate", "packed"), [("exp", False), ("exp", True), ("sigmoid", True), ("exp_both", False)]
)
@pytest.mark.parametrize("f_tilde", [-1e6, -1e9, torch.finfo(torch.float32).min, -math.inf])
def test_a_forget_gate_closed_however_far_takes_no_digits_from_others(
    input_gate: str, packed: bool, f_tilde: float
) -> None:
    xs = mlstm_inputs(37, gate_std=1.0)
    xs[4].data[0, ::3], xs[4].data[1, 20] = f_tilde, f_tilde
    narrow = [x.detach().float().requires_grad_() for x in xs]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    options: dict[str, Any] = {"input_gate": input_gate, "eps": 1e-6}
    options["reset"] = torch.arange(37).eq(30).expand(2, -1) if packed else None
    h, state, gradients = run(mlstm, narrow, None, **options)
    actual = h.double(), MLSTMState(*(x.double() for x in state)), [g.double() for g in gradients]
    assert_same(actual, run(mlstm_recurrent, wide, None, **options), FLOAT32)


def test_what_an_open_input_gate_wrote_is_forgotten_by_no_less_than_its_own_size() -> None:
    xs = mlstm_inputs(6)
    xs[3].data[:, 1], xs[4].data[:, 3] = 3e5, -2e5
    options: dict[str, Any] = {"input_gate": "exp", "eps": 1e-6}
    actual, expected = (run(worker, xs, None, **options) for worker in (mlstm, mlstm_recurrent))
    assert (expected[1].m > 9e4).all()
    assert_same(actual, expected, FLOAT32)  # of 3e5 even float64 keeps no more than 1e-10


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("i_tilde", "log_f", "k_scale", "of_q"),
    [((20.0, 39.0, 0.0), -59.0, 1.0, 1e-3), ((86.0, 0.0, 0.0), 6.0, 50.0, 1.0)],
    ids=["twice as far apart as near is", "written before a reset"],
)
def test_documents_far_above_each_other_in_one_chunk_stay_finite_and_right(
    backend: str, i_tilde: tuple[float, ...], log_f: float, k_scale: float, of_q: float
) -> None:
    """No number of one document, however large beside another's, reaches that one, gradients included."""
    q, k, v, i, f = (x.detach()[:1] for x in mlstm_inputs(6))
    first, second, third = slice(2), slice(2, 4), slice(4, 6)
    q[:, first] *= of_q
    k, i, f = k * k_scale, torch.zeros_like(i), torch.full_like(f, 30.0)
    for place, level in zip((first, second, third), i_tilde, strict=True):
        i[:, place] = level
    f[:, 2] = log_f
    reset = torch.tensor([[False, False, True, False, True, False]])
    narrow = [x.float().requires_grad_() for x in (q, k, v, i, f)]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    h, state = mlstm(*narrow, reset=reset, backend=backend)
    expected = mlstm(*wide, reset=reset, backend="reference")
    assert_same((h.double(), [x.double() for x in state]), (expected[0], list(expected[1])), FLOAT32)
    assert all(g.isfinite().all() for g in torch.autograd.grad(1e4 * h.sum() + state.C.sum(), narrow))


def test_no_rows_give_none_with_gradients() -> None:
    xs = [x.detach()[:0].requires_grad_() for x in mlstm_inputs(5)]
    h, state = mlstm(*xs)
    assert h.shape[:2] == (0, 5)
    assert state.C.shape[0] == 0
    assert all(g.shape == x.shape for g, x in zip(torch.autograd.grad(h.sum(), xs), xs, strict=True))


def test_gates_and_states_of_a_bfloat16_model_are_float32() -> None:
    xs = [x.detach().bfloat16() for x in mlstm_inputs(9)]
    h, state = mlstm(*xs)
    assert h.dtype == torch.bfloat16
    assert {x.dtype for x in state} == {torch.float32}
    expected, _ = mlstm(*(x.float() for x in xs))
    assert_identical(h, expected.bfloat16())


@pytest.mark.parametrize("rise", [40.0, -1.0])
def test_half_precision_is_kept_for_the_backward_pass_and_computed_with_in_float32(
    rise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ops_mlstm_weights.NEAR, torch.float32, rise)  # without and with a weight per pair
    xs = [x.detach().bfloat16().requires_grad_() for x in mlstm_inputs(9, B=3)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        h, _ = mlstm(*xs, chunk_size=1)
    assert {x.data_ptr() for x in xs[:3]} <= {x.data_ptr() for x in kept}
    assert not any(x.shape == xs[0].shape and x.dtype == torch.float32 for x in kept)
    wide = [x.detach().float().requires_grad_() for x in xs]
    expected = torch.autograd.grad(mlstm(*wide, chunk_size=1)[0].bfloat16().sum(), wide)
    assert_identical(list(torch.autograd.grad(h.sum(), xs)), [x.bfloat16() for x in expected])


@pytest.mark.parametrize(("width", "chunks"), [(8, 2), (16, 2), (32, 1)])
def test_wide_heads_keep_the_states_before_fewer_chunks(width: int, chunks: int) -> None:
    kept: list[Tensor] = []
    xs = mlstm_inputs(16, K=width, V=width)
    for state in (mlstm_state(K=width, V=width), None):  # zeros at the start are not kept
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            mlstm(*xs, state, chunk_size=2)
        found = [len(x) for x in kept if x.shape[1:] == (2 * 2, width, width + ops_mlstm_tokens.MARGIN)]
        assert found == [chunks if state else chunks - 1]


@pytest.mark.parametrize("rise", [None, -1.0])
def test_no_product_is_made_with_zeros_at_the_start_or_of_a_gradient_that_nobody_gives(
    rise: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rise is not None:  # each token has a weight for each other
        monkeypatch.setitem(ops_mlstm_weights.NEAR, torch.float64, rise)
    B, T, H, K, V = 2, 4, 2, 4, 8
    with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
        h, _ = mlstm(*mlstm_inputs(T, K=K, V=V), chunk_size=T)
        forward = counter.get_total_flops()
        h.sum().backward()
    wide = V + ops_mlstm_tokens.MARGIN
    scores, values, state = 2 * T * T * K, 2 * T * T * wide, 2 * T * K * wide
    assert forward == B * H * (scores + values + state)
    # Scores and the state are not made again where no later block reads them.
    assert counter.get_total_flops() - forward == B * H * (scores + values + 2 * T * T * (V + 2 * K))


def test_autocast_leaves_the_cell_in_float32() -> None:
    xs = [x.detach().float() for x in mlstm_inputs(9)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mlstm(*xs)
    assert_identical(inside, mlstm(*xs))


def test_the_state_passed_in_is_not_modified() -> None:
    state = mlstm_state()
    before = [x.clone() for x in state]
    mlstm(*mlstm_inputs(5), state)
    assert_identical(list(state), before)


def test_a_wider_state_keeps_its_dtype() -> None:
    xs = [x.detach().float() for x in mlstm_inputs(5)]
    _, state = mlstm(*xs, MLSTMState.zeros(2, 2, 4, 6, like=torch.zeros((), dtype=torch.float64)))
    assert {x.dtype for x in state} == {torch.float64}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"k": torch.zeros(2, 5, 2, 3)}, r"`k` must be .* with K = 4 as in `q`; got shape \(2, 5, 2, 3\)"),
        ({"i_tilde": torch.zeros(2, 5)}, r"`i_tilde` must be \[B, T, H\]"),
        ({"lengths": torch.zeros(3, dtype=torch.long)}, "`lengths` must be"),
        ({"lengths": torch.zeros(2)}, "`lengths` must be"),
        ({"lengths": [5, 3]}, "`lengths` must be a tensor; got list"),
        ({"lengths": torch.tensor([5, 9])}, r"`lengths` must be from 0 to T = 5; got \[5, 9\]"),
        ({"lengths": torch.tensor([-1, 5])}, "`lengths` must be from 0 to T = 5"),
        ({"reset": torch.zeros(2, 5)}, "`reset` must be"),
        ({"reset": torch.zeros(2, 5, dtype=torch.bool, device="meta")}, "`reset` must be on cpu"),
        (
            {"v": torch.zeros(2, 5, 2, 6, dtype=torch.long)},
            "`v` must be floating point; got torch.int64",
        ),
        (
            {"f_tilde": torch.zeros(2, 5, 2, device="meta")},
            "`f_tilde` must be on cpu as `q` is; got meta",
        ),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1"),
        ({"input_gate": "tanh"}, "`input_gate` must be"),
        ({"input_gate": "exp_both", "reset": torch.zeros(2, 5, dtype=torch.bool)}, "`reset` needs a forget gate"),
        ({"backend": "cuda"}, "`backend` must be one of"),
        ({"state": MLSTMState(torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4), torch.zeros(2, 2))}, "`C` must be"),
    ],
)
def test_bad_arguments_are_named(fault: dict[str, Any], message: str) -> None:
    names = ("q", "k", "v", "i_tilde", "f_tilde")
    arguments = dict(zip(names, mlstm_inputs(5), strict=True)) | fault
    with pytest.raises(ValueError, match=message):
        mlstm(**arguments)


def test_no_tokens_raise() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        mlstm(*(x[:, :0] for x in mlstm_inputs(3)))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@given(T=st.integers(1, 9), cap=st.sampled_from([0.5, 15.0]), input_gate=BOUNDED_GATES)
def test_a_soft_cap_bounds_both_gates_and_leaves_padding_alone(
    backend: str, T: int, cap: float, input_gate: str
) -> None:
    *qkv, i, f = mlstm_inputs(T)
    lengths = torch.tensor([T, T // 2])
    options: dict[str, Any] = {"backend": backend, "input_gate": input_gate, "lengths": lengths}
    actual = mlstm(*qkv, i, f, gate_soft_cap=cap, **options)
    expected = mlstm(*qkv, cap * torch.tanh(i / cap), cap * torch.tanh(f / cap), **options)
    assert_same(actual, expected)


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan")])
def test_a_soft_cap_that_bounds_nothing_is_refused(cap: float) -> None:
    with pytest.raises(ValueError, match="`gate_soft_cap` must be above 0"):
        mlstm(*mlstm_inputs(2), gate_soft_cap=cap)
