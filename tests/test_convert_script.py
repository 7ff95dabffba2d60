"""scripts/convert.py on sharded checkpoints of the published 7B's key structure at small width."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from checkout import ROOT
from inputs import tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_architecture import TRAVELLING
from tokenizers import Tokenizer, models, pre_tokenizers
from tolerances import assert_identical
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXTokenizerFast,
    PreTrainedTokenizerFast,
    TrainingArguments,
    xLSTMConfig,
    xLSTMForCausalLM,
)

from modeling_xlstm import XLSTMForCausalLM, convert_from, convert_to
from modeling_xlstm.pretrained_xlstm import AUTO_MAP

SHARD = "60KB"
# What the published configuration has beside the fields of its class.
PUBLISHED = {"force_bos_token_insert": True, "cell_norm_eps": 1e-06, "mlstm_round_up_to_multiple_of": 64, "head_dim": 8}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.chdir(tmp_path)
    import convert

    return convert


def run(script: ModuleType, *words: str) -> None:
    script.convert(script.parse(["--max_shard_size", SHARD, *words]))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve blocks in the built-in format, sharded, with a tokenizer that does not begin with BOS, and a card."""
    folder = tmp_path_factory.mktemp("published") / "small-7b"
    torch.manual_seed(0)
    config = xLSTMConfig(vocab_size=40, hidden_size=32, num_hidden_layers=12, num_heads=4, **PUBLISHED)
    model = xLSTMForCausalLM(config)
    for x in model.parameters():
        x.data.normal_(std=0.2)
    model.save_pretrained(folder, max_shard_size=SHARD)
    (folder / "README.md").write_text("---\nlicense: other\n---\nText.\n", "utf-8")
    words = {"<bos>": 0, "<pad>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, 40)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    (folder / "tokenizer").mkdir()  # as scripts/train.py leaves one
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_published_format_becomes_a_folder_that_loads_and_comes_back_bit_by_bit(
    published: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    run(script, str(published), "ours")
    ours = Path("ours")
    config = json.loads((published / "config.json").read_text("utf-8"))
    assert_identical(tensors(ours), convert_from("transformers", config, tensors(published))[1])
    index = json.loads((ours / "model.safetensors.index.json").read_text("utf-8"))
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors(ours).values())
    for path in ours.glob("*.safetensors"):
        assert set(load_file(path)) == {name for name, file in index["weight_map"].items() if file == path.name}
        assert path.stat().st_size < 70_000
    assert "are the official model's to" in capsys.readouterr().out
    left = {path.name for path in ours.iterdir()}
    assert {f"{name}.py" for name in TRAVELLING} <= left
    assert script.PROGRESS not in left

    model = AutoModelForCausalLM.from_pretrained(ours, trust_remote_code=True)
    assert json.loads((ours / "config.json").read_text("utf-8"))["auto_map"] == AUTO_MAP
    assert (model.generation_config.bos_token_id, model.config.architectures) == (0, ["XLSTMForCausalLM"])
    assert AutoTokenizer.from_pretrained(ours)("w5 w7").input_ids == [0, 5, 7]
    assert AutoTokenizer.from_pretrained(published)("w5 w7").input_ids == [5, 7]
    card = (ours / "README.md").read_text("utf-8")
    for fact in ("license: other", "of small-7b", "begin with the BOS token", f"| {model.num_parameters():,} |"):
        assert fact in card
    cache = model(torch.tensor([[0, 5]]), use_cache=True).past_key_values
    assert f"| {cache.size_in_bytes():,} bytes in float32" in card

    run(script, "ours", "back", "--to", "transformers")
    assert_identical(tensors(Path("back")), tensors(published))
    again = xLSTMForCausalLM.from_pretrained("back")
    assert_identical(dict(again.state_dict()), tensors(published))
    run(script, "ours", "fused", "--to", "transformers", "--weight_mode", "fused", "--no_verify")
    assert "backbone.blocks.11.mlstm_layer.qkv_opreact.weight" in tensors(Path("fused"))
    run(script, "fused", "unfused")
    assert_identical(tensors(Path("unfused")), tensors(ours))


@pytest.mark.parametrize("family", ["neurips", "large"])
@pytest.mark.parametrize("stored", ["safetensors", "pt"])
def test_models_of_the_official_package_convert_both_ways(family: str, stored: str, script: ModuleType) -> None:
    variant = {"neurips": "mixed", "large": "mlstm"}[family]
    config = tiny_config(family, variant, tie_word_embeddings=family == "neurips")
    model = XLSTMForCausalLM(config)
    model.save_pretrained("ours", max_shard_size="9KB")
    run(script, "ours", "official", "--to", family, "--no_verify")
    official, weights = convert_to(family, config, model.state_dict())
    assert json.loads(Path("official/config.json").read_text("utf-8")) == json.loads(json.dumps(official))
    if family == "neurips":
        weights.pop("lm_head.weight")  # tied: not stored
    assert_identical(tensors(Path("official")), weights)
    if stored == "pt":
        for path in Path("official").glob("*"):
            path.unlink()
        if family == "neurips":
            weights["lm_head.weight"] = weights.pop("token_embedding.weight")  # as safetensors' save_model has it
        torch.save(weights, "official/model.pt")
        Path("official/config.yaml").write_text(yaml.safe_dump(official).replace("1.0e-", "1e-"), "utf-8")
    run(script, "official", "back", "--from", family, "--no_verify")
    assert_identical(tensors(Path("back")), tensors(Path("ours")))
    loaded = XLSTMForCausalLM.from_pretrained("back")
    assert_identical(loaded.state_dict(), model.state_dict())


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import convert, shards
replace = os.replace
def kill_the_third(draft, path):
    if os.path.basename(path).startswith("model-00003"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(draft, path)
shards.os.replace = kill_the_third
convert.main()
"""


@pytest.mark.slow
def test_a_killed_conversion_goes_on_and_leaves_what_an_undisturbed_one_leaves(
    published: Path, script: ModuleType
) -> None:
    run(script, str(published), "whole")
    words = [str(ROOT / "scripts"), "--max_shard_size", SHARD, str(published), "killed"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
    died = subprocess.run([sys.executable, "-c", KILLED, *words], env=environment, check=False)
    assert died.returncode == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in Path("killed").glob("*.safetensors")}
    assert len(done) == 2
    with pytest.raises(script.WrongInput, match="was begun from another source"):
        run(script, str(published), "killed", "--max_shard_size", "80KB")
    run(script, str(published), "killed")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    whole, killed = contents(Path("whole")), contents(Path("killed"))
    whole["README.md"] = whole["README.md"].replace(b"whole", b"killed")
    assert killed == whole


def test_a_conversion_that_changed_a_number_is_not_called_verified(
    published: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change_one(path: Path, steps: Any, weights: Any) -> None:
        write(path, steps, weights)
        if path.name.startswith("model-00002"):
            save_file({name: 1.01 * x for name, x in load_file(path).items()}, path, {"format": "pt"})

    write = script.write_shard
    monkeypatch.setattr(script, "write_shard", change_one)
    with pytest.raises(script.WrongInput, match="The two models differ by"):
        run(script, str(published), "ours")
    assert not Path("ours/README.md").exists()


def test_what_cannot_be_converted_is_refused_before_anything_is_written(published: Path, script: ModuleType) -> None:
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/mine").touch()
    tiny_model(XLSTMForCausalLM).save_pretrained("mine")
    for words, message in (
        (["empty", "out"], "must hold config.json or config.yaml"),
        ([str(published), "out", "--to", "large"], "is no model of ours"),
        ([str(published), "full"], "must be a new or empty folder"),
        ([str(published), "full", "--restart"], "must be a new or empty folder"),
        ([str(published), "out", "--weight_mode", "fused"], "`--weight_mode fused` applies to --to large"),
        ([str(published), "out", "--tokenizer", "empty"], "with the files of one; empty holds none"),
        ([str(published), "out", "--tokenizer", "nowhere"], "with the files of one; nowhere holds none"),
        (["mine", "out", "--to", "transformers", "--weight_mode", "fused"], "cannot load `--weight_mode fused`"),
    ):
        with pytest.raises(script.WrongInput, match=message):
            run(script, *words)
    Path("empty/config.json").write_text("{}", "utf-8")
    with pytest.raises(ValueError, match="must hold weights"):
        run(script, "empty", "out")
    assert not Path("out").exists()


@pytest.fixture
def pickled(published: Path, script: ModuleType) -> tuple[Path, dict[str, Tensor]]:
    """A folder with the published configuration, to put pickled files into, and a state dict that belongs there."""
    folder = Path("pickled")
    folder.mkdir()
    shutil.copyfile(published / "config.json", folder / "config.json")
    return folder, tensors(published)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_state_dict_converts_from_the_folder_and_the_format_that_a_training_left_it_in(
    name: str, zipped: bool, published: Path, pickled: tuple[Path, dict[str, Tensor]], script: ModuleType
) -> None:
    folder, weights = pickled
    torch.save(weights, folder / name, _use_new_zipfile_serialization=zipped)
    torch.save(TrainingArguments("out"), folder / "training_args.bin")
    for other in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state_0.pth"):
        torch.save({"step": 3}, folder / other)
    run(script, "pickled", "ours", "--no_verify")
    config = json.loads((published / "config.json").read_text("utf-8"))
    assert_identical(tensors(Path("ours")), convert_from("transformers", config, weights)[1])


def in_safetensors(name: str, x: Tensor) -> Callable[[dict[str, Tensor], Path], None]:
    return lambda weights, folder: save_file({**weights, name: x}, folder / "model.safetensors")


def in_pickle(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[dict[str, Tensor], Path], None]:
    return lambda weights, folder: torch.save(change(weights), folder / "model.pt")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (in_pickle(lambda x: {"step": 3, "model": x}), r"model\.pt .*`step` is a int.*alone, perhaps .* `model`\.$"),
        (in_pickle(lambda x: list(x.values())), r"model\.pt must hold a state dict, .*; got a list"),
        (in_pickle(lambda x: nn.Linear(2, 2)), r"model\.pt must hold a state dict, .*; it holds something else"),
        (in_pickle(lambda x: {**x, "head": torch.ones(2, dtype=torch.int8)}), r"`head` in .*model\.pt .*torch\.int8"),
        (in_safetensors("head", torch.ones(2).to(torch.float8_e4m3fn)), r"`head` in .*model\.safetensors .*F8_E4M3"),
        (lambda x, folder: (folder / "model.pt").write_bytes(b""), r"model\.pt must hold .*, or is damaged"),
        (
            lambda x, folder: (folder / "a.safetensors").write_bytes(b"{"),
            r"a\.safetensors is no safetensors file, or a",
        ),
    ],
    ids=["nested", "list", "module", "int8", "fp8", "empty", "damaged"],
)
def test_files_that_hold_no_weights_are_named(
    write: Callable[[dict[str, Tensor], Path], None],
    message: str,
    pickled: tuple[Path, dict[str, Tensor]],
    script: ModuleType,
) -> None:
    folder, weights = pickled
    write(weights, folder)
    with pytest.raises(ValueError, match=message):
        run(script, "pickled", "ours")
    assert not Path("ours").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"pickled/config\.json must hold a configuration; it cannot be read: Expecting"),
        ("[]", r"pickled/config\.json must hold a configuration, .*; got a list"),
        ('{"num_heads": 3}', r"The configuration in pickled must be that of a model: .*validate_heads"),
        (
            '{"model_type": "extended_lstm", "hiden_size": 3}',
            r"in pickled must be that of a model: `hiden_size` is not",
        ),
    ],
    ids=["no JSON", "list", "impossible", "unknown field"],
)
def test_configurations_that_describe_no_model_are_refused_by_their_place(
    text: str, message: str, pickled: tuple[Path, dict[str, Tensor]], script: ModuleType
) -> None:
    folder, weights = pickled
    torch.save(weights, folder / "model.pt")
    (folder / "config.json").write_text(text, "utf-8")
    to = ["--to", "large"] if "extended" in text else ["--from", "transformers"]
    with pytest.raises(script.WrongInput, match=message):
        run(script, "pickled", "ours", *to)


def test_a_tokenizer_of_a_class_that_writes_its_own_template_begins_with_bos_too(script: ModuleType) -> None:
    core = Tokenizer(models.BPE({"<bos>": 0, "a": 1, "b": 2}, []))
    GPTNeoXTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<bos>", unk_token="<bos>"
    ).save_pretrained("neox")
    assert AutoTokenizer.from_pretrained("neox")("ab").input_ids == [1, 2]
    assert script.begin_with_bos(Path("neox"), 0)
    assert AutoTokenizer.from_pretrained("neox")("ab").input_ids == [0, 1, 2]


def test_the_card_says_who_puts_bos_where_there_is_no_tokenizer(published: Path, script: ModuleType) -> None:
    shutil.copytree(published, "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    run(script, "bare", "ours", "--no_verify")
    card = Path("ours/README.md").read_text("utf-8")
    assert "must begin with the BOS token; no tokenizer here puts it there, so do it yourself." in card


def test_an_interrupted_conversion_says_how_it_goes_on(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["convert.py", "from", "to"])
    monkeypatch.setattr(script, "convert", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 130
    assert "The same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["infGB", "nan", "0", "-1MB", "MB", "5TB"])
def test_a_shard_size_that_is_none_is_refused(word: str, script: ModuleType, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        script.parse([f"--max_shard_size={word}", "from", "to"])
    assert "--max_shard_size: must be a size above 0" in capsys.readouterr().err


def test_a_target_that_is_a_file_is_refused(
    published: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine").touch()
    with pytest.raises(SystemExit):
        run(script, str(published), "mine")
    assert "argument target: must name a folder; mine is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: mit\nmodel-index: 3\n---\n", "mit"),
        ("---\nlicense: [mit\n---\n", "unknown"),
        ("---\n- mit\n---\n", "unknown"),
        ("---\n---\n", "unknown"),
        ("---\nText.\n", "unknown"),
        ("Text.", "unknown"),
        (None, "unknown"),
    ],
    ids=["strange", "no YAML", "list", "empty", "rule", "plain", "none"],
)
def test_the_license_is_the_sources_whatever_else_its_card_holds(
    card: str | None, license: str, script: ModuleType
) -> None:
    if card is not None:
        Path("README.md").write_text(card, "utf-8")
    assert script.license_of(Path("README.md")) == license
