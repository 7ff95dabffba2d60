"""scripts/benchmark_serving.py runs, judges before it times, and reports what it ran on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from checkout import ROOT


def test_the_serving_benchmark_runs_at_tiny_size_and_writes_its_numbers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 61, "slots": 2, "requests": 3, "rounds": 1}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [
        sys.executable,
        str(ROOT / "scripts" / "benchmark_serving.py"),
        *flags,
        "--json",
        str(tmp_path / "out.json"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert sizes.items() <= result.items()
    assert result["new_tokens"] >= 3 * 4
    assert {"machine", "threads", "versions"} <= result.keys()
    assert result["ratio"] > 0
