"""Fresh weights: mean and standard deviation of every parameter, and which weights initialisation may not touch.

The formulas are those of the official packages: NeurIPS as after `reset_parameters()`, Large as in transformers'
xLSTM, except that output gates and feed-forward gates are not zeroed there only because their names contain "gate".
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import STYLES, tiny_config
from tolerances import assert_drawn_with, assert_identical, assert_same
from torch import Tensor, nn

from modeling_xlstm import (
    XLSTMConfig,
    XLSTMForCausalLM,
    XLSTMForSequenceClassification,
    XLSTMForTokenClassification,
)

every_style = pytest.mark.parametrize("style", STYLES)
Rule = Callable[[Tensor], None]


def wide_config(style: str, **fields: Any) -> XLSTMConfig:
    """Wide and deep enough for statistics, with every parameter that the style can have."""
    sizes = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 5, "num_heads": 16, "slstm_num_heads": 4}
    biases = {"use_bias": True, "ffn_bias": True, "norm_bias": style != "neurips"}
    blocks = {} if "block_types" in fields else {"variant": "mixed"}
    return XLSTMConfig(block_style=style, **{**sizes, **biases, **blocks, "slstm_conv_kernel_size": 4, **fields})


# Rules


def normal(std: float) -> Rule:
    def rule(x: Tensor) -> None:
        assert_drawn_with(x, 0.0, std)
        assert x.numel() < 1000 or x.abs().max() > 2 * std, "no tails: not a normal distribution"

    return rule


def uniform(bound: float) -> Rule:
    def rule(x: Tensor) -> None:
        assert_drawn_with(x, 0.0, bound / math.sqrt(3))
        assert x.abs().max() <= bound

    return rule


def constant(value: float) -> Rule:
    return lambda x: assert_drawn_with(x, value, 0.0)


def each(values: Any) -> Rule:
    """Every entry is known; `values` lie along the last dim."""
    return lambda x: assert_same(x, torch.tensor(values, dtype=torch.float64).to(x.dtype).expand(x.shape))


def rules(config: XLSTMConfig) -> dict[str, Rule]:
    """The rule of every parameter, by its name, with "mlstm", "slstm" or "any" for the block it is in."""
    D, N, H = config.hidden_size, config.num_hidden_layers, config.num_heads
    small, wang = normal(math.sqrt(2 / (5 * D))), normal(2 / (N * math.sqrt(D)))
    zero, one = constant(0.0), constant(0.0 if config.block_style == "neurips" else 1.0)
    table: dict[str, Rule] = {
        r"model\.embed_tokens\.weight|lm_head\.weight|score\.weight": small,
        r"score\.bias": zero,
        r"model\.norm\.weight|any\.(mixer|ffn)_norm\.weight|slstm\.mixer\.norm\.weight": one,
        r"mlstm\.mixer\.cell\.norm\.weight": one,
        r"any\.ffn\.(gate|up)_proj\.weight": small,
        r"any\.ffn\.down_proj\.weight": wang
        if config.block_style == "neurips"
        else normal(2 / (N * config.ffn_size**0.5)),
        r"any\.ffn\.(gate|up|down)_proj\.bias": zero,
        r"slstm\.mixer\.[ifzo]gate\.weight": small,
        r"slstm\.mixer\.conv\.(weight|bias)": uniform(config.slstm_conv_kernel_size**-0.5),
        r"slstm\.mixer\.recurrent": zero if config.recurrent_weight_init == "zeros" else uniform(D**-0.5),
        r"mlstm\.mixer\.[qkv]_proj\.weight": small,
        r"mlstm\.mixer\.[qkv]_proj\.bias": zero,
        r"mlstm\.mixer\.[if]gate\.weight": zero,
        r"mlstm\.mixer\.igate\.bias": constant(-10.0) if config.block_style == "large" else normal(0.1),
        r"mlstm\.mixer\.fgate\.bias": each([3 + 3 * h / (H - 1) for h in range(H)]),
    }
    if config.block_style == "neurips":
        return table | {
            r"mlstm\.mixer\.up_proj\.weight": small,
            r"mlstm\.mixer\.down_proj\.weight": wang,
            r"mlstm\.mixer\.(up|down)_proj\.bias": zero,
            r"mlstm\.mixer\.skip": constant(1.0),
            r"mlstm\.mixer\.conv\.(weight|bias)": uniform(config.conv_kernel_size**-0.5),
        }
    return table | {
        r"mlstm\.mixer\.ogate\.weight": small,
        r"mlstm\.mixer\.out_proj\.weight": wang,
        r"mlstm\.mixer\.(ogate|out_proj)\.bias": zero,
        r"(model|any|slstm|mlstm)\.(mixer\.|cell\.)*\w*norm\.bias": zero,
    }


def slstm_bias(config: XLSTMConfig, block: int) -> Rule:
    """Gate order i, f, z, o; only the forget gate's differ from zero, and in one choice only from block to block."""
    P, N = config.hidden_size // config.slstm_num_heads, config.num_hidden_layers
    if config.slstm_bias_init == "standard":
        return uniform(config.hidden_size**-0.5)
    if config.slstm_bias_init == "powerlaw_blockdependent":
        exponent = 0.3 + 1.3 * (block / (N - 1) if N > 1 else 0.0)
        forget = [5 - 12 * (j / (P - 1) if P > 1 else 0.0) ** exponent for j in range(P)]
    elif config.slstm_bias_init == "small_init":
        forget = [3 + 3 * j / (P - 1) for j in range(P)]
    else:
        forget = [0.0] * P

    def rule(x: Tensor) -> None:
        for gate, bias in zip("ifzo", x, strict=True):
            each(forget if gate == "f" else [0.0] * P)(bias)

    return rule


def kind(name: str, config: XLSTMConfig) -> tuple[str, int]:
    """A parameter's name as `rules` has it, and the number of its block, -1 outside."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    if not found:
        return name, -1
    block, rest = int(found[1]), found[2]
    return (f"{config.block_types[block]}.{rest}" if rest.startswith("mixer.") else f"any.{rest}"), block


def rule_for(name: str, config: XLSTMConfig) -> Rule:
    short, block = kind(name, config)
    if short == "slstm.mixer.bias":
        return slstm_bias(config, block)
    matching = [rule for pattern, rule in rules(config).items() if re.fullmatch(pattern, short)]
    assert len(matching) == 1, f"{len(matching)} rows of the table are for `{short}`"
    return matching[0]


def assert_initialised(model: nn.Module, config: XLSTMConfig) -> None:
    """Every parameter alone, and every kind of parameter over all blocks, keeps its rule."""
    pooled: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        try:
            rule_for(name, config)(parameter.detach())
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        if kind(name, config)[0] != "slstm.mixer.bias":
            pooled.setdefault(kind(name, config)[0], []).append(parameter.detach())
    for short, parameters in pooled.items():
        name = next(name for name, _ in model.named_parameters() if kind(name, config)[0] == short)
        try:
            rule_for(name, config)(torch.stack(parameters))
        except AssertionError as error:
            raise AssertionError(f"{short} of {len(parameters)} blocks together: {error}") from None


# Fresh models


@every_style
@pytest.mark.parametrize("model_class", [XLSTMForCausalLM, XLSTMForSequenceClassification, XLSTMForTokenClassification])
def test_every_parameter_of_a_fresh_model_is_drawn_as_specified(style: str, model_class: Any) -> None:
    config = wide_config(style, num_labels=20)
    assert_initialised(model_class(config), config)


@every_style
def test_every_row_of_the_table_is_needed(style: str) -> None:
    config = wide_config(style)
    names = {kind(name, config)[0] for name, _ in XLSTMForCausalLM(config).named_parameters()} | {"score.bias"}
    unused = [pattern for pattern in rules(config) if not any(re.fullmatch(pattern, name) for name in names)]
    assert unused == []


@every_style
@pytest.mark.parametrize("bias_init", ["powerlaw_blockdependent", "small_init", "zeros", "standard"])
@pytest.mark.parametrize("recurrent_init", ["zeros", "standard"])
def test_every_choice_of_slstm_initialisation_is_as_specified(style: str, bias_init: str, recurrent_init: str) -> None:
    config = wide_config(style, variant="slstm", slstm_bias_init=bias_init, recurrent_weight_init=recurrent_init)
    assert_initialised(XLSTMForCausalLM(config), config)


@every_style
def test_the_power_law_falls_from_5_to_minus_7_and_differs_from_block_to_block(style: str) -> None:
    model = XLSTMForCausalLM(wide_config(style, variant="slstm"))
    forget = [layer.mixer.bias[1] for layer in model.model.layers]
    for bias in forget:
        assert_same(bias[:, 0], torch.full_like(bias[:, 0], 5.0))
        assert_same(bias[:, -1], torch.full_like(bias[:, -1], -7.0))
        assert (bias.diff() < 0).all()
    # Later blocks forget less: a higher exponent keeps more of the biases near 5.
    assert all((later[:, 1:-1] > earlier[:, 1:-1]).all() for earlier, later in itertools.pairwise(forget))


@every_style
@pytest.mark.parametrize("blocks", [1, 2])
def test_heads_of_one_cell_and_models_of_one_block_are_finite(style: str, blocks: int) -> None:
    """The official formula divides by zero for both."""
    fields = {"slstm_num_heads": 64, "num_hidden_layers": blocks, "block_types": ["slstm"] * blocks}
    config = wide_config(style, **fields)
    model = XLSTMForCausalLM(config)
    assert_initialised(model, config)
    assert_same(model.model.layers[-1].mixer.bias[1], torch.full((64, 1), 5.0))


@every_style
@pytest.mark.parametrize(("mean", "std"), [(-3.0, 0.0), (1.0, 0.5)])
def test_input_gate_biases_follow_the_configuration(style: str, mean: float, std: float) -> None:
    config = wide_config(style, variant="mlstm", input_gate_bias_mean=mean, input_gate_bias_std=std)
    biases = torch.cat([layer.mixer.igate.bias for layer in XLSTMForCausalLM(config).model.layers])
    assert_drawn_with(biases, mean, std)


@every_style
def test_a_fresh_norm_multiplies_by_one_and_adds_nothing(style: str) -> None:
    model = XLSTMForCausalLM(wide_config(style)).double()
    norms = {name: m for name, m in model.named_modules() if type(m).__name__ in ("RMSNorm", "LayerNorm", "HeadNorm")}
    assert {type(norm).__name__ for norm in norms.values()} == {
        "RMSNorm" if style == "large" else "LayerNorm",
        "HeadNorm",
    }
    for norm in norms.values():
        heads = 4 if type(norm).__name__ == "HeadNorm" else 1
        x = torch.randn(2, 3, heads, norm.weight.numel() // heads, dtype=torch.float64)
        plain = F.rms_norm if type(norm).__name__ == "RMSNorm" else F.layer_norm
        expected = plain(x, x.shape[-1:], eps=norm.eps).flatten(-2)
        assert_same(norm(x if heads > 1 else x.flatten(-2)), expected)


@every_style
def test_output_gates_and_feed_forward_gates_are_not_zeroed(style: str) -> None:
    """transformers' xLSTM zeroes them because of their names, and every feed-forward part starts dead."""
    model = XLSTMForCausalLM(wide_config(style))
    alive = [
        name for name, p in model.named_parameters() if re.search(r"ogate\.weight|gate_proj\.weight", name) and p.any()
    ]
    mlstm, slstm = (model.config.block_types.count(name) for name in ("mlstm", "slstm"))
    # One output gate in every mixer but neurips mLSTM, one feed-forward gate in every feed-forward part but residual.
    assert len(alive) == {"large": 2 * (mlstm + slstm), "neurips": 2 * slstm, "residual": mlstm + slstm}[style]


@every_style
def test_every_parameter_learns_from_the_first_steps_on(style: str) -> None:
    """Zeros may hold back the gradients of others for a step, not longer."""
    torch.manual_seed(1)
    model = XLSTMForCausalLM(wide_config(style, vocab_size=20, input_gate_bias_mean=0.0))
    ids = torch.randint(20, (2, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learnt: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        learnt |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert {name for name, _ in model.named_parameters()} - learnt == set()


@every_style
def test_a_seed_gives_the_same_weights_and_another_seed_others(style: str) -> None:
    def draw(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return XLSTMForCausalLM(wide_config(style, recurrent_weight_init="standard")).state_dict()

    one, again, other = draw(3), draw(3), draw(4)
    assert_identical(again, one)
    drawn = {name for name, x in one.items() if x.unique().numel() > 100}
    assert drawn
    assert all(not torch.equal(one[name], other[name]) for name in drawn)


@every_style
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_drawn_in_another_dtype_keep_the_rules(style: str, dtype: torch.dtype) -> None:
    config = wide_config(style)
    model = XLSTMForCausalLM._from_config(config, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_initialised(model, config)


# Without memory, and with weights that are already there


@every_style
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_made_on_meta_is_initialised_like_any_other(style: str, tied: bool) -> None:
    config = wide_config(style, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = XLSTMForCausalLM(config)
    assert {x.device.type for x in [*model.parameters(), *model.buffers()]} == {"meta"}
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    model.init_weights()
    assert_initialised(model, config)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def checkpoint(config: XLSTMConfig, model_class: Any = XLSTMForCausalLM) -> dict[str, Tensor]:
    """Weights that no initialisation could draw."""
    return {name: 50 + torch.randn_like(x) for name, x in model_class(config).state_dict().items()}


def load(weights: dict[str, Tensor], config: XLSTMConfig, model_class: Any = XLSTMForCausalLM) -> tuple[Any, set[str]]:
    """A model with copies of these weights, for loading may take tensors as they are; and the keys it missed."""
    copies = {name: x.clone() for name, x in weights.items()}
    loaded = model_class.from_pretrained(None, config=config, state_dict=copies, output_loading_info=True)
    return loaded[0], set(loaded[1]["missing_keys"])


@every_style
def test_loading_draws_nothing_over_what_was_loaded(style: str) -> None:
    config = tiny_config(style, use_bias=True, ffn_bias=True, norm_bias=style != "neurips")
    weights = checkpoint(config)
    model, missing = load(weights, config)
    assert not missing
    assert_identical(model.state_dict(), weights)
    model = XLSTMForCausalLM(config)
    model.load_state_dict(weights)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        model._init_weights(module)
    assert_identical(model.state_dict(), weights)


@every_style
@pytest.mark.parametrize("bias_init", ["powerlaw_blockdependent", "standard"])
def test_a_missing_parameter_is_drawn_as_specified_and_no_other_is_touched(style: str, bias_init: str) -> None:
    fields = {"recurrent_weight_init": "standard" if bias_init == "standard" else "zeros", "slstm_bias_init": bias_init}
    gates = {} if style == "large" else {"input_gate_bias_mean": 0.0, "input_gate_bias_std": 0.1}
    config = wide_config(style, num_hidden_layers=2, block_types=["slstm", "mlstm"], **fields, **gates)
    weights = checkpoint(config)
    for missing in weights:
        kept = {name: x for name, x in weights.items() if name != missing}
        model, keys = load(kept, config)
        assert keys == {missing}
        loaded = dict(model.state_dict())
        drawn = loaded.pop(missing)
        assert_identical(loaded, kept)
        rule_for(missing, config)(drawn)


@every_style
def test_a_head_that_is_missing_is_drawn_and_the_body_is_the_checkpoint(style: str) -> None:
    config = wide_config(style, num_labels=30)
    weights = {name: x for name, x in checkpoint(config).items() if name.startswith("model.")}
    for model_class in (XLSTMForTokenClassification, XLSTMForSequenceClassification):
        model, missing = load(weights, config, model_class)
        loaded = dict(model.state_dict())
        heads = {name: loaded.pop(name) for name in list(loaded) if name.startswith("score.")}
        assert_identical(loaded, weights)
        assert missing == set(heads) != set()
        for name, x in heads.items():
            rule_for(name, config)(x)


# A vocabulary that grows or shrinks


@every_style
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("by_mean", [False, True])
def test_tokens_that_are_added_get_sensible_rows_and_the_others_keep_theirs(
    style: str, tied: bool, by_mean: bool
) -> None:
    config = wide_config(style, tie_word_embeddings=tied, pad_token_id=0)
    model = XLSTMForCausalLM(config)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.resize_token_embeddings(450, mean_resizing=by_mean)
    after = model.state_dict()
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    for name in before:
        assert_identical(after[name][:300] if name in tables else after[name], before[name])
    for name in tables:
        added = after[name][300:]
        assert added.shape == (150, 64)
        if by_mean:
            # Around the mean of the rows there, much closer than they are.
            spread = (added - before[name].mean(0)).norm(dim=-1)
            assert spread.max() < before[name].norm(dim=-1).min() / 2
        else:
            rule_for(name, config)(added)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.vocab_size == model.lm_head.out_features == 450
    assert model(torch.tensor([[299, 300, 449]])).logits.shape == (1, 3, 450)


@every_style
@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_shrinks_keeps_its_first_rows(style: str, tied: bool) -> None:
    model = XLSTMForCausalLM(wide_config(style, tie_word_embeddings=tied))
    before = model.model.embed_tokens.weight.detach().clone()
    model.resize_token_embeddings(200)
    assert_identical(model.model.embed_tokens.weight, before[:200])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model(torch.tensor([[199]])).logits.shape == (1, 1, 200)
