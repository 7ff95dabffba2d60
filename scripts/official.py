"""The official models, where their packages are installed: made from what `convert_to` writes, on any machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import xLSTMConfig, xLSTMForCausalLM
from transformers.initialization import no_init_weights

Logits = Callable[[Tensor], Tensor]


def official_model(family: str, config: Mapping[str, Any]) -> Any:
    """An official model, not yet with its weights.

    Raises:
        ImportError: the family's package is not installed; `transformers` always is.
    """
    return {"neurips": _neurips, "large": _large, "transformers": _transformers}[family](config)


def official_logits(family: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Logits:
    """The forward pass of an official model in float32: token ids [B, T] to logits [B, T, vocab_size]."""
    model = official_model(family, config)
    # A tied head may be left out of a state dict.
    model.load_state_dict(weights, strict=not config.get("tie_weights"))
    model = model.float().eval()

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        if family == "transformers":
            return model(ids, use_cache=False).logits  # the sizes of its cache are rounded
        out = model(ids)
        return out[0] if isinstance(out, tuple) else out

    return logits


def _transformers(config: Mapping[str, Any]) -> Any:
    with no_init_weights():  # theirs fails on fused weights
        return xLSTMForCausalLM(xLSTMConfig(**config))


def _large(config: Mapping[str, Any]) -> Any:
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    return xLSTMLarge(xLSTMLargeConfig(**config))


def _neurips(config: Mapping[str, Any]) -> Any:
    from xlstm import (
        FeedForwardConfig,
        mLSTMBlockConfig,
        mLSTMLayerConfig,
        sLSTMBlockConfig,
        sLSTMLayerConfig,
        xLSTMLMModel,
        xLSTMLMModelConfig,
    )

    made = dict(config)
    parts = {"mlstm": mLSTMLayerConfig, "slstm": sLSTMLayerConfig, "feedforward": FeedForwardConfig}
    for name, block in {"mlstm_block": mLSTMBlockConfig, "slstm_block": sLSTMBlockConfig}.items():
        if made.get(name):
            made[name] = block(**{key: value and parts[key](**value) for key, value in made[name].items()})
    return xLSTMLMModel(xLSTMLMModelConfig(**made))
