"""The decode loop of generate(): states at fixed addresses give the same text, and the laws of the cache still hold.

A stand-in for the CUDA graph does what one does: runs the step once, keeps what it returned, and at a replay runs it
again and writes over that.
"""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inputs import STYLES, tiny_config, tiny_model, tokens
from tolerances import assert_identical, assert_same
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from transformers import CompileConfig

from modeling_xlstm import XLSTMCache, XLSTMForCausalLM
from modeling_xlstm.decoding_xlstm import KEPT_GRAPHS, DecodeLoop, capture_graph
from modeling_xlstm.states_xlstm import tensors_of

every_style = pytest.mark.parametrize("style", STYLES)
FIXED: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Recorder:
    """Captures a step as a CUDA graph would, and counts."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, step: Any, model: Any) -> Any:
        self.captures += 1
        for _ in range(2):  # warm up, as on a GPU: what it does to the states must not matter
            step(model)
        logits = step(model)

        def replay(model: Any) -> Tensor:
            self.replays += 1
            return logits.copy_(step(model))

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """generate() decodes as on a GPU, with the stand-in."""
    recorder = Recorder()
    made = DecodeLoop.__init__

    def init(self: DecodeLoop) -> None:
        made(self)
        self.capture = recorder

    monkeypatch.setattr(DecodeLoop, "__init__", init)
    allowed = XLSTMForCausalLM._valid_auto_compile_criteria

    def criteria(self: Any, model_kwargs: Any, generation_config: Any) -> bool:
        config = copy.copy(generation_config)
        config.compile_config = CompileConfig()
        config.compile_config._compile_all_devices = True
        return allowed(self, model_kwargs, config)

    monkeypatch.setattr(XLSTMForCausalLM, "_valid_auto_compile_criteria", criteria)
    return recorder


def decode(model: Any, ids: Tensor, new: int = 6, **options: Any) -> Any:
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, **{**FIXED, **options})


def plain(model: Any, ids: Tensor, **options: Any) -> Any:
    return decode(model, ids, disable_compile=True, **options)


@torch.no_grad()
def started(model: Any, B: int = 2, T: int = 4) -> tuple[XLSTMCache, Tensor]:
    """A cache after a prompt, and the next token of each row."""
    cache = XLSTMCache(model.config)
    logits = model(tokens(B, T), past_key_values=cache).logits
    return cache, logits[:, -1:].argmax(-1)


@every_style
def test_the_loop_gives_the_same_text_and_scores_with_one_capture(style: str, recorder: Recorder) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(2, 5)
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    expected = plain(model, ids, **options)
    assert (recorder.captures, recorder.replays) == (0, 0)
    for calls in (1, 2):
        actual = decode(model, ids, **options)
        assert_identical(actual.sequences, expected.sequences)
        assert_same(actual.logits, expected.logits)
        assert_same(tensors_of(actual.past_key_values.states), tensors_of(expected.past_key_values.states))
        assert actual.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
        assert (recorder.captures, recorder.replays) == (1, 5 * calls)


def test_padded_prompts_sampling_and_chunked_prefill_go_through_the_loop(recorder: Recorder) -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(3, 6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for options in (
        {"do_sample": True, "top_k": 5},
        {"prefill_chunk_size": 2},
        {"num_return_sequences": 2, "top_k": 5},
    ):
        given: dict[str, Any] = {"attention_mask": mask, **options}
        given["do_sample"] = "top_k" in options
        before = recorder.replays
        texts = []
        for run in (decode, plain):
            torch.manual_seed(1)
            texts.append(run(model, ids, **given))
        assert_identical(*texts)
        assert recorder.replays > before


def test_addresses_stay_and_states_handed_out_stay_what_they_were(recorder: Recorder) -> None:
    model = tiny_model(XLSTMForCausalLM)
    cache, ids = started(model)
    other = copy.deepcopy(cache)
    with torch.no_grad():
        step = model.get_compiled_call(None)
        seen, handed_out, addresses = [], [], []
        for _ in range(4):
            handed_out.append((cache.states, copy.deepcopy(cache.states)))
            out = step(input_ids=ids, past_key_values=cache, use_cache=True)
            addresses.append([x.data_ptr() for x in tensors_of([layer.held for layer in cache.layers])])
            seen.append(out.logits)
            expected = model(ids, past_key_values=other)
            assert_same(out.logits, expected.logits)
            ids = expected.logits.argmax(-1)
        assert_same(tensors_of(cache.states), tensors_of(other.states))
    assert cache.borrowed
    assert all(where == addresses[0] for where in addresses)
    assert recorder.captures == 1
    for given, copied in handed_out:
        assert_identical(tensors_of(given), tensors_of(copied))


def changes(cache: XLSTMCache) -> dict[str, Any]:
    """Everything that may happen to a cache between two steps."""
    return {
        "reorder": lambda: cache.reorder_cache(torch.tensor([1, 0])),
        "select": lambda: cache.batch_select_indices(torch.tensor([1, 1])),
        "repeat": lambda: cache.batch_repeat_interleave(2),
        "detach": cache.detach_,
        "to": lambda: cache.to("cpu"),
        "reset rows": lambda: cache.reset_rows_(torch.tensor([True, False])),
        "append": lambda: cache.append_fresh_rows_(1),
        "offload": lambda: [layer.offload() for layer in cache.layers],
        "apply": lambda: cache.apply_(lambda x: x * 0.5),
        "settle": cache.settle_,
    }


@pytest.mark.parametrize("what", sorted(changes(XLSTMCache(tiny_config()))))
def test_whatever_happens_to_a_cache_between_steps_the_next_step_sees_it(what: str, recorder: Recorder) -> None:
    model = tiny_model(XLSTMForCausalLM)
    borrowing, ids = started(model)
    owning = copy.deepcopy(borrowing)
    with torch.no_grad():
        step = model.get_compiled_call(None)
        for change in (False, True, False):
            for cache in (borrowing, owning):
                if change:
                    changes(cache)[what]()
            ids = ids[:1].expand(borrowing.batch_size, 1)
            logits = step(input_ids=ids, past_key_values=borrowing).logits
            assert_same(logits, model(ids, past_key_values=owning).logits)
            ids = logits.argmax(-1)
    assert recorder.replays == 3
    assert_same(tensors_of(borrowing.states), tensors_of(owning.states))


def test_caches_take_turns_and_a_fork_goes_its_own_way(recorder: Recorder) -> None:
    model = tiny_model(XLSTMForCausalLM)
    first, ids = started(model)
    second, _ = started(model)
    expected = [copy.deepcopy(first), copy.deepcopy(second)]
    with torch.no_grad():
        step = model.get_compiled_call(None)
        step(input_ids=ids, past_key_values=first)
        fork = copy.deepcopy(first)
        kept = tensors_of(fork.states)
        step(input_ids=ids, past_key_values=second)
        step(input_ids=ids, past_key_values=first)
        for cache, count in zip(expected, (2, 1), strict=True):
            for _ in range(count):
                model(ids, past_key_values=cache)
        for cache, wanted in zip((first, second), expected, strict=True):
            assert_same(tensors_of(cache.states), tensors_of(wanted.states))
        assert_identical(tensors_of(fork.states), kept)
        expected_logits = model(ids, past_key_values=copy.deepcopy(fork)).logits
        assert_same(step(input_ids=ids, past_key_values=fork).logits, expected_logits)
    assert recorder.captures == 1


def test_two_recordings_take_turns_with_one_cache(recorder: Recorder) -> None:
    model = tiny_model(XLSTMForCausalLM)
    cache, ids = started(model)
    other = copy.deepcopy(cache)
    with torch.no_grad():
        step = model.get_compiled_call(None)
    for inference in (False, True, False, True, True):
        with torch.inference_mode() if inference else torch.no_grad():
            logits = step(input_ids=ids, past_key_values=cache).logits
            assert_same(logits, model(ids, past_key_values=other).logits)
    assert (recorder.captures, recorder.replays) == (2, 5)
    assert_same(tensors_of(cache.states), tensors_of(other.states))


def test_threads_may_share_a_model(recorder: Recorder) -> None:
    model = tiny_model(XLSTMForCausalLM)
    prompts = [tokens(1, 4) for _ in range(4)]
    expected = [plain(model, ids, new=12) for ids in prompts]
    results: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i, ids=ids: results.__setitem__(i, decode(model, ids, new=12)))  # type: ignore[misc]
        for i, ids in enumerate(prompts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_identical([results[i] for i in range(4)], expected)


def test_what_a_step_has_fixed_and_the_model_has_no_more_is_recorded_anew(recorder: Recorder) -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(2, 5)
    changes: list[Any] = [
        lambda: None,
        lambda: model.lm_head.weight.data.neg_(),  # in place: the same recording reads the new values
        lambda: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight.detach() * 0.5)),
        lambda: setattr(model.config, "output_logit_soft_cap", 0.5),
        lambda: setattr(model.model.norm, "eps", 0.5),
    ]
    for change, captures in zip(changes, (1, 1, 2, 3, 4), strict=True):
        change()
        assert_identical(decode(model, ids), plain(model, ids))
        assert recorder.captures == captures


@pytest.mark.parametrize(
    "what", ["hook", "global hook", "hidden states", "recording", "debug", "beams", "training", "two tokens"]
)
def test_what_a_recording_cannot_do_is_launched_step_by_step(
    what: str, recorder: Recorder, request: pytest.FixtureRequest
) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, debug=what == "debug"), tokens(2, 5)
    options: dict[str, Any] = {}
    calls: list[int] = []
    if what == "hook":
        model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    elif what == "global hook":
        every = register_module_forward_hook(lambda module, *_: calls.extend([1] * (module is model.model.norm)))
        request.addfinalizer(every.remove)
    elif what == "hidden states":
        options = {"output_hidden_states": True, "return_dict_in_generate": True}
    elif what == "recording":
        cache = XLSTMCache(model.config)
        cache.activate_past_recording()
        options = {"past_key_values": cache}
    elif what == "beams":
        options = {"num_beams": 2}
    elif what == "training":
        model.train()
    if what == "two tokens":
        cache, _ = started(model)
        with torch.no_grad():
            model.get_compiled_call(None)(input_ids=ids, past_key_values=cache)
    else:
        decode(model, ids, **options)
    assert recorder.replays == 0
    assert len(calls) == (6 if "hook" in what else 0)


def test_a_step_that_cannot_be_recorded_is_launched_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(2, 5)
    cache, ids = started(model)

    def fail(step: Any, model: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    model.decode_loop.capture = fail
    other = copy.deepcopy(cache)
    with torch.no_grad():
        for _ in range(2):
            logits = model.get_compiled_call(None)(input_ids=ids, past_key_values=cache).logits
            assert_identical(logits, model(ids, past_key_values=other).logits)
    assert caplog.text.count("could not be recorded") == 1


class Gpus:
    """Two GPUs as `capture_graph` sees them: which is the current one, its stream, and where recordings began."""

    def __init__(self) -> None:
        self.device, self.stream = 0, "default"
        self.recorded: list[int] = []
        self.failed = False

    def make_stream(self) -> Any:
        return SimpleNamespace(device=self.device, wait_stream=lambda _: None)

    def make_graph(self) -> Any:
        return SimpleNamespace(capture_begin=self.begin, capture_end=self.end)

    def begin(self, **options: Any) -> None:
        self.recorded.append(self.device)

    def end(self) -> None:
        if self.failed:
            raise RuntimeError("operation failed due to a previous error during capture")


class Current:
    """`torch.cuda.stream`: one that is never left stays the current one."""

    def __init__(self, gpus: Gpus, stream: Any) -> None:
        self.gpus, self.inside = gpus, (stream.device, "side")

    def __enter__(self) -> None:
        self.before = self.gpus.device, self.gpus.stream
        self.gpus.device, self.gpus.stream = self.inside

    def __exit__(self, *args: object) -> None:
        self.gpus.device, self.gpus.stream = self.before


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    gpus = Gpus()
    for name, stand_in in {
        "Stream": gpus.make_stream,
        "current_stream": gpus.make_stream,
        "stream": functools.partial(Current, gpus),
        "CUDAGraph": gpus.make_graph,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    return gpus


def test_a_step_is_recorded_on_the_device_of_its_model(gpus: Gpus) -> None:
    for gpus.device in (0, 1):
        capture_graph(lambda model: torch.zeros(1), None)
    assert gpus.recorded == [0, 1]


def test_a_recording_that_fails_leaves_its_stream_and_says_why(gpus: Gpus, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(XLSTMForCausalLM)
    cache, ids = started(model)
    forward = model.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        if gpus.recorded and not gpus.failed:
            gpus.failed = True
            raise RuntimeError("a step waits for the device")
        return forward(*args, **kwargs)

    with torch.no_grad():
        step = model.get_compiled_call(None)
        model.forward = fail
        step(input_ids=ids, past_key_values=cache)
    assert gpus.failed
    assert gpus.stream == "default"
    assert "(first: a step waits for the device)" in caplog.text


def test_steps_of_few_shapes_are_kept(recorder: Recorder) -> None:
    model = tiny_model(XLSTMForCausalLM)
    for B in range(1, KEPT_GRAPHS + 3):
        ids = tokens(B, 3)
        assert_identical(decode(model, ids, new=3), plain(model, ids, new=3))
    assert len(model.decode_loop.steps) == KEPT_GRAPHS


def test_a_copy_or_a_pickle_of_a_model_starts_without_recordings(recorder: Recorder) -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(2, 5)
    expected = decode(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other.decode_loop.steps
        assert_identical(decode(other, ids), expected)


@every_style
def test_a_compiled_step_has_no_graph_break_and_is_compiled_once(style: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(2, 5)
    config = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode="default")
    expected = plain(model, ids, new=8)
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    counters = torch._dynamo.utils.counters
    counters.clear()
    assert_identical(decode(model, ids, new=8, compile_config=config), expected)
    assert_identical(decode(model, ids, new=8, compile_config=config), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_who_asks_for_compiled_steps_hears_why_there_are_none(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(2, 5)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    decode(model, ids, compile_config=CompileConfig(backend="aot_eager", mode="default"))
    assert "hooks must run at every call" in caplog.text


def test_without_a_gpu_generate_launches_its_steps() -> None:
    model = tiny_model(XLSTMForCausalLM)
    if model.device.type == "cpu":
        decode(model, tokens(1, 3))
        assert not model.decode_loop.steps
