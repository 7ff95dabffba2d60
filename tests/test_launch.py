"""The launch files, run by `accelerate launch` on two CPU processes: what they train, save and resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import ROOT
from processes import ENVIRONMENT
from safetensors.torch import load_file
from test_train_script import RECIPE, write_recipe
from tolerances import FLOAT32, assert_same

from modeling_xlstm import XLSTMForCausalLM

# Plain gradient descent, for Adam blows up the rounding of gradients that are nearly zero.
SGD = RECIPE.replace("learning_rate: 1.0e-2", "learning_rate: 0.5\noptim: sgd")


def launch(folder: Path, file: str) -> subprocess.Popen[str]:
    """Two processes, each with half of a batch; killed together, for they are one group."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configuration/launch/{file}.yaml"]
    command += ["--num_processes", "2", "--mixed_precision", "no", "tests/on_cpu.py", "scripts/train.py"]
    command = [str(ROOT / word) if (ROOT / word).is_file() else word for word in command]
    return subprocess.Popen(
        [*command, "recipe.yaml", "--output_dir", "run"],
        cwd=folder, env={**os.environ, **ENVIRONMENT}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.slow
def test_fsdp2_killed_and_resumed_trains_as_one_process_and_leaves_a_model_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its launch file: blocks sharded and recomputed, checkpoints in shards."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    Path("recipe.yaml").write_text(SGD, "utf-8")
    import train

    train.train(*train.parse(["recipe.yaml", "--output_dir", "alone"]))
    halves = SGD.replace("train_batch_size: 4", "train_batch_size: 2").replace("use_cpu: true", "")
    Path("recipe.yaml").write_text(halves, "utf-8")
    process = launch(tmp_path, "fsdp2")
    while not list(tmp_path.glob("run/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not Path("run/model.safetensors").exists()
    process = launch(tmp_path, "fsdp2")
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert "Resuming   at step" in out
    assert list(Path("run/checkpoint-12/pytorch_model_fsdp_0").glob("*.distcp"))

    assert_same(load_file("run/model.safetensors"), load_file("alone/model.safetensors"), FLOAT32)
    XLSTMForCausalLM.from_pretrained("run")
    logs = [json.loads(Path(run, "trainer_state.json").read_text("utf-8"))["log_history"] for run in ("run", "alone")]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert_same(*losses, FLOAT32)
