"""Checkpoints bring their code: they load, generate, train and save where neither our package nor triton exists.

One process without the package does everything that can be done with checkpoints saved here, and saves what it loaded;
a second one loads what the first saved. Each task reports its own failure, and each test reads one task.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checkout import PACKAGE, ROOT
from inputs import tiny_config, tiny_model
from safetensors.torch import load_file
from test_architecture import TRAVELLING
from tokenizers import Tokenizer, models, pre_tokenizers
from tolerances import assert_identical
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.dynamic_module_utils import get_relative_import_files

from modeling_xlstm import (
    XLSTMConfig,
    XLSTMForCausalLM,
    XLSTMForForecasting,
    XLSTMForSequenceClassification,
    XLSTMForTokenClassification,
    XLSTMModel,
)

CODE = {f"{name}.py" for name in TRAVELLING}
AUTO_MAP = {
    "AutoConfig": "configuration_xlstm.XLSTMConfig",
    "AutoModel": "modeling_xlstm.XLSTMModel",
    "AutoModelForCausalLM": "modeling_xlstm.XLSTMForCausalLM",
    "AutoModelForSequenceClassification": "modeling_xlstm.XLSTMForSequenceClassification",
    "AutoModelForTimeSeriesPrediction": "forecasting_xlstm.XLSTMForForecasting",
    "AutoModelForTokenClassification": "modeling_xlstm.XLSTMForTokenClassification",
}
PROMPT = "w3 w14 w15 w9 w26"

# What both processes do, sent to them as source: nothing below may name what this file imports.


def block(names: list[str]) -> dict[str, Any]:
    """Make packages that could be imported impossible to import."""
    import importlib.util
    import sys

    class Block:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name.split(".")[0] in names:
                raise ModuleNotFoundError(f"No module named {name!r}: blocked by the test", name=name)

    before = [importlib.util.find_spec(name) is not None for name in names]
    sys.meta_path.insert(0, Block())  # type: ignore[arg-type]
    after = []
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            after.append(str(error))
    return {"importable before": before, "error after": after}


def run_tasks(folder: Any, tasks: list[Callable[..., Any]], names: list[str]) -> None:
    """Run each task by itself and write what it returned or how it failed."""
    import json
    import sys
    import traceback

    report: dict[str, Any] = {"block": {"value": block(names)}}
    import torch

    torch.set_num_threads(1)
    for task in tasks:
        try:
            report[task.__name__] = {"value": task(folder)}
        except BaseException:
            report[task.__name__] = {"error": traceback.format_exc()}
    sources = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    # An editable installation leaves a module of its own, which only finds the package.
    ours = (source for source in sources if "__editable__" not in source)
    report["loaded"] = {"value": sorted(source for source in ours if "xlstm" in source.rsplit("/", 1)[-1])}
    with open(f"{folder}/report.json", "w") as file:
        json.dump(report, file)


def results(model: Any) -> dict[str, Any]:
    """What a model computes: two left-padded rows, their logits, or hidden states, and what it generates."""
    import torch

    model = model.eval()
    if model.main_input_name == "past_values":
        with torch.no_grad():
            return {"first": model(torch.linspace(0, 3, 12).sin().view(2, 6)).predictions.contiguous()}
    ids = torch.tensor([[3, 14, 15, 9, 26, 5], [0, 0, 35, 8, 9, 7]])
    mask = (ids != 0).long()
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask)
        found = {"first": outputs[0].contiguous()}
        if hasattr(model, "lm_head"):
            fixed = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5}
            found["greedy"] = model.generate(ids, do_sample=False, **fixed)
            found["beams"] = model.generate(ids, do_sample=False, num_beams=3, num_return_sequences=2, **fixed)
            # A second turn: the cache holds the first one, and one token more than it is new.
            cache = model(ids[:1], use_cache=True).past_key_values
            longer = torch.cat([ids[:1], torch.tensor([[17, 4, 21]])], 1)
            found["second turn"] = model.generate(
                longer, past_key_values=cache, do_sample=False, max_new_tokens=5, min_new_tokens=5
            )
            found["seen"] = torch.tensor(cache.get_seq_length())
    return found


def write_results(model: Any, path: str) -> str:
    from safetensors.torch import save_file

    save_file(results(model), path)
    return type(model).__module__ + "." + type(model).__name__


# Tasks of the first process


def refuse_without_trust(folder: Any) -> dict[str, str]:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

    loaders = {
        "AutoConfig": AutoConfig.from_pretrained,
        "AutoModel": AutoModel.from_pretrained,
        "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
        "pipeline": lambda path: pipeline("text-generation", model=path),
    }
    refusals = {}
    for name, load in loaders.items():
        try:
            refusals[name] = f"loaded {type(load(f'{folder}/lm'))}"
        except ValueError as error:
            refusals[name] = str(error)
    return refusals


def load_each_class(folder: Any) -> dict[str, str]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(f"{folder}/lm", trust_remote_code=True)
    loaded = {"config": f"{type(config).__module__}.{type(config).__name__}"}
    for name, auto in (
        ("base", "AutoModel"),
        ("lm", "AutoModelForCausalLM"),
        ("rows", "AutoModelForSequenceClassification"),
        ("tokens", "AutoModelForTokenClassification"),
        ("series", "AutoModelForTimeSeriesPrediction"),
        ("sharded", "AutoModelForCausalLM"),
    ):
        auto_class = getattr(transformers, auto)
        model = auto_class.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
        loaded[name] = write_results(model, f"{folder}/{name}.safetensors")
    return loaded


def load_a_language_model_as_every_class(folder: Any) -> dict[str, Any]:
    import transformers

    loaded = {}
    for auto in ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"):
        auto_class = getattr(transformers, auto)
        model, report = auto_class.from_pretrained(
            f"{folder}/lm", trust_remote_code=True, output_loading_info=True, num_labels=4
        )
        loaded[auto] = [type(model).__name__, sorted(report["missing_keys"])]
    return loaded


def draw_fresh_weights(folder: Any) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in ("lm", "base", "rows"):
        config = AutoConfig.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        save_file(model.state_dict(), f"{folder}/fresh_{name}.safetensors")


def save_and_load_twice(folder: Any) -> None:
    from transformers import AutoModelForCausalLM

    for source, target in (("lm", "lm2"), ("lm2", "lm3")):
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/{source}", trust_remote_code=True)
        model.save_pretrained(f"{folder}/{target}")
        write_results(model, f"{folder}/before_{target}.safetensors")


def turn_into_a_classifier(folder: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(f"{folder}/lm", trust_remote_code=True, num_labels=4)
    model.save_pretrained(f"{folder}/classifier")
    write_results(model, f"{folder}/before_classifier.safetensors")


def load_checkpoints_with_different_code(folder: Any) -> None:
    from transformers import AutoModelForCausalLM

    paths = {"own": f"{folder}/lm", "changed": f"{folder}/changed", "namesake": f"{folder}/other/lm"}
    loaded = {name: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True) for name, path in paths.items()}
    loaded["again"] = AutoModelForCausalLM.from_pretrained(paths["own"], trust_remote_code=True)
    for name, model in loaded.items():
        write_results(model, f"{folder}/code_{name}.safetensors")


def run_a_pipeline(folder: Any) -> list[Any]:
    from transformers import pipeline

    generate = pipeline("text-generation", model=f"{folder}/lm", trust_remote_code=True, device="cpu")
    return generate("w3 w14 w15 w9 w26", do_sample=False, max_new_tokens=5, min_new_tokens=5)


def train_and_resume(folder: Any) -> list[int]:
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    rows = [{"input_ids": torch.arange(3, 11) + i, "labels": torch.arange(3, 11) + i} for i in range(4)]
    steps = []
    for last, resume in ((1, None), (2, True)):
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/lm", trust_remote_code=True)
        arguments = TrainingArguments(
            f"{folder}/run", max_steps=last, save_steps=1, per_device_train_batch_size=2, use_cpu=True,
            report_to=[], disable_tqdm=True, learning_rate=0.01, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        steps.append(trainer.state.global_step)
    trainer.save_model(f"{folder}/trained")
    write_results(model, f"{folder}/before_trained.safetensors")
    return steps


# The task of the second process


def load_what_the_first_saved(folder: Any) -> dict[str, str]:
    import transformers

    loaded = {}
    for name, auto in (
        ("lm3", "AutoModelForCausalLM"),
        ("trained", "AutoModelForCausalLM"),
        ("run/checkpoint-2", "AutoModelForCausalLM"),
        ("classifier", "AutoModelForSequenceClassification"),
    ):
        model = getattr(transformers, auto).from_pretrained(f"{folder}/{name}", trust_remote_code=True)
        loaded[name] = write_results(model, f"{folder}/after_{name.replace('/', '_')}.safetensors")
    return loaded


FIRST = [
    refuse_without_trust,
    load_each_class,
    load_a_language_model_as_every_class,
    draw_fresh_weights,
    save_and_load_twice,
    turn_into_a_classifier,
    load_checkpoints_with_different_code,
    run_a_pipeline,
    train_and_resume,
]
SECOND = [load_what_the_first_saved]
ABSENT = ["modeling_xlstm", "triton"]


class Remote(NamedTuple):
    """What the processes without our package left behind, and what this one, which has it, computes."""

    folder: Path
    package: dict[str, bytes]
    reports: list[dict[str, Any]]
    here: dict[str, dict[str, Tensor]]

    def value(self, task: Callable[..., Any] | str) -> Any:
        name = task if isinstance(task, str) else task.__name__
        result = next(report[name] for report in self.reports if name in report)
        assert "error" not in result, f"in the process without our package:\n{result.get('error')}"
        return result["value"]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")


def make_checkpoints(folder: Path) -> dict[str, Any]:
    """One model of each class and style, saved; the language model also sharded and with changed code."""
    lm = tiny_model(XLSTMForCausalLM, "neurips", output_logit_soft_cap=30.0).float()
    made = {
        "lm": lm,
        "base": tiny_model(XLSTMModel, "large").float(),
        "rows": tiny_model(XLSTMForSequenceClassification, "residual", num_labels=3).float(),
        "tokens": tiny_model(XLSTMForTokenClassification, "large", num_labels=3).float(),
        "series": tiny_model(XLSTMForForecasting, "residual", vocab_size=0, input_size=1, prediction_length=3).float(),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
    lm.save_pretrained(folder / "sharded", max_shard_size="5KB")
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, 61)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "lm")

    # The same weights and configuration, with code whose soft cap gives twice as much, and so do its logits.
    for copy in (folder / "changed", folder / "other" / "lm"):
        shutil.copytree(folder / "lm", copy)
        source = (copy / "ops_lean.py").read_text("utf-8")
        assert source.count("cap * torch.tanh(x / cap)") == 1
        source = source.replace("cap * torch.tanh(x / cap)", "2.0 * cap * torch.tanh(x / cap)")
        (copy / "ops_lean.py").write_text(source, "utf-8")
    return made


def in_another_process(folder: Path, tasks: list[Callable[..., Any]], number: int) -> dict[str, Any]:
    """Run tasks where ABSENT cannot be imported, with empty caches, and read their report."""
    # Both could be imported there if nothing blocked them.
    stub = folder / "stub" / "triton"
    stub.mkdir(parents=True, exist_ok=True)
    (stub / "__init__.py").touch()
    functions = [block, run_tasks, results, write_results, *tasks]
    source = "\n".join(textwrap.dedent(inspect.getsource(function)) for function in functions)
    head = "from __future__ import annotations\nfrom collections.abc import Callable\nfrom typing import Any\n"
    call = f"run_tasks({str(folder)!r}, [{', '.join(task.__name__ for task in tasks)}], {ABSENT})\n"
    script = folder / f"process_{number}.py"
    script.write_text(f"{head}{source}if __name__ == '__main__':\n    {call}", "utf-8")
    paths = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(stub.parent)]),
        "HF_MODULES_CACHE": str(folder / f"m{number}"),
    }
    process = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder, env={**os.environ, **paths}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-5000:]
    return json.loads((folder / "report.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Remote:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("remote")
    package = {name: (PACKAGE / name).read_bytes() for name in CODE}
    made = make_checkpoints(folder)
    reports = [in_another_process(folder, tasks, number) for number, tasks in enumerate((FIRST, SECOND), 1)]
    return Remote(folder, package, reports, {name: results(model) for name, model in made.items()})


def code_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.py")}


def stored_auto_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "config.json").read_text("utf-8"))["auto_map"]


# What is saved


def test_the_code_that_travels_is_the_closure_of_the_model_file() -> None:
    closure = {Path(name).name for name in get_relative_import_files(PACKAGE / "modeling_xlstm.py")}
    assert closure | {"modeling_xlstm.py"} == CODE


@pytest.mark.parametrize("name", ["lm", "base", "rows", "tokens", "series", "sharded"])
def test_a_checkpoint_holds_exactly_that_code_and_names_every_auto_class(remote: Remote, name: str) -> None:
    assert code_of(remote.folder / name) == remote.package
    assert stored_auto_map(remote.folder / name) == AUTO_MAP


def test_the_sharded_checkpoint_has_shards(remote: Remote) -> None:
    index = json.loads((remote.folder / "sharded" / "model.safetensors.index.json").read_text("utf-8"))
    assert len(set(index["weight_map"].values())) > 3


# Without our package


def test_neither_our_package_nor_triton_was_there(remote: Remote) -> None:
    for number, report in enumerate(remote.reports, 1):
        assert report["block"]["value"]["importable before"] == [True, True]
        assert [name in error for name, error in zip(ABSENT, report["block"]["value"]["error after"], strict=True)] == [
            True,
            True,
        ]
        loaded = [Path(source) for source in report["loaded"]["value"]]
        assert {path.name for path in loaded} >= {"modeling_xlstm.py", "configuration_xlstm.py"}
        cache = remote.folder / f"m{number}"
        assert [path for path in loaded if cache not in path.parents] == []


def test_without_trust_it_raises_and_loads_nothing_else(remote: Remote) -> None:
    refusals = remote.value(refuse_without_trust)
    assert len(refusals) == 4
    for refusal in refusals.values():
        assert "trust_remote_code=True" in refusal


@pytest.mark.parametrize("name", ["lm", "base", "rows", "tokens", "series", "sharded"])
def test_every_auto_class_computes_the_same_to_the_last_bit(remote: Remote, name: str) -> None:
    """Logits or hidden states; for language models also greedy search, beam search and a cache that is given."""
    classes = {"base": "XLSTMModel", "rows": "XLSTMForSequenceClassification", "tokens": "XLSTMForTokenClassification"}
    classes["series"] = "XLSTMForForecasting"
    loaded = remote.value(load_each_class)
    assert loaded["config"].startswith("transformers_modules.")
    assert loaded[name].startswith("transformers_modules.")
    assert loaded[name].endswith("." + classes.get(name, "XLSTMForCausalLM"))
    assert_identical(remote.tensors(name), remote.here["lm" if name == "sharded" else name])


def test_what_was_generated_there_is_no_constant(remote: Remote) -> None:
    found = remote.here["lm"]
    assert found["greedy"].shape == (2, 11)
    assert found["beams"].shape == (4, 11)
    assert found["second turn"].shape == (1, 14)
    assert found["seen"] == 13  # all but the last token
    assert found["greedy"][:, 6:].unique().numel() > 2


def test_a_language_model_serves_every_other_class_too(remote: Remote) -> None:
    assert remote.value(load_a_language_model_as_every_class) == {
        "AutoModel": ["XLSTMModel", []],
        "AutoModelForSequenceClassification": ["XLSTMForSequenceClassification", ["score.weight"]],
        "AutoModelForTokenClassification": ["XLSTMForTokenClassification", ["score.bias", "score.weight"]],
    }


@pytest.mark.parametrize("name", ["lm", "base", "rows"])
def test_fresh_weights_are_drawn_as_with_the_package(remote: Remote, name: str) -> None:
    remote.value(draw_fresh_weights)
    config = XLSTMConfig.from_pretrained(remote.folder / name)
    torch.manual_seed(5)
    assert_identical(remote.tensors(f"fresh_{name}"), dict(XLSTMForCausalLM(config).state_dict()))


@pytest.mark.parametrize("name", ["lm2", "lm3"])
def test_saving_what_was_loaded_keeps_code_map_configuration_and_weights(remote: Remote, name: str) -> None:
    remote.value(save_and_load_twice)
    first, later = remote.folder / "lm", remote.folder / name
    assert code_of(later) == code_of(first)
    for file in ("config.json", "generation_config.json"):
        assert json.loads((later / file).read_text("utf-8")) == json.loads((first / file).read_text("utf-8"))
    assert_identical(load_file(later / "model.safetensors"), load_file(first / "model.safetensors"))
    assert_identical(remote.tensors(f"before_{name}"), remote.here["lm"])


def test_a_third_process_loads_the_second_save(remote: Remote) -> None:
    assert remote.value(load_what_the_first_saved)["lm3"].startswith("transformers_modules.")
    assert_identical(remote.tensors("after_lm3"), remote.here["lm"])


def test_a_classifier_made_from_a_language_model_keeps_its_code(remote: Remote) -> None:
    remote.value(turn_into_a_classifier)
    remote.value(load_what_the_first_saved)
    assert code_of(remote.folder / "classifier") == code_of(remote.folder / "lm")
    assert stored_auto_map(remote.folder / "classifier") == AUTO_MAP
    assert remote.tensors("after_classifier")["first"].shape == (2, 4)
    assert_identical(remote.tensors("after_classifier"), remote.tensors("before_classifier"))


@pytest.mark.parametrize("name", ["trained", "run/checkpoint-1", "run/checkpoint-2"])
def test_what_the_trainer_saves_keeps_its_code(remote: Remote, name: str) -> None:
    assert remote.value(train_and_resume) == [1, 2]
    assert code_of(remote.folder / name) == code_of(remote.folder / "lm")
    assert stored_auto_map(remote.folder / name) == AUTO_MAP


@pytest.mark.parametrize("name", ["trained", "run_checkpoint-2"])
def test_a_third_process_loads_what_was_trained_and_resumed(remote: Remote, name: str) -> None:
    remote.value(train_and_resume)
    remote.value(load_what_the_first_saved)
    assert_identical(remote.tensors(f"after_{name}"), remote.tensors("before_trained"))
    assert not torch.equal(remote.tensors("before_trained")["first"], remote.here["lm"]["first"])


@pytest.mark.parametrize(
    "name",
    [
        "changed",
        "namesake",
    ],
)
def test_a_checkpoint_with_other_code_runs_its_own(remote: Remote, name: str) -> None:
    """Only a file behind the model file differs."""
    remote.value(load_checkpoints_with_different_code)
    assert_identical(remote.tensors(f"code_{name}")["first"], 2 * remote.here["lm"]["first"])


@pytest.mark.parametrize("name", ["own", "again"])
def test_loading_other_code_changes_no_model_loaded_before_or_after(remote: Remote, name: str) -> None:
    remote.value(load_checkpoints_with_different_code)
    assert_identical(remote.tensors(f"code_{name}"), remote.here["lm"])


def test_the_pipeline_writes_the_same_text(remote: Remote) -> None:
    there = remote.value(run_a_pipeline)
    generate = pipeline("text-generation", model=remote.folder / "lm", device="cpu")
    here = generate(PROMPT, do_sample=False, max_new_tokens=5, min_new_tokens=5)
    assert there == here
    assert there[0]["generated_text"].startswith(PROMPT)
    assert len(there[0]["generated_text"].removeprefix(PROMPT).split()) == 5


# With our package


@pytest.mark.parametrize("trust", [None, False, True])
def test_with_our_package_trust_is_not_needed_and_changes_nothing(remote: Remote, trust: bool | None) -> None:
    options = {} if trust is None else {"trust_remote_code": trust}
    assert type(AutoConfig.from_pretrained(remote.folder / "lm", **options)) is XLSTMConfig
    for auto_class, name, model_class in (
        (AutoModel, "base", XLSTMModel),
        (AutoModelForCausalLM, "lm", XLSTMForCausalLM),
        (AutoModelForCausalLM, "sharded", XLSTMForCausalLM),
        (AutoModelForSequenceClassification, "rows", XLSTMForSequenceClassification),
        (AutoModelForTokenClassification, "tokens", XLSTMForTokenClassification),
        (AutoModelForTimeSeriesPrediction, "series", XLSTMForForecasting),
    ):
        model = auto_class.from_pretrained(remote.folder / name, **options)
        assert type(model) is model_class
        assert_identical(results(model), remote.here["lm" if name == "sharded" else name])


def test_with_our_package_what_another_process_saved_loads_too(remote: Remote) -> None:
    remote.value(save_and_load_twice)
    model = AutoModelForCausalLM.from_pretrained(remote.folder / "lm3")
    assert type(model) is XLSTMForCausalLM
    assert_identical(results(model), remote.here["lm"])
    assert AutoTokenizer.from_pretrained(remote.folder / "lm")(PROMPT)["input_ids"] == [3, 14, 15, 9, 26]


def test_a_configuration_saved_alone_carries_the_model_code_too(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    assert set(code_of(tmp_path)) == {f"{name}.py" for name in TRAVELLING}
    assert stored_auto_map(tmp_path) == {"AutoConfig": AUTO_MAP["AutoConfig"]}
