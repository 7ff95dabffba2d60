"""Weights of a folder, read a few tensors at a time, and weights written shard by shard: neither need fit in memory."""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
PICKLED = (".pt", ".pth", ".bin")
# What trainings leave beside the weights, in files of the same endings.
NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "sampler", "rng_state")


class Stored(NamedTuple):
    """One tensor of a folder."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def find_weights(folder: Path) -> dict[str, Stored]:
    """What a folder holds: its safetensors files, or, without any, its pickled state dicts.

    Raises:
        ValueError: there are none, two files hold one name, or one is damaged or holds other things than weights.
    """
    pickled = (x for end in PICKLED for x in folder.glob(f"*{end}") if not x.name.startswith(NO_WEIGHTS))
    files = sorted(folder.glob("*.safetensors")) or sorted(pickled)
    found: dict[str, Stored] = {}
    for file in files:
        for name, shape, dtype in _list(file):
            if name in found:
                raise ValueError(f"`{name}` is in {found[name].file} and in {file}. Keep the files of one checkpoint.")
            if dtype not in DTYPES.values():
                raise ValueError(
                    f"`{name}` in {file} must be of one of {', '.join(DTYPES)}; got {dtype}. Store it in one of these, "
                    "or leave it out if it is no weight."
                )
            found[name] = Stored(file, shape, dtype)
    if not found:
        raise ValueError(f"{folder} must hold weights, *.safetensors or one of {', '.join(PICKLED)}; got none.")
    return found


def _list(file: Path) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    if file.suffix in PICKLED:
        for name, x in _unpickle(file).items():
            yield name, tuple(x.shape), x.dtype
        return
    try:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                part = stored.get_slice(name)
                kind = part.get_dtype()
                yield name, tuple(part.get_shape()), DTYPES.get(kind, kind)
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or a damaged one: {error}. Get it again.") from error


def _unpickle(file: Path) -> dict[str, Tensor]:
    """A state dict that stays in its file until it is read, unless it is in torch's format of before 1.6."""
    wanted = f"{file} must hold a state dict, tensors by their names"
    try:
        stored = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{wanted}; it holds something else, or is damaged. Save the `state_dict()` of the model, or get it again."
        ) from error
    if not isinstance(stored, dict):
        raise ValueError(f"{wanted}; got a {type(stored).__name__}. Save the `state_dict()` of the model.")
    if others := [name for name, x in stored.items() if not isinstance(x, Tensor)]:
        nested = [name for name in others if isinstance(stored[name], dict)]
        raise ValueError(
            f"{wanted}; `{others[0]}` is a {type(stored[others[0]]).__name__}. Save the state dict alone"
            f"{f', perhaps what is under `{nested[0]}`' if nested else ''}."
        )
    return dict(stored)


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


def read_tensors(weights: Mapping[str, Stored], names: Iterable[str]) -> dict[str, Tensor]:
    """Some of the tensors, with one file open at a time."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(weights[name].file, []).append(name)
    tensors = {}
    for file, wanted in by_file.items():
        if file.suffix in PICKLED:
            stored = _unpickle(file)
            tensors.update({name: stored[name].clone() for name in wanted})
            continue
        with safe_open(file, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in wanted})
    return tensors


class Step(NamedTuple):
    """Some tensors that come from some others: `run` makes those it `writes` of those it `reads`."""

    reads: tuple[str, ...]
    writes: Mapping[str, int]  # bytes of each
    run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def pack(steps: Iterable[Step], limit: int) -> list[list[Step]]:
    """Steps in their order, in groups that write `limit` bytes at most, or one step each."""
    groups: list[list[Step]] = []
    room = 0
    for step in steps:
        size = sum(step.writes.values())
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(step)
        room -= size
    return groups


def shard_names(count: int) -> list[str]:
    """The file names Transformers looks for."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_shard(path: Path, steps: Iterable[Step], weights: Mapping[str, Stored]) -> None:
    """Write one shard, whole or not at all: a file of this name is finished."""
    made: dict[str, Tensor] = {}
    for step in steps:
        made |= step.run(read_tensors(weights, step.reads))
    draft = path.with_suffix(".draft")
    save_file({name: x.contiguous() for name, x in made.items()}, draft, metadata={"format": "pt"})
    os.replace(draft, path)


def write_index(folder: Path, groups: list[list[Step]]) -> None:
    """The map from tensors to shards; a single shard has none."""
    names = shard_names(len(groups))
    if len(names) > 1:
        sizes = [size for group in groups for step in group for size in step.writes.values()]
        places = {x: name for name, group in zip(names, groups, strict=True) for step in group for x in step.writes}
        index: dict[str, Any] = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
