"""How much memory a training step takes, found by going through it with tensors that are made and freed, not filled.

One block of each kind, and what comes after the blocks, are run forward and backward on their own, in the PyTorch
workers; the step is put together from what each holds and needs. docs/training.md says how near it came to real ones.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .configuration_xlstm import XLSTMConfig
from .modeling_xlstm import XLSTMForCausalLM
from .ops_common import token_blocks
from .states_xlstm import Call


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside while they live.

    Attributes:
        now: bytes alive.
        peak: most bytes alive since `peak` was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Views and results written in place share the storage of an argument.
        given = {id(x.untyped_storage()) for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}
        for x in tree_flatten(out)[0]:
            if isinstance(x, Tensor):
                self._add(x.untyped_storage(), given)
        return out

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known or key in given:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        self._known[key] = weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


class Part(NamedTuple):
    """Bytes of one part of a model, beside its weights.

    Attributes:
        forward: most at any time of its forward pass.
        held: at the end of that, until the whole forward pass is over.
        saved: until its backward pass.
        backward: most at any time of that, what was saved and the gradients of its weights included.
        state: of the recurrent states it leaves.
    """

    forward: float
    held: float
    saved: float
    backward: float
    state: float


def run_part(run: Callable[[], tuple[Any, Any]], precision: str) -> Part:
    """Forward and backward of one part; `run` gives its output and the states it leaves, see `Plan` for `precision`."""
    with LiveBytes() as live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "mixed"):
            y, state = run()
            forward, held = live.peak, live.now
            state_bytes = sum(x.untyped_storage().nbytes() for x in tree_flatten(state)[0] if isinstance(x, Tensor))
            del state
        saved = live.peak = live.now
        y.backward(torch.ones_like(y))
        return Part(forward, held, saved, live.peak, state_bytes)


class Step(NamedTuple):
    """Bytes of one training step on one device, and parameters.

    Attributes:
        parameters: of the model.
        weights: of it, as they lie on the device.
        gathered: of weights and gradients brought together from other devices for the part that runs.
        optimizer: states of the optimizer.
        gradients: of the weights.
        activations: most that is held for the backward pass and needed while it runs.
        states: recurrent states of all rows, alive during a forward pass.
        peak: the most of all these together at any time.
    """

    parameters: int
    weights: float
    gathered: float
    optimizer: float
    gradients: float
    activations: float
    states: float
    peak: float


# Of an optimizer for each weight: numbers kept in the weights' dtype, bytes beside them, numbers needed for a moment.
OPTIMIZERS = {"adamw": (2, 0, 0), "adamw_foreach": (2, 0, 1), "adamw_8bit": (0, 2, 0), "sgd": (0, 0, 0)}
SHARDINGS = ("none", "ddp", "zero2", "zero3")  # FSDP2 that reshards after forward is zero3
SHORT = 32  # tokens at least of an sLSTM that is run in the place of a longer one


class Plan(NamedTuple):
    """What is trained how: rows B of T tokens on each device.

    Attributes:
        batch: rows of one micro-batch.
        tokens: of a row.
        precision: "float32", "bfloat16" (weights too) or "mixed" (float32 weights, autocast to bfloat16).
        optimizer: a key of `OPTIMIZERS`.
        checkpointing: whether blocks are computed again in the backward pass.
        accumulation: micro-batches of a step.
        sharding: one of `SHARDINGS`.
        devices: that share the model.
        carried: whether states are kept from step to step.
    """

    batch: int
    tokens: int
    precision: str = "float32"
    optimizer: str = "adamw"
    checkpointing: bool = False
    accumulation: int = 1
    sharding: str = "none"
    devices: int = 1
    carried: bool = False


def estimate_step(config: XLSTMConfig, plan: Plan) -> Step:
    """Memory of a training step of a language model on packed documents.

    Raises:
        ValueError: a word of the plan is unknown.
    """
    for name, known in (
        ("precision", ("float32", "bfloat16", "mixed")),
        ("optimizer", tuple(OPTIMIZERS)),
        ("sharding", SHARDINGS),
    ):
        if getattr(plan, name) not in known:
            raise ValueError(f"`{name}` must be one of {list(known)}; got {getattr(plan, name)!r}.")
    if config.kernel_backend == "triton":  # which no tensor here could run
        config = type(config)(**{**config.to_dict(), "kernel_backend": "torch"})
    kinds = config.block_types or []
    parts = {kind: _block(config, kind, plan) for kind in dict.fromkeys(kinds)}
    with FakeTensorMode():
        model = _model(config, plan)
        sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in model.model.layers]
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        numbers = sum(p.numel() for p in model.parameters())
        end = _end(model, plan)
    return _put_together(plan, [parts[kind] for kind in kinds], end, sizes, whole, numbers)


def _put_together(plan: Plan, blocks: list[Part], end: Part, sizes: list[int], whole: int, numbers: int) -> Step:
    """Walk through the step, forward through the blocks and back."""
    shared = plan.devices if plan.sharding in ("zero2", "zero3") else 1
    weights = whole / (plan.devices if plan.sharding == "zero3" else 1)
    each, more, moment = OPTIMIZERS[plan.optimizer]
    width = whole / numbers
    optimizer = numbers * (each * width + more) / shared
    gradients = whole / shared
    gathered = 0.0
    if plan.sharding == "zero3":
        # The part that runs and the next one, and what is not in a block throughout.
        gathered = whole - sum(sizes) + 2 * max(sizes)
    if shared > 1:
        gathered += max(sizes)  # gradients of one part before they are shared out
    if plan.sharding == "ddp":
        gathered += whole  # the buckets in which gradients are summed
    states = sum(part.state for part in blocks)
    static = weights + optimizer + gathered + (states if plan.carried else 0.0)
    kept = gradients if plan.accumulation > 1 else 0.0
    live = peak = 0.0
    for part in (*blocks, end):
        peak = max(peak, live + part.forward)
        live += part.held
    live = sum(part.saved for part in (*blocks, end))
    # Gradients of the parts that are behind, as far as they were not kept from the micro-batch before.
    made = 0.0
    for part, size in zip((end, *blocks[::-1]), (whole - sum(sizes), *sizes[::-1]), strict=True):
        live -= part.saved
        own = size if kept else 0.0  # counted in `kept` already
        peak = max(peak, live + part.backward - own + made)
        made += 0.0 if kept else size / shared
    peak = static + max(kept + peak, gradients + moment * whole / shared)
    return Step(numbers, weights, gathered, optimizer, gradients, peak - static - kept, states, peak)


def _model(config: XLSTMConfig, plan: Plan) -> Any:
    dtype = torch.bfloat16 if plan.precision == "bfloat16" else torch.float32
    model: Any = XLSTMForCausalLM._from_config(config, dtype=dtype).train()
    if plan.checkpointing:
        enable_checkpointing(model)
    return model


def enable_checkpointing(model: Any, **options: Any) -> None:
    """Have blocks computed again in the backward pass; the options are those of torch's checkpoint."""
    # The newer name first, which Transformers has since 5.23: there the older one warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options or None)


def _block(config: XLSTMConfig, kind: str, plan: Plan) -> Part:
    """One block of a kind; a long sLSTM, which needs as much for every block of tokens, from two and four of them."""
    fields = {**config.to_dict(), "num_hidden_layers": 1, "block_types": [kind]}
    one = type(config)(**fields)
    if kind == "slstm":
        # It asks its tensors where documents begin, which only real ones can answer.
        short = max(SHORT, token_blocks(plan.tokens, plan.batch * config.hidden_size)[0].stop)
        lengths = (plan.tokens,) if plan.tokens <= 4 * short else (2 * short, 4 * short)
        runs = [_run_block(one, plan, tokens, contextlib.nullcontext()) for tokens in (lengths[0], *lengths)]
        first, last = runs[1], runs[-1]  # what a process does once is in the run before them
        steps = plan.tokens / lengths[0] - 1
        return Part(*(a + steps * (b - a) for a, b in zip(first, last, strict=True)))
    return _run_block(one, plan, plan.tokens, FakeTensorMode())


def _run_block(config: XLSTMConfig, plan: Plan, tokens: int, mode: Any) -> Part:
    with mode:
        model = _model(config, plan)
        x = torch.zeros(plan.batch, tokens, config.hidden_size, dtype=model.dtype).requires_grad_()
        reset = torch.zeros(plan.batch, tokens, dtype=torch.bool)
        call = Call(reset=reset)
        return run_part(lambda: model.model.layers[0](x, call), plan.precision)


def _end(model: Any, plan: Plan) -> Part:
    """Norm, head and loss."""
    model.model.layers = nn.ModuleList()
    x = torch.zeros(plan.batch, plan.tokens, model.config.hidden_size, dtype=model.dtype).requires_grad_()
    labels = torch.zeros(plan.batch, plan.tokens, dtype=torch.long)

    def run() -> tuple[Tensor, None]:
        output = model(inputs_embeds=x, labels=labels, shift_labels=labels, use_cache=False)
        return output.loss, None

    return run_part(run, plan.precision)
