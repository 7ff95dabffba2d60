r"""Fine-tune a checkpoint on examples: all weights, LoRA adapters, a prompt, or nothing but the states it starts from.

Laptop:

    python scripts/finetune.py xlstm-quickstart --data examples.jsonl --method lora --output_dir out/lora

One GPU; the second on weights of four bits, as QLoRA:

    python scripts/finetune.py out/125m --data chats.jsonl --method full --packing --bf16 --output_dir out/chat
    python scripts/finetune.py out/7b --data chats.jsonl --quantization bitsandbytes-4bit --bf16 --output_dir out/lora

Many GPUs:

    accelerate launch --config_file configuration/launch/ddp.yaml scripts/finetune.py out/125m --data chats.jsonl \
        --method full --output_dir out/chat

The first word names the checkpoint. Rows of a .jsonl file hold `text`, or `prompt` and `completion`, of which the
completion is learnt, or `messages` for the tokenizer's chat template, or that of --chat_template_path, which is given
`tools` and `chat_template_kwargs` of the row. All flags of TRL's SFTConfig apply. --method state and --method prompt
write state.safetensors, which scripts/generate.py takes with --load_state.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from flags import WrongInput, make_folder
from peft import LoraConfig, PeftConfig, PromptTuningConfig
from runs import check_numbers, check_resumed, end_group, flag_parser, load, parse_flags, refusals
from train_data import load_files
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed
from transformers.hf_argparser import string_to_bool
from trl import SFTConfig, SFTTrainer

from modeling_xlstm import XLSTMCache
from modeling_xlstm.quantization_xlstm import ADAPTABLE, quantization
from modeling_xlstm.training_xlstm import ResumableTrainer, XLSTMTrainer
from modeling_xlstm.tuning_xlstm import StateTuner, lora_targets

METHODS = ("full", "lora", "prompt", "state")
KINDS = ({"text"}, {"prompt", "completion"}, {"messages"})  # of rows
OF_CHATS = {"tools", "chat_template_kwargs"}  # columns that a template reads beside them


class Tuning(ResumableTrainer, SFTTrainer):
    """TRL's trainer, which trains no further a run that has ended."""


@dataclass
class TuneArguments:
    data: list[str] = field(default_factory=list, metadata={"help": ".jsonl files of examples"})
    method: str = field(default="lora", metadata={"help": "full, lora, prompt or state", "choices": METHODS})
    lora_r: int = field(default=16, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=32, metadata={"help": "their scale, times the rank"})
    prompt_tokens: int = field(default=16, metadata={"help": "length of the prompt that --method prompt learns"})
    quantization: str | None = field(
        default=None,
        metadata={"help": "keep the model's weights in few bits while what is added is trained", "choices": ADAPTABLE},
    )


def parse(words: Sequence[str]) -> tuple[str, SFTConfig, TuneArguments]:
    """The checkpoint, and flags."""
    parser = flag_parser("CHECKPOINT", __doc__, [SFTConfig, TuneArguments])
    if words and words[0] in ("-h", "--help"):
        parser.print_help()
        raise SystemExit(0)
    if not words or words[0].startswith("-"):
        raise WrongInput(f"The first word must name a checkpoint; got {' '.join(words[:1]) or 'nothing'}.")
    parser.set_defaults(use_cache=True, logging_steps=10)
    if not torch.accelerator.is_available():
        # TRL computes in bfloat16 unless told otherwise, which Trainer refuses on a CPU that it was not told of.
        parser.set_defaults(use_cpu=True, bf16=False)
    for action in parser._actions:
        # Switches whose default TRL finds later, such as --bf16, would want a word after them.
        if action.type is string_to_bool and action.nargs is None:
            action.nargs, action.const = "?", True
    settings, tune = parse_flags(parser, words[1:])
    check(settings, tune)
    return words[0], settings, tune


def check(settings: SFTConfig, tune: TuneArguments) -> None:
    """Raise WrongInput for flags that cannot be followed."""
    check_numbers(settings)
    check_resumed(settings.resume_from_checkpoint, "the tuning begins anew")
    if settings.max_length is not None and settings.max_length < 1:
        raise WrongInput(f"`--max_length` must be at least 1; got {settings.max_length}.")
    if settings.dataset_text_field != "text":
        raise WrongInput(
            f"`--dataset_text_field` must be text, as in the rows; got {settings.dataset_text_field}. Rename the field."
        )
    for name, method in (("lora_r", "lora"), ("lora_alpha", "lora"), ("prompt_tokens", "prompt")):
        value = getattr(tune, name)
        if value < 1:
            raise WrongInput(f"`--{name}` must be at least 1; got {value}.")
        if tune.method != method and value != getattr(TuneArguments, name):
            raise WrongInput(f"`--{name}` applies to --method {method}; got --method {tune.method}. Leave it out.")


def read_examples(files: list[str]) -> Dataset:
    """Rows of one kind, each of them whole, without columns that are not learnt from.

    TRL takes some of those for its own, such as `labels` and `input_ids`.
    """
    rows = load_files("--data", files, "jsonl", split="train")
    named = {name for kind in KINDS for name in kind} & set(rows.column_names)
    if named not in KINDS:
        raise WrongInput(
            "Rows of `--data` must hold `text`, `prompt` and `completion`, or `messages`, and not more than one of "
            f"these kinds; got {rows.column_names}. Leave out what is not to be learnt from, or rename it."
        )
    kinds = set()
    for name in sorted(named):
        wanted = "a list of messages, each with a `role`" if name == "messages" else "text"
        for i, value in enumerate(rows[name], 1):
            is_text = isinstance(value, str) and name != "messages"
            if not is_text and not (is_chat(value) and name != "text"):
                raise WrongInput(f"`{name}` in row {i} of `--data` must be {wanted}; got {value!r}.")
            kinds.add(type(value))
    if len(kinds) > 1:
        raise WrongInput("`prompt` and `completion` of `--data` must all be text, or all messages; got both.")
    if "text" in named and not any(text.strip() for text in rows["text"]):
        raise WrongInput(f"`--data` must hold examples to learn; the text of all {len(rows)} is empty.")
    learnt = named if str in kinds else named | OF_CHATS
    return rows.select_columns([name for name in rows.column_names if name in learnt])


def is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) and x.get("role") for x in value)


def encode(row: dict[str, Any], tokenizer: Any, longest: int | None) -> dict[str, list[int]]:
    """Ids of one example with an end token, and what is learnt of it."""
    prompt: list[int] = []
    if "messages" in row:
        tools, options = row.get("tools"), row.get("chat_template_kwargs") or {}
        tools = json.loads(tools) if isinstance(tools, str) else tools
        text = tokenizer.apply_chat_template(row["messages"], tools=tools, tokenize=False, **options)
    else:
        prompt = tokenizer(row.get("prompt", ""), add_special_tokens=False).input_ids
        text = row["text"] if "text" in row else row["completion"]
    ids = [*prompt, *tokenizer(text, add_special_tokens=False).input_ids]
    if ids[-1:] != [tokenizer.eos_token_id]:  # the template of a chat may have written it
        ids.append(tokenizer.eos_token_id)
    ids = ids[:longest]
    return {"input_ids": ids, "labels": [-100] * len(prompt[:longest]) + ids[len(prompt) :]}


def refuse(settings: SFTConfig, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(settings, name) != getattr(SFTConfig, name):  # its default
            raise WrongInput(f"`--{name}` does not apply to {why}. Leave it out.")


def check_learnt(learnt: Any, rows: Dataset, settings: SFTConfig) -> None:
    """Raise WrongInput where of all rows nothing is learnt."""
    if not len(learnt):
        raise WrongInput(
            f"`--data` must leave something to learn; all {len(rows)} examples are empty, or their prompts fill "
            f"--max_length {settings.max_length}."
        )


def tune_states(model: Any, tokenizer: Any, rows: Dataset, settings: SFTConfig) -> None:
    """Train the states only, and write them."""
    rowwise = ("packing", "padding_free", "assistant_only_loss")
    refuse(settings, rowwise, "--method state: every row starts from the states")
    refuse(settings, ("resume_from_checkpoint",), "--method state, which keeps no checkpoints")
    of_trl = ("loss_type", "neftune_noise_alpha", "truncation_mode", "eos_token")
    refuse(settings, of_trl, "--method state, which trains without TRL")
    if not settings.completion_only_loss:
        refuse(settings, ("completion_only_loss",), "--method state: of a prompt nothing is learnt")
    if "prompt" in rows.column_names and not all(isinstance(row["prompt"], str) for row in rows):
        raise WrongInput("For --method state `prompt` and `completion` must be text; got messages. Use `messages`.")
    with refusals():
        examples = [encode(row, tokenizer, settings.max_length) for row in rows]
    learnt = [example for example in examples if any(label != -100 for label in example["labels"][1:])]
    check_learnt(learnt, rows, settings)
    if len(learnt) < len(examples):
        print(f"Left out   {len(examples) - len(learnt):,} of {len(examples):,} examples, of which nothing is learnt")
    tuner = StateTuner(model, [tokenizer.eos_token_id])
    trained = sum(x.numel() for x in tuner.parameters() if x.requires_grad)
    print(f"States     {trained:,} numbers are trained, of {model.num_parameters():,} weights none")
    # What it learns is written at the end; a checkpoint of it would hold the frozen model once more.
    settings.save_strategy = "no"
    with refusals():
        trainer = XLSTMTrainer(
            tuner, settings, train_dataset=learnt, data_collator=DataCollatorForSeq2Seq(tokenizer, padding="longest")
        )
    trainer.train()
    write_state(tuner.cache(1), settings)


def write_state(cache: XLSTMCache, settings: SFTConfig) -> None:
    """Write, once among all processes, a state that texts go on from."""
    if settings.process_index == 0:
        path = Path(str(settings.output_dir)) / "state.safetensors"
        cache.detach_().save(path)
        print(f"Saved      {path}")


def adapters(model: Any, settings: SFTConfig, tune: TuneArguments) -> PeftConfig | None:
    """What is trained beside the weights, as PEFT describes it."""
    if tune.method == "lora":
        return LoraConfig(
            r=tune.lora_r, lora_alpha=tune.lora_alpha, target_modules=lora_targets(model), task_type="CAUSAL_LM"
        )
    if tune.method == "prompt":
        # PEFT drops what describes packing when it puts a prompt before a row.
        refuse(settings, ("packing", "padding_free"), "--method prompt: every row starts with the prompt")
        refuse(settings, ("label_smoothing_factor",), "--method prompt, whose prompt has logits and no labels")
        return PromptTuningConfig(
            num_virtual_tokens=tune.prompt_tokens, prompt_tuning_init="SAMPLE_VOCAB", task_type="CAUSAL_LM"
        )
    return None


def tune_weights(model: Any, tokenizer: Any, rows: Dataset, settings: SFTConfig, tune: TuneArguments) -> None:
    """Train all weights, adapters or a prompt with TRL, and write a checkpoint or what was added."""
    added = adapters(model, settings, tune)
    with refusals():
        trainer = Tuning(model, settings, train_dataset=rows, processing_class=tokenizer, peft_config=added)
    check_learnt(trainer.train_dataset, rows, settings)
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    trainer.save_model(str(settings.output_dir))
    if tune.method == "prompt":
        learnt: Any = trainer.accelerator.unwrap_model(trainer.model).eval()
        with torch.no_grad():
            write_state(
                model(inputs_embeds=learnt.get_prompt(1).to(model.dtype), use_cache=True).past_key_values, settings
            )


def load_model(checkpoint: str, settings: SFTConfig, tune: TuneArguments) -> Any:
    options: dict[str, Any] = {"dtype": torch.float32}
    if tune.quantization is not None:
        if tune.method == "full":
            raise WrongInput("`--quantization` holds weights that cannot be trained; got --method full. Use lora.")
        options["dtype"] = torch.bfloat16 if settings.bf16 else torch.float32
        try:
            options["quantization_config"] = quantization(tune.quantization, options["dtype"])
        except ImportError as error:
            raise WrongInput(f"`--quantization` cannot be followed: {error}") from error
    return load("The first word", AutoModelForCausalLM, checkpoint, **options)


def load_tokenizer(checkpoint: str, settings: SFTConfig, chats: bool) -> Any:
    tokenizer = load("The first word", AutoTokenizer, checkpoint)
    if settings.chat_template_path is not None:
        path = Path(settings.chat_template_path)
        if not path.is_file():
            raise WrongInput(f"`--chat_template_path` must name a .jinja file; {path} is none, seen from {Path.cwd()}.")
        tokenizer.chat_template = path.read_text("utf-8")
    if chats and tokenizer.chat_template is None:
        raise WrongInput(
            f"Rows of `--data` hold `messages`, and the tokenizer of {checkpoint} has no chat template. Name one with "
            "--chat_template_path; docs/training.md has an example."
        )
    return tokenizer


def run(checkpoint: str, settings: SFTConfig, tune: TuneArguments) -> None:
    rows = read_examples(tune.data)
    make_folder(Path(str(settings.output_dir)), "--output_dir")
    set_seed(settings.seed)
    tokenizer = load_tokenizer(checkpoint, settings, "messages" in rows.column_names)
    model = load_model(checkpoint, settings, tune)
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
    except KeyboardInterrupt:
        print("\nInterrupted. --resume_from_checkpoint goes on from a checkpoint in --output_dir.", file=sys.stderr)
        raise SystemExit(130) from None
    end_group()


if __name__ == "__main__":
    main()
