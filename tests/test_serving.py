"""XLSTMEngine: what a request gets is what it gets alone, whoever comes and goes beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import STYLES, tiny_model, tokens

from modeling_xlstm import Request, XLSTMEngine, XLSTMForCausalLM
from modeling_xlstm.serving_xlstm import _Running

every_style = pytest.mark.parametrize("style", STYLES)


def model_without_end(style: str = "large") -> Any:
    model = tiny_model(XLSTMForCausalLM, style)
    model.generation_config.eos_token_id = None
    return model


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def prompts(*lengths: int) -> list[list[int]]:
    return [tokens(1, n)[0].tolist() for n in lengths]


@every_style
@settings(max_examples=8)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=7),
    slots=st.integers(1, 4),
    chunk=st.sampled_from([1, 3, 64]),
)
def test_greedy_texts_equal_one_by_one_generation(
    style: str, lengths: list[tuple[int, int]], slots: int, chunk: int
) -> None:
    model = model_without_end(style)
    requests = [Request(tokens(1, n)[0].tolist(), max_new_tokens=new) for n, new in lengths]
    together = XLSTMEngine(model, slots, chunk).generate(requests)
    assert together == [greedy(model, list(r.prompt), r.max_new_tokens) for r in requests]


@every_style
def test_sampled_texts_do_not_depend_on_their_neighbours(style: str) -> None:
    model = model_without_end(style)
    settings_of = [{"temperature": 0.7}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.3, "top_p": 0.8}, {}]
    requests = [
        Request(prompt, max_new_tokens=6, seed=i, **options)  # type: ignore[arg-type]
        for i, (prompt, options) in enumerate(zip(prompts(3, 7, 1, 5), settings_of, strict=True))
    ]
    together = XLSTMEngine(model, slots=3, prefill_chunk_size=2).generate(requests)
    assert together == [XLSTMEngine(model).generate([request])[0] for request in requests]


def test_requests_join_a_running_batch_and_stream_in_order() -> None:
    model = model_without_end()
    engine, (a, b) = XLSTMEngine(model, slots=4), prompts(4, 6)
    first = engine.submit(Request(a, max_new_tokens=5))
    got: dict[int, list[int]] = {first: []}
    got[first] += [token.id for token in engine.step() + engine.step()]
    second = engine.submit(Request(b, max_new_tokens=3))
    got[second] = []
    ends = {}
    while engine.busy:
        for token in engine.step():
            got[token.request].append(token.id)
            ends[token.request] = token.end
    assert got == {first: greedy(model, a, 5), second: greedy(model, b, 3)}
    assert ends == {first: "length", second: "length"}


def test_texts_end_at_end_tokens_and_stop_sequences() -> None:
    model = model_without_end()
    (prompt,) = prompts(5)
    free = greedy(model, prompt, 8)
    ended = list(XLSTMEngine(model).stream([Request(prompt, 8, stop=[free[2:4]])]))
    assert ([token.id for token in ended], ended[-1].end) == (free[: first_end(free, free[2:4])], "stop")
    for ends in (free[3], [free[3], 60], (free[3], 60)):
        model.generation_config.eos_token_id = ends
        ended = list(XLSTMEngine(model).stream([Request(prompt, 8)]))
        assert ([token.id for token in ended], ended[-1].end) == (free[: free.index(free[3]) + 1], "eos")


def first_end(text: list[int], stop: list[int]) -> int:
    return next(n for n in range(1, len(text) + 1) if text[:n][-len(stop) :] == stop)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_cancelled_request_leaves_and_the_others_go_on(steps: int) -> None:
    model = model_without_end()
    engine, (a, b, c) = XLSTMEngine(model, slots=2, prefill_chunk_size=2), prompts(3, 9, 4)
    numbers = [engine.submit(Request(p, max_new_tokens=6)) for p in (a, b, c)]
    got: dict[int, list[int]] = {number: [] for number in numbers}
    for _ in range(steps):
        for token in engine.step():
            got[token.request].append(token.id)
    assert engine.cancel(numbers[1])
    assert not engine.cancel(numbers[1])
    for token in engine.stream(()):
        got[token.request].append(token.id)
    assert got[numbers[0]] == greedy(model, a, 6)
    assert got[numbers[2]] == greedy(model, c, 6)
    assert len(got[numbers[1]]) < 6


def test_tokens_of_a_cancelled_request_are_not_yielded_any_more() -> None:
    engine, after = XLSTMEngine(model_without_end()), []
    cancelled = False
    for token in engine.stream([Request(p, max_new_tokens=6) for p in prompts(3, 3)]):
        cancelled = cancelled or engine.cancel(1)  # at request 0's first token, with that of request 1 made beside it
        after.append(token.request)
    assert after == [0] * 6


def test_generate_leaves_others_their_tokens() -> None:
    model, (a, b) = model_without_end(), prompts(3, 4)
    engine = XLSTMEngine(model)
    number = engine.submit(Request(a, max_new_tokens=5))
    assert engine.generate([Request(b, max_new_tokens=3)]) == [greedy(model, b, 3)]
    assert engine.busy
    assert [(token.request, token.id) for token in engine.stream(())] == [(number, i) for i in greedy(model, a, 5)]


def test_a_request_refused_among_others_queues_none_of_them() -> None:
    engine = XLSTMEngine(model_without_end())
    for submit_all in (engine.generate, lambda requests: list(engine.stream(requests))):
        with pytest.raises(ValueError, match="`prompt` must hold ids from 0 to 60; got 99"):
            submit_all([Request([3]), Request([99])])
        assert not engine.busy


@pytest.mark.parametrize("temperature", [1e-40, 5e-324])
def test_a_temperature_next_to_zero_takes_the_most_likely_tokens(temperature: float) -> None:
    model, (prompt,) = model_without_end(), prompts(4)
    assert XLSTMEngine(model).generate([Request(prompt, 6, temperature)]) == [greedy(model, prompt, 6)]


@pytest.mark.parametrize("stage", ["choose", "forward"])
@pytest.mark.parametrize("at", range(1, 9))
def test_an_interrupted_step_changes_no_text(stage: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = model_without_end(), 0
    requests = [Request(p, 5, temperature=1.0, seed=i) for i, p in enumerate(prompts(5, 2, 3))]
    alone = [XLSTMEngine(model).generate([request])[0] for request in requests]
    owner: Any = _Running if stage == "choose" else model
    run = getattr(owner, stage)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result, calls = run(*args, **kwargs), calls + 1
        if calls == at:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, stage, interrupted)
    engine, interrupts = XLSTMEngine(model, slots=2, prefill_chunk_size=2), 0
    got: dict[int, list[int]] = {engine.submit(request): [] for request in requests}
    while engine.busy:
        try:
            for token in engine.step():
                got[token.request].append(token.id)
        except KeyboardInterrupt:
            interrupts += 1
    assert (interrupts, list(got.values())) == (1, alone)


def test_a_request_that_cannot_be_sampled_is_named_and_the_others_go_on() -> None:
    model, (a, b) = model_without_end(), prompts(3, 2)
    alone, engine = greedy(model, a, 4), XLSTMEngine(model)

    def spoil(module: Any, args: Any, logits: torch.Tensor) -> None:
        logits[1:] = torch.nan

    hook = model.lm_head.register_forward_hook(spoil)
    engine.submit(Request(a, max_new_tokens=4))
    spoilt = engine.submit(Request(b, temperature=1.0))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"No token of request {spoilt} can be sampled"):
            engine.step()
    assert engine.cancel(spoilt)
    assert [token.id for token in engine.stream(())] == alone
    hook.remove()


def test_no_more_requests_run_than_there_are_slots() -> None:
    model, sizes = model_without_end(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    XLSTMEngine(model, slots=2).generate([Request(p, max_new_tokens=3) for p in prompts(2, 3, 4, 5, 6)])
    assert max(sizes) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "`prompt` must hold at least one"),
        ({"prompt": [1], "max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"prompt": [1], "top_p": 0.0}, "`top_p` must be in"),
        ({"prompt": [1], "top_p": 1.5}, "`top_p` must be in"),
        ({"prompt": [1], "temperature": -1.0}, "must not be negative"),
        ({"prompt": [1], "stop": [[]]}, "`stop` must hold sequences"),
        ({"prompt": [1], "stop": [5]}, "`stop` must hold sequences of token ids, integers; got 5"),
        ({"prompt": [1.5, 2]}, "`prompt` must hold token ids, integers; got"),
        ({"prompt": torch.zeros(1, 2).long()}, "`prompt` must hold token ids, integers; got"),
        ({"prompt": [1], "max_new_tokens": 2.5}, "`max_new_tokens` must be an integer; got 2.5"),
        ({"prompt": [1], "temperature": None}, "`temperature` must be a number; got None"),
        ({"prompt": [1], "temperature": "0.7"}, "`temperature` must be a number; got '0.7'"),
        ({"prompt": [1], "temperature": float("nan")}, "`temperature` must be a number; got nan"),
        ({"prompt": [1], "top_p": None}, "`top_p` must be a number; got None"),
        ({"prompt": [1], "seed": 2**64}, "`seed` must be in .*; got 18446744073709551616"),
        ({"prompt": [1], "stop": None}, "`stop` must hold sequences of token ids; got None"),
    ],
)
def test_bad_requests_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**options)


def test_ids_may_be_arrays_and_tensors() -> None:
    ids = [3, 4, 5]
    wanted = Request(ids, stop=[ids[:2]])
    assert Request(torch.tensor(ids), stop=[torch.tensor(ids[:2])]) == wanted  # type: ignore[arg-type]
    assert Request(np.array(ids), stop=[np.array(ids[:2])]) == wanted  # type: ignore[arg-type]


def test_a_step_in_training_mode_raises_and_changes_no_text() -> None:
    model, prompt = tiny_model(XLSTMForCausalLM, dropout=0.5), prompts(4)[0]
    engine, request = XLSTMEngine(model), Request(prompt, max_new_tokens=5)
    expected = engine.generate([request])
    number = engine.submit(request)
    tokens_made = engine.step()
    model.train()
    with pytest.raises(ValueError, match=r"in evaluation mode.* got training mode"):
        engine.step()
    model.eval()
    tokens_made += engine.stream([])
    assert [[token.id for token in tokens_made if token.request == number]] == expected


def test_a_default_device_that_is_not_the_model_s_changes_nothing() -> None:
    model = model_without_end()
    requests = [
        Request(prompt, max_new_tokens=count) for prompt, count in zip(prompts(3, 5, 2), (6, 2, 4), strict=True)
    ]
    expected = XLSTMEngine(model, slots=2).generate(requests)
    with torch.device("meta"):
        assert XLSTMEngine(model, slots=2).generate(requests) == expected


def test_ids_outside_the_vocabulary_and_no_slots_raise() -> None:
    model = model_without_end()
    with pytest.raises(ValueError, match="`prompt` must hold ids from 0 to 60; got 3 to 61"):
        XLSTMEngine(model).submit(Request([3, 61]))
    with pytest.raises(ValueError, match="`slots`"):
        XLSTMEngine(model, slots=0)
