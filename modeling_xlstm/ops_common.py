"""What every op does before it computes: check shapes and choose a worker."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def bind_shapes(**tensors: tuple[Tensor | None, str]) -> dict[str, int]:
    """Match every tensor with its letters, all floating point and on one device; return the size of each letter.

    Args:
        tensors: name=(tensor, letters), letters as in "B T H K"; a digit stands for itself; None is passed over.

    Returns:
        sizes: the size each letter stands for.

    Raises:
        ValueError: a tensor has another number of dimensions, is not floating point or lies on another device than
            the first, or two tensors disagree about a letter.
    """
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    leader: tuple[str, torch.device] | None = None
    for name, (tensor, letters) in tensors.items():
        if tensor is None:
            continue
        leader = leader or (name, tensor.device)
        if tensor.device != leader[1] or not tensor.is_floating_point():
            raise ValueError(
                f"`{name}` must be floating point on {leader[1]} as `{leader[0]}` is; got {tensor.dtype} on "
                f"{tensor.device}. Use `.to()`, which an XLSTMCache has too."
            )
        wanted = _letters(letters)
        if tensor.dim() != len(wanted):
            raise ValueError(f"`{name}` must be [{', '.join(wanted)}]; got shape {tuple(tensor.shape)}.")
        for letter, size in zip(wanted, tensor.shape, strict=True):
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            if size != expected:
                raise ValueError(
                    f"`{name}` must be [{', '.join(wanted)}] with {letter} = {expected}"
                    f"{f' as in `{origin[letter]}`' if letter in origin else ''}; got shape {tuple(tensor.shape)}."
                )
            origin.setdefault(letter, name)
    return sizes


def mark_tokens(
    T: int, B: int, lengths: Tensor | None, reset: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Check the arguments that describe tokens, the same for every op.

    Returns:
        padded: True after the real tokens of a row, [B, T]; None without padding.
        reset: `reset` without its padded tokens, for a token that does not exist begins no document.

    Raises:
        ValueError: there is no token, or `lengths` is not [B] integers, or `reset` is not [B, T] booleans, or one of
            them lies on another device than the inputs.
    """
    if T == 0:
        raise ValueError("An op needs at least one token; got T = 0. Skip the call: no token changes no state.")
    if lengths is not None and (lengths.shape != (B,) or lengths.is_floating_point() or lengths.dtype == torch.bool):
        raise ValueError(f"`lengths` must be [B] = [{B}] integers; got {tuple(lengths.shape)} of {lengths.dtype}.")
    if reset is not None and (reset.shape != (B, T) or reset.dtype != torch.bool):
        raise ValueError(f"`reset` must be [B, T] = [{B}, {T}] booleans; got {tuple(reset.shape)} of {reset.dtype}.")
    for name, x in (("lengths", lengths), ("reset", reset)):
        if x is not None and x.device != device:
            raise ValueError(f"`{name}` must be on {device} as the inputs are; got {x.device}. Use `.to()`.")
    if lengths is None:
        return None, reset
    padded = torch.arange(T, device=device) >= lengths[:, None]
    return padded, None if reset is None else reset & ~padded


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Autocast off: it would run the products with the states in half precision."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


@functools.cache
def _letters(spelling: str) -> tuple[str, ...]:
    return tuple(spelling.split())


def check_gates(input_gate: str) -> None:
    """Raise ValueError unless the name is one that `log_gates` knows."""
    if input_gate not in ("exp", "sigmoid", "exp_both"):
        raise ValueError(f"`input_gate` must be 'exp', 'sigmoid' or 'exp_both'; got {input_gate!r}.")


def log_gates(i_tilde: Tensor, f_tilde: Tensor, input_gate: str) -> tuple[Tensor, Tensor]:
    """Natural logs of the input and the forget gate, from their pre-activations."""
    log_i = F.logsigmoid(i_tilde) if input_gate == "sigmoid" else i_tilde
    return log_i, f_tilde if input_gate == "exp_both" else F.logsigmoid(f_tilde)


def choose_backend(backend: str, available: Mapping[str, bool]) -> str:
    """Name the worker to run.

    Args:
        backend: 'auto' takes the first that can run here; any other name is taken literally.
        available: the workers of this op, the preferred one first, and whether each can run on the tensors given.

    Raises:
        ValueError: the name is unknown, or the worker cannot run here. Nothing is replaced silently.
    """
    if backend == "auto":
        return next(name for name, runs in available.items() if runs)
    if backend not in available:
        raise ValueError(f"`backend` must be one of {['auto', *available]}; got {backend!r}.")
    if not available[backend]:
        raise ValueError(f"`backend={backend!r}` cannot run on these tensors or this device; use 'auto'.")
    return backend
