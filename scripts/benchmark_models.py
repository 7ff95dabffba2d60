"""The contestants of scripts/benchmark.py: models that hold the same weights, and what they are asked to do.

Peers are taken as they are: the official `xlstm` package (NeurIPS blocks, vanilla sLSTM backend) and transformers' own
xlstm, which has two modes and uses the blocks of the `xlstm` package where that is installed; all of these are tried.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from official import official_model
from torch import Tensor
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM, xLSTMConfig
from transformers.models.xlstm import modeling_xlstm as transformers_xlstm
from transformers.utils import is_xlstm_available

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM, convert_to
from modeling_xlstm.ops_products import plan_product

PIECE = 512  # tokens read at a time where a long context is only what comes before decoding


class Size(NamedTuple):
    """Of all models of the table.

    Attributes:
        model: fields of the configuration.
        slstm_at: blocks of the NeurIPS style that are sLSTM.
        shrink: what lengths are divided by.
        others: fields that make a Llama and a Mamba2 of about as many parameters.
        contexts: lengths of the plots.
    """

    model: dict[str, int]
    slstm_at: list[int]
    shrink: int
    others: dict[str, dict[str, int]]
    contexts: tuple[int, ...]


FULL = Size(
    model={"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8, "num_heads": 4},
    slstm_at=[1, 5],
    shrink=1,
    others={
        "llama": {"num_hidden_layers": 9, "num_attention_heads": 8, "intermediate_size": 1408},
        "mamba2": {"num_hidden_layers": 17, "num_heads": 16, "head_dim": 64, "n_groups": 1, "state_size": 128},
    },
    contexts=(256, 512, 1024, 2048, 4096, 8192, 16384),
)
# Shows that everything runs, and nothing about speed.
TINY = Size(
    model={"vocab_size": 128, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2},
    slstm_at=[1],
    shrink=8,
    others={
        "llama": {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 320},
        "mamba2": {"num_hidden_layers": 4, "num_heads": 4, "head_dim": 64, "n_groups": 1, "state_size": 16},
    },
    contexts=(32, 96),
)


class Contestant(NamedTuple):
    """What is timed.

    Attributes:
        run: takes what `prepare` made and returns what is compared, a tensor or several.
        tokens: tokens of one run.
        prepare: called before every run, outside the clock.
    """

    run: Callable[[Any], Any]
    tokens: int
    prepare: Callable[[], Any] = lambda: None


def ours(style: str, size: Size, dtype: torch.dtype = torch.float32) -> Any:
    """Always the same weights; all mLSTM in the large style."""
    torch.manual_seed(0)
    blocks: dict[str, Any] = {"slstm_at": size.slstm_at} if style == "neurips" else {"variant": "mlstm"}
    model: Any = XLSTMForCausalLM(XLSTMConfig(block_style=style, **blocks, **size.model))  # type: ignore[arg-type]
    return model.to(dtype)


def official(size: Size, dtype: torch.dtype = torch.float32) -> Any:
    """The NeurIPS model of the `xlstm` package, with the weights of ours."""
    model = ours("neurips", size)
    written, weights = convert_to("neurips", model.config, model.state_dict())
    theirs = official_model("neurips", {**written, "context_length": 4096 // size.shrink})
    theirs.load_state_dict(weights)
    return theirs.to(dtype)


@functools.cache
def without_package() -> Any:
    """Transformers' module as it is where the `xlstm` package is not installed."""
    if not is_xlstm_available():
        return transformers_xlstm
    name = "transformers.models.xlstm.modeling_xlstm_alone"
    spec = importlib.util.spec_from_file_location(name, transformers_xlstm.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with mock.patch("transformers.utils.is_xlstm_available", return_value=False):
        spec.loader.exec_module(module)
    return module


def builtin(size: Size, mode: str, package: bool, dtype: torch.dtype = torch.float32) -> Any:
    """Transformers' xlstm with the weights of ours; of its third mode no forward pass returns (5.23.0)."""
    model = ours("large", size)
    written, weights = convert_to("transformers", model.config, model.state_dict())
    source = transformers_xlstm if package else without_package()
    theirs = source.xLSTMForCausalLM(xLSTMConfig(**{**written, "mode": mode}))
    theirs.load_state_dict(weights)
    return theirs.to(dtype)


def builtins(size: Size, modes: tuple[str, ...], dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], Any]]:
    """Every way to run transformers' xlstm here."""
    makers: dict[str, Callable[[], Any]] = {}
    for mode in modes:
        makers[f"transformers ({mode})"] = functools.partial(builtin, size, mode, False, dtype)
        if is_xlstm_available():
            makers[f"transformers with xlstm ({mode})"] = functools.partial(builtin, size, mode, True, dtype)
    return makers


def other(name: str, size: Size) -> Any:
    """A Llama or a Mamba2."""
    torch.manual_seed(0)
    fields = {name: size.model[name] for name in ("vocab_size", "hidden_size")} | {"tie_word_embeddings": False}
    fields |= size.others[name]
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**fields, max_position_embeddings=2 * size.contexts[-1]))  # type: ignore[arg-type]
    return Mamba2ForCausalLM(Mamba2Config(**fields))  # type: ignore[arg-type]


def kind(model: Any) -> str:
    return type(model).__name__


def ids(size: Size, B: int, T: int, seed: int = 1) -> Tensor:
    return torch.randint(size.model["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def training(model: Any, tokens: Tensor) -> Contestant:
    """One optimizer step, from the model's own loss where it has one, as Transformers' Trainer does it.

    The learning rate is zero, so that every step does the same and can be compared.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    embedding = next(module for module in model.modules() if isinstance(module, torch.nn.Embedding)).weight

    def run(_: None) -> Tensor:
        if kind(model) == "xLSTMLMModel":
            scores = model(tokens)[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(scores.float(), tokens[:, 1:].flatten())
        else:
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        gradient: Tensor = embedding.grad  # type: ignore[assignment]
        optimizer.zero_grad()
        return gradient

    return Contestant(run, tokens.numel())


def read(model: Any, tokens: Tensor, state: Any = None, piece: int = PIECE) -> tuple[Tensor, Any]:
    """Logits of the last token, [B, V], and the state after it; a long text in pieces."""
    if kind(model) == "xLSTMLMModel":
        for t in range(tokens.shape[1]):
            logits, state = model.step(tokens[:, t : t + 1], state=state)
        return logits[:, -1], state
    key = "cache_params" if kind(model) in ("xLSTMForCausalLM", "Mamba2ForCausalLM") else "past_key_values"
    # Transformers' xlstm computes the logits of every token, asked or not.
    last = {} if kind(model) == "xLSTMForCausalLM" else {"logits_to_keep": 1}
    for part in tokens.split(piece, dim=1):
        out = model(part, use_cache=True, **{key: state}, **last)
        state = out[key]
    return out.logits[:, -1], state


def prefill(model: Any, tokens: Tensor) -> Contestant:
    """Read a prompt: logits of the last token and, where the model has a way to give it at once, the state."""
    model.eval()

    @torch.inference_mode()
    def run(_: None) -> Tensor:
        if kind(model) == "xLSTMLMModel":
            return model(tokens)[:, -1]
        return read(model, tokens, piece=tokens.shape[1])[0]

    return Contestant(run, tokens.numel())


def decoding(model: Any, prompt: Tensor, tokens: Tensor) -> Contestant:
    """Feed fixed tokens one at a time through the model's forward, from the state after a prompt."""
    model.eval()
    with torch.inference_mode():
        state = read(model, prompt)[1]
    return from_state(model, state, tokens)


def compiled_decoding(model: Any, prompt: Tensor, tokens: Tensor) -> Contestant:
    """As `decoding`, with the step through `torch.compile`: ours as `generate` does it when told to."""
    contestant = decoding(model, prompt, tokens)
    if kind(model) == "xLSTMLMModel":
        model.step = torch.compile(model.step)
        return contestant
    if kind(model) != "XLSTMForCausalLM":
        model.forward = torch.compile(model.forward)
        return contestant
    with torch.inference_mode():
        forward = model.get_compiled_call(CompileConfig(mode="default"))

    @torch.inference_mode()
    def run(state: Any) -> Tensor:
        for token in tokens.split(1, dim=1):
            logits = forward(input_ids=token, past_key_values=state, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1]

    return contestant._replace(run=run)


def packed_decoding(model: Any, prompt: Tensor, tokens: Tensor) -> Contestant:
    """As `decoding`, with the weights of ours kept once more in the CPU's own order."""
    model.eval()
    model.pack_weights()
    return decoding(model, prompt, tokens)


def from_state(model: Any, state: Any, tokens: Tensor) -> Contestant:
    @torch.inference_mode()
    def run(state: Any) -> Tensor:
        return read(model, tokens, state, piece=1)[0]

    return Contestant(run, tokens.numel(), lambda: copy.deepcopy(state))


def generating(model: Any, prompt: Tensor, new: int) -> Contestant:
    """Greedy text through `generate`; compared token by token."""
    model.eval()
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    def run(_: None) -> Tensor:
        text = model.generate(prompt, **options)
        return torch.nn.functional.one_hot(text, model.config.vocab_size)

    return Contestant(run, prompt.shape[0] * new)


def floor(model: Any, B: int, new: int) -> Contestant:
    """Nothing but the matrix products of decoding, each in its fastest way: what the weights alone take."""
    weights = [p.detach() for p in model.parameters() if p.dim() == 2 and p is not model.get_input_embeddings().weight]
    pairs = [(weight.new_ones(B, weight.shape[1]), weight.new_empty(B, len(weight))) for weight in weights]
    products = [plan_product(x, weight, out) for weight, (x, out) in zip(weights, pairs, strict=True)]

    @torch.inference_mode()
    def run(_: None) -> None:
        for _step in range(new):
            for product in products:
                product()

    return Contestant(run, B * new)


def state_bytes(state: Any) -> int:
    """Bytes of all tensors that a state holds, whatever it is made of."""
    return sum(x.nbytes for x in {id(x): x for x in _tensors(state, set())}.values())


def _tensors(x: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif id(x) not in seen:
        seen.add(id(x))
        inner = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ()
        for part in (*inner, *getattr(x, "__dict__", {}).values()):
            yield from _tensors(part, seen)
