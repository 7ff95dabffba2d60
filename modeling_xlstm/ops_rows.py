"""A few rows times a matrix on the CPU: in parts, where that is faster.

Such a product does little more than read the matrix. Made by one call of MKL, as torch does it, it reads on some CPUs
with one thread and slowly: 10 GB/s on AMD's Zen 5. The same matrix as a batch of smaller ones is read by all threads,
up to 40 GB/s. Which way is the fastest depends on the CPU and the number of rows, so it is measured.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST_ROWS = 16
LEAST = 2**16  # numbers of a matrix for which another way is worth its calls
GAIN = 1.1  # how many times as fast another way must be: less may be the noise of measuring


def plan_product(x: Tensor, weight: Tensor, out: Tensor, add: bool = False) -> Callable[[], object]:
    """What writes x weight.T into `out`, or adds it: x [B, I], weight [O, I], out [B, O]; not for gradients."""
    has_ways = len(x) <= MOST_ROWS and weight.numel() >= LEAST and weight.is_contiguous() and _parts(len(weight)) > 1
    way = fastest(len(x), torch.get_num_threads()) if has_ways and weight.dtype is torch.float32 else "whole"
    return plan_product_by(way, x, weight, out, add)


def plan_product_by(way: str, x: Tensor, weight: Tensor, out: Tensor, add: bool = False) -> Callable[[], object]:
    """`plan_product` in one of the ways: 'whole', or parts of the matrix times 'columns' or 'rows'."""
    G, B = _parts(len(weight)), len(x)
    if way == "whole" or G == 1:
        whole = functools.partial(torch.addmm, out) if add else torch.mm
        return functools.partial(whole, x, weight.t(), out=out)
    parts = weight.view(G, -1, weight.shape[1])
    if way == "columns":
        # A column must have the strides of a row turned around: with others, MKL takes the slow way again.
        a, b, to = parts, x.t().expand(G, -1, -1), out.t().unflatten(0, (G, -1))
    else:
        a, b, to = x.expand(G, -1, -1), parts.mT, out.unflatten(1, (G, -1)).transpose(0, 1)
    if B == 1:
        return functools.partial(to.baddbmm_, a, b) if add else functools.partial(torch.bmm, a, b, out=to)
    write = to.add_ if add else to.copy_
    return lambda: write(torch.bmm(a, b))


def _parts(outputs: int) -> int:
    """In how many parts a matrix with so many outputs goes."""
    G, most = 1, min(4 * torch.get_num_threads(), outputs // 16)
    while most >= 2 * G and outputs % (2 * G) == 0:
        G *= 2
    return G


@functools.cache
def fastest(B: int, threads: int) -> str:
    """The fastest way for B rows with so many threads: measured once, on matrices that together no cache holds."""
    place: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are now
    weights, x, out = torch.ones(16, 2048, 512, **place), torch.ones(B, 512, **place), torch.empty(B, 2048, **place)
    products = {way: [plan_product_by(way, x, w, out) for w in weights] for way in ("whole", "columns", "rows")}
    spent: dict[str, list[float]] = {way: [] for way in products}
    for _ in range(5):
        for way, runs in products.items():
            start = time.perf_counter()
            for run in runs:
                run()
            spent[way].append(time.perf_counter() - start)
    seconds = {way: min(found) for way, found in spent.items()}  # least disturbed by others
    best = min(seconds, key=lambda way: seconds[way])
    return best if seconds["whole"] > GAIN * seconds[best] else "whole"
