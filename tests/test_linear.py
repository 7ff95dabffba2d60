"""Products of half precision on CPUs without units for it: through float32, at half precision's memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import BFLOAT16, assert_same
from torch import Tensor, nn

from modeling_xlstm import ops_linear
from modeling_xlstm.layers_xlstm import HeadwiseLinear
from modeling_xlstm.ops_linear import COLUMNS, ROWS, bmm, has_units, linear, multiply

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def unitless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without units, whatever this one has."""
    monkeypatch.setattr(ops_linear, "has_units", lambda dtype: False)


def draw(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def with_gradients(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    y = function(*inputs)
    return [y, *torch.autograd.grad(y.double().square().sum(), inputs)]


def in_float64(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    wide = with_gradients(function, [x.detach().double().requires_grad_() for x in inputs])
    return [x.to(inputs[0].dtype) for x in wide]


@pytest.mark.usefixtures("unitless")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_product_and_its_gradients_are_those_of_float64(dtype: torch.dtype) -> None:
    inputs = draw((2, ROWS, 48), (COLUMNS, 48), (COLUMNS,), dtype=dtype)
    actual = with_gradients(linear, inputs)
    assert "_Linear" in type(linear(*inputs).grad_fn).__name__
    assert_same(actual, in_float64(torch.nn.functional.linear, inputs))
    inputs = draw((3, ROWS, 8), (3, 8, COLUMNS), dtype=dtype)
    assert "_Products" in type(bmm(*inputs).grad_fn).__name__
    assert_same(with_gradients(bmm, inputs), in_float64(torch.bmm, inputs))


@pytest.mark.usefixtures("unitless")
def test_what_is_kept_for_the_backward_pass_is_in_half_precision() -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        multiply(nn.Linear(64, 64).bfloat16(), torch.randn(ROWS, 64).bfloat16())
        layer = HeadwiseLinear(2, 64, 64, bias=False).bfloat16()
        torch.nn.init.normal_(layer.weight)
        layer(torch.randn(ROWS, 128).bfloat16())
    assert {x.dtype for x in kept} == {torch.bfloat16}


@pytest.mark.usefixtures("unitless")
def test_only_what_needs_a_gradient_is_given_one() -> None:
    x, weight, bias = draw((ROWS, 64), (64, 64), (64,), dtype=torch.bfloat16)
    frozen = linear(x, weight.detach(), bias.detach())
    frozen.float().sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    tuned = linear(x.detach(), weight.detach(), bias)
    assert_same(torch.autograd.grad(tuned.float().sum(), bias)[0], torch.full_like(bias, ROWS))


@pytest.mark.usefixtures("unitless")
def test_autocast_multiplies_as_torch_does_under_it() -> None:
    inputs = draw((ROWS, 64), (64, 64), (64,), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = linear(*inputs)
        expected = torch.nn.functional.linear(*inputs)
    assert "_Linear" in type(actual.grad_fn).__name__
    assert_same(actual, expected)
    gradients = [torch.autograd.grad(y.float().square().sum(), inputs) for y in (actual, expected)]
    assert_same(*gradients, tolerance=BFLOAT16)


def test_small_products_and_those_of_cpus_with_units_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_ours(rows: int, columns: int, dtype: torch.dtype) -> bool:
        x, weight = draw((rows, 64), (columns, 64), dtype=dtype)
        return "_Linear" in type(linear(x, weight, None).grad_fn).__name__

    for answer in (False, True):
        monkeypatch.setattr(ops_linear, "has_units", lambda dtype, answer=answer: answer)
        assert is_ours(ROWS, COLUMNS, torch.bfloat16) is not answer
        assert not is_ours(ROWS - 1, COLUMNS, torch.bfloat16)
        assert not is_ours(ROWS, COLUMNS - 1, torch.bfloat16)
        assert not is_ours(ROWS, COLUMNS, torch.float32)


@pytest.mark.parametrize(
    ("known", "units"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64"}, True),
        ({}, True),
    ],
)
def test_units_are_those_torch_tells_of(known: dict[str, Any], units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert has_units.__wrapped__(torch.bfloat16) is units
    assert has_units.__wrapped__(torch.float32)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.usefixtures("unitless")
def test_a_layer_that_is_more_than_its_product_is_called() -> None:
    plain, hooked, doubled = (kind(64, 64).bfloat16() for kind in (nn.Linear, nn.Linear, Doubled))
    hooked.register_forward_hook(lambda module, given, y: 2 * y)
    for layer in (hooked, doubled):
        layer.load_state_dict(plain.state_dict())
    x = torch.randn(ROWS, 64).bfloat16()
    assert "_Linear" in type(multiply(plain, x).grad_fn).__name__
    for layer in (hooked, doubled):
        assert_same(multiply(layer, x), 2 * plain(x))
    seen: list[Any] = []
    plain.register_full_backward_hook(lambda *call: seen.append(call))
    multiply(plain, x.requires_grad_()).float().sum().backward()
    assert len(seen) == 1


def compiled(function: Any, inputs: list[Tensor]) -> tuple[Tensor, set[str]]:
    """What a compiled function returns, and the operations that it calls."""
    called = set()

    def backend(graph: Any, _: Any) -> Any:
        called.update(getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    return torch.compile(function, backend=backend, fullgraph=True)(*inputs), called


PRODUCTS = {"linear", "bmm", "baddbmm"}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_compiled_few_rows_are_multiplied_as_sums_unless_gradients_are_on(dtype: torch.dtype) -> None:
    for rows in (1, dtype.itemsize, dtype.itemsize + 1):
        cases = [
            (linear, draw((rows, 1, 48), (32, 48), (32,), dtype=dtype)),
            (lambda x, weight: linear(x, weight, None), draw((rows, 48), (32, 48), dtype=dtype)),
            (bmm, draw((3, rows, 48), (3, 48, 32), (3, 1, 32), dtype=dtype)),
            (bmm, draw((3, rows, 48), (3, 48, 32), dtype=dtype)),
        ]
        for function, inputs in cases:
            with torch.no_grad():
                y, called = compiled(function, inputs)
                expected = function(*(x.double() for x in inputs)).to(dtype)
            assert_same(y, expected)
            assert (not called & PRODUCTS) is (rows <= dtype.itemsize)
            assert compiled(function, inputs)[1] & PRODUCTS


def test_autocast_leaves_float64_alone_as_torch_does() -> None:
    x, weight, bias = draw((4, 16), (8, 16), (8,), dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, bias)
    assert_same(y, torch.nn.functional.linear(x, weight, bias))
    assert y.dtype is torch.float64


class Product(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_product_is_one(strict: bool) -> None:
    with torch.no_grad():
        exported = torch.export.export(Product(48, 32), (torch.randn(1, 48),), strict=strict)
    assert any("linear" in str(node.target) for node in exported.graph.nodes)
