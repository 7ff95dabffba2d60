"""Products of half precision on CPUs that have no units for it: through float32, and rounded once.

There torch's own products of bfloat16 convert inside their loops, which took three to four times as long as converting
both operands at once and multiplying in float32. What the backward pass needs is kept in half precision. `multiply` is
where every layer's product is chosen.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .ops_rows import MOST_ROWS, plan_product

ROWS, COLUMNS = 64, 32  # of a result; with fewer, converting the operands takes what the product gains
UNITS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


@functools.cache
def has_units(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies numbers of this dtype itself; True too where torch cannot tell."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # of a later torch than 2.7
    if dtype not in UNITS or known.get("architecture") != "x86_64":
        return True
    return any(known.get(unit) for unit in UNITS[dtype])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` over [..., I] on a CPU, the same to a rounding."""
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(half), weight.to(half), None if bias is None else bias.to(half)
    if not _gains(x, weight, x.shape[:-1].numel(), weight.shape[0]):
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


def multiply(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x): by that product where the layer is an `nn.Linear` of which nothing asks for a call.

    A class of our own would do without this function, but libraries that quantise look for `nn.Linear` itself.
    """
    is_half = x.is_cpu and (x.element_size() == 2 or torch.is_autocast_enabled("cpu"))
    are_few = _are_few(x)
    if (is_half or are_few) and type(layer) is nn.Linear and not is_hooked(layer):
        if is_half:
            return linear(x, layer.weight, layer.bias)
        if type(layer.weight) is nn.Parameter and layer.weight.dtype is x.dtype:
            return _few_rows(x, layer.weight, layer.bias)
    y: Tensor = layer(x)
    return y


def _are_few(x: Tensor) -> bool:
    """Whether these are few plain rows on a CPU without gradients, for which torch may read the weights slowly."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu or x.dtype is not torch.float32:
        return False
    return type(x) is Tensor and x.shape[:-1].numel() <= MOST_ROWS


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty(len(rows), len(weight))
    plan_product(rows, weight, y)()
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], -1)


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
    is_autocast = torch.is_autocast_enabled(a.device.type)
    if _gains(a, b, a.shape[1], b.shape[2]) and not is_autocast:
        y: Tensor = _Products.apply(a, b)
    elif bias is not None and not is_autocast:
        return torch.baddbmm(bias, a, b)  # no tensor more
    else:
        y = torch.bmm(a, b)
    return y if bias is None else y + bias  # under autocast not rounded to half precision


def _gains(a: Tensor, b: Tensor, rows: int, columns: int) -> bool:
    """Whether a product is a large one of plain half-precision tensors on a CPU without units for them."""
    return (
        a.element_size() == 2
        and min(rows - ROWS, columns - COLUMNS) >= 0
        and a.is_cpu
        and a.dtype is b.dtype
        and not has_units(a.dtype)
        and not torch.compiler.is_compiling()
        and {type(a), type(b)} <= {Tensor, nn.Parameter}
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        with torch.autocast("cpu", enabled=False):
            rows, transposed = x.flatten(0, -2).float(), weight.float().t()
            y = rows @ transposed if bias is None else torch.addmm(bias.float(), rows, transposed)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), dy = ctx.saved_tensors, dy.flatten(0, -2).float()
        dx = dweight = dbias = None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:
                dx = (dy @ weight.float()).to(x.dtype).view(x.shape)
            if ctx.needs_input_grad[1]:
                dweight = (dy.t() @ x.flatten(0, -2).float()).to(weight.dtype)
            if ctx.has_bias and ctx.needs_input_grad[2]:
                dbias = dy.sum(0).to(weight.dtype)
        return dx, dweight, dbias


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.bmm(a.float(), b.float()).to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        (a, b), dy = ctx.saved_tensors, dy.float()
        return torch.bmm(dy, b.float().mT).to(a.dtype), torch.bmm(a.float().mT, dy).to(b.dtype)
