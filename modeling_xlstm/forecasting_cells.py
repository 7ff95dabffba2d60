"""pytorch-forecasting's xLSTM cells, layers and networks: the same parameter names, calls and numbers.

For state dicts trained there (`pytorch_forecasting` 1.8). These are not the paper's cells: their "mLSTM" keeps a
vector, v scaled by the sum of k, instead of a matrix, and has sigmoid gates only; their "sLSTM" normalises gates over
channels instead of over time. `PaperMLSTMCell` and `PaperSLSTMCell` are the paper's behind the same calls; layers and
networks take them as `cell_class`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .ops_common import bind_shapes
from .recurrent_xlstm import MLSTMCell, SLSTMCell
from .states_xlstm import MLSTMState, SLSTMState

MLSTM_EPS = 1e-8
SLSTM_EPS = 1e-6
Vectors = list[Tensor]


def _zeros(module: nn.Module, *shape: int, device: Any = None) -> Tensor:
    weight = next(module.parameters())
    return torch.zeros(shape, device=weight.device if device is None else device, dtype=weight.dtype)


class mLSTMCell(nn.Module):  # the library's spelling
    """One step of a gated vector memory: (x [B, input_size], h, c, n, each [B, hidden_size]) -> (h, c, n).

    `h_prev` takes part in nothing; it is there for the library's call. Keys are scaled before their norm.

    Args:
        input_size: width of the input.
        hidden_size: width of h, c and n.
        dropout: dropout of the input.
        layer_norm: whether queries, keys, values and gates are normalised.
    """

    def __init__(self, input_size: int, hidden_size: int, dropout: float = 0.2, layer_norm: bool = True):
        super().__init__()
        self.input_size, self.hidden_size, self.layer_norm = input_size, hidden_size, layer_norm
        for name in "qkvifo":
            setattr(self, f"W{name}", nn.Linear(input_size, hidden_size))
        for name in "qkvifo" if layer_norm else "":
            setattr(self, f"ln_{name}", nn.LayerNorm(hidden_size))
        self.dropout = nn.Dropout(dropout)

    def _project(self, name: str, x: Tensor, scale: float = 1.0) -> Tensor:
        y = getattr(self, f"W{name}")(x) / scale
        return getattr(self, f"ln_{name}")(y) if self.layer_norm else y

    def forward(self, x: Tensor, h_prev: Tensor, c_prev: Tensor, n_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bind_shapes(
            x=(x, f"B {self.input_size}"),
            h_prev=(h_prev, f"B {self.hidden_size}"),
            c_prev=(c_prev, f"B {self.hidden_size}"),
            n_prev=(n_prev, f"B {self.hidden_size}"),
        )
        x = self.dropout(x)
        k, v = self._project("k", x, math.sqrt(self.hidden_size)), self._project("v", x)
        i, f, o = (torch.sigmoid(self._project(name, x)) for name in "ifo")
        # The outer product of k and v, summed over the keys.
        c = f * c_prev + i * k.sum(1, keepdim=True) * v
        n = f * n_prev + i * k
        return o * torch.tanh(c * n / (n.norm(dim=-1, keepdim=True) + MLSTM_EPS)), c, n

    def init_hidden(self, batch_size: int, device: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """h, c, n before any token."""
        h, c, n = (_zeros(self, batch_size, self.hidden_size, device=device) for _ in range(3))
        return h, c, n


class sLSTMCell(nn.Module):
    """One step with gates normalised over channels: (x [B, input_size], h, c, each [B, hidden_size]) -> (h, c).

    Args:
        input_size: width of the input.
        hidden_size: width of h and c.
        dropout: dropout of the input and of h.
        use_layer_norm: whether gates, cell and output are normalised.
    """

    def __init__(self, input_size: int, hidden_size: int, dropout: float = 0.0, use_layer_norm: bool = True):
        super().__init__()
        self.input_size, self.hidden_size, self.use_layer_norm = input_size, hidden_size, use_layer_norm
        self.input_weights = nn.Linear(input_size, 4 * hidden_size)  # gate order i, f, z, o
        self.hidden_weights = nn.Linear(hidden_size, 4 * hidden_size)
        self.ln_cell = nn.LayerNorm(hidden_size) if use_layer_norm else nn.Identity()
        self.ln_hidden = nn.LayerNorm(hidden_size) if use_layer_norm else nn.Identity()
        self.ln_input = nn.LayerNorm(4 * hidden_size) if use_layer_norm else nn.Identity()
        self.ln_hidden_update = nn.LayerNorm(4 * hidden_size) if use_layer_norm else nn.Identity()
        self.dropout_layer = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every parameter, norms too, uniform in +-1/sqrt(hidden_size), as in the library."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def normalized_exp_gate(self, pre_gate: Tensor) -> Tensor:
        """[B, hidden_size] centred, clamped to +-5, exponentiated, divided by its sum over the channels."""
        gate = torch.exp((pre_gate - pre_gate.mean(1, keepdim=True)).clamp(-5.0, 5.0))
        return gate / (gate.sum(1, keepdim=True) + SLSTM_EPS)

    def forward(self, x: Tensor, h_prev: Tensor, c_prev: Tensor) -> tuple[Tensor, Tensor]:
        bind_shapes(
            x=(x, f"B {self.input_size}"),
            h_prev=(h_prev, f"B {self.hidden_size}"),
            c_prev=(c_prev, f"B {self.hidden_size}"),
        )
        gates = self.ln_input(self.input_weights(self.dropout_layer(x)))
        gates = gates + self.ln_hidden_update(self.hidden_weights(self.dropout_layer(h_prev)))
        i_tilde, f_tilde, z_tilde, o_tilde = gates.chunk(4, 1)
        i, f = self.normalized_exp_gate(i_tilde), self.normalized_exp_gate(f_tilde)
        total = i + f + SLSTM_EPS
        c = self.ln_cell((f * c_prev + i * torch.tanh(z_tilde)) / total)
        return torch.sigmoid(o_tilde) * self.ln_hidden(torch.tanh(c)), c

    def init_hidden(self, batch_size: int, device: Any = None) -> tuple[Tensor, Tensor]:
        """h, c before any token."""
        h, c = (_zeros(self, batch_size, self.hidden_size, device=device) for _ in range(2))
        return h, c


class PaperMLSTMCell(nn.Module):
    """The paper's mLSTM behind the calls of `mLSTMCell`; arguments are the same.

    c is the matrix memory [B, H, P, P]; n holds normaliser and, last, stabiliser of each head, [B, H, P + 1].
    """

    def __init__(self, input_size: int, hidden_size: int, dropout: float = 0.2, layer_norm: bool = True):
        super().__init__()
        self.cell = MLSTMCell(input_size, hidden_size, layer_norm=layer_norm)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, h_prev: Tensor, c_prev: Tensor, n_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, state = self.cell(self.dropout(x), MLSTMState(c_prev, n_prev[..., :-1], n_prev[..., -1]))
        return h, state.C, torch.cat([state.n, state.m[..., None]], -1)

    def init_hidden(self, batch_size: int, device: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """h, c, n before any token."""
        C, n, m = self.cell.init_hidden(batch_size, device)
        return _zeros(self, batch_size, self.cell.hidden_size, device=device), C, torch.cat([n, m[..., None]], -1)


class PaperSLSTMCell(nn.Module):
    """The paper's sLSTM behind the calls of `sLSTMCell`; arguments are the same.

    c holds cell, normaliser, stabiliser and the output that the recurrent weights see, [B, 4, H, P]: h may come back
    with a residual added. So dropout acts on the input only.
    """

    def __init__(self, input_size: int, hidden_size: int, dropout: float = 0.0, use_layer_norm: bool = True):
        super().__init__()
        self.cell = SLSTMCell(input_size, hidden_size, layer_norm=use_layer_norm)
        self.dropout_layer = nn.Dropout(dropout)

    def forward(self, x: Tensor, h_prev: Tensor, c_prev: Tensor) -> tuple[Tensor, Tensor]:
        h, state = self.cell(self.dropout_layer(x), SLSTMState(*c_prev.unbind(1)))
        return h, torch.stack(state, 1)

    def init_hidden(self, batch_size: int, device: Any = None) -> tuple[Tensor, Tensor]:
        """h, c before any token."""
        state = self.cell.init_hidden(batch_size, device)
        return _zeros(self, batch_size, self.cell.hidden_size, device=device), torch.stack(state, 1)


class mLSTMLayer(nn.Module):
    """Stacked `mLSTMCell`s over x [T, B, input_size] -> ([T, B, hidden_size], (h, c, n), each [num_layers, B, ...]).

    Args:
        input_size: width of the input.
        hidden_size: width of every cell.
        num_layers: number of cells.
        dropout: dropout of the cells.
        layer_norm: norms of the cells.
        residual_conn: whether each cell from the second on adds its input to its output.
        cell_class: `mLSTMCell` or `PaperMLSTMCell`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        dropout: float = 0.2,
        layer_norm: bool = True,
        residual_conn: bool = True,
        cell_class: type[nn.Module] = mLSTMCell,
    ):
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.residual_conn = residual_conn
        widths = [input_size] + [hidden_size] * (num_layers - 1)
        self.cells = nn.ModuleList(cell_class(width, hidden_size, dropout, layer_norm) for width in widths)

    def forward(
        self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None, n: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        given = _all_or_none(h=h, c=c, n=n)
        h, c, n = self.init_hidden(x.shape[1]) if given is None else given
        outputs = []
        for x_t in x.unbind(0):
            states = []
            for i, cell in enumerate(self.cells):
                h_i, c_i, n_i = cell(x_t, h[i], c[i], n[i])
                # The sum is also the h that the layer returns.
                x_t = h_i + x_t if self.residual_conn and i else h_i
                states.append((x_t, c_i, n_i))
            h, c, n = (torch.stack(tensors) for tensors in zip(*states, strict=True))
            outputs.append(h[-1])
        return torch.stack(outputs), (h, c, n)

    def init_hidden(self, batch_size: int, device: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """h, c, n before any token, stacked over cells."""
        states = [cell.init_hidden(batch_size, device) for cell in self.cells]  # type: ignore[operator]
        h, c, n = (torch.stack(tensors) for tensors in zip(*states, strict=True))
        return h, c, n


class sLSTMLayer(nn.Module):
    """Stacked `sLSTMCell`s over x [T, B, input_size] -> ([T, B, hidden_size], (h, c), lists of [B, hidden_size]).

    As in the library the states returned are detached, and the lists given are not modified (there they are).

    Args:
        input_size: width of the input.
        hidden_size: width of every cell.
        num_layers: number of cells.
        dropout: dropout of the cells.
        use_layer_norm: norms in and after the cells.
        use_residual: whether each cell adds its input, the first one projected to its width if it has another.
        cell_class: `sLSTMCell` or `PaperSLSTMCell`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        use_layer_norm: bool = True,
        use_residual: bool = True,
        cell_class: type[nn.Module] = sLSTMCell,
    ):
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.use_residual = use_residual
        projects = use_residual and input_size != hidden_size
        self.input_projection = nn.Linear(input_size, hidden_size, bias=False) if projects else nn.Identity()
        widths = [input_size] + [hidden_size] * (num_layers - 1)
        self.cells = nn.ModuleList(cell_class(width, hidden_size, dropout, use_layer_norm) for width in widths)
        self.layer_norm_layers = nn.ModuleList(
            nn.LayerNorm(hidden_size) if use_layer_norm else nn.Identity() for _ in widths
        )

    def forward(
        self, x: Tensor, h: Sequence[Tensor] | None = None, c: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, tuple[Vectors, Vectors]]:
        given = _all_or_none(h=h, c=c)
        h, c = (list(state) for state in (self.init_hidden(x.shape[1], x.device) if given is None else given))
        outputs = []
        for x_t in x.unbind(0):
            for i, cell in enumerate(self.cells):
                h_i, c[i] = cell(x_t, h[i], c[i])
                if self.use_residual:
                    h_i = h_i + (x_t if i else self.input_projection(x_t))
                h[i] = x_t = self.layer_norm_layers[i](h_i)
            outputs.append(x_t)
        return torch.stack(outputs), ([x.detach() for x in h], [x.detach() for x in c])

    def init_hidden(self, batch_size: int, device: Any = None) -> tuple[Vectors, Vectors]:
        """h, c before any token, one of each per cell."""
        states = [cell.init_hidden(batch_size, device) for cell in self.cells]  # type: ignore[operator]
        return [h for h, _ in states], [c for _, c in states]


class mLSTMNetwork(nn.Module):
    """`mLSTMLayer` and a linear map of its last output: x [T, B, input_size] -> ([B, output_size], (h, c, n)).

    Args:
        input_size: width of the input.
        hidden_size: width of every cell.
        num_layers: number of cells.
        output_size: width of the output.
        dropout: dropout of the cells.
        use_layer_norm: norms of the cells.
        use_residual: residual connections between cells.
        cell_class: `mLSTMCell` or `PaperMLSTMCell`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        output_size: int,
        dropout: float = 0.0,
        use_layer_norm: bool = True,
        use_residual: bool = True,
        cell_class: type[nn.Module] = mLSTMCell,
    ):
        super().__init__()
        self.mlstm_layer = mLSTMLayer(
            input_size, hidden_size, num_layers, dropout, use_layer_norm, use_residual, cell_class
        )
        self.fc = nn.Linear(hidden_size, output_size)

    def forward(
        self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None, n: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        outputs, state = self.mlstm_layer(x, h, c, n)
        return self.fc(outputs[-1]), state

    def init_hidden(self, batch_size: int, device: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the layer."""
        return self.mlstm_layer.init_hidden(batch_size, device)


class sLSTMNetwork(nn.Module):
    """`sLSTMLayer` and a linear map of its last output: x [T, B, input_size] -> ([B, output_size], (h, c)).

    Arguments are those of `mLSTMNetwork`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        output_size: int,
        dropout: float = 0.0,
        use_layer_norm: bool = True,
        use_residual: bool = True,
        cell_class: type[nn.Module] = sLSTMCell,
    ):
        super().__init__()
        self.slstm_layer = sLSTMLayer(
            input_size, hidden_size, num_layers, dropout, use_layer_norm, use_residual, cell_class
        )
        self.fc = nn.Linear(hidden_size, output_size)

    def forward(
        self, x: Tensor, h: Sequence[Tensor] | None = None, c: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, tuple[Vectors, Vectors]]:
        outputs, state = self.slstm_layer(x, h, c)
        return self.fc(outputs[-1]), state

    def init_hidden(self, batch_size: int, device: Any = None) -> tuple[Vectors, Vectors]:
        """Those of the layer."""
        return self.slstm_layer.init_hidden(batch_size, device)


def _all_or_none(**states: Any) -> tuple[Any, ...] | None:
    """The states given, or None; half a state would be replaced without a word."""
    missing = [name for name, state in states.items() if state is None]
    if missing and len(missing) < len(states):
        raise ValueError(f"Pass all of {list(states)} or none; {missing} missing. `init_hidden` makes a fresh state.")
    return None if missing else tuple(states.values())
