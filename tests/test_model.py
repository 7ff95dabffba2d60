"""XLSTMModel and its heads: the laws of padding, packing, splitting and batching, for every style and mixture."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import STYLES, rows, tiny_config, tiny_model, tokens
from tolerances import assert_identical, assert_same
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache
from transformers.utils import logging

from modeling_xlstm import (
    XLSTMCache,
    XLSTMForCausalLM,
    XLSTMForSequenceClassification,
    XLSTMForTokenClassification,
    XLSTMModel,
)
from modeling_xlstm.memory_xlstm import enable_checkpointing
from modeling_xlstm.states_xlstm import Call

VARIANTS = ["mlstm", "slstm", "mixed"]
every_style = pytest.mark.parametrize("style", STYLES)
every_mixture = pytest.mark.parametrize("variant", VARIANTS)


def loss_gradients(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**inputs).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss, {
        n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, gradients, strict=True)
    }


@every_style
@every_mixture
@settings(max_examples=10)
@given(cuts=st.sets(st.integers(1, 10), max_size=3))
def test_splitting_a_sequence_anywhere_changes_nothing(style: str, variant: str, cuts: set[int]) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style, variant), tokens(2, 11)
    whole = model(ids)
    edges, cache, logits = [0, *sorted(cuts), 11], None, []
    for start, stop in itertools.pairwise(edges):
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    assert cache is not None
    assert_same(torch.cat(logits, 1), whole.logits)
    assert_same(rows(cache.states, slice(None)), rows(whole.past_key_values.states, slice(None)))
    assert cache.get_seq_length() == 11


@every_style
@every_mixture
@settings(max_examples=10)
@given(mask=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3), cut=st.integers(0, 8))
def test_padding_anywhere_changes_no_real_token_and_no_state(
    style: str, variant: str, mask: list[list[bool]], cut: int
) -> None:
    """Left, right, inside, whole rows; on the first forward and on a continued one; any batch size."""
    model = tiny_model(XLSTMForCausalLM, style, variant)
    real = torch.tensor(mask)
    B, T = real.shape
    ids = tokens(B, T) * real
    cache, logits = XLSTMCache(model.config), []
    for piece in (slice(0, cut), slice(cut, T)):
        if ids[:, piece].shape[1]:
            # Generation passes the whole mask, other callers the current part of it.
            given_mask = real[:, : piece.stop].long() if piece.start else real[:, piece]
            logits.append(model(ids[:, piece], attention_mask=given_mask, past_key_values=cache).logits)
    padded = torch.cat(logits, 1)
    for row in range(B):
        if real[row].any():
            alone = model(ids[row][real[row]][None])
            assert_same(padded[row][real[row]], alone.logits[0])
            assert_same(rows(cache.states, row), rows(alone.past_key_values.states, 0))
        else:
            assert all(not x.any() for layer in rows(cache.states, row) for x in layer)


@every_style
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_loss_and_no_gradient(style: str, side: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(1, 7)
    pad, zeros = torch.full((1, 3), -100), torch.zeros(1, 3, dtype=torch.long)
    order = (lambda a, b: [b, a]) if side == "left" else (lambda a, b: [a, b])
    padded = loss_gradients(
        model,
        input_ids=torch.cat(order(ids, zeros), 1),
        labels=torch.cat(order(ids, pad), 1),
        attention_mask=torch.cat(order(torch.ones_like(ids), zeros), 1),
    )
    assert_same(padded, loss_gradients(model, input_ids=ids, labels=ids))


def spell(spelling: str, cuts: list[int], T: int) -> dict[str, Tensor]:
    """The same packing of one row in one of its spellings, or in all."""
    edges = torch.tensor([0, *cuts, T])
    document = torch.searchsorted(edges, torch.arange(T), right=True)
    spellings = {
        "seq_idx": document[None],
        "cu_seq_lens_q": edges.int(),
        "position_ids": (torch.arange(T) - edges[document - 1])[None],
    }
    return spellings if spelling == "all" else {spelling: spellings[spelling]}


@every_style
@every_mixture
@pytest.mark.parametrize("spelling", ["seq_idx", "cu_seq_lens_q", "position_ids", "all"])
@settings(max_examples=5)
@given(cuts=st.sets(st.integers(1, 11), min_size=1, max_size=4))
def test_packed_documents_equal_separate_ones(style: str, variant: str, spelling: str, cuts: set[int]) -> None:
    model, ids, T = tiny_model(XLSTMForCausalLM, style, variant), tokens(1, 12), 12
    start = XLSTMCache(model.config)
    with torch.no_grad():
        model(tokens(1, 3), past_key_values=start)  # a state that belongs to the first document
    packed = model(ids, past_key_values=copy.deepcopy(start), **spell(spelling, sorted(cuts), T))
    edges = [0, *sorted(cuts), T]
    separate = [
        model(ids[:, a:b], past_key_values=copy.deepcopy(start) if a == 0 else None, use_cache=True)
        for a, b in itertools.pairwise(edges)
    ]
    assert_same(packed.logits, torch.cat([out.logits for out in separate], 1))
    last = separate[-1].past_key_values.states
    assert_same(rows(packed.past_key_values.states, slice(None)), rows(last, slice(None)))


@every_style
def test_packing_changes_no_loss_and_no_gradient(style: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(1, 12)
    edges = [0, 5, 8, 12]
    packed = loss_gradients(model, input_ids=ids, labels=ids, **spell("seq_idx", edges[1:-1], 12))
    parts = [loss_gradients(model, input_ids=ids[:, a:b], labels=ids[:, a:b]) for a, b in itertools.pairwise(edges)]
    weights = [(b - a - 1) / 9 for a, b in itertools.pairwise(edges)]  # predicted tokens of each document
    loss = sum(w * part[0] for w, part in zip(weights, parts, strict=True))
    gradients = {n: sum(w * part[1][n] for w, part in zip(weights, parts, strict=True)) for n in packed[1]}
    assert_same(packed, (loss, gradients))


@every_style
def test_padding_and_packing_combine(style: str) -> None:
    model = tiny_model(XLSTMForCausalLM, style)
    ids = tokens(2, 10)
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    document = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [5, 5, 5, 5, 6, 6, 6, 6, 7, 7]])
    packed = model(ids, attention_mask=real.long(), seq_idx=document)
    for row in range(2):
        for number in document[row][real[row]].unique():
            chosen = real[row] & (document[row] == number)
            alone = model(ids[row][chosen][None])
            assert_same(packed.logits[row][chosen], alone.logits[0])
        assert_same(rows(packed.past_key_values.states, row), rows(alone.past_key_values.states, 0))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, r"`attention_mask` must be \[2, 6\]"),
        ({"attention_mask": torch.ones(2, 5)}, r"`attention_mask` must be \[2, 6\]"),
        ({"attention_mask": torch.ones(1, 6)}, r"`attention_mask` must be \[2, 6\]"),
        ({"seq_idx": torch.zeros(2, 5, dtype=torch.long)}, r"`seq_idx` must be \[2, 6\]"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 6])}, "describe a single row"),
        ({"inputs_embeds": torch.zeros(2, 6, 16)}, "exactly one of `input_ids`, `inputs_embeds`"),
        ({"input_ids": torch.zeros(2, 6)}, r"`input_ids` must be \[B, T\] integers.*torch.float32"),
        ({"input_ids": torch.zeros(6, dtype=torch.long)}, r"`input_ids` must be \[B, T\] integers"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 6, 15)}, r"`inputs_embeds` must be \[B, T, 16\]"),
        ({"attention_mask": torch.ones(2, 6, device="meta")}, "`attention_mask` must be on cpu"),
        ({"seq_idx": torch.zeros(2, 6, device="meta")}, "`seq_idx` must be on cpu"),
        ({"past_key_values": DynamicCache()}, "`past_key_values` must be an XLSTMCache"),
    ],
)
def test_bad_arguments_are_named(fault: dict[str, Any], message: str) -> None:
    model = tiny_model(XLSTMModel)
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": tokens(2, 6), **fault})


@pytest.mark.parametrize(
    "edges", [torch.tensor([0, 3, 5]), torch.tensor([1, 3, 6]), torch.tensor([0, 4, 3, 6]), torch.tensor([[0, 6]])]
)
def test_document_edges_that_do_not_rise_to_the_end_raise(edges: Tensor) -> None:
    with pytest.raises(ValueError, match="must rise from 0 to T = 6"):
        tiny_model(XLSTMModel)(tokens(1, 6), cu_seq_lens_q=edges)


def test_spellings_of_packing_that_disagree_raise() -> None:
    packing = spell("seq_idx", [3], 6) | spell("position_ids", [4], 6)
    with pytest.raises(ValueError, match="disagree whether a document begins at real token 3 of row 0"):
        tiny_model(XLSTMModel)(tokens(1, 6), **packing)


def test_a_cache_of_another_batch_size_raises() -> None:
    model = tiny_model(XLSTMModel)
    cache = model(tokens(3, 4)).past_key_values
    with pytest.raises(ValueError, match="holds 3 rows and the input has 2"):
        model(tokens(2, 4), past_key_values=cache)


@every_style
def test_a_cache_on_another_device_raises(style: str) -> None:
    model = tiny_model(XLSTMModel, style)
    cache = model(tokens(2, 4)).past_key_values.to("meta")
    with pytest.raises(ValueError, match=r"must be on cpu as"):
        model(tokens(2, 4), past_key_values=cache)


def test_a_failed_forward_leaves_the_cache_as_it_was() -> None:
    model = tiny_model(XLSTMModel)
    cache = model(tokens(2, 4)).past_key_values
    before = rows(cache.states, slice(None))
    model.layers[-1].mixer = torch.nn.Identity()
    with pytest.raises(TypeError):
        model(tokens(2, 4), past_key_values=cache)
    assert_identical(rows(cache.states, slice(None)), before)
    assert cache.get_seq_length() == 4


def test_a_keyword_nothing_knows_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    logging.enable_propagation()
    try:
        tiny_model(XLSTMForCausalLM)(tokens(1, 4), token_type_idz=torch.zeros(1, 4))
    finally:
        logging.disable_propagation()
    assert "token_type_idz" in caplog.text


@every_style
def test_embeddings_give_what_their_ids_give(style: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(2, 6)
    assert_identical(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


@every_style
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("T", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("use_cache", [False, True])
def test_every_dtype_length_and_cache_combination_runs_with_float32_states(
    style: str, dtype: torch.dtype, T: int, use_cache: bool
) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style).to(dtype), tokens(2, T)
    out = model(ids, use_cache=use_cache)
    assert out.logits.dtype == dtype
    assert out.logits.isfinite().all()
    if use_cache:
        assert {x.dtype for s in out.past_key_values.states for x in s.cell} == {torch.float32}
        following = model(ids[:, :1], past_key_values=out.past_key_values)
        assert following.logits.isfinite().all()


@every_style
def test_hidden_states_are_the_embeddings_and_every_block_the_last_one_normalised(style: str) -> None:
    model, ids = tiny_model(XLSTMModel, style), tokens(2, 5)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 1]])
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    real = mask.bool()
    assert_identical(out.hidden_states[0][real], model.get_input_embeddings()(ids)[real])
    assert_identical(out.hidden_states[-1], out.last_hidden_state)
    first_block, _ = model.layers[0](model.get_input_embeddings()(ids[:1, 1:]), Call())
    assert_same(out.hidden_states[1][0, 1:], first_block[0])


@every_style
def test_gradients_reach_the_hidden_states_that_are_returned_around_padding(style: str) -> None:
    model, mask = tiny_model(XLSTMModel, style), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 1]])
    embeds = model.get_input_embeddings()(tokens(2, 5)).detach().requires_grad_()
    out = model(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
    for x in out.hidden_states:
        x.retain_grad()
    (out.last_hidden_state * mask[..., None]).sin().sum().backward()
    assert_identical(out.hidden_states[0].grad, embeds.grad)
    for x in out.hidden_states:
        assert_identical(x.grad.any(-1), mask.bool())


@every_style
def test_return_dict_false_gives_the_same_tensors_as_a_tuple(style: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(2, 5)
    named, plain = model(ids, labels=ids), model(ids, labels=ids, return_dict=False)
    assert_identical(plain[0], named.loss)
    assert_identical(plain[1], named.logits)
    model.config.return_dict = False
    assert_identical(model(ids, labels=ids)[1], named.logits)
    assert_identical(model(ids, labels=ids, return_dict=True).logits, named.logits)
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    model.config.return_dict = True
    assert_identical(model.generate(ids, max_new_tokens=3, do_sample=False), generated)


@every_style
def test_logits_to_keep_computes_only_those(style: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(2, 7)
    logits = model(ids).logits
    assert_same(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    assert_same(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])


def test_the_loss_is_divided_by_num_items_in_batch() -> None:
    """Accumulating two halves of a batch gives the gradients of the whole batch."""
    model, ids = tiny_model(XLSTMForCausalLM), tokens(4, 6)
    labels = ids.clone()
    labels[0, 3:] = -100
    items = int((labels[:, 1:] != -100).sum())
    whole = loss_gradients(model, input_ids=ids, labels=labels)
    halves = [
        loss_gradients(model, input_ids=ids[rows], labels=labels[rows], num_items_in_batch=items)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert_same((halves[0][0] + halves[1][0], {n: halves[0][1][n] + halves[1][1][n] for n in whole[1]}), whole)


@every_style
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(style: str, reentrant: bool) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style).train(), tokens(2, 9)
    plain = loss_gradients(model, input_ids=ids, labels=ids)
    enable_checkpointing(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert_same((loss, {n: p.grad for n, p in model.named_parameters()}), plain)


def test_gradient_checkpointing_turns_the_cache_off() -> None:
    model = tiny_model(XLSTMForCausalLM).train()
    enable_checkpointing(model, use_reentrant=False)
    assert model(tokens(1, 4), use_cache=True).past_key_values is None


@every_style
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoints", "reentrant checkpoints"])
def test_gradients_flow_through_a_carried_state(style: str, reentrant: bool | None) -> None:
    """Training on two halves with the state between them equals training on the whole."""
    model, ids = tiny_model(XLSTMForCausalLM, style).train(), tokens(2, 10)
    whole = loss_gradients(model, input_ids=ids, labels=ids, logits_to_keep=0)
    if reentrant is not None:
        enable_checkpointing(model, use_reentrant=reentrant)
    cache = XLSTMCache(model.config)
    logits = torch.cat([model(x, past_key_values=cache).logits for x in (ids[:, :4], ids[:, 4:])], 1)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()  # which reentrant checkpoints ask for
    assert_same((loss, {n: p.grad for n, p in model.named_parameters()}), whole)


class Logits(torch.nn.Module):
    def __init__(self, model: XLSTMForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (tokens(2, 5), {}, r"Labels must be \[2, 9\] integers.* got \[2, 5\] of torch\.int64"),
        (tokens(2, 9).float(), {}, r"Labels must be \[2, 9\] integers.* got \[2, 9\] of torch\.float32"),
        (tokens(2, 9), {"logits_to_keep": 3}, r"Labels must be \[2, 3\] integers.* leave `logits_to_keep` out"),
        (tokens(1, 9)[0], {}, r"`labels` must be \[B, T\]; got shape \(9,\)"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels: Tensor, options: dict[str, Any], message: str) -> None:
    model = tiny_model(XLSTMForCausalLM)
    with pytest.raises(ValueError, match=message):
        model(tokens(2, 9), labels=labels, **options)


def test_labels_may_be_narrow_integers_as_ids_may() -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(2, 9)
    assert_identical(model(ids.int(), labels=ids.int()).loss, model(ids, labels=ids).loss)


@every_style
def test_an_exported_model_computes_what_the_model_does(style: str) -> None:
    """Whatever its gates are: which way they let the mLSTM take is not known when it is exported."""
    model = Logits(tiny_model(XLSTMForCausalLM, style)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("fgate.bias"):
                parameter.fill_(-9.0)
        exported = torch.export.export(model, (tokens(1, 21),)).module()
        ids = tokens(1, 21)
        assert_same(exported(ids), model(ids))


@every_style
def test_a_model_without_numbers_tells_the_shapes(style: str) -> None:
    model = tiny_model(XLSTMForCausalLM, style)
    given = {"attention_mask": torch.ones(2, 9).long(), "use_cache": True}
    known = model(tokens(2, 9), **given)
    output = model.to("meta")(tokens(2, 9).to("meta"), use_cache=True)
    assert output.logits.shape == known.logits.shape
    pairs = zip(output.past_key_values.states, known.past_key_values.states, strict=True)
    assert all(a.cell.m.shape == b.cell.m.shape for a, b in pairs)


def test_no_rows_give_no_logits() -> None:
    assert tiny_model(XLSTMForCausalLM)(tokens(0, 5)).logits.shape == (0, 5, 61)


@every_style
def test_nothing_that_a_block_returns_in_training_is_a_view(style: str) -> None:
    """FSDP2 hooks what blocks return, warns of views, and loses its hook where one is written in place."""
    model, returned = tiny_model(XLSTMForCausalLM, style).train(), []
    for block in model.model.layers:
        block.register_forward_hook(lambda _, args, output: returned.extend(tree_leaves(output)))
    ids, mask, documents = tokens(2, 8), torch.ones(2, 8).long(), torch.zeros(2, 8).long()
    mask[0, :3], documents[0, 3:] = 0, 1
    for options in ({}, {"attention_mask": mask}, {"seq_idx": documents}):
        model(ids, labels=ids, **options)
    in_training = [x for x in returned if isinstance(x, Tensor) and x.requires_grad]
    assert len(in_training) > 3 * 3 * len(model.model.layers)
    assert all(x._base is None for x in in_training)


@every_style
def test_a_training_step_lowers_the_loss(style: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style).float().train(), tokens(4, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@every_style
@every_mixture
def test_every_parameter_gets_a_gradient(style: str, variant: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style, variant), tokens(2, 9)
    _, gradients = loss_gradients(model, input_ids=ids, labels=ids)
    assert [name for name, g in gradients.items() if not g.any()] == []


@every_style
def test_a_state_of_float64_serves_a_float32_model(style: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style, state_dtype="float64").float(), tokens(2, 6)
    cache = model(ids).past_key_values
    assert {x.dtype for s in cache.states for x in s.cell} == {torch.float64}
    assert_same(model(ids[:, :1], past_key_values=cache).logits, model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:])


@pytest.mark.parametrize("dropout", ["dropout", "ffn_dropout", "embedding_dropout"])
def test_every_dropout_acts_in_training_and_only_there(dropout: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, **{dropout: 0.5}), tokens(2, 6)
    assert_identical(model(ids).logits, model(ids).logits)
    model.train()
    assert (model(ids).logits != model(ids).logits).any()


@every_style
def test_the_reference_backend_gives_the_same_model(style: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(2, 9)
    reference = XLSTMForCausalLM(tiny_config(style, kernel_backend="reference")).double().eval()
    reference.load_state_dict(model.state_dict())
    assert_same(reference(ids).logits, model(ids).logits)


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("by", ["mask", "pad_token_id"])
def test_sequence_classification_reads_the_last_real_token(side: str, by: str) -> None:
    model, ids = tiny_model(XLSTMForSequenceClassification, num_labels=3), tokens(2, 6)
    x, mask = ids.clone(), torch.ones_like(ids)
    if side != "none":
        gap = slice(0, 2) if side == "left" else slice(4, 6)
        x[1, gap] = 0
        mask[1, gap] = 0
        ids = [ids[0], ids[1][mask[1].bool()]]
    if by == "pad_token_id" and side == "left":
        mask_given: Tensor | None = mask  # ids alone cannot keep left padding out of the state
    else:
        mask_given = mask if by == "mask" else None
    logits = model(x, attention_mask=mask_given).logits
    assert_same(logits, torch.cat([model(row[None]).logits for row in ids]))


def test_sequence_classification_without_mask_or_pad_token_raises() -> None:
    model = tiny_model(XLSTMForSequenceClassification, pad_token_id=None)
    with pytest.raises(ValueError, match="must say where each of the 2 rows ends"):
        model(tokens(2, 4))
    assert model(tokens(1, 4)).logits.shape == (1, 2)


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 2])),
        ("multi_label_classification", torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)),
        ("regression", torch.randn(2, 3, dtype=torch.float64)),
    ],
)
def test_sequence_classification_has_the_three_losses_of_transformers(problem_type: str, labels: Tensor) -> None:
    model, ids = tiny_model(XLSTMForSequenceClassification, num_labels=3, problem_type=problem_type), tokens(2, 5)
    out = model(ids, labels=labels)
    losses = {
        "single_label_classification": torch.nn.functional.cross_entropy,
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
        "regression": torch.nn.functional.mse_loss,
    }
    assert_same(out.loss, losses[problem_type](out.logits, labels))


def test_token_classification_scores_every_token_and_leaves_ignored_ones_out() -> None:
    model, ids = tiny_model(XLSTMForTokenClassification, num_labels=5), tokens(2, 6)
    labels = torch.randint(0, 5, (2, 6))
    labels[:, 0] = -100
    out = model(ids, labels=labels)
    assert out.logits.shape == (2, 6, 5)
    assert_same(out.loss, torch.nn.functional.cross_entropy(out.logits.flatten(0, 1).float(), labels.flatten()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_at_padding_change_neither_loss_nor_gradients_of_a_token_classifier(side: str) -> None:
    model, ids = tiny_model(XLSTMForTokenClassification, num_labels=5), tokens(1, 6)
    labels, padding = torch.randint(0, 5, (1, 6)), (3, 0) if side == "left" else (0, 3)
    mask, padded = (torch.nn.functional.pad(x, padding) for x in (torch.ones_like(ids), ids))
    weights = list(model.parameters())

    def results(*given: Any, labels: Tensor) -> list[Tensor]:
        loss = model(*given, labels=labels).loss
        return [loss, *torch.autograd.grad(loss, weights)]

    wanted = results(ids, labels=labels)
    for fill in (0, 4):
        assert_same(results(padded, mask, labels=torch.nn.functional.pad(labels, padding, value=fill)), wanted)


def test_labels_of_tokens_may_be_a_slice() -> None:
    model, ids = tiny_model(XLSTMForTokenClassification, num_labels=5), tokens(2, 6)
    labels = torch.randint(0, 5, (2, 7))[:, 1:]
    assert_identical(model(ids, labels=labels).loss, model(ids, labels=labels.clone()).loss)


def test_shifted_labels_alone_have_a_loss() -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(2, 6)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert_same(model(ids, shift_labels=shifted).loss, model(ids, labels=ids).loss)


def test_tied_embeddings_are_one_tensor_before_and_after_saving(tmp_path: Any) -> None:
    model = tiny_model(XLSTMForCausalLM, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = XLSTMForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_identical(loaded.lm_head.weight, model.lm_head.weight)


@every_style
def test_memory_of_the_states_does_not_grow_with_tokens(style: str) -> None:
    model = tiny_model(XLSTMForCausalLM, style)
    sizes = {model(tokens(2, T)).past_key_values.size_in_bytes() for T in (1, 5, 40)}
    assert len(sizes) == 1
    assert sizes.pop() > 0


def test_the_embedding_of_an_end_token_that_also_pads_is_trained() -> None:
    """Many tokenizers pad with the end token; a padding index in the embedding would freeze it."""
    model, ids = tiny_model(XLSTMForCausalLM, pad_token_id=2, eos_token_id=2), tokens(1, 6)
    ids[0, 3] = 2
    _, gradients = loss_gradients(model, input_ids=ids, labels=ids)
    assert gradients["model.embed_tokens.weight"][2].any()


def broken(where: str) -> tuple[XLSTMForCausalLM, dict[str, Any]]:
    """A model in debug, and inputs, of which one thing is not finite."""
    model, ids = tiny_model(XLSTMForCausalLM, "neurips", debug=True), tokens(2, 5)
    inputs: dict[str, Any] = {"input_ids": ids}
    with torch.no_grad():
        if where == "parameter":
            model.model.layers[1].mixer.up_proj.weight[0, 0] = torch.nan
        elif where == "state":
            inputs["past_key_values"] = model(ids).past_key_values
            inputs["past_key_values"].layers[1].state.cell.C[1] = torch.inf
        else:
            x = model.model.embed_tokens(ids)
            x[1, 3, 0] = torch.inf
            inputs = {"inputs_embeds": x}
    return model, inputs


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "parameter",
            r"`layers.1` .*output \(rows \[0, 1\], from token 0 on\).*began: parameter `mixer.up_proj.weight`",
        ),
        ("state", r"`layers.1` .*state `C` \(rows \[1\]\).*began: state before the first token `C` \(rows \[1\]\)"),
        ("input", r"`layers.0` .*output \(rows \[1\], from token 3 on\).*began: input \(rows \[1\], from token 3 on\)"),
    ],
)
def test_debug_tells_where_values_stopped_being_finite(where: str, message: str) -> None:
    model, inputs = broken(where)
    with pytest.raises(FloatingPointError, match=message):
        model(**inputs)
    model.config.debug = False
    assert not model(**inputs).logits.isfinite().all()


def test_debug_blames_the_range_of_the_dtype_where_everything_before_was_finite() -> None:
    model = tiny_model(XLSTMForCausalLM, "large", "mlstm", debug=True).to(torch.float16)
    x = torch.full((1, 2, 16), 60000.0, dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[0].mixer.v_proj.weight.fill_(60000.0)
        with pytest.raises(FloatingPointError, match=r"input \(largest 6e\+04 in torch.float16\), earlier"):
            model(inputs_embeds=x)
