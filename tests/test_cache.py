"""XLSTMCache: every operation of a Transformers cache, exact on states of fixed size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import STYLES, rows, tiny_model, tokens
from safetensors import safe_open
from safetensors.torch import save_file
from tolerances import assert_identical, assert_same
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from modeling_xlstm import XLSTMCache, XLSTMForCausalLM
from modeling_xlstm.cache_xlstm import KEPT

every_style = pytest.mark.parametrize("style", STYLES)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def filled(style: str, B: int = 3) -> tuple[Any, torch.Tensor, XLSTMCache]:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(B, 6)
    return model, ids, model(ids).past_key_values


def states(cache: XLSTMCache) -> Any:
    return rows(cache.states, slice(None))


def test_it_is_a_cache_of_linear_attention_layers() -> None:
    cache = filled("large")[2]
    assert isinstance(cache, Cache)
    assert all(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
    assert cache.is_linear == [True] * 3
    assert len(cache) == 3
    assert cache.get_max_length() == -1


def test_it_counts_the_tokens_it_has_seen() -> None:
    model, ids, cache = filled("large")
    assert cache.get_seq_length() == 6
    model(ids[:, :2], past_key_values=cache)
    assert cache.get_seq_length() == 8
    assert cache.get_mask_sizes(3) == (11, 0)


def test_an_empty_cache_says_so() -> None:
    model = tiny_model(XLSTMForCausalLM)
    cache = XLSTMCache(model.config)
    assert cache.states == [None] * 3
    assert (cache.get_seq_length(), cache.batch_size, cache.size_in_bytes()) == (0, -1, 0)
    assert not cache.has_previous_state()
    for operate in (lambda: cache.reorder_cache(torch.tensor([0])), lambda: cache.to("cpu"), cache.reset):
        operate()
    assert cache.states == [None] * 3


@every_style
def test_has_previous_state_is_told_without_a_convolution_too(style: str) -> None:
    cache = filled(style)[2]
    assert cache.has_previous_state()
    assert all(cache.has_previous_state(i) for i in range(3))
    assert cache.batch_size == 3


@every_style
@pytest.mark.parametrize("operation", ["reorder_cache", "batch_select_indices"])
def test_rows_can_be_reordered_dropped_and_repeated(style: str, operation: str) -> None:
    model, ids, cache = filled(style)
    index = torch.tensor([2, 0, 0, 1])
    getattr(cache, operation)(index)
    assert_same(states(cache), states(model(ids[index]).past_key_values))
    following = model(tokens(4, 2), past_key_values=cache)
    assert following.logits.shape[0] == cache.batch_size == 4


@every_style
def test_rows_can_be_repeated_in_place(style: str) -> None:
    model, ids, cache = filled(style)
    cache.batch_repeat_interleave(2)
    assert_same(states(cache), states(model(ids.repeat_interleave(2, 0)).past_key_values))


@every_style
def test_rows_that_are_reset_are_at_the_start_and_the_others_where_they_were(style: str) -> None:
    model, ids, cache = filled(style)
    cache.reset_rows_(torch.tensor([True, False, True]))
    following = tokens(3, 2)
    after = model(following, past_key_values=cache).logits
    alone = model(torch.cat([ids, following], 1)).logits[:, 6:]
    assert_same(after, torch.stack([model(following).logits[0], alone[1], model(following).logits[2]]))


@every_style
def test_rows_of_another_cache_stand_behind_those_held_at_the_length_of_the_longest(style: str) -> None:
    model, ids, _ = filled(style)
    for first, second in ((ids, ids[:, :2]), (ids[:, :2], ids)):
        cache, other = (model(x).past_key_values for x in (first, second))
        cache.append_rows_(other, [2, 0])
        assert cache.get_seq_length() == 6
        following = tokens(5, 2)
        read = [*first, second[2], second[0]]
        alone = torch.stack([model(torch.cat(text)[None]).logits[0, -2:] for text in zip(read, following, strict=True)])
        assert_same(model(following, past_key_values=cache).logits, alone)


@every_style
def test_reset_gives_a_fresh_start(style: str) -> None:
    model, ids, cache = filled(style)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_identical(model(ids, past_key_values=cache).logits, model(ids).logits)


@every_style
def test_a_copy_goes_its_own_way(style: str) -> None:
    model, ids, cache = filled(style)
    before = [tuple(x.clone() for x in layer) for layer in states(cache)]
    other = copy.deepcopy(cache)
    model(ids, past_key_values=other)
    assert_identical(states(cache), before)
    assert (cache.get_seq_length(), other.get_seq_length()) == (6, 12)


@every_style
@torch.enable_grad()
def test_a_copy_of_states_that_were_made_with_gradients_keeps_them(style: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(2, 6)
    cache = XLSTMCache(model.config)
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    other = copy.deepcopy(cache)
    gradients = []
    for each in (cache, other):
        each.crop(-2)
        logits = model(ids[:, :2], past_key_values=each).logits
        (gradient,) = torch.autograd.grad(logits.square().sum(), model.get_input_embeddings().weight, retain_graph=True)
        gradients.append(gradient)
    assert_identical(gradients[1], gradients[0])


@every_style
def test_states_handed_out_are_never_written_to(style: str) -> None:
    model, ids, cache = filled(style)
    held = states(cache)
    before = [tuple(x.clone() for x in layer) for layer in held]
    model(ids, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1, 1]))
    cache.reset()
    assert_identical(held, before)


@every_style
def test_layers_can_be_offloaded_and_come_back_by_themselves(style: str) -> None:
    model, ids, cache = filled(style)
    expected = model(ids, past_key_values=copy.deepcopy(cache)).logits
    for i in range(len(cache)):
        cache.offload(i)
    assert_identical(model(ids, past_key_values=cache).logits, expected)


def test_it_moves_between_devices() -> None:
    cache = filled("neurips")[2].to("meta")
    assert {x.device.type for layer in states(cache) for x in layer} == {"meta"}


def test_detached_states_have_no_history() -> None:
    model = tiny_model(XLSTMForCausalLM)
    with torch.enable_grad():
        cache = model(tokens(1, 3)).past_key_values
        assert any(x.requires_grad for layer in states(cache) for x in layer)
        cache.detach_()
    assert not any(x.requires_grad for layer in states(cache) for x in layer)


@every_style
def test_a_prompt_can_be_forked_to_many_continuations(style: str) -> None:
    model, prompt = tiny_model(XLSTMForCausalLM, style), tokens(1, 5)
    cache = model(prompt).past_key_values
    cache.batch_repeat_interleave(4)
    ends = tokens(4, 3)
    whole = model(torch.cat([prompt.expand(4, -1), ends], 1)).logits[:, 5:]
    assert_same(model(ends, past_key_values=cache).logits, whole)


@every_style
@pytest.mark.parametrize("pieces", [[7], [1, 1, 1, 1], [3, 1, 2], [1, 6]])
@pytest.mark.parametrize("padded", [False, True])
def test_crop_comes_back_exactly_to_an_earlier_token(style: str, pieces: list[int], padded: bool) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(2, 5 + sum(pieces))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, [6, 8]] = mask[1, 5] = 0
    for back in range(sum(pieces) + 1):
        cache = XLSTMCache(model.config)
        model(ids[:, :5], past_key_values=cache)
        cache.activate_past_recording()
        end = 5
        for piece in pieces:
            end += piece
            model(ids[:, end - piece : end], attention_mask=mask[:, end - piece : end], past_key_values=cache)
        cache.crop(-back)
        expected = model(ids[:, : end - back], attention_mask=mask[:, : end - back]).past_key_values
        assert_same(states(cache), states(expected))
        assert cache.get_seq_length() == end - back


@every_style
def test_crop_can_come_back_over_a_document_boundary_and_to_the_start(style: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(1, 8)
    packing = {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]])}
    for back in range(9):
        cache = XLSTMCache(model.config)
        cache.activate_past_recording()
        model(ids, past_key_values=cache, **packing)
        cache.crop(-back)
        if back == 8:
            assert cache.states == [None] * 3
        else:
            kept = {"seq_idx": packing["seq_idx"][:, : 8 - back]}
            assert_same(states(cache), states(model(ids[:, : 8 - back], **kept).past_key_values))


@every_style
def test_rows_moved_while_recording_come_back_too(style: str) -> None:
    model, ids, cache = filled(style)
    cache.activate_past_recording()
    more, real = tokens(3, 4), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 1, 0]])
    model(more, attention_mask=real, past_key_values=cache)
    index = torch.tensor([2, 0])
    cache.reorder_cache(index)
    cache.crop(-2)
    text, mask = torch.cat([ids, more], 1)[index, :8], torch.cat([torch.ones_like(ids), real], 1)[index, :8]
    assert_same(states(cache), states(model(text, attention_mask=mask).past_key_values))


def test_crop_keeps_no_copy_of_the_matrix_state_per_token() -> None:
    model, ids, cache = filled("large")
    cache.activate_past_recording()
    for t in range(5):
        model(ids[:, t : t + 1], past_key_values=cache)
    recorded = [tape for recording in cache._past for tape in recording.tapes]
    assert len(recorded) == 3  # one tape per layer, whatever the number of calls
    cache.crop(0)
    assert cache._past == []


@every_style
@settings(max_examples=15)
@given(rounds=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 12)), min_size=2, max_size=8))
def test_crops_after_each_other_come_back_over_the_ones_before(style: str, rounds: list[tuple[int, int]]) -> None:
    model, text = tiny_model(XLSTMForCausalLM, style), tokens(1, 3)
    cache = model(text).past_key_values
    cache.activate_past_recording()
    for new, back in rounds:
        more = tokens(1, new)
        model(more, past_key_values=cache)
        text = torch.cat([text, more], 1)
        back = min(back, text.shape[1] - 3)
        cache.crop(-back)
        text = text[:, : text.shape[1] - back]
    assert_same(states(cache), states(model(text).past_key_values))
    assert cache.get_seq_length() == text.shape[1]


def test_what_stays_recorded_over_crops_is_bounded() -> None:
    model, text = tiny_model(XLSTMForCausalLM), tokens(1, 300)
    cache = XLSTMCache(model.config)
    cache.activate_past_recording()
    for start in range(0, 300, 20):
        model(text[:, start : start + 20], past_key_values=cache)
        cache.crop(0)
        assert len(cache._older) == 1
        assert min(start + 20, KEPT) <= cache._older[0].tokens <= 2 * KEPT
    cache.crop(-KEPT)
    assert_same(states(cache), states(model(text[:, : 300 - KEPT]).past_key_values))
    with pytest.raises(ValueError, match="`tokens_to_remove` must be from"):
        cache.crop(-KEPT)


@pytest.mark.parametrize("removed", [1, -1, -5])
def test_crop_further_than_was_recorded_raises_and_changes_nothing(removed: int) -> None:
    model, ids, cache = filled("large")
    before = states(cache)
    if removed == -5:
        cache.activate_past_recording()
        model(ids[:, :4], past_key_values=cache)
        before = states(cache)
    with pytest.raises(ValueError, match="`tokens_to_remove` must be from"):
        cache.crop(removed)
    assert_identical(states(cache), before)


@every_style
def test_a_saved_prompt_state_goes_on_as_if_never_saved(style: str, tmp_path: Path) -> None:
    model, ids, cache = filled(style)
    cache.save(tmp_path / "prompt.safetensors")
    for config in (None, model.config):
        loaded = XLSTMCache.load(tmp_path / "prompt.safetensors", config)
        assert_identical(states(loaded), states(cache))
        assert loaded.get_seq_length() == 6
        following = model(ids[:, :2], past_key_values=loaded).logits
        assert_identical(following, model(ids[:, :2], past_key_values=copy.deepcopy(cache)).logits)


@every_style
def test_a_saved_state_of_a_bfloat16_model_keeps_its_dtypes(style: str, tmp_path: Path) -> None:
    cache = tiny_model(XLSTMForCausalLM, style).bfloat16()(tokens(3, 6)).past_key_values
    cache.save(tmp_path / "prompt.safetensors")
    assert_identical(states(XLSTMCache.load(tmp_path / "prompt.safetensors")), states(cache))


@pytest.mark.parametrize(
    "other", [{"num_heads": 4}, {"gate_soft_cap": None}, {"normalizer_eps": 1e-5}, {"variant": "mlstm"}]
)
def test_states_of_another_model_raise_and_name_the_field(other: dict[str, Any], tmp_path: Path) -> None:
    cache = filled("large")[2]
    cache.save(tmp_path / "prompt.safetensors")
    field = "block_types" if "variant" in other else next(iter(other))
    model = tiny_model(XLSTMForCausalLM, "large", **{"variant": "mixed", **other})
    with pytest.raises(ValueError, match=f"they differ in .*{field}"):
        XLSTMCache.load(tmp_path / "prompt.safetensors", model.config)
    with pytest.raises(ValueError, match=f"they differ in .*{field}"):
        model(tokens(3, 2), past_key_values=XLSTMCache.load(tmp_path / "prompt.safetensors"))
    for foreign in (cache, XLSTMCache(tiny_model(XLSTMForCausalLM, "large").config)):
        with pytest.raises(ValueError, match=f"they differ in .*{field}"):
            model(tokens(3, 2), past_key_values=foreign)


def test_rows_of_another_model_are_not_taken_over() -> None:
    cache, other = filled("large")[2], tiny_model(XLSTMForCausalLM, "large", norm_eps=1e-2)
    before, foreign = states(cache), other(tokens(1, 2)).past_key_values
    for taker in (cache, XLSTMCache(cache._used_by)):
        with pytest.raises(ValueError, match=r"they differ in norm_eps"):
            taker.append_rows_(foreign, [0])
    assert_identical(states(cache), before)


def rewritten(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, m: t.pop("0.m"), r"missing or too many: \['0.m'\]"),
        (lambda t, m: t.update({"9.m": t["0.m"].clone()}), r"missing or too many: \['9.m'\]"),
        (lambda t, m: t.update({"0.n": t["0.n"][:, :1]}), "`0.n` must be"),
        (lambda t, m: t.update({"0.n": t["0.n"][:2]}), "must be"),
        (lambda t, m: t.update({"1.C": t["1.C"].half()}), "`1.C` must be float32 or float64"),
        (lambda t, m: t["1.C"].fill_(torch.nan), "`1.C` holds values that are not finite"),
        (lambda t, m: m.pop("format"), "its format must be"),
        (lambda t, m: m.update(tokens_seen="-3"), "its header does not describe"),
        (lambda t, m: m.update(tokens_seen="many"), "cannot be read as states"),
        (lambda t, m: m.update(model="[]"), "its header does not describe"),
        (lambda t, m: m.update(model=m["model"].replace('"hidden_size": 16', '"hidden_size": -1')), "cannot be read"),
        (lambda t, m: m.update(model="{" * 99999), "cannot be read as states"),
        (lambda t, m: t.update({name: x[:0] for name, x in t.items()}), "its states have no rows"),
        (lambda t, m: t["1.C"].neg_(), "its checksum is"),
        (lambda t, m: m.update(tokens_seen="7"), "its checksum is"),
    ],
)
def test_a_hostile_file_raises_and_loads_nothing(damage: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    filled("large")[2].save(path)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    damage(tensors, metadata)
    rewritten(path, tensors, metadata)
    with pytest.raises(ValueError, match=message):
        XLSTMCache.load(path)


def test_a_file_without_a_checksum_loads_as_it_did(tmp_path: Path) -> None:
    path, cache = tmp_path / "prompt.safetensors", filled("large")[2]
    cache.save(path)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    del metadata["crc32"]
    rewritten(path, tensors, metadata)
    assert_identical(states(XLSTMCache.load(path)), states(cache))


def test_what_was_loaded_stays_when_its_file_is_written_over(tmp_path: Path) -> None:
    path, cache = tmp_path / "prompt.safetensors", filled("large")[2]
    cache.save(path)
    loaded = XLSTMCache.load(path)
    path.write_bytes(bytes(path.stat().st_size))  # in place, as `cp` does
    assert_identical(states(loaded), states(cache))


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_file_raises(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    filled("large")[2].save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="no safetensors file, or a damaged one"):
        XLSTMCache.load(path)


def test_a_missing_file_and_an_empty_cache_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No file of states"):
        XLSTMCache.load(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="has seen no token"):
        XLSTMCache(tiny_model(XLSTMForCausalLM).config).save(tmp_path / "empty.safetensors")
    with pytest.raises(FileNotFoundError, match=r"there is none at .*nowhere"):
        filled("large")[2].save(tmp_path / "nowhere" / "prompt.safetensors")


STEP = st.one_of(
    st.tuples(st.just("feed"), st.lists(st.integers(0, 2**20), min_size=1, max_size=4)),  # one mask per column, as bits
    st.tuples(st.just("draft"), st.lists(st.integers(0, 2**20), min_size=1, max_size=4), st.integers(0, 4)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=3)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("fork")),
    st.tuples(st.just("save")),
)


class Texts:
    """A cache, and beside it, column by column, all that it should have seen."""

    def __init__(self, style: str, path: Path):
        self.model, self.path = tiny_model(XLSTMForCausalLM, style), path
        self.cache = XLSTMCache(self.model.config)
        self.ids, self.mask = tokens(2, 0), torch.zeros(2, 0, dtype=torch.long)
        self.feed([3, 1])

    def feed(self, bits: list[int]) -> None:
        ids = tokens(len(self.ids), len(bits))
        mask = (torch.tensor(bits) >> torch.arange(len(ids))[:, None]) & 1
        self.model(ids, attention_mask=mask, past_key_values=self.cache)
        self.ids, self.mask = torch.cat([self.ids, ids], 1), torch.cat([self.mask, mask], 1)

    def draft(self, bits: list[int], back: int) -> None:
        self.cache.activate_past_recording()
        self.feed(bits)
        back = min(back, len(bits))
        self.cache.crop(-back)
        kept = self.ids.shape[1] - back
        self.ids, self.mask = self.ids[:, :kept], self.mask[:, :kept]

    def select(self, order: list[int]) -> None:
        index = torch.tensor(order) % len(self.ids)
        self.cache.batch_select_indices(index)
        self.ids, self.mask = self.ids[index], self.mask[index]

    def repeat(self, times: int) -> None:
        if len(self.ids) * times <= 4:
            self.cache.batch_repeat_interleave(times)
            self.ids, self.mask = self.ids.repeat_interleave(times, 0), self.mask.repeat_interleave(times, 0)

    def fork(self) -> None:
        self.cache, other = copy.deepcopy(self.cache), self.cache
        self.model(tokens(len(self.ids), 2), past_key_values=other)  # what the other does stays its own

    def save(self) -> None:
        self.cache.save(self.path)
        self.cache = XLSTMCache.load(self.path, self.model.config)


@every_style
@settings(max_examples=20)
@given(steps=st.lists(STEP, max_size=6))
def test_any_sequence_of_operations_equals_one_forward_of_each_text(
    style: str, steps: list[tuple[Any, ...]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Continue with padding anywhere, come back, reorder, select, repeat, fork, save and load, in any order."""
    texts = Texts(style, tmp_path_factory.mktemp("states") / "state.safetensors")
    for name, *arguments in steps:
        getattr(texts, name)(*arguments)
    expected = texts.model(texts.ids, attention_mask=texts.mask).past_key_values
    assert_same(states(texts.cache), states(expected))
    assert texts.cache.get_seq_length() == texts.ids.shape[1]
