"""The benchmark scripts run, judge before they time, and report what they ran on."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from corpus import train_tokenizer
from inputs import tiny_model

from modeling_xlstm import XLSTMForCausalLM
from modeling_xlstm.quantization_xlstm import LIBRARIES


def benchmark(script: str, folder: Path, *options: str | Path, **flags: Any) -> dict[str, Any]:
    """What a script measured; flags by name."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, ROOT / "scripts" / script, *options, *words, "--json", folder / "out.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((folder / "out.json").read_text("utf-8"))
    return result


def test_continuous_batching_is_timed_against_padded_batches(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 61, "slots": 2, "requests": 3, "rounds": 1}
    result = benchmark("benchmark_serving.py", tmp_path, **sizes)
    assert sizes.items() <= result.items()
    assert result["new_tokens"] >= 3 * 4
    assert {"cpu", "threads", "versions"} <= result["about"].keys()
    assert result["ratio"] > 0


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("benchmark", ["--rounds", "0"], "argument --rounds: must be a whole number of at least 1; got 0"),
        ("benchmark", ["--json", "no/x.json"], "argument --json: must name a file in a folder that exists; got no"),
        ("benchmark", ["--json", "."], "argument --json: must name a file in a folder that exists; got ."),
        ("benchmark", ["--plots", "file"], "argument --plots: must name a folder; file is a file"),
        ("benchmark", ["--from_json", "file"], "`--from_json` must name a file that --json wrote; file is none"),
        ("benchmark", ["--from_json", "no"], "`--from_json` must name a file that --json wrote; [Errno 2]"),
        ("benchmark_serving", ["--slots", "0"], "argument --slots: must be a whole number of at least 1; got 0"),
        ("benchmark_assisted", ["no"], "argument model: must name a checkpoint's folder; no holds no config.json"),
        ("benchmark_quantised", ["large", "no"], "argument models: must name a checkpoint's folder; no holds no"),
    ],
)
def test_what_a_benchmark_cannot_be_given_is_named(
    script: str,
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("{}", "utf-8")
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main()
    assert message in f"{stopped.value.code}\n{capsys.readouterr().err}"


@pytest.mark.slow
def test_assisted_decoding_is_timed_with_every_kind_of_draft(tmp_path: Path) -> None:
    train_tokenizer([], 300).save_pretrained(tmp_path / "model")
    tiny_model(XLSTMForCausalLM, vocab_size=300).float().save_pretrained(tmp_path / "model")
    sizes = {"prompts": 1, "prompt_tokens": 8, "new_tokens": 6, "rounds": 1, "draft": tmp_path / "model"}
    result = benchmark("benchmark_assisted.py", tmp_path, tmp_path / "model", **sizes)
    assert result.keys() == {"greedy", "prompt lookup", "own first block", "draft model", "about"}
    assert (result["greedy"]["passes_per_token"], result["greedy"]["accepted"]) == (1.0, None)
    assert result["draft model"]["accepted"] == 1.0  # it drafts for itself


@pytest.mark.slow
def test_a_benchmark_of_tiny_models_leaves_json_tables_and_plots(tmp_path: Path) -> None:
    rows = ("train large 4x63", "decode large batch 1 bf16", "prefill others", "contexts")
    (tmp_path / "README.md").write_text("before\n<!-- benchmark -->\nold\n<!-- /benchmark -->\nafter\n", "utf-8")
    files = ("--plots", tmp_path / "plots", "--markdown", tmp_path / "README.md")
    result = benchmark("benchmark.py", tmp_path, "--tiny", "--only", *rows, *files, rounds=1, seconds=0, threads=1)
    decoding, training, others = result["rows"]  # a name in full is one row, though others contain it
    assert {"ours", "llama", "mamba2"} == others["tokens_per_second"].keys()
    assert {"ours", "transformers (inference)", "floor"} <= decoding["milliseconds"].keys()
    assert 0 < decoding["difference"] < 1
    assert [claim["what"] for claim in training["claims"]] == ["speed", "memory"]
    assert all(m["peak"] > m["fixed"] > 0 for m in training["memory"].values())
    models = result["contexts"]["models"]
    assert {"ours", "transformers (inference)", "llama", "mamba2"} == models.keys()
    assert models["llama"]["state_bytes"][1] > models["llama"]["state_bytes"][0]
    assert models["ours"]["state_bytes"][1] == models["ours"]["state_bytes"][0] > 0
    assert {"cpu", "cores", "flags", "threads", "versions", "commit", "command", "date"} <= result["about"].keys()
    plots = {"ratios.png", "throughput.png", "time_per_token.png", "state.png"}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == plots
    readme = (tmp_path / "README.md").read_text("utf-8")
    assert "| train large 4x63" in readme
    assert "old" not in readme
    assert readme.startswith("before\n")
    assert readme.endswith("\nafter\n")


def contest(results: dict[str, float]) -> Any:
    from benchmark_models import Contestant
    from benchmark_works import Work

    makers = {n: lambda x=x: Contestant(lambda _: torch.tensor([x]), 1) for n, x in results.items()}
    return Work(makers, faster=1.0, agreement=0.01)


@pytest.mark.parametrize("wrong", [1.5, float("nan")])
def test_a_contest_is_not_timed_when_one_computes_something_else(wrong: float) -> None:
    from benchmark import time_row

    row = time_row("x", contest({"ours": 1.0, "right": 1.0, "wrong": wrong}), 1, 0.0)
    assert "refused" in row
    assert "milliseconds" not in row


@pytest.mark.parametrize(("ours", "peer", "refused"), [(1.001, 1.004, False), (1.005, 1.001, True), (1.02, 1.03, True)])
def test_a_judge_asks_that_ours_is_near_and_not_twice_as_far_as_the_peer(
    ours: float, peer: float, refused: bool
) -> None:
    from benchmark import time_row

    judge = contest({"judge": 1.0}).makers["judge"]
    row = time_row("x", contest({"ours": ours, "peer": peer})._replace(judge=judge), 1, 0.0)
    assert ("refused" in row) == refused
    assert row["errors"]["peer"] > row["errors"]["ours"] or ours > peer


def test_contestants_that_agree_are_timed_and_compared_with_the_fastest() -> None:
    from benchmark import time_row

    row = time_row("x", contest({"ours": 1.0, "peer": 1.0, "other": 1.0}), 3, 0.0)
    assert row["rounds"] == 3
    assert row["fastest_peer"] == min(("peer", "other"), key=row["milliseconds"].get)
    assert row["claims"][0]["value"] == row["milliseconds"][row["fastest_peer"]] / row["milliseconds"]["ours"]


def test_a_row_that_this_machine_cannot_measure_is_left_out_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import benchmark
    import benchmark_works

    wide = contest({"ours": 1.0, "peer": 1.0})._replace(packs=torch.float32)
    works = {"absent": wide._replace(needs=("no_such_package",)), "half": wide._replace(packs=torch.bfloat16)}
    monkeypatch.setattr(benchmark_works, "is_packable", lambda dtype: dtype is torch.float32)
    monkeypatch.setattr(benchmark, "all_works", lambda size: works)
    words = ["--tiny", "--threads", "1", "--only", *works, "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    benchmark.main()
    why = {"absent": "no_such_package is not installed", "half": "oneDNN packs no bfloat16 on this CPU"}
    rows = json.loads((tmp_path / "out.json").read_text("utf-8"))["rows"]
    assert {row["work"]: row["left_out"] for row in rows} == why
    printed = capsys.readouterr().out
    assert all(f"- not timed: {row}, {reason}" in printed for row, reason in why.items())
    assert wide.obstacle() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="waits for a machine with Linux, which tells what is resident")
def test_memory_is_what_a_contestant_allocates_and_not_what_was_there() -> None:
    from benchmark import allocated
    from benchmark_models import Contestant
    from benchmark_works import Work

    there = torch.ones(2**26)  # 256 MiB; a peak set back counts them no more

    def make() -> Contestant:
        weights = torch.ones(2**24)
        return Contestant(lambda _: (weights + 1).sum() + there[0], 1)

    found = allocated("x", Work({"ours": make}, kind="other"), "ours")
    assert 60 < found["fixed"] / 2**20 < 68
    assert 124 < found["peak"] / 2**20 < 136


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_rows_that_pack_weights_say_which(name: str, dtype: torch.dtype) -> None:
    from benchmark_models import FULL
    from benchmark_works import all_works

    works = {row: work for row, work in all_works(FULL).items() if name in row}
    assert {row for row, work in works.items() if work.packs} == {row for row in works if row.endswith("ours packed")}
    assert {work.packs for work in works.values()} == {None, dtype}


def test_every_row_that_was_asked_for_has_its_target() -> None:
    from benchmark_models import FULL
    from benchmark_works import all_works

    asked = {
        "train neurips 4x512": (2.2, 0.35),
        "slstm layer 4x512 forward": (6.0, None),
        "slstm layer 4x4096 forward+backward": (8.0, None),
        "prefill neurips 512": (1.5, None),
        "prefill neurips 4096": (4.0, None),
        "decode neurips": (2.0, None),
        "mlstm op 2048": (2.0, None),
        "prefill large": (1.15, None),
        "decode large batch 1 fp32": (1.3, None),
        "decode large batch 1 bf16": (1.6, None),
        "decode large batch 8 bf16": (1.4, None),
        "train large 4x51": (1.1, 0.7),
    }
    works = all_works(FULL)
    for words, targets in asked.items():
        found = {(work.faster, work.memory) for name, work in works.items() if words in name}
        assert targets in found, words
    assert works["decode large after 8192 against 256"].kind == "itself"
    assert works["train large 8192 against 512"].memory is not None
    assert {work.kind for name, work in works.items() if "others" in name} == {"other"}


def test_tables_say_which_targets_were_missed() -> None:
    from benchmark_report import verdict

    assert verdict({"value": 2.0, "at_least": 1.5}) == "2.00 (≥ 1.5)"
    assert verdict({"value": 1.0, "at_least": 1.5}) == "1.00 (≥ 1.5, missed)"
    assert verdict({"value": 0.5, "at_most": 0.35}) == "0.50 (≤ 0.35, missed)"
    assert verdict({"value": 0.5}) == "0.50"


@pytest.mark.parametrize(
    ("document", "message"),
    [("<!-- benchmark -->\n", "must have the lines"), (None, "must name a document")],
)
def test_a_document_without_a_place_for_tables_is_refused_before_anything_is_measured(
    document: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from benchmark import parse

    if document is not None:
        (tmp_path / "README.md").write_text(document, "utf-8")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--markdown", str(tmp_path / "README.md")])
    with pytest.raises(SystemExit):
        parse()
    assert f"--markdown: {message}" in capsys.readouterr().err


def test_plots_without_matplotlib_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from benchmark import parse

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--plots", str(tmp_path)])
    with pytest.raises(SystemExit):
        parse()
    assert "--plots: needs matplotlib" in capsys.readouterr().err


def test_the_description_of_a_machine_holds_no_path_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from machine import describe_machine, machine_in_words

    monkeypatch.setattr(sys, "argv", [str(tmp_path / "run.py"), "--json", str(tmp_path / "out.json")])
    about = describe_machine("no-such-package")
    assert about["command"] == "python scripts/run.py --json out.json"
    assert about["versions"]["no-such-package"] is None
    assert str(tmp_path) not in json.dumps(about)
    assert f"torch {metadata.version('torch')}" in machine_in_words(about)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["large", "neurips"])
def test_weights_in_fewer_bits_are_judged_and_timed(style: str, tmp_path: Path) -> None:
    result = benchmark("benchmark_quantised.py", tmp_path, style, "--tiny", rounds=1, batches=1)
    rows = result[style]
    plain = rows["float32"]
    assert len(rows) == 2 * (1 + len(LIBRARIES))
    assert all(row["weight_bytes"] < plain["weight_bytes"] for name, row in rows.items() if name != "float32")
    assert all(row["batch 1"]["tokens_per_second"] > 0 for row in rows.values())
    assert plain["batch 1"]["difference"] == 0 < rows["quanto-int8 float32"]["batch 1"]["difference"]
    assert result["about"]["versions"]["torchao"]
