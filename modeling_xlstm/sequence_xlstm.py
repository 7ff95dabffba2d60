"""Sequence models: an encoder of windows of frames, and what a configuration amounts to before it is built."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .configuration_xlstm import XLSTMConfig
from .forecasting_xlstm import XLSTMForForecasting
from .modeling_xlstm import (
    XLSTMForCausalLM,
    XLSTMForSequenceClassification,
    XLSTMForTokenClassification,
    XLSTMModel,
)
from .tokens_xlstm import last_of


def recommended_defaults() -> dict[str, Any]:
    """Fields of `XLSTMConfig` to start a sequence model with; add `input_size`, or a `vocab_size`."""
    return {
        "block_style": "residual",
        "variant": "mixed",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_heads": 4,
        "head_dim": 64,
        "expand_factor": 2.0,
        "dropout": 0.0,
        "ffn_dropout": 0.0,
    }


class XLSTMEncoder(nn.Module):
    """Windows of frames to one vector each, the hidden state of the last real frame: [B, T, embed_dim] -> [B, D].

    Args:
        config: of a model with an `input_size`.
        window_size: most frames of a window; None sets no limit.
    """

    def __init__(self, config: XLSTMConfig, window_size: int | None = None):
        super().__init__()
        self.model = XLSTMModel(config)
        self.window_size = window_size

    def forward(self, frames: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode windows of at most `window_size` frames; `attention_mask` [B, T] is 0 at padding, anywhere.

        Raises:
            ValueError: there are more frames.
        """
        if self.window_size is not None and frames.shape[1] > self.window_size:
            raise ValueError(
                f"`frames` may hold {self.window_size} frames, the `window_size`; got {frames.shape[1]}. Pass the last "
                "ones, or build with window_size=None."
            )
        hidden = self.model(input_features=frames, attention_mask=attention_mask, use_cache=False, return_dict=True)[0]
        return hidden[:, -1] if attention_mask is None else last_of(hidden, attention_mask != 0)


def build_encoder(
    embed_dim: int,
    hidden_size: int = 256,
    num_layers: int = 4,
    variant: str = "mixed",
    num_heads: int = 4,
    head_dim: int = 64,
    expand_factor: float = 2.0,
    dropout: float = 0.0,
    window_size: int | None = 60,
) -> XLSTMEncoder:
    """An encoder of the residual style, with sLSTM and mLSTM blocks alternating unless `variant` says otherwise.

    Args:
        embed_dim: channels of a frame.
        hidden_size: width of the blocks and of the result, D.
        num_layers: number of blocks.
        variant: "mixed" (sLSTM first), "slstm" or "mlstm".
        num_heads: heads of every block.
        head_dim: query, key and value width per mLSTM head.
        expand_factor: feed-forward width over `hidden_size`.
        dropout: of mixers and feed-forward parts.
        window_size: most frames of a window; None sets no limit.

    Returns:
        encoder: a module that maps [B, T, embed_dim] to [B, hidden_size].
    """
    fields: dict[str, Any] = {
        **recommended_defaults(),
        "input_size": embed_dim,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "variant": variant,
        "num_heads": num_heads,
        "head_dim": head_dim,
        "expand_factor": expand_factor,
        "dropout": dropout,
        "ffn_dropout": dropout,
    }
    return XLSTMEncoder(XLSTMConfig(**fields), window_size)


def output_size(config: XLSTMConfig) -> int:
    """Width of `last_hidden_state`, and of what `XLSTMEncoder` returns."""
    return config.hidden_size


def param_count(config: XLSTMConfig, model_class: type[nn.Module] = XLSTMModel) -> int:
    """Number of parameters of a model, without building it; tied embeddings count once.

    Args:
        config: its configuration.
        model_class: `XLSTMModel` or a class with a head.

    Raises:
        ValueError: the class is none of this package's models.
    """
    D, V = config.hidden_size, config.vocab_size
    labels = config.num_labels or 2
    outputs = len(config.quantiles or []) if config.forecast_distribution == "quantile" else 2
    heads = {
        XLSTMModel: 0,
        XLSTMForCausalLM: 0 if config.tie_word_embeddings else V * D,
        XLSTMForSequenceClassification: D * labels,
        XLSTMForTokenClassification: _linear(D, labels, True),
        XLSTMForForecasting: _linear(D, (config.input_size or 0) * outputs, True),
    }
    if model_class not in heads:
        raise ValueError(f"`model_class` must be one of {[c.__name__ for c in heads]}; got {model_class}.")
    frames = _linear(config.frame_size, D, True) if config.frame_size else 0
    norm = _norm(config) if config.add_out_norm else 0
    return V * D + frames + sum(_block(config, kind) for kind in config.block_types or []) + norm + heads[model_class]


def _linear(inputs: int, outputs: int, bias: bool) -> int:
    return inputs * outputs + outputs * bias


def _norm(config: XLSTMConfig) -> int:
    return config.hidden_size * (1 + config.norm_bias)


def _block(config: XLSTMConfig, kind: str) -> int:
    """One block: mixer, feed-forward part if there is one, and their norms."""
    D, U = config.hidden_size, config.ffn_size
    if kind == "mlstm" and config.block_style == "neurips":
        return _norm(config) + _up_mlstm(config)
    mixer = _slstm(config) if kind == "slstm" else _mlstm(config)
    ups = 1 if config.block_style == "residual" else 2
    ffn = ups * _linear(D, U, config.ffn_bias) + _linear(U, D, config.ffn_bias) + _norm(config) if U else 0
    return _norm(config) + mixer + ffn


def _mlstm(config: XLSTMConfig) -> int:
    D, QK, V, bias = config.hidden_size, config.qk_size, config.v_size, config.use_bias
    projections = 2 * _linear(D, QK, bias) + 2 * _linear(D, V, bias) + _linear(V, D, bias)
    return projections + 2 * _linear(D, config.num_heads, True) + V * (1 + config.norm_bias)


def _up_mlstm(config: XLSTMConfig) -> int:
    D, E, bias = config.hidden_size, config.inner_size, config.use_bias
    projections = _linear(D, 2 * E, bias) + _linear(E, D, bias) + 3 * _linear(config.qkv_proj_blocksize, E, bias)
    convolution_norm_skip = E * (config.conv_kernel_size + 1) + 2 * E
    return projections + 2 * _linear(3 * E, config.num_heads, True) + convolution_norm_skip


def _slstm(config: XLSTMConfig) -> int:
    D, W = config.hidden_size, config.slstm_conv_kernel_size
    P = D // (config.slstm_num_heads or 1)
    convolution = D * (W + 1) if W else 0
    return convolution + 8 * D * P + 4 * D + D * (config.slstm_norm_weight + config.norm_bias)
