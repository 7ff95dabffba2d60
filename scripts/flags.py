"""Numbers within bounds, for argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


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
