"""The drop-in modules and the one-step cells: nn.LSTM's calls, the paper's numbers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerances import UNSTABILISED, assert_drawn_with, assert_identical, assert_same
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from modeling_xlstm import MLSTM, SLSTM, MLSTMCell, MLSTMState, SLSTMCell, SLSTMState

MODULES = pytest.mark.parametrize("module", [MLSTM, SLSTM])
CELLS = pytest.mark.parametrize("cell_class", [MLSTMCell, SLSTMCell])
AROUND = pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"residual": True}, {"input_norm": True}, {"residual": True, "input_norm": True}],
    ids=str,
)
GATES = [{}, {"input_gate": "sigmoid"}, {"forget_gate": "exp"}]
OPTIONS = [
    {**gates, "output_gate": gate, "output_tanh": tanh, "layer_norm": norm}
    for gates, gate, tanh, norm in itertools.product(GATES, [True, False], [True, False], [False, True])
]


def frames(B: int = 3, T: int = 7, width: int = 5) -> Tensor:
    return torch.randn(B, T, width, dtype=torch.float64)


def make(module: Any, *args: Any, **options: Any) -> Any:
    made = module(*args, **options, dtype=torch.float64)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def logs_of_gates(cell: Any, i_tilde: Tensor, f_tilde: Tensor) -> tuple[Tensor, Tensor]:
    i = torch.sigmoid(i_tilde) if cell.gates == "sigmoid" else torch.exp(i_tilde)
    return i, torch.exp(f_tilde) if cell.gates == "exp_both" else torch.sigmoid(f_tilde)


def paper_mlstm(cell: Any, x: Tensor) -> Tensor:
    """The mLSTM cell as its equations read, without stabiliser: [B, T, input_size] -> [B, T, D]."""
    B, H, P = x.shape[0], cell.num_heads, cell.hidden_size // cell.num_heads
    C, n, outputs = x.new_zeros(B, H, P, P), x.new_zeros(B, H, P), []
    for x_t in x.unbind(1):
        q, k, v = (p(x_t).view(B, H, P) for p in (cell.q_proj, cell.k_proj, cell.v_proj))
        i, f = (g[..., None] for g in logs_of_gates(cell, cell.igate(x_t), cell.fgate(x_t)))
        C = f[..., None] * C + i[..., None] * k[..., :, None] * v[..., None, :] / P**0.5
        n = f * n + i * k / P**0.5
        h = (q[..., None, :] @ C)[..., 0, :] / (q * n).sum(-1, keepdim=True).abs().clamp(min=1.0)
        h = h.flatten(1) if cell.norm is None else cell.norm(h)
        h = torch.tanh(h) if cell.output_tanh else h
        outputs.append(h if cell.ogate is None else torch.sigmoid(cell.ogate(x_t)) * h)
    return torch.stack(outputs, 1)


def paper_slstm(cell: Any, x: Tensor) -> Tensor:
    """The sLSTM cell as its equations read, without stabiliser: [B, T, input_size] -> [B, T, D]."""
    B, H, P = x.shape[0], cell.num_heads, cell.hidden_size // cell.num_heads
    (c, n, h), outputs = (x.new_zeros(B, H, P) for _ in range(3)), []
    for x_t in x.unbind(1):
        gates = cell.gate_proj(x_t).view(B, -1, H, P) + torch.einsum("ghoi,bhi->bgho", cell.recurrent, h)
        i, f = logs_of_gates(cell, gates[:, 0], gates[:, 1])
        c, n = f * c + i * torch.tanh(gates[:, 2]), f * n + i
        h = torch.tanh(c / n) if cell.output_tanh else c / n
        h = h * torch.sigmoid(gates[:, 3]) if cell.output_gate else h
        outputs.append(h.flatten(1) if cell.norm is None else cell.norm(h))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@CELLS
def test_a_cell_computes_the_equations_of_the_paper_token_by_token_and_as_a_sequence(
    cell_class: Any, options: dict[str, Any]
) -> None:
    cell, x = make(cell_class, 5, 8, num_heads=2, **options), frames()
    whole, end = cell.sequence(x)
    expected = paper_mlstm(cell, x) if cell_class is MLSTMCell else paper_slstm(cell, x)
    assert_same(whole, expected, UNSTABILISED)
    state, outputs = cell.init_hidden(3), []
    for x_t in x.unbind(1):
        y, state = cell(x_t, state)
        outputs.append(y)
    assert_same((torch.stack(outputs, 1), list(state)), (whole, list(end)))
    assert_same(cell(x[:, 0])[0], whole[:, 0])


@MODULES
def test_one_training_script_runs_with_nn_lstm_and_with_ours(module: Any) -> None:
    def script(rnn_class: Any) -> tuple[Any, ...]:
        rnn = rnn_class(5, 8, 2, True, True, 0.1, True)
        rnn.flatten_parameters()
        optimizer = torch.optim.Adam(rnn.parameters(), lr=1e-2)
        packed = pack_padded_sequence(frames().float(), torch.tensor([4, 7, 2]), batch_first=True, enforce_sorted=False)
        for _ in range(2):
            outputs, state = rnn(packed)
            padded, lengths = pad_packed_sequence(outputs, batch_first=True)
            padded.square().mean().backward()
            optimizer.step()
        outputs, state = rnn(frames().float(), tuple(x.detach() for x in state))
        return outputs.shape, padded.shape, lengths.tolist(), [x.shape[:2] for x in state][:2]

    assert script(module) == script(nn.LSTM)


@AROUND
@MODULES
def test_what_padding_holds_reaches_no_output_state_or_gradient(module: Any, options: dict[str, Any]) -> None:
    """Not even what is not finite, which 0 times is not 0."""
    rnn, x, lengths = make(module, 8, 8, 2, **options), frames(width=8), torch.tensor([4, 7, 2])
    results = []
    for fill in (0.0, torch.nan, torch.inf):
        padded = x.masked_fill(torch.arange(7)[None, :, None] >= lengths[:, None, None], fill).requires_grad_()
        outputs, state = rnn(padded, lengths=lengths)
        parameters = list(rnn.parameters())
        results.append([outputs, *state, *torch.autograd.grad(outputs.square().sum(), [*parameters, padded])])
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])


@AROUND
@MODULES
def test_lengths_and_packed_sequences_equal_each_row_alone(module: Any, options: dict[str, Any]) -> None:
    rnn, x, lengths = make(module, 8, 8, 2, **options), frames(width=8), torch.tensor([4, 7, 2])
    outputs, state = rnn(x, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    repacked, packed_state = rnn(packed)
    assert_same((pad_packed_sequence(repacked, batch_first=True)[0], list(packed_state)), (outputs, list(state)))
    for mine, theirs in zip(repacked[1:], packed[1:], strict=True):
        assert_identical(mine, theirs)
    for row, length in enumerate(lengths.tolist()):
        alone, end = rnn(x[row : row + 1, :length])
        assert_same((outputs[row : row + 1, :length], [s[:, row : row + 1] for s in state]), (alone, list(end)))
        assert_identical(outputs[row, length:], torch.zeros_like(outputs[row, length:]))
        unbatched, end = rnn(x[row, :length])
        assert_same((unbatched, list(end)), (alone[0], [s[:, row] for s in state]))


@MODULES
@given(cut=st.integers(1, 10), layers=st.integers(1, 3))
def test_a_series_fed_in_pieces_gives_what_the_whole_gives_gradients_too(module: Any, cut: int, layers: int) -> None:
    rnn, x = make(module, 5, 4, layers), frames(T=11).requires_grad_()
    whole, end = rnn(x)
    first, middle = rnn(x[:, :cut])
    second, after = rnn(x[:, cut:], middle)
    pieces = torch.cat([first, second], 1)
    assert_same((pieces, list(after)), (whole, list(end)))
    wrt = [x, *rnn.parameters()]
    gradients = [torch.autograd.grad((y * y).sum() + s[0].sum(), wrt) for y, s in ((pieces, after), (whole, end))]
    # Side by side: what a norm makes zero is rounding by itself.
    assert_same(*(torch.cat([g.flatten() for g in each]) for each in gradients))


@MODULES
def test_the_backward_direction_is_the_forward_one_on_the_reversed_series(module: Any) -> None:
    rnn, x = make(module, 5, 8, bidirectional=True), frames()
    outputs, state = rnn(x)
    reverse, end = rnn.cells[1].sequence(x.flip(1))
    assert_same((outputs[..., 8:], [s[1] for s in state]), (reverse.flip(1), list(end)))
    assert_same(outputs[..., :8], rnn.cells[0].sequence(x)[0])


@MODULES
def test_time_may_come_first(module: Any) -> None:
    rnn, x = make(module, 5, 8, 2), frames()
    outputs, state = rnn(x)
    rnn.batch_first = False
    by_time, same_state = rnn(x.transpose(0, 1))
    assert_identical((by_time.transpose(0, 1), list(same_state)), (outputs, list(state)))


@MODULES
def test_residual_and_input_norm_act_where_widths_agree(module: Any) -> None:
    rnn, x = make(module, 5, 8, 2, residual=True, input_norm=True), frames()
    y = rnn.cells[0].sequence(rnn.input_norms[0](x))[0]
    y = y + rnn.cells[1].sequence(rnn.input_norms[1](y))[0]
    assert_same(rnn(x)[0], y)
    square, x = make(module, 8, 8, residual=True), frames(width=8)
    assert_same(square(x)[0], x + square.cells[0].sequence(x)[0])


@MODULES
def test_dropout_acts_between_layers_in_training_only(module: Any) -> None:
    rnn, x = make(module, 5, 8, 2, dropout=0.5), frames()
    torch.manual_seed(1)
    trained = rnn(x)[0]
    torch.manual_seed(1)
    first = F.dropout(rnn.cells[0].sequence(x)[0], 0.5)
    assert_same(trained, rnn.cells[1].sequence(first)[0])
    assert_identical(rnn.eval()(x)[0], rnn(x)[0])
    with pytest.warns(UserWarning, match="between layers"):
        module(5, 8, dropout=0.5)


@CELLS
def test_fresh_weights_are_those_of_nn_lstm_and_forget_gates_are_nearly_open(cell_class: Any) -> None:
    cell = cell_class(40, 64, num_heads=4, layer_norm=True)
    before = {name: parameter.clone() for name, parameter in cell.named_parameters()}
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.fill_(7.0)  # as if trained
    cell.reset_parameters()
    for name, parameter in cell.named_parameters():
        if name.endswith("bias") or name == "norm.weight":
            assert_identical(parameter, before[name])
        else:
            assert_drawn_with(parameter, 0.0, 64**-0.5 / 3**0.5)
            assert not torch.equal(parameter, before[name])
    if cell_class is MLSTMCell:
        assert_same(cell.fgate.bias, torch.linspace(3, 6, 4))
    else:
        bias = cell.gate_proj.bias.view(4, 4, 16)
        assert_same(bias[1], torch.linspace(3, 6, 16).expand(4, 16))
        assert not bias[[0, 2, 3]].any()


@CELLS
def test_no_bias_and_no_output_gate_mean_no_such_parameters(cell_class: Any) -> None:
    cell = cell_class(5, 8, bias=False, output_gate=False, layer_norm=True)
    assert not [name for name, _ in cell.named_parameters() if "bias" in name or "ogate" in name]
    assert cell_class is MLSTMCell or cell.recurrent.shape == (3, 4, 2, 2)


@MODULES
def test_states_of_a_bfloat16_module_are_float32_and_start_at_zero(module: Any) -> None:
    rnn = module(5, 8, 2, dtype=torch.bfloat16)
    start = rnn.init_hidden(3)
    assert all(not x.any() and x.dtype == torch.float32 and x.shape[:2] == (2, 3) for x in start)
    x = frames().bfloat16()
    outputs, state = rnn(x, start)
    assert outputs.dtype == torch.bfloat16
    assert {s.dtype for s in state} == {torch.float32}
    assert_identical(outputs, rnn(x)[0])


@MODULES
def test_under_autocast_inputs_may_have_its_precision(module: Any) -> None:
    rnn, x = module(5, 8), frames().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        (outputs, state), (wide, _) = rnn(x), rnn(x.float())
    assert {s.dtype for s in state} == {torch.float32}
    assert_identical(outputs.to(wide.dtype), wide)


@CELLS
def test_a_cell_is_made_and_its_states_start_on_the_device_named(cell_class: Any) -> None:
    cell = cell_class(5, 8, layer_norm=True, device="meta")
    assert {parameter.device.type for parameter in cell.parameters()} == {"meta"}
    for starting, named, device in ((cell, None, "meta"), (cell, "cpu", "cpu"), (cell_class(5, 8), "meta", "meta")):
        assert {x.device.type for x in starting.init_hidden(3, named)} == {device}


@MODULES
def test_a_state_saved_by_torch_is_loaded_by_torch(module: Any, tmp_path: Path) -> None:
    state = make(module, 5, 8)(frames())[1]
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    assert type(loaded) is type(state)
    assert_identical(list(loaded), list(state))


@CELLS
def test_an_exported_cell_takes_any_number_of_rows(cell_class: Any) -> None:
    cell = make(cell_class, 5, 8)
    with torch.no_grad():
        rows = ({0: torch.export.Dim("B", min=2, max=50)},)
        exported = torch.export.export(cell, (frames()[:, 0],), dynamic_shapes=rows).module()
        x = frames(B=9)[:, 0]
        (h, state), (h_exported, state_exported) = cell(x), exported(x)
        assert_same([h_exported, *state_exported], [h, *state])


@pytest.mark.parametrize(("hidden_size", "heads"), [(50, 2), (64, 4), (7, 1)])
def test_every_width_has_a_number_of_heads_by_default(hidden_size: int, heads: int) -> None:
    assert MLSTM(3, hidden_size).cells[0].num_heads == heads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 10, "num_heads": 4}, "nearest sizes that work are 8 and 12"),
        ({"hidden_size": 0}, "`hidden_size` must be at least 1"),
        ({"num_layers": 0}, "`num_layers` must be at least 1"),
        ({"dropout": 1.5}, "`dropout` is a probability"),
        ({"input_gate": "sigmoid", "forget_gate": "exp"}, "must be one of the pairs"),
    ],
    ids=str,
)
@MODULES
def test_bad_sizes_and_gates_are_named(module: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**{"input_size": 5, "hidden_size": 8, **arguments})
    with pytest.raises(TypeError, match="proj_size"):
        module(5, 8, proj_size=4)


@MODULES
def test_lengths_may_be_of_any_integers(module: Any) -> None:
    rnn, x, lengths = make(module, 5, 8, bidirectional=True), frames(2, 200), torch.tensor([100, 0])
    expected = rnn(x, lengths=lengths)
    for dtype in (torch.int8, torch.uint8, torch.int16):
        assert_identical(list(rnn(x, lengths=lengths.to(dtype))), list(expected))


@MODULES
def test_bad_inputs_are_named(module: Any) -> None:
    rnn, x = make(module, 5, 8, 2), frames()
    with pytest.raises(ValueError, match=r"`inputs` must be \[B, T, 5\]; got shape \(3, 7, 4\)"):
        rnn(frames(width=4))
    with pytest.raises(ValueError, match=r"`inputs` must be \[T, 5\]; got shape \(7, 4\)"):
        rnn(frames(width=4)[0])
    with pytest.raises(ValueError, match=r"`inputs` must be \[T, B, 5\]; got shape \(3, 7, 4\)"):
        make(module, 5, 8, batch_first=False)(frames(width=4))
    with pytest.raises(ValueError, match=r"`inputs` must be \[B, T, 5\]; got shape \(5,\)"):
        rnn(x[0, 0])
    with pytest.raises(ValueError, match=r"`inputs` must be \[B, T, 5\]; got shape \(3, 7, 4\)"):
        rnn.cells[0].sequence(frames(width=4))
    with pytest.raises(ValueError, match=r"`inputs` must be floating point; got torch\.int64"):
        rnn(x.long())
    with pytest.raises(ValueError, match=r"each \[2, 3, ...\]"):
        rnn(x, rnn.init_hidden(4))
    other = SLSTMState if module is MLSTM else MLSTMState
    with pytest.raises(ValueError, match="`state` must hold"):
        rnn(x, other(*(x.new_zeros(2, 3) for _ in other._fields)))
    with pytest.raises(
        ValueError, match=f"`state` must hold {', '.join(module.cell_class.state_class._fields)}; got 2"
    ):
        rnn.cells[0](x[:, 0], (torch.zeros(3, 8), torch.zeros(3, 8)))
    with pytest.raises(ValueError, match=r"`lengths` must be from 0 to T = 7; got \[7, 9, 1\]"):
        rnn(x, lengths=torch.tensor([7, 9, 1]))
    with pytest.raises(ValueError, match=r"`inputs` must be torch\.float64 as the weights are; got torch\.float32"):
        rnn(x.float())
    with pytest.raises(ValueError, match=r"`inputs` must be \[B, T, 5\]; got shape \(3, 7, 4\)"):
        make(module, 5, 8, input_norm=True)(pack_padded_sequence(frames(width=4), torch.tensor([7] * 3), True))
    with pytest.raises(ValueError, match=r"each \[2, 3, ...\]: layers times .* got \['.*State', '.*State'"):
        rnn(x, [rnn.init_hidden(3)] * len(module.cell_class.state_class._fields))
    with pytest.raises(ValueError, match="knows its lengths"):
        rnn(pack_padded_sequence(x, torch.tensor([7, 7, 7]), batch_first=True), lengths=torch.tensor([7, 7, 7]))
