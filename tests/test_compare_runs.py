"""scripts/compare_runs.py: what finished runs are worth beside compressors and each other."""

from __future__ import annotations

import json
import math
import sys
import zlib
from pathlib import Path

import compare_runs
import corpus
import pytest
import torch
from inputs import tiny_model
from matplotlib.figure import Figure
from tolerances import assert_same

from modeling_xlstm import XLSTMForCausalLM

TEXTS = ["def add(a, b):\n    return a + b\n" * 3, "x = 1\n"]


def test_a_file_read_in_pieces_is_worth_what_it_is_worth_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = corpus.train_tokenizer(TEXTS, 270)
    model = tiny_model(XLSTMForCausalLM, vocab_size=270).float()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    end, nats = tokenizer.eos_token_id, 0.0
    for text in TEXTS:
        ids = torch.tensor([[end, *tokenizer(text, add_special_tokens=False).input_ids, end]])
        with torch.no_grad():
            nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    monkeypatch.setattr(compare_runs, "PIECE", 7)
    found = compare_runs.bits_per_byte_in_one_piece(tmp_path, TEXTS)
    assert_same(torch.tensor(found), torch.tensor(nats / math.log(2) / corpus.count_bytes(TEXTS)))


def test_a_compressor_gets_each_file_alone() -> None:
    found = compare_runs.bits_per_byte_compressed(["a" * 100, "b" * 50], zlib.compress)
    assert found == 8 * (len(zlib.compress(b"a" * 100)) + len(zlib.compress(b"b" * 50))) / 150


def test_a_folder_without_a_finished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="must hold a finished run"):
        compare_runs.read_run(tmp_path, 4)


def write_run(folder: Path, *judged: dict[str, float]) -> Path:
    """What a training leaves of its log."""
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"loss": 1.0}, *judged]}), "utf-8")
    return folder


def test_a_run_that_was_judged_on_other_text_or_not_at_all_is_named_before_any_other_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = corpus.count_bytes(TEXTS)
    monkeypatch.setattr(compare_runs, "read_standard_library", lambda: corpus.Text([], TEXTS, ""))
    monkeypatch.setattr(compare_runs, "bits_per_byte_in_one_piece", None)  # which reads a model
    monkeypatch.setattr(compare_runs, "bits_per_byte_compressed", None)
    same, other = (
        write_run(tmp_path / name, {"eval_nats": 3.7, "eval_bits_per_byte": 3.7 / math.log(2) / count})
        for name, count in (("same", size), ("other", size + 1))
    )
    assert compare_runs.read_run(same, size)["judged"]["eval_nats"] == 3.7
    for folder, message in (
        (other, f"other must have been judged on .* {size:,} bytes are held out; got {size + 1:,}"),
        (write_run(tmp_path / "unfinished"), "unfinished has not been judged"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(same), str(folder)])
        with pytest.raises(SystemExit, match=message):
            compare_runs.main()


def test_of_a_run_that_logged_no_loss_what_is_held_out_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    compare_runs.draw({"short": [{"step": 4, "eval_nats_per_token": 2.0}]}, tmp_path / "losses.png")
    (axes,) = figures[0].axes
    assert [line.get_label() for line in axes.lines] == ["short, held out"]
