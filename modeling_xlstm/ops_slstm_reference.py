"""The sLSTM in plain PyTorch: the definition, and the judge of every faster worker.

Symbols are those of the xLSTM paper (arXiv:2405.04517): `x_tilde` a pre-activation, `x_prime` a stabilised gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops_common import log_gates
from .states_xlstm import SLSTMState, compute_dtype


def slstm_step(gates: Tensor, state: SLSTMState, input_gate: str, output_tanh: bool) -> SLSTMState:
    """One token: gates [4, B, H, P] in the order i, f, z, o, recurrent part included.

    A cell that has seen no token (n = 0) forgets nothing, so its forget gate is closed whatever it says: this is what
    keeps the first token exact for any pre-activation, row by row.
    """
    i_tilde, f_tilde, z_tilde, o_tilde = gates
    log_i, log_f = log_gates(i_tilde, f_tilde, input_gate)
    log_f = (log_f + state.m).masked_fill(state.n == 0, -torch.inf)
    m = torch.maximum(log_i, log_f)
    i_prime, f_prime = torch.exp(log_i - m), torch.exp(log_f - m)
    c = f_prime * state.c + i_prime * torch.tanh(z_tilde)
    n = f_prime * state.n + i_prime
    return SLSTMState(c, n, m, torch.sigmoid(o_tilde) * (torch.tanh(c / n) if output_tanh else c / n))


def slstm_recurrent(
    i_tilde: Tensor,
    f_tilde: Tensor,
    z_tilde: Tensor,
    o_tilde: Tensor,
    recurrent: Tensor,
    state: SLSTMState | None,
    *,
    lengths: Tensor | None,
    reset: Tensor | None,
    input_gate: str,
    output_tanh: bool = False,
) -> tuple[Tensor, SLSTMState]:
    """One token after the other. Arguments and results as in `ops_slstm.slstm`."""
    dtype = compute_dtype(i_tilde, state)
    gates = torch.stack([i_tilde, f_tilde, z_tilde, o_tilde]).to(dtype)  # [4, B, T, H, P]
    R = recurrent.to(dtype).mT  # [4, H, P in, P out]
    _, B, T, H, P = gates.shape
    state = SLSTMState.zeros(B, H, P, like=gates) if state is None else SLSTMState(*(x.to(dtype) for x in state))
    h = []
    for t in range(T):
        if reset is not None:
            state = SLSTMState(*(x * ~reset[:, t, None, None] for x in state))
        recurrent_part = (state.h.transpose(0, 1) @ R).transpose(1, 2)  # [4, B, H, P]
        state_next = slstm_step(gates[:, :, t] + recurrent_part, state, input_gate, output_tanh)
        if lengths is not None:
            # A padded token does not exist: the state, output included, is carried past it.
            real = (t < lengths)[:, None, None]
            state_next = SLSTMState(*(torch.where(real, new, old) for new, old in zip(state_next, state, strict=True)))
        state = state_next
        h.append(state.h)
    return torch.stack(h, 1), state
