"""Compile every Triton kernel for a GPU that need not be there, and say what each takes of it.

Laptop, about a quarter of an hour on 2 CPU cores for the complete matrix, no GPU:

    python scripts/compile_kernels.py --json docs/kernel_resources_triton_3.9.0.json

A minute, the main shapes only:

    python scripts/compile_kernels.py --shapes main

One GPU or many: the same; the result depends on the version of Triton and not on the machine.

Every launch that an op makes is recorded on tensors without data and then compiled. Exits with 1 if a kernel does not
compile, needs more shared memory than the device has, spills in a main shape on sm_90, or holds the pattern that Triton
3.4 to 3.7.0 miscompiles on Hopper: a product's result transposed and fed to another product.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from flags import new_file
from tqdm import tqdm  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from modeling_xlstm import ops_mlstm_triton, ops_slstm_triton

# Bytes of shared memory a block may have, by compute capability.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
MULTIPROCESSORS = 132  # of an H100
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.bool: "i1",
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The 7B model's mLSTM with its soft cap, the widest sLSTM head of one program, and heads of several that wait.
MAIN: list[dict[str, Any]] = [
    {"op": "mlstm", "K": 256, "V": 512},
    *({"op": "slstm", "P": P} for P in (128, 192, 256, 384, 512)),
]
ALL = [
    *MAIN,
    {"op": "mlstm", "K": 256, "V": 512, "chunk_size": 256},
    {"op": "mlstm", "K": 256, "V": 512, "reset": True, "input_gate": "sigmoid"},
    *(
        {"op": "mlstm", "K": K, "V": V}
        for K, V in [(16, 16), (64, 128), (128, 256), (384, 384), (512, 512), (512, 1024)]
    ),
    {"op": "mlstm", "K": 48, "V": 80, "reset": True, "gate_soft_cap": None},
    {"op": "mlstm", "K": 128, "V": 256, "dtype": FP16},
    *({"op": "mlstm", "K": K, "V": V, "dtype": FP32} for K, V in [(64, 64), (256, 512)]),
    *({"op": "slstm", "P": P} for P in (16, 32, 64, 144)),
    {"op": "slstm", "P": 128, "reset": True, "padded": True, "input_gate": "sigmoid"},
    {"op": "slstm", "P": 256, "reset": True, "padded": True},
    # More rows than programs can wait for each other: a launch a token.
    *({"op": "slstm", "P": P, "B": 4096} for P in (192, 512)),
    *({"op": "slstm", "P": P, "dtype": FP32} for P in (64, 256)),
]
OPTIONS = ("num_warps", "num_stages", "num_ctas", "launch_cooperative_grid")


class Launch(NamedTuple):
    """One launch: the kernel, the types of its arguments, its constants, and which arguments are multiples of 16."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]


class Resources(NamedTuple):
    """What a compiled kernel takes, per thread (registers, stack in bytes) and per block (shared memory in bytes)."""

    registers: int
    stack: int
    shared: int
    spills: int  # instructions that load or store local memory
    tensor_core: int  # tensor-core instructions
    transposed: bool


def meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def call_mlstm(T: int, K: int, V: int, dtype: torch.dtype, reset: bool, **options: Any) -> None:
    B, H = 2, 8
    tokens = [meta(B, T, H, size, dtype=dtype) for size in (K, K, V)] + [meta(B, T, H) for _ in range(2)]
    xs: Any = [x.requires_grad_(T > 1) for x in tokens]
    worker: Any = ops_mlstm_triton.mlstm_chunkwise_triton
    h, state = worker(
        *xs, None, reset=meta(B, T, dtype=torch.bool) if reset else None, eps=1e-6, **options
    )  # fmt: skip
    if T > 1:
        torch.autograd.grad(h.float().sum() + state.C.sum(), xs)


def call_slstm(T: int, P: int, dtype: torch.dtype, reset: bool, padded: bool, input_gate: str, B: int) -> None:
    H = 4
    xs: Any = [meta(B, T, H, P, dtype=dtype).requires_grad_(T > 1) for _ in range(4)]
    worker: Any = ops_slstm_triton.slstm_recurrent_triton
    h, state = worker(
        *xs, meta(4, H, P, P, dtype=dtype), None, lengths=meta(B, dtype=torch.int32) if padded else None,
        reset=meta(B, T, dtype=torch.bool) if reset else None, input_gate=input_gate,
    )  # fmt: skip
    if T > 1:
        torch.autograd.grad(h.float().sum() + state.c.sum(), xs)


def launches_of(shape: dict[str, Any]) -> list[Launch]:
    """The different launches of a shape: forward and backward over a sequence, and one token."""
    given = {"dtype": BF16, "reset": False, "input_gate": "exp", **shape}
    op = given.pop("op")
    defaults = {"chunk_size": 64, "gate_soft_cap": 15.0} if op == "mlstm" else {"padded": False, "B": 16}
    call = call_mlstm if op == "mlstm" else call_slstm
    with recorded() as launches:
        for T in (3, 1):
            call(T=T, **{**defaults, **given})
    return list({(launch.kernel.__name__, str(launch[1:])): launch for launch in launches}.values())


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record launches instead of running them."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **keywords: Any) -> None:
        options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
        bound = {**dict(zip(self.arg_names, args, strict=False)), **keywords}
        signature, constants, aligned = {}, {}, []
        for parameter in self.params:
            name, value = parameter.name, bound[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = f"*{TYPES[value.dtype]}"
                aligned.append(name)
            elif isinstance(value, int):
                signature[name] = "i32"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    aligned.append(name)
            else:
                signature[name] = "fp32"
        launches.append(Launch(self, signature, constants, tuple(aligned), options))

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compiled(launch: Launch, arch: int) -> Resources:
    names = launch.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, constexprs=launch.constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (dump(flag, file.name) for flag in ("--dump-resource-usage", "--dump-sass"))
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers, f"cuobjdump said nothing of {launch.kernel.__name__}: {usage}"
    return Resources(
        registers=int(numbers[1]),
        stack=int(numbers[2]),
        shared=kernel.metadata.shared,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        tensor_core=len(re.findall(r"\bHG?MMA", sass)),
        transposed=transposes_a_product(kernel.asm["ttgir"]),
    )


def transposes_a_product(ttgir: str) -> bool:
    """Whether a value with the layout of a product's result is transposed."""
    return bool(re.search(r"tt\.trans[^\n]*#(?:mma|linear)", ttgir))


def dump(flag: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout


def faults(resources: Resources, main: bool, arch: int = 90) -> list[str]:
    """What is wrong with a compiled kernel."""
    return [
        *([f"{resources.shared} bytes of shared memory"] if resources.shared > SHARED_LIMIT[arch] else []),
        *([f"{resources.spills} spills"] if main and arch == 90 and (resources.spills or resources.stack) else []),
        *(["transposes a product"] if resources.transposed else []),
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel and say what it takes.")
    add = parser.add_argument
    add("--shapes", choices=["main", "all"], default="all", help="which shapes (default: %(default)s)")
    add(
        "--arch",
        type=int,
        choices=SHARED_LIMIT,
        default=90,
        help="compute capability without its point (default: %(default)s)",
    )
    add("--kernels", default="", help="only kernels whose name matches; the file of --json keeps its other rows")
    add("--json", type=new_file, help="also write the result there")
    return parser.parse_args()


def kept_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of an earlier run for kernels that this one leaves out, of shapes that there still are."""
    if not arguments.kernels or arguments.json is None or not arguments.json.exists():
        return []
    earlier = json.loads(arguments.json.read_text("utf-8"))
    assert (earlier["triton"], earlier["arch"]) == (triton.__version__, arguments.arch), "another Triton or device"
    shapes = [{name: str(value) for name, value in shape.items()} for shape in ALL]
    columns = {"kernel", *Resources._fields}
    return [
        row
        for row in earlier["kernels"]
        if not re.search(arguments.kernels, row["kernel"])
        and {k: v for k, v in row.items() if k not in columns} in shapes
    ]


def name_of(shape: dict[str, Any], launch: Launch) -> dict[str, str]:
    """What a row is known by."""
    return {**{name: str(value) for name, value in shape.items()}, "kernel": launch.kernel.__name__}


def main() -> None:
    arguments = parse()
    rows = kept_rows(arguments)
    wrong: list[str] = []
    for worker in (ops_mlstm_triton, ops_slstm_triton):
        # What the workers ask the device when there is one.
        vars(worker)["is_small"] = lambda _: SHARED_LIMIT[arguments.arch] < 160 * 1024
        vars(worker)["programs_at_once"] = lambda _: MULTIPROCESSORS
    work = [(s, launch) for s in (MAIN if arguments.shapes == "main" else ALL) for launch in launches_of(s)]
    expected = [name_of(shape, launch) for shape, launch in work]
    work = [(s, launch) for s, launch in work if re.search(arguments.kernels, launch.kernel.__name__)]
    for shape, launch in tqdm(work, desc="Kernels"):
        resources = compiled(launch, arguments.arch)
        row = name_of(shape, launch)
        rows.append({**row, **resources._asdict()})
        wrong += [f"{row}: {fault}" for fault in faults(resources, shape in MAIN, arguments.arch)]
    found = [{k: v for k, v in row.items() if k not in Resources._fields} for row in rows]
    missing = [row for i, row in enumerate(expected) if row not in found and row not in expected[:i]]
    result = {
        "triton": triton.__version__,
        "arch": arguments.arch,
        "faults": wrong,
        "missing": missing,
        "kernels": rows,
    }
    text = json.dumps(result, indent=None).replace('{"op"', '\n{"op"')
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", "utf-8")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
