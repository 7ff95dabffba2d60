"""scripts/benchmark_gpu.py runs without a GPU, judges before it times, and reports what it ran on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkout import ROOT
from inputs import mlstm_inputs, mlstm_state
from torch import Tensor

from modeling_xlstm import MLSTMState, mlstm
from modeling_xlstm.decoding_xlstm import FixedStep

SCRIPT = [sys.executable, str(ROOT / "scripts" / "benchmark_gpu.py")]


@pytest.fixture
def script() -> ModuleType:
    import benchmark_gpu

    return benchmark_gpu


class Backward(torch.autograd.Function):
    """Leaves a tensor and multiplies its gradient: a fault that the backward pass alone has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.factor, None


def judged(script: ModuleType, state: float = 1.0, gradient: float = 1.0) -> bool:
    """What the script says of kernels, PyTorch's here, whose state n and whose gradient of k are wrong by a factor."""

    def run(backend: str, *xs: Tensor) -> Any:
        q, k, v, i, f, *before = xs
        if backend == "triton":
            k = Backward.apply(k, gradient)
        h, after = mlstm(q, k, v, i, f, MLSTMState(*before), backend="torch" if backend == "triton" else backend)
        return h, after._replace(n=after.n * state) if backend == "triton" else after

    inputs = [x.detach().float() for x in (*mlstm_inputs(9, 1, 2, 16, 32), *mlstm_state(1, 2, 16, 32))]
    return script.over_twin(run, inputs, torch.float32)["passes"]


@pytest.mark.parametrize("fault", [{"state": torch.nan}, {"gradient": torch.nan}, {"gradient": 1.01}], ids=str)
def test_a_kernel_that_is_wrong_or_not_a_number_does_not_pass(script: ModuleType, fault: dict[str, float]) -> None:
    assert judged(script)
    assert not judged(script, **fault)


class Stored(torch.autograd.Function):
    """Rounds a tensor and its gradient as a kernel that keeps them in bfloat16 does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.bfloat16().to(gradient.dtype)


def in_bfloat16(script: ModuleType, fault: str) -> Any:
    """The reference, and in the kernels' place one that rounds what they do: operands, states between chunks, h."""

    def run(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState, **options: Any) -> Any:
        if options.pop("backend") == "reference":
            return mlstm(q, k, v, i, f, state, backend="reference", **options)
        options.pop("reset")
        state, outputs = MLSTMState(*(x.float() for x in state)), []
        v = 1.01 * v.float() if fault == "v is 1 % too large" else v
        n_0 = 0.0 * state.n
        for chunks in zip(*(x.float().split(8, 1) for x in (q, k, v, i, f)), strict=True):
            if fault == "no gradient through C between chunks":
                state = state._replace(C=state.C.detach() + 0.0 * state.C)
            with script.Rounded(torch.bfloat16):
                stored = state._replace(C=Stored.apply(state.C))
                h, state = mlstm(*chunks, stored, backend="reference", **options)
            outputs.append(Stored.apply(h))
        if fault == "no gradient through the last n":
            state = state._replace(n=state.n.detach() + n_0)
        return torch.cat(outputs, 1).to(q.dtype), state

    return run


@pytest.mark.parametrize(
    "fault", ["", "v is 1 % too large", "no gradient through C between chunks", "no gradient through the last n"]
)
def test_kernels_in_bfloat16_pass_whatever_is_drawn_and_one_wrong_term_does_not(
    fault: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = script.Bench(torch.device("cpu"), 1.0)
    bench.dtype = torch.bfloat16
    monkeypatch.setattr(script, "mlstm", in_bfloat16(script, fault))
    passes = []
    for seed in range(8):
        torch.manual_seed(seed)
        passes.append(script.check_mlstm(bench)["passes"])
    assert passes == [not fault] * 8


def test_a_decode_loop_without_a_number_does_not_pass(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    run = FixedStep.run
    bench = script.Bench(kernel_device, 1.0)
    assert script.check_decoding(bench, "large")["passes"]
    monkeypatch.setattr(FixedStep, "run", lambda *given: run(*given) * torch.nan)
    assert not script.check_decoding(bench, "large")["passes"]


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
