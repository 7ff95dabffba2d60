"""A diagnosis instead of silence when values stop being finite, for `config.debug`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .states_xlstm import LayerState, named_tensors


def check_finite(
    name: str, block: nn.Module, x: Tensor, y: Tensor, before: LayerState | None, after: LayerState
) -> None:
    """Raise if a block's output or state is not finite; costs one look at every value.

    Args:
        name: the block's name in the model.
        block: the block; its parameters are looked at only if something is wrong.
        x: its input, [B, T, D].
        y: its output, [B, T, D].
        before: its state before the first token.
        after: its state after the last token.

    Raises:
        FloatingPointError: says what is not finite, in which rows and from which token on, and where it began.
    """
    faults = [*_faults("output", y), *_state_faults("state", after)]
    if not faults:
        return
    causes = [
        *_faults("input", x),
        *_state_faults("state before the first token", before),
        *(fault for key, p in block.named_parameters() for fault in _faults(f"parameter `{key}`", p[None])),
    ]
    largest = x.detach().abs().amax().item()
    began = "; ".join(causes) or f"input (largest {largest:.3g} in {x.dtype}), earlier state and parameters are finite"
    raise FloatingPointError(
        f"`{name}` gave values that are not finite: {'; '.join(faults)}. Where it began: {began}. float16 overflows at "
        "65504 (use bfloat16 or float32); in training, lower the learning rate or clip gradients."
    )


def _state_faults(name: str, state: LayerState | None) -> Iterator[str]:
    for part, x in named_tensors(state).items():
        yield from _faults(f"{name} `{part}`", x)


def _faults(name: str, x: Tensor) -> Iterator[str]:
    """What is wrong with a tensor whose first dim is rows and, for [B, T, D], second is tokens."""
    bad = ~torch.isfinite(x.detach())
    if not bad.any():
        return
    rows = bad.flatten(1).any(1).nonzero()[:, 0].tolist()
    if name not in ("input", "output"):
        yield f"{name} (rows {rows})" if len(x) > 1 else name
        return
    first = bad.any(2).any(0).nonzero()[0].item()
    yield f"{name} (rows {rows}, from token {first} on)"
