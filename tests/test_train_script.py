"""scripts/train.py at tiny size: what it leaves, what it says, and that no interruption and no layout changes it."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pytest
import runs
import torch
import train
import train_data
from checkout import ROOT
from inputs import tiny_model
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from tolerances import BFLOAT16, FLOAT32, assert_identical, assert_same
from transformers import AutoTokenizer, Trainer, TrainingArguments

from modeling_xlstm import XLSTMForCausalLM

# Transformers' name for it since 5.23, and before.
NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = next(name for name in NAMES if hasattr(TrainingArguments, name))
SCRIPT = str(ROOT / "scripts" / "train.py")
MODEL = {
    "model_type": "extended_lstm", "block_style": "neurips", "slstm_at": [1], "vocab_size": 320, "hidden_size": 16,
    "num_hidden_layers": 2, "num_heads": 2,
}  # fmt: skip
RECIPE = """
model: model.json
text: [first.txt, second.txt]
block_size: 32
per_device_train_batch_size: 4
per_device_eval_batch_size: 4
max_steps: 12
learning_rate: 1.0e-2
save_steps: 3
logging_steps: 3
use_cpu: true
token_cache: cache
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, in a folder with a recipe and what it names."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    return train


def write_recipe(folder: Path) -> None:
    text = Path(argparse.__file__).read_text("utf-8")
    (folder / "first.txt").write_text(text[:9_000], "utf-8")
    (folder / "second.txt").write_text(text[9_000:20_000], "utf-8")
    (folder / "model.json").write_text(json.dumps(MODEL), "utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, "utf-8")


def run(script: ModuleType, *words: str, report_to: tuple[str, ...] = ("--report_to", "none")) -> None:
    """One training in this process; TensorBoard's thread would write on in the folder of the next test."""
    script.train(*script.parse(["recipe.yaml", "--output_dir", "run", *report_to, *words]))


def logged(folder: Path, name: str) -> float:
    """The last value of this name in the log of the training."""
    state = json.loads((folder / "trainer_state.json").read_text("utf-8"))
    return float([entry[name] for entry in state["log_history"] if name in entry][-1])


@pytest.mark.parametrize("carry", ["true", "false"])
def test_a_run_leaves_a_checkpoint_that_loads_and_the_bits_per_byte_of_the_held_out_text(
    carry: str, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(script, "--carry_state", carry, "--z_loss", "1e-4", report_to=())
    folder = tmp_path / "run"
    left = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "modeling_xlstm.py", "config.json", "tokenizer.json", "loss.png"} <= left
    model = XLSTMForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert model.config.use_cache
    assert model.config.eos_token_id == tokenizer.eos_token_id is not None
    held_out = train_data.read_files([Path("first.txt"), Path("second.txt")]).held_out
    documents = train_data.encode(tokenizer, held_out, 320)
    _, arguments = script.parse(["recipe.yaml", "--output_dir", "run", "--carry_state", carry])
    tokens = train_data.tokenise(arguments, train_data.Dataset.from_dict({"text": held_out}), tokenizer, 320, "read")
    lanes = script.make_rows(arguments, tokens, 4, None, "read").edges
    # Each document by itself, cut where a lane ends; those are rows of 32 tokens if nothing is carried.
    ids, ends = torch.tensor(list(itertools.chain(*documents))), list(itertools.accumulate(map(len, documents)))
    nats = 0.0
    for start, stop in itertools.pairwise(sorted({0, *ends, *lanes})):
        targets = ids[start + 1 : stop + (stop not in ends)]
        with torch.no_grad():
            logits = model(ids[None, start:stop]).logits[0, : len(targets)]
        nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    size = sum(len(text.encode()) for text in held_out)
    assert_same(logged(folder, "eval_bits_per_byte"), nats / math.log(2) / size, FLOAT32)
    assert f"{logged(folder, 'eval_bits_per_byte'):.4f} bits per byte" in capsys.readouterr().out
    for name in ("grad_norm", "mfu", "peak_memory_mb", "gates/00_mlstm/forget_mean", "gates/01_slstm/input_max"):
        assert logged(folder, name) != 0
    assert list(folder.glob("runs/*/events.out.tfevents.*")), "TensorBoard is told where it is installed"


def test_the_last_batch_is_judged_where_training_drops_it(script: ModuleType) -> None:
    """Of the held-out rows, which are no multiple of 4, and which are fewer than 90."""
    judged = []
    for words in (["--dataloader_drop_last", "false"], ["--dataloader_drop_last"]):
        for rows in ("4", "90"):
            run(script, "--max_steps", "2", "--per_device_eval_batch_size", rows, *words)
            judged.append([logged(Path("run"), name) for name in ("eval_predicted_tokens", "eval_bits_per_byte")])
            shutil.rmtree("run")
    assert_same(torch.tensor(judged), torch.tensor(judged[:1] * 4), FLOAT32)


def test_a_model_that_is_judged_in_half_precision_is_saved_as_it_was_trained(script: ModuleType) -> None:
    run(script, "--max_steps", "2", "--bf16_full_eval")
    assert_identical(load_file("run/model.safetensors"), load_file("run/checkpoint-2/model.safetensors"))


def test_the_best_model_is_that_of_the_fewest_bits_per_byte(script: ModuleType) -> None:
    steps = ["--max_steps", "6", "--save_steps", "2", "--eval_steps", "2", "--eval_strategy", "steps"]
    run(script, *steps, "--load_best_model_at_end", "--metric_for_best_model", "eval_bits_per_byte")
    state = json.loads(Path("run/trainer_state.json").read_text("utf-8"))
    judged = [entry["eval_bits_per_byte"] for entry in state["log_history"] if "eval_bits_per_byte" in entry]
    assert len(set(judged)) == 3, "after 2, 4 and 6 steps, and the best again"
    assert state["best_metric"] == min(judged)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["bits_per_byte"], False),
        (["eval_nats_per_token"], False),
        (["eval_loss"], False),
        (["eval_nats", "--greater_is_better", "true"], True),
        (["eval_nats", "--greater-is-better=true"], True),
        (["eval_predicted_tokens"], True),
    ],
)
def test_less_is_better_of_nats_and_bits_unless_it_is_said_otherwise(
    words: list[str], wanted: bool, script: ModuleType
) -> None:
    settings, _ = script.parse(["recipe.yaml", "--output_dir", "x", "--metric_for_best_model", *words])
    assert settings.greater_is_better is wanted


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    places = {"PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*words, "recipe.yaml", "--output_dir", "run"],
        cwd=folder, env={**os.environ, **places}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(script: ModuleType, tmp_path: Path) -> None:
    run(script, "--carry_state")
    whole = tmp_path / "whole"
    (tmp_path / "run").rename(whole)
    (tmp_path / "recipe.yaml").write_text(RECIPE + "carry_state: true\n", "utf-8")
    process = start(tmp_path, sys.executable, SCRIPT)
    while not list(tmp_path.glob("run/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run(script, "--carry_state")
    assert_identical(load_file("run/model.safetensors"), load_file(whole / "model.safetensors"))
    for name in ("loss", "eval_nats", "num_input_tokens_seen"):
        assert logged(tmp_path / "run", name) == logged(whole, name)


@pytest.mark.parametrize("words", [["--carry_state"], ["--max_steps", "-1", "--num_train_epochs", "0.3"]], ids=str)
def test_a_run_stopped_while_it_is_judged_and_one_that_has_ended_are_trained_no_further(
    words: list[str], script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--lr_scheduler_type", "constant", "--max_steps", "4", *words]
    run(script, *words)
    Path("run").rename("whole")
    with monkeypatch.context() as stopped:
        stopped.setattr(Trainer, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(script, *words)
    for _ in range(2):
        run(script, *words)
        assert_identical(load_file("run/model.safetensors"), load_file("whole/model.safetensors"))
        assert last_step(Path("run")) == last_step(Path("whole"))
        for name in ("step", "loss", "eval_nats", "num_input_tokens_seen"):
            assert logged(Path("run"), name) == logged(Path("whole"), name)


def last_step(run: Path) -> int:
    """Of the checkpoints that a run left."""
    checkpoint = runs.last_checkpoint(run)
    assert checkpoint is not None
    return runs.step_of(checkpoint)


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_accumulation_and_checkpointing_change_no_weight_and_bfloat16_trains(
    script: ModuleType, tmp_path: Path
) -> None:
    """By plain gradient descent, as below."""
    recipe = RECIPE.replace("learning_rate: 1.0e-2", "learning_rate: 0.5\noptim: sgd").replace("12", "4")
    (tmp_path / "recipe.yaml").write_text(recipe, "utf-8")
    kinds = {
        "alone": [],
        "parts": ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"],
        "again": [f"--{CHECKPOINTING}"],
        "short": ["--bf16"],
    }
    for name, words in kinds.items():
        run(script, *words)
        (tmp_path / "run").rename(tmp_path / name)
    for name in ("parts", "again"):
        assert_same(load_file(f"{name}/model.safetensors"), load_file("alone/model.safetensors"), FLOAT32)
        assert_same(logged(tmp_path / name, "loss"), logged(tmp_path / "alone", "loss"), FLOAT32)
    assert_same(logged(tmp_path / "short", "loss"), logged(tmp_path / "alone", "loss"), BFLOAT16)


@pytest.mark.slow
def test_two_processes_train_to_the_weights_of_one(script: ModuleType, tmp_path: Path) -> None:
    """Over gloo, by plain gradient descent, for Adam blows up the rounding of gradients that are nearly zero."""
    recipe = RECIPE.replace("learning_rate: 1.0e-2", "learning_rate: 0.5\noptim: sgd")
    (tmp_path / "recipe.yaml").write_text(recipe, "utf-8")
    run(script)
    (tmp_path / "run").rename(tmp_path / "alone")
    halves = recipe.replace("train_batch_size: 4", "train_batch_size: 2")
    (tmp_path / "recipe.yaml").write_text(halves + "ddp_backend: gloo\n", "utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(tmp_path, *launch, SCRIPT)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    assert_same(load_file("run/model.safetensors"), load_file("alone/model.safetensors"), FLOAT32)
    for name in ("loss", "eval_nats"):
        assert_same(logged(tmp_path / "run", name), logged(tmp_path / "alone", name), FLOAT32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--demo"], "Choose one of --dataset, --text and --demo; got text and demo"),
        (["--model", "nothing.json"], "nothing.json does not exist"),
        (["--text", "a.jsonl", "b.parquet"], "files of one kind; got"),
        (["--text", "none.txt"], "`--text` must name files"),
        (["--text", "rows.jsonl", "--text_column", "body"], "a column `body` is needed; got"),
        (["--prediction_loss_only"], "`--prediction_loss_only` leaves out the nats"),
        (["--eval_do_concat_batches", "false"], "`--eval_do_concat_batches false` keeps apart the nats"),
        (["--save_only_model"], "`--save_only_model` leaves out what a killed training goes on from"),
        (["--block_size", "0"], "`--block_size` must be at least 1; got 0"),
        (["--carry_state", "--per_device_train_batch_size", "90000"], "Text: .*lanes"),
        (["--resume_from_checkpoint", "true"], "`--resume_from_checkpoint` must name a folder that a training wrote"),
        (["--output_dir", "first.txt"], "`--output_dir` must name a folder; first.txt is a file"),
        (["--foo", "3"], "`--foo` is no flag"),
        (["--learning_rat", "3"], "`--learning_rat` is no flag"),
        (["--text", "broken.jsonl"], "broken.jsonl cannot be read as json"),
        (["--text", "numbers.jsonl"], "The column of the text must hold text; got int"),
        (["--model", "broken.jsonl", "--tokenizer", "."], "`--tokenizer` must name a checkpoint's folder"),
        (["--model", "list.json"], "list.json must hold the fields of a configuration"),
        (["--model", "broken.json"], "broken.json must be JSON in UTF-8"),
        (["--model", "typo.json"], "typo.json describes no model: .*num_headz"),
        (["--model", "heads.json"], "heads.json describes no model: (?s:.*)must be a multiple of"),
        (["--model", "words.json"], "`vocab_size` of words.json must be a whole number of at least 1; got 'x'"),
        (["--per_device_train_batch_size", "0"], "`--per_device_train_batch_size` must be at least 1; got 0"),
        (["--per_device_eval_batch_size", "0"], "`--per_device_eval_batch_size` must be at least 1; got 0"),
        (["--learning_rate", "-1"], "`--learning_rate` must be at least 0; got -1.0"),
        (["--peak_flops", "-5"], "`--peak_flops` must be a finite number above 0; got -5.0"),
        (["--optim_args", "fast"], "`--optim_args` must be `name=value,name=value`; got fast"),
        (["--z_loss", "nan"], "cannot be followed: `z_loss` must be a finite number of at least 0; got nan"),
        (["--report_to", "nonsense"], "cannot be followed: nonsense is not supported"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    words: list[str], message: str, script: ModuleType, tmp_path: Path
) -> None:
    Path("rows.jsonl").write_text('{"text": "a b c"}\n{"text": "d e f"}\n', "utf-8")
    Path("numbers.jsonl").write_text('{"text": 1}\n{"text": 2}\n' * 40, "utf-8")
    Path("list.json").write_text("[1, 2]", "utf-8")
    Path("typo.json").write_text(json.dumps({**MODEL, "num_headz": 2}), "utf-8")
    Path("heads.json").write_text(json.dumps({**MODEL, "num_heads": 3}), "utf-8")
    Path("words.json").write_text(json.dumps({**MODEL, "vocab_size": "x"}), "utf-8")
    for name in ("broken.jsonl", "broken.json"):
        Path(name).write_text('{"text": "a b', "utf-8")
    with pytest.raises(script.WrongInput, match=message):
        run(script, *words)


def test_another_run_in_the_folder_is_refused_unless_it_is_asked_for(script: ModuleType) -> None:
    run(script, "--max_steps", "6")
    Path("other.json").write_text(json.dumps({**MODEL, "hidden_size": 32}), "utf-8")
    changes = {
        ("--learning_rate", "1e-4"): r"learning_rate: 0\.01, now 0\.0001",
        ("--max_steps", "3"): "max_steps: 6, now 3",
        ("--block_size", "16"): "block_size: 32, now 16",
        ("--text", "second.txt"): "another text",
        ("--model", "other.json"): "another model",
        ("--carry_state",): "carry_state: False, now True",
        ("--data_seed", "7"): "data_seed: None, now 7",
        ("--label_smoothing_factor", "0.3"): r"label_smoothing_factor: 0\.0, now 0\.3",
        ("--optim_args", "eps=1"): "optim_args: None, now eps=1",
    }
    for words, message in changes.items():
        with pytest.raises(
            script.WrongInput, match=rf"run holds another run \({message}\)\. Choose another folder, or"
        ):
            run(script, "--max_steps", "6", *words)
    run(script, "--max_steps", "9", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2")
    resumed = ["--resume_from_checkpoint", "run/checkpoint-9", "--learning_rate", "1e-4"]
    run(script, "--max_steps", "12", *resumed)
    assert json.loads(Path("run/trainer_state.json").read_text("utf-8"))["global_step"] == 12


@pytest.mark.parametrize("finished", [True, False])
def test_checkpoints_of_what_is_not_known_are_neither_deleted_nor_gone_on_from(
    finished: bool, script: ModuleType
) -> None:
    kept = Path("run/checkpoint-100/notes.txt")
    kept.parent.mkdir(parents=True)
    kept.touch()
    if finished:
        (kept.parent / "trainer_state.json").write_text("{}", "utf-8")
    with pytest.raises(script.WrongInput, match=r"run holds checkpoint-100 and no training_run\.json"):
        run(script)
    assert kept.exists()


def test_a_checkpoint_of_this_run_that_was_not_written_to_its_end_is_deleted_and_named(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    run(script, "--max_steps", "6")
    Path("run/checkpoint-9").mkdir()
    run(script, "--max_steps", "7")
    assert not Path("run/checkpoint-9").exists()
    out = capsys.readouterr().out
    assert "Deleted    run/checkpoint-9, which was not written to its end" in out
    assert "Resuming   at step 6" in out


def test_a_tokenizer_of_another_text_is_trained_anew(script: ModuleType) -> None:
    """A run that was refused for its text leaves one behind."""
    Path("tiny.txt").write_text("a b c d e", "utf-8")
    with pytest.raises(script.WrongInput, match="There is no document with text to be held out"):
        run(script, "--text", "tiny.txt")
    run(script)
    assert len(AutoTokenizer.from_pretrained("run/tokenizer")) == MODEL["vocab_size"]


def test_folders_that_only_sound_like_checkpoints_are_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best").mkdir()
    assert runs.last_checkpoint(tmp_path) is None


def test_a_recipe_that_is_missing_or_none_is_refused(script: ModuleType) -> None:
    with pytest.raises(script.WrongInput, match="There is no recipe"):
        script.parse(["none.yaml"])
    Path("list.yaml").write_text("[1, 2]", "utf-8")
    with pytest.raises(script.WrongInput, match="must hold `flag: value` lines; got list"):
        script.parse(["list.yaml"])


def test_the_help_names_the_recipe_and_shows_commands_as_they_are_typed(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        script.parse(["--help"])
    text = capsys.readouterr().out
    assert "[RECIPE.yaml] [--flag value ...]" in text
    assert "--tokenizer gpt2 \\\n        --dataset" in text
    assert "tokens of a row (default: 512)" in text


def test_memory_is_pinned_where_there_is_a_gpu_or_it_is_asked_for(script: ModuleType) -> None:
    """Torch warns where there is none."""
    words = ["recipe.yaml", "--output_dir", "x", "--use_cpu", "false"]
    assert script.parse(words)[0].dataloader_pin_memory is torch.cuda.is_available()
    assert script.parse([*words, "--dataloader_pin_memory", "true"])[0].dataloader_pin_memory


def test_what_a_recipe_leaves_empty_is_not_given(script: ModuleType) -> None:
    Path("empty.yaml").write_text("tokenizer: null\npeak_flops:\ntext: []\nblock_size: 7\n", "utf-8")
    _, arguments = script.parse(["empty.yaml", "--output_dir", "x"])
    assert (arguments.tokenizer, arguments.peak_flops, arguments.text, arguments.block_size) == (None, None, [], 7)


def test_flags_win_over_the_recipe(script: ModuleType) -> None:
    settings, arguments = script.parse(
        ["recipe.yaml", "--output_dir", "x", "--block_size", "7", "--learning_rate", "1"]
    )
    assert (arguments.block_size, settings.learning_rate, settings.max_steps) == (7, 1.0, 12)
    assert arguments.text == ["first.txt", "second.txt"]


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(script: ModuleType) -> None:
    texts = [Path("first.txt").read_text("utf-8")]
    tokenizer = script.load_or_train_tokenizer(Path("tokenizer"), texts, 320, "text")
    with pytest.raises(script.WrongInput, match="and the model knows 300"):
        train_data.encode(tokenizer, texts, 300)


def test_prompts_encoded_together_are_continued_as_each_alone(script: ModuleType) -> None:
    texts = [Path("first.txt").read_text("utf-8")]
    script.load_or_train_tokenizer(Path("tokenizer"), texts, 320, "text")
    tokenizer, model = AutoTokenizer.from_pretrained("tokenizer"), tiny_model(XLSTMForCausalLM, vocab_size=320)
    model.generation_config.eos_token_id = None
    prompts, ids = ["a", texts[0][:40]], []
    for given in (prompts, prompts[:1], prompts[1:]):
        encoded = tokenizer(given, return_tensors="pt", padding=True)
        new = model.generate(**encoded, max_new_tokens=8, do_sample=False)
        ids.append(new[:, encoded.input_ids.shape[1] :])
    assert_identical(ids[0], torch.cat(ids[1:]))


def test_columns_of_jsonl_and_parquet_are_read_and_some_documents_held_out(script: ModuleType) -> None:
    rows = train_data.Dataset.from_dict({"body": [f"document {i}" for i in range(70)] + [" "]})
    rows.to_json("rows.jsonl")
    rows.to_parquet("rows.parquet")
    texts: list[Any] = []
    for name in ("rows.jsonl", "rows.parquet"):
        _, arguments = script.parse(["recipe.yaml", "--output_dir", "x", "--text", name, "--text_column", "body"])
        texts.append([list(part["text"]) for part in train_data.open_source(arguments)[:2]])
    assert texts[0] == texts[1]
    train, held_out = texts[0]
    assert held_out == ["document 0", "document 32", "document 64"]
    assert sorted([*train, *held_out]) == sorted(rows["body"])


def words_of(count: int) -> list[str]:
    """Documents of a few words to two hundred, some of them empty."""
    return ["" if i % 10 == 7 else " ".join(f"word{i * j % 97}" for j in range(1 + i * 7 % 200)) for i in range(count)]


def test_text_is_tokenised_once_and_again_where_text_tokenizer_or_vocabulary_changed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = words_of(40)
    _, arguments = script.parse(["recipe.yaml", "--output_dir", "x"])
    tokenizers = [script.load_or_train_tokenizer(Path(f"of{n}"), texts[:n], 300 + n, str(n)) for n in (20, 40)]

    def tokens(texts: list[str], which: int, vocab_size: int = 400) -> Any:
        documents = train_data.Dataset.from_dict({"text": texts})
        return train_data.tokenise(arguments, documents, tokenizers[which], vocab_size, "read")

    first = tokens(texts, 0)
    assert not first.cached
    documents = train_data.encode(tokenizers[0], train_data.not_empty(texts), 400)
    ids = torch.tensor([*itertools.chain(*documents)], dtype=torch.int32)
    assert first.lengths.tolist() == [len(ids) for ids in documents]
    assert first.bytes == sum(map(len, texts))
    assert_identical(first.ids[torch.arange(len(first.ids))], ids)
    for changed in (tokens(texts[1:], 0), tokens(texts, 1), tokens(texts, 0, 401)):
        assert not changed.cached
    tokenizers[0](["a"], padding=True, truncation=True, max_length=4)  # a mark on the tokenizer
    monkeypatch.setattr(train_data, "encode", None)
    again = tokens(texts, 0)
    assert again.cached
    assert_identical(again.ids[torch.arange(99)], first.ids[torch.arange(99)])


def test_ids_in_many_chunks_are_read_at_any_places() -> None:
    parts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    chunks = pyarrow.chunked_array([pyarrow.array([part], pyarrow.list_(pyarrow.int32())) for part in parts])
    ids = train_data.MappedIds(chunks)
    places = torch.tensor([9, 0, 3, 3, 5, 2])
    assert len(ids) == 10
    assert ids[places].tolist() == [10, 1, 4, 4, 6, 3]


def test_a_stream_packs_every_document_in_turn_and_begins_anew_in_another_order(script: ModuleType) -> None:
    texts = words_of(12)
    tokenizer = script.load_or_train_tokenizer(Path("tokenizer"), texts, 320, "text")
    documents = train_data.Dataset.from_dict({"text": texts}).to_iterable_dataset()
    rows = list(itertools.islice(train_data.Stream(documents, tokenizer, 320, 32, 0), 200))
    ids, numbers = (torch.cat([row[name] for row in rows]) for name in ("input_ids", "seq_idx"))
    read = [ids[numbers == number].tolist() for number in numbers.unique()[:-1]]
    wanted = train_data.encode(tokenizer, train_data.not_empty(texts), 320)
    count = len(wanted)
    assert len(read) > 2 * count
    assert sorted(read[:count]) == sorted(read[count : 2 * count]) == sorted(wanted)
    assert read[:count] != read[count : 2 * count]
    with pytest.raises(script.WrongInput, match="and the model knows 300"):
        next(iter(train_data.Stream(documents, tokenizer, 300, 32, 0)))
    inside = numbers[:-1] == numbers[1:]
    assert_identical(torch.cat([row["shift_labels"] for row in rows])[:-1][inside], ids[1:][inside])
    assert (torch.cat([row["labels"] for row in rows])[:-1][~inside] == -100).all()


def test_documents_stand_between_end_tokens_whatever_the_tokenizer_puts_around_texts(script: ModuleType) -> None:
    texts = words_of(3)
    tokenizer = script.load_or_train_tokenizer(Path("tokenizer"), texts, 320, "text")
    wanted, end = train_data.encode(tokenizer, texts, 320), tokenizer.eos_token_id
    around = TemplateProcessing(single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", end)])
    tokenizer.backend_tokenizer.post_processor = around
    assert len(tokenizer(texts[0]).input_ids) == len(wanted[0])
    assert train_data.encode(tokenizer, texts, 320) == wanted


def test_a_stream_holds_out_its_first_hundred_documents_unless_told() -> None:
    documents = train_data.Dataset.from_dict({"text": words_of(120)}).to_iterable_dataset()
    source = train_data.split(train_data.DataArguments(streaming=True), {"train": documents}, "words")
    assert list(source.held_out["text"]) == words_of(100)
    assert [row["text"] for row in source.train] == words_of(120)[100:]
    assert "the first 100 documents" in source.about


@pytest.fixture
def stream(script: ModuleType, tmp_path: Path) -> Path:
    """A recipe that streams rows of a file."""
    texts = words_of(60)
    train_data.Dataset.from_dict({"text": texts}).to_json("rows.jsonl")
    script.load_or_train_tokenizer(Path("tokenizer"), texts, 320, "text")
    recipe = RECIPE.replace("text: [first.txt, second.txt]", "")
    more = "streaming: true\nheld_out_documents: 5\ntokenizer: tokenizer\n"
    (tmp_path / "recipe.yaml").write_text(recipe + more, "utf-8")
    return tmp_path


def test_a_stream_resumed_after_a_failure_ends_with_the_weights_of_an_undisturbed_one(
    script: ModuleType, stream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(script, "--text", "rows.jsonl", "--max_steps", "20")  # more than once through the documents
    (stream / "run").rename(stream / "whole")
    step = script.Run.training_step

    def fail(self: Any, *args: Any) -> Any:
        if self.state.global_step == 17:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(script.Run, "training_step", fail)
    with pytest.raises(KeyboardInterrupt):
        run(script, "--text", "rows.jsonl", "--max_steps", "20")
    monkeypatch.undo()
    monkeypatch.chdir(stream)
    run(script, "--text", "rows.jsonl", "--max_steps", "20")
    assert_identical(load_file("run/model.safetensors"), load_file("whole/model.safetensors"))
    assert logged(stream / "run", "eval_nats") == logged(stream / "whole", "eval_nats")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "rows.jsonl", "--max_steps", "-1"], "`--streaming` needs `--max_steps`"),
        (["--text", "rows.jsonl", "--dataloader_num_workers", "2"], "each would read every row"),
        (["--text", "rows.jsonl", "--carry_state"], "which `--streaming` has not"),
        (["--text", "rows.jsonl", "--text_column", "body"], "a column `body` is needed; got"),
        (["--text", "first.txt"], "`--streaming` applies to a data set"),
        (["--text", "rows.jsonl", "--held_out_documents", "60"], "The stream has no document with text beside"),
        (["--text", "rows.jsonl", "--held_out_documents", "0"], "must be at least 1; got 0"),
        (["--text", "rows.jsonl", "--model", "small.json"], "and the model knows 300"),
        (["--streaming", "false", "--dataset", "nowhere"], "`--dataset` must name a data set, or a folder"),
        (["--streaming", "false", "--text", "empty.jsonl"], "must leave some to train on; got 5 of 2"),
        (["--text", "empty.jsonl"], "no document with text to be held out"),
    ],
)
def test_streams_that_cannot_be_trained_on_are_refused_by_name(
    words: list[str], message: str, script: ModuleType, stream: Path
) -> None:
    Path("small.json").write_text(json.dumps({**MODEL, "vocab_size": 300}), "utf-8")
    Path("empty.jsonl").write_text('{"text": ""}\n{"text": " "}\n', "utf-8")
    with pytest.raises(script.WrongInput, match=message):
        run(script, *words)


def test_what_save_to_disk_wrote_and_folders_of_files_are_data_sets(script: ModuleType, stream: Path) -> None:
    whole = train_data.Dataset.from_dict({"text": [f"document {i}" for i in range(9)]})
    whole.save_to_disk("saved")
    Path("folder").mkdir()
    whole.to_parquet("folder/rows.parquet")
    for name, streaming in itertools.product(("saved", "folder"), ("true", "false")):
        options = ["--dataset", name, "--streaming", streaming]
        _, arguments = script.parse(["recipe.yaml", "--output_dir", "x", *options])
        train, held_out, _ = train_data.open_source(arguments)
        assert list(held_out["text"]) == [f"document {i}" for i in range(5)]
        assert [row["text"] for row in train] == [f"document {i}" for i in range(5, 9)]
