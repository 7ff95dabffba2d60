"""Continuous batching against padded batches, on requests of mixed lengths: tokens per second, as a ratio.

Laptop, a few minutes on 2 CPU cores:

    python scripts/benchmark_serving.py

One GPU, which is used if there is one:

    python scripts/benchmark_serving.py --hidden_size 1024 --num_hidden_layers 24 --slots 64 --requests 512

Both contestants run the same model, weights and requests in one process, in turns. Before anything is timed every text
of the one must equal that of the other. Padded batches are what `generate` offers: requests are taken as they come, so
many at a time as there are slots; a batch ends with its longest text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from flags import new_file, number, positive, write_json
from machine import describe_machine
from tqdm import tqdm  # type: ignore[import-untyped]

from modeling_xlstm import Request, XLSTMConfig, XLSTMEngine, XLSTMForCausalLM

Texts = list[list[int]]


def draw_requests(count: int, vocab_size: int, seed: int) -> list[Request]:
    """Prompts of 64 and texts of 64 tokens in the median, log-normal with a long tail, at most 512."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (64 * torch.randn(count, 2, generator=generator).mul(0.9).exp()).long().clamp(4, 512).tolist()
    prompts = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n, _ in lengths]
    return [Request(prompt, max_new_tokens=new) for prompt, (_, new) in zip(prompts, lengths, strict=True)]


def continuous(model: XLSTMForCausalLM, requests: list[Request], slots: int) -> Texts:
    return XLSTMEngine(model, slots).generate(requests)


def padded(model: XLSTMForCausalLM, requests: list[Request], slots: int) -> Texts:
    texts: Texts = []
    for start in range(0, len(requests), slots):
        batch = requests[start : start + slots]
        T, new = (max(map(len, (r.prompt for r in batch))), max(r.max_new_tokens for r in batch))
        ids = torch.tensor([[0] * (T - len(r.prompt)) + list(r.prompt) for r in batch], device=model.device)
        mask = torch.tensor([[0] * (T - len(r.prompt)) + [1] * len(r.prompt) for r in batch], device=model.device)
        options: Any = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        out: Any = model.generate(ids, attention_mask=mask, **options)
        texts += [row[T : T + r.max_new_tokens].tolist() for row, r in zip(out, batch, strict=True)]
    return texts


def seconds(run: Callable[[], Texts]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continuous batching against padded batches.")
    add = parser.add_argument
    add("--hidden_size", type=positive, default=256, help="width of the model (default: %(default)s)")
    add(
        "--num_hidden_layers",
        type=positive,
        default=4,
        help="blocks, sLSTM first and alternating (default: %(default)s)",
    )
    add("--vocab_size", type=positive, default=4096, help="default: %(default)s")
    add("--slots", type=positive, default=8, help="requests that run at once (default: %(default)s)")
    add("--requests", type=positive, default=48, help="default: %(default)s")
    add("--rounds", type=positive, default=5, help="turns of each contestant (default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, help="of weights and requests (default: %(default)s)")
    add("--json", type=new_file, help="also write the result there")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.manual_seed(arguments.seed)
    size = {name: getattr(arguments, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    model = XLSTMForCausalLM(XLSTMConfig(variant="mixed", **size)).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    requests = draw_requests(arguments.requests, arguments.vocab_size, arguments.seed)
    contestants = {"continuous": continuous, "padded": padded}
    texts = [run(model.double(), requests[: 2 * arguments.slots], arguments.slots) for run in contestants.values()]
    if texts[0] != texts[1]:
        raise SystemExit("benchmark_serving.py: the two contestants wrote different texts; nothing was timed.")
    model.float()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in tqdm(range(arguments.rounds), desc="Rounds"):
        for name, run in contestants.items():
            times[name].append(seconds(lambda run=run: run(model, requests, arguments.slots)))  # type: ignore[misc]
    new = sum(request.max_new_tokens for request in requests)
    speed = {name: new / statistics.median(spent) for name, spent in times.items()}
    result = {
        "tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "ratio": round(speed["continuous"] / speed["padded"], 2),
        "new_tokens": new,
        **{name: value for name, value in vars(arguments).items() if name != "json"},
        "about": describe_machine(),
    }
    print(json.dumps(result, indent=2))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
