"""State tracking: train on words of at most 40 tokens, then follow the state through words of 256 and beyond.

Minutes on 2 CPU cores for each task; --tasks and --models choose:

    python scripts/tasks_state_tracking.py --tasks parity
    python scripts/tasks_state_tracking.py

Every task is an automaton that starts in state 0, moves with each token, and is to be named after each of them: parity
of ones; arithmetic modulo 5, where a token is an operation (+, -, *) with a digit; and word problems of two groups,
where a token is an element to multiply with: any of S3, and of A5 the identity, a cycle of five and one of three, which
generate it. Accuracy is that of the state after the last token of words drawn at random; chance is 1 / states.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tasks import Recipe, Report, arguments, build_tagger, count_parameters, line, train
from torch import Tensor, nn

TRAINED_UP_TO = 40
LENGTHS = [20, 40, 80, 128, 256, 512]
WORDS = 512  # of each length, for the accuracies


class Task(NamedTuple):
    """An automaton and what solves it.

    Attributes:
        moves: next state of each state (row) and token (column), [states, tokens].
        width: of every model.
        recipe: of every model, but for learning rates that `LEARNING_RATES` sets.
    """

    moves: Tensor
    width: int
    recipe: Recipe


def group(degree: int, even: bool) -> Tensor:
    """Multiplication table of the permutations of `degree` things, or of the even ones, the identity first."""
    permutations = [p for p in itertools.permutations(range(degree)) if not even or _is_even(p)]
    index = {p: i for i, p in enumerate(permutations)}
    return torch.tensor([[index[tuple(p[i] for i in q)] for q in permutations] for p in permutations])


def _is_even(p: tuple[int, ...]) -> bool:
    return sum(p[i] > p[j] for i, j in itertools.combinations(range(len(p)), 2)) % 2 == 0


def arithmetic(modulus: int) -> Tensor:
    """The states of a calculator: + d, - d, * d for every digit d."""
    states = torch.arange(modulus)[:, None]
    digits = torch.arange(modulus)
    return torch.cat([states + digits, states - digits, states * digits], 1) % modulus


EVEN = [p for p in itertools.permutations(range(5)) if _is_even(p)]
A5_GENERATORS = [EVEN.index(p) for p in ((0, 1, 2, 3, 4), (1, 2, 3, 4, 0), (1, 2, 0, 3, 4))]
TASKS = {
    "parity": Task(torch.tensor([[0, 1], [1, 0]]), 32, Recipe(500, 64, 1e-2)),
    "mod5": Task(arithmetic(5), 64, Recipe(600, 64, 1e-2)),
    "s3": Task(group(3, even=False), 64, Recipe(600, 64, 1e-2)),
    "a5": Task(group(5, even=True)[:, A5_GENERATORS], 64, Recipe(2500, 64, 1e-2)),
}
MODELS = ["xlstm", "mlstm", "lstm", "transformer"]
# A Transformer of this depth diverges at the recurrent models' rate.
LEARNING_RATES = {"transformer": 2e-3}


def words(task: Task, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random words and the state after each of their tokens: [count, length] twice."""
    tokens = task.moves.shape[1]
    ids = torch.randint(tokens, (count, length), generator=generator)
    state, after = torch.zeros(count, dtype=torch.long), []
    for t in range(length):
        state = task.moves[state, ids[:, t]]
        after.append(state)
    return ids, torch.stack(after, 1)


def build(kind: str, task: Task, seed: int) -> nn.Module:
    """One of `MODELS` for a task: two layers of the task's width."""
    torch.manual_seed(seed)
    states, tokens = task.moves.shape
    return build_tagger(kind, tokens, states, task.width, 2)


def fit(model: nn.Module, task: Task, recipe: Recipe) -> float:
    """Train on words of 3 to 40 tokens; returns CPU seconds."""
    generator = torch.Generator().manual_seed(recipe.seed)

    def loss_of_step(model: nn.Module, step: int) -> Tensor:
        length = int(torch.randint(3, TRAINED_UP_TO + 1, (), generator=generator))
        ids, states = words(task, recipe.batch, length, generator)
        return F.cross_entropy(model(ids).flatten(0, 1), states.flatten())

    return train(model, loss_of_step, recipe)


@torch.no_grad()
def accuracy(model: nn.Module, task: Task, length: int) -> float:
    """How often the state after the last token is named rightly, over fresh words."""
    ids, states = words(task, WORDS, length, torch.Generator().manual_seed(length))
    named = torch.cat([model(part)[:, -1].argmax(-1) for part in ids.split(64)])
    return (named == states[:, -1]).double().mean().item()


def measure(kind: str, task: Task, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Train one model and judge it at every length."""
    recipe = task.recipe._replace(seed=seed, learning_rate=LEARNING_RATES.get(kind, task.recipe.learning_rate))
    recipe = recipe._replace(steps=steps or recipe.steps)
    model = build(kind, task, seed)
    seconds = fit(model, task, recipe)
    accuracies = {str(length): accuracy(model, task, length) for length in LENGTHS}
    return {"model": kind, "parameters": count_parameters(model), "CPU seconds": seconds, **accuracies}


def main() -> None:
    options = arguments(__doc__, "state_tracking", MODELS, list(TASKS))
    report = Report("State tracking", options.out, ABOUT)
    for name, kind in itertools.product(options.tasks, options.models):
        report.add(task=name, **measure(kind, TASKS[name], options.seed, options.steps))

    report.write(lambda figure: draw(figure, report.rows), (3.2 * len(options.tasks) + 1.5, 3.4))


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Accuracy over length, one panel for each task."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    for i, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1)
        for j, row in enumerate(row for row in rows if row["task"] == name):
            accuracies = [row[str(length)] for length in LENGTHS]
            axes.plot(LENGTHS, accuracies, **line(j), label=row["model"])
        axes.axhline(1 / len(TASKS[name].moves), color="grey", linestyle=":", label="chance")
        axes.axvline(TRAINED_UP_TO, color="grey", linewidth=0.8)
        axes.set(title=name, xlabel="length of the word", xscale="log", ylim=(-0.03, 1.05))
        axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
        axes.minorticks_off()
    figure.axes[0].set_ylabel("accuracy of the last state")
    figure.axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


ABOUT = {
    "summary": "Which models follow the state of an automaton past the lengths they were trained on.",
    "data": "Random words, drawn afresh for every step; tables of the automata are in the script.",
    "training": f"Words of 3 to {TRAINED_UP_TO} tokens, 64 a step, a label after every token. Two layers, of one width "
    "for each task; xlstm is one sLSTM block (a single head) and one mLSTM block of the residual style, mlstm two "
    "mLSTM blocks, lstm is nn.LSTM, transformer is Llama's with rotary positions.",
    "limits": "One seed, one recipe for each task: a model that fails here may be trainable in another way.",
}

if __name__ == "__main__":
    main()
