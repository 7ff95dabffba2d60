"""configuration/ holds data only, and every file opens with its real reader."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from checkout import ROOT, tracked_files
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM

FILES = [ROOT / name for name in tracked_files() if name.startswith("configuration/")]
KINDS = ("model", "peer", "launch", "recipe")
MODELS, PEERS, LAUNCHES, RECIPES = ([x for x in FILES if x.parent.name == kind] for kind in KINDS)
# Published parameter counts, in millions; those of the large style are of the runs listed in NX-AI/xlstm_scaling_laws.
PUBLISHED = {
    "xlstm_neurips_125m": 163.8,
    "xlstm_neurips_350m": 409.3,
    "xlstm_neurips_760m": 840.4,
    "xlstm_neurips_1_3b": 1422.6,
    "xlstm_large_160m": 164.110224,
    "xlstm_large_400m": 406.856896,
    "xlstm_large_1_3b": 1420.839104,
    "xlstm_large_2_7b": 2780.4496,
    "xlstm_large_7b": 6865.424896,
}
# The others, as they came out here: a change of one is a change of the model.
COUNTED = {
    "xlstm_neurips_7_1_125m": 163.7,
    "xlstm_neurips_7_1_350m": 408.4,
    "xlstm_neurips_7_1_760m": 839.7,
    "xlstm_neurips_7_1_1_3b": 1420.1,
    "xlstm_laptop": 0.9,
    "xlstm_2m": 2.5,
}


def test_every_file_is_data_that_some_reader_here_opens() -> None:
    assert sorted(FILES) == sorted([*MODELS, *PEERS, *LAUNCHES, *RECIPES])
    assert {path.suffix for path in (*MODELS, *PEERS)} == {".json"}
    assert {path.suffix for path in (*LAUNCHES, *RECIPES)} == {".yaml"}
    assert {path.stem for path in MODELS} == {*PUBLISHED, *COUNTED}


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_file_names_only_fields_and_builds_a_model_of_its_size(path: Path) -> None:
    fields = {field.name for field in dataclasses.fields(XLSTMConfig)} | {"model_type", "slstm_at", "variant"}
    assert set(json.loads(path.read_text("utf-8"))) <= fields
    with torch.device("meta"):
        model = XLSTMForCausalLM(XLSTMConfig.from_json_file(path))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    wanted = {**PUBLISHED, **COUNTED}[path.stem]
    assert round(millions, 1 if "large" not in path.stem else 6) == wanted


@pytest.mark.parametrize("path", PEERS, ids=lambda path: path.stem)
def test_a_peer_has_the_size_and_vocabulary_of_the_model_it_is_compared_with(path: Path) -> None:
    ours = ROOT / "configuration" / "model" / path.name.replace("llama", "xlstm")
    peer, model = (json.loads(file.read_text("utf-8")) for file in (path, ours))
    with torch.device("meta"):
        sizes = [
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).num_parameters()
            for fields in (peer, model)
        ]
    assert peer["vocab_size"] == model["vocab_size"]
    assert max(sizes) - min(sizes) < min(sizes) // 20


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_a_launch_file_is_read_by_accelerate_and_wraps_our_blocks(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.compute_environment == "LOCAL_MACHINE"
    kind = str(config.distributed_type).rpartition(".")[2]
    assert kind == {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(path.stem, "DEEPSPEED")
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] in XLSTMForCausalLM._no_split_modules
    if kind == "DEEPSPEED":
        assert path.stem == f"deepspeed_zero{config.deepspeed_config['zero_stage']}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_holds_flags_of_the_training_script_and_names_a_model_file(path: Path) -> None:
    import train

    _, arguments = train.parse([str(path), "--output_dir", "unused", "--use_cpu"])
    assert ROOT / arguments.model in MODELS
