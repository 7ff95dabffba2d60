"""generate(): every way of decoding gives what a cache-free full forward gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from corpus import train_tokenizer
from inputs import STYLES, tiny_model, tokens
from tolerances import assert_same
from torch import Tensor
from transformers import LogitsProcessor, TextIteratorStreamer

from modeling_xlstm import XLSTMCache, XLSTMForCausalLM, modeling_xlstm

every_style = pytest.mark.parametrize("style", STYLES)
NEW = 7


def left_padded() -> tuple[Tensor, Tensor]:
    ids, mask = tokens(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[1, :3] = 0
    mask[2, :1] = 0
    return ids * mask, mask


def greedy(model: Any, ids: Tensor, steps: int = NEW) -> Tensor:
    """The definition: the whole text again for every token."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def decode(model: Any, ids: Tensor | None = None, **options: Any) -> Any:
    # Without an end token every row has the full length, so that all outputs can be compared.
    fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, **{**fixed, **options})


@every_style
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_decoding_equals_full_forwards(style: str, use_cache: bool) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(2, 5)
    assert torch.equal(decode(model, ids, use_cache=use_cache), greedy(model, ids))


@every_style
def test_a_left_padded_row_decodes_as_it_would_alone(style: str) -> None:
    model, (ids, mask) = tiny_model(XLSTMForCausalLM, style), left_padded()
    batch = decode(model, ids, attention_mask=mask)
    for row in range(3):
        alone = greedy(model, ids[row : row + 1, mask[row].bool()])
        assert torch.equal(batch[row, 6:], alone[0, -NEW:])


@every_style
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5}]
)
def test_beam_search_equals_beam_search_without_a_cache(style: str, options: dict[str, Any]) -> None:
    model, (ids, mask) = tiny_model(XLSTMForCausalLM, style), left_padded()
    with_cache = decode(model, ids, attention_mask=mask, **options)
    assert torch.equal(with_cache, decode(model, ids, attention_mask=mask, use_cache=False, **options))


@every_style
def test_beam_search_finds_the_best_of_all_continuations(style: str) -> None:
    """With as many beams as there are continuations of one token less, nothing can be missed."""
    model, ids = tiny_model(XLSTMForCausalLM, style, vocab_size=6), torch.randint(3, 6, (1, 4))
    found = decode(model, ids, num_beams=6, max_new_tokens=2, min_new_tokens=2)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    logits = model(torch.cat([ids.expand(36, -1), pairs], 1)).logits.log_softmax(-1)
    scores = logits[:, 3].gather(1, pairs[:, :1]) + logits[:, 4].gather(1, pairs[:, 1:])
    assert torch.equal(found[0, 4:], pairs[scores[:, 0].argmax()])


@every_style
@pytest.mark.parametrize("options", [{"num_return_sequences": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_sampling_equals_sampling_without_a_cache(style: str, options: dict[str, Any]) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(2, 5)
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        outputs.append(decode(model, ids, do_sample=True, top_k=20, use_cache=use_cache, **options))
    assert torch.equal(*outputs)
    assert len(outputs[0]) == 2 * options["num_return_sequences"]


@every_style
def test_scores_are_the_logits_of_full_forwards(style: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(2, 5)
    out = decode(model, ids, output_logits=True, return_dict_in_generate=True)
    assert_same(torch.stack(out.logits, 1), model(out.sequences).logits[:, 4:-1].to(out.logits[0].dtype))


@every_style
def test_a_second_turn_continues_from_the_returned_cache(style: str) -> None:
    model, ids, reply = tiny_model(XLSTMForCausalLM, style), tokens(2, 5), tokens(2, 3)
    first = decode(model, ids, return_dict_in_generate=True)
    history = torch.cat([first.sequences, reply], 1)
    second = decode(model, history, past_key_values=first.past_key_values)
    assert torch.equal(second, greedy(model, history))


@every_style
def test_a_given_cache_may_come_with_the_new_tokens_only(style: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(2, 9)
    cache = XLSTMCache(model.config)
    model(ids[:, :5], past_key_values=cache)
    out = decode(model, ids[:, 5:], past_key_values=cache, attention_mask=torch.ones(2, 9, dtype=torch.long))
    assert torch.equal(out[:, 4:], greedy(model, ids)[:, 9:])


@pytest.mark.parametrize("new", [0, 1, 5, 6])
@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 2}], ids=str)
def test_a_prompt_that_its_cache_leaves_nothing_of_raises(new: int, options: dict[str, Any]) -> None:
    """The text that was read, once more, or the new tokens under a mask of no more than them: the columns tell."""
    model, past = tiny_model(XLSTMForCausalLM), tokens(1, 6)
    ids = tokens(1, new) if new else past
    with pytest.raises(ValueError, match=rf"has seen 6 columns and .* of {len(ids[0])}\."):
        decode(model, ids, past_key_values=model(past).past_key_values, **options)


def test_a_given_cache_without_use_cache_raises() -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(1, 4)
    for cache in (XLSTMCache(model.config), model(ids[:, :2]).past_key_values):
        with pytest.raises(ValueError, match=r"`past_key_values` must come with `use_cache=True`"):
            decode(model, ids, past_key_values=cache, use_cache=False)


DRAFTS = pytest.mark.parametrize("draft", ["prompt lookup", "early exit", "model"])


def drafting(draft: str, style: str) -> dict[str, Any]:
    """Options of generate() that have tokens drafted."""
    if draft == "model":
        return {"assistant_model": tiny_model(XLSTMForCausalLM, style)}
    return {"prompt_lookup_num_tokens": 3} if draft == "prompt lookup" else {"assistant_early_exit": 1}


@every_style
@DRAFTS
def test_drafts_from_a_given_cache_give_the_greedy_output(style: str, draft: str) -> None:
    """Whether the whole text is given or the new tokens only, and whatever padding the cache has seen."""
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(1, 9)
    expected, options = greedy(model, ids), drafting(draft, style)
    padded, mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1), torch.tensor([[0] * 5 + [1] * 9])
    for text, real in ((ids, torch.ones_like(ids)), (padded, mask)):
        seen = text.shape[1] - 3
        for given in (text, text[:, seen:]):
            with torch.no_grad():
                cache = model(text[:, :seen], attention_mask=real[:, :seen]).past_key_values
            out = decode(model, given, past_key_values=cache, attention_mask=real, **options)
            assert torch.equal(out[:, -NEW:], expected[:, -NEW:])
            assert cache.get_seq_length() == text.shape[1] + NEW - 1


@DRAFTS
def test_a_cache_records_no_longer_when_drafting_has_ended(draft: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(1, 5)
    given = XLSTMCache(model.config)
    own = decode(model, ids, return_dict_in_generate=True, **drafting(draft, "large")).past_key_values
    decode(model, ids, past_key_values=given, **drafting(draft, "large"))
    for cache in (own, given):
        assert not cache.recording
        with pytest.raises(ValueError, match=r"from 0 to 0, for the last 0 are recorded"):
            cache.crop(-1)
    given = XLSTMCache(model.config)
    given.activate_past_recording()
    decode(model, ids, past_key_values=given, **drafting(draft, "large"))
    assert given.recording


def test_embeddings_are_not_read_in_chunks_and_not_drafted_for() -> None:
    model = tiny_model(XLSTMForCausalLM)
    embeds = model.get_input_embeddings()(tokens(1, 6)).detach()
    with pytest.raises(ValueError, match=r"`prefill_chunk_size` cuts `input_ids` only"):
        decode(model, inputs_embeds=embeds, prefill_chunk_size=3)
    with pytest.raises(ValueError, match=r"Assisted decoding drafts from ids; got `inputs_embeds`"):
        decode(model, inputs_embeds=embeds, **drafting("model", "large"))


def test_a_tokenizer_for_stop_strings_is_no_unused_keyword(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(modeling_xlstm.logger, "warning_once", told.append)
    model, tokenizer = tiny_model(XLSTMForCausalLM), train_tokenizer([], 61)
    decode(model, tokens(1, 5), stop_strings=["no such text"], tokenizer=tokenizer)
    assert not told


@every_style
def test_embeddings_can_be_the_prompt(style: str) -> None:
    model, (ids, mask) = tiny_model(XLSTMForCausalLM, style), left_padded()
    embeds = model.get_input_embeddings()(ids)
    out = decode(model, inputs_embeds=embeds, attention_mask=mask)
    assert torch.equal(out, decode(model, ids, attention_mask=mask)[:, 6:])


def test_prompt_lookup_goes_on_from_embeddings() -> None:
    """They leave no ids to look a draft up in, until some have been written."""
    model, ids = tiny_model(XLSTMForCausalLM), tokens(1, 5)
    options = {"inputs_embeds": model.get_input_embeddings()(ids).detach(), "prompt_lookup_num_tokens": 3}
    for mask in (None, torch.ones(1, 5, dtype=torch.long)):
        assert torch.equal(decode(model, attention_mask=mask, **options), greedy(model, ids)[:, 5:])
    with pytest.raises(ValueError, match=r"cannot go on from `inputs_embeds` with padding"):
        decode(model, attention_mask=torch.tensor([[0, 0, 1, 1, 1]]), **options)


@every_style
@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
def test_a_prompt_prefilled_in_chunks_gives_the_same(style: str, chunk: int) -> None:
    model, (ids, mask) = tiny_model(XLSTMForCausalLM, style), left_padded()
    chunked = decode(model, ids, attention_mask=mask, prefill_chunk_size=chunk)
    assert torch.equal(chunked, decode(model, ids, attention_mask=mask))


def test_decoding_steps_feed_one_token() -> None:
    model, ids, lengths = tiny_model(XLSTMForCausalLM), tokens(2, 5), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    decode(model, ids)
    assert lengths == [5] + [1] * (NEW - 1)


def test_a_streamer_gets_every_token_in_order() -> None:
    class Tokenizer:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(f"{i} " for i in ids)

    model, ids = tiny_model(XLSTMForCausalLM), tokens(1, 5)
    streamer = TextIteratorStreamer(Tokenizer())  # type: ignore[arg-type]
    out = decode(model, ids, streamer=streamer)
    assert "".join(streamer).split() == [str(i) for i in out[0].tolist()]


def test_stopping_at_the_end_token_pads_the_rest() -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(3, 4)
    free = greedy(model, ids)
    end = int(free[0, 6])  # the third new token of the first row ends it
    out = decode(model, ids, eos_token_id=end, min_new_tokens=0)
    stop = free[0, 4:].tolist().index(end) + 5
    assert torch.equal(out[0, :stop], free[0, :stop])
    assert not out[0, stop:].any()


def test_logits_processors_see_the_last_position() -> None:
    class Only(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            assert scores.shape == (2, 61)
            return scores.masked_fill(torch.arange(61) != 7, -torch.inf)

    out = decode(tiny_model(XLSTMForCausalLM), tokens(2, 4), logits_processor=[Only()])
    assert (out[:, 4:] == 7).all()


def test_a_cache_implementation_by_name_raises() -> None:
    with pytest.raises(ValueError, match=r"cache_implementation='static'.*does not apply"):
        decode(tiny_model(XLSTMForCausalLM), tokens(1, 4), cache_implementation="static")


def test_continuous_batching_by_pages_of_keys_and_values_names_our_own() -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(1, 4)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=r"Use `XLSTMEngine\(model\)\.generate"):
        model.generate_batch(ids.tolist(), progress_bar=False)
    with pytest.raises(ValueError, match=r"Use `XLSTMEngine\(model\)\.generate"):
        decode(model, ids, cache_implementation="paged")
    assert model.config.to_dict() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_decoding_keeps_float32_states(dtype: torch.dtype) -> None:
    model = tiny_model(XLSTMForCausalLM).to(dtype)
    out = decode(model, tokens(2, 5), return_dict_in_generate=True)
    assert {x.dtype for s in out.past_key_values.states for x in s.cell} == {torch.float32}


@every_style
@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
@pytest.mark.parametrize("draft", ["same", "other"])
def test_assisted_decoding_gives_the_greedy_output(style: str, schedule: str, draft: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(1, 5)
    assistant = model if draft == "same" else tiny_model(XLSTMForCausalLM, "large", "mlstm", num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = schedule
    out = decode(model, ids, assistant_model=assistant, max_new_tokens=20, min_new_tokens=20)
    assert torch.equal(out, greedy(model, ids, 20))


@every_style
def test_prompt_lookup_decoding_gives_the_greedy_output(style: str) -> None:
    model = tiny_model(XLSTMForCausalLM, style)
    ids = tokens(1, 4).repeat(1, 3)  # a prompt with something to look up
    out = decode(model, ids, prompt_lookup_num_tokens=3, max_new_tokens=20, min_new_tokens=20)
    assert torch.equal(out, greedy(model, ids, 20))


@every_style
@pytest.mark.parametrize("layers", [1, 2])
def test_drafting_with_its_own_first_blocks_gives_the_greedy_output(style: str, layers: int) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(1, 5)
    out = decode(model, ids, assistant_early_exit=layers, max_new_tokens=20, min_new_tokens=20)
    assert torch.equal(out, greedy(model, ids, 20))


def test_a_model_interrupted_while_its_first_blocks_draft_is_whole_again() -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(1, 5)
    expected = greedy(model, ids)

    def interrupt(*_: Any) -> None:
        drafting.append(model.config.num_hidden_layers == 1)
        if drafting[-1]:
            raise KeyboardInterrupt

    drafting: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        decode(model, ids, assistant_early_exit=1, logits_processor=[interrupt])
    assert drafting[-1]
    assert torch.equal(greedy(model, ids), expected)


@every_style
def test_an_assistant_with_another_tokenizer_gives_the_greedy_output(style: str) -> None:
    words = ["the state of a text has one size, and the text has one state"] * 3
    tokenizer, other = train_tokenizer(words, 280), train_tokenizer(words, 270)
    assert len(tokenizer) != len(other)
    model = tiny_model(XLSTMForCausalLM, style, vocab_size=len(tokenizer))
    assistant = tiny_model(XLSTMForCausalLM, "large", vocab_size=len(other))
    ids = torch.tensor([tokenizer("the state of a text").input_ids])
    out = decode(
        model, ids, assistant_model=assistant, tokenizer=tokenizer, assistant_tokenizer=other,
        max_new_tokens=20, min_new_tokens=20,
    )  # fmt: skip
    assert torch.equal(out, greedy(model, ids, 20))


def test_an_assistant_that_is_often_right_saves_forward_passes() -> None:
    model, ids, calls = tiny_model(XLSTMForCausalLM), tokens(1, 5), []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    assistant = copy.deepcopy(model)
    assistant.model._forward_pre_hooks.clear()
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    decode(model, ids, assistant_model=assistant, max_new_tokens=24, min_new_tokens=24)
    assert len(calls) <= 5
