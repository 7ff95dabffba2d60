"""A small training with carried states that the tests run in this process, and as a script in several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from inputs import rows, tiny_model, tokens
from runs import end_group
from torch import Tensor
from transformers import TrainingArguments

from modeling_xlstm import XLSTMForCausalLM
from modeling_xlstm.training_xlstm import CarriedStateTrainer, Segments

LENGTHS = [37, 5, 64, 1, 21, 90, 8, 30]
Z_LOSS = 0.5  # of two processes


def documents(lengths: list[int]) -> list[Tensor]:
    torch.manual_seed(1)
    return [tokens(1, n)[0] for n in lengths]


class Recorder(CarriedStateTrainer):
    """Keeps the losses of the optimizer steps as they are; Trainer's log is in float32."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.losses: list[Tensor] = []

    def training_step(self, *args: Any) -> Tensor:
        loss = super().training_step(*args)
        while len(self.losses) <= self.state.global_step:
            self.losses.append(torch.zeros((), dtype=torch.float64))
        self.losses[self.state.global_step] += loss
        return loss


def trainer(folder: Path, segments: Segments, z_loss: float = 0.0, **options: Any) -> Recorder:
    """A trainer of a small mixture in float64, reproducible, that logs every step and says nothing."""
    torch.manual_seed(0)
    model = tiny_model(XLSTMForCausalLM, "neurips")
    given = {
        "save_strategy": "no",
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        **options,
    }
    arguments = TrainingArguments(str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **given)
    return Recorder(model, arguments, train_dataset=segments, eval_dataset=segments, z_loss=z_loss)


def joined_states(trained: CarriedStateTrainer) -> list[list[Tensor]]:
    """The states of all lanes in the order of the lanes, layer by layer."""
    by_micro_batch = [rows(cache.states, slice(None)) for _, cache in sorted(trained._carried.items())]
    return [[torch.cat(parts) for parts in zip(*layers, strict=True)] for layers in zip(*by_micro_batch, strict=True)]


def result(trained: Recorder) -> dict[str, Any]:
    """What a training leaves: weights, losses and states."""
    weights = {name: x.detach() for name, x in trained.model.named_parameters()}
    return {"weights": weights, "losses": trained.losses, "states": joined_states(trained)}


def main() -> None:
    """One process of two: four lanes in all, four optimizer steps; leaves `result-RANK.pt` in the folder given."""
    folder = Path(sys.argv[1])
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 4}
    run = trainer(folder, Segments(documents(LENGTHS), 4, 9, seed=0), Z_LOSS, ddp_backend="gloo", **options)
    run.train()
    torch.save(result(run), folder / f"result-{run.args.process_index}.pt")
    end_group()


if __name__ == "__main__":
    main()
