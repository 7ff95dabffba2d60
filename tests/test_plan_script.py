"""scripts/plan.py: its numbers and its refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import plan
import pytest
from checkout import ROOT

MODEL = str(ROOT / "configuration" / "model" / "xlstm_laptop.json")


def test_the_numbers_follow_from_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan.py", MODEL, "--batch", "2", "--block_size", "64", "--devices", "4", "--sharding", "zero2"]
    words += ["--device", "NVIDIA A100-SXM4-80GB", "--mfu", "0.5", "--total_tokens", "1e9", "--memory", "0.001"]
    monkeypatch.setattr(sys, "argv", [*words, "--json"])
    plan.main()
    numbers = json.loads(capsys.readouterr().out)
    parts = numbers["memory"]
    together = sum(parts[name] for name in ("weights", "gathered", "optimizer", "activations"))
    assert abs(together - parts["peak"]) <= len(parts)
    assert numbers["tokens_per_step"] == 2 * 64 * 4
    assert not numbers["fits"]
    speed = 4 * 312e12 * 0.5 / numbers["flops_per_token"]["training"]
    assert (numbers["tokens_per_second"], numbers["seconds"]) == (speed, 1e9 / speed)
    monkeypatch.setattr(sys, "argv", words)
    plan.main()
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.json"], "nothing.json is neither"),
        ([str(ROOT / "README.md")], "README.md describes no xLSTM: "),
        ([MODEL, "--block_size", "8", "--device", "A10G", "--flops", "1e12"], "Give --device or --flops; got both"),
        ([MODEL, "--devices", "2"], "Several devices need a --sharding"),
        ([MODEL, "--block_size", "8", "--device", "A10G"], "No peak is known of `--device A10G`"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(plan.WrongInput, match=message):
        plan.estimate(plan.parse(words))


@pytest.mark.parametrize("name", ["model.json", "config.json"])
def test_a_model_of_another_type_is_not_planned_as_an_xlstm(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"model_type": "llama", "hidden_size": 64}), "utf-8")
    with pytest.raises(plan.WrongInput, match="must describe a model of type extended_lstm; got llama"):
        plan.open_config(tmp_path / name if name == "model.json" else tmp_path)


def test_the_help_shows_the_command_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        plan.parse(["--help"])
    assert "--precision mixed \\\n        --gradient_checkpointing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "describes no xLSTM: .*must be a multiple of"),
        ({"hidden_size": "x"}, "describes no xLSTM: .*expected int, got str"),
        ({"vocab_size": 0, "input_size": 3}, "must describe a language model; this one reads frames"),
    ],
)
def test_a_configuration_that_makes_no_language_model_is_not_planned(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "model.json"
    file.write_text(json.dumps({"vocab_size": 61, "hidden_size": 32, "num_heads": 2, **fields}), "utf-8")
    with pytest.raises(plan.WrongInput, match=f"(?s){message}"):
        plan.open_config(file)


def test_a_model_for_the_kernels_is_planned_without_a_gpu(tmp_path: Path) -> None:
    fields = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "slstm_at": [1]}
    numbers = []
    for backend in ("torch", "triton"):
        (tmp_path / "model.json").write_text(json.dumps({**fields, "kernel_backend": backend}), "utf-8")
        numbers.append(plan.estimate(plan.parse([str(tmp_path / "model.json"), "--block_size", "16"])))
    assert numbers[0] == numbers[1]


def test_a_checkpoint_is_planned_like_its_configuration(tmp_path: Path) -> None:
    plan.open_config(Path(MODEL)).save_pretrained(tmp_path)
    numbers = [plan.estimate(plan.parse([str(path), "--block_size", "32"])) for path in (MODEL, tmp_path)]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mfu", "40"], "argument --mfu: must be a number from 1e-06 to 1; got 40"),
        (["--flops", "nan"], "argument --flops: must be a number of at least 1; got nan"),
        (["--batch", "2.5"], "argument --batch: must be a whole number of at least 1; got 2.5"),
    ],
)
def test_numbers_out_of_bounds_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan.parse([MODEL, *words])
    assert message in capsys.readouterr().err
