"""The two cells for people who use `nn.LSTM`: drop-in sequence modules, and one-step cells that share their weights.

`MLSTM` and `SLSTM` are called as `nn.LSTM` is; a layer of theirs is an `MLSTMCell` or `SLSTMCell`, which can also be
used alone, one token at a time. Both run the ops of the language model, so every law of the ops holds here.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .layers_xlstm import HeadNorm
from .ops_common import bind_shapes, mark_tokens
from .ops_mlstm import mlstm
from .ops_slstm import slstm
from .states_xlstm import MLSTMState, SLSTMState

State = MLSTMState | SLSTMState
NORM_EPS = 1e-5


class RecurrentCell(nn.Module):
    """What both cells share: sizes, options and the step as a sequence of one token.

    Args:
        input_size: width of the input.
        hidden_size: width of the output, D; the heads share it.
        bias: whether projections and gates have biases.
        num_heads: H; None takes 4 where that divides `hidden_size`, else 2, else 1.
        input_gate: "exp" (paper) or "sigmoid".
        forget_gate: "sigmoid" or "exp" (the paper allows both).
        output_gate: whether a gate scales the output.
        output_tanh: whether the output passes a tanh before its gate.
        layer_norm: whether each head's output is normalised; off in the paper's cell, on in its blocks.
        backend: 'auto', 'triton', 'torch' or 'reference', which alone has second derivatives; see docs/kernels.md.
        device: where the parameters are made.
        dtype: dtype of the parameters; states are float32 or wider whatever it is.

    Raises:
        ValueError: a size is below 1, `hidden_size` is no multiple of `num_heads`, or the gates do not go together.
    """

    state_class: ClassVar[type[MLSTMState] | type[SLSTMState]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        num_heads: int | None = None,
        *,
        input_gate: str = "exp",
        forget_gate: str = "sigmoid",
        output_gate: bool = True,
        output_tanh: bool = False,
        layer_norm: bool = False,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        self.input_size, self.hidden_size, self.bias, self.backend = input_size, hidden_size, bias, backend
        self.num_heads = _heads(input_size, hidden_size, num_heads)
        self.gates = _gates(input_gate, forget_gate)
        self.output_gate, self.output_tanh = output_gate, output_tanh
        norm = HeadNorm(hidden_size, NORM_EPS, bias, offset=0.0) if layer_norm else None
        self.norm = None if norm is None else norm.to(device=device, dtype=dtype)
        self._make(input_size, hidden_size, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def _make(self, width: int, D: int, factory: dict[str, Any]) -> None:
        raise NotImplementedError

    def _run(self, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, State]:
        raise NotImplementedError

    def _gated(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        """The outputs [B, T, D] behind an output gate that sees the inputs, if the cell has one."""
        return outputs

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token.

        Args:
            inputs: [B, input_size].
            state: the state before it, as `init_hidden` makes it; None starts from there.

        Returns:
            outputs: [B, D].
            state: the state after it; the one passed in is not modified.
        """
        bind_shapes(inputs=(inputs, f"B {self.input_size}"))
        outputs, state = self.sequence(inputs[:, None], state)
        return outputs[:, 0], state

    def sequence(self, inputs: Tensor, state: Any = None, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """T tokens, the same numbers as T calls.

        Args:
            inputs: [B, T, input_size].
            state: the state before the first token; None starts from zeros.
            lengths: number of real tokens of each row, which come first, [B]; None if all are real.

        Returns:
            outputs: [B, T, D]; zero after the real tokens.
            state: the state after each row's last real token.

        Raises:
            ValueError: shapes disagree, `lengths` are not from 0 to T, or the state is another cell's.
        """
        bind_shapes(inputs=(inputs, f"B T {self.input_size}"))
        _check_dtype(inputs, self)
        fields = self.state_class._fields
        if state is not None and len(state) != len(fields):
            raise ValueError(
                f"`state` must hold {', '.join(fields)}; got {len(state)} tensors. Pass what the last call returned."
            )
        padded, _ = mark_tokens(inputs.shape[1], inputs.shape[0], lengths, None, inputs.device)
        inputs = _real(inputs, padded)
        h, state = self._run(inputs, None if state is None else self.state_class(*state), lengths)
        outputs = self._gated(h.flatten(2) if self.norm is None else self.norm(h), inputs)
        return _real(outputs, padded), state

    def init_hidden(self, batch_size: int, device: Any = None) -> Any:
        """The state before any token, for `batch_size` rows; on the device of the parameters unless one is named."""
        weight = next(self.parameters())
        like = torch.empty(0, device=weight.device if device is None else device)
        like = like.to(torch.promote_types(weight.dtype, torch.float32))
        P = self.hidden_size // self.num_heads
        sizes = (P, P) if "C" in self.state_class._fields else (P,)
        zeros: Any = self.state_class.zeros
        return zeros(batch_size, self.num_heads, *sizes, like)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights uniform in +-1/sqrt(hidden_size), as in `nn.LSTM`; biases 0, but forget gates nearly open, 3 to 6.

        Biases of exponential forget gates are 0.
        """
        bound = 1 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            if not name.startswith("norm."):
                nn.init.uniform_(parameter, -bound, bound)
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
        if self.norm is not None:
            nn.init.ones_(self.norm.weight)  # type: ignore[arg-type]
            if self.norm.bias is not None:
                nn.init.zeros_(self.norm.bias)
        self._open_forget_gates()

    def _open_forget_gates(self) -> None:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, num_heads={self.num_heads}, gates={self.gates!r}"


def _real(x: Tensor, padded: Tensor | None) -> Tensor:
    """[B, T, .] with zeros where a token is padded, [B, T]: 0 times what is not finite there would not be 0."""
    return x if padded is None else x.masked_fill(padded[..., None], 0.0)


def _check_dtype(inputs: Tensor, module: nn.Module) -> None:
    """Raise ValueError, as `nn.LSTM` does, unless inputs have the dtype of the weights, or autocast sees to that."""
    weight = next(module.parameters())
    if inputs.dtype is not weight.dtype and not torch.is_autocast_enabled(inputs.device.type):
        raise ValueError(f"`inputs` must be {weight.dtype} as the weights are; got {inputs.dtype}. Use `.to()`.")


def _heads(input_size: int, hidden_size: int, num_heads: int | None) -> int:
    """The number of heads, checked against the widths."""
    for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_heads", num_heads)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1; got {value}.")
    if num_heads is None:
        return next(heads for heads in (4, 2, 1) if hidden_size % heads == 0)
    if hidden_size % num_heads:
        low = hidden_size // num_heads * num_heads
        raise ValueError(
            f"`hidden_size` must be a multiple of `num_heads`; got {hidden_size} and {num_heads}. The nearest sizes "
            f"that work are {low or num_heads} and {low + num_heads}."
        )
    return num_heads


def _gates(input_gate: str, forget_gate: str) -> str:
    """The ops' name for a pair of gates."""
    known = {("exp", "sigmoid"): "exp", ("sigmoid", "sigmoid"): "sigmoid", ("exp", "exp"): "exp_both"}
    if (input_gate, forget_gate) not in known:
        raise ValueError(
            f"`input_gate` and `forget_gate` must be one of the pairs {list(known)}; got "
            f"{(input_gate, forget_gate)}. An exponential forget gate needs an exponential input gate's stabiliser."
        )
    return known[input_gate, forget_gate]


class MLSTMCell(RecurrentCell):
    """mLSTM cell: queries, keys, values and gates from the input; matrix memory per head; one step or a sequence.

    h = o * C^T q / max(|n . q|, 1), with C and n as in the paper and kept stabilised in log space. State and output are
    exact for any gate; `state` is an `MLSTMState` of C [B, H, P, P], n [B, H, P] and m [B, H] with P = D / H. Arguments
    are those of `RecurrentCell`.
    """

    state_class = MLSTMState

    def _make(self, width: int, D: int, factory: dict[str, Any]) -> None:
        self.q_proj = nn.Linear(width, D, self.bias, **factory)
        self.k_proj = nn.Linear(width, D, self.bias, **factory)
        self.v_proj = nn.Linear(width, D, self.bias, **factory)
        self.igate = nn.Linear(width, self.num_heads, self.bias, **factory)
        self.fgate = nn.Linear(width, self.num_heads, self.bias, **factory)
        self.ogate = nn.Linear(width, D, self.bias, **factory) if self.output_gate else None

    def _run(self, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, State]:
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        options: dict[str, Any] = {"lengths": lengths, "input_gate": self.gates, "backend": self.backend}
        return mlstm(q, k, v, self.igate(x), self.fgate(x), state, **options)

    def _gated(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        outputs = torch.tanh(outputs) if self.output_tanh else outputs
        return outputs if self.ogate is None else torch.sigmoid(self.ogate(inputs)) * outputs

    def _open_forget_gates(self) -> None:
        if self.fgate.bias is not None and self.gates != "exp_both":
            self.fgate.bias.copy_(torch.linspace(3.0, 6.0, self.num_heads))


class SLSTMCell(RecurrentCell):
    """sLSTM cell: four gates from input and previous output; scalar memories; one step or a sequence.

    h = o * c / n, with c, n and the gates as in the paper and kept stabilised in log space. The recurrent weights mix
    the channels of a head: with num_heads=1, all of them, as in `nn.LSTM`. `state` is an `SLSTMState` of c, n, m and h,
    each [B, H, P] with P = D / H; its h is not normalised. Arguments are those of `RecurrentCell`.
    """

    state_class = SLSTMState

    def _make(self, width: int, D: int, factory: dict[str, Any]) -> None:
        P, count = D // self.num_heads, 4 if self.output_gate else 3
        self.gate_proj = nn.Linear(width, count * D, self.bias, **factory)  # gate order i, f, z, o; then head, channel
        self.recurrent = nn.Parameter(torch.empty(count, self.num_heads, P, P, **factory))  # [gate, head, out, in]

    def _run(self, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, State]:
        gates = self.gate_proj(x).unflatten(-1, (-1, self.num_heads, self.hidden_size // self.num_heads))
        i_tilde, f_tilde, z_tilde, *rest = gates.unbind(2)
        recurrent: Tensor = self.recurrent
        if not rest:
            # A gate that is open whatever comes: its recurrent part is zero, and o = sigmoid(inf) = 1.
            rest, recurrent = [torch.full_like(i_tilde, torch.inf)], F.pad(recurrent, (0,) * 7 + (1,))
        options: dict[str, Any] = {"lengths": lengths, "input_gate": self.gates, "output_tanh": self.output_tanh}
        return slstm(i_tilde, f_tilde, z_tilde, rest[0], recurrent, state, **options, backend=self.backend)

    def _open_forget_gates(self) -> None:
        if self.gate_proj.bias is not None and self.gates != "exp_both":
            P = self.hidden_size // self.num_heads
            bias = self.gate_proj.bias.view(-1, self.num_heads, P)
            bias[1] = torch.linspace(3.0, 6.0, P)


class RecurrentLayers(nn.Module):
    """Layers of cells, called as `nn.LSTM` is.

    Args:
        input_size: width of the input.
        hidden_size: width of each direction of each layer, D.
        num_layers: layers, each reading the one before.
        bias: whether projections and gates have biases.
        batch_first: whether inputs and outputs are [B, T, .] or [T, B, .]. True by default, unlike `nn.LSTM`.
        dropout: dropout between layers.
        bidirectional: whether every layer also reads backwards; outputs are then twice as wide.
        num_heads: H; None takes 4 where that divides `hidden_size`, else 2, else 1.
        residual: whether a layer's input is added to its output where both have one width.
        input_norm: whether the input of every layer passes a LayerNorm.
        options: those of the cell; `layer_norm` is True here unless it says otherwise. `device` and `dtype` too.

    Raises:
        ValueError: a size or a rate is out of range.
        TypeError: an option is unknown, such as `proj_size` of `nn.LSTM`.
    """

    cell_class: ClassVar[type[RecurrentCell]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        num_heads: int | None = None,
        residual: bool = False,
        input_norm: bool = False,
        **options: Any,
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"`num_layers` must be at least 1; got {num_layers}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` is a probability, 0 <= p < 1; got {dropout}.")
        if dropout and num_layers == 1:
            warnings.warn(f"dropout={dropout} acts between layers; with num_layers=1 there are none.", stacklevel=2)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, dropout
        self.bidirectional, self.residual = bidirectional, residual
        directions = 2 if bidirectional else 1
        widths = [input_size] + [hidden_size * directions] * (num_layers - 1)
        options = {"layer_norm": True, **options}
        # One cell for each layer and direction, in the order of nn.LSTM's states.
        self.cells = nn.ModuleList(
            self.cell_class(width, hidden_size, bias, num_heads, **options)
            for width in widths
            for _ in range(directions)
        )
        factory: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        norms = (nn.LayerNorm(width, NORM_EPS, bias=bias, **factory) for width in widths)
        self.input_norms = nn.ModuleList(norms) if input_norm else None

    def forward(self, inputs: Any, state: Any = None, lengths: Tensor | None = None) -> tuple[Any, Any]:
        """Run a batch of sequences.

        Args:
            inputs: [B, T, input_size], [T, B, input_size] unless `batch_first`, [T, input_size] without a batch, or a
                `PackedSequence`.
            state: state before the first token, of the kind returned; None starts from zeros. Feeding a series in
                pieces, each with the state the one before returned, gives what the whole gives.
            lengths: number of real tokens of each row, which come first, [B]; not with a `PackedSequence`.

        Returns:
            outputs: as the inputs, with D channels, 2 D with two directions; zero after the real tokens of a row.
            state: an `MLSTMState` or `SLSTMState` whose tensors are stacked over layers and directions as in nn.LSTM,
                [num_layers * directions, B, ...], after each row's last real token.

        Raises:
            ValueError: shapes disagree, the inputs are no floating point, or `lengths` is given with a
                `PackedSequence`.
        """
        if isinstance(inputs, PackedSequence):
            if lengths is not None:
                raise ValueError("A PackedSequence knows its lengths; got `lengths` as well. Leave it out.")
            x, rows = pad_packed_sequence(inputs, batch_first=True)
            bind_shapes(inputs=(x, f"B T {self.input_size}"))
            outputs, state = self._run(x, state, rows.to(x.device))
            return _pack_like(inputs, outputs, rows), state
        bind_shapes(inputs=(inputs, self._layout(inputs.dim())))
        if inputs.dim() == 2:
            state = None if state is None else [x[:, None] for x in state]
            outputs, state = self._run(inputs[None], state, lengths)
            return outputs[0], type(state)(*(x[:, 0] for x in state))
        outputs, state = self._run(inputs if self.batch_first else inputs.transpose(0, 1), state, lengths)
        return outputs if self.batch_first else outputs.transpose(0, 1), state

    def _layout(self, dims: int) -> str:
        """The letters of inputs with so many dimensions."""
        rows = "T" if dims == 2 else "B T" if self.batch_first else "T B"
        return f"{rows} {self.input_size}"

    def _run(self, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        """Every layer over [B, T, input_size]."""
        _check_dtype(x, self)
        x = _real(x, mark_tokens(x.shape[1], x.shape[0], lengths, None, x.device)[0])  # norms and residuals read it too
        states = self._split(state, x.shape[0])
        after: list[Any] = []
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            if layer:
                x = F.dropout(x, self.dropout, self.training)
            inputs = x if self.input_norms is None else self.input_norms[layer](x)
            outputs = []
            for i in range(layer * directions, (layer + 1) * directions):
                backwards = i % directions == 1
                given = _reverse(inputs, lengths) if backwards else inputs
                y, state = self.cells[i].sequence(given, states[i], lengths)  # type: ignore[operator]
                outputs.append(_reverse(y, lengths) if backwards else y)
                after.append(state)
            y = torch.cat(outputs, -1)
            x = x + y if self.residual and x.shape[-1] == y.shape[-1] else y
        return x, type(after[0])(*(torch.stack(tensors) for tensors in zip(*after, strict=True)))

    def _split(self, state: Any, B: int) -> list[Any]:
        """The state of every cell."""
        if state is None:
            return [None] * len(self.cells)
        state_class = self.cell_class.state_class
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in state]
        if len(state) != len(state_class._fields) or {shape[:2] for shape in shapes} != {(len(self.cells), B)}:
            raise ValueError(
                f"`state` must hold {', '.join(state_class._fields)}, each [{len(self.cells)}, {B}, ...]: layers times "
                f"directions, then rows; got {shapes}. Pass what the last call returned."
            )
        return [state_class(*tensors) for tensors in zip(*(x.unbind(0) for x in state), strict=True)]

    def init_hidden(self, batch_size: int, device: Any = None) -> Any:
        """The state before any token, stacked over layers and directions."""
        states = [cell.init_hidden(batch_size, device) for cell in self.cells]  # type: ignore[operator]
        return type(states[0])(*(torch.stack(tensors) for tensors in zip(*states, strict=True)))

    def reset_parameters(self) -> None:
        """Initialise every cell and norm again."""
        for module in (*self.cells, *(self.input_norms or ())):
            module.reset_parameters()

    def flatten_parameters(self) -> None:
        """Nothing to do: scripts call it on an `nn.LSTM`, whose weights cuDNN wants in one piece."""

    def extra_repr(self) -> str:
        return f"batch_first={self.batch_first}, dropout={self.dropout}, residual={self.residual}"


def _reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The real tokens of each row in reverse, padding where it was: [B, T, .] -> [B, T, .]."""
    if lengths is None:
        return x.flip(1)
    t = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    index = torch.where(t < lengths[:, None], lengths[:, None] - 1 - t, t)
    return x.gather(1, index[..., None].expand_as(x))


def _pack_like(packed: PackedSequence, x: Tensor, lengths: Tensor) -> PackedSequence:
    """[B, T, .] as a PackedSequence in the order of another one, so that both can stand side by side."""
    order = packed.sorted_indices
    if order is not None:
        x, lengths = x.index_select(0, order), lengths.index_select(0, order.to(lengths.device))
    data = pack_padded_sequence(x, lengths, batch_first=True).data
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


class MLSTM(RecurrentLayers):
    """mLSTM with the calls of `nn.LSTM`: matrix memories, all tokens of a sequence together.

    Arguments are those of `RecurrentLayers`.
    """

    cell_class = MLSTMCell


class SLSTM(RecurrentLayers):
    """sLSTM with the calls of `nn.LSTM`: scalar memories and recurrent weights, one token after the other.

    Arguments are those of `RecurrentLayers`.
    """

    cell_class = SLSTMCell


class mLSTM(nn.Module):  # PyxLSTM's spelling
    """`MLSTM` behind the calls of PyxLSTM: (x [B, T, input_size], hidden_states) -> (outputs, hidden_states).

    `hidden_states` is a list with one `MLSTMState` per layer.

    Args:
        input_size: width of the input.
        hidden_size: width of each layer.
        num_layers: number of layers.
        dropout: dropout between layers.
    """

    layers_class: ClassVar[type[RecurrentLayers]] = MLSTM

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, dropout: float = 0.0):
        super().__init__()
        self.layers = self.layers_class(input_size, hidden_size, num_layers, dropout=dropout)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers

    def init_hidden(self, batch_size: int) -> list[Any]:
        """The state of each layer before any token."""
        return self._by_layer(self.layers.init_hidden(batch_size))

    def forward(self, input_seq: Tensor, hidden_state: Any = None) -> tuple[Tensor, list[Any]]:
        state_class = self.layers.cell_class.state_class
        if hidden_state is not None:
            counts = [len(state) for state in hidden_state]
            if counts != [len(state_class._fields)] * self.num_layers:
                raise ValueError(
                    f"`hidden_state` must hold an {state_class.__name__} for each of {self.num_layers} layers; got "
                    f"{counts} tensors. Pass what the last call returned."
                )
            hidden_state = state_class(*(torch.stack(tensors) for tensors in zip(*hidden_state, strict=True)))
        outputs, state = self.layers(input_seq, hidden_state)
        return outputs, self._by_layer(state)

    def _by_layer(self, state: Any) -> list[Any]:
        return [self.layers.cell_class.state_class(*tensors) for tensors in zip(*state, strict=True)]


class sLSTM(mLSTM):
    """`SLSTM` in the same way, with one `SLSTMState` per layer."""

    layers_class = SLSTM
