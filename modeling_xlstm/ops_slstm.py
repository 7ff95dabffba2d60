"""The door to the sLSTM cell: checks shapes, chooses a worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ops_common import (
    bind_shapes,
    check_gates,
    choose_backend,
    disagreement,
    mark_tokens,
    on_device,
    self_check,
    without_autocast,
)
from .ops_slstm_reference import slstm_recurrent
from .ops_slstm_torch import slstm_recurrent_torch, slstm_step_torch
from .states_xlstm import SLSTMState

PATIENCE = 2**18  # looks of a program in the self-check at what the others have counted: a fraction of a second


def slstm(
    i_tilde: Tensor,
    f_tilde: Tensor,
    z_tilde: Tensor,
    o_tilde: Tensor,
    recurrent: Tensor,
    state: SLSTMState | None = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    input_gate: str = "exp",
    output_tanh: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, SLSTMState]:
    """Run the sLSTM cell over T tokens (xLSTM paper, sLSTM forward pass, stabilised, one memory per channel).

    Args:
        i_tilde: input-gate pre-activation without its recurrent part, [B, T, H, P]; natural log of the gate if
            `input_gate` is 'exp', else its logit.
        f_tilde: forget-gate pre-activation without its recurrent part, [B, T, H, P]; logit of the gate, its
            natural log if `input_gate` is 'exp_both'.
        z_tilde: cell-input pre-activation without its recurrent part, [B, T, H, P].
        o_tilde: output-gate pre-activation without its recurrent part, [B, T, H, P]; logit of the gate.
        recurrent: recurrent weights within each head, gates in the order i, f, z, o, [4, H, P, P]; output channel
            first, then the channel of the previous h.
        state: state before the first token; None starts from zeros.
        lengths: number of real tokens of each row, [B]; the tokens after them, any finite numbers, leave the
            state as it is.
        reset: True at the first token of a new document, [B, T]; the state returns to zeros before that token.
        input_gate: 'exp' (paper), 'sigmoid' or 'exp_both', where the forget gate is exponential too.
        output_tanh: whether h is o * tanh(c / n) instead of o * c / n (paper).
        backend: 'auto', 'triton', 'torch' or 'reference'; see docs/kernels.md.

    Returns:
        h: cell output, [B, T, H, P], in the dtype of `i_tilde`; zero after the real tokens of a row.
        state: state after the last real token, float32 or wider; the one passed in is not modified.

    Raises:
        ValueError: shapes, devices or kinds of numbers disagree, T is 0, `lengths` are not from 0 to T,
            the backend or gate is unknown, or the backend asked for cannot run on these tensors.
    """
    given = SLSTMState(None, None, None, None) if state is None else state  # type: ignore[arg-type]
    size = bind_shapes(
        i_tilde=(i_tilde, "B T H P"),
        f_tilde=(f_tilde, "B T H P"),
        z_tilde=(z_tilde, "B T H P"),
        o_tilde=(o_tilde, "B T H P"),
        recurrent=(recurrent, "4 H P P"),
        c=(given.c, "B H P"),
        n=(given.n, "B H P"),
        m=(given.m, "B H P"),
        h=(given.h, "B H P"),
    )
    padded, reset = mark_tokens(size["T"], size["B"], lengths, reset, i_tilde.device)
    check_gates(input_gate)
    variant = (
        "" if input_gate != "exp_both" and not output_tanh else "no kernel has input_gate='exp_both' or output_tanh"
    )
    chosen = choose_backend(backend, i_tilde, lambda: variant or _triton_obstacle(i_tilde, recurrent, state))
    options: dict[str, Any] = {"reset": reset, "input_gate": input_gate}
    if chosen == "torch" and size["T"] == 1 and lengths is None:
        worker: Callable[..., tuple[Tensor, SLSTMState]] = slstm_step_torch
    else:
        worker = _worker(chosen)
        options["lengths"] = lengths
    options |= {"output_tanh": True} if output_tanh else {}
    if chosen == "triton":
        options["together"] = _may_wait(i_tilde, recurrent)
    with without_autocast(i_tilde.device), on_device(i_tilde.device):
        h, state = worker(i_tilde, f_tilde, z_tilde, o_tilde, recurrent, state, **options)
    h = h.to(i_tilde.dtype)
    return h if padded is None else h.masked_fill(padded[..., None, None], 0.0), state


def _worker(name: str) -> Callable[..., tuple[Tensor, SLSTMState]]:
    if name == "triton":
        # Here, because Triton may be absent and takes a second to import.
        from .ops_slstm_triton import slstm_recurrent_triton

        return slstm_recurrent_triton
    return {"torch": slstm_recurrent_torch, "reference": slstm_recurrent}[name]


def _triton_obstacle(x: Tensor, recurrent: Tensor, state: SLSTMState | None) -> str:
    """What keeps Triton's kernels from this call; empty if nothing does."""
    from .ops_slstm_triton import slstm_sizes_obstacle

    return slstm_sizes_obstacle(x, recurrent, state) or self_check(_compare, x.device, x.dtype)


def _may_wait(x: Tensor, recurrent: Tensor) -> Any:
    """Whether the programs of a wide head may wait for each other inside a launch; else they take a launch a token.

    Not where none would, and not in a compiled model: torch leaves out that a launch is cooperative.
    """
    from .ops_slstm_triton import Together, is_shared

    many = x.shape[1] > 1 and is_shared(x, recurrent) and not torch.compiler.is_compiling()
    return Together(many and not self_check(_compare_together, x.device, x.dtype))


def _compare(device: torch.device, dtype: torch.dtype) -> str:
    """How the kernels disagree with the reference: heads of one program, of several, one token; empty if they agree."""
    return _disagreement(device, dtype, False, ((9, 32, True), (3, 144, True), (1, 32, False)))


def _compare_together(device: torch.device, dtype: torch.dtype) -> str:
    """The same for programs that wait for each other; here they give up after a while."""
    return _disagreement(device, dtype, True, ((33, 192, True), (5, 512, True)))


def _disagreement(
    device: torch.device, dtype: torch.dtype, together: bool, shapes: tuple[tuple[int, int, bool], ...]
) -> str:
    from .ops_slstm_triton import Together

    random = torch.Generator().manual_seed(0)

    def run(worker: str, x: Tensor, R: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"lengths": None, "reset": None, "input_gate": "exp"}
        options |= {"together": Together(together, PATIENCE)} if worker == "triton" else {}
        h, after = _worker(worker)(*x.unbind(2), R, SLSTMState(*state), **options)
        return h, *after

    kernels = "cooperative Triton kernels of the sLSTM" if together else "Triton kernels of the sLSTM"
    for T, P, differentiate in shapes:
        x = torch.randn(2, T, 4, 1, P, generator=random, device="cpu")
        R = torch.randn(4, 1, P, P, generator=random, device="cpu") * P**-0.5
        c, n, m, h = torch.randn(4, 2, 1, P, generator=random, device="cpu")
        inputs = [y.to(dtype) for y in (x, R, c, 1 + n.abs(), m, h)]
        if what := disagreement(run, inputs, device, differentiate, kernels):
            return what
    return ""
