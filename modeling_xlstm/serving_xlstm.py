"""Continuous batching: requests join and leave a running batch at any step, because every state has one size.

A slot is a row of the running cache. At each step the engine decodes one token for every running request in one forward
pass and, beside it, reads the next piece of the prompts of newcomers in another. What a request gets does not depend on
its neighbours: sampling has a generator of its own per request.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .cache_xlstm import XLSTMCache
from .modeling_xlstm import XLSTMForCausalLM


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: how many tokens to make at most.
        temperature: of sampling; 0 takes the most likely token.
        top_k: sample from the so many most likely tokens; 0 for all.
        top_p: sample from the most likely tokens that together have this probability.
        seed: of this request's own generator.
        stop: token sequences that end the text; they are part of it. The model's end tokens always end it.

    Raises:
        ValueError: a field has the wrong type or is out of its range.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        numbers: dict[str, Any] = {
            name: _integer(name, getattr(self, name)) for name in ("max_new_tokens", "top_k", "seed")
        }
        numbers |= {name: _number(name, getattr(self, name)) for name in ("temperature", "top_p")}
        if not isinstance(self.stop, Iterable):
            raise ValueError(f"`stop` must hold sequences of token ids; got {self.stop!r}. Leave it out for none.")
        stop = tuple(_ids("stop", sequence) for sequence in self.stop)
        for name, value in {"prompt": _ids("prompt", self.prompt), "stop": stop, **numbers}.items():
            object.__setattr__(self, name, value)
        if not self.prompt:
            raise ValueError("`prompt` must hold at least one token id; got none. Begin with the model's BOS token.")
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1; got {self.max_new_tokens}.")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "`temperature` and `top_k` must not be negative and `top_p` must be in (0, 1]; got "
                f"{self.temperature}, {self.top_k} and {self.top_p}."
            )
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"`seed` must be in [-2^63, 2^64), which torch's generators take; got {self.seed}.")
        if any(not sequence for sequence in self.stop):
            raise ValueError("`stop` must hold sequences of at least one token id; got an empty one.")


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"`{name}` must be an integer; got {value!r}.") from None


def _number(name: str, value: Any) -> float:
    try:
        known = not math.isnan(value)
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"`{name}` must be a number; got {value!r}.")
    return float(value)


def _ids(name: str, ids: Any) -> tuple[int, ...]:
    """Token ids of a list, an array or a tensor."""
    try:
        return tuple(map(operator.index, ids.tolist() if hasattr(ids, "tolist") else ids))
    except TypeError:
        what = "token ids" if name == "prompt" else "sequences of token ids"
        raise ValueError(f"`{name}` must hold {what}, integers; got {ids!r}.") from None


@dataclasses.dataclass(frozen=True)
class Token:
    """One new token of one request.

    Attributes:
        request: number that `submit` gave.
        id: the token.
        end: None while the text goes on; else why it ended: "eos", "stop" or "length".
    """

    request: int
    id: int
    end: str | None


class _Running:
    """What the engine knows of one request."""

    def __init__(self, number: int, request: Request, end_tokens: frozenset[int], device: torch.device):
        self.number, self.request, self.end_tokens = number, request, end_tokens
        self.unread = list(request.prompt)
        self.new: list[int] = []
        self.generator = torch.Generator(device).manual_seed(request.seed)
        warpers: list[Any] = []
        if request.temperature not in (0.0, 1.0):
            # What float32 takes for 0 would divide 0 by 0.
            warpers.append(TemperatureLogitsWarper(max(request.temperature, torch.finfo(torch.float32).tiny)))
        if request.top_k:
            warpers.append(TopKLogitsWarper(request.top_k))
        if request.top_p < 1:
            warpers.append(TopPLogitsWarper(request.top_p))
        self.warp = LogitsProcessorList(warpers)

    def choose(self, logits: Tensor) -> Token:
        """Take the next token from logits [vocab_size]."""
        logits = logits.float()
        if self.request.temperature == 0:
            token = int(logits.argmax())
        else:
            # None of these warpers looks at the text, so a step costs the same however long it is.
            no_text: Any = logits.new_empty(1, 0, dtype=torch.long)
            # Below 0 first: a low temperature may then make them -inf, but not inf.
            weights = self.warp(no_text, logits[None] - logits.max()).softmax(-1)
            try:
                token = int(torch.multinomial(weights, 1, generator=self.generator))
            except RuntimeError as error:
                raise RuntimeError(
                    f"No token of request {self.number} can be sampled: {error}. Cancel it, and the others go on."
                ) from error
        self.new.append(token)
        return Token(self.number, token, self._end())

    def mark(self) -> Callable[[], None]:
        """What takes this request back to where it is now."""
        unread, count = self.unread, len(self.new)
        state = self.generator.get_state() if self.request.temperature else None

        def back() -> None:
            self.unread = unread
            del self.new[count:]
            if state is not None:
                self.generator.set_state(state)

        return back

    def _end(self) -> str | None:
        if self.new[-1] in self.end_tokens:
            return "eos"
        if any(self.new[-len(sequence) :] == list(sequence) for sequence in self.request.stop):
            return "stop"
        return "length" if len(self.new) == self.request.max_new_tokens else None


class XLSTMEngine:
    """A scheduler with slots around a language model; not safe to share between threads.

    A step that fails or is interrupted changes nothing: the next one goes on as if it had not been.

    Args:
        model: put into eval mode.
        slots: requests that run at once; more wait.
        prefill_chunk_size: prompt tokens read per newcomer and step, so that long prompts do not hold up the others.

    Raises:
        ValueError: `slots` or `prefill_chunk_size` is below 1; at a step, the model is in training mode again.
    """

    def __init__(self, model: XLSTMForCausalLM, slots: int = 8, prefill_chunk_size: int = 256):
        if slots < 1 or prefill_chunk_size < 1:
            raise ValueError(
                f"`slots` and `prefill_chunk_size` must be at least 1; got {slots} and {prefill_chunk_size}."
            )
        self.model = model.eval()
        self.slots, self.prefill_chunk_size = slots, prefill_chunk_size
        self._numbers = itertools.count()
        self._waiting: deque[_Running] = deque()
        self._untold: deque[Token] = deque()  # made, and not yet given to anyone
        # Row i of a cache belongs to request i of the list beside it.
        self._reading: list[_Running] = []
        self._reading_cache = XLSTMCache(model.config)
        self._decoding: list[_Running] = []
        self._decoding_cache = XLSTMCache(model.config)

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number.

        Raises:
            ValueError: the prompt holds an id outside the vocabulary.
        """
        running = self._start(request)
        self._waiting.append(running)
        return running.number

    def _start(self, request: Request) -> _Running:
        size = self.model.config.vocab_size
        if not all(0 <= token < size for token in request.prompt):
            raise ValueError(
                f"`prompt` must hold ids from 0 to {size - 1}; got {min(request.prompt)} to {max(request.prompt)}."
            )
        ends = self.model.generation_config.eos_token_id
        end_tokens = frozenset([] if ends is None else torch.as_tensor(ends).flatten().tolist())
        return _Running(next(self._numbers), request, end_tokens, self.model.device)

    def cancel(self, number: int) -> bool:
        """Drop a request wherever it is, and its tokens not yet yielded; False if it is not here, ended or unknown."""
        is_here = self._drop(number)
        if is_here:
            self._untold = deque(token for token in self._untold if token.request != number)
        return is_here

    def _drop(self, number: int) -> bool:
        for running in self._waiting:
            if running.number == number:
                self._waiting.remove(running)
                return True
        for group, cache in self._groups():
            kept = [i for i, running in enumerate(group) if running.number != number]
            if len(kept) < len(group):
                self._keep(group, cache, kept)
                return True
        return False

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs, or has tokens that nobody was given."""
        return bool(self._waiting or self._reading or self._decoding or self._untold)

    def step(self) -> list[Token]:
        """One decoding pass and one reading pass; returns the new tokens, in the order of the requests' numbers."""
        self._advance()
        tokens = list(self._untold)
        self._untold.clear()
        return tokens

    def stream(self, requests: Iterable[Request]) -> Iterator[Token]:
        """Submit requests and yield every new token of them, and of those submitted earlier, until all have ended."""
        self._waiting += [self._start(request) for request in requests]
        while self.busy:
            if not self._untold:
                self._advance()
            while self._untold:
                yield self._untold.popleft()

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """The new tokens of each request; those of others, submitted earlier, come with the next step."""
        running = [self._start(request) for request in requests]
        self._waiting += running
        new: dict[int, list[int]] = {one.number: [] for one in running}
        going, others = set(new), list[Token]()
        try:
            while going:
                for token in self.step():
                    if token.request not in new:
                        others.append(token)
                        continue
                    new[token.request].append(token.id)
                    if token.end is not None:
                        going.remove(token.request)
        finally:
            self._untold.extendleft(reversed(others))
            for number in going:
                self.cancel(number)
        return [new[one.number] for one in running]

    @torch.no_grad()
    def _advance(self) -> None:
        if self.model.training:
            raise ValueError(
                "The model must be in evaluation mode, or dropout would have its part in the texts; got training mode. "
                "Call `model.eval()` before a step, and `model.train()` after it."
            )
        self._untold += self._whole(self._decode)
        self._admit()
        self._untold += self._whole(self._read)
        self._untold = deque(sorted(self._untold, key=lambda token: token.request))

    def _whole(self, run: Callable[[], list[Token]]) -> list[Token]:
        """The tokens of a pass, or nothing of it done: states are replaced, never written to, and can be put back."""
        kept = [(group, list(group), cache, cache.states, cache.tokens_seen) for group, cache in self._groups()]
        marks = [running.mark() for running in (*self._reading, *self._decoding)]
        try:
            return run()
        except BaseException:  # an interrupt, too
            for group, members, cache, states, seen in kept:
                group[:], cache.tokens_seen = members, seen
                for layer, state in zip(cache.layers, states, strict=True):
                    layer.store_(state)
            for back in marks:
                back()
            raise

    def _groups(self) -> tuple[tuple[list[_Running], XLSTMCache], ...]:
        return (self._reading, self._reading_cache), (self._decoding, self._decoding_cache)

    def _decode(self) -> list[Token]:
        if not self._decoding:
            return []
        last = torch.tensor([[running.new[-1]] for running in self._decoding], device=self.model.device)
        logits = self.model(last, past_key_values=self._decoding_cache).logits[:, -1]
        tokens = [running.choose(row) for running, row in zip(self._decoding, logits, strict=True)]
        self._keep(self._decoding, self._decoding_cache, [i for i, token in enumerate(tokens) if token.end is None])
        return tokens

    def _read(self) -> list[Token]:
        """Read a piece of every newcomer's prompt; those that are through get their first token and start decoding."""
        if not self._reading:
            return []
        pieces = [running.unread[: self.prefill_chunk_size] for running in self._reading]
        T = max(map(len, pieces))
        ids = torch.tensor([[0] * (T - len(piece)) + piece for piece in pieces], device=self.model.device)
        mask = torch.tensor([[0] * (T - len(piece)) + [1] * len(piece) for piece in pieces], device=ids.device)
        out = self.model(ids, attention_mask=mask, past_key_values=self._reading_cache, logits_to_keep=1)
        tokens, joining, staying = [], [], []
        for i, (running, piece) in enumerate(zip(self._reading, pieces, strict=True)):
            running.unread = running.unread[len(piece) :]
            if running.unread:
                staying.append(i)
                continue
            tokens.append(running.choose(out.logits[i, -1]))
            if tokens[-1].end is None:
                joining.append(i)
        self._decoding_cache.append_rows_(self._reading_cache, joining)
        self._decoding += [self._reading[i] for i in joining]
        self._keep(self._reading, self._reading_cache, staying)
        return tokens

    def _admit(self) -> None:
        """Give free slots to those who wait."""
        free = self.slots - len(self._reading) - len(self._decoding)
        count = min(free, len(self._waiting))
        if count and self._reading_cache.batch_size > 0:
            self._reading_cache.append_fresh_rows_(count)
        self._reading += [self._waiting.popleft() for _ in range(count)]

    @staticmethod
    def _keep(group: list[_Running], cache: XLSTMCache, rows: list[int]) -> None:
        if len(rows) == len(group):
            return
        group[:] = [group[i] for i in rows]
        if rows:
            cache.batch_select_indices(torch.tensor(rows, device="cpu"))
        else:
            cache.reset()
