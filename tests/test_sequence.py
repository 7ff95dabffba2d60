"""Continuous input, pooling, the encoder of windows, and counts that need no model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import STYLES, tiny_config, tiny_model, tokens
from tolerances import assert_identical, assert_same

from modeling_xlstm import (
    XLSTMConfig,
    XLSTMForCausalLM,
    XLSTMForForecasting,
    XLSTMForSequenceClassification,
    XLSTMForTokenClassification,
    XLSTMModel,
    build_encoder,
    output_size,
    param_count,
    recommended_defaults,
)

every_style = pytest.mark.parametrize("style", STYLES)
CLASSES = [XLSTMModel, XLSTMForCausalLM, XLSTMForSequenceClassification, XLSTMForTokenClassification]


def frames(B: int = 2, T: int = 9, width: int = 3) -> torch.Tensor:
    return torch.randn(B, T, width, dtype=torch.float64)


@every_style
def test_frames_and_ids_of_one_model_are_read_alike(style: str) -> None:
    model, x, ids = tiny_model(XLSTMModel, style, input_size=3, vocab_size=61), frames(), tokens(2, 9)
    assert_same(model(input_features=x)[0], model(inputs_embeds=model.frame_proj(x))[0])
    assert_same(model(ids)[0], model(inputs_embeds=model.embed_tokens(ids))[0])
    first = model(input_features=x[:, :4], use_cache=True)
    second = model(input_features=x[:, 4:], past_key_values=first.past_key_values)
    assert_same(torch.cat([first[0], second[0]], 1), model(input_features=x)[0])


@pytest.mark.parametrize("pooling", ["last", "mean"])
@every_style
def test_padded_frames_are_classified_as_if_alone(style: str, pooling: str) -> None:
    fields = {"input_size": 3, "vocab_size": 0, "pooling": pooling, "num_labels": 5}
    model, x = tiny_model(XLSTMForSequenceClassification, style, **fields), frames()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, [0, 1, 5]] = 0
    output = model(input_features=x, attention_mask=mask, labels=torch.tensor([1, 4]))
    real = mask[1].bool()
    alone = model(input_features=x[1:, real])
    assert_same(output.logits[1:], alone.logits)
    hidden = model.model(input_features=x[1:, real])[0]
    pooled = hidden[:, -1] if pooling == "last" else hidden.mean(1)
    assert_same(alone.logits, model.score(pooled))
    assert_same(output.loss, torch.nn.functional.cross_entropy(output.logits, torch.tensor([1, 4])))


def test_mean_pooling_of_ids_passes_over_padding() -> None:
    model, ids = tiny_model(XLSTMForSequenceClassification, pooling="mean"), tokens(2, 7)
    ids[1, 5:] = 0
    assert_same(model(ids).logits[1:], model(ids[1:, :5]).logits)


def test_frames_that_are_not_finite_in_padding_reach_no_gradient() -> None:
    model, x, mask = tiny_model(XLSTMForSequenceClassification, input_size=3), frames(), torch.ones(2, 9).long()
    read = model.model.frame_proj
    mask[1, 4:] = 0
    given = {"attention_mask": mask, "labels": torch.tensor([0, 1])}
    expected = torch.autograd.grad(model(input_features=x, **given).loss, read.weight)
    x[1, 4:] = torch.nan
    assert_identical(list(torch.autograd.grad(model(input_features=x, **given).loss, read.weight)), list(expected))


@pytest.mark.parametrize("model_class", [XLSTMModel, XLSTMForSequenceClassification, XLSTMForTokenClassification])
def test_what_reads_frames_is_the_input_embedding_of_a_model_without_ids(model_class: Any) -> None:
    """Adapters over checkpointed blocks hook it for their gradients; Trainer gathers the main input."""
    model = tiny_model(model_class, input_size=3, vocab_size=0)
    reader = model.base_model.frame_proj
    assert model.get_input_embeddings() is reader
    assert model.main_input_name == "input_features"
    with pytest.raises(ValueError, match="needs a model with a `vocab_size`"):
        model.resize_token_embeddings(70)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert model(input_features=frames())[0].requires_grad


def test_a_model_of_half_precision_rounds_frames_and_none_takes_wider_ones() -> None:
    model, x = tiny_model(XLSTMForTokenClassification, input_size=3, vocab_size=0).bfloat16(), frames().float()
    assert_identical(model(input_features=x).logits, model(input_features=x.bfloat16()).logits)
    with pytest.raises(ValueError, match=r"`input_features` must be float32 .* got torch\.float64. Use `.float\(\)`"):
        model.float()(input_features=x.double())


def test_every_token_of_frames_can_be_labelled() -> None:
    model = tiny_model(XLSTMForTokenClassification, input_size=3, vocab_size=0, num_labels=4)
    assert model(input_features=frames()).logits.shape == (2, 9, 4)


@pytest.mark.parametrize(
    ("fields", "call", "message"),
    [
        ({"input_size": 3}, {"input_ids": tokens(2, 5)}, "made without `vocab_size`"),
        ({}, {"input_features": frames()}, "made without `input_size`"),
        ({"input_size": 3}, {"input_features": frames(width=4)}, r"must be \[B, T, 3\]"),
        ({"input_size": 3}, {}, "Pass exactly one of"),
        ({"input_size": 3}, {"input_ids": tokens(2, 5), "input_features": frames()}, "Pass exactly one of"),
    ],
    ids=["no vocabulary", "no frames", "another width", "nothing", "both"],
)
def test_bad_inputs_are_named(fields: dict[str, Any], call: dict[str, Any], message: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2}
    with pytest.raises(ValueError, match=message):
        XLSTMModel(XLSTMConfig(**sizes, **fields))(**call)


def test_an_input_size_leaves_the_embedding_out_unless_a_vocabulary_is_named() -> None:
    config = XLSTMConfig(input_size=3)
    assert config.vocab_size == 0
    assert XLSTMConfig.from_dict(config.to_dict()).vocab_size == 0
    both = XLSTMConfig(input_size=3, vocab_size=50304)
    assert XLSTMConfig.from_dict(both.to_diff_dict()).vocab_size == 50304
    with pytest.raises(ValueError, match="needs a `vocab_size`"):
        XLSTMForCausalLM(tiny_config(input_size=3, vocab_size=0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prediction_length": 3}, "needs an `input_size`"),
        ({"input_size": 0}, "`input_size` must be at least 1, or None"),
        ({"input_size": 1, "prediction_length": 0}, "`prediction_length` must be at least 1"),
        ({"context_length": 0}, "`context_length` must be at least 1"),
        ({"num_past_covariates": -1}, "`num_past_covariates` must be 0 or above"),
        ({"quantiles": [0.5, 0.1]}, "`quantiles` must rise"),
        ({"quantiles": [0.5, 1.0]}, "`quantiles` must rise"),
        ({"quantiles": []}, "`quantiles` must rise"),
    ],
    ids=str,
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        XLSTMConfig(**fields)


def test_the_builder_encodes_windows_by_their_last_frame() -> None:
    encoder = build_encoder(7)
    config = encoder.model.config
    assert (config.block_types, config.ffn_size) == (["slstm", "mlstm"] * 2, 512)
    assert {name: getattr(config, name, None) for name in recommended_defaults() if name != "variant"} == {
        name: value for name, value in recommended_defaults().items() if name != "variant"
    }
    assert encoder(torch.randn(2, 60, 7)).shape == (2, 256) == (2, output_size(config))
    small, x = build_encoder(3, 16, 2, num_heads=2, head_dim=8, window_size=9).double().eval(), frames()
    assert_identical(small(x), small.model(input_features=x)[0][:, -1])
    mask = torch.ones(2, 9)
    mask[1, 6:] = 0
    assert_same(small(x, mask)[1:], small(x[1:, :6]))
    with pytest.raises(ValueError, match="may hold 9 frames"):
        small(frames(T=10))


@given(
    style=st.sampled_from(STYLES),
    fields=st.fixed_dictionaries(
        {
            "variant": st.sampled_from(["mixed", "mlstm", "slstm"]),
            "use_bias": st.booleans(),
            "ffn_bias": st.booleans(),
            "slstm_norm_weight": st.booleans(),
            "add_out_norm": st.booleans(),
            "tie_word_embeddings": st.booleans(),
            "slstm_conv_kernel_size": st.sampled_from([0, 3]),
            "ffn_proj_factor": st.sampled_from([0.0, 1.3, 2.0]),
            "num_labels": st.integers(2, 4),
            "input_size": st.sampled_from([None, 1, 3]),
        }
    ),
    covariates=st.integers(0, 2),
    head=st.sampled_from(["gaussian", "quantile"]),
)
def test_the_count_of_parameters_is_exact_without_a_model(
    style: str, fields: dict[str, Any], covariates: int, head: str
) -> None:
    fields["norm_bias"] = fields["use_bias"] and style != "neurips"
    config = tiny_config(style, **fields)
    with torch.device("meta"):
        for model_class in CLASSES:
            assert param_count(config, model_class) == sum(p.numel() for p in model_class(config).parameters())
        if fields["input_size"] is not None:
            series = {"prediction_length": 3, "num_past_covariates": covariates, "forecast_distribution": head}
            config = tiny_config(style, **fields, **series)
            built = XLSTMForForecasting(config)
            assert param_count(config, XLSTMForForecasting) == sum(p.numel() for p in built.parameters())
    with pytest.raises(ValueError, match="`model_class` must be one of"):
        param_count(config, torch.nn.Linear)
