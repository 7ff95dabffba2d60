"""Operations that keep less for the backward pass than PyTorch's own: what is cheap is made again from what is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .ops_half import is_hooked, multiply


def make_again(make: Callable[..., Tensor], modules: Iterable[nn.Module], *inputs: Tensor | None) -> Tensor:
    """make(*inputs), of which the inputs alone are kept; the backward pass makes again what it needs of the rest.

    It stops at the last tensor that is needed, so a product at the end of `make` is not computed twice. A compiler
    chooses for itself what to keep, and where a module has hooks, which may count its calls, everything is kept.

    Args:
        make: cheap, and draws no random numbers.
        modules: that `make` calls. Their weights are inputs too: the backward pass takes those of the forward pass, and
            raises as everywhere if they were written over.
        inputs: tensors or None.
    """
    parts = [part for module in modules for part in module.modules()]
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or any(map(is_hooked, parts)):
        return make(*inputs)
    owners = (part._parameters for part in parts)
    places = [(owner, name) for owner in owners for name, weight in owner.items() if weight is not None]

    def run(*given: Any) -> Tensor:
        with _weights_in(places, given[len(inputs) :]):
            return make(*given[: len(inputs)])

    weights = (owner[name] for owner, name in places)
    made: Tensor = checkpoint(run, *inputs, *weights, use_reentrant=False, preserve_rng_state=False)
    return made


@contextlib.contextmanager
def _weights_in(places: list[tuple[dict[str, Any], str]], weights: tuple[Tensor, ...]) -> Iterator[None]:
    """Other weights in the places of modules' own."""
    own = [owner[name] for owner, name in places]
    try:
        for (owner, name), weight in zip(places, weights, strict=True):
            owner[name] = weight
        yield
    finally:
        for (owner, name), weight in zip(places, own, strict=True):
            owner[name] = weight


def project(
    linear: nn.Module, make: Callable[..., Tensor], modules: Iterable[nn.Module], *inputs: Tensor | None
) -> Tensor:
    """linear(make(*inputs)), of which the inputs alone are kept; see `make_again`.

    A projection that is more than its product (adapters, hooks, quantised weights) runs once and keeps its own input.
    """
    if type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not is_hooked(linear):
        return make_again(lambda *xs: multiply(linear, make(*xs)), (*modules, linear), *inputs)
    projected: Tensor = linear(make_again(make, modules, *inputs))
    return projected


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; x and the weight are kept."""
    if x.is_cuda or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.rms_norm(x, (x.shape[-1],), weight, eps)  # on a GPU one kernel, which keeps no more
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


class _RMSNorm(torch.autograd.Function):
    """Elsewhere `F.rms_norm` is several operations, which keep the input twice, the second time in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        rstd = torch.rsqrt(length.square_().div_(x.shape[-1]).add_(ctx.eps))
        normal, dy = x * rstd, dy.to(wide)
        dweight = (dy * normal).flatten(0, -2).sum(0)
        dnormal = dy * weight
        along = (dnormal * normal).mean(-1, keepdim=True)
        return dnormal.addcmul_(normal, along, value=-1).mul_(rstd).to(x.dtype), dweight.to(weight.dtype), None


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Bound x smoothly to +-cap: cap * tanh(x / cap); None leaves it. The result is kept, as its receiver keeps it."""
    if cap is None:
        return x
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        capped: Tensor = _SoftCap.apply(x, cap)
        return capped
    return cap * torch.tanh(x / cap)


class _SoftCap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cap: float) -> Tensor:
        y = (x / cap).tanh_().mul_(cap)
        ctx.save_for_backward(y)
        ctx.cap = cap
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        t = ctx.saved_tensors[0] / ctx.cap
        return torch.ops.aten.tanh_backward(dy, t, grad_input=t), None


PIECE = 2**20  # logits looked at together, or a sixteenth of all: wide copies of more would only take memory


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Sum of -log softmax(logits) at the targets, in float32 or wider; of all tensors of that size logits are kept.

    Args:
        logits: [N, vocab_size].
        targets: indices below vocab_size, [N]; where one is `ignore_index` there is nothing to predict.
        ignore_index: see `targets`.

    Returns:
        loss: [].
    """
    if torch.compiler.is_compiling():
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="sum")
    loss: Tensor = _CrossEntropy.apply(logits, targets, ignore_index)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.ignore_index = ignore_index
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = [
            F.cross_entropy(logits[rows].to(wide), targets[rows], ignore_index=ignore_index, reduction="sum")
            for rows in _pieces(logits)
        ]
        return torch.stack(losses).sum() if losses else logits.new_zeros((), dtype=wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        for rows in _pieces(logits):
            counted = targets[rows] != ctx.ignore_index
            error = torch.softmax(logits[rows], -1, dtype=dloss.dtype)
            error.scatter_add_(-1, targets[rows].where(counted, 0)[:, None], -torch.ones_like(error[:, :1]))
            torch.mul(error, (counted * dloss)[:, None], out=dlogits[rows])
        return dlogits, None, None


def _pieces(logits: Tensor) -> Iterator[slice]:
    N, vocab_size = logits.shape
    step = max(1, PIECE // vocab_size, N // 16)
    yield from (slice(start, start + step) for start in range(0, N, step))
