"""One block: x + mixer(norm x), then x + ffn(norm x) where the block has a feed-forward part."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_xlstm import XLSTMConfig
from .layers_xlstm import FeedForward, MLSTMLayer, SLSTMLayer, UpMLSTMLayer, block_norm
from .states_xlstm import Call, LayerState


def build_mixer(config: XLSTMConfig, layer_idx: int) -> nn.Module:
    """The one place that chooses a mixer."""
    assert config.block_types is not None
    if config.block_types[layer_idx] == "slstm":
        return SLSTMLayer(config, layer_idx)
    return UpMLSTMLayer(config, layer_idx) if config.block_style == "neurips" else MLSTMLayer(config, layer_idx)


class XLSTMBlock(GradientCheckpointingLayer):
    """[B, T, D] -> [B, T, D] with the mixer's state in and out."""

    def __init__(self, config: XLSTMConfig, layer_idx: int):
        super().__init__()
        assert config.block_types is not None
        has_ffn = config.ffn_size and (config.block_style != "neurips" or config.block_types[layer_idx] == "slstm")
        self.mixer_norm = block_norm(config)
        self.mixer = build_mixer(config, layer_idx)
        self.ffn_norm = block_norm(config) if has_ffn else None
        self.ffn = FeedForward(config) if has_ffn else None

    def forward(self, x: Tensor, call: Call) -> tuple[Tensor, LayerState]:
        y, state = self.mixer(self.mixer_norm(x), call)
        x = x + y
        if self.ffn is not None and self.ffn_norm is not None:
            x = x + self.ffn(self.ffn_norm(x))
        return x, state
