"""Forecasting two public series a year ahead: sea surface temperature and carbon dioxide, both monthly.

Minutes on 2 CPU cores; needs statsmodels, which brings the data (pip install -e ".[tasks]"):

    python scripts/tasks_forecasting.py

Trained on all but the last ten years; judged from every month of these at which a whole year is left, from five years
of past. The seasonal naive forecast is the value of twelve months before. nn.LSTM stands where the xLSTM does: head,
normalisation, loss and rollout are those of XLSTMForForecasting.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tasks import Recipe, Report, arguments, count_parameters, train
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from modeling_xlstm import XLSTMConfig, XLSTMForForecasting

CONTEXT, HORIZON, SEASON = 60, 12, 12
JUDGED = 120  # months at the end
SAMPLES = 100
WIDTH, LAYERS = 32, 2
RECIPE = Recipe(400, 32, 5e-3)
SERIES = ["elnino", "co2"]
MODELS = ["xlstm", "mlstm", "lstm"]


class LSTMCore(nn.Module):
    """nn.LSTM in the place of an XLSTMModel: frames and a state in, hidden states and a state out."""

    def __init__(self, frame_size: int, width: int):
        super().__init__()
        self.lstm = nn.LSTM(frame_size, width, LAYERS, batch_first=True)

    def forward(self, input_features: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        hidden, state = self.lstm(input_features, getattr(past_key_values, "state", None))
        cache: Any = past_key_values or SimpleNamespace()  # a cache that the head made is taken for its place only
        cache.state = state
        cache.batch_repeat_interleave = lambda repeats: _repeat(cache, repeats)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)


def _repeat(cache: Any, repeats: int) -> None:
    cache.state = tuple(x.repeat_interleave(repeats, 1) for x in cache.state)


def build(kind: str, seed: int) -> Any:
    """A forecaster; nn.LSTM in the smallest width that has the parameters of "xlstm"."""
    torch.manual_seed(seed)
    variant: Any = {"xlstm": "mixed", "lstm": "mixed"}.get(kind, kind)
    lengths = {"input_size": 1, "prediction_length": HORIZON, "context_length": CONTEXT}
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_heads": 4, **lengths}
    model: Any = XLSTMForForecasting(XLSTMConfig(block_style="residual", variant=variant, **sizes))
    if kind == "lstm":
        wanted, levels = count_parameters(model), model.outputs_per_value
        for width in range(WIDTH, 500):
            model.model, model.head = LSTMCore(model.config.frame_size, width), nn.Linear(width, levels)
            if count_parameters(model) >= wanted:
                break
    return model


def load(name: str) -> tuple[Tensor, Tensor]:
    """Monthly values and whether they were observed, [months] twice."""
    try:
        import statsmodels.api as sm
    except ImportError as error:
        raise SystemExit(f'{error}. The series come with statsmodels: pip install -e ".[tasks]"') from None
    data = getattr(sm.datasets, name).load_pandas().data
    months = data.drop(columns="YEAR").to_numpy().ravel() if name == "elnino" else data["co2"].resample("MS").mean()
    values = torch.tensor([float(x) for x in months])
    return values.nan_to_num(), (~values.isnan()).float()


def windows(x: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Past and future at each start, [starts, CONTEXT] and [starts, HORIZON]."""
    cut = x.unfold(0, CONTEXT + HORIZON, 1)[starts]
    return cut[:, :CONTEXT], cut[:, CONTEXT:]


def fit(model: nn.Module, values: Tensor, observed: Tensor, recipe: Recipe) -> float:
    """Train on windows that end before the months judged; returns CPU seconds."""
    generator = torch.Generator().manual_seed(recipe.seed)
    last = len(values) - JUDGED - CONTEXT - HORIZON

    def loss_of_step(model: nn.Module, step: int) -> Tensor:
        starts = torch.randint(last + 1, (recipe.batch,), generator=generator)
        (past, future), (seen, future_seen) = windows(values, starts), windows(observed, starts)
        return model(past, seen, future_values=future, future_observed_mask=future_seen).loss

    return train(model, loss_of_step, recipe)


@torch.no_grad()
def judge(model: Any, values: Tensor, observed: Tensor) -> tuple[dict[str, float], Tensor]:
    """Mean absolute error of a model, or of the seasonal naive forecast if it is None; and the forecasts."""
    starts = torch.arange(len(values) - JUDGED - CONTEXT, len(values) - CONTEXT - HORIZON + 1)
    (past, future), (seen, future_seen) = windows(values, starts), windows(observed, starts)
    forecast = past[:, -SEASON:][:, :HORIZON] if model is None else model(past, seen).predictions
    measured = {"mean absolute error": (((forecast - future).abs() * future_seen).sum() / future_seen.sum()).item()}
    if model is not None:
        torch.manual_seed(0)
        low, high = model.generate(past, seen, num_samples=SAMPLES).sequences.quantile(torch.tensor([0.1, 0.9]), dim=1)
        inside = (low <= future) & (future <= high)
        measured["inside 80 % interval"] = ((inside * future_seen).sum() / future_seen.sum()).item()
    return measured, forecast


def measure(kind: str, name: str, seed: int, steps: int | None = None) -> tuple[dict[str, Any], Tensor]:
    """Train one model on one series and judge it; "naive" is not trained."""
    values, observed = load(name)
    if kind == "naive":
        measured, forecast = judge(None, values, observed)
        return {"series": name, "model": "seasonal naive", **measured}, forecast
    recipe = RECIPE._replace(steps=steps or RECIPE.steps, seed=seed)
    model = build(kind, seed)
    seconds = fit(model, values, observed, recipe)
    measured, forecast = judge(model, values, observed)
    row = {"series": name, "model": kind, "parameters": count_parameters(model), "CPU seconds": seconds}
    return {**row, **measured}, forecast


def main() -> None:
    options = arguments(__doc__, "forecasting", MODELS, SERIES)
    report = Report("Forecasts a year ahead", options.out, ABOUT)
    forecasts: dict[tuple[str, str], Tensor] = {}
    for name in options.tasks:
        for kind in ["naive", *options.models]:
            row, forecasts[name, kind] = measure(kind, name, options.seed, options.steps)
            report.add(**row)

    def plot(figure: Any) -> None:
        for i, name in enumerate(options.tasks):
            axes = figure.add_subplot(len(options.tasks), 1, i + 1)
            values = load(name)[0]
            months = torch.arange(len(values))
            axes.plot(months[-JUDGED:], values[-JUDGED:], color="black", linewidth=1, label="observed")
            for kind in [kind for series, kind in forecasts if series == name]:
                # One forecast a year, each of the twelve months after it.
                line = forecasts[name, kind][::HORIZON].flatten()
                axes.plot(months[-JUDGED:][: len(line)], line, linewidth=1, alpha=0.8, label=kind)
            axes.set(title=name, xlabel="month")
            axes.margins(y=0.2)
            axes.legend(ncols=5, fontsize="small")

    report.write(plot, (8.0, 3.0 * len(options.tasks)))


ABOUT = {
    "summary": "Monthly series, a year ahead from five years of past, against the value of a year before.",
    "data": "statsmodels' `elnino` (sea surface temperature, 1950 to 2010) and `co2` (Mauna Loa, 1958 to 2001, monthly "
    "means of the weeks observed; months without one are masked).",
    "training": "Random windows of the months before the last ten years, 32 a step; pinball loss of nine quantiles, "
    "each series normalised by its own past; two layers of width 32 for the xLSTMs, nn.LSTM wider, so that it has as "
    "many parameters as xlstm.",
    "limits": "Two series and one seed, without tuning for each; each forecast goes on from its own medians.",
}

if __name__ == "__main__":
    main()
