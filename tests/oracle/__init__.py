"""What the official packages computed: small models with random weights, and single mLSTM cells.

Made with `xlstm` 2.0.6 and `mlstm_kernels` 2.0.6 in float64. Each folder is one model: `config.json` holds the family
and the official configuration, `model.safetensors` the official state dict, and `io.safetensors` the token ids
`ids_S{7,64,100}`, `logits64_S{7,100}`, `loss64` and `grad.<official name>` of the mean cross entropy of ids_S64, and
`state.*` after the tokens of ids_S7, one by one. `cells.*` are mLSTM cells, [B, H, T, .].
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent
CASES = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
CELLS: dict[str, dict[str, Any]] = json.loads((FOLDER / "cells.json").read_text("utf-8"))


class Case(NamedTuple):
    """One official model. Shared by all tests, which must not change it."""

    family: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    io: dict[str, Tensor]

    @property
    def weight_mode(self) -> str:
        return self.config.get("weight_mode", "single")

    def gradients(self) -> dict[str, Tensor]:
        """The official gradients, by official name."""
        return {name.removeprefix("grad."): x for name, x in self.io.items() if name.startswith("grad.")}


@functools.cache
def load_case(name: str) -> Case:
    described = json.loads((FOLDER / name / "config.json").read_text("utf-8"))
    tensors = [load_file(FOLDER / name / f"{kind}.safetensors") for kind in ("model", "io")]
    return Case(described["family"], described["config"], *tensors)


@functools.cache
def load_cells() -> dict[str, Tensor]:
    return load_file(FOLDER / "cells.safetensors")
