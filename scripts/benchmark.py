"""Time this package against its peers on the CPU: training, prefill, decoding and the cells alone, as ratios.

More than an hour on 2 CPU cores that do nothing else, a third of it for the official sLSTM's gradients at T 4096; the
peers are optional, and only measured against:

    pip install xlstm mlstm_kernels
    python scripts/benchmark.py --json benchmark.json --plots plots

The tables and plots of a run once more, and the tables into a document that has a place for them:

    python scripts/benchmark.py --from_json benchmark.json --plots plots --markdown README.md

The contestants of a row hold the same weights and inputs and take turns in one process, which is the row's own: what an
allocator remembers of other rows changes none. A row is not timed unless they computed the same, or in bfloat16 unless
ours is as near to float64 as it should be. Rows of another function, Llama and Mamba2 of about as many parameters, have
nothing to check and no target. A ratio compares medians. Memory is measured in a process of its own for each
contestant: what it has allocated at most during a training step after the first, weights, gradients, optimizer and
activations, over what was there before the model was made; Python, libraries and code are not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Container
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from benchmark_models import FULL, TINY, Contestant, Size, from_state, ids, read, state_bytes
from benchmark_report import draw_plots, marked_document, summary, tables, write_between_marks
from benchmark_works import AGREEMENT, DECODED, F32, NOISE, Work, all_works, large, others
from flags import new_file, new_folder, number, positive, write_json
from machine import describe_machine
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

CONTEXTS = "contexts"  # the row that is a curve
MOST_ROUNDS = 50
Row = dict[str, Any]


def disagreement(results: list[Any]) -> float:
    """Largest error over scale between the first result and every other."""
    return max(error_over_scale(results[0], result) for result in results[1:])


def error_over_scale(result: Any, right: Any) -> float:
    worst = 0.0
    for mine, other in zip(_tensors(result), _tensors(right), strict=True):
        error = (mine.double() - other.double()).abs().max() / other.double().abs().max()
        worst = max(worst, error.nan_to_num(float("inf")).item())
    return worst


def check(work: Work, results: dict[str, Any]) -> Row:
    """How far apart results of one work lie, and why they are not compared where that is too much."""
    assert work.agreement is not None, "peers must agree"
    if work.judge is None:
        error = disagreement(list(results.values()))
        refused = f"contestants differ by {error:.1e} of scale" if error > work.agreement else ""
        return {"difference": error, **({"refused": refused} if refused else {})}
    right = run_once(work.judge())[0]
    errors = {contestant: error_over_scale(result, right) for contestant, result in results.items()}
    ours, *peers = errors.values()
    row: Row = {"difference": ours, "errors": errors}
    if not ours <= min(work.agreement, 2 * min(peers)):
        row["refused"] = "off float64 by " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return row


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def run_once(contestant: Contestant) -> tuple[Any, float]:
    """What a run returns, and its seconds."""
    prepared = contestant.prepare()
    start = time.perf_counter()
    result = contestant.run(prepared)
    return result, time.perf_counter() - start


def measure(contestants: dict[str, Contestant], rounds: int, seconds: float, name: str) -> dict[str, list[float]]:
    """Seconds of every run: contestants take turns, in reverse order every other round."""
    spent: dict[str, list[float]] = {contestant: [] for contestant in contestants}
    with tqdm(desc=name, unit="round", leave=False) as bar:
        while bar.n < rounds or (bar.n < MOST_ROUNDS and sum(map(sum, spent.values())) < seconds):
            for contestant in list(contestants)[:: -1 if bar.n % 2 else 1]:
                spent[contestant].append(run_once(contestants[contestant])[1])
            bar.update()
    return spent


def claim(what: str, value: float, **bound: float | None) -> dict[str, Any]:
    """A ratio and its target, `at_least` or `at_most`."""
    return {"what": what, "value": value, **{name: target for name, target in bound.items() if target is not None}}


def time_row(name: str, work: Work, rounds: int, seconds: float) -> Row:
    """The times of a row and the ratio that matters, or why it was not timed."""
    contestants = {contestant: make() for contestant, make in work.makers.items()}
    results, first = {}, {}
    for whose, contestant in contestants.items():  # warms up, too
        results[whose], first[whose] = run_once(contestant)
    checked = check(work, results) if work.kind == "peer" else {}
    del results  # held while the clock runs, they would keep memory from being given back that runs give back
    if "refused" in checked:
        return checked
    if work.floor is not None:
        contestants["floor"] = work.floor()
    spent = measure(contestants, rounds, seconds, name)
    medians = {contestant: statistics.median(found) for contestant, found in spent.items()}
    mine, *rest = work.makers
    row: Row = {
        **checked,
        "rounds": len(spent[mine]),
        "seconds_of_the_first_run": first,
        "milliseconds": {contestant: 1000 * median for contestant, median in medians.items()},
        "milliseconds_least": {contestant: 1000 * min(found) for contestant, found in spent.items()},
        "tokens_per_second": {c: contestants[c].tokens / median for c, median in medians.items()},
    }
    if work.kind == "itself":
        long, short = (medians[c] / contestants[c].tokens for c in (mine, rest[0]))
        return {**row, "claims": [claim("time per token", long / short, at_most=NOISE)]}
    best = min(rest, key=lambda peer: medians[peer])
    faster = [claim("speed", medians[best] / medians[mine], at_least=work.faster)] if work.kind == "peer" else []
    return {**row, "fastest_peer": best if work.kind == "peer" else None, "claims": faster}


def memory_row(name: str, work: Work, row: Row, in_a_process: InAProcess) -> None:
    """Add the memory of every contestant, and its ratio."""
    assert work.memory is not None
    contestants = tqdm(work.makers, desc=f"{name}, memory", leave=False)
    found = {c: in_a_process(allocated, name, c) for c in contestants}
    row["memory"] = found
    first, second, *_ = found
    if work.kind == "itself":
        tokens = {c: make().tokens for c, make in work.makers.items()}
        long, short = ((found[c]["peak"] - found[c]["fixed"]) / tokens[c] for c in (first, second))
        row["claims"].append(claim("memory per token", long / short, at_most=work.memory))
    elif work.kind == "peer":
        peer = row.get("fastest_peer") or second
        row["claims"].append(claim("memory", found[first]["peak"] / found[peer]["peak"], at_most=work.memory or None))


class InAProcess:
    """Functions of a row, each call in a new process.

    Args:
        arguments: `threads` and `tiny` of the command line.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.threads, self.tiny = arguments.threads, arguments.tiny

    def __call__(self, function: Callable[..., Any], name: str, *given: Any) -> Any:
        """function(name, the row's work, *given)."""
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(self._run, function, name, *given).result()

    def _run(self, function: Callable[..., Any], name: str, *given: Any) -> Any:
        torch.set_num_threads(self.threads)
        return function(name, all_works(TINY if self.tiny else FULL)[name], *given)


def can_measure_memory() -> bool:
    return Path("/proc/self/clear_refs").exists()


def allocated(_name: str, work: Work, contestant: str) -> dict[str, int]:
    """Bytes that one contestant has allocated: between steps, `fixed`, and at most, `peak`.

    Not `ru_maxrss`: a process inherits that of the one that started it, and it cannot be set back. Pages of files are
    left out, because which parts of the libraries are read is chance.
    """
    _give_back()
    before = _resident("RssAnon")
    made = work.makers[contestant]()
    run_once(made)  # the optimizer makes its state in its first step
    _give_back()
    fixed = _resident("RssAnon") - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    run_once(made)
    peak = _resident("VmHWM") - _resident("RssFile") - _resident("RssShmem") - before
    return {"peak": peak, "fixed": fixed}


def _give_back() -> None:
    """Give what is free back to the system."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    """Bytes, from Linux."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def read_contexts(size: Size, rounds: int) -> dict[str, Any]:
    """Time of a decoded token and bytes of the state, after contexts of every length, of all language models."""
    makers = {**others(size), **{n: m for n, m in large(size, "inference").items() if n == "transformers (inference)"}}
    models = {name: make().eval() for name, make in makers.items()}
    tokens, new = ids(size, 1, size.contexts[-1]), ids(size, 1, DECODED, seed=2)
    states: dict[str, Any] = dict.fromkeys(models)
    found: dict[str, Any] = {name: {"milliseconds": [], "state_bytes": []} for name in models}
    past = 0
    for length in tqdm(size.contexts, desc=CONTEXTS, leave=False):
        for name, model in models.items():
            with torch.inference_mode():
                states[name] = read(model, tokens[:, past:length], states[name])[1]
        contestants = {name: from_state(model, states[name], new) for name, model in models.items()}
        results = {name: run_once(contestant)[0] for name, contestant in contestants.items()}
        error = disagreement([results["ours"], results["transformers (inference)"]])
        if error > AGREEMENT[F32]:
            return {"difference": error, "refused": f"after {length} tokens ours and transformers' xlstm differ"}
        for name, spent in measure(contestants, rounds, 0, f"after {length} tokens").items():
            found[name]["milliseconds"].append(1000 * statistics.median(spent) / DECODED)
            found[name]["state_bytes"].append(state_bytes(states[name]))
        past = length
    for name, model in models.items():
        found[name]["parameters"] = sum(p.numel() for p in model.parameters())
    return {"lengths": list(size.contexts), "models": found}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time this package against its peers on the CPU.")
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="WORDS", help="rows so named, or whose name contains one of these")
    add("--rounds", type=positive, default=5, help="least turns of each contestant (default: %(default)s)")
    add(
        "--seconds", type=number(float, 0), default=5.0, help="short rows take turns for so long (default: %(default)s)"
    )
    add("--threads", type=positive, default=2, help="of torch (default: %(default)s)")
    add("--no_memory", action="store_true", help="measure time only")
    add("--tiny", action="store_true", help="tiny sizes: shows that everything runs, and nothing about speed")
    add("--json", type=new_file, help="write the result there, after every row")
    add("--from_json", type=Path, help="measure nothing; take the result from there")
    add("--plots", type=new_folder, metavar="FOLDER", help="draw there; needs matplotlib")
    add("--markdown", type=marked_document, help="put the tables into this document, between its marks")
    arguments = parser.parse_args()
    if arguments.plots is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error('argument --plots: needs matplotlib: pip install -e ".[tasks]"')
    return arguments


def measure_all(arguments: argparse.Namespace, works: dict[str, Work], size: Size) -> dict[str, Any]:
    result: dict[str, Any] = {"about": describe_machine("xlstm", "mlstm_kernels"), "rows": []}
    result["about"] |= {"rounds": arguments.rounds, "tiny": arguments.tiny}
    in_a_process = InAProcess(arguments)
    memory = not arguments.no_memory and can_measure_memory()
    for name, work in tqdm(works.items(), desc="Rows"):
        row: Row = {"work": name, "kind": work.kind, "claims": []}
        if obstacle := work.obstacle():
            row["left_out"] = obstacle
        elif work.timed:
            row |= in_a_process(time_row, name, arguments.rounds, arguments.seconds)
        if work.memory is not None and memory and not {"left_out", "refused"} & row.keys():
            memory_row(name, work, row, in_a_process)
        result["rows"].append(row)
        tqdm.write(summary(row))
        write_json(arguments.json, result)
    if not arguments.only or any(words in CONTEXTS for words in arguments.only):
        result[CONTEXTS] = read_contexts(size, arguments.rounds)
        write_json(arguments.json, result)
    return result


def read_result(path: Path) -> dict[str, Any]:
    """What an earlier run wrote."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmark.py: `--from_json` must name a file that --json wrote; {error}") from None
    if not isinstance(result, dict) or not {"about", "rows"} <= result.keys():
        raise SystemExit(f"benchmark.py: `--from_json` must name a file that --json wrote; {path} is none.")
    return result


def _is_chosen(name: str, names: Container[str], only: list[str]) -> bool:
    """Whether a row is meant: by its whole name, or by words in it that are no row's whole name."""
    return any(words == name if words in names else words in name for words in only)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    size = TINY if arguments.tiny else FULL
    works = all_works(size)
    if arguments.from_json is not None:
        result = read_result(arguments.from_json)
    else:
        chosen = {name: work for name, work in works.items() if _is_chosen(name, works, arguments.only or [""])}
        if not chosen and not any(words in CONTEXTS for words in arguments.only):
            rows = ", ".join([*works, CONTEXTS])
            raise SystemExit(f"benchmark.py: `--only` must name rows; got {arguments.only}. Rows: {rows}.")
        result = measure_all(arguments, chosen, size)
    print(tables(result))
    if arguments.markdown is not None:
        write_between_marks(arguments.markdown, tables(result))
    if arguments.plots is not None:
        draw_plots(result, arguments.plots)
    results = [*result["rows"], {"work": CONTEXTS, **result.get(CONTEXTS, {})}]
    if wrong := [row["work"] for row in results if "refused" in row]:
        raise SystemExit(f"benchmark.py: {wrong} failed their checks and were not timed.")


if __name__ == "__main__":
    main()
