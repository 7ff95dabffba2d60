"""Fine-tune a checkpoint on examples: all weights, LoRA adapters, or nothing but the states it starts from.

Laptop:

    python scripts/finetune.py xlstm-quickstart --data examples.jsonl --method lora --output_dir out/lora

One GPU:

    python scripts/finetune.py out/125m --data chats.jsonl --method full --packing --bf16 --output_dir out/chat

Many GPUs:

    accelerate launch --config_file configuration/launch/ddp.yaml scripts/finetune.py out/125m --data chats.jsonl \
        --method full --output_dir out/chat

Rows of a .jsonl file hold `text`, or `prompt` and `completion`, of which the completion is learnt, or `messages` for
the tokenizer's chat template. All flags of TRL's SFTConfig apply. --method state writes state.safetensors, which
scripts/generate.py takes with --load_state.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from corpus import WrongInput
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, HfArgumentParser, set_seed
from trl import SFTConfig, SFTTrainer

from modeling_xlstm.training_xlstm import XLSTMTrainer
from modeling_xlstm.tuning_xlstm import StateTuner, lora_targets

METHODS = ("full", "lora", "state")


@dataclass
class TuneArguments:
    data: list[str] = field(default_factory=list, metadata={"help": ".jsonl files of examples"})
    method: str = field(default="lora", metadata={"help": "full, lora or state", "choices": METHODS})
    lora_r: int = field(default=16, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=32, metadata={"help": "their scale, times the rank"})


def parse(words: Sequence[str]) -> tuple[str, SFTConfig, TuneArguments]:
    """The checkpoint, and flags."""
    if not words or words[0].startswith("-"):
        raise WrongInput(f"The first word must name a checkpoint; got {' '.join(words[:1]) or 'nothing'}.")
    kinds: Any = [SFTConfig, TuneArguments]
    parser = HfArgumentParser(kinds)
    parser.set_defaults(use_cache=True, logging_steps=10)
    settings, tune = parser.parse_args_into_dataclasses(list(words[1:]))
    return words[0], settings, tune


def read_examples(files: list[str]) -> Dataset:
    missing = [name for name in files if not Path(name).is_file()]
    if missing or not files:
        raise WrongInput(f"`--data` must name files; got {', '.join(missing) or 'none'}, seen from {Path.cwd()}.")
    rows = load_dataset("json", data_files=files, split="train")
    kinds = ({"text"}, {"prompt", "completion"}, {"messages"})
    if not any(kind <= set(rows.column_names) for kind in kinds):
        raise WrongInput(
            f"Rows of `--data` must hold `text`, `prompt` and `completion`, or `messages`; got {rows.column_names}."
        )
    return rows


def encode(row: dict[str, Any], tokenizer: Any, longest: int | None) -> dict[str, list[int]]:
    """Ids of one example with an end token, and what is learnt of it."""
    prompt: list[int] = []
    if "messages" in row:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    else:
        prompt = tokenizer(row.get("prompt", ""), add_special_tokens=False).input_ids
        text = row["text"] if "text" in row else row["completion"]
    ids = [*prompt, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id][:longest]
    return {"input_ids": ids, "labels": [-100] * len(prompt[:longest]) + ids[len(prompt) :]}


def tune_states(model: Any, tokenizer: Any, rows: Dataset, settings: SFTConfig) -> None:
    """Train the states only, and write them."""
    for name in ("packing", "padding_free", "assistant_only_loss"):
        if getattr(settings, name):
            raise WrongInput(f"`--{name}` does not apply to --method state, where every row starts from the states.")
    examples = [encode(row, tokenizer, settings.max_length) for row in rows]
    tuner = StateTuner(model, [tokenizer.eos_token_id])
    trained = sum(x.numel() for x in tuner.parameters() if x.requires_grad)
    print(f"States     {trained:,} numbers are trained, of {model.num_parameters():,} weights none")
    # What it learns is written at the end; a checkpoint of it would hold the frozen model once more.
    settings.save_strategy = "no"
    trainer = XLSTMTrainer(
        tuner, settings, train_dataset=examples, data_collator=DataCollatorForSeq2Seq(tokenizer, padding="longest")
    )
    trainer.train()
    if settings.process_index == 0:
        path = Path(str(settings.output_dir)) / "state.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tuner.save(path)
        print(f"Saved      {path}")


def tune_weights(model: Any, tokenizer: Any, rows: Dataset, settings: SFTConfig, tune: TuneArguments) -> None:
    """Train all weights or adapters with TRL, and write a checkpoint or the adapters."""
    adapters = None
    if tune.method == "lora":
        adapters = LoraConfig(
            r=tune.lora_r, lora_alpha=tune.lora_alpha, target_modules=lora_targets(model), task_type="CAUSAL_LM"
        )
    trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer, peft_config=adapters)
    trainer.train()
    trainer.save_model(str(settings.output_dir))


def run(checkpoint: str, settings: SFTConfig, tune: TuneArguments) -> None:
    rows = read_examples(tune.data)
    set_seed(settings.seed)
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32)
    if "messages" in rows.column_names and tokenizer.chat_template is None:
        raise WrongInput(f"Rows of `--data` hold `messages`, and the tokenizer of {checkpoint} has no chat template.")
    if tune.method == "state":
        tune_states(model, tokenizer, rows, settings)
    else:
        tune_weights(model, tokenizer, rows, settings, tune)


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    try:
        run(*parse(sys.argv[1:]))
    except WrongInput as error:
        raise SystemExit(f"finetune.py: {error}") from None


if __name__ == "__main__":
    main()
