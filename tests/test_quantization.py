"""Weights in few bits: loaded by Transformers for every block style, decoded from states, and LoRA trained on top."""

from __future__ import annotations

import ast
import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from inputs import STYLES, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from tolerances import BFLOAT16, EIGHT_BITS, FOUR_BITS, assert_identical, assert_same
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from modeling_xlstm import XLSTMForCausalLM
from modeling_xlstm.quantization_xlstm import ADAPTABLE, KEPT, LIBRARIES, quantization, weight_bytes
from modeling_xlstm.tuning_xlstm import lora_targets

pytestmark = [
    # PEFT asks for it by Transformers' older name, which the newest Transformers warns about.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
FLOAT = torch.float32
PAGE = ROOT / "docs" / "quantization.md"


def load(folder: Path, kind: str, dtype: torch.dtype = FLOAT) -> Any:
    config = quantization(kind, dtype)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype).eval()


@pytest.fixture(params=STYLES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A model of each style, and where it was saved."""
    model = tiny_model(XLSTMForCausalLM, request.param, hidden_size=64).float()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def is_plain(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.dtype == FLOAT and not hasattr(weight, "quant_state")


def judge_answers(kind: str, quantised: Any, model: Any) -> None:
    """Logits are nearly the old ones; token by token from states they are those of the whole text."""
    ids = tokens(2, 9)
    with torch.no_grad():
        whole = quantised(ids).logits
        assert_same(whole, model(ids).logits, FOUR_BITS if kind == "bitsandbytes-4bit" else EIGHT_BITS)
        cache, steps = None, []
        for t in range(9):
            out = quantised(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    # What bitsandbytes packed for a CPU with units for bfloat16 is multiplied in it, for one token as for many.
    kept = (getattr(weight, "quant_state", None) for weight in quantised.parameters())
    in_bfloat16 = any(getattr(state, "packing_format_for_cpu", False) for state in kept)
    assert_same(torch.cat(steps, 1), whole, BFLOAT16 if in_bfloat16 else None)
    written = quantised.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert written.shape == (2, 13)


@pytest.mark.parametrize("kind", LIBRARIES)
def test_the_projections_of_blocks_are_quantised_and_the_model_answers_and_decodes_as_before(
    kind: str, saved: tuple[Any, Path]
) -> None:
    model, folder = saved
    quantised = load(folder, kind)
    targets = {f"{name}.weight" for name in lora_targets(model)}
    after, before = dict(quantised.named_parameters()), dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert {name for name, x in after.items() if not is_plain(x)} == targets
    assert_identical(
        {n: after[n] for n in before if n not in targets}, {n: before[n] for n in before if n not in targets}
    )
    bits = 4 if kind == "bitsandbytes-4bit" else 8
    spared = sum(before[name].numel() for name in targets) * (32 - bits) // 8
    # The scales, of rows or blocks, take some of it back.
    assert 0.85 * spared < weight_bytes(model) - weight_bytes(quantised) < spared
    judge_answers(kind, quantised, model)


@pytest.mark.parametrize("kind", ["quanto-int8", "torchao-int8"])
@pytest.mark.parametrize("saved", ["large"], indirect=True)
def test_eight_bits_go_with_bfloat16(kind: str, saved: tuple[Any, Path]) -> None:
    model, folder = saved
    ids = tokens(2, 9)
    with torch.no_grad():
        logits = load(folder, kind, torch.bfloat16)(ids).logits
    assert logits.dtype == torch.bfloat16
    assert_same(logits.float(), model(ids).logits.detach(), EIGHT_BITS)


@pytest.mark.parametrize("kind", ADAPTABLE)
def test_adapters_train_on_quantised_weights(kind: str, saved: tuple[Any, Path]) -> None:
    _, folder = saved
    base, ids = load(folder, kind), tokens(2, 9)
    targets = lora_targets(base)
    lora: Any = get_peft_model(base, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    trained = [x for x in lora.parameters() if x.requires_grad]
    assert len(trained) == 2 * len(targets)
    optimizer, losses = torch.optim.Adam(trained, 1e-2), []
    for _ in range(8):
        loss = lora(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_kinds_that_are_unknown_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`kind` must be one of bitsandbytes-4bit, .*; got 'int3'"):
        quantization("int3")


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_library_that_is_missing_is_named_with_the_way_to_install_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    library = LIBRARIES[kind]
    with pytest.raises(
        ImportError, match=re.escape(f"{kind!r} needs the package {library}, which is not installed")
    ) as e:
        quantization(kind)
    assert 'pip install -e ".[quant]"' in str(e.value)
    assert 'pip install -e ".[quant]"' in PAGE.read_text("utf-8")


def test_the_page_shows_what_is_kept_as_it_is() -> None:
    shown = re.findall(r"^KEPT = (.*)$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert [ast.literal_eval(patterns) for patterns in shown] == [KEPT]
