"""Which tensors of the official models hold which of ours: names, shapes, layouts.

Tensors are only cut, joined and reordered: the way back gives the same bits, and gradients pass. Every link can be
followed by itself, so that a model need not fit in memory.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_xlstm import XLSTMConfig

Shape = tuple[int, ...]
Weights = Mapping[str, Tensor]

# fmt: off
# Embedding, blocks and last norm.
MODULES = {
    "neurips": ("token_embedding", "xlstm_block_stack.blocks", "xlstm_block_stack.post_blocks_norm"),
    "large": ("embedding", "backbone.blocks", "backbone.out_norm"),
    "transformers": ("backbone.embeddings", "backbone.blocks", "backbone.out_norm"),
}
HEAD = "lm_head.weight"
# What "fused" stores in one tensor and "single" in several: fused name -> single name -> our name.
LARGE_FUSED = {
    "mlstm_layer.qkv_opreact": {
        "mlstm_layer.q": "mixer.q_proj", "mlstm_layer.k": "mixer.k_proj", "mlstm_layer.v": "mixer.v_proj",
        "mlstm_layer.ogate_preact": "mixer.ogate",
    },
    "mlstm_layer.ifgate_preact": {"mlstm_layer.igate_preact": "mixer.igate", "mlstm_layer.fgate_preact": "mixer.fgate"},
    "ffn.proj_up_gate_z": {"ffn.proj_up_gate": "ffn.gate_proj", "ffn.proj_up": "ffn.up_proj"},
}
# fmt: on


class Link(NamedTuple):
    """One official tensor and the tensors of ours that it holds.

    Attributes:
        theirs: official name.
        ours: our names and shapes, in the order of the rows of the official tensor.
        shape: official shape, where it is not that of our tensors one below the other.
        view: the official tensor in this shape ...
        order: ... has our one tensor's dims in this order.
        zero: whether official models have no such tensor, for it is always zero.
        tied: official and our name of the embedding that this head must equal.
    """

    theirs: str
    ours: Mapping[str, Shape]
    shape: Shape | None = None
    view: Shape = ()
    order: Shape = ()
    zero: bool = False
    tied: tuple[str, str] | None = None

    @property
    def official_shape(self) -> Shape:
        first, *_ = self.ours.values()
        return self.shape or (sum(shape[0] for shape in self.ours.values()), *first[1:])

    def split(self, weights: Weights) -> dict[str, Tensor]:
        """Our tensors from the official ones."""
        if self.zero:
            like = next(iter(weights.values()))
            return {name: like.new_zeros(shape) for name, shape in self.ours.items()}
        x = weights[self.theirs]
        self._check_tied(x, weights, 0)
        if self.order:
            x = x.reshape(self.view).permute(self.order).contiguous()
        if len(self.ours) == 1:
            return dict.fromkeys(self.ours, x)
        parts = torch.split(x, [shape[0] for shape in self.ours.values()])
        # Copies, so that no two results share memory.
        return {name: part.clone() for name, part in zip(self.ours, parts, strict=True)}

    def join(self, weights: Weights) -> dict[str, Tensor]:
        """The official tensor from ours."""
        parts = [weights[name] for name in self.ours]
        if self.zero:
            if parts[0].any():
                raise ValueError(f"`{next(iter(self.ours))}` must be zero, for an official model has none; it is not.")
            return {}
        self._check_tied(parts[0], weights, 1)
        if self.order:
            back = sorted(range(len(self.order)), key=self.order.__getitem__)
            return {self.theirs: parts[0].permute(back).reshape(self.official_shape)}
        return {self.theirs: torch.cat(parts) if len(parts) > 1 else parts[0]}

    def _check_tied(self, head: Tensor, weights: Weights, side: int) -> None:
        if self.tied and not torch.equal(head, weights[self.tied[side]]):
            raise ValueError(
                f"`{HEAD}` must equal the embedding it is tied to; got other values. Untie it, or leave it out."
            )


def _links(theirs: str, ours: Mapping[str, Shape], bias: bool = False) -> Iterator[Link]:
    """The weight of one or several modules, and the bias if they have one."""
    yield Link(f"{theirs}.weight", {f"{name}.weight": shape for name, shape in ours.items()})
    if bias:
        yield Link(f"{theirs}.bias", {f"{name}.bias": shape[:1] for name, shape in ours.items()})


def _neurips_mlstm(config: XLSTMConfig, weight_mode: str) -> Iterator[Link]:
    D, E, H, bias = config.hidden_size, config.inner_size, config.num_heads, config.use_bias
    blocksize = config.qkv_proj_blocksize
    yield from _links("xlstm_norm", {"mixer_norm": (D,)})
    yield from _links("xlstm.proj_up", {"mixer.up_proj": (2 * E, D)}, bias)
    yield from _links("xlstm.conv1d.conv", {"mixer.conv": (E, 1, config.conv_kernel_size)}, bias=True)
    for name in ("q_proj", "k_proj", "v_proj"):
        yield from _links(f"xlstm.{name}", {f"mixer.{name}": (E // blocksize, blocksize, blocksize)})
        if bias:
            yield Link(f"xlstm.{name}.bias", {f"mixer.{name}.bias": (E,)})
    for name in ("igate", "fgate"):
        yield from _links(f"xlstm.mlstm_cell.{name}", {f"mixer.{name}": (H, 3 * E)}, bias=True)
    yield from _links("xlstm.mlstm_cell.outnorm", {"mixer.cell.norm": (E,)})
    yield Link("xlstm.learnable_skip", {"mixer.skip": (E,)})
    yield from _links("xlstm.proj_down", {"mixer.down_proj": (D, E)}, bias)


def _neurips_slstm(config: XLSTMConfig, weight_mode: str) -> Iterator[Link]:
    D, H, U = config.hidden_size, config.slstm_num_heads or config.num_heads, config.ffn_size
    P = D // H
    yield from _links("xlstm_norm", {"mixer_norm": (D,)})
    if config.slstm_conv_kernel_size:
        yield from _links("xlstm.conv1d.conv", {"mixer.conv": (D, 1, config.slstm_conv_kernel_size)}, bias=True)
    # The official module named `fgate` feeds the input gate and `igate` the forget gate (NX-AI/xlstm issue 98); the
    # gates of recurrent weights and biases are in the order of the equations.
    for theirs, ours in (("fgate", "igate"), ("igate", "fgate"), ("zgate", "zgate"), ("ogate", "ogate")):
        yield from _links(f"xlstm.{theirs}", {f"mixer.{ours}": (H, P, P)})
    kernel = (H, 4 * P, P), (H, 4, P, P), (1, 0, 2, 3)
    bias = (4 * D,), (4, H, P), (0, 1, 2)
    if weight_mode == "cuda":
        kernel, bias = ((H, P, 4 * P), (H, P, 4, P), (2, 0, 3, 1)), ((4 * D,), (H, 4, P), (1, 0, 2))
    yield Link("xlstm.slstm_cell._recurrent_kernel_", {"mixer.recurrent": (4, H, P, P)}, *kernel)
    yield Link("xlstm.slstm_cell._bias_", {"mixer.bias": (4, H, P)}, *bias)
    if config.slstm_norm_weight:
        yield from _links("xlstm.group_norm", {"mixer.norm": (D,)})
    if U:
        yield from _links("ffn_norm", {"ffn_norm": (D,)})
        yield from _links("ffn.proj_up", {"ffn.gate_proj": (U, D), "ffn.up_proj": (U, D)}, config.ffn_bias)
        yield from _links("ffn.proj_down", {"ffn.down_proj": (D, U)}, config.ffn_bias)


def _large_block(config: XLSTMConfig, weight_mode: str) -> Iterator[Link]:
    D, H, U, bias = config.hidden_size, config.num_heads, config.ffn_size, config.use_bias
    QK, V = config.qk_size, config.v_size
    rows = {"mixer.q_proj": QK, "mixer.k_proj": QK, "mixer.v_proj": V, "mixer.ogate": V, "mixer.igate": H}
    rows |= {"mixer.fgate": H, "ffn.gate_proj": U, "ffn.up_proj": U}
    for fused, singles in LARGE_FUSED.items():
        stored = {fused: list(singles.values())} if weight_mode == "fused" else {x: [singles[x]] for x in singles}
        for theirs, ours in stored.items():
            is_gate = fused == "mlstm_layer.ifgate_preact"
            yield from _links(theirs, {name: (rows[name], D) for name in ours}, bias or is_gate)
    yield from _links("mlstm_layer.out_proj", {"mixer.out_proj": (D, V)}, bias)
    yield from _links("ffn.proj_down", {"ffn.down_proj": (D, U)}, bias)
    yield from _links("norm_mlstm", {"mixer_norm": (D,)}, bias)
    yield from _links("norm_ffn", {"ffn_norm": (D,)}, bias)
    yield from _links("mlstm_layer.multihead_norm", {"mixer.cell.norm": (V,)}, bias)


def model_links(
    family: str, config: XLSTMConfig, names: Container[str], weight_mode: str, *, to_ours: bool
) -> list[Link]:
    """The links of a whole model, the embedding first.

    Args:
        family: "neurips", "large" or "transformers".
        config: our configuration.
        names: of the tensors at hand; they tell whether a tied head is stored, or it alone.
        weight_mode: "single", "fused" (large, transformers) or "cuda" (neurips: sLSTM cells as that backend has them).
        to_ours: whether `names` are official ones.
    """
    V, D, (embedding, blocks, last_norm) = config.vocab_size, config.hidden_size, MODULES[family]
    links = list(_links(embedding, {"model.embed_tokens": (V, D)}))
    for i, kind in enumerate(config.block_types or []):
        mlstm = _neurips_mlstm if family == "neurips" else _large_block
        for link in (_neurips_slstm if kind == "slstm" else mlstm)(config, weight_mode):
            ours = {f"model.layers.{i}.{name}": shape for name, shape in link.ours.items()}
            links.append(link._replace(theirs=f"{blocks}.{i}.{link.theirs}", ours=ours))
    if config.add_out_norm:
        norm = list(_links(last_norm, {"model.norm": (D,)}, config.norm_bias))
        # The last norm of transformers' model never has a bias.
        links += [x._replace(zero=family == "transformers" and x.theirs.endswith(".bias")) for x in norm]
    both = f"{embedding}.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and HEAD in names and both[0 if to_ours else 1] not in names:
        # safetensors' `save_model` keeps one name of what is shared, the first in the alphabet: the head's.
        links[0] = links[0]._replace(**{"theirs": HEAD} if to_ours else {"ours": {HEAD: (V, D)}})
    elif not config.tie_word_embeddings or HEAD in names:
        tied = both if config.tie_word_embeddings else None
        links += [link._replace(tied=tied) for link in _links("lm_head", {"lm_head": (V, D)})]
    return links


def _some(names: list[str]) -> str:
    return "; ".join(names[:3] + ["..."] * (len(names) > 3))


def check_shapes(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    """Raise unless the weights have exactly the names and shapes wanted."""
    faults = {
        "unused": [name for name in shapes if name not in wanted],
        "missing": [name for name in wanted if name not in shapes],
        "of another shape": [
            f"{name} {list(shapes[name])}, wanted {list(shape)}"
            for name, shape in wanted.items()
            if name in shapes and tuple(shapes[name]) != shape
        ],
    }
    prefixes = {name.removesuffix(x) for x in faults["missing"][:1] for name in faults["unused"] if name.endswith(x)}
    for prefix in sorted(prefixes):
        if prefix.endswith(".") and all(prefix + name in shapes for name in faults["missing"]):
            raise ValueError(
                f"`weights` must have the model's own names; got them with `{prefix}` before them, as wrappers such as "
                f"DistributedDataParallel store them. Take it off with `name.removeprefix({prefix!r})`."
            )
    found = [f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names]
    if found:
        raise ValueError(
            f"`weights` must be what the configuration says; got {', '.join(found)}. Check which is right."
        )


def is_cuda(name: str, shape: Shape) -> bool:
    """Whether a tensor is a recurrent kernel as the CUDA backend stores it, [H, P, 4 P] instead of [H, 4 P, P]."""
    return name.endswith("._recurrent_kernel_") and len(shape) == 3 and shape[2] == 4 * shape[1]
