"""Between a command line and a script: numbers, files, folders for argparse; errors in a line; stdout and JSON."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

# What a configuration raises whose fields make no model.
NO_CONFIG = (StrictDataclassError, TypeError, ValueError)


class WrongInput(ValueError):
    """The caller can mend it: shown as a message, without a traceback."""


def take_any_text() -> None:
    """Have stdout be UTF-8 where it is no terminal, and a terminal show `?` for letters that it has not."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="replace")


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """What reads an `int` or a `float` from `low` to `high`."""

    def read(word: str) -> Any:
        try:
            value = kind(word)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            bounds = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {what} {bounds}; got {word}")
        return value

    return read


positive = number(int, 1)


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder that a flag names, and those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WrongInput(f"`{flag}` must name a folder that can be made: {error}. Choose another.") from error


def checkpoint(word: str) -> Path:
    """The folder of a checkpoint."""
    path = Path(word)
    if not (path / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"must name a checkpoint's folder; {word} holds no config.json")
    return path


def new_file(word: str) -> Path:
    """A file to write, in a folder that exists."""
    if (path := Path(word)).is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must name a file in a folder that exists; got {word}")
    return path


def write_json(path: Path | None, result: Any) -> None:
    """Write a result into the file of `--json`, if that was given."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def new_folder(word: str) -> Path:
    """A folder to write, which need not exist yet."""
    if (path := Path(word)).exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"must name a folder; {word} is a file")
    return path
