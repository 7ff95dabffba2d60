"""Write text with a checkpoint: complete a prompt, go on from a saved state, chat, or complete a file of prompts.

Complete a prompt as the checkpoint's generation config says, or greedily:

    python scripts/generate.py xlstm-quickstart --prompt "def add(a, b"
    python scripts/generate.py xlstm-quickstart --prompt "def add(a, b" --max_new_tokens 50 --temperature 0

Read a long text once and keep its state, then go on from it as often as you like; --prompt holds the new text only:

    python scripts/generate.py xlstm-quickstart --prompt "$(cat book.txt)" --max_new_tokens 0 --save_state book.state
    python scripts/generate.py xlstm-quickstart --load_state book.state --prompt " The end"

Several turns on a terminal, which go on from each other; an empty line ends:

    python scripts/generate.py xlstm-quickstart --chat

Many prompts, one per line or as {"prompt": ...} per line of a .jsonl file, in batches:

    python scripts/generate.py xlstm-quickstart --prompts_file prompts.jsonl --batch_size 16 --output written.jsonl

Weights in bfloat16, or in eight bits on top (docs/quantization.md says what that is good for):

    python scripts/generate.py xlstm-quickstart --prompt "def" --dtype bfloat16 --quantization quanto-int8

On a CPU that multiplies bfloat16 itself, faster for the memory of the weights once more:

    python scripts/generate.py xlstm-quickstart --prompt "def" --dtype bfloat16 --pack_weights

Compiled, for long texts: faster still where few prompts go together, after half a minute before the first token:

    python scripts/generate.py xlstm-quickstart --prompt "def" --max_new_tokens 10000 --compile

A saved state holds all that was shown, the completion too. With --prompts_file, every prompt goes on from the state.
A checkpoint that asks for beams gets them with --prompts_file; what is shown while it is written has none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from flags import NO_CONFIG, WrongInput, number, take_any_text
from safetensors import SafetensorError
from torch._dynamo.exc import BackendCompilerFailed
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, TextStreamer, set_seed

from modeling_xlstm import XLSTMCache, XLSTMConfig
from modeling_xlstm.quantization_xlstm import LIBRARIES, quantization

MAX_NEW_TOKENS = 128
LEAST_TEMPERATURE = 1e-6  # logits divided by it stay finite in float32


class Writer:
    """A model, its tokenizer, the state of the text so far, and counts of what was read and written.

    Args:
        model: a language model whose `generation_config` says how to write.
        tokenizer: the one it was trained with.
        cache: state of the text so far, of one row or empty.
    """

    def __init__(self, model: Any, tokenizer: Any, cache: XLSTMCache):
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self.tokens_read = self.tokens_written = 0
        self.state_bytes = cache.size_in_bytes()
        self.seconds = 0.0

    @property
    def fresh(self) -> bool:
        """Whether the text is yet to begin."""
        return self.cache.get_seq_length() == 0

    def encode(self, text: str, name: str) -> list[int]:
        """Ids of the next part of the text; only at its beginning with what the tokenizer puts there."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=self.fresh).input_ids
        if not ids and self.fresh and self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id]
        if not ids:
            raise WrongInput(f"`{name}` must hold at least one token of new text; got {text!r}. Write how to go on.")
        return ids

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> None:
        """Take tokens into the state and write nothing."""
        start = time.perf_counter()
        x = torch.tensor([ids], device=self.model.device)  # [1, T]
        self.model(x, past_key_values=self.cache, logits_to_keep=1)
        self.seconds += time.perf_counter() - start
        self.tokens_read += len(ids)
        self.state_bytes = self.cache.size_in_bytes()

    def write(self, ids: list[int], show_prompt: bool) -> None:
        """Go on after `ids` while streaming to stdout; the state then holds both."""
        before = self.cache.get_seq_length()
        streamer = TextStreamer(self.tokenizer, skip_prompt=not show_prompt, skip_special_tokens=True)
        new = self.generate([ids], self.cache, streamer)[0]
        # The last token chosen was not yet read; an end token never is, for it was not shown.
        unread = [*ids, *new][self.cache.get_seq_length() - before :]
        if unread:
            self.read(unread)
            self.tokens_read -= len(unread)

    def write_from_copies(self, rows: list[list[int]]) -> list[str]:
        """Completions of several prompts, each from the state so far, which stays as it is."""
        cache = XLSTMCache(self.model.config)
        if not self.fresh:
            cache.append_rows_(self.cache, [0] * len(rows))
        new = self.generate(rows, cache)
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]

    def generate(self, rows: list[list[int]], cache: XLSTMCache, streamer: Any = None) -> list[list[int]]:
        """New tokens of each row, without the end token."""
        T, past = max(map(len, rows)), cache.get_seq_length()
        pad = self.model.generation_config.pad_token_id
        # The mask covers the past too: Transformers would take one of the prompt's length for a text to be cut.
        mask = [[1] * past + [0] * (T - len(row)) + [1] * len(row) for row in rows]
        start = time.perf_counter()
        ids = self.model.generate(
            input_ids=torch.tensor([[pad] * (T - len(row)) + row for row in rows], device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            past_key_values=cache,
            streamer=streamer,
            tokenizer=self.tokenizer if self.model.generation_config.stop_strings else None,
        )
        new = [self._until_end(row) for row in ids[:, T:].tolist()]
        self.seconds += time.perf_counter() - start
        self.tokens_read += sum(map(len, rows))
        self.tokens_written += sum(map(len, new))
        self.state_bytes = cache.size_in_bytes() // cache.batch_size  # beams have a row each
        return new

    def _until_end(self, ids: list[int]) -> list[int]:
        return next((ids[:i] for i, token in enumerate(ids) if token in self.ends), ids)

    def summary(self) -> str:
        """What was done, how fast, and what the state of one text takes."""
        speed = (self.tokens_written or self.tokens_read) / max(self.seconds, 1e-9)
        doing = "writing" if self.tokens_written else "reading"
        return (
            f"{self.tokens_read} tokens read, {self.tokens_written} written; {doing} {speed:.0f} tokens/s. "
            f"The state takes {self.state_bytes:,} bytes however long the text is."
        )


def chat_turn(writer: Writer, line: str) -> list[int]:
    """Ids of what stands between the text so far and the answer to `line`."""
    tokenizer = writer.tokenizer
    if not tokenizer.chat_template:
        return writer.encode(f"{line}\n" if writer.fresh else f"\n{line}\n", "a line of the chat")
    turn = [{"role": "user", "content": line}]
    if writer.fresh:
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    else:
        # What a template puts between an answer and the next one is read off an example, so no history is needed.
        example = [{"role": "user", "content": "question"}]
        before = tokenizer.apply_chat_template(example, tokenize=False, add_generation_prompt=True) + "answer"
        example += [{"role": "assistant", "content": "answer"}, *turn]
        text = tokenizer.apply_chat_template(example, tokenize=False, add_generation_prompt=True)
        if not text.startswith(before):
            raise WrongInput(
                "The tokenizer's chat template must write later turns behind earlier ones, so that a state can be "
                "carried; this one rewrites them. Use --prompt with the text of the whole conversation."
            )
        text = text[len(before) :]
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def chat(writer: Writer) -> None:
    """Answer line after line from stdin until an empty one, or the end."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        writer.write(chat_turn(writer, line), show_prompt=False)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one per line, or of a .jsonl file; blank lines are left out."""
    if not path.is_file():
        raise WrongInput(f"`--prompts_file` must name a file; {path} is none. Check the path.")
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise WrongInput(
            f"`--prompts_file` must name UTF-8 text; {path} has other bytes at position {error.start}. "
            "Convert it, for example with iconv."
        ) from error
    numbered = [(i, line.removesuffix("\r")) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise WrongInput(f"`--prompts_file` must name a file with prompts in it; {path} has none. Write one per line.")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [prompt_of(line, f"{path}, line {i}") for i, line in numbered]


def prompt_of(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError, IndexError):
        prompt = None
    if not isinstance(prompt, str):
        raise WrongInput(
            f'A line of a .jsonl file must be like {{"prompt": "text"}}; {place} is {line[:60]!r}. '
            "Mend it, or name the file .txt if each line is a prompt."
        )
    return prompt


def complete_all(writer: Writer, prompts: Sequence[str], arguments: argparse.Namespace) -> None:
    """Complete all prompts; a batch's results are written before the next begins."""
    ids = [writer.encode(prompt, f"prompt {i}") for i, prompt in enumerate(prompts, 1)]
    with open_output(arguments.output) as output, tqdm(total=len(prompts), unit="prompt") as bar:
        for start in range(0, len(prompts), arguments.batch_size):
            batch = slice(start, start + arguments.batch_size)
            completions = writer.write_from_copies(ids[batch])
            for prompt, completion in zip(prompts[batch], completions, strict=True):
                line = json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False)
                print(line, file=output, flush=True)
            bar.update(len(completions))


@contextlib.contextmanager
def open_output(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
    else:
        with path.open("w", encoding="utf-8") as file:
            yield file


def load(arguments: argparse.Namespace) -> Writer:
    """The checkpoint, ready to write as the flags say, and the state to go on from."""
    folder = arguments.checkpoint
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if missing:
        way_out = "scripts/quickstart.py makes one."
        if (folder / "adapter_config.json").is_file():
            way_out = "It holds an adapter: merge that into its model, as docs/training.md shows."
        raise WrongInput(
            f"The checkpoint must be a folder with a model and its tokenizer; {folder} has no "
            f"{' and no '.join(missing)}. {way_out}"
        )
    options: dict[str, Any] = {} if arguments.dtype is None else {"dtype": getattr(torch, arguments.dtype)}
    if arguments.quantization is not None:
        try:
            options["quantization_config"] = quantization(arguments.quantization, options.get("dtype", torch.float32))
        except ImportError as error:
            raise WrongInput(f"`--quantization` cannot be followed: {error}") from error
    model, tokenizer = load_checkpoint(folder, options)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if arguments.pack_weights:
        try:
            model.pack_weights()
        except ValueError as error:
            raise WrongInput(f"`--pack_weights` cannot be followed: {error}") from error
    settle(model.generation_config, tokenizer, arguments)
    return Writer(model, tokenizer, load_state(arguments.load_state, model))


def load_checkpoint(folder: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    """A language model, all of its weights from the folder, and its tokenizer."""
    # The package's classes, not code that lies in the folder: a state written by one version is read by this one.
    options = {**options, "trust_remote_code": False, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, SafetensorError, *NO_CONFIG) as error:
        raise WrongInput(f"{folder} must hold a language model and its tokenizer: {error}") from error
    model, report = loaded
    if model.config.model_type != XLSTMConfig.model_type:
        raise WrongInput(
            f"The checkpoint must be of model type {XLSTMConfig.model_type!r}; {folder} is of "
            f"{model.config.model_type!r}. Convert it with modeling_xlstm.convert_from, if it is an xLSTM."
        )
    if new := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
        raise WrongInput(
            f"{folder} must hold all weights of a language model; missing, or of another shape: {', '.join(new[:3])}"
            f"{', ...' * (len(new) > 3)}. Give the folder of an XLSTMForCausalLM."
        )
    return model, tokenizer


def settle(settings: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Put the flags into the checkpoint's generation config, and one text per prompt, all of it in a state."""
    settings.use_cache, settings.cache_implementation, settings.token_healing = True, None, False
    settings.num_return_sequences, settings.return_dict_in_generate = 1, False
    if arguments.prompts_file is None:
        # Beams cannot be shown before the last token is chosen.
        settings.num_beams = 1
    if arguments.temperature == 0:
        settings.do_sample = False
        # Each would be warned about: greedy search has no use for them.
        settings.temperature = settings.top_p = settings.top_k = None
    elif arguments.temperature is not None or arguments.top_p is not None:
        settings.do_sample = True
        settings.temperature = settings.temperature if arguments.temperature is None else arguments.temperature
        settings.top_p = settings.top_p if arguments.top_p is None else arguments.top_p
    settings.max_length = None
    if arguments.max_new_tokens is not None:
        settings.max_new_tokens = arguments.max_new_tokens
    elif settings.max_new_tokens is None:
        settings.max_new_tokens = MAX_NEW_TOKENS
    if arguments.compile:
        settings.compile_config = CompileConfig(mode="default")
    if settings.pad_token_id is None:
        settings.pad_token_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def load_state(path: Path | None, model: Any) -> XLSTMCache:
    if path is None:
        return XLSTMCache(model.config)
    try:
        cache = XLSTMCache.load(path, model.config, model.device)
    except (FileNotFoundError, ValueError) as error:
        raise WrongInput(f"`--load_state` must name a state of this model. {error}") from error
    if cache.batch_size != 1:
        raise WrongInput(
            f"`--load_state` must name the state of one text; {path} holds {cache.batch_size}. "
            "Keep one with XLSTMCache.batch_select_indices and save it."
        )
    return cache


def save_state(path: Path, cache: XLSTMCache) -> None:
    """Write the state in one go, so that an interruption leaves the old file, which may be the one read, or the new."""
    if cache.get_seq_length() == 0:
        raise WrongInput(f"`--save_state` has no state to write to {path}, for no text was read. Enter some.")
    temporary = path.with_name(f"{path.name}.tmp")
    cache.save(temporary)
    temporary.replace(path)


def underscored(words: Sequence[str]) -> list[str]:
    """Flags may be spelled with - for _, as those of Transformers' own parser."""
    return [re.sub(r"^--[a-z-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in words]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write text with a checkpoint.")
    add = parser.add_argument
    add("checkpoint", type=Path, help="folder with a model and its tokenizer")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="text to complete, or to go on with after --load_state")
    what.add_argument("--chat", action="store_true", help="answer lines from stdin until an empty one")
    what.add_argument("--prompts_file", type=Path, metavar="FILE", help="complete each line, or each line of a .jsonl")
    add("--output", type=Path, metavar="FILE", help="of --prompts_file: JSON lines (default: stdout)")
    add("--batch_size", type=number(int, 1), default=8, help="of --prompts_file (default: %(default)s)")
    add("--load_state", type=Path, metavar="FILE", help="go on from the text whose state this is")
    add("--save_state", type=Path, metavar="FILE", help="write the state of all that was read and written")
    add(
        "--max_new_tokens",
        type=number(int, 0),
        help=f"per completion; 0 only reads --prompt (default: the checkpoint's, else {MAX_NEW_TOKENS})",
    )
    add("--temperature", type=number(float, 0), help="of sampling; 0 is greedy (default: the checkpoint's)")
    add("--top_p", type=number(float, 1e-6, 1), help="sample from this share (default: the checkpoint's)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: the checkpoint's)")
    add("--quantization", choices=list(LIBRARIES), help="keep the blocks' projections in few bits")
    add("--pack_weights", action="store_true", help="on a CPU, keep large matrices once more in its own order: faster")
    add("--compile", action="store_true", help="compile a token's step: half a minute, then faster; needs a compiler")
    add("--seed", type=number(int, 0), default=0, help="of sampling (default: %(default)s)")
    return parser.parse_args(underscored(sys.argv[1:]))


def check(arguments: argparse.Namespace) -> None:
    """Refuse, before anything is loaded, flags that contradict each other."""
    if arguments.temperature == 0 and arguments.top_p is not None:
        raise WrongInput("`--top_p` must not stand beside --temperature 0, which samples nothing. Leave one out.")
    if 0 < (arguments.temperature or 0) < LEAST_TEMPERATURE:
        raise WrongInput(
            f"`--temperature` must be 0, which is greedy, or at least {LEAST_TEMPERATURE}; got {arguments.temperature}."
        )
    if arguments.max_new_tokens == 0 and arguments.prompt is None:
        raise WrongInput("`--max_new_tokens` must be at least 1 but with --prompt; got 0. Raise it.")
    if arguments.compile and arguments.pack_weights:
        raise WrongInput("`--compile` must not stand beside --pack_weights, which it has no use for. Leave one out.")
    if arguments.output is not None and arguments.prompts_file is None:
        raise WrongInput("`--output` belongs to --prompts_file, which is not given. Use > FILE for other text.")
    if arguments.save_state is not None and arguments.prompts_file is not None:
        raise WrongInput(
            "`--save_state` keeps the state of one text; --prompts_file has many. Use --prompt, once per text."
        )


def check_files(arguments: argparse.Namespace) -> None:
    """Refuse files in places that are not there, and those that would replace what is read."""
    for name in ("output", "save_state"):
        path = getattr(arguments, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise WrongInput(f"`--{name}` must name a file in a folder that exists; got {path}. Make the folder.")
    for name in ("prompts_file", "load_state"):
        path = getattr(arguments, name)
        if path and arguments.output and path.resolve() == arguments.output.resolve():
            raise WrongInput(f"`--output` must not be --{name}, whose file it would replace; got {path} for both.")


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    check_files(arguments)
    prompts = None if arguments.prompts_file is None else read_prompts(arguments.prompts_file)
    writer = load(arguments)
    set_seed(arguments.seed)
    if prompts is not None:
        complete_all(writer, prompts, arguments)
    elif arguments.chat:
        chat(writer)
    else:
        ids = writer.encode(arguments.prompt, "--prompt")
        if arguments.max_new_tokens == 0:
            writer.read(ids)
        else:
            writer.write(ids, show_prompt=True)
    if arguments.save_state is not None:
        save_state(arguments.save_state, writer.cache)
    print(writer.summary(), file=sys.stderr)


def main() -> None:
    arguments = parse()
    take_any_text()
    # Bars of the weights; that of the prompts stays.
    transformers.utils.logging.disable_progress_bar()
    try:
        run(arguments)
    except WrongInput as error:
        raise SystemExit(f"generate.py: {error}") from None
    except BackendCompilerFailed as error:
        if type(error.inner_exception).__name__ != "InvalidCxxCompiler":
            raise
        message = f"`--compile` needs a C++ compiler: {error.inner_exception}. Install one or leave it out."
        raise SystemExit(f"generate.py: {message}") from None
    except BrokenPipeError:  # who read stdout, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python ends by writing the rest
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
