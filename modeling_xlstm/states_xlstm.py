"""The recurrent states: what one cell, and one layer, remembers between calls.

Every state has a fixed size. A state passed to a function is the one *before* its first token, the one returned is the
one after its last real token; no function modifies the state it was given. The start is zero everywhere, `m` included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MLSTMState(NamedTuple):
    """Matrix memory of an mLSTM cell, stabilised: the memory itself is `C * exp(m)` and its normaliser `n * exp(m)`.

    Attributes:
        C: memory matrix, [B, H, K, V]; accumulates keys scaled by K**-0.5.
        n: normaliser, [B, H, K].
        m: stabiliser, [B, H]; natural log.
    """

    C: Tensor
    n: Tensor
    m: Tensor

    @classmethod
    def zeros(cls, B: int, H: int, K: int, V: int, like: Tensor) -> MLSTMState:
        """The state before any token, with the dtype and device of `like`."""
        return cls(like.new_zeros(B, H, K, V), like.new_zeros(B, H, K), like.new_zeros(B, H))


class SLSTMState(NamedTuple):
    """Scalar memories of an sLSTM layer; `n == 0` marks a cell that has seen no token.

    Attributes:
        c: cell, [B, H, P]; stabilised.
        n: normaliser, [B, H, P]; stabilised.
        m: stabiliser, [B, H, P]; natural log.
        h: output of the last token, [B, H, P]; feeds the recurrent connections.
    """

    c: Tensor
    n: Tensor
    m: Tensor
    h: Tensor

    @classmethod
    def zeros(cls, B: int, H: int, P: int, like: Tensor) -> SLSTMState:
        """The state before any token, with the dtype and device of `like`."""
        return cls(*(like.new_zeros(B, H, P) for _ in range(4)))


class LayerState(NamedTuple):
    """All that one mixer layer remembers.

    Attributes:
        cell: state of the mLSTM or sLSTM cell.
        conv: the last W - 1 inputs of the causal convolution, oldest first, [B, W - 1, D]; None without a convolution.
    """

    cell: MLSTMState | SLSTMState
    conv: Tensor | None


def compute_dtype(x: Tensor, state: MLSTMState | SLSTMState | None) -> torch.dtype:
    """The dtype of gates and states: float32, or wider if the input or the state given is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return dtype if state is None else torch.promote_types(dtype, state.m.dtype)
