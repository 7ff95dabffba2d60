"""The benchmark scripts run, judge before they time, and report what they ran on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT
from inputs import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from modeling_xlstm import XLSTMForCausalLM


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
    assert {"machine", "threads", "versions"} <= result.keys()
    assert result["ratio"] > 0


@pytest.mark.slow
def test_assisted_decoding_is_timed_with_every_kind_of_draft(tmp_path: Path) -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([], BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(tmp_path / "model")
    tiny_model(XLSTMForCausalLM, vocab_size=300).float().save_pretrained(tmp_path / "model")
    sizes = {"prompts": 1, "prompt_tokens": 8, "new_tokens": 6, "rounds": 1, "draft": tmp_path / "model"}
    result = benchmark("benchmark_assisted.py", tmp_path, tmp_path / "model", **sizes)
    assert result.keys() == {"greedy", "prompt lookup", "own first block", "draft model", "about"}
    assert (result["greedy"]["passes_per_token"], result["greedy"]["accepted"]) == (1.0, None)
    assert result["draft model"]["accepted"] == 1.0  # it drafts for itself


@pytest.mark.slow
def test_peers_are_timed_after_they_agreed(tmp_path: Path) -> None:
    result = benchmark("benchmark.py", tmp_path, "--only", "prefill large 512", rounds=1)
    (row,) = result["rows"]
    assert row["milliseconds"].keys() == {"ours", "transformers xlstm"}
    assert 0 < row["difference"] < 1
    assert {"machine", "threads", "torch", "transformers"} <= result["about"].keys()
