"""The short way of a single token through the blocks: the numbers of the long one, and taken only where it is due."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from inputs import STYLES, tiny_model, tokens
from tolerances import BFLOAT16, assert_identical, assert_same
from torch import Tensor, nn

from modeling_xlstm import XLSTMForCausalLM
from modeling_xlstm.step_xlstm import StepPlan

FIELDS: list[dict[str, Any]] = [
    {},
    {"use_bias": True, "ffn_bias": True, "norm_bias": True, "gate_soft_cap": None, "output_logit_soft_cap": None},
    {"input_gate": "sigmoid", "slstm_conv_kernel_size": 0, "slstm_norm_weight": False, "slstm_num_heads": 2},
]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What took the short way."""
    taken: list[Tensor] = []

    def run(plan: StepPlan, x: Tensor, states: Any) -> Any:
        taken.append(x)
        return short(plan, x, states)

    short = StepPlan.run
    monkeypatch.setattr(StepPlan, "run", run)
    return taken


def decode(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, list[Any]]:
    """Logits of the tokens after the fourth, one by one, and the states at the end; differentiable, the long way."""
    cache = model(ids[:, :4], use_cache=True).past_key_values
    logits = [model(ids[:, t : t + 1], past_key_values=cache, **options).logits for t in range(4, ids.shape[1])]
    return torch.cat(logits, 1), cache.states


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", FIELDS, ids=["default", "biases", "variants"])
def test_the_short_way_of_a_token_gives_the_logits_and_states_of_the_long_one(
    style: str, dtype: torch.dtype, fields: dict[str, Any], steps: list[Tensor]
) -> None:
    fields = {name: value for name, value in fields.items() if (style, name) != ("neurips", "norm_bias")}
    model, ids = tiny_model(XLSTMForCausalLM, style, "mixed", **fields), tokens(3, 7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and not parameter.any():  # which would hide a missing one
                parameter.normal_(std=0.5)
    expected = decode(model.to(dtype), ids)
    assert not steps
    with torch.no_grad():
        actual = decode(model, ids)
    assert len(steps) == 3
    assert_same(actual[0], expected[0])
    # bfloat16 layers feed both ways' states, which themselves are float32.
    assert_same(actual[1], expected[1], tolerance=BFLOAT16 if dtype == torch.bfloat16 else None)


def test_generate_takes_the_short_way(steps: list[Tensor]) -> None:
    tiny_model(XLSTMForCausalLM).generate(tokens(2, 5), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert len(steps) == 3


def adapter(model: Any) -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module):
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.base(x)

    model.model.layers[0].mixer.q_proj = Adapter(model.model.layers[0].mixer.q_proj)


def wider_dtype(model: Any) -> None:
    model.model.layers[0].ffn_norm.to(torch.float32)


def replaced_forward(model: Any) -> None:
    ffn = model.model.layers[1].ffn
    forward = ffn.forward
    ffn.forward = lambda x: forward(x) + 1.0


MEDDLINGS: dict[str, Callable[[Any], Any]] = {
    "hook": lambda model: model.model.layers[0].ffn.up_proj.register_forward_hook(lambda *call: call[2] + 1.0),
    "pre-hook": lambda model: model.model.layers[1].register_forward_pre_hook(lambda _, call: (call[0] + 1.0, call[1])),
    "adapter": adapter,
    "replaced forward": replaced_forward,
    "training": lambda model: model.model.layers[0].train(),
    "reference": lambda model: setattr(model.config, "kernel_backend", "reference"),
    "debug": lambda model: setattr(model.config, "debug", True),
}


@pytest.mark.parametrize("meddling", MEDDLINGS)
def test_what_only_a_call_of_the_modules_honours_takes_the_long_way(meddling: str, steps: list[Tensor]) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, "large", "mlstm"), tokens(2, 6)
    MEDDLINGS[meddling](model)
    expected = decode(model, ids)
    with torch.no_grad():
        assert_same(decode(model, ids), expected)
    assert not steps


def test_a_meddling_between_two_tokens_is_seen(steps: list[Tensor]) -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(1, 6)
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:5], past_key_values=cache)
        seen: list[Any] = []
        model.model.layers[0].mixer_norm.register_forward_hook(lambda *call: seen.append(call))
        model(ids[:, 5:], past_key_values=cache)
    assert (len(steps), len(seen)) == (1, 1)


def test_padding_and_recording_take_the_long_way(steps: list[Tensor]) -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(2, 5)
    with torch.no_grad():
        decode(model, ids, attention_mask=torch.tensor([[1], [0]]))
        decode(model, ids, output_hidden_states=True)
        cache = model(ids, use_cache=True).past_key_values
        cache.activate_past_recording()
        model(ids[:, :1], past_key_values=cache)
        with torch.autocast("cpu", torch.bfloat16):
            decode(model.float(), ids)
    assert not steps


def test_a_weight_written_or_replaced_between_two_tokens_is_what_the_next_one_reads(steps: list[Tensor]) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, "large", "mlstm"), tokens(1, 5)
    mixer = model.model.layers[0].mixer

    def written() -> None:
        mixer.q_proj.weight.data.mul_(2.0)  # unseen by version counters

    def moved() -> None:
        mixer.k_proj.weight.data = 3.0 * mixer.k_proj.weight.data

    def capped() -> None:
        mixer.cell.options = dataclasses.replace(mixer.cell.options, gate_soft_cap=0.5)

    def replaced() -> None:
        mixer.v_proj.weight = nn.Parameter(torch.ones_like(mixer.v_proj.weight))

    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        seen = [model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits]
        for change in (written, moved, capped, replaced):
            change()
            seen.append(model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits)
            assert_same(seen[-1], copy.deepcopy(model)(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits)
            assert not torch.equal(*seen[-2:])
    assert len(steps) == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_written_between_two_tokens_is_what_the_next_one_reads(dtype: torch.dtype, steps: list[Tensor]) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, "large", "mlstm").to(dtype), tokens(1, 5)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        before = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
        model.model.norm.weight.data.mul_(2.0)
        after = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
        assert_same(after, copy.deepcopy(model)(ids[:, :1], past_key_values=cache).logits)
    assert not torch.equal(before, after)
    assert len(steps) == 3


def test_a_model_that_moves_or_is_copied_keeps_no_plan() -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(1, 5)
    with torch.no_grad():
        decode(model, ids)
    assert model.model.stepper.watched
    assert not copy.deepcopy(model).model.stepper.watched
    assert not pickle.loads(pickle.dumps(model)).model.stepper.watched
    assert not model.to(torch.float64).model.stepper.watched


@pytest.mark.parametrize("style", STYLES)
def test_a_default_device_that_is_not_the_model_s_changes_nothing(style: str, steps: list[Tensor]) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(1, 6)
    expected = decode(model, ids)
    with torch.no_grad(), torch.device("meta"):
        actual = decode(model, ids)
    assert len(steps) == 2
    assert_same(actual, expected)


def test_fewer_layers_while_drafting_are_stepped(steps: list[Tensor]) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, "large", "mlstm"), tokens(1, 6)
    with torch.no_grad():
        decode(model, ids)
        model.config.num_hidden_layers -= 1
        actual = decode(model, ids)
    assert len(steps) == 4
    assert_same(actual, decode(model, ids))


@pytest.mark.parametrize("style", STYLES)
def test_a_token_writes_over_nothing_that_an_earlier_one_gave(style: str, steps: list[Tensor]) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style, "mixed"), tokens(2, 7)
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        hidden = model.model(ids[:, 5:6], past_key_values=cache).last_hidden_state
        given = hidden, cache.states
        kept = copy.deepcopy(given)
        model(ids[:, 6:], past_key_values=cache)
    assert len(steps) == 2
    assert_identical(given, kept)


@pytest.mark.parametrize("style", STYLES)
def test_threads_share_a_model_and_no_numbers(style: str, steps: list[Tensor]) -> None:
    model, batches = tiny_model(XLSTMForCausalLM, style, "mixed"), [tokens(2, 40), tokens(2, 40).flip(0)]

    def run(ids: Tensor) -> Any:
        with torch.no_grad():
            return decode(model, ids)

    expected = [run(ids) for ids in batches]
    with ThreadPoolExecutor(2) as pool:
        assert_identical(list(pool.map(run, batches)), expected)
    assert len(steps) == 4 * 36


def test_batches_of_other_sizes_and_modes_follow_each_other(steps: list[Tensor]) -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(3, 6)
    expected = decode(model, ids)
    with torch.inference_mode():
        decode(model, ids[:1])
        inferred = decode(model, ids)
    with torch.no_grad():
        assert_same(decode(model, ids), expected)
        decode(model, ids[:2])
    assert_same(inferred, expected)
    assert len(steps) == 8


def test_states_of_another_dtype_or_with_gradients_take_the_long_way(steps: list[Tensor]) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, state_dtype="float64").float(), tokens(1, 6)
    expected = decode(model, ids)
    with torch.no_grad():
        assert_same(decode(model, ids), expected)
    plain = tiny_model(XLSTMForCausalLM)
    cache = plain(ids, use_cache=True).past_key_values
    assert any(x.requires_grad for state in cache.states for x in state.cell)
    with torch.no_grad():
        assert plain(ids[:, :1], past_key_values=cache).logits.isfinite().all()
    assert not steps


def test_an_older_numpy_takes_the_long_way(steps: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(XLSTMForCausalLM), tokens(1, 6)
    monkeypatch.delattr(np, "vecdot")
    with torch.no_grad():
        decode(model, ids)
    assert not steps


@pytest.mark.parametrize("style", STYLES)
def test_gates_of_any_size_are_those_of_the_long_way(style: str, steps: list[Tensor]) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style, "mixed", gate_soft_cap=None), tokens(2, 8)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias" and module.__class__.__name__ in ("Linear", "SLSTMLayer"):
                parameter.data.copy_(torch.linspace(-300.0, 300.0, parameter.numel()).view_as(parameter))
    expected = decode(model, ids)
    with torch.no_grad():
        assert_same(decode(model, ids), expected)
    assert len(steps) == 4
