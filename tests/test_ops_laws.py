"""Laws that both ops share: rows in any order, a state continued from many times, coming back to a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import mlstm_inputs, mlstm_state, slstm_inputs, slstm_state
from tolerances import assert_identical, assert_same
from torch import Tensor

from modeling_xlstm import mlstm, slstm

T, ROWS = 7, 3
every_op = pytest.mark.parametrize("op", ["mlstm", "slstm"])
every_backend = pytest.mark.parametrize("backend", ["torch", "reference"])


class Op:
    """One of the ops with random inputs of three rows, and the state before them."""

    def __init__(self, name: str, backend: str):
        self.function: Any = mlstm if name == "mlstm" else slstm
        xs = mlstm_inputs(T, B=ROWS) if name == "mlstm" else slstm_inputs(T, B=ROWS)
        self.tokens = xs if name == "mlstm" else xs[:4]
        self.weights = xs[len(self.tokens) :]
        self.state: Any = mlstm_state(B=ROWS) if name == "mlstm" else slstm_state(B=ROWS)
        self.options = {"backend": backend, **({"chunk_size": 3} if name == "mlstm" else {})}

    def __call__(self, tokens: list[Tensor], state: Any, **options: Any) -> tuple[Tensor, Any]:
        h, after = self.function(*tokens, *self.weights, state, **self.options, **options)
        return h, after

    def take(self, state: Any, order: list[int]) -> Any:
        return type(state)(*(x[order] for x in state))


@every_op
@every_backend
@settings(max_examples=10)
@given(order=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=5))
def test_rows_taken_in_any_order_and_number_give_what_they_gave(op: str, backend: str, order: list[int]) -> None:
    run = Op(op, backend)
    h, after = run(run.tokens, run.state)
    h_taken, after_taken = run([x[order] for x in run.tokens], run.take(run.state, order))
    assert_same((h_taken, list(after_taken)), (h[order], list(run.take(after, order))))


@every_op
@every_backend
@settings(max_examples=10)
@given(kept=st.integers(1, T), other=st.integers(1, T))
def test_a_state_continued_from_twice_gives_the_same_and_brings_back_to_any_token(
    op: str, backend: str, kept: int, other: int
) -> None:
    run = Op(op, backend)
    before = [x.detach().clone() for x in run.state]
    first = run([x[:, :kept] for x in run.tokens], run.state)
    run([x.flip(1)[:, :other] for x in run.tokens], run.state)  # another continuation
    again = run([x[:, :kept] for x in run.tokens], run.state)
    assert_identical((again[0], list(again[1])), (first[0], list(first[1])))
    assert_identical([x.detach() for x in run.state], before)
    whole, _ = run(run.tokens, run.state)
    assert_same(first[0], whole[:, :kept])


@every_op
@every_backend
@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, T), min_size=ROWS, max_size=ROWS))
def test_documents_in_padded_rows_are_those_of_each_row_alone(op: str, backend: str, lengths: list[int]) -> None:
    run = Op(op, backend)
    reset = torch.rand(ROWS, T) < 0.5  # of padding too
    h, after = run(run.tokens, run.state, lengths=torch.tensor(lengths), reset=reset)
    for row, length in enumerate(lengths):
        only = slice(row, row + 1)
        tokens = [x[only, :length] for x in run.tokens]
        alone = run(tokens, run.take(run.state, only), reset=reset[only, :length])
        assert_same((h[only, :length], list(run.take(after, only))), (alone[0], list(alone[1])))
