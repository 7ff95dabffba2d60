"""The mLSTM in plain PyTorch: the definition (recurrent) and two forms that equal it (parallel, chunkwise).

These functions judge every faster worker. Symbols are those of the xLSTM paper (arXiv:2405.04517): `x_tilde` a
pre-activation, `x_prime` a stabilised gate. `log_i` and `log_f` are natural logs of the gates.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops_common import log_gates
from .states_xlstm import MLSTMState, compute_dtype


def _widen(
    q: Tensor, k: Tensor, v: Tensor, i_tilde: Tensor, f_tilde: Tensor, state: MLSTMState | None, input_gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, MLSTMState]:
    """Everything in the dtype of the states, keys scaled, gates in the log domain."""
    B, _, H, K = q.shape
    dtype = compute_dtype(v, state)
    q, k, v, i_tilde, f_tilde = (x.to(dtype) for x in (q, k, v, i_tilde, f_tilde))
    V = v.shape[-1]
    state = MLSTMState.zeros(B, H, K, V, like=v) if state is None else MLSTMState(*(x.to(dtype) for x in state))
    return q, k * K**-0.5, v, *log_gates(i_tilde, f_tilde, input_gate), state


def _normalise(numerator: Tensor, qn: Tensor, m: Tensor, eps: float) -> Tensor:
    """h = numerator / (max(|q n|, exp(-m)) + eps).

    A cell whose gates stayed closed has a very negative `m`: the bound keeps exp(-m) finite, so that h is zero to
    rounding and its gradient is not inf * 0.
    """
    bound = math.log(torch.finfo(m.dtype).max) - 3
    floor = torch.exp((-m).clamp(max=bound))
    return numerator / (torch.maximum(qn.abs(), floor) + eps)[..., None]


def mlstm_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i_tilde: Tensor,
    f_tilde: Tensor,
    state: MLSTMState | None,
    *,
    reset: Tensor | None = None,
    eps: float,
    input_gate: str,
) -> tuple[Tensor, MLSTMState]:
    """The definition: one token after the other. Arguments and results as in `ops_mlstm.mlstm`."""
    q, k, v, log_i, log_f, state = _widen(q, k, v, i_tilde, f_tilde, state, input_gate)
    C, n, m = state
    h = []
    for t in range(q.shape[1]):
        if reset is not None:
            keep = ~reset[:, t, None]
            C, n, m = C * keep[..., None, None], n * keep[..., None], m * keep
        k_t, v_t = k[:, t], v[:, t]
        # A sigmoid gate cannot exceed 1, so that cell needs no stabiliser: m stays where it started.
        m_next = m if input_gate == "sigmoid" else torch.maximum(log_f[:, t] + m, log_i[:, t])
        i_prime, f_prime = torch.exp(log_i[:, t] - m_next), torch.exp(log_f[:, t] + m - m_next)
        C = f_prime[..., None, None] * C + i_prime[..., None, None] * (k_t[..., :, None] * v_t[..., None, :])
        n, m = f_prime[..., None] * n + i_prime[..., None] * k_t, m_next
        numerator = (q[:, t, :, None, :] @ C).squeeze(-2)
        h.append(_normalise(numerator, (q[:, t] * n).sum(-1), m, eps))
    return torch.stack(h, 1), MLSTMState(C, n, m)


def _log_weights(log_i: Tensor, log_f: Tensor, m: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """How much each token still weighs at every later one, in the log domain.

    Returns:
        log_D: weight of token s (last dim) at token t, [B, H, T, T]; -inf where s does not reach t.
        log_carry: exp(m) of the state the document of token t began with, as it is at t, [B, H, T].
        carried: whether the state passed in reaches token t, [B, 1, T]; None when it reaches them all.
    """
    T = log_i.shape[-1]
    b = log_f.cumsum(-1)
    reached = torch.ones(T, T, dtype=torch.bool, device=b.device).tril()
    if reset is None:
        log_carry, carried = b + m[..., None], None
    else:
        document = reset.cumsum(-1)[:, None]  # [B, 1, T]
        reached = reached & (document[..., :, None] == document[..., None, :])
        carried = document == 0
        # b never rises, so the running minimum over reset tokens is the b just before the latest reset.
        before = F.pad(b, (1, -1)).masked_fill(~reset[:, None], 0.0).cummin(-1).values
        log_carry = b - before + m[..., None] * carried
    log_D = b[..., :, None] - b[..., None, :] + log_i[..., None, :]
    return log_D.masked_fill(~reached, -torch.inf), log_carry, carried


def mlstm_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i_tilde: Tensor,
    f_tilde: Tensor,
    state: MLSTMState | None,
    *,
    reset: Tensor | None = None,
    eps: float,
    input_gate: str,
) -> tuple[Tensor, MLSTMState]:
    """All tokens at once, memory T x T. Arguments and results as in `ops_mlstm.mlstm`."""
    q, k, v, log_i, log_f, state = _widen(q, k, v, i_tilde, f_tilde, state, input_gate)
    q, k, v, log_i, log_f = (x.transpose(1, 2) for x in (q, k, v, log_i, log_f))  # [B, H, T, .]
    C, n, m_0 = state
    log_D, log_carry, carried = _log_weights(log_i, log_f, m_0, reset)
    if input_gate == "sigmoid":
        m = m_0[..., None].expand_as(log_carry) if carried is None else m_0[..., None] * carried
    else:
        m = torch.maximum(log_carry, log_D.amax(-1))
    D, carry = torch.exp(log_D - m[..., None]), torch.exp(log_carry - m)
    if carried is not None:
        carry = carry * carried

    S = (q @ k.mT) * D
    numerator = carry[..., None] * (q @ C) + S @ v
    qn = carry * (q @ n[..., None]).squeeze(-1) + S.sum(-1)
    h = _normalise(numerator, qn, m, eps).transpose(1, 2)

    weighted_k = k * D[..., -1, :, None]
    last = carry[..., -1, None]
    C = last[..., None] * C + weighted_k.mT @ v
    return h, MLSTMState(C, last * n + weighted_k.sum(-2), m[..., -1])


def mlstm_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i_tilde: Tensor,
    f_tilde: Tensor,
    state: MLSTMState | None,
    *,
    reset: Tensor | None = None,
    chunk_size: int,
    eps: float,
    input_gate: str,
) -> tuple[Tensor, MLSTMState]:
    """Parallel within chunks, recurrent between them. Arguments and results as in `ops_mlstm.mlstm`."""
    outputs = []
    for start in range(0, q.shape[1], chunk_size):
        chunk = slice(start, start + chunk_size)
        h, state = mlstm_parallel(
            q[:, chunk],
            k[:, chunk],
            v[:, chunk],
            i_tilde[:, chunk],
            f_tilde[:, chunk],
            state,
            reset=None if reset is None else reset[:, chunk],
            eps=eps,
            input_gate=input_gate,
        )
        outputs.append(h)
    assert state is not None
    return torch.cat(outputs, 1), state
