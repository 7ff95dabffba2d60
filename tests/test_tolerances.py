"""Tolerances are in one place, nothing loosens them, and the helpers that use them do fail."""

from __future__ import annotations

import ast
import re

import pytest
import tolerances
import torch
from checkout import ROOT, tracked_files
from tolerances import (
    assert_drawn_with,
    assert_identical,
    assert_oracle_gradients,
    assert_oracle_logits,
    assert_oracle_loss,
    assert_oracle_states,
    assert_same,
)

from modeling_xlstm.states_xlstm import SLSTMState

HELD_BY = "tests/tolerances.py"
TOLERANCE_NAME = re.compile(r"(^|_)(atol|rtol|tol|tolerance)(_|$)|^(abs|rel)$", re.IGNORECASE)
CLOSENESS = {
    "allclose", "isclose", "assert_close", "assert_allclose", "assert_almost_equal", "assertAlmostEqual", "approx",
}  # fmt: skip
SMALL = 0.02


def number(node: ast.AST | None) -> float | None:
    """The value of an expression made of number literals only, such as -1e-3 or 10**-5."""
    parts = (ast.Constant, ast.UnaryOp, ast.BinOp, ast.operator, ast.unaryop)
    if not isinstance(node, ast.expr) or not all(isinstance(part, parts) for part in ast.walk(node)):
        return None
    value = eval(compile(ast.Expression(node), "<literal>", "eval"), {"__builtins__": {}})
    return float(value) if isinstance(value, (int, float)) else None


def numbers(node: ast.AST) -> list[float]:
    """The literals of an arithmetic expression: 1e-5 and 3 of `3 * (scale + 1e-5)`."""
    value = number(node)
    if value is not None:
        return [value]
    if isinstance(node, ast.BinOp):
        return numbers(node.left) + numbers(node.right)
    return numbers(node.operand) if isinstance(node, ast.UnaryOp) else []


def name_of(node: ast.AST) -> str:
    return getattr(node, "id", getattr(node, "attr", getattr(node, "arg", ""))) or ""


def stray_numbers(tree: ast.AST) -> list[tuple[int, str]]:
    """Literals given to something whose name says tolerance: keyword, default or assignment. Zero is no tolerance."""
    pairs: list[tuple[ast.AST, ast.expr | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword):
            pairs.append((node, node.value))
        elif isinstance(node, ast.Assign):
            pairs += [(target, node.value) for target in node.targets]
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)):
            pairs.append((node.target, node.value))
        elif isinstance(node, ast.arguments):
            positional = [*node.posonlyargs, *node.args]
            pairs += zip(positional[len(positional) - len(node.defaults) :], node.defaults, strict=True)
            pairs += zip(node.kwonlyargs, node.kw_defaults, strict=True)
    return [
        (v.lineno, "a literal tolerance") for n, v in pairs if v and TOLERANCE_NAME.search(name_of(n)) and number(v)
    ]


def closeness_calls(tree: ast.AST) -> list[tuple[int, str]]:
    """Calls that compare within a tolerance, whether they spell it or hide it in a default."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(c.lineno, f"`{name_of(c.func)}`; use a helper") for c in calls if name_of(c.func) in CLOSENESS]


def small_bounds(tree: ast.AST) -> list[tuple[int, str]]:
    """Comparisons with a small literal, such as `error < 1e-5 * scale`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            values = [value for side in (node.left, *node.comparators) for value in numbers(side)]
            if any(0 < abs(value) <= SMALL for value in values):
                found.append((node.lineno, "a comparison with a small literal"))
    return found


def environment_reads(tree: ast.AST) -> list[tuple[int, str]]:
    """Reads of single environment variables; handing the whole environment to another process is no read."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keyed = name_of(getattr(node.func, "value", node)) == "environ"
            read = name_of(node.func) == "getenv" or (keyed and name_of(node.func) in ("get", "pop", "setdefault"))
        elif isinstance(node, ast.Subscript):
            read = name_of(node.value) == "environ" and isinstance(node.ctx, ast.Load)
        elif isinstance(node, ast.Compare):
            read = any(name_of(side) == "environ" for side in node.comparators)
        else:
            read = False
        if read:
            found.append((node.lineno, "an environment variable is read"))
    return found


EVERYWHERE = (stray_numbers,)
IN_TESTS = (stray_numbers, closeness_calls, small_bounds, environment_reads)


def faults(name: str, source: str) -> list[str]:
    tree = ast.parse(source)
    rules = IN_TESTS if name.startswith("tests/") else EVERYWHERE
    return [f"{name}:{line}: {what}" for rule in rules for line, what in rule(tree)]


def test_tolerance_numbers_stand_in_one_file_only() -> None:
    sources = [name for name in tracked_files() if name.endswith(".py") and name != HELD_BY]
    assert "tests/test_tolerances.py" in sources
    found = [fault for name in sources for fault in faults(name, (ROOT / name).read_text("utf-8"))]
    assert not found, f"Name the number in {HELD_BY} and import it:\n" + "\n".join(found)


def test_no_environment_variable_loosens_a_tolerance() -> None:
    tree = ast.parse((ROOT / HELD_BY).read_text("utf-8"))
    names = {name_of(node) for node in ast.walk(tree)} | {
        alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names
    }
    assert not names & {"os", "environ", "getenv"}


@pytest.mark.parametrize(
    "line",
    [
        "torch.testing.assert_close(a, b, rtol=1e-5, atol=ATOL)",
        "compare(a, b, atol=10**-5)",
        "compare(a, b, rel=-(-1e-3))",
        "torch.allclose(a, b)",
        "x == pytest.approx(1.0)",
        "math.isclose(a, b)",
        "loss_tolerance = 1e-3",
        "def same(a, b, *, rtol=1e-3): ...",
        "def same(a, b, tol: float = 1e-3): ...",
        "assert (a - b).abs().max() < 1e-5",
        "assert 1e-3 > error",
        "assert error <= 2 * (scale + 1e-5)",
        "scale = float(os.environ['LOOSER'])",
        "scale = os.environ.get('LOOSER', 1)",
        "loose = 'LOOSER' in os.environ",
        "scale = os.getenv('LOOSER')",
    ],
)
def test_a_stray_tolerance_in_a_test_is_found(line: str) -> None:
    assert faults("tests/test_planted.py", line)


@pytest.mark.parametrize(
    "line",
    [
        "assert_same(a, b, tolerances.FLOAT32)",
        "mlstm(*xs, eps=1e-6)",
        "torch.equal(a, b)",
        "assert loss < 3.5",
        "subprocess.run(command, env={**os.environ, 'A': 'b'})",
        "os.environ['HF_HUB_OFFLINE'] = '1'",
        "compare(a, b, atol=0)",
    ],
)
def test_an_honest_line_is_left_alone(line: str) -> None:
    assert not faults("tests/test_planted.py", line)


def test_the_twin_rule_is_two() -> None:
    assert tolerances.KERNEL_OVER_TWIN == 2.0


@pytest.mark.parametrize(("dtype", "allowed"), tolerances.TOLERANCES.items(), ids=str)
def test_same_fails_just_above_its_tolerance_and_passes_just_below(dtype: torch.dtype, allowed: float) -> None:
    expected = torch.tensor([0.0, 100.0]).to(dtype)
    assert_same(expected + torch.tensor([50 * allowed, 0.0]).to(dtype), expected)
    with pytest.raises(AssertionError, match=r"value\[0\].*relative to scale 100"):
        assert_same(expected + torch.tensor([200 * allowed, 0.0]).to(dtype), expected)


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (SLSTMState(*torch.eye(4)), r"value: got 4 entries"),
        ([*torch.ones(4, 2), None, 2.0, 5], r"value\[4\]: got None, wanted 7"),
        ([*torch.ones(4, 2), 7, 2.5, None], r"value\[5\]\[\]: got 2.5, wanted 2.0"),
        ([*torch.ones(4, 3), 7, 2.0, None], r"value\[3\]: got \[3\]"),
        ([*torch.ones(4, 2).double(), 7, 2.0, None], r"value\[0\]: got \[2\] torch.float64"),
        ([*torch.full((4, 2), torch.nan), 7, 2.0, None], r"value\[0\]: 2 NaN"),
        ([*torch.full((4, 2), torch.inf), 7, 2.0, None], r"value\[0\]\[0\]: got inf"),
        ([*torch.ones(4, 2), 7, 2.0, torch.ones(1)], r"value\[6\]: got Tensor, wanted None"),
        ([*torch.ones(4, 2), 8, 2.0, None], r"value\[4\]\[\]: got 8, wanted 7; .*must be equal"),
    ],
)
def test_same_names_what_differs(actual: object, message: str) -> None:
    expected = [*torch.ones(4, 2), 7, 2.0, None]
    assert_same(list(expected), expected)
    with pytest.raises(AssertionError, match=message):
        assert_same(actual, expected)


def test_same_names_the_field_of_a_state() -> None:
    state = SLSTMState(*torch.ones(4, 1))
    with pytest.raises(AssertionError, match=r"value\['a'\]\.m\[0\]: got 1.5, wanted 1.0"):
        assert_same({"a": state._replace(m=torch.full((1,), 1.5))}, {"a": state})


def test_same_takes_equal_infinities_and_refuses_opposite_ones() -> None:
    gates = torch.tensor([-torch.inf, 1.0, torch.inf])
    assert_same(gates, gates.clone())
    with pytest.raises(AssertionError, match="got inf, wanted -inf"):
        assert_same(gates.abs(), gates)


def test_identical_finds_the_last_bit() -> None:
    x = torch.ones(3)
    assert_identical(x.clone(), x)
    with pytest.raises(AssertionError, match="must be bit-identical"):
        assert_identical(torch.nextafter(x, 2 * x), x)


def test_oracle_helpers_fail_just_above_their_tolerance() -> None:
    logits, tiny, ones = torch.full((2,), 50.0).double(), torch.zeros(2).double(), torch.ones(2).double()
    for below, above, check in (
        (logits + 0.5 * tolerances.ORACLE_LOGITS, logits + 2 * tolerances.ORACLE_LOGITS, assert_oracle_logits),
        (logits[0] + 0.5 * tolerances.ORACLE_LOSS, logits[0] + 2 * tolerances.ORACLE_LOSS, assert_oracle_loss),
        (logits + 20 * tolerances.ORACLE_STATE, logits + 100 * tolerances.ORACLE_STATE, assert_oracle_states),
    ):
        expected = logits[0] if check is assert_oracle_loss else logits
        check(below, expected)
        with pytest.raises(AssertionError, match="error"):
            check(above, expected)
    near = {"a": tiny + 0.5 * tolerances.ORACLE_GRADIENT_FLOOR, "b": ones + 0.5 * tolerances.ORACLE_GRADIENT}
    assert_oracle_gradients(near, {"a": tiny, "b": ones})
    far = {"a": tiny + 2 * tolerances.ORACLE_GRADIENT_FLOOR, "b": ones + 2 * tolerances.ORACLE_GRADIENT}
    with pytest.raises(AssertionError, match=r"(?s)\['a'\].*\['b'\]"):
        assert_oracle_gradients(far, {"a": tiny, "b": ones})
    with pytest.raises(AssertionError, match=r"keys missing \['b'\]"):
        assert_oracle_gradients({"a": tiny}, {"a": tiny, "b": ones})


def test_statistics_of_a_draw_are_told_apart() -> None:
    x = torch.randn(100, 100) * 0.1
    assert_drawn_with(x, mean=0.0, std=0.1)
    assert_drawn_with(torch.full((4,), -1.0), mean=-1.0, std=0.0)
    for mean, std, what in ((0.01, 0.1, "mean"), (0.0, 0.11, "standard deviation"), (0.0, 0.0, "mean")):
        with pytest.raises(AssertionError, match=f"^{what}"):
            assert_drawn_with(x, mean=mean, std=std)
