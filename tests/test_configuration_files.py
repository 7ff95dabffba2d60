"""configuration/ holds data only, and every file opens with its real reader."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from checkout import ROOT, tracked_files

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM

FILES = [ROOT / name for name in tracked_files() if name.startswith("configuration/")]
MODELS = [path for path in FILES if path.parent.name == "model"]
# Published parameter counts, in millions.
PARAMETERS = {"xlstm_neurips_125m": 163.8, "xlstm_large_7b": 6870}


def test_every_file_is_data_that_some_reader_here_opens() -> None:
    assert FILES == MODELS != []
    assert {path.suffix for path in FILES} == {".json"}


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_file_names_only_fields_and_builds_a_model_of_the_published_size(path: Path) -> None:
    fields = {field.name for field in dataclasses.fields(XLSTMConfig)} | {"model_type", "slstm_at", "variant"}
    assert set(json.loads(path.read_text("utf-8"))) <= fields
    with torch.device("meta"):
        model = XLSTMForCausalLM(XLSTMConfig.from_json_file(path))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    digits = 1 if millions < 1000 else -1
    assert round(millions, digits) == PARAMETERS[path.stem]
