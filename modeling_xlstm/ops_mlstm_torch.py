"""The mLSTM over a sequence in PyTorch, chunkwise, with a backward pass written by hand for the matrix products.

The gates are small ([B, T, H]): autograd differentiates them, stabiliser and all, so the gradients are exact for every
gate, reset and epsilon. The products are large: `_Chunks` goes from chunk to chunk with all heads, so that what is made
is used while it is in the cache, keeps only its inputs and the state that each chunk reads, and computes the rest again
in its backward pass.

Letters: N chunks of L tokens; R heads of all rows, or of some. Gates are [B, H, N, L]. `a` is a token's log input gate
relative to the decay b up to it, `M` the stabiliser relative to b.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from .ops_common import log_gates
from .states_xlstm import MLSTMState, compute_dtype


class _Gates(NamedTuple):
    """The gates as the products need them: natural logs, but for the last.

    Attributes:
        a: weight of token s before stabilisation, [B, H, N, L].
        M: stabiliser of token t; exp(a_s - M_t) weighs s at t, [B, H, N, L].
        carry: weight of the state before the chunk at each token, [B, H, N, L].
        write: weight of each token in the state after the chunk, [B, H, N, L].
        floor: lower bound of the normaliser, exp(-m) itself, [B, H, N, L].
    """

    a: Tensor
    M: Tensor
    carry: Tensor
    write: Tensor
    floor: Tensor


# A log weight below LOWEST is none at all. Where M rises by at most NEAR in a chunk, exp(a_s - M_t) is the product of a
# factor of s and one of t: what LOWEST then cuts off is still less than rounding.
LOWEST = {torch.float32: -60.0, torch.float64: -600.0}
NEAR = {torch.float32: 40.0, torch.float64: 500.0}
HIGHEST = {dtype: math.log(torch.finfo(dtype).max) - 3 for dtype in (torch.float32, torch.float64)}


def _weigh(x: Tensor) -> Tensor:
    """exp(x), but 0 below `LOWEST`.

    Products of numbers that are too small to be normal take a hundred times as long, and so does exp of infinities.
    """
    lowest = LOWEST[x.dtype]
    x = x.clamp(lowest, HIGHEST[x.dtype]).exp_()  # only what is masked afterwards may be above
    return F.threshold(x, math.exp(lowest + 0.1), 0.0, inplace=True)


def _visible(document: Tensor | None, L: int, device: torch.device) -> Tensor:
    """Which tokens s (last dim) a token t sees: [L, L], or [B, 1, N, L, L] with documents."""
    seen = torch.ones(L, L, dtype=torch.bool, device=device).tril()
    return seen if document is None else seen & (document[..., :, None] == document[..., None, :])


def _prepare_gates(
    log_i: Tensor, log_f: Tensor, m: Tensor, document: Tensor | None, sigmoid_gate: bool
) -> tuple[_Gates, Tensor]:
    """Turn log gates [B, H, N, L] and the first stabiliser [B, H] into `_Gates` and the last stabiliser.

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
    carry, write = start - base - M, a - M[..., -1:]
    if document is not None:
        carry = carry.masked_fill(reached == 0, -torch.inf)
        write = write.masked_fill(document != document[..., -1:], -torch.inf)
    return _Gates(a, M, carry, write, _floor(b + M)), m


def _floor(m: Tensor) -> Tensor:
    """exp(-m), bounded: of a very negative m it would be infinite, and the gradient of x / infinity 0 * infinity."""
    return (-m).clamp(max=HIGHEST[m.dtype]).exp_()


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


BLOCK = 2**19  # numbers of the largest tensor of a chunk of the heads that go together
FEW = 2**16  # of so few numbers a chunk would spend more time on calls than on products

_Group = tuple[slice, slice]  # rows, and heads of each


def _groups(shape: torch.Size, widths: tuple[int, int]) -> list[_Group]:
    """Cut rows and heads of gates [B, H, N, L] so that no scores and no tokens of a chunk are larger than `BLOCK`."""
    B, H, _, L = shape
    room = BLOCK // (L * max(L, *widths))
    return list(itertools.product(_cut(B, room // H), _cut(H, room)))


def _cut(size: int, most: int) -> list[slice]:
    """Parts of nearly equal size, none of them larger than `most`."""
    count = math.ceil(size / max(1, most))
    edges = [size * part // count for part in range(count + 1)]
    return [slice(*edge) for edge in itertools.pairwise(edges)]


def _of_group(gates: Tensor, group: _Group) -> Tensor:
    """A view: [., B, H, N, L] -> [., rows, heads, N, L]."""
    rows, heads = group
    return gates[:, rows, heads]


def _by_chunk(x: Tensor, group: _Group, L: int) -> tuple[Tensor, ...]:
    """Views of a group's chunks: [B, T, H, .] -> [rows, heads, L, .] each."""
    rows, heads = group
    return x[rows, :, heads].transpose(1, 2).split(L, 2)


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, heads, L, .] -> [R, L, .], a view of one row if it has the dtype."""
    if x.dtype is dtype and len(x) == 1:
        return x[0]
    return x.new_empty(x.shape, dtype=dtype).copy_(x).flatten(0, 1)


class _Weights(NamedTuple):
    """The gates of one chunk of the R heads of a group, as its products need them.

    Attributes:
        is_near: whether M rises by at most `NEAR`, in every head.
        seen: 1 where token t sees token s, [L, L] or [R, L, L].
        a: see `_Gates`, [R, L].
        M: see `_Gates`, [R, L].
        floor: see `_Gates`, [R, L].
        lift: exp of how far M is below its last value if `is_near`, else 1, [R, L].
        carry: weight of the state before the chunk, [R, L, 1].
        write: weight in the state after the chunk, scale included, [R, L, 1].
    """

    is_near: bool
    seen: Tensor
    a: Tensor
    M: Tensor
    floor: Tensor
    lift: Tensor
    carry: Tensor
    write: Tensor


def _weigh_chunks(gates: Tensor, group: _Group, seen: Tensor, q: Tensor) -> list[_Weights]:
    """What a group's chunks weigh: gates [5, B, H, N, L], see `_Gates`, seen, see `_visible`, and q [B, T, H, K]."""
    g = _Gates(*_of_group(gates, group).permute(0, 3, 1, 2, 4).flatten(2, 3))  # [N, R, L]
    rise = g.M[..., -1:] - g.M  # never below 0 where there is no reset
    is_near = (rise[..., 0] <= NEAR[g.M.dtype]).all(1) & (seen.dim() == 2)
    lift = torch.where(is_near[:, None, None], rise, 0.0).exp_()
    seen = seen.to(g.a.dtype)  # products with booleans are slow
    if seen.dim() == 2:
        by_chunk = [seen] * len(lift)
    else:
        rows, heads = group
        by_chunk = [x.expand(-1, heads.stop - heads.start, -1, -1).flatten(0, 1) for x in seen[rows].unbind(2)]
    carry, write = _weigh(g.carry)[..., None], _weigh(g.write).mul_(q.shape[-1] ** -0.5)[..., None]
    numbers = [list(x.unbind()) for x in (g.a, g.M, g.floor, lift, carry, write)]
    if rest := q.shape[1] % gates.shape[-1]:
        by_chunk[-1] = by_chunk[-1][..., :rest, :rest]
        for xs in numbers:
            xs[-1] = xs[-1][:, :rest]
    # Tensors without numbers, which tell how much memory would be taken, take the usual way.
    near = [True] * len(lift) if isinstance(is_near, FakeTensor) else is_near.tolist()
    return [_Weights(*chunk) for chunk in zip(near, by_chunk, *numbers, strict=True)]


class _State(NamedTuple):
    """C [R, K, V] and n [R, K] of a group's heads, or their gradients."""

    C: Tensor
    n: Tensor


class _Chunks(torch.autograd.Function):
    """q, k, v [B, T, H, .], `_Gates` [5, B, H, N, L] and the first C, n to h [B, T, H, V] and the last C, n."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, C: Tensor, n: Tensor, seen: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        saving, (*_, N, L), room = any(ctx.needs_input_grad), gates.shape, _Room(gates)
        h, last = gates.new_empty(v.shape), _State(torch.empty_like(C), torch.empty_like(n))
        kept: list[Tensor] = []
        for group in _groups(gates.shape[1:], (q.shape[-1], v.shape[-1])):
            state = _State(*(x[group].flatten(0, 1).clone() for x in (C, n)))
            reads = [x.new_empty(N if saving else 1, *x.shape) for x in state]
            normalisers = gates.new_empty(2, N, len(state.n), L)
            tokens = zip(*(_by_chunk(x, group, L) for x in (q, k, v)), strict=True)
            chunks = zip(_weigh_chunks(gates, group, seen, q), tokens, _by_chunk(h, group, L), strict=True)
            for index, (weights, qkv_c, h_c) in enumerate(chunks):
                read, made = _State(*(x[index if saving else 0] for x in reads)), normalisers[:, index]
                _Chunk(weights, qkv_c, room).read_and_write(state, read, made, h_c, eps)
            kept += [*reads, normalisers] if saving else []
            for x, whole in zip(state, last, strict=True):
                _put(x, whole[group])
        ctx.save_for_backward(q, k, v, gates, seen, h, *kept)
        ctx.set_materialize_grads(False)
        return h, *last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, dC: Tensor | None, dn: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, gates, seen, h, *kept = ctx.saved_tensors
        (B, _, H, K), V, (*_, N, L) = q.shape, v.shape[-1], gates.shape
        dh = torch.zeros_like(h) if dh is None else dh
        dC = gates.new_zeros(B, H, K, V) if dC is None else dC
        dn = gates.new_zeros(B, H, K) if dn is None else dn
        first = _State(torch.empty_like(dC), torch.empty_like(dn))
        dqkv, room = [x.new_empty(x.shape) for x in (q, k, v)], _Room(gates)
        dgates = torch.empty_like(gates)
        for group in _groups(gates.shape[1:], (K, V)):
            C, n, normalisers, *kept = kept
            dstate = _State(*(x[group].flatten(0, 1).clone() for x in (dC, dn)))
            dgates_by_chunk = gates.new_zeros(N, 5, len(dstate.n), L)  # the last chunk may have fewer tokens
            tokens = (zip(*(_by_chunk(x, group, L) for x in xs), strict=True) for xs in ((q, k, v), (h, dh), dqkv))
            made = zip(C.unbind(), n.unbind(), normalisers.unbind(1), strict=True)
            chunks = list(zip(_weigh_chunks(gates, group, seen, q), *tokens, made, dgates_by_chunk, strict=True))
            for weights, qkv_c, outputs, *rest in reversed(chunks):
                _Chunk(weights, qkv_c, room).differentiate(dstate, *outputs, *rest)
            _put(dgates_by_chunk.permute(1, 2, 0, 3), _of_group(dgates, group))
            for x, whole in zip(dstate, first, strict=True):
                _put(x, whole[group])
        return *dqkv, dgates, *first, None, None


def _put(x: Tensor, view: Tensor) -> None:
    view.copy_(x.reshape(view.shape))


class _Room:
    """Buffers by name and shape: what a chunk makes is written where the chunk before had its own, in the cache."""

    def __init__(self, like: Tensor):
        self._like = like
        self._buffers: dict[Any, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        key = (name, shape)
        if key not in self._buffers:
            self._buffers[key] = self._like.new_empty(shape)
        return self._buffers[key]

    def bmm(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return torch.bmm(x, y, out=self.take(name, len(x), x.shape[1], y.shape[2]))

    def mul(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return torch.mul(x, y, out=self.take(name, *x.shape))

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Scalar products over the last dim."""
        return self.mul("products", x, y).sum(-1)


class _Chunk:
    """The products of one chunk of a group's heads.

    If it is near, no token needs a weight per other token: exp(a_s - M_t) is write_s lift_t, and the state before the
    chunk weighs keep lift_t. Tokens then read S = keep C, and what they read is lifted afterwards. Else S is C.

    Args:
        weights: see `_Weights`.
        tokens: q, k, v, [rows, heads, L, .].
        room: for what is made.
    """

    def __init__(self, weights: _Weights, tokens: tuple[Tensor, ...], room: _Room):
        self.weights, self.room, self.keep = weights, room, weights.carry[:, -1]
        self.q, self.k, self.v = (_flat(x, weights.a.dtype) for x in tokens)
        self.kw = room.mul("kw", self.k, weights.write)
        self.reader = self.q if weights.is_near else room.mul("reader", self.q, weights.carry)

    def _scores(self) -> tuple[Tensor, Tensor | None]:
        """What token t takes of s before it is lifted, [R, L, L], and the weight of q k^T in it, if not near."""
        w = self.weights
        if w.is_near:
            return self.room.bmm("P", self.q, self.kw.mT).tril_(), None
        weights = _weigh(w.a[:, None, :] - w.M[..., None]).mul_(w.seen).mul_(self.q.shape[-1] ** -0.5)
        return self.room.bmm("P", self.q, self.k.mT).mul_(weights), weights

    def read_and_write(self, state: _State, read: _State, normalisers: Tensor, h: Tensor, eps: float) -> None:
        """The forward pass.

        Args:
            state: before the chunk; after it is written over that.
            read: where S is written, as state.
            normalisers: where qn and the normaliser of each token are written, [2, R, L or more].
            h: where the outputs are written, [rows, heads, L, V].
            eps: added to the normaliser.
        """
        w, (P, _) = self.weights, self._scores()
        for x, S, keep in zip(state, read, (self.keep[..., None], self.keep), strict=True):
            if w.is_near:
                torch.mul(x, keep, out=S)
            else:
                S.copy_(x)
                x.mul_(keep)
        qn, normaliser = normalisers[..., : self.q.shape[1]]
        torch.mul(torch.baddbmm(P.sum(-1, keepdim=True), self.reader, read.n[..., None])[..., 0], w.lift, out=qn)
        torch.maximum(qn.abs(), w.floor, out=normaliser).add_(eps)
        numerator = self.room.bmm("numerator", self.reader, read.C).baddbmm_(P, self.v)
        torch.mul(numerator.view(h.shape), (w.lift / normaliser).view(*h.shape[:-1], 1), out=h)
        decayed = read if w.is_near else state
        torch.baddbmm(decayed.C, self.kw.mT, self.v, out=state.C)
        torch.add(decayed.n, self.kw.sum(1), out=state.n)

    def differentiate(
        self, dstate: _State, h: Tensor, dh: Tensor, dqkv: tuple[Tensor, ...], made: tuple[Tensor, ...], dgates: Tensor
    ) -> None:
        """The backward pass.

        Args:
            dstate: gradient of the state after the chunk; of the one before it is written over that.
            h: outputs, [rows, heads, L, V].
            dh: their gradient, alike.
            dqkv: where the gradients of q, k, v are written, [rows, heads, L, .].
            made: C and n as read, and normalisers of `read_and_write`.
            dgates: where the gradients of `_Gates` are written, 0 so far, [5, R, L or more].
        """
        w, room, (C, n, normalisers), (dC, dn) = self.weights, self.room, made, dstate
        L = self.q.shape[1]
        (qn, normaliser), (da, dM, dcarry, dwrite, dfloor) = normalisers[..., :L], dgates[..., :L]
        h, dh = (_flat(x, w.a.dtype) for x in (h, dh))
        dnumerator = room.mul("dnumerator", dh, (w.lift / normaliser)[..., None])
        along = room.dot(dh, h)
        dnormaliser = along / -normaliser
        by_floor = qn.abs() < w.floor
        dqn = (dnormaliser * qn.sign()).masked_fill_(by_floor, 0.0)
        dlift = torch.addcmul(along, dqn, qn)  # of log lift
        dqn = dqn.mul_(w.lift)[..., None]

        P, weights = self._scores()
        dP = room.bmm("dP", dnumerator, self.v.mT).add_(dqn)
        _put(room.bmm("dv", self.kw, dC).baddbmm_(P.mT, dnumerator), dqkv[2])
        dkw = room.bmm("dkw", self.v, dC.mT).add_(dn[:, None, :])
        dreader = room.bmm("dreader", dnumerator, C.mT).addcmul_(dqn, n[:, None, :])
        if weights is None:
            dP.tril_()
            _put(dreader.baddbmm_(dP, self.kw), dqkv[0])
            dkw.baddbmm_(dP.mT, self.q)
            torch.neg(dlift, out=dM)[:, -1] += dlift.sum(-1)
        else:
            dlog = P.mul_(dP)
            torch.sum(dlog, 1, out=da)
            torch.sum(dlog, -1, out=dM).neg_()
            dcarry.copy_(room.dot(self.reader, dreader))
            dscores = dP.mul_(weights)
            _put(room.bmm("dq", dscores, self.k).addcmul_(dreader, w.carry), dqkv[0])
        dwrite.copy_(room.dot(dkw, self.kw))
        dkw.mul_(w.write)
        _put(dkw if weights is None else dkw.baddbmm_(dscores.mT, self.q), dqkv[1])

        dcarry[:, -1] += self._step_back(dstate, made[:2], dnumerator, dqn)
        dfloor.copy_(dnormaliser.masked_fill_(~by_floor, 0.0))

    def _step_back(self, dstate: _State, read: tuple[Tensor, ...], dnumerator: Tensor, dqn: Tensor) -> Tensor:
        """Turn the gradient of the state after the chunk into that of the one before; return that of log keep, [R]."""
        (dC, dn), (C, n) = dstate, read

        def add_reads() -> None:
            dC.baddbmm_(self.reader.mT, dnumerator)
            dn[..., None].baddbmm_(self.reader.mT, dqn)

        def decay() -> None:
            dC.mul_(self.keep[..., None])
            dn.mul_(self.keep)

        # Near, what is read has decayed; elsewhere it is what decays.
        then, first = (decay, add_reads) if self.weights.is_near else (add_reads, decay)
        first()
        dkeep = self.room.dot(C.flatten(1), dC.flatten(1)).add_((n * dn).sum(-1))
        then()
        return dkeep


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
    """All heads together, chunk by chunk. Arguments and results as in `ops_mlstm.mlstm`; can be differentiated once."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    dtype = compute_dtype(v, state)
    i_tilde, f_tilde = i_tilde.to(dtype), f_tilde.to(dtype)
    C, n, m = MLSTMState.zeros(B, H, K, V, like=i_tilde) if state is None else (x.to(dtype) for x in state)
    chunk_size *= 2  # what suits a GPU is half of what suits a CPU, whose calls cost more beside the products
    if B * H * chunk_size * max(K, V) <= FEW:
        chunk_size *= 2
    # Of wide heads the states between short chunks would take more memory and time than the scores in longer ones.
    while 4 * chunk_size**2 < K * V:
        chunk_size *= 2
    N = math.ceil(T / chunk_size)
    L = math.ceil(T / N)  # the last chunk is nearly full
    missing = N * L - T
    log_i, log_f = log_gates(i_tilde, f_tilde, input_gate)
    padded = (_whole_chunks(log_i, missing, -torch.inf), _whole_chunks(log_f, missing))
    log_i, log_f = (x.transpose(1, 2).unflatten(-1, (N, L)).contiguous() for x in padded)
    document = None
    if reset is not None:
        document = _whole_chunks(reset.long(), missing).unflatten(1, (N, L)).cumsum(-1)[:, None]
    gates, m = _prepare_gates(log_i, log_f, m, document, input_gate == "sigmoid")
    h, C, n = _Chunks.apply(q, k, v, torch.stack(gates), C, n, _visible(document, L, q.device), eps)
    return h, MLSTMState(C, n, m)


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
