"""The mLSTM over a sequence in PyTorch, chunkwise, with a backward pass written by hand for the matrix products.

The gates are small ([B, T, H]): autograd differentiates them, stabiliser and all, so the gradients are exact for every
gate, reset and epsilon. The products are large: `_Chunks` takes some chunks together, few enough for the cache,
keeps only its inputs and the state before each chunk, and computes the rest again in its backward pass.

Letters: N chunks of L tokens, of which a block holds G. Gates are [H, B, N, L], in `_Chunks` [N, H, B, L]. `a` is a
token's log input gate relative to the decay b up to it, `M` the stabiliser relative to b.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
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
        a: log weight of token s before stabilisation, [H, B, N, L].
        M: stabiliser of token t; exp(a_s - M_t) weighs s at t, [H, B, N, L].
        carry: weight of the state before the chunk at each token, [H, B, N, L].
        write: weight of each token in the state after the chunk, [H, B, N, L].
        floor: lower bound of the normaliser, exp(-m), [H, B, N, L].
    """

    a: Tensor
    M: Tensor
    carry: Tensor
    write: Tensor
    floor: Tensor


def _weigh(x: Tensor, inplace: bool = False) -> Tensor:
    """exp(x), but 0 below e^-60, which is less than rounding beside the weights that count.

    Products of numbers that are too small to be normal take a hundred times as long, and so does exp of infinities.
    """
    highest = math.log(torch.finfo(x.dtype).max) - 3  # only what is masked afterwards may be above
    x = x.clamp_(-60.0, highest).exp_() if inplace else x.clamp(-60.0, highest).exp()
    return F.threshold(x, math.exp(-59.9), 0.0, inplace)


def _visible(document: Tensor | None, L: int, device: torch.device) -> Tensor:
    """Which tokens s (last dim) a token t sees: [L, L], or [1, B, N, L, L] with documents."""
    seen = torch.ones(L, L, dtype=torch.bool, device=device).tril()
    return seen if document is None else seen & (document[..., :, None] == document[..., None, :])


def _weigh_tokens(
    log_i: Tensor, log_f: Tensor, m: Tensor, document: Tensor | None, sigmoid_gate: bool
) -> tuple[_Weights, Tensor]:
    """Turn log gates [H, B, N, L] and the first stabiliser [H, B] into weights, and return the last stabiliser.

    `document` counts the resets since the start of each chunk, [1, B, N, L]; tokens of the same one see each other.
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
    return _Weights(a, M, _weigh(start - base - M) * reached, _weigh(late), _floor(b + M)), m


HIGHEST = {dtype: math.log(torch.finfo(dtype).max) - 3 for dtype in (torch.float32, torch.float64)}


def _floor(m: Tensor) -> Tensor:
    """exp(-m), bounded: of a very negative m it would be infinite, and the gradient of x / infinity 0 * infinity."""
    return (-m).clamp(max=HIGHEST[m.dtype]).exp_()


def _stabilisers(
    m: Tensor, own: Tensor, decay: Tensor, cut: Tensor | None, sigmoid_gate: bool
) -> tuple[Tensor, Tensor]:
    """The stabilisers before each chunk, [H, B, N], and after the last: m = max(own, m + decay) from chunk to chunk.

    `own` is the highest log weight of a chunk's own tokens at its end, `decay` the log weight of what was before it,
    `cut` 0 where a document that began in the chunk cut that off, so that m starts from 0 there.
    """
    if sigmoid_gate:
        kept = m[..., None] * (torch.ones_like(own) if cut is None else cut).cumprod(-1)
        return torch.cat([m[..., None], kept[..., :-1]], -1), kept[..., -1]
    if cut is None:
        # Sums over a whole sequence lose digits that differences between neighbours need; Apple's GPUs have no more.
        wide = m.dtype if m.device.type == "mps" else torch.float64
        total = F.pad(decay.to(wide).cumsum(-1), (1, 0))
        highest = torch.cat([m[..., None].to(wide), own.to(wide) - total[..., 1:]], -1).cummax(-1).values
        kept = (highest + total).to(m.dtype)
        return kept[..., :-1], kept[..., -1]
    before = []
    for own_c, decay_c, cut_c in zip(own.unbind(-1), decay.unbind(-1), cut.unbind(-1), strict=True):
        before.append(m)
        m = torch.maximum(own_c, m * cut_c + decay_c)
    return torch.stack(before, -1), m


BLOCK = 2**19  # numbers of the largest tensor of a block, so that what is made is used while it is in the cache


class _Part(NamedTuple):
    """Some heads and rows; their chunks are cut into blocks, which are computed together.

    The views of all blocks are made at once, for in a loop they would take as long as the operations.

    Attributes:
        heads: several only with all rows.
        rows: of the batch.
        sizes: chunks of each block; several only with all heads and rows.
        L: tokens of a chunk.
        rest: tokens of a last chunk that has fewer and is a block of its own; 0 if there is none.
    """

    heads: slice
    rows: slice
    sizes: list[int]
    L: int
    rest: int

    def tokens(self, x: Tensor) -> list[Tensor]:
        """Views: [B, T, H, .] -> [chunks, heads, rows, L, .] of each block."""
        whole, rest = x[self.rows, :, self.heads].split([x.shape[1] - self.rest, self.rest], 1)
        by_chunk = whole.unflatten(1, (-1, self.L)).permute(1, 3, 0, 2, 4)
        return [*by_chunk.split(self.sizes), *([rest.permute(2, 0, 1, 3)[None]] if self.rest else [])]

    def weights(self, x: Tensor) -> list[Tensor]:
        """Views: [., N, H, B, L] -> [., chunks, heads, rows, L] of each block."""
        x = x[:, :, self.heads, self.rows]
        if not self.rest:
            return list(x.split(self.sizes, 1))
        *whole, rest = x.split([*self.sizes, 1], 1)
        return [*whole, rest[..., : self.rest]]

    def seen(self, x: Tensor) -> list[Tensor]:
        """[L, L] or [N, 1, B, L, L], see `_visible`, -> [L, L] or [chunks, heads, rows, L, L] of each block."""
        if x.dim() == 2:
            return [x] * len(self.sizes) + ([x[: self.rest, : self.rest]] if self.rest else [])
        heads = len(range(self.heads.start, self.heads.stop))
        views = x[:, :, self.rows].expand(-1, heads, -1, -1, -1).split([*self.sizes, *([1] if self.rest else [])])
        return [*views[: len(self.sizes)], *(rest[..., : self.rest, : self.rest] for rest in views[len(self.sizes) :])]

    def states(self, x: Tensor) -> Tensor:
        """A view: [., H, B, ...] -> [., heads * rows, ...]."""
        return x[:, self.heads, self.rows].flatten(1, 2)


def _cut(size: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _parts(shape: torch.Size, T: int, widths: tuple[int, int]) -> list[_Part]:
    """Cut T tokens in chunks [N, H, B, L] such that no scores and no tokens of a block are larger than `BLOCK`.

    Its states are at most twice as large, for chunks are long where heads are wide.
    """
    _, H, B, L = shape
    room = max(1, BLOCK // (L * max(L, *widths)))
    sizes = [part.stop - part.start for part in _cut(T // L, room // (H * B))]
    return [_Part(*some, sizes, L, T % L) for some in itertools.product(_cut(H, room // B), _cut(B, room))]


class _Chunks(torch.autograd.Function):
    """q, k, v [B, T, H, .], the five weights [5, N, H, B, L] and the first C, n to h [B, T, H, V] and the last C, n."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, C: Tensor, n: Tensor, seen: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        h, normalisers = weights.new_empty(v.shape), torch.empty_like(weights[:2])
        parts = _parts(weights.shape[1:], q.shape[1], (q.shape[-1], v.shape[-1]))
        saving = any(ctx.needs_input_grad)
        room = 1 + (weights.shape[1] if saving else parts[0].sizes[0])
        running = [_by_head(x) for x in (C, n)]
        states = [x.new_empty(room, *x.shape[1:]) for x in running]
        for part in parts:
            ends = [part.states(x)[0] for x in running]
            before, at = ends, 0
            own = [part.states(x) for x in states]
            views = part.weights(weights), part.seen(seen), *map(part.tokens, (q, k, v))
            results = zip(part.tokens(h), *([part.weights(normalisers)] if saving else []), strict=True)
            for (w, seen_block, *tokens), result in zip(zip(*views, strict=True), results, strict=True):
                around = [x[at : at + len(w[0]) + 1] for x in own]
                if not (saving and at):
                    _copy([x[0] for x in around], before)
                _read_and_write(tokens, w, seen_block, around, result, eps)
                before = [x[-1] for x in around]
                at += len(w[0]) if saving else 0
            _copy(ends, before)
        ctx.save_for_backward(q, k, v, weights, seen, h, normalisers, *states)
        ctx.set_materialize_grads(False)
        return h, *(x[0].transpose(0, 1) for x in running)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, dC: Tensor | None, dn: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, weights, seen, h, normalisers, *states = ctx.saved_tensors
        dh = torch.zeros_like(h) if dh is None else dh
        dqkv = [x.new_empty(x.shape) for x in (q, k, v)]
        dweights = torch.zeros_like(weights)  # zeros, for the last chunk may have fewer tokens
        running = [
            torch.zeros_like(x[:1]) if dx is None else _by_head(dx) for dx, x in zip((dC, dn), states, strict=True)
        ]
        parts = _parts(weights.shape[1:], q.shape[1], (q.shape[-1], v.shape[-1]))
        dstates = [x.new_empty(parts[0].sizes[0] + 1, *x.shape[1:]) for x in running]
        for part in parts:
            ends = [part.states(x)[0] for x in running]
            after, at = ends, weights.shape[1]
            saved, own = ([part.states(x) for x in xs] for xs in (states, dstates))
            views = *map(part.weights, (weights, normalisers)), part.seen(seen), *map(part.tokens, (q, k, v, h, dh))
            results = zip(*map(part.tokens, dqkv), part.weights(dweights), strict=True)
            blocks = list(zip(zip(*views, strict=True), results, strict=True))
            for (w, normaliser, seen_block, *tokens), result in reversed(blocks):
                chunks = len(w[0])
                around = [x[: chunks + 1] for x in own]
                _copy([x[-1] for x in around], after)
                at -= chunks
                before = [x[at : at + chunks] for x in saved]
                _differentiate(tokens, w, normaliser, seen_block, before, around, result)
                after = [x[0] for x in around]
            _copy(ends, after)
        return *dqkv, dweights, *(x[0].transpose(0, 1) for x in running), None, None


def _by_head(x: Tensor) -> Tensor:
    """A copy: a state [B, H, ...] -> [1, H, B, ...]."""
    return x.transpose(0, 1)[None].clone(memory_format=torch.contiguous_format)


def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value.view(target.shape))


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[chunks, heads, rows, ...] -> [G, ...], contiguous."""
    return x.new_empty(x.shape, dtype=dtype).copy_(x).flatten(0, 2)


def _weights(x: Tensor) -> _Weights:
    """[5, chunks, heads, rows, L] -> [G, L] each."""
    return _Weights(*x.flatten(1, 3).unbind())


def _decays(w: _Weights, seen: Tensor) -> Tensor:
    """Weight of token s at token t, [G, L, L]."""
    seen = (seen if seen.dim() == 2 else seen.flatten(0, 2)).to(w.a.dtype)  # products with booleans are slow
    return _weigh(w.a[:, None, :] - w.M[..., None], inplace=True).mul_(seen)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * q @ k^T."""
    return torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=scale)


def _read_and_write(
    tokens: list[Tensor], weights: Tensor, seen: Tensor, states: list[Tensor], results: tuple[Tensor, ...], eps: float
) -> None:
    """The forward pass of one block.

    Args:
        tokens: q, k, v, [chunks, heads, rows, L, .].
        weights: [5, chunks, heads, rows, L].
        seen: see `_Part.seen`.
        states: C and n, [chunks + 1, heads * rows, ...]; the first are given, the others are written.
        results: where h is written, as v, and qn and the normaliser, [2, chunks, heads, rows, L].
        eps: added to the normaliser.
    """
    q, k, v = (_flat(x, weights.dtype) for x in tokens)
    w = _weights(weights)
    scale, keep = q.shape[-1] ** -0.5, w.carry[:, -1]
    C, n = states
    kw = k * (w.write * scale)[..., None]
    torch.bmm(kw.mT, v, out=C[1:].flatten(0, 1))
    torch.sum(kw, 1, out=n[1:].flatten(0, 1))
    _scan(C[1:], keep, C[:-1])
    _scan(n[1:], keep, n[:-1])
    P = _scores(q, k, scale).mul_(_decays(w, seen))
    q_carried = q * w.carry[..., None]
    qn = P.sum(-1).add_((q_carried * n[:-1].view(-1, 1, q.shape[-1])).sum(-1))
    numerator = torch.bmm(q_carried, C[:-1].flatten(0, 1)).baddbmm_(P, v)
    h, *normalisers = results
    normaliser = torch.maximum(qn.abs(), w.floor).add_(eps)
    _copy(normalisers, [torch.stack([qn, normaliser])] * len(normalisers))
    torch.div(numerator.view(h.shape), normaliser.view(*h.shape[:-1], 1), out=h)


def _differentiate(
    tokens: list[Tensor], weights: Tensor, normalisers: Tensor, seen: Tensor, states: list[Tensor],
    dstates: list[Tensor], results: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """The backward pass of one block.

    Args:
        tokens: q, k, v, h and dh, [chunks, heads, rows, L, .].
        weights: [5, chunks, heads, rows, L].
        normalisers: qn and the normaliser, [2, chunks, heads, rows, L].
        seen: see `_Part.seen`.
        states: C and n before each chunk, [chunks, heads * rows, ...].
        dstates: gradients of C and n, [chunks + 1, heads * rows, ...]; the last are given, the others are written.
        results: where the gradients of q, k, v, as they, and of the weights, [5, chunks, heads, rows, L], are written.
    """
    q, k, v = (_flat(x, weights.dtype) for x in tokens[:3])
    w, qn = _weights(weights), normalisers[0].flatten(0, 2)
    (C, n), (dC, dn) = (x.flatten(0, 1) for x in states), dstates
    scale, keep = q.shape[-1] ** -0.5, w.carry[:, -1]
    dnumerator = torch.div(tokens[4], normalisers[1, ..., None], out=v.new_empty(tokens[4].shape))
    dnormaliser = (dnumerator * tokens[3]).sum(-1).view_as(qn).neg_()
    dnumerator = dnumerator.flatten(0, 2)
    by_floor = qn.abs() < w.floor
    dqn = (dnormaliser * qn.sign()).masked_fill_(by_floor, 0.0)
    dfloor = dnormaliser.masked_fill_(~by_floor, 0.0)

    # Through the state before each chunk.
    q_carried = q * w.carry[..., None]
    torch.bmm(q_carried.mT, dnumerator, out=dC[:-1].flatten(0, 1))
    torch.sum(q_carried.mul_(dqn[..., None]), 1, out=dn[:-1].flatten(0, 1))
    _scan(dC[:-1], keep, dC[1:], reverse=True)
    _scan(dn[:-1], keep, dn[1:], reverse=True)
    dC, dn = (x[1:].flatten(0, 1) for x in dstates)
    dq_carried = torch.bmm(dnumerator, C.mT).addcmul_(dqn[..., None], n[:, None, :])
    dcarry = (q * dq_carried).sum(-1)
    dcarry[:, -1] += (C * dC).flatten(1).sum(1).add_((n * dn).sum(1))
    dk_written = torch.bmm(v, dC.mT).add_(dn[:, None, :])
    dwrite = (k * dk_written).sum(-1).mul_(scale)

    # Within each chunk.
    D = _decays(w, seen)
    P = _scores(q, k, scale).mul_(D)
    write = (w.write * scale)[..., None]
    dv = torch.bmm(k * write, dC).baddbmm_(P.mT, dnumerator)
    dP = torch.bmm(dnumerator, v.mT).add_(dqn[..., None])
    dlog = P.mul_(dP)
    dM, da = dlog.sum(-1).neg_(), dlog.sum(1)
    dS = dP.mul_(D.mul_(scale))
    _add(torch.bmm(dS, k), dq_carried, w.carry[..., None], results[0])
    _add(torch.bmm(dS.mT, q), dk_written, write, results[1])
    _copy(results[2:], [dv, torch.stack([da, dM, dcarry, dwrite, dfloor])])


def _add(x: Tensor, y: Tensor, weight: Tensor, result: Tensor) -> None:
    """x + weight y of [G, L, .] into a view of tokens."""
    torch.addcmul(*(z.view(*result.shape[:-1], -1) for z in (x, y, weight)), out=result)


def _scan(states: Tensor, keep: Tensor, before: Tensor, reverse: bool = False) -> None:
    """s = keep s + x from chunk to chunk, in place, while the chunks' x are still in the cache.

    Args:
        states: x of each chunk, turned into s, [chunks, heads * rows, ...].
        keep: what each leaves of the s before it, [chunks * heads * rows].
        before: s before each, [chunks, heads * rows, ...]: the same memory as `states`, one chunk earlier.
        reverse: from the last chunk to the first, so that before is after.
    """
    keep = keep.view(*states.shape[:2], *(1,) * (states.dim() - 2))
    steps = zip(states.unbind(), keep.unbind(), before.unbind(), strict=True)
    for s, keep_c, s_before in reversed(list(steps)) if reverse else steps:
        s.addcmul_(keep_c, s_before)


def _whole_chunks(x: Tensor, missing: int, fill: float = 0.0) -> Tensor:
    """[B, T, ...] -> [B, T + missing, ...]."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing), value=fill) if missing else x


@torch.compiler.disable  # a compiler would unroll the loop over chunks, for minutes
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
    """All chunks of a block together. Arguments and results as in `ops_mlstm.mlstm`; can be differentiated once."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    dtype = compute_dtype(v, state)
    i_tilde, f_tilde = i_tilde.to(dtype), f_tilde.to(dtype)
    C, n, m = MLSTMState.zeros(B, H, K, V, like=i_tilde) if state is None else (x.to(dtype) for x in state)
    # Of wide heads the states between short chunks would take more memory and time than the scores in longer ones.
    while 4 * chunk_size**2 < K * V:
        chunk_size *= 2
    N = math.ceil(T / chunk_size)
    L = math.ceil(T / N)  # the last chunk is nearly full
    missing = N * L - T
    log_i, log_f = log_gates(i_tilde, f_tilde, input_gate)
    gates = (_whole_chunks(log_i, missing, -torch.inf), _whole_chunks(log_f, missing))
    log_i, log_f = (x.permute(2, 0, 1).unflatten(-1, (N, L)).contiguous() for x in gates)
    document = None
    if reset is not None:
        document = _whole_chunks(reset.long(), missing).unflatten(1, (N, L)).cumsum(-1)[None]
    weights, m = _weigh_tokens(log_i, log_f, m.T, document, input_gate == "sigmoid")
    seen = _visible(document, L, q.device)
    seen = seen if document is None else seen.permute(2, 0, 1, 3, 4)
    by_chunk = torch.stack(weights).permute(0, 3, 1, 2, 4).contiguous()
    h, C, n = _Chunks.apply(q, k, v, by_chunk, C, n, seen, eps)
    return h, MLSTMState(C, n, m.T)


def mlstm_step_torch(
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
    """One token in few operations, C read and written once. Arguments and results as in `ops_mlstm.mlstm`."""
    B, _, H, K = q.shape
    V, rows = v.shape[-1], B * H
    dtype = compute_dtype(v, state)
    state = MLSTMState.zeros(B, H, K, V, like=v) if state is None else state
    given = (q, k, v, i_tilde, f_tilde, *state)
    q, k, v, i_tilde, f_tilde, C, n, m = (x if x.dtype is dtype else x.to(dtype) for x in given)
    if reset is not None:
        C, n, m = (x * ~reset.view(B, *(1,) * (x.dim() - 1)) for x in (C, n, m))
    # One row per head: views, for every operation costs more than the numbers it works on.
    m = m.reshape(rows, 1, 1)
    log_i, log_f = log_gates(i_tilde.reshape(rows, 1, 1), f_tilde.reshape(rows, 1, 1), input_gate)
    log_f = log_f + m
    m_next = m if input_gate == "sigmoid" else torch.maximum(log_f, log_i)
    f_prime, i_prime = (log_f - m_next).exp_(), (log_i - m_next).exp_()
    kw = k.reshape(rows, K, 1) * i_prime
    C = (C.reshape(rows, K, V) * f_prime).addcmul_(kw, v.reshape(rows, 1, V), value=K**-0.5)
    n = (n.reshape(rows, K, 1) * f_prime).add_(kw, alpha=K**-0.5)
    q = q.reshape(rows, 1, K)
    normaliser = torch.maximum(torch.bmm(q, n).abs_(), _floor(m_next)).add_(eps)
    h = torch.bmm(q, C).div_(normaliser)
    return h.view(B, 1, H, V), MLSTMState(C.view(B, H, K, V), n.view(B, H, K), m_next.view(B, H))
