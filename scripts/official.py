"""The official models, where their packages are installed: made from what `convert_to` writes, on any machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import xLSTMConfig, xLSTMForCausalLM

Logits = Callable[[Tensor], Tensor]


def official_logits(family: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Logits:
    """The forward pass of an official model in float32: token ids [B, T] to logits [B, T, vocab_size].

    Raises:
        ImportError: the family's package is not installed; `transformers` always is.
    """
    model, forward = MAKERS[family](config)
    model.load_state_dict(weights, strict=not config.get("tie_weights"))
    model = model.float().eval()

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        return forward(model, ids)

    return logits


def _transformers(config: Mapping[str, Any]) -> tuple[Any, Callable[[Any, Tensor], Tensor]]:
    # Without a cache, whose sizes it rounds.
    return xLSTMForCausalLM(xLSTMConfig(**config)), lambda model, ids: model(ids, use_cache=False).logits


def _large(config: Mapping[str, Any]) -> tuple[Any, Callable[[Any, Tensor], Tensor]]:
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    return xLSTMLarge(xLSTMLargeConfig(**config)), lambda model, ids: model(ids)[0]


def _neurips(config: Mapping[str, Any]) -> tuple[Any, Callable[[Any, Tensor], Tensor]]:
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
    return xLSTMLMModel(xLSTMLMModelConfig(**made)), lambda model, ids: model(ids)


MAKERS = {"neurips": _neurips, "large": _large, "transformers": _transformers}
