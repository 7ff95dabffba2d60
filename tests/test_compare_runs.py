"""scripts/compare_runs.py: what finished runs are worth beside compressors and each other."""

from __future__ import annotations

import math
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
        compare_runs.read_run(tmp_path)


def test_of_a_run_that_logged_no_loss_what_is_held_out_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    compare_runs.draw({"short": [{"step": 4, "eval_nats_per_token": 2.0}]}, tmp_path / "losses.png")
    (axes,) = figures[0].axes
    assert [line.get_label() for line in axes.lines] == ["short, held out"]
