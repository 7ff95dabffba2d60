"""The states between calls: one `XLSTMCacheLayer` per block, of fixed size whatever the number of tokens.

What is replaced here is the reference to a state, never a tensor's values: a state handed out, or taken from a forward
pass with gradients, stays what it was. The decode loop steps states of its own in place; a cache that borrows them
(`decoding_xlstm`) hands out copies.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache, LinearAttentionLayer

from .configuration_xlstm import XLSTMConfig
from .statefile_xlstm import check_same_model, fingerprint, read_states, write_states
from .states_xlstm import LayerState, MLSTMState, SLSTMState, Tape, tensors_of


class XLSTMCacheLayer(LinearAttentionLayer):
    """The state of one block: cell tensors as `recurrent_states` 0, 1, ..., the conv window as `conv_states[0]`."""

    # `generate` may take a faster forward for its decoding steps: see `decoding_xlstm`.
    is_compileable = True

    def __init__(self, block_type: str):
        self.borrowed = False
        self.cell_type: type[MLSTMState | SLSTMState] = MLSTMState if block_type == "mlstm" else SLSTMState
        super().__init__(number_of_states=len(self.cell_type._fields))

    @property
    def held(self) -> LayerState | None:
        """The tensors held, own or borrowed; None before the first token."""
        if self.recurrent_states[0] is None:
            return None
        self.prefetch()
        cell: Any = self.recurrent_states.values()
        return LayerState(self.cell_type(*cell), self.conv_states[0])

    @property
    def state(self) -> LayerState | None:
        """The state to start the next call with, a copy of a borrowed one; None before the first token."""
        return _map(self.held, Tensor.clone) if self.borrowed else self.held

    def store_(self, state: LayerState | None) -> None:
        """Replace the state; None forgets it."""
        cell, conv = ((None,) * len(self.recurrent_states), None) if state is None else (state.cell, state.conv)
        for i, tensor in enumerate(cell):
            self.recurrent_states[i] = tensor
            self.is_recurrent_states_initialized[i] = self.has_previous_state[i] = tensor is not None
        self.conv_states[0] = conv
        self.borrowed = False
        self.is_conv_states_initialized[0] = self.conv_states[0] is not None
        if state is not None:
            self.device = state.cell.m.device  # type: ignore[assignment]
            self.dtype = state.cell.m.dtype  # type: ignore[assignment]

    def apply_(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by function(tensor)."""
        self.store_(_map(self.state, function))

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can come back exactly: yes, once recording is on."""
        return True

    def reset(self) -> None:
        """Forget everything."""
        self.store_(None)


def _map(state: LayerState | None, function: Callable[[Tensor], Tensor]) -> LayerState | None:
    """The state with every tensor replaced by function(tensor)."""
    if state is None:
        return None
    cell: Any = [function(x) for x in state.cell]
    return LayerState(type(state.cell)(*cell), None if state.conv is None else function(state.conv))


def _join(first: LayerState, second: LayerState) -> LayerState:
    """The rows of both."""
    cell: Any = [torch.cat(pair) for pair in zip(first.cell, second.cell, strict=True)]
    conv = None if first.conv is None or second.conv is None else torch.cat([first.conv, second.conv])
    return LayerState(type(first.cell)(*cell), conv)


class _Recording(NamedTuple):
    """The tapes of one or more calls.

    Attributes:
        tapes: one per layer.
        tokens: columns they hold, padding included.
        real: which of them are real, [B, tokens]; None if all are.
    """

    tapes: list[Tape]
    tokens: int
    real: Tensor | None

    def extend(self, later: _Recording) -> _Recording | None:
        """Both as one, or None where padding or resets stand between them."""
        plain = self.real is None and later.real is None
        if not plain or any(tape.inputs[-1] is not None for tape in (*self.tapes, *later.tapes)):
            return None
        tapes = [a.extend(b) for a, b in zip(self.tapes, later.tapes, strict=True)]
        return _Recording(tapes, self.tokens + later.tokens, None)

    def part(self, start: int, stop: int) -> _Recording:
        """The tokens from `start` to `stop` only."""
        real = None if self.real is None else self.real[:, start:stop]
        tapes = [
            tape._replace(
                before=self.rewind(tape, start),
                inputs=tuple(None if x is None else x[:, start:stop] for x in tape.inputs),
            )
            for tape in self.tapes
        ]
        return _Recording(tapes, stop - start, real)

    def rewind(self, tape: Tape, tokens: int) -> LayerState | None:
        """A layer's state after the first `tokens` tokens."""
        return tape.rewind(tokens, None if self.real is None else self.real[:, :tokens].sum(1))

    def apply(self, function: Callable[[Tensor], Tensor]) -> _Recording:
        """With every tensor replaced by function(tensor)."""
        tapes = [
            tape._replace(
                before=_map(tape.before, function),
                inputs=tuple(None if x is None else function(x) for x in tape.inputs),
            )
            for tape in self.tapes
        ]
        return _Recording(tapes, self.tokens, None if self.real is None else function(self.real))


KEPT = 64  # tokens that stay recorded over a crop: more than any assistant looks back on


def _append(recordings: list[_Recording], later: _Recording) -> None:
    """Join a recording to the last one where that is possible, else put it behind."""
    joined = recordings[-1].extend(later) if recordings else None
    recordings[len(recordings) - (joined is not None) :] = [joined or later]


def _bounded(recordings: list[_Recording]) -> list[_Recording]:
    """The same in one or two, for each holds a state; of older tokens so many that `KEPT` to 2 `KEPT` remain."""
    joined: list[_Recording] = []
    for recording in recordings:
        _append(joined, recording)
    joined = joined[-2:]
    excess = sum(recording.tokens for recording in joined) - KEPT
    if excess > KEPT:
        while excess >= joined[0].tokens:
            excess -= joined.pop(0).tokens
        joined[0] = joined[0].part(excess, joined[0].tokens)
    return joined


class XLSTMCache(Cache):
    """Recurrent states of all blocks, in the manner of `transformers.Cache`.

    Its size does not depend on the number of tokens seen. States keep the dtype the model computed them in, float32 or
    wider for C, n, m, c, h. A row of padding only leaves its states as they were.

    Args:
        config: configuration of the model whose states it will hold.
    """

    layers: list[XLSTMCacheLayer]  # type: ignore[assignment]
    donates = False  # whether the model may write over the states while it reads them
    held_of_prompt = 0  # columns of the prompt of `generate` to pass over, while it drafts

    def __init__(self, config: XLSTMConfig):
        block_types = (config.block_types or [])[: config.num_hidden_layers]
        super().__init__(layers=[XLSTMCacheLayer(block_type) for block_type in block_types])
        self.model = fingerprint(config)
        self.tokens_seen = 0
        self._used_by = config
        self._older: list[_Recording] = []  # up to the last crop
        self._past: list[_Recording] = []  # since then

    def __deepcopy__(self, memo: dict[int, Any]) -> XLSTMCache:
        """A copy that goes its own way; states that were made with gradients on keep their graph."""
        tensors = tree_leaves([[layer.held for layer in self.layers], self._older, self._past])
        # What torch would not copy, and what belongs to the model.
        memo |= {id(x): x.clone() for x in tensors if isinstance(x, Tensor) and not x.is_leaf}
        memo[id(self._used_by)] = self._used_by
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    @property
    def recording(self) -> bool:
        """Whether calls are recorded, so that `crop` can come back (see `activate_past_recording`)."""
        return any(layer.record_past for layer in self.layers)

    @property
    def states(self) -> list[LayerState | None]:
        """One state per block; None before the first token."""
        return [layer.state for layer in self.layers]

    def store_(self, states: Sequence[LayerState], tokens: int, real: Tensor | None = None) -> None:
        """Replace all states at once, `tokens` columns further on, of which `real` [B, tokens] are not padding."""
        for layer, state in zip(self.layers, states, strict=True):
            layer.store_(state)
        self.tokens_seen += tokens
        tapes = [state.tape for state in states if state.tape is not None]
        if not tapes:
            self._forget_()
            return
        _append(self._past, _Recording(tapes, tokens, real))

    @property
    def borrowed(self) -> bool:
        """Whether all states lie at the addresses of a decode loop, which steps them."""
        return all(layer.borrowed for layer in self.layers)

    def borrow_(self, states: Sequence[LayerState | None]) -> None:
        """Take up states of the same values that someone else steps in place."""
        for layer, state in zip(self.layers, states, strict=True):
            layer.store_(state)
            layer.borrowed = True

    def settle_(self) -> None:
        """Replace every borrowed state by a copy."""
        for layer in self.layers:
            if layer.borrowed:
                layer.store_(layer.state)

    def advance_(self, tokens: int) -> None:
        """Count columns by which borrowed states were stepped; what was recorded before them is forgotten."""
        self.tokens_seen += tokens
        self._forget_()

    def crop(self, tokens_to_remove: int) -> None:
        """Come back exactly to an earlier token.

        The cells run again from the state before the recording up to that token, on inputs of a few numbers per token.
        The last `KEPT` tokens at least stay recorded, as assistants with another tokenizer need, which come back
        further than to the last crop.

        Args:
            tokens_to_remove: minus the number of columns to take back, padding included; 0 takes none back.

        Raises:
            ValueError: the number is positive, or reaches further back than the recording.
        """
        recordings = [*self._older, *self._past]
        back, held = -tokens_to_remove, sum(recording.tokens for recording in recordings)
        if not 0 <= back <= held:
            raise ValueError(
                f"`tokens_to_remove` must be from {-held} to 0, for the last {held} are recorded; got "
                f"{tokens_to_remove}. Call activate_past_recording() before the tokens that may have to be taken back."
            )
        self.tokens_seen -= back
        while back:
            recording = recordings.pop()
            keep = max(recording.tokens - back, 0)
            for layer, tape in zip(self.layers, recording.tapes, strict=True):
                layer.store_(recording.rewind(tape, keep))
            back -= recording.tokens - keep
            recordings += [recording.part(0, keep)] if keep else []
        self._older, self._past = _bounded(recordings), []

    def stop_recording_(self) -> None:
        """End what `activate_past_recording` began, and forget what was recorded."""
        for layer in self.layers:
            layer.record_past = False
        self._forget_()

    def _forget_(self) -> None:
        """Forget what was recorded."""
        self._older, self._past = [], []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input seen so far, padding included: the length of the attention mask up to now."""
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of a mask over past and present columns."""
        return self.tokens_seen + query_length, 0

    @property
    def batch_size(self) -> int:
        """Rows held, or -1 before the first token."""
        state = self.layers[0].held
        return -1 if state is None else state.cell.m.shape[0]

    def apply_(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by function(tensor)."""
        for layer in self.layers:
            layer.apply_(function)
        self._older = [recording.apply(function) for recording in self._older]
        self._past = [recording.apply(function) for recording in self._past]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order; a row may be taken several times."""
        self.apply_(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times: 0, 0, ..., 1, 1, ..."""
        self.apply_(lambda x: x.repeat_interleave(repeats, 0))

    def to(self, device: torch.device | str) -> XLSTMCache:
        """Move every state to a device; returns itself."""
        self.apply_(lambda x: x.to(device))
        return self

    def detach_(self) -> XLSTMCache:
        """Cut the states off the graph that made them (truncated back-propagation); returns itself."""
        self.apply_(Tensor.detach)
        return self

    def reset_rows_(self, rows: Tensor) -> None:
        """Take the rows where `rows` [B] is True back to the start; what was recorded is forgotten."""
        self._forget_()
        self.apply_(lambda x: x.masked_fill(rows.to(x.device).view(-1, *(1,) * (x.dim() - 1)), 0))

    def append_rows_(self, other: XLSTMCache, rows: Sequence[int]) -> None:
        """Take over some rows of another cache of the same model, behind the rows held; what was recorded is forgotten.

        Texts of different lengths may stand side by side; `get_seq_length` then is that of the longest.

        Raises:
            ValueError: the other cache is of another model; nothing is taken over.
        """
        check_same_model(other.model, self.model)
        self._forget_()
        if not rows:
            return
        index = torch.tensor(rows, device="cpu")
        for layer, source in zip(self.layers, other.layers, strict=True):
            new = _map(source.state, lambda x: x.index_select(0, index.to(x.device)))
            layer.store_(new if layer.state is None or new is None else _join(layer.state, new))
        self.tokens_seen = max(self.tokens_seen, other.tokens_seen)

    def append_fresh_rows_(self, count: int) -> None:
        """Add rows that have seen no token to a cache that holds some."""
        joined: list[LayerState | None] = []
        for state in self.states:
            zeros = _map(state, lambda x: x.new_zeros(count, *x.shape[1:]))
            joined.append(None if state is None or zeros is None else _join(state, zeros))
        self._forget_()
        for layer, state in zip(self.layers, joined, strict=True):
            layer.store_(state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the states to a safetensors file, with what model they belong to; what was recorded is left out.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: no token has been seen yet, so there is no state to save.
        """
        states = [state for state in self.states if state is not None]
        if not states:
            raise ValueError("The cache has seen no token; run the model on the prompt first, then save its cache.")
        write_states(path, states, self.tokens_seen, self.model)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: XLSTMConfig | None = None, device: torch.device | str = "cpu"
    ) -> XLSTMCache:
        """Read states that `save` wrote.

        Args:
            path: the file.
            config: configuration of the model that will go on from them; None takes the one in the file, and the model
                compares when it is given the cache.
            device: where to put them.

        Returns:
            cache: with the states and the number of tokens seen.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, foreign, or of another model than `config`; nothing is loaded.
        """
        states, tokens, model = read_states(path)
        cache = cls(config or XLSTMConfig(**{**model, "num_hidden_layers": len(states)}))
        if config is not None:
            check_same_model(model, fingerprint(config))
        cache.store_(states, tokens)
        return cache.to(device)

    def check_model_(self, config: XLSTMConfig) -> None:
        """Compare the model that the states belong to with the one that will use them, once for each that does.

        Raises:
            ValueError: they differ; the message names the fields.
        """
        if not self.is_checked(config):
            check_same_model(self.model, fingerprint(config))
            self._used_by = config

    def is_checked(self, config: XLSTMConfig) -> bool:
        """Whether the states are known to belong to a model of this configuration."""
        return self._used_by is config

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.reset()
        self._forget_()
        self.tokens_seen = 0

    def size_in_bytes(self) -> int:
        """Memory the states take; the same after one token and after a million."""
        return sum(x.numel() * x.element_size() for x in tensors_of([layer.held for layer in self.layers]))
