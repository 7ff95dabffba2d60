"""One token through all blocks on the CPU, by hand: when that may be, and the plan of it.

At a width of 512, a decoding step through the modules spends more time on calls and small operations than on its
weights. A `StepPlan` does what the blocks' `forward` does for one token, with the parts of `step_parts_xlstm`. What may
change is looked at before every token. It steps aside for whatever only a module's call honours: hooks, adapters,
quantised or sharded weights, subclasses.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .blocks_xlstm import XLSTMBlock
from .layers_xlstm import (
    CausalConv,
    FeedForward,
    HeadNorm,
    HeadwiseLinear,
    LayerNorm,
    MLSTMHeads,
    MLSTMLayer,
    RMSNorm,
    SLSTMLayer,
    UpMLSTMLayer,
)
from .ops_common import has_numpy_2, keep_freed_memory
from .ops_linear import is_hooked
from .states_xlstm import LayerState
from .step_parts_xlstm import Room, plan_block, plan_norm

_KNOWN = {
    XLSTMBlock, RMSNorm, LayerNorm, HeadNorm, HeadwiseLinear, CausalConv, FeedForward, MLSTMHeads, MLSTMLayer,
    UpMLSTMLayer, SLSTMLayer, nn.Linear, nn.Dropout, nn.Identity,
}  # fmt: skip


class Watch:
    """What a plan was made for, so that whatever would change what a token's way computes is seen before it.

    Args:
        modules: the blocks and the norm after them, all plain.
        dtype: of the weights.
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype):
        self.roots, self.dtype = list(modules), dtype
        self.modules = every = [module for root in modules for module in root.modules()]
        self.kinds = [module.__class__ for module in every]
        self.attributes = [module.__dict__ for module in every]
        self.hooks = [hooks for own in self.attributes for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"])]
        owners = (owner for own in self.attributes for owner in (own["_modules"], own["_parameters"]))
        places = [(owner, name) for owner in owners for name in owner]
        places += [(own, name) for own in self.attributes for name in ("eps", "offset", "options") if name in own]
        self.owners, self.names = [owner for owner, _ in places], [name for _, name in places]
        self.parts = list(map(dict.get, self.owners, self.names))
        self.parameters = [p for p in self.parts if isinstance(p, Tensor)]
        self.addresses = [p.data_ptr() for p in self.parameters]

    def is_current(self, modules: Sequence[nn.Module]) -> bool:
        """Whether nothing has changed, no module trains and none has hooks of the forward pass.

        What `is_hooked` asks of one module is asked of all at once here; where no gradient is asked for, hooks of the
        backward pass do nothing.
        """
        every = nn.modules.module
        if every._global_forward_hooks or every._global_forward_pre_hooks or any(self.hooks):
            return False
        # Hundreds of questions before every token: `map` asks them without a line of Python for each, and comparing
        # lists is quick where their entries are the same objects.
        return (
            self.roots == list(modules)
            and list(map(type, self.modules)) == self.kinds
            and all(map(operator.is_, map(dict.get, self.owners, self.names), self.parts))
            and list(map(Tensor.data_ptr, self.parameters)) == self.addresses
            and not any(map(operator.itemgetter("training"), self.attributes))
            and not any(map(operator.contains, self.attributes, itertools.repeat("forward")))
        )


class StepPlan:
    """How a token of each of B rows passes through blocks that are plain, and the norm after them. Not for two threads.

    Args:
        blocks: of one model.
        norm: after the last of them.
        shape: of the embeddings to come, [B, D].
        dtype: theirs and that of the weights.
    """

    def __init__(self, blocks: Sequence[nn.Module], norm: nn.Module, shape: torch.Size, dtype: torch.dtype):
        B, D = shape
        self.shape = shape
        self.room = Room(B, D, dtype)
        self.steps = [plan_block(cast(XLSTMBlock, block), self.room) for block in blocks]
        self.norm = plan_norm(norm, self.room)
        keep_freed_memory()  # states are new tensors with every token, and those before are freed together

    def run(self, x: Tensor, states: Sequence[LayerState | None]) -> tuple[Tensor, list[LayerState]]:
        """One real token of each row through all blocks.

        Args:
            x: embeddings, [B, D].
            states: the state of each block before the token, none of them None.

        Returns:
            x: output of the last block, normalised, [B, D].
            states: the state of each block after the token.
        """
        room = self.room
        room.refresh()
        room.x.wide.copy_(x)
        with np.errstate(all="ignore"):
            after = [step(cast(LayerState, state)) for step, state in zip(self.steps, states, strict=True)]
            self.norm()
        return room.y.narrow.clone(), after


class Stepper:
    """The plans of a model, made when they are first needed. A copy or a pickle of the model starts without."""

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Forget every plan, for it would keep the memory that weights move out of."""
        # A plan has buffers, so every thread has one of its own; they go with the watch that found them current.
        self.watched: tuple[Watch, threading.local] | None = None

    def __deepcopy__(self, memo: Any) -> Stepper:
        return Stepper()

    def __reduce__(self) -> Any:
        return Stepper, ()

    @staticmethod
    def is_for(x: Tensor) -> bool:
        """Whether embeddings lie on the CPU, to be computed as they are, and NumPy is not older than 2.0."""
        plain = x.is_cpu and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
        return plain and has_numpy_2()

    def plan_for(
        self, blocks: Sequence[nn.Module], norm: nn.Module, x: Tensor, states: Sequence[LayerState | None]
    ) -> StepPlan | None:
        """What computes from x [B, D] and states what blocks and norm would.

        None unless all is plain and on the CPU, the weights of the dtype of x and the states of that which they have
        by default.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        tensors = (tensor for state in states for tensor in cast(LayerState, state).cell)
        if not all(tensor.dtype is wide and tensor.is_cpu and not tensor.requires_grad for tensor in tensors):
            return None
        modules = [*blocks, norm]
        watched = self.watched  # other threads may replace it
        if watched is None or not watched[0].is_current(modules):
            if not all(_is_plain(part, x.dtype) for module in modules for part in module.modules()):
                self.drop()
                return None
            watched = self.watched = Watch(modules, x.dtype), threading.local()
        if watched[0].dtype is not x.dtype:
            return None
        own = watched[1].__dict__
        plan: StepPlan | None = own.get("plan")
        if plan is None or x.shape != plan.shape:
            with torch.inference_mode(False):  # tensors made in that mode could not be written to outside
                plan = own["plan"] = StepPlan(blocks, norm, x.shape, x.dtype)
        return plan


def _is_plain(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether all that a module does is written here; an activation is called, whichever it is."""
    parameters = module._parameters
    if module.training or is_hooked(module) or (module.__class__ not in _KNOWN and (parameters or module._modules)):
        return False
    present = [p for p in parameters.values() if p is not None]
    return all(p.__class__ is nn.Parameter and p.dtype is dtype and p.is_cpu for p in present)
