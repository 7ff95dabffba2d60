"""The shapes in the docstrings of the public ops are true: they are parsed, and the ops are called with them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling_xlstm.ops_mlstm import mlstm
from modeling_xlstm.ops_slstm import slstm
from modeling_xlstm.states_xlstm import MLSTMState, SLSTMState

OPS = [(mlstm, MLSTMState), (slstm, SLSTMState)]
# A letter that stood for another one would show: no two letters, and no literal size, have the same number.
SIZES = {"B": 2, "T": 7, "H": 3, "K": 5, "V": 6, "P": 8}
NOT_FLOAT = {"lengths": torch.int64, "reset": torch.bool}

ENTRY = re.compile(r"(\w+): (.*)")
SHAPE = re.compile(r"\[((?:\w+, )*\w+)\]")


def entries(documented: Any, section: str) -> dict[str, str]:
    """The entries `name: text` of one section of a docstring."""
    lines = (inspect.getdoc(documented) or "").split("\n")
    assert f"{section}:" in lines, f"`{documented.__name__}` documents no {section}"
    found: dict[str, str] = {}
    name = ""
    for line in lines[lines.index(f"{section}:") + 1 :]:
        if line and not line.startswith(" "):
            break
        entry = ENTRY.fullmatch(line[4:])
        if entry and not line.startswith(" " * 5):
            name, found[entry[1]] = entry[1], entry[2]
        elif name:
            found[name] += " " + line.strip()
    return found


def letters(text: str) -> list[str] | None:
    """The letters of the one shape an entry gives; None where it gives none."""
    shapes = SHAPE.findall(text)
    assert len(shapes) <= 1, f"one shape per entry; got {shapes}"
    return shapes[0].split(", ") if shapes else None


def shapes(documented: Any, section: str) -> dict[str, list[str]]:
    return {name: shape for name, text in entries(documented, section).items() if (shape := letters(text))}


def size(letter: str) -> int:
    return int(letter) if letter.isdigit() else SIZES[letter]


def make(name: str, shape: list[int]) -> Tensor:
    dtype = NOT_FLOAT.get(name, torch.float32)
    return torch.randn(shape) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)


def documented_call(op: Callable[..., Any], state: type) -> dict[str, Any]:
    """Arguments for a call with every tensor of the docstring, each of the shape written there."""
    arguments: dict[str, Any] = {
        name: make(name, [size(letter) for letter in shape]) for name, shape in shapes(op, "Args").items()
    }
    fields = shapes(state, "Attributes")
    return {**arguments, "state": state(**{name: make(name, [*map(size, shape)]) for name, shape in fields.items()})}


def test_no_two_letters_share_a_size() -> None:
    assert len({*SIZES.values(), 1, 4}) == len(SIZES) + 2


@pytest.mark.parametrize(("op", "state"), OPS)
def test_every_parameter_is_documented_and_every_tensor_has_a_shape(op: Callable[..., Any], state: type) -> None:
    parameters = inspect.signature(op).parameters
    assert list(entries(op, "Args")) == list(parameters)
    assert list(entries(op, "Returns")) == ["h", "state"]
    tensors = {name for name, parameter in parameters.items() if "Tensor" in str(parameter.annotation)}
    assert set(shapes(op, "Args")) == tensors
    assert set(shapes(op, "Returns")) == {"h"}
    assert list(shapes(state, "Attributes")) == list(state._fields)


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize(("op", "state"), OPS)
def test_documented_arguments_give_documented_results(op: Callable[..., Any], state: type, with_state: bool) -> None:
    arguments = documented_call(op, state)
    h, after = op(**(arguments if with_state else {**arguments, "state": None}))
    assert list(h.shape) == [size(letter) for letter in shapes(op, "Returns")["h"]]
    assert isinstance(after, state)
    for name, shape in shapes(state, "Attributes").items():
        assert list(getattr(after, name).shape) == [size(letter) for letter in shape], name


@pytest.mark.parametrize(("op", "state"), OPS)
def test_another_shape_than_the_documented_one_is_refused(op: Callable[..., Any], state: type) -> None:
    """One dimension of one tensor at a time is larger by one, or missing."""
    right = documented_call(op, state)
    for name, shape in {**shapes(state, "Attributes"), **shapes(op, "Args")}.items():
        for axis in range(len(shape)):
            wrong = [size(letter) + (i == axis) for i, letter in enumerate(shape)]
            for bad in (make(name, wrong), make(name, wrong[:axis] + wrong[axis + 1 :])):
                changed = {"state": right["state"]._replace(**{name: bad})} if name in state._fields else {name: bad}
                with pytest.raises(ValueError, match="must be"):
                    op(**{**right, **changed})


def test_a_docstring_that_lies_is_found() -> None:
    def lying(q: Tensor, k: Tensor) -> None: ...

    lying.__doc__ = "Lie.\n\nArgs:\n    q: queries, [B, T, K, H].\n    k: keys, in two\n        lines, [B, T, H, K].\n"
    assert shapes(lying, "Args") == {"q": ["B", "T", "K", "H"], "k": ["B", "T", "H", "K"]}
    honest = documented_call(mlstm, MLSTMState)
    lie = {name: make(name, [*map(size, shape)]) for name, shape in shapes(lying, "Args").items()}
    with pytest.raises(ValueError, match="must be"):
        mlstm(**{**honest, **lie})
