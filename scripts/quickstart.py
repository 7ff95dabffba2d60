"""Train a tokenizer and a small mixed sLSTM/mLSTM on Python's own source code, then load both without this package.

Laptop, minutes on 2 CPU cores, no network:

    python scripts/quickstart.py

One GPU, which is used if there is one; --text trains on your own files:

    python scripts/quickstart.py --text notes.txt thesis.txt --out my-model --steps 2000

Many GPUs:

    torchrun --nproc-per-node 8 scripts/quickstart.py --out my-model

The same command again goes on after an interruption, exactly as if there had been none, and after the end it only
writes another completion; --prompt, --max_new_tokens and --restart may be added to it.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import transformers
from accelerate import PartialState
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProgressCallback,
    TextStreamer,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from write_card import write_card

PACKAGE = "modeling_xlstm"
ROOT = Path(__file__).resolve().parents[1]
PROMPT = 'class Stack:\n    """A last-in, first-out stack."""\n\n    def __init__(self'

# The recipe: best bits per byte on held-out files in the time of a coffee on 2 cores; docs/log.md has what else was tried.
MODEL = {"num_hidden_layers": 4, "num_heads": 4, "block_style": "residual", "slstm_at": [1]}
TRAINING = {
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-3,
    "warmup_steps": 30,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
}
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
BLOCK_TOKENS = 256
HELD_OUT_ONE_IN = 32
HELD_OUT_BYTES = 256 * 1024
END, PAD = "<|endoftext|>", "<|padding|>"

# Bulk that is no everyday Python: test data, character tables, generated files, an application, other people's packages.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo"}
SKIPPED_FOLDERS |= {"site-packages", "dist-packages"}
SKIPPED_FILES = ("_sysconfigdata",)


class WrongInput(ValueError):
    """The caller can mend it: shown as a message, without a traceback."""


class Text(NamedTuple):
    """What to train on, what to judge with, and where both came from."""

    train: list[str]
    held_out: list[str]
    about: str


class Blocks(Dataset[dict[str, Tensor]]):
    """A stream of ids in blocks that overlap by one, so that every id but the first is predicted exactly once.

    Args:
        ids: token ids, [tokens]; what does not fill a block is left out.
    """

    def __init__(self, ids: Tensor):
        self.blocks = ids.unfold(0, BLOCK_TOKENS, BLOCK_TOKENS - 1) if len(ids) >= BLOCK_TOKENS else ids.view(-1, 0)[:0]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


class LossBar(ProgressCallback):
    """Transformers' progress bar with the loss in it, instead of a line per log entry."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if self.training_bar is not None:
            self.training_bar.set_description("Training")
            self.training_bar.initial = self.training_bar.n = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")


class QuickstartTrainer(Trainer):
    """Weight decay on the matrices only: not on norms, skips, embeddings, or the biases of gates, which are matrices too."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        named = model.named_parameters()
        return [name for name, x in named if x.dim() > 1 and "bias" not in name and "embed" not in name]


def read_standard_library() -> Text:
    """The source files of the Python that runs this, in the order of their names; some held out by a checksum of theirs."""
    folder = Path(sysconfig.get_path("stdlib"))
    train, held_out = [], []
    for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py")):
        parts = name.split("/")
        if SKIPPED_FOLDERS & set(parts) or parts[-1].startswith(SKIPPED_FILES):
            continue
        try:
            text = (folder / name).read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            (train if zlib.crc32(name.encode()) % HELD_OUT_ONE_IN else held_out).append(text)
    if not train or not held_out:
        raise WrongInput(f"Python's standard library has no source files in {folder}. Train on your own with --text FILE...")
    about = (
        f"Python {platform.python_version()}'s standard library (PSF license), {len(train) + len(held_out)} source files as "
        f"installed, without tests, character tables and IDLE. Held out: {len(held_out)} files, chosen by a checksum of "
        "their names."
    )
    return Text(train, held_out, about)


def read_files(paths: Sequence[Path]) -> Text:
    """The caller's files, in the order given; the end of each is held out."""
    train, held_out = [], []
    for path in paths:
        if not path.is_file():
            raise WrongInput(f"`--text` must name files; {path} {'is a folder' if path.is_dir() else 'does not exist'}.")
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise WrongInput(
                f"`--text` must name UTF-8 text; {path} has other bytes at {error.start}. Convert it, for example with iconv."
            ) from error
        if not text.strip():
            raise WrongInput(f"`--text` must name files with text in them; {path} is empty. Leave it out.")
        cut = len(text) - min(len(text) // 10, HELD_OUT_BYTES // len(paths))
        train.append(text[:cut])
        held_out.append(text[cut:])
    about = f"{', '.join(path.name for path in paths)}. Held out: the end of each file, a tenth of it or less."
    return Text(train, held_out, about)


def count_bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE: every text has an encoding, and decoding gives it back."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_input_names=["input_ids", "attention_mask"],
    )


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """All texts as one stream of ids, an end token before the first and after each, [tokens]."""
    ids = [tokenizer.eos_token_id]
    for text_ids in tokenizer(list(texts), verbose=False).input_ids:
        ids += text_ids
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def bits_per_byte(loss: float, blocks: Blocks, tokenizer: PreTrainedTokenizerBase) -> float:
    """A loss in nats per token, as bits per byte of the text that the predicted tokens stand for; an end token is none."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    lengths = torch.tensor([0 if token in (END, PAD) else len(token) for token in tokens])
    predicted = blocks.blocks[:, 1:]
    return loss / math.log(2) * predicted.numel() / int(lengths[predicted].sum())


def describe(arguments: argparse.Namespace, text: Text) -> dict[str, Any]:
    """What makes a run this run and no other: resuming it under any other description would give another model."""
    digest = hashlib.sha256()
    for part in (*text.train, *text.held_out):
        digest.update(part.encode())
        digest.update(b"\0")
    return {
        "text": [str(path) for path in arguments.text] or "Python's standard library",
        "text_sha256": digest.hexdigest(),
        "steps": arguments.steps,
        "seed": arguments.seed,
        "hidden_size": arguments.hidden_size,
        "vocab_size": arguments.vocab_size,
        "block_tokens": BLOCK_TOKENS,
        "model": MODEL,
        "training": TRAINING,
        "processes": PartialState().num_processes,
    }


def open_run(arguments: argparse.Namespace, text: Text) -> None:
    """Make the folder of this run, or recognise it; raise WrongInput if it holds anything else."""
    folder, file = arguments.out, arguments.out / "run.json"
    run = describe(arguments, text)
    if file.is_file() and not arguments.restart:
        before = json.loads(file.read_text("utf-8"))["run"]
        changed = [f"{name}: {before.get(name)}, now {run[name]}" for name in run if run[name] != before.get(name)]
        if changed:
            raise WrongInput(
                f"{folder} holds another run ({'; '.join(changed)}). Add --restart to delete it and train anew, "
                "or choose another folder with --out."
            )
        return
    if file.is_file():
        shutil.rmtree(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WrongInput(f"`--out` must be a new or empty folder, or one of an earlier run; {folder} is neither.")
    folder.mkdir(parents=True, exist_ok=True)
    write_run(folder, run, card_words(arguments, text))


def write_run(folder: Path, run: dict[str, Any], card: dict[str, Any]) -> None:
    """Write run.json in one go, so that an interruption leaves the old file or the new one."""
    temporary = folder / "run.json.tmp"
    temporary.write_text(json.dumps({"run": run, "card": card}, indent=2) + "\n", "utf-8")
    temporary.replace(folder / "run.json")


def card_words(arguments: argparse.Namespace, text: Text) -> dict[str, Any]:
    """What the model card says beside the numbers of the training."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    given = shlex.join(word for word in sys.argv[1:] if word != "--restart")
    subject = "the files below" if arguments.text else "Python source code"
    return {
        "name": arguments.out.resolve().name,
        "license": "other",
        "summary": f"A small xLSTM language model of {subject}, trained in minutes by scripts/quickstart.py of xlstm-transformers.",
        "data": text.about,
        "train_bytes": count_bytes(text.train),
        "eval_bytes": count_bytes(text.held_out),
        "command": f"python scripts/quickstart.py {given}".rstrip(),
        "machine": gpu or f"{torch.get_num_threads()} CPU threads ({platform.system()} {platform.machine()})",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}",
        "commit": found.stdout.strip() if found and found.returncode == 0 else "unknown",
        "date": datetime.date.today().isoformat(),
        "prompt": arguments.prompt,
        "limits": f"Its text has the look of what it was trained on, not the sense. It was trained on blocks of {BLOCK_TOKENS} "
        "tokens, each from an empty state, and bits per byte are measured in the same way.",
    }


def load_or_train_tokenizer(folder: Path, text: Text, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of this run; the first process of several makes it."""
    with PartialState().main_process_first():
        if not (folder / "tokenizer_config.json").is_file():
            train_tokenizer(text.train, vocab_size).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


def make_model(tokenizer: PreTrainedTokenizerBase, hidden_size: int) -> nn.Module:
    # Imported here and nowhere else: the process that shows the completion must do without the package.
    from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = XLSTMForCausalLM(XLSTMConfig(vocab_size=len(tokenizer), hidden_size=hidden_size, **MODEL, **ids))
    model.generation_config = GenerationConfig(**SAMPLING, **ids)
    return model


def training_arguments(arguments: argparse.Namespace) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(arguments.out / "checkpoints"),
        max_steps=arguments.steps,
        seed=arguments.seed,
        per_device_eval_batch_size=16,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        logging_steps=max(1, min(20, arguments.steps // 4)),
        # An interruption loses less than a fifteenth of the run: ten seconds.
        save_steps=max(1, arguments.steps // 15),
        save_total_limit=1,
        dataloader_pin_memory=on_gpu,
        # Trainer writes its own `use_cache` into the configuration: the checkpoint is to generate with its cache.
        use_cache=True,
        include_num_input_tokens_seen="all",
        report_to="none",
        disable_tqdm=False,
        **TRAINING,
    )


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end; one that was not is deleted."""
    steps = {int(path.name.rsplit("-", 1)[1]): path for path in folder.glob("checkpoint-*")}
    for step in sorted(steps, reverse=True):
        try:
            # Trainer writes this file last.
            TrainerState.load_from_json(str(steps[step] / "trainer_state.json"))
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(steps[step])
        else:
            return str(steps[step])
    return None


def make_trainer(arguments: argparse.Namespace, text: Text, tokenizer: PreTrainedTokenizerBase) -> QuickstartTrainer:
    train, held_out = (Blocks(encode(tokenizer, texts)) for texts in (text.train, text.held_out))
    if not len(train) or not len(held_out):
        raise WrongInput(
            f"`--text` must fill a block of {BLOCK_TOKENS} tokens to train on and one to be held out; got "
            f"{count_bytes(text.train)} and {count_bytes(text.held_out)} bytes. Add files, or a longer one."
        )
    set_seed(arguments.seed)
    model = make_model(tokenizer, arguments.hidden_size)
    trainer = QuickstartTrainer(
        model, training_arguments(arguments), train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar())
    return trainer


def train(arguments: argparse.Namespace, text: Text) -> None:
    """Train, judge and save: model, tokenizer and card in the folder of the run."""
    say, folder = PartialState().print, arguments.out
    tokenizer = load_or_train_tokenizer(folder, text, arguments.vocab_size)
    trainer = make_trainer(arguments, text, tokenizer)
    tokens = sum(len(blocks) for blocks in (trainer.train_dataset, trainer.eval_dataset)) * (BLOCK_TOKENS - 1)
    say(f"Tokenizer  {len(tokenizer):,} tokens, {(count_bytes(text.train) + count_bytes(text.held_out)) / tokens:.2f} bytes each")
    size = sum(x.numel() for x in trainer.model.parameters())
    say(f"Model      {size / 1e6:.1f} M parameters, blocks: {', '.join(trainer.model.config.block_types)}")

    checkpoint = last_checkpoint(folder / "checkpoints")
    resumed_at = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
    if checkpoint:
        say(f"Resuming   at step {resumed_at} of {arguments.steps}")
    trainer.train(resume_from_checkpoint=checkpoint)
    loss = trainer.evaluate()["eval_loss"]
    bits = bits_per_byte(loss, trainer.eval_dataset, tokenizer)
    trainer.log({"eval_bits_per_byte": bits, "resumed_at_step": resumed_at})
    say(f"Held out   loss {loss:.3f} nats per token, {bits:.3f} bits per byte")
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        finish(trainer, folder)


def finish(trainer: Trainer, folder: Path) -> None:
    """Write the facts and the card; what was kept for an interruption goes."""
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    notes = json.loads((folder / "run.json").read_text("utf-8"))
    with torch.no_grad():
        one_token = torch.zeros(1, 1, dtype=torch.long, device=trainer.model.device)
        cache = trainer.model.eval()(one_token, use_cache=True).past_key_values
    write_run(folder, notes["run"], {**notes["card"], "state_bytes": cache.size_in_bytes()})
    write_card(folder)
    shutil.rmtree(folder / "checkpoints")
    print(f"Saved      {folder}: model, its code, tokenizer, card (README.md)")


def complete_in_fresh_process(arguments: argparse.Namespace) -> None:
    """Run this file again, elsewhere, with the package out of reach and an empty cache of remote code."""
    with tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, str(Path(__file__).resolve()), "--only_complete", "--out", str(arguments.out.resolve())]
        command += ["--prompt", arguments.prompt, "--max_new_tokens", str(arguments.max_new_tokens)]
        command += ["--seed", str(arguments.seed)]
        places = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(empty) / "modules")}
        subprocess.run(command, check=True, cwd=empty, env={**os.environ, **places})


def complete(arguments: argparse.Namespace) -> None:
    """Load the checkpoint as anyone would who has only the checkpoint, and stream a completion."""
    # None makes every import of the package fail.
    sys.modules[PACKAGE] = None  # type: ignore[assignment]
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.out)
    model = AutoModelForCausalLM.from_pretrained(arguments.out, trust_remote_code=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    source = Path(sys.modules[type(model).__module__].__file__ or "")
    assert (ROOT / PACKAGE) not in source.resolve().parents, f"the model's code came from the package: {source}"
    print(f"\nIn a fresh process that cannot import {PACKAGE}, the model's code comes with the checkpoint:\n")

    set_seed(arguments.seed)
    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    start = time.perf_counter()
    output = model.generate(
        **inputs,
        max_new_tokens=arguments.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        return_dict_in_generate=True,
    )
    new_tokens = output.sequences.shape[1] - inputs.input_ids.shape[1]
    speed = new_tokens / (time.perf_counter() - start)
    size = output.past_key_values.size_in_bytes()
    print(f"\n{new_tokens} tokens, {speed:.0f} tokens/s; the state takes {size:,} bytes, whatever the length of the text.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small xLSTM on this machine's own Python sources, or on your text.")
    parser.add_argument("--out", type=Path, default=Path("xlstm-quickstart"), help="folder to write (default: %(default)s)")
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="train on these UTF-8 files instead")
    parser.add_argument("--steps", type=positive, default=500, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and sampling (default: %(default)s)")
    parser.add_argument("--hidden_size", type=positive, default=256, help="width of the model (default: %(default)s)")
    parser.add_argument("--vocab_size", type=positive, default=4096, help="tokens, at most (default: %(default)s)")
    parser.add_argument("--prompt", default=PROMPT, help="text to complete")
    parser.add_argument("--max_new_tokens", type=positive, default=200, help="of the completion (default: %(default)s)")
    parser.add_argument("--restart", action="store_true", help="delete the run in --out and train anew")
    parser.add_argument("--only_complete", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def positive(word: str) -> int:
    """A count, for argparse."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def main() -> None:
    arguments = parse()
    if arguments.only_complete:
        complete(arguments)
        return
    say, is_main = PartialState().print, PartialState().is_main_process
    try:
        text = read_files(arguments.text) if arguments.text else read_standard_library()
        say(f"Text       {count_bytes(text.train) / 1e6:.2f} MB, and {count_bytes(text.held_out) / 1e6:.2f} MB held out")
        if is_main:
            open_run(arguments, text)
        PartialState().wait_for_everyone()
        if (arguments.out / "README.md").is_file():
            say(f"Trained    already, {arguments.out}; --restart trains anew")
        else:
            train(arguments, text)
    except WrongInput as error:
        raise SystemExit(f"quickstart.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted. The same command goes on from the last checkpoint.") from None
    if is_main:
        complete_in_fresh_process(arguments)


if __name__ == "__main__":
    main()
