"""pytorch-forecasting's cells: its state dicts load, and its numbers come out.

`tests/golden/pytorch_forecasting.safetensors` was recorded from version 1.8.0 in float64: for each case, random weights
under the library's own names, inputs, and what the library returned in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any

import pytest
import torch
from checkout import ROOT
from safetensors.torch import load_file
from tolerances import assert_drawn_with, assert_identical, assert_same
from torch import Tensor

from modeling_xlstm import MLSTMState, SLSTMState, mLSTM, sLSTM
from modeling_xlstm.forecasting_cells import (
    PaperMLSTMCell,
    PaperSLSTMCell,
    mLSTMCell,
    mLSTMLayer,
    mLSTMNetwork,
    sLSTMCell,
    sLSTMLayer,
    sLSTMNetwork,
)

GOLDEN = load_file(ROOT / "tests" / "golden" / "pytorch_forecasting.safetensors")
CASES = sorted({name.split("/")[0] for name in GOLDEN} - {"gate"})


def part(case: str, kind: str) -> dict[str, Tensor]:
    prefix = f"{case}/{kind}/"
    return {name.removeprefix(prefix): x for name, x in GOLDEN.items() if name.startswith(prefix)}


def tensors(result: Any) -> Iterator[Tensor]:
    """The tensors of a result in order, a list of them stacked."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, list):
        yield torch.stack(result)
    else:
        for entry in result:
            yield from tensors(entry)


def make(case: str) -> Any:
    cell, kind, *options = case.split("_")
    norm = "bare" not in options
    sizes = (3, 4) if kind == "cell" else (3, 4, 2, 2) if kind == "network" else (3, 4, 2)
    classes: dict[str, Any] = {"mlstm_cell": mLSTMCell, "mlstm_layer": mLSTMLayer, "mlstm_network": mLSTMNetwork}
    classes |= {"slstm_cell": sLSTMCell, "slstm_layer": sLSTMLayer, "slstm_network": sLSTMNetwork}
    by_name = cell == "mlstm" and kind != "network"
    named: dict[str, Any] = {"layer_norm" if by_name else "use_layer_norm": norm}
    if "plain" in options:
        named["residual_conn" if by_name else "use_residual"] = False
    module = classes[f"{cell}_{kind}"](*sizes, **named).double().eval()
    module.load_state_dict(part(case, "weights"))
    return module


@pytest.mark.parametrize("case", CASES)
def test_the_librarys_state_dict_loads_and_its_numbers_come_out(case: str) -> None:
    inputs = list(part(case, "inputs").values())
    before = [x.clone() for x in inputs]
    expected = part(case, "outputs")
    results = list(tensors(make(case)(*inputs)))
    assert_same(results, [expected[str(i)] for i in range(len(expected))])
    assert_identical(inputs, before)


def test_the_normalised_gate_is_the_librarys() -> None:
    gate = sLSTMCell(3, 4).normalized_exp_gate(GOLDEN["gate/inputs/0"])
    assert_same(gate, GOLDEN["gate/outputs/0"])


def test_dropout_is_by_default_the_librarys() -> None:
    with_it = {mLSTMCell, mLSTMLayer, PaperMLSTMCell}
    for module in (*with_it, mLSTMNetwork, sLSTMCell, sLSTMLayer, sLSTMNetwork, PaperSLSTMCell):
        assert signature(module).parameters["dropout"].default == (0.2 if module in with_it else 0.0)


def test_an_slstm_cell_starts_uniform_in_all_parameters_as_the_librarys() -> None:
    for name, parameter in sLSTMCell(64, 64).named_parameters():
        assert parameter.abs().max() <= 64**-0.5, name
        assert_drawn_with(parameter, 0.0, 64**-0.5 / 3**0.5)


def test_an_slstm_layer_projects_inputs_of_another_width_only() -> None:
    for width, projected in ((3, True), (4, False)):
        layer = sLSTMLayer(width, 4, 2)
        assert ("input_projection.weight" in layer.state_dict()) == projected
        assert layer(torch.randn(5, 2, width))[0].shape == (5, 2, 4)


def test_an_slstm_layer_returns_states_without_their_graph() -> None:
    outputs, states = sLSTMLayer(3, 4, 2)(torch.randn(5, 2, 3))
    assert outputs.requires_grad
    assert not any(x.requires_grad for x in tensors(states))


@pytest.mark.parametrize(
    ("network", "cell_class"),
    [
        (mLSTMNetwork, mLSTMCell),
        (sLSTMNetwork, sLSTMCell),
        (mLSTMNetwork, PaperMLSTMCell),
        (sLSTMNetwork, PaperSLSTMCell),
    ],
)
def test_networks_take_either_cell_go_on_from_a_state_and_train(network: Any, cell_class: Any) -> None:
    model = network(3, 8, 2, 1, cell_class=cell_class).double()
    assert isinstance(next(iter(model.children())).cells[0], cell_class)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    whole, _ = model(x)
    _, state = model(x[:4], *model.init_hidden(2))
    assert_same(model(x[4:], *state)[0], whole)
    whole.square().sum().backward()
    # The library's mLSTM reads no query.
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert all("Wq" in name or "ln_q" in name for name in unused)


@pytest.mark.parametrize(("cell_class", "states"), [(PaperMLSTMCell, 3), (PaperSLSTMCell, 2)])
def test_the_papers_cells_behind_the_same_calls_are_the_papers_cells(cell_class: Any, states: int) -> None:
    cell = cell_class(3, 8).double().eval()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    hidden, outputs = cell.init_hidden(2), []
    assert len(hidden) == states
    for x_t in x.unbind(1):
        hidden = cell(x_t, *hidden)
        outputs.append(hidden[0])
    assert_same(torch.stack(outputs, 1), cell.cell.sequence(x)[0])


def test_a_state_in_part_and_wrong_shapes_are_named() -> None:
    layer, x = mLSTMLayer(3, 4, 2), torch.randn(5, 2, 3)
    h, c, _ = layer.init_hidden(2)
    with pytest.raises(ValueError, match=r"\['n'\] missing"):
        layer(x, h, c)
    right, wrong = torch.zeros(2, 4), torch.zeros(2, 5)
    for cell in (mLSTMCell(3, 4), sLSTMCell(3, 4)):
        names = [name for name in signature(cell.forward).parameters if name != "x"]
        with pytest.raises(ValueError, match=r"`x` must be \[B, 3\]"):
            cell(right, *[right] * len(names))
        for i, name in enumerate(names):
            with pytest.raises(ValueError, match=rf"`{name}` must be \[B, 4\]"):
                cell(x[0], *[wrong if i == j else right for j in range(len(names))])


@pytest.mark.parametrize(("module", "state_class"), [(mLSTM, MLSTMState), (sLSTM, SLSTMState)])
def test_pyxlstm_calls_return_a_state_per_layer_and_take_it_back(module: Any, state_class: Any) -> None:
    model = module(3, 8, 2, 0.1).double().eval()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    whole, end = model(x)
    assert [type(state) for state in end] == [state_class] * 2
    first, hidden_states = model(x[:, :4])
    second, after = model(x[:, 4:], hidden_states)
    assert_same((torch.cat([first, second], 1), [list(s) for s in after]), (whole, [list(s) for s in end]))
    assert_identical(model(x, model.init_hidden(2))[0], whole)
    assert (model.hidden_size, model.num_layers) == (8, 2)
    for wrong in ([], [end[0]], [(x, x)] * 2):
        with pytest.raises(ValueError, match=f"must hold an {state_class.__name__} for each of 2 layers"):
            model(x, wrong)
