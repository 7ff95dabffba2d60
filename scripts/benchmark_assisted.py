"""Assisted decoding against plain greedy decoding: drafts accepted, forward passes saved, tokens per second as a ratio.

Laptop, minutes on 2 CPU cores, with a trained model and a smaller one that shares its tokenizer:

    python scripts/quickstart.py
    python scripts/quickstart.py --out draft --hidden_size 64
    python scripts/benchmark_assisted.py xlstm-quickstart --draft draft

The prompts are beginnings of files of the standard library that the models were not trained on. Every contestant runs
in one process, in turns, on the same prompts. Before anything is timed, each must write the greedy text of each prompt
exactly, in float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from corpus import read_standard_library
from flags import checkpoint, new_file, positive, write_json
from machine import describe_machine
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoTokenizer

from modeling_xlstm import XLSTMForCausalLM

Contestants = dict[str, dict[str, Any]]  # what each passes to `generate` beside the prompt


class Written(NamedTuple):
    """What writing some texts took.

    Attributes:
        texts: ids, prompt included.
        seconds: of all.
        passes: forward passes of the model, the prompt's included.
        drafted: tokens that were drafted for it to check.
    """

    texts: list[list[int]]
    seconds: float
    passes: int
    drafted: int


def write(model: XLSTMForCausalLM, prompts: list[Tensor], new: int, options: dict[str, Any]) -> Written:
    columns: list[int] = []
    layers = model.config.num_hidden_layers

    def count(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if model.config.num_hidden_layers == layers:  # drafts by its own first blocks are no pass
            columns.append(kwargs["input_ids"].shape[1])

    hook = model.model.register_forward_pre_hook(count, with_kwargs=True)
    fixed: Any = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    texts: list[list[int]] = []
    start = time.perf_counter()
    for prompt in prompts:
        columns.append(-prompt.shape[1])  # the first pass reads the prompt too
        out: Any = model.generate(prompt, **fixed, **options)
        texts += out.tolist()
    seconds = time.perf_counter() - start
    hook.remove()
    passes = len(columns) - len(prompts)
    drafted = sum(columns) - (passes - len(prompts))
    return Written(texts, seconds, passes, drafted)


def contestants(arguments: argparse.Namespace, layers: int) -> tuple[Contestants, XLSTMForCausalLM | None]:
    found: Contestants = {"greedy": {}, "prompt lookup": {"prompt_lookup_num_tokens": arguments.draft_tokens}}
    if layers > 1:
        found["own first block"] = {"assistant_early_exit": 1}
    if arguments.draft is None:
        return found, None
    draft = XLSTMForCausalLM.from_pretrained(arguments.draft).eval()
    draft.generation_config.num_assistant_tokens = arguments.draft_tokens
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    return {**found, "draft model": {"assistant_model": draft}}, draft


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Assisted decoding against plain greedy decoding.")
    add = parser.add_argument
    add("model", type=checkpoint, help="folder of a trained model and its tokenizer")
    add("--draft", type=checkpoint, help="folder of a smaller model with the same tokenizer")
    add("--draft_tokens", type=positive, default=5, help="drafted at a time (default: %(default)s)")
    add("--prompts", type=positive, default=8, help="default: %(default)s")
    add("--prompt_tokens", type=positive, default=128, help="of each prompt (default: %(default)s)")
    add("--new_tokens", type=positive, default=128, help="of each text (default: %(default)s)")
    add("--rounds", type=positive, default=5, help="turns of each contestant (default: %(default)s)")
    add("--json", type=new_file, help="also write the result there")
    return parser.parse_args()


def read_prompts(folder: Path, count: int, length: int) -> list[Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = (tokenizer(text, return_tensors="pt").input_ids[:, :length] for text in read_standard_library().held_out)
    return [ids for ids in encoded if ids.shape[1] == length][:count]


def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    model = XLSTMForCausalLM.from_pretrained(arguments.model).eval()
    options, draft = contestants(arguments, model.config.num_hidden_layers)
    prompts = read_prompts(arguments.model, arguments.prompts, arguments.prompt_tokens)
    models = [m for m in (model, draft) if m is not None]
    for m in models:
        m.double()
    texts = {name: write(model, prompts, arguments.new_tokens, chosen).texts for name, chosen in options.items()}
    if wrong := [name for name in texts if texts[name] != texts["greedy"]]:
        raise SystemExit(f"benchmark_assisted.py: {wrong} did not write the greedy texts; nothing was timed.")
    for m in models:
        m.float()
    runs: dict[str, list[Written]] = {name: [] for name in options}
    for _ in tqdm(range(arguments.rounds), desc="Rounds"):
        for name, chosen in options.items():
            runs[name].append(write(model, prompts, arguments.new_tokens, chosen))
    new = len(prompts) * arguments.new_tokens
    seconds = {name: statistics.median(run.seconds for run in done) for name, done in runs.items()}
    result: dict[str, Any] = {
        name: {
            "tokens_per_second": round(new / seconds[name], 1),
            "ratio": round(seconds["greedy"] / seconds[name], 2),
            "passes_per_token": round(done[0].passes / new, 3),
            "accepted": round((new - done[0].passes) / done[0].drafted, 3) if done[0].drafted else None,
        }
        for name, done in runs.items()
    }
    sizes = {name: value for name, value in vars(arguments).items() if isinstance(value, int)}
    result["about"] = describe_machine() | sizes
    print(json.dumps(result, indent=2))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
