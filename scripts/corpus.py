"""Text to train on and to judge with, and a tokenizer for it: what scripts/quickstart.py and scripts/train.py share."""

from __future__ import annotations

import platform
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
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


class WrongInput(ValueError):
    """The caller can mend it: shown as a message, without a traceback."""


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
            text = path.read_text("utf-8")
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


def read_columns(source: str, files: list[str], column: str, configuration: str | None = None) -> Text:
    """A column of a data set, as the `datasets` library finds it, or of files that it reads.

    Args:
        source: name or folder of a data set, or the kind of the files: json, parquet or arrow.
        files: paths, if `source` is their kind.
        column: which holds the text.
        configuration: name of one of the data set's configurations.
    """
    # Imported here, for it is an extra that plain text does without.
    from datasets import load_dataset

    missing = [name for name in files if not Path(name).is_file()]
    if missing:
        raise WrongInput(f"`--text` must name files; {', '.join(missing)} is none, seen from {Path.cwd()}.")
    splits = load_dataset(source, configuration, data_files=files or None)
    if "train" not in splits or column not in splits["train"].column_names:
        found = {name: split.column_names for name, split in splits.items()}
        raise WrongInput(
            f"A split `train` with a column `{column}` is needed; got {found}. Name it with --text_column."
        )
    train = [text for text in splits["train"][column] if text and text.strip()]
    other = next((name for name in ("validation", "test") if name in splits), None)
    if other is not None:
        held_out, how = [text for text in splits[other][column] if text and text.strip()], f"its split {other}"
    else:
        held_out, how = train[::HELD_OUT_ONE_IN], f"every {HELD_OUT_ONE_IN}nd document"
        train = [text for i, text in enumerate(train) if i % HELD_OUT_ONE_IN]
    if not train or not held_out:
        raise WrongInput(f"At least two documents with text are needed; got {len(train) + len(held_out)}.")
    name = ", ".join(Path(file).name for file in files) or source
    return Text(train, held_out, f"{name}, column {column}, without empty documents. Held out: {how}.")


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


def load_or_train_tokenizer(folder: Path, text: Text, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder, which is there or it is not: renaming it into place leaves no half of one."""
    if not folder.is_dir():
        unfinished = folder.with_suffix(".unfinished")
        train_tokenizer(text.train, vocab_size).save_pretrained(unfinished)
        unfinished.replace(folder)
    return AutoTokenizer.from_pretrained(folder)
