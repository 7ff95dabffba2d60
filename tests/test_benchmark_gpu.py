"""scripts/benchmark_gpu.py runs without a GPU, judges before it times, and reports what it ran on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkout import ROOT

SCRIPT = [sys.executable, str(ROOT / "scripts" / "benchmark_gpu.py")]


@pytest.mark.slow
@pytest.mark.usefixtures("kernel_device")
def test_the_gpu_benchmark_runs_at_tiny_size_in_the_interpreter(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    command = [*SCRIPT, "--device", "cpu", "--json", "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert {"about", "device", "dtype"} <= result.keys()
    assert all(check["passes"] for check in result["checks"].values())
    models = [f"model {style}, {who}" for style in ("large", "neurips") for who in ("ours", "peer transformers xlstm")]
    for kind in ("mlstm {", "mlstm step", "slstm", *models):
        assert any(name.startswith(kind) for name in result), kind
    for check in (
        "mlstm soft cap",
        "mlstm step",
        "slstm step",
        "slstm 192 packed",
        "decoding large",
        "decoding neurips",
    ):
        assert check in result["checks"]
    assert result["model large, ours"]["training tokens/s"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="waits for a machine without a CUDA device")
def test_it_says_what_it_lacks(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(SCRIPT, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "no CUDA device, nothing was measured" in done.stdout
