"""Recurrent states in a safetensors file: the memory of a prompt, to be continued elsewhere or later.

The file says which model it belongs to: the fields of the configuration that give a state its shape and meaning. A
file that is damaged, foreign or of another model raises before anything of it is used. Numbers are checked by their
checksum; files of earlier versions hold none, and load without.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .configuration_xlstm import XLSTMConfig
from .states_xlstm import LayerState, MLSTMState, SLSTMState, named_tensors

FORMAT = "xlstm-states-1"
# What gives a state its shape and its meaning; steering of speed, training and vocabulary is left out.
FIELDS = (
    "block_style", "block_types", "hidden_size", "num_heads", "slstm_num_heads", "head_dim", "qk_dim_factor",
    "v_dim_factor", "proj_factor", "proj_round_up_to_multiple_of", "proj_rounding", "qkv_proj_blocksize",
    "conv_kernel_size", "slstm_conv_kernel_size", "ffn_proj_factor", "ffn_round_up_to_multiple_of", "ffn_rounding",
    "hidden_act", "norm_eps", "normalizer_eps", "gate_soft_cap", "input_gate", "state_dtype",
)  # fmt: skip


def fingerprint(config: XLSTMConfig) -> dict[str, Any]:
    """The fields a state depends on."""
    return {name: getattr(config, name) for name in FIELDS}


def check_same_model(made_by: Mapping[str, Any], used_by: Mapping[str, Any]) -> None:
    """Raise ValueError, with the fields, if states made by one model cannot be used by another."""
    different = [f"{name}: {made_by[name]} and {used_by[name]}" for name in FIELDS if made_by[name] != used_by[name]]
    if different:
        raise ValueError(
            f"States must come from a model like the one that uses them; they differ in {'; '.join(different)}. "
            "Run the prompt through this model and save its states."
        )


def state_shapes(model: Mapping[str, Any], block_type: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of one layer's state, without the batch, for a model given by its fingerprint."""
    config = XLSTMConfig(**{**model, "num_hidden_layers": len(model["block_types"])})
    if block_type == "mlstm":
        H, window, width = config.num_heads, config.conv_kernel_size, config.inner_size
        K, V = config.qk_size // H, config.v_size // H
        shapes: dict[str, tuple[int, ...]] = {"C": (H, K, V), "n": (H, K), "m": (H,)}
    else:
        assert config.slstm_num_heads is not None
        H, window, width = config.slstm_num_heads, config.slstm_conv_kernel_size, config.hidden_size
        shapes = dict.fromkeys(SLSTMState._fields, (H, width // H))
    return {**shapes, "conv": (window - 1, width)} if window else shapes


def write_states(
    path: str | os.PathLike[str], states: Sequence[LayerState], tokens: int, model: dict[str, Any]
) -> None:
    """Write the states of all layers, on the CPU, detached, in their own dtypes.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a state holds some of the model's heads only.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"States are saved into a folder that exists; there is none at {folder}. Make it first."
        )
    tensors = {}
    for i, state in enumerate(states):
        named = named_tensors(state)
        wanted = state_shapes(model, model["block_types"][i])
        if {name: tuple(x.shape[1:]) for name, x in named.items()} != wanted:
            raise ValueError(
                f"The states of layer {i} must hold all its heads, {wanted['m'][0]}; got {state.cell.m.shape[1]}, of a "
                "model cut over processes. Read the text with the whole model to save its states."
            )
        tensors.update({f"{i}.{name}": x.detach().cpu().contiguous() for name, x in named.items()})
    metadata = {"format": FORMAT, "tokens_seen": str(tokens), "model": json.dumps(model)}
    save_file(tensors, path, {**metadata, "crc32": _checksum(tensors, metadata)})


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of all tensors in the order of their names, and of what the header says of them."""
    crc = zlib.crc32((metadata["tokens_seen"] + metadata["model"]).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy().data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def read_states(path: str | os.PathLike[str]) -> tuple[list[LayerState], int, dict[str, Any]]:
    """Read what `write_states` wrote.

    Returns:
        states: one per layer, on the CPU.
        tokens: columns of input they have seen.
        model: fingerprint of the model they belong to.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or was not written by `write_states`, or a tensor has another name, shape or
            dtype than the model in its header asks for, holds no rows, or is not finite.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"No file of states at {os.fspath(path)}. XLSTMCache.save writes one.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # What safetensors gives may be the file itself, mapped: it would change, or end, with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{os.fspath(path)} is no safetensors file, or a damaged one: {error}. Save it again."
        ) from error
    try:
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format must be {FORMAT!r}; got {metadata.get('format')!r}")
        tokens, model = int(metadata["tokens_seen"]), json.loads(metadata["model"])
        if set(model) != set(FIELDS) or tokens < 0:
            raise ValueError("its header does not describe a model and a number of tokens")
        states = _states(tensors, model)
        if metadata.get("crc32", checksum := _checksum(tensors, metadata)) != checksum:
            raise ValueError(f"its checksum is {checksum} and was {metadata['crc32']} when it was saved")
        return states, tokens, model
    # A header can hold anything: whatever its fields make the configuration raise is a fault of the file.
    except Exception as error:
        raise ValueError(f"{os.fspath(path)} cannot be read as states: {error}. Nothing was loaded.") from error


def _states(tensors: dict[str, Tensor], model: dict[str, Any]) -> list[LayerState]:
    """Check every tensor against the model and put the layers together."""
    wanted = {
        f"{i}.{name}": shape
        for i, block_type in enumerate(model["block_types"])
        for name, shape in state_shapes(model, block_type).items()
    }
    if tensors.keys() != wanted.keys():
        raise ValueError(f"tensors missing or too many: {sorted(tensors.keys() ^ wanted.keys())}")
    B = next(iter(tensors.values())).shape[:1]
    if B == (0,):
        raise ValueError("its states have no rows")
    for name, x in tensors.items():
        if x.shape != (*B, *wanted[name]):
            raise ValueError(f"`{name}` must be {[*B, *wanted[name]]}; got {list(x.shape)}")
        exact = torch.float32, torch.float64
        if not x.is_floating_point() or (not name.endswith(".conv") and x.dtype not in exact):
            raise ValueError(f"`{name}` must be float32 or float64; got {x.dtype}")
        if not x.isfinite().all():
            raise ValueError(f"`{name}` holds values that are not finite")
    states = []
    for i, block_type in enumerate(model["block_types"]):
        kind = MLSTMState if block_type == "mlstm" else SLSTMState
        cell: Any = kind(*(tensors[f"{i}.{name}"] for name in kind._fields))
        states.append(LayerState(cell, tensors.get(f"{i}.conv")))
    return states
