"""scripts/generate.py, as a user starts it, against greedy decoding that reads the whole text anew for every token."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import torch
from checkout import ROOT
from inputs import rows, tiny_model
from processes import without_torchao
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from tolerances import assert_same
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_xlstm import XLSTMCache, XLSTMForCausalLM, ops_products

FIRST, SECOND = "The state of a text", " has one size"
NEW = 7
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Checkpoint(NamedTuple):
    folder: Path
    model: Any
    tokenizer: Any

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text).input_ids)

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @torch.no_grad()
    def greedy(self, ids: list[int], count: int = NEW) -> list[int]:
        """The likeliest tokens after `ids`, each from a fresh pass over everything."""
        text = list(ids)
        while len(text) < len(ids) + count:
            text.append(int(self.model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        new = text[len(ids) :]
        assert self.tokenizer.eos_token_id not in new, "the tiny model must not end early here: choose other texts"
        return new


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model in float64, so that no tie is broken by rounding, and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("generate") / "checkpoint"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([FIRST + SECOND] * 3, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    model = tiny_model(XLSTMForCausalLM, vocab_size=bpe.get_vocab_size())
    with torch.no_grad():
        # Larger embeddings: the text counts for more than the model's favourite token.
        model.model.embed_tokens.weight.normal_()
        model.lm_head.weight.normal_()
    model.save_pretrained(folder)
    return Checkpoint(folder, model, AutoTokenizer.from_pretrained(folder))


def generate(checkpoint: Checkpoint, *options: str | Path, stdin: str = "", fails: bool = False) -> tuple[str, str]:
    """What the script wrote to stdout and stderr."""
    greedy = ["--temperature", "0", "--max_new_tokens", str(NEW)]
    process = subprocess.run(
        [sys.executable, ROOT / "scripts" / "generate.py", checkpoint.folder, *greedy, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "TORCHDYNAMO_DISABLE": "1"},
        input=stdin.encode(),
        capture_output=True,
    )
    out, err = process.stdout.decode(), process.stderr.decode()
    assert (process.returncode != 0) == fails, out + err
    return out, without_torchao(err)


@pytest.mark.slow
def test_going_on_from_a_saved_state_is_going_on_from_the_whole_text(checkpoint: Checkpoint, tmp_path: Path) -> None:
    state = tmp_path / "text.state"
    start = checkpoint.ids(FIRST)
    completion = checkpoint.greedy(start)
    out, err = generate(checkpoint, "--prompt", FIRST, "--save_state", state)
    assert out == checkpoint.text([*start, *completion]) + "\n"
    saved = XLSTMCache.load(state, checkpoint.model.config)
    assert saved.get_seq_length() == len(start) + NEW
    assert err.endswith(  # libraries may say on import what they could not load
        f"{len(start)} tokens read, {NEW} written; writing {err.split('writing ')[1].split()[0]} tokens/s. "
        f"The state takes {saved.size_in_bytes():,} bytes however long the text is.\n"
    )

    more = checkpoint.ids(SECOND)
    out, _ = generate(checkpoint, "--load-state", state, "--prompt", SECOND)
    assert out == checkpoint.text([*more, *checkpoint.greedy([*start, *completion, *more])]) + "\n"


@pytest.mark.slow
def test_a_file_of_prompts_is_completed_as_each_prompt_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    prompts = [FIRST, "a", FIRST + SECOND, SECOND, "\u00e9t\u00e9"]
    file, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), "utf-8")
    out, err = generate(checkpoint, "--prompts_file", file, "--batch_size", "3", "--output", output)
    assert out == ""
    assert "5/5" in err
    assert [json.loads(line) for line in output.read_text("utf-8").splitlines()] == [
        {"prompt": prompt, "completion": checkpoint.text(checkpoint.greedy(checkpoint.ids(prompt)))}
        for prompt in prompts
    ]


@pytest.mark.slow
def test_a_chat_over_a_pipe_answers_each_line_with_all_before_it_in_mind(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    text: list[int] = []
    answers = []
    for turn in (f"{FIRST}\n", "\nhas it\n"):
        text += checkpoint.ids(turn)
        answers.append(checkpoint.greedy(text))
        text += answers[-1]
    state = tmp_path / "chat.state"
    out, _ = generate(checkpoint, "--chat", "--save_state", state, stdin=f"{FIRST}\nhas it\n\nnot read\n")
    assert out == "".join(checkpoint.text(answer) + "\n" for answer in answers)
    assert XLSTMCache.load(state, checkpoint.model.config).get_seq_length() == len(text)


@pytest.mark.slow
def test_a_damaged_state_is_refused_in_one_line(checkpoint: Checkpoint, tmp_path: Path) -> None:
    state = tmp_path / "damaged.state"
    state.write_bytes(b"no tensors")
    out, err = generate(checkpoint, "--load_state", state, "--prompt", SECOND, fails=True)
    assert out == ""
    assert err.startswith("generate.py: `--load_state` must name a state of this model. ")
    assert str(state) in err
    assert err.count("\n") == 1


@pytest.fixture
def script() -> ModuleType:
    import generate

    return generate


def test_the_turns_of_a_chat_spell_what_the_template_writes_for_the_whole_conversation(
    checkpoint: Checkpoint, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.tokenizer, "chat_template", TEMPLATE)
    writer = script.Writer(checkpoint.model, checkpoint.tokenizer, XLSTMCache(checkpoint.model.config))
    first = script.chat_turn(writer, "one")
    writer.read(first)
    spelt = checkpoint.tokenizer.decode(first) + "two" + checkpoint.tokenizer.decode(script.chat_turn(writer, "three"))
    words = (("user", "one"), ("assistant", "two"), ("user", "three"))
    whole = [{"role": role, "content": content} for role, content in words]
    assert spelt == checkpoint.tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)


def test_what_was_ended_by_an_end_token_goes_on_without_it(
    checkpoint: Checkpoint, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = checkpoint.ids(FIRST)
    completion = checkpoint.greedy(start)
    end = completion[3]
    shown = completion[: completion.index(end)]
    assert shown
    monkeypatch.setattr(checkpoint.model.generation_config, "eos_token_id", end)
    monkeypatch.setattr(checkpoint.model.generation_config, "max_new_tokens", NEW)
    writer = script.Writer(checkpoint.model, checkpoint.tokenizer, XLSTMCache(checkpoint.model.config))
    writer.write(start, show_prompt=False)
    cache = checkpoint.model(torch.tensor([[*start, *shown]]), use_cache=True).past_key_values
    assert writer.cache.get_seq_length() == cache.get_seq_length()
    assert writer.tokens_written == len(shown)
    assert_same(rows(writer.cache.states, 0), rows(cache.states, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--temperature", "0", "--top_p", "0.5"], "`--top_p` must not stand beside --temperature 0"),
        (["--chat", "--max_new_tokens", "0"], "`--max_new_tokens` must be at least 1"),
        (["--prompt", "a", "--temperature", "1e-40"], "`--temperature` must be 0, which is greedy, or at least 1e-06"),
        (["--prompt", "a", "--compile", "--pack_weights"], "`--compile` must not stand beside --pack_weights"),
        (["--prompt", "a", "--output", "x"], "`--output` belongs to --prompts_file"),
        (["--prompts_file", "x", "--output", "./x"], "`--output` must not be --prompts_file"),
        (["--prompts_file", "x", "--load_state", "y", "--output", "y"], "`--output` must not be --load_state"),
        (["--prompts_file", "x", "--save_state", "y"], "`--save_state` keeps the state of one text"),
        (["--prompt", "a", "--save_state", "no/such/file"], "`--save_state` must name a file in a folder that exists"),
        (["--prompt", "a"], "The checkpoint must be a folder with a model and its tokenizer; nowhere has no config"),
    ],
    ids=[
        *("top_p", "max_new_tokens", "temperature", "compile", "output", "prompts replaced", "state replaced"),
        *("many states", "folder", "checkpoint"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused_by_name(
    options: list[str], message: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py", "nowhere", *options])
    with pytest.raises(SystemExit) as refusal:
        script.main()
    assert str(refusal.value).startswith(f"generate.py: {message}")


@pytest.fixture
def write(
    checkpoint: Checkpoint, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What is written, greedily, with a checkpoint's folder and flags."""

    def run(folder: Path, *flags: str | Path) -> str:
        greedy = ["--temperature", "0", "--max_new_tokens", str(NEW)]
        monkeypatch.setattr(sys, "argv", ["generate.py", str(folder), *greedy, *map(str, flags)])
        script.main()
        return capsys.readouterr().out

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return run


def changed(folder: Path, copy: Path, file: str, **fields: Any) -> Path:
    """A copy of a checkpoint, with other fields in one of its JSON files."""
    shutil.copytree(folder, copy)
    before = json.loads((folder / file).read_text("utf-8"))
    (copy / file).write_text(json.dumps({**before, **fields}), "utf-8")
    return copy


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "num_beams": 2},
        {"return_dict_in_generate": True},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"token_healing": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_prompt_has_one_streamed_completion_and_its_state_whatever_the_generation_config_says(
    fields: dict[str, Any], checkpoint: Checkpoint, write: Callable[..., str], tmp_path: Path
) -> None:
    folder = changed(checkpoint.folder, tmp_path / "changed", "generation_config.json", **fields)
    start, state = checkpoint.ids(FIRST), tmp_path / "text.state"
    text = checkpoint.text([*start, *checkpoint.greedy(start)])
    assert write(folder, "--prompt", FIRST, "--save_state", state) == text + "\n"
    assert XLSTMCache.load(state, checkpoint.model.config).get_seq_length() == len(start) + NEW


def test_each_prompt_of_a_file_has_one_completion_where_the_generation_config_asks_for_several(
    checkpoint: Checkpoint, write: Callable[..., str], tmp_path: Path
) -> None:
    fields = {"num_return_sequences": 2, "num_beams": 2, "return_dict_in_generate": True}
    folder = changed(checkpoint.folder, tmp_path / "changed", "generation_config.json", **fields)
    (tmp_path / "prompts.txt").write_text(f"{FIRST}\n{SECOND}\n", "utf-8")
    out = write(folder, "--prompts_file", tmp_path / "prompts.txt")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == [FIRST, SECOND]


def test_a_completion_ends_with_the_stop_string_of_the_generation_config(
    checkpoint: Checkpoint, write: Callable[..., str], tmp_path: Path
) -> None:
    start = checkpoint.ids(FIRST)
    completion = checkpoint.greedy(start)
    # A token that is a character by itself, not a part of one.
    at = next(i for i, token in enumerate(completion) if checkpoint.text([token]).isalnum())
    stop = checkpoint.text([completion[at]])
    folder = changed(checkpoint.folder, tmp_path / "changed", "generation_config.json", stop_strings=[stop])
    assert at < NEW - 1
    assert write(folder, "--prompt", FIRST) == checkpoint.text([*start, *completion[: at + 1]]) + "\n"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 301}, "weights of a language model; missing, or of another shape: lm_head.weight, model.embed"),
        (
            {"vocab_size": 0, "input_size": 2},
            "a language model and its tokenizer: A language model needs a `vocab_size`",
        ),
        ({"num_heads": 5}, "a language model and its tokenizer: Class validation error"),
        ({"hiden_size": 8}, "a language model and its tokenizer: `hiden_size` is not a field of XLSTMConfig"),
    ],
    ids=["another vocabulary", "frames", "impossible", "unknown field"],
)
def test_a_checkpoint_that_is_no_language_model_is_refused(
    fields: dict[str, Any], message: str, checkpoint: Checkpoint, write: Callable[..., str], tmp_path: Path
) -> None:
    folder = changed(checkpoint.folder, tmp_path / "changed", "config.json", **fields)
    with pytest.raises(SystemExit) as refusal:
        write(folder, "--prompt", FIRST)
    assert message in str(refusal.value)


def test_a_checkpoint_without_a_language_models_head_or_configuration_is_refused(
    checkpoint: Checkpoint, write: Callable[..., str], tmp_path: Path
) -> None:
    folder = changed(checkpoint.folder, tmp_path / "changed", "config.json")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match=r"missing, or of another shape: lm_head\.weight\. Give"):
        write(folder, "--prompt", FIRST)
    (folder / "config.json").write_text("{", "utf-8")
    with pytest.raises(SystemExit, match=r"must hold a language model and its tokenizer: .*JSON"):
        write(folder, "--prompt", FIRST)


@pytest.mark.skipif("onednn" not in ops_products.WAYS, reason="needs oneDNN")
def test_weights_are_packed_where_that_can_be(
    checkpoint: Checkpoint, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    greedy = ["--dtype", "float32", "--temperature", "0", "--max_new_tokens", str(NEW)]
    command, texts = ["generate.py", str(checkpoint.folder), "--prompt", FIRST, *greedy], []
    monkeypatch.setattr(ops_products, "LEAST", 1)
    packed = Mock(wraps=ops_products.Packed)
    monkeypatch.setattr(ops_products, "Packed", packed)
    for flags in ([], ["--pack_weights"]):
        assert not packed.called
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        script.main()
        texts.append(capsys.readouterr().out)
    assert packed.called
    assert texts[0] == texts[1]
    monkeypatch.setattr(ops_products, "LEAST", 2**30)
    with pytest.raises(SystemExit, match="`--pack_weights` cannot be followed: `pack_weights` needs linear layers"):
        script.main()


def test_steps_are_compiled_on_request_unless_the_compiler_is_missing(
    checkpoint: Checkpoint, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    greedy, texts = ["--temperature", "0", "--max_new_tokens", str(NEW)], []
    steps = Mock(side_effect=lambda step, **_: step)
    monkeypatch.setattr(torch, "compile", steps)
    for flags in ([], ["--compile"]):
        assert not steps.called
        monkeypatch.setattr(sys, "argv", ["generate.py", str(checkpoint.folder), "--prompt", FIRST, *greedy, *flags])
        script.main()
        texts.append(capsys.readouterr().out)
    assert steps.call_count == 1
    assert texts[0] == texts[1]
    missing = InvalidCxxCompiler()
    steps.side_effect = lambda step, **_: Mock(side_effect=InductorError(missing, None))
    with pytest.raises(SystemExit) as stopped:
        script.main()
    expected = f"generate.py: `--compile` needs a C++ compiler: {missing}. Install one or leave it out."
    assert str(stopped.value) == expected
    steps.side_effect = lambda step, **_: Mock(side_effect=InductorError(RuntimeError("another"), None))
    with pytest.raises(InductorError, match="another"):
        script.main()


def test_it_ends_without_a_word_when_who_reads_its_output_has_enough(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "argv", ["generate.py", "folder", "--prompt", "a"])
    monkeypatch.setattr(script, "run", lambda arguments: print("text", flush=True))
    with open(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as end:
            script.main()
    assert end.value.code == 141
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2"),
        ("p.jsonl", b"plain\n", "line 1"),
        ("p.txt", b"\n \n", "must name a file with prompts in it"),
        ("p.txt", b"ab\xff", "has other bytes at position 2"),
    ],
    ids=["another key", "no JSON", "blank", "not UTF-8"],
)
def test_a_file_without_readable_prompts_is_refused(
    name: str, content: bytes, message: str, script: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(script.WrongInput, match=message):
        script.read_prompts(tmp_path / name)
