"""Fine-tuning of a finished model: where LoRA acts, and the states it starts from as the only thing that is trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .cache_xlstm import XLSTMCache
from .states_xlstm import LayerState, named_tensors
from .tokens_xlstm import lay_out_tokens

# What is trained of a state. Not the normaliser n and the stabiliser m: cells divide by n, and by an exponential of m.
TUNED = ("C", "c", "h", "conv")


def lora_targets(model: nn.Module) -> list[str]:
    """Full names of the linear maps in the blocks that LoRA adapts by default, for PEFT's `target_modules`.

    All projections, feed-forward parts included. Not the input and forget gates of the mLSTM, which have one output per
    head, nor maps that are block-diagonal, as are the sLSTM's gates and the neurips style's q, k and v: they are no
    `nn.Linear`, and small already. Their plain names would not do: the two kinds share them. A map that has an adapter
    already is named as it was without.
    """
    gates, modules = ("igate", "fgate"), dict(model.named_modules())
    adapted = tuple(f"{name}." for name, module in modules.items() if hasattr(module, "base_layer"))
    maps = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    own = [name for name in maps if name.endswith(".base_layer") or not name.startswith(adapted)]
    names = [name.removesuffix(".base_layer") for name in own]
    return [name for name in names if ".layers." in f".{name}" and not name.endswith(gates)]


class StateTuner(nn.Module):
    """A frozen language model, and the states it starts every text from as the only parameters.

    What is learnt has the size of one state and is saved as the state of a prompt: `XLSTMCache.load` reads it, and
    `generate(..., past_key_values=cache)` goes on from it as if it had read a text.

    Args:
        model: the language model; its parameters are frozen here.
        prompt: token ids whose state the training begins with, at least one.

    Raises:
        ValueError: the prompt is empty.
    """

    def __init__(self, model: nn.Module, prompt: Sequence[int]):
        super().__init__()
        if not prompt:
            raise ValueError("`prompt` must hold at least one token id; got none. The end token will do.")
        self.model = model.requires_grad_(False)
        self.config: Any = model.config
        ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
        # Asked for no gradient, the layers of bitsandbytes would on some CPUs never again give one.
        embeddings = self.model.get_input_embeddings()(ids).requires_grad_()  # type: ignore[operator]
        with torch.enable_grad():
            start: XLSTMCache = model.eval()(inputs_embeds=embeddings, use_cache=True).past_key_values
        self._start = start.detach_()
        self.states = nn.ParameterDict(
            {
                f"{i}_{name}": nn.Parameter(x.clone())
                for i, state in enumerate(start.states)
                for name, x in named_tensors(state).items()
                if name in TUNED
            }
        )

    def cache(self, rows: int) -> XLSTMCache:
        """The states as they are now for so many texts, with a graph back to the parameters."""
        cache = XLSTMCache(self.config)
        layers = []
        for i, state in enumerate(self._start.states):
            assert state is not None
            now = named_tensors(state)
            now.update({name: self.states[f"{i}_{name}"] for name in now if f"{i}_{name}" in self.states})
            # The start was made on the device that the model was on then.
            place = self.states[next(iter(self.states))].device
            rowed: Any = {name: x.to(place).repeat_interleave(rows, 0) for name, x in now.items()}
            conv = rowed.pop("conv", None)
            layers.append(LayerState(type(state.cell)(**rowed), conv))
        cache.store_(layers, self._start.get_seq_length())
        return cache

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As the model's forward, from the tuned states; `attention_mask` is of the current tokens only, [B, T].

        Raises:
            ValueError: a document begins inside a row, where the tuned states are not.
        """
        packing = {name: kwargs.get(name) for name in ("seq_idx", "cu_seq_lens_q", "position_ids")}
        size = (input_ids.shape[0], input_ids.shape[1])
        reset = lay_out_tokens(size, input_ids.device, 0, attention_mask, **packing).reset
        if reset is not None and reset.any():
            raise ValueError(
                "Rows must hold one text each, for only the beginning of a row has the tuned states; got packed ones. "
                "Give each text a row of its own."
            )
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **kwargs}
        return self.model(past_key_values=self.cache(input_ids.shape[0]), **inputs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The model's; Trainer asks for it."""
        self.model.activation_checkpointing_enable(*args, **kwargs)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The same under the name that older versions of Transformers use."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)  # type: ignore[operator]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the states to a file that `XLSTMCache.load` reads."""
        self.cache(1).detach_().save(path)
