"""Which of the tokens given are real, which begin a document, and in what order the blocks see them.

The blocks know two things about tokens: the number of real ones in each row, which come first, and where a document
begins inside a row. All that Transformers and its collators say about padding and packing is turned into these here.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TokenLayout:
    """Moves the real tokens of each row to its left, and back, and knows where documents begin among them.

    Padding then lies on the right whatever it was, where a causal model cannot see it.

    Attributes:
        lengths: real tokens of each row, [B]; None if all are real.
        reset: True where a document begins after another, [B, T], real tokens first; None if nowhere.
    """

    def __init__(self, real: Tensor | None):
        self.real = real
        self.lengths = None if real is None else real.sum(1)
        self.order = None if real is None else torch.argsort(~real, dim=1, stable=True)  # [B, T]
        self.back = None if self.order is None else torch.argsort(self.order, dim=1)
        self.reset: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, T, ...], real tokens first, zero after them."""
        if self.order is None or self.real is None:
            return x
        tail = (1,) * (x.dim() - 2)
        x = x.masked_fill(~self.real.view(*self.real.shape, *tail), 0)
        return x.gather(1, self.order.view(*self.order.shape, *tail).expand_as(x))

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of `pack`."""
        if self.back is None:
            return x
        return x.gather(1, self.back.view(*self.back.shape, *(1,) * (x.dim() - 2)).expand_as(x))


def lay_out_tokens(
    size: tuple[int, int],
    device: torch.device,
    past: int = 0,
    attention_mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> TokenLayout:
    """Read a mask and any of the three spellings of packing.

    Args:
        size: rows B and current tokens T.
        device: where the tokens are.
        past: tokens the cache has seen.
        attention_mask: 1 at real tokens, 0 at padding, [B, T] or, as generation passes it, [B, past + T].
        seq_idx: number of the document each token belongs to, [B, T]; a document begins where it changes.
        cu_seq_lens_q: first token of each document of the only row, and T at the end, [documents + 1].
        position_ids: position of each token in its document, [B, T] or [1, T]; one begins where it does not grow.

    Returns:
        layout: see `TokenLayout`. The first token of a row never resets: the state passed in belongs to its document.

    Raises:
        ValueError: a shape or device does not fit, `cu_seq_lens_q` does not rise from 0 to T, or two spellings
            disagree.
    """
    packing = {"seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q, "position_ids": position_ids}
    for name, x in {"attention_mask": attention_mask, **packing}.items():
        if x is not None and x.device != device:
            raise ValueError(f"`{name}` must be on {device} as the tokens are; got {x.device}. Use `.to()`.")
    layout = TokenLayout(_real_tokens(attention_mask, size, past))
    starts: dict[str, Tensor] = {}
    if seq_idx is not None:
        document = layout.pack(_per_token("seq_idx", seq_idx, size))
        starts["seq_idx"] = document[:, 1:] != document[:, :-1]
    if cu_seq_lens_q is not None:
        document = layout.pack(_documents_of(cu_seq_lens_q, size))
        starts["cu_seq_lens_q"] = document[:, 1:] != document[:, :-1]
    if position_ids is not None:
        position = layout.pack(_per_token("position_ids", position_ids, size))
        starts["position_ids"] = position[:, 1:] <= position[:, :-1]
    if starts and size[1] > 1:
        layout.reset = _agreed_starts(starts, layout.lengths)
    return layout


def next_real_tokens(
    labels: Tensor,
    attention_mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """What each position predicts, [B, T]: the next real token of the same document, else -100.

    Args:
        labels: token ids, not shifted, [B, T].
        attention_mask: see `lay_out_tokens`, as the rest.
        seq_idx: number of each token's document, [B, T].
        cu_seq_lens_q: first token of each document of a single row, then T, [documents + 1].
        position_ids: position of each token in its document, [B, T] or [1, T].

    Raises:
        ValueError: labels have not two dimensions, or what else is given does not fit them.
    """
    if labels.dim() != 2:
        raise ValueError(f"`labels` must be [B, T]; got shape {tuple(labels.shape)}.")
    B, T = labels.shape
    mask = None if attention_mask is None else attention_mask[:, -T:]
    layout = lay_out_tokens((B, T), labels.device, 0, mask, seq_idx, cu_seq_lens_q, position_ids)
    targets = layout.pack(labels)
    if layout.lengths is not None:
        targets = targets.masked_fill(torch.arange(T, device=labels.device) >= layout.lengths[:, None], -100)
    if layout.reset is not None:
        targets = targets.masked_fill(layout.reset, -100)
    return layout.unpack(torch.nn.functional.pad(targets[:, 1:], (0, 1), value=-100))


def last_of(hidden: Tensor, real: Tensor) -> Tensor:
    """The last real token of each row: [B, T, D], [B, T] -> [B, D]."""
    last = (torch.arange(hidden.shape[1], device=hidden.device) * real).argmax(1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]


def mean_of(hidden: Tensor, real: Tensor) -> Tensor:
    """The mean over the real tokens of each row: [B, T, D], [B, T] -> [B, D]."""
    return hidden.masked_fill(~real[..., None], 0.0).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def _real_tokens(attention_mask: Tensor | None, size: tuple[int, int], past: int) -> Tensor | None:
    """The current part of a mask as booleans, [B, T]; None if every token is real."""
    if attention_mask is None:
        return None
    B, T = size
    if attention_mask.dim() != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] not in (T, past + T):
        raise ValueError(
            f"`attention_mask` must be [{B}, {T}]{f' or [{B}, {past + T}]' if past else ''}, 1 at real tokens and 0 at "
            f"padding; got shape {tuple(attention_mask.shape)}. Masks between pairs of tokens do not apply."
        )
    real = attention_mask[:, -T:] != 0
    return None if _known(real.all()) else real


def _per_token(name: str, x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.dim() != 2 or x.shape[1] != size[1] or x.shape[0] not in (1, size[0]):
        raise ValueError(f"`{name}` must be [{size[0]}, {size[1]}], one number per token; got shape {tuple(x.shape)}.")
    return x.expand(size)


def _documents_of(cu_seq_lens: Tensor, size: tuple[int, int]) -> Tensor:
    """The number of each token's document, [1, T]."""
    B, T = size
    edges = cu_seq_lens.tolist() if cu_seq_lens.dim() == 1 else []
    if B != 1 or len(edges) < 2 or edges[0] != 0 or edges[-1] != T or edges != sorted(edges):
        raise ValueError(
            f"`cu_seq_lens_q` must rise from 0 to T = {T} and describe a single row; got {edges or cu_seq_lens} for "
            f"{B} rows. Use `seq_idx` for several rows."
        )
    tokens = torch.arange(T, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
    return torch.searchsorted(cu_seq_lens.contiguous(), tokens, right=True)[None]


def _agreed_starts(starts: dict[str, Tensor], lengths: Tensor | None) -> Tensor | None:
    """The starts all spellings agree on, [B, T]; None if no document begins."""
    name, first = next(iter(starts.items()))
    if lengths is not None:
        real = torch.arange(1, first.shape[1] + 1, device=first.device) < lengths[:, None]
        starts = {name: start & real for name, start in starts.items()}
    first = starts[name]
    for other, start in starts.items():
        if _known((start != first).any()):
            row, token = (start != first).nonzero()[0].tolist()
            raise ValueError(
                f"`{name}` and `{other}` disagree whether a document begins at real token {token + 1} of row {row}. "
                "Pass one of them, or make them agree."
            )
    return None if _known(~first.any()) else torch.nn.functional.pad(first, (1, 0))


def _known(condition: Tensor) -> bool:
    """Whether a shortcut may be taken; a traced graph must serve every value, so it never may there."""
    return not torch.compiler.is_compiling() and bool(condition)
