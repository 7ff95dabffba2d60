"""A few rows times a matrix: every way gives the product, and the one that was the fastest here is taken."""

from __future__ import annotations

import pytest
import torch
from inputs import STYLES, tiny_model, tokens
from tolerances import assert_same
from torch import Tensor, nn

from modeling_xlstm import XLSTMForCausalLM, ops_rows
from modeling_xlstm.ops_half import multiply
from modeling_xlstm.ops_rows import LEAST, MOST_ROWS, fastest, plan_product, plan_product_by

WAYS = ("whole", "columns", "rows")


def taken(monkeypatch: pytest.MonkeyPatch, way: str = "columns") -> list[str]:
    """The ways of products from now on, where `way` is the fastest for whatever is large enough."""
    ways: list[str] = []

    def noted(way: str, *given: object) -> object:
        ways.append(way)
        return plan_product_by(way, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(ops_rows, "fastest", lambda rows, threads: way)
    monkeypatch.setattr(ops_rows, "plan_product_by", noted)
    return ways


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [1, 3, MOST_ROWS])
@pytest.mark.parametrize("outputs", [128, 48, 7])
def test_every_way_gives_the_product_and_adds_it(way: str, rows: int, outputs: int) -> None:
    x, weight = torch.randn(rows, 2 * 40)[:, 40:], torch.randn(outputs, 40)
    right = x @ weight.T
    given, sums = torch.empty(rows, outputs), torch.ones(rows, outputs)
    plan_product_by(way, x, weight, given)()
    plan_product_by(way, x, weight, sums, add=True)()
    assert_same((given, sums), (right, 1 + right))


def test_what_is_small_or_not_float32_or_of_many_rows_is_multiplied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    ways, width = taken(monkeypatch), 64
    weight = torch.zeros(LEAST // width, width)
    for x, w in (
        (torch.ones(1, width), weight),
        (torch.ones(MOST_ROWS, width), weight),
        (torch.ones(MOST_ROWS + 1, width), weight),
        (torch.ones(1, width), weight[1:]),
        (torch.ones(1, width).double(), weight.double()),
        (torch.ones(1, len(weight)), weight.t()),
        (torch.ones(1, width), torch.zeros(len(weight) + 1, width)),  # odd: no parts of equal size
    ):
        plan_product(x, w, x.new_empty(len(x), len(w)))
    assert ways == ["columns", "columns", "whole", "whole", "whole", "whole", "whole"]


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({"whole": 3, "columns": 1, "rows": 2}, "columns"),
        ({"whole": 3, "columns": 2, "rows": 1}, "rows"),
        ({"whole": 1, "columns": 2, "rows": 3}, "whole"),
        ({"whole": 1.05, "columns": 1, "rows": 2}, "whole"),  # too near to tell
    ],
)
def test_the_fastest_way_is_measured(seconds: dict[str, float], best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def pretend(way: str, *_: object) -> object:
        return lambda: clock.__setitem__(0, clock[0] + seconds[way])

    monkeypatch.setattr(ops_rows, "plan_product_by", pretend)
    monkeypatch.setattr(ops_rows.time, "perf_counter", lambda: clock[0])
    assert fastest.__wrapped__(1, 2) == best


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("style", STYLES)
def test_a_token_is_decoded_to_the_same_logits_in_every_way(
    style: str, rows: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(XLSTMForCausalLM, style, "mixed", hidden_size=32).float()
    ids = tokens(rows, 4)
    whole = model(ids).logits
    ways = taken(monkeypatch, way)
    monkeypatch.setattr(ops_rows, "LEAST", 1)
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True).past_key_values
        logits = model(ids[:, 3:], past_key_values=cache).logits
    assert_same(logits, whole[:, 3:].detach())
    assert way in ways


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_layer_is_entered_only_where_nothing_asks_for_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = taken(monkeypatch)
    monkeypatch.setattr(ops_rows, "LEAST", 1)
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
