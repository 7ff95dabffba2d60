"""How the tokens and states of the chunkwise mLSTM lie in memory while they are computed with.

Letters: N chunks of J blocks of L tokens; R heads of all rows, or of some. A chunk's tokens are [J, rows, heads, L, .],
and [J, R, L, .] in products. n is one more column of the matrix memory: the state S is [R, K, V + `MARGIN`].
"""

from __future__ import annotations

import itertools
import math
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 2**19  # numbers of the largest tensor of a chunk of the heads that go together
MARGIN = 16  # columns of S beside those of C: as many as leave its rows where a cache line begins

Group = tuple[slice, slice]  # rows, and heads of each


def groups(shape: torch.Size, widths: tuple[int, int]) -> list[Group]:
    """Cut rows and heads of gates [B, H, N, J, L]: no tokens and no scores of a chunk are more numbers than `GROUP`."""
    B, H, _, J, L = shape
    most = GROUP // (J * L * max(L, *widths))  # heads that go together
    return list(itertools.product(_cut(B, most // H), _cut(H, most)))


def _cut(size: int, most: int) -> list[slice]:
    """Parts of nearly equal size, none of them larger than `most`."""
    count = math.ceil(size / max(1, most))
    edges = [size * part // count for part in range(count + 1)]
    return [slice(*edge) for edge in itertools.pairwise(edges)]


class Sum:
    """A tensor that products are added to, in place.

    Attributes:
        numbers: the tensor; they mean nothing as long as the sum is zero.
        is_zero: whether nothing has been added, so that nothing need be read.
    """

    def __init__(self, numbers: Tensor, is_zero: bool = True):
        self.numbers, self.is_zero = numbers, is_zero

    def add(self, x: Tensor, y: Tensor | Sum) -> Sum:
        """Add x y, all [R, ., .]."""
        if isinstance(y, Sum):
            return self if y.is_zero else self.add(x, y.numbers)
        if self.is_zero:
            torch.bmm(x, y, out=self.numbers)
        else:
            self.numbers.baddbmm_(x, y)
        self.is_zero = False
        return self

    def times(self, weights: Tensor | None, block: int | None = None) -> Sum:
        """Weigh what has been added, if there are weights: by all, or by those of a block."""
        if weights is not None and not self.is_zero:
            self.numbers.mul_(weights if block is None else weights[block])
        return self

    @property
    def mT(self) -> Sum:
        """The same numbers transposed, to be read."""
        return Sum(self.numbers.mT, self.is_zero)

    def columns(self, count: int) -> Sum:
        """The first columns, to be read."""
        return Sum(self.numbers[..., :count], self.is_zero)


def joined(C: Tensor | None, n: Tensor | None, group: Group, like: Tensor) -> Sum:
    """A group's S [R, K, V + MARGIN] of C [B, H, K, V] and n [B, H, K]; None are zeros, and C is like another."""
    *heads, K, V = like[group].shape
    S = like.new_empty(*heads, K, V + MARGIN)
    if C is None and n is None:
        return Sum(S.flatten(0, 1))
    S.zero_()
    if C is not None:
        S[..., :V] = C[group]
    if n is not None:
        S[..., V] = n[group]
    return Sum(S.flatten(0, 1), is_zero=False)


def separate(S: Sum, C: Tensor, n: Tensor) -> None:
    """Write S, to which something has been added, into views of C and n; see `joined`."""
    V = C.shape[-1]
    C.copy_(S.numbers[..., :V].view(C.shape))
    n.copy_(S.numbers[..., V].view(n.shape))


class Blocks(NamedTuple):
    """Tokens of a chunk as products need them, [J, R, L, .].

    Attributes:
        whole: all.
        each: by block.
        mT: those transposed.
    """

    whole: Tensor
    each: tuple[Tensor, ...]
    mT: tuple[Tensor, ...]

    @classmethod
    def of(cls, whole: Tensor) -> Blocks:
        return cls(whole, whole.unbind(), whole.mT.unbind())


class Buffer:
    """A tensor that each chunk writes anew, where the chunk before had its own: in the cache.

    Attributes:
        by_row: [J, rows, heads, L, .].
        blocks: the same, [J, R, L, .].
    """

    def __init__(self, by_row: Tensor):
        self.by_row, self.blocks = by_row, Blocks.of(by_row.flatten(1, 2))


class WideBuffer(Buffer):
    """V numbers of each token, one that belongs to n, and a margin of zeros.

    Attributes:
        v: the V numbers, [J, rows, heads, L, V].
        n: the one, [J, rows, heads, L, 1].
        v_by_block: the V numbers, [R, L, V] each.
    """

    def __init__(self, by_row: Tensor):
        super().__init__(by_row)
        V = by_row.shape[-1] - MARGIN
        by_row[..., V:].zero_()
        self.v, self.n, self.v_by_block = by_row[..., :V], by_row[..., V : V + 1], self.blocks.whole[..., :V].unbind()


class Tokens:
    """A group's tokens [B, T, H, .] by chunk: views [J, rows, heads, L, .], of a copy where tokens are missing."""

    def __init__(self, x: Tensor, group: Group, blocks: tuple[int, int]):
        (rows, heads), (J, L) = group, blocks
        T = x.shape[1] // (J * L) * J * L
        self._rest = x[rows, T:, heads]
        parts = [x[rows, :T, heads]]
        if self._rest.shape[1]:
            self._copy = F.pad(self._rest, (0, 0, 0, 0, 0, J * L - self._rest.shape[1]))
            parts.append(self._copy)
        self._parts = [part.unflatten(1, (-1, J, L)).permute(1, 2, 0, 4, 3, 5) for part in parts]

    @cached_property
    def chunks(self) -> list[Tensor]:
        return [chunk for part in self._parts for chunk in part]

    def put_back(self) -> None:
        """What was written into the copy goes where it belongs."""
        if rest := self._rest.shape[1]:
            self._rest.copy_(self._copy[:, :rest])

    def operands(self, dtype: torch.dtype) -> list[Blocks] | list[Tensor]:
        """By chunk, views that products can read: of one row, if it has the dtype. Else `chunks`, to be copied."""
        if self._rest.dtype is not dtype or len(self._rest) > 1:
            return self.chunks
        views: list[Blocks] = []
        for part in self._parts:
            wholes, J = part[:, :, 0], part.shape[1]
            # All at once: in the middle of products a view costs as much as a small operation.
            each, mT = (x.flatten(0, 1).unbind() for x in (wholes, wholes.mT))
            views += [Blocks(x, each[c * J :][:J], mT[c * J :][:J]) for c, x in enumerate(wholes)]
        return views


class Room:
    """Buffers by name for the heads of a group, [J, rows, heads, L]."""

    def __init__(self, like: Tensor, K: int, V: int, shape: tuple[int, ...]):
        self.shape, self.K, self.V = shape, K, V
        self._like = like
        self._buffers: dict[str, Buffer] = {}
        self._wide: dict[str, WideBuffer] = {}

    def tokens(self, name: str, width: int) -> Buffer:
        """[J, rows, heads, L, width]."""
        if name not in self._buffers:
            self._buffers[name] = Buffer(self._like.new_empty(*self.shape, width))
        return self._buffers[name]

    def wide(self, name: str) -> WideBuffer:
        """[J, rows, heads, L, V + MARGIN]."""
        if name not in self._wide:
            self._wide[name] = WideBuffer(self._like.new_empty(*self.shape, self.V + MARGIN))
        return self._wide[name]

    @cached_property
    def state(self) -> Tensor:
        """[R, K, V + MARGIN]."""
        _, rows, heads, _ = self.shape
        return self._like.new_empty(rows * heads, self.K, self.V + MARGIN)
