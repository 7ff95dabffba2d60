"""One token through all blocks on the CPU, with as few operations as there can be.

At a width of 512, a decoding step through the modules spends more time on calls and small operations than on its
weights. A `StepPlan` does what the blocks' `forward` does for one token. What it reads are views of the modules' own
parameters, so whatever is written into these is seen; what else may change is looked at before every token. It steps
aside for whatever only a module's call honours: hooks, adapters, quantised or sharded weights, subclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

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
from .ops_lean import is_hooked, soft_cap
from .ops_mlstm_torch import mlstm_step_torch
from .ops_slstm_torch import slstm_step_torch
from .states_xlstm import LayerState, MLSTMState, SLSTMState

# A product: [B, I] -> [B, O]. A part of a block: what it reads, what its result is added to, and its state.
Product = Callable[[Tensor], Tensor]
Part = Callable[[Tensor, Tensor, LayerState], tuple[Tensor, LayerState]]
Block = Callable[[Tensor, LayerState], tuple[Tensor, LayerState]]

_KNOWN = {
    XLSTMBlock, RMSNorm, LayerNorm, HeadNorm, HeadwiseLinear, CausalConv, FeedForward, MLSTMHeads, MLSTMLayer,
    UpMLSTMLayer, SLSTMLayer, nn.Linear, nn.Dropout,
}  # fmt: skip


def _product(layer: nn.Module) -> Product:
    """A linear map; several microseconds less than `F.linear`."""
    weight, bias = cast(nn.Linear, layer)._parameters.values()
    assert weight is not None
    transposed = weight.detach().t()
    if bias is None:
        return lambda x: torch.mm(x, transposed)
    return lambda x: torch.addmm(bias, x, transposed)


def _sum(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """x, y -> y + layer(x)."""
    weight, bias = cast(nn.Linear, layer)._parameters.values()
    assert weight is not None
    transposed = weight.detach().t()
    if bias is None:
        return lambda x, y: torch.addmm(y, x, transposed)
    return lambda x, y: torch.addmm(y, x, transposed).add_(bias)


def _headwise(layer: HeadwiseLinear) -> Product:
    """A block-diagonal map; through the module's `forward` a step of width 64 took a twentieth longer."""
    transposed, bias = layer.weight.detach().mT, layer.bias
    heads, size, _ = transposed.shape

    def multiply(x: Tensor) -> Tensor:
        y = torch.bmm(x.view(-1, heads, size).transpose(0, 1), transposed).transpose(0, 1).flatten(1)
        return y if bias is None else y + bias

    return multiply


def _convolution(conv: CausalConv) -> Callable[[Tensor, LayerState], tuple[Tensor, Tensor]]:
    """The convolution at a token [B, D], and the window before the next, [B, W - 1, D]."""
    weight, bias = conv.weight.detach()[:, 0].T, conv.bias

    def convolve(x: Tensor, state: LayerState) -> tuple[Tensor, Tensor]:
        assert state.conv is not None
        window = torch.cat([state.conv.to(x.dtype), x[:, None]], 1)
        y = (window * weight).sum(1).add_(bias)
        return F.silu(y, inplace=True), window[:, 1:].clone()

    return convolve


def _cell(
    cell: MLSTMHeads,
) -> Callable[[Sequence[Tensor], tuple[Tensor, Tensor], LayerState], tuple[Tensor, MLSTMState]]:
    """The mLSTM cell and its head norm over q, k, v and both gates, [B, .]: [B, H * V] and the state after."""
    H, norm = cell.num_heads, cell.norm.forward

    def run(qkv: Sequence[Tensor], gates: tuple[Tensor, Tensor], state: LayerState) -> tuple[Tensor, MLSTMState]:
        options, joint = cell.options, torch.cat(gates, 1)
        joint = soft_cap(joint.float() if joint.element_size() < 4 else joint, options.gate_soft_cap)
        q, k, v = (x.view(-1, 1, H, x.shape[1] // H) for x in qkv)
        i_tilde, f_tilde = joint.view(-1, 1, 2, H).unbind(2)
        before = cast(MLSTMState, state.cell)
        h, after = mlstm_step_torch(q, k, v, i_tilde, f_tilde, before, eps=options.eps, input_gate=options.input_gate)
        return norm(h.to(v.dtype))[:, 0], after

    return run


def _plan_mlstm(layer: MLSTMLayer) -> Part:
    maps = (layer.q_proj, layer.k_proj, layer.v_proj, layer.igate, layer.fgate, layer.ogate)
    q, k, v, i, f, o = (_product(m) for m in maps)
    cell, out = _cell(layer.cell), _sum(layer.out_proj)

    def run(x: Tensor, residual: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        h, after = cell((q(x), k(x), v(x)), (i(x), f(x)), state)
        return out(o(x).sigmoid_().mul_(h), residual), LayerState(after, None)

    return run


def _plan_up_mlstm(layer: UpMLSTMLayer) -> Part:
    up, i, f, down = _product(layer.up_proj), _product(layer.igate), _product(layer.fgate), _sum(layer.down_proj)
    q, k, v = _headwise(layer.q_proj), _headwise(layer.k_proj), _headwise(layer.v_proj)
    conv, cell, skip = _convolution(layer.conv), _cell(layer.cell), layer.skip

    def run(x: Tensor, residual: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        a, z = up(x).chunk(2, 1)
        c, window = conv(a, state)
        qkv = q(c), k(c), v(a)
        g = torch.cat(qkv, 1)
        h, after = cell(qkv, (i(g), f(g)), state)
        return down(torch.addcmul(h, c, skip).mul_(F.silu(z)), residual), LayerState(after, window)

    return run


def _plan_slstm(layer: SLSTMLayer) -> Part:
    i, f, z, o = (_headwise(m) for m in (layer.igate, layer.fgate, layer.zgate, layer.ogate))
    norm, bias, recurrent = layer.norm.forward, layer.bias, layer.recurrent
    conv = None if layer.conv is None else _convolution(layer.conv)
    _, H, P = layer.bias.shape

    def run(x: Tensor, residual: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        c, window = (x, None) if conv is None else conv(x, state)
        gates = torch.stack((i(c), f(c), z(x), o(x))).view(4, -1, 1, H, P) + bias[:, None, None]
        before = cast(SLSTMState, state.cell)
        i_tilde, f_tilde, z_tilde, o_tilde = gates.unbind()
        h, after = slstm_step_torch(
            i_tilde, f_tilde, z_tilde, o_tilde, recurrent, before, input_gate=layer.options.input_gate
        )
        return residual + norm(h.to(x.dtype))[:, 0], LayerState(after, window)

    return run


_PLANS: dict[type, Callable[[Any], Part]] = {
    MLSTMLayer: _plan_mlstm,
    UpMLSTMLayer: _plan_up_mlstm,
    SLSTMLayer: _plan_slstm,
}


def _plan_feed_forward(ffn: FeedForward) -> Callable[[Tensor, Tensor], Tensor]:
    up, down, act = _product(ffn.up_proj), _sum(ffn.down_proj), ffn.act
    if ffn.gate_proj is None:
        return lambda x, residual: down(act(up(x)), residual)
    gate = _product(ffn.gate_proj)
    return lambda x, residual: down(act(gate(x)) * up(x), residual)


def _plan_block(block: XLSTMBlock) -> Block:
    mixer, mixer_norm = _PLANS[type(block.mixer)](block.mixer), block.mixer_norm.forward
    if block.ffn is None or block.ffn_norm is None:
        return lambda x, state: mixer(mixer_norm(x), x, state)
    ffn, ffn_norm = _plan_feed_forward(block.ffn), block.ffn_norm.forward

    def run(x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        x, state = mixer(mixer_norm(x), x, state)
        return ffn(ffn_norm(x), x), state

    return run


class StepPlan:
    """How a token passes through blocks that are plain.

    Args:
        blocks: of one model, every module of them plain.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        self.blocks = list(blocks)
        self.steps = [_plan_block(cast(XLSTMBlock, block)) for block in blocks]
        modules = [module for block in blocks for module in block.modules()]
        self.modules = [(m, m.__class__) for m in modules]
        self.children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self.tensors = [
            (m._parameters, name, p, 0 if p is None else p.data_ptr())
            for m in modules
            for name, p in m._parameters.items()
        ]

    def is_current(self, blocks: Sequence[nn.Module], dtype: torch.dtype) -> bool:
        """Whether nothing has changed since the plan was made, and the weights are of this dtype."""
        if self.blocks != list(blocks):
            return False
        for module, kind in self.modules:
            if module.__class__ is not kind or module.training or is_hooked(module):
                return False
        for children, name, child in self.children:
            if children[name] is not child:
                return False
        for parameters, name, p, address in self.tensors:
            if parameters[name] is not p or (p is not None and (p.data_ptr() != address or p.dtype is not dtype)):
                return False
        return True

    def run(self, x: Tensor, states: Sequence[LayerState | None]) -> tuple[Tensor, list[LayerState]]:
        """One real token of each row through all blocks.

        Args:
            x: embeddings, [B, D].
            states: the state of each block before the token, none of them None.

        Returns:
            x: output of the last block, [B, D].
            states: the state of each block after the token.
        """
        after = []
        for step, state in zip(self.steps, states, strict=True):
            x, state = step(x, cast(LayerState, state))
            after.append(state)
        return x, after


class Stepper:
    """The plan of a model, made when it is first needed. A copy or a pickle of the model starts without."""

    def __init__(self) -> None:
        self.plan: StepPlan | None = None

    def __deepcopy__(self, memo: Any) -> Stepper:
        return Stepper()

    def __reduce__(self) -> Any:
        return Stepper, ()

    def plan_for(self, blocks: Sequence[nn.Module], x: Tensor) -> StepPlan | None:
        """What computes from x [B, D] what the blocks would; None unless they are plain, on the CPU, of its dtype."""
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return None
        plan = self.plan  # other threads may replace it
        if plan is None or not plan.is_current(blocks, x.dtype):
            is_plain = all(_is_plain(module, x.dtype) for block in blocks for module in block.modules())
            plan = self.plan = StepPlan(blocks) if is_plain else None
        return plan


def _is_plain(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether all that a module does is written here; an activation is called, whichever it is."""
    own = module.__dict__
    parameters = own["_parameters"]
    if module.training or is_hooked(module) or (module.__class__ not in _KNOWN and (parameters or own["_modules"])):
        return False
    present = [p for p in parameters.values() if p is not None]
    return all(p.__class__ is nn.Parameter and p.dtype is dtype and p.is_cpu for p in present)
