"""The matrix products of the chunkwise mLSTM, chunk by chunk with all heads, and their gradients by hand.

What is made in a chunk is used while it is in the cache. Kept for the backward pass are the inputs, the outputs and the
state that each chunk reads; the rest is computed again.

Letters: N chunks of J blocks of L tokens; R heads of all rows, or of some. Tokens of a chunk are [J, R, L, .]. n is one
more column of the matrix memory, and v has a 1 there: the state S is [R, K, V + `MARGIN`].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops_mlstm_weights import Gates, Masks, Weights, by_chunk, masks_of, times, weigh, weight_of

GROUP = 2**19  # numbers of the largest tensor of a chunk of the heads that go together
MARGIN = 16  # columns of S beside those of C: as many as leave its rows where a cache line begins

_Group = tuple[slice, slice]  # rows, and heads of each


def _groups(shape: torch.Size, widths: tuple[int, int]) -> list[_Group]:
    """Cut rows and heads of gates [B, H, N, J, L]: no tokens and no scores of a chunk are more numbers than `GROUP`."""
    B, H, _, J, L = shape
    room = GROUP // (J * L * max(L, *widths))
    return list(itertools.product(_cut(B, room // H), _cut(H, room)))


def _cut(size: int, most: int) -> list[slice]:
    """Parts of nearly equal size, none of them larger than `most`."""
    count = math.ceil(size / max(1, most))
    edges = [size * part // count for part in range(count + 1)]
    return [slice(*edge) for edge in itertools.pairwise(edges)]


class _Tokens:
    """A group's tokens [B, T, H, .] by chunk: views [J, rows, heads, L, .], of a copy where tokens are missing."""

    def __init__(self, x: Tensor, group: _Group, blocks: tuple[int, int]):
        (rows, heads), (J, L) = group, blocks
        T = x.shape[1] // (J * L) * J * L
        self._rest = x[rows, T:, heads]
        parts = [x[rows, :T, heads]]
        if self._rest.shape[1]:
            self._copy = F.pad(self._rest, (0, 0, 0, 0, 0, J * L - self._rest.shape[1]))
            parts.append(self._copy)
        views = (part.unflatten(1, (-1, J, L)).permute(1, 2, 0, 4, 3, 5).unbind() for part in parts)
        self.chunks = list(itertools.chain(*views))

    def put_back(self) -> None:
        """What was written into the copy goes where it belongs."""
        if rest := self._rest.shape[1]:
            self._rest.copy_(self._copy[:, :rest])


class Chunks(torch.autograd.Function):
    """q, k, v [B, T, H, .], `Gates` [5, B, H, N, J, L] and the first C, n to h [B, T, H, V] and the last C, n.

    Documents, if resets begin some, are counted from each chunk's beginning, [B, N, J, L]. J is 1 unless every chunk of
    every head is near.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        C: Tensor,
        n: Tensor,
        document: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, ...]:
        (*_, K), V, (*_, N, J, L), room = q.shape, v.shape[-1], gates.shape, _Room(gates)
        h, last = gates.new_empty(v.shape), (torch.empty_like(C), torch.empty_like(n))
        kept: list[Tensor] = []
        saving, ctx.shape, ctx.kinds = any(ctx.needs_input_grad), gates.shape, []
        for group in _groups(gates.shape[1:], (K, V)):
            S = _joined(C[group], n[group])
            reads = S.new_empty(N if saving else 0, *S.shape)
            normalisers = S.new_empty(N, 2, J, len(S), L)
            qkv, outputs = [_Tokens(x, group, (J, L)).chunks for x in (q, k, v)], _Tokens(h, group, (J, L))
            numbers, kinds = weigh(gates, group, K)
            made = zip(reads.unbind() if saving else [None] * N, normalisers.unbind(), outputs.chunks, strict=True)
            chunks = zip(by_chunk(numbers, kinds, group, document), zip(*qkv, strict=True), made, strict=True)
            for weights, qkv_c, made_c in chunks:
                _chunk(weights, qkv_c, room).read_and_write(S, *made_c, eps)
            outputs.put_back()
            kept += [numbers, reads, normalisers] if saving else []
            ctx.kinds.append(kinds)
            _separate(S, last[0][group], last[1][group])
        ctx.save_for_backward(q, k, v, document, h, *kept)
        ctx.set_materialize_grads(False)
        return h, *last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, dC: Tensor | None, dn: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, document, h, *kept = ctx.saved_tensors
        (B, _, H, K), V, (*_, N, J, L) = q.shape, v.shape[-1], ctx.shape
        dh = torch.zeros_like(h) if dh is None else dh
        dC = h.new_zeros(B, H, K, V) if dC is None else dC
        dn = h.new_zeros(B, H, K) if dn is None else dn
        first = (torch.empty_like(dC), torch.empty_like(dn))
        dqkv, dgates, room = [x.new_empty(x.shape) for x in (q, k, v)], h.new_empty(ctx.shape), _Room(h)
        for group, kinds in zip(_groups(ctx.shape[1:], (K, V)), ctx.kinds, strict=True):
            numbers, reads, normalisers, *kept = kept
            dS = _joined(dC[group], dn[group])
            dgates_by_chunk = h.new_zeros(N, 5, J, len(dS), L)
            tokens = [[_Tokens(x, group, (J, L)) for x in xs] for xs in ((q, k, v), (h, dh), dqkv)]
            views = (zip(*(x.chunks for x in xs), strict=True) for xs in tokens)
            made = zip(reads.unbind(), normalisers.unbind(), dgates_by_chunk.unbind(), strict=True)
            chunks = list(zip(by_chunk(numbers, kinds, group, document), *views, made, strict=True))
            for weights, qkv_c, outputs, dqkv_c, made_c in reversed(chunks):
                _chunk(weights, qkv_c, room).differentiate(dS, outputs, dqkv_c, *made_c)
            for x in tokens[-1]:
                x.put_back()
            view = dgates[(slice(None), *group)]
            view.copy_(dgates_by_chunk.unflatten(3, view.shape[1:3]).permute(1, 3, 4, 0, 2, 5))
            _separate(dS, first[0][group], first[1][group])
        return *dqkv, dgates, *first, None, None


def _joined(C: Tensor, n: Tensor) -> Tensor:
    """C [rows, heads, K, V] and n [rows, heads, K] -> S [R, K, V + MARGIN]."""
    S = F.pad(C.flatten(0, 1), (0, MARGIN))
    S[..., C.shape[-1]] = n.flatten(0, 1)
    return S


def _separate(S: Tensor, C: Tensor, n: Tensor) -> None:
    """Write S into views of C and n; see `_joined`."""
    C.copy_(S[..., : C.shape[-1]].view(C.shape))
    n.copy_(S[..., C.shape[-1]].view(n.shape))


class _Blocks(NamedTuple):
    """A tensor, its views by the first dim, and those transposed."""

    whole: Tensor
    each: tuple[Tensor, ...]
    mT: tuple[Tensor, ...]

    @classmethod
    def of(cls, x: Tensor) -> _Blocks:
        return cls(x, x.unbind(), x.mT.unbind())


class _Room:
    """Buffers by name and shape: what a chunk makes is written where the chunk before had its own, in the cache."""

    def __init__(self, like: Tensor):
        self._like = like
        self._buffers: dict[Any, _Blocks] = {}

    def take(self, name: str, *shape: int, fill: float | None = None) -> _Blocks:
        """A buffer, filled when it is new."""
        key = (name, shape)
        if key not in self._buffers:
            buffer = self._like.new_empty(shape) if fill is None else self._like.new_full(shape, fill)
            self._buffers[key] = _Blocks.of(buffer)
        return self._buffers[key]


def _dot(x: Tensor, y: Tensor, room: Tensor) -> Tensor:
    """Scalar products over the last dim, the products in a tensor that nobody else needs."""
    return torch.mul(x, y, out=room).sum(-1)


class _Back(NamedTuple):
    """What the gradients of a chunk's products are made of, and where they go.

    Attributes:
        read: the state as the first block reads it, [R, K, V + MARGIN].
        dnumerator: gradient of what tokens read, [J, R, L, V + MARGIN].
        dlift: of log lift, [J, R, L].
        dq: to be made, [J, R, L, K].
        dkw: of k times its weight, to be made, [J, R, L, K].
        dv: to be made, [J, R, L, V].
        dlogs: of `Gates`, to be made but for the floor's and `write`'s, 0 so far, [J, R, L] each.
    """

    read: Tensor
    dnumerator: _Blocks
    dlift: Tensor
    dq: _Blocks
    dkw: _Blocks
    dv: _Blocks
    dlogs: Gates


class _Chunk:
    """The products of one chunk of a group's heads, `_Near` or `_Far`.

    Args:
        weights: see `Weights`.
        tokens: q, k, v, [J, rows, heads, L, .].
        room: for what is made.
    """

    def __init__(self, weights: Weights, tokens: tuple[Tensor, ...], room: _Room):
        self.weights, self.room = weights, room
        self.masks = Masks() if weights.document is None else masks_of(weights.document, weights.M)
        q, k, v = tokens
        self.V, self.shape = v.shape[-1], q.shape[:4]
        self.q = self._flat("q", q)
        # The column behind v is 1, and so are those that fill its margin: nothing reads what they make.
        self.v = room.take("v", *weights.M.shape, self.V + MARGIN, fill=1.0)
        self._tokens(self.v.whole[..., : self.V]).copy_(v)
        self.kw = room.take("kw", *self.q.whole.shape)
        torch.mul(k, self._tokens(weights.write), out=self._tokens(self.kw.whole))

    def _tokens(self, x: Tensor) -> Tensor:
        """[J, R, L, .] -> [J, rows, heads, L, .]."""
        return x.view(*self.shape, x.shape[-1])

    def _flat(self, name: str, x: Tensor) -> _Blocks:
        """[J, rows, heads, L, .] -> [J, R, L, .], views of one row if it has the dtype."""
        if x.dtype is self.weights.M.dtype and x.shape[1] == 1:
            return _Blocks.of(x[:, 0])
        flat = self.room.take(name, *self.weights.M.shape, x.shape[-1])
        self._tokens(flat.whole).copy_(x)
        return flat

    def _pairs(self, name: str, x: Iterable[Tensor], y: Iterable[Tensor]) -> _Blocks:
        """The products of each block's x and y, [J, R, L, L]."""
        pairs = self.room.take(name, *self.weights.M.shape, self.weights.M.shape[-1])
        for out, x_j, y_j in zip(pairs.each, x, y, strict=True):
            torch.bmm(x_j, y_j, out=out)
        return pairs

    def read_and_write(self, S: Tensor, read: Tensor | None, normalisers: Tensor, h: Tensor, eps: float) -> None:
        """The forward pass.

        Args:
            S: the state before the chunk; the one after it is written over that.
            read: where S is written as the first block reads it, [R, K, V + MARGIN], if anybody asks.
            normalisers: where qn and the normaliser of each token are written, [2, J, R, L].
            h: where the outputs are written, [J, rows, heads, L, V].
            eps: added to the normaliser.
        """
        w, (qn, normaliser) = self.weights, normalisers
        numerator, each, _ = self.room.take("numerator", *self.v.whole.shape)
        self._step(S, read, each)
        torch.mul(numerator[..., self.V], w.lift, out=qn)
        torch.maximum(qn.abs(), w.floor, out=normaliser).add_(eps)
        torch.mul(self._tokens(numerator[..., : self.V]), self._tokens((w.lift / normaliser)[..., None]), out=h)

    def differentiate(
        self,
        dS: Tensor,
        outputs: tuple[Tensor, Tensor],
        dqkv: tuple[Tensor, ...],
        read: Tensor,
        normalisers: Tensor,
        dgates: Tensor,
    ) -> None:
        """The backward pass.

        Args:
            dS: gradient of the state after the chunk; of the one before it is written over that.
            outputs: h and its gradient, [J, rows, heads, L, V].
            dqkv: where the gradients of q, k, v are written, [J, rows, heads, L, .].
            read: see `read_and_write`.
            normalisers: see `read_and_write`.
            dgates: where the gradients of `Gates` are written, 0 so far, [5, J, R, L].
        """
        w, (h, dh), (qn, normaliser), dlogs = self.weights, outputs, normalisers, Gates(*dgates)
        widths = {"dq": dqkv[0].shape[-1], "dkw": dqkv[0].shape[-1], "dv": self.V}
        dq, dkw, dv = (self.room.take(name, *qn.shape, width) for name, width in widths.items())
        along = _dot(dh, h, self._tokens(dv.whole)).view(qn.shape)
        dnormaliser = along / -normaliser
        by_floor = qn.abs() < w.floor
        torch.mul(dnormaliser, by_floor, out=dlogs.floor)
        dqn = (dnormaliser * qn.sign()).masked_fill_(by_floor, 0.0)
        dlift = torch.addcmul(along, dqn, qn)  # of log lift
        dnumerator = self.room.take("dnumerator", *self.v.whole.shape, fill=0.0)
        scale = self._tokens((w.lift / normaliser)[..., None])
        torch.mul(dh, scale, out=self._tokens(dnumerator.whole[..., : self.V]))
        torch.mul(dqn, w.lift, out=dnumerator.whole[..., self.V])
        dk = self._step_back(dS, _Back(read, dnumerator, dlift, dq, dkw, dv, dlogs))
        dlogs.write.copy_(_dot(dkw.whole, self.kw.whole, self.kw.whole))
        for x, view in zip((dq, dv), dqkv[::2], strict=True):
            view.copy_(self._tokens(x.whole))
        if dk is None:
            torch.mul(self._tokens(dkw.whole), self._tokens(w.write), out=dqkv[1])
        else:
            dqkv[1].copy_(self._tokens(dk.addcmul_(dkw.whole, w.write)))

    def _step(self, S: Tensor, read: Tensor | None, numerator: tuple[Tensor, ...]) -> None:
        """Read S into the numerators, by block, and turn it into the state after the chunk."""
        raise NotImplementedError

    def _step_back(self, dS: Tensor, back: _Back) -> Tensor | None:
        """Make gradients; return that which reaches k without its weight, [J, R, L, K], if there is one.

        dS, of the state after the chunk, becomes that of the one before.
        """
        raise NotImplementedError

    def _dot_of_states(self, S: Tensor, dS: Tensor) -> Tensor:
        return _dot(S, dS, self.room.take("products", *S.shape).whole).sum(-1)


class _Near(_Chunk):
    """A chunk in which no token needs a weight per other token: exp(a_s - M_t) is write_s lift_t.

    The state before the chunk weighs keep lift_t: tokens read S that has decayed by keep, and what they read is lifted
    afterwards. What is between is linear attention without weights, from block to block.
    """

    def __init__(self, weights: Weights, tokens: tuple[Tensor, ...], room: _Room):
        super().__init__(weights, tokens, room)
        self.keep = weights.carry[0, :, :1]
        # What reads S, and what is written to it.
        self.reader = self._masked("reader", self.q, self.masks.reads)
        self.writer = self._masked("writer", self.kw, self.masks.writes)

    def _masked(self, name: str, x: _Blocks, mask: Tensor | None) -> _Blocks:
        if mask is None:
            return x
        out = self.room.take(name, *x.whole.shape)
        torch.mul(x.whole, mask, out=out.whole)
        return out

    def _seen(self, name: str, x: Iterable[Tensor], y: Iterable[Tensor]) -> _Blocks:
        pairs, seen = self._pairs(name, x, y), self.masks.seen
        if seen is None:
            pairs.whole.tril_()
        else:
            pairs.whole.mul_(seen)
        return pairs

    def _step(self, S: Tensor, read: Tensor | None, numerator: tuple[Tensor, ...]) -> None:
        S.mul_(self.keep)
        if read is not None:
            read.copy_(S)
        P = self._seen("P", self.q.each, self.kw.mT)
        for j, v in enumerate(self.v.each):
            torch.bmm(self.reader.each[j], S, out=numerator[j]).baddbmm_(P.each[j], v)
            times(S, self.masks.stays, j).baddbmm_(self.writer.mT[j], v)

    def _reads(self, read: Tensor) -> list[Tensor]:
        """The state that each block reads, of that which the first one reads."""
        reads, stays = [read], self.masks.stays
        for j, S in enumerate(self.room.take("reads", len(self.v.each) - 1, *read.shape).each):
            before = reads[-1] if stays is None else torch.mul(reads[-1], stays[j], out=S)
            reads.append(torch.baddbmm(before, self.writer.mT[j], self.v.each[j], out=S))
        return reads

    def _step_back(self, dS: Tensor, back: _Back) -> Tensor | None:
        read, dnumerator, dlift, dq, dkw, dv, dlogs = back
        P, dP = self._seen("P", self.q.each, self.kw.mT), self._seen("dP", dnumerator.each, self.v.mT)
        dC, dST = dS[..., : self.V], dS.mT
        for j, S in reversed(list(enumerate(self._reads(read)))):
            torch.bmm(self.writer.each[j], dC, out=dv.each[j]).baddbmm_(P.mT[j], dnumerator.each[j][..., : self.V])
            times(torch.bmm(self.v.each[j], dST, out=dkw.each[j]), self.masks.writes, j)
            dkw.each[j].baddbmm_(dP.mT[j], self.q.each[j])
            times(torch.bmm(dnumerator.each[j], S.mT, out=dq.each[j]), self.masks.reads, j)
            dq.each[j].baddbmm_(dP.each[j], self.kw.each[j])
            times(dS, self.masks.stays, j).baddbmm_(self.reader.mT[j], dnumerator.each[j])
        dkeep = self._dot_of_states(read, dS)
        dS.mul_(self.keep)
        torch.neg(dlift, out=dlogs.M)
        dlogs.carry[0, :, 0] = dkeep
        dlogs.M[0, :, 0] += dkeep
        dlogs.M[-1, :, -1] += dlift.sum((0, 2)) - dkeep
        return None


class _Far(_Chunk):
    """A chunk of one block in which each token has a weight for each other."""

    def __init__(self, weights: Weights, tokens: tuple[Tensor, ...], room: _Room):
        super().__init__(weights, tokens, room)
        self.k, self.keep = self._flat("k", tokens[1]), weights.carry[-1, :, -1:]
        times(self.kw.each[0], self.masks.writes, 0)

    def _weights(self) -> Tensor:
        """exp(a_s - M_t) where t sees s, scale included, [R, L, L]."""
        w = self.weights
        weights = weight_of(w.a[0, :, None, :] - w.M[0, ..., None])
        seen = weights.tril_() if self.masks.seen is None else weights.mul_(self.masks.seen[0])
        return seen.mul_(self.q.whole.shape[-1] ** -0.5)

    def _reader(self) -> Tensor:
        """q as it reads S."""
        (q,), (carry,) = self.q.each, self.weights.carry
        return torch.mul(q, carry, out=self.room.take("reader", *q.shape).whole)

    def _step(self, S: Tensor, read: Tensor | None, numerator: tuple[Tensor, ...]) -> None:
        if read is not None:
            read.copy_(S)
        (P,) = self._pairs("P", self.q.each, self.k.mT).each
        (v,), (kwT,) = self.v.each, self.kw.mT
        torch.bmm(self._reader(), S, out=numerator[0]).baddbmm_(P.mul_(self._weights()), v)
        S.mul_(self.keep).baddbmm_(kwT, v)

    def _step_back(self, dS: Tensor, back: _Back) -> Tensor | None:
        blocks = (self.q, self.k, self.kw, self.v, back.dnumerator, back.dq, back.dkw, back.dv)
        q, k, kw, v, dnumerator, dq, dkw, dv = (x.each[0] for x in blocks)
        read, dlogs = back.read, back.dlogs
        reader, weights = self._reader(), self._weights()
        (P,) = self._pairs("P", self.q.each, self.k.mT).each
        (dP,) = self._pairs("dP", back.dnumerator.each, self.v.mT).each
        P.mul_(weights)
        torch.bmm(kw, dS[..., : self.V], out=dv).baddbmm_(P.mT, dnumerator[..., : self.V])
        dlog = P.mul_(dP)
        torch.sum(dlog, 1, out=dlogs.a[0])
        torch.sum(dlog, -1, out=dlogs.M[0]).neg_()
        dscores = dP.mul_(weights)
        torch.bmm(dnumerator, read.mT, out=dq)  # of the reader
        dlogs.carry[0] = _dot(reader, dq, self.room.take("products", *dq.shape).whole)
        dq.mul_(self.weights.carry[0]).baddbmm_(dscores, k)
        times(torch.bmm(v, dS.mT, out=dkw), self.masks.writes, 0)
        dS.mul_(self.keep)
        dlogs.carry[0, :, -1] += self._dot_of_states(read, dS)
        dS.baddbmm_(reader.mT, dnumerator)
        return torch.bmm(dscores.mT, q)[None]


def _chunk(weights: Weights, tokens: tuple[Tensor, ...], room: _Room) -> _Chunk:
    return (_Near if weights.is_near else _Far)(weights, tokens, room)
