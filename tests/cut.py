"""One process of two that load models cut over both; leaves what they compute in the folder of each model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from runs import end_group
from torch import Tensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from modeling_xlstm import XLSTMForCausalLM

PROMPT, NEW = 5, 6
LAYOUTS: dict[str, dict[str, Any]] = {"fsdp": {"fsdp_size": 2}}
if hasattr(PreTrainedModel, "_resolve_parallel_plans"):  # with an older Transformers, heads are not cut
    LAYOUTS["tp"] = {"tp_plan": "auto"}


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def results(model: XLSTMForCausalLM, ids: Tensor) -> dict[str, Any]:
    """Logits, a greedy continuation, loss, and the gradient of every parameter."""
    with torch.no_grad():
        logits = model(ids).logits
    text = model.generate(ids[:, :PROMPT], max_new_tokens=NEW, do_sample=False)
    loss = model(ids, labels=ids).loss
    loss.backward()
    gradients = {name: whole(x.grad) for name, x in model.named_parameters()}
    return {"logits": logits, "text": text, "loss": loss.detach(), "gradients": gradients}


def elements(model: XLSTMForCausalLM) -> int:
    """Parameters that this process holds."""
    return sum((x.to_local() if hasattr(x, "to_local") else x).numel() for x in model.parameters())


def main() -> None:
    dist.init_process_group("gloo")
    for checkpoint in sorted(path.parent for path in Path(sys.argv[1]).glob("*/config.json")):
        ids = torch.load(checkpoint / "ids.pt")
        for kind, layout in LAYOUTS.items():
            model = XLSTMForCausalLM.from_pretrained(
                checkpoint, dtype=torch.float64, distributed_config=DistributedConfig(**layout)
            )
            made = {**results(model, ids), "elements": elements(model)}
            model.save_pretrained(checkpoint / kind)
            torch.save(made, checkpoint / f"{kind}-{dist.get_rank()}.pt")
            if kind == "tp":
                refuse_to_save(model(ids, use_cache=True).past_key_values, checkpoint)
    end_group()


def refuse_to_save(cache: Any, checkpoint: Path) -> None:
    """Some heads of a state are no state; where every process runs the whole cells, it can be saved."""
    path = checkpoint / f"states-{dist.get_rank()}.safetensors"
    try:
        cache.save(path)
    except ValueError as error:
        path.with_suffix(".txt").write_text(str(error), "utf-8")


if __name__ == "__main__":
    main()
