"""The main job, at tiny size: what it leaves, what it says, and what becomes of it when it is interrupted."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkout import ROOT
from huggingface_hub import ModelCard
from processes import without_torchao
from safetensors.torch import load_file, save_file
from tolerances import FLOAT32, assert_identical, assert_same
from transformers import AutoTokenizer, Trainer

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM

OPTIONS = ["--steps", "20", "--hidden_size", "16", "--vocab_size", "384", "--max_new_tokens", "12"]
PROMPT = "def add_argument(self"


def quickstart(folder: Path, *options: str, first: Path = ROOT) -> subprocess.Popen[str]:
    """Start the script on `folder`/text.txt; `first` is the folder where Python looks for packages first."""
    command = [sys.executable, str(ROOT / "scripts" / "quickstart.py"), "--text", "text.txt", "--out", "run"]
    return subprocess.Popen(
        [*command, *OPTIONS, "--prompt", PROMPT, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(first), "TORCHDYNAMO_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a process that must succeed wrote to stdout and stderr."""
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return out, without_torchao(err)


def write_text(folder: Path) -> str:
    text = Path(argparse.__file__).read_text("utf-8")[:40_000].encode("ascii", "replace").decode()
    (folder / "text.txt").write_text(text, "utf-8")
    return text


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that nothing disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    write_text(folder)
    return folder / "run", said(quickstart(folder))[0]


@pytest.fixture
def script() -> ModuleType:
    import quickstart

    return quickstart


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8")))


def logged(run: Path, name: str) -> float:
    """The last value of this name in the log of the training."""
    return float([entry[name] for entry in read(run / "trainer_state.json")["log_history"] if name in entry][-1])


@pytest.mark.slow
def test_a_finished_run_leaves_weights_code_tokenizer_and_card(finished: tuple[Path, str]) -> None:
    run, _ = finished
    left = {path.name for path in run.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= left
    assert {"modeling_xlstm.py", "configuration_xlstm.py", "trainer_state.json"} <= left
    assert "checkpoints" not in left


@pytest.mark.slow
def test_the_checkpoint_generates_with_its_cache_and_knows_its_special_tokens(finished: tuple[Path, str]) -> None:
    run, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(run, trust_remote_code=True)
    config, generation = read(run / "config.json"), read(run / "generation_config.json")
    assert config["use_cache"] is True
    assert {"mlstm", "slstm"} == set(config["block_types"])
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert config[name] == generation[name] == getattr(tokenizer, name) is not None
    text = "naïve 漢字 \x00\n\t  x"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.slow
def test_the_card_states_the_numbers_of_the_run(finished: tuple[Path, str]) -> None:
    run, printed = finished
    card, state = (run / "README.md").read_text("utf-8"), read(run / "trainer_state.json")
    weights, size = load_file(run / "model.safetensors"), (run.parent / "text.txt").stat().st_size
    for fact in (
        f"| Parameters | {sum(x.numel() for x in weights.values()):,} |",
        f"Training text: {size - size // 10:,} bytes. Held-out text: {size // 10:,} bytes",
        f"20 steps, {state['num_input_tokens_seen']:,} tokens, {logged(run, 'train_runtime'):.0f} s on",
        f"| Loss, nats per token | {logged(run, 'eval_loss'):.4f} |",
        f"| Bits per byte | {logged(run, 'eval_bits_per_byte'):.4f} |",
        f"Last training loss: {logged(run, 'loss'):.4f} nats per token.",
        f"python scripts/quickstart.py --text text.txt --out run {' '.join(OPTIONS)} --prompt '{PROMPT}'\n",
    ):
        assert fact in card
    assert f"{logged(run, 'eval_bits_per_byte'):.3f} bits per byte" in printed
    assert "$" not in card


@pytest.mark.slow
def test_the_loss_and_the_bits_per_byte_are_those_of_the_held_out_text(finished: tuple[Path, str]) -> None:
    run, _ = finished
    text = (run.parent / "text.txt").read_text("utf-8")
    tokenizer = AutoTokenizer.from_pretrained(run, trust_remote_code=True)
    ids = torch.tensor(
        [tokenizer.eos_token_id, *tokenizer(text[-(len(text) // 10) :]).input_ids, tokenizer.eos_token_id]
    )
    blocks = [ids[start : start + 256] for start in range(0, len(ids) - 255, 255)]
    model = XLSTMForCausalLM.from_pretrained(run).eval()
    with torch.no_grad():
        nats = [torch.nn.functional.cross_entropy(model(block[None]).logits[0, :-1], block[1:]) for block in blocks]
    loss = torch.stack(nats).mean().item()
    spelt = "".join(tokenizer.decode(block[1:], skip_special_tokens=True) for block in blocks)
    bits = loss * 255 * len(blocks) / math.log(2) / len(spelt.encode())
    assert_same([logged(run, "eval_loss"), logged(run, "eval_bits_per_byte")], [loss, bits], FLOAT32)


@pytest.mark.slow
def test_the_completion_needs_the_checkpoint_and_not_the_package(finished: tuple[Path, str], tmp_path: Path) -> None:
    run, printed = finished
    poison = tmp_path / "modeling_xlstm"
    poison.mkdir()
    (poison / "__init__.py").write_text("raise RuntimeError('the package was imported')", "utf-8")
    weights = load_file(run / "model.safetensors")
    out, err = said(quickstart(run.parent, first=tmp_path))
    assert "already" in out
    assert err == ""
    completion = out[out.index("In a fresh process") :]
    assert PROMPT in completion
    assert "12 tokens, " in completion
    # The same seed, checkpoint and prompt: also the completion of the first run was made this way.
    assert completion.split("tokens/s")[0].rsplit("\n", 1)[0] in printed
    state_bytes = read(run / "run.json")["card"]["state_bytes"]
    assert f"The state takes {state_bytes:,} bytes" in completion
    assert_identical(load_file(run / "model.safetensors"), weights)


@pytest.fixture
def heeding_interrupts() -> Iterator[None]:
    """Interrupts interrupt: what a shell without job control starts in the background ignores them, children too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stop_after_a_checkpoint(process: subprocess.Popen[str], checkpoints: Path, by: signal.Signals) -> int:
    """Send the signal as soon as a checkpoint is there that was not before; returns the exit status."""
    before = set(checkpoints.glob("checkpoint-*/trainer_state.json"))
    while not set(checkpoints.glob("checkpoint-*/trainer_state.json")) - before:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    while True:
        process.send_signal(by)
        try:
            process.communicate(timeout=2.0)
        except subprocess.TimeoutExpired:
            continue  # an interrupt that falls into a callback from C++ is dropped: press again
        return process.returncode


@pytest.mark.slow
@pytest.mark.usefixtures("heeding_interrupts")
def test_a_killed_and_an_interrupted_run_end_with_the_weights_of_an_undisturbed_one(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    undisturbed, _ = finished
    write_text(tmp_path)
    run = tmp_path / "run"
    assert stop_after_a_checkpoint(quickstart(tmp_path), run / "checkpoints", signal.SIGKILL) == -signal.SIGKILL
    # Pressed again while it leaves, it ends at once, without a status of its own.
    assert stop_after_a_checkpoint(quickstart(tmp_path), run / "checkpoints", signal.SIGINT) in (130, -signal.SIGINT)
    assert not (run / "README.md").exists()
    out, _ = said(quickstart(tmp_path))
    assert "Resuming" in out
    assert "after resuming at step" in (run / "README.md").read_text("utf-8")
    assert_identical(load_file(run / "model.safetensors"), load_file(undisturbed / "model.safetensors"))
    for name in ("eval_loss", "eval_bits_per_byte", "loss", "num_input_tokens_seen"):
        assert logged(run, name) == logged(undisturbed, name)


def test_a_run_stopped_while_it_is_judged_is_trained_no_further(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "complete_in_fresh_process", lambda arguments: None)
    words = ["quickstart.py", "--text", "text.txt", *OPTIONS, "--out"]
    monkeypatch.setattr(sys, "argv", [*words, "run"])
    with monkeypatch.context() as stopped:
        stopped.setattr(Trainer, "evaluate", interrupted)
        with pytest.raises(SystemExit, match="130"):
            script.main()
    script.main()
    monkeypatch.setattr(sys, "argv", [*words, "whole"])
    script.main()
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert "20 steps" in (run / "README.md").read_text("utf-8")
    assert_identical(load_file(run / "model.safetensors"), load_file(whole / "model.safetensors"))
    for name in ("eval_loss", "eval_bits_per_byte", "loss", "num_input_tokens_seen"):
        assert logged(run, name) == logged(whole, name)


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def run_main(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    """The message with which the script refuses these options."""
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *options])
    with pytest.raises(SystemExit) as refusal:
        script.main()
    return str(refusal.value)


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_options_or_other_text(
    finished: tuple[Path, str], script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = finished
    monkeypatch.chdir(run.parent)
    same = ["--text", "text.txt", "--out", "run", *OPTIONS]
    assert "steps: 20, now 21" in run_main(script, monkeypatch, *same, "--steps", "21")
    message = run_main(script, monkeypatch, *same, "--seed", "1")
    assert "seed: 0, now 1" in message
    assert "--restart" in message
    text = Path("text.txt").read_text("utf-8")
    Path("text.txt").write_text(text.replace("a", "b", 1), "utf-8")
    assert "text_sha256" in run_main(script, monkeypatch, *same)
    Path("text.txt").write_text(text, "utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"`--text` must name files; .*text\.txt does not exist"),
        (b"", r"`--text` must name files with text in them; .*text\.txt is empty"),
        (b" \n\n", r"text\.txt is empty"),
        (b"ab\xff\xfe", r"`--text` must name UTF-8 text; .*text\.txt has other bytes at position 2"),
        (b"import os\n" * 20, r"`--text` must fill a block of 256 tokens .* got \d+ tokens"),
    ],
    ids=["missing", "empty", "blank", "not UTF-8", "too short"],
)
def test_text_that_cannot_be_trained_on_is_refused_by_name(
    content: bytes | None, message: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    got = run_main(script, monkeypatch, "--text", str(path), "--out", str(tmp_path / "run"))
    assert re.search(message, got), got


def test_a_folder_with_other_things_in_it_is_left_alone(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_text(tmp_path)
    options = ["--text", str(tmp_path / "text.txt"), "--out", str(tmp_path)]
    assert "must be a new or empty folder" in run_main(script, monkeypatch, *options)
    assert "must be a new or empty folder" in run_main(script, monkeypatch, *options, "--restart")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_folder_in_which_nothing_was_trained_yet_takes_other_options(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--out", str(tmp_path / "run")])
    arguments = script.parse()
    script.open_run(arguments, script.Text(["a"], ["b"], ""), 1)
    longer = script.Text(["aa"], ["bb"], "")
    script.open_run(arguments, longer, 1)
    assert read(arguments.out / "run.json")["run"]["text_sha256"] == script.checksum(longer)
    checkpoint = arguments.out / "checkpoints" / "checkpoint-9"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}", "utf-8")
    with pytest.raises(script.WrongInput, match="another run"):
        script.open_run(arguments, script.Text(["a"], ["b"], ""), 1)


def test_a_folder_that_cannot_be_made_is_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_text(tmp_path)
    options = ["--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "text.txt" / "run")]
    assert "`--out` must name a folder that can be made" in run_main(script, monkeypatch, *options)


def test_stdout_takes_any_text_as_utf8_unless_it_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import flags

    for is_terminal, expected in ((False, "é\ufffd→".encode()), (True, b"\xe9??")):
        written = io.BytesIO()
        stdout = io.TextIOWrapper(written, encoding="cp1252")
        monkeypatch.setattr(stdout, "isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        monkeypatch.setattr(sys, "stdout", stdout)
        flags.take_any_text()
        print("é\ufffd→", end="", flush=True)
        assert written.getvalue() == expected


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    import corpus
    import generate

    (tmp_path / "text.txt").write_text("first\nsecond", "utf-8-sig")
    assert "".join(part[0] for part in corpus.read_files([tmp_path / "text.txt"])[:2]) == "first\nsecond"
    assert generate.read_prompts(tmp_path / "text.txt") == ["first", "second"]


def test_restart_deletes_the_run_of_other_options(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--out", str(tmp_path / "run"), "--steps", "7"])
    arguments, text = script.parse(), script.Text(["a"], ["b"], "")
    script.open_run(arguments, text, 1)
    (arguments.out / "README.md").touch()
    arguments.steps = 8
    with pytest.raises(script.WrongInput, match="steps: 7, now 8"):
        script.open_run(arguments, text, 1)
    arguments.restart = True
    script.open_run(arguments, text, 1)
    assert [path.name for path in arguments.out.iterdir()] == ["run.json"]
    assert read(arguments.out / "run.json")["run"]["steps"] == 8


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(script: ModuleType, tmp_path: Path) -> None:
    for step, state in ((9, "{}"), (10, '{"global_st'), (11, None)):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        if state is not None:
            (checkpoint / "trainer_state.json").write_text(state, "utf-8")
    assert script.last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert script.last_checkpoint(tmp_path / "nothing") is None


def test_the_standard_library_is_read_and_split_in_one_way_only(script: ModuleType) -> None:
    text = script.read_standard_library()
    assert text == script.read_standard_library()
    assert len(text.train) > len(text.held_out) > 0
    assert not set(text.train) & set(text.held_out)
    assert Path(argparse.__file__).read_text("utf-8") in (*text.train, *text.held_out)


@pytest.mark.parametrize("style", ["large", "neurips", "residual"])
def test_weight_decay_spares_norms_embeddings_and_all_biases(style: str, script: ModuleType) -> None:
    config = XLSTMConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=2, num_heads=2, block_style=style, slstm_at=[1]
    )
    model = XLSTMForCausalLM(config)
    decayed = set(script.decayed_matrices(model))
    spared = {name for name, _ in model.named_parameters()} - decayed
    assert not [name for name in decayed if "norm" in name or "bias" in name or "embed" in name or "skip" in name]
    assert "model.layers.1.mixer.bias" in spared
    assert not [name for name in spared if "proj.weight" in name or "gate.weight" in name or "recurrent" in name]


def test_a_card_is_not_written_with_a_fact_missing(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json, which does not exist"):
        script.write_card(tmp_path)


@pytest.mark.parametrize(
    ("file", "without"),
    [("run.json", "card"), ("run.json", "prompt"), ("run.json", "state_bytes"), ("trainer_state.json", "log_history")],
    ids=str,
)
def test_a_card_names_the_fact_that_the_files_lack(file: str, without: str, script: ModuleType, tmp_path: Path) -> None:
    card = {"name": "n", "license": "mit", "prompt": "p", "train_bytes": 1, "eval_bytes": 1, "state_bytes": 1}
    logs = {"loss": 1.0, "eval_loss": 1.0, "eval_bits_per_byte": 1.0, "train_runtime": 1.0}
    files: dict[str, Any] = {
        "config.json": {"block_types": ["mlstm"], "hidden_size": 8, "num_heads": 1, "vocab_size": 8},
        "trainer_state.json": {"log_history": [logs], "global_step": 1, "num_input_tokens_seen": 1},
        "run.json": {"card": card},
    }
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    (template := tmp_path / "template.md").write_text("$name: $parameters parameters", "utf-8")

    def write() -> Path:
        for name, content in files.items():
            (tmp_path / name).write_text(json.dumps(content), "utf-8")
        return Path(script.write_card(tmp_path, template))

    assert write().read_text("utf-8") == "n: 3 parameters"
    (files[file] if without in files[file] else card).pop(without)
    with pytest.raises(ValueError, match=f"A card needs `{without}`"):
        write()


def test_a_card_names_the_file_that_is_no_json(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", "utf-8")
    with pytest.raises(ValueError, match=r"A card needs .*config\.json, which is no JSON"):
        script.write_card(tmp_path)


@pytest.mark.parametrize("name", ["template.md", "converted_template.md"])
def test_the_example_of_a_card_asks_nobody_whether_to_trust_the_code(name: str) -> None:
    card = (ROOT / "model_cards" / name).read_text("utf-8")
    loads = re.findall(r"Auto\w+\.from_pretrained\((.*)\)", card)
    assert loads == ['"$path", trust_remote_code=True'] * 2


@pytest.mark.slow
def test_the_hub_finds_in_the_card_what_it_looks_for(finished: tuple[Path, str]) -> None:
    run, _ = finished
    data = ModelCard.load(run / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("other", "transformers", "text-generation")
    assert {"xlstm", "custom_code"} <= set(data.tags)
    measured = {result.metric_type: result.metric_value for result in data.eval_results}
    names = {"loss": "eval_loss", "bits_per_byte": "eval_bits_per_byte"}
    assert measured == {kind: round(logged(run, name), 4) for kind, name in names.items()}


def test_a_card_names_its_data_sets_and_languages_where_it_has_any(script: ModuleType) -> None:
    card = {"name": "n", "license": "mit", "eval_bytes": 7, "datasets": ["a/b"], "languages": ["de"]}
    text = sys.modules["write_card"].metadata(card, {"eval_loss": 1.0, "eval_bits_per_byte": 2.0})
    data = ModelCard(f"---\n{text}\n---\n").data
    assert (data.datasets, data.language, data.model_name) == (["a/b"], ["de"], "n")


@pytest.mark.slow
def test_a_template_that_asks_for_an_unknown_fact_is_refused(
    finished: tuple[Path, str], script: ModuleType, tmp_path: Path
) -> None:
    run, _ = finished
    card = (run / "README.md").read_text("utf-8")
    template = tmp_path / "template.md"
    template.write_text("$name has $parameters parameters and is $colour", "utf-8")
    with pytest.raises(ValueError, match=r"asks for `\$colour`"):
        script.write_card(run, template)
    assert (run / "README.md").read_text("utf-8") == card
