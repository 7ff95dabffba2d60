"""What docs/tasks.md claims, trained for again: fixed seeds, minutes on two cores, left out of the default tests."""

from __future__ import annotations

import pytest
import tasks_digits
import tasks_forecasting
import tasks_recall
import tasks_state_tracking

pytestmark = pytest.mark.claim
MINUTES = 60.0


@pytest.mark.parametrize("task", ["parity", "mod5", "s3"])
def test_slstm_blocks_follow_a_state_to_length_256_from_training_on_40(task: str) -> None:
    row = tasks_state_tracking.measure("xlstm", tasks_state_tracking.TASKS[task], seed=0)
    assert row["256"] >= 0.99
    assert row["CPU seconds"] < 10 * MINUTES


def test_mlstm_blocks_alone_do_not_solve_parity() -> None:
    row = tasks_state_tracking.measure("mlstm", tasks_state_tracking.TASKS["parity"], seed=0)
    assert row["256"] < 0.6
    assert row["CPU seconds"] < 10 * MINUTES


def test_mlstm_blocks_recall_what_an_lstm_of_equal_width_forgets() -> None:
    mlstm, lstm = (tasks_recall.measure(kind, seed=0) for kind in ("mlstm", "lstm"))
    assert mlstm["8 pairs"] >= 0.95
    assert mlstm["16 pairs"] >= 0.85
    assert lstm["8 pairs"] < 0.3
    assert mlstm["CPU seconds"] + lstm["CPU seconds"] < 10 * MINUTES


def test_carbon_dioxide_is_forecast_better_than_by_the_value_of_a_year_before() -> None:
    naive, _ = tasks_forecasting.measure("naive", "co2", seed=0)
    row, _ = tasks_forecasting.measure("xlstm", "co2", seed=0)
    assert row["mean absolute error"] < 0.7 * naive["mean absolute error"]
    assert row["CPU seconds"] < 5 * MINUTES


def test_a_mixture_reads_digits_pixel_by_pixel_about_as_well_as_nn_lstm() -> None:
    ours, theirs = (tasks_digits.measure(kind, seed=0) for kind in ("xlstm", "lstm"))
    assert ours["held out"] >= 0.85
    assert ours["held out"] >= theirs["held out"] - 0.03
    assert ours["CPU seconds"] < 10 * MINUTES
