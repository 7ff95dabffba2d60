"""The launch files, run by `accelerate launch` on two CPU processes: what they train, save and resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from processes import ENVIRONMENT, launch_two
from safetensors.torch import load_file
from test_train_script import RECIPE, write_recipe
from tolerances import FLOAT32, assert_same

from modeling_xlstm import XLSTMForCausalLM

# Plain gradient descent, for Adam blows up the rounding of gradients that are nearly zero.
SGD = RECIPE.replace("learning_rate: 1.0e-2", "learning_rate: 0.5\noptim: sgd")


def launch(folder: Path, file: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Two processes, each with half of a batch."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configuration/launch/{file}.yaml"]
    command += ["--num_processes", "2", "--mixed_precision", "no", "tests/on_cpu.py", *words, "scripts/train.py"]
    command = [str(ROOT / word) if (ROOT / word).is_file() else word for word in command]
    return subprocess.run(
        [*command, "recipe.yaml", "--output_dir", "run"],
        cwd=folder, env={**os.environ, **ENVIRONMENT}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_processes_that_end_right_after_they_have_talked_are_not_aborted(tmp_path: Path) -> None:
    """Without the wait in `end_group`, seven of twelve launches failed."""
    launch_two("gathered.py", tmp_path)


@pytest.mark.slow
def test_fsdp2_killed_and_resumed_trains_as_one_process_and_leaves_a_model_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its launch file: blocks sharded and recomputed, checkpoints in shards."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    Path("recipe.yaml").write_text(SGD, "utf-8")
    import train

    train.train(*train.parse(["recipe.yaml", "--output_dir", "alone"]))
    halves = SGD.replace("train_batch_size: 4", "train_batch_size: 2").replace("use_cpu: true", "")
    Path("recipe.yaml").write_text(halves, "utf-8")
    assert "(SIGKILL)" in launch(tmp_path, "fsdp2", "--kill_at_step", "5").stdout
    assert not Path("run/model.safetensors").exists()
    done = launch(tmp_path, "fsdp2")
    assert done.returncode == 0, done.stdout
    assert "Resuming   at step 3" in done.stdout
    assert list(Path("run/checkpoint-12/pytorch_model_fsdp_0").glob("*.distcp"))

    assert_same(load_file("run/model.safetensors"), load_file("alone/model.safetensors"), FLOAT32)
    XLSTMForCausalLM.from_pretrained("run")
    logs = [json.loads(Path(run, "trainer_state.json").read_text("utf-8"))["log_history"] for run in ("run", "alone")]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert_same(*losses, FLOAT32)
