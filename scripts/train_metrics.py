"""What scripts/train.py logs beside what Trainer logs: speed, memory, gates, and what is held out in bits per byte."""

from __future__ import annotations

import math
import resource
import sys
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from modeling_xlstm.costs_xlstm import known_peak_flops, measured_peak_flops
from modeling_xlstm.gates_xlstm import GateStatistics
from modeling_xlstm.training_xlstm import CarriedStateTrainer, XLSTMTrainer

# Of what is logged of the held-out text, beside the loss.
LESS_IS_BETTER = ("nats", "nats_per_token", "bits_per_byte")


class Costs(NamedTuple):
    """What a token costs in training, and how many operations one device can do in a second; None if unknown."""

    flops_per_token: int
    peak: float | None


class Run(XLSTMTrainer):
    """Logs speed and perplexity beside what Trainer logs, and bits per byte of what is held out."""

    held_out_bytes = 0
    costs = Costs(0, None)
    gates: GateStatistics | None = None
    started: tuple[float, float] | None = None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As in Trainer, but all rows: those that training drops are part of what bits per byte are of."""
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropped

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in Trainer; the gates are watched in steps that are logged."""
        if self.gates is None or not self._logs_next():
            return super().training_step(model, inputs, num_items_in_batch)
        with self.gates.watching(model):
            return super().training_step(model, inputs, num_items_in_batch)

    def _logs_next(self) -> bool:
        step = self.state.global_step + 1
        return step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["perplexity"] = math.exp(min(logs["loss"], 100.0))
            logs["peak_memory_mb"] = round(peak_memory(self.args.device) / 2**20, 1)
            logs.update({} if self.gates is None else self.gates.take())
            self._log_speed(logs)
        if "eval_nats" in logs:
            self.started = None  # what an evaluation takes is no time of training
            logs["eval_nats_per_token"] = logs["eval_nats"] / logs["eval_predicted_tokens"]
            logs["eval_bits_per_byte"] = logs["eval_nats"] / math.log(2) / self.held_out_bytes
        super().log(logs, start_time)

    def _log_speed(self, logs: dict[str, float]) -> None:
        now, seen = time.perf_counter(), float(self.state.num_input_tokens_seen)
        if self.started is not None:
            speed = (seen - self.started[1]) / (now - self.started[0])
            logs["tokens_per_second"] = round(speed, 1)
            if self.costs.peak is not None:
                logs["mfu"] = speed * self.costs.flops_per_token / (self.costs.peak * self.args.world_size)
        self.started = now, seen


class CarriedRun(Run, CarriedStateTrainer):
    """The same, with states carried from step to step."""


def peak_flops_of(settings: TrainingArguments) -> float | None:
    """Operations a second of the device at the precision of this run: from a table, or measured on a CPU."""
    half = settings.bf16 or settings.fp16
    if settings.device.type == "cuda":
        precision = "half" if half else "tf32" if settings.tf32 else "float32"
        return known_peak_flops(torch.cuda.get_device_name(), precision)
    return measured_peak_flops(torch.bfloat16 if half else torch.float32) if settings.device.type == "cpu" else None


def peak_memory(device: torch.device) -> int:
    """Most bytes at any time so far: of tensors on a GPU, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
