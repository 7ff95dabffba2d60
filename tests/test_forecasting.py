"""The forecasting head: units, missing values, padding, covariates, and a rollout that equals a fresh forward."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import STYLES, tiny_config
from tolerances import FLOAT32, assert_drawn_with, assert_identical, assert_same
from torch import Tensor
from transformers import AutoModelForTimeSeriesPrediction, Trainer, TrainingArguments

from modeling_xlstm import XLSTMCache, XLSTMForForecasting
from modeling_xlstm.memory_xlstm import enable_checkpointing

LEVELS = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
HEADS = pytest.mark.parametrize("head", ["quantile", "gaussian"])


def forecaster(head: str = "quantile", style: str = "residual", **fields: Any) -> Any:
    series = {"input_size": 1, "prediction_length": 4, "forecast_distribution": head, "vocab_size": 0}
    model = XLSTMForForecasting(tiny_config(style, **{**series, **fields})).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate.weight" in name or "head" in name or "frame" in name:
                parameter.normal_(std=0.5)
    return model


def series(B: int = 2, T: int = 9, *channels: int) -> Tensor:
    return 50 + 7 * torch.randn(B, T, *channels, dtype=torch.float64)


def parts(output: Any) -> list[Tensor]:
    return [x for x in (output.predictions, output.quantiles, output.scale) if x is not None]


@pytest.mark.parametrize("style", STYLES)
@HEADS
def test_the_rollout_through_the_cache_equals_forwards_from_the_start_on_its_own_values(head: str, style: str) -> None:
    model, past = forecaster(head, style, num_past_covariates=2), series()
    covariates = torch.randn(2, 9, 2, dtype=torch.float64)
    rolled = model(past, past_covariates=covariates)
    own = model(past, past_covariates=covariates, future_values=rolled.predictions)
    assert rolled.loss is None
    assert_same(parts(rolled), parts(own))


@pytest.mark.parametrize("channels", [(), (1,), (3,)], ids=str)
@HEADS
def test_a_forecast_is_in_the_units_and_the_shape_of_the_series(head: str, channels: tuple[int, ...]) -> None:
    model, past = forecaster(head, input_size=(*channels, 1)[0]), series(2, 9, *channels)
    output = model(past)
    assert output.predictions.shape == (2, 4, *channels)
    scaled = model(3 * past - 20)
    assert_same(scaled.predictions, 3 * output.predictions - 20)
    if head == "quantile":
        assert output.quantiles.shape == (2, 4, *channels, 9)
        assert_same(scaled.quantiles, 3 * output.quantiles - 20)
        assert (output.quantiles.diff(dim=-1) >= 0).all()
        assert_same(output.predictions, output.quantiles[..., 4])
    else:
        assert_same(scaled.scale, 3 * output.scale)
        assert (output.scale > 0).all()
    plain = forecaster(head, input_size=(*channels, 1)[0], instance_norm=False)
    assert (plain(3 * past - 20).predictions - 3 * plain(past).predictions + 20).abs().max() > 1


def test_gradient_checkpointing_changes_no_rollout() -> None:
    model, past = forecaster(), series()
    expected = model(past).predictions
    enable_checkpointing(model.train(), use_reentrant=False)
    assert_same(model(past).predictions, expected)
    assert model.generate(past, num_samples=3).sequences.shape == (2, 3, 4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_very_small_and_very_large_series_are_forecast_as_others(scale: float) -> None:
    model, past = forecaster().float(), series().sub(50).float()
    assert_same(model(past * scale).predictions / scale, model(past).predictions, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_series_and_covariates_far_from_zero_keep_their_digits_in_a_model_of_float32(dtype: torch.dtype) -> None:
    model = forecaster(num_past_covariates=1).float()
    past, future, covariates = (100 * x for x in (series(), series(2, 4), series(2, 9, 1)))
    far = [(x.round() + 2**33).to(dtype) for x in (past, future, covariates)]
    near = [x.round() for x in (past, future, covariates)]
    got, wanted = (model(x, past_covariates=c, future_values=y) for x, y, c in (far, near))
    assert_same(got.loss, wanted.loss, FLOAT32)
    assert got.loss.dtype == torch.float32
    assert_same(got.predictions - 2**33, wanted.predictions, FLOAT32)
    drawn = model.generate(far[0], past_covariates=far[2], num_samples=50).sequences
    assert drawn.std(1).mean() > 1


def test_hidden_states_are_those_of_the_past_and_of_a_future_that_is_given() -> None:
    model, past, future = forecaster(num_hidden_layers=2), series(), series(2, 4)
    assert model(past).hidden_states is None
    assert [x.shape[1] for x in model(past, output_hidden_states=True).hidden_states] == [9] * 3
    states = model(past, future_values=future, output_hidden_states=True).hidden_states
    assert [x.shape[1] for x in states] == [12] * 3


def test_a_constant_series_is_forecast_without_a_scale_of_zero() -> None:
    output = forecaster()(torch.full((1, 6), 3e8, dtype=torch.float64))
    assert output.predictions.isfinite().all()


@HEADS
def test_the_loss_is_that_of_the_normalised_future_and_passes_over_what_was_not_observed(head: str) -> None:
    model, past, future = forecaster(head), series(), series(2, 4)
    with torch.no_grad():
        # Quantiles that rise by themselves: the loss is of what the head says, the output is sorted.
        model.head.bias.copy_(torch.linspace(-20, 20, model.outputs_per_value, dtype=torch.float64))
    seen = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]])
    output = model(past, future_values=future, future_observed_mask=seen)
    centre, scale = past.mean(1, keepdim=True), past.std(1, keepdim=True, correction=0)
    if head == "gaussian":
        normal = torch.distributions.Normal((output.predictions - centre) / scale, output.scale / scale)
        each = -normal.log_prob((future - centre) / scale)
    else:
        error = (future[..., None] - output.quantiles) / scale[..., None]
        each = torch.where(error > 0, LEVELS * error, (LEVELS - 1) * error).mean(-1)
    assert_same(output.loss, (each * seen).sum() / seen.sum())
    other = future.masked_fill(seen == 0, torch.nan)
    assert_identical(model(past, future_values=other, future_observed_mask=seen).loss, output.loss)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_pinball_loss_of_rising_quantiles_is_the_textbooks() -> None:
    model, future = forecaster(quantiles=[0.3]), series(2, 4)
    past = series()
    output = model(past, future_values=future)
    error = (future - output.predictions) / past.std(1, keepdim=True, correction=0)
    assert_same(output.loss, torch.maximum(0.3 * error, -0.7 * error).mean())


@pytest.mark.parametrize("side", ["left", "right"])
@HEADS
def test_padded_series_are_forecast_as_if_alone(head: str, side: str) -> None:
    model, past = forecaster(head, num_past_covariates=1), series()
    covariates, future = torch.randn(2, 9, 1, dtype=torch.float64), series(2, 4)
    mask = torch.ones(2, 9, dtype=torch.long)
    padding = slice(0, 3) if side == "left" else slice(6, 9)
    mask[1, padding] = 0
    real = mask[1].bool()
    past[1, padding], covariates[1, padding] = torch.nan, torch.nan
    for given in ({}, {"future_values": future}):
        both = model(past, past_covariates=covariates, attention_mask=mask, **given)
        alone = model(past[1:, real], past_covariates=covariates[1:, real], **{k: v[1:] for k, v in given.items()})
        assert_same([x[1:] for x in parts(both)], parts(alone))


def test_what_stands_at_a_value_that_was_not_observed_is_not_read() -> None:
    model, past = forecaster(), series()
    seen = torch.ones_like(past)
    seen[:, 3] = 0
    output = model(past, past_observed_mask=seen)
    past[:, 3] = torch.nan
    assert_identical(model(past, past_observed_mask=seen).predictions, output.predictions)
    assert not torch.equal(model(past.nan_to_num()).predictions, output.predictions)


@HEADS
def test_the_loss_is_the_mean_over_observed_values_be_it_one(head: str) -> None:
    model, past, future = forecaster(head), series(), series(2, 4)
    seen = torch.zeros(3, 2, 4)
    seen[0, 0, 0] = seen[1, 1, 0] = 1
    seen[2] = seen[0] + seen[1]
    first, second, both = (model(past, future_values=future, future_observed_mask=mask).loss for mask in seen)
    assert_same(both, (first + second) / 2)


def test_the_model_is_told_where_there_are_covariates() -> None:
    model, past, frames = forecaster(num_past_covariates=2), series(), []
    model.model.register_forward_pre_hook(lambda _, __, named: frames.append(named["input_features"]), with_kwargs=True)
    model(past, past_covariates=torch.randn(2, 9, 2, dtype=torch.float64), future_values=series(2, 4))
    told = [1.0] * 9 + [0.0] * 3
    assert frames[0][..., -1].tolist() == [told] * 2


@HEADS
def test_samples_follow_the_predicted_distribution_and_go_on_from_their_own_draws(head: str) -> None:
    model, past = forecaster(head), series(1)
    torch.manual_seed(1)
    sequences = model.generate(past, num_samples=2000).sequences
    assert sequences.shape == (1, 2000, 4)
    first = model(past)
    drawn = sequences[0, :, 0]
    if head == "gaussian":
        assert_drawn_with(drawn, first.predictions[0, 0].item(), first.scale[0, 0].item())
    else:
        for level, quantile in list(zip(LEVELS.tolist(), first.quantiles[0, 0], strict=True))[1:-1]:
            assert_drawn_with((drawn < quantile).double(), level, math.sqrt(level * (1 - level)))
    # Each path goes on from its own first draw.
    if head == "gaussian":
        path = torch.cat([sequences[0], sequences[0, :, :1]], 1)[:, :4]
        conditional = model(past.expand(2000, -1), future_values=path)
        standard = (path - conditional.predictions) / conditional.scale
        assert_drawn_with(standard[:, 1:], 0.0, 1.0)


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({}, {"past_values": torch.zeros(2, 9, 3)}, r"must be \[B, T, 1\]"),
        ({}, {"past_values": torch.zeros(2, 0)}, "must hold at least 1 time"),
        ({}, {"past_key_values": XLSTMCache(tiny_config())}, "`past_key_values` must be None; got XLSTMCache"),
        ({"context_length": 8}, {}, "may hold 8 times"),
        ({}, {"future_values": torch.zeros(2, 3)}, r"`future_values` must be \[2, 4, ...\]"),
        ({}, {"past_covariates": torch.zeros(2, 9, 1)}, "`past_covariates` must be None"),
        ({"num_past_covariates": 2}, {}, r"`past_covariates` must be \[2, 9, 2\] .*; got None"),
        ({"num_past_covariates": 2}, {"past_covariates": torch.zeros(2, 9, 1)}, r"got \(2, 9, 1\)"),
        ({}, {"past_observed_mask": torch.ones(2, 8)}, "`past_values` and its mask"),
        ({}, {"attention_mask": torch.ones(2, 8)}, r"`attention_mask` must be \[2, 9\]"),
        ({}, {"future_observed_mask": torch.ones(2, 4)}, "`future_observed_mask` needs `future_values`"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(fields: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forecaster(**fields)(**{"past_values": series(), **arguments})


def test_no_cache_is_asked_for_and_changes_nothing() -> None:
    model, past = forecaster(), series()
    assert_identical(model(past, past_key_values=None), model(past))


def test_no_sample_and_no_length_are_named() -> None:
    with pytest.raises(ValueError, match="`num_samples` must be at least 1"):
        forecaster().generate(series(), num_samples=0)
    with pytest.raises(ValueError, match="needs `input_size` and `prediction_length`"):
        XLSTMForForecasting(tiny_config(input_size=2))


def test_the_trainer_trains_and_evaluates_it_and_a_checkpoint_forecasts_the_same(tmp_path: Path) -> None:
    rows = [{"past_values": torch.randn(6), "future_values": torch.randn(4)} for _ in range(4)]
    quiet: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), max_steps=2, label_names=["future_values"], **quiet)
    model = forecaster().float()
    before = model.head.weight.clone()
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert not torch.equal(model.head.weight, before)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    assert_same(trainer.evaluate()["eval_loss"], model.eval()(**batch).loss.item(), FLOAT32)
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path / "saved")
    past = batch["past_values"]
    assert_identical(again(past).predictions, model(past).predictions)
