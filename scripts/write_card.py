"""Write the model card (README.md) of a checkpoint, every number of it read from the files beside it.

Laptop, one GPU or many GPUs, for no model is run:

    python scripts/write_card.py xlstm-quickstart

The folder must hold `config.json`, weights, `trainer_state.json` (losses, steps, seconds) and `run.json`, whose "card"
says what no other file can: name, summary, data, command, machine, limits, and, where there are any, the Hub's names of
its `datasets` and `languages`. scripts/quickstart.py leaves all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open

TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "template.md"


def write_card(folder: Path, template: Path = TEMPLATE) -> Path:
    """Fill the template with the facts of a checkpoint.

    Args:
        folder: the checkpoint.
        template: text with `$names` of facts.

    Returns:
        path: of the card, README.md in the folder.

    Raises:
        ValueError: a file is missing or no JSON, or the files do not hold a fact that is asked for.
    """
    try:
        facts = card_facts(folder)
    except KeyError as error:
        raise ValueError(
            f"A card needs `{error.args[0]}`, and no config.json, trainer_state.json or run.json in {folder} holds "
            'it. Add it to "card" in run.json, or give a folder that scripts/quickstart.py has finished.'
        ) from error
    return fill_card(template, facts, folder)


def fill_card(template: Path, facts: Mapping[str, str], folder: Path) -> Path:
    """Write README.md in a folder from a template and the facts it asks for; ValueError if it asks for another."""
    try:
        card = string.Template(template.read_text("utf-8")).substitute(facts)
    except KeyError as error:
        raise ValueError(
            f"{template} asks for `${error.args[0]}`, which the files in {folder} do not hold. "
            f'Add it to "card" in {folder / "run.json"}, or take it out of the template.'
        ) from error
    path = folder / "README.md"
    path.write_text(card, "utf-8")
    return path


def card_facts(folder: Path) -> dict[str, str]:
    """All that a template can ask for, as text."""
    config, run, state = (_read(folder / name) for name in ("config.json", "run.json", "trainer_state.json"))
    logs: dict[str, Any] = {}
    for entry in state["log_history"]:
        logs.update(entry)
    card = run["card"]
    return {
        **{name: str(value) for name, value in card.items()},
        "metadata": metadata(card, logs),
        "path": folder.as_posix(),
        # As it stands between the quotes of a Python string.
        "prompt": json.dumps(card["prompt"], ensure_ascii=False)[1:-1],
        "train_bytes": f"{card['train_bytes']:,}",
        "eval_bytes": f"{card['eval_bytes']:,}",
        "parameters": f"{count_parameters(folder):,}",
        "state_bytes": f"{card['state_bytes']:,}",
        "block_types": ", ".join(config["block_types"]),
        "hidden_size": str(config["hidden_size"]),
        "num_heads": str(config["num_heads"]),
        "vocab_size": f"{config['vocab_size']:,}",
        "steps": f"{state['global_step']:,}",
        "train_tokens": f"{state['num_input_tokens_seen']:,}",
        "duration": _duration(state, logs),
        "train_loss": f"{logs['loss']:.4f}",
        "eval_loss": f"{logs['eval_loss']:.4f}",
        "bits_per_byte": f"{logs['eval_bits_per_byte']:.4f}",
    }


def metadata(card: Mapping[str, Any], logs: Mapping[str, Any]) -> str:
    """What the Hub reads at the top of a card, as YAML: among it, as `model-index`, what was measured."""
    measured = {"loss": ("Loss, nats per token", "eval_loss"), "bits_per_byte": ("Bits per byte", "eval_bits_per_byte")}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=f"held-out text, {card['eval_bytes']:,} bytes",
            metric_type=kind,
            metric_name=name,
            metric_value=round(float(logs[key]), 4),
        )
        for kind, (name, key) in measured.items()
    ]
    data = ModelCardData(
        language=card.get("languages"),
        license=card["license"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["xlstm", "custom_code"],
        datasets=card.get("datasets"),
        model_name=card["name"],
        eval_results=results,
    )
    return str(data.to_yaml())


def _duration(state: Mapping[str, Any], logs: Mapping[str, Any]) -> str:
    """Seconds of the last session of the training, and where it began unless that was the start."""
    resumed = logs.get("resumed_at_step", 0)
    seconds = f"{logs['train_runtime']:.0f} s"
    return f"{seconds} (after resuming at step {resumed:,} of {state['global_step']:,})" if resumed else seconds


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"A card needs {path}, which does not exist. Give the folder of a finished training.")
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        raise ValueError(f"A card needs {path}, which is no JSON: {error}. Mend it, or train anew.") from error


def count_parameters(folder: Path) -> int:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"A card needs weights, and {folder} has no *.safetensors. Give the folder of a finished training."
        )
    count = 0
    for path in files:
        with safe_open(path, framework="pt") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the README.md of a checkpoint.")
    parser.add_argument("folder", type=Path, help="the checkpoint")
    parser.add_argument("--template", type=Path, default=TEMPLATE, help="default: %(default)s")
    arguments = parser.parse_args()
    if not arguments.template.is_file():
        raise SystemExit(f"write_card.py: `--template` must name a file; {arguments.template} is none.")
    try:
        print(write_card(arguments.folder, arguments.template))
    except ValueError as error:
        raise SystemExit(f"write_card.py: {error}") from None


if __name__ == "__main__":
    main()
