"""A whole model on Triton's kernels: the same logits, gradients and text as without."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import pytest_collection_modifyitems
from inputs import tiny_config, tokens
from tolerances import FLOAT32, assert_identical, assert_same
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_xlstm import MLSTMState, XLSTMForCausalLM, mlstm, ops_common, ops_mlstm, ops_slstm, slstm


@pytest.mark.parametrize("style", ["large", "neurips"])
def test_a_model_on_the_kernels_equals_the_same_model_without(style: str, kernel_device: torch.device) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "slstm_at": [0], "variant": None}
    ids = tokens(2, 9).to(kernel_device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    results, texts = [], []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        model = XLSTMForCausalLM(tiny_config(style, **sizes, kernel_backend=backend)).to(kernel_device).eval()
        out = model(ids, attention_mask=mask, labels=ids)
        gradients = torch.autograd.grad(out.loss, list(model.parameters()))
        results.append([out.logits, out.loss, *gradients])
        texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False))
    assert_same(*results, FLOAT32)
    assert_identical(*texts)


@pytest.mark.usefixtures("kernel_device")
def test_kernels_are_checked_and_launched_with_the_device_of_their_tensors_as_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from modeling_xlstm import ops_mlstm_triton, ops_slstm_triton

    current, seen = [torch.device("cuda", 0)], []

    @contextlib.contextmanager
    def become_current(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def check(device: torch.device, dtype: torch.dtype) -> str:
        seen.append(current[-1])
        return ""

    def work(*tensors: Any, **options: Any) -> Any:
        seen.append(current[-1])
        return tensors[2], None

    monkeypatch.setattr(torch.cuda, "device", become_current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(ops_common, "_device_obstacle", lambda device: "")
    monkeypatch.setattr(ops_common, "_VERDICTS", {})
    monkeypatch.setattr(ops_mlstm, "_compare", check)
    monkeypatch.setattr(ops_slstm, "_disagreement", lambda device, dtype, *_: check(device, dtype))
    monkeypatch.setattr(ops_mlstm_triton, "mlstm_chunkwise_triton", work)
    monkeypatch.setattr(ops_mlstm_triton, "mlstm_step_triton_", work)
    monkeypatch.setattr(ops_slstm_triton, "slstm_recurrent_triton", work)
    with FakeTensorMode(), torch.device("cuda", 1):
        q, gate, x = torch.empty(1, 1, 2, 16), torch.empty(1, 1, 2), torch.empty(1, 1, 2, 16)
        state = MLSTMState(torch.empty(1, 2, 16, 16), torch.empty(1, 2, 16), torch.empty(1, 2))
        R = torch.empty(4, 2, 16, 16)
    mlstm(q, q, q, gate, gate)
    options: dict[str, Any] = {"eps": 1e-6, "input_gate": "exp", "gate_soft_cap": None, "backend": "auto"}
    ops_mlstm.mlstm_step_(q, q, q, gate, gate, state, **options)
    slstm(x, x, x, x, R)
    assert len(seen) >= 5
    assert set(seen) == {torch.device("cuda", 1)}


def test_the_kernels_tests_are_those_of_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[str] = []
    item: Any = SimpleNamespace(fixturenames=["kernel_device"], add_marker=marks.append)
    for there, expected in ((False, []), (True, ["gpu"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        pytest_collection_modifyitems([item])
        assert marks == expected
