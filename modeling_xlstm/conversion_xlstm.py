"""Official checkpoints to ours and back: tables of configuration fields, and the doors.

Families: "neurips" (`xlstm` package, xLSTMLMModel), "large" (`xlstm` package, xLSTMLarge) and "transformers" (its
built-in xLSTMForCausalLM, the format of NX-AI/xLSTM-7b). Every source key is used and every target key filled, or the
conversion raises. `convert_from` and `convert_to` take whole models; `plan_from` and `plan_to` give the links of one
from the shapes of its tensors alone, to be followed tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .configuration_xlstm import XLSTMConfig
from .links_xlstm import Link, Shape, Weights, check_shapes, is_cuda, model_links

Reader = Callable[[Mapping[str, Any]], XLSTMConfig]
Writer = Callable[[XLSTMConfig, str], dict[str, Any]]


class Section(NamedTuple):
    """One dictionary of an official configuration.

    Attributes:
        fields: official name -> our field.
        defaults: the package's, where it has another one than our style; `REQUIRED` where it has none.
        fixed: official name -> the only value our models can express.
        ignored: what changes no output (speed, precision, training, derived numbers), and what is read by hand.
        written: what `convert_to` adds, so that the package's model runs on any machine and for any length.
    """

    fields: Mapping[str, str]
    defaults: Mapping[str, Any] = {}
    fixed: Mapping[str, Any] = {}
    ignored: frozenset[str] = frozenset()
    written: Mapping[str, Any] = {}


REQUIRED = object()
# fmt: off
# Official value -> ours, for the fields that do not share their values.
VALUES: Mapping[str, Mapping[Any, str]] = {
    "proj_rounding": {True: "ceil", False: "floor"}, "ffn_rounding": {True: "ceil", False: "floor"},
    "hidden_act": {
        "gelu": "gelu", "relu": "relu", "relu^2": "relu2", "selu": "selu", "sigmoid": "sigmoid", "swish": "silu",
    },
}
NEURIPS = Section(
    {
        "vocab_size": "vocab_size", "embedding_dim": "hidden_size", "num_blocks": "num_hidden_layers",
        "add_post_blocks_norm": "add_out_norm", "tie_weights": "tie_word_embeddings", "bias": "use_bias",
        "dropout": "dropout",
    },
    defaults={"vocab_size": REQUIRED, "embedding_dim": 128, "num_blocks": 1},
    ignored=frozenset({
        "add_embedding_dropout", "context_length", "mlstm_block", "slstm_at", "slstm_block",
        "weight_decay_on_embedding", "_block_map",
    }),
    # The full forward refuses more tokens than this; no tensor depends on it.
    written={"context_length": 2048},
)
NEURIPS_BLOCK = Section({}, ignored=frozenset({"mlstm", "slstm", "feedforward", "_num_blocks", "_block_idx"}))
NEURIPS_MLSTM = Section(
    {
        "num_heads": "num_heads", "conv1d_kernel_size": "conv_kernel_size", "qkv_proj_blocksize": "qkv_proj_blocksize",
        "proj_factor": "proj_factor", "round_proj_up_dim_up": "proj_rounding",
        "round_proj_up_to_multiple_of": "proj_round_up_to_multiple_of",
    },
    defaults={"num_heads": 4},
    # The block stack overwrites all of these with its own.
    ignored=frozenset({
        "bias", "context_length", "dropout", "embedding_dim", "_inner_embedding_dim", "_num_blocks", "_proj_up_dim",
    }),
)
NEURIPS_SLSTM = Section(
    {
        "num_heads": "slstm_num_heads", "conv1d_kernel_size": "slstm_conv_kernel_size", "bias_init": "slstm_bias_init",
        "group_norm_weight": "slstm_norm_weight", "recurrent_weight_init": "recurrent_weight_init",
    },
    defaults={"num_heads": 4},
    fixed={
        "function": "slstm", "num_gates": 4, "num_states": 4, "forward_clipval": None, "gradient_recurrent_cut": False,
        "gradient_recurrent_clipval": None, "initial_val": 0.0, "input_shape": "BSGNH", "output_shape": "BNSH",
    },
    ignored=frozenset({
        "backend", "batch_size", "constants", "dropout", "dtype", "dtype_a", "dtype_b", "dtype_g", "dtype_r", "dtype_s",
        "dtype_w", "embedding_dim", "enable_automatic_mixed_precision", "hidden_size", "internal_input_shape",
        "_block_idx", "_num_blocks",
    }),
    written={"backend": "vanilla"},
)
NEURIPS_FFN = Section(
    {
        "proj_factor": "ffn_proj_factor", "act_fn": "hidden_act", "bias": "ffn_bias", "dropout": "ffn_dropout",
        "round_proj_up_dim_up": "ffn_rounding", "round_proj_up_to_multiple_of": "ffn_round_up_to_multiple_of",
    },
    fixed={"ff_type": "ffn_gated"},
    ignored=frozenset({"embedding_dim", "_num_blocks", "_proj_up_dim"}),
)
LARGE = Section(
    {
        "vocab_size": "vocab_size", "embedding_dim": "hidden_size", "num_blocks": "num_hidden_layers",
        "num_heads": "num_heads", "use_bias": "use_bias", "norm_eps": "norm_eps", "add_out_norm": "add_out_norm",
        "qk_dim_factor": "qk_dim_factor", "v_dim_factor": "v_dim_factor", "chunk_size": "chunk_size",
        "eps": "normalizer_eps", "ffn_proj_factor": "ffn_proj_factor", "gate_soft_cap": "gate_soft_cap",
        "ffn_round_up_to_multiple_of": "ffn_round_up_to_multiple_of", "output_logit_soft_cap": "output_logit_soft_cap",
    },
    defaults=dict.fromkeys(("vocab_size", "embedding_dim", "num_blocks", "num_heads"), REQUIRED),
    ignored=frozenset({
        "autocast_kernel_dtype", "chunkwise_kernel", "inference_state_dtype", "mode", "norm_reduction_force_float32",
        "return_last_states", "sequence_kernel", "step_kernel", "weight_mode",
    }),
    # The package's defaults need a GPU, and fail on every forward there.
    written={
        "mode": "inference", "return_last_states": True, "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native", "step_kernel": "native",
    },
)
TRANSFORMERS = LARGE._replace(
    fields={**LARGE.fields, **{x: x for x in ("use_cache", "pad_token_id", "bos_token_id", "eos_token_id")}},
    defaults={
        "vocab_size": 50304, "embedding_dim": 4096, "num_blocks": 32, "num_heads": 8, "ffn_proj_factor": 2.667,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    },
    fixed={"model_type": "xlstm"},
    written={"model_type": "xlstm", "architectures": ["xLSTMForCausalLM"]},
)
TRANSFORMERS_ALIASES = {"embedding_dim": "hidden_size", "num_blocks": "num_hidden_layers"}
# Fields of ours that a family has one value for.
NEURIPS_NEEDS = {
    "block_style": "neurips", "norm_eps": 1e-5, "normalizer_eps": 1e-6, "input_gate": "exp", "gate_soft_cap": None,
    "output_logit_soft_cap": None,
}
LARGE_NEEDS = {
    "block_style": "large", "hidden_act": "silu", "ffn_rounding": "large", "input_gate": "exp", "dropout": 0.0,
    "ffn_dropout": 0.0, "embedding_dropout": 0.0, "tie_word_embeddings": False,
}
# fmt: on


def _check_dictionary(name: str, given: Any, way_out: str) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"`{name}` must be a dictionary; got {type(given).__name__}. Pass {way_out}.")


def _read(section: Section, given: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Our fields from one dictionary of an official configuration; `path` precedes its names in messages."""
    _check_dictionary(path.rstrip("."), given, "what `dataclasses.asdict` makes of it, or `{}`")
    known = {*section.fields, *section.fixed, *section.ignored}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"`{path}{unknown[0]}` must be one of {sorted(known)}. Correct the name, or leave it out.")
    for name, wanted in section.fixed.items():
        if given.get(name, wanted) != wanted:
            raise ValueError(f"`{path}{name}` must be {wanted!r}; got {given[name]!r}. XLSTMConfig has no such model.")
    fields = {}
    for theirs, value in {**section.defaults, **given}.items():
        if value is REQUIRED:
            raise ValueError(f"`{path}{theirs}` must be given, for the package has no default; got {sorted(given)}.")
        if ours := section.fields.get(theirs):
            if ours in VALUES and value not in VALUES[ours]:
                raise ValueError(f"`{path}{theirs}` must be one of {list(VALUES[ours])}; got {value!r}.")
            fields[ours] = VALUES[ours][value] if ours in VALUES else value
    return fields


def _write(section: Section, config: XLSTMConfig) -> dict[str, Any]:
    """The inverse of `_read`."""
    written = dict(section.written)
    for theirs, ours in section.fields.items():
        value = getattr(config, ours)
        official = {mine: name for name, mine in VALUES.get(ours, {}).items()}
        if official and value not in official:
            raise ValueError(f"`{ours}` must be one of {list(official)} in an official model; got {value!r}.")
        written[theirs] = official[value] if official else value
    return written


def _refuse(family: str, config: XLSTMConfig, needs: Mapping[str, Any]) -> None:
    """Raise for the first field of another value than the family needs."""
    for name, wanted in needs.items():
        if getattr(config, name) != wanted:
            raise ValueError(
                f"`{name}` must be {wanted!r} to convert to {family!r}; got {getattr(config, name)!r}. "
                "That family has no such model: keep this one in its own format."
            )


def _blocksize(fields: Mapping[str, Any]) -> Any:
    """The width of q, k, v's blocks: the package makes inner // asked of them, wider ones where that leaves a rest."""
    asked = fields.get("qkv_proj_blocksize", 4)
    inner = XLSTMConfig(block_style="neurips", **{**fields, "qkv_proj_blocksize": 1}).inner_size
    blocks = inner // asked if isinstance(asked, int) and asked > 0 else 0
    return inner // blocks if blocks and inner % blocks == 0 else asked


def _read_neurips(given: Mapping[str, Any]) -> XLSTMConfig:
    fields = _read(NEURIPS, given)
    mlstm_block, slstm_block = given.get("mlstm_block"), given.get("slstm_block")
    slstm_at: Any = "all" if mlstm_block is None else given.get("slstm_at", [])
    types = XLSTMConfig(num_hidden_layers=fields["num_hidden_layers"], slstm_at=slstm_at).block_types or []
    block_map = ",".join("1" if kind == "slstm" else "0" for kind in types)
    if given.get("_block_map") not in (None, block_map):
        raise ValueError(f"`_block_map` must be {block_map!r}; got {given['_block_map']!r}. Correct it or `slstm_at`.")
    if "slstm" in types:
        if slstm_block is None:
            raise ValueError(f"`slstm_block` must describe the sLSTM blocks of {block_map!r}; got None.")
        _read(NEURIPS_BLOCK, slstm_block, "slstm_block.")
        fields |= _read(NEURIPS_SLSTM, slstm_block.get("slstm", {}), "slstm_block.slstm.")
        ffn = slstm_block.get("feedforward", {})
        fields |= {"ffn_proj_factor": 0.0} if ffn is None else _read(NEURIPS_FFN, ffn, "slstm_block.feedforward.")
        fields["num_heads"] = fields["slstm_num_heads"]
    if mlstm_block is not None and "mlstm" in types:
        _read(NEURIPS_BLOCK, mlstm_block, "mlstm_block.")
        fields |= _read(NEURIPS_MLSTM, mlstm_block.get("mlstm", {}), "mlstm_block.mlstm.")
        fields["qkv_proj_blocksize"] = _blocksize(fields)
    if given.get("add_embedding_dropout", False):
        fields["embedding_dropout"] = fields.get("dropout", 0.0)
    return XLSTMConfig(block_style="neurips", block_types=types, **fields)


def _write_neurips(config: XLSTMConfig, weight_mode: str) -> dict[str, Any]:
    embedding_dropout = config.dropout if config.embedding_dropout else 0.0
    _refuse("neurips", config, {**NEURIPS_NEEDS, "embedding_dropout": embedding_dropout})
    types = config.block_types or []
    written = _write(NEURIPS, config) | {"add_embedding_dropout": config.embedding_dropout > 0}
    written["slstm_at"] = [i for i, kind in enumerate(types) if kind == "slstm"]
    written["mlstm_block"] = {"mlstm": _write(NEURIPS_MLSTM, config)} if "mlstm" in types else None
    written["slstm_block"] = None
    if "slstm" in types:
        ffn = _write(NEURIPS_FFN, config) if config.ffn_size else None
        written["slstm_block"] = {"slstm": _write(NEURIPS_SLSTM, config), "feedforward": ffn}
    return written


def _read_large(given: Mapping[str, Any], section: Section = LARGE) -> XLSTMConfig:
    fields = _read(section, given)
    if "siging" in (kernel := str(given.get("chunkwise_kernel"))):
        # The package has no step for these kernels and runs another function at T = 1.
        raise ValueError(f"`chunkwise_kernel` must have an exponential input gate; got {kernel!r}. Name another.")
    bias = fields.get("use_bias", False)
    return XLSTMConfig(block_style="large", norm_bias=bias, ffn_bias=bias, **fields)


def _read_transformers(given: Mapping[str, Any]) -> XLSTMConfig:
    # Its class takes any name, published configurations hold a dozen of no use, and its model always has the last norm.
    known = {*TRANSFORMERS.fields, *TRANSFORMERS.fixed, *TRANSFORMERS.ignored}
    large = {name: value for name, value in given.items() if name in known} | {"add_out_norm": True}
    for name, alias in TRANSFORMERS_ALIASES.items():
        values = [given[key] for key in (name, alias) if given.get(key) is not None]
        # Its model has `num_blocks` blocks; its class leaves the other name at the default of 32.
        if name != "num_blocks" and values[1:] not in ([], values[:1]):
            raise ValueError(f"`{alias}` and `{name}` must be one number; got {given[alias]} and {given[name]}.")
        large[name] = values[0] if values else TRANSFORMERS.defaults[name]
    return _read_large(large, TRANSFORMERS)


def _write_large(config: XLSTMConfig, weight_mode: str, family: str = "large") -> dict[str, Any]:
    same = {"norm_bias": config.use_bias, "ffn_bias": config.use_bias, "ffn_size": config.ffn_size or "above 0"}
    _refuse(family, config, {**LARGE_NEEDS, **same, "block_types": ["mlstm"] * config.num_hidden_layers})
    return {**_write(LARGE if family == "large" else TRANSFORMERS, config), "weight_mode": weight_mode}


def _write_transformers(config: XLSTMConfig, weight_mode: str) -> dict[str, Any]:
    caps = {name: getattr(config, name) or "a number" for name in ("gate_soft_cap", "output_logit_soft_cap")}
    written = _write_large(config, weight_mode, "transformers")
    _refuse("transformers", config, {"add_out_norm": True, **caps})
    return written | {alias: written[name] for name, alias in TRANSFORMERS_ALIASES.items()}


FAMILIES: Mapping[str, tuple[Reader, Writer]] = {
    "neurips": (_read_neurips, _write_neurips),
    "large": (_read_large, _write_large),
    "transformers": (_read_transformers, _write_transformers),
}


def _choose(family: str, weight_mode: str) -> tuple[Reader, Writer]:
    if family not in FAMILIES:
        raise ValueError(f"`family` must be one of {list(FAMILIES)}; got {family!r}.")
    modes = ["single"] if family == "neurips" else ["single", "fused"]
    if weight_mode not in modes:
        raise ValueError(f"`weight_mode` must be one of {modes} for {family!r}; got {weight_mode!r}.")
    return FAMILIES[family]


def _shapes(weights: Weights) -> dict[str, Shape]:
    _check_dictionary("weights", weights, "the `state_dict()` of the model")
    return {name: tuple(x.shape) for name, x in weights.items()}


def plan_from(family: str, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> tuple[XLSTMConfig, list[Link]]:
    """Our configuration, and the links whose `split` gives our tensors; as `convert_from`, of shapes."""
    _check_dictionary("config", config, "its `to_dict()`, or what `dataclasses.asdict` makes of it")
    weight_mode = config.get("weight_mode", "single")
    read, _ = _choose(family, weight_mode)
    ours = read(config)
    if family == "neurips" and any(is_cuda(name, shape) for name, shape in shapes.items()):
        weight_mode = "cuda"
    links = model_links(family, ours, shapes, weight_mode, to_ours=True)
    check_shapes(shapes, {link.theirs: link.official_shape for link in links if not link.zero})
    return ours, links


def plan_to(
    family: str, config: XLSTMConfig, shapes: Mapping[str, Shape], *, weight_mode: str = "single"
) -> tuple[dict[str, Any], list[Link]]:
    """The official configuration, and the links whose `join` gives its tensors; as `convert_to`, of shapes."""
    if isinstance(config, Mapping):
        raise TypeError(f"`config` must be an XLSTMConfig; got {type(config).__name__}. Pass `XLSTMConfig(**config)`.")
    _, write = _choose(family, weight_mode)
    official = write(config, weight_mode)
    links = model_links(family, config, shapes, weight_mode, to_ours=False)
    check_shapes(shapes, {name: shape for link in links for name, shape in link.ours.items()})
    return official, links


def convert_from(family: str, config: Mapping[str, Any], weights: Weights) -> tuple[XLSTMConfig, dict[str, Tensor]]:
    """Turn an official model into the configuration and the weights of `XLSTMForCausalLM`.

    Args:
        family: "neurips", "large" or "transformers".
        config: the official configuration as a dictionary; names left out have the package's defaults.
        weights: the official state dict; of tied weights either may be left out, and the result then has the
            embedding only. sLSTM cells may be stored as the vanilla or the CUDA backend does.

    Returns:
        result: configuration, and weights by our names; tensors that need no change are those passed in, none modified.

    Raises:
        ValueError: the family is unknown, our models cannot express the configuration, or tensors are unused, missing
            or of another shape.
        TypeError: the configuration, a part of it or the weights are no dictionary.
        StrictDataclassError: a value is none that `XLSTMConfig` takes.
    """
    ours, links = plan_from(family, config, _shapes(weights))
    return ours, {name: x for link in links for name, x in link.split(weights).items()}


def convert_to(
    family: str, config: XLSTMConfig, weights: Weights, *, weight_mode: str = "single"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Turn a configuration and the weights of `XLSTMForCausalLM` into an official model.

    What steers only speed, precision or training keeps the package's default, or what runs on any machine.

    Args:
        family: "neurips", "large" or "transformers".
        config: our configuration.
        weights: our state dict; of tied weights either may be left out, and the result then has the embedding only.
        weight_mode: "single" or "fused" projections, of the large and transformers families.

    Returns:
        result: official configuration, and weights by official names, sLSTM cells as the vanilla backend stores them;
            tensors that need no change are those passed in, none modified.

    Raises:
        ValueError: the family or weight mode is unknown, the family cannot express the model, or tensors are unused,
            missing or of another shape.
        TypeError: the configuration is a dictionary, or the weights are none.
    """
    official, links = plan_to(family, config, _shapes(weights), weight_mode=weight_mode)
    return official, {name: x for link in links for name, x in link.join(weights).items()}
