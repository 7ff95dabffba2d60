"""Forecasting: series in, quantiles or a Gaussian of their next values out, one value at a time through the cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput, SampleTSPredictionOutput
from transformers.utils import can_return_tuple

from .cache_xlstm import XLSTMCache
from .configuration_xlstm import XLSTMConfig
from .modeling_xlstm import XLSTMModel
from .pretrained_xlstm import XLSTMPreTrainedModel
from .tokens_xlstm import last_of


@dataclass
class XLSTMForecastOutput(ModelOutput):
    """A forecast, in the units of the series; without the last dim where `past_values` had none.

    Attributes:
        loss: pinball loss or negative log-likelihood per observed future value of the normalised series.
        predictions: mean or median of each value, [B, prediction_length, input_size]; if all quantiles lie on one side
            of the median, the one nearest to it.
        quantiles: the quantiles of `config.quantiles`, sorted, [B, prediction_length, input_size, levels]; or None.
        scale: standard deviation of the Gaussian, [B, prediction_length, input_size]; or None.
        hidden_states: those of the base model over the past, and over the future if it was given; or None.
    """

    loss: Tensor | None = None
    predictions: Tensor | None = None
    quantiles: Tensor | None = None
    scale: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class Normaliser(NamedTuple):
    """Centre and scale of each series, [B, 1, channels]."""

    centre: Tensor
    scale: Tensor

    @classmethod
    def of(cls, values: Tensor, observed: Tensor, active: bool) -> Normaliser:
        """Mean and standard deviation over the observed values; 0 and 1 if not active, 1 for a constant series."""
        if not active:
            return cls(values.new_zeros(()), values.new_ones(()))
        count = observed.sum(1, keepdim=True).clamp(min=1)
        centre = (values * observed).sum(1, keepdim=True) / count
        deviations = (values - centre) * observed
        # Their squares may be more or less than a number can be.
        largest = deviations.abs().amax(1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
        scale = largest * ((deviations / largest).square().sum(1, keepdim=True) / count).sqrt()
        # The rounding of a constant series is no variation of it.
        return cls(centre, torch.where(scale > torch.finfo(values.dtype).eps * centre.abs() * 8, scale, 1.0))

    def apply(self, values: Tensor) -> Tensor:
        """To mean 0 and standard deviation 1."""
        return (values - self.centre) / self.scale

    def undo(self, values: Tensor) -> Tensor:
        """Back to the units of the series."""
        return values * self.scale + self.centre


class XLSTMForForecasting(XLSTMPreTrainedModel):
    """Distribution of the next value of each series, from all values before it.

    The base model reads one frame per time: the value, whether it was observed, and, with past covariates, these and
    whether they are known. Beyond the past, its own predictions are the values, and covariates are unknown.

    Raises:
        ValueError: the configuration has no `input_size` or no `prediction_length`.
    """

    main_input_name = "past_values"

    def __init__(self, config: XLSTMConfig):
        super().__init__(config)
        if config.prediction_length is None or config.input_size is None:
            raise ValueError("A forecasting model needs `input_size` and `prediction_length`; got None.")
        self.model = XLSTMModel(config)
        self.outputs_per_value = len(config.quantiles or []) if config.forecast_distribution == "quantile" else 2
        self.head = nn.Linear(config.hidden_size, config.input_size * self.outputs_per_value)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        past_values: Tensor,
        past_observed_mask: Tensor | None = None,
        past_covariates: Tensor | None = None,
        attention_mask: Tensor | None = None,
        future_values: Tensor | None = None,
        future_observed_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> XLSTMForecastOutput:
        """Forecast `config.prediction_length` values; or, given them, the loss and one-step forecasts of each.

        Args:
            past_values: the series up to now, [B, T, input_size], or [B, T] of one channel.
            past_observed_mask: 1 where a value was observed, like `past_values`; what stands elsewhere is not read.
            past_covariates: channels known for the past, [B, T, num_past_covariates].
            attention_mask: 1 at real times, 0 at padding anywhere, for series of different lengths, [B, T].
            future_values: what came next, [B, prediction_length, input_size] or [B, prediction_length]; each is then
                forecast from the true values before it.
            future_observed_mask: 1 where a future value was observed; the loss passes over the others.
            kwargs: `return_dict` and `output_hidden_states` are honoured; a keyword that no part of the model knows is
                warned about.

        Returns:
            output: see `XLSTMForecastOutput`.

        Raises:
            ValueError: a shape does not fit the configuration, the past is empty or longer than `context_length`, there
                is a mask of future values without these, or a cache.
        """
        if (cache := kwargs.pop("past_key_values", None)) is not None:
            raise ValueError(
                f"`past_key_values` must be None; got {type(cache).__name__}. A series is scaled by its whole past: "
                "pass that as `past_values`."
            )
        past = self._frames_of_past(past_values, past_observed_mask, past_covariates, attention_mask)
        if future_values is None:
            if future_observed_mask is not None:
                raise ValueError("`future_observed_mask` needs `future_values`; got None. Leave out the mask.")
            raw, _, hidden_states = self._roll_out(past, kwargs)
            return self._output(raw, hidden_states, past)
        future, observed = self._series("future_values", future_values, future_observed_mask)
        if future.shape[1] != self.config.prediction_length or future.shape[0] != past.frames.shape[0]:
            raise ValueError(
                f"`future_values` must be [{past.frames.shape[0]}, {self.config.prediction_length}, ...] as "
                f"`config.prediction_length` says; got shape {tuple(future_values.shape)}."
            )
        future, observed = (self._at_hand(x) for x in (past.normaliser.apply(future) * observed, observed))
        frames = torch.cat([past.frames, self._frames(future[:, :-1], observed[:, :-1], None)], 1)
        real = F.pad(past.real, (0, future.shape[1] - 1), value=True)
        mask = None if attention_mask is None else real.long()
        given = {"use_cache": False, "return_dict": True, **kwargs}
        outputs = self.model(input_features=frames, attention_mask=mask, **given)
        hidden, T = outputs.last_hidden_state, past.frames.shape[1]
        first = last_of(hidden[:, :T], past.real)
        raw = self._distribution(torch.cat([first[:, None], hidden[:, T:]], 1))
        return self._output(raw, outputs.hidden_states, past, self._loss(raw, future, observed))

    @torch.no_grad()
    def generate(
        self,
        past_values: Tensor,
        past_observed_mask: Tensor | None = None,
        past_covariates: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_samples: int = 100,
    ) -> SampleTSPredictionOutput:
        """Draw possible futures, each value from the distribution given the ones drawn before it.

        Args:
            past_values: as in `forward`.
            past_observed_mask: as in `forward`.
            past_covariates: as in `forward`.
            attention_mask: as in `forward`.
            num_samples: futures drawn for each series.

        Returns:
            output: with `sequences` [B, num_samples, prediction_length, input_size], without the last dim where
                `past_values` had none. Draws come from torch's global generator. No draw lies beyond the outermost
                quantiles: with levels from 0.1 to 0.9, a fifth of them are one of these.

        Raises:
            ValueError: `num_samples` is below 1, or as in `forward`.
        """
        if num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1; got {num_samples}.")
        past = self._frames_of_past(past_values, past_observed_mask, past_covariates, attention_mask)
        _, drawn, _ = self._roll_out(past, {}, num_samples)
        paths = drawn.unflatten(0, (-1, num_samples))  # [B, num_samples, P, channels]
        normaliser = Normaliser(*(x[:, None] if x.dim() else x for x in past.normaliser))
        paths = normaliser.undo(paths)
        return SampleTSPredictionOutput(sequences=paths[..., 0] if past.squeeze else paths)

    def _roll_out(
        self, past: _Past, kwargs: dict[str, Any], num_samples: int | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        """Read the past, then feed back what was predicted, or drawn, for `num_samples` futures of each row.

        Returns:
            raw: outputs of the head, [B or B * num_samples, P, channels, .].
            values: what was fed back, and the last ones, [B or B * num_samples, P, channels].
            hidden_states: of the past, if asked for.
        """
        mask = None if past.real.all() else past.real.long()
        cache = XLSTMCache(self.config)  # one of the model's own making would be left out under checkpointing
        given = {"past_key_values": cache, "return_dict": True, **kwargs}
        outputs = self.model(input_features=past.frames, attention_mask=mask, **given)
        hidden = last_of(outputs.last_hidden_state, past.real)
        if num_samples is not None:
            hidden = hidden.repeat_interleave(num_samples, 0)
            cache.batch_repeat_interleave(num_samples)
        raw, values = [self._distribution(hidden)], []
        while True:
            values.append(self._point(raw[-1]) if num_samples is None else self._draw(raw[-1]))
            if len(raw) == self.config.prediction_length:
                return torch.stack(raw, 1), torch.stack(values, 1), outputs.hidden_states
            value = values[-1][:, None]
            frame = self._frames(value, torch.ones_like(value), None)
            hidden = self.model(input_features=frame, **given).last_hidden_state[:, 0]
            raw.append(self._distribution(hidden))

    def _frames_of_past(
        self, values: Tensor, observed: Tensor | None, covariates: Tensor | None, attention_mask: Tensor | None
    ) -> _Past:
        """What the base model reads of the past, and how to come back to the units of the series."""
        config = self.config
        series, seen = self._series("past_values", values, observed)
        B, T, _ = series.shape
        if T == 0:
            raise ValueError(f"`past_values` must hold at least 1 time; got shape {tuple(values.shape)}.")
        if config.context_length is not None and config.context_length < T:
            raise ValueError(
                f"`past_values` may hold {config.context_length} times, `config.context_length`; got {T}. Pass the "
                "last ones, or set it to None."
            )
        if attention_mask is not None and attention_mask.shape != (B, T):
            raise ValueError(f"`attention_mask` must be [{B}, {T}]; got shape {tuple(attention_mask.shape)}.")
        real = series.new_ones(B, T, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        series, seen = series.masked_fill(~real[..., None], 0.0), seen * real[..., None]
        normaliser = Normaliser.of(series, seen, config.instance_norm)
        count = config.num_past_covariates
        if (covariates is None) != (count == 0) or (covariates is not None and covariates.shape != (B, T, count)):
            got = None if covariates is None else tuple(covariates.shape)
            wanted = f"[{B}, {T}, {count}] as `config.num_past_covariates` says" if count else "None"
            raise ValueError(f"`past_covariates` must be {wanted}; got {got}.")
        if covariates is not None:
            covariates = self._digits(covariates).masked_fill(~real[..., None], 0.0)
            known = real[..., None].to(covariates.dtype).expand_as(covariates)
            covariates = Normaliser.of(covariates, known, config.instance_norm).apply(covariates)
        frames = self._frames(normaliser.apply(series) * seen, seen, covariates)
        return _Past(frames, real, normaliser, squeeze=values.dim() == 2)

    def _series(self, name: str, values: Tensor, observed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Values and whether they were observed, [B, T, channels], as `_digits`; 0 where not observed."""
        channels = self.config.input_size
        if values.dim() == 2 and channels == 1:
            values, observed = values[..., None], None if observed is None else observed[..., None]
        if (
            values.dim() != 3
            or values.shape[-1] != channels
            or (observed is not None and observed.shape != values.shape)
        ):
            got = [tuple(x.shape) for x in (values, observed) if x is not None]
            raise ValueError(
                f"`{name}` and its mask must be [B, T, {channels}], `config.input_size`; got shapes {got}."
            )
        values = self._digits(values)
        if observed is None:
            return values, torch.ones_like(values)
        return values.masked_fill(observed == 0, 0.0), (observed != 0).to(values.dtype)

    def _at_hand(self, x: Tensor) -> Tensor:
        """In float32, or wider if the model is."""
        return x.to(torch.promote_types(self.dtype, torch.float32))

    def _digits(self, x: Tensor) -> Tensor:
        """In float32, or wider if the model or x is: far from zero, a series varies in its last digits."""
        dtype = x.dtype if x.is_floating_point() else torch.float32 if x.device.type == "mps" else torch.float64
        return x.to(torch.promote_types(torch.promote_types(self.dtype, torch.float32), dtype))

    def _frames(self, values: Tensor, observed: Tensor, covariates: Tensor | None) -> Tensor:
        """Frames of the base model, [B, T, config.frame_size]; covariates are unknown if they are None."""
        parts = [values, observed]
        if count := self.config.num_past_covariates:
            shape = (*values.shape[:2], count)
            parts.append(values.new_zeros(shape) if covariates is None else covariates)
            parts.append(values.new_full((*shape[:2], 1), 0.0 if covariates is None else 1.0))
        return torch.cat([x.to(self.dtype) for x in parts], -1)

    def _distribution(self, hidden: Tensor) -> Tensor:
        """Raw outputs of the head in float32 or wider: [..., D] -> [..., channels, quantiles or (mean, scale)]."""
        raw = self._at_hand(self.head(hidden).unflatten(-1, (-1, self.outputs_per_value)))
        if self.config.forecast_distribution == "quantile":
            return raw
        return torch.stack([raw[..., 0], F.softplus(raw[..., 1]) + 1e-6], -1)

    def _point(self, raw: Tensor) -> Tensor:
        """The median, between two quantiles if none is it, or the mean: [..., channels, .] -> [..., channels]."""
        if self.config.forecast_distribution == "gaussian":
            return raw[..., 0]
        return self._quantile(raw, raw.new_full(raw.shape[:-1], 0.5))

    def _draw(self, raw: Tensor) -> Tensor:
        """One draw of each value; beyond the outermost quantiles, these."""
        if self.config.forecast_distribution == "gaussian":
            return raw[..., 0] + raw[..., 1] * torch.randn_like(raw[..., 0])
        return self._quantile(raw, torch.rand_like(raw[..., 0]))

    def _quantile(self, raw: Tensor, level: Tensor) -> Tensor:
        """Value of a level [..., channels], linear between the quantiles [..., channels, levels]: [..., channels]."""
        levels = torch.tensor(self.config.quantiles, dtype=raw.dtype, device=raw.device)
        if len(levels) == 1:
            return raw[..., 0]
        values = raw.sort(-1).values
        above = torch.searchsorted(levels, level.contiguous()).clamp(1, len(levels) - 1)[..., None]
        low, high = values.gather(-1, above - 1)[..., 0], values.gather(-1, above)[..., 0]
        x_low, x_high = levels[above - 1][..., 0], levels[above][..., 0]
        return torch.lerp(low, high, ((level - x_low) / (x_high - x_low)).clamp(0, 1))

    def _output(self, raw: Tensor, hidden_states: Any, past: _Past, loss: Tensor | None = None) -> XLSTMForecastOutput:
        """Loss in normalised units, forecasts in those of the series."""
        predictions = past.normaliser.undo(self._point(raw))
        quantiles = scale = None
        if self.config.forecast_distribution == "gaussian":
            scale = raw[..., 1] * past.normaliser.scale
        else:
            quantiles = torch.stack([past.normaliser.undo(x) for x in raw.sort(-1).values.unbind(-1)], -1)
        if past.squeeze:
            predictions = predictions[..., 0]
            quantiles, scale = (None if x is None else x[:, :, 0] for x in (quantiles, scale))
        return XLSTMForecastOutput(loss, predictions, quantiles, scale, hidden_states)

    def _loss(self, raw: Tensor, future: Tensor, observed: Tensor) -> Tensor:
        """Mean over the observed values."""
        if self.config.forecast_distribution == "gaussian":
            mean, scale = raw.unbind(-1)
            each = torch.log(scale) + ((future - mean) / scale).square() / 2 + math.log(2 * math.pi) / 2
        else:
            levels = torch.tensor(self.config.quantiles, dtype=raw.dtype, device=raw.device)
            error = future[..., None] - raw
            each = torch.maximum(levels * error, (levels - 1) * error).mean(-1)
        return (each * observed).sum() / observed.sum().clamp(min=1)


class _Past(NamedTuple):
    """Frames of the past [B, T, .], which are real [B, T], their normaliser, and whether values came as [B, T]."""

    frames: Tensor
    real: Tensor
    normaliser: Normaliser
    squeeze: bool


__all__ = ["XLSTMForForecasting", "XLSTMForecastOutput"]
