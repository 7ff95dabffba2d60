"""Carried states: a model trained on segments sees the documents whole, however lanes, steps and processes cut them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
import torch.distributed.checkpoint as dcp
from carried import LENGTHS, Z_LOSS, documents, joined_states, result, trainer
from hypothesis import given
from hypothesis import strategies as st
from inputs import STYLES, tiny_config, tiny_model, tokens
from processes import launch_two
from tolerances import FLOAT32, TRAINED, assert_identical, assert_same
from torch import Tensor
from transformers import Trainer, TrainingArguments, default_data_collator

from modeling_xlstm import XLSTMForCausalLM, XLSTMForSequenceClassification, XLSTMForTokenClassification
from modeling_xlstm.training_xlstm import Segments, XLSTMTrainer, decayed_parameters, next_labels


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    lanes=st.integers(1, 5),
    segment_tokens=st.integers(1, 9),
    seed=st.sampled_from([None, 0]),
)
def test_every_token_is_read_once_in_order_and_predicted_once_but_for_the_first_of_a_document(
    lengths: list[int], lanes: int, segment_tokens: int, seed: int | None
) -> None:
    lanes = min(lanes, sum(lengths))
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    segments = Segments(
        [s + torch.arange(n) for s, n in zip(starts, lengths, strict=True)], lanes, segment_tokens, seed
    )
    for epoch in range(2):
        segments.set_epoch(epoch)
        items = [segments[i] for i in range(len(segments))]
        lanes_read = [[items[i] for i in range(lane, len(items), lanes)] for lane in range(lanes)]
        read = [item["input_ids"][item["attention_mask"] == 1] for lane in lanes_read for item in lane]
        order = torch.cat(read).tolist()
        assert sorted(order) == list(range(sum(lengths)))
        predicted = torch.cat([item["shift_labels"] for item in items])
        assert sorted(predicted[predicted >= 0].tolist()) == sorted(set(order) - set(starts.tolist()))
        for item in items:
            here = item["shift_labels"] >= 0
            assert_identical(item["shift_labels"][here], item["input_ids"][here] + 1)
            first = item["input_ids"][0]
            if item["attention_mask"][0]:
                assert bool(item["fresh"]) >= bool((first == starts).any())


def nats_of_whole_documents(model: Any, segments: Segments) -> Tensor:
    """Loss of every place of the stream in float64; a document that a lane cuts counts as two, read one by one."""
    order = torch.repeat_interleave(segments.shifts, segments.ends.diff(prepend=torch.tensor([0])))
    stream = segments.ids[torch.arange(len(order)) + order].long()
    nats = torch.zeros(len(stream), dtype=torch.float64)
    for start, stop in itertools.pairwise(sorted({0, *segments.ends.tolist(), *segments.edges})):
        # What the last token before a cut predicts opens the next lane.
        targets = stream[start + 1 : stop + (stop not in segments.ends)]
        with torch.no_grad():
            logits = model(stream[None, start:stop]).logits[0, : len(targets)]
        nats[start : start + len(targets)] = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return nats


def described(kind: str, T: int = 8) -> list[dict[str, Tensor]]:
    """Four rows for a collator: plain, padded, or of two documents each."""
    columns: dict[str, dict[str, Tensor]] = {
        "plain": {},
        "left padding": {"attention_mask": (torch.arange(T) > 2).long()},
        "right padding": {"attention_mask": (torch.arange(T) < 5).long()},
        "seq_idx": {"seq_idx": torch.arange(T) // 4},
        "position_ids": {"position_ids": torch.arange(T) % 4},
    }
    return [{"input_ids": ids, "labels": ids, **columns[kind]} for ids in tokens(4, T)]


def trained_once(
    trainer_class: Any, model: Any, data: list[dict[str, Tensor]], folder: Path, batch: int = 4, **options: Any
) -> list[float]:
    """Loss and norm of the gradient of one step on four examples."""
    given: dict[str, Any] = {
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch, "max_steps": 1,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "learning_rate": 0.0,
    }  # fmt: skip
    run = trainer_class(model, TrainingArguments(str(folder), **given, **options), train_dataset=data)
    run.train()
    (entry,) = (entry for entry in run.state.log_history if "loss" in entry)
    return [entry["loss"], float(entry["grad_norm"])]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["plain", "left padding", "right padding", "seq_idx", "position_ids"])
def test_a_loss_is_that_of_the_predicted_tokens_however_rows_are_described_and_accumulated(
    kind: str, smoothing: float, tmp_path: Path
) -> None:
    model, data = tiny_model(XLSTMForCausalLM), described(kind)
    batch = default_data_collator(data)
    targets = next_labels(batch)
    logits = model(**{name: x for name, x in batch.items() if name != "labels"}).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing)
    norm = torch.stack([g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()))]).sum().sqrt()
    for size in (4, 1):
        actual = trained_once(XLSTMTrainer, model, data, tmp_path, size, label_smoothing_factor=smoothing)
        assert_same(torch.tensor(actual), torch.stack([loss, norm]).float(), FLOAT32)


@pytest.mark.parametrize("trainer_class", [Trainer, XLSTMTrainer])
def test_smoothed_labels_are_those_of_the_next_tokens(trainer_class: Any, tmp_path: Path) -> None:
    model, data = tiny_model(XLSTMForCausalLM), described("plain")
    ids = torch.stack([row["input_ids"] for row in data])
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    actual = trained_once(trainer_class, model, data, tmp_path, label_smoothing_factor=0.1)[0]
    assert_same(torch.tensor(actual), loss.detach().float(), FLOAT32)


@pytest.mark.parametrize("trainer_class", [Trainer, XLSTMTrainer])
@pytest.mark.parametrize("model_class", [XLSTMForSequenceClassification, XLSTMForTokenClassification])
def test_classifiers_train_the_same_however_rows_are_accumulated(
    model_class: Any, trainer_class: Any, tmp_path: Path
) -> None:
    model, data = tiny_model(model_class), described("plain")
    for i, row in enumerate(data):
        by_token = (row["input_ids"] % 2).index_fill(0, torch.arange(i), -100)  # as many labels as no other row has
        row["labels"] = by_token if model_class is XLSTMForTokenClassification else by_token[-1]
    whole, parts = (trained_once(trainer_class, model, data, tmp_path, size) for size in (4, 1))
    assert_same(torch.tensor(parts), torch.tensor(whole), FLOAT32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_at_padding_count_in_no_loss_of_a_token_classifiers_trainer(smoothing: float, tmp_path: Path) -> None:
    model, data = tiny_model(XLSTMForTokenClassification), described("right padding")
    for row in data:
        row["labels"] = row["input_ids"] % 2
    ignored = [{**row, "labels": row["labels"].masked_fill(row["attention_mask"] == 0, -100)} for row in data]
    options = {"label_smoothing_factor": smoothing}
    actual, expected = (trained_once(XLSTMTrainer, model, rows, tmp_path, 2, **options) for rows in (data, ignored))
    assert_same(torch.tensor(actual), torch.tensor(expected), FLOAT32)


@pytest.mark.parametrize("model_class", [XLSTMForCausalLM, XLSTMForSequenceClassification, XLSTMForTokenClassification])
def test_trainer_leaves_every_model_with_a_head_its_columns(model_class: Any, tmp_path: Path) -> None:
    model = tiny_model(model_class, input_size=3, vocab_size=61)
    run = Trainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    run._set_signature_columns_if_needed()
    wanted = {"input_ids", "input_features", "attention_mask", "labels", "seq_idx", "cu_seq_lens_q", "position_ids"}
    assert wanted <= set(run._signature_columns)


@pytest.mark.parametrize("lengths", [LENGTHS, [18, 9, 27, 18, 36, 36]])  # the latter begin where segments do
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_segments_with_carried_states_have_the_losses_of_whole_documents_in_every_epoch(
    tmp_path: Path, micro_batches: int, lengths: list[int]
) -> None:
    segments, T = Segments(documents(lengths), 4, 9, seed=0), 9
    steps = len(segments) // 4
    run = trainer(
        tmp_path,
        segments,
        learning_rate=0.0,
        max_steps=2 * steps,
        per_device_train_batch_size=4 // micro_batches,
        gradient_accumulation_steps=micro_batches,
    )
    run.train()
    expected = []
    for epoch, step in itertools.product(range(2), range(steps)):
        segments.set_epoch(epoch)
        nats = nats_of_whole_documents(run.model.eval(), segments)
        lanes = [nats[start:stop][T * step :][:T] for start, stop in itertools.pairwise(segments.edges)]
        predicted = [segments[4 * step + lane]["shift_labels"] >= 0 for lane in range(4)]
        expected.append(torch.cat(lanes).sum() / torch.cat(predicted).sum())
    assert_same(run.losses, expected)


def test_four_micro_batches_of_one_lane_train_as_one_batch_of_four(tmp_path: Path) -> None:
    results = []
    for batch, accumulation in ((1, 4), (4, 1)):
        run = trainer(
            tmp_path / str(batch),
            Segments(documents(LENGTHS), 4, 9, seed=0),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=12,  # more than an epoch
        )
        run.train()
        results.append(result(run))
    assert_same(*results, TRAINED)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Over gloo: every process carries the states of its own lanes."""
    launch_two("carried.py", tmp_path)
    first, second = (torch.load(tmp_path / f"result-{rank}.pt") for rank in range(2))
    assert_identical(first["weights"], second["weights"])
    # Lanes 0 and 2 are the first process's, 1 and 3 the second's; each keeps its own part of the loss.
    states = [
        [torch.stack([a, b], 1).flatten(0, 1) for a, b in zip(*pair, strict=True)]
        for pair in zip(first["states"], second["states"], strict=True)
    ]
    losses = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    alone = trainer(tmp_path, Segments(documents(LENGTHS), 4, 9, 0), Z_LOSS, per_device_train_batch_size=4, max_steps=4)
    alone.train()
    assert_same({**first, "losses": losses, "states": states}, result(alone), TRAINED)


@pytest.mark.parametrize(
    ("length", "stop"),
    [
        *(({"max_steps": 19}, stop) for stop in (4, 8, 16, 19)),
        *(({"max_steps": -1, "num_train_epochs": epochs}, stop) for epochs, stop in ((1.5, 12), (2, 16))),
    ],
    ids=str,
)
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path, length: dict[str, Any], stop: int) -> None:
    """In the middle of an epoch, where one ends after eight steps, two epochs later, and at the end of a run."""
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": stop, **length}
    data = (documents(LENGTHS), 4, 9, 3)
    whole = trainer(tmp_path, Segments(*data), **options)
    assert len(whole.train_dataset) == 8 * 4
    whole.train()
    again = trainer(tmp_path / "again", Segments(*data), **options)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    again.losses[:stop] = whole.losses[:stop]
    assert_identical(result(again), result(whole))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process needs no process group
def test_sharded_over_two_processes_trains_as_one_and_its_checkpoint_loads_in_one(tmp_path: Path) -> None:
    """FSDP2, block by block, with carried states."""
    launch_two("sharded.py", tmp_path)
    alone, ids = sharded.setting()
    sharded.train(alone, ids)
    loaded = {name: torch.empty_like(x) for name, x in alone.state_dict().items()}
    dcp.load(loaded, checkpoint_id=str(tmp_path), no_dist=True)
    assert_same(loaded, alone.state_dict())


def test_evaluation_carries_states_of_its_own(tmp_path: Path) -> None:
    """In the middle of a training, it gives the loss of whole documents and leaves the lanes' states alone."""
    segments = Segments(documents([36] * 4), 4, 9, seed=None)
    run = trainer(tmp_path, segments, max_steps=2, gradient_accumulation_steps=2, per_device_eval_batch_size=4)
    run.train()
    before = joined_states(run)
    first, second = run.evaluate()["eval_loss"], run.evaluate()["eval_loss"]
    whole = segments.ids.view(4, 36).long()
    with torch.no_grad():
        logits = run.model(whole).logits
    # Trainer weighs the batches alike, though a document's last token predicts nothing.
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), whole[:, 1:].flatten(), reduction="none")
    by_segment = [part.mean() for part in nats.view(4, 35).split(9, 1)]
    assert_same(first, torch.stack(by_segment).mean().item())
    assert first == second
    assert_identical(joined_states(run), before)


def test_named_data_sets_and_predictions_are_judged_from_carried_states_too(tmp_path: Path) -> None:
    segments = Segments(documents([36] * 4), 4, 9, seed=None)
    run = trainer(tmp_path, segments, per_device_eval_batch_size=4)
    loss = run.evaluate()["eval_loss"]
    run.eval_dataset = {"first": segments, "second": segments}
    judged = run.evaluate()
    predicted = run.predict(segments).metrics
    assert [judged["eval_first_loss"], judged["eval_second_loss"], predicted["test_loss"]] == [loss] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 3}, r"must be `Segments` of 3 lanes.* got Segments of 4 lanes"),
        ({"ignore_data_skip": True}, "`ignore_data_skip` cannot be combined with carried states"),
        ({"accelerator_config": {"split_batches": True}}, r"`accelerator_config\.split_batches` cannot be combined"),
        ({"accelerator_config": {"dispatch_batches": True}}, r"`accelerator_config\.dispatch_batches` cannot"),
    ],
)
def test_what_would_take_a_segment_to_another_lane_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    run = trainer(tmp_path, Segments(documents(LENGTHS), 4, 9, None), **{"per_device_train_batch_size": 4, **options})
    with pytest.raises(ValueError, match=message):
        run.train()


def test_a_checkpoint_without_the_states_of_these_lanes_is_not_resumed(tmp_path: Path) -> None:
    segments = Segments(documents(LENGTHS), 4, 9, None)
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, segments, gradient_accumulation_steps=2, **options).train()
    checkpoint = tmp_path / "checkpoint-2"
    other = trainer(tmp_path, segments, per_device_train_batch_size=4, **options)
    with pytest.raises(ValueError, match=r"states_00000\.safetensors must hold 4 lanes, the batch size; got 2"):
        other.train(resume_from_checkpoint=str(checkpoint))
    less = trainer(tmp_path, Segments(documents(LENGTHS), 2, 9, None), **options)
    with pytest.raises(ValueError, match=r"must hold the states of 2 lanes; there is states_00002\.safetensors too"):
        less.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "states_00002.safetensors").unlink()
    same = trainer(tmp_path, segments, gradient_accumulation_steps=2, **options)
    with pytest.raises(ValueError, match="must hold the states of lane 2 and those after it"):
        same.train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_takes_the_place_of_one_with_more_lanes(tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    for lanes in (4, 2):
        run = trainer(
            tmp_path, Segments(documents(LENGTHS), lanes, 9, 0), gradient_accumulation_steps=lanes // 2, **options
        )
        run.train()
    again = trainer(tmp_path, Segments(documents(LENGTHS), 2, 9, 0), **{**options, "max_steps": 3})
    assert again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).global_step == 3


@pytest.mark.parametrize(
    ("lengths", "lanes", "message"),
    [([], 1, "at least one document"), ([3, 0], 1, "of them 1 empty"), ([3], 4, "a token for each lane; got 4")],
)
def test_documents_that_fill_no_lane_are_refused(lengths: list[int], lanes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segments(documents(lengths), lanes, 4, None)


@pytest.mark.parametrize("document", [5, "abc", ["a", "b"], [1.5, 2.0], torch.ones(1, 3, dtype=torch.long), [[1], [2]]])
def test_a_document_that_is_no_row_of_integers_is_refused_by_number(document: Any) -> None:
    with pytest.raises(ValueError, match=r"must hold token ids, integers \[T\]; number 1 is a"):
        Segments([[3, 4], document], 1, 2, None)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_acts_on_the_parameters_of_the_published_recipe(style: str, tied: bool) -> None:
    model = XLSTMForCausalLM(tiny_config(style, use_bias=True, tie_word_embeddings=tied))
    decayed = set(decayed_parameters(model))
    spared = {name for name, _ in model.named_parameters()} - decayed
    marks = ("norm", "bias", "embed_tokens", "skip", "recurrent")
    assert [name for name in spared if not any(mark in name for mark in marks)] == []
    assert [name for name in decayed if any(mark in name for mark in marks)] == []
    assert ("lm_head.weight" in decayed) != tied
    assert any("igate.weight" in name for name in decayed)


def test_the_optimizer_holds_every_parameter_once_and_decays_those(tmp_path: Path) -> None:
    run = trainer(tmp_path, Segments(documents(LENGTHS), 4, 9, None), weight_decay=0.1)
    decay, spare = run.create_optimizer().param_groups
    names = {id(x): name for name, x in run.model.named_parameters()}
    assert (decay["weight_decay"], spare["weight_decay"]) == (0.1, 0.0)
    assert [names[id(x)] for x in decay["params"]] == decayed_parameters(run.model)
    assert sorted(names[id(x)] for x in (*decay["params"], *spare["params"])) == sorted(names.values())


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_z_loss_is_the_mean_squared_log_normaliser_under_accumulation_too(
    tmp_path: Path, micro_batches: int
) -> None:
    segments = Segments(documents(LENGTHS), 4, 9, 0)
    layout = {"per_device_train_batch_size": 4 // micro_batches, "gradient_accumulation_steps": micro_batches}
    plain, with_z = (trainer(tmp_path, segments, max_steps=1, z_loss=z, **layout) for z in (0.0, 0.5))
    items = [segments[lane] for lane in range(4)]
    ids, targets = (torch.stack([item[name] for item in items]) for name in ("input_ids", "shift_labels"))
    with torch.no_grad():
        logits = plain.model(ids, seq_idx=torch.stack([item["seq_idx"] for item in items])).logits
    squares = logits.logsumexp(-1).square()[targets >= 0]
    plain.train()
    with_z.train()
    assert_same(with_z.losses[0] - plain.losses[0], 0.5 * squares.mean())


def test_the_z_loss_counts_the_tokens_that_the_loss_counts_in_packed_and_padded_rows(tmp_path: Path) -> None:
    ids, document = tokens(2, 12), torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] * 3])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 9:], mask[1, :2] = 0, 0
    inputs = {"input_ids": ids, "labels": ids, "seq_idx": document, "attention_mask": mask}
    predicted = next_labels(inputs) != -100
    # Of 9 and 10 real tokens two documents' last ones predict nothing.
    assert predicted.sum(1).tolist() == [7, 8]
    plain, with_z = (trainer(tmp_path, Segments(documents(LENGTHS), 4, 9, None), z_loss=z) for z in (0.0, 0.5))
    model = with_z.model.train()
    logits = model(**inputs).logits
    loss, full = (run.compute_loss(model, dict(inputs)) for run in (plain, with_z))
    targets = next_labels(inputs)[predicted]
    assert_same(loss, torch.nn.functional.cross_entropy(logits[predicted], targets))
    assert_same(full - loss, 0.5 * logits.logsumexp(-1)[predicted].square().mean())


def test_the_z_loss_is_added_to_the_loss_of_a_function_too(tmp_path: Path) -> None:
    ids = tokens(2, 8)

    def halved(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return 0.5 * torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model = tiny_model(XLSTMForCausalLM).train()
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    run = XLSTMTrainer(model, arguments, z_loss=0.5, compute_loss_func=halved)
    outputs = model(ids, labels=ids)
    squares = outputs.logits[:, :-1].logsumexp(-1).square()
    loss = run.compute_loss(model, {"input_ids": ids, "labels": ids})
    assert_same(loss, 0.5 * outputs.loss + 0.5 * squares.mean())


@pytest.mark.parametrize(
    ("model_class", "z_loss", "message"),
    [
        (XLSTMForTokenClassification, 1e-4, "needs a language model.* got 0.0001 for XLSTMForTokenClassification"),
        (XLSTMForSequenceClassification, 1e-4, "needs a language model"),
        (XLSTMForCausalLM, -1.0, "must be a finite number of at least 0; got -1.0"),
        (XLSTMForCausalLM, float("nan"), "must be a finite number of at least 0; got nan"),
    ],
)
def test_a_z_loss_that_cannot_be_meant_is_refused(
    model_class: Any, z_loss: float, message: str, tmp_path: Path
) -> None:
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=f"`z_loss` {message}"):
        XLSTMTrainer(tiny_model(model_class), arguments, z_loss=z_loss)


def test_columns_that_describe_packing_reach_the_model(tmp_path: Path) -> None:
    """Trainer drops columns that forward does not name: documents would then see each other."""
    ids, document = tokens(1, 12), torch.tensor([0] * 5 + [1] * 7)
    labels = ids.masked_fill(torch.arange(12) == 5, -100)  # as collators do it: Trainer counts the others
    rows = [{"input_ids": ids[0], "labels": labels[0], "seq_idx": document}]
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=1)
    model = tiny_model(XLSTMForCausalLM)
    run = XLSTMTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    assert_same(run.evaluate()["eval_loss"], model(ids, labels=ids, seq_idx=document[None]).loss.item(), FLOAT32)


def test_a_plain_trainer_keeps_the_columns_that_describe_packing(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    plain = Trainer(tiny_model(XLSTMForCausalLM), args=arguments)
    plain._set_signature_columns_if_needed()
    assert {"seq_idx", "cu_seq_lens_q", "position_ids"} <= set(plain._signature_columns or ())


def test_a_plain_trainer_judges_batches_that_hold_labels_only(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(2, 6)]
    assert "eval_loss" in Trainer(tiny_model(XLSTMForCausalLM), args=arguments, eval_dataset=rows).evaluate()
