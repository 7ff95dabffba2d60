"""The sLSTM's Triton kernels against the definition in float64: on a GPU, or through Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import outputs_and_gradients, slstm_inputs, slstm_state
from tolerances import FLOAT32, assert_identical, assert_same
from torch import Tensor

from modeling_xlstm import SLSTMState, ops_slstm, slstm
from modeling_xlstm.ops_slstm import _compare

pytestmark = pytest.mark.usefixtures("kernel_device")


def narrow(tensors: Any, device: torch.device) -> list[Tensor]:
    """Leaves in float32."""
    return [x.detach().to(device, torch.float32).requires_grad_() for x in tensors]


def kernel_inputs(T: int, B: int, H: int, P: int) -> list[Tensor]:
    """Gates and recurrent weights of a size that keeps wide heads in range."""
    *gates, R = slstm_inputs(T, B, H, P)
    return [*gates, R.detach() * P**-0.5]


# 16 and 48 fit into one program, 80 is split among several, which take one token after the other.
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize(
    ("T", "P", "fresh", "resets", "lengths"),
    [
        (1, 16, False, False, None),
        (7, 16, True, True, None),
        (5, 48, False, True, [4, 0]),
        (3, 80, False, True, [0, 2]),
    ],
    ids=str,
)
def test_the_kernels_equal_the_definition_with_states_and_all_gradients(
    T: int, P: int, fresh: bool, resets: bool, lengths: list[int] | None, input_gate: str, kernel_device: torch.device
) -> None:
    xs, state = kernel_inputs(T, 2, 1, P), None if fresh else slstm_state(2, 1, P)
    options: dict[str, Any] = {
        "lengths": None if lengths is None else torch.tensor(lengths, device=kernel_device),
        "reset": torch.rand(2, T, device=kernel_device) < 0.3 if resets else None,
        "input_gate": input_gate,
    }
    given = narrow([*xs, *(state or ())], kernel_device)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in given]
        before = SLSTMState(*leaves[5:]) if state else None
        h, after = slstm(*leaves[:5], before, backend=backend, **options)
        h, after, gradients = outputs_and_gradients(h, after, leaves)
        results.append([x.double() for x in (h, *after, *gradients)])
    assert_same(*results, FLOAT32)


@pytest.mark.parametrize("i_tilde", [-80.0, 80.0])
@pytest.mark.parametrize("f_tilde", [-80.0, 80.0])
def test_extreme_gates_stay_finite_and_right(i_tilde: float, f_tilde: float, kernel_device: torch.device) -> None:
    *gates, R = kernel_inputs(6, 1, 1, 16)
    given = narrow([gates[0] + i_tilde, gates[1] + f_tilde, *gates[2:], R], kernel_device)
    h, state = slstm(*given, backend="triton")
    expected = slstm(*(x.double() for x in given), backend="reference")
    assert_same((h.double(), [x.double() for x in state]), (expected[0], list(expected[1])), FLOAT32)
    gradients = torch.autograd.grad(h.square().sum() + state.c.sum() + state.m.sum(), given)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("f_tilde", [10.0, 12.0, 16.0])
def test_forget_gates_near_one_forget_what_they_should(f_tilde: float, kernel_device: torch.device) -> None:
    """Behind closed input gates m is the sum of log f: near -4e-4 at 12, rounded at 6e-8 a token if 1 + e is."""
    z = torch.zeros(1, 64, 1, 16, device=kernel_device)
    xs = [z - 100.0, z + f_tilde, z, z, torch.zeros(4, 1, 16, 16, device=kernel_device)]
    state = SLSTMState(z[:, 0], z[:, 0] + 1, z[:, 0], z[:, 0])
    _, after = slstm(*xs, state, backend="triton")
    _, expected = slstm(*(x.double() for x in xs), SLSTMState(*(x.double() for x in state)), backend="reference")
    assert_same(after.m.double(), expected.m, FLOAT32)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.1, 1.0])
def test_small_cell_inputs_keep_their_digits(size: float, kernel_device: torch.device) -> None:
    gates = [torch.zeros(1, 3, 1, 16, device=kernel_device) for _ in range(4)]
    xs = [*gates, torch.zeros(4, 1, 16, 16, device=kernel_device)]
    xs[2] = size * torch.linspace(-1, 1, 48, device=kernel_device).view_as(gates[2])
    h, _ = slstm(*xs, backend="triton")
    expected, _ = slstm(*(x.double() for x in xs), backend="reference")
    assert_same(h.double() / size, expected / size, FLOAT32)


@pytest.mark.parametrize("P", [16, 80])
def test_one_token_after_the_other_equals_the_sequence(P: int, kernel_device: torch.device) -> None:
    *gates, R = (x.detach() for x in narrow(kernel_inputs(3, 17, 1, P), kernel_device))
    expected = slstm(*gates, R, backend="triton")
    state, outputs = None, []
    for t in range(3):
        h, state = slstm(*(x[:, t : t + 1] for x in gates), R, state, backend="triton")
        outputs.append(h)
    assert_same((torch.cat(outputs, 1), state), expected)


def test_the_state_passed_in_is_not_modified(kernel_device: torch.device) -> None:
    state = SLSTMState(*(x.detach() for x in narrow(slstm_state(2, 1, 80), kernel_device)))
    before = [x.clone() for x in state]
    for T in (1, 2, 3):
        slstm(*(x.detach() for x in narrow(kernel_inputs(T, 2, 1, 80), kernel_device)), state, backend="triton")
    assert_identical(list(state), before)


@pytest.mark.parametrize(
    ("P", "dtype", "message"),
    [(24, torch.float32, "multiple of 16"), (528, torch.float32, "P = 512"), (16, torch.float64, "must be float32")],
    ids=str,
)
def test_what_the_kernels_cannot_take_is_refused_by_name_and_computed_under_auto(
    P: int, dtype: torch.dtype, message: str, kernel_device: torch.device
) -> None:
    xs = [x.detach().to(kernel_device, dtype) for x in kernel_inputs(2, 1, 1, P)]
    with pytest.raises(ValueError, match=message):
        slstm(*xs, backend="triton")
    assert_identical(slstm(*xs), slstm(*xs, backend="torch"))


def test_the_self_check_passes_whatever_the_default_device(kernel_device: torch.device) -> None:
    with torch.device("meta"):
        assert _compare(kernel_device, torch.float32) == ""


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> Any:
    """The worker's module on a device that runs 132 programs at once: so the interpreter is told, which runs one."""
    from modeling_xlstm import ops_slstm_triton

    if kernel_device.type == "cpu":
        monkeypatch.setattr(ops_slstm_triton, "programs_at_once", lambda _: 132)
    return ops_slstm_triton


def test_tokens_in_one_launch_equal_a_launch_a_token(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter with a head in one slice, for there a program cannot wait for one after it."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(worker, "_held", lambda *_: {"BP": 64, "BU": 128})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = narrow([*kernel_inputs(4, 2, 1, 80), *slstm_state(2, 1, 80)], device)
    marks = {"lengths": torch.tensor([4, 2], device=device), "reset": torch.rand(2, 4, device=device) < 0.3}
    results = []
    for together in (worker.Together(True), worker.Together(False)):
        leaves = [x.detach().requires_grad_() for x in given]
        h, after = worker.slstm_recurrent_triton(
            *leaves[:5], SLSTMState(*leaves[5:]), **marks, input_gate="exp", together=together
        )
        results.append(outputs_and_gradients(h, after, leaves))
    assert_same(*results)


def test_programs_wait_for_each_other_only_where_all_of_them_run_at_once(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tensors without data are on no device that runs programs, where there is a GPU too.
    monkeypatch.setattr(worker, "programs_at_once", lambda _: 132)

    def launches(B: int, T: int, P: int, together: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[int, bool]:
        x, R = torch.empty(B, T, 4, P, dtype=dtype, device="meta"), torch.empty(4, 4, P, P, dtype=dtype, device="meta")
        size = worker._Sizes.of(x, R, (None, None), False, worker.Together(together))
        return -(-T // size.stride), bool(size.options.get("launch_cooperative_grid"))

    assert launches(16, 9, 128, True) == (1, False)  # a head in one program
    for P in (192, 256, 384, 512):
        assert launches(16, 9, P, True) == (1, True)
        assert launches(16, 9, P, False) == (9, False)
        assert launches(4096, 9, P, True) == (9, False)
        assert launches(16, 1, P, True) == (1, False)
        # Wider slices of float32 do not fit beside their lower digits.
        assert launches(16, 9, P, True, torch.float32) == ((1, True) if P <= 256 else (9, False))


def test_where_waiting_programs_are_wrong_a_launch_a_token_is_the_way_out(
    worker: Any, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    def check(compare: Any, *_: Any) -> str:
        return "they disagree" if compare is ops_slstm._compare_together else ""

    monkeypatch.setattr(ops_slstm, "self_check", check)
    xs = [x.detach() for x in narrow(kernel_inputs(2, 2, 1, 80), kernel_device)]
    assert ops_slstm._may_wait(xs[0], xs[4]) == worker.Together(False)
    assert_same(slstm(*xs, backend="triton"), slstm(*xs, backend="torch"))


def test_waiting_programs_are_asked_for_and_checked_only_where_heads_are_shared_over_tokens_outside_compiled_models(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    monkeypatch.setattr(ops_slstm, "self_check", lambda compare, *_: checked.append(compare) or "")

    def may_wait(T: int, P: int) -> bool:
        x, R = torch.empty(2, T, 1, P, device="meta"), torch.empty(4, 1, P, P, device="meta")
        return bool(ops_slstm._may_wait(x, R).allowed)

    assert [may_wait(T, P) for T, P in [(9, 64), (1, 192), (9, 192)]] == [False, False, True]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not may_wait(9, 192)
    assert checked == [ops_slstm._compare_together]


def test_more_rows_than_a_grid_has_are_refused(worker: Any) -> None:
    def obstacle(B: int) -> str:
        x, R = torch.empty(B, 1, 1, 16, device="meta"), torch.empty(4, 1, 16, 16, device="meta")
        return str(worker.slstm_sizes_obstacle(x, R, None))

    assert obstacle(65_535 * 16) == ""
    assert "1048560 rows at most; got 1048561" in obstacle(65_535 * 16 + 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="waits for the interpreter, whose programs wait in vain")
def test_the_self_check_finds_programs_that_wait_in_vain_and_ends(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_slstm, "PATIENCE", 3)
    with pytest.warns(UserWarning, match="cooperative Triton kernels of the sLSTM are not used"):
        assert ops_slstm._disagreement(torch.device("cpu"), torch.float32, True, ((2, 80, True),))
