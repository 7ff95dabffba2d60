"""The mLSTM over a sequence in PyTorch, chunkwise, with a backward pass written by hand for the matrix products.

The gates are small ([B, H, T]): autograd differentiates them, stabiliser and all, so the gradients are exact for every
gate, reset and epsilon. The products are large: `_Chunks` runs all chunks of a sequence together, keeps only its inputs
and the state before each chunk, and computes the rest again in its backward pass.

Letters: N chunks of L tokens; everything is [B, H, N, L, .] here. `a` is a token's log input gate relative to the decay
b up to it, `M` the stabiliser relative to b.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops_common import log_gates
from .states_xlstm import MLSTMState, compute_dtype


class _Weights(NamedTuple):
    """The gates as the products need them.

    Attributes:
        a: log weight of token s before stabilisation, [B, H, N, L].
        M: stabiliser of token t; exp(a_s - M_t) weighs s at t, [B, H, N, L].
        carry: weight of the state before the chunk at each token, [B, H, N, L].
        write: weight of each token in the state after the chunk, [B, H, N, L].
        floor: lower bound of the normaliser, exp(-m), [B, H, N, L].
    """

    a: Tensor
    M: Tensor
    carry: Tensor
    write: Tensor
    floor: Tensor


def _visible(document: Tensor | None, L: int, device: torch.device) -> Tensor:
    """Which tokens s (last dim) a token t sees: [L, L], or [B, 1, N, L, L] with documents."""
    seen = torch.ones(L, L, dtype=torch.bool, device=device).tril()
    return seen if document is None else seen & (document[..., :, None] == document[..., None, :])


def _weigh_tokens(
    log_i: Tensor, log_f: Tensor, m: Tensor, document: Tensor | None, sigmoid_gate: bool
) -> tuple[_Weights, Tensor]:
    """Turn log gates [B, H, N, L] and the first stabiliser [B, H] into weights, and return the last stabiliser.

    `document` counts the resets since the start of each chunk, [B, 1, N, L]; tokens of the same one see each other.
    """
    N, L = log_i.shape[2:]
    b = log_f.cumsum(-1)
    a = log_i - b
    if document is None:
        reached = torch.ones_like(b)  # 1 where the state before the chunk reaches the token
        base = torch.zeros_like(b)  # b just before the first token of the token's document
        highest = a.cummax(-1).values
    else:
        reached = (document == 0).expand_as(b).to(b.dtype)
        is_reset = F.pad(document, (1, 0)).diff(dim=-1) > 0
        base = F.pad(b, (1, -1)).masked_fill(~is_reset, 0.0).cummin(-1).values  # b never rises
        highest = a[..., None, :].masked_fill(~_visible(document, L, b.device), -torch.inf).amax(-1)
    before = []
    for c in range(N):
        before.append(m)
        m = m * reached[:, :, c, -1]
        if not sigmoid_gate:
            m = torch.maximum(highest[:, :, c, -1], m - base[:, :, c, -1]) + b[:, :, c, -1]
    start = torch.stack(before, 2)[..., None] * reached
    M = start - b if sigmoid_gate else torch.maximum(highest, start - base)
    late = a - M[..., -1:]
    if document is not None:
        late = late.masked_fill(document != document[..., -1:], -torch.inf)
    # A very negative m would make exp(-m) infinite, and the gradient of h = x / infinity is 0 * infinity.
    floor = torch.exp((-b - M).clamp(max=math.log(torch.finfo(b.dtype).max) - 3))
    return _Weights(a, M, torch.exp(start - base - M) * reached, torch.exp(late), floor), m


class _Chunks(torch.autograd.Function):
    """q, k, v [B, H, N, L, .], the token weights and the first C, n to h [B, H, N, L, V] and the last C, n."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, a: Tensor, M: Tensor, carry: Tensor, write: Tensor, floor: Tensor,
        C: Tensor, n: Tensor, seen: Tensor, eps: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        C_before, n_before, C, n = _states(k, v, carry[..., -1], write, C, n)
        P = (q @ k.mT).mul_(_decay(a, M, seen))
        qn = P.sum(-1).add_(carry * (q @ n_before[..., None])[..., 0])
        h = torch.matmul(q * carry[..., None], C_before).add_(P @ v)
        normaliser = torch.maximum(qn.abs(), floor).add_(eps)
        h.div_(normaliser[..., None])
        ctx.save_for_backward(q, k, v, a, M, carry, write, floor, C_before, n_before, seen, h, qn, normaliser)
        ctx.set_materialize_grads(False)
        return h, C, n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, dC: Tensor | None, dn: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, a, M, carry, write, floor, C_before, n_before, seen, h, qn, normaliser = ctx.saved_tensors
        dh = torch.zeros_like(h) if dh is None else dh
        dnumerator = dh / normaliser[..., None]
        dnormaliser = -(dnumerator * h).sum(-1)
        by_floor = qn.abs() < floor
        dqn = (dnormaliser * qn.sign()).masked_fill_(by_floor, 0.0)
        dfloor = dnormaliser.masked_fill_(~by_floor, 0.0)

        # Through the state before each chunk.
        dq_carried = (dnumerator @ C_before.mT).addcmul_(dqn[..., None], n_before[..., None, :])
        dcarry = (q * dq_carried).sum(-1)
        q_carried = q * carry[..., None]
        dC_after, dn_after, dC_0, dn_0 = _state_gradients(
            q_carried.mT @ dnumerator, (q_carried.mT @ dqn[..., None])[..., 0], carry[..., -1], dC, dn
        )
        dcarry[..., -1] += (C_before * dC_after).sum((-2, -1)) + (n_before * dn_after).sum(-1)
        dk_written = v @ dC_after.mT + dn_after[..., None, :]
        dwrite = (k * dk_written).sum(-1)
        dv = (k * write[..., None]) @ dC_after

        # Within each chunk.
        D = _decay(a, M, seen)
        dS = (dnumerator @ v.mT).add_(dqn[..., None]).mul_(D)
        P = (q @ k.mT).mul_(D)
        dv += P.mT @ dnumerator
        dq, dk = dS @ k, dS.mT @ q
        dM, da = -(q * dq).sum(-1), (k * dk).sum(-1)
        dq.addcmul_(dq_carried, carry[..., None])
        dk.addcmul_(dk_written, write[..., None])
        return dq, dk, dv, da, dM, dcarry, dwrite, dfloor, dC_0, dn_0, None, None


def _decay(a: Tensor, M: Tensor, seen: Tensor) -> Tensor:
    """Weight of token s (last dim) at token t, [B, H, N, L, L]."""
    return (a[..., None, :] - M[..., None]).masked_fill_(~seen, -torch.inf).exp_()


def _states(k: Tensor, v: Tensor, keep: Tensor, write: Tensor, C: Tensor, n: Tensor) -> tuple[Tensor, ...]:
    """The states before each chunk, [B, H, N, K, V] and [B, H, N, K], and after the last."""
    k = k * write[..., None]
    C_all, n_all = k.mT @ v, k.sum(-2)
    for c in range(k.shape[2]):
        # What the chunk writes gives its place to the state before it.
        C, C_before = torch.addcmul(C_all[:, :, c], keep[:, :, c, None, None], C), C
        n, n_before = torch.addcmul(n_all[:, :, c], keep[:, :, c, None], n), n
        C_all[:, :, c], n_all[:, :, c] = C_before, n_before
    return C_all, n_all, C, n


def _state_gradients(
    dC_all: Tensor, dn_all: Tensor, keep: Tensor, dC: Tensor | None, dn: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of the states after each chunk, from what each chunk read of the state before it, and of the first."""
    dC = torch.zeros_like(dC_all[:, :, 0]) if dC is None else dC
    dn = torch.zeros_like(dn_all[:, :, 0]) if dn is None else dn
    for c in range(dC_all.shape[2] - 1, -1, -1):
        dC, dC_after = torch.addcmul(dC_all[:, :, c], keep[:, :, c, None, None], dC), dC
        dn, dn_after = torch.addcmul(dn_all[:, :, c], keep[:, :, c, None], dn), dn
        dC_all[:, :, c], dn_all[:, :, c] = dC_after, dn_after
    return dC_all, dn_all, dC, dn


def _into_chunks(x: Tensor, N: int, L: int, fill: float = 0.0) -> Tensor:
    """[B, T, H, ...] -> [B, H, N, L, ...], the last chunk filled up."""
    missing = N * L - x.shape[1]
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing), value=fill)
    return x.transpose(1, 2).unflatten(2, (N, L)).contiguous()


def mlstm_chunkwise_torch(
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
    """All chunks together. Arguments and results as in `ops_mlstm.mlstm`; can be differentiated once."""
    B, T, H, K = q.shape
    dtype = compute_dtype(v, state)
    q, k, v, i_tilde, f_tilde = (x.to(dtype) for x in (q, k, v, i_tilde, f_tilde))
    C, n, m = MLSTMState.zeros(B, H, K, v.shape[-1], like=v) if state is None else (x.to(dtype) for x in state)
    N = math.ceil(T / chunk_size)
    L = math.ceil(T / N)  # the last chunk is nearly full
    log_i, log_f = log_gates(i_tilde, f_tilde, input_gate)
    log_i, log_f = _into_chunks(log_i, N, L, -torch.inf), _into_chunks(log_f, N, L)
    document = None
    if reset is not None:
        document = _into_chunks(reset[:, :, None].long(), N, L).cumsum(-1)
    weights, m = _weigh_tokens(log_i, log_f, m, document, input_gate == "sigmoid")
    seen = _visible(document, L, q.device)
    q, k, v = _into_chunks(q, N, L), _into_chunks(k * K**-0.5, N, L), _into_chunks(v, N, L)
    h, C, n = _Chunks.apply(q, k, v, *weights, C, n, seen, eps)
    return h.flatten(2, 3)[:, :, :T].transpose(1, 2), MLSTMState(C, n, m)
