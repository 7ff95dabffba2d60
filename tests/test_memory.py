"""The memory that scripts/plan.py foretells, against what torch's allocator gave out in real training steps."""

from __future__ import annotations

import contextlib
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import STYLES
from tolerances import assert_foretold

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM, ops_common
from modeling_xlstm.memory_xlstm import LiveBytes, Plan, _block, _run_block, enable_checkpointing, estimate_step


def small_config(style: str, **fields: Any) -> XLSTMConfig:
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 4, "num_heads": 4, "slstm_at": [1]}
    return XLSTMConfig(block_style=style, chunk_size=32, **{**sizes, **fields})  # type: ignore[arg-type]


def train(config: XLSTMConfig, plan: Plan) -> None:
    """Two optimizer steps on packed rows, as Trainer makes them."""
    model: Any = XLSTMForCausalLM(config).train()
    if plan.checkpointing:
        enable_checkpointing(model)
    if plan.precision == "bfloat16":
        model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        for _ in range(plan.accumulation):
            ids = torch.randint(0, config.vocab_size, (plan.batch, plan.tokens))
            documents = (torch.arange(plan.tokens) // 50).expand_as(ids)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=plan.precision == "mixed"):
                loss = model(ids, labels=ids, shift_labels=ids, seq_idx=documents, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def allocated(config: XLSTMConfig, plan: Plan, file: Path) -> int:
    """Most bytes that torch's allocator had given out at a time, by its own account."""
    train(config, plan)  # what a process does once is no part of a step
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train(config, plan)
    profile.export_chrome_trace(str(file))
    events = [e["args"] for e in json.loads(file.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    before = events[0]["Total Allocated"] - events[0]["Bytes"]
    return max(event["Total Allocated"] for event in events) - before


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_takes_the_memory_that_was_foretold(style: str, checkpointing: bool, tmp_path: Path) -> None:
    config, plan = small_config(style), Plan(2, 96, checkpointing=checkpointing)
    assert_foretold(estimate_step(config, plan).peak, allocated(config, plan, tmp_path / "trace.json"))


@pytest.mark.parametrize("options", [{"precision": "mixed"}, {"precision": "bfloat16"}, {"accumulation": 2}])
def test_other_precisions_and_accumulation_take_what_was_foretold(options: dict[str, Any], tmp_path: Path) -> None:
    config, plan = small_config("neurips"), Plan(2, 96, **options)
    assert_foretold(estimate_step(config, plan).peak, allocated(config, plan, tmp_path / "trace.json"))


@pytest.mark.parametrize("tokens", [40, 512])  # of a block
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_long_slstm_takes_what_its_first_blocks_of_tokens_foretell(
    checkpointing: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, plan = small_config("neurips", slstm_at=[0, 1, 2, 3]), Plan(2, 400, checkpointing=checkpointing)
    monkeypatch.setattr(ops_common, "BLOCK", tokens * plan.batch * config.hidden_size)
    foretold = _block(config, "slstm", plan)
    # Twice, for what a process does once is no part of a step.
    _, measured = (_run_block(config, plan, plan.tokens, contextlib.nullcontext()) for _ in range(2))
    for estimate, real in zip(foretold, measured, strict=True):
        assert_foretold(estimate, real)


def test_shards_of_weights_gradients_and_optimizer_add_up_to_the_whole() -> None:
    config = small_config("large")
    alone = estimate_step(config, Plan(1, 32))
    parts = {way: estimate_step(config, Plan(1, 32, sharding=way, devices=4)) for way in ("ddp", "zero2", "zero3")}
    assert parts["ddp"].gathered == alone.weights == parts["zero2"].weights == 4 * parts["zero3"].weights
    for way in ("zero2", "zero3"):
        assert (4 * parts[way].optimizer, 4 * parts[way].gradients) == (alone.optimizer, alone.gradients)
    assert {part.activations for part in parts.values()} >= {alone.activations}
    assert estimate_step(config, Plan(1, 32, optimizer="sgd")).optimizer == 0


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="`optimizer` must be one of"):
        estimate_step(small_config("large"), Plan(1, 8, optimizer="adam"))


def test_live_bytes_count_storages_once_while_they_live() -> None:
    with LiveBytes() as live:
        x = torch.zeros(1000)
        y = x.view(10, 100)[:5] + 1
        x.mul_(2)
        assert live.now == 4 * 1500
        del x
        assert live.now == 4 * 500
        assert live.peak >= 4 * 1500
        del y
    assert live.now == 0
