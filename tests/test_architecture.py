"""The house: arrows that only point down, imports that travel with a checkpoint, small functions, nothing global.

Every rule is shown to fail on a planted violation at the end of this file. docs/architecture.md gives the reasons.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from checkout import PACKAGE, ROOT
from transformers.dynamic_module_utils import get_imports, get_relative_imports


class Module(NamedTuple):
    layer: int
    ours: set[str]  # modules of the package it may import
    others: set[str]  # third parties it may import; the standard library is free


HOME = 10  # stays with the package; everything below it travels with every checkpoint
CONFIG, STATES, COMMON, TOKENS = "configuration_xlstm", "states_xlstm", "ops_common", "tokens_xlstm"
LEAN, LINEAR, PRODUCTS = "ops_lean", "ops_linear", "ops_products"
TRAVELLING = {
    CONFIG: Module(0, set(), {"transformers", "huggingface_hub"}),
    STATES: Module(0, set(), {"torch"}),
    COMMON: Module(0, set(), {"torch", "numpy"}),
    PRODUCTS: Module(0, set(), {"torch"}),
    LINEAR: Module(1, {COMMON, PRODUCTS}, {"torch"}),
    LEAN: Module(2, {COMMON, LINEAR}, {"torch"}),
    TOKENS: Module(0, set(), {"torch"}),
    "ops_mlstm_reference": Module(1, {STATES, COMMON}, {"torch"}),
    "ops_slstm_reference": Module(1, {STATES, COMMON}, {"torch"}),
    "ops_mlstm_weights": Module(0, set(), {"torch"}),
    "ops_mlstm_tokens": Module(0, set(), {"torch"}),
    "ops_mlstm_chunks": Module(1, {COMMON, "ops_mlstm_weights", "ops_mlstm_tokens"}, {"torch"}),
    "ops_mlstm_torch": Module(2, {STATES, COMMON, "ops_mlstm_weights", "ops_mlstm_chunks"}, {"torch"}),
    "ops_slstm_torch": Module(1, {STATES, COMMON}, {"torch", "numpy"}),
    "ops_mlstm_triton_fwd": Module(0, set(), {"triton"}),
    "ops_mlstm_triton_bwd": Module(1, {"ops_mlstm_triton_fwd"}, {"triton"}),
    "ops_mlstm_triton": Module(
        2, {STATES, COMMON, "ops_mlstm_triton_fwd", "ops_mlstm_triton_bwd"}, {"torch", "triton"}
    ),
    "ops_mlstm": Module(
        3, {STATES, COMMON, LEAN, "ops_mlstm_reference", "ops_mlstm_torch", "ops_mlstm_triton"}, {"torch"}
    ),
    "ops_slstm_triton_kernels": Module(0, set(), {"triton"}),
    "ops_slstm_triton": Module(2, {STATES, COMMON, "ops_slstm_triton_kernels"}, {"torch", "triton"}),
    "ops_slstm": Module(3, {STATES, COMMON, "ops_slstm_reference", "ops_slstm_torch", "ops_slstm_triton"}, {"torch"}),
    "layers_xlstm": Module(
        4, {CONFIG, STATES, COMMON, LEAN, LINEAR, "ops_mlstm", "ops_slstm"}, {"torch", "transformers"}
    ),
    "blocks_xlstm": Module(5, {CONFIG, STATES, "layers_xlstm"}, {"torch", "transformers"}),
    "statefile_xlstm": Module(1, {CONFIG, STATES}, {"torch", "safetensors"}),
    "cache_xlstm": Module(5, {CONFIG, STATES, "statefile_xlstm"}, {"torch", "transformers"}),
    "debug_xlstm": Module(5, {STATES}, {"torch"}),
    "step_parts_xlstm": Module(
        6, {STATES, PRODUCTS, "ops_mlstm_weights", "layers_xlstm", "blocks_xlstm"}, {"torch", "numpy"}
    ),
    "step_xlstm": Module(
        7, {STATES, COMMON, LINEAR, "layers_xlstm", "blocks_xlstm", "step_parts_xlstm"}, {"torch", "numpy"}
    ),
    "pretrained_xlstm": Module(5, {CONFIG, PRODUCTS, "layers_xlstm"}, {"torch", "transformers"}),
    "decoding_xlstm": Module(6, {STATES, LINEAR, "cache_xlstm"}, {"torch", "transformers"}),
    "modeling_xlstm": Module(
        8,
        {
            CONFIG,
            STATES,
            LEAN,
            LINEAR,
            TOKENS,
            "layers_xlstm",
            "blocks_xlstm",
            "step_xlstm",
            "cache_xlstm",
            "debug_xlstm",
        }
        | {"decoding_xlstm", "pretrained_xlstm"},
        {"torch", "transformers"},
    ),
    "forecasting_xlstm": Module(
        9, {CONFIG, TOKENS, "cache_xlstm", "modeling_xlstm", "pretrained_xlstm"}, {"torch", "transformers"}
    ),
}
MODULES = {
    **TRAVELLING,
    "links_xlstm": Module(HOME, {CONFIG}, {"torch"}),
    "conversion_xlstm": Module(HOME + 1, {CONFIG, "links_xlstm"}, {"torch"}),
    "serving_xlstm": Module(HOME, {"cache_xlstm", "modeling_xlstm"}, {"torch", "transformers"}),
    "training_xlstm": Module(HOME, {"cache_xlstm", CONFIG, TOKENS}, {"torch", "transformers"}),
    "tuning_xlstm": Module(HOME, {"cache_xlstm", STATES, TOKENS}, {"torch"}),
    "quantization_xlstm": Module(HOME, set(), {"torch", "transformers", "torchao"}),
    "costs_xlstm": Module(HOME, {CONFIG, LINEAR, "layers_xlstm", "modeling_xlstm"}, {"torch"}),
    "gates_xlstm": Module(HOME, {STATES, LEAN}, {"torch"}),
    "memory_xlstm": Module(HOME, {CONFIG, STATES, COMMON, "modeling_xlstm"}, {"torch"}),
    "recurrent_xlstm": Module(HOME, {STATES, COMMON, "ops_mlstm", "ops_slstm", "layers_xlstm"}, {"torch"}),
    "sequence_xlstm": Module(HOME, {CONFIG, TOKENS, "modeling_xlstm", "forecasting_xlstm"}, {"torch"}),
    "forecasting_cells": Module(HOME + 1, {STATES, COMMON, "recurrent_xlstm"}, {"torch"}),
    "__init__": Module(
        HOME + 1,
        {CONFIG, STATES, "cache_xlstm", "modeling_xlstm", "forecasting_xlstm", "ops_mlstm", "ops_slstm"}
        | {"conversion_xlstm", "serving_xlstm", "recurrent_xlstm", "sequence_xlstm"},
        {"torch", "transformers"},
    ),
}
TABLE = "the table MODULES in tests/test_architecture.py and the one in docs/architecture.md"

# A checkpoint's code and the installed package hold two classes of each of these names: an object of one is no
# instance of the other.
LOADED_TWICE = {"XLSTMConfig", "XLSTMCache", "LayerState", "MLSTMState", "SLSTMState"}

FUNCTION_LINES, KERNEL_LINES = 40, 120
MODULE_LINES, TRITON_LINES = 500, 800
ARGUMENTS = 13

Fault = tuple[int, str]
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


class Source:
    """One module as the rules see it."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.stem
        self.text = path.read_text("utf-8")
        self.tree = ast.parse(self.text)
        self.row = MODULES[self.name] if self.name in MODULES else Module(HOME, set(), set())

    def walk(self, *kinds: type) -> Iterator[ast.AST]:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))

    def runs(self, node: ast.AST) -> bool:
        """Whether a statement stands outside every `if TYPE_CHECKING`."""
        guards = (found for found in ast.walk(self.tree) if isinstance(found, ast.If))
        return not any(ast.unparse(guard.test) == "TYPE_CHECKING" and node in guard.body for guard in guards)


# The arrows that point up, under TYPE_CHECKING, for Transformers' scanner and not for Python.
NEVER_RUN = {(CONFIG, "modeling_xlstm"), (CONFIG, "forecasting_xlstm")}


def arrows(source: Source) -> Iterator[Fault]:
    for node in source.walk(ast.ImportFrom):
        if (source.name, node.module) in NEVER_RUN and not source.runs(node):
            continue
        if node.level == 1 and node.module not in source.row.ours:
            yield node.lineno, f"may not import `{node.module}`; if the arrow points down, add it to {TABLE}"


def spellings(source: Source) -> Iterator[Fault]:
    """Only `from .module import name`, alone on its line, is copied into a checkpoint."""
    seen_by_python = set()
    for node in source.walk(ast.ImportFrom, ast.Import):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.level:
            seen_by_python.add(names[0])
            flat = node.level == 1 and names[0] and "." not in names[0]
            if not flat or any(alias.name == "*" for alias in node.names):
                yield node.lineno, "a relative import must read `from .module import name`"
        elif any(name.split(".")[0] == "modeling_xlstm" for name in names):
            yield node.lineno, "the package imports itself by name; write `from .module import name`"
    for node in source.walk(ast.Call):
        if ast.unparse(node.func).split(".")[-1] in ("__import__", "import_module"):
            yield node.lineno, "an import by string does not travel"
    if (seen := set(get_relative_imports(source.path))) != seen_by_python:
        unlike = sorted(seen ^ seen_by_python)
        yield 1, f"Transformers' scanner and Python disagree on {unlike}: a docstring line or a `;`?"


def third_parties(source: Source) -> Iterator[Fault]:
    free = sys.stdlib_module_names | {"modeling_xlstm"}
    for node in source.walk(ast.ImportFrom, ast.Import):
        if isinstance(node, ast.ImportFrom):
            names = [] if node.level else [node.module or ""]
        else:
            names = [alias.name for alias in node.names]
        for name in names:
            if (top := name.split(".")[0]) not in source.row.others | free:
                yield node.lineno, f"may not import `{top}`; see {TABLE}"
    if "triton" in get_imports(source.path):
        yield 1, "`import triton` outside `try`: a checkpoint with this file is refused where triton is absent"


def global_names(source: Source) -> Iterator[Fault]:
    """torch.library: loading a second checkpoint silently replaces the first one's operator."""
    banned = {"torch.library", "torch.ops.xlstm"}
    for node in source.walk(ast.Attribute, ast.ImportFrom, ast.Import):
        if isinstance(node, ast.Attribute):
            names = {ast.unparse(node)}
        elif isinstance(node, ast.ImportFrom):
            names = {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        else:
            names = {alias.name for alias in node.names}
        if names & banned:
            yield node.lineno, "names in torch.library are global; use autograd.Function"
    for node in source.walk(ast.Global):
        yield node.lineno, "`global`: values go down as arguments and come back as results"


def class_tests(source: Source) -> Iterator[Fault]:
    for node in source.walk(ast.Call, ast.Compare, ast.MatchClass):
        if isinstance(node, ast.Call):
            asked = ast.unparse(node.func) in ("isinstance", "issubclass")
            classes = ast.walk(node.args[1]) if asked and len(node.args) == 2 else iter(())
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asked = any(ast.unparse(side).startswith("type(") for side in sides)
            classes = (part for side in sides for part in ast.walk(side)) if asked else iter(())
        else:
            classes = iter([node.cls])
        if tested := LOADED_TWICE & {getattr(part, "id", getattr(part, "attr", None)) for part in classes}:
            yield node.lineno, f"tests for {sorted(tested)}, of which a checkpoint brings its own copy"


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def sizes(source: Source) -> Iterator[Fault]:
    limit = TRITON_LINES if "_triton" in source.name else MODULE_LINES
    if (lines := len(source.text.splitlines())) > limit:
        yield lines, f"{lines} lines; a module has {limit} at most"
    for node in source.walk(*Function):
        kernel = node.name.startswith("_") and node.name.endswith("_kernel")
        limit = KERNEL_LINES if kernel else FUNCTION_LINES
        if (lines := body_lines(node)) > limit:
            yield node.lineno, f"`{node.name}` has {lines} lines; {limit} at most"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(argument.arg not in ("self", "cls", "ctx") for argument in arguments)
        # A kernel takes a pointer and the strides of every tensor one by one.
        if count > ARGUMENTS and not kernel:
            yield node.lineno, f"`{node.name}` takes {count} arguments; {ARGUMENTS} at most"


def memories(source: Source) -> Iterator[Fault]:
    """Nothing is remembered on `self` in forward."""
    for method in source.walk(*Function):
        if method.name != "forward" or not method.args.args or method.args.args[0].arg != "self":
            continue
        for node in ast.walk(method):
            root = node
            while isinstance(root, (ast.Attribute, ast.Subscript)):
                root = root.value
            stored = isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)) and root is not node
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "object.__setattr__"):
                stored, root = True, node.args[0]
            if stored and isinstance(root, ast.Name) and root.id == "self":
                yield node.lineno, "sets an attribute on self in forward; give it back as a result"


RULES: tuple[Callable[[Source], Iterator[Fault]], ...] = (
    arrows,
    spellings,
    third_parties,
    global_names,
    class_tests,
    sizes,
    memories,
)


def faults(path: Path, rule: Callable[[Source], Iterator[Fault]]) -> list[str]:
    return [f"{path.name}:{line}: {what}" for line, what in rule(Source(path))]


def test_the_table_names_exactly_the_modules_that_exist() -> None:
    exist = {path.stem for path in PACKAGE.glob("*.py")}
    assert not exist - set(MODULES), f"add {sorted(exist - set(MODULES))} to {TABLE}"
    assert not set(MODULES) - exist, f"take {sorted(set(MODULES) - exist)} out of {TABLE}"


def test_the_page_holds_the_same_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \((\w+)\) \|.*\| ([^|]*) \|$", page, re.MULTILINE)
    told = {name: (layer, set(re.findall(r"`(\w+)`", arrows))) for name, layer, arrows in rows}
    assert told == {name: ("home" if row.layer >= HOME else str(row.layer), row.ours) for name, row in MODULES.items()}


def test_every_arrow_of_the_table_is_taken() -> None:
    for path in PACKAGE.glob("*.py"):
        taken = {node.module for node in Source(path).walk(ast.ImportFrom) if node.level == 1}
        assert MODULES[path.stem].ours <= taken, path.stem


def test_every_allowed_arrow_points_down() -> None:
    up = [(name, to) for name, row in MODULES.items() for to in row.ours if MODULES[to].layer >= row.layer]
    assert [arrow for arrow in up if arrow != ("__init__", "conversion_xlstm")] == []


def test_no_travelling_module_may_import_one_that_stays_home() -> None:
    assert set().union(*(row.ours for row in TRAVELLING.values())) <= set(TRAVELLING)


def test_the_two_op_families_and_transformers_stay_apart() -> None:
    for name, row in MODULES.items():
        if name.startswith("ops_"):
            assert "transformers" not in row.others
            assert not {
                to
                for to in row.ours
                if to.startswith("ops_") and to[4] != name[4] and to not in (COMMON, LEAN, LINEAR, PRODUCTS)
            }


def test_the_package_is_flat_and_holds_only_python() -> None:
    strangers = [path.name for path in PACKAGE.iterdir() if path.suffix != ".py" and path.name != "__pycache__"]
    assert not strangers, f"only .py files travel with a checkpoint, and only from one folder; found {strangers}"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule: Callable[[Source], Iterator[Fault]]) -> None:
    known = [path for path in sorted(PACKAGE.glob("*.py")) if path.stem in MODULES]
    found = [fault for path in known for fault in faults(path, rule)]
    assert not found, "\n".join(found)


LONG = "def f():\n    '''Doc.\n\n    More.\n    '''\n" + "    x = 1\n" * 41
PLANTED = [
    (arrows, "ops_mlstm", "from .ops_slstm_reference import slstm_recurrent"),
    (arrows, "states_xlstm", "def f():\n    from .layers_xlstm import HeadNorm"),
    (arrows, "modeling_xlstm", "try:\n    from .conversion_xlstm import convert_to\nexcept ImportError:\n    pass"),
    (spellings, "layers_xlstm", "from . import ops_mlstm"),
    (spellings, "layers_xlstm", "from .kernels.mlstm import f"),
    (arrows, "layers_xlstm", "from .kernels import f"),
    (spellings, "layers_xlstm", "from ..states_xlstm import MLSTMState"),
    (spellings, "layers_xlstm", "from .states_xlstm import *"),
    (spellings, "layers_xlstm", "from modeling_xlstm.states_xlstm import MLSTMState"),
    (spellings, "layers_xlstm", "import modeling_xlstm.states_xlstm"),
    (spellings, "layers_xlstm", "from .states_xlstm import A; from .ops_mlstm import mlstm"),
    (spellings, "layers_xlstm", "import importlib\nimportlib.import_module('.ops_mlstm', __package__)"),
    (spellings, "layers_xlstm", "'''Docstring.\n\nfrom .elsewhere import f\n'''"),
    (third_parties, "layers_xlstm", "import einops"),
    (third_parties, "ops_mlstm", "def f():\n    from transformers.utils import logging"),
    (third_parties, "configuration_xlstm", "try:\n    import torch.nn\nexcept ImportError:\n    pass"),
    (third_parties, "layers_xlstm", "def f():\n    try:\n        import triton\n    except ImportError:\n        pass"),
    (global_names, "ops_mlstm", "import torch\n@torch.library.custom_op('xlstm::f', mutates_args=())\ndef f(): ..."),
    (global_names, "ops_mlstm", "from torch.library import custom_op"),
    (global_names, "ops_mlstm", "from torch import library"),
    (global_names, "ops_mlstm", "def f():\n    global g\n    g = 1"),
    (class_tests, "modeling_xlstm", "isinstance(config, XLSTMConfig)"),
    (class_tests, "modeling_xlstm", "isinstance(cache, (dict, cache_xlstm.XLSTMCache))"),
    (class_tests, "modeling_xlstm", "type(state) is MLSTMState"),
    (class_tests, "modeling_xlstm", "match cache:\n    case XLSTMCache():\n        pass"),
    (sizes, "layers_xlstm", LONG),
    (sizes, "layers_xlstm", "x = 1\n" * 501),
    (sizes, "ops_mlstm_triton", "x = 1\n" * 801),
    (sizes, "layers_xlstm", f"def f({', '.join(f'a{i}' for i in range(11))}, *, b, c, d): ..."),
    (memories, "layers_xlstm", "class A:\n    def forward(self, x):\n        self.x = x"),
    (memories, "layers_xlstm", "class A:\n    def forward(self, x):\n        self.x[0], y = x"),
    (memories, "layers_xlstm", "class A:\n    def forward(self, x):\n        self.a.count += 1"),
    (memories, "layers_xlstm", "class A:\n    def forward(self, x):\n        setattr(self, 'x', x)"),
    (memories, "layers_xlstm", "class A:\n    def forward(self, x):\n        for self.x in x: pass"),
]


@pytest.mark.parametrize(("rule", "name", "text"), PLANTED, ids=lambda part: getattr(part, "__name__", None))
def test_a_planted_violation_is_found(
    rule: Callable[[Source], Iterator[Fault]], name: str, text: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.py"
    path.write_text(text, "utf-8")
    assert faults(path, rule)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ops_mlstm", "def f():\n    from .ops_mlstm_reference import (\n        mlstm_recurrent,\n    )"),
        ("ops_mlstm", "import math\nfrom collections.abc import Mapping\nimport torch.nn.functional as F"),
        ("ops_mlstm_triton", "try:\n    pass\nexcept ImportError:\n    pass\n" + "x = 1\n" * 700),
        ("ops_mlstm_triton", f"def _mlstm_fwd_kernel({', '.join(f'a{i}' for i in range(30))}): ..."),
        ("layers_xlstm", LONG.replace("    x = 1\n", "", 1)),
        (
            "layers_xlstm",
            "class A:\n    def __init__(self, x):\n        self.x = x\n    def forward(self, x): y = self.x",
        ),
        ("layers_xlstm", "class F:\n    @staticmethod\n    def forward(ctx, x):\n        ctx.x = x"),
        ("modeling_xlstm", "isinstance(module, HeadNorm)\ntype(module).__name__ == 'HeadNorm'"),
    ],
)
def test_an_honest_module_is_left_alone(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.py"
    path.write_text(text, "utf-8")
    assert [fault for rule in RULES for fault in faults(path, rule)] == []


def test_triton_may_be_imported_in_try_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(MODULES, "ops_mlstm_triton", Module(1, {STATES}, {"torch", "triton"}))
    path = tmp_path / "ops_mlstm_triton.py"
    for bare in ("import triton", "def f():\n    import triton.language as tl", "from triton import jit"):
        path.write_text(bare, "utf-8")
        assert faults(path, third_parties)
    path.write_text("try:\n    import triton\nexcept ImportError:\n    triton = None", "utf-8")
    assert not faults(path, third_parties)
