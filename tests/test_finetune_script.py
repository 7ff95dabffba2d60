"""scripts/finetune.py at tiny size: every method learns, and leaves what its readers read."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from inputs import tiny_config
from peft import PeftModel
from safetensors.torch import load_file
from test_trl import word_tokenizer
from tolerances import assert_identical
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from modeling_xlstm import XLSTMCache, XLSTMForCausalLM

# TRL and PEFT use Transformers' older names, which the newest Transformers warns about.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing(_disable|_enable)?` is deprecated:FutureWarning"
)
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
ROWS: dict[str, Any] = {
    "text": {"text": "w5 w6 w7 w8 w9 w5 w6 w7"},
    "completion": {"prompt": "w5 w6 w7 ", "completion": "w8 w9 w10 w11"},
    "messages": {"messages": [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8"}]},
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, in a folder with a checkpoint and examples of every kind."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    XLSTMForCausalLM(tiny_config("neurips")).save_pretrained("base")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("base")
    for kind, row in ROWS.items():
        Path(f"{kind}.jsonl").write_text((json.dumps(row) + "\n") * 8, "utf-8")
    import finetune

    return finetune


def tune(script: ModuleType, *words: str) -> None:
    flags = ["--output_dir", "out", "--max_steps", "10", "--learning_rate", "3e-2", "--use_cpu", "--report_to", "none"]
    script.run(*script.parse(["base", *flags, "--disable_tqdm", "true", "--save_strategy", "no", *words]))


def loss_on_text(model: Any, cache: XLSTMCache | None = None) -> float:
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 2]])
    with torch.no_grad():
        return float(model(ids, labels=ids, past_key_values=cache).loss)


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_without_a_gpu_the_documented_commands_are_understood(script: ModuleType) -> None:
    words = ["base", "--data", "text.jsonl", "--output_dir", "out"]
    _, settings, _ = script.parse(words)
    assert settings.bf16 is torch.accelerator.is_available() is not settings.use_cpu
    assert script.parse([*words, "--bf16"])[1].bf16


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["base", "--help"]], ids=str)
def test_the_help_names_the_checkpoint(
    words: list[str], script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        script.parse(words)
    text = capsys.readouterr().out
    assert "CHECKPOINT [--flag value ...]" in text
    assert "--data chats.jsonl \\\n        --method full" in text
    assert "--lora_r" in text


@pytest.mark.parametrize("method", ["full", "lora", "prompt", "state"])
def test_every_method_learns_the_examples_and_leaves_what_loads(method: str, script: ModuleType) -> None:
    tune(script, "--data", "text.jsonl", "--method", method)
    before = loss_on_text(load("base"))
    if method == "full":
        after = loss_on_text(load("out"))
    elif method != "state":
        after = loss_on_text(PeftModel.from_pretrained(load("base"), "out"))
    else:
        base = load("base")
        after = loss_on_text(base, XLSTMCache.load("out/state.safetensors", base.config))
    assert after < (0.95 if method == "prompt" else 0.9) * before


@pytest.mark.parametrize("method", ["lora", "prompt", "state"])
@pytest.mark.parametrize("kind", ["completion", "messages"])
def test_prompts_with_completions_and_chats_are_learnt_from(kind: str, method: str, script: ModuleType) -> None:
    tune(script, "--data", f"{kind}.jsonl", "--method", method, "--max_steps", "2")


@pytest.mark.parametrize("method", ["lora", "prompt", "state"])
def test_what_is_added_is_learnt_while_the_weights_stay_in_four_bits(method: str, script: ModuleType) -> None:
    trained: list[Any] = []
    kind = script.XLSTMTrainer if method == "state" else script.Tuning

    class Kept(kind):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            trained.append(self)

    # On CPUs with units for bfloat16, bitsandbytes multiplies by blocks of 64 numbers.
    XLSTMForCausalLM(tiny_config("neurips", hidden_size=64)).save_pretrained("base")
    setattr(script, kind.__name__, Kept)
    try:
        flags = ["--quantization", "bitsandbytes-4bit", "--logging_steps", "1"]
        tune(script, "--data", "text.jsonl", "--method", method, *flags)
    finally:
        setattr(script, kind.__name__, kind)
    (trainer,) = trained
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < (0.95 if method == "prompt" else 0.9) * losses[0]
    packed = [name for name, x in trainer.model.named_parameters() if hasattr(x, "quant_state")]
    assert packed
    assert not any(name.endswith(("lm_head.weight", "gate.weight")) for name in packed if "ogate" not in name)


def test_a_learnt_prompt_is_written_as_the_state_after_it(script: ModuleType) -> None:
    tune(script, "--data", "text.jsonl", "--method", "prompt", "--prompt_tokens", "5")
    base = load("base").eval()
    cache = XLSTMCache.load("out/state.safetensors", base.config)
    assert cache.get_seq_length() == 5
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones(1, 5 + 3, dtype=torch.long)
    written = base.generate(ids, past_key_values=cache, attention_mask=mask, **options)
    learnt = PeftModel.from_pretrained(load("base"), "out").eval()
    assert_identical(written, learnt.generate(input_ids=ids, attention_mask=mask[:, 5:], **options))


def test_of_a_prompt_nothing_is_learnt(script: ModuleType) -> None:
    row = script.encode(ROWS["completion"], word_tokenizer(), None)
    assert row == {"input_ids": [5, 6, 7, 8, 9, 10, 11, 2], "labels": [-100, -100, -100, 8, 9, 10, 11, 2]}
    assert script.encode(ROWS["completion"], word_tokenizer(), 2) == {"input_ids": [5, 6], "labels": [-100, -100]}


MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} {% endgeneration %}"
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_of_a_chat_the_answers_alone_can_be_learnt(
    packing: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("marked.jinja").write_text(MARKED, "utf-8")
    seen: list[Any] = []
    compute_loss = script.SFTTrainer.compute_loss

    def keep(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({name: x.tolist() for name, x in inputs.items() if isinstance(x, torch.Tensor)})
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(script.SFTTrainer, "compute_loss", keep)
    flags = ["--method", "full", "--max_steps", "1", "--assistant_only_loss", "true", "--packing", packing]
    tune(script, "--data", "messages.jsonl", "--chat_template_path", "marked.jinja", "--max_length", "8", *flags)
    row = seen[0]
    if packing == "false":
        assert row["labels"][0] == [-100, -100, 7, 8]
        return
    # All chats in one row, which the model takes apart where positions begin again.
    assert row["input_ids"][0][:8] == 2 * [5, 6, 7, 8]
    assert row["labels"][0][:8] == 2 * [-100, -100, 7, 8]
    assert row["position_ids"][0][:8] == 2 * [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "text.jsonl", "--method", "state", "--packing", "true"], "`--packing` does not apply to --method"),
        (
            ["--data", "text.jsonl", "--method", "prompt", "--packing", "true"],
            "row starts with the prompt. Leave it out",
        ),
        (
            ["--data", "text.jsonl", "--method", "full", "--quantization", "torchao-int8"],
            "weights that cannot be trained; got --method full. Use lora",
        ),
        (["--data", "messages.jsonl", "--chat_template_path", "no.jinja"], "must name a .jinja file; no.jinja is none"),
        (["--data", "none.jsonl"], "`--data` must name files; got none.jsonl"),
        (["--data", "broken.jsonl"], "`--data` must name .jsonl files; "),
        (["--data", "blank.jsonl"], "the text of all 2 is empty"),
        (
            ["--data", "completion.jsonl", "--method", "state", "--max_length", "1"],
            "all 8 examples are empty, or",
        ),
        (["--data", "text.jsonl", "--method", "state", "--lora_r", "3"], "`--lora_r` applies to --method lora; got"),
        (["--data", "text.jsonl", "--lora_r", "0"], "`--lora_r` must be at least 1; got 0"),
        (
            ["--data", "text.jsonl", "--resume_from_checkpoint", "no"],
            "a folder that a training wrote, such as OUT/checkpoint-100",
        ),
        (["--data", "text.jsonl", "--foo"], "`--foo` is no flag"),
        (["--method", "full"], "`--data` must name files; got none"),
        (["--data", "both.jsonl"], r"not more than one of these kinds; got \['text', 'prompt', 'completion'\]"),
        (["--data", "null.jsonl"], "`text` in row 2 of `--data` must be text; got None"),
        (["--data", "number.jsonl"], "`text` in row 1 of `--data` must be text; got 5"),
        (["--data", "chat.jsonl"], "`messages` in row 1 of `--data` must be a list of messages.* got 'w5'"),
        (["--data", "text.jsonl", "--max_length", "0"], "`--max_length` must be at least 1; got 0"),
        (["--data", "text.jsonl", "--learning_rate", "-1"], "`--learning_rate` must be at least 0; got -1"),
        (["--data", "text.jsonl", "--dataset_text_field", "body"], "`--dataset_text_field` must be text, as in the"),
        (["--data", "text.jsonl", "--eval_strategy", "steps"], "cannot be followed: .*eval_dataset"),
        (
            ["--data", "text.jsonl", "--method", "state", "--eval_strategy", "steps"],
            "cannot be followed: .*eval_dataset",
        ),
        (
            ["--data", "text.jsonl", "--method", "prompt", "--label_smoothing_factor", "0.1"],
            "`--label_smoothing_factor` does not apply to --method prompt",
        ),
        (
            ["--data", "completion.jsonl", "--method", "state", "--completion_only_loss", "false"],
            "`--completion_only_loss` does not apply to --method state",
        ),
        (["--data", "text.jsonl", "--method", "state", "--loss_type", "dft"], "`--loss_type` does not apply to"),
        (
            ["--data", "text.jsonl", "--method", "state", "--neftune_noise_alpha", "5"],
            "`--neftune_noise_alpha` does not apply to",
        ),
        (["--data", "talks.jsonl", "--method", "state"], "`prompt` and `completion` must be text; got messages"),
        (["--data", "completion.jsonl", "--method", "full", "--max_length", "2"], "all 8 examples are empty, or"),
        (["--data", "halves.jsonl"], "must all be text, or all messages; got both"),
        (["--data", "text.jsonl", "--output_dir", "text.jsonl"], "`--output_dir` must name a folder that can be made"),
        (["--data", "other.jsonl"], r"must hold `text`, .* not more than one of these kinds; got \['body'\]"),
    ],
)
def test_examples_that_cannot_be_learnt_from_are_refused(words: list[str], message: str, script: ModuleType) -> None:
    Path("other.jsonl").write_text('{"body": "w5"}\n', "utf-8")
    Path("blank.jsonl").write_text('{"text": ""}\n{"text": " "}\n', "utf-8")
    Path("broken.jsonl").write_text('{"text": "w5', "utf-8")
    rows = {
        "both": [{**ROWS["text"], **ROWS["completion"]}],
        "null": [{"text": "w5"}, {"text": None}],
        "number": [{"text": 5}],
        "chat": [{"messages": "w5"}],
        "halves": [{**ROWS["completion"], "completion": ROWS["messages"]["messages"][1:]}],
        "talks": [{"prompt": ROWS["messages"]["messages"][:1], "completion": ROWS["messages"]["messages"][1:]}],
    }
    for name, lines in rows.items():
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    with pytest.raises(script.WrongInput, match=message):
        tune(script, *words)


@pytest.mark.parametrize("method", ["full", "state"])
@pytest.mark.parametrize(
    ("message", "why"),
    [({"role": "assistant", "tool_calls": []}, "has no attribute 'content'"), ({"content": ["w5"]}, "concatenate")],
    ids=["calls", "parts"],
)
def test_chats_that_the_template_cannot_write_are_refused(
    message: dict[str, Any], why: str, method: str, script: ModuleType
) -> None:
    Path("joined.jinja").write_text("{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}", "utf-8")
    Path("chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", **message}]}), "utf-8")
    with pytest.raises(script.WrongInput, match=f"rows cannot be followed: .*{why}"):
        tune(script, "--data", "chats.jsonl", "--chat_template_path", "joined.jinja", "--method", method)


def test_chats_without_an_answer_to_learn_are_refused(script: ModuleType) -> None:
    Path("marked.jinja").write_text(MARKED, "utf-8")
    Path("asked.jsonl").write_text(json.dumps({"messages": ROWS["messages"]["messages"][:1]}), "utf-8")
    with pytest.raises(script.WrongInput, match=r"rows cannot be followed: .*no assistant tokens"):
        tune(script, "--data", "asked.jsonl", "--chat_template_path", "marked.jinja", "--assistant_only_loss")


def test_a_checkpoint_that_is_none_is_refused(script: ModuleType) -> None:
    with pytest.raises(script.WrongInput, match=r"first word must name a checkpoint's folder, or .*; nowhere"):
        script.run(*script.parse(["nowhere", "--data", "text.jsonl", "--use_cpu"]))


@pytest.mark.parametrize("method", ["full", "lora", "prompt", "state"])
def test_an_adapter_is_no_model_to_tune(method: str, script: ModuleType) -> None:
    tune(script, "--data", "text.jsonl", "--method", "lora", "--max_steps", "1", "--output_dir", "adapter")
    words = ["--data", "text.jsonl", "--method", method, "--max_steps", "1", "--use_cpu", "--report_to", "none"]
    with pytest.raises(script.WrongInput, match="must name a model; adapter holds an adapter of one"):
        script.run(*script.parse(["adapter", *words]))


def test_an_adapter_is_no_checkpoint_to_write_with(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import generate

    tune(script, "--data", "text.jsonl", "--method", "lora", "--max_steps", "1")
    monkeypatch.setattr(sys, "argv", ["generate.py", "out", "--prompt", "w5"])
    with pytest.raises(SystemExit, match=r"out has no config\.json\. It holds an adapter: merge that into its model"):
        generate.main()


def test_a_chat_has_one_end_token_whether_its_template_writes_it_or_not(script: ModuleType) -> None:
    tokenizer, row = word_tokenizer(), ROWS["messages"]
    encoded = []
    for template in (TEMPLATE, TEMPLATE + "{{ eos_token }}"):
        tokenizer.chat_template = template
        encoded.append(script.encode(row, tokenizer, None)["input_ids"])
    assert encoded[0] == encoded[1]
    assert encoded[0].count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("kind", ROWS)
def test_columns_that_are_not_learnt_from_change_nothing(kind: str, script: ModuleType) -> None:
    foreign = {"labels": 1, "input_ids": [7, 7], "attention_mask": [1, 0], "id": "a"}
    of_chats = {"chat_template_kwargs": {"more": "w9"}} if kind == "messages" else {"tools": "saws"}
    Path("foreign.jsonl").write_text((json.dumps({**ROWS[kind], **foreign, **of_chats}) + "\n") * 8, "utf-8")
    assert {"labels", "id"}.isdisjoint(script.read_examples(["foreign.jsonl"]).column_names)
    for data in (kind, "foreign"):
        tune(script, "--data", f"{data}.jsonl", "--method", "full", "--max_steps", "2", "--output_dir", data)
    assert_identical(load_file(f"{kind}/model.safetensors"), load_file("foreign/model.safetensors"))


@pytest.mark.parametrize("as_text", [False, True])
def test_the_template_of_a_chat_is_given_tools_and_options_of_the_row(as_text: bool, script: ModuleType) -> None:
    tools: Any = [{"type": "function", "function": {"name": "w9"}}]
    row = {**ROWS["messages"], "tools": json.dumps(tools) if as_text else tools}
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ tools[0].function.name if tools }} {{ more }} " + TEMPLATE
    assert script.encode({**row, "chat_template_kwargs": {"more": "w10"}}, tokenizer, 4)["input_ids"] == [9, 10, 5, 6]
    assert script.encode({**row, "chat_template_kwargs": None}, tokenizer, 3)["input_ids"] == [9, 5, 6]
    assert script.encode({**row, "tools": None}, tokenizer, 2)["input_ids"] == [5, 6]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_fine_tuning_goes_on_from_a_checkpoint_to_its_last_step(method: str, script: ModuleType) -> None:
    words = ["--data", "text.jsonl", "--method", method, "--save_strategy", "steps", "--save_steps", "5"]
    words += ["--lr_scheduler_type", "constant", "--per_device_train_batch_size", "3"]
    weights = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    tune(script, *words)
    Path("out").rename("whole")
    for stop, written in (("5", ["checkpoint-10"]), ("10", [])):
        tune(script, *words, "--resume_from_checkpoint", f"whole/checkpoint-{stop}")
        assert [path.name for path in Path("out").glob("checkpoint-*")] == written
        assert_identical(load_file(f"out/{weights}"), load_file(f"whole/{weights}"))
        shutil.rmtree("out")


def test_chats_without_a_template_are_refused(script: ModuleType) -> None:
    word_tokenizer().save_pretrained("base")
    Path("base/chat_template.jinja").unlink()
    with pytest.raises(script.WrongInput, match=r"no chat template\. Name one with --chat_template_path"):
        tune(script, "--data", "messages.jsonl")


def test_a_library_that_is_missing_is_refused_by_name(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", raises_missing)
    with pytest.raises(script.WrongInput, match="`--quantization` cannot be followed: 'torchao-int8' needs"):
        script.load_model("base", *script.parse(["base", "--use_cpu", "--quantization", "torchao-int8"])[1:])


def raises_missing(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_a_checkpoint_must_be_named_first(script: ModuleType) -> None:
    with pytest.raises(script.WrongInput, match="first word must name a checkpoint; got --data"):
        script.parse(["--data", "x"])


def test_dpo_prefers_what_was_chosen(tmp_path: Path, script: ModuleType) -> None:
    from datasets import Dataset

    rows = {"prompt": "w5 w6 ", "chosen": "w7 w8 w9", "rejected": "w10 w11 w12"}
    arguments = DPOConfig(
        "dpo", max_steps=5, learning_rate=1e-2, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True,
        bf16=False, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list([rows] * 8)
    trainer = DPOTrainer(load("base"), args=arguments, train_dataset=data, processing_class=word_tokenizer())
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"]
