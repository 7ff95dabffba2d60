"""Random inputs, states and small models that the tests share. Letters as in docs/style.md."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from modeling_xlstm import LayerState, MLSTMState, SLSTMState, XLSTMConfig

STYLES = ["large", "neurips", "residual"]
# torch counts the operations of `baddbmm` and forgets its twin that works in place.
PRODUCTS = {torch.ops.aten.baddbmm_: lambda to, a, b, **_: 2 * math.prod(a) * b[-1]}


def mlstm_inputs(T: int, B: int = 2, H: int = 2, K: int = 4, V: int = 6, gate_std: float = 3.0) -> list[Tensor]:
    """q, k, v, i_tilde, f_tilde in float64, ready for gradients."""
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H)]
    scales = [1.0, 1.0, 1.0, gate_std, gate_std]
    return [
        (s * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape, s in zip(shapes, scales, strict=True)
    ]


def mlstm_state(B: int = 2, H: int = 2, K: int = 4, V: int = 6) -> MLSTMState:
    """A state as if after some tokens, in float64, ready for gradients."""
    return MLSTMState(
        *(torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((B, H, K, V), (B, H, K), (B, H)))
    )


def slstm_inputs(T: int, B: int = 2, H: int = 2, P: int = 3, gate_std: float = 2.0) -> list[Tensor]:
    """i_tilde, f_tilde, z_tilde, o_tilde and the recurrent weights in float64, ready for gradients."""
    gates = [gate_std * torch.randn(B, T, H, P, dtype=torch.float64) for _ in range(4)]
    return [x.requires_grad_() for x in (*gates, torch.randn(4, H, P, P, dtype=torch.float64))]


def slstm_state(B: int = 2, H: int = 2, P: int = 3) -> SLSTMState:
    """A state as if after some tokens, its first row fresh, in float64, ready for gradients."""
    c, n, m, h = (torch.randn(B, H, P, dtype=torch.float64) for _ in range(4))
    tensors = (c, 1 + n.abs(), m, h)
    for x in tensors:
        x[0] = 0.0
    return SLSTMState(*(x.requires_grad_() for x in tensors))


def outputs_and_gradients(h: Tensor, state: Any, inputs: list[Tensor], seen: slice = slice(None)) -> tuple[Any, ...]:
    """h, state, and the gradients of a loss that sees some of both, weighted so that no two entries count alike."""
    loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in (h, *state)[seen])
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return h, state, [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True)]


def tiny_config(block_style: str = "large", variant: str = "mixed", **fields: Any) -> XLSTMConfig:
    """A configuration small enough for any test; two heads, three blocks, a convolution wherever there can be one."""
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 3, "num_heads": 2, "chunk_size": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    more = {"slstm_conv_kernel_size": 4, "slstm_num_heads": 4, "recurrent_weight_init": "standard"}
    # Open input gates and weights that look at the input: nothing in a fresh model may be hidden by an initial zero.
    more |= {"input_gate_bias_mean": 0.0, "input_gate_bias_std": 1.0}
    return XLSTMConfig(block_style=block_style, variant=variant, **{**sizes, **tokens, **more, **fields})


def tiny_model(model_class: Any, block_style: str = "large", variant: str = "mixed", **fields: Any) -> Any:
    """A model in float64 and eval mode whose gates depend on their input."""
    model = model_class(tiny_config(block_style, variant, **fields)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "igate.weight" in name or "fgate.weight" in name:
                parameter.normal_(std=0.5)
    return model


def tokens(B: int, T: int, vocab_size: int = 61) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, vocab_size, (B, T))


def rows(states: list[LayerState], index: Any) -> list[tuple[Tensor, ...]]:
    """The tensors of every layer's state, for some of the rows."""
    return [tuple(x[index] for x in (*s.cell, s.conv) if x is not None) for s in states]
