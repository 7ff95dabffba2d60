"""The data and models of scripts/tasks_*.py. Their claims are trained for in test_claims.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import tasks
import tasks_digits
import tasks_forecasting
import tasks_recall
import tasks_state_tracking
import torch


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("degree", "even", "order"), [(3, False, 6), (5, True, 60)])
def test_word_problems_are_those_of_groups(degree: int, even: bool, order: int) -> None:
    table = tasks_state_tracking.group(degree, even)
    assert table.shape == (order, order)
    assert table[0].tolist() == table[:, 0].tolist() == list(range(order))
    a, b, c = torch.randint(order, (3, 200), generator=generator())
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    assert not torch.equal(table, table.T)


def test_the_states_of_a_word_are_those_of_its_automaton() -> None:
    task = tasks_state_tracking.TASKS["parity"]
    ids, states = tasks_state_tracking.words(task, 4, 30, generator())
    assert torch.equal(states, ids.cumsum(1) % 2)
    task = tasks_state_tracking.TASKS["mod5"]
    ids, states = tasks_state_tracking.words(task, 1, 30, generator())
    value = 0
    for token, state in zip(ids[0].tolist(), states[0].tolist(), strict=True):
        operation, digit = divmod(token, 5)
        value = (value + digit, value - digit, value * digit)[operation] % 5
        assert value == state


def test_every_key_that_is_asked_was_told_with_its_value() -> None:
    ids, answers = tasks_recall.rows(3, 8, generator())
    for row, expected in zip(ids.tolist(), answers.tolist(), strict=True):
        told = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert len(told) == 8
        assert [told[key] - tasks_recall.KEYS for key in row[16:]] == expected


def test_models_compared_have_a_size() -> None:
    parity = {
        kind: tasks_state_tracking.build(kind, tasks_state_tracking.TASKS["parity"], 0) for kind in ("xlstm", "lstm")
    }
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert {model(ids).shape for model in parity.values()} == {(2, 5, 2)}
    for module in (tasks_digits, tasks_forecasting):
        ours, theirs = (tasks.count_parameters(module.build(kind, 0)) for kind in ("xlstm", "lstm"))
        assert ours <= theirs < 1.06 * ours


def test_nn_lstm_forecasts_through_the_same_head_and_rollout() -> None:
    model = tasks_forecasting.build("lstm", 0).double().eval()
    past, future = torch.randn(2, 20, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)
    assert model(past, future_values=future).loss.isfinite()
    assert model(past).predictions.shape == (2, 12)
    assert model.generate(past, num_samples=3).sequences.shape == (2, 3, 12)


def test_a_report_holds_what_was_measured(tmp_path: Path) -> None:
    report = tasks.Report("A claim", tmp_path, {})
    report.add(model="a", parameters=12345, accuracy=0.98765)
    report.add(model="b", accuracy=1.0)
    assert report.table().splitlines() == [
        "| model | parameters | accuracy |",
        "| --- | --- | --- |",
        "| a | 12,345 | 0.9877 |",
        "| b |  | 1 |",
    ]
