"""Text to train on and to judge with, and a tokenizer for it: what scripts/quickstart.py and scripts/train.py share."""

from __future__ import annotations

import platform
import shutil
import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
from flags import WrongInput
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

HELD_OUT_ONE_IN = 32
HELD_OUT_BYTES = 256 * 1024
END, PAD = "<|endoftext|>", "<|padding|>"

# Bulk that is no everyday Python: tests, character tables, generated files, an application, other people's packages.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo"}
SKIPPED_FOLDERS |= {"site-packages", "dist-packages"}
SKIPPED_FILES = ("_sysconfigdata",)


class Text(NamedTuple):
    """What to train on, what to judge with, and where both came from."""

    train: list[str]
    held_out: list[str]
    about: str


def read_standard_library() -> Text:
    """The sources of the Python that runs this, in the order of their names; a checksum of these holds some out."""
    folder = Path(sysconfig.get_path("stdlib"))
    train: list[str] = []
    held_out: list[str] = []
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
        raise WrongInput(f"Python's standard library has no sources in {folder}. Train on yours: --text FILE...")
    about = (
        f"The standard library of Python {platform.python_version()} (PSF license), {len(train + held_out)} files: "
        "all its sources but tests, character tables, IDLE and what is not UTF-8. "
        f"Held out: {len(held_out)} files, chosen by a checksum of their names."
    )
    return Text(train, held_out, about)


def read_files(paths: Sequence[Path]) -> Text:
    """The caller's files, in the order given; the end of each is held out."""
    train, held_out = [], []
    for path in paths:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else f"does not exist in {Path.cwd()}"
            raise WrongInput(f"`--text` must name files; {path} {what}. Check the path.")
        try:
            text = path.read_text("utf-8-sig")  # a byte order mark is no text
        except UnicodeDecodeError as error:
            raise WrongInput(
                f"`--text` must name UTF-8 text; {path} has other bytes at position {error.start}. "
                "Convert it, for example with iconv."
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


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
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
        padding_side="left",  # `generate` goes on from the last column
    )


def load_or_train_tokenizer(
    folder: Path, texts: Iterable[str], vocab_size: int, text_checksum: str
) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder, if it was trained on this text; else a new one in its place.

    It is there or it is not: renaming it into place leaves no half of one.
    """
    made_of, wanted = folder / "trained_on.txt", f"{text_checksum} {vocab_size}"
    if folder.is_dir() and made_of.is_file() and made_of.read_text("utf-8") != wanted:
        shutil.rmtree(folder)
    if not folder.is_dir():
        unfinished = folder.with_suffix(".unfinished")
        train_tokenizer(texts, vocab_size).save_pretrained(unfinished)
        (unfinished / made_of.name).write_text(wanted, "utf-8")
        unfinished.replace(folder)
    return AutoTokenizer.from_pretrained(folder)
