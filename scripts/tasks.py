"""What the scripts tasks_*.py share: models of one size, a training loop, and the report: table, plot, model card.

A report is a folder with `results.json`, `table.md`, `plot.png` and `README.md`, the model card. Its table and its
machine are what was measured in that run; nothing else is written into a card.
"""

from __future__ import annotations

import argparse
import json
import string
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flags import new_folder, number, positive
from machine import describe_machine
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForTokenClassification

from modeling_xlstm import XLSTMConfig, XLSTMForTokenClassification

TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "task_template.md"


class Recipe(NamedTuple):
    """How one model of a comparison is trained; `steps` and `batch` are the same for all models of a task."""

    steps: int
    batch: int
    learning_rate: float
    seed: int = 0


class LSTMTagger(nn.Module):
    """nn.LSTM between an embedding and a linear head: ids [B, T] -> logits [B, T, labels]."""

    def __init__(self, vocab_size: int, labels: int, width: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, labels)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0])


class Logits(nn.Module):
    """A Transformers model as a function of ids alone: ids [B, T] -> logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def build_tagger(kind: str, vocab_size: int, labels: int, width: int, layers: int, **fields: Any) -> nn.Module:
    """A model that labels every token: "xlstm", "mlstm", "slstm", "lstm" or "transformer"; `fields` are the xLSTM's."""
    if kind == "lstm":
        return LSTMTagger(vocab_size, labels, width, layers)
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_labels": labels,
    }
    if kind == "transformer":
        config = LlamaConfig(
            **sizes, bos_token_id=None, eos_token_id=None, intermediate_size=2 * width, num_attention_heads=4
        )
        return Logits(LlamaForTokenClassification(config))
    variant: Any = {"xlstm": "mixed"}.get(kind, kind)
    # One sLSTM head: every channel sees every other, as in nn.LSTM; with four, S3 was not learnt in the same time.
    fields = {"block_style": "residual", "num_heads": 4, "slstm_num_heads": 1, **fields}
    return Logits(XLSTMForTokenClassification(XLSTMConfig(**sizes, variant=variant, **fields)))


def train(model: nn.Module, loss_of_step: Callable[[nn.Module, int], Tensor], recipe: Recipe) -> float:
    """AdamW with a warm-up and a linear decay, gradients clipped to 1; returns the CPU seconds it took.

    Args:
        model: what is trained, in place.
        loss_of_step: (model, step) -> the loss of a batch drawn for that step.
        recipe: its steps and its learning rate.
    """
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1, anneal_strategy="linear"
    )
    start = time.process_time()
    model.train()
    for step in range(recipe.steps):
        loss = loss_of_step(model, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return time.process_time() - start


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class Report:
    """Rows of measurements, and the files made of them.

    Args:
        title: what was asked.
        folder: where the files go.
        about: facts of the card: `summary`, `data`, `training`, `limits`.
    """

    def __init__(self, title: str, folder: Path, about: Mapping[str, str]):
        self.title, self.folder, self.about = title, folder, dict(about)
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        """Take a row and show it."""
        self.rows.append(row)
        print("  ".join(f"{name} {_text(value)}" for name, value in row.items()), flush=True)

    def table(self) -> str:
        """The rows in Markdown."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        lines = [names, ["---"] * len(names)]
        lines += [[_text(row.get(name, "")) for name in names] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def write(self, plot: Callable[[Any], None], size: tuple[float, float] = (7.0, 4.0)) -> None:
        """Write results.json, table.md, README.md and plot.png.

        Args:
            plot: draws on the matplotlib figure it is given.
            size: of the figure, in inches.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        on = describe_machine()
        facts = {
            **self.about,
            "title": self.title,
            "table": self.table(),
            "command": on["command"],
            "machine": f"{on['cores']} {on['architecture']} CPU cores, torch threads: {on['threads']}",
            "versions": ", ".join(f"{name} {version}" for name, version in on["versions"].items()),
            "date": on["date"],
        }
        (self.folder / "results.json").write_text(json.dumps({**facts, "rows": self.rows}, indent=1), "utf-8")
        (self.folder / "table.md").write_text(facts["table"], "utf-8")
        (self.folder / "README.md").write_text(string.Template(TEMPLATE.read_text("utf-8")).substitute(facts), "utf-8")
        draw(plot, size, self.folder / "plot.png")
        print(f"{self.folder}: results.json, table.md, plot.png, README.md")


def draw(plot: Callable[[Any], None], size: tuple[float, float], path: Path) -> None:
    """Draw a figure into a file; without matplotlib, say how to get it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit(f'{error}. The plots need matplotlib: pip install -e ".[tasks]"') from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    plot(figure)
    figure.savefig(path, dpi=150)


def line(i: int) -> dict[str, Any]:
    """How the i-th model of a plot is drawn: all can be seen where they lie on each other."""
    return {"marker": "osD^"[i % 4], "markersize": 11 - 2.5 * (i % 4), "linewidth": 3 - 0.7 * (i % 4)}


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def arguments(
    description: str | None, name: str, models: Sequence[str], tasks: Sequence[str] = ()
) -> argparse.Namespace:
    """The options all task scripts take."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--out", type=new_folder, default=Path("out") / name, help="default: %(default)s")
    parser.add_argument("--steps", type=positive, help="training steps of every model; default: the task's own")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="default: %(default)s")
    parser.add_argument("--models", nargs="+", default=list(models), choices=models, help="default: all")
    if tasks:
        parser.add_argument("--tasks", nargs="+", default=list(tasks), choices=tasks, help="default: all")
    return parser.parse_args()
