"""A whole model on Triton's kernels: the same logits, gradients and text as without."""

from __future__ import annotations

import pytest
import torch
from inputs import tiny_config, tokens
from tolerances import FLOAT32, assert_identical, assert_same

from modeling_xlstm import XLSTMForCausalLM


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
