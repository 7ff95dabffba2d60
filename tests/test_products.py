"""Products with a matrix: every way gives them; few rows take the fastest here, many what the CPU is known for."""

from __future__ import annotations

import functools
import itertools
import unittest.mock
from typing import Any

import pytest
import torch
from inputs import STYLES, tiny_model, tokens
from tolerances import assert_same
from torch import Tensor, nn

from modeling_xlstm import XLSTMForCausalLM, ops_products
from modeling_xlstm.ops_lean import project
from modeling_xlstm.ops_linear import linear, multiply
from modeling_xlstm.ops_products import (
    FEW,
    LEAST,
    LEAST_OF_MANY,
    PARTS,
    SOME,
    WAYS,
    plan_product_by,
    product,
    product_of_columns,
    way_of,
)


def taken(monkeypatch: pytest.MonkeyPatch, way: str, least: int | None = None) -> list[str]:
    """The ways of products from now on, where `way` is the fastest for whatever is large enough."""
    ways: list[str] = []

    def noted(B: int, weight: Tensor) -> str:
        ways.append(way_of(B, weight))
        return ways[-1]

    monkeypatch.setattr(ops_products, "seconds", lambda rows, threads: {**dict.fromkeys(WAYS, 3.0), way: 1.0})
    monkeypatch.setattr(ops_products, "is_mkl_narrow", lambda: way == "onednn")
    monkeypatch.setattr(ops_products, "is_amd_without_avx512", lambda: False)
    monkeypatch.setattr(ops_products, "way_of", noted)
    if least is not None:
        monkeypatch.setattr(ops_products, "LEAST", least)
        monkeypatch.setattr(ops_products, "LEAST_OF_MANY", least)
    return ways


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [1, 3, FEW])
@pytest.mark.parametrize("outputs", [128, 48, 7])
def test_every_way_gives_the_product_and_adds_it(way: str, rows: int, outputs: int) -> None:
    x, weight = torch.randn(rows, 2 * 40)[:, 40:], torch.randn(outputs, 40)
    right = x @ weight.T
    given, sums = torch.empty(rows, outputs), torch.ones(rows, outputs)
    plan_product_by(way, x, weight, given)()
    plan_product_by(way, x, weight, sums, add=True)()
    assert_same((given, sums), (right, 1 + right))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 40, 64), (FEW, 40, 64), (70, 40, 64), (70, 64, 40)])
def test_a_product_and_that_of_columns_are_torchs_in_every_way(
    way: str, rows: int, inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias, dy = (torch.randn(size) for size in ((rows, inputs), (outputs, inputs), outputs, (rows, outputs)))
    ways = taken(monkeypatch, way, least=1)
    for given in (None, bias):
        assert_same(product(x, weight, given), nn.functional.linear(x, weight, given))
    assert ways == 2 * ["whole" if way in PARTS and rows > FEW else way]
    assert_same(product(dy, weight.t()), dy @ weight)
    assert_same(product_of_columns(dy, x), dy.t() @ x)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "whole"])
def test_only_float32_and_only_what_is_large_is_multiplied_in_another_way(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken(monkeypatch, way)
    width, has_parts = 64, way in PARTS
    weight = torch.zeros(LEAST // width, width)
    many = LEAST_OF_MANY // LEAST
    assert way_of(1, weight) == way_of(FEW, weight) == way
    assert way_of(many, weight) == ("whole" if has_parts else way)
    for rows, other in ((0, weight), (1, weight[1:]), (1, weight.double()), (many, weight[1:]), (many, weight.half())):
        assert way_of(rows, other) == "whole"
    # Neither of these has parts of equal size that lie in one piece.
    for other in (weight.t(), torch.zeros(len(weight) + 1, width)):
        assert way_of(1, other) == ("whole" if has_parts else way)


@pytest.mark.skipif("onednn" not in WAYS, reason="needs oneDNN")
def test_whoever_turns_onednn_off_gets_products_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken(monkeypatch, "onednn")
    weight = torch.zeros(LEAST // 64, 64)
    assert way_of(1, weight) == "onednn"
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert way_of(1, weight) == "whole"


@pytest.mark.skipif("onednn" not in WAYS, reason="needs oneDNN")
def test_onednn_is_given_dense_matrices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """It multiplies others by its reference implementation, which takes a thousand times as long."""
    onednn = unittest.mock.Mock(wraps=ops_products._onednn)
    monkeypatch.setattr(ops_products, "_onednn", onednn)
    taken(monkeypatch, "onednn", least=1)
    x, dy = torch.randn(70, 2 * 40)[:, 40:], torch.randn(70, 2 * 48)[:, ::2]
    layer, rows = torch.randn(2 * 48, 40)[::2], x.unflatten(0, (2, 35)).requires_grad_()
    assert_same(product(x, layer), x @ layer.t())
    for a, b in ((x, dy), (dy, x)):
        assert_same(product_of_columns(a, b), a.t() @ b)
    y = linear(rows, layer.requires_grad_(), None)
    expected = nn.functional.linear(rows, layer)
    made, right = (torch.autograd.grad(z.square().sum(), (rows, layer)) for z in (y, expected))
    assert_same(made, right)
    given = [call.args[1] for call in onednn.call_args_list]
    assert len(given) == 6
    assert all(weight.is_contiguous() or weight.t().is_contiguous() for weight in given)


def test_deterministic_algorithms_are_not_chosen_by_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    taken(monkeypatch, WAYS[-1])
    weight = torch.zeros(LEAST // 64, 64)
    assert way_of(1, weight) == WAYS[-1]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert way_of(1, weight) == "whole"


@pytest.mark.parametrize(
    ("spent", "best"),
    [
        ({"whole": 3, "columns": 1, "rows": 2, "onednn": 3}, "columns"),
        ({"whole": 3, "columns": 2, "rows": 1, "onednn": 3}, "rows"),
        ({"whole": 3, "columns": 2, "rows": 2, "onednn": 1}, "onednn"),
        ({"whole": 1, "columns": 2, "rows": 3, "onednn": 4}, "whole"),
        ({"whole": 1.05, "columns": 1, "rows": 2, "onednn": 1.02}, "whole"),  # too near to tell
    ],
)
def test_the_fastest_way_of_few_rows_is_measured(
    spent: dict[str, float], best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def pretend(way: str, *_: object) -> object:
        return lambda: clock.__setitem__(0, clock[0] + spent[way])

    monkeypatch.setattr(ops_products, "plan_product_by", pretend)
    monkeypatch.setattr(ops_products.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(ops_products, "seconds", functools.cache(ops_products.seconds.__wrapped__))
    assert way_of(1, torch.zeros(1024, 64)) == (best if best in WAYS else "whole")


@pytest.mark.parametrize(
    ("known", "some", "many"),
    [
        ({"cpu_name": "AMD EPYC 9755", "avx2": True, "avx512_f": True, "avx_vnni": True}, True, True),
        ({"cpu_name": "AMD EPYC 9654", "avx2": True, "avx512_f": True, "avx_vnni": False}, False, False),
        ({"cpu_name": "AMD EPYC 7763", "avx2": True, "avx512_f": False, "avx_vnni": False}, True, False),
        ({"cpu_name": "Intel Xeon 6980P", "avx2": True, "avx512_f": True, "avx_vnni": True}, False, False),
        ({"cpu_name": "Intel Core i7-6700", "avx2": True, "avx512_f": False, "avx_vnni": False}, False, False),
        ({}, False, False),
    ],
)
def test_more_rows_go_through_onednn_where_the_cpu_is_known_to_be_slow_with_mkl(
    known: dict[str, Any], some: bool, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("is_mkl_narrow", "is_amd_without_avx512"):
        monkeypatch.setattr(ops_products, name, getattr(ops_products, name).__wrapped__)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    has_both = torch.backends.mkl.is_available() and "onednn" in WAYS
    weight = torch.zeros(LEAST_OF_MANY // 64, 64)
    for rows, is_onednn in ((FEW + 1, some), (SOME, some), (SOME + 1, many)):
        assert way_of(rows, weight) == ("onednn" if is_onednn and has_both else "whole")


def test_no_clock_decides_how_a_training_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(rows: int, threads: int) -> dict[str, float]:
        raise AssertionError("measured")

    monkeypatch.setattr(ops_products, "seconds", forbidden)
    monkeypatch.setattr(ops_products, "is_mkl_narrow", lambda: True)
    monkeypatch.setattr(ops_products, "LEAST", 1)
    monkeypatch.setattr(ops_products, "LEAST_OF_MANY", 1)
    for rows, *widths in itertools.product((1, FEW, FEW + 1), repeat=3):
        x, weight = torch.randn(rows, widths[0], requires_grad=True), torch.randn(widths[::-1], requires_grad=True)
        linear(x, weight, None).sum().backward()
    with torch.no_grad(), pytest.raises(AssertionError, match="measured"):
        linear(x[:1], weight, None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("style", STYLES)
def test_a_token_is_decoded_to_the_same_logits_in_every_way(
    style: str, rows: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(XLSTMForCausalLM, style, "mixed", hidden_size=32).float()
    ids = tokens(rows, 4)
    whole = model(ids).logits
    ways = taken(monkeypatch, way, least=1)
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True).past_key_values
        logits = model(ids[:, 3:], past_key_values=cache).logits
    assert_same(logits, whole[:, 3:].detach())
    assert way in ways


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_layer_is_entered_only_where_nothing_asks_for_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = taken(monkeypatch, WAYS[-1], least=1)
    plain, hooked, doubled = nn.Linear(32, 64), nn.Linear(32, 64, bias=False), Doubled(32, 64)
    hooked.register_forward_hook(lambda module, given, y: 2 * y)
    x = torch.randn(1, 3, 32)
    with torch.no_grad():
        for layer, factor, entered in ((plain, 1, 1), (hooked, 2, 0), (doubled, 2, 0)):
            ways.clear()
            right = factor * nn.functional.linear(x, layer.weight, layer.bias)
            assert_same(multiply(layer, x), right)
            assert len(ways) == entered
    assert multiply(plain, x).requires_grad


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [3, 70])
def test_a_layer_and_its_gradients_are_those_of_float64_whatever_way_is_the_fastest(
    way: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [torch.randn(size).requires_grad_() for size in ((2, rows, 40), (64, 40), (64,))]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    ways = taken(monkeypatch, way, least=1)
    y = linear(inputs[0], *inputs[1:])
    expected = nn.functional.linear(wide[0], *wide[1:])
    made, right = ((z, *torch.autograd.grad(z.square().sum(), xs)) for z, xs in ((y, inputs), (expected, wide)))
    assert_same(made, tuple(x.float() for x in right))
    assert (way in ways) == (way == "onednn" and 2 * rows > FEW)


@pytest.mark.skipif("onednn" not in WAYS, reason="needs oneDNN")
def test_a_projection_is_not_multiplied_again_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its input, its weights and itself there is one product each."""
    layer, act, x = nn.Linear(64, 32), nn.SiLU(), torch.randn(70, 64, requires_grad=True)
    leaves = (x, *layer.parameters())
    expected = torch.autograd.grad(layer(act(x)).square().sum(), leaves)
    taken(monkeypatch, "onednn", least=1)
    by_onednn = unittest.mock.Mock(wraps=ops_products._by_onednn)
    monkeypatch.setattr(ops_products, "_by_onednn", by_onednn)
    project(layer, act, (act,), x).square().sum().backward()
    assert_same(tuple(leaf.grad for leaf in leaves), expected)
    assert by_onednn.call_count == 3
