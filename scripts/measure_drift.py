"""How far a checkpoint's logits and states drift from float64 when a long text is read one token at a time.

    python scripts/quickstart.py
    python scripts/measure_drift.py xlstm-quickstart --tokens 100000

The text is held-out standard library, repeated if it is too short. float64 reads it in long pieces, every other dtype
token by token, as decoding does; its own rounding of the weights is part of what is measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from corpus import read_standard_library
from flags import checkpoint, positive
from machine import describe_machine, machine_in_words
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoTokenizer

from modeling_xlstm import XLSTMCache, XLSTMForCausalLM

PIECE = 1000  # tokens of a float64 forward pass, and of the end that is compared
DTYPES = ("float64", "float32", "bfloat16", "float16")


def read_text(folder: Path, tokens: int) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: Tensor = tokenizer("\n".join(read_standard_library().held_out), return_tensors="pt").input_ids[0]
    return ids.repeat(-(-tokens // len(ids)))[None, :tokens]


@torch.inference_mode()
def last_logits(model: XLSTMForCausalLM, ids: Tensor, piece: int, name: str) -> tuple[Tensor, bool]:
    """Logits of the last PIECE tokens, float64, and whether every state was finite all along."""
    cache, logits, finite = XLSTMCache(model.config), [], True
    for start in tqdm(range(0, ids.shape[1], piece), desc=name):
        out = model(ids[:, start : start + piece], past_key_values=cache)
        if start + piece > ids.shape[1] - PIECE:
            logits.append(out.logits.double())
        if start % PIECE == 0:
            finite &= all(bool(x.isfinite().all()) for s in cache.states if s is not None for x in s.cell)
    return torch.cat(logits, 1)[0, -PIECE:], finite


def main() -> None:
    parser = argparse.ArgumentParser(description="Drift of long decoding against float64.")
    parser.add_argument("checkpoint", type=checkpoint, help="folder with a model and its tokenizer")
    parser.add_argument("--tokens", type=positive, default=100_000, help="to read (default: %(default)s)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="default: %(default)s"
    )
    arguments = parser.parse_args()
    ids = read_text(arguments.checkpoint, arguments.tokens)
    exact, _ = last_logits(
        XLSTMForCausalLM.from_pretrained(arguments.checkpoint, dtype="float64"), ids, PIECE, "float64"
    )
    print(f"logits of the last {len(exact)} of {ids.shape[1]} tokens, scale {exact.abs().max():.3g}")
    for dtype in arguments.dtypes:
        model = XLSTMForCausalLM.from_pretrained(arguments.checkpoint, dtype=dtype)
        logits, finite = last_logits(model, ids, 1, dtype)
        error, changed = (logits - exact).abs().max(), (logits.argmax(-1) != exact.argmax(-1)).double().mean()
        print(f"{dtype}: largest error {error:.2e}, argmax differs {changed:.2%}, states finite: {finite}")
    print(machine_in_words(describe_machine()))


if __name__ == "__main__":
    main()
