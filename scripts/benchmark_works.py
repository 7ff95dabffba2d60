"""The rows of scripts/benchmark.py: what is timed, against whom, and how both are shown to compute the same first.

Peers are taken as they are when installed, and their rows left out, and named, when not: the official `xlstm` and
`mlstm_kernels` packages (NeurIPS blocks, vanilla sLSTM backend; native chunkwise kernels) and transformers' models.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM, xLSTMConfig, xLSTMForCausalLM

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM, convert_to, mlstm
from modeling_xlstm.layers_xlstm import SLSTMLayer
from modeling_xlstm.states_xlstm import Call

SIZE: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8, "num_heads": 4}
DECODED = 16  # tokens of a decoding run
# Largest error over scale between contestants that hold the same weights: rounding, and the published epsilon's place.
AGREEMENT = {torch.float32: 2e-3, torch.bfloat16: 1e-1}

Run = Callable[[], Any]


class Contest(NamedTuple):
    """One row.

    Attributes:
        tokens: tokens of one run.
        runs: what is timed, ours first; each returns what `check` compares, a tensor or several.
        target: how many times as fast as the first peer we want to be; None without a peer of the same function.
        agreement: largest error over scale between ours and every other; None where the function is another one.
    """

    tokens: int
    runs: dict[str, Run]
    target: float | None = None
    agreement: float | None = None


def neurips_models() -> tuple[XLSTMForCausalLM, Any]:
    """Ours and the official NeurIPS model, with the same weights."""
    from xlstm import (
        FeedForwardConfig,
        mLSTMBlockConfig,
        mLSTMLayerConfig,
        sLSTMBlockConfig,
        sLSTMLayerConfig,
        xLSTMLMModel,
        xLSTMLMModelConfig,
    )

    torch.manual_seed(0)
    ours = XLSTMForCausalLM(XLSTMConfig(block_style="neurips", slstm_at=[1, 5], **SIZE))
    written, weights = convert_to("neurips", ours.config, ours.state_dict())
    parts = {"mlstm": mLSTMLayerConfig, "slstm": sLSTMLayerConfig, "feedforward": FeedForwardConfig}
    blocks = {"mlstm_block": mLSTMBlockConfig, "slstm_block": sLSTMBlockConfig}
    for name, block in blocks.items():
        inner = {key: parts[key](**value) for key, value in written[name].items() if key in parts and value}
        written[name] = block(**inner)
    theirs = xLSTMLMModel(xLSTMLMModelConfig(**{**written, "context_length": 4096}))
    theirs.load_state_dict(weights)
    return ours, theirs


def large_models() -> tuple[XLSTMForCausalLM, Any]:
    """Ours and transformers' built-in xLSTM, with the same weights."""
    torch.manual_seed(0)
    ours = XLSTMForCausalLM(XLSTMConfig(block_style="large", variant="mlstm", **SIZE))
    written, weights = convert_to("transformers", ours.config, ours.state_dict())
    theirs = xLSTMForCausalLM(xLSTMConfig(**written))
    theirs.load_state_dict(weights)
    return ours, theirs


def ids(B: int, T: int) -> Tensor:
    return torch.randint(SIZE["vocab_size"], (B, T), generator=torch.Generator().manual_seed(1))


def training(model: Any, logits: Callable[[Tensor], Tensor], tokens: Tensor) -> Run:
    """One optimizer step; the learning rate is zero, so that every step does the same and can be compared."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def run() -> Tensor:
        scores = logits(tokens)[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(scores.float(), tokens[:, 1:].flatten())
        loss.backward()
        embedding: Tensor = model.get_parameter(EMBEDDING[type(model).__name__]).grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        return embedding

    return run


EMBEDDING = {
    "XLSTMForCausalLM": "model.embed_tokens.weight",
    "xLSTMForCausalLM": "backbone.embeddings.weight",
    "xLSTMLMModel": "token_embedding.weight",
    "LlamaForCausalLM": "model.embed_tokens.weight",
    "Mamba2ForCausalLM": "backbone.embeddings.weight",
}


def forward_of(model: Any) -> Callable[[Tensor], Tensor]:
    """[B, T] ids to [B, T, vocab_size] logits, without states."""
    if type(model).__name__ == "xLSTMLMModel":
        return model
    return lambda tokens: model(tokens, use_cache=False).logits


def prefill(model: Any, tokens: Tensor) -> Run:
    """Read a prompt: logits of the last token and, where the model has a way to give it, the state."""
    model.eval()

    @torch.inference_mode()
    def run() -> Tensor:
        name = type(model).__name__
        if name == "xLSTMLMModel":
            return model(tokens)[:, -1]
        if name == "xLSTMForCausalLM":  # computes the logits of every token
            return model(tokens, use_cache=True).logits[:, -1]
        return model(tokens, use_cache=True, logits_to_keep=1).logits[:, -1]

    return run


class Decoding:
    """Feed fixed tokens one at a time from the state after a prompt; the state is restored for every run."""

    def __init__(self, model: Any, prompt: Tensor, tokens: Tensor):
        self.model, self.tokens = model.eval(), tokens
        self.name = type(model).__name__
        self.key = {"xLSTMForCausalLM": "cache_params", "Mamba2ForCausalLM": "cache_params"}.get(
            self.name, "past_key_values"
        )
        with torch.inference_mode():
            self.state: Any = None
            if self.name == "xLSTMLMModel":
                for t in range(prompt.shape[1]):
                    _, self.state = model.step(prompt[:, t : t + 1], state=self.state)
            else:
                self.state = model(prompt, use_cache=True)[self.key]

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        state, logits = copy.deepcopy(self.state), torch.empty(0)
        for t in range(self.tokens.shape[1]):
            token = self.tokens[:, t : t + 1]
            if self.name == "xLSTMLMModel":
                logits, state = self.model.step(token, state=state)
            else:
                out = self.model(token, use_cache=True, **{self.key: state})
                logits, state = out.logits, out[self.key]
        return logits[:, -1]


def neurips_training(dtype: torch.dtype) -> Contest:
    tokens = ids(4, 512)
    models: list[Any] = [model.to(dtype) for model in list[Any](neurips_models())]
    runs = {n: training(m, forward_of(m), tokens) for n, m in zip(("ours", "official"), models, strict=True)}
    return Contest(tokens.numel(), runs, 2.2, AGREEMENT[dtype])


def slstm_layer(T: int, backward: bool) -> Contest:
    """The layer alone: convolution, gates, cell and head norm."""
    models = neurips_models()
    ours = models[0].model.layers[1].mixer
    assert isinstance(ours, SLSTMLayer)
    theirs = models[1].xlstm_block_stack.blocks[1].xlstm
    x = torch.randn(4, T, SIZE["hidden_size"], generator=torch.Generator().manual_seed(1), requires_grad=backward)

    def run(layer: Callable[[Tensor], Tensor]) -> Tensor:
        if not backward:
            with torch.no_grad():
                return layer(x)
        return torch.autograd.grad(layer(x).square().sum(), x)[0]

    runs = {"ours": lambda: run(lambda x: ours(x, Call())[0]), "official": lambda: run(theirs)}
    return Contest(4 * T, runs, 8.0 if backward else 6.0, AGREEMENT[torch.float32])


def neurips_prefill(T: int) -> Contest:
    tokens = ids(1, T)
    runs = {n: prefill(m, tokens) for n, m in zip(("ours", "official"), neurips_models(), strict=True)}
    return Contest(T, runs, 1.5 if T <= 512 else 4.0, AGREEMENT[torch.float32])


def neurips_decoding(B: int) -> Contest:
    models = neurips_models()
    runs: dict[str, Run] = {
        n: Decoding(m, ids(B, 16), ids(B, DECODED)) for n, m in zip(("ours", "official"), models, strict=True)
    }
    return Contest(B * DECODED, runs, 2.0, AGREEMENT[torch.float32])


def mlstm_op(K: int, V: int, backward: bool) -> Contest:
    from mlstm_kernels.torch.chunkwise.native import (
        mlstm_chunkwise__native_autograd as kernel,
    )

    B, T, H = 1, 2048, SIZE["num_heads"]
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(B, T, H, size, generator=g, requires_grad=backward) for size in (K, K, V))
    i, f = (torch.randn(B, T, H, generator=g).add(shift).requires_grad_(backward) for shift in (0.0, 4.0))
    dh = torch.randn(B, T, H, V, generator=g)
    # [B, H, T, .] as that package wants it, made before the clock runs.
    theirs = [x.detach().transpose(1, 2).contiguous().requires_grad_(backward) for x in (q, k, v, i, f)]

    def ours() -> tuple[Tensor, ...]:
        h, _ = mlstm(q, k, v, i, f)
        return torch.autograd.grad(h, (q, v), dh) if backward else (h,)

    def official(chunk_size: int) -> Run:
        def run() -> tuple[Tensor, ...]:
            h = kernel(*theirs, chunk_size=chunk_size)
            h = h[0] if isinstance(h, tuple) else h
            if not backward:
                return (h.transpose(1, 2),)
            grads = torch.autograd.grad(h, (theirs[0], theirs[2]), dh.transpose(1, 2))
            return tuple(x.transpose(1, 2) for x in grads)

        return run

    runs: dict[str, Run] = {"ours": ours, **{f"official {L}": official(L) for L in (32, 64, 128, 256)}}
    return Contest(B * T, runs, 2.0, AGREEMENT[torch.float32])


def large_prefill(T: int) -> Contest:
    tokens = ids(1, T)
    ours, theirs = large_models()
    runs = {"ours": prefill(ours, tokens), "transformers xlstm": prefill(theirs, tokens)}
    return Contest(T, runs, 1.15, AGREEMENT[torch.float32])


def large_decoding(B: int, dtype: torch.dtype) -> Contest:
    ours, theirs = (model.to(dtype) for model in list[Any](large_models()))
    runs: dict[str, Run] = {
        name: Decoding(model, ids(B, 64), ids(B, DECODED))
        for name, model in {"ours": ours, "transformers xlstm": theirs}.items()
    }
    target = 1.3 if dtype == torch.float32 else {1: 1.6, 8: 1.4}[B]
    return Contest(B * DECODED, runs, target, AGREEMENT[dtype])


def large_training(T: int) -> Contest:
    tokens = ids(4, T)
    ours, theirs = large_models()
    theirs.config.mode = "train_with_padding"
    runs = {"ours": training(ours, forward_of(ours), tokens)}
    runs["transformers xlstm"] = training(theirs, forward_of(theirs), tokens)
    return Contest(tokens.numel(), runs, 1.1, AGREEMENT[torch.float32])


def context_decoding() -> Contest:
    """Ours after a long and a short prompt."""
    model = large_models()[0]
    runs = {f"after {T} tokens": Decoding(model, ids(1, T), ids(1, DECODED)) for T in (256, 8192)}
    return Contest(DECODED, dict(reversed(runs.items())), None, None)


def other_models() -> dict[str, Any]:
    """Ours in the large style, a Llama and a Mamba2 of about as many parameters."""
    torch.manual_seed(0)
    width: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 512, "tie_word_embeddings": False}
    llama = LlamaConfig(**width, num_hidden_layers=9, num_attention_heads=8, intermediate_size=1408)
    mamba = Mamba2Config(**width, num_hidden_layers=17, num_heads=16, head_dim=64, n_groups=1, state_size=128)
    return {
        "ours": XLSTMForCausalLM(XLSTMConfig(block_style="large", variant="mlstm", **SIZE)),
        "llama": LlamaForCausalLM(llama),
        "mamba2": Mamba2ForCausalLM(mamba),
    }


def others(kind: str) -> Contest:
    models = other_models()
    if kind == "training":
        tokens = ids(4, 512)
        return Contest(tokens.numel(), {n: training(m, forward_of(m), tokens) for n, m in models.items()})
    if kind == "prefill":
        return Contest(2048, {n: prefill(m, ids(1, 2048)) for n, m in models.items()})
    return Contest(DECODED, {n: Decoding(m, ids(1, 2048), ids(1, DECODED)) for n, m in models.items()})


F32, BF16 = torch.float32, torch.bfloat16
# Name, the packages its peers come from, and what builds it.
WORKS: dict[str, tuple[tuple[str, ...], Callable[[], Contest]]] = {
    "train neurips 4x512 fp32": (("xlstm",), lambda: neurips_training(F32)),
    "train neurips 4x512 bf16": (("xlstm",), lambda: neurips_training(BF16)),
    "slstm layer 4x512 forward": (("xlstm",), lambda: slstm_layer(512, False)),
    "slstm layer 4x512 forward+backward": (("xlstm",), lambda: slstm_layer(512, True)),
    "slstm layer 4x4096 forward": (("xlstm",), lambda: slstm_layer(4096, False)),
    "slstm layer 4x4096 forward+backward": (("xlstm",), lambda: slstm_layer(4096, True)),
    "prefill neurips 512": (("xlstm",), lambda: neurips_prefill(512)),
    "prefill neurips 4096": (("xlstm",), lambda: neurips_prefill(4096)),
    "decode neurips batch 1": (("xlstm",), lambda: neurips_decoding(1)),
    "decode neurips batch 8": (("xlstm",), lambda: neurips_decoding(8)),
    "mlstm op 2048 64x128 forward": (("mlstm_kernels",), lambda: mlstm_op(64, 128, False)),
    "mlstm op 2048 64x128 forward+backward": (("mlstm_kernels",), lambda: mlstm_op(64, 128, True)),
    "mlstm op 2048 256x256 forward": (("mlstm_kernels",), lambda: mlstm_op(256, 256, False)),
    "mlstm op 2048 256x256 forward+backward": (("mlstm_kernels",), lambda: mlstm_op(256, 256, True)),
    "prefill large 512": ((), lambda: large_prefill(512)),
    "prefill large 2048": ((), lambda: large_prefill(2048)),
    "decode large batch 1 fp32": ((), lambda: large_decoding(1, F32)),
    "decode large batch 8 fp32": ((), lambda: large_decoding(8, F32)),
    "decode large batch 1 bf16": ((), lambda: large_decoding(1, BF16)),
    "decode large batch 8 bf16": ((), lambda: large_decoding(8, BF16)),
    "train large 4x512": ((), lambda: large_training(512)),
    "train large 4x511": ((), lambda: large_training(511)),
    "decode large after 8192 or 256": ((), context_decoding),
    "train others 4x512": ((), lambda: others("training")),
    "prefill others 2048": ((), lambda: others("prefill")),
    "decode others after 2048": ((), lambda: others("decoding")),
}


def missing(packages: tuple[str, ...]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]
