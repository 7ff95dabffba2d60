"""The recurrent states: what one cell, and one layer, remembers between calls.

Every state has a fixed size. A state passed to a function is the one *before* its first token, the one returned is the
one after its last real token; no function modifies the state it was given. The start is zero everywhere, `m` included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class MLSTMState(NamedTuple):
    """Matrix memory of an mLSTM cell, stabilised: the memory itself is `C * exp(m)` and its normaliser `n * exp(m)`.

    Attributes:
        C: memory matrix, [B, H, K, V]; accumulates keys scaled by K**-0.5.
        n: normaliser, [B, H, K].
        m: stabiliser, [B, H]; natural log.
    """

    C: Tensor
    n: Tensor
    m: Tensor

    @classmethod
    def zeros(cls, B: int, H: int, K: int, V: int, like: Tensor) -> MLSTMState:
        """The state before any token, with the dtype and device of `like`."""
        return cls(like.new_zeros(B, H, K, V), like.new_zeros(B, H, K), like.new_zeros(B, H))


class SLSTMState(NamedTuple):
    """Scalar memories of an sLSTM layer; `n == 0` marks a cell that has seen no token.

    Attributes:
        c: cell, [B, H, P]; stabilised.
        n: normaliser, [B, H, P]; stabilised.
        m: stabiliser, [B, H, P]; natural log.
        h: output of the last token, [B, H, P]; feeds the recurrent connections.
    """

    c: Tensor
    n: Tensor
    m: Tensor
    h: Tensor

    @classmethod
    def zeros(cls, B: int, H: int, P: int, like: Tensor) -> SLSTMState:
        """The state before any token, with the dtype and device of `like`."""
        return cls(*(like.new_zeros(B, H, P) for _ in range(4)))


# So that `torch.load` takes states as it takes tensors.
torch.serialization.add_safe_globals([MLSTMState, SLSTMState])


class LayerState(NamedTuple):
    """All that one mixer layer remembers.

    Attributes:
        cell: state of the mLSTM or sLSTM cell.
        conv: the last W - 1 inputs of the causal convolution, oldest first, [B, W - 1, D]; None without a convolution.
        tape: how to come back to a token of the call that made this state, if that was asked for.
    """

    cell: MLSTMState | SLSTMState
    conv: Tensor | None
    tape: Tape | None = None


def tensors_of(states: Sequence[LayerState | None]) -> list[Tensor]:
    """Every tensor of the states of some layers, in one order."""
    return [x for state in states if state is not None for x in (*state.cell, state.conv) if x is not None]


def named_tensors(state: LayerState | None) -> dict[str, Tensor]:
    """The tensors of one layer's state by name: the cell's, and `conv` if there is a convolution."""
    if state is None:
        return {}
    return {**state.cell._asdict(), **({} if state.conv is None else {"conv": state.conv})}


CellInputs = tuple[Any, ...]  # tensors [B, T, ...], or None where a layer has no such input
CellRun = Callable[[LayerState | None, CellInputs, Tensor | None, Any], tuple[Tensor, LayerState]]


class Tape(NamedTuple):
    """What a layer's state was made of: the state before, and the inputs of its cell, a few numbers per token.

    Coming back to a token runs the cell again up to it, so nothing of the size of a state is kept per token.

    Attributes:
        run: (state before, inputs, lengths, options) -> output and state after.
        before: the state before the first token; None if there was none.
        inputs: what cell and convolution saw, each [B, T, ...] or None.
        options: the rest of what `run` needs.
    """

    run: CellRun
    before: LayerState | None
    inputs: CellInputs
    options: Any

    def rewind(self, tokens: int, lengths: Tensor | None) -> LayerState | None:
        """The state after the first `tokens` tokens, of which `lengths` [B] are real; None if there was none then."""
        if tokens == 0:
            return self.before
        kept = tuple(None if x is None else x[:, :tokens] for x in self.inputs)
        return self.run(self.before, kept, lengths, self.options)[1]

    def extend(self, later: Tape) -> Tape:
        """One tape over the tokens of both; neither may hold a reset or padding."""
        pairs = zip(self.inputs, later.inputs, strict=True)
        return self._replace(inputs=tuple(None if a is None else torch.cat([a, b], 1) for a, b in pairs))


class Call(NamedTuple):
    """What a layer is told beside its input.

    Attributes:
        state: the state before the first token; None at the start.
        lengths: number of real tokens of each row, which come first, [B]; None if all are real.
        reset: True at the first token of a new document, [B, T]; None if none begins.
        record: whether to return a tape with the state.
        donated: whether the next state may be written over the one before, of which only the one returned counts then.
    """

    state: LayerState | None = None
    lengths: Tensor | None = None
    reset: Tensor | None = None
    record: bool = False
    donated: bool = False

    def run(self, cell: CellRun, inputs: CellInputs, options: Any) -> tuple[Tensor, LayerState]:
        """Run a cell from the state of this call."""
        if self.donated:
            options = dataclasses.replace(options, donated=True)
        x = inputs[0]
        # On the CPU a worker's loop breaks a compiled graph: broken once, around the cell, it leaves fewer pieces.
        run = _apart if x.shape[1] > 1 and x.device.type != "cuda" else _in_line
        h, state = run(cell, self.state, inputs, self.lengths, options)
        return h, state._replace(tape=Tape(cell, self.state, inputs, options)) if self.record else state

    def part(self, tokens: slice, state: LayerState | None) -> Call:
        """The call for some of the tokens, from the state before the first of them."""
        lengths = None if self.lengths is None else (self.lengths - tokens.start).clamp(0, tokens.stop - tokens.start)
        return self._replace(state=state, lengths=lengths, reset=None if self.reset is None else self.reset[:, tokens])


def _in_line(cell: CellRun, *given: Any) -> tuple[Tensor, LayerState]:
    return cell(*given)


_apart = torch.compiler.disable(_in_line)


def compute_dtype(x: Tensor, state: MLSTMState | SLSTMState | None) -> torch.dtype:
    """The dtype of gates and states: float32, or wider if the input or the state given is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return dtype if state is None else torch.promote_types(dtype, state.m.dtype)
