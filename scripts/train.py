"""Train an xLSTM, or go on training one, on any text: packed documents, or long ones with carried states.

Laptop, no network, a small model of the sources of Python's standard library:

    python scripts/train.py configuration/recipe/laptop.yaml --output_dir out/laptop

One GPU, on your own text or any Hugging Face data set:

    python scripts/train.py --model configuration/model/xlstm_neurips_125m.json --tokenizer gpt2 \
        --dataset HuggingFaceFW/fineweb-edu --output_dir out/125m --bf16 --learning_rate 1e-3 --max_steps 10000

Many GPUs:

    accelerate launch --config_file configuration/launch/fsdp2.yaml scripts/train.py recipe.yaml --output_dir out/125m

A recipe is a YAML file of these same flags; flags after it win. All flags of Transformers' TrainingArguments apply. The
same command goes on from the last checkpoint, exactly as if it had not been interrupted.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml  # type: ignore[import-untyped]
from corpus import WrongInput, load_or_train_tokenizer
from runs import LossBar, draw_losses, end_group, last_checkpoint, silent, step_of
from train_data import DataArguments, Source, Stream, Tokens, not_empty, open_source, tokenise
from train_metrics import CarriedRun, Costs, Run, peak_flops_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)

from modeling_xlstm.costs_xlstm import flops_per_token
from modeling_xlstm.gates_xlstm import GateStatistics
from modeling_xlstm.training_xlstm import Segments, nats_of_labels, sum_nats


@dataclass
class RunArguments(DataArguments):
    model: str = field(
        default="", metadata={"help": "file of configuration/model to begin with, or a checkpoint to go on from"}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "folder or name; else the checkpoint's, or one trained on the text"}
    )
    block_size: int = field(default=512, metadata={"help": "tokens of a row"})
    carry_state: bool = field(
        default=False, metadata={"help": "rows go on where the last step's ended, from the state it left, detached"}
    )
    z_loss: float = field(default=0.0, metadata={"help": "weight of the squared log-normaliser; 1e-4 is usual"})
    gate_statistics: bool = field(
        default=True, metadata={"help": "log what the gates do; not with --torch_compile, which traces no watching"}
    )
    peak_flops: float | None = field(
        default=None, metadata={"help": "operations a second of one device, for MFU; known for some, measured on a CPU"}
    )


def parse(words: Sequence[str]) -> tuple[TrainingArguments, RunArguments]:
    """Flags, after those of a recipe if the first word names one."""
    kinds: Any = [TrainingArguments, RunArguments]
    parser = HfArgumentParser(kinds)
    # What a run of ours differs in from Trainer's defaults.
    parser.set_defaults(use_cache=True, include_num_input_tokens_seen=True, logging_steps=20, save_total_limit=2)
    if importlib.util.find_spec("tensorboard") is not None:
        parser.set_defaults(report_to=["tensorboard"])
    if words and words[0].endswith((".yaml", ".yml")):
        words = [*recipe_flags(Path(words[0])), *words[1:]]
    settings, run = parser.parse_args_into_dataclasses(list(words))
    return settings, run


def recipe_flags(path: Path) -> Iterator[str]:
    """A recipe as flags."""
    if not path.is_file():
        raise WrongInput(f"There is no recipe {path}. Those of the project are in configuration/recipe.")
    recipe = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(recipe, dict):
        raise WrongInput(f"{path} must hold `flag: value` lines; got {type(recipe).__name__}.")
    for name, value in recipe.items():
        yield f"--{name}"
        if isinstance(value, list):
            yield from map(str, value)
        else:
            yield json.dumps(value) if isinstance(value, dict) else str(value)


def open_model(
    run: RunArguments, settings: TrainingArguments, source: Source
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A new model of a configuration file, or a checkpoint, and its tokenizer."""
    set_seed(settings.seed)
    if not run.model.endswith(".json"):
        tokenizer: Any = AutoTokenizer.from_pretrained(run.tokenizer or run.model, trust_remote_code=True)
        return AutoModelForCausalLM.from_pretrained(run.model, trust_remote_code=True), tokenizer
    if not Path(run.model).is_file():
        raise WrongInput(f"`--model` must name a file or a checkpoint; {run.model} does not exist.")
    if run.streaming and not run.tokenizer:
        raise WrongInput("`--streaming` needs a `--tokenizer`: one cannot be trained on a stream that is read once.")
    fields = json.loads(Path(run.model).read_text("utf-8"))
    if run.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(run.tokenizer, trust_remote_code=True)
    else:
        folder = Path(str(settings.output_dir)) / "tokenizer"
        with settings.main_process_first():
            texts = (text for rows in source.train.iter(1000) for text in not_empty(rows["text"]))
            tokenizer = load_or_train_tokenizer(folder, texts, fields["vocab_size"])
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**fields, **ids}))
    model.generation_config = GenerationConfig(**ids)
    return model, tokenizer


def make_rows(run: RunArguments, tokens: Tokens, rows: int, seed: int | None) -> Segments:
    """Rows of `block_size` tokens: each from an empty state, or, carried, `rows` lanes of segments."""
    if not run.carry_state:
        # One segment per lane: the lanes are what rows of packed documents are.
        rows, seed = -(-len(tokens.ids) // run.block_size), None
    return Segments(tokens, rows, run.block_size, seed)


def make_data(
    run: RunArguments, settings: TrainingArguments, source: Source, tokenizer: Any, vocab_size: int
) -> tuple[Any, Segments, int]:
    """Rows to train on and to judge with, and the bytes of the text of the latter."""
    say = print if settings.process_index == 0 else silent
    with settings.main_process_first():
        held_out = tokenise(run, source.held_out, tokenizer, vocab_size, "held out")
        train = None if run.streaming else tokenise(run, source.train, tokenizer, vocab_size, "trained on")
    for name, tokens in (("Text", train), ("Held out", held_out)):
        if tokens is None:
            say(f"{name:11}a stream, tokenised as it is read")
        else:
            how = ", found tokenised" if tokens.cached else ""
            say(f"{name:11}{tokens.bytes / 1e6:.2f} MB, {len(tokens.ids):,} tokens{how}")
    judged = make_rows(run, held_out, settings.eval_batch_size * settings.world_size, None)
    if train is None:
        return Stream(source.train, tokenizer, vocab_size, run.block_size, settings.seed), judged, held_out.bytes
    lanes = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
    return make_rows(run, train, lanes, settings.seed), judged, held_out.bytes


def make_trainer(
    run: RunArguments, settings: TrainingArguments, model: PreTrainedModel, tokenizer: Any, source: Source
) -> Run:
    train, held_out, size = make_data(run, settings, source, tokenizer, model.config.vocab_size)
    trainer = (CarriedRun if run.carry_state else Run)(
        model,
        settings,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        compute_metrics=sum_nats,
        preprocess_logits_for_metrics=nats_of_labels,
        z_loss=run.z_loss,
    )
    trainer.held_out_bytes = size
    config: Any = model.config
    flops = flops_per_token(config, run.block_size).training
    trainer.costs = Costs(flops, run.peak_flops or peak_flops_of(settings))
    # A compiled graph would be traced anew at every step that is watched.
    trainer.gates = GateStatistics() if run.gate_statistics and not settings.torch_compile else None
    if not settings.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossBar())
    return trainer


def check(run: RunArguments, settings: TrainingArguments) -> None:
    """Refuse what cannot be meant, before anything is read."""
    if not run.model:
        raise WrongInput("`--model` must name a file of configuration/model, or a checkpoint; got none.")
    if run.streaming and settings.max_steps < 1:
        raise WrongInput("`--streaming` needs `--max_steps`, for a stream says not how long it is.")
    if run.streaming and run.carry_state:
        raise WrongInput("`--carry_state` needs every lane's place in the text, which `--streaming` has not.")
    if settings.prediction_loss_only:
        raise WrongInput("`--prediction_loss_only` leaves out the nats that bits per byte are made of. Leave it out.")


def train(settings: TrainingArguments, run: RunArguments) -> None:
    say = print if settings.process_index == 0 else silent
    folder = Path(str(settings.output_dir))
    check(run, settings)
    if settings.disable_tqdm or settings.process_index:
        datasets.disable_progress_bars()
    with settings.main_process_first():
        source = open_source(run)
    say(f"Source     {source.about}")
    model, tokenizer = open_model(run, settings, source)
    say(f"Model      {model.num_parameters():,} parameters; {len(tokenizer):,} tokens")
    trainer = make_trainer(run, settings, model, tokenizer, source)
    with settings.main_process_first():
        checkpoint = last_checkpoint(folder)
    if settings.resume_from_checkpoint is None and checkpoint is not None:
        settings.resume_from_checkpoint = str(checkpoint)
        say(f"Resuming   at step {step_of(checkpoint):,}")
    if settings.torch_compile and run.gate_statistics:
        say("Gates      not logged: --torch_compile would trace every step that is watched anew")
    if trainer.costs.peak is None:
        say("MFU        not logged: this device is in no table; give its best with --peak_flops")
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    facts = trainer.evaluate()
    trainer.save_model(str(folder))
    trainer.save_state()
    if settings.process_index == 0:
        draw_losses(trainer.state.log_history, folder / "loss.png")
    say(
        f"Held out   {facts['eval_nats_per_token']:.4f} nats per token, {facts['eval_bits_per_byte']:.4f} bits per byte"
    )
    say(f"Saved      {folder}: model, its code, tokenizer, trainer_state.json and loss.png")


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    try:
        train(*parse(sys.argv[1:]))
    except WrongInput as error:
        raise SystemExit(f"train.py: {error}") from None
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        raise SystemExit(130) from None
    end_group()


if __name__ == "__main__":
    main()
