"""Scripts of the tests in two processes that talk over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from checkout import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


def launch_two(script: str, folder: Path) -> None:
    """Run a script of the tests with this folder as its argument."""
    command = [*TORCHRUN, str(ROOT / "tests" / script), str(folder)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def without_torchao(stderr: str) -> str:
    """What was written to stderr but by torchao, which says on import what it could not load."""
    theirs = ("Failed to load ", "torch/utils/_pytree.py:")
    return "".join(line for line in stderr.splitlines(keepends=True) if not any(words in line for words in theirs))
