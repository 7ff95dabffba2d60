"""Set finished runs of scripts/train.py on the standard library beside each other, gzip and xz: bits per byte, a plot.

    python scripts/compare_runs.py out/xlstm out/llama --plot losses.png

The compressors get each held-out file alone, as the models do. `in one piece` reads every file from its first token to
its last with the state carried, where a model has one; the rest read the rows of the run's evaluation.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from corpus import count_bytes, read_standard_library
from flags import new_file
from machine import describe_machine, machine_in_words
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, AutoTokenizer

PIECE = 512  # tokens read at once


def bits_per_byte_compressed(texts: list[str], compress: Callable[[bytes], bytes]) -> float:
    return 8 * sum(len(compress(text.encode())) for text in texts) / count_bytes(texts)


@torch.inference_mode()
def bits_per_byte_in_one_piece(folder: Path, texts: list[str]) -> float:
    """Every file, and the end token behind it, predicted from all that is before."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    end, nats = tokenizer.eos_token_id, 0.0
    for text in tqdm(texts, desc="In one piece", leave=False):
        ids = torch.tensor([[end, *tokenizer(text, add_special_tokens=False, verbose=False).input_ids, end]])
        cache = None
        for start in range(0, ids.shape[1] - 1, PIECE):
            targets = ids[0, start + 1 : start + PIECE + 1]
            out = model(ids[:, start : start + len(targets)], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            nats += torch.nn.functional.cross_entropy(out.logits[0].double(), targets, reduction="sum").item()
    return nats / math.log(2) / count_bytes(texts)


def read_run(folder: Path, held_out_bytes: int) -> dict[str, Any]:
    """The state that a run left; `judged` in it is the last evaluation."""
    path = folder / "trainer_state.json"
    if not path.is_file():
        raise SystemExit(
            f"compare_runs.py: {folder} must hold a finished run of scripts/train.py; no {path.name} there."
        )
    state: dict[str, Any] = json.loads(path.read_text("utf-8"))
    judged = [entry for entry in state["log_history"] if "eval_bits_per_byte" in entry]
    if not judged:
        raise SystemExit(f"compare_runs.py: {folder} has not been judged: its training has not ended.")
    size = round(judged[-1]["eval_nats"] / math.log(2) / judged[-1]["eval_bits_per_byte"])
    if size != held_out_bytes:
        raise SystemExit(
            f"compare_runs.py: {folder} must have been judged on this Python's standard library, of which "
            f"{held_out_bytes:,} bytes are held out; got {size:,}. Train with --demo, under this Python."
        )
    return {**state, "judged": judged[-1]}


def draw(histories: dict[str, list[dict[str, Any]]], path: Path) -> None:
    # Imported here, for it is an extra, and slow.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for i, (name, history) in enumerate(histories.items()):
        for key, style in (("loss", "-"), ("eval_nats_per_token", "o--")):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            label = f"{name}, {'training' if key == 'loss' else 'held out'}"
            if points:
                axes.plot(
                    *zip(*points, strict=True), style, color=f"C{i}", alpha=0.4 if key == "loss" else 1.0, label=label
                )
    axes.set(xlabel="optimizer step", ylabel="nats per token", ylim=(None, 7.0))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare finished runs on the standard library.")
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of scripts/train.py --demo")
    parser.add_argument("--plot", type=new_file, help="where to draw the losses")
    arguments = parser.parse_args()
    text = read_standard_library()
    size = count_bytes(text.held_out)
    states = {folder: read_run(folder, size) for folder in arguments.runs}
    print(f"Held out   {len(text.held_out)} files, {size:,} bytes")
    for name, compress in (
        ("gzip -9", lambda x: gzip.compress(x, 9)),
        ("xz -9e", lambda x: lzma.compress(x, preset=9 | lzma.PRESET_EXTREME)),
    ):
        print(f"{name:10} {bits_per_byte_compressed(text.held_out, compress):.4f} bits per byte")
    for folder, state in states.items():
        one = ""
        if "extended_lstm" in (folder / "config.json").read_text("utf-8"):
            one = f", {bits_per_byte_in_one_piece(folder, text.held_out):.4f} in one piece"
        tokens = f"{state['num_input_tokens_seen']:,} tokens"
        print(f"{folder.name:10} {state['judged']['eval_bits_per_byte']:.4f} bits per byte after {tokens}{one}")
    if arguments.plot:
        draw({str(folder): state["log_history"] for folder, state in states.items()}, arguments.plot)
    print(f"Machine    {machine_in_words(describe_machine())}")


if __name__ == "__main__":
    main()
