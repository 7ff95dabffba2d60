"""Our models are the official ones: logits, losses, gradients and states, all in float64 and through the converter."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from oracle import CASES, CELLS, load_case, load_cells
from tolerances import (
    assert_oracle_gradients,
    assert_oracle_logits,
    assert_oracle_loss,
    assert_oracle_states,
    assert_same,
)
from torch import Tensor

from modeling_xlstm import LayerState, MLSTMState, SLSTMState, XLSTMCache, XLSTMForCausalLM, convert_from, mlstm
from modeling_xlstm.ops_mlstm_reference import mlstm_recurrent

BY_CASE = pytest.mark.parametrize("name", CASES)


@functools.cache
def model_of(name: str) -> XLSTMForCausalLM:
    """Our float64 model of a case; shared, so no test may change it."""
    case = load_case(name)
    config, weights = convert_from(case.family, case.config, case.weights)
    model = XLSTMForCausalLM(config).double().eval().requires_grad_(False)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    return model


def run(model: XLSTMForCausalLM, ids: Tensor, *cuts: int) -> tuple[Tensor, list[LayerState | None]]:
    """Logits and final states of the pieces between the cuts, the states handed on from each to the next."""
    cache = XLSTMCache(model.config)
    pieces = torch.tensor_split(ids, cuts, dim=1)
    logits = [model(piece, past_key_values=cache).logits for piece in pieces if piece.shape[1]]
    return torch.cat(logits, 1), cache.states


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def our_states(name: str) -> list[LayerState]:
    """The official states in our shapes and scales."""
    case, config = load_case(name), model_of(name).config
    states = []
    for i, kind in enumerate(config.block_types):
        if case.family == "large":
            C, n, m = (case.io[f"state.{i}.{x}"] for x in "cnm")
            scale = n.shape[-1] ** -0.5  # the large family scales q, we scale k
            states.append(LayerState(MLSTMState(C * scale, n * scale, m.squeeze(-1)), None))
            continue
        window = case.io.get(f"state.block_{i}.conv_state.0")
        if kind == "mlstm":
            C, n, m = (case.io[f"state.block_{i}.mlstm_state.{x}"] for x in range(3))
            cell: MLSTMState | SLSTMState = MLSTMState(C, n.squeeze(-1), m.squeeze(-1).squeeze(-1))
        else:
            h, c, n, m = case.io[f"state.block_{i}.slstm_state"].unflatten(-1, (config.slstm_num_heads, -1))
            cell = SLSTMState(c, n, m, h)
        # The oldest of the official window's W entries has no use for the next token.
        states.append(LayerState(cell, None if window is None else window[:, 1:]))
    return states


def test_the_oracle_is_here() -> None:
    assert len(CASES) == 17
    assert {load_case(name).family for name in CASES} == {"neurips", "large"}
    assert len(CELLS) == 6


@pytest.mark.parametrize("T", [7, 100])
@BY_CASE
def test_logits_are_those_of_the_official_model(name: str, T: int) -> None:
    io = load_case(name).io
    logits, _ = run(model_of(name), io[f"ids_S{T}"])
    assert_oracle_logits(logits, io[f"logits64_S{T}"])


@BY_CASE
def test_loss_is_that_of_the_official_model(name: str) -> None:
    io, model = load_case(name).io, model_of(name)
    output = model(io["ids_S64"], labels=io["ids_S64"])
    assert_oracle_loss(next_token_loss(output.logits, io["ids_S64"]), io["loss64"])
    assert_oracle_loss(output.loss, io["loss64"])


@BY_CASE
def test_every_gradient_is_that_of_the_official_model(name: str) -> None:
    case, model = load_case(name), model_of(name)
    leaves = {key: x.double().requires_grad_() for key, x in case.weights.items()}
    _, weights = convert_from(case.family, case.config, leaves)
    ids = case.io["ids_S64"]
    logits = torch.func.functional_call(model, weights, (ids,)).logits
    gradients = torch.autograd.grad(next_token_loss(logits, ids), list(leaves.values()))
    expected = {key: x.double() for key, x in case.gradients().items()}
    assert_oracle_gradients(dict(zip(leaves, gradients, strict=True)), expected)


@pytest.mark.parametrize("cuts", [range(1, 7), ()], ids=["token by token", "at once"])
@BY_CASE
def test_states_are_those_of_the_official_model(name: str, cuts: tuple[int, ...]) -> None:
    _, states = run(model_of(name), load_case(name).io["ids_S7"], *cuts)
    assert_oracle_states(states, our_states(name))


@pytest.mark.parametrize(
    ("T", "cuts"),
    [(70, range(1, 70)), (100, (1,)), (100, (3, 4)), (100, (64,)), (100, (31, 95)), (100, (99,))],
    ids=["token by token", "1", "3 4", "64", "31 95", "99"],
)
@BY_CASE
def test_splitting_a_text_anywhere_changes_nothing(name: str, T: int, cuts: tuple[int, ...]) -> None:
    model, ids = model_of(name), load_case(name).io["ids_S100"][:, :T]
    assert_same(run(model, ids, *cuts), run(model, ids))


def cell_inputs(name: str) -> list[Tensor]:
    """q, k, v, i_tilde, f_tilde of an official cell, [B, T, H, .], float64."""
    return [load_cells()[f"{name}.{x}"].double().transpose(1, 2) for x in "qkvif"]


def assert_cell(actual: Tensor, name: str) -> None:
    """Compare with an official tensor, relative to its size: cells with closed gates hold very small numbers."""
    expected = load_cells()[name]
    unit = expected.abs().max()
    assert_same(actual / unit, expected / unit)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 32, 64, 200])
@pytest.mark.parametrize("name", CELLS)
def test_the_mlstm_cell_is_the_official_one_for_every_chunk_size(name: str, chunk_size: int, backend: str) -> None:
    h, state = mlstm(*cell_inputs(name), chunk_size=chunk_size, eps=CELLS[name]["eps"], backend=backend)
    assert_cell(h.transpose(1, 2), f"{name}.out.recurrent")
    assert_cell(h.transpose(1, 2), f"{name}.out.chunkwise32")
    assert_cell(state.C * state.C.shape[-2] ** 0.5, f"{name}.state.c")
    assert_cell(state.n * state.n.shape[-1] ** 0.5, f"{name}.state.n")
    assert_cell(state.m[..., None], f"{name}.state.m")


@pytest.mark.parametrize("name", CELLS)
def test_the_recurrent_mlstm_is_the_official_one(name: str) -> None:
    h, _ = mlstm_recurrent(*cell_inputs(name), None, eps=CELLS[name]["eps"], input_gate="exp")
    assert_cell(h.transpose(1, 2), f"{name}.out.recurrent")


@pytest.mark.parametrize("chunk_size", [1, 16, 200])
@pytest.mark.parametrize("name", CELLS)
def test_the_sigmoid_gate_is_the_official_one_for_every_chunk_size(name: str, chunk_size: int) -> None:
    h, _ = mlstm(*cell_inputs(name), chunk_size=chunk_size, eps=CELLS[name]["eps"], input_gate="sigmoid")
    assert_cell(h.transpose(1, 2), f"{name}.out.siging")


@pytest.mark.parametrize("name", CELLS)
def test_the_official_parallel_form_is_ours_with_the_stabiliser_started_below_every_gate(name: str) -> None:
    q, k, v, i_tilde, f_tilde = cell_inputs(name)
    zeros = MLSTMState.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], like=q)
    state = zeros._replace(m=torch.full_like(zeros.m, -1e6))
    h, _ = mlstm(q, k, v, i_tilde, f_tilde, state, eps=CELLS[name]["eps"])
    assert_cell(h.transpose(1, 2), f"{name}.out.parallel")
