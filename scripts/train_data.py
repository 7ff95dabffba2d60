"""What scripts/train.py trains on and judges with: text tokenised once into a cache, or read as training goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from corpus import HELD_OUT_ONE_IN, Text, read_files, read_standard_library
from datasets import Dataset, Features, List, Value
from flags import WrongInput, make_folder
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from modeling_xlstm.training_xlstm import packed_row

HELD_OUT_OF_A_STREAM = 100
SHUFFLED_TOGETHER = 1000  # documents of a stream
TOKENISED_TOGETHER = 64  # documents of a stream
LEFT_BY_A_CALL = ("truncation", "padding")  # in a fast tokenizer


@dataclass
class DataArguments:
    dataset: str | None = field(default=None, metadata={"help": "name or folder of a Hugging Face data set"})
    dataset_config: str | None = field(default=None, metadata={"help": "which of its configurations"})
    text: list[str] = field(
        default_factory=list, metadata={"help": "files of one kind: UTF-8 text, .jsonl, .parquet or .arrow"}
    )
    text_column: str = field(default="text", metadata={"help": "of a data set, .jsonl, .parquet or .arrow"})
    demo: bool = field(default=False, metadata={"help": "the sources of Python's standard library"})
    streaming: bool = field(
        default=False, metadata={"help": "read and tokenise as training goes on; needs --max_steps and --tokenizer"}
    )
    held_out_documents: int | None = field(
        default=None,
        metadata={"help": "hold out the first so many documents; else a split, or every 32nd; 100 of a stream"},
    )
    token_cache: str | None = field(
        default=None, metadata={"help": "folder of tokenised text; else one in the datasets library's cache"}
    )


class Source(NamedTuple):
    """Documents to train on and to judge with, in a column `text`; those to train on may be a stream."""

    train: Any
    held_out: Dataset
    about: str


def open_source(data: DataArguments) -> Source:
    """Documents from whichever source was chosen."""
    chosen = [name for name in ("dataset", "text", "demo") if getattr(data, name)]
    if len(chosen) != 1:
        raise WrongInput(f"Choose one of --dataset, --text and --demo; got {' and '.join(chosen) or 'none'}.")
    if data.held_out_documents is not None and data.held_out_documents < 1:
        raise WrongInput(f"`--held_out_documents` must be at least 1; got {data.held_out_documents}. Leave it out.")
    if data.dataset:
        return split(data, open_dataset(data), data.dataset)
    kinds = {Path(name).suffix.lstrip(".") for name in data.text}
    if data.demo or not kinds & {"jsonl", "parquet", "arrow"}:
        for name in ("streaming", "held_out_documents"):
            if getattr(data, name):
                raise WrongInput(f"`--{name}` applies to a data set, .jsonl, .parquet or .arrow. Leave it out.")
        return of_texts(read_standard_library() if data.demo else read_files([Path(name) for name in data.text]))
    if len(kinds) > 1:
        raise WrongInput(f"`--text` must name files of one kind; got {sorted(kinds)}. Convert them, or train in turns.")
    found = load_files("--text", data.text, kinds.pop(), streaming=data.streaming)
    return split(data, found, ", ".join(Path(name).name for name in data.text))


def load_files(flag: str, files: list[str], suffix: str, **options: Any) -> Any:
    """Rows of the files that a flag names; further options are those of `datasets.load_dataset`."""
    missing = [name for name in files if not Path(name).is_file()]
    if missing or not files:
        raise WrongInput(f"`{flag}` must name files; got {', '.join(missing) or 'none'}, seen from {Path.cwd()}.")
    kind = {"jsonl": "json"}.get(suffix, suffix)
    try:
        return datasets.load_dataset(kind, data_files=files, **options)
    except (datasets.exceptions.DatasetsError, StopIteration, ValueError) as error:
        wrong = f"`{flag}` must name .{suffix} files; {', '.join(files)} cannot be read as {kind}"
        raise WrongInput(f"{wrong}: {error.__cause__ or error!r}") from error


def of_texts(text: Text) -> Source:
    train, held_out = (Dataset.from_dict({"text": texts}) for texts in (text.train, text.held_out))
    return Source(train, held_out, text.about)


def open_dataset(data: DataArguments) -> Any:
    """The splits of a data set: a name, a folder of files, or what `save_to_disk` wrote."""
    folder = Path(str(data.dataset))
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved: Any = datasets.load_from_disk(str(folder))
        splits = {"train": saved} if isinstance(saved, Dataset) else saved
        return {name: x.to_iterable_dataset() for name, x in splits.items()} if data.streaming else splits
    try:
        return datasets.load_dataset(str(data.dataset), data.dataset_config, streaming=data.streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise WrongInput(f"`--dataset` must name a data set, or a folder of one; {data.dataset}: {error}") from error


def split(data: DataArguments, splits: Any, name: str) -> Source:
    """The column of the text, parted into what is trained on and what is held out."""
    columns = {part: column_names(x) for part, x in splits.items()}
    if data.text_column not in columns.get("train", []):
        raise WrongInput(
            f"A split `train` with a column `{data.text_column}` is needed; got {columns}. Name it with --text_column."
        )
    texts = {part: x.select_columns(data.text_column) for part, x in splits.items()}
    if data.text_column != "text":
        texts = {part: x.rename_column(data.text_column, "text") for part, x in texts.items()}
    train, about = texts["train"], f"{name}, column {data.text_column}, without empty documents. Held out: "
    if data.streaming:
        count = data.held_out_documents or HELD_OUT_OF_A_STREAM
        held_out = Dataset.from_dict({"text": [row["text"] for row in train.take(count)]})
        return Source(train.skip(count), held_out, f"{about}the first {count} documents.")
    if data.held_out_documents:
        count = data.held_out_documents
        if count >= len(train):
            raise WrongInput(f"`--held_out_documents` must leave some to train on; got {count} of {len(train)}.")
        rows = train.select(range(count, len(train))), train.select(range(count))
        return Source(*rows, f"{about}the first {count} documents.")
    if other := next((part for part in ("validation", "test") if part in texts), None):
        return Source(train, texts[other], f"{about}its split {other}.")
    places = np.arange(len(train)) % HELD_OUT_ONE_IN == 0
    rows = train.select(np.flatnonzero(~places)), train.select(np.flatnonzero(places))
    return Source(*rows, f"{about}every {HELD_OUT_ONE_IN}nd document.")


def column_names(part: Any) -> list[str]:
    """Of a stream they may be known from its first row only."""
    return list(part.column_names or next(iter(part), {}))


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], vocab_size: int) -> list[list[int]]:
    """Ids of every document between two end tokens, so that each of its own tokens is predicted."""
    end: Any = tokenizer.eos_token_id
    if end is None:
        raise WrongInput("The tokenizer must have an end token (`eos_token`), which parts documents; it has none.")
    documents = [[end, *ids, end] for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids]
    largest = max(max(ids) for ids in documents)
    if largest >= vocab_size:
        raise WrongInput(
            f"The tokenizer writes id {largest}, and the model knows {vocab_size}. Use the tokenizer it was trained "
            "with, or a larger `vocab_size`."
        )
    return documents


def not_empty(texts: Iterable[Any]) -> list[str]:
    found = []
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise WrongInput(f"The column of the text must hold text; got {type(text).__name__}. See --text_column.")
        if text and text.strip():
            found.append(text)
    return found


class MappedIds:
    """Token ids on disk, read where they are asked for: `ids[places]` with places of any shape.

    Args:
        column: lists of ids, in chunks as pyarrow keeps them.
    """

    def __init__(self, column: Any):
        self.chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
        self.ends = torch.tensor([len(chunk) for chunk in self.chunks]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, places: Tensor) -> Tensor:
        ids = torch.empty(places.shape, dtype=torch.int32)
        which = torch.searchsorted(self.ends, places, right=True)
        for chunk in which.unique().tolist():
            here, values = which == chunk, self.chunks[chunk]
            first = int(self.ends[chunk]) - len(values)
            ids[here] = torch.from_numpy(values[(places[here] - first).numpy()])
        return ids


class Tokens(NamedTuple):
    """Documents as token ids, which `Segments` reads.

    Attributes:
        ids: of all documents, end to end.
        lengths: tokens of each document, [documents].
        bytes: of their text in UTF-8.
        cached: whether they were tokenised by an earlier run.
    """

    ids: MappedIds
    lengths: Tensor
    bytes: int
    cached: bool


def tokenise(
    data: DataArguments, documents: Dataset, tokenizer: PreTrainedTokenizerBase, vocab_size: int, what: str
) -> Tokens:
    """Tokenise documents, or find them tokenised: the file's name is a checksum of the text, tokenizer and vocabulary.

    Rows are cut when they are read, so the block size has no part in it.
    """
    key = fingerprint(documents, tokenizer, vocab_size)
    folder = Path(data.token_cache or Path(datasets.config.HF_DATASETS_CACHE) / "xlstm_tokens")
    make_folder(folder, "--token_cache")
    file = folder / f"{key}.arrow"
    cached = file.is_file()

    def read(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = not_empty(rows["text"])
        ids = encode(tokenizer, texts, vocab_size) if texts else []
        return {"input_ids": ids, "bytes": [len(text.encode()) for text in texts]}

    table = documents.map(
        read,
        batched=True,
        remove_columns=["text"],
        features=Features({"input_ids": List(Value("int32")), "bytes": Value("int64")}),
        cache_file_name=str(file),
        new_fingerprint=key,
        load_from_cache_file=True,
        desc=f"Tokenising what is {what}",
    )
    if len(table) == 0:
        raise WrongInput(
            f"There is no document with text to be {what}, of {len(documents)} documents. At least two are needed, "
            "one of them held out; is it the right column?"
        )
    column = table.data.column("input_ids")
    lengths = torch.from_numpy(pc.list_value_length(column).to_numpy().astype(np.int64))
    return Tokens(MappedIds(column), lengths, pc.sum(table.data.column("bytes")).as_py(), cached)


def fingerprint(documents: Dataset, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
    """The datasets library's checksum of the text, and ours of everything the ids depend on beside it."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = datasets.fingerprint.Hasher.hash(tokenizer)
    else:
        # What it would be saved as, but for the marks that its last call left.
        rules = {name: rule for name, rule in json.loads(backend.to_str()).items() if name not in LEFT_BY_A_CALL}
    parts = (documents._fingerprint, type(tokenizer).__name__, rules, tokenizer.eos_token_id, vocab_size)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


class Stream(IterableDataset[dict[str, Tensor]]):
    """Packed rows of a stream of documents, without end: the documents anew, in another order, when it is over.

    Rows are those of `Segments`, every one from an empty state. The same rows come in every run, so that skipping those
    it has seen takes a resumed training to its place.

    Args:
        documents: a stream with a column `text`.
        tokenizer: their tokenizer.
        vocab_size: of the model.
        block_size: tokens of a row.
        seed: of the order; documents are shuffled among 1000 at a time.
    """

    def __init__(self, documents: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int, block_size: int, seed: int):
        self.documents = documents.shuffle(seed=seed, buffer_size=SHUFFLED_TOGETHER)
        self.tokenizer, self.vocab_size, self.block_size = tokenizer, vocab_size, block_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        T = self.block_size
        ids: list[int] = []
        numbers: list[int] = []  # of the documents
        for number, document in enumerate(self._encoded()):
            ids += document
            numbers += [number] * len(document)
            start = 0
            # One token more than a row: it is predicted.
            while len(ids) - start > T:
                row = slice(start, start + T + 1)
                yield packed_row(torch.tensor(ids[row]), torch.tensor(numbers[row]))
                start += T
            del ids[:start], numbers[:start]

    def _encoded(self) -> Iterator[list[int]]:
        for epoch in itertools.count():
            self.documents.set_epoch(epoch)
            found = False
            for rows in self.documents.iter(TOKENISED_TOGETHER):
                if texts := not_empty(rows["text"]):
                    found = True
                    yield from encode(self.tokenizer, texts, self.vocab_size)
            if not found:
                raise WrongInput("The stream has no document with text beside those held out. Is it the right column?")
