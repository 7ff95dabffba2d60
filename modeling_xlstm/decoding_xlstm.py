"""What `generate` asks of the model, and its decode loop: states at fixed addresses, a step replayed or compiled.

A step launched from Python pays for every kernel's launch; one recorded in a CUDA graph pays once. A graph writes where
it was recorded to write, so it steps states of its own. A cache borrows them while it decodes: what is read from it is
a copy, anything but the next step takes it back to states of its own, and a second cache that comes puts the first out.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_xlstm import XLSTMCache
from .ops_linear import is_hooked
from .states_xlstm import LayerState, tensors_of

Step = Callable[[Any], Tensor]  # of the model, which no step holds: its memory must not wait for a cycle's collection
Capture = Callable[[Step, Any], Step]
logger = logging.getLogger(__name__)

Generation: Any = GenerationMixin  # whose methods are typed for a `self` that is several classes at once
KEPT_GRAPHS = 4  # batch sizes; each holds states of its own
PLAIN = (bool, int, float, str, type(None))


class FixedCache(XLSTMCache):
    """States that stay where they are: the next ones are written over them, by the kernel itself where it can."""

    donates = True

    @property
    def states(self) -> list[LayerState | None]:
        """The states themselves, no copies."""
        return [layer.held for layer in self.layers]

    def store_(self, states: Sequence[LayerState], tokens: int, real: Tensor | None = None) -> None:
        """Write all states at once over those before them; columns are counted by the cache that borrows them."""
        pairs = zip(tensors_of(self.states), tensors_of(states), strict=True)
        # What a kernel wrote in place is there already.
        moved = [(old, new) for old, new in pairs if old is not new]
        torch._foreach_copy_([old for old, _ in moved], [new for _, new in moved])


def capture_graph(step: Step, model: Any) -> Step:
    """Record a step in a CUDA graph, after runs that compile and check its kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # A stream of this device: torch's own is on the first one that recorded. Entered here too, for torch does not leave
    # it if a recording cannot be ended. Other threads may go on with what they do on the device.
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        logits = step(model)

    def replay(model: Any) -> Tensor:
        graph.replay()
        return logits

    return replay


def compile_step(config: Any) -> Capture:
    """Compile a step as `generation_config.compile_config` says."""
    return lambda step, model: torch.compile(step, **config.to_dict())


class FixedStep:
    """One token of a batch of one size: ids in, logits out, states stepped in place.

    Args:
        model: the language model.
        states: states of the shapes and dtypes to come.
        ids: ids of the shape to come, [B, 1].
        capture: makes the step fast; it may run the step, for no state is here yet.
    """

    def __init__(self, model: Any, states: Sequence[LayerState | None], ids: Tensor, capture: Capture):
        self.ids = fixed_ids = torch.zeros_like(ids)
        self.cache = cache = FixedCache(model.config)
        for layer, state in zip(cache.layers, states, strict=True):
            layer.store_(state)
            layer.apply_(lambda x: torch.zeros(x.shape, dtype=x.dtype, device=x.device))
        for x in (fixed_ids, *tensors_of(cache.states)):
            torch._dynamo.mark_static_address(x)
        self.borrower: weakref.ref[XLSTMCache] | None = None

        def step(model: Any) -> Tensor:
            return model.forward(fixed_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

        self.replay = capture(step, model)

    def release_(self) -> None:
        """Take the states back from the cache that borrows them, which keeps a copy."""
        borrower = None if self.borrower is None else self.borrower()
        if borrower is not None:
            borrower.settle_()
        self.borrower = None

    def run(self, model: Any, cache: XLSTMCache, ids: Tensor) -> Tensor:
        """Step the states of a cache by one token of each row and return the logits, [B, 1, vocab_size]."""
        lent = self.borrower is not None and self.borrower() is cache and cache.borrowed
        # What it borrows may be another step's by now.
        if not lent or cache.layers[0].recurrent_states[0] is not self.cache.layers[0].recurrent_states[0]:
            states = [layer.held for layer in cache.layers]
            if self.borrower is not None and self.borrower() is not cache:
                self.release_()
            torch._foreach_copy_(tensors_of(self.cache.states), tensors_of(states))
            cache.borrow_(self.cache.states)
            self.borrower = weakref.ref(cache)
        self.ids.copy_(ids)
        logits = self.replay(model).clone()  # the next step writes over it
        cache.advance_(1)
        return logits


def _release_(step: FixedStep | None) -> None:
    if step is not None:
        step.release_()


class DecodeLoop:
    """The recorded steps of a model. A copy or a pickle of the model starts without them.

    Attributes:
        capture: how a step is recorded where nothing else was asked for.
    """

    def __init__(self) -> None:
        self.capture: Capture = capture_graph
        self.steps: OrderedDict[Hashable, FixedStep | None] = OrderedDict()
        self.lock = threading.Lock()
        self.made_for: Hashable = None

    def __deepcopy__(self, memo: Any) -> DecodeLoop:
        return DecodeLoop()

    def __reduce__(self) -> Any:
        return DecodeLoop, ()

    def bind(self, model: Any, compile_config: Any = None) -> Callable[..., Any]:
        """The model's forward for one `generate`: fast where a call is a plain decoding step, else the model's own."""
        obstacle = _model_obstacle(model)
        if obstacle:
            # Who asked for compiled steps must hear that there are none.
            level = logging.INFO if compile_config is None else logging.WARNING
            logger.log(level, "Decoding steps are launched one by one: %s.", obstacle)
            return model.__call__
        made_for = (_fingerprint(model), repr(compile_config))
        with self.lock:
            if made_for != self.made_for:
                self._forget_()
                self.made_for = made_for
        capture = self.capture if compile_config is None else compile_step(compile_config)

        def forward(**inputs: Any) -> Any:
            if not _is_plain_step(model, inputs):
                return model(**inputs)
            cache = inputs["past_key_values"]
            # Threads may share a model; what they share of it here is not theirs between two steps.
            with self.lock, torch.cuda.device_of(inputs["input_ids"]):
                step = self._step_for(model, cache, inputs["input_ids"], capture)
                logits = None if step is None else step.run(model, cache, inputs["input_ids"])
            if logits is None:
                return model(**inputs)
            return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

        return forward

    def _step_for(self, model: Any, cache: XLSTMCache, ids: Tensor, capture: Capture) -> FixedStep | None:
        """The step for a cache of these shapes, recorded when they first come; None where that failed."""
        states = [layer.held for layer in cache.layers]
        shapes = tuple((x.shape, x.dtype, x.device) for x in tensors_of(states))
        key = (ids.shape, ids.dtype, shapes, torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision())
        if key not in self.steps:
            while len(self.steps) >= KEPT_GRAPHS:
                _release_(self.steps.popitem(last=False)[1])
            try:
                self.steps[key] = FixedStep(model, states, ids, capture)
            except RuntimeError as error:
                self.steps[key] = None
                # Of a step that failed, the end of the recording says only that it did.
                first = "" if error.__context__ is None else f" (first: {error.__context__})"
                logger.warning("The decoding step could not be recorded and is launched one by one: %s%s", error, first)
        self.steps.move_to_end(key)
        return self.steps[key]

    def _forget_(self) -> None:
        """Forget every step: the model is not what it was."""
        for step in self.steps.values():
            _release_(step)
        self.steps.clear()


def _model_obstacle(model: Any) -> str:
    """Why a model's steps cannot be recorded; empty if they can."""
    if torch.is_grad_enabled() or model.training:
        return "gradients or training mode are on"
    if model.config.debug:
        return "config.debug looks at every value"
    if len({p.device for p in model.parameters()}) > 1:
        return "the model lies on several devices"
    if any(map(is_hooked, model.modules())):
        return "hooks must run at every call"
    if torch.is_autocast_enabled(next(model.parameters()).device.type):
        return "autocast is on"
    return ""


def _is_plain_step(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether a call is one real token of every row behind states, with nothing else asked for."""
    known = {"input_ids", "past_key_values", "use_cache", "return_dict", "logits_to_keep"}
    ids: Any = inputs.get("input_ids")
    cache: Any = inputs.get("past_key_values")
    return (
        ids is not None
        and ids.dim() == 2
        and ids.shape[1] == 1
        and hasattr(cache, "borrow_")
        and cache.batch_size == ids.shape[0]
        and cache.layers[0].held.cell.m.device == ids.device
        and not cache.recording
        and cache.is_checked(model.config)
        and not torch.is_grad_enabled()
        and not model.config.output_hidden_states
        and inputs.get("use_cache") is not False
        and not isinstance(inputs.get("logits_to_keep"), Tensor)
        and inputs.get("logits_to_keep") in (None, 0, 1)
        and all(value is None or value is False for name, value in inputs.items() if name not in known)
    )


def _fingerprint(model: nn.Module) -> Hashable:
    """What a recorded step has fixed: where tensors lie, and every plain attribute of every module."""
    modules = ((name, type(module).__qualname__, _plain(vars(module))) for name, module in model.named_modules())
    return repr(model.config), *modules


def _plain(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.data_ptr(), value.dtype, value.device
    if isinstance(value, PLAIN):
        return value
    if dataclasses.is_dataclass(value):
        return repr(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(_plain(x) for x in value)
    if isinstance(value, dict):
        return tuple((str(name), _plain(x)) for name, x in value.items())
    return type(value).__qualname__


class XLSTMGenerationMixin(Generation):  # type: ignore[misc]
    """Where `generate` differs from Transformers': the cache, how prompts go on from it, what a step is given."""

    generate: Any

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give `generate` the recurrent cache; Transformers knows none for classes of this name."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"`cache_implementation={generation_config.cache_implementation!r}` does not apply: the "
                "state of an xLSTM has one size and one implementation. Leave it out."
            )
        given, use_cache = model_kwargs.get("past_key_values"), generation_config.use_cache
        if given is not None and use_cache is False:
            raise ValueError(
                "`past_key_values` must come with `use_cache=True`; got False, with which every step reads the whole "
                "text again. Leave one of them out."
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if given is None and use_cache is not False:
            model_kwargs["past_key_values"] = XLSTMCache(self.config)
            if generation_config.is_assistant:  # its drafts will be taken back
                model_kwargs["past_key_values"].activate_past_recording()

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As in Transformers; a cache that leaves nothing to read raises, and so do embeddings in chunks."""
        inputs_embeds = model_kwargs.get("inputs_embeds") if is_first_iteration else None
        if inputs_embeds is not None and generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "`prefill_chunk_size` cuts `input_ids` only; got `inputs_embeds`. Leave it out, or read the embeddings "
                "in pieces yourself and go on from their cache."
            )
        held = _columns_held(input_ids, inputs_embeds, generation_config, model_kwargs)
        # Cut here, for Transformers 5.17 does not where the prompt is read in chunks.
        input_ids = input_ids[:, held:]
        return super()._prefill(
            input_ids, generation_config, model_kwargs, is_first_iteration=is_first_iteration, **kwargs
        )

    def _assisted_decoding(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
    ) -> Any:
        """As in Transformers, which reads a given cache's tokens twice, and leaves the cache recording at the end.

        Interrupted while the first blocks draft, it leaves the model with these alone (`assistant_early_exit`).
        """
        rest = (input_ids, logits_processor, stopping_criteria, generation_config)
        cache: Any = kwargs.get("past_key_values")
        inputs_embeds = kwargs.get("inputs_embeds")
        if inputs_embeds is not None and (generation_config.prompt_lookup_num_tokens is None or input_ids.shape[1]):
            raise ValueError(
                "Assisted decoding drafts from ids; got `inputs_embeds`. Pass `input_ids`, or leave the assistant out."
            )
        if not hasattr(cache, "stop_recording_"):
            return super()._assisted_decoding(*rest, **kwargs)  # which says what is wrong with it
        held, recording = _columns_held(input_ids, inputs_embeds, generation_config, kwargs), cache.recording
        # Transformers cuts and extends a mask from its first column, as if that were the first of the ids.
        mask = kwargs.get("attention_mask")
        if mask is not None and inputs_embeds is not None:
            if not mask.all():
                raise ValueError(
                    "Prompt lookup cannot go on from `inputs_embeds` with padding; got an `attention_mask` with zeros. "
                    "Leave the padded columns out, or pass `input_ids`."
                )
            del kwargs["attention_mask"]
        elif mask is not None and not held:
            kwargs["attention_mask"] = mask[:, -input_ids.shape[1] :]
        cache.held_of_prompt, blocks = held, self.config.num_hidden_layers
        try:
            return super()._assisted_decoding(*rest, **kwargs)
        finally:
            cache.held_of_prompt, self.config.num_hidden_layers = 0, blocks
            if not recording:
                cache.stop_recording_()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse what deals out pages of keys and values (`generate_batch`, `cache_implementation="paged"`)."""
        raise ValueError(
            "Continuous batching in Transformers needs pages of keys and values; an xLSTM has states instead. Use "
            "`XLSTMEngine(model).generate([Request(prompt=ids), ...])` of modeling_xlstm."
        )

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """As in Transformers, but a `compile_config` is honoured on every device, the CPU too."""
        if generation_config.compile_config is not None:
            generation_config.compile_config._compile_all_devices = True
        allowed: bool = super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        return allowed

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """The mask as it is; Transformers would make one between pairs of tokens for a cache that can be compiled."""
        return attention_mask

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,  # Transformers looks for this name here
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in Transformers; a decoding step is given no mask, for the token just chosen is real in every row."""
        kwargs.pop("tokenizer", None)  # that of `stop_strings`, which Transformers passes on to the model
        held = getattr(kwargs.get("past_key_values"), "held_of_prompt", 0)
        if is_first_iteration and held:
            kwargs["next_sequence_length"] = (input_ids if inputs_embeds is None else inputs_embeds).shape[1] - held
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("next_sequence_length") is not None:
            inputs.pop("attention_mask", None)
        # Transformers makes position ids for every model whose forward takes keywords; there are no positions here.
        inputs.pop("position_ids", None)
        return inputs


def _columns_held(
    input_ids: Tensor, inputs_embeds: Tensor | None, generation_config: Any, model_kwargs: dict[str, Any]
) -> int:
    """How many columns of the prompt given its cache has seen: all it has, or none where only what follows is given.

    As Transformers has it, ids are the whole text if they are as long as the mask, and embeddings always.

    Raises:
        ValueError: the cache has seen all of it.
    """
    cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
    seen = 0 if cache is None else cache.get_seq_length()
    columns = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
    # A mask of ones Transformers drops, from 5.18 or so on, and notes its length.
    mask_length = getattr(generation_config, "_mask_length", columns) if mask is None else mask.shape[1]
    if not seen or (inputs_embeds is None and mask_length != columns):
        return 0
    if columns <= seen:
        raise ValueError(
            f"The prompt must go on where `past_key_values` ends; got a cache that has seen {seen} columns and what is "
            f"taken for the whole text, of {columns}. Pass a longer text, or the new tokens alone with an "
            f"`attention_mask` [{len(input_ids)}, {seen} + new]."
        )
    return int(seen)
