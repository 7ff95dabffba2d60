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
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from corpus import (
    END,
    PAD,
    Text,
    count_bytes,
    load_or_train_tokenizer,
    read_files,
    read_standard_library,
)
from flags import WrongInput, make_folder, number, positive, take_any_text
from runs import LossBar, delete_unfinished, differences, last_checkpoint, silent, step_of
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TextStreamer,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from write_card import write_card

if TYPE_CHECKING:
    from modeling_xlstm import XLSTMForCausalLM

PACKAGE = "modeling_xlstm"
ROOT = Path(__file__).resolve().parents[1]
PROMPT = 'class Stack:\n    """A last-in, first-out stack."""\n\n    def __init__(self'

# The recipe, chosen for the fewest bits per byte of held-out files after minutes on 2 cores.
MODEL: dict[str, Any] = {"num_hidden_layers": 2, "num_heads": 4, "block_style": "neurips", "slstm_at": [0]}
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 8e-3,
    "warmup_steps": 60,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
}
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
BLOCK_TOKENS = 256


class Blocks(Dataset[dict[str, Tensor]]):
    """A stream of ids in blocks that overlap by one, so that every id but the first is predicted exactly once.

    Args:
        ids: token ids, [tokens]; what does not fill a block is left out.
    """

    def __init__(self, ids: Tensor):
        self.blocks = ids.unfold(0, BLOCK_TOKENS, BLOCK_TOKENS - 1)  # [blocks, BLOCK_TOKENS]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def decayed_matrices(model: torch.nn.Module) -> list[str]:
    """Weight decay on matrices only: not on norms, embeddings or biases; those of sLSTM gates have several dims too."""
    named = model.named_parameters()
    return [name for name, x in named if x.dim() > 1 and "bias" not in name and "embed" not in name]


def make_blocks(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Blocks:
    """Cut texts into blocks, an end token before the first text and after each."""
    ids = [tokenizer.eos_token_id]
    for text_ids in tokenizer(list(texts), verbose=False).input_ids:
        ids += [*text_ids, tokenizer.eos_token_id]
    if len(ids) < BLOCK_TOKENS:
        raise WrongInput(
            f"`--text` must fill a block of {BLOCK_TOKENS} tokens to train on and another to be held out; one of them "
            f"got {len(ids)} tokens ({count_bytes(texts):,} bytes). Add files, or a longer one."
        )
    return Blocks(torch.tensor(ids))


def bits_per_byte(loss: float, blocks: Blocks, tokenizer: PreTrainedTokenizerBase) -> float:
    """A loss in nats per token as bits per byte of the text that the predicted tokens spell; end tokens spell none."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    lengths = torch.tensor([0 if token in (END, PAD) else len(token) for token in tokens])
    predicted = blocks.blocks[:, 1:]
    return loss / math.log(2) * predicted.numel() / int(lengths[predicted].sum())


def checksum(text: Text) -> str:
    digest = hashlib.sha256()
    for part in (*text.train, *text.held_out):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def describe(arguments: argparse.Namespace, text: Text, processes: int) -> dict[str, Any]:
    """What makes a run this run and no other: resuming it under any other description would give another model."""
    return {
        "text": [str(path) for path in arguments.text] or "Python's standard library",
        "text_sha256": checksum(text),
        "steps": arguments.steps,
        "seed": arguments.seed,
        "hidden_size": arguments.hidden_size,
        "vocab_size": arguments.vocab_size,
        "block_tokens": BLOCK_TOKENS,
        "model": MODEL,
        "training": TRAINING,
        "processes": processes,
    }


def open_run(arguments: argparse.Namespace, text: Text, processes: int) -> None:
    """Make the folder of this run, or recognise it; raise WrongInput if it holds anything else."""
    folder, file = arguments.out, arguments.out / "run.json"
    run = describe(arguments, text, processes)
    if file.is_file() and not arguments.restart:
        before = json.loads(file.read_text("utf-8"))["run"]
        changed = differences(before, run)
        if changed and ((folder / "README.md").is_file() or last_checkpoint(folder / "checkpoints") is not None):
            raise WrongInput(
                f"{folder} holds another run ({'; '.join(changed)}). Add --restart to delete it and train anew, "
                "or choose another folder with --out."
            )
        if changed:  # nothing was trained yet
            write_run(folder, run, card_words(arguments, text))
        return
    if file.is_file():
        shutil.rmtree(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WrongInput(f"`--out` must be a new or empty folder, or one of an earlier run; {folder} is neither.")
    make_folder(folder, "--out")
    write_run(folder, run, card_words(arguments, text))


def write_run(folder: Path, run: dict[str, Any], card: dict[str, Any]) -> None:
    """Write run.json in one go, so that an interruption leaves the old file or the new one."""
    temporary = folder / "run.json.tmp"
    temporary.write_text(json.dumps({"run": run, "card": card}, indent=2) + "\n", "utf-8")
    temporary.replace(folder / "run.json")


def card_words(arguments: argparse.Namespace, text: Text) -> dict[str, Any]:
    """What the model card says beside the numbers of the training."""
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    given = shlex.join(word for word in sys.argv[1:] if word != "--restart")
    subject = "the files below" if arguments.text else "Python source code"
    return {
        "name": arguments.out.resolve().name,
        "license": "other",
        "summary": f"A small xLSTM language model of {subject}, trained by xlstm-transformers' scripts/quickstart.py.",
        "data": text.about,
        "train_bytes": count_bytes(text.train),
        "eval_bytes": count_bytes(text.held_out),
        "command": f"python scripts/quickstart.py {given}".rstrip(),
        "machine": gpu or f"CPU ({platform.machine()}, threads: {torch.get_num_threads()})",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": found.stdout.strip() if found and found.returncode == 0 else "unknown",
        "date": datetime.date.today().isoformat(),
        "prompt": arguments.prompt,
        "limits": "Its text has the look of what it was trained on, not the sense. It was trained on blocks of "
        f"{BLOCK_TOKENS} tokens, each from an empty state, and its bits per byte are measured in the same way.",
    }


def make_model(tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace) -> XLSTMForCausalLM:
    # Imported in functions only: the process that shows the completion must do without the package.
    from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    set_seed(arguments.seed)
    config = XLSTMConfig(vocab_size=len(tokenizer), hidden_size=arguments.hidden_size, **MODEL, **ids)
    model = XLSTMForCausalLM(config)
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


def make_trainer(model: XLSTMForCausalLM, settings: TrainingArguments, **kwargs: Any) -> Trainer:
    from modeling_xlstm.training_xlstm import ResumableTrainer

    class QuickstartTrainer(ResumableTrainer):
        def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
            return decayed_matrices(model)

    trainer = QuickstartTrainer(model, settings, **kwargs)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar())
    return trainer


def train(arguments: argparse.Namespace, text: Text, settings: TrainingArguments) -> None:
    """Train, judge and save: model, tokenizer and card in the folder of the run."""
    say = print if settings.process_index == 0 else silent
    with settings.main_process_first():
        delete_unfinished(arguments.out / "checkpoints")
        checkpoint = last_checkpoint(arguments.out / "checkpoints")
        tokenizer = load_or_train_tokenizer(
            arguments.out / "checkpoints" / "tokenizer", text.train, arguments.vocab_size, checksum(text)
        )
    blocks, held_out = (make_blocks(tokenizer, texts) for texts in text[:2])
    say(f"Tokenizer  {len(tokenizer):,} tokens; {len(blocks):,} blocks of {BLOCK_TOKENS}, {len(held_out):,} held out")
    model = make_model(tokenizer, arguments)
    say(f"Model      {model.num_parameters():,} parameters; blocks: {', '.join(model.config.block_types or [])}")
    trainer = make_trainer(model, settings, train_dataset=blocks, eval_dataset=held_out, processing_class=tokenizer)
    if checkpoint is not None:
        say(f"Resuming   at step {step_of(checkpoint):,} of {arguments.steps:,}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    loss = trainer.evaluate()["eval_loss"]
    bits = bits_per_byte(loss, held_out, tokenizer)
    trainer.log({"eval_bits_per_byte": bits, "resumed_at_step": 0 if checkpoint is None else step_of(checkpoint)})
    trainer.save_model(str(arguments.out))
    if settings.process_index == 0:
        finish(trainer.state, model, arguments.out)
    say(f"Held out   loss {loss:.3f} nats per token, {bits:.3f} bits per byte")
    say(f"Saved      {arguments.out}: model, its code, tokenizer and card (README.md)")


def finish(state: TrainerState, model: XLSTMForCausalLM, folder: Path) -> None:
    """Write the facts and the card; what was kept for an interruption goes."""
    state.save_to_json(str(folder / "trainer_state.json"))
    with torch.no_grad():
        output = model.eval()(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)
    notes = json.loads((folder / "run.json").read_text("utf-8"))
    write_run(folder, notes["run"], {**notes["card"], "state_bytes": output.past_key_values.size_in_bytes()})
    write_card(folder)
    shutil.rmtree(folder / "checkpoints")


def complete_in_fresh_process(arguments: argparse.Namespace) -> None:
    """Run this file again, elsewhere, with the package out of reach and an empty cache of remote code."""
    with tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, str(Path(__file__).resolve()), "--only_complete"]
        for name in ("prompt", "max_new_tokens", "seed"):
            command += [f"--{name}", str(getattr(arguments, name))]
        command += ["--out", str(arguments.out.resolve())]
        places = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(empty) / "modules")}
        sys.stdout.flush()
        subprocess.run(command, check=True, cwd=empty, env={**os.environ, **places})


def complete(arguments: argparse.Namespace) -> None:
    """Load the checkpoint as anyone would who has only the checkpoint, and stream a completion."""
    # None makes every import of the package fail.
    sys.modules[PACKAGE] = None  # type: ignore[assignment]
    # The flag keeps Transformers from asking, for it looks at the model's configuration here too.
    tokenizer = AutoTokenizer.from_pretrained(arguments.out, trust_remote_code=True)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.out, trust_remote_code=True)
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
    print(f"\n{new_tokens} tokens, {speed:.0f} tokens/s. The state takes {size:,} bytes however long the text is.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small xLSTM on Python's own source code, or on your text.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("xlstm-quickstart"), help="folder to write (default: %(default)s)")
    add("--text", type=Path, nargs="+", default=[], metavar="FILE", help="train on these UTF-8 files instead")
    add("--steps", type=positive, default=2000, help="optimizer steps (default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, help="of weights, data order and sampling (default: %(default)s)")
    add("--hidden_size", type=positive, default=128, help="width of the model (default: %(default)s)")
    add("--vocab_size", type=number(int, 258), default=2048, help="tokens, at most (default: %(default)s)")
    add("--prompt", default=PROMPT, help="text to complete")
    add("--max_new_tokens", type=positive, default=200, help="of the completion (default: %(default)s)")
    add("--restart", action="store_true", help="delete the run in --out and train anew")
    add("--only_complete", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hidden_size % MODEL["num_heads"]:
        parser.error(
            f"--hidden_size must be a multiple of {MODEL['num_heads']}, the heads; got {arguments.hidden_size}"
        )
    if not arguments.prompt:
        parser.error("--prompt must hold text")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    settings = training_arguments(arguments)
    say = print if settings.process_index == 0 else silent
    text = read_files(arguments.text) if arguments.text else read_standard_library()
    sizes = [f"{count_bytes(texts) / 1e6:.2f} MB" for texts in text[:2]]
    say(f"Text       {sizes[0]}, and {sizes[1]} held out")
    with settings.main_process_first():
        if settings.process_index == 0:
            open_run(arguments, text, settings.world_size)
    if (arguments.out / "README.md").is_file():
        say(f"Trained    already, in {arguments.out}; --restart trains anew")
    else:
        train(arguments, text, settings)
    if settings.process_index == 0:
        complete_in_fresh_process(arguments)


def main() -> None:
    arguments = parse()
    take_any_text()
    # Bars of single files; that of the training stays.
    transformers.utils.logging.disable_progress_bar()
    try:
        complete(arguments) if arguments.only_complete else run(arguments)
    except WrongInput as error:
        raise SystemExit(f"quickstart.py: {error}") from None
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
