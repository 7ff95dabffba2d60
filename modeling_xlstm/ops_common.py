"""What ops share: checks of shapes, the choice of a worker, and what happens to who differentiates a gradient."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

BACKENDS = ("auto", "triton", "torch", "reference")
# Largest error of a kernel in its self-check, relative to scale: far above rounding, far below a wrong formula.
AGREEMENT = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


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
        if not tensor.is_floating_point():
            raise ValueError(f"`{name}` must be floating point; got {tensor.dtype}. Use `.to()`.")
        if tensor.device != leader[1]:
            raise ValueError(
                f"`{name}` must be on {leader[1]} as `{leader[0]}` is; got {tensor.device}. Use `.to()`, which an "
                "XLSTMCache has too."
            )
        wanted = letters.split()
        if tensor.dim() != len(wanted):
            raise ValueError(f"`{name}` must be [{', '.join(wanted)}]; got shape {tuple(tensor.shape)}.")
        for letter, size in zip(wanted, tensor.shape, strict=True):
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            if size != expected:
                reason = "" if letter.isdigit() else f" with {letter} = {expected} as in `{origin[letter]}`"
                raise ValueError(f"`{name}` must be [{', '.join(wanted)}]{reason}; got shape {tuple(tensor.shape)}.")
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
        ValueError: there is no token, or `lengths` is not [B] integers from 0 to T (on a GPU their range is not looked
            at, and more than T is T), or `reset` is not [B, T] booleans, or one of them lies on another device than the
            inputs.
    """
    if T == 0:
        raise ValueError("An op needs at least one token; got T = 0. Skip the call: no token changes no state.")
    for name, x in (("lengths", lengths), ("reset", reset)):
        if x is not None and not isinstance(x, Tensor):
            raise ValueError(f"`{name}` must be a tensor; got {type(x).__name__}. Use `torch.tensor()`.")
    if lengths is not None and (lengths.shape != (B,) or lengths.is_floating_point() or lengths.dtype == torch.bool):
        raise ValueError(f"`lengths` must be [B] = [{B}] integers; got {tuple(lengths.shape)} of {lengths.dtype}.")
    if reset is not None and (reset.shape != (B, T) or reset.dtype != torch.bool):
        raise ValueError(f"`reset` must be [B, T] = [{B}, {T}] booleans; got {tuple(reset.shape)} of {reset.dtype}.")
    for name, x in (("lengths", lengths), ("reset", reset)):
        if x is not None and x.device != device:
            raise ValueError(f"`{name}` must be on {device} as the inputs are; got {x.device}. Use `.to()`.")
    if lengths is None:
        return None, reset
    may_look = lengths.is_cpu and not torch.compiler.is_compiling() and not isinstance(lengths, FakeTensor)
    if may_look and ((lengths < 0) | (lengths.long() > T)).any():
        raise ValueError(f"`lengths` must be from 0 to T = {T}; got {lengths.tolist()}.")
    padded = torch.arange(T, device=device) >= lengths[:, None]
    return padded, None if reset is None else reset & ~padded


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Autocast off: it would run the products with the states in half precision."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A GPU made the current one: there Triton launches, wherever the tensors are. A compiled model does so itself."""
    on = device.type == "cuda" and not torch.compiler.is_compiling()
    return torch.cuda.device(device) if on else contextlib.nullcontext()


def has_numpy_2() -> bool:
    """Whether NumPy is 2.0 or later: numbers of Python leave the dtype of arrays alone there, and `vecdot` is known."""
    return hasattr(np, "vecdot")


def check_gates(input_gate: str, gate_soft_cap: float | None = None) -> None:
    """Raise ValueError unless the name is one that `log_gates` knows and the cap is above 0."""
    if gate_soft_cap is not None and not gate_soft_cap > 0:
        raise ValueError(f"`gate_soft_cap` must be above 0; got {gate_soft_cap}. Use None to leave the cap out.")
    if input_gate not in ("exp", "sigmoid", "exp_both"):
        raise ValueError(f"`input_gate` must be 'exp', 'sigmoid' or 'exp_both'; got {input_gate!r}.")


BLOCK = 2**20  # numbers that are made and used together: they stay in the cache, and need no new memory


def token_blocks(T: int, numbers: int) -> list[slice]:
    """T tokens in blocks that are made and used together, `numbers` of each tensor in every token."""
    size = max(1, BLOCK // max(1, numbers))
    return [slice(start, min(start + size, T)) for start in range(0, T, size)]


@functools.cache
def keep_freed_memory() -> None:
    """Once in a process: have glibc keep up to 62 MiB of what tensors leave free, instead of asking for it anew.

    When a piece of memory that it had mapped is freed, it raises its mmap threshold to the size of that, if it is below
    32 MiB, and its trim threshold to twice that.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


def log_gates(i_tilde: Tensor, f_tilde: Tensor, input_gate: str) -> tuple[Tensor, Tensor]:
    """Natural logs of the input and the forget gate, from their pre-activations."""
    log_i = F.logsigmoid(i_tilde) if input_gate == "sigmoid" else i_tilde
    return log_i, f_tilde if input_gate == "exp_both" else F.logsigmoid(f_tilde)


Backward = Callable[..., tuple[Tensor | None, ...]]


def differentiable_once(backward: Backward) -> Backward:
    """For a Function's `backward` by hand, of which autograd sees nothing: a derivative of what it returns raises.

    torch's `once_differentiable` hangs its error on copies of the gradients alone, and `torch.autograd.grad` to the
    inputs, which does not pass there, takes them for constant. Here it hangs on all that they are made of: the tensors
    saved must lead to every input, as an output does.
    """

    @torch.compiler.disable  # the frames of a backward pass that is called in a compiled function are compiled too
    @functools.wraps(backward)
    def run(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *dys)
        # Read once: gradient checkpointing unpacks what was saved no second time.
        saved = ctx.saved_tensors
        given = types.SimpleNamespace(**vars(ctx), saved_tensors=saved, needs_input_grad=ctx.needs_input_grad)
        with torch.no_grad():
            made = backward(given, *dys)
        there = [d for d in made if d is not None]
        guarded = iter(_Constant.apply(len(there), *there, *saved, *dys))
        return tuple(None if d is None else next(guarded) for d in made)

    return run


class _Constant(torch.autograd.Function):
    """The first of some tensors, which cannot be differentiated by the others."""

    @staticmethod
    def forward(ctx: Any, count: int, *given: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in given[:count] if x is not None)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(
            "Gradients of an xLSTM cell by its fast ways are constants for autograd; a derivative of them was asked "
            "for. The reference is slow and has all derivatives: `backend='reference'` of `mlstm`, `slstm`, `MLSTM` "
            "and `SLSTM`, `kernel_backend='reference'` in the configuration of a model."
        )


def differentiable_by(plain: Callable[..., Tensor]) -> Callable[[Backward], Backward]:
    """For a Function's `backward` by hand: gradients that are to be differentiated are made by autograd instead.

    Args:
        plain: the Function's only output in operations of torch's, from its ctx and the tensors that it saved; those
            are its first inputs.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def run(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return backward(ctx, dy)
            # Views: where one input was made of another, the gradient of each is to be its own part only.
            xs = [None if x is None else x.view_as(x) for x in ctx.saved_tensors]
            wanted = {i: x for i, x in enumerate(xs) if x is not None and x.requires_grad}
            with without_autocast(dy.device):
                made = torch.autograd.grad(plain(ctx, *xs), list(wanted.values()), dy, create_graph=True)
            by_input = dict(zip(wanted, made, strict=True))
            return tuple(map(by_input.get, range(len(ctx.needs_input_grad))))

        return run

    return decorate


def choose_backend(backend: str, x: Tensor, triton_obstacle: Callable[[], str]) -> str:
    """Name the worker to run: 'triton', 'torch' or 'reference'.

    Args:
        backend: 'auto' takes Triton's kernels on a GPU that can run them, else 'torch'; any other name is taken as is.
        x: a tensor of the call.
        triton_obstacle: says what keeps the op's Triton kernels from running; empty if nothing does.

    Raises:
        ValueError: the name is unknown, or the worker cannot run here. Nothing asked for by name is replaced.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {list(BACKENDS)}; got {backend!r}.")
    # No AMD device has seen these kernels, not even a compiler for one: they are there for who asks by name.
    if backend == "triton" or (backend == "auto" and x.is_cuda and torch.version.hip is None):
        obstacle = _machine_obstacle(x.device) or triton_obstacle()
        if not obstacle:
            return "triton"
        if backend == "triton":
            raise ValueError(f"`backend='triton'` cannot run here: {obstacle}. `backend='auto'` takes what can.")
        _say_once(f"The Triton kernels of the xLSTM do not run here, PyTorch does their work: {obstacle}.")
    return "torch" if backend == "auto" else backend


def _machine_obstacle(device: torch.device) -> str:
    """What keeps any Triton kernel from running on a device; empty if nothing does."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "tensors on the CPU need TRITON_INTERPRET=1 in the environment of the process"
    return _device_obstacle(device)


@functools.cache
def _device_obstacle(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package `triton` is not installed"
    if device.type not in ("cuda", "cpu"):
        return f"there are no Triton kernels for a device of type {device.type!r}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return ""


def dtypes_obstacle(*tensors: Tensor) -> str:
    """Why Triton's kernels cannot take tensors and states of these dtypes; empty if they can."""
    others = {x.dtype for x in tensors} - AGREEMENT.keys()
    if others:
        return f"tensors and states must be float32, bfloat16 or float16; got {', '.join(sorted(map(str, others)))}"
    return ""


@functools.cache
def is_small(device: torch.device) -> bool:
    """Whether a block has less shared memory than on the data centre's GPUs, such as 99 KB on consumers' ones."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block) < 160 * 1024


@functools.cache
def _say_once(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def self_check(compare: Callable[[torch.device, torch.dtype], str], device: torch.device, dtype: torch.dtype) -> str:
    """The result of `compare`, computed when an op's kernels are first used on a device in a dtype.

    The interpreter on the CPU is no device to doubt, and nothing can be compared while a CUDA graph is captured, a
    model is compiled or tensors are made without memory: then the result is that of the calls before, or empty.
    """
    if device.type != "cuda":
        return ""
    key = f"{compare.__module__} {compare.__name__} {device} {dtype}"
    if key not in _VERDICTS:
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing() or detect_fake_mode() is not None:
            return ""
        # A check takes gradients whatever the caller does without; a checkpoint would count what it saves for them.
        apart = torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x)
        with torch.inference_mode(False), without_autocast(device), on_device(device), apart:
            _VERDICTS[key] = compare(device, dtype)
    return _VERDICTS[key]


_VERDICTS: dict[str, str] = {}


def disagreement(
    run: Callable[..., tuple[Tensor, ...]],
    inputs: list[Tensor],
    device: torch.device,
    differentiate: bool,
    kernels: str = "Triton kernels",
) -> str:
    """Compare Triton's kernels with the reference on a device, in all results and gradients.

    Kernels that are right on one device have been wrong on another, some in the backward pass only; and some do not run
    there, for want of a C compiler or of shared memory.

    Args:
        run: takes "triton" or "reference" and the inputs; returns outputs and states.
        inputs: tensors in the dtype under test; the reference sees them in float64.
        device: where to compare.
        differentiate: whether to compare gradients too.
        kernels: what the warning calls them.

    Returns:
        what: empty if they agree. Otherwise it was also given as a warning.
    """
    where = f"on {torch.cuda.get_device_name(device) if device.type == 'cuda' else device} with triton "
    where += f"{importlib.metadata.version('triton')} and torch {torch.__version__} they"
    try:
        got = _results(run, "triton", [x.to(device) for x in inputs], differentiate)
    except torch.OutOfMemoryError:
        raise  # which says nothing of the kernels
    except Exception as error:
        what = f"{where} raise {type(error).__name__}: {error}"
        warnings.warn(f"The {kernels} are not used: {what}", stacklevel=2)
        return what
    wanted = _results(run, "reference", [x.to(device, torch.float64) for x in inputs], differentiate)
    errors = [
        ((x.double() - y.double()).abs().max() / y.double().abs().max()).item()
        for x, y in zip(got, wanted, strict=True)
    ]
    if all(error <= AGREEMENT[inputs[0].dtype] for error in errors):
        return ""
    what = (
        f"{where} disagree with the reference in {inputs[0].dtype}: errors of outputs, states and gradients relative "
        f"to scale {[f'{e:.1g}' for e in errors]}"
    )
    warnings.warn(f"The {kernels} are not used: {what}. Please report it.", stacklevel=2)
    return what


def _results(
    run: Callable[..., tuple[Tensor, ...]], worker: str, inputs: list[Tensor], differentiate: bool
) -> list[Tensor]:
    """All results of a worker, and the gradients of a loss that weighs each entry differently."""
    xs = [x.detach().requires_grad_(differentiate) for x in inputs]
    with torch.set_grad_enabled(differentiate):
        results = run(worker, *xs)
    if not differentiate:
        return list(results)
    weights = (torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view_as(y) for y in results)
    return [*results, *torch.autograd.grad(results, xs, list(weights))]
