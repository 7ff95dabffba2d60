"""Operations that keep less for the backward pass than PyTorch's own: what is cheap is made again from what is kept."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .ops_common import differentiable_by, token_blocks
from .ops_linear import is_hooked, multiply


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
        runs = itertools.count()  # from the second on for the backward pass
        return make_again(lambda *xs: multiply(linear, make(*xs), next(runs) > 0), (*modules, linear), *inputs)
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
    @differentiable_by(lambda ctx, x, weight: F.rms_norm(x, (x.shape[-1],), weight, ctx.eps))
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
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        t = ctx.saved_tensors[0] / ctx.cap
        into = {} if torch.is_grad_enabled() else {"grad_input": t}  # a second derivative reads t
        return torch.ops.aten.tanh_backward(dy, t, **into), None


def causal_conv(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor, document: Tensor | None) -> Tensor:
    """Depthwise causal convolution over the last W tokens of the same document; of all tensors the inputs are kept.

    Args:
        x: [B, T, D].
        past: the W - 1 inputs before the first token, oldest first, [B, W - 1, D].
        weight: [D, W]; the last tap multiplies the current token.
        bias: [D].
        document: the number of the document that each token of the past and of x belongs to, [B, W - 1 + T]; None if
            all belong to one.

    Returns:
        y: [B, T, D].
    """
    if torch.compiler.is_compiling():
        return _convolve(torch.cat([past, x], 1), weight, bias, document)
    y: Tensor = _CausalConv.apply(x, past, weight, bias, document)
    return y


def _convolve(seen: Tensor, weight: Tensor, bias: Tensor, document: Tensor | None, out: Tensor | None = None) -> Tensor:
    W = weight.shape[1]
    T, y = seen.shape[1] - W + 1, bias
    for tap, weight_tap in enumerate(weight.unbind(1)):
        x_tap = seen[:, tap : tap + T]
        if document is not None:
            x_tap = x_tap * _is_same(document, tap, W)
        # In place but for the first: for a long sequence new memory costs more than the sum.
        y = y.addcmul_(x_tap, weight_tap) if tap else torch.addcmul(y, x_tap, weight_tap, out=out)
    return y


def _is_same(document: Tensor, tap: int, W: int) -> Tensor:
    """Whether what a tap sees belongs to the document of the token, [B, T, 1]."""
    current = document[:, W - 1 :]
    return (document[:, tap : tap + current.shape[1]] == current)[..., None]


class _CausalConv(torch.autograd.Function):
    """On the CPU block by block: beside its result, a long sequence then needs no new memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, past: Tensor, weight: Tensor, bias: Tensor, document: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, past, weight, bias, document)
        y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
        for block, seen, documents in _seen_in_blocks(x, past, document):
            _convolve(seen, weight, bias, documents, out=y[:, block])
        return y

    @staticmethod
    @differentiable_by(lambda _, x, past, *rest: _convolve(torch.cat([past, x], 1), *rest))
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, past, weight, bias, document = ctx.saved_tensors
        W, wide = weight.shape[1], torch.promote_types(dy.dtype, torch.float32)
        dseen = dy.new_zeros(x.shape[0], W - 1 + x.shape[1], x.shape[2])
        dweight, dbias = (dy.new_zeros(w.shape, dtype=wide) for w in (weight, bias))
        for block, seen, documents in _seen_in_blocks(x, past, document):
            d, T = dy[:, block], block.stop - block.start
            dbias += d.sum((0, 1), dtype=wide)
            for tap, weight_tap in enumerate(weight.unbind(1)):
                d_tap = d if documents is None else d * _is_same(documents, tap, W)
                dweight[:, tap] += (d_tap * seen[:, tap : tap + T]).sum((0, 1), dtype=wide)
                dseen[:, block.start + tap : block.stop + tap].addcmul_(d_tap, weight_tap)
        dpast, dx = dseen.split([W - 1, x.shape[1]], 1)
        return dx.to(x.dtype), dpast.to(past.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype), None


def _seen_in_blocks(x: Tensor, past: Tensor, document: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Blocks of tokens, what their taps see, [B, W - 1 + t, D], and which document that belongs to."""
    B, T, D = x.shape
    window = past.shape[1]
    for block in token_blocks(T, B * D) if x.is_cpu else [slice(0, T)]:
        seen = torch.cat([past, x[:, block]], 1)
        past = seen[:, -window:]
        yield block, seen, None if document is None else document[:, block.start : block.stop + window]


PIECE = 2**20  # logits looked at together, or a sixteenth of all: wide copies of more would only take memory


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Transformers' `ForCausalLMLoss`, but logits wider than float32 stay as wide; no other tensor as large is kept.

    Args:
        logits: [B, T, vocab_size].
        labels: ids of the tokens themselves, [B, T]; what each predicts is the next one. Not read with `shift_labels`.
        vocab_size: number of ids.
        num_items_in_batch: what the sum is divided by; None counts the targets.
        ignore_index: the target of a row that predicts nothing.
        shift_labels: what each row of logits predicts, [B, T].
        kwargs: not read; Transformers passes on what the model was given.

    Returns:
        loss: [].

    Raises:
        ValueError: labels are no integers, or not as many as there are rows of logits.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    if shift_labels.numel() != logits.shape[:-1].numel() or shift_labels.is_floating_point():
        got = f"{list(shift_labels.shape)} of {shift_labels.dtype}"
        raise ValueError(
            f"Labels must be {list(logits.shape[:-1])} integers, one for each row of logits; got {got}. With labels, "
            "leave `logits_to_keep` out."
        )
    targets = shift_labels.reshape(-1).to(logits.device, torch.int64)
    total = cross_entropy(logits.view(-1, vocab_size), targets, ignore_index)
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    return total / torch.as_tensor(num_items_in_batch, device=total.device)


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
        return _cross_entropy(logits, targets, ignore_index)
    loss: Tensor = _CrossEntropy.apply(logits, targets, ignore_index)
    return loss


def _cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="sum")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.ignore_index = ignore_index
        losses = [_cross_entropy(logits[rows], targets[rows], ignore_index) for rows in _pieces(logits)]
        return torch.stack(losses).sum() if losses else _cross_entropy(logits, targets, ignore_index)

    @staticmethod
    @differentiable_by(lambda ctx, logits, targets: _cross_entropy(logits, targets, ctx.ignore_index))
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
