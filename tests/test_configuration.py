"""XLSTMConfig: strict fields, rules that say the way out, shorthands, rounding, and files that read back as written."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from inputs import STYLES, tiny_config
from tolerances import assert_identical
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM, XLSTMModel
from modeling_xlstm.configuration_xlstm import STYLE_DEFAULTS, STYLE_FIXED

every_style = pytest.mark.parametrize("style", STYLES)
OWN = {field.name: field.default for field in dataclasses.fields(XLSTMConfig)}
OWN = {name: default for name, default in OWN.items() if name not in PreTrainedConfig.__dataclass_fields__}
FLOATS = sorted(name for name, default in OWN.items() if isinstance(default, float))


def two_blocks(style: str = "large", **fields: Any) -> XLSTMConfig:
    """Width 64, one block of each type unless said otherwise."""
    defaults = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "vocab_size": 100, "block_style": style}
    if not {"slstm_at", "variant", "block_types"} & set(fields):
        fields["block_types"] = ["slstm", "mlstm"]
    return XLSTMConfig(**{**defaults, **fields})


# Strictness


@pytest.mark.parametrize(
    ("typo", "field"),
    [
        ("hiden_size", "hidden_size"),
        ("num_head", "num_heads"),
        ("block_type", "block_types"),
        ("gate_softcap", "gate_soft_cap"),
        ("ffn_proj_facter", "ffn_proj_factor"),
        ("tie_word_embedings", "tie_word_embeddings"),
        ("pad_token", "pad_token_id"),
    ],
)
def test_a_typo_raises_and_names_the_field_that_was_meant(typo: str, field: str) -> None:
    with pytest.raises(TypeError, match=f"`{typo}` is not a field of XLSTMConfig. Did you mean `{field}`?"):
        XLSTMConfig(**{typo: 1})


def test_a_name_close_to_no_field_raises_and_the_way_out_it_names_survives_a_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"`qqq` is not a field of XLSTMConfig\. Name it `_qqq` if"):
        XLSTMConfig(qqq=1)
    two_blocks(_qqq={"a": 1}).save_pretrained(tmp_path)
    assert XLSTMConfig.from_pretrained(tmp_path)._qqq == {"a": 1}


def test_a_typo_in_a_file_raises(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "extended_lstm", "hiden_size": 64}), "utf-8")
    for read in (XLSTMConfig.from_json_file, XLSTMConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(TypeError, match="Did you mean `hidden_size`"):
            read(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("hidden_size", True),
        ("hidden_size", None),
        ("num_hidden_layers", "2"),
        ("block_types", "mlstm"),
        ("block_types", ("mlstm", "slstm")),
        ("block_types", [0, 1]),
        ("block_style", "small"),
        ("ffn_rounding", "round"),
        ("proj_rounding", "large"),
        ("hidden_act", "swish"),
        ("input_gate", "tanh"),
        ("recurrent_weight_init", "ones"),
        ("slstm_bias_init", "powerlaw"),
        ("kernel_backend", "cuda"),
        ("state_dtype", "bfloat16"),
        ("use_bias", 1),
        ("dropout", True),
        ("dropout", "0.1"),
        ("gate_soft_cap", "15"),
        ("norm_eps", None),
        ("eos_token_id", "2"),
        ("pad_token_id", 0.0),
    ],
    ids=str,
)
def test_a_wrong_type_or_choice_raises_names_the_field_and_shows_the_value(field: str, value: Any) -> None:
    with pytest.raises(StrictDataclassError, match=f"(?s)'{field}'.*{re.escape(str(value))}"):
        XLSTMConfig(**{field: value})
    config = two_blocks()
    before = getattr(config, field)
    with pytest.raises(StrictDataclassError, match=f"(?s)'{field}'.*{re.escape(str(value))}"):
        setattr(config, field, value)
    assert getattr(config, field) == before


def test_positional_arguments_raise() -> None:
    with pytest.raises(TypeError, match="positional"):
        XLSTMConfig(512)  # type: ignore[call-arg,misc]


COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "slstm_num_heads", "chunk_size",
    "qkv_proj_blocksize", "proj_round_up_to_multiple_of", "ffn_round_up_to_multiple_of",
)  # fmt: skip


@every_style
@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("value", [0, -1])
def test_a_count_below_one_raises_before_anything_divides_by_it(style: str, field: str, value: int) -> None:
    message = f"`{field}` must be at least 1; got {value}"
    for blocks in ({"block_types": ["slstm", "mlstm"]}, {"slstm_at": [0]}, {"variant": "mixed"}):
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            two_blocks(style, **{field: value}, **blocks)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate_soft_cap": 0}, r"`gate_soft_cap` must be above 0 and finite; got 0.0. Use None to leave the cap out"),
        ({"output_logit_soft_cap": -30.0}, r"`output_logit_soft_cap` must be above 0.*; got -30.0. Use None"),
        ({"gate_soft_cap": float("inf")}, r"`gate_soft_cap` must be above 0 and finite; got inf. Use None"),
        ({"qk_dim_factor": 0.0}, r"`qk_dim_factor` must be above 0.*; got 0.0"),
        ({"v_dim_factor": -1.0}, r"`v_dim_factor` must be above 0.*; got -1.0"),
        ({"block_style": "neurips", "proj_factor": 0.0}, r"`proj_factor` must be above 0.*; got 0.0"),
        ({"norm_eps": float("nan")}, r"`norm_eps` must be above 0.*; got nan"),
        ({"normalizer_eps": -1e-6}, r"`normalizer_eps` must be 0 or above.*; got -1e-06"),
        ({"ffn_proj_factor": -1.0}, r"`ffn_proj_factor` must be 0 or above.*; got -1.0"),
        ({"ffn_proj_factor": float("inf")}, r"`ffn_proj_factor` must be 0 or above, and finite; got inf"),
        (
            {"ffn_proj_factor": 0.5, "ffn_rounding": "floor"},
            r"`ffn_proj_factor` must give a width above 0; got 0.5, .*Use 0 to leave.* or ffn_rounding='ceil'",
        ),
        ({"num_labels": 0}, r"`num_labels` must be at least 1; got 0"),
        ({"input_gate_bias_mean": float("nan")}, r"`input_gate_bias_mean` must be finite; got nan"),
        ({"input_gate_bias_std": -0.1}, r"`input_gate_bias_std` must be 0 or above.*; got -0.1"),
        ({"dropout": 1.0}, r"`dropout` is a probability, 0 <= p < 1; got 1.0"),
        ({"ffn_dropout": -0.1}, r"`ffn_dropout` is a probability, 0 <= p < 1; got -0.1"),
        ({"embedding_dropout": 2}, r"`embedding_dropout` is a probability, 0 <= p < 1; got 2.0"),
        ({"classifier_dropout": float("nan")}, r"`classifier_dropout` is a probability, 0 <= p < 1; got nan"),
        (
            {"block_types": ["mlstm"]},
            r"`block_types` must name one type for each of the 2 blocks; got 1. Change `num_hidden_layers` and",
        ),
        ({"block_types": ["mlstm", "lstm"]}, r"`block_types` may hold 'mlstm' and 'slstm'; got \['lstm'\]"),
        ({"slstm_num_heads": 3}, r"`hidden_size` must be a multiple of `slstm_num_heads`; got 64 and 3.*63 and 66"),
        ({"num_heads": 6, "slstm_num_heads": 4}, r"`int\(hidden_size \* qk_dim_factor\)` .* got 32 and 6.*30 and 36"),
        ({"v_dim_factor": 0.8}, r"`int\(hidden_size \* v_dim_factor\)` .*`num_heads`; got 51 and 4.*48 and 52"),
        ({"qk_dim_factor": 0.01}, r"`int\(hidden_size \* qk_dim_factor\)` .*got 0 and 4. .* works is 4\."),
        (
            {"block_style": "neurips", "num_heads": 6, "slstm_num_heads": 4},
            r"inner width.* must be a multiple of `num_heads`; got 128 and 6.*126 and 132",
        ),
        (
            {"block_style": "neurips", "qkv_proj_blocksize": 7},
            r"inner width.* must be a multiple of `qkv_proj_blocksize`; got 128 and 7.*126 and 133",
        ),
        (
            {"block_style": "residual", "num_heads": 5, "slstm_num_heads": 4},
            r"`head_dim` must be at least 1; got None. It can be left out only if `hidden_size`.*64 and 5",
        ),
        ({"block_style": "residual", "head_dim": 0}, r"`head_dim` must be at least 1; got 0"),
        (
            {"block_style": "neurips", "conv_kernel_size": 1},
            r"`conv_kernel_size` must be at least 2 in the neurips style; got 1",
        ),
        ({"slstm_conv_kernel_size": 1}, r"`slstm_conv_kernel_size` must be 0 \(no convolution\) or at least 2; got 1"),
        ({"slstm_conv_kernel_size": -4}, r"`slstm_conv_kernel_size` must be 0 .* or at least 2; got -4"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_broken_rule_says_which_field_what_was_wanted_what_came_and_the_way_out(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        two_blocks(**fields)


def test_rules_of_one_block_type_do_not_bind_the_other() -> None:
    only_mlstm = two_blocks(variant="mlstm", hidden_size=60, num_heads=3, slstm_num_heads=7)
    only_slstm = two_blocks("neurips", variant="slstm", slstm_num_heads=4, num_heads=5, conv_kernel_size=0)
    for config in (only_mlstm, only_slstm):
        XLSTMModel(config)


@every_style
def test_a_field_the_style_has_no_use_for_raises_and_says_so(style: str) -> None:
    others = {
        "proj_factor": 3.0, "proj_round_up_to_multiple_of": 32, "conv_kernel_size": 7, "head_dim": 8,
        "qk_dim_factor": 0.25, "v_dim_factor": 2.0, "norm_bias": True,
    }  # fmt: skip
    assert set(STYLE_FIXED[style]) <= set(others)
    for name, value in others.items():
        if name not in STYLE_FIXED[style]:
            two_blocks(style, **{name: value})
            continue
        only = STYLE_FIXED[style][name]
        message = f"`{name}` has no use with block_style='{style}' and must be {only}; got {value}. Leave it out, or"
        with pytest.raises(StrictDataclassError, match=message):
            two_blocks(style, **{name: value})


# Shorthands and aliases


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ({}, "mmmm"),
        ({"slstm_at": []}, "mmmm"),
        ({"slstm_at": [1]}, "msmm"),
        ({"slstm_at": [3, 0, 3]}, "smms"),
        ({"slstm_at": (-1, -4)}, "smms"),
        ({"slstm_at": range(0, 4, 2)}, "smsm"),
        ({"slstm_at": "all"}, "ssss"),
        ({"variant": "mlstm"}, "mmmm"),
        ({"variant": "slstm"}, "ssss"),
        ({"variant": "mixed"}, "smsm"),
        ({"block_types": ["mlstm", "mlstm", "slstm", "mlstm"]}, "mmsm"),
    ],
    ids=str,
)
def test_each_spelling_of_the_block_types_gives_these_blocks_and_is_not_stored(
    spelling: dict[str, Any], expected: str
) -> None:
    config = XLSTMConfig(num_hidden_layers=4, **spelling)
    assert config.block_types == [f"{letter}lstm" for letter in expected]
    assert not {"slstm_at", "variant"} & set(config.to_dict())


def test_a_mixture_of_odd_depth_begins_and_ends_with_slstm() -> None:
    assert XLSTMConfig(num_hidden_layers=3, variant="mixed").block_types == ["slstm", "mlstm", "slstm"]


@pytest.mark.parametrize(
    ("spelling", "error", "message"),
    [
        ({"slstm_at": [4]}, ValueError, "`slstm_at` must hold block indices from -4 to 3; got 4. -1 is the last"),
        ({"slstm_at": [0, -5]}, ValueError, "`slstm_at` must hold block indices from -4 to 3; got -5"),
        ({"slstm_at": [1.0]}, ValueError, "`slstm_at` must hold block indices from -4 to 3; got 1.0"),
        ({"slstm_at": [True]}, ValueError, "`slstm_at` must hold block indices from -4 to 3; got True"),
        ({"slstm_at": 1}, TypeError, "`slstm_at` must be a list of block indices or 'all'; got 1"),
        ({"slstm_at": 0}, TypeError, "`slstm_at` must be a list of block indices or 'all'; got 0"),
        ({"slstm_at": ""}, TypeError, "`slstm_at` must be a list of block indices or 'all'; got ''"),
        ({"slstm_at": "first"}, TypeError, "`slstm_at` must be a list of block indices or 'all'; got 'first'"),
        ({"variant": "hybrid"}, ValueError, r"`variant` must be one of \['mlstm', 'slstm', 'mixed'\]; got 'hybrid'"),
        ({"variant": ["mixed"]}, ValueError, r"`variant` must be one of .*; got \['mixed'\]"),
        ({"variant": "slstm", "slstm_at": "all"}, ValueError, "Pass one of .*; got slstm_at and variant"),
        ({"variant": "mlstm", "slstm_at": []}, ValueError, "Pass one of .*; got slstm_at and variant"),
        ({"variant": "mlstm", "block_types": ["mlstm"] * 4}, ValueError, "got block_types and variant"),
        ({"slstm_at": [], "block_types": ["mlstm"] * 4}, ValueError, "got block_types and slstm_at"),
        (
            {"variant": "mlstm", "slstm_at": [], "block_types": ["mlstm"] * 4},
            ValueError,
            "got block_types and slstm_at and variant",
        ),
    ],
    ids=str,
)
def test_a_wrong_or_contradictory_spelling_of_the_block_types_raises(
    spelling: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        XLSTMConfig(num_hidden_layers=4, **spelling)


@pytest.mark.parametrize(
    ("alias", "field"),
    [
        ("expand_factor", "ffn_proj_factor"),
        ("num_attention_heads", "num_heads"),
        ("final_logit_softcapping", "output_logit_soft_cap"),
    ],
)
def test_an_alias_reads_and_writes_its_field_is_not_stored_and_may_not_contradict_it(alias: str, field: str) -> None:
    config = XLSTMConfig(**{alias: 2})
    assert getattr(config, alias) == getattr(config, field) == 2
    assert type(getattr(config, field)) is type(OWN[field])
    setattr(config, alias, type(OWN[field])(8))
    assert getattr(config, field) == 8
    assert field in config.to_dict()
    assert alias not in config.to_dict()
    assert getattr(XLSTMConfig(**{alias: 8, field: 8}), field) == 8
    with pytest.raises(ValueError, match=f"`{alias}` is another name of `{field}`; got 8 and 4. Pass only `{field}`"):
        XLSTMConfig(**{alias: 8, field: 4})


# Defaults of the styles


@every_style
def test_a_field_left_out_takes_the_value_of_its_style_and_a_given_one_is_kept(style: str) -> None:
    config = two_blocks(style)
    given = {"block_style", "block_types", "hidden_size", "num_hidden_layers", "num_heads", "vocab_size"}
    derived = {"slstm_num_heads": 4, "head_dim": 16 if style == "residual" else None}
    for name, default in OWN.items():
        if name not in given:
            assert getattr(config, name) == derived.get(name, STYLE_DEFAULTS[style].get(name, default)), name
    changed = {"norm_eps": 0.5, "hidden_act": "relu", "gate_soft_cap": 7.0, "ffn_proj_factor": 1.5}
    config = two_blocks(style, **changed)
    assert {name: getattr(config, name) for name in changed} == changed


def test_the_styles_are_the_published_ones() -> None:
    """Defaults of the official packages (spec sections 1 and 2.3), and of the residual blocks of the issue."""
    large, neurips, residual = (two_blocks(style) for style in STYLES)
    assert (large.qk_dim_factor, large.v_dim_factor, large.ffn_proj_factor) == (0.5, 1.0, 2.6667)
    assert (large.gate_soft_cap, large.output_logit_soft_cap, large.norm_eps) == (15.0, 30.0, 1e-6)
    assert (large.hidden_act, large.use_bias, large.tie_word_embeddings, large.add_out_norm) == (
        "silu", False, False, True,
    )  # fmt: skip
    assert (neurips.proj_factor, neurips.proj_round_up_to_multiple_of, neurips.qkv_proj_blocksize) == (2.0, 64, 4)
    assert (neurips.conv_kernel_size, neurips.slstm_conv_kernel_size, neurips.ffn_proj_factor) == (4, 4, 1.3)
    assert (neurips.gate_soft_cap, neurips.output_logit_soft_cap, neurips.norm_eps) == (None, None, 1e-5)
    assert (neurips.hidden_act, neurips.use_bias, neurips.normalizer_eps) == ("gelu", False, 1e-6)
    assert (residual.hidden_act, residual.ffn_size, residual.qk_size, residual.v_size) == ("gelu", 128, 64, 64)
    assert {config.state_dtype for config in (large, neurips, residual)} == {"float32"}


def test_layer_types_is_a_property_that_no_file_holds() -> None:
    config = two_blocks()
    assert config.layer_types == ["linear_attention"] * 2
    assert "layer_types" not in config.to_dict()
    with pytest.raises(TypeError, match="`layer_types` is not a field"):
        two_blocks(layer_types=["linear_attention"] * 2)


# Widths


@pytest.mark.parametrize("factor", [2.6667, 2.667])
def test_the_feed_forward_of_the_7b_model_is_10944_wide(factor: float) -> None:
    assert XLSTMConfig(hidden_size=4096, num_heads=8, ffn_proj_factor=factor).ffn_size == 10944


@pytest.mark.parametrize(("D", "U"), [(384, 1024), (768, 2048), (512, 1408), (64, 192), (4096, 10944)])
def test_large_feed_forward_widths_are_the_published_ones(D: int, U: int) -> None:
    assert XLSTMConfig(hidden_size=D, num_heads=4).ffn_size == U


def test_the_large_rule_is_no_ceiling_where_the_product_has_a_fraction() -> None:
    """384 * 2.6667 = 1024.0128, of which a true ceiling would make 1088."""
    widths = [XLSTMConfig(hidden_size=384, ffn_rounding=rule).ffn_size for rule in ("large", "ceil", "floor")]
    assert widths == [1024, 1088, 1024]
    # 250 * 0.5 = 125 has none, and is rounded up.
    assert XLSTMConfig(hidden_size=250, num_heads=1, ffn_proj_factor=0.5, ffn_rounding="large").ffn_size == 128


@pytest.mark.parametrize(
    ("D", "factor", "rule", "E"),
    [(16, 2.0, "ceil", 64), (64, 2.0, "ceil", 128), (100, 2.0, "ceil", 256), (100, 2.0, "floor", 192)],
)
def test_neurips_inner_widths_are_rounded_to_64(D: int, factor: float, rule: str, E: int) -> None:
    config = XLSTMConfig(block_style="neurips", hidden_size=D, proj_factor=factor, proj_rounding=rule)
    assert (config.inner_size, config.qk_size, config.v_size) == (E, E, E)


@pytest.mark.parametrize(("D", "U"), [(16, 64), (64, 128), (128, 192), (512, 704), (768, 1024), (1024, 1344)])
def test_neurips_feed_forward_widths_are_rounded_up_to_64(D: int, U: int) -> None:
    assert XLSTMConfig(block_style="neurips", hidden_size=D).ffn_size == U


def test_large_query_and_value_widths_are_truncated_not_rounded() -> None:
    """transformers' built-in rounds its cache to 64 and truncates its layers; here there is one number."""
    config = two_blocks(hidden_size=100, num_heads=3, qk_dim_factor=0.39, v_dim_factor=0.998, slstm_num_heads=4)
    assert (config.qk_size, config.v_size) == (39, 99)
    mixer = XLSTMModel(config).layers[1].mixer
    assert (mixer.q_proj.out_features, mixer.v_proj.out_features) == (39, 99)


def test_residual_heads_need_not_fill_the_width() -> None:
    config = two_blocks("residual", hidden_size=100, num_heads=3, head_dim=16, slstm_num_heads=4)
    assert (config.qk_size, config.v_size) == (48, 48)


def test_a_feed_forward_factor_of_zero_leaves_that_part_out() -> None:
    model = XLSTMModel(two_blocks(ffn_proj_factor=0))
    assert model.config.ffn_size == 0
    assert all(layer.ffn is None and layer.ffn_norm is None for layer in model.layers)


# Numbers and files


@every_style
def test_whole_numbers_are_good_floats(style: str, tmp_path: Path) -> None:
    whole = {"gate_soft_cap": 15, "output_logit_soft_cap": 30, "ffn_proj_factor": 2, "dropout": 0, "norm_eps": 1}
    config = two_blocks(style, **whole)
    assert {name: getattr(config, name) for name in whole} == whole
    assert all(type(getattr(config, name)) is float for name in whole)
    assert config == two_blocks(style, **{name: float(value) for name, value in whole.items()})


def test_every_float_field_takes_a_whole_number() -> None:
    assert "gate_soft_cap" in FLOATS
    for name in FLOATS:
        for style in STYLES:
            only = STYLE_FIXED[style].get(name)
            value = 0 if "dropout" in name else 1
            if only in (None, value):
                assert type(getattr(two_blocks(style, **{name: value}), name)) is float


VARIATIONS: list[dict[str, Any]] = [
    {},
    {"gate_soft_cap": None, "output_logit_soft_cap": None},
    {"gate_soft_cap": 5.0, "output_logit_soft_cap": 7.0},
    {"variant": "slstm", "slstm_num_heads": 2, "slstm_conv_kernel_size": 3, "slstm_bias_init": "small_init"},
    {"eos_token_id": [1, 2], "pad_token_id": 0, "bos_token_id": 3, "tie_word_embeddings": True, "use_bias": True},
    {"num_labels": 5, "problem_type": "regression", "dtype": "bfloat16", "use_cache": False, "state_dtype": "float64"},
]


@every_style
@pytest.mark.parametrize("fields", VARIATIONS, ids=lambda fields: "-".join(fields) or "defaults")
def test_a_saved_configuration_reads_back_as_it_was(style: str, fields: dict[str, Any], tmp_path: Path) -> None:
    config = two_blocks(style, **fields)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert stored["model_type"] == "extended_lstm"
    # A field left out of the file would take another value once a default changes.
    assert set(OWN) <= set(stored)
    assert [stored[cap] for cap in ("gate_soft_cap", "output_logit_soft_cap")] == [
        config.gate_soft_cap,
        config.output_logit_soft_cap,
    ]
    for read in (
        XLSTMConfig.from_pretrained(tmp_path),
        XLSTMConfig.from_json_file(tmp_path / "config.json"),
        AutoConfig.from_pretrained(tmp_path),
        XLSTMConfig.from_dict(config.to_dict()),
        XLSTMConfig.from_dict(config.to_diff_dict()),
    ):
        assert type(read) is XLSTMConfig
        assert same_fields(read, config)
    assert read.num_labels == config.num_labels


def same_fields(one: XLSTMConfig, other: XLSTMConfig) -> bool:
    """Whether two configurations agree in everything but where they were read from and by which release."""
    a, b = one.to_dict(), other.to_dict()
    return all(a[name] == b[name] for name in (a.keys() | b.keys()) - {"_name_or_path", "transformers_version"})


@every_style
def test_a_second_save_writes_the_same_file(style: str, tmp_path: Path) -> None:
    two_blocks(style, gate_soft_cap=None).save_pretrained(tmp_path / "one")
    XLSTMConfig.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / name / "config.json").read_text("utf-8") for name in ("one", "two"))
    assert one == two
    assert json.loads(one)["gate_soft_cap"] is None


def test_a_hand_written_file_may_use_the_shorthands(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    fields = {"block_style": "neurips", "num_hidden_layers": 4, "slstm_at": [-1], "expand_factor": 2, "hidden_size": 64}
    path.write_text(json.dumps({"model_type": "extended_lstm", **fields}), "utf-8")
    expected = XLSTMConfig(**fields)
    assert expected.block_types == ["mlstm", "mlstm", "mlstm", "slstm"]
    assert same_fields(XLSTMConfig.from_json_file(path), expected)
    assert same_fields(AutoConfig.from_pretrained(path), expected)


@every_style
def test_a_copy_and_a_pickle_are_equal_and_independent(style: str) -> None:
    config = two_blocks(style, gate_soft_cap=None)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        other.block_types[0] = "mlstm"
        assert config.block_types == ["slstm", "mlstm"]
        with pytest.raises(StrictDataclassError, match="hidden_size"):
            other.hidden_size = "64"


def test_two_configurations_share_no_list() -> None:
    types = ["slstm", "mlstm"]
    one, two = two_blocks(block_types=list(types)), two_blocks()
    one.block_types.append("mlstm")
    assert two.block_types == types
    assert two_blocks().block_types == types


# Transformers


def test_auto_config_makes_it_by_its_model_type() -> None:
    config = AutoConfig.for_model("extended_lstm", hidden_size=64, num_heads=2, slstm_at=[0])
    assert type(config) is XLSTMConfig
    assert (config.hidden_size, config.block_types[0]) == (64, "slstm")


@every_style
def test_the_difference_from_the_defaults_holds_what_makes_the_model(style: str) -> None:
    difference = two_blocks(style, dropout=0.25).to_diff_dict()
    assert difference["dropout"] == 0.25
    assert difference["block_style"] == style
    assert same_fields(XLSTMConfig(**difference), two_blocks(style, dropout=0.25))
    assert not {"slstm_at", "variant", "layer_types", "expand_factor"} & set(difference)


def test_generation_settings_in_an_old_file_do_no_harm(tmp_path: Path) -> None:
    generation = {
        "max_length": 7,
        "temperature": 0.5,
        "do_sample": True,
        "num_beams": 3,
        "top_k": 5,
        "num_return_sequences": 2,
    }
    config = two_blocks(**generation)
    assert same_fields(config, two_blocks())
    assert not any(hasattr(config, name) for name in generation)
    assert all(getattr(two_blocks(max_new_tokens=9), name) == getattr(config, name) for name in OWN)


def test_keys_that_transformers_itself_writes_are_accepted(tmp_path: Path) -> None:
    keys = {
        "architectures": ["XLSTMForCausalLM"], "auto_map": {"AutoConfig": "configuration_xlstm.XLSTMConfig"},
        "transformers_version": "5.17.0", "torch_dtype": "float32", "_name_or_path": "x", "tokenizer_class": "T",
        "id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}, "quantization_config": {"a": 1},
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**two_blocks().to_dict(), **keys}), "utf-8")
    config = XLSTMConfig.from_pretrained(path)
    assert config.id2label == {0: "no", 1: "yes"}
    assert all(getattr(config, name) == getattr(two_blocks(), name) for name in OWN)


def test_keywords_of_from_pretrained_override_the_file(tmp_path: Path) -> None:
    two_blocks().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, hidden_size=128, num_labels=3, dropout=0.5, num_attention_heads=8)
    assert (config.hidden_size, config.num_labels, config.dropout, config.num_heads) == (128, 3, 0.5, 8)
    assert XLSTMModel(config).layers[1].mixer.q_proj.weight.shape == (64, 128)
    with pytest.raises(StrictDataclassError, match="hidden_size"):
        AutoConfig.from_pretrained(tmp_path, hidden_size="128")


def test_keywords_of_from_pretrained_are_read_as_by_the_constructor(tmp_path: Path) -> None:
    two_blocks().save_pretrained(tmp_path)
    for spelling in ({"slstm_at": [0]}, {"variant": "mixed"}, {"slstm_at": [-3, 2], "num_hidden_layers": 3}):
        wanted = XLSTMConfig(**{"num_hidden_layers": 2, **spelling}).block_types
        assert AutoConfig.from_pretrained(tmp_path, **spelling).block_types == wanted
    config = AutoConfig.from_pretrained(tmp_path, gate_soft_cap=20, expand_factor=3)
    assert [type(x) for x in (config.gate_soft_cap, config.ffn_proj_factor)] == [float, float]
    nothing = {"slstm_at": None, "variant": None}
    assert AutoConfig.from_pretrained(tmp_path, **nothing).block_types == two_blocks().block_types
    with pytest.raises(ValueError, match="got slstm_at and variant"):
        XLSTMConfig.from_pretrained(tmp_path, slstm_at=[0], variant="mixed")


def test_a_variant_that_is_no_kind_of_blocks_names_the_files_of_the_weights(tmp_path: Path) -> None:
    model = XLSTMForCausalLM(two_blocks())
    model.save_pretrained(tmp_path, variant="fp16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, variant="fp16")
    assert_identical(dict(loaded.state_dict()), dict(model.state_dict()))


def test_a_subclass_keeps_styles_rules_and_shorthands() -> None:
    class Wider(XLSTMConfig):
        model_type = "wider_lstm"
        hidden_size = 64
        window: float = 3.0

    config = Wider(num_hidden_layers=2, slstm_at=[1], block_style="neurips", window=5)
    assert (config.hidden_size, config.window, type(config.window)) == (64, 5, float)
    assert (config.block_types, config.proj_factor) == (["mlstm", "slstm"], 2.0)
    assert all(getattr(Wider.from_dict(config.to_dict()), name) == getattr(config, name) for name in [*OWN, "window"])
    with pytest.raises(TypeError, match="Did you mean `window`"):
        Wider(windov=1)
    with pytest.raises(StrictDataclassError, match="multiple of `num_heads`"):
        Wider(num_heads=3)


@pytest.mark.parametrize("model_class", [XLSTMModel, XLSTMForCausalLM])
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_heads", 5, "got 8 and 5"),
        ("num_hidden_layers", 4, "each of the 4 blocks; got 3. Change `num_hidden_layers` and `block_types` together"),
        ("block_types", ["mlstm", "mlstm", "none"], r"may hold 'mlstm' and 'slstm'; got \['none'\]"),
        ("gate_soft_cap", 0.0, "`gate_soft_cap` must be above 0"),
        ("conv_kernel_size", 4, "`conv_kernel_size` has no use"),
        ("slstm_conv_kernel_size", 1, "`slstm_conv_kernel_size` must be 0"),
    ],
)
def test_a_configuration_made_invalid_afterwards_raises_when_a_model_is_built(
    model_class: Any, field: str, value: Any, message: str
) -> None:
    config = tiny_config()
    setattr(config, field, value)
    with pytest.raises(StrictDataclassError, match=message):
        model_class(config)


# Published sizes


@pytest.mark.parametrize(
    ("D", "N", "millions"), [(768, 24, 163.8), (1024, 48, 409.3), (1536, 48, 840.4), (2048, 48, 1422.6)]
)
def test_neurips_models_have_the_published_numbers_of_parameters(D: int, N: int, millions: float) -> None:
    """The xLSTM[1:0] models of arXiv:2405.04517: vocabulary 50304, 4 heads, embeddings not tied."""
    fields = {"hidden_size": D, "num_hidden_layers": N, "num_heads": 4, "vocab_size": 50304}
    assert round(parameters(block_style="neurips", **fields) / 1e6, 1) == millions


def test_the_7b_model_has_the_published_number_of_parameters() -> None:
    fields = {"hidden_size": 4096, "num_hidden_layers": 32, "num_heads": 8, "vocab_size": 50304}
    assert round(parameters(ffn_proj_factor=2.667, qk_dim_factor=0.5, **fields) / 1e9, 2) == 6.87


def parameters(**fields: Any) -> int:
    with torch.device("meta"):
        model = XLSTMForCausalLM(XLSTMConfig(**fields))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    return sum(p.numel() for p in model.parameters())
