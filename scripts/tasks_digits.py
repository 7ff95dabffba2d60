"""Classification of real sequences: scikit-learn's handwritten digits, read pixel by pixel.

Minutes on 2 CPU cores; needs scikit-learn (pip install -e ".[tasks]"):

    python scripts/tasks_digits.py

Each 8 x 8 image is a series of 64 grey values. nn.LSTM is as wide as it takes to have at least as many parameters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tasks import Recipe, Report, arguments, count_parameters, train
from torch import Tensor, nn

from modeling_xlstm import XLSTMConfig, XLSTMForSequenceClassification

CLASSES = 10
WIDTH, LAYERS = 48, 2
RECIPE = Recipe(600, 64, 5e-3)
HELD_OUT = 450
MODELS = ["xlstm", "mlstm", "lstm"]


class XLSTMClassifier(nn.Module):
    """Series [B, T] -> logits [B, classes] by an xLSTM of the residual style, from its last frame."""

    def __init__(self, variant: Any):
        super().__init__()
        fields: dict[str, Any] = {"num_labels": CLASSES, "num_heads": 4, "block_style": "residual", "variant": variant}
        config = XLSTMConfig(input_size=1, hidden_size=WIDTH, num_hidden_layers=LAYERS, **fields)
        self.model = XLSTMForSequenceClassification(config)

    def forward(self, series: Tensor) -> Tensor:
        return self.model(input_features=series[..., None]).logits


class LSTMClassifier(nn.Module):
    """The same by nn.LSTM."""

    def __init__(self, width: int):
        super().__init__()
        self.lstm = nn.LSTM(1, width, LAYERS, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, series: Tensor) -> Tensor:
        return self.head(self.lstm(series[..., None])[0][:, -1])


def build(kind: str, seed: int) -> nn.Module:
    """One of `MODELS`; nn.LSTM in the smallest width that has the parameters of "xlstm"."""
    torch.manual_seed(seed)
    if kind != "lstm":
        return XLSTMClassifier({"xlstm": "mixed"}.get(kind, kind))
    wanted = count_parameters(XLSTMClassifier("mixed"))
    width = next(width for width in range(WIDTH, 1000) if count_parameters(LSTMClassifier(width)) >= wanted)
    torch.manual_seed(seed)
    return LSTMClassifier(width)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Series in [-1, 1] and classes to train on, and those held out, the same for every seed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit(f'{error}. The digits come with scikit-learn: pip install -e ".[tasks]"') from None
    images, classes = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = (images[order] / 8 - 1).float(), classes[order]
    return x[HELD_OUT:], y[HELD_OUT:], x[:HELD_OUT], y[:HELD_OUT]


def measure(kind: str, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Train one model and judge it on the digits held out."""
    recipe = RECIPE._replace(steps=steps or RECIPE.steps, seed=seed)
    x, y, held_out, classes = digits()
    model = build(kind, seed)
    generator = torch.Generator().manual_seed(seed)

    def loss_of_step(model: nn.Module, step: int) -> Tensor:
        index = torch.randint(len(x), (recipe.batch,), generator=generator)
        return F.cross_entropy(model(x[index]), y[index])

    seconds = train(model, loss_of_step, recipe)
    with torch.no_grad():
        accuracy = (model(held_out).argmax(1) == classes).double().mean().item()
        fitted = (model(x).argmax(1) == y).double().mean().item()
    row = {"model": kind, "parameters": count_parameters(model), "CPU seconds": seconds}
    return {**row, "trained on": fitted, "held out": accuracy}


def main() -> None:
    options = arguments(__doc__, "digits", MODELS)
    report = Report("Handwritten digits as pixel sequences", options.out, ABOUT)
    for kind in options.models:
        report.add(**measure(kind, options.seed, options.steps))

    def plot(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.bar([row["model"] for row in report.rows], [1 - row["held out"] for row in report.rows])
        axes.set(ylabel="error on digits held out")

    report.write(plot, (4.5, 3.2))


ABOUT = {
    "summary": "Ten classes from 64 grey values read one after the other.",
    "data": f"scikit-learn's `load_digits`, 1,797 images of 8 x 8; {HELD_OUT} of them, chosen once, held out.",
    "training": "Two layers, 64 images a step, the same optimiser and steps for all; width 48 for the xLSTMs (residual "
    "style, 4 heads), nn.LSTM wider, so that it has as many parameters as xlstm.",
    "limits": "One seed; no augmentation, no tuning for each model; one digit held out is 0.0022.",
}

if __name__ == "__main__":
    main()
