"""What the tokens of the chunkwise mLSTM weigh: for each other, for the state they read and for the state they make.

Letters: N chunks of J blocks of L tokens; R heads of all rows, or of some. `a` is a token's log input gate relative to
the decay up to it, `M` the stabiliser relative to that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Gates(NamedTuple):
    """The gates of all chunks as the products need them, natural logs.

    Attributes:
        a: weight of token s in the state after the chunk, if no reset is between, [B, H, N, J L].
        M: stabiliser of token t over the last one; exp(a_s + rest_s - M_t) weighs s at t, [B, H, N, J L].
        carry: weight of the state before the chunk at each token, [B, H, N, J L].
        log_floor: lower bound of the normaliser, [B, H, N, J L].
        rest: what rounding has taken from a, [B, H, N, J L].
    """

    a: Tensor
    M: Tensor
    carry: Tensor
    log_floor: Tensor
    rest: Tensor


# A log weight below LOWEST is none at all. Where M changes by at most NEAR in a chunk, exp(a_s - M_t) is the product of
# a factor of s and one of t: what LOWEST then cuts off is still less than rounding.
LOWEST = {torch.float32: -60.0, torch.float64: -600.0}
NEAR = {torch.float32: 40.0, torch.float64: 500.0}
HIGHEST = {dtype: math.log(torch.finfo(dtype).max) - 3 for dtype in (torch.float32, torch.float64)}


def are_near(M: Tensor) -> list[bool]:
    """Whether no two stabilisers of a chunk are farther than `NEAR` from each other: [N, ..., J L] -> N."""
    if isinstance(M, FakeTensor) or M.is_meta:
        # Without numbers: what is exported must be right for any, what is to tell how much memory it takes is as usual.
        return [not torch.compiler.is_exporting()] * len(M)
    return (M.amax(-1) - M.amin(-1) <= NEAR[M.dtype]).flatten(1).all(1).tolist()


def weight_of_(x: Tensor) -> Tensor:
    """What a log weight says, but 0 below `LOWEST`.

    Products of numbers that are too small to be normal take a hundred times as long, and so does exp of infinities.
    """
    lowest = LOWEST[x.dtype]
    x.clamp_(lowest, HIGHEST[x.dtype]).exp_()  # only what is masked afterwards may be above
    return F.threshold(x, math.exp(lowest + 0.1), 0.0, inplace=True)


class Masks(NamedTuple):
    """What resets leave in one chunk of a group's heads, 1 and 0; None if there are none.

    Attributes:
        seen: whether token t sees token s of its block, [J, R, L, L].
        reads: whether a token's document is that before its block, [J, R, L, 1].
        writes: whether it is that after its block, [J, R, L, 1].
        stays: whether these two are the same, [J, R, 1, 1].
    """

    seen: Tensor | None = None
    reads: Tensor | None = None
    writes: Tensor | None = None
    stays: Tensor | None = None


def masks_of(document: Tensor, like: Tensor) -> Masks:
    """The masks of documents [rows, J, L] that are counted from the beginning of the chunk; like is [J, R, L]."""
    document = document.repeat_interleave(like.shape[1] // len(document), 0).transpose(0, 1)
    after = document[..., -1:]
    before = F.pad(after[:-1], (0, 0, 0, 0, 1, 0))
    seen = (document[..., None] == document[..., None, :]).to(like.dtype).tril_()
    rest = ((document == before)[..., None], (document == after)[..., None], (before == after)[..., None])
    return Masks(seen, *(x.to(like.dtype) for x in rest))


class Weights(NamedTuple):
    """The gates of a chunk of a group's heads as its products need them, or of all N chunks, [N, ...].

    Where a chunk is near, M changes by at most `NEAR` in every head; `lift` is exp of how far M is below its last value
    there, and 1 elsewhere.

    Attributes:
        a: see `Gates`, [J, rows, heads, L, 1].
        M: see `Gates`, [J, rows, heads, L, 1].
        carry: weight of the state before the chunk, over lift, [J, rows, heads, L, 1].
        write: weight in the state after the chunk, if no reset is between, scale included, [J, rows, heads, L, 1].
        floor: lower bound of the normaliser, over lift, [J, rows, heads, L, 1].
        eps: added to the normaliser, over lift, [J, rows, heads, L, 1].
        score: what a score with the token is to be weighed by besides exp(a_s - M_t), [J, rows, heads, L, 1].
    """

    a: Tensor
    M: Tensor
    carry: Tensor
    write: Tensor
    floor: Tensor
    eps: Tensor
    score: Tensor


def weigh(gates: Tensor, group: tuple[slice, slice], K: int, eps: float) -> tuple[Tensor, list[bool]]:
    """`Weights` of all chunks of a group, [7, N, J, rows, heads, L, 1], and which chunks are near.

    Args:
        gates: see `Gates`, [5, B, H, N, J, L].
        group: rows, and heads of each.
        K: width of a key.
        eps: added to the normaliser.
    """
    g = Gates(*gates[(slice(None), *group)].permute(0, 3, 4, 1, 2, 5))  # [N, J, rows, heads, L]
    drop = g.M - g.M[:, -1:, ..., -1:]  # -log lift
    kinds = are_near(g.M[:, 0]) if g.M.shape[1] == 1 else [True] * len(drop)  # chunks of several blocks are
    for drop_c, near in zip(drop, kinds, strict=True):
        if not near:
            drop_c.zero_()
    numbers = torch.stack([g.a, g.M, g.carry + drop, g.a, g.log_floor + drop, drop, g.rest])
    made = Weights(*numbers)
    weight_of_(numbers[2:4])
    made.write.mul_(K**-0.5)
    bound = HIGHEST[drop.dtype]  # both 1 / floor and floor are to be normal numbers
    made.floor.clamp_(-bound, bound)
    numbers[4:].exp_()
    made.eps.mul_(eps)
    made.score.mul_(K**-0.5)
    return numbers[..., None], kinds
