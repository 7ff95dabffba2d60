"""What training costs and what its gates do: counted, and compared with what torch did and the cells saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import PRODUCTS, STYLES, tiny_config, tiny_model, tokens
from tolerances import FLOAT32, assert_same
from torch.utils.flop_counter import FlopCounterMode

from modeling_xlstm import XLSTMForCausalLM, costs_xlstm, ops_mlstm_tokens
from modeling_xlstm.costs_xlstm import flops_per_token, known_peak_flops, measured_peak_flops
from modeling_xlstm.gates_xlstm import GateStatistics
from modeling_xlstm.memory_xlstm import enable_checkpointing
from modeling_xlstm.ops_lean import soft_cap
from modeling_xlstm.states_xlstm import Call


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("T", "chunk_size"), [(60, 64), (48, 16), (50, 32)])
def test_flops_are_those_that_torch_counts_in_a_forward_pass(
    style: str, T: int, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops_mlstm_tokens, "MARGIN", 1)  # without the columns that only fill a cache line
    # So few tokens that no blocks of block-diagonal maps are laid together, with zeros between them.
    config, B = tiny_config(style, chunk_size=chunk_size, use_bias=style == "neurips"), 1
    model = XLSTMForCausalLM(config)
    with torch.no_grad():
        states = model(tokens(B, 1), use_cache=True).past_key_values  # at the start nothing reads the zeros
        with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
            model(tokens(B, T), past_key_values=states)
    flops = flops_per_token(config, T)
    # Convolutions multiply and add tap by tap, which torch does not count.
    assert counter.get_total_flops() == B * T * (flops.forward - flops.convolutions)
    taps = 4 * (2 * 16 + (config.inner_size if style == "neurips" else 0))
    assert flops.convolutions == 2 * taps
    assert flops.training == 3 * flops.forward


def test_the_flops_of_the_published_7b_take_no_memory_to_count() -> None:
    from modeling_xlstm import XLSTMConfig

    config = XLSTMConfig(vocab_size=50304, hidden_size=4096, num_hidden_layers=32, num_heads=8)
    flops = flops_per_token(config, 8192)
    assert 6.5e9 < (flops.projections + flops.head) / 2 < 6.9e9


def test_devices_are_known_by_whole_words_of_their_names() -> None:
    assert known_peak_flops("NVIDIA H100 80GB HBM3", "half") == 989e12
    assert known_peak_flops("NVIDIA H100 PCIe", "half") == 756e12
    assert known_peak_flops("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    assert known_peak_flops("NVIDIA L4", "float32") == 30.3e12
    assert known_peak_flops("NVIDIA L40S", "half") == 362e12
    assert known_peak_flops("NVIDIA A10G", "half") is None
    assert measured_peak_flops(torch.float32, size=32, rounds=1) > 0


def test_what_a_cpu_can_do_is_what_layers_get_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = [0.0], []

    def multiply(a: torch.Tensor, b: torch.Tensor, bias: None) -> None:
        asked.append((a.shape, b.shape))
        clock[0] += 0.5 ** len(asked)

    monkeypatch.setattr(costs_xlstm, "linear", multiply)
    monkeypatch.setattr(costs_xlstm.time, "perf_counter", lambda: clock[0])
    assert measured_peak_flops(torch.float32, size=32, rounds=4) == 2**4 * 2 * 32**3
    assert asked == 4 * [((32, 32), (32, 32))]


@torch.no_grad()
def pre_activations(model: Any, ids: torch.Tensor) -> list[list[torch.Tensor]]:
    """Input and forget gates of every block, from what its cell is given token by token and the h before."""
    x, gates = model.model.embed_tokens(ids), []
    for block in model.model.layers:
        state, h, y, pair = None, None, [], [[], []]
        for token in x.split(1, 1):
            out, state = block(token, Call(state, record=True))
            y.append(out)
            for gate in range(2):
                slstm = hasattr(block.mixer, "recurrent")
                z = state.tape.inputs[gate if slstm else 3 + gate][:, 0]
                z = z if slstm else soft_cap(z, model.config.gate_soft_cap)
                if h is not None:
                    z = z + torch.einsum("bhi,hoi->bho", h, block.mixer.recurrent[gate])
                pair[gate].append(z)
            h = getattr(state.cell, "h", None)
        x = torch.cat(y, 1)
        gates.append([torch.stack(z) for z in pair])
    return gates


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gate_statistics_are_those_of_the_pre_activations_the_cells_use(style: str, checkpointing: bool) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(2, 9)
    gates = pre_activations(model, ids)
    if checkpointing:
        enable_checkpointing(model)
    statistics = GateStatistics()
    with statistics.watching(model.train()):
        model(ids, labels=ids).loss.backward()
    numbers = statistics.take()
    assert statistics.take() == {}
    assert not any(module._forward_pre_hooks for module in model.modules())
    for i, (kind, pair) in enumerate(zip(model.config.block_types, gates, strict=True)):
        for name, x in zip(("input", "forget"), pair, strict=True):
            for what, value in (("mean", x.mean()), ("min", x.min()), ("max", x.max())):
                assert_same(numbers[f"gates/{i:02d}_{kind}/{name}_{what}"], value.item(), FLOAT32)


def test_gate_statistics_leave_out_a_pass_that_holds_padding_only() -> None:
    """The last micro-batches of an epoch may: their lanes have ended."""
    model, ids = tiny_model(XLSTMForCausalLM), tokens(2, 9)
    statistics, seen = GateStatistics(), []
    for masks in ([1], [1, 0]):
        with statistics.watching(model):
            for mask in masks:
                model(ids, attention_mask=torch.full_like(ids, mask))
        seen.append(statistics.take())
    assert seen[0] == seen[1]
