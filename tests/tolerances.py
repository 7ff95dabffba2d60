"""Every tolerance of the tests, and the only functions that use them.

No other test file holds a tolerance or calls a closeness function of torch, numpy, math or pytest, and no environment
variable changes a number here; `test_tolerances.py` checks both. A new tolerance gets a name and a reason in this file.

Errors are relative to scale: the largest |actual - expected| of a tensor over its largest |expected|, so that one
small entry beside large ones is not asked for digits that its neighbours' rounding took away.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Two forms of one law, such as chunkwise and recurrent. Largest error of the mLSTM over eight lengths from 1 to 200,
# gates of standard deviation 3, outputs, states and gradients: 1.2e-13 in float64, 4.5e-5 in float32.
EXACT = 1e-12
FLOAT32 = 1e-4
# Inputs in half precision: 3.4e-3 and 4.4e-4 against float64 on the same inputs. Their states are compared as float32.
BFLOAT16 = 2e-2
FLOAT16 = 2e-3
TOLERANCES = {
    torch.float64: EXACT,
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
}
# Weights and states after a dozen steps of Adam in float64, which makes rounding of whole steps out of that of tiny
# gradients: largest error of four micro-batches against one batch, 1.9e-11.
TRAINED = 1e-9
# Logits of small models whose projections are kept in eight bits (largest error 1.4e-2) or in four (0.2).
EIGHT_BITS = 5e-2
FOUR_BITS = 0.5
# Smaller scales count as this one: sums that cancel to zero keep the rounding of their terms.
SCALE_FLOOR = 1e-3

# The official models, run in float64. Logits and losses are absolute; the published formulations differ among
# themselves by up to 1.4e-6 in a logit, because the stabiliser also scales eps.
ORACLE_LOGITS = 1e-5
ORACLE_LOSS = 1e-6
# The equations of a cell without stabiliser, in float64: the ops add an epsilon of 1e-6 that the stabiliser scales.
UNSTABILISED = 1e-4
# Entry by entry: relative to the entry, with an absolute floor where the gradient itself is tiny.
ORACLE_GRADIENT = 1e-4
ORACLE_GRADIENT_FLOOR = 1e-6
# Relative to scale; both sides start the stabiliser at zero, so only rounding is left.
ORACLE_STATE = 1e-10

# The twin rule. A kernel is judged in float64 on the same inputs: output, state and every gradient. It may err at most
# this many times as much as its twin, the chunkwise reference with matmul operands rounded to the kernel's dtype.
# A correct variant errs up to 1.7 times its twin; an error of 1 % in `k` is 4.7 times.
KERNEL_OVER_TWIN = 2.0

# Sample mean and standard deviation of an initialised parameter, in standard errors of a normal sample.
STANDARD_ERRORS = 5.0

# Memory that was estimated, relative to what was given out: what the estimate promises.
FORETOLD = 0.15


def assert_foretold(estimate: float, measured: float) -> None:
    """Assert that an estimate is as near to what was measured as it promises."""
    error = abs(estimate - measured) / measured
    assert error <= FORETOLD, f"estimated {estimate:,.0f}, measured {measured:,.0f}: off by {100 * error:.1f} %"


def assert_same(actual: Any, expected: Any, tolerance: float | None = None) -> None:
    """Assert that two values agree: tensors, numbers, None, or tuples, NamedTuples, lists and mappings of them.

    Args:
        actual: the value under test.
        expected: what it must be; same structure, shapes and dtypes.
        tolerance: largest error relative to scale; None takes it from the dtype. Integers and booleans must be equal.
    """
    _assert_leaves(actual, expected, lambda a, e: _scaled_error(a, e, tolerance))


def assert_identical(actual: Any, expected: Any) -> None:
    """Assert that two values agree bit by bit: nothing was computed between them, or the same thing twice."""
    _assert_leaves(actual, expected, lambda a, e: ((a != e).to(torch.float64), 0.0, "must be bit-identical"))


def assert_oracle_logits(actual: Tensor, expected: Tensor) -> None:
    """Assert that logits are those of the official model, absolutely."""
    _assert_leaves(actual, expected, lambda a, e: ((a - e).abs(), ORACLE_LOGITS, "absolute"))


def assert_oracle_loss(actual: Tensor | float, expected: Tensor | float) -> None:
    """Assert that a loss is that of the official model, absolutely."""
    _assert_leaves(float(actual), float(expected), lambda a, e: ((a - e).abs(), ORACLE_LOSS, "absolute"))


def assert_oracle_gradients(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Assert that every gradient, by name, is that of the official model."""

    def judge(a: Tensor, e: Tensor) -> tuple[Tensor, float, str]:
        allowed = (ORACLE_GRADIENT * e.abs()).clamp(min=ORACLE_GRADIENT_FLOOR)
        rule = f"in units of max({ORACLE_GRADIENT:g} * |expected|, {ORACLE_GRADIENT_FLOOR:g})"
        return (a - e).abs() / allowed, 1.0, rule

    _assert_leaves(actual, expected, judge)


def assert_oracle_states(actual: Any, expected: Any) -> None:
    """Assert that states are those of the official model after conversion."""
    assert_same(actual, expected, ORACLE_STATE)


def assert_drawn_with(tensor: Tensor, mean: float, std: float) -> None:
    """Assert that the entries of a parameter look drawn independently with this mean and standard deviation.

    A standard deviation of zero asks for the constant `mean`. Right for a normal distribution and for every
    distribution with lighter tails, such as the uniform or a truncated normal.
    """
    x = tensor.detach().double()
    for what, got, wanted, error in (
        ("mean", x.mean().item(), mean, std / math.sqrt(x.numel())),
        ("standard deviation", x.std(correction=0).item(), std, std / math.sqrt(2 * x.numel())),
    ):
        allowed = STANDARD_ERRORS * error + EXACT * abs(mean)
        assert abs(got - wanted) <= allowed, (
            f"{what} of {x.numel()} entries: got {got:.6g}, wanted {wanted:.6g} +- {allowed:.2g}"
        )


def _scaled_error(a: Tensor, e: Tensor, tolerance: float | None) -> tuple[Tensor, float, str]:
    if not e.is_floating_point():
        return (a != e).to(torch.float64), 0.0, "must be equal"
    tolerance = TOLERANCES[e.dtype] if tolerance is None else tolerance
    a, e = a.double(), e.double()
    # Infinities must stand in the same places with the same sign; they say nothing about the scale.
    agree, finite = a == e, e.isfinite()
    scale = max(e[finite].abs().max().item() if finite.any() else 0.0, SCALE_FLOOR)
    return ((a - e).abs() / scale).masked_fill(agree, 0.0), tolerance, f"relative to scale {scale:.3g}"


def _assert_leaves(actual: Any, expected: Any, judge: Any) -> None:
    """Compare leaf by leaf and report every leaf that fails, the worst entry of each."""
    faults = [fault for path, a, e in _leaves("value", actual, expected) if (fault := _fault(path, a, e, judge))]
    assert not faults, "\n".join(faults)


def _leaves(path: str, actual: Any, expected: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(expected, Mapping):
        assert isinstance(actual, Mapping), f"{path}: got {type(actual).__name__}, wanted a mapping"
        extra, missing = sorted(actual.keys() - expected.keys()), sorted(expected.keys() - actual.keys())
        assert extra == missing == [], f"{path}: keys missing {missing}, keys too many {extra}"
        children: Iterable[tuple[str, Any, Any]] = ((f"[{k!r}]", actual[k], expected[k]) for k in expected)
    elif isinstance(expected, (tuple, list)):
        assert isinstance(actual, (tuple, list)), f"{path}: got {type(actual).__name__}, wanted a sequence"
        assert len(actual) == len(expected), f"{path}: got {len(actual)} entries, wanted {len(expected)}"
        names = [f".{field}" for field in getattr(expected, "_fields", ())] or [f"[{i}]" for i in range(len(expected))]
        children = zip(names, actual, expected, strict=True)
    else:
        yield path, actual, expected
        return
    for name, a, e in children:
        yield from _leaves(path + name, a, e)


def _fault(path: str, a: Any, e: Any, judge: Any) -> str | None:
    """What is wrong with one leaf, or None."""
    if a is None or e is None:
        return None if a is e else f"{path}: got {a if a is None else type(a).__name__}, wanted {e}"
    if isinstance(e, (bool, int, float)) and not isinstance(a, Tensor):
        a, e = (torch.tensor(x, dtype=torch.float64 if isinstance(e, float) else None) for x in (a, e))
    assert isinstance(a, Tensor), f"{path}: got {type(a).__name__}, wanted a tensor"
    assert isinstance(e, Tensor), f"{path}: cannot compare with a {type(e).__name__}"
    a, e = a.detach().cpu(), e.detach().cpu()
    if a.shape != e.shape or a.dtype != e.dtype:
        return f"{path}: got {list(a.shape)} {a.dtype}, wanted {list(e.shape)} {e.dtype}"
    if e.is_floating_point() and (a.isnan().any() or e.isnan().any()):
        return f"{path}: {int(a.isnan().sum())} NaN in what was got, {int(e.isnan().sum())} in what was wanted"
    error, allowed, rule = judge(a, e)
    if error.numel() == 0 or error.max() <= allowed:
        return None
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    failing = f"{int((~(error <= allowed)).sum())} of {error.numel()} entries"
    return (
        f"{path}{list(worst)}: got {a[worst].item()!r}, wanted {e[worst].item()!r}; "
        f"error {error[worst].item():.3g} > {allowed:g} ({rule}), {failing}"
    )
