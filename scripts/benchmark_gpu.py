"""The Triton kernels on one GPU: first whether they are right, then how fast, beside whatever peers are installed.

One GPU, under nine minutes; sections that no longer fit into the time are named in the result:

    python scripts/benchmark_gpu.py --json gpu.json

Laptop, a minute: tiny sizes in Triton's interpreter, which shows that the script works and nothing about speed:

    TRITON_INTERPRET=1 python scripts/benchmark_gpu.py --device cpu

Every kernel is judged in float64 on the same inputs, with a twin beside it: plain PyTorch with the operands of its
matrix products rounded to the kernel's dtype. A kernel may err twice as much as its twin (root mean square, outputs,
states and every gradient), in bfloat16 what is summed in float32 by 2e-2 at least; if one errs more nothing is timed
and the script exits with 1. Peers (`mlstm_kernels`, `fla`) are used if they can be imported and never needed; what one
of them raises is its result.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from flags import new_file, number, write_json
from machine import describe_machine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm  # type: ignore[import-untyped]

from modeling_xlstm import MLSTMState, SLSTMState, XLSTMCache, XLSTMConfig, XLSTMForCausalLM, mlstm, slstm
from modeling_xlstm.ops_mlstm import mlstm_step_

Run = Callable[[], Any]
Result = dict[str, Any]
OVER_TWIN = 2.0  # KERNEL_OVER_TWIN of tests/tolerances.py
FLOAT32 = 1e-4  # as there: rounding of float32, which a twin in float32 draws as well as the kernel
BFLOAT16 = 2e-2  # as there: roundings of states and of h that the twin does not make, in sums that cancel
TINY: Result = {
    "slstm checks": [16],
    "mlstm": [{"B": 1, "H": 2, "T": 37, "K": 16, "V": 32}],
    "slstm": [{"B": 2, "H": 1, "T": 4, "P": 16}, {"B": 2, "H": 1, "T": 2, "P": 80}],
    "step": [1],
    "model": {
        style: {"hidden_size": 128, "num_hidden_layers": 1, "num_heads": 2, "vocab_size": 61}
        for style in ("large", "neurips")
    },
    "tokens": {"B": 1, "T": 64, "new": 2},
}
FULL: Result = {
    "slstm checks": [64, 128, 192, 256, 384, 512],
    "mlstm": [{"B": 8, "H": 8, "T": 8192, "K": 256, "V": 512}, {"B": 8, "H": 16, "T": 8192, "K": 128, "V": 256}],
    "slstm": [{"B": 16, "H": 12, "T": 1024, "P": 64}, *({"B": 16, "H": 4, "T": 1024, "P": P} for P in (128, 256, 512))],
    "step": [1, 8, 64],
    "model": {
        "large": {"hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 4, "vocab_size": 50304},
        "neurips": {"hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 4, "vocab_size": 50304},
    },
    "tokens": {"B": 4, "T": 2048, "new": 64},
}
BANDWIDTH, PRODUCTS = 4.3e12, 790e12  # bytes and floating-point operations a second of an H200 in bfloat16


class Rounded(TorchDispatchMode):
    """Rounds the operands of every matrix product, in the backward pass too."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            arguments = [x.to(self.dtype).to(x.dtype) for x in arguments]
        return function(*arguments, **(keywords or {}))


class Bench:
    """What every measurement needs: where it runs, in which dtype, and until when."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.deadline = device, time.monotonic() + seconds
        self.cuda = device.type == "cuda"
        # The interpreter computes bfloat16 wrongly.
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.sizes = FULL if self.cuda else TINY

    def draw(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = True, scale: float = 1.0) -> Tensor:
        x = scale * torch.randn(shape, device=self.device)
        return x.to(dtype or self.dtype).requires_grad_(grad)

    def milliseconds(self, run: Run) -> float:
        """Median of some runs after others that warm up."""
        for _ in range(3 if self.cuda else 1):
            run()
        times = []
        for _ in range(15 if self.cuda else 1):
            if self.cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if self.cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return round(1e3 * statistics.median(times), 4)

    def timed(self, run: Run) -> float | str:
        """Milliseconds, or what a peer raised."""
        try:
            return self.milliseconds(run)
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:200]}"


def results(run: Callable[..., Any], inputs: list[Tensor], differentiate: bool) -> list[Tensor]:
    """Outputs, states and the gradients of a loss that weighs each entry differently."""
    xs = [x.detach().clone().requires_grad_(differentiate) for x in inputs]
    with torch.set_grad_enabled(differentiate):
        h, state = run(*xs)
    seen = [h, *state]
    if not differentiate:
        return seen
    weights = [torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view_as(y) for y in seen]
    return [*seen, *torch.autograd.grad(seen, xs, weights)]


def over_twin(run: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype, differentiate: bool = True) -> Result:
    """Errors of a kernel and its twin against float64, relative to scale, and whether the kernel's may be."""
    got = results(lambda *xs: run("triton", *xs), inputs, differentiate)
    wanted = results(lambda *xs: run("reference", *xs), [x.double() for x in inputs], differentiate)
    with Rounded(dtype):
        twin = results(lambda *xs: run("reference", *xs), [x.float() for x in inputs], differentiate)

    def error(x: Tensor, y: Tensor) -> float:
        return ((x.double() - y).square().mean().sqrt() / y.square().mean().sqrt().clamp(min=1e-30)).item()

    errors = [error(x, y) for x, y in zip(got, wanted, strict=True)]
    allowed = [error(t.to(x.dtype), y) for x, t, y in zip(got, twin, wanted, strict=True)]

    def limit(x: Tensor, a: float) -> float:
        # States, and the gradients of gates and of states, are float32; of these n and m see no rounding to bfloat16.
        summed = dtype == torch.bfloat16 and x.dtype == torch.float32 and a > FLOAT32 / 10
        return max(OVER_TWIN * a, BFLOAT16 if summed else FLOAT32)

    # NaN is not below a limit.
    passes = all(e <= limit(x, a) for x, e, a in zip(got, errors, allowed, strict=True))
    return {"passes": passes, "errors": [f"{e:.1e}" for e in errors], "twin": [f"{a:.1e}" for a in allowed]}


def check_mlstm(bench: Bench, **options: Any) -> Result:
    T, K, V = (options.pop("T", 300), 256, 512) if bench.cuda else (min(options.pop("T", 21), 21), 16, 32)
    B, step = 4 if bench.cuda else 1, T == 1
    inputs = [bench.draw(B, T, 2, size) for size in (K, K, V)]
    inputs += [bench.draw(B, T, 2, dtype=torch.float32, scale=3.0) for _ in range(2)]
    inputs += [bench.draw(B, 2, *size, dtype=torch.float32) for size in ((K, V), (K,), ())]
    reset = torch.rand(B, T, device=bench.device) < 0.02 if options.pop("packed", False) else None
    # These keep q n from zero, where the few tokens that come near make all of an error, another one in every draw.
    inputs[0], inputs[1], inputs[6] = ((1 + x).detach().requires_grad_() for x in (inputs[0], inputs[1], inputs[6]))

    def run(backend: str, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, *state: Tensor) -> Any:
        if step and backend == "triton":
            fixed = {"eps": 1e-6, "input_gate": "exp", "gate_soft_cap": None, **options}
            return mlstm_step_(q, k, v, i, f, MLSTMState(*state), backend=backend, **fixed)
        return mlstm(q, k, v, i, f, MLSTMState(*state), reset=reset, backend=backend, **options)

    return over_twin(run, inputs, bench.dtype, differentiate=not step)


def check_slstm(bench: Bench, P: int, packed: bool = False, T: int = 40, B: int = 5) -> Result:
    """Heads above P = 128 in programs that wait for each other, unless there are more rows than these can hold."""
    T, B = (T, B) if bench.cuda else (min(T, 3), 2)
    inputs = [bench.draw(B, T, 2, P) for _ in range(4)] + [bench.draw(4, 2, P, P, scale=P**-0.5)]
    state = [bench.draw(B, 2, P, dtype=torch.float32) for _ in range(4)]
    state[1] = 1 + state[1].detach().abs()
    reset = torch.rand(B, T, device=bench.device) < 0.1 if packed else None

    def run(backend: str, i: Tensor, f: Tensor, z: Tensor, o: Tensor, R: Tensor, *state: Tensor) -> Any:
        return slstm(i, f, z, o, R, SLSTMState(*state), reset=reset, backend=backend)

    return over_twin(run, [*inputs, *state], bench.dtype, differentiate=T > 1)


@torch.no_grad()
def check_decoding(bench: Bench, style: str) -> Result:
    """The decode loop against steps launched one by one: the same kernels, so the same logits."""
    fields: Result = {"hidden_size": 1024, "num_hidden_layers": 4, "vocab_size": 512} if bench.cuda else {}
    fields = fields or {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 61}
    config = XLSTMConfig(block_style=style, num_heads=4, slstm_at=[1], kernel_backend="triton", **fields)
    model: Any = XLSTMForCausalLM(config)
    model = model.to(bench.device, bench.dtype).eval()
    if not bench.cuda:
        model.decode_loop.capture = lambda step, model: step
    caches = [XLSTMCache(config), XLSTMCache(config)]
    loop, errors = model.get_compiled_call(None), []
    ids = torch.randint(3, config.vocab_size, (3, 17 if bench.cuda else 3), device=bench.device)
    for _ in range(12 if bench.cuda else 3):
        fast, plain = (f(input_ids=ids, past_key_values=c).logits for f, c in zip((loop, model), caches, strict=True))
        errors.append(((fast - plain).abs().max() / plain.abs().max()).item())
        ids = plain[:, -1:].argmax(-1)
    recorded = [step is not None for step in model.decode_loop.steps.values()]
    passes = recorded == [True] and all(e <= FLOAT32 for e in errors)
    return {"passes": passes, "errors": [f"{e:.1e}" for e in errors], "recorded": recorded}


def checks(bench: Bench) -> Result:
    """The twin rule for every kernel."""
    cases: dict[str, Run] = {
        "mlstm": lambda: check_mlstm(bench),
        "mlstm packed, chunk 256": lambda: check_mlstm(bench, packed=True, chunk_size=256 if bench.cuda else 16),
        "mlstm sigmoid": lambda: check_mlstm(bench, input_gate="sigmoid"),
        "mlstm soft cap": lambda: check_mlstm(bench, gate_soft_cap=15.0),
        "mlstm step": lambda: check_mlstm(bench, T=1, gate_soft_cap=15.0),
        **{f"slstm {P}": lambda P=P: check_slstm(bench, P) for P in bench.sizes["slstm checks"]},  # type: ignore[misc]
        "slstm 256, many rows": lambda: check_slstm(bench, 256 if bench.cuda else 80, B=600),
        "slstm step": lambda: check_slstm(bench, 256 if bench.cuda else 16, T=1),
        "slstm packed": lambda: check_slstm(bench, 16, packed=True),
        "slstm 192 packed": lambda: check_slstm(bench, 192 if bench.cuda else 16, packed=True),
        **{f"decoding {style}": lambda style=style: check_decoding(bench, style) for style in ("large", "neurips")},  # type: ignore[misc]
    }
    return {name: run() for name, run in tqdm(cases.items(), desc="Checks")}


def time_mlstm(bench: Bench, B: int, H: int, T: int, K: int, V: int) -> Result:
    q, k, v = (bench.draw(B, T, H, size) for size in (K, K, V))
    i, f = (bench.draw(B, T, H, dtype=torch.float32) for _ in range(2))
    dh = bench.draw(B, T, H, V, grad=False)
    found: Result = {"B": B, "H": H, "T": T, "K": K, "V": V}

    def forward(chunk_size: int) -> Tensor:
        return mlstm(q, k, v, i, f, chunk_size=chunk_size, backend="triton")[0]

    def both(run: Callable[[], Tensor], xs: list[Tensor], dy: Tensor) -> Run:
        return lambda: torch.autograd.grad(run(), xs, dy)

    for chunk_size in (64, 128, 256) if bench.cuda else (16,):
        run = functools.partial(forward, chunk_size)
        found[f"forward ms, chunk {chunk_size}"] = bench.timed(run)
        found[f"forward+backward ms, chunk {chunk_size}"] = bench.timed(both(run, [q, k, v, i, f], dh))
    L, n = 256, B * H * T
    work = 4 * n * K * V + n * (L + 64) * (K + V)
    traffic = 2 * (2 * n * (K + V) + 2 * B * H * (T // L) * K * V)
    found["floor forward ms on an H200"] = round(1e3 * max(work / PRODUCTS, traffic / BANDWIDTH), 3)
    found |= {f"peer {name}": value for name, value in time_peers(bench, (q, k, v, i, f), both).items()}
    return found


def time_peers(bench: Bench, inputs: tuple[Tensor, ...], both: Callable[..., Run]) -> Result:
    """The same inputs in other packages' kernels, and attention."""
    q, k, v, _, f = inputs
    found: Result = {}
    heads = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs]
    try:
        from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk

        def official() -> Tensor:
            names = dict(zip("qkvif", heads, strict=True))
            return mlstm_chunkwise__xl_chunk(**names, chunk_size=128, autocast_kernel_dtype=bench.dtype)

        found["xl_chunk forward ms"] = bench.timed(official)
        found["xl_chunk forward+backward ms"] = bench.timed(both(official, heads, torch.ones_like(heads[2])))
    except ImportError as error:
        found["xl_chunk"] = str(error)
    try:
        from fla.ops.simple_gla import chunk_simple_gla

        decay = F.logsigmoid(f).detach()
        found["simple_gla forward ms"] = bench.timed(lambda: chunk_simple_gla(q=q, k=k, v=v, g=decay))
    except ImportError as error:
        found["simple_gla"] = str(error)
    if bench.cuda:
        D, head = q.shape[2] * v.shape[3], 128
        qkv: Any = [bench.draw(q.shape[0], D // head, q.shape[1], head) for _ in range(3)]
        attend = lambda: F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)  # noqa: E731
        found["attention forward ms"] = bench.timed(attend)
        found["attention forward+backward ms"] = bench.timed(both(attend, qkv, torch.ones_like(qkv[0])))
    return found


@torch.no_grad()
def time_step(bench: Bench, B: int) -> Result:
    """One token of the 7B model's mLSTM over its state, launched from Python and replayed from a CUDA graph."""
    H, K, V = (8, 256, 512) if bench.cuda else (1, 16, 16)
    xs: Any = [bench.draw(B, 1, H, size, grad=False) for size in (K, K, V)]
    xs += [bench.draw(B, 1, H, dtype=torch.float32, grad=False) for _ in range(2)]
    state = MLSTMState(*(torch.zeros(s, device=bench.device) for s in ((B, H, K, V), (B, H, K), (B, H))))
    op: Any = mlstm_step_
    options: Any = {"eps": 1e-6, "input_gate": "exp", "gate_soft_cap": 15.0}
    found: Result = {"B": B}
    runs: dict[str, Run] = {"": lambda: op(*xs, state, backend="triton", **options)}
    try:
        from mlstm_kernels.torch.recurrent.triton_step import mlstm_recurrent_step__triton as official

        old: Any = {"c": state.C, "n": state.n, "m": state.m[..., None]}
        new: Any = dict(zip("qkvif", [x[:, 0] if x.dim() == 4 else x[:, 0, :, None] for x in xs], strict=True))
        runs["peer official "] = lambda: official(**new, **old)
    except ImportError as error:
        found["peer official"] = str(error)
    for name, run in runs.items():
        found[f"{name}ms"] = bench.timed(run)
        if bench.cuda and not isinstance(found[f"{name}ms"], str):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            found[f"{name}graph ms"] = bench.timed(graph.replay)
    found["floor ms on an H200"] = round(1e3 * 8 * B * H * K * (V + 1) / BANDWIDTH, 4)
    return found


def time_slstm(bench: Bench, B: int, H: int, T: int, P: int) -> Result:
    gates: Any = [bench.draw(B, T, H, P) for _ in range(4)]
    R = bench.draw(4, H, P, P, scale=P**-0.5)
    dh = bench.draw(B, T, H, P, grad=False)
    op: Any = slstm
    run = lambda: op(*gates, R, backend="triton")[0]  # noqa: E731
    found: Result = {"B": B, "H": H, "T": T, "P": P}
    times = {"forward": bench.timed(run)}
    times["forward+backward"] = bench.timed(lambda: torch.autograd.grad(run(), [*gates, R], dh))
    if bench.cuda:
        lstm = torch.nn.LSTM(H * P, H * P, batch_first=True, device=bench.device, dtype=bench.dtype)
        x, weights = bench.draw(B, T, H * P), list(lstm.parameters())
        dy = bench.draw(B, T, H * P, grad=False)
        times["peer nn.LSTM forward"] = bench.timed(lambda: lstm(x))
        both = lambda: torch.autograd.grad(lstm(x)[0], [x, *weights], dy)  # noqa: E731
        times["peer nn.LSTM forward+backward"] = bench.timed(both)
    return {
        **found,
        **{f"{name} us a step": v if isinstance(v, str) else round(1e3 * v / T, 2) for name, v in times.items()},
    }


def contestants(style: str, fields: Result) -> dict[str, Callable[[], Any]]:
    """Language models of one size: ours on kernels, Transformers' own xlstm, and a Llama."""
    made: dict[str, Callable[[], Any]] = {
        "ours": lambda: XLSTMForCausalLM(XLSTMConfig(block_style=style, kernel_backend="triton", **fields))
    }
    made["peer transformers xlstm"] = lambda: transformers.AutoModelForCausalLM.from_config(
        transformers.xLSTMConfig(**fields)  # it knows the large style only
    )
    width = {"intermediate_size": int(8 * fields["hidden_size"] / 3) // 64 * 64, "num_attention_heads": 16}
    sizes = {**fields, **width} | {"max_position_embeddings": 1 << 20}
    sizes.pop("num_heads")
    made["peer llama"] = lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return made


def time_model(bench: Bench, make: Callable[[], Any], B: int, T: int, new: int) -> Result:
    model = make().to(bench.device, bench.dtype)
    ids = torch.randint(3, model.config.vocab_size, (B, T), device=bench.device)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False).loss.backward()

    def decode(count: int, **options: Any) -> Run:
        options |= {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return lambda: model.generate(ids[:1], **options)

    found: Result = {"parameters": sum(p.numel() for p in model.parameters())}
    spent = bench.milliseconds(train)
    found["training tokens/s"] = round(1e3 * B * T / spent, 1)
    model.zero_grad(set_to_none=True)
    model.eval()
    ways: Result = {"": {}}
    if hasattr(model, "decode_loop"):
        ways["step by step "] = {"disable_compile": True}
        if not bench.cuda:
            model.decode_loop.capture = lambda step, model: step
    for way, options in ways.items():
        longer, shorter = bench.milliseconds(decode(new, **options)), bench.milliseconds(decode(1, **options))
        spent = (longer - shorter) / (new - 1)
        found[f"decode {way}ms a token, batch 1"] = round(spent, 4)
        found[f"decode {way}tokens/s, batch 1"] = round(1e3 / max(spent, 1e-6), 1)
    return found


def sections(bench: Bench) -> dict[str, Run]:
    """What is timed, the most important first."""
    sizes = bench.sizes
    found: dict[str, Run] = {}
    for size in sizes["mlstm"]:
        found[f"mlstm {size}"] = lambda size=size: time_mlstm(bench, **size)  # type: ignore[misc]
    for B in sizes["step"]:
        found[f"mlstm step, batch {B}"] = lambda B=B: time_step(bench, B)  # type: ignore[misc]
    for size in sizes["slstm"]:
        found[f"slstm {size}"] = lambda size=size: time_slstm(bench, **size)  # type: ignore[misc]
    for style, fields in sizes["model"].items():
        for name, make in contestants(style, fields).items():
            found[f"model {style}, {name}"] = lambda make=make: time_model(bench, make, **sizes["tokens"])  # type: ignore[misc]
    return found


def guarded(name: str, run: Run) -> Any:
    """The result of a section; of a peer's, also what it raised."""
    try:
        return run()
    except Exception as error:
        if "peer" not in name:
            raise
        return f"{type(error).__name__}: {str(error)[:200]}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The Triton kernels on one GPU: right first, then fast.")
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s")
    add(
        "--seconds",
        type=number(float, 0),
        default=440,
        help="time after which no section is begun (default: %(default)s)",
    )
    add("--checks_only", action="store_true", help="time nothing")
    add("--json", type=new_file, help="also write the result there, after every section")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        # No failure: `make bench` runs every benchmark, on laptops too.
        print("benchmark_gpu.py: no CUDA device, nothing was measured; `--device cpu` shows that the script works.")
        return
    if arguments.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        # Read when Triton is imported, which has happened by now.
        raise SystemExit("benchmark_gpu.py: `--device cpu` needs TRITON_INTERPRET=1 in the environment.")
    torch.manual_seed(0)
    bench = Bench(torch.device(arguments.device), arguments.seconds)
    about = describe_machine("triton", "mlstm_kernels", "flash-linear-attention")
    result: Result = {"about": about, "device": arguments.device, "dtype": str(bench.dtype)}
    result["checks"] = checks(bench)
    write_json(arguments.json, result)
    if failed := [name for name, check in result["checks"].items() if not check["passes"]]:
        print(json.dumps(result, indent=1))
        raise SystemExit(f"benchmark_gpu.py: {failed} err more than they may; nothing was timed.")
    work = {} if arguments.checks_only else sections(bench)
    for name, run in tqdm(work.items(), desc="Times"):
        result[name] = guarded(name, run) if time.monotonic() < bench.deadline else "no time left"
        write_json(arguments.json, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
