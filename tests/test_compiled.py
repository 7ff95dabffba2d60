"""torch.compile around a model that trains: the numbers of a plain one, and no more pieces for more blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from inputs import tiny_model, tokens
from tolerances import assert_same

from modeling_xlstm import XLSTMForCausalLM
from modeling_xlstm.memory_xlstm import enable_checkpointing

COUNTERS = torch._dynamo.utils.counters
B, T = 2, 13
# torch's own look at the tensors it traces.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    COUNTERS.clear()
    yield
    torch._dynamo.reset()  # type: ignore[no-untyped-call]


def batch() -> dict[str, Any]:
    """Documents packed in two rows, of which one has padding on both sides."""
    ids, mask = tokens(B, T), torch.ones(B, T, dtype=torch.long)
    mask[0, :2] = mask[0, -3:] = 0
    document = (torch.arange(T) // 5).expand(B, T).contiguous()
    return {"input_ids": ids, "labels": ids, "attention_mask": mask, "seq_idx": document}


def trained(model: Any, call: Any, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses, and gradients summed over all batches, as in accumulation."""
    model.zero_grad()
    losses = []
    for given in batches:
        loss = call(**given).loss
        loss.backward()
        losses.append(loss.detach())
    return {"losses": losses, "gradients": {name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize(
    ("style", "checkpointing", "backend"),
    [("neurips", False, "aot_eager"), ("large", True, "aot_eager"), ("residual", False, "eager")],
)
def test_a_compiled_model_trains_as_a_plain_one_packed_padded_and_accumulated(
    style: str, checkpointing: bool, backend: str
) -> None:
    model = tiny_model(XLSTMForCausalLM, style).train()
    if checkpointing:
        enable_checkpointing(model, use_reentrant=False)
    batches = [batch(), batch()]
    expected = trained(model, model, batches)
    assert_same(trained(model, torch.compile(model, backend=backend), batches), expected)
    assert COUNTERS["stats"]["unique_graphs"], "nothing was compiled"


def test_a_compiled_function_may_hold_the_whole_training_step() -> None:
    model, given = tiny_model(XLSTMForCausalLM, variant="mlstm", num_hidden_layers=1).train(), [batch(), batch()]
    expected = trained(model, model, given)
    assert_same(torch.compile(trained, backend="aot_eager")(model, model, given), expected)


def test_more_blocks_take_no_more_graphs() -> None:
    counts = []
    for blocks in (3, 5):
        torch._dynamo.reset()  # type: ignore[no-untyped-call]
        COUNTERS.clear()
        model = tiny_model(XLSTMForCausalLM, num_hidden_layers=blocks).train()
        torch.compile(model, backend="eager")(**batch())
        counts.append(COUNTERS["stats"]["unique_graphs"])
    assert 0 < counts[0] == counts[1]
