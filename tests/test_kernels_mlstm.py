"""The mLSTM's Triton kernels against the definition in float64: on a GPU, or on the CPU through Triton's interpreter.

The interpreter computes bfloat16 wrongly and is slow, so everything here is float32 and small.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from inputs import mlstm_inputs, mlstm_state, outputs_and_gradients
from tolerances import FLOAT32, assert_identical, assert_same
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from modeling_xlstm import MLSTMState, mlstm, ops_common
from modeling_xlstm.ops_common import disagreement, self_check
from modeling_xlstm.ops_mlstm import _compare, mlstm_step_

pytestmark = pytest.mark.usefixtures("kernel_device")


def narrow(tensors: Any, device: torch.device) -> list[Tensor]:
    """Leaves in float32."""
    return [x.detach().to(device, torch.float32).requires_grad_() for x in tensors]


def assert_kernels_equal_the_definition(
    xs: list[Tensor], state: MLSTMState | None, device: torch.device, reset: Tensor | None = None, **options: Any
) -> None:
    """Outputs, states and all gradients; inputs are rounded to float32 first."""
    results = []
    given = narrow([*xs, *(state or ())], device)
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in given]
        before = MLSTMState(*leaves[5:]) if state else None
        reset = None if reset is None else reset.to(device)
        h, after = mlstm(*leaves[:5], before, reset=reset, backend=backend, **options)
        h, after, gradients = outputs_and_gradients(h, after, leaves)
        results.append([x.double() for x in (h, *after, *gradients)])
    assert_same(*results, FLOAT32)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize(
    ("T", "K", "V", "chunk_size", "resets"),
    [(1, 16, 16, 16, False), (11, 16, 32, 64, True), (37, 16, 16, 16, True), (49, 32, 16, 32, False)],
    ids=str,
)
def test_the_kernels_equal_the_definition_with_states_and_all_gradients(
    T: int, K: int, V: int, chunk_size: int, resets: bool, input_gate: str, kernel_device: torch.device
) -> None:
    reset = torch.rand(2, T) < 0.15 if resets else None
    options: dict[str, Any] = {"chunk_size": chunk_size, "eps": 0.05, "input_gate": input_gate}
    options["gate_soft_cap"] = 2.5 if T % 4 == 1 else None
    inputs = mlstm_inputs(T, 2, 1, K, V), mlstm_state(2, 1, K, V)
    assert_kernels_equal_the_definition(*inputs, kernel_device, reset, **options)


@pytest.mark.parametrize(("K", "V"), [(48, 16), (80, 80)], ids=str)
def test_channels_in_several_and_partly_filled_blocks(K: int, V: int, kernel_device: torch.device) -> None:
    assert_kernels_equal_the_definition(mlstm_inputs(21, 1, 2, K, V), None, kernel_device, chunk_size=16)


@pytest.mark.parametrize("chunk_size", [64, 128])
def test_chunks_of_several_tiles(chunk_size: int, kernel_device: torch.device) -> None:
    reset = torch.zeros(1, 75, dtype=torch.bool)
    reset[:, [0, 40, 64]] = True
    inputs = mlstm_inputs(75, 1, 1, 16, 16), mlstm_state(1, 1, 16, 16)
    assert_kernels_equal_the_definition(*inputs, kernel_device, reset, chunk_size=chunk_size)


@pytest.mark.parametrize("i_tilde", [-80.0, 80.0])
@pytest.mark.parametrize("f_tilde", [-80.0, 80.0])
def test_extreme_gates_stay_finite_and_right(i_tilde: float, f_tilde: float, kernel_device: torch.device) -> None:
    xs = mlstm_inputs(21, 1, 1, 16, 16, gate_std=1.0)
    given = narrow([*xs[:3], xs[3] + i_tilde, xs[4] + f_tilde], kernel_device)
    h, state = mlstm(*given, chunk_size=16, backend="triton")
    expected = mlstm(*(x.double() for x in given), backend="reference")
    assert_same((h.double(), [x.double() for x in state]), (expected[0], list(expected[1])), FLOAT32)
    gradients = torch.autograd.grad(h.square().sum() + state.C.sum() + state.m.sum(), given)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("f_tilde", [10.0, 12.0, 16.0])
def test_forget_gates_near_one_forget_what_they_should(f_tilde: float, kernel_device: torch.device) -> None:
    """Behind closed input gates m is the sum of log f: near -4e-4 at 12, rounded at 6e-8 a token if 1 + e is."""
    q, k, v, i, f = (x.detach() for x in narrow(mlstm_inputs(64, 1, 1, 16, 16), kernel_device))
    gates = torch.full_like(i, -100.0), torch.full_like(f, f_tilde)
    _, state = mlstm(q, k, v, *gates, backend="triton")
    _, expected = mlstm(*(x.double() for x in (q, k, v, *gates)), backend="reference")
    assert_same(state.m.double(), expected.m, FLOAT32)


def test_infinite_gates_meet_the_soft_cap_as_in_the_definition(kernel_device: torch.device) -> None:
    xs = [x.detach() for x in narrow(mlstm_inputs(19, 1, 1, 16, 16), kernel_device)]
    xs[3][:, 4:9], xs[4][:, 7:12] = -torch.inf, torch.inf
    results = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in xs]
        h, state = mlstm(*leaves, gate_soft_cap=2.5, chunk_size=16, backend=backend)
        results.append(outputs_and_gradients(h, state, leaves))
    assert_same(*results, FLOAT32)


def test_padding_changes_no_real_token_no_state_and_no_gradient(kernel_device: torch.device) -> None:
    xs, state = narrow(mlstm_inputs(19, 2, 1, 16, 16), kernel_device), narrow(mlstm_state(2, 1, 16, 16), kernel_device)
    lengths = [13, 0]
    options: dict[str, Any] = {"chunk_size": 16, "backend": "triton", "gate_soft_cap": 2.5}
    h, after = mlstm(*xs, MLSTMState(*state), lengths=torch.tensor(lengths, device=kernel_device), **options)
    alone, end = mlstm(*(x[:1, :13] for x in xs), MLSTMState(*(x[:1] for x in state)), **options)
    assert_same((h[:1, :13], [x[:1] for x in after]), (alone, list(end)))
    assert_same([x[1] for x in after], [x[1] for x in state])
    gradients = torch.autograd.grad(h.sum() + after.C.sum(), xs)
    for row, length in enumerate(lengths):
        assert not h[row, length:].any()
        assert all(not g[row, length:].any() for g in gradients)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_one_token_after_the_other_equals_the_sequence(input_gate: str, kernel_device: torch.device) -> None:
    xs = [x.detach() for x in narrow(mlstm_inputs(5, 2, 2, 48, 80), kernel_device)]
    reset = torch.tensor([[False, False, True, False, False], [False] * 5], device=kernel_device)
    options: dict[str, Any] = {"input_gate": input_gate, "backend": "triton", "gate_soft_cap": 2.5}
    expected = mlstm(*xs, reset=reset, **options)
    state, outputs = None, []
    for t in range(5):
        h, state = mlstm(*(x[:, t : t + 1] for x in xs), state, reset=reset[:, t : t + 1], **options)
        outputs.append(h)
    assert_same((torch.cat(outputs, 1), state), expected)


def test_the_state_passed_in_is_not_modified(kernel_device: torch.device) -> None:
    state = MLSTMState(*(x.detach() for x in narrow(mlstm_state(2, 1, 16, 16), kernel_device)))
    before = [x.clone() for x in state]
    for T in (1, 5):
        mlstm(*narrow(mlstm_inputs(T, 2, 1, 16, 16), kernel_device), state, backend="triton")
        with torch.no_grad():
            mlstm(*narrow(mlstm_inputs(T, 2, 1, 16, 16), kernel_device), state, backend="triton")
    assert_identical(list(state), before)


@pytest.mark.parametrize("cap", [None, 2.5])
def test_a_step_over_its_state_equals_a_step_beside_it(cap: float | None, kernel_device: torch.device) -> None:
    xs = [x.detach() for x in narrow(mlstm_inputs(1, 2, 2, 48, 80), kernel_device)]
    state = MLSTMState(*(x.detach() for x in narrow(mlstm_state(2, 2, 48, 80), kernel_device)))
    expected = mlstm(*xs, state, gate_soft_cap=cap, backend="triton")
    options: dict[str, Any] = {"eps": 1e-6, "input_gate": "exp", "gate_soft_cap": cap}
    h, after = mlstm_step_(*xs, state, backend="triton", **options)
    assert_identical((h, list(after)), (expected[0], list(expected[1])))
    assert after.C is state.C
    assert after.n is not state.n


def test_inputs_are_read_where_projections_leave_them(kernel_device: torch.device) -> None:
    """Slices of one projection, tensors with heads before tokens, and rows that are one row in memory."""
    q, k, v, *gates = (x.detach() for x in narrow(mlstm_inputs(9, 2, 2, 16, 16), kernel_device))
    expected = mlstm(q, k, v, *gates, backend="triton")
    slices = torch.cat([x.flatten(2) for x in (q, k, v)], -1).chunk(3, -1)
    assert_identical(mlstm(*(x.unflatten(-1, (2, 16)) for x in slices), *gates, backend="triton"), expected)
    moved = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert_identical(mlstm(*moved, *gates, backend="triton"), expected)
    rows = [x[:1].expand(2, *x.shape[1:]) for x in (q, k, v, *gates)]
    h, _ = mlstm(*rows, backend="triton")
    assert_identical(h[1], expected[0][0])


@pytest.mark.parametrize(
    ("K", "V", "dtype", "message"),
    [
        (24, 16, torch.float32, "multiples of 16"),
        (16, 1040, torch.float32, "V = 1024"),
        (16, 16, torch.float64, "must be float32"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_take_is_refused_by_name_and_computed_under_auto(
    K: int, V: int, dtype: torch.dtype, message: str, kernel_device: torch.device
) -> None:
    xs = [x.detach().to(kernel_device, dtype) for x in mlstm_inputs(3, 1, 1, K, V)]
    with pytest.raises(ValueError, match=message):
        mlstm(*xs, backend="triton")
    assert_identical(mlstm(*xs), mlstm(*xs, backend="torch"))


def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        mlstm(*(x.float() for x in mlstm_inputs(3, 1, 1, 16, 16)), backend="triton")


def test_auto_never_takes_the_interpreter() -> None:
    xs = [x.detach().float() for x in mlstm_inputs(9, 1, 1, 16, 16)]
    assert_identical(mlstm(*xs), mlstm(*xs, backend="torch"))


def test_the_self_check_passes_whatever_the_default_device(kernel_device: torch.device) -> None:
    with torch.device("meta"):
        assert _compare(kernel_device, torch.float32) == ""


def test_the_self_check_finds_a_backward_pass_that_is_wrong_where_the_forward_pass_is_right() -> None:
    def run(worker: str, x: Tensor) -> tuple[Tensor, ...]:
        detached = x.detach() if worker == "triton" else x
        return (x * detached,)

    x = torch.rand(4) + 1
    with pytest.warns(UserWarning, match="disagree with the reference"):
        assert "on cpu with triton" in disagreement(run, [x], torch.device("cpu"), True)
    assert disagreement(run, [x], torch.device("cpu"), False) == ""


def test_kernels_that_cannot_run_are_found_by_the_self_check_and_full_memory_is_not_their_fault() -> None:
    def run(worker: str, x: Tensor) -> tuple[Tensor, ...]:
        if worker == "triton":
            raise error
        return (x,)

    x, error = torch.rand(4), RuntimeError("Failed to find C compiler.")
    with pytest.warns(UserWarning, match="are not used: on cpu.*raise RuntimeError: Failed to find C compiler"):
        assert "Failed to find C compiler" in disagreement(run, [x], torch.device("cpu"), True)
    error = torch.OutOfMemoryError("for now")
    with pytest.raises(torch.OutOfMemoryError, match="for now"):
        disagreement(run, [x], torch.device("cpu"), True)


@pytest.fixture
def checks_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `self_check` asks of CUDA is answered where there is none, and no result is kept."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(ops_common, "_VERDICTS", {})


@pytest.mark.usefixtures("checks_begin")
def test_what_the_self_check_found_holds_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compare(device: torch.device, dtype: torch.dtype) -> str:
        calls.append(torch.is_inference_mode_enabled())
        return "wrong"

    results = []
    for capturing in (True, False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        with torch.inference_mode():
            results.append(self_check(compare, torch.device("cuda"), torch.float32))
    assert results == ["", "wrong", "wrong"]
    assert calls == [False]


@pytest.mark.usefixtures("checks_begin")
def test_no_self_check_begins_on_tensors_without_memory() -> None:
    def compare(device: torch.device, dtype: torch.dtype) -> str:
        return "these hold no numbers" if isinstance(torch.empty(1), FakeTensor) else "wrong"

    with FakeTensorMode():
        assert self_check(compare, torch.device("cuda"), torch.float32) == ""
    assert self_check(compare, torch.device("cuda"), torch.float32) == "wrong"


@pytest.mark.usefixtures("checks_begin")
def test_a_self_check_inside_a_checkpointed_block_is_no_part_of_it() -> None:
    gradients = []

    def compare(device: torch.device, dtype: torch.dtype) -> str:
        x = torch.ones(2, requires_grad=True)
        gradients.append(torch.autograd.grad(x.exp().square().sum(), x)[0])
        return ""

    def block(x: Tensor) -> Tensor:
        self_check(compare, torch.device("cuda"), torch.float32)
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    assert_same(x.grad, x.cos())
    assert_same(gradients, [2 * torch.full((2,), 2.0).exp()])
