"""The mLSTM over a sequence in PyTorch, chunkwise, with a backward pass written by hand for the matrix products.

The gates are small ([B, T, H]): autograd differentiates them, stabiliser and all, so the gradients are exact for every
gate, reset and epsilon. The products are large: `_Chunks` takes many chunks together, keeps only its inputs and the
state before each chunk, and computes the rest again in its backward pass.

Letters: N chunks of L tokens, of which a block holds G. Gates are [H, B, N, L] here. `a` is a token's log input gate
relative to the decay b up to it, `M` the stabiliser relative to b.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
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


def _weigh(x: Tensor) -> Tensor:
    """exp(x), but 0 below e^-60, which is less than rounding beside the weights that count.

    Products of numbers that are too small to be normal take a hundred times as long, and so does exp of infinities.
    """
    highest = math.log(torch.finfo(x.dtype).max) - 3  # only what is masked afterwards may be above
    return F.threshold(x.clamp(-60.0, highest).exp(), math.exp(-59.9), 0.0)


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


_HIGHEST = {dtype: math.log(torch.finfo(dtype).max) - 3 for dtype in (torch.float32, torch.float64)}


def _floor(m: Tensor) -> Tensor:
    """exp(-m), bounded: of a very negative m it would be infinite, and the gradient of x / infinity 0 * infinity."""
    return (-m).clamp(max=_HIGHEST[m.dtype]).exp_()


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


BLOCK = 2**21  # numbers of the largest tensor of a block; more would only take memory


def _blocks(
    shape: tuple[int, ...], widths: tuple[int, int], reverse: bool = False
) -> Iterator[tuple[slice, slice, slice]]:
    """Cut [H, B, N, L] tokens into heads, rows and chunks; several of the one only with all of the next.

    No tensor of a block is larger than `BLOCK`: neither its tokens of widths K and V, nor its states.
    """
    H, B, N, L = shape
    K, V = widths
    room = max(1, BLOCK // max(L * L, L * K, L * V, K * V))
    chunks, rows, heads = _cut(N, room), _cut(B, room // N), _cut(H, room // (N * B))
    yield from itertools.product(heads, rows, chunks[::-1] if reverse else chunks)


def _cut(size: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _by_chunk(x: Tensor, N: int) -> Tensor:
    """A view: [B, N * L, H, .] -> [H, B, N, L, .]."""
    return x.permute(2, 0, 1, 3).unflatten(2, (N, -1))


class _Chunks(torch.autograd.Function):
    """q, k, v [B, N * L, H, .], the token weights and the first C, n to h [B, N * L, H, V] and the last C, n."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, a: Tensor, M: Tensor, carry: Tensor, write: Tensor, floor: Tensor,
        C: Tensor, n: Tensor, seen: Tensor, eps: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        H, B, N, _ = a.shape
        h, state = v.new_empty(v.shape), [x.transpose(0, 1).clone() for x in (C, n)]
        before = [x.new_empty(H, B, N, *x.shape[2:]) for x in state] if any(ctx.needs_input_grad) else []
        normalisers = [torch.empty_like(a), torch.empty_like(a)]
        qkv = [_by_chunk(x, N) for x in (q, k, v)]
        for part in _blocks(a.shape, (q.shape[-1], v.shape[-1])):
            weights = _Weights(*(_take(x, part) for x in (a, M, carry, write, floor)))
            given = [_take(x, part) for x in qkv], weights, _see(seen, part), [x[part[:2]] for x in state]
            h_block, after, block_before, block_normalisers = _read_and_write(*given, eps)
            _put(
                [_by_chunk(h, N), *normalisers, *before],
                part,
                [h_block, *block_normalisers, *block_before[: len(before)]],
            )
            _put(state, part[:2], after)
        ctx.save_for_backward(q, k, v, a, M, carry, write, floor, seen, h, *normalisers, *before)
        ctx.set_materialize_grads(False)
        return h, *(x.transpose(0, 1) for x in state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, dC: Tensor | None, dn: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, *weights, seen, h, qn, normaliser, C_before, n_before = ctx.saved_tensors
        N = C_before.shape[2]
        dh = torch.zeros_like(h) if dh is None else dh
        dstate = [
            torch.zeros_like(x[:, :, 0]) if dx is None else dx.transpose(0, 1).clone()
            for dx, x in ((dC, C_before), (dn, n_before))
        ]
        dqkv, dweights = [x.new_empty(x.shape) for x in (q, k, v)], [torch.empty_like(x) for x in weights]
        tokens, gradients = [_by_chunk(x, N) for x in (q, k, v, h, dh)], [_by_chunk(x, N) for x in dqkv]
        for part in _blocks(qn.shape, (q.shape[-1], v.shape[-1]), reverse=True):
            block_weights = _Weights(*(_take(x, part) for x in weights))
            saved = C_before[part], n_before[part], _take(qn, part), _take(normaliser, part)
            given = [_take(x, part) for x in tokens], block_weights, _see(seen, part), saved
            made, before = _differentiate(*given, [x[part[:2]] for x in dstate])
            _put([*gradients, *dweights], part, made)
            _put(dstate, part[:2], before)
        return *dqkv, *dweights, *(x.transpose(0, 1) for x in dstate), None, None


def _take(x: Tensor, part: tuple[slice, ...]) -> Tensor:
    """The chunks of a block: [H, B, N, ...] -> [G, ...]."""
    return x[part].flatten(0, 2).contiguous()


def _put(wholes: list[Tensor], part: tuple[slice, ...], values: list[Tensor]) -> None:
    for whole, value in zip(wholes, values, strict=True):
        target = whole[part]
        target.copy_(value.view(target.shape))


def _see(seen: Tensor, part: tuple[slice, ...]) -> Tensor:
    """What the tokens of a block see, [L, L] or [G, L, L]."""
    if seen.dim() == 2:
        return seen
    heads, rows, chunks = part
    block = seen[:, rows, chunks]
    return block.expand(len(range(heads.start, heads.stop)), *block.shape[1:]).flatten(0, 2)


def _read_and_write(
    qkv: list[Tensor], w: _Weights, seen: Tensor, state: list[Tensor], eps: float
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """The forward pass of one block: q, k, v [G, L, .] and the C [heads, rows, K, V] and n before it.

    Returns:
        result: h; C and n after the block; the same before each chunk; qn and normaliser, [G, L].
    """
    q, k, v = qkv
    scale = q.shape[-1] ** -0.5
    kw = k * (w.write * scale)[..., None]
    C_before, C = _scan(torch.bmm(kw.mT, v), w.carry[:, -1], state[0])
    n_before, n = _scan(kw.sum(1), w.carry[:, -1], state[1])
    P = _scores(q, k, scale).mul_(_weigh(w.a[:, None, :] - w.M[..., None]).mul_(seen))
    qn = P.sum(-1).addcmul_(w.carry, torch.bmm(q, n_before[..., None])[..., 0])
    h = torch.bmm(q * w.carry[..., None], C_before).baddbmm_(P, v)
    normaliser = torch.maximum(qn.abs(), w.floor).add_(eps)
    return h.div_(normaliser[..., None]), [C, n], [C_before, n_before], [qn, normaliser]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of x * y over all but the first dim, [G, ...] -> [G], without a tensor of their size."""
    return torch.bmm(x.flatten(1)[:, None], y.flatten(1)[..., None]).view(-1)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * q @ k^T."""
    return torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=scale)


def _differentiate(
    tokens: list[Tensor], w: _Weights, seen: Tensor, saved: tuple[Tensor, ...], dstate: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The backward pass of one block.

    Args:
        tokens: q, k, v, h and dh, [G, L, .].
        w: the weights, [G, L].
        seen: see `_visible`.
        saved: C and n before each chunk, [heads, rows, chunks, ...], qn and normaliser, [G, L].
        dstate: gradients of C and n after the block, [heads, rows, ...].

    Returns:
        result: gradients of q, k, v and the weights, and of C and n before the block.
    """
    q, k, v, h, dh = tokens
    C, n, qn, normaliser = saved[0].flatten(0, 2), saved[1].flatten(0, 2), *saved[2:]
    scale, keep = q.shape[-1] ** -0.5, w.carry[:, -1]
    dnumerator = dh / normaliser[..., None]
    dnormaliser = (dnumerator * h).sum(-1).neg_()
    by_floor = qn.abs() < w.floor
    dqn = (dnormaliser * qn.sign()).masked_fill_(by_floor, 0.0)
    dfloor = dnormaliser.masked_fill_(~by_floor, 0.0)

    # Through the state before each chunk.
    dq_carried = torch.bmm(dnumerator, C.mT).addcmul_(dqn[..., None], n[:, None, :])
    dcarry = (q * dq_carried).sum(-1)
    q_carried = q * w.carry[..., None]
    dC_after, dC = _scan(torch.bmm(q_carried.mT, dnumerator), keep, dstate[0], reverse=True)
    dn_after, dn = _scan(torch.bmm(q_carried.mT, dqn[..., None])[..., 0], keep, dstate[1], reverse=True)
    dcarry[:, -1] += _dot(C, dC_after) + _dot(n, dn_after)
    dk_written = torch.bmm(v, dC_after.mT).add_(dn_after[:, None, :])
    dwrite = (k * dk_written).sum(-1).mul_(scale)

    # Within each chunk.
    D = _weigh(w.a[:, None, :] - w.M[..., None]).mul_(seen)
    P = _scores(q, k, scale).mul_(D)
    write = (w.write * scale)[..., None]
    dv = torch.bmm(k * write, dC_after).baddbmm_(P.mT, dnumerator)
    dS = torch.bmm(dnumerator, v.mT).add_(dqn[..., None]).mul_(D.mul_(scale))
    dq, dk = torch.bmm(dS, k), torch.bmm(dS.mT, q)
    dM, da = (q * dq).sum(-1).neg_(), (k * dk).sum(-1)
    dq.addcmul_(dq_carried, w.carry[..., None])
    dk.addcmul_(dk_written, write)
    return [dq, dk, dv, da, dM, dcarry, dwrite, dfloor], [dC, dn]


def _scan(x: Tensor, keep: Tensor, first: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """The values of s before each chunk, and the last, of s = keep s + x from chunk to chunk.

    Args:
        x: what each chunk adds, [heads * rows * chunks, ...].
        keep: what each leaves of the value before it, [heads * rows * chunks].
        first: the value before all, [heads, rows, ...].
        reverse: from the last chunk to the first.

    Returns:
        result: [heads * rows * chunks, ...] and [heads, rows, ...].
    """
    added = x.unflatten(0, (*first.shape[:2], -1))
    before = torch.empty_like(added)
    keep = keep.view(*added.shape[:3], *(1,) * (first.dim() - 2))
    steps = list(zip(added.unbind(2), keep.unbind(2), before.unbind(2), strict=True))
    if reverse:
        steps.reverse()
    steps[0][2].copy_(first)
    for (x_c, keep_c, s), (_, _, s_next) in itertools.pairwise(steps):
        torch.addcmul(x_c, keep_c, s, out=s_next)
    x_c, keep_c, s = steps[-1]
    return before.flatten(0, 2), torch.addcmul(x_c, keep_c, s)


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
    B, T, H, K = q.shape
    dtype = compute_dtype(v, state)
    q, k, v, i_tilde, f_tilde = (x.to(dtype) for x in (q, k, v, i_tilde, f_tilde))
    C, n, m = MLSTMState.zeros(B, H, K, v.shape[-1], like=v) if state is None else (x.to(dtype) for x in state)
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
    q, k, v = (_whole_chunks(x, missing) for x in (q, k, v))
    h, C, n = _Chunks.apply(q, k, v, *weights, C, n, seen, eps)
    return h[:, :T], MLSTMState(C, n, m.T)


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
