"""Run a script whose processes `accelerate launch` started by a launch file for GPUs, on CPUs that talk over gloo.

Accelerate offers FSDP and DeepSpeed to accelerators only, and would run this in one process, or as DDP, without a word.
What is told to it here is that a CPU is one; everything after that is its own. After `--kill_at_step N` each process
ends by SIGKILL at that step. A script that leaves its process group open fails, for gloo aborts some of those.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from typing import Any

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
os.environ["DS_ACCELERATOR"] = "cpu"

import torch.distributed as dist
from accelerate.state import DistributedType, PartialState
from transformers.trainer_callback import DefaultFlowCallback

_on_step_end = DefaultFlowCallback.on_step_end


def _prepare_backend(*args: object, **kwargs: object) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState._prepare_backend = _prepare_backend
    if sys.argv[1] == "--kill_at_step":
        last = int(sys.argv[2])
        del sys.argv[1:3]

        def kill(self: DefaultFlowCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return _on_step_end(self, args, state, control, **kwargs)

        DefaultFlowCallback.on_step_end = kill
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert not dist.is_initialized()
