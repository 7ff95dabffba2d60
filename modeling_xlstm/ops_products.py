"""Products of float32 with a matrix on the CPU: by the way that is the fastest there.

torch multiplies float32 with MKL, which is slow on some CPUs. On AMD's Zen 5 it reads a matrix for a few rows with one
thread, at 10 GB/s, where a batch of the matrix' parts is read by all threads, at up to 40. Of many rows it multiplies
with units of half the width: 195 GFLOP/s in two threads, where oneDNN, which torch takes for other dtypes and has for
this one, reaches 450. On a Zen 3 it multiplies some tens of rows with a large matrix at two thirds of oneDNN's speed.
The fastest way for few rows depends on the CPU and their number, so it is measured. For more the CPU decides, and few
have torch's own way where there are gradients: clocks err while others compute, and a training that is stopped and
resumed is to round as one that is not.

Whoever has the memory can also pack a matrix: keep it once more, in the order in which oneDNN reads it the fastest.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

FEW = 16  # rows for which the ways are measured
SOME = 96  # rows up to which oneDNN is faster on AMD's CPUs without AVX-512
LEAST = 2**16  # numbers of a matrix for which another way is worth its calls to few rows
LEAST_OF_MANY = 2**22  # multiplications for which another way is worth its call to many
GAIN = 1.1  # how many times as fast another way must be: less may be the noise of measuring

# The operation that torch's own compiler calls.
_onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
PARTS = ("columns", "rows")
WAYS = ("whole", *PARTS, *(() if _onednn is None else ("onednn",)))

MOST_PACKED = 64  # rows; with more, the order in which a matrix is read matters little
SAMPLE = 64  # numbers of a packed weight that are looked at before each product


class Packed:
    """Weights [O, I] of the same inputs, as one matrix in oneDNN's own order; made again when one of them has changed.

    Attributes:
        dtype: theirs.
    """

    def __init__(self, weights: Sequence[Tensor]):
        self.dtype = weights[0].dtype
        self._pack(weights)

    def times(self, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        """x times the weights as they are now, their outputs side by side, plus a bias: [..., I] -> [..., sum of O]."""
        if not self._is_of(weights):
            self._pack(weights)
        return _by_onednn(x, self._numbers, bias)

    def _is_of(self, weights: Sequence[Tensor]) -> bool:
        # Addresses first: of numbers that were moved, to shared memory say, the samples are in memory that may be gone.
        there = [weight.data_ptr() for weight in weights] == self._places
        return there and list(map(_seen, weights, self._samples)) == self._packed_of

    def _pack(self, weights: Sequence[Tensor]) -> None:
        weights = [weight.detach() for weight in weights]
        with torch.inference_mode(False):
            whole = torch.cat(weights) if len(weights) > 1 else weights[0]
            self._numbers: Tensor = torch.ops.mkldnn._reorder_linear_weight(whole, None)
        # What is written through `.data` moves no version.
        bits = [weight.view(torch.int32 if weight.element_size() == 4 else torch.int16).flatten() for weight in weights]
        self._samples = [x[:: max(1, len(x) // SAMPLE)].numpy() for x in bits]
        self._places = [weight.data_ptr() for weight in weights]
        self._packed_of = list(map(_seen, weights, self._samples))


def _seen(weight: Tensor, sample: Any) -> tuple[int, bytes]:
    """What tells the numbers of a weight from others that it had at the same address: its version and a sample."""
    return 0 if weight.is_inference() else weight._version, sample.tobytes()


# By weight to be packed, as long as that lives: what it is the first of.
_packed: Any = WeakIdKeyDictionary()


def pack(weight: Tensor) -> bool:
    """Have a weight packed when it is first read without gradients, if its dtype and this CPU allow."""
    if weight.is_cpu and weight.numel() >= LEAST and is_packable(weight.dtype):
        _packed[weight] = {}
    return weight in _packed


def is_packable(dtype: torch.dtype) -> bool:
    """Whether oneDNN has an order of its own for numbers of a dtype on this CPU."""
    if _onednn is None:
        return False
    ops = torch.ops.mkldnn
    return (
        dtype is torch.float32
        or (dtype is torch.bfloat16 and ops._is_mkldnn_bf16_supported())
        or (dtype is torch.float16 and ops._is_mkldnn_fp16_supported())
    )


def unpack(weight: Tensor) -> None:
    """Forget what `pack` had made."""
    _packed.pop(weight, None)


def is_any_packed() -> bool:
    """Whether any weight of this process is to be packed."""
    return bool(_packed)


def packed_together(B: int, weights: Sequence[Tensor]) -> Packed | None:
    """What B rows are multiplied with instead of the weights, if the first is to be packed and rows gain by that."""
    is_one = B == 1 and weights[0].dtype is torch.float32  # which reads as fast in any order
    made = _packed.get(weights[0]) if is_any_packed() and B <= MOST_PACKED and not is_one else None
    if made is None or len({weight.dtype for weight in weights}) > 1:
        return None
    key = tuple(map(id, weights))
    if key not in made:
        made[key] = Packed(weights)
    packed: Packed = made[key]
    return packed


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight.T + bias: x [B, I], weight [O, I], bias [O]; all on the CPU; not for gradients."""
    way = way_of(len(x), weight)
    if way == "whole":
        return F.linear(x, weight, bias)
    if way == "onednn":
        return _by_onednn(x, weight, bias)
    y = x.new_empty(len(x), len(weight))
    plan_product_by(way, x, weight, y)()
    return y if bias is None else y.add_(bias)


def product_of_columns(a: Tensor, b: Tensor) -> Tensor:
    """a.T b of a [B, O] and b [B, I], on the CPU: the gradient of a weight; not for gradients of it."""
    if a.shape[1] <= FEW:  # the way of so few is measured, and gradients are to round the same every time
        return a.t() @ b
    if way_of(a.shape[1], b.t()) == "onednn" and a.shape[1] > b.shape[1]:
        return _by_onednn(b.t(), a.t(), None).t()  # what comes first is copied to turn it around
    return product(a.t(), b.t())


def plan_product(x: Tensor, weight: Tensor, out: Tensor, add: bool = False) -> Callable[[], object]:
    """What writes x weight.T into `out`, or adds it: x [B, I], weight [O, I], out [B, O]; not for gradients."""
    return plan_product_by(way_of(len(x), weight), x, weight, out, add)


def plan_product_by(way: str, x: Tensor, weight: Tensor, out: Tensor, add: bool = False) -> Callable[[], object]:
    """`plan_product` in one of the ways: 'whole', parts of the matrix times 'columns' or 'rows', or 'onednn'."""
    G, B = _parts(len(weight)), len(x)
    if way == "onednn":
        write = out.add_ if add else out.copy_
        return lambda: write(_by_onednn(x, weight, None))
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


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # A matrix that is dense neither as it is nor transposed is multiplied number by number: a thousand times as long.
    if not (weight.is_mkldnn or weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    y: Tensor = _onednn(x, weight, bias, "none", [], "")
    return y


def _parts(outputs: int) -> int:
    """In how many parts a matrix with so many outputs goes."""
    G, most = 1, min(4 * torch.get_num_threads(), outputs // 16)
    while most >= 2 * G and outputs % (2 * G) == 0:
        G *= 2
    return G


def way_of(B: int, weight: Tensor) -> str:
    """The way in which B rows are multiplied with a matrix [O, I]; torch's if every machine is to take the same."""
    few = B <= FEW
    is_small = weight.numel() < LEAST if few else B * weight.numel() < LEAST_OF_MANY
    if is_small or B == 0 or weight.dtype is not torch.float32 or torch.are_deterministic_algorithms_enabled():
        return "whole"
    has_onednn = _onednn is not None and torch.backends.mkldnn.enabled
    if not few:
        is_mkl_slow = is_mkl_narrow() or (B <= SOME and is_amd_without_avx512())
        return "onednn" if has_onednn and is_mkl_slow else "whole"
    spent = seconds(B, torch.get_num_threads())
    may = {**dict.fromkeys(PARTS, weight.is_contiguous() and _parts(len(weight)) > 1), "onednn": has_onednn}
    best = min((way for way in spent if may.get(way, True)), key=lambda way: spent[way])
    return best if spent["whole"] > GAIN * spent[best] else "whole"


def capabilities() -> dict[str, Any]:
    """What torch tells of the CPU; torch 2.7 nothing."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return known


@functools.cache
def is_mkl_narrow() -> bool:
    """Whether MKL multiplies with units of half the width that oneDNN uses: on AMD's CPUs since Zen 5."""
    known = capabilities()  # AVX-VNNI came to AMD with units of 512 bits; before, those of AVX-512 were of 256
    is_wide_amd = known.get("cpu_name", "").startswith("AMD") and known.get("avx512_f") and known.get("avx_vnni")
    return bool(is_wide_amd) and torch.backends.mkl.is_available()


@functools.cache
def is_amd_without_avx512() -> bool:
    """Whether this is a CPU of AMD's before Zen 4."""
    known = capabilities()
    is_one = known.get("cpu_name", "").startswith("AMD") and known.get("avx2") and not known.get("avx512_f")
    return bool(is_one) and torch.backends.mkl.is_available()


@functools.cache
def seconds(B: int, threads: int) -> dict[str, float]:
    """What B rows take in each way with so many threads: measured once, on matrices that no cache holds."""
    place: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are now
    weights, x, out = (torch.ones(size, **place) for size in ((16, 2048, 512), (B, 512), (B, 2048)))
    products = {way: [plan_product_by(way, x, w, out) for w in weights] for way in WAYS}
    spent: dict[str, list[float]] = {way: [] for way in products}
    for _ in range(5):
        for way, runs in products.items():
            start = time.perf_counter()
            for run in runs:
                run()
            spent[way].append(time.perf_counter() - start)
    return {way: min(found) for way, found in spent.items()}  # least disturbed by others
