"""Models cut over processes, by heads or by parameters, are the whole model: outputs, texts, gradients, checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cut
import pytest
import torch
from inputs import tiny_config, tiny_model, tokens
from processes import launch_two
from tolerances import TRAINED, assert_identical, assert_same
from transformers.distributed.mixin import DistributedMixin

from modeling_xlstm import XLSTMForCausalLM

BIASES = dict.fromkeys(("use_bias", "norm_bias", "ffn_bias", "tie_word_embeddings"), True) | {"vocab_size": 62}
MODELS: dict[str, dict[str, Any]] = {
    "large": {"variant": "mlstm"},
    "large_biases_tied": {"variant": "mixed", **BIASES},
    "residual": {"block_style": "residual"},
    "neurips": {"block_style": "neurips"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any], XLSTMForCausalLM]]:
    """Folder, results in one process, and model; two processes have left theirs in the folder."""
    folder, made = tmp_path_factory.mktemp("cut"), {}
    for name, fields in MODELS.items():
        torch.manual_seed(0)
        model, ids = tiny_model(XLSTMForCausalLM, **fields), tokens(2, 13)
        model.save_pretrained(folder / name)
        torch.save(ids, folder / name / "ids.pt")
        made[name] = folder / name, cut.results(model, ids), model
    launch_two("cut.py", folder)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", cut.LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_cut_over_two_processes_computes_what_it_computes_in_one(name: str, kind: str, models: Any) -> None:
    folder, wanted, model = models[name]
    for rank in range(2):
        got = torch.load(folder / f"{kind}-{rank}.pt")
        assert got.pop("elements") < 0.8 * sum(x.numel() for x in model.parameters())
        # The open gates of these models make large gradients out of rounding.
        assert_same(got, wanted, TRAINED)
    saved = XLSTMForCausalLM.from_pretrained(folder / kind, dtype=torch.float64)
    assert_identical(saved.state_dict(), model.state_dict())


@pytest.mark.slow
def test_a_process_with_some_of_the_heads_does_not_save_their_states_as_the_model_s(models: Any) -> None:
    for name, (folder, _, _) in models.items():
        refused = folder / "states-1.txt"
        assert refused.exists() == (name != "neurips" and "tp" in cut.LAYOUTS)
        if refused.exists():
            assert "cut over processes" in refused.read_text("utf-8")


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_every_rule_of_the_plan_names_a_part_of_the_model(fields: dict[str, Any]) -> None:
    model = tiny_model(XLSTMForCausalLM, **fields)
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    plan = model.tp_plan
    assert {"lm_head", "model.embed_tokens"} <= plan.keys()
    for rule in plan:
        before, _, after = rule.partition(".*.")
        assert any(name == rule or (name.startswith(before) and name.endswith(f".{after}")) for name in names), rule


@pytest.mark.parametrize(
    ("vocab_size", "tied", "is_refused"), [(61, True, True), (62, True, False), (61, False, False)]
)
def test_a_tied_embedding_that_does_not_divide_over_the_processes_is_refused(
    vocab_size: int, tied: bool, is_refused: bool
) -> None:
    model = tiny_model(XLSTMForCausalLM, vocab_size=vocab_size, tie_word_embeddings=tied)
    layout = SimpleNamespace(tp_size=1, fsdp_size=2)
    if is_refused:
        with pytest.raises(
            ValueError, match=r"`fsdp_size` must divide `vocab_size`.* got 2 and 61.*pad_to_multiple_of=2"
        ):
            model.maybe_distribute_model(model, layout, None)
        model.resize_token_embeddings(pad_to_multiple_of=2)
    assert model.maybe_distribute_model(model, layout, None) is model


def test_heads_that_do_not_divide_over_the_processes_are_refused() -> None:
    model = tiny_model(XLSTMForCausalLM, num_heads=4)
    with pytest.raises(ValueError, match=r"`tp_size` must divide `num_heads`.* got 6 and 4\. Use 2"):
        model._resolve_parallel_plans(SimpleNamespace(tp_size=6))


def test_transformers_that_cannot_tell_the_blocks_apart_cuts_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(XLSTMForCausalLM)
    monkeypatch.delattr(DistributedMixin, "_resolve_parallel_plans", raising=False)
    with pytest.raises(ImportError, match=r"Tensor parallelism needs transformers 5\.23 or newer"):
        model.maybe_distribute_model(model, SimpleNamespace(tp_size=2), None)
    for alone in (None, SimpleNamespace(tp_size=1)):
        assert model.maybe_distribute_model(model, alone, None) is model


def test_the_plan_follows_from_the_other_fields() -> None:
    config = tiny_config(tie_word_embeddings=True)
    config.base_model_tp_plan = {**config.base_model_tp_plan, "embed_tokens": "embedding_rowwise"}
    with pytest.raises(AttributeError, match=r"`base_model_tp_plan` follows from other fields; got \{'x': 'y'\}"):
        config.base_model_tp_plan = {"x": "y"}
