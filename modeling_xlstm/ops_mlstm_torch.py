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


def _weigh(x: Tensor, seen: Tensor | None = None) -> Tensor:
    """exp(x) where `seen`, else 0, and 0 below e^-60, which is less than rounding beside the weights that count.

    Products of numbers that are too small to be normal take a hundred times as long, and so does exp of infinities.
    """
    counts = x > -60.0
    highest = math.log(torch.finfo(x.dtype).max) - 3  # of what is not seen
    return torch.where(counts if seen is None else counts.logical_and_(seen), x.clamp(-60.0, highest).exp(), 0.0)


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
    L = log_i.shape[-1]
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
    cut = None if document is None else reached[..., -1]
    before, m = _stabilisers(m, highest[..., -1] + b[..., -1], b[..., -1] - base[..., -1], cut, sigmoid_gate)
    start = before[..., None] * reached
    M = start - b if sigmoid_gate else torch.maximum(highest, start - base)
    late = a - M[..., -1:]
    if document is not None:
        late = late.masked_fill(document != document[..., -1:], -torch.inf)
    # A very negative m would make exp(-m) infinite, and the gradient of h = x / infinity is 0 * infinity.
    floor = torch.exp((-b - M).clamp(max=math.log(torch.finfo(b.dtype).max) - 3))
    return _Weights(a, M, _weigh(start - base - M) * reached, _weigh(late), floor), m


def _stabilisers(
    m: Tensor, own: Tensor, decay: Tensor, cut: Tensor | None, sigmoid_gate: bool
) -> tuple[Tensor, Tensor]:
    """The stabilisers before each chunk, [B, H, N], and after the last: m = max(own, m + decay) from chunk to chunk.

    `own` is the highest log weight of a chunk's own tokens at its end, `decay` the log weight of what was before it,
    `cut` 0 where a document that began in the chunk cut that off, so that m starts from 0 there.
    """
    if sigmoid_gate:
        kept = m[..., None] * (torch.ones_like(own) if cut is None else cut).cumprod(-1)
        return torch.cat([m[..., None], kept[..., :-1]], -1), kept[..., -1]
    if cut is None:
        # Sums over a whole sequence lose digits that differences between neighbours need.
        total = F.pad(decay.double().cumsum(-1), (1, 0))
        highest = torch.cat([m[..., None].double(), own.double() - total[..., 1:]], -1).cummax(-1).values
        kept = (highest + total).to(m.dtype)
        return kept[..., :-1], kept[..., -1]
    before = []
    for own_c, decay_c, cut_c in zip(own.unbind(-1), decay.unbind(-1), cut.unbind(-1), strict=True):
        before.append(m)
        m = torch.maximum(own_c, m * cut_c + decay_c)
    return torch.stack(before, -1), m


class _Chunks(torch.autograd.Function):
    """q, k, v [B, H, N, L, .], the token weights and the first C, n to h [B, H, N, L, V] and the last C, n."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, a: Tensor, M: Tensor, carry: Tensor, write: Tensor, floor: Tensor,
        C: Tensor, n: Tensor, seen: Tensor, eps: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        kw = k * write[..., None]
        C_before, C = _scan(kw.mT @ v, carry[..., -1], C)
        n_before, n = _scan(kw.sum(-2), carry[..., -1], n)
        D = _weigh(a[..., None, :] - M[..., None], seen)
        P = (q @ k.mT).mul_(D)
        qn = P.sum(-1).add_(carry * (q @ n_before[..., None])[..., 0])
        h = _add_product(torch.matmul(q * carry[..., None], C_before), P, v)
        normaliser = torch.maximum(qn.abs(), floor).add_(eps)
        h.div_(normaliser[..., None])
        ctx.save_for_backward(q, k, v, D, P, carry, write, floor, C_before, n_before, h, qn, normaliser)
        ctx.set_materialize_grads(False)
        return h, C, n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, dC: Tensor | None, dn: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, D, P, carry, write, floor, C_before, n_before, h, qn, normaliser = ctx.saved_tensors
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
        keep = carry[..., -1]
        dC = torch.zeros_like(C_before[:, :, 0]) if dC is None else dC
        dn = torch.zeros_like(n_before[:, :, 0]) if dn is None else dn
        dC_after, dC_0 = _scan(q_carried.mT @ dnumerator, keep, dC, reverse=True)
        dn_after, dn_0 = _scan((q_carried.mT @ dqn[..., None])[..., 0], keep, dn, reverse=True)
        dcarry[..., -1] += (C_before * dC_after).sum((-2, -1)) + (n_before * dn_after).sum(-1)
        dk_written = (v @ dC_after.mT).add_(dn_after[..., None, :])
        dwrite = (k * dk_written).sum(-1)

        # Within each chunk.
        dv = _add_product((k * write[..., None]) @ dC_after, P.mT, dnumerator)
        dS = (dnumerator @ v.mT).add_(dqn[..., None]).mul_(D)
        dq, dk = dS @ k, dS.mT @ q
        dM, da = -(q * dq).sum(-1), (k * dk).sum(-1)
        dq.addcmul_(dq_carried, carry[..., None])
        dk.addcmul_(dk_written, write[..., None])
        return dq, dk, dv, da, dM, dcarry, dwrite, dfloor, dC_0, dn_0, None, None


def _add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a @ b, in place."""
    x.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))
    return x


def _scan(x: Tensor, keep: Tensor, first: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """The values of s before each chunk, and the last, of s = keep s + x from chunk to chunk.

    A group of chunks is one matrix product with their decays, for many small steps cost more than it.

    Args:
        x: what each chunk adds, [B, H, N, ...].
        keep: what each leaves of the value before it, [B, H, N].
        first: the value before all, [B, H, ...].
        reverse: from the last chunk to the first.
    """
    shape = x.shape
    x, s = x.flatten(3), first.flatten(2)[:, :, None]
    befores = []
    log_keep = keep.log()
    for part in _groups(shape[2], reverse):
        weights = _scan_weights(log_keep[:, :, part], reverse)
        values = (weights[..., 1:] @ x[:, :, part]).addcmul_(weights[..., :1], s)
        values, s = (values[:, :, 1:], values[:, :, :1]) if reverse else (values[:, :, :-1], values[:, :, -1:])
        befores.append(values)
    before = torch.cat(befores[::-1] if reverse else befores, 2)
    return before.view(shape), s.reshape(first.shape)


def _groups(N: int, reverse: bool) -> list[slice]:
    """At most 16 neighbours at a time, in the order of the scan."""
    groups = [slice(start, min(start + 16, N)) for start in range(0, N, 16)]
    return groups[::-1] if reverse else groups


def _scan_weights(log_keep: Tensor, reverse: bool) -> Tensor:
    """What the first value (column 0) and each addition count in each value, the last one too: [B, H, g + 1, g + 1]."""
    if reverse:
        weights = _scan_weights(log_keep.flip(-1), False)
        return torch.cat([weights[..., :1], weights[..., 1:].flip(-1)], -1).flip(-2)
    g = log_keep.shape[-1]
    later = torch.ones(g, g + 1, dtype=torch.bool, device=log_keep.device).tril()
    total = torch.where(later, log_keep[..., None], 0.0).cumsum(-2)
    return _weigh(F.pad(total, (0, 0, 1, 0))).tril_()


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
