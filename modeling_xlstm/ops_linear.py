"""Products of linear layers on a CPU: exact, and by the way that is the fastest there.

Those of float32 are `ops_products`'. Those of half precision, on CPUs that have no units for it, go through float32 and
are rounded once: there torch's own products of bfloat16 convert inside their loops, which took three to four times as
long as converting both operands at once and multiplying in float32. What the backward pass needs is kept as it came.
`multiply` is where every layer's product is chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops_common import differentiable_by
from .ops_products import FEW, capabilities, packed_together, product, product_of_columns, way_of

ROWS, COLUMNS = 64, 32  # of a result in half precision; with fewer, converting operands takes what the product gains
UNITS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


@functools.cache
def has_units(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies numbers of this dtype itself; True too where torch cannot tell."""
    known = capabilities()
    if dtype not in UNITS or known.get("architecture") != "x86_64":
        return True
    return any(known.get(unit) for unit in UNITS[dtype])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, is_remade: bool = False) -> Tensor:
    """`F.linear` over [..., I] on a CPU, the same to a rounding.

    Args:
        x: [..., I].
        weight: [O, I].
        bias: [O] or None.
        is_remade: whether only what the backward pass needs is asked for: the result is undefined then.
    """
    if torch.is_autocast_enabled("cpu"):
        x, weight = _in_half(x), _in_half(weight)
        bias = None if bias is None else _in_half(bias)
    rows = x.shape[:-1].numel()
    if torch.compiler.is_compiling():
        if _is_for_sums(x, weight, rows):
            return _sums(x.reshape(rows, -1), weight, bias).view(*x.shape[:-1], -1)
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        packed = packed_together(rows, (weight,))
        if packed is not None and packed.dtype is x.dtype:
            return packed.times(x, (weight,), bias)
    if not _gains(x, weight, rows, weight.shape[0]):
        return F.linear(x, weight, bias)
    if x.dtype is torch.float32 and not torch.is_grad_enabled():
        return _linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias, is_remade)
    return y


def _in_half(x: Tensor) -> Tensor:
    """As autocast has it, which leaves float64 alone."""
    return x if x.dtype is torch.float64 else x.to(torch.get_autocast_dtype("cpu"))


def multiply(layer: nn.Module, x: Tensor, is_remade: bool = False) -> Tensor:
    """layer(x), by `linear` where it is an `nn.Linear` and nothing asks for a call; `is_remade` as there, or ignored.

    A class of our own would do without this function, but libraries that quantise look for `nn.Linear` itself.
    """
    if x.is_cpu and type(layer) is nn.Linear and not is_hooked(layer):
        return linear(x, layer.weight, layer.bias, is_remade)
    y: Tensor = layer(x)
    return y


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than the `forward` of its class, in the backward pass too."""
    own, every = module.__dict__, nn.modules.module
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )


def bmm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.bmm` of [G, M, K] and [G, K, N], the same to a rounding, plus a bias [G, 1, N]; not for autocast."""
    if not a.is_meta and torch.is_autocast_enabled(a.device.type):
        y: Tensor = torch.bmm(a, b)
        return y if bias is None else y + bias  # not rounded to half precision
    if a.element_size() == 2 and _gains(a, b, a.shape[1], b.shape[2]):
        y = _Products.apply(a, b)
        return y if bias is None else y + bias
    if torch.compiler.is_compiling() and _is_for_sums(a, b, a.shape[1]):
        return _sums(a, b.mT, bias)
    return torch.bmm(a, b) if bias is None else torch.baddbmm(bias, a, b)  # no tensor more


def _are_plain(a: Tensor, b: Tensor) -> bool:
    """Whether both are on the CPU, of one dtype, and plain tensors, which quantised weights are not."""
    return a.is_cpu and a.dtype is b.dtype and {type(a), type(b)} <= {Tensor, nn.Parameter}


def _gains(a: Tensor, b: Tensor, rows: int, columns: int) -> bool:
    """Whether torch's own product of plain tensors is slower than ours."""
    if torch.compiler.is_compiling() or not _are_plain(a, b):
        return False
    if a.element_size() == 2:
        return min(rows - ROWS, columns - COLUMNS) >= 0 and not has_units(a.dtype)
    if rows <= FEW and torch.is_grad_enabled():  # see `ops_products`
        return False
    return way_of(rows, b) != "whole"


def _is_for_sums(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Whether a compiled product is faster as sums, which a compiler puts into one loop with what stands around them.

    A library's product has to be called, and reads a matrix for few rows more slowly. Adding up takes longer than
    reading only where there are more rows than bytes in a number.
    """
    if torch.is_grad_enabled() or torch.compiler.is_exporting():  # who exports wants products
        return False
    return _are_plain(x, weight) and 0 < rows <= weight.element_size()


def _sums(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight.T + bias, row by row in float32 or wider: [..., B, I] and [..., O, I] -> [..., B, O]."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight = weight.to(wide)
    y = torch.stack([(weight * row.to(wide)[..., None, :]).sum(-1) for row in x.unbind(-2)], -2)
    return (y if bias is None else y + bias).to(x.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.float()
    return product(_rows(x), weight.float(), bias).to(x.dtype).view(*x.shape[:-1], -1)


def _in_float32(operation: Callable[..., Tensor], *xs: Tensor | None) -> Tensor:
    """A product of torch's, in the dtype of its first operand."""
    assert xs[0] is not None
    return operation(*(None if x is None else x.float() for x in xs)).to(xs[0].dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).float()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, is_remade: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        if is_remade:
            return x.new_empty(*x.shape[:-1], len(weight))
        with torch.autocast("cpu", enabled=False):
            return _linear(x, weight, bias)

    @staticmethod
    @differentiable_by(lambda _, x, weight, bias: _in_float32(F.linear, x, weight, bias))
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, _), dy = ctx.saved_tensors, _rows(dy)
        dx = dweight = dbias = None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:
                dx = product(dy, weight.float().t()).to(x.dtype).view(x.shape)
            if ctx.needs_input_grad[1]:
                dweight = product_of_columns(dy, _rows(x)).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                dbias = dy.sum(0).to(weight.dtype)
        return dx, dweight, dbias, None


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.bmm(a.float(), b.float()).to(a.dtype)

    @staticmethod
    @differentiable_by(lambda _, a, b: _in_float32(torch.bmm, a, b))
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        (a, b), dy = ctx.saved_tensors, dy.float()
        return torch.bmm(dy, b.float().mT).to(a.dtype), torch.bmm(a.float().mT, dy).to(b.dtype)
