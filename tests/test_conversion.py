"""Official checkpoints convert both ways without losing a bit, and what does not fit is refused by name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import CASES, load_case
from safetensors.torch import load_file, save_file
from tolerances import assert_identical, assert_same
from torch import Tensor
from transformers import xLSTMConfig, xLSTMForCausalLM
from transformers.initialization import no_init_weights

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM, convert_from, convert_to

Config = dict[str, Any]
Weights = dict[str, Tensor]

BY_CASE = pytest.mark.parametrize("name", CASES)
TIED = [name for name in CASES if load_case(name).config.get("tie_weights")]
SLSTM = [name for name in CASES if load_case(name).config.get("slstm_block")]
EMBEDDING = {
    "neurips": "token_embedding.weight", "large": "embedding.weight", "transformers": "backbone.embeddings.weight",
}  # fmt: skip
FUSED = {
    "mlstm_layer.qkv_opreact": ("mlstm_layer.q", "mlstm_layer.k", "mlstm_layer.v", "mlstm_layer.ogate_preact"),
    "mlstm_layer.ifgate_preact": ("mlstm_layer.igate_preact", "mlstm_layer.fgate_preact"),
    "ffn.proj_up_gate_z": ("ffn.proj_up_gate", "ffn.proj_up"),
}
SMALL = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2}


def style_of(family: str) -> str:
    return "neurips" if family == "neurips" else "large"


def random_weights(config: XLSTMConfig) -> Weights:
    """A state dict of ours without two equal tensors."""
    weights = XLSTMForCausalLM(config).state_dict()
    for x in {x.data_ptr(): x for x in weights.values()}.values():
        x.normal_(std=0.3)
    return weights


def logits_of(config: XLSTMConfig, weights: Weights, ids: Tensor) -> Tensor:
    model = XLSTMForCausalLM(config).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(ids).logits


@functools.cache
def pair(family: str) -> tuple[XLSTMConfig, Weights, Config, Weights]:
    """A small model, ours and official; shared, so no test may change it."""
    slstm_at = [1] if family == "neurips" else []
    ours = XLSTMConfig(block_style=style_of(family), slstm_at=slstm_at, **SMALL)
    weights = random_weights(ours)
    return ours, weights, *convert_to(family, ours, weights)


def source(family: str, convert: Any) -> tuple[Any, Weights]:
    """What `convert_from` or `convert_to` is given of that pair."""
    ours, weights, official, official_weights = pair(family)
    return (official, official_weights) if convert is convert_from else (ours, weights)


def rename(weights: Weights) -> Weights:
    """The keys of the package's xLSTMLarge as transformers names them."""
    return {EMBEDDING["transformers"] if name == EMBEDDING["large"] else name: x for name, x in weights.items()}


def fuse(weights: Weights) -> Weights:
    """The fused weights of single ones, in alphabetical order as safetensors has them."""
    fused = dict(weights)
    for name in weights:
        for target, parts in FUSED.items():
            prefix, first, suffix = name.partition(parts[0] + ".")
            if first:
                fused[f"{prefix}{target}.{suffix}"] = torch.cat([fused.pop(f"{prefix}{x}.{suffix}") for x in parts])
    return dict(sorted(fused.items()))


def as_cuda(kernel: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A vanilla sLSTM cell in the layout of the CUDA backend, entry by entry."""
    H, P = kernel.shape[0], kernel.shape[2]
    cuda_kernel, cuda_bias = torch.empty(H, P, 4 * P), torch.empty(4 * H * P)
    for head in range(H):
        for gate in range(4):
            for out in range(P):
                cuda_bias[(head * 4 + gate) * P + out] = bias[(gate * H + head) * P + out]
                for channel in range(P):
                    cuda_kernel[head, channel, gate * P + out] = kernel[head, gate * P + out, channel]
    return cuda_kernel, cuda_bias


def merge(config: Config, change: Config) -> Config:
    """A copy of a nested configuration with changes deep within."""
    merged = copy.deepcopy(config)
    for name, value in change.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if nested else value
    return merged


def slstm(**changes: Any) -> Config:
    return {"slstm_block": {"slstm": changes}}


def ffn(**changes: Any) -> Config:
    return {"slstm_block": {"feedforward": changes}}


def lost(written: Any, official: Any, path: str = "") -> list[str]:
    """The names whose value in `written` is not that of `official`."""
    if isinstance(written, dict) and isinstance(official, dict):
        return [x for name in written for x in lost(written[name], official.get(name), f"{path}.{name}")]
    return [] if written == official else [path]


class TestRoundTrip:
    @BY_CASE
    def test_official_weights_come_back_bit_by_bit(self, name: str) -> None:
        case = load_case(name)
        config, weights = convert_from(case.family, case.config, case.weights)
        _, back = convert_to(case.family, config, weights, weight_mode=case.weight_mode)
        assert_identical(back, case.weights)

    @BY_CASE
    def test_our_weights_and_configuration_come_back_bit_by_bit(self, name: str) -> None:
        case = load_case(name)
        config, _ = convert_from(case.family, case.config, case.weights)
        weights = random_weights(config)
        official = convert_to(case.family, config, weights, weight_mode=case.weight_mode)
        config_back, back = convert_from(case.family, *official)
        assert_identical(back, weights)
        assert config_back.to_dict() == config.to_dict()

    @BY_CASE
    def test_every_field_written_is_the_official_one(self, name: str) -> None:
        case = load_case(name)
        config, weights = convert_from(case.family, case.config, case.weights)
        written, _ = convert_to(case.family, config, weights, weight_mode=case.weight_mode)
        written.pop("context_length", None)
        # This one describes mLSTM blocks and has none; all else is written as it was.
        unused = [".mlstm_block"] if name == "n_mix_all_unused_mlstm" else []
        assert lost(written, case.config) == unused

    @BY_CASE
    def test_converted_weights_load_strictly(self, name: str) -> None:
        case = load_case(name)
        weights = {**case.weights}
        if name in TIED:
            weights["lm_head.weight"] = weights[EMBEDDING["neurips"]]
        config, weights = convert_from(case.family, case.config, weights)
        XLSTMForCausalLM(config).load_state_dict(weights, strict=True)

    @BY_CASE
    def test_converted_weights_share_no_memory_and_can_be_saved(self, name: str, tmp_path: Path) -> None:
        case = load_case(name)
        config, weights = convert_from(case.family, case.config, case.weights)
        # The other mode than the one read, so that what was fused is cut and what was single is joined.
        weight_mode = {"neurips": "single", "large": "single" if case.weight_mode == "fused" else "fused"}[case.family]
        for converted in (weights, convert_to(case.family, config, weights, weight_mode=weight_mode)[1]):
            assert len({x.untyped_storage().data_ptr() for x in converted.values()}) == len(converted)
            save_file(converted, tmp_path / "model.safetensors")
            assert_identical(load_file(tmp_path / "model.safetensors"), converted)

    @BY_CASE
    def test_nothing_passed_in_is_changed(self, name: str) -> None:
        case = load_case(name)
        given, config = {key: x.clone() for key, x in case.weights.items()}, copy.deepcopy(case.config)
        ours, weights = convert_from(case.family, config, given)
        before, fields = {key: x.clone() for key, x in weights.items()}, ours.to_dict()
        convert_to(case.family, ours, weights, weight_mode=case.weight_mode)
        assert list(given) == list(case.weights)
        assert_identical(given, case.weights)
        assert config == case.config
        assert_identical(weights, before)
        assert ours.to_dict() == fields


class TestNeurips:
    @pytest.mark.parametrize("name", SLSTM)
    def test_the_cuda_layout_of_slstm_cells_is_told_from_the_vanilla_one(self, name: str) -> None:
        case = load_case(name)
        cuda = dict(case.weights)
        for key in case.weights:
            if key.endswith("._recurrent_kernel_"):
                bias = key.replace("_recurrent_kernel_", "_bias_")
                cuda[key], cuda[bias] = as_cuda(cuda[key], cuda[bias])
        assert {key for key in cuda if cuda[key].shape != case.weights[key].shape}
        config, weights = convert_from("neurips", case.config, cuda)
        assert_identical(weights, convert_from("neurips", case.config, case.weights)[1])
        assert_identical(convert_to("neurips", config, weights)[1], case.weights)

    def test_the_module_named_fgate_feeds_the_input_gate(self) -> None:
        _, weights, _, official = pair("neurips")
        block = "xlstm_block_stack.blocks.1.xlstm."
        assert_identical(official[f"{block}fgate.weight"], weights["model.layers.1.mixer.igate.weight"])
        assert_identical(official[f"{block}igate.weight"], weights["model.layers.1.mixer.fgate.weight"])

    @pytest.mark.parametrize("name", TIED)
    def test_a_tied_head_may_be_stored_or_left_out(self, name: str) -> None:
        case = load_case(name)
        assert "lm_head.weight" not in case.weights
        stored = {**case.weights, "lm_head.weight": case.weights[EMBEDDING["neurips"]].clone()}
        config, weights = convert_from("neurips", case.config, stored)
        assert_identical(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
        assert_identical(convert_to("neurips", config, weights)[1], stored)
        config, weights = convert_from("neurips", case.config, case.weights)
        assert "lm_head.weight" not in weights
        assert_identical(convert_to("neurips", config, weights)[1], case.weights)

    @pytest.mark.parametrize("name", TIED)
    def test_a_tied_head_stored_alone_is_the_embedding_both_ways(self, name: str) -> None:
        case = load_case(name)
        config, weights = convert_from("neurips", case.config, case.weights)
        alone = dict(case.weights)
        alone["lm_head.weight"] = alone.pop(EMBEDDING["neurips"])
        assert_identical(convert_from("neurips", case.config, alone)[1], weights)
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
        assert_identical(convert_to("neurips", config, weights)[1], case.weights)

    @pytest.mark.parametrize("name", TIED)
    def test_a_tied_head_of_other_values_is_refused(self, name: str) -> None:
        case = load_case(name)
        other = {**case.weights, "lm_head.weight": case.weights[EMBEDDING["neurips"]] + 1}
        with pytest.raises(ValueError, match=r"lm_head\.weight.*tied"):
            convert_from("neurips", case.config, other)

    @pytest.mark.parametrize(
        ("change", "types"),
        [
            ({"slstm_at": [-1]}, ["mlstm", "slstm"]),
            ({"slstm_at": [1, 1], "_block_map": "0,1"}, ["mlstm", "slstm"]),
            ({"slstm_at": [-2, 1]}, ["slstm", "slstm"]),
            ({"slstm_at": "all"}, ["slstm", "slstm"]),
            ({"slstm_at": [], "mlstm_block": None}, ["slstm", "slstm"]),
            ({"slstm_at": []}, ["mlstm", "mlstm"]),
        ],
        ids=str,
    )
    def test_every_spelling_of_the_block_types_is_understood(self, change: Config, types: list[str]) -> None:
        ours = XLSTMConfig(block_style="neurips", block_types=types, **SMALL)
        _, weights = convert_to("neurips", ours, random_weights(ours))
        config, _ = convert_from("neurips", merge(pair("neurips")[2], change), weights)
        assert config.block_types == types
        assert config.to_dict() == ours.to_dict()

    @pytest.mark.parametrize(("asked", "width"), [(16, 18), (14, 18), (24, 36), (9, 9)])
    def test_blocks_of_a_width_that_does_not_divide_are_as_many_as_the_package_makes(
        self, asked: int, width: int
    ) -> None:
        sizes = {**SMALL, "hidden_size": 24, "proj_factor": 1.5, "proj_round_up_to_multiple_of": 1}
        ours = XLSTMConfig(block_style="neurips", qkv_proj_blocksize=width, **sizes)
        weights = random_weights(ours)
        official, official_weights = convert_to("neurips", ours, weights)
        change = {"mlstm_block": {"mlstm": {"qkv_proj_blocksize": asked}}}
        config, back = convert_from("neurips", merge(official, change), official_weights)
        assert config.to_dict() == ours.to_dict()
        assert_identical(back, weights)

    def test_dropout_reaches_the_embedding_only_where_it_is_asked_for(self) -> None:
        *_, config, weights = pair("neurips")
        for asked, expected in ((True, 0.25), (False, 0.0)):
            change = {"dropout": 0.25, "add_embedding_dropout": asked}
            ours, ours_weights = convert_from("neurips", merge(config, change), weights)
            assert (ours.dropout, ours.embedding_dropout, ours.ffn_dropout) == (0.25, expected, 0.0)
            assert lost(change, convert_to("neurips", ours, ours_weights)[0]) == []

    @pytest.mark.parametrize(
        ("official", "function"),
        [
            ("gelu", F.gelu), ("relu", F.relu), ("relu^2", lambda x: F.relu(x) ** 2), ("sigmoid", F.sigmoid),
            ("swish", F.silu), ("selu", F.selu),
        ],
    )  # fmt: skip
    def test_every_activation_of_the_package_is_ours(self, official: str, function: Callable[[Tensor], Tensor]) -> None:
        *_, config, weights = pair("neurips")
        change = ffn(act_fn=official)
        ours, ours_weights = convert_from("neurips", merge(config, change), weights)
        x = torch.randn(100)
        assert_identical(XLSTMForCausalLM(ours).model.layers[1].ffn.act(x), function(x))
        assert lost(change, convert_to("neurips", ours, ours_weights)[0]) == []


class TestLarge:
    @pytest.mark.parametrize("family", ["large", "transformers"])
    @pytest.mark.parametrize("use_bias", [False, True], ids=["no bias", "bias"])
    def test_fused_is_single_for_more_than_ten_blocks_in_any_order(self, family: str, use_bias: bool) -> None:
        biases = dict.fromkeys(("use_bias", "norm_bias", "ffn_bias"), use_bias)
        config = XLSTMConfig(**{**SMALL, "num_hidden_layers": 12}, **biases)
        weights = random_weights(config)
        if use_bias:
            weights["model.norm.bias"].zero_()
        official, single = convert_to(family, config, weights)
        fused = fuse(single)
        assert not {key.rpartition(".")[0] for key in fused} & {
            f"backbone.blocks.10.{x}" for x in sum(FUSED.values(), ())
        }
        _, back = convert_from(family, {**official, "weight_mode": "fused"}, fused)
        assert_identical(back, weights)
        written, written_weights = convert_to(family, config, weights, weight_mode="fused")
        assert_identical(written_weights, fused)
        assert written == {**official, "weight_mode": "fused"}

    def test_the_formats_differ_in_the_name_of_the_embedding_only(self) -> None:
        config, weights, _, official = pair("large")
        assert_identical(convert_to("transformers", config, weights)[1], rename(official))


class TestTransformers:
    """Against transformers' own model, in its own fallback code, without a cache (whose sizes it rounds)."""

    @staticmethod
    def model(**changes: Any) -> xLSTMForCausalLM:
        sizes = {"vocab_size": 61, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 4}
        model = xLSTMForCausalLM(xLSTMConfig(**{**sizes, **changes})).eval().requires_grad_(False)
        for x in model.parameters():
            x.normal_(std=0.15)
        return model

    CHANGES = pytest.mark.parametrize(
        "changes",
        [
            {},
            {"use_bias": True},
            {"qk_dim_factor": 1.0, "v_dim_factor": 0.5, "num_heads": 2, "ffn_round_up_to_multiple_of": 32},
            {
                "hidden_size": 96,
                "num_heads": 3,
                "num_hidden_layers": 3,
                "gate_soft_cap": 2.0,
                "output_logit_soft_cap": 3.0,
            },
            {"norm_eps": 0.1, "eps": 0.1, "chunk_size": 16},
        ],
        ids=str,
    )

    @pytest.mark.parametrize("T", [7, 64, 65])
    @CHANGES
    def test_logits_are_those_of_its_model(self, changes: Config, T: int) -> None:
        theirs = self.model(**changes)
        ids = torch.randint(61, (2, T))
        config, weights = convert_from("transformers", theirs.config.to_dict(), theirs.state_dict())
        assert_same(logits_of(config, weights, ids), theirs(ids, use_cache=False).logits)

    @CHANGES
    def test_its_weights_come_back_and_load_strictly(self, changes: Config) -> None:
        theirs = self.model(**changes)
        config, weights = convert_from("transformers", theirs.config.to_dict(), theirs.state_dict())
        written, back = convert_to("transformers", config, weights)
        assert_identical(back, dict(theirs.state_dict()))
        again = xLSTMForCausalLM(xLSTMConfig(**written)).eval()
        again.load_state_dict(back, strict=True)
        assert again.config.to_dict() == {**theirs.config.to_dict(), "architectures": written["architectures"]}
        ids = torch.randint(61, (2, 7))
        assert_identical(again(ids, use_cache=False).logits, theirs(ids, use_cache=False).logits)

    def test_the_blocks_are_as_many_as_num_blocks_says_as_in_its_model(self) -> None:
        theirs = self.model(num_blocks=2, num_hidden_layers=32)
        assert (theirs.config.num_hidden_layers, len(theirs.backbone.blocks)) == (32, 2)
        config, weights = convert_from("transformers", theirs.config.to_dict(), theirs.state_dict())
        ids = torch.randint(61, (2, 7))
        assert_same(logits_of(config, weights, ids), theirs(ids, use_cache=False).logits)
        written, back = convert_to("transformers", config, weights)
        assert (written["num_blocks"], written["num_hidden_layers"]) == (2, 2)
        assert_identical(back, dict(theirs.state_dict()))

    def test_fused_weights_load_strictly(self) -> None:
        config = XLSTMConfig(**SMALL)
        written, weights = convert_to("transformers", config, random_weights(config), weight_mode="fused")
        # Its own initialisation fails in this mode.
        with no_init_weights():
            theirs = xLSTMForCausalLM(xLSTMConfig(**written))
        theirs.load_state_dict(weights, strict=True)

    def test_a_published_configuration_converts_with_the_fields_its_class_has_no_use_for(self) -> None:
        ours, weights, _, official = pair("transformers")
        published = {
            "architectures": ["xLSTMForCausalLM"], "model_type": "xlstm", "vocab_size": 19, "embedding_dim": 16,
            "num_blocks": 2, "num_heads": 2, "head_dim": 8, "ffn_proj_factor": 2.6667, "cell_norm_eps": 1e-6,
            "mlstm_round_up_to_multiple_of": 64, "lm_head_bias": False, "torch_dtype": "float32", "pad_token_id": None,
            "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True, "add_out_norm": False,
        }  # fmt: skip
        config, back = convert_from("transformers", published, official)
        assert config.to_dict() == ours.to_dict()
        assert_identical(back, weights)

    def test_a_bias_of_the_last_norm_is_refused(self) -> None:
        config = XLSTMConfig(**SMALL, use_bias=True, norm_bias=True, ffn_bias=True)
        with pytest.raises(ValueError, match=r"`model\.norm\.bias` must be zero"):
            convert_to("transformers", config, random_weights(config))


class TestDefaults:
    @pytest.mark.parametrize(
        ("family", "given", "fields"),
        [
            (
                "large",
                {"vocab_size": 19, "embedding_dim": 384, "num_blocks": 1, "num_heads": 2},
                {"hidden_size": 384, "num_heads": 2, "qk_dim_factor": 0.5, "v_dim_factor": 1.0, "use_bias": False,
                 "ffn_proj_factor": 2.6667, "ffn_round_up_to_multiple_of": 64, "ffn_rounding": "large",
                 "norm_eps": 1e-6, "normalizer_eps": 1e-6, "gate_soft_cap": 15.0, "output_logit_soft_cap": 30.0,
                 "add_out_norm": True, "chunk_size": 64, "tie_word_embeddings": False},
            ),
            (
                "transformers",
                {"hidden_size": 128, "num_blocks": 1, "vocab_size": 19},
                {"hidden_size": 128, "num_heads": 8, "qk_dim_factor": 0.5, "v_dim_factor": 1.0, "use_bias": False,
                 "ffn_proj_factor": 2.667, "ffn_round_up_to_multiple_of": 64, "ffn_rounding": "large",
                 "norm_eps": 1e-6, "normalizer_eps": 1e-6, "gate_soft_cap": 15.0, "output_logit_soft_cap": 30.0,
                 "chunk_size": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "use_cache": True},
            ),
            (
                "neurips",
                {"vocab_size": 19, "mlstm_block": {}},
                {"hidden_size": 128, "num_heads": 4, "block_types": ["mlstm"], "proj_factor": 2.0,
                 "proj_rounding": "ceil", "proj_round_up_to_multiple_of": 64, "conv_kernel_size": 4,
                 "qkv_proj_blocksize": 4, "use_bias": False, "dropout": 0.0, "add_out_norm": True, "norm_eps": 1e-5,
                 "normalizer_eps": 1e-6, "gate_soft_cap": None, "output_logit_soft_cap": None,
                 "tie_word_embeddings": False},
            ),
            (
                "neurips",
                {"vocab_size": 19, "slstm_block": {}},
                {"hidden_size": 128, "num_heads": 4, "block_types": ["slstm"], "slstm_num_heads": 4,
                 "slstm_conv_kernel_size": 4, "slstm_norm_weight": True, "recurrent_weight_init": "zeros",
                 "slstm_bias_init": "powerlaw_blockdependent", "dropout": 0.0, "embedding_dropout": 0.0,
                 "ffn_proj_factor": 1.3, "ffn_round_up_to_multiple_of": 64, "ffn_rounding": "ceil",
                 "hidden_act": "gelu", "ffn_bias": False, "ffn_dropout": 0.0},
            ),
            (
                "neurips",
                {"vocab_size": 19, "slstm_block": {"feedforward": None}},
                {"hidden_size": 128, "num_heads": 4, "block_types": ["slstm"], "ffn_proj_factor": 0.0},
            ),
            (
                "neurips",
                {"vocab_size": 19, "num_blocks": 2, "mlstm_block": {}, "slstm_block": {"slstm": {"num_heads": 2}},
                 "slstm_at": [0]},
                {"hidden_size": 128, "num_heads": 4, "slstm_num_heads": 2, "block_types": ["slstm", "mlstm"]},
            ),
        ],
        ids=["large", "transformers", "neurips mlstm", "neurips slstm", "neurips no feed-forward", "neurips mixed"],
    )  # fmt: skip
    def test_what_is_left_out_has_the_default_of_the_package(self, family: str, given: Config, fields: Config) -> None:
        num_blocks = len(fields.get("block_types", [0]))
        ours = XLSTMConfig(block_style=style_of(family), vocab_size=19, num_hidden_layers=num_blocks, **fields)
        _, weights = convert_to(family, ours, random_weights(ours))
        assert convert_from(family, given, weights)[0].to_dict() == ours.to_dict()


class TestRefusedWeights:
    FAMILIES = pytest.mark.parametrize("family", EMBEDDING)
    BOTH_WAYS = pytest.mark.parametrize("convert", [convert_from, convert_to])

    @FAMILIES
    @BOTH_WAYS
    def test_an_unknown_key_is_named(self, family: str, convert: Any) -> None:
        config, weights = source(family, convert)
        with pytest.raises(ValueError, match=r"1 unused \(a\.stranger\)"):
            convert(family, config, {**weights, "a.stranger": torch.ones(1)})

    @FAMILIES
    @BOTH_WAYS
    def test_every_missing_key_is_named(self, family: str, convert: Any) -> None:
        config, weights = source(family, convert)
        for missing in weights:
            with pytest.raises(ValueError, match="1 missing") as error:
                convert(family, config, {key: x for key, x in weights.items() if key != missing})
            assert f"({missing})" in str(error.value)

    @FAMILIES
    @BOTH_WAYS
    def test_every_tensor_of_another_shape_is_named(self, family: str, convert: Any) -> None:
        config, weights = source(family, convert)
        for wrong, x in weights.items():
            with pytest.raises(ValueError, match="1 of another shape") as error:
                convert(family, config, {**weights, wrong: x[None]})
            assert f"({wrong} {list(x[None].shape)}, wanted {list(x.shape)})" in str(error.value)

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
    @FAMILIES
    @BOTH_WAYS
    def test_a_prefix_of_all_names_is_named_alone(self, family: str, convert: Any, prefix: str) -> None:
        config, weights = source(family, convert)
        message = rf"with `{prefix}` before them.*removeprefix\('{prefix}'\)`\.$"
        with pytest.raises(ValueError, match=message):
            convert(family, config, {prefix + name: x for name, x in weights.items()})

    @FAMILIES
    def test_of_many_names_three_are_listed(self, family: str) -> None:
        *_, config, weights = pair(family)
        with pytest.raises(ValueError, match=rf"got {len(weights)} missing \(([^;]+; ){{3}}\.\.\.\)\. Check"):
            convert_from(family, config, {})

    @pytest.mark.parametrize("num_blocks", [1, 3])
    @pytest.mark.parametrize("family", ["large", "transformers"])
    def test_another_number_of_blocks_is_refused(self, family: str, num_blocks: int) -> None:
        *_, config, weights = pair(family)
        with pytest.raises(ValueError, match=rf"(unused|missing) .*backbone\.blocks\.{min(num_blocks, 2)}\."):
            convert_from(family, {**config, "num_blocks": num_blocks}, weights)

    @pytest.mark.parametrize("family", ["large", "transformers"])
    def test_weights_of_the_other_mode_are_refused(self, family: str) -> None:
        *_, config, weights = pair(family)
        with pytest.raises(ValueError, match=r"unused .*missing .*qkv_opreact"):
            convert_from(family, {**config, "weight_mode": "fused"}, weights)


class TestRefusedConfigurations:
    @pytest.mark.parametrize(
        ("family", "change", "message"),
        [
            ("neurips", {"typo": 1}, "`typo` must be one of"),
            ("neurips", {"mlstm_block": {"typo": 1}}, "`mlstm_block.typo` must be one of"),
            ("neurips", {"mlstm_block": {"mlstm": {"typo": 1}}}, "`mlstm_block.mlstm.typo` must be one of"),
            ("neurips", slstm(function="lstm"), "`slstm_block.slstm.function` must be 'slstm'"),
            ("neurips", slstm(forward_clipval=1.0), "`slstm_block.slstm.forward_clipval`"),
            ("neurips", slstm(gradient_recurrent_cut=True), "gradient_recurrent_cut` must be False"),
            ("neurips", slstm(gradient_recurrent_clipval=1.0), "gradient_recurrent_clipval` must"),
            ("neurips", slstm(initial_val=1.0), "initial_val` must be 0.0; got 1.0"),
            ("neurips", slstm(input_shape="SBGNH"), "input_shape` must be 'BSGNH'; got 'SBGNH'"),
            ("neurips", slstm(output_shape="SBNH"), "output_shape` must be 'BNSH'; got 'SBNH'"),
            ("neurips", ffn(act_fn="tanh"), "feedforward.act_fn` must be one of .* got 'tanh'"),
            ("neurips", ffn(ff_type="ffn"), "feedforward.ff_type` must be 'ffn_gated'"),
            ("neurips", {"slstm_block": None}, "`slstm_block` must describe the sLSTM blocks of '0,1'; got None"),
            ("neurips", {"_block_map": "1,0"}, "`_block_map` must be '0,1'; got '1,0'"),
            ("neurips", {"_block_map": "0,1,0"}, "`_block_map` must be '0,1'; got '0,1,0'"),
            ("neurips", {"slstm_at": [2]}, "`slstm_at` must hold block indices .* got 2"),
            ("large", {"typo": 1}, "`typo` must be one of"),
            ("large", {"chunkwise_kernel": "parallel--native_siging"}, "`chunkwise_kernel` .* got '.*siging'"),
            ("large", {"weight_mode": "both"}, "`weight_mode` must be one of .* got 'both'"),
            ("transformers", {"model_type": "mamba"}, "`model_type` must be 'xlstm'; got 'mamba'"),
            ("transformers", {"embedding_dim": 32}, "`hidden_size` and `embedding_dim` must be .* got 16 and 32"),
        ],
        ids=str,
    )  # fmt: skip
    def test_what_ours_cannot_express_is_named(self, family: str, change: Config, message: str) -> None:
        *_, config, weights = pair(family)
        with pytest.raises(ValueError, match=message):
            convert_from(family, merge(config, change), weights)

    @pytest.mark.parametrize(
        ("family", "missing"),
        [
            ("neurips", "vocab_size"),
            *(("large", x) for x in ("vocab_size", "embedding_dim", "num_blocks", "num_heads")),
        ],
    )
    def test_what_the_package_has_no_default_for_is_named(self, family: str, missing: str) -> None:
        *_, config, weights = pair(family)
        with pytest.raises(ValueError, match=f"`{missing}` must be given"):
            convert_from(family, {name: value for name, value in config.items() if name != missing}, weights)

    @pytest.mark.parametrize(
        ("family", "fields", "message"),
        [
            ("neurips", {"block_style": "large"}, "`block_style` must be 'neurips'; got 'large'"),
            ("neurips", {"block_style": "residual"}, "`block_style` must be 'neurips'"),
            ("neurips", {"norm_eps": 1e-6}, "`norm_eps` must be 1e-05"),
            ("neurips", {"normalizer_eps": 0.1}, "`normalizer_eps` must be 1e-06"),
            ("neurips", {"input_gate": "sigmoid"}, "`input_gate` must be 'exp'"),
            ("neurips", {"gate_soft_cap": 15.0}, "`gate_soft_cap` must be None; got 15.0"),
            ("neurips", {"output_logit_soft_cap": 30.0}, "`output_logit_soft_cap` must be None; got 30.0"),
            ("neurips", {"embedding_dropout": 0.1}, "`embedding_dropout` must be 0.0; got 0.1"),
            ("neurips", {"variant": "mixed", "ffn_rounding": "large"}, "`ffn_rounding` must be one of .*got 'large'"),
            ("large", {"variant": "mixed"}, "`block_types` must be .* got .*slstm"),
            ("large", {"block_style": "residual"}, "`block_style` must be 'large'"),
            ("large", {"input_gate": "sigmoid"}, "`input_gate` must be 'exp'; got 'sigmoid'"),
            ("large", {"dropout": 0.1}, "`dropout` must be 0.0; got 0.1"),
            ("large", {"ffn_dropout": 0.1}, "`ffn_dropout` must be 0.0; got 0.1"),
            ("large", {"embedding_dropout": 0.1}, "`embedding_dropout` must be 0.0; got 0.1"),
            ("large", {"tie_word_embeddings": True}, "`tie_word_embeddings` must be False; got True"),
            ("large", {"hidden_act": "gelu"}, "`hidden_act` must be 'silu'; got 'gelu'"),
            ("large", {"ffn_rounding": "ceil"}, "`ffn_rounding` must be 'large'; got 'ceil'"),
            ("large", {"ffn_proj_factor": 0.0}, "`ffn_size` must be 'above 0'; got 0"),
            ("large", {"norm_bias": True}, "`norm_bias` must be False; got True"),
            ("large", {"use_bias": True, "norm_bias": True}, "`ffn_bias` must be True; got False"),
            ("transformers", {"variant": "mixed"}, "`block_types` must be .* to convert to 'transformers'"),
            ("transformers", {"block_style": "neurips"}, "`block_style` must be 'large'"),
            ("transformers", {"add_out_norm": False}, "`add_out_norm` must be True; got False"),
            ("transformers", {"gate_soft_cap": None}, "`gate_soft_cap` must be 'a number'; got None"),
            ("transformers", {"output_logit_soft_cap": None}, "`output_logit_soft_cap` must be 'a number'; got None"),
        ],
        ids=str,
    )  # fmt: skip
    def test_what_the_family_cannot_express_is_named(self, family: str, fields: Config, message: str) -> None:
        config = XLSTMConfig(**{"block_style": style_of(family), **SMALL, **fields})
        message = message.replace("; got", f" to convert to '{family}'; got")
        with pytest.raises(ValueError, match=message):
            convert_to(family, config, random_weights(config))

    def test_an_unknown_family_or_mode_is_named(self) -> None:
        ours, weights, official, official_weights = pair("neurips")
        with pytest.raises(ValueError, match=r"`family` must be one of .* got 'slstm'"):
            convert_from("slstm", official, official_weights)
        with pytest.raises(ValueError, match=r"`family` must be one of .* got 'slstm'"):
            convert_to("slstm", ours, weights)
        with pytest.raises(ValueError, match=r"`weight_mode` must be one of .* got 'fused'"):
            convert_to("neurips", ours, weights, weight_mode="fused")

    def test_what_is_no_dictionary_or_is_one_instead_of_a_configuration_is_named_with_what_to_pass(self) -> None:
        ours, weights, official, official_weights = pair("transformers")
        model = XLSTMForCausalLM(ours)
        with pytest.raises(TypeError, match=r"`config` must be a dictionary; got xLSTMConfig\. Pass .*`to_dict\(\)`"):
            convert_from("transformers", xLSTMConfig(**official), official_weights)
        with pytest.raises(TypeError, match=r"`weights` must be .* got XLSTMForCausalLM\. Pass .*`state_dict\(\)`"):
            convert_from("transformers", official, model)
        with pytest.raises(TypeError, match=r"`weights` must be .* got XLSTMForCausalLM\. Pass .*`state_dict\(\)`"):
            convert_to("transformers", ours, model)
        with pytest.raises(TypeError, match=r"`config` must be an XLSTMConfig; got dict\."):
            convert_to("transformers", ours.to_dict(), weights)
        *_, nested, nested_weights = pair("neurips")
        with pytest.raises(TypeError, match=r"`mlstm_block\.mlstm` must be a dictionary; got NoneType\."):
            convert_from("neurips", merge(nested, {"mlstm_block": {"mlstm": None}}), nested_weights)
        with pytest.raises(TypeError, match=r"`slstm_block` must be a dictionary; got list\."):
            convert_from("neurips", merge(nested, {"slstm_block": ["slstm"]}), nested_weights)
