"""What each part of a block does for one token on the CPU, with as few and as cheap operations as there can be.

Products are torch's; most of what is between them is NumPy's, whose calls on small arrays cost a third of torch's, in
buffers that both see. Between products numbers are float32 or wider, where modules of a half dtype round. What is read
of the weights are views of the modules' own parameters, so whatever is written into these is seen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks_xlstm import XLSTMBlock
from .layers_xlstm import (
    CausalConv,
    FeedForward,
    HeadwiseLinear,
    MLSTMHeads,
    MLSTMLayer,
    RMSNorm,
    SLSTMLayer,
    UpMLSTMLayer,
)
from .ops_mlstm_weights import HIGHEST
from .ops_products import packed_together, plan_product
from .states_xlstm import LayerState, MLSTMState, SLSTMState

Array = np.ndarray[Any, Any]
Run = Callable[[], object]  # from buffers into buffers
Part = Callable[[LayerState], LayerState]


class Buffer:
    """Numbers that torch and NumPy both see, and their copy in the dtype of the weights where that is another one.

    Attributes:
        wide: float32 or wider.
        array: the same memory.
        narrow: of the dtype of the weights, what products read and write; `wide` itself if that is its dtype.
    """

    def __init__(self, wide: Tensor, narrow: Tensor):
        self.wide, self.narrow, self.array = wide, narrow, wide.numpy()
        self.is_split = wide.dtype is not narrow.dtype

    def widen(self) -> None:
        """Take over what a product wrote."""
        if self.is_split:
            self.wide.copy_(self.narrow)

    def round(self) -> None:
        """Prepare what a product reads."""
        if self.is_split:
            self.narrow.copy_(self.wide)

    def columns(self, count: int) -> list[Buffer]:
        """As many buffers, [B, D / count] each, side by side in this one."""
        pieces = zip(self.wide.chunk(count, 1), self.narrow.chunk(count, 1), strict=True)
        return [Buffer(wide, narrow) for wide, narrow in pieces]

    def parts(self, *shapes: tuple[int, ...]) -> list[Buffer]:
        """Buffers of these shapes, one behind the other in this one."""
        sizes = [math.prod(shape) for shape in shapes]
        pieces = zip(self.wide.view(-1).split(sizes), self.narrow.view(-1).split(sizes), shapes, strict=True)
        return [Buffer(wide.view(shape), narrow.view(shape)) for wide, narrow, shape in pieces]


class Room:
    """The buffers of a plan. Blocks run one after the other, so those of equal name and shape share theirs.

    Args:
        B: rows.
        D: width of the model.
        dtype: of the weights.
    """

    def __init__(self, B: int, D: int, dtype: torch.dtype):
        self.B, self.dtype, self.wide = B, dtype, torch.promote_types(dtype, torch.float32)
        self._buffers: dict[Any, Buffer] = {}
        self._copies: tuple[list[Tensor], list[Tensor]] = [], []
        self.x = self.take("x", B, D)  # the residual stream, wide
        self.y = self.take("y", B, D)  # what a norm makes of it

    def take(self, name: str, *shape: int) -> Buffer:
        """The buffer of this name and shape."""
        if (name, shape) not in self._buffers:
            wide = torch.zeros(shape, dtype=self.wide, device="cpu")
            self._buffers[name, shape] = Buffer(wide, wide.to(self.dtype))
        return self._buffers[name, shape]

    def weight(self, weight: Tensor) -> Tensor:
        """A weight that no product reads: itself, or a wide copy that `refresh` makes again."""
        weight = weight.detach()
        if self.dtype is self.wide:
            return weight
        wide = torch.empty_like(weight, dtype=self.wide)
        for copies, x in zip(self._copies, (wide, weight), strict=True):
            copies.append(x)
        return wide

    def refresh(self) -> None:
        """Read the weights again: what was written into them since the last token counts."""
        if self._copies[0]:
            torch._foreach_copy_(*self._copies)


def _add(x: Buffer, bias: Tensor | None, room: Room) -> list[Run]:
    """What adds a bias to wide numbers, if there is one."""
    if bias is None:
        return []
    a, b = x.array, room.weight(bias).numpy()
    return [lambda: np.add(a, b, a)]


def _products(layers: Sequence[nn.Module], x: Buffer, outs: Sequence[Buffer], group: Buffer, room: Room) -> Run:
    """out = layer(x) for several layers, into the first parts of one buffer, in their order."""
    weights = [cast(Tensor, layer.weight) for layer in layers]
    biases = [add for layer, out in zip(layers, outs, strict=True) for add in _add(out, _bias(layer), room)]
    packed = packed_together(room.B, weights)
    if packed is not None:
        sizes = [len(weight) for weight in weights]
        if room.B == 1:  # the outputs lie as their product has them
            row = group.narrow.view(-1)[: sum(sizes)]
            products: list[Run] = [lambda: row.copy_(packed.times(x.narrow, weights)[0])]
        else:
            narrow = [out.narrow for out in outs]
            products = [lambda: torch._foreach_copy_(narrow, packed.times(x.narrow, weights).split(sizes, 1))]
    else:
        pairs = zip(weights, outs, strict=True)
        products = [plan_product(x.narrow, weight.detach(), out.narrow) for weight, out in pairs]

    def run() -> None:
        for product in products:
            product()
        group.widen()
        for add in biases:
            add()

    return run


def _bias(layer: nn.Module) -> Tensor | None:
    return cast("Tensor | None", layer.bias)


def _headwise(layers: Sequence[HeadwiseLinear], xs: Sequence[Buffer], outs: Sequence[Tensor]) -> list[Run]:
    """Block-diagonal maps without their biases, each into [heads, B, O]."""
    runs: list[Run] = []
    for layer, x, out in zip(layers, xs, outs, strict=True):
        heads, _, size = layer.weight.shape
        a = x.narrow.unflatten(1, (heads, size)).transpose(0, 1)
        runs.append(functools.partial(torch.bmm, a, layer.weight.detach().mT, out=out))
    return runs


def _sum(layer: nn.Module, x: Buffer, room: Room) -> Run:
    """Add layer(x) to the residual stream."""
    weight, residual, after = cast(Tensor, layer.weight), room.x.wide, _add(room.x, _bias(layer), room)
    packed = packed_together(room.B, [weight])
    if packed is not None:
        products: list[Run] = [lambda: residual.add_(packed.times(x.narrow, [weight]))]
    elif x.is_split:
        y = room.take("sum", *residual.shape).narrow
        products = [plan_product(x.narrow, weight.detach(), y), lambda: residual.add_(y)]
    else:
        products = [plan_product(x.narrow, weight.detach(), residual, add=True)]

    def run() -> None:
        x.round()
        for product in products:
            product()
        for add in after:
            add()

    return run


def _norm_weight(norm: nn.Module, room: Room) -> Callable[[], Array | None]:
    """What a norm multiplies with, read again for every token."""
    if norm.weight is None:
        return lambda: None
    weight, offset = room.weight(cast(Tensor, norm.weight)).numpy(), getattr(norm, "offset", 0.0)
    if not offset:
        return lambda: weight
    moved = room.take("norm weight", *weight.shape).array
    return lambda: cast(Array, np.add(weight, offset, moved))


def _normalise(norm: nn.Module, shape: tuple[int, ...], room: Room) -> Callable[[Array, Array], None]:
    """The norm of x over the last dim, into out: (out, x), both of a shape [B, D] or [B, H, V]."""
    eps, read, centred = cast(RMSNorm, norm).eps, _norm_weight(norm, room), not isinstance(norm, RMSNorm)
    bias = None if norm.bias is None else room.weight(cast(Tensor, norm.bias)).numpy().reshape(shape[1:])
    column, share = room.take("column", *shape[:-1], 1).array, 1 / shape[-1]
    square = column[..., 0]

    def run(out: Array, x: Array) -> None:
        if centred:
            np.add.reduce(x, -1, out=column, keepdims=True)
            np.multiply(column, share, column)
            x = np.subtract(x, column, out)
        np.vecdot(x, x, square)
        np.multiply(column, share, column)
        np.add(column, eps, column)
        np.sqrt(column, column)
        np.divide(x, column, out)
        weight = read()
        if weight is not None:
            np.multiply(out, weight.reshape(shape[1:]), out)
        if bias is not None:
            np.add(out, bias, out)

    return run


def plan_norm(norm: nn.Module, room: Room) -> Run:
    """room.y = norm(room.x)."""
    x, y = room.x.array, room.y
    normalise = np.copyto if isinstance(norm, nn.Identity) else _normalise(norm, x.shape, room)

    def run() -> None:
        normalise(y.array, x)
        y.round()

    return run


def _sigmoid_times(x: Array, y: Array, out: Array) -> None:
    """out = sigmoid(x) * y; x is written over."""
    np.negative(x, x)
    np.exp(x, x)
    np.add(x, 1.0, x)
    np.divide(y, x, out)


def _convolution(conv: CausalConv, x: Buffer, out: Buffer, room: Room) -> Callable[[LayerState], Tensor]:
    """out = the convolution at a token x [B, D]; returns the window before the next, [B, W - 1, D]."""
    taps, bias = room.weight(conv.weight)[:, 0].T.numpy(), room.weight(conv.bias).numpy()
    past, last, given = taps[:-1], taps[-1], x.array
    terms, y = room.take("taps", room.B, *past.shape).array, room.take("tap", *out.wide.shape).array

    def run(state: LayerState) -> Tensor:
        assert state.conv is not None
        # A conversion to what a tensor is already would take as long as all that follows.
        window = state.conv if state.conv.dtype is x.narrow.dtype else state.conv.to(x.narrow.dtype)
        before = (window.to(x.wide.dtype) if x.is_split else window).numpy()
        np.multiply(before, past, terms)
        np.add.reduce(terms, 1, out=y)
        np.multiply(given, last, out.array)
        np.add(y, out.array, y)
        np.add(y, bias, y)
        np.copyto(out.array, y)
        _sigmoid_times(y, out.array, out.array)
        out.round()
        if x.is_split:
            return torch.cat([window[:, 1:], x.narrow[:, None]], 1)
        return torch.from_numpy(np.concatenate((before[:, 1:], given[:, None]), 1))

    return run


def _gates(cell: MLSTMHeads, tilde: Array, weights: Buffer) -> Callable[[Array], Array]:
    """What weighs the memory: input gate, forget gate and the normaliser's floor, weights [3, B, H].

    They are made from tilde [3, B, H], the gates' pre-activations, which are written over, and zeros, and from m before
    the token, [B, H]; m after it is returned.
    """
    cap, input_gate = cell.options.gate_soft_cap, cell.options.input_gate
    gates, i, f, w, highest = tilde[:2], tilde[0], tilde[1], weights.array, HIGHEST[weights.wide.dtype]

    def run(m: Array) -> Array:
        if cap is not None:
            np.divide(gates, cap, gates)
            np.tanh(gates, gates)
            np.multiply(gates, cap, gates)
        # log sigmoid(x) = -log(exp(-x) + 1)
        if input_gate == "sigmoid":
            np.negative(np.logaddexp(np.negative(i, i), 0.0, i), i)
        if input_gate == "exp_both":
            np.add(f, m, f)
        else:
            np.subtract(m, np.logaddexp(np.negative(f, f), 0.0, f), f)
        m = m.copy() if input_gate == "sigmoid" else np.maximum(i, f)
        np.subtract(tilde, m, w)
        np.minimum(w, highest, out=w)
        np.exp(w, w)
        return m

    return run


def _mlstm_cell(cell: MLSTMHeads, qkv: Sequence[Buffer], gates: Buffer, room: Room) -> Callable[[Any], MLSTMState]:
    """The mLSTM cell and its norm over qkv, three of [B, H * .], and gates [3, B, H], into `room`'s "h" [B, H, V]."""
    (q, k, v), B, H, eps = qkv, room.B, cell.num_heads, cell.options.eps
    K, V = q.wide.shape[1] // H, v.wide.shape[1] // H
    weights, kw, h = room.take("weights", 3, B, H), room.take("weighted k", B, H, K), room.take("h", B, H, V)
    weigh, floor, scale = _gates(cell, gates.array, weights), weights.array[2], K**-0.5
    i_column, f_column, _ = weights.array[..., None]
    f_block = weights.wide[1, ..., None, None]
    q_heads, k_heads, kw_heads = q.array.reshape(B, H, K), k.array.reshape(B, H, K), kw.array
    q_block, kw_block, v_block = q.wide.unflatten(1, (H, 1, K)), kw.wide[..., None], v.wide.unflatten(1, (H, 1, V))
    h_rows, out, normaliser = h.wide.view(B * H, 1, V), h.array, room.take("normaliser", B, H, 1).array
    product, normalise = normaliser[..., 0], _normalise(cell.norm, (B, H, V), room)

    def run(state: MLSTMState) -> MLSTMState:
        m = weigh(state.m.numpy())
        np.multiply(i_column, scale, i_column)
        np.multiply(k_heads, i_column, kw_heads)
        n = state.n.numpy() * f_column
        np.add(n, kw_heads, n)
        np.vecdot(q_heads, n, product)
        np.absolute(product, product)
        np.maximum(product, floor, out=product)
        np.add(product, eps, product)
        C = torch.empty(B, H, K, V, dtype=h_rows.dtype, device="cpu")
        torch.mul(state.C, f_block, out=C).addcmul_(kw_block, v_block)
        torch.bmm(q_block.reshape(B * H, 1, K), C.view(B * H, K, V), out=h_rows)
        np.divide(out, normaliser, out)
        normalise(out, out)
        return MLSTMState(C, torch.from_numpy(n), torch.from_numpy(m))

    return run


def _plan_mlstm(layer: MLSTMLayer, room: Room) -> Part:
    B, H, K, V = room.B, layer.cell.num_heads, layer.q_proj.out_features, layer.v_proj.out_features
    group, read_out = room.take("mlstm", B * (2 * K + 2 * V + 3 * H)), room.take("read out", B, V)
    q, k, v, o, gates = group.parts((B, K), (B, K), (B, V), (B, V), (3, B, H))
    maps = layer.q_proj, layer.k_proj, layer.v_proj, layer.ogate, layer.igate, layer.fgate
    project = _products(maps, room.y, (q, k, v, o, *gates.parts(*[(B, H)] * 3)[:2]), group, room)
    cell, h = _mlstm_cell(layer.cell, (q, k, v), gates, room), room.take("h", B, H, V // H).array.reshape(B, V)
    add = _sum(layer.out_proj, read_out, room)

    def run(state: LayerState) -> LayerState:
        project()
        after = cell(state.cell)
        _sigmoid_times(o.array, h, read_out.array)
        add()
        return LayerState(after, None)

    return run


def _plan_up_mlstm(layer: UpMLSTMLayer, room: Room) -> Part:
    B, H, E, blocks = room.B, layer.cell.num_heads, layer.skip.shape[0], layer.q_proj.weight.shape[0]
    up, qkv, gates = room.take("up", B, 2 * E), room.take("qkv", B, 3 * E), room.take("i f", 3, B, H)
    c, read_out, h = room.take("c", B, E), room.take("read out", B, E), room.take("h", B, H, E // H).array.reshape(B, E)
    a, z = up.columns(2)
    project, conv = _products([layer.up_proj], room.y, [up], up, room), _convolution(layer.conv, a, c, room)
    maps, parts = (layer.q_proj, layer.k_proj, layer.v_proj), qkv.columns(3)  # the gates read them as one
    heads = _headwise(maps, (c, c, a), [x.narrow.unflatten(1, (blocks, -1)).transpose(0, 1) for x in parts])
    biases = [add for m, part in zip(maps, parts, strict=True) for add in _add(part, m.bias, room)]
    gate = _products((layer.igate, layer.fgate), qkv, gates.parts(*[(B, H)] * 3)[:2], gates, room)
    cell, skip = _mlstm_cell(layer.cell, parts, gates, room), room.weight(layer.skip).numpy()
    add = _sum(layer.down_proj, read_out, room)

    def run(state: LayerState) -> LayerState:
        project()
        if layer.up_proj.bias is not None:
            up.round()
        window = conv(state)
        for product in heads:
            product()
        qkv.widen()
        if biases:
            for add_bias in biases:
                add_bias()
            qkv.round()
        gate()
        after = cell(state.cell)
        np.multiply(c.array, skip, read_out.array)
        np.add(h, read_out.array, h)
        np.multiply(h, z.array, h)
        _sigmoid_times(z.array, h, read_out.array)
        add()
        return LayerState(after, window)

    return run


def _slstm_cell(layer: SLSTMLayer, gates: Buffer, room: Room) -> Callable[[Any], SLSTMState]:
    """The sLSTM cell over its four gates without their recurrent parts, [4, H, B, P]; its output is the state's h."""
    _, H, B, P = gates.wide.shape
    recurrent, by_state = room.weight(layer.recurrent).mT, room.take("by state", 4, H, B, P)
    input_gate = layer.options.input_gate
    i_wide, f_wide = gates.wide[:2]
    both, (i, f, z, o) = gates.array[:2].swapaxes(1, 2), gates.array.swapaxes(1, 2)  # rows first, as in states

    def run(state: SLSTMState) -> SLSTMState:
        torch.matmul(state.h.transpose(0, 1), recurrent, out=by_state.wide)
        np.add(gates.array, by_state.array, gates.array)
        if input_gate == "sigmoid":
            i_wide.copy_(F.logsigmoid(i_wide))
        if input_gate != "exp_both":
            f_wide.copy_(F.logsigmoid(f_wide))
        c, n = state.c.numpy(), state.n.numpy()
        np.add(f, state.m.numpy(), f)
        # A cell that has seen no token forgets nothing, whatever its gate says.
        if not n.all():
            np.copyto(f, -np.inf, where=n == 0)
        m = np.maximum(i, f, order="C")
        np.subtract(both, m, both)
        np.exp(both, both)
        np.tanh(z, z)
        c = np.multiply(f, c, order="C")
        np.add(c, np.multiply(i, z, z), c)
        n = np.multiply(f, n, order="C")
        np.add(n, i, n)
        h = np.divide(c, n)
        _sigmoid_times(o, h, h)
        return SLSTMState(*map(torch.from_numpy, (c, n, m, h)))

    return run


def _plan_slstm(layer: SLSTMLayer, room: Room) -> Part:
    B, (_, H, P), x, residual = room.B, layer.bias.shape, room.y, room.x.array
    c = x if layer.conv is None else room.take("c", *x.wide.shape)
    conv = None if layer.conv is None else _convolution(layer.conv, x, c, room)
    gates, bias = room.take("slstm", 4, H, B, P), room.weight(layer.bias).numpy()[:, :, None]
    project = _headwise((layer.igate, layer.fgate, layer.zgate, layer.ogate), (c, c, x, x), gates.narrow.unbind())
    cell, normalise = _slstm_cell(layer, gates, room), _normalise(layer.norm, (B, H, P), room)
    normal = room.take("h", B, H, P).array

    def run(state: LayerState) -> LayerState:
        window = None if conv is None else conv(state)
        for product in project:
            product()
        gates.widen()
        np.add(gates.array, bias, gates.array)
        after = cell(state.cell)
        normalise(normal, after.h.numpy())
        np.add(residual, normal.reshape(residual.shape), residual)
        return LayerState(after, window)

    return run


_PLANS: dict[type, Callable[[Any, Room], Part]] = {
    MLSTMLayer: _plan_mlstm,
    UpMLSTMLayer: _plan_up_mlstm,
    SLSTMLayer: _plan_slstm,
}


def _plan_feed_forward(ffn: FeedForward, room: Room) -> Run:
    B, U, maps = room.B, ffn.up_proj.out_features, [m for m in (ffn.up_proj, ffn.gate_proj) if m is not None]
    group, hidden = room.take("feed forward", len(maps) * B * U), room.take("hidden", B, U)
    outs = group.parts(*[(B, U)] * len(maps))
    project, add = _products(maps, room.y, outs, group, room), _sum(ffn.down_proj, hidden, room)
    act, is_silu, gated = ffn.act, type(ffn.act) is nn.SiLU, len(maps) == 2
    up, activated, out = outs[0].array, outs[-1], hidden.array

    def run() -> None:
        project()
        if gated and is_silu:
            np.multiply(up, activated.array, up)
            _sigmoid_times(activated.array, up, out)
        elif gated:
            np.multiply(act(activated.wide).numpy(), up, out)
        else:
            hidden.wide.copy_(act(activated.wide))
        add()

    return run


def plan_block(block: XLSTMBlock, room: Room) -> Part:
    """The block over `room.x`; from the state of its mixer before the token to the one after."""
    mixer, mixer_norm = _PLANS[type(block.mixer)](block.mixer, room), plan_norm(block.mixer_norm, room)
    if block.ffn is None or block.ffn_norm is None:
        rest: list[Run] = []
    else:
        rest = [plan_norm(block.ffn_norm, room), _plan_feed_forward(block.ffn, room)]

    def run(state: LayerState) -> LayerState:
        mixer_norm()
        state = mixer(state)
        for part in rest:
            part()
        return state

    return run
