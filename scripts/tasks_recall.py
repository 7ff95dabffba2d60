"""Associative recall: read pairs of a key and a value, then name the value of every key that is asked again.

Minutes on 2 CPU cores:

    python scripts/tasks_recall.py

Multi-query associative recall: a row holds pairs of a key and its value, keys drawn without repetition, and then the
keys in another order; each of them is to be answered with its value. Width and number of layers are the same for all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tasks import Recipe, Report, arguments, build_tagger, count_parameters, line, train
from torch import Tensor, nn

KEYS, VALUES = 64, 64
PAIRS = [4, 8, 16, 32]
TRAINED_UP_TO = 16
WIDTH = 32
ROWS = 512  # for each accuracy
RECIPE = Recipe(1200, 64, 5e-3)
MODELS = ["mlstm", "lstm", "xlstm", "transformer"]
LEARNING_RATES = {"transformer": 2e-3}


def rows(count: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids [count, 3 * pairs]: key, value, key, value, ..., then the keys; and the values to answer, [count, pairs]."""
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(VALUES, (count, pairs), generator=generator)
    order = torch.rand(count, pairs, generator=generator).argsort(1)
    told = torch.stack([keys, KEYS + values], 2).flatten(1)
    return torch.cat([told, keys.gather(1, order)], 1), values.gather(1, order)


def build(kind: str, seed: int) -> nn.Module:
    """One of `MODELS`: two layers; the xLSTM's are the paper's blocks, whose convolution lets a value meet its key."""
    torch.manual_seed(seed)
    return build_tagger(kind, KEYS + VALUES, VALUES, WIDTH, 2, block_style="neurips")


def fit(model: nn.Module, recipe: Recipe) -> float:
    """Train on 1 to 16 pairs; returns CPU seconds."""
    generator = torch.Generator().manual_seed(recipe.seed)

    def loss_of_step(model: nn.Module, step: int) -> Tensor:
        pairs = int(torch.randint(1, TRAINED_UP_TO + 1, (), generator=generator))
        ids, values = rows(recipe.batch, pairs, generator)
        return F.cross_entropy(model(ids)[:, -pairs:].flatten(0, 1), values.flatten())

    return train(model, loss_of_step, recipe)


@torch.no_grad()
def accuracy(model: nn.Module, pairs: int) -> float:
    """How often a key is answered with its value, over fresh rows."""
    ids, values = rows(ROWS, pairs, torch.Generator().manual_seed(pairs))
    named = torch.cat([model(part)[:, -pairs:].argmax(-1) for part in ids.split(64)])
    return (named == values).double().mean().item()


def measure(kind: str, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Train one model and judge it with every number of pairs."""
    recipe = RECIPE._replace(steps=steps or RECIPE.steps, seed=seed)
    recipe = recipe._replace(learning_rate=LEARNING_RATES.get(kind, recipe.learning_rate))
    model = build(kind, seed)
    seconds = fit(model, recipe)
    accuracies = {f"{pairs} pairs": accuracy(model, pairs) for pairs in PAIRS}
    return {"model": kind, "parameters": count_parameters(model), "CPU seconds": seconds, **accuracies}


def main() -> None:
    options = arguments(__doc__, "recall", MODELS)
    report = Report("Associative recall", options.out, ABOUT)
    for kind in options.models:
        report.add(**measure(kind, options.seed, options.steps))

    report.write(lambda figure: draw(figure, report.rows), (5.5, 3.6))


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Accuracy over the number of pairs."""
    axes = figure.add_subplot()
    for i, row in enumerate(rows):
        axes.plot(PAIRS, [row[f"{pairs} pairs"] for pairs in PAIRS], **line(i), label=row["model"])
    axes.axhline(1 / VALUES, color="grey", linestyle=":", label="chance")
    axes.axvline(TRAINED_UP_TO, color="grey", linewidth=0.8)
    axes.set(xlabel="pairs to remember", ylabel="answers that are right", xscale="log", ylim=(-0.03, 1.05))
    axes.set_xticks(PAIRS, [str(pairs) for pairs in PAIRS])
    axes.minorticks_off()
    axes.legend()


ABOUT = {
    "summary": "How many pairs of a key and a value each model can hold and give back.",
    "data": f"Random rows, drawn afresh for every step: {KEYS} keys, {VALUES} values.",
    "training": f"1 to {TRAINED_UP_TO} pairs, 64 rows a step, loss on the answers only. Two layers of width {WIDTH}: "
    "mlstm is two mLSTM blocks of the paper, xlstm an sLSTM and an mLSTM block, lstm is nn.LSTM, transformer Llama's.",
    "limits": "One seed, one recipe; equal width, so the mLSTM has the larger state, a matrix for each head.",
}

if __name__ == "__main__":
    main()
