"""The rows of scripts/benchmark.py: what is measured, against whom, what is asked, and how near results must be."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from benchmark_models import (
    Contestant,
    Size,
    builtins,
    compiled_decoding,
    decoding,
    floor,
    generating,
    ids,
    official,
    other,
    ours,
    packed_decoding,
    prefill,
    training,
)
from torch import Tensor

from modeling_xlstm import mlstm
from modeling_xlstm.layers_xlstm import SLSTMLayer
from modeling_xlstm.ops_products import is_packable
from modeling_xlstm.states_xlstm import Call

F32, BF16 = torch.float32, torch.bfloat16
# Largest error over scale between contestants that hold the same weights: rounding, and the published epsilon's place.
# In bfloat16, of ours against float64: a peer that keeps its states in bfloat16 is farther off the more it has read.
AGREEMENT = {F32: 2e-3, BF16: 1e-1}
# What a ratio of equals may be off by on a machine that does nothing else.
NOISE = 1.05
DECODED = 32  # tokens of a decoding run

Maker = Callable[[], Contestant]
Row = tuple[str, "Work"]


class Work(NamedTuple):
    """One row.

    Attributes:
        makers: make the contestants, ours first, each without the others, so that its memory can be seen alone.
        kind: "peer" if all compute the same; "itself" if the first is the longer work and the second the shorter, both
            ours; "other" if the others compute another function.
        faster: how many times as fast as the fastest peer ours must be.
        memory: the part of the fastest peer's memory ours may take; 0 to measure it without a target.
        agreement: largest error over scale between ours and every peer, or between ours and the judge.
        judge: makes who computes the same in float64, where contestants round too much to be compared with each other.
            Ours may then be twice as far off as the nearest peer.
        needs: packages without which there is no peer.
        packs: dtype of the matrices that ours packs, if it does.
        timed: whether time is measured at all.
        floor: makes the least that any contestant must do.
    """

    makers: dict[str, Maker]
    kind: str = "peer"
    faster: float | None = None
    memory: float | None = None
    agreement: float | None = None
    needs: tuple[str, ...] = ()
    judge: Maker | None = None
    packs: torch.dtype | None = None
    timed: bool = True
    floor: Maker | None = None

    def obstacle(self) -> str:
        """Why the row cannot be measured here; empty if it can."""
        if missing := [name for name in self.needs if importlib.util.find_spec(name) is None]:
            return f"{', '.join(missing)} is not installed"
        if self.packs is not None and not is_packable(self.packs):
            return f"oneDNN packs no {str(self.packs).removeprefix('torch.')} on this CPU"
        return ""


def each(models: Mapping[str, Callable[[], Any]], task: Callable[..., Contestant], *inputs: Any) -> dict[str, Maker]:
    """The same task for every model."""

    def make(model: Callable[[], Any]) -> Contestant:
        return task(model(), *inputs)

    return {name: partial(make, model) for name, model in models.items()}


def neurips(size: Size, dtype: torch.dtype = F32) -> dict[str, Callable[[], Any]]:
    return {"ours": partial(ours, "neurips", size, dtype), "official": partial(official, size, dtype)}


def large(size: Size, *modes: str, dtype: torch.dtype = F32) -> dict[str, Callable[[], Any]]:
    return {"ours": partial(ours, "large", size, dtype), **builtins(size, modes, dtype)}


def judged(style: str, size: Size, task: Callable[..., Contestant], *inputs: Any) -> Contestant:
    """The task in float64 with the weights of bfloat16."""
    return task(ours(style, size, BF16).double(), *inputs)


def others(size: Size) -> dict[str, Callable[[], Any]]:
    return {"ours": partial(ours, "large", size), **{name: partial(other, name, size) for name in size.others}}


def slstm_layer(size: Size, T: int, backward: bool, whose: str) -> Contestant:
    """The layer alone: convolution, gates, cell and head norm."""
    i = size.slstm_at[0]
    if whose == "ours":
        mixer = ours("neurips", size).model.layers[i].mixer
        assert isinstance(mixer, SLSTMLayer)
        module: torch.nn.Module = mixer
        layer: Callable[[Tensor], Tensor] = lambda x: mixer(x, Call())[0]  # noqa: E731
    else:
        module = layer = official(size).xlstm_block_stack.blocks[i].xlstm
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, T, size.model["hidden_size"], generator=generator, requires_grad=backward)

    def run(_: None) -> Tensor:
        if not backward:
            with torch.no_grad():
                return layer(x)
        return torch.autograd.grad(layer(x).square().sum(), [x, *module.parameters()])[0]

    return Contestant(run, 4 * T)


def op_inputs(size: Size, T: int, K: int, V: int, backward: bool) -> tuple[list[Tensor], Tensor]:
    """Inputs of the mLSTM and the gradient of its output, [B, T, H, .]."""
    H, g = size.model["num_heads"], torch.Generator().manual_seed(1)
    xs = [torch.randn(1, T, H, width, generator=g) for width in (K, K, V)]
    xs += [torch.randn(1, T, H, generator=g) + shift for shift in (0.0, 4.0)]
    return [x.requires_grad_(backward) for x in xs], torch.randn(1, T, H, V, generator=g)


def own_op(size: Size, T: int, K: int, V: int, backward: bool) -> Contestant:
    xs, dh = op_inputs(size, T, K, V, backward)

    def run(_: None) -> tuple[Tensor, ...]:
        q, k, v, i, f = xs
        h, _state = mlstm(q, k, v, i, f)
        return torch.autograd.grad(h, xs, dh) if backward else (h,)

    return Contestant(run, T)


def official_op(size: Size, T: int, K: int, V: int, backward: bool, L: int) -> Contestant:
    # The package's other native kernels leave the normaliser out of their gradients, so they fail the check.
    from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_autograd

    # [B, H, T, .] as that package wants it, made before the clock runs.
    xs, dh = op_inputs(size, T, K, V, False)
    turned = [x.transpose(1, 2).contiguous().requires_grad_(backward) for x in (*xs, dh)]

    def run(_: None) -> tuple[Tensor, ...]:
        h = mlstm_chunkwise__native_autograd(*turned[:5], chunk_size=L)
        seen = torch.autograd.grad(h, turned[:5], turned[5]) if backward else (h,)
        return tuple(x.transpose(1, 2) for x in seen)

    return Contestant(run, T)


def neurips_rows(size: Size) -> Iterator[Row]:
    need, short = ("xlstm",), 512 // size.shrink
    for name, dtype in (("fp32", F32), ("bf16", BF16)):
        makers, judge = each(neurips(size, dtype), training, ids(size, 4, short)), None
        if dtype == BF16:
            judge = partial(judged, "neurips", size, training, ids(size, 4, short))
        yield f"train neurips 4x{short} {name}", Work(makers, "peer", 2.2, 0.35, AGREEMENT[dtype], need, judge)
    for T in (short, 8 * short):
        for name, backward, target in (("forward", False, 6.0), ("forward+backward", True, 8.0)):
            layers: dict[str, Maker] = {w: partial(slstm_layer, size, T, backward, w) for w in ("ours", "official")}
            yield f"slstm layer 4x{T} {name}", Work(layers, "peer", target, None, AGREEMENT[F32], need)
    for name, backward in (("forward", False), ("forward+backward", True)):
        lengths: dict[str, Maker] = {
            f"T {T}": partial(slstm_layer, size, T, backward, "ours") for T in (8 * short, short)
        }
        yield f"slstm layer {8 * short} against {short} {name}", Work(lengths, "itself")
    for T, target in ((short, 1.5), (8 * short, 4.0)):
        makers = each(neurips(size), prefill, ids(size, 1, T))
        yield f"prefill neurips {T}", Work(makers, "peer", target, None, AGREEMENT[F32], need)
    for B in (1, 8):
        makers = each(neurips(size), decoding, ids(size, B, 16), ids(size, B, DECODED))
        work = Work(makers, "peer", 2.0, None, AGREEMENT[F32], need)
        yield f"decode neurips batch {B}", work
        yield from compiled_rows(f"decode neurips batch {B}", neurips(size), size, B, 16, work)


def compiled_rows(
    name: str, models: dict[str, Callable[[], Any]], size: Size, B: int, past: int, work: Work
) -> Iterator[Row]:
    """Decoding, `work`, by `torch.compile`: ours against peers as they are, and against peers that are compiled too."""
    compiled = each(models, compiled_decoding, ids(size, B, past), ids(size, B, DECODED))
    against_plain = {**work.makers, "ours": compiled["ours"]}
    yield f"{name}, ours compiled", work._replace(makers=against_plain, floor=None)
    if B == 1:  # a compiler takes its minutes: the first peer only
        both = dict(itertools.islice(compiled.items(), 2))
        yield f"{name}, both compiled", work._replace(makers=both, faster=None, floor=None)


def op_rows(size: Size) -> Iterator[Row]:
    """At the head shapes of the large and the NeurIPS style."""
    T = 2048 // size.shrink
    for K, V in ((64, 128), (256, 256)):
        for name, backward in (("forward", False), ("forward+backward", True)):
            makers: dict[str, Maker] = {"ours": partial(own_op, size, T, K, V, backward)}
            makers |= {f"official {L}": partial(official_op, size, T, K, V, backward, L) for L in (32, 64, 128, 256)}
            work = Work(makers, "peer", 2.0, None, AGREEMENT[F32], ("mlstm_kernels",))
            yield f"mlstm op {T} {K}x{V} {name}", work


def large_rows(size: Size) -> Iterator[Row]:
    for T in (512 // size.shrink, 2048 // size.shrink):
        makers = each(large(size, "inference", "train"), prefill, ids(size, 1, T))
        yield f"prefill large {T}", Work(makers, "peer", 1.15, None, AGREEMENT[F32])
    for name, dtype, targets in (("fp32", F32, (1.3, 1.3)), ("bf16", BF16, (1.6, 1.4))):
        for B, target in zip((1, 8), targets, strict=True):
            models = large(size, "inference", dtype=dtype)
            inputs = ids(size, B, 64 // size.shrink), ids(size, B, DECODED)
            judge = partial(judged, "large", size, decoding, *inputs) if dtype == BF16 else None
            least = partial(_floor, models["ours"], B)
            work = Work(each(models, decoding, *inputs), "peer", target, None, AGREEMENT[dtype], (), judge, floor=least)
            yield f"decode large batch {B} {name}", work
            yield from compiled_rows(f"decode large batch {B} {name}", models, size, B, 64 // size.shrink, work)
            if size.shrink == 1 and (B > 1 or dtype == BF16):  # tiny models have nothing to pack
                alone = each({"ours": models["ours"]}, packed_decoding, *inputs)
                packed = work._replace(makers={**work.makers, **alone}, packs=dtype, floor=None)
                yield f"decode large batch {B} {name}, ours packed", packed
    makers = each(large(size, "inference"), generating, ids(size, 1, 64 // size.shrink), DECODED)
    yield "generate large batch 1", Work(makers, "peer", None, None, 0.0)
    # The mode "train" takes whole chunks only.
    for T, modes in ((512 // size.shrink, ("inference", "train")), (511 // size.shrink, ("inference",))):
        makers = each(large(size, *modes), training, ids(size, 4, T))
        yield f"train large 4x{T}", Work(makers, "peer", 1.1, 0.7, AGREEMENT[F32])


def _floor(model: Callable[[], Any], B: int) -> Contestant:
    return floor(model(), B, DECODED)


def own_rows(size: Size) -> Iterator[Row]:
    long, short = 8192 // size.shrink, 256 // size.shrink
    for style in ("large", "neurips"):
        after: dict[str, Maker] = {}
        for T in (long, short):
            model = {f"after {T}": partial(ours, style, size)}
            after |= each(model, decoding, ids(size, 1, T), ids(size, 1, DECODED))
        yield f"decode {style} after {long} against {short}", Work(after, "itself")
    short *= 2
    for style in ("large", "neurips"):
        lengths: dict[str, Maker] = {}
        for T in (long, short):
            lengths |= each({f"T {T}": partial(ours, style, size)}, training, ids(size, 1, T))
        yield f"train {style} {long} against {short}", Work(lengths, "itself", memory=NOISE, timed=False)


def other_rows(size: Size) -> Iterator[Row]:
    short, long = 512 // size.shrink, 2048 // size.shrink
    yield f"train others 4x{short}", Work(each(others(size), training, ids(size, 4, short)), "other", memory=0)
    yield f"prefill others {long}", Work(each(others(size), prefill, ids(size, 1, long)), "other")
    makers = each(others(size), decoding, ids(size, 1, long), ids(size, 1, DECODED))
    yield f"decode others after {long}", Work(makers, "other")


def all_works(size: Size) -> dict[str, Work]:
    """Every row by its name."""
    kinds = (neurips_rows, op_rows, large_rows, own_rows, other_rows)
    return {name: work for rows in kinds for name, work in rows(size)}
