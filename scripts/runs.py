"""What the scripts that train share: flags, progress bar, last checkpoint, loss curve, the end of a process."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from flags import WrongInput
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from transformers import AutoTokenizer, HfArgumentParser, ProgressCallback, TrainerState, TrainingArguments
from transformers.utils import find_adapter_config_file

LETTING_GO = 0.2  # seconds, a hundred times what a thread needs to drop a tensor


class LossBar(ProgressCallback):
    """Transformers' progress bar with the loss in it, instead of a line per log entry."""

    training_bar: Any
    prediction_bar: Any

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if self.training_bar is not None:
            self.training_bar.set_description("Training")
            self.training_bar.initial = self.training_bar.n = state.global_step

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description("Held out")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A docstring as it stands, and the default of every flag."""


def flag_parser(first: str, about: str | None, kinds: Sequence[Any]) -> HfArgumentParser:
    """Flags of dataclasses; `first` is how usage names the word before them."""
    usage = f"%(prog)s {first} [--flag value ...]"
    return HfArgumentParser(kinds, usage=usage, description=about, formatter_class=Help, allow_abbrev=False)


def parse_flags(parser: HfArgumentParser, words: Sequence[str]) -> tuple[Any, ...]:
    """The dataclasses of a command line; raise WrongInput for what no flag is, or not allowed together."""
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(list(words), return_remaining_strings=True)
    except ValueError as error:
        raise WrongInput(str(error)) from error
    if unknown:
        raise WrongInput(f"`{unknown[0]}` is no flag; --help lists them. A file of flags comes first.")
    return tuple(parsed)


def check_numbers(settings: TrainingArguments) -> None:
    """Raise WrongInput for what Trainer would stumble over later."""
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    for name, least in (*((size, 1) for size in sizes), ("learning_rate", 0)):
        value = getattr(settings, name)
        if not value >= least:
            raise WrongInput(f"`--{name}` must be at least {least}; got {value}.")
    words = settings.optim_args.split(",") if settings.optim_args else []
    if not all(word.count("=") == 1 for word in words):
        raise WrongInput(f"`--optim_args` must be `name=value,name=value`; got {settings.optim_args}.")


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Where a trainer is made: what it refuses of flags and rows is for the caller to mend."""
    try:
        yield
    except (ImportError, RuntimeError, TemplateError, TypeError, ValueError) as error:
        raise WrongInput(f"These flags and rows cannot be followed: {error}") from error


def check_resumed(chosen: str | None, without: str) -> None:
    """Raise WrongInput if `--resume_from_checkpoint` names no checkpoint; `without` says what happens if none is."""
    if chosen is not None and not (Path(chosen) / "trainer_state.json").is_file():
        raise WrongInput(
            f"`--resume_from_checkpoint` must name a folder that a training wrote, such as OUT/checkpoint-100; got "
            f"{chosen}. Without it {without}."
        )


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], may_grow: Sequence[str] = (), unsaid: Sequence[str] = ()
) -> list[str]:
    """What of a run's description has changed; of some only that it has, and some may be more than before."""
    found = []
    for name, value in now.items():
        old = before.get(name)
        is_more = name in may_grow and old is not None and value > old
        if value != old and not is_more:
            found.append(f"another {name}" if name in unsaid else f"{name}: {old}, now {value}")
    return found


def load(word: str, auto_class: Any, name: str, **options: Any) -> Any:
    """A checkpoint's model or tokenizer; `word` is how the caller names it.

    Raises:
        WrongInput: there is none, or the model is an adapter: Transformers would load it over its own model, where one
            method of tuning throws it away and the next finds nothing to train.
    """
    try:
        is_adapter = auto_class is not AutoTokenizer and find_adapter_config_file(name) is not None
        loaded = None if is_adapter else auto_class.from_pretrained(name, trust_remote_code=True, **options)
    except (OSError, StrictDataclassError, ValueError) as error:
        raise WrongInput(f"{word} must name a checkpoint's folder, or one of the Hub; {name}: {error}") from error
    if is_adapter:
        raise WrongInput(
            f"{word} must name a model; {name} holds an adapter of one. Merge it into its model first, as "
            "docs/training.md shows, or give the model's folder."
        )
    return loaded


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints(folder: Path) -> list[Path]:
    """The last first, written to their ends or not."""
    numbered = (path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit())
    return sorted(numbered, key=step_of, reverse=True)


def is_whole(checkpoint: Path) -> bool:
    """Whether it was written to its end."""
    try:
        # Trainer writes this file last.
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    return next(filter(is_whole, checkpoints(folder)), None)


def delete_unfinished(folder: Path) -> None:
    """Delete the checkpoints after that; Trainer would take them for the newest, and delete whole ones first."""
    for checkpoint in itertools.takewhile(lambda x: not is_whole(x), checkpoints(folder)):
        print(f"Deleted    {checkpoint}, which was not written to its end")
        shutil.rmtree(checkpoint)


def silent(*words: object) -> None:
    """What all processes but the first print."""


def draw_losses(log_history: list[dict[str, Any]], path: Path) -> None:
    """The curve of the losses, in nats per token over optimizer steps, as a picture."""
    # Imported here, for it is an extra, and slow.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for name, label in (("loss", "training"), ("eval_nats_per_token", "held out")):
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else None)
    axes.set(xlabel="optimizer step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def end_group() -> None:
    """Leave the process group of a launched run, if there is one; the last that a process does.

    Gloo's threads drop the tensors of their last work after it is done, and need the interpreter for that: where it has
    ended by then, they abort the process, and a finished run fails. To destroy the group ends them only if nothing else
    holds it, and DTensor's caches do.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(LETTING_GO)
