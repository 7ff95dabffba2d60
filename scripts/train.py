r"""Train an xLSTM, or go on training one, on any text: packed documents, or long ones with carried states.

Laptop, no network, a small model of the sources of Python's standard library:

    python scripts/train.py configuration/recipe/laptop.yaml --output_dir out/laptop

One GPU, on your own text or any Hugging Face data set:

    python scripts/train.py --model configuration/model/xlstm_neurips_125m.json --tokenizer gpt2 \
        --dataset HuggingFaceFW/fineweb-edu --output_dir out/125m --bf16 --learning_rate 1e-3 --max_steps 10000

Many GPUs:

    accelerate launch --config_file configuration/launch/fsdp2.yaml scripts/train.py recipe.yaml --output_dir out/125m

The first word may be a recipe, a YAML file of these same flags; flags after it win. All flags of Transformers'
TrainingArguments apply. The same command goes on from the last checkpoint, exactly as if it had not been interrupted.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml  # type: ignore[import-untyped]
from corpus import load_or_train_tokenizer
from flags import NO_CONFIG, WrongInput, make_folder
from runs import (
    LossBar,
    check_numbers,
    check_resumed,
    checkpoints,
    delete_unfinished,
    differences,
    draw_losses,
    end_group,
    flag_parser,
    last_checkpoint,
    load,
    parse_flags,
    refusals,
    silent,
    step_of,
)
from train_data import DataArguments, Source, Stream, Tokens, not_empty, open_source, tokenise
from train_metrics import LESS_IS_BETTER, CarriedRun, Costs, Run, peak_flops_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
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
    parser = flag_parser("[RECIPE.yaml]", __doc__, [TrainingArguments, RunArguments])
    # What a run of ours differs in from Trainer's defaults.
    parser.set_defaults(use_cache=True, include_num_input_tokens_seen=True, logging_steps=20, save_total_limit=2)
    # Where memory cannot be pinned, torch warns of it.
    parser.set_defaults(
        dataloader_pin_memory=torch.accelerator.is_available() and not torch.backends.mps.is_available()
    )
    if importlib.util.find_spec("tensorboard") is not None:
        parser.set_defaults(report_to=["tensorboard"])
    if words and words[0].endswith((".yaml", ".yml")):
        words = [*recipe_flags(Path(words[0])), *words[1:]]
    settings, run = parse_flags(parser, words)
    is_given = any(word.split("=")[0].replace("-", "_") == "__greater_is_better" for word in words)
    if not is_given and str(settings.metric_for_best_model).removeprefix("eval_") in LESS_IS_BETTER:
        settings.greater_is_better = False  # Trainer takes whatever is not named a loss for the better the more
    return settings, run


def recipe_flags(path: Path) -> Iterator[str]:
    """A recipe as flags."""
    if not path.is_file():
        raise WrongInput(f"There is no recipe {path}. Those of the project are in configuration/recipe.")
    try:
        recipe = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WrongInput(f"{path} must be YAML in UTF-8: {error}") from error
    if not isinstance(recipe, dict):
        raise WrongInput(f"{path} must hold `flag: value` lines; got {type(recipe).__name__}.")
    for name, value in recipe.items():
        if value is None or value == []:  # no word that a flag could have says it
            continue
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
        tokenizer = load("`--tokenizer`" if run.tokenizer else "`--model`", AutoTokenizer, run.tokenizer or run.model)
        return load("`--model`", AutoModelForCausalLM, run.model), tokenizer
    if not Path(run.model).is_file():
        raise WrongInput(f"`--model` must name a file or a checkpoint; {run.model} does not exist.")
    if run.streaming and not run.tokenizer:
        raise WrongInput("`--streaming` needs a `--tokenizer`: one cannot be trained on a stream that is read once.")
    fields = read_fields(Path(run.model))
    if run.tokenizer:
        tokenizer = load("`--tokenizer`", AutoTokenizer, run.tokenizer)
    else:
        folder = Path(str(settings.output_dir)) / "tokenizer"
        with settings.main_process_first():
            texts = (text for rows in source.train.iter(1000) for text in not_empty(rows["text"]))
            tokenizer = load_or_train_tokenizer(folder, texts, fields["vocab_size"], source.train._fingerprint)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**fields, **ids}))
    except NO_CONFIG as error:
        raise WrongInput(f"{run.model} describes no model: {error}") from error
    model.generation_config = GenerationConfig(**ids)
    return model, tokenizer


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a model file."""
    try:
        fields = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise WrongInput(f"{path} must be JSON in UTF-8: {error}") from error
    if not isinstance(fields, dict) or not {"model_type", "vocab_size"} <= fields.keys():
        raise WrongInput(f"{path} must hold the fields of a configuration, `model_type` and `vocab_size` among them.")
    if type(fields["vocab_size"]) is not int or fields["vocab_size"] < 1:
        raise WrongInput(f"`vocab_size` of {path} must be a whole number of at least 1; got {fields['vocab_size']!r}.")
    return fields


def make_rows(run: RunArguments, tokens: Tokens, rows: int, seed: int | None, what: str) -> Segments:
    """Rows of `block_size` tokens: each from an empty state, or, carried, `rows` lanes of segments."""
    if not run.carry_state:
        # One segment per lane: the lanes are what rows of packed documents are.
        rows, seed = -(-len(tokens.ids) // run.block_size), None
    try:
        return Segments(tokens, rows, run.block_size, seed)
    except ValueError as error:
        raise WrongInput(f"{what}: {error}") from error


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
    judged = make_rows(run, held_out, settings.eval_batch_size * settings.world_size, None, "Held out")
    if train is None:
        return Stream(source.train, tokenizer, vocab_size, run.block_size, settings.seed), judged, held_out.bytes
    lanes = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
    return make_rows(run, train, lanes, settings.seed, "Text"), judged, held_out.bytes


def make_trainer(
    run: RunArguments, settings: TrainingArguments, model: PreTrainedModel, tokenizer: Any, source: Source
) -> Run:
    train, held_out, size = make_data(run, settings, source, tokenizer, model.config.vocab_size)
    with refusals():
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
    if run.streaming and settings.dataloader_num_workers > 1:
        raise WrongInput("`--streaming` takes one `--dataloader_num_workers` at most, for each would read every row.")
    if run.block_size < 1:
        raise WrongInput(f"`--block_size` must be at least 1; got {run.block_size}.")
    if run.peak_flops is not None and not 0 < run.peak_flops < math.inf:
        raise WrongInput(f"`--peak_flops` must be a finite number above 0; got {run.peak_flops}.")
    check_numbers(settings)
    check_resumed(settings.resume_from_checkpoint, "the last one in `--output_dir` is taken")
    if Path(str(settings.output_dir)).is_file():
        raise WrongInput(f"`--output_dir` must name a folder; {settings.output_dir} is a file.")
    nats = "the nats that bits per byte are made of"
    for flag, is_given, what in (
        ("--save_only_model", settings.save_only_model, "leaves out what a killed training goes on from"),
        ("--prediction_loss_only", settings.prediction_loss_only, f"leaves out {nats}"),
        ("--eval_do_concat_batches false", not settings.eval_do_concat_batches, f"keeps apart {nats}"),
    ):
        if is_given:
            raise WrongInput(f"`{flag}` {what}. Leave it out.")


# Of TrainingArguments: what decides what is learnt. Of the numbers of steps, more may be asked for later.
DECIDING = (
    "seed", "data_seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay",
    "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16",
    "optim_args", "optim_target_modules", "label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy",
)  # fmt: skip


def describe(run: RunArguments, settings: TrainingArguments, source: Source) -> dict[str, Any]:
    """What makes a run this run and no other: going on under any other description would give another model."""
    is_file = run.model.endswith(".json") and Path(run.model).is_file()
    text = source.about if run.streaming else f"{source.train._fingerprint} {source.held_out._fingerprint}"
    return {
        "model": read_fields(Path(run.model)) if is_file else run.model,
        "text": text,
        **{name: getattr(run, name) for name in ("tokenizer", "block_size", "carry_state", "z_loss")},
        **{name: getattr(settings, name) for name in DECIDING},
        "rows of a step": settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size,
        "max_steps": settings.max_steps,
        "num_train_epochs": settings.num_train_epochs,
    }


def open_run(run: RunArguments, settings: TrainingArguments, source: Source) -> Path | None:
    """The checkpoint to go on from, if there is one; raise WrongInput if it is of another run."""
    folder, described = Path(str(settings.output_dir)), json.loads(json.dumps(describe(run, settings, source)))
    file, checkpoint = folder / "training_run.json", last_checkpoint(folder)
    if not file.is_file() and (others := checkpoints(folder)):
        raise WrongInput(
            f"{folder} holds {others[0].name} and no {file.name}: what trained there is not known. Choose another "
            "folder, where --resume_from_checkpoint can go on from a checkpoint of this one."
        )
    if checkpoint is not None and file.is_file() and settings.resume_from_checkpoint is None:
        before = json.loads(file.read_text("utf-8"))
        known = {name: value for name, value in described.items() if name in before}
        changed = differences(before, known, ("max_steps", "num_train_epochs"), ("model", "text"))
        if changed:
            raise WrongInput(
                f"{folder} holds another run ({'; '.join(changed)}). Choose another folder, or go on from it all the "
                f"same with --resume_from_checkpoint {checkpoint}."
            )
    if settings.process_index == 0:
        delete_unfinished(folder)
        make_folder(folder, "--output_dir")
        file.write_text(json.dumps(described, indent=2) + "\n", "utf-8")
    return checkpoint


def train(settings: TrainingArguments, run: RunArguments) -> None:
    say = print if settings.process_index == 0 else silent
    folder = Path(str(settings.output_dir))
    check(run, settings)
    if settings.disable_tqdm or settings.process_index:
        datasets.disable_progress_bars()
    with settings.main_process_first():
        source = open_source(run)
    say(f"Source     {source.about}")
    with settings.main_process_first():
        checkpoint = open_run(run, settings, source)
    model, tokenizer = open_model(run, settings, source)
    say(f"Model      {model.num_parameters():,} parameters; {len(tokenizer):,} tokens")
    trainer = make_trainer(run, settings, model, tokenizer, source)
    if settings.resume_from_checkpoint is None and checkpoint is not None:
        settings.resume_from_checkpoint = str(checkpoint)
        say(f"Resuming   at step {step_of(checkpoint):,}")
    if settings.torch_compile and run.gate_statistics:
        say("Gates      not logged: --torch_compile would trace every step that is watched anew")
    if trainer.costs.peak is None:
        say("MFU        not logged: this device is in no table; give its best with --peak_flops")
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    trainer.save_model(str(folder))  # first, for --bf16_full_eval rounds the weights that it judges in place
    facts = trainer.evaluate()
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
        settings, run = parse(sys.argv[1:])
        train(settings, run)
    except WrongInput as error:
        raise SystemExit(f"train.py: {error}") from None
    except KeyboardInterrupt:
        kept = last_checkpoint(Path(str(settings.output_dir)))
        where = "the start: there is no checkpoint yet" if kept is None else f"step {step_of(kept):,}"
        print(f"\nInterrupted. The same command goes on from {where}.", file=sys.stderr)
        raise SystemExit(130) from None
    end_group()


if __name__ == "__main__":
    main()
