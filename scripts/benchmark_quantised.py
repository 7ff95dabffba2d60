"""Decoding with weights in fewer bits: tokens per second, bytes of weights, bits per byte of held-out text.

Minutes on 2 CPU cores that do nothing else, with a trained model and the two sizes of scripts/benchmark.py:

    pip install -e ".[quant]"
    python scripts/quickstart.py
    python scripts/benchmark_quantised.py xlstm-quickstart large neurips

Every model is read from a folder once more for each library and dtype. All run in one process and take turns, feeding
the same tokens one at a time from the state after a prompt; what answers unlike float32 is not timed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmark import disagreement, measure, run_once
from benchmark_models import FULL, TINY, Size, decoding, ours
from corpus import read_standard_library
from flags import checkpoint, new_file, positive, write_json
from machine import describe_machine
from quickstart import bits_per_byte, make_blocks
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoTokenizer

from modeling_xlstm import XLSTMForCausalLM
from modeling_xlstm.quantization_xlstm import LIBRARIES, quantization, weight_bytes

STYLES = ("large", "neurips")
PROMPT, NEW = 16, 16  # tokens
# Norm of the last logits' errors over theirs, against float32: more is a fault, not rounding. Wrong products give 1.4.
AGREEMENT = {"bitsandbytes-4bit": 0.6}
EIGHT_BITS = 0.1


def load(folder: Path, kind: str | None, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {} if kind is None else {"quantization_config": quantization(kind, dtype)}
    return XLSTMForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def load_all(folder: Path) -> dict[str, tuple[str | None, Any]]:
    """The model as it is and in every kind, in float32 and bfloat16: name to kind and model."""
    found: dict[str, tuple[str | None, Any]] = {}
    for kind in (None, *LIBRARIES):
        for dtype in (torch.float32, torch.bfloat16):
            name = " ".join(word for word in (kind, str(dtype).removeprefix("torch.")) if word)
            found[name] = kind, load(folder, kind, dtype)
    return found


@torch.inference_mode()
def held_out_bits(model: Any, tokenizer: Any, blocks: Any) -> float:
    losses = [float(model(rows, labels=rows).loss) * len(rows) for rows in blocks.blocks.split(8)]
    return bits_per_byte(sum(losses) / len(blocks.blocks), blocks, tokenizer)


def time_decoding(models: dict[str, tuple[str | None, Any]], B: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds and tokens per second of each, and its error over scale against the first."""
    vocab_size = next(iter(models.values()))[1].config.vocab_size
    ids: Tensor = torch.randint(vocab_size, (B, PROMPT + NEW), generator=torch.Generator().manual_seed(1))
    contestants = {name: decoding(model, ids[:, :PROMPT], ids[:, PROMPT:]) for name, (_, model) in models.items()}
    results = {name: run_once(contestant)[0] for name, contestant in contestants.items()}
    first = next(iter(results.values()))
    errors = {name: disagreement([first, result]) for name, result in results.items()}
    for name in errors:
        apart = float((results[name].float() - first.float()).norm() / first.float().norm())
        if not apart <= AGREEMENT.get(models[name][0] or "", EIGHT_BITS):
            raise SystemExit(f"benchmark_quantised.py: {name} differs by {apart:.2g} of its norm; nothing was timed.")
    spent = measure(contestants, rounds, 0.0, f"batch {B}")
    return {
        name: {
            "milliseconds": 1000 * statistics.median(seconds) / NEW,
            "tokens_per_second": B * NEW / statistics.median(seconds),
            "difference": errors[name],
        }
        for name, seconds in spent.items()
    }


def judge(name: str, folder: Path, rounds: int, batches: list[int], blocks: int) -> dict[str, Any]:
    models = load_all(folder)
    rows: dict[str, Any] = {n: {"weight_bytes": weight_bytes(model)} for n, (_, model) in models.items()}
    for B in batches:
        for n, timed in time_decoding(models, B, rounds).items():
            rows[n][f"batch {B}"] = timed
    if (folder / "tokenizer_config.json").exists():
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        held_out = make_blocks(tokenizer, read_standard_library().held_out)
        held_out.blocks = held_out.blocks[:blocks]
        for n, (_, model) in tqdm(models.items(), desc="bits per byte"):
            rows[n]["bits_per_byte"] = held_out_bits(model, tokenizer, held_out)
    show(name, rows, batches)
    return rows


def show(name: str, rows: dict[str, Any], batches: list[int]) -> None:
    heads = [f"{'tokens/s, ms a step at batch ' + str(B):>31}" for B in batches]
    print(f"\n{name:28}{'MB':>9}{''.join(heads)}   difference   bits per byte")
    for n, row in rows.items():
        timed = [row[f"batch {B}"] for B in batches]
        speeds = "".join(f"{t['tokens_per_second']:20,.0f} {t['milliseconds']:10.2f}" for t in timed)
        bits = f"{row['bits_per_byte']:16.4f}" if "bits_per_byte" in row else ""
        print(f"{n:28}{row['weight_bytes'] / 1e6:9.2f}{speeds}{timed[0]['difference']:13.4f}{bits}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decoding with weights in fewer bits.")
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        type=style_or_checkpoint,
        help=f"folders of models, or {' and '.join(STYLES)}: the sizes of scripts/benchmark.py",
    )
    add("--rounds", type=positive, default=5, help="turns of each contestant (default: %(default)s)")
    add("--threads", type=positive, default=2, help="of torch (default: %(default)s)")
    add("--batches", type=positive, nargs="+", default=[1, 8], help="default: %(default)s")
    add("--blocks", type=positive, default=256, help="held-out blocks to judge with (default: %(default)s)")
    add("--tiny", action="store_true", help="tiny sizes, which show nothing about speed")
    add("--json", type=new_file, help="also write the result there")
    return parser.parse_args()


def style_or_checkpoint(word: str) -> str:
    return word if word in STYLES else str(checkpoint(word))


def save_untrained(style: str, size: Size, folder: Path) -> Path:
    ours(style, size).save_pretrained(folder / style)
    return folder / style


def main() -> None:
    arguments = parse()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.models:
            size = TINY if arguments.tiny else FULL
            folder = save_untrained(name, size, Path(scratch)) if name in STYLES else Path(name)
            result[name] = judge(name, folder, arguments.rounds, arguments.batches, arguments.blocks)
    result["about"] = describe_machine(*sorted(set(LIBRARIES.values())))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
