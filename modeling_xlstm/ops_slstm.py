"""The door to the sLSTM cell: checks shapes, chooses a worker."""

from __future__ import annotations

from torch import Tensor

from .ops_common import bind_shapes, check_gates, choose_backend, mark_tokens, without_autocast
from .ops_slstm_reference import slstm_recurrent
from .ops_slstm_torch import slstm_recurrent_torch
from .states_xlstm import SLSTMState


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
        lengths: number of real tokens of each row, [B]; the tokens after them leave the state as it is.
        reset: True at the first token of a new document, [B, T]; the state returns to zeros before that token.
        input_gate: 'exp' (paper), 'sigmoid' or 'exp_both', where the forget gate is exponential too.
        output_tanh: whether h is o * tanh(c / n) instead of o * c / n (paper).
        backend: 'auto', 'torch' or 'reference'.

    Returns:
        h: cell output, [B, T, H, P], in the dtype of `i_tilde`; zero after the real tokens of a row.
        state: state after the last real token, float32 or wider; the one passed in is not modified.

    Raises:
        ValueError: shapes, devices or kinds of numbers disagree, T is 0, or the backend or gate is unknown.
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
    chosen = choose_backend(backend, {"torch": True, "reference": True})
    # For one token nothing is faster than the definition.
    worker = slstm_recurrent_torch if chosen == "torch" and size["T"] > 1 else slstm_recurrent
    with without_autocast(i_tilde.device):
        h, state = worker(
            i_tilde,
            f_tilde,
            z_tilde,
            o_tilde,
            recurrent,
            state,
            lengths=lengths,
            reset=reset,
            input_gate=input_gate,
            output_tanh=output_tanh,
        )
    h = h.to(i_tilde.dtype)
    return h if padded is None else h.masked_fill(padded[..., None, None], 0.0), state
