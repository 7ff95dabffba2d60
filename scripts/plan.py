r"""What training a model takes before it is tried: parameters, memory of a device, operations of a token, time.

    python scripts/plan.py configuration/model/xlstm_neurips_1_3b.json --batch 8 --block_size 2048 --precision mixed \
        --gradient_checkpointing --device "H100 80GB HBM3" --devices 8 --sharding zero3 --total_tokens 30e9

No number is computed and nothing downloaded; the model may be far larger than this machine. One block of each kind is
walked through, operation by operation, which takes a minute or two where rows are long. docs/training.md says how near
the numbers came to real runs, and what they leave out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flags import NO_CONFIG, WrongInput, number, positive

from modeling_xlstm import XLSTMConfig
from modeling_xlstm.costs_xlstm import flops_per_token, known_peak_flops
from modeling_xlstm.memory_xlstm import OPTIMIZERS, SHARDINGS, Plan, estimate_step


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, help="file of configuration/model, or a checkpoint's folder")
    add("--batch", type=positive, default=8, help="rows of a micro-batch on one device (default: %(default)s)")
    add("--block_size", type=positive, default=2048, help="tokens of a row (default: %(default)s)")
    add("--accumulation", type=positive, default=1, help="micro-batches of a step (default: %(default)s)")
    add("--precision", choices=("float32", "mixed", "bfloat16"), default="mixed", help="mixed is Trainer's --bf16")
    add("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="(default: %(default)s)")
    add("--gradient_checkpointing", action="store_true", help="compute blocks again in the backward pass")
    add("--carry_state", action="store_true", help="keep states from step to step")
    add("--devices", type=positive, default=1, help="how many (default: %(default)s)")
    add("--sharding", choices=SHARDINGS, default="none", help="zero3 is FSDP2 too (default: %(default)s)")
    add("--device", help="name of a known GPU, as torch gives it; else --flops")
    add("--flops", type=number(float, 1), help="operations a second of one device, without sparsity")
    add("--memory", type=number(float, 1e-3), help="GB (10^9 bytes) of one device: says whether the step fits")
    add(
        "--mfu",
        type=number(float, 1e-6, 1),
        default=0.4,
        help="share of --flops, or of the --device's, that training reaches (default: %(default)s)",
    )
    add("--total_tokens", type=number(float, 1), default=1e9, help="to train on (default: %(default)g)")
    add("--json", action="store_true", help="print JSON")
    return parser.parse_args(words)


def open_config(path: Path) -> XLSTMConfig:
    file = path if path.is_file() else path / "config.json"
    if not file.is_file():
        raise WrongInput(f"`model` must be a file of configuration/model or a checkpoint's folder; {path} is neither.")
    try:
        fields = json.loads(file.read_text("utf-8"))
        kind = fields.get("model_type", XLSTMConfig.model_type)
        if kind == XLSTMConfig.model_type:
            config = XLSTMConfig(**fields) if path.is_file() else XLSTMConfig.from_pretrained(path)
    except (AttributeError, *NO_CONFIG) as error:
        raise WrongInput(f"{file} describes no xLSTM: {error}") from error
    if kind != XLSTMConfig.model_type:
        raise WrongInput(f"{file} must describe a model of type {XLSTMConfig.model_type}; got {kind}.")
    if not config.vocab_size:
        raise WrongInput(f"{file} must describe a language model; this one reads frames and has no `vocab_size`.")
    return config


def estimate(arguments: argparse.Namespace) -> dict[str, Any]:
    """All numbers: bytes, operations, seconds."""
    if arguments.sharding == "none" and arguments.devices > 1:
        raise WrongInput("Several devices need a --sharding: ddp, zero2 or zero3.")
    config = open_config(arguments.model)
    plan = Plan(
        batch=arguments.batch,
        tokens=arguments.block_size,
        precision=arguments.precision,
        optimizer=arguments.optimizer,
        checkpointing=arguments.gradient_checkpointing,
        accumulation=arguments.accumulation,
        sharding=arguments.sharding,
        devices=arguments.devices,
        carried=arguments.carry_state,
    )
    step, flops = estimate_step(config, plan), flops_per_token(config, arguments.block_size)
    numbers: dict[str, Any] = {
        "parameters": step.parameters,
        "memory": {name: round(x) for name, x in step._asdict().items() if name != "parameters"},
        "flops_per_token": {**flops._asdict(), "forward": flops.forward, "training": flops.training},
        "tokens_per_step": arguments.batch * arguments.block_size * arguments.accumulation * arguments.devices,
    }
    if arguments.memory:
        numbers["fits"] = step.peak <= arguments.memory * 1e9
    if peak := peak_flops(arguments):
        speed = arguments.devices * peak * arguments.mfu / flops.training
        numbers |= {"tokens_per_second": speed, "seconds": arguments.total_tokens / speed}
    return numbers


def peak_flops(arguments: argparse.Namespace) -> float | None:
    if arguments.flops and arguments.device:
        raise WrongInput("Give --device or --flops; got both.")
    if not arguments.device:
        return arguments.flops
    peak = known_peak_flops(arguments.device, "float32" if arguments.precision == "float32" else "half")
    if peak is None:
        raise WrongInput(f"No peak is known of `--device {arguments.device}`. Give it with --flops.")
    return peak


def show(numbers: dict[str, Any], arguments: argparse.Namespace) -> None:
    print(f"Parameters {numbers['parameters']:,}")
    print(f"Memory of each of {arguments.devices} device(s), GB:")
    for name, size in numbers["memory"].items():
        print(f"  {name:12} {size / 1e9:10.3f}")
    if arguments.memory:
        print(f"  {'of':12} {arguments.memory:10.3f}   {'fits' if numbers['fits'] else 'DOES NOT FIT'}")
    print("FLOPs of a token, millions:")
    for name, count in numbers["flops_per_token"].items():
        print(f"  {name:12} {count / 1e6:10.3f}")
    print(f"Step       {numbers['tokens_per_step']:,} tokens")
    if "seconds" in numbers:
        hours = numbers["seconds"] / 3600
        speed = f"{numbers['tokens_per_second']:,.0f} tokens/s at an MFU of {arguments.mfu:g}"
        print(f"Time       {speed}: {arguments.total_tokens:,.0f} tokens in {hours:,.1f} hours")
    else:
        print("Time       unknown: give --device or --flops")


def main() -> None:
    arguments = parse()
    try:
        numbers = estimate(arguments)
    except WrongInput as error:
        raise SystemExit(f"plan.py: {error}") from None
    if arguments.json:
        print(json.dumps(numbers, indent=2))
    else:
        show(numbers, arguments)


if __name__ == "__main__":
    main()
