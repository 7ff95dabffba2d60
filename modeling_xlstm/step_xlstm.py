"""One token through all blocks on the CPU, with as few operations as there can be.

At a width of 512, a decoding step through the modules spends more time on calls and small operations than on its
weights. These functions do what the layers' `forward` does for one token, read the modules' own parameters every time,
so there is nothing to be fused, undone or kept up to date, and step aside for whatever only a module's call honours:
hooks, adapters, quantised or sharded weights, subclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks_xlstm import XLSTMBlock
from .layers_xlstm import (
    CausalConv,
    FeedForward,
    HeadNorm,
    HeadwiseLinear,
    LayerNorm,
    MLSTMHeads,
    MLSTMLayer,
    RMSNorm,
    SLSTMLayer,
    UpMLSTMLayer,
)
from .ops_lean import soft_cap
from .ops_mlstm_torch import mlstm_step_torch
from .ops_slstm_torch import slstm_step_torch
from .states_xlstm import LayerState, MLSTMState, SLSTMState

_KNOWN = {
    XLSTMBlock, RMSNorm, LayerNorm, HeadNorm, HeadwiseLinear, CausalConv, FeedForward, MLSTMHeads, MLSTMLayer,
    UpMLSTMLayer, SLSTMLayer, nn.Linear, nn.Dropout,
}  # fmt: skip


def can_step(blocks: Iterable[nn.Module], x: Tensor) -> bool:
    """Whether `step` computes what calling the blocks would: they are plain, and on the CPU in the dtype of x."""
    called = nn.modules.module
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    if called._global_forward_hooks or called._global_forward_pre_hooks:
        return False
    return all(_is_plain(block, x.dtype) for block in blocks)


def _is_plain(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether all that a module does is written here; an activation is called, whichever it is."""
    attributes = module.__dict__
    if attributes["training"] or attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]:
        return False
    parameters, children = attributes["_parameters"], attributes["_modules"]
    if "forward" in attributes or (module.__class__ not in _KNOWN and (parameters or children)):
        return False
    for p in parameters.values():
        if p is not None and (p.__class__ is not nn.Parameter or p.dtype is not dtype or not p.is_cpu):
            return False
    return all(child is None or _is_plain(child, dtype) for child in children.values())


def step(
    blocks: Iterable[nn.Module], x: Tensor, states: Sequence[LayerState | None]
) -> tuple[Tensor, list[LayerState]]:
    """One real token of each row through all blocks.

    Args:
        blocks: of one model, for which `can_step` holds.
        x: embeddings, [B, D].
        states: the state of each block before the token, none of them None.

    Returns:
        x: output of the last block, [B, D].
        states: the state of each block after the token.
    """
    after = []
    for block, state in zip(cast(Iterable[XLSTMBlock], blocks), states, strict=True):
        y, state = _STEPS[type(block.mixer)](block.mixer, block.mixer_norm.forward(x), state)
        x = x + y
        if block.ffn is not None and block.ffn_norm is not None:
            x = x + _feed_forward(block.ffn, block.ffn_norm.forward(x))
        after.append(state)
    return x, after


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """[B, I] -> [B, O]; several microseconds less than `F.linear`."""
    weight, bias = cast(nn.Linear, layer)._parameters.values()
    assert weight is not None
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _feed_forward(ffn: FeedForward, x: Tensor) -> Tensor:
    up = _linear(ffn.up_proj, x)
    hidden = ffn.act(up) if ffn.gate_proj is None else ffn.act(_linear(ffn.gate_proj, x)) * up
    return _linear(ffn.down_proj, hidden)


def _convolve(conv: CausalConv, x: Tensor, state: LayerState) -> tuple[Tensor, Tensor]:
    """The convolution at a token [B, D], and the window before the next, [B, W - 1, D]."""
    assert state.conv is not None
    window = torch.cat([state.conv.to(x.dtype), x[:, None]], 1)
    y = (window * conv.weight[:, 0].T).sum(1).add_(conv.bias)
    return F.silu(y, inplace=True), window[:, 1:].clone()


def _mlstm(
    cell: MLSTMHeads, qkv: tuple[Tensor, Tensor, Tensor], gates: tuple[Tensor, Tensor], state: LayerState
) -> tuple[Tensor, MLSTMState]:
    """The cell and its head norm over q, k, v [B, .] and the gates [B, H]: [B, H * V] and the state after."""
    B, H, dtype = qkv[0].shape[0], cell.num_heads, qkv[2].dtype
    joint = torch.cat(gates, 1)
    joint = soft_cap(joint.float() if joint.element_size() < 4 else joint, cell.options.gate_soft_cap)
    q, k, v = (x.view(B, 1, H, -1) for x in qkv)
    i_tilde, f_tilde = joint.view(B, 1, 2, H).unbind(2)
    options = cell.options
    h, after = mlstm_step_torch(
        q, k, v, i_tilde, f_tilde, cast(MLSTMState, state.cell), eps=options.eps, input_gate=options.input_gate
    )
    return cell.norm.forward(h.to(dtype))[:, 0], after


def _mlstm_layer(layer: MLSTMLayer, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    qkv = _linear(layer.q_proj, x), _linear(layer.k_proj, x), _linear(layer.v_proj, x)
    h, after = _mlstm(layer.cell, qkv, (_linear(layer.igate, x), _linear(layer.fgate, x)), state)
    return _linear(layer.out_proj, _linear(layer.ogate, x).sigmoid_().mul_(h)), LayerState(after, None)


def _up_mlstm_layer(layer: UpMLSTMLayer, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    a, z = _linear(layer.up_proj, x).chunk(2, -1)
    c, window = _convolve(layer.conv, a, state)
    qkv = layer.q_proj.forward(c), layer.k_proj.forward(c), layer.v_proj.forward(a)
    g = torch.cat(qkv, -1)
    h, after = _mlstm(layer.cell, qkv, (_linear(layer.igate, g), _linear(layer.fgate, g)), state)
    return _linear(layer.down_proj, torch.addcmul(h, c, layer.skip).mul_(F.silu(z))), LayerState(after, window)


def _slstm_layer(layer: SLSTMLayer, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    c, window = (x, None) if layer.conv is None else _convolve(layer.conv, x, state)
    gates = layer.igate.forward(c), layer.fgate.forward(c), layer.zgate.forward(x), layer.ogate.forward(x)
    B, (_, H, P) = x.shape[0], layer.bias.shape
    i_tilde, f_tilde, z_tilde, o_tilde = torch.stack(gates).view(4, B, 1, H, P) + layer.bias[:, None, None]
    h, after = slstm_step_torch(
        i_tilde,
        f_tilde,
        z_tilde,
        o_tilde,
        layer.recurrent,
        cast(SLSTMState, state.cell),
        input_gate=layer.options.input_gate,
    )
    return layer.norm.forward(h.to(x.dtype))[:, 0], LayerState(after, window)


_STEPS: dict[type, Callable[..., tuple[Tensor, LayerState]]] = {
    MLSTMLayer: _mlstm_layer,
    UpMLSTMLayer: _up_mlstm_layer,
    SLSTMLayer: _slstm_layer,
}
