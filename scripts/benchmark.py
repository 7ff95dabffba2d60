"""Time this package against its peers on the CPU: training, prefill, decoding and the cells alone, as ratios.

    pip install xlstm mlstm_kernels    # optional peers, only to be measured against
    python scripts/benchmark.py --json benchmark.json

The contestants of a row hold the same weights and inputs, run in one process and take turns; a row is not timed unless
they computed the same. A ratio is the first peer's median time over ours; peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmark_works import WORKS, Contest, missing
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]


def disagreement(contest: Contest) -> float:
    """Largest error over scale between ours and every other contestant; runs each once."""
    results = [run() for run in contest.runs.values()]
    worst = 0.0
    for result in results[1:]:
        for ours, other in zip(tensors(results[0]), tensors(result), strict=True):
            error = (ours.double() - other.double()).abs().max() / other.double().abs().max()
            worst = max(worst, error.nan_to_num(float("inf")).item())
    return worst


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def measure(contest: Contest, rounds: int, name: str) -> dict[str, list[float]]:
    """Seconds of every run of every contestant, taken in turns."""
    seconds: dict[str, list[float]] = {contestant: [] for contestant in contest.runs}
    for _ in tqdm(range(rounds), desc=name, leave=False):
        for contestant, run in contest.runs.items():
            start = time.perf_counter()
            run()
            seconds[contestant].append(time.perf_counter() - start)
    return seconds


def time_row(name: str, rounds: int) -> dict[str, Any]:
    contest = WORKS[name][1]()
    error = disagreement(contest)
    if contest.agreement is not None and error > contest.agreement:
        raise SystemExit(f"benchmark.py: contestants of {name!r} differ by {error:.1e} of scale; it is not timed.")
    seconds = measure(contest, rounds, name)
    medians = {contestant: statistics.median(spent) for contestant, spent in seconds.items()}
    ours, *peers = medians
    best = min(peers, key=lambda peer: medians[peer])
    return {
        "work": name,
        "tokens_per_second": {contestant: contest.tokens / spent for contestant, spent in medians.items()},
        "milliseconds": {contestant: 1000 * spent for contestant, spent in medians.items()},
        "fastest_peer": best,
        "ratio": medians[best] / medians[ours],
        "target": contest.target,
        "difference": error if contest.agreement is not None else None,
    }


def peak_memory(name: str, contestant: str) -> int:
    """Bytes resident at most while one contestant of a row runs twice, in a process of its own."""
    command = [sys.executable, __file__, "--only", name, "--contestant", contestant]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak_memory(name: str, contestant: str) -> None:
    import resource

    run = WORKS[name][1]().runs[contestant]
    run()
    run()
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time this package against its peers on the CPU.")
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="WORDS", help="rows whose name contains one of these")
    add("--rounds", type=int, default=5, help="turns of each contestant (default: %(default)s)")
    add("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    add("--memory", action="store_true", help="also measure the peak memory of training rows")
    add("--json", type=Path, help="also write the result there")
    add("--contestant", help=argparse.SUPPRESS)
    return parser.parse_args()


def show(row: dict[str, Any]) -> None:
    speeds = ", ".join(f"{name} {value:,.0f}" for name, value in row["tokens_per_second"].items())
    target = "" if row["target"] is None else f" (target {row['target']})"
    memory = "".join(f", {name} {value / 2**30:.2f} GB" for name, value in row.get("peak_memory", {}).items())
    tqdm.write(f"{row['work']:40} {row['ratio']:6.2f} x{target:14} tokens/s: {speeds}{memory}")


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    chosen = [name for name in WORKS if not arguments.only or any(words in name for words in arguments.only)]
    if not chosen:
        raise SystemExit(f"benchmark.py: `--only` must name rows; got {arguments.only}. Rows: {', '.join(WORKS)}.")
    if arguments.contestant:
        print_peak_memory(chosen[0], arguments.contestant)
        return
    rows = []
    for name in tqdm(chosen, desc="Rows"):
        if absent := missing(WORKS[name][0]):
            tqdm.write(f"{name:40} left out: {absent} is not installed")
            continue
        row = time_row(name, arguments.rounds)
        if arguments.memory and name.startswith("train"):
            row["peak_memory"] = {c: peak_memory(name, c) for c in row["milliseconds"]}
        rows.append(row)
        show(row)
    about = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    about |= {"transformers": transformers.__version__, "python": platform.python_version()}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows, "about": about}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
