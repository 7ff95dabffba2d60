"""The matrix products of the chunkwise mLSTM, chunk by chunk with all heads, and their gradients by hand.

What is made in a chunk is used while it is in the cache. Kept for the backward pass are the inputs, the outputs and the
state that each chunk reads; the rest is computed again.

Letters as in `ops_mlstm_tokens`. v has a 1 where n is one more column of the matrix memory: products with the state
S [R, K, V + `MARGIN`] make numerators and normalisers.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops_common import differentiable_once
from .ops_mlstm_tokens import Blocks, Buffer, Group, Room, Sum, Tokens, WideBuffer, groups, joined, separate
from .ops_mlstm_weights import Masks, Weights, masks_of, weigh, weight_of_


class Chunks(torch.autograd.Function):
    """q, k, v [B, T, H, .], `Gates` [5, B, H, N, J, L] and the first C, n to h [B, T, H, V] and the last C, n.

    The first C, n are None at the start, where they are zero. Documents, if resets begin some, are counted from each
    chunk's beginning, [B, N, J, L]. J is 1 unless every chunk of every head is near.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        C: Tensor | None,
        n: Tensor | None,
        document: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, ...]:
        (B, _, H, K), V, (*_, N, J, L) = q.shape, v.shape[-1], gates.shape
        h, last = gates.new_empty(v.shape), (gates.new_empty(B, H, K, V), gates.new_empty(B, H, K))
        kept: list[Tensor] = []
        rooms = cache(partial(Room, h, K, V))
        saving, ctx.shape, ctx.kinds = any(ctx.needs_input_grad), gates.shape, []
        for group in groups(gates.shape[1:], (K, V)):
            S, outputs = joined(C, n, group, like=last[0]), Tokens(h, group, (J, L))
            reads = h.new_empty(N - S.is_zero if saving else 0, *S.numbers.shape)
            numbers, kinds = weigh(gates, group, K, eps)
            qn, normaliser = normalisers = torch.empty_like(numbers[:2])
            chunks = _chunks(group, (q, k, v), Weights(*numbers), kinds, document)
            room = rooms(chunks[0].v.shape[:-1])
            made = zip(_by_chunk(reads, N), qn if saving else [None] * N, normaliser, outputs.chunks, strict=True)
            for chunk, made_c in zip(chunks, made, strict=True):
                _products(chunk, room).read_and_write(S, *made_c)
            outputs.put_back()
            kept += [numbers, reads, normalisers] if saving else []
            ctx.kinds.append(kinds)
            separate(S, last[0][group], last[1][group])
        ctx.save_for_backward(q, k, v, document, h, *kept)
        ctx.set_materialize_grads(False)
        return h, *last

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dh: Tensor | None, dC: Tensor | None, dn: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, document, h, *kept = ctx.saved_tensors
        (B, _, H, K), V, (*_, J, L) = q.shape, v.shape[-1], ctx.shape
        dh = torch.zeros_like(h) if dh is None else dh
        first, of_first = (h.new_empty(B, H, K, V), h.new_empty(B, H, K)), any(ctx.needs_input_grad[4:6])
        dqkv, dgates = [x.new_empty(x.shape) for x in (q, k, v)], h.new_empty(ctx.shape)
        rooms = cache(partial(Room, h, K, V))
        for group, kinds in zip(groups(ctx.shape[1:], (K, V)), ctx.kinds, strict=True):
            numbers, reads, normalisers, *kept = kept
            dS, weights = joined(dC, dn, group, like=first[0]), Weights(*numbers)
            gradients = _Gradients(weights, normalisers, kinds)
            chunks = _chunks(group, (q, k, v), weights, kinds, document)
            inputs, outputs = ([Tokens(x, group, (J, L)) for x in xs] for xs in (dqkv, (h, dh)))
            views = (zip(*(x.chunks for x in xs), strict=True) for xs in (outputs, inputs))
            room = rooms(chunks[0].v.shape[:-1])
            made = list(zip(chunks, _by_chunk(reads, len(chunks)), gradients.by_chunk, *views, strict=True))
            for chunk, *made_c in reversed(made):
                _products(chunk, room).differentiate(dS, *made_c)
            for x in inputs:
                x.put_back()
            dgates[(slice(None), *group)] = gradients.of_gates()
            if of_first:
                separate(dS, first[0][group], first[1][group])
        return *dqkv, dgates, *(first if of_first else (None, None)), None, None


def _by_chunk(reads: Tensor, N: int) -> list[Tensor | None]:
    """The state that each of N chunks reads, None where none is kept: zeros at the start, or all."""
    return [*[None] * (N - len(reads)), *reads]


class _Chunk(NamedTuple):
    """What one chunk of a group's heads is given.

    Attributes:
        is_near: see `_Near`.
        weights: see `Weights`.
        keep: weight of the state before the chunk in the one after it, [R, 1, 1].
        document: see `Chunks`, [rows, J, L].
        q: what products can read, or [J, rows, heads, L, K] to be copied.
        k: the same.
        v: [J, rows, heads, L, V].
    """

    is_near: bool
    weights: Weights
    keep: Tensor
    document: Tensor | None
    q: Blocks | Tensor
    k: Blocks | Tensor
    v: Tensor


def _chunks(
    group: Group, qkv: tuple[Tensor, ...], weights: Weights, kinds: list[bool], document: Tensor | None
) -> list[_Chunk]:
    """The chunks, with the weights of all and documents [B, N, J, L]."""
    (N, J, *_, L, _), dtype = weights.a.shape, weights.a.dtype
    tokens = [Tokens(x, group, (J, L)) for x in qkv]
    q, k = (x.operands(dtype) for x in tokens[:2])
    firsts, lasts = (weights.carry[:, j, ..., t, :].reshape(N, -1, 1, 1) for j, t in ((0, 0), (-1, -1)))
    keeps = (first if near else last for near, first, last in zip(kinds, firsts, lasts, strict=True))
    documents = [None] * N if document is None else document[group[0]].unbind(1)
    by_chunk = (Weights(*x) for x in zip(*weights, strict=True))
    return list(map(_Chunk, kinds, by_chunk, keeps, documents, q, k, tokens[2].chunks))


class _Back(NamedTuple):
    """What a chunk's gradients are made of beside its inputs and outputs, and where those of its gates go.

    Attributes:
        inverse: 1 / normaliser, [J, rows, heads, L, 1].
        of_n: gradient of qn, over h dh, [J, rows, heads, L, 1].
        along: h dh of each token, to be made, [J, rows, heads, L, 1].
        a: of what scores make of it, see `Gates`; 0 so far, and so are all below, [J, rows, heads, L, 1].
        M: see `Gates`; of a near chunk `_Gradients` makes it, [J, rows, heads, L, 1].
        carry: see `Gates`; of a near chunk `_Gradients` makes it, [J, rows, heads, L, 1].
        write: of what the state after the chunk makes of a, [J, rows, heads, L, 1].
        keep: of log keep, if the chunk is near, [R].
    """

    inverse: Tensor
    of_n: Tensor
    along: Tensor
    a: Tensor
    M: Tensor
    carry: Tensor
    write: Tensor
    keep: Tensor


class _Gradients:
    """The gradients of a group's gates.

    Args:
        weights: of all chunks, [N, J, rows, heads, L, 1] each.
        normalisers: qn and normaliser, [2, N, J, rows, heads, L, 1].
        kinds: whether each chunk is near.
    """

    def __init__(self, weights: Weights, normalisers: Tensor, kinds: list[bool]):
        floor, qn, inverse = weights.floor, normalisers[0], normalisers[1].reciprocal()
        by_floor, near = qn.abs() < floor, torch.tensor(kinds, device=qn.device).view(-1, 1, 1, 1, 1, 1)
        of_n = (qn.sign() * inverse).neg_().masked_fill_(by_floor, 0.0)
        self._of_lift = torch.where(near, of_n * qn + 1.0, 0.0)
        self._of_floor = (floor * inverse).neg_().masked_fill_(~by_floor, 0.0)
        self._gates = floor.new_zeros(5, *floor.shape)
        self._keep = floor.new_zeros(len(near), floor[0, 0, ..., 0, 0].numel())
        self.by_chunk = [_Back(*x) for x in zip(inverse, of_n, *self._gates, self._keep, strict=True)]

    def of_gates(self) -> Tensor:
        """Once every chunk has made its own: of `Gates`, [5, rows, heads, N, J, L]."""
        along, a, M, carry, write = self._gates.squeeze(-1)
        keep = self._keep.view(carry[:, 0, ..., 0].shape)
        lift = along * self._of_lift.squeeze(-1)
        M -= lift
        M[:, 0, ..., 0] += keep
        M[:, -1, ..., -1] += lift.sum((1, -1)) - keep
        carry[:, 0, ..., 0] += keep
        gates = torch.stack([a + write, M, carry, along * self._of_floor.squeeze(-1), torch.zeros_like(a)])
        return gates.permute(0, 3, 4, 1, 2, 5)


class _Products:
    """The products of one chunk of a group's heads, `_Near` or `_Far`."""

    def __init__(self, chunk: _Chunk, room: Room):
        self.weights, self.keep, self.v, self.room = chunk.weights, chunk.keep, chunk.v, room
        self.masks = Masks() if chunk.document is None else masks_of(chunk.document, self.weights.M.flatten(1, 2))
        self.q, self.k = self._operand("q", chunk.q), self._operand("k", chunk.k)

    def _operand(self, name: str, x: Blocks | Tensor) -> Blocks:
        """What products read, copied if it must be."""
        if isinstance(x, Blocks):
            return x
        copy = self.room.tokens(name, self.room.K)
        copy.by_row.copy_(x)
        return copy.blocks

    def _pairs(self, name: str, x: Iterable[Tensor], y: Iterable[Tensor]) -> Blocks:
        """The products of each block's x and y, [J, R, L, L]."""
        pairs = self.room.tokens(name, self.room.shape[-1]).blocks
        for out, x_j, y_j in zip(pairs.each, x, y, strict=True):
            torch.bmm(x_j, y_j, out=out)
        return pairs

    def read_and_write(self, S: Sum, read: Tensor | None, qn: Tensor | None, normaliser: Tensor, h: Tensor) -> None:
        """The forward pass.

        Args:
            S: the state before the chunk; the one after it is written over that.
            read: where S is written as the first block reads it, [R, K, V + MARGIN], if anybody asks.
            qn: where q n is written, [J, rows, heads, L, 1], if anybody asks.
            normaliser: where it is written, [J, rows, heads, L, 1].
            h: where the outputs are written, [J, rows, heads, L, V].
        """
        numerator = self.room.wide("numerator")
        self._step(S, read, numerator.blocks.each)
        if qn is not None:
            qn.copy_(numerator.n)
        torch.abs(numerator.n, out=normaliser).clamp_(min=self.weights.floor).add_(self.weights.eps)
        torch.div(numerator.v, normaliser, out=h)

    def differentiate(
        self, dS: Sum, read: Tensor | None, back: _Back, outputs: tuple[Tensor, Tensor], dqkv: tuple[Tensor, ...]
    ) -> None:
        """The backward pass.

        Args:
            dS: gradient of the state after the chunk; of the one before it is written over that.
            read: see `read_and_write`; None is zero.
            back: see `_Back`.
            outputs: h and its gradient, [J, rows, heads, L, V].
            dqkv: where the gradients of q, k, v are written, [J, rows, heads, L, .].
        """
        h, dh = outputs
        along = torch.mul(h, dh, out=self._gradient("v").by_row)
        torch.sum(along, -1, keepdim=True, out=back.along)
        dnumerator = self.room.wide("dnumerator")
        torch.mul(dh, back.inverse, out=dnumerator.v)
        torch.mul(back.along, back.of_n, out=dnumerator.n)
        self._step_back(dS, read, dnumerator, back, dqkv)

    def _step(self, S: Sum, read: Tensor | None, numerator: tuple[Tensor, ...]) -> None:
        """Read S into the numerators, by block, and turn it into the state after the chunk."""
        raise NotImplementedError

    def _step_back(
        self, dS: Sum, read: Tensor | None, dnumerator: WideBuffer, back: _Back, dqkv: tuple[Tensor, ...]
    ) -> None:
        """Make the gradients of all that `_step` read, that of the state after the chunk into the one before."""
        raise NotImplementedError

    def _gradient(self, x: str) -> Buffer:
        """A buffer for that of q, k or v."""
        return self.room.tokens("d" + x, self.room.V if x == "v" else self.room.K)

    def _add_keep_gradient(self, dkeep: Tensor, read: Tensor | None, dS: Sum) -> None:
        """Of log keep, [R], of what it has made of the state and of the gradient it gets."""
        if read is not None and not dS.is_zero:
            dkeep += torch.mul(read, dS.numbers, out=self.room.state).flatten(1).sum(1)


class _Near(_Products):
    """A chunk in which no token needs a weight per other token: exp(a_s - M_t) is write_s lift_t.

    The state before the chunk weighs keep lift_t: tokens read S that has decayed by keep. What is between is linear
    attention without weights, from block to block: of q, k, and v and n's 1 times write. The lift would be in numerator
    and normaliser; instead, what the latter has besides is divided by it.
    """

    def __init__(self, *given: Any):
        super().__init__(*given)
        values = self.room.wide("values")
        torch.mul(self.v, self.weights.write, out=values.v)
        values.n.copy_(self.weights.write)
        self.values = values.blocks
        # What reads S, and what is written to it.
        self.reader = self._masked("reader", self.q, self.masks.reads)
        self.writer = self._masked("writer", self.k, self.masks.writes)

    def _masked(self, name: str, x: Blocks, mask: Tensor | None) -> Blocks:
        if mask is None:
            return x
        out = self.room.tokens(name, self.room.K).blocks
        torch.mul(x.whole, mask, out=out.whole)
        return out

    def _seen(self, name: str, x: Iterable[Tensor], y: Iterable[Tensor]) -> Blocks:
        pairs, seen = self._pairs(name, x, y), self.masks.seen
        if seen is None:
            pairs.whole.tril_()
        else:
            pairs.whole.mul_(seen)
        return pairs

    def _step(self, S: Sum, read: Tensor | None, numerator: tuple[Tensor, ...]) -> None:
        S.times(self.keep)
        if read is not None:
            read.copy_(S.numbers)
        P = self._seen("P", self.q.each, self.k.mT)
        for j, values in enumerate(self.values.each):
            Sum(numerator[j]).add(self.reader.each[j], S).add(P.each[j], values)
            S.times(self.masks.stays, j).add(self.writer.mT[j], values)

    def _step_back(
        self, dS: Sum, read: Tensor | None, dnumerator: WideBuffer, back: _Back, dqkv: tuple[Tensor, ...]
    ) -> None:
        masks, dnum, values = self.masks, dnumerator.blocks.each, self.values
        made = [self._gradient(x) for x in "qkv"]
        dq, dk, dv = (x.blocks for x in made)
        P, dP = self._seen("P", self.q.each, self.k.mT), self._seen("dP", dnum, values.mT)
        for j, dnum_j in reversed(list(enumerate(dnum))):
            dC = dS.columns(self.room.V)
            Sum(dv.each[j]).add(self.writer.each[j], dC).add(P.mT[j], dnumerator.v_by_block[j])
            Sum(dk.each[j]).add(values.each[j], dS.mT).times(masks.writes, j).add(dP.mT[j], self.q.each[j])
            if j > 0 or read is not None:
                dS.times(masks.stays, j).add(self.reader.mT[j], dnum_j)
        self._add_keep_gradient(back.keep, read, dS)
        dS.times(self.keep)
        S = Sum(self.room.state) if read is None else Sum(self.room.state.copy_(read), is_zero=False)
        for j, dnum_j in enumerate(dnum):
            Sum(dq.each[j]).add(dnum_j, S.mT).times(masks.reads, j).add(dP.each[j], self.k.each[j])
            if j + 1 < len(dnum):
                S.times(masks.stays, j).add(self.writer.mT[j], values.each[j])
        dqkv[0].copy_(made[0].by_row)
        dqkv[1].copy_(made[1].by_row)
        torch.mul(made[2].by_row, self.weights.write, out=dqkv[2])
        torch.sum(dk.whole.mul_(self.k.whole), -1, keepdim=True, out=back.write.flatten(1, 2))


class _Far(_Products):
    """A chunk of one block in which each token has a weight for each other."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.carry, self.write = (x[0].flatten(0, 1) for x in (self.weights.carry, self.weights.write))
        values = self.room.wide("values")
        values.v.copy_(self.v)
        values.n.fill_(1.0)
        self.values, self.kw = values.blocks, self.room.tokens("kw", self.room.K).blocks
        # Masked before k is weighed: what a token far above those after a reset would write may be infinite.
        write = self.write if self.masks.writes is None else self.write * self.masks.writes[0]
        torch.mul(self.k.each[0], write, out=self.kw.each[0])

    def _weights(self) -> Tensor:
        """exp(a_s + rest_s - M_t) where t sees s, scale included, [R, L, L]."""
        a, M, score = (x[0].flatten(0, 1) for x in (self.weights.a, self.weights.M, self.weights.score))
        weights = weight_of_(a.mT - M)
        seen = weights.tril_() if self.masks.seen is None else weights.mul_(self.masks.seen[0])
        return seen.mul_(score.mT)

    def _reader(self) -> Tensor:
        """q as it reads S."""
        return torch.mul(self.q.each[0], self.carry, out=self.room.tokens("reader", self.room.K).blocks.each[0])

    def _step(self, S: Sum, read: Tensor | None, numerator: tuple[Tensor, ...]) -> None:
        if read is not None:
            read.copy_(S.numbers)
        (P,) = self._pairs("P", self.q.each, self.k.mT).each
        (values,), (kwT,) = self.values.each, self.kw.mT
        Sum(numerator[0]).add(self._reader(), S).add(P.mul_(self._weights()), values)
        S.times(self.keep).add(kwT, values)

    def _step_back(
        self, dS: Sum, read: Tensor | None, dnumerator: WideBuffer, back: _Back, dqkv: tuple[Tensor, ...]
    ) -> None:
        made, blocks = [self._gradient(x) for x in "qkv"], (self.q, self.k, self.kw, self.values, dnumerator.blocks)
        (q, k, kw, values, dnum), (dq, dk, dv) = (x.each[0] for x in blocks), (x.blocks.each[0] for x in made)
        da, dM, dcarry, dwrite = (x[0].flatten(0, 1) for x in (back.a, back.M, back.carry, back.write))
        reader, weights = self._reader(), self._weights()
        (P,) = self._pairs("P", self.q.each, self.k.mT).each
        (dP,) = self._pairs("dP", (dnum,), self.values.mT).each
        P.mul_(weights)
        Sum(dv).add(kw, dS.columns(self.room.V)).add(P.mT, dnumerator.v_by_block[0])
        dlog = P.mul_(dP)
        torch.sum(dlog.mT, -1, keepdim=True, out=da)
        torch.sum(dlog, -1, keepdim=True, out=dM).neg_()
        dscores = dP.mul_(weights)
        of_q, of_k = Sum(dq), Sum(dk)
        if read is not None:
            of_q.add(dnum, read.mT)  # of the reader
            torch.sum(torch.mul(reader, dq, out=dk), -1, keepdim=True, out=dcarry)
        of_q.times(self.carry).add(dscores, k)
        if not dS.is_zero:
            of_k.add(values, dS.mT).times(self.masks.writes, 0)  # of kw
            torch.sum(torch.mul(dk, kw, out=kw), -1, keepdim=True, out=dwrite)
        of_k.times(self.write).add(dscores.mT, q)
        dS.times(self.keep)
        self._add_keep_gradient(dcarry[:, -1, 0], read, dS)
        if read is not None:
            dS.add(reader.mT, dnum)
        for x, view in zip(made, dqkv, strict=True):
            view.copy_(x.by_row)


def _products(chunk: _Chunk, room: Room) -> _Products:
    return (_Near if chunk.is_near else _Far)(chunk, room)
