"""Run a script whose processes `accelerate launch` started by a launch file for GPUs, on CPUs that talk over gloo.

Accelerate offers FSDP and DeepSpeed to accelerators only, and would run this in one process, or as DDP, without a word.
What is told to it here is that a CPU is one; everything after that is its own.
"""

from __future__ import annotations

import os
import runpy
import sys

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
os.environ["DS_ACCELERATOR"] = "cpu"

from accelerate.state import DistributedType, PartialState


def _prepare_backend(*args: object, **kwargs: object) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState._prepare_backend = _prepare_backend
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
