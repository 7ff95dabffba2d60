"""What the gates of every cell do in training: their pre-activations as the cells see them, watched when asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .ops_lean import soft_cap
from .states_xlstm import Call, CellInputs, CellRun, LayerState, SLSTMState


class _Watched(Call):
    """A call that shows what its cell is given and gives."""

    show: Callable[[CellInputs, Tensor, Any], None]

    def run(self, cell: CellRun, inputs: CellInputs, options: Any) -> tuple[Tensor, LayerState]:
        h, state = super().run(cell, inputs, options)
        self.show(inputs, h, options)
        return h, state


class GateStatistics:
    """Mean and extremes of the input and forget gates' pre-activations, block by block.

    They are those the cells use: of the mLSTM after the soft cap, of the sLSTM with bias and recurrent part. Padding is
    left out. Outside `watching` nothing is hooked and nothing costs.
    """

    def __init__(self) -> None:
        self._seen: dict[str, list[Tensor]] = {}

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Note the gates of every forward pass inside; what a pass computes is not changed."""
        blocks: list[Any] = [x for x in model.modules() if hasattr(x, "mixer") and hasattr(x, "mixer_norm")]
        hooks = [block.mixer.register_forward_pre_hook(self._hook(i)) for i, block in enumerate(blocks)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def watch(mixer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            x, call = given
            watched = _Watched(*call)
            watched.show = lambda inputs, h, options: self._note(index, call, inputs, h, options)
            return x, watched

        return watch

    @torch.no_grad()
    def _note(self, index: int, call: Call, inputs: CellInputs, h: Tensor, options: Any) -> None:
        if options.recurrent is None:
            kind, gates = "mlstm", [soft_cap(x.float(), options.gate_soft_cap) for x in inputs[3:5]]
        else:
            kind, gates = "slstm", _with_recurrent_part(call, inputs, h, options.recurrent)
        if call.lengths is not None:
            real = torch.arange(h.shape[1], device=h.device) < call.lengths[:, None]
            gates = [x[real] for x in gates]
        if not gates[0].numel():  # a lane that has ended leaves padding only
            return
        numbers = [number for x in gates for number in (x.mean(), x.min(), x.max())]
        self._seen.setdefault(f"{index:02d}_{kind}", []).append(torch.stack(numbers))

    def take(self) -> dict[str, float]:
        """What was seen since the last call, over all passes: `gates/00_mlstm/input_mean`, `..._min`, `..._max`."""
        numbers: dict[str, float] = {}
        for block, passes in self._seen.items():
            x = torch.stack(passes)  # [passes, 6]
            mean, low, high = x.mean(0).tolist(), x.amin(0).tolist(), x.amax(0).tolist()
            for gate, first in (("input", 0), ("forget", 3)):
                values = {"mean": mean[first], "min": low[first + 1], "max": high[first + 2]}
                numbers |= {f"gates/{block}/{gate}_{name}": value for name, value in values.items()}
        self._seen = {}
        return numbers


def _with_recurrent_part(call: Call, inputs: CellInputs, h: Tensor, recurrent: Tensor) -> list[Tensor]:
    """Input and forget gate of the sLSTM with what the token before adds, [B, T, H, P] each."""
    reset = inputs[-1]
    before = torch.zeros_like(h[:, :1])
    if call.state is not None:
        cell: SLSTMState = call.state.cell  # type: ignore[assignment]
        before = cell.h[:, None].to(h.dtype)
    h_before = torch.cat([before, h[:, :-1]], 1).float()  # [B, T, H, P]
    if reset is not None:
        h_before = h_before.masked_fill(reset[..., None, None], 0.0)
    pairs = zip(inputs[:2], recurrent[:2].float(), strict=True)
    return [x.float() + torch.einsum("bthi,hoi->btho", h_before, R) for x, R in pairs]
