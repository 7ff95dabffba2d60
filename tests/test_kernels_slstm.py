"""The sLSTM's Triton kernels against the definition in float64: on a GPU, or through Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import outputs_and_gradients, slstm_inputs, slstm_state
from tolerances import FLOAT32, assert_identical, assert_same
from torch import Tensor

from modeling_xlstm import SLSTMState, slstm
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


def test_the_self_check_passes(kernel_device: torch.device) -> None:
    assert _compare(kernel_device, torch.float32) == ""
