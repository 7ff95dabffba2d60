"""The parts of a block: norms, causal convolution, feed-forward, and the three mixer layers around the two cells.

Every mixer maps ([B, T, D], call) to ([B, T, D], state): the call holds the state before the tokens and what is known
of them, the state is the one after.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_xlstm import XLSTMConfig
from .ops_common import token_blocks
from .ops_lean import causal_conv, project, rms_norm
from .ops_linear import bmm, is_hooked, multiply
from .ops_mlstm import mlstm, mlstm_step_
from .ops_slstm import slstm
from .states_xlstm import Call, CellInputs, LayerState, MLSTMState, SLSTMState, compute_dtype


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (+ bias) over the last dim."""

    def __init__(self, size: int, eps: float, bias: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = rms_norm(x, self.weight, self.eps)
        return x if self.bias is None else x + self.bias


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * (offset + weight) (+ bias) over the last dim.

    The neurips family stores weights as their deviation from 1 (offset 1), so that weight decay pulls towards 1.
    """

    def __init__(self, size: int, eps: float, bias: bool, offset: float):
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.offset if self.offset else self.weight
        return F.layer_norm(x, (x.shape[-1],), weight, self.bias, self.eps)


class HeadNorm(nn.Module):
    """LayerNorm of each head over its own channels, one weight over all: [B, T, H, V] -> [B, T, H * V]."""

    def __init__(self, size: int, eps: float, bias: bool, offset: float, weight: bool = True):
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset)) if weight else None
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, (x.shape[-1],), eps=self.eps).flatten(-2)
        if self.weight is not None:
            x = x * (self.weight + self.offset if self.offset else self.weight)
        return x if self.bias is None else x + self.bias


def block_norm(config: XLSTMConfig) -> RMSNorm | LayerNorm:
    """The norm before each mixer and feed-forward, and after the last block."""
    if config.block_style == "large":
        return RMSNorm(config.hidden_size, config.norm_eps, config.norm_bias)
    return LayerNorm(config.hidden_size, config.norm_eps, config.norm_bias, norm_offset(config))


def norm_offset(config: XLSTMConfig) -> float:
    """What the stored norm weights deviate from."""
    return 1.0 if config.block_style == "neurips" else 0.0


# From so many tokens on, blocks are laid together up to this width: fewer and larger products.
ROWS, WIDTH = 64, 32


class HeadwiseLinear(nn.Module):
    """A block-diagonal linear map, one block per head: [..., H * I] -> [..., G, H * O / G].

    G is H, or fewer where narrow heads are computed together; `flatten(-2)` gives all heads' outputs one after the
    other. As it is, it needs no copy.
    """

    def __init__(self, heads: int, in_size: int, out_size: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, out_size, in_size))
        self.bias = nn.Parameter(torch.empty(heads * out_size)) if bias else None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map x; `bias`, of H * O numbers, stands in for one of its own."""
        weight: Tensor = self.weight
        bias = self.bias if bias is None else bias
        heads, out_size, in_size = weight.shape
        together = math.gcd(heads, max(WIDTH // in_size, 1)) if x.numel() >= ROWS * heads * in_size else 1
        if together > 1:
            between = torch.eye(together, dtype=x.dtype, device=x.device).view(together, 1, together, 1)
            weight = weight.view(-1, together, out_size, 1, in_size) * between  # zeros off the diagonal
            weight = weight.reshape(-1, together * out_size, together * in_size)
        heads, _, in_size = weight.shape
        bias = None if bias is None else bias.view(heads, 1, -1)
        y = bmm(x.reshape(-1, heads, in_size).transpose(0, 1), weight.mT, bias)
        return y.transpose(0, 1).unflatten(0, x.shape[:-1])


class CausalConv(nn.Module):
    """Depthwise causal convolution over the last W tokens of the same document, then SiLU: [B, T, D] -> [B, T, D]."""

    def __init__(self, size: int, window: int):
        super().__init__()
        self.window = window
        self.weight = nn.Parameter(torch.empty(size, 1, window))  # the last tap multiplies the current token
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, state: LayerState | None, reset: Tensor | None) -> Tensor:
        W = self.window
        if x.shape[1] == 1 and reset is None:
            return F.silu((with_past(x, state, W) * self.weight[:, 0].T).sum(1, keepdim=True) + self.bias)
        document = None if reset is None else F.pad(reset.cumsum(1), (W - 1, 0))
        return F.silu(causal_conv(x, inputs_before(x, state, W), self.weight[:, 0], self.bias, document))


def inputs_before(x: Tensor, state: LayerState | None, window: int) -> Tensor:
    """The inputs a convolution looks back on before the first token of x, [B, W - 1, D]."""
    past = None if state is None else state.conv
    if past is not None and past.device != x.device:
        raise ValueError(
            f"The state must be on {x.device} as the input is; got {past.device}. Use `.to()` on the cache."
        )
    return x.new_zeros(x.shape[0], window - 1, x.shape[2]) if past is None else past.to(x.dtype)


def with_past(x: Tensor, state: LayerState | None, window: int) -> Tensor:
    """Those inputs, then those of the tokens: [B, W - 1 + T, D]."""
    return torch.cat([inputs_before(x, state, window), x], 1)


def last_inputs(
    x: Tensor | None, state: LayerState | None, window: int, lengths: Tensor | None, reset: Tensor | None
) -> Tensor | None:
    """The W - 1 inputs before the next token, zero where they belong to another document: [B, W - 1, D].

    Args:
        x: inputs of the convolution, [B, T, D]; None without one.
        state: the state before the first token.
        window: W.
        lengths: number of real tokens of each row, [B].
        reset: True at the first token of a new document, [B, T].
    """
    if x is None:
        return None
    W = window
    if lengths is None and reset is None:
        x = x if x.shape[1] >= W - 1 else with_past(x, state, W)
        return x[:, 1 - W :].clone()  # a view would keep the whole sequence
    x = with_past(x, state, W)
    if lengths is None:
        lengths = torch.full(x.shape[:1], x.shape[1] - W + 1, device=x.device)
    index = lengths[:, None] + torch.arange(W - 1, device=x.device)  # [B, W - 1]
    last = x[torch.arange(len(x), device=x.device)[:, None], index]  # `gather` would keep x for its backward pass
    if reset is not None:
        document = F.pad(reset.cumsum(1), (W - 1, 0))[..., None]
        current = document.gather(1, (lengths + W - 2)[:, None, None])
        last = last * (document.gather(1, index[..., None]) == current)
    return last


class FeedForward(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) in the residual style: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: XLSTMConfig):
        super().__init__()
        D, U = config.hidden_size, config.ffn_size
        self.gate_proj = None if config.block_style == "residual" else nn.Linear(D, U, bias=config.ffn_bias)
        self.up_proj = nn.Linear(D, U, bias=config.ffn_bias)
        self.down_proj = nn.Linear(U, D, bias=config.ffn_bias)
        # Transformers has no name for the first and a class of its own for the second, which a decoding step knows.
        own = {"selu": nn.SELU, "silu": nn.SiLU}
        self.act = own[config.hidden_act]() if config.hidden_act in own else ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.up_proj,) if self.gate_proj is None else (self.up_proj, self.gate_proj)
        return self.dropout(
            project(self.down_proj, self._hidden, (self.act,), *(multiply(layer, x) for layer in layers))
        )

    def _hidden(self, up: Tensor, gate: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.act(up) if gate is None else self.act(gate) * up
        return hidden


@dataclasses.dataclass(frozen=True)
class CellOptions:
    """What a cell needs beside its inputs; `recurrent` are the sLSTM's weights, `window` is 0 without convolution.

    `donated` allows an op to write over the state it is given.
    """

    window: int
    state_dtype: torch.dtype
    input_gate: str
    backend: str
    chunk_size: int
    eps: float
    gate_soft_cap: float | None
    donated: bool = False
    recurrent: Tensor | None = None

    @classmethod
    def of(cls, config: XLSTMConfig, window: int) -> CellOptions:
        """The options that a configuration states."""
        return cls(
            window=window,
            state_dtype=getattr(torch, config.state_dtype),
            input_gate=config.input_gate,
            backend=config.kernel_backend,
            chunk_size=config.chunk_size,
            eps=config.normalizer_eps,
            gate_soft_cap=config.gate_soft_cap,
        )

    def scalar(self, x: Tensor) -> Tensor:
        """A tensor with the device of x and the dtype that states have there."""
        return x.new_empty((), dtype=torch.promote_types(x.dtype, self.state_dtype))


def run_mlstm(
    state: LayerState | None, inputs: CellInputs, lengths: Tensor | None, options: CellOptions
) -> tuple[Tensor, LayerState]:
    """The mLSTM cell and its convolution's window over q, k, v, i_tilde, f_tilde, convolution inputs and resets."""
    q, k, v, i_tilde, f_tilde, x, reset = inputs
    B, _, H, K = q.shape
    cell = None if state is None else cast(MLSTMState, state.cell)
    # The op's own start costs nothing: zeros are for states wider than that.
    if cell is None and (like := options.scalar(q)).dtype is not compute_dtype(v, None):
        cell = MLSTMState.zeros(B, H, K, v.shape[-1], like)
    common: Any = {name: getattr(options, name) for name in ("eps", "input_gate", "gate_soft_cap", "backend")}
    if options.donated and cell is not None and lengths is None and reset is None and q.shape[1] == 1:
        h, cell = mlstm_step_(q, k, v, i_tilde, f_tilde, cell, **common)
    else:
        common |= {"lengths": lengths, "reset": reset, "chunk_size": options.chunk_size}
        h, cell = mlstm(q, k, v, i_tilde, f_tilde, cell, **common)
    return h, LayerState(cell, last_inputs(x, state, options.window, lengths, reset))


def run_slstm(
    state: LayerState | None, inputs: CellInputs, lengths: Tensor | None, options: CellOptions
) -> tuple[Tensor, LayerState]:
    """The sLSTM cell and its convolution's window over the four gates, convolution inputs and resets."""
    i_tilde, f_tilde, z_tilde, o_tilde, x, reset = inputs
    assert options.recurrent is not None
    B, _, H, P = i_tilde.shape
    cell = SLSTMState.zeros(B, H, P, options.scalar(i_tilde)) if state is None else cast(SLSTMState, state.cell)
    h, cell = slstm(
        i_tilde,
        f_tilde,
        z_tilde,
        o_tilde,
        options.recurrent,
        cell,
        lengths=lengths,
        reset=reset,
        input_gate=options.input_gate,
        backend=options.backend,
    )
    return h, LayerState(cell, last_inputs(x, state, options.window, lengths, reset))


class MLSTMHeads(nn.Module):
    """What both mLSTM layers share: the cell, [B, T, H, .] -> [B, T, H, V], and its head norm."""

    def __init__(self, config: XLSTMConfig, window: int):
        super().__init__()
        self.num_heads = config.num_heads
        self.options = CellOptions.of(config, window)
        self.norm = HeadNorm(config.v_size, config.norm_eps, config.norm_bias, norm_offset(config))

    def forward(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        gates: tuple[Tensor, Tensor],
        conv_inputs: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, LayerState]:
        # Counted, not `num_heads`: under tensor parallelism a process has some of the heads.
        heads = (x.unflatten(-1, (gates[0].shape[-1], -1)) for x in qkv)
        return call.run(run_mlstm, (*heads, *gates, conv_inputs, call.reset), self.options)


class MLSTMLayer(nn.Module):
    """The large and residual styles' mixer: q, k, v and gates from x, mLSTM cell, output gate, projection."""

    def __init__(self, config: XLSTMConfig, layer_idx: int):
        super().__init__()
        D, bias = config.hidden_size, config.use_bias
        self.q_proj = nn.Linear(D, config.qk_size, bias=bias)
        self.k_proj = nn.Linear(D, config.qk_size, bias=bias)
        self.v_proj = nn.Linear(D, config.v_size, bias=bias)
        self.igate = nn.Linear(D, config.num_heads)
        self.fgate = nn.Linear(D, config.num_heads)
        self.ogate = nn.Linear(D, config.v_size, bias=bias)
        self.cell = MLSTMHeads(config, window=0)
        self.out_proj = nn.Linear(config.v_size, D, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, call: Call) -> tuple[Tensor, LayerState]:
        qkv = multiply(self.q_proj, x), multiply(self.k_proj, x), multiply(self.v_proj, x)
        h, state = self.cell(qkv, (multiply(self.igate, x), multiply(self.fgate, x)), None, call)
        return self.dropout(
            project(self.out_proj, self._read_out, (self.cell.norm,), h, multiply(self.ogate, x))
        ), state

    def _read_out(self, h: Tensor, o_tilde: Tensor) -> Tensor:
        return torch.sigmoid(o_tilde) * self.cell.norm(h)


class UpMLSTMLayer(nn.Module):
    """The neurips style's mixer: up-projection, convolution, mLSTM cell, learnable skip, SiLU gate, down-projection."""

    def __init__(self, config: XLSTMConfig, layer_idx: int):
        super().__init__()
        D, E, bias = config.hidden_size, config.inner_size, config.use_bias
        blocks, blocksize = E // config.qkv_proj_blocksize, config.qkv_proj_blocksize
        self.up_proj = nn.Linear(D, 2 * E, bias=bias)  # cell branch first, then gate branch
        self.conv = CausalConv(E, config.conv_kernel_size)
        self.q_proj = HeadwiseLinear(blocks, blocksize, blocksize, bias)
        self.k_proj = HeadwiseLinear(blocks, blocksize, blocksize, bias)
        self.v_proj = HeadwiseLinear(blocks, blocksize, blocksize, bias)
        self.igate = nn.Linear(3 * E, config.num_heads)
        self.fgate = nn.Linear(3 * E, config.num_heads)
        self.cell = MLSTMHeads(config, config.conv_kernel_size)
        self.skip = nn.Parameter(torch.ones(E))
        self.down_proj = nn.Linear(E, D, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, call: Call) -> tuple[Tensor, LayerState]:
        a, z = multiply(self.up_proj, x).chunk(2, -1)
        c = self.conv(a, call.state, call.reset)
        qkv = self.q_proj(c), self.k_proj(c), self.v_proj(a)
        g = torch.stack(qkv, -3).flatten(-3)  # the gates keep it, so the cell is given parts of it and keeps no others
        h, state = self.cell(g.chunk(3, -1), (multiply(self.igate, g), multiply(self.fgate, g)), a, call)
        y = project(self.down_proj, self._read_out, (self.cell.norm,), h, c, z, self.skip)
        return self.dropout(y), state

    def _read_out(self, h: Tensor, c: Tensor, z: Tensor, skip: Tensor) -> Tensor:
        return (self.cell.norm(h) + skip * c) * F.silu(z)


class SLSTMLayer(nn.Module):
    """Every style's sLSTM mixer: convolution if any, four gates per head, sLSTM cell, head norm."""

    def __init__(self, config: XLSTMConfig, layer_idx: int):
        super().__init__()
        assert config.slstm_num_heads is not None
        D, H = config.hidden_size, config.slstm_num_heads
        P = D // H
        self.layer_idx = layer_idx
        self.num_heads = H
        self.options = CellOptions.of(config, config.slstm_conv_kernel_size)
        self.conv = CausalConv(D, config.slstm_conv_kernel_size) if config.slstm_conv_kernel_size else None
        self.igate = HeadwiseLinear(H, P, P, bias=False)
        self.fgate = HeadwiseLinear(H, P, P, bias=False)
        self.zgate = HeadwiseLinear(H, P, P, bias=False)
        self.ogate = HeadwiseLinear(H, P, P, bias=False)
        self.recurrent = nn.Parameter(torch.empty(4, H, P, P))  # gate order i, f, z, o; [out, in]
        self.bias = nn.Parameter(torch.empty(4, H, P))
        self.dropout = nn.Dropout(config.dropout)
        self.norm = HeadNorm(D, config.norm_eps, config.norm_bias, norm_offset(config), config.slstm_norm_weight)

    def forward(self, x: Tensor, call: Call) -> tuple[Tensor, LayerState]:
        blocks = token_blocks(x.shape[1], x.shape[0] * x.shape[2])
        if len(blocks) <= 1 or not self._may_go_in_blocks(x, call):
            return self._mix(x, call)
        parts, y, state = [], x.new_empty(0), call.state
        for block, x_block in zip(blocks, x.split(blocks[0].stop, 1), strict=True):
            part, state = self._mix(x_block.contiguous(), call.part(block, state))
            if torch.is_grad_enabled():
                parts.append(part)
            else:  # no part is held longer than it takes to make the next
                y = y if len(y) else part.new_empty(x.shape)
                y[:, block] = part
        assert state is not None
        return torch.cat(parts, 1) if parts else y, state

    def _may_go_in_blocks(self, x: Tensor, call: Call) -> bool:
        """Whether nobody can tell: no part is watched, recorded or compiled."""
        is_seen = call.record or type(call) is not Call or torch.compiler.is_compiling()
        return x.is_cpu and not is_seen and not any(map(is_hooked, self.children()))

    def _mix(self, x: Tensor, call: Call) -> tuple[Tensor, LayerState]:
        c = x if self.conv is None else self.conv(x, call.state, call.reset)
        linears = (self.igate, c), (self.fgate, c), (self.zgate, x), (self.ogate, x)
        maps = (linear(inputs, bias=bias) for (linear, inputs), bias in zip(linears, self.bias, strict=True))
        gates = (y.reshape(*x.shape[:-1], self.num_heads, y.shape[-2:].numel() // self.num_heads) for y in maps)
        inputs = (*gates, None if self.conv is None else x, call.reset)
        h, state = call.run(run_slstm, inputs, dataclasses.replace(self.options, recurrent=self.recurrent))
        return self.norm(self.dropout(h)), state
