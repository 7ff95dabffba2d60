"""What a language model costs: floating point operations of a token, and how many a device can do in a second.

One count for the log of a training (MFU) and for scripts/plan.py. Counted are products of matrices, a multiply and an
add as two; norms, activations, gates and softmax are not. docs/training.md has the formulas.
"""

from __future__ import annotations

import math
import re
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .configuration_xlstm import XLSTMConfig
from .layers_xlstm import CausalConv, HeadwiseLinear, MLSTMLayer, SLSTMLayer, UpMLSTMLayer
from .modeling_xlstm import XLSTMForCausalLM
from .ops_linear import linear


class Flops(NamedTuple):
    """Operations of one token in one forward pass.

    Attributes:
        projections: every linear map of the blocks, block-diagonal ones by their blocks.
        convolutions: causal convolutions, a multiply and an add for each tap and channel.
        cells: mLSTM in its chunkwise form with whole score matrices, sLSTM by its recurrent weights.
        head: the map to the vocabulary.
    """

    projections: int
    convolutions: int
    cells: int
    head: int

    @property
    def forward(self) -> int:
        """Of one token in one forward pass."""
        return sum(self)

    @property
    def training(self) -> int:
        """Of one token forward and backward: each product has two gradients; what is computed twice counts once."""
        return 3 * sum(self)


def build_on_meta(config: XLSTMConfig) -> XLSTMForCausalLM:
    """The language model without memory for its weights."""
    with torch.device("meta"):
        return XLSTMForCausalLM(config)


def flops_per_token(config: XLSTMConfig, tokens: int) -> Flops:
    """Count a language model's operations by its modules, on the meta device.

    Args:
        config: of a model with a vocabulary.
        tokens: of a sequence, T; the mLSTM cuts it into chunks of nearly equal length, `chunk_size` at most, as it
            does on a GPU; on a CPU these are the blocks of longer ones.
    """
    chunk = math.ceil(tokens / math.ceil(tokens / config.chunk_size))
    projections = convolutions = cells = 0
    model = build_on_meta(config)
    for module in model.model.modules():
        if isinstance(module, (nn.Linear, HeadwiseLinear)):
            projections += 2 * module.weight.numel()
        elif isinstance(module, CausalConv):
            convolutions += 2 * module.weight.numel()
        elif isinstance(module, SLSTMLayer):
            cells += 2 * module.recurrent.numel()
        elif isinstance(module, (MLSTMLayer, UpMLSTMLayer)):
            H = config.num_heads
            K, V = config.qk_size // H, config.v_size // H
            # Scores and their values in the chunk; the state written and read. n is one more column of values.
            cells += H * (2 * chunk * (K + V + 1) + 4 * K * (V + 1))
    return Flops(projections, convolutions, cells, 2 * model.lm_head.weight.numel())


# Operations per second without sparsity in float16 or bfloat16 with sums in float32, in TF32 and in float32, from
# NVIDIA's data sheets. A device is known if all words of a key are words of its name; the first such key counts.
NVIDIA: dict[tuple[str, ...], tuple[float, float, float]] = {
    ("H200",): (989e12, 494e12, 67e12),
    ("H100", "PCIe"): (756e12, 378e12, 51e12),
    ("H100", "HBM3"): (989e12, 494e12, 67e12),
    ("A100",): (312e12, 156e12, 19.5e12),
    ("L40S",): (362e12, 183e12, 91.6e12),
    ("L4",): (121e12, 60e12, 30.3e12),
    ("A10",): (125e12, 62.5e12, 31.2e12),
}


def known_peak_flops(name: str, precision: str) -> float | None:
    """What a device of this name can do at best; None if it is in no table.

    Args:
        name: as `torch.cuda.get_device_name` gives it.
        precision: "half" (float16 and bfloat16), "tf32" or "float32".
    """
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    column = ("half", "tf32", "float32").index(precision)
    return next((peaks[column] for key, peaks in NVIDIA.items() if words >= set(key)), None)


def measured_peak_flops(dtype: torch.dtype, size: int = 1024, rounds: int = 5) -> float:
    """What the fastest of a few layers' products reached on the CPU, square ones, in the threads torch has now."""
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(_seconds(a, b) for _ in range(rounds))


def _seconds(a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    linear(a, b, None)
    return time.perf_counter() - start
