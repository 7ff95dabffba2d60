"""Weights in eight or four bits, through the libraries that Transformers speaks to: what to pass, and what to leave."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

# Kind of quantisation: the distribution that does it.
LIBRARIES = {
    "bitsandbytes-4bit": "bitsandbytes",
    "quanto-int8": "optimum-quanto",
    "torchao-int8": "torchao",
}
# PEFT has a layer for their weights. It takes quanto's for plain ones, and merging into them loses the adapter.
ADAPTABLE = ("bitsandbytes-4bit", "torchao-int8")
# Patterns of modules that stay as they are, beside what is no `nn.Linear` (recurrent and block-diagonal weights, norms,
# convolutions, embeddings): what exponentials see, what enters and what leaves the blocks. All are small but the head.
KEPT = ("lm_head", "score", "head", r"(.*\.)?frame_proj", r".*\.igate", r".*\.fgate")


def quantization(kind: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What to pass to `from_pretrained` as `quantization_config`, to load the blocks' projections in few bits.

    "bitsandbytes-4bit" are the NF4 weights of QLoRA with their scales quantised too, "quanto-int8" and "torchao-int8"
    eight-bit weights with a scale per row; activations are not quantised.

    Args:
        kind: a key of `LIBRARIES`.
        dtype: of the products, and of what is not quantised: pass it to `from_pretrained` too.

    Returns:
        config: Transformers' own configuration, which names in `KEPT` what is not quantised.

    Raises:
        ValueError: the kind is unknown.
        ImportError: its library is not installed.
    """
    if kind not in LIBRARIES:
        raise ValueError(f"`kind` must be one of {', '.join(LIBRARIES)}; got {kind!r}.")
    library = LIBRARIES[kind]
    try:
        importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"{kind!r} needs the package {library}, which is not installed. Install it with `pip install {library}`, "
            'or all of them, from this repository, with `pip install -e ".[quant]"`.'
        ) from None
    # Imported here: Transformers itself looks for the libraries when asked for these.
    from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

    kept = list(KEPT)
    if library == "optimum-quanto":
        return QuantoConfig(weights="int8", modules_to_not_convert=kept)
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes that the parameters take, scales of quantised ones included."""
    return sum(x.numel() * x.element_size() for parameter in model.parameters() for x in _parts(parameter))


def _parts(x: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a parameter is made of."""
    if hasattr(x, "__tensor_flatten__"):  # torchao's and quanto's
        inner = (getattr(x, name) for name in x.__tensor_flatten__()[0])
        return [part for tensor in inner for part in _parts(tensor)]
    state = getattr(x, "quant_state", None)  # bitsandbytes'
    scales = [] if state is None else [v for v in state.as_dict(packed=True).values() if isinstance(v, torch.Tensor)]
    return [x.detach(), *scales]
