"""What an xLSTM is: the fields of `config.json`, their rules, and the widths that follow from them."""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig

if TYPE_CHECKING:
    # Never runs. Transformers tells two checkpoints of one folder name apart by the files it finds named from here, and
    # gives the second one the first one's model if these are the same.
    from .forecasting_xlstm import XLSTMForForecasting  # noqa: F401
    from .modeling_xlstm import XLSTMPreTrainedModel  # noqa: F401

BlockStyle = Literal["neurips", "large", "residual"]

# What each style sets where it differs from the class defaults, which are the large style's.
STYLE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "large": {},
    "neurips": {
        "qk_dim_factor": 1.0,
        "proj_factor": 2.0,
        "proj_round_up_to_multiple_of": 64,
        "conv_kernel_size": 4,
        "slstm_conv_kernel_size": 4,
        "ffn_proj_factor": 1.3,
        "ffn_rounding": "ceil",
        "hidden_act": "gelu",
        "norm_eps": 1e-5,
        "gate_soft_cap": None,
        "output_logit_soft_cap": None,
        "input_gate_bias_mean": 0.0,
        "input_gate_bias_std": 0.1,
    },
    "residual": {
        "qk_dim_factor": 1.0,
        "ffn_proj_factor": 2.0,
        "ffn_round_up_to_multiple_of": 1,
        "ffn_rounding": "ceil",
        "hidden_act": "gelu",
        "use_bias": True,
        "norm_bias": True,
        "ffn_bias": True,
        "norm_eps": 1e-5,
        "gate_soft_cap": None,
        "output_logit_soft_cap": None,
        "input_gate_bias_mean": 0.0,
        "input_gate_bias_std": 0.1,
    },
}

VARIANTS = {"mlstm": ["mlstm"], "slstm": ["slstm"], "mixed": ["slstm", "mlstm"]}  # blocks that are repeated

# Fields that a style has no use for, and the only value they may have there.
_NO_BRANCH = {"proj_factor": 1.0, "proj_round_up_to_multiple_of": 1, "conv_kernel_size": 0}
STYLE_FIXED: Mapping[str, Mapping[str, Any]] = {
    "large": {**_NO_BRANCH, "head_dim": None},
    "neurips": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0, "norm_bias": False, "head_dim": None},
    "residual": {**_NO_BRANCH, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
}

# Keys of the base class, or of older and wider Transformers configurations, that are not fields here and do no harm.
TRANSFORMERS_KEYS = frozenset(
    {
        "architectures", "attn_implementation", "auto_map", "custom_pipelines", "experts_implementation",
        "finetuning_task", "is_decoder", "model_type", "name_or_path", "num_labels", "output_attentions",
        "per_layer_config", "quantization_config", "sep_token_id", "decoder_start_token_id", "task_specific_params",
        "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "transformers_weights",
    }
)  # fmt: skip

BASE_FIELDS = frozenset(field.name for field in dataclasses.fields(PreTrainedConfig))


def _round_width(width: float, multiple: int, rule: str) -> int:
    """Round a width to a multiple: 'ceil' and 'floor' of width / multiple, or 'large', the Large family's own rule.

    'large' is floor((width + multiple - 1) / multiple) multiples, which for a fractional width in (k m, k m + 1) gives
    k m: 1024.0128 stays 1024. Published checkpoints depend on it.
    """
    if rule == "large":
        return math.floor((width + multiple - 1) / multiple) * multiple
    return (math.ceil if rule == "ceil" else math.floor)(width / multiple) * multiple


@strict
class XLSTMConfig(PreTrainedConfig):
    """Configuration of an xLSTM (arXiv:2405.04517).

    Three block styles share one set of fields; a field left out takes the value of its style.

    - "large": x + mixer(RMSNorm x), x + SwiGLU(RMSNorm x); the xLSTM 7B architecture, with sLSTM blocks allowed.
    - "neurips": the paper's blocks; mLSTM blocks up-project, convolve and have no feed-forward part, sLSTM blocks
      convolve and have a gated one.
    - "residual": x + mixer(LayerNorm x), x + GELU feed-forward(LayerNorm x).

    Args:
        vocab_size: number of token ids; 0, the default with an `input_size`, leaves the embedding out.
        input_size: channels of a continuous input, read as `input_features` [B, T, input_size]; of a series to
            forecast, its target channels. None leaves the projection out.
        hidden_size: width of the residual stream, D.
        num_hidden_layers: number of blocks.
        num_heads: heads of every mixer, H; `slstm_num_heads` overrides it for sLSTM.
        slstm_num_heads: heads of the sLSTM mixers; None takes `num_heads`.
        block_style: "large", "neurips" or "residual".
        block_types: "mlstm" or "slstm" for each block. Two shorthands, not stored, fill it: `slstm_at`, a list of block
            indices (negative ones count from the end) or "all"; `variant`, "mlstm", "slstm" or "mixed" (sLSTM first,
            then alternating; any other in `from_pretrained` names files of weights, as in Transformers).
        head_dim: query, key and value width per mLSTM head of the residual style; None takes hidden_size / num_heads.
        qk_dim_factor: query and key width over `hidden_size` (large).
        v_dim_factor: value width over `hidden_size` (large).
        proj_factor: inner width of an mLSTM block over `hidden_size` (neurips).
        proj_round_up_to_multiple_of: the inner width is rounded to a multiple of this (neurips).
        proj_rounding: "ceil" or "floor" (neurips).
        qkv_proj_blocksize: block size of the block-diagonal q, k, v projections (neurips).
        conv_kernel_size: window of the causal convolution of mLSTM blocks, W; the current token included (neurips).
        slstm_conv_kernel_size: the same for sLSTM blocks, any style; 0 leaves convolution and SiLU out.
        ffn_proj_factor: feed-forward width over `hidden_size`; 0 leaves that part out. Alias `expand_factor`.
        ffn_round_up_to_multiple_of: the feed-forward width is rounded to a multiple of this.
        ffn_rounding: "ceil", "floor" or "large" (see `_round_width`).
        hidden_act: activation of the feed-forward part, gated in large and neurips.
        use_bias: biases of the mixers' projections; gates and convolutions always have one.
        norm_bias: biases of the norms (large, residual).
        ffn_bias: biases of the feed-forward projections.
        norm_eps: epsilon of every norm.
        slstm_norm_weight: whether the head norm of sLSTM mixers has a weight.
        add_out_norm: whether a norm follows the last block.
        normalizer_eps: added to the mLSTM normaliser.
        gate_soft_cap: mLSTM gate pre-activations become cap * tanh(x / cap); None leaves them.
        output_logit_soft_cap: the same for logits.
        input_gate: "exp" (paper) or "sigmoid".
        dropout: dropout of the mixers' outputs.
        ffn_dropout: dropout of the feed-forward outputs.
        embedding_dropout: dropout of the embeddings.
        classifier_dropout: dropout before the token classification head.
        pooling: what a sequence is classified by, the hidden state of its "last" real token or the "mean" over all.
        prediction_length: frames to forecast; None without a forecasting head.
        context_length: most frames of the past a forecast may be given; None sets no limit.
        num_past_covariates: channels known for the past only, given beside the series.
        forecast_distribution: "quantile" or "gaussian", what the head predicts and is trained for.
        quantiles: levels of the quantile head, rising; None takes 0.1 to 0.9.
        instance_norm: whether each series is centred and scaled by its own past.
        tie_word_embeddings: whether the LM head is the embedding.
        recurrent_weight_init: "zeros" or "standard", uniform in +-1/sqrt(D).
        slstm_bias_init: "powerlaw_blockdependent", "small_init", "zeros" or "standard".
        input_gate_bias_mean: mean of the mLSTM input-gate biases at initialisation.
        input_gate_bias_std: standard deviation of the mLSTM input-gate biases at initialisation.
        chunk_size: tokens per chunk of the mLSTM; steers speed and memory, never the result.
        kernel_backend: "auto", "triton", "torch" or "reference"; steers speed, never the result.
        state_dtype: "float32" or "float64", the least precision of gates and states.
        debug: whether every block's output and state is checked to be finite, with a diagnosis if not; costs time.
        use_cache: whether the model returns its states by default outside training.
        pad_token_id: id of the padding token.
        bos_token_id: id of the token that begins a text.
        eos_token_id: id, or ids, of the token that ends a text.

    Raises:
        TypeError, ValueError: a keyword is not a field; a shorthand or an alias is wrong, or contradicts another.
        StrictDataclassError: a value has the wrong type or breaks a rule; the message names field, rule and way out.
    """

    model_type = "extended_lstm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_attention_heads": "num_heads",
        "expand_factor": "ffn_proj_factor",
        # The name by which TRL, which computes the logits itself, finds the cap.
        "final_logit_softcapping": "output_logit_soft_cap",
    }

    vocab_size: int = 50304
    input_size: int | None = None
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_heads: int = 4
    slstm_num_heads: int | None = None
    block_style: BlockStyle = "large"
    block_types: list[str] | None = None
    head_dim: int | None = None
    qk_dim_factor: float = 0.5
    v_dim_factor: float = 1.0
    proj_factor: float = 1.0
    proj_round_up_to_multiple_of: int = 1
    proj_rounding: Literal["ceil", "floor"] = "ceil"
    qkv_proj_blocksize: int = 4
    conv_kernel_size: int = 0
    slstm_conv_kernel_size: int = 0
    ffn_proj_factor: float = 2.6667
    ffn_round_up_to_multiple_of: int = 64
    ffn_rounding: Literal["ceil", "floor", "large"] = "large"
    hidden_act: Literal["gelu", "relu", "relu2", "selu", "sigmoid", "silu"] = "silu"
    use_bias: bool = False
    norm_bias: bool = False
    ffn_bias: bool = False
    norm_eps: float = 1e-6
    slstm_norm_weight: bool = True
    add_out_norm: bool = True
    normalizer_eps: float = 1e-6
    gate_soft_cap: float | None = 15.0
    output_logit_soft_cap: float | None = 30.0
    input_gate: Literal["exp", "sigmoid"] = "exp"
    dropout: float = 0.0
    ffn_dropout: float = 0.0
    embedding_dropout: float = 0.0
    classifier_dropout: float = 0.0
    pooling: Literal["last", "mean"] = "last"
    prediction_length: int | None = None
    context_length: int | None = None
    num_past_covariates: int = 0
    forecast_distribution: Literal["quantile", "gaussian"] = "quantile"
    quantiles: list[float] | None = None
    instance_norm: bool = True
    tie_word_embeddings: bool = False
    recurrent_weight_init: Literal["zeros", "standard"] = "zeros"
    slstm_bias_init: Literal["powerlaw_blockdependent", "small_init", "zeros", "standard"] = "powerlaw_blockdependent"
    input_gate_bias_mean: float = -10.0
    input_gate_bias_std: float = 0.0
    chunk_size: int = 64
    kernel_backend: Literal["auto", "triton", "torch", "reference"] = "auto"
    state_dtype: Literal["float32", "float64"] = "float32"
    debug: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        inherited = cls.__init__
        if "__init__" not in cls.__dict__:  # that of the dataclass it is made would know neither styles nor rules
            cls.__init__ = inherited  # type: ignore[method-assign]
        super().__init_subclass__(**kwargs)

    def __init__(
        self,
        *,
        slstm_at: Sequence[int] | Literal["all"] | None = None,
        variant: Literal["mlstm", "slstm", "mixed"] | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs = self._with_field_names(kwargs)
        own = [x.name for x in dataclasses.fields(self) if x.name not in BASE_FIELDS]
        self._refuse_unknown(kwargs, known={*BASE_FIELDS, *own})
        values = {name: getattr(type(self), name, None) for name in own}
        style = kwargs.get("block_style", type(self).block_style)
        values.update(STYLE_DEFAULTS.get(style, {}) if isinstance(style, str) else {})
        if kwargs.get("input_size") is not None:
            values["vocab_size"] = 0  # no embedding unless it is asked for
        values.update((name, kwargs.pop(name)) for name in list(kwargs) if name in values)
        for name, value in values.items():
            # JSON has one kind of number, and 15 is a good float.
            is_float = isinstance(getattr(type(self), name, None), float) or name.endswith("soft_cap")
            setattr(self, name, float(value) if is_float and type(value) is int else value)
        if self.slstm_num_heads is None:
            self.slstm_num_heads = self.num_heads
        if self.head_dim is None and self.block_style == "residual" and self.num_heads > 0:
            whole, rest = divmod(self.hidden_size, self.num_heads)
            self.head_dim = None if rest else whole
        if self.quantiles is None and self.prediction_length is not None and self.forecast_distribution == "quantile":
            self.quantiles = [level / 10 for level in range(1, 10)]
        self._fill_block_types(slstm_at, variant)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Transformers, but fields among the keywords, and their shorthands, are read as by the constructor."""
        kwargs = {name: x for name, x in kwargs.items() if name != "slstm_at" or x is not None}
        # Transformers has a `variant` too, which names files of weights.
        shorthands = {"slstm_at", "variant"} if kwargs.get("variant") in VARIANTS else {"slstm_at"}
        known = {x.name for x in dataclasses.fields(cls)} - BASE_FIELDS | shorthands | cls.attribute_map.keys()
        given = cls._with_field_names({name: kwargs.pop(name) for name in known & kwargs.keys()})
        left_out = {"slstm_at", "variant", "block_types"} if shorthands & given.keys() else set()
        stored = cls._with_field_names({name: x for name, x in config_dict.items() if name not in left_out})
        return super().from_dict({**stored, **given}, **kwargs)

    @classmethod
    def _with_field_names(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Replace aliases by the fields they stand for."""
        for alias, name in cls.attribute_map.items():
            if alias in kwargs and kwargs.get(name, kwargs[alias]) != kwargs[alias]:
                got = f"{kwargs[alias]} and {kwargs[name]}"
                raise ValueError(f"`{alias}` is another name of `{name}`; got {got}. Pass only `{name}`.")
        return {cls.attribute_map.get(name, name): value for name, value in kwargs.items()}

    @classmethod
    def _refuse_unknown(cls, kwargs: Mapping[str, Any], known: set[str]) -> None:
        """Raise TypeError for a keyword that is no field: a typo would train another model than the one meant."""
        harmless = TRANSFORMERS_KEYS | set(GenerationConfig().to_dict())
        for name in kwargs:
            if name in known or name in harmless or name.startswith("_"):
                continue
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean `{close[0]}`?" if close else f"Name it `_{name}` if it is your own note."
            raise TypeError(f"`{name}` is not a field of {cls.__name__}. {hint}")

    def _fill_block_types(self, slstm_at: Sequence[int] | str | None, variant: str | None) -> None:
        """Write `block_types` from whichever of the three spellings was used."""
        N = self.num_hidden_layers
        if N < 1:
            raise ValueError(f"`num_hidden_layers` must be at least 1; got {N}.")
        spelled = {"block_types": self.block_types, "slstm_at": slstm_at, "variant": variant}
        given = [name for name, value in spelled.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"Pass one of `block_types`, `slstm_at` and `variant`; got {' and '.join(given)}.")
        if variant is not None:
            if variant not in list(VARIANTS):
                raise ValueError(f"`variant` must be one of {list(VARIANTS)}; got {variant!r}.")
            self.block_types = (VARIANTS[variant] * N)[:N]
        elif self.block_types is None:
            indices: Any = range(N) if slstm_at == "all" else () if slstm_at is None else slstm_at
            if not isinstance(indices, Sequence) or isinstance(indices, str):
                raise TypeError(f"`slstm_at` must be a list of block indices or 'all'; got {slstm_at!r}.")
            for index in indices:
                if type(index) is not int or not -N <= index < N:
                    raise ValueError(
                        f"`slstm_at` must hold block indices from {-N} to {N - 1}; got {index!r}. -1 is the last block."
                    )
            chosen = {index % N for index in indices}
            self.block_types = ["slstm" if i in chosen else "mlstm" for i in range(N)]

    @property
    def layer_types(self) -> list[str]:
        """Transformers' word for what each layer keeps: a state of fixed size."""
        return ["linear_attention"] * self.num_hidden_layers

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Which weights tensor parallelism cuts, in Transformers' words: mLSTM heads where they are independent.

        Every process runs the whole cells of sLSTM mixers, and of the neurips style, whose gates look at all heads.
        """
        plan = {}
        if "mlstm" in (self.block_types or []) and self.block_style == "neurips":
            plan = {"mixer.up_proj": "colwise_gather_output", "mixer.down_proj": "rowwise_split_input"}
        elif "mlstm" in (self.block_types or []):
            cut = ("q_proj", "k_proj", "v_proj", "igate", "fgate", "ogate", "cell.norm.weight")
            plan = dict.fromkeys((f"mixer.{name}" for name in cut), "colwise")
            plan |= {"mixer.cell.norm": "local_params", "mixer.out_proj": "rowwise"}
            plan |= {"mixer.cell.norm.bias": "colwise"} if self.norm_bias else {}
        if self.ffn_size and (self.block_style != "neurips" or "slstm" in (self.block_types or [])):
            gate = {} if self.block_style == "residual" else {"ffn.gate_proj": "colwise"}
            plan |= {**gate, "ffn.up_proj": "colwise", "ffn.down_proj": "rowwise"}
        return {"embed_tokens": "embedding_rowwise", **{f"layers.*.{name}": style for name, style in plan.items()}}

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        if plan != self.base_model_tp_plan:  # Transformers before 5.21 sets the rule of a tied embedding again
            raise AttributeError(
                f"`base_model_tp_plan` follows from other fields; got {plan}. Use `DistributedConfig(tp_plan=...)`."
            )

    @property
    def inner_size(self) -> int:
        """Width of the cell branch of a neurips mLSTM block."""
        return _round_width(self.proj_factor * self.hidden_size, self.proj_round_up_to_multiple_of, self.proj_rounding)

    @property
    def qk_size(self) -> int:
        """Width of all query (or key) heads together."""
        if self.block_style == "neurips":
            return self.inner_size
        return self.num_heads * self.head_dim if self.head_dim else int(self.hidden_size * self.qk_dim_factor)

    @property
    def v_size(self) -> int:
        """Width of all value heads together."""
        if self.block_style == "neurips":
            return self.inner_size
        return self.num_heads * self.head_dim if self.head_dim else int(self.hidden_size * self.v_dim_factor)

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward part; 0 without one."""
        return _round_width(
            self.ffn_proj_factor * self.hidden_size, self.ffn_round_up_to_multiple_of, self.ffn_rounding
        )

    @property
    def frame_size(self) -> int:
        """Width of the frames the base model reads; a series to forecast comes with what is known of each value."""
        if self.input_size is None:
            return 0
        if self.prediction_length is None:
            return self.input_size
        return 2 * self.input_size + (self.num_past_covariates + 1 if self.num_past_covariates else 0)

    def validate_forecasting(self) -> None:
        """A forecast has a length, a series to forecast, and rising levels."""
        if self.prediction_length is not None and self.input_size is None:
            raise ValueError(
                f"`prediction_length` needs an `input_size`, the channels to forecast; got {self.prediction_length} "
                "and None."
            )
        for name in ("input_size", "prediction_length", "context_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, or None; got {value}.")
        if self.num_past_covariates < 0:
            raise ValueError(f"`num_past_covariates` must be 0 or above; got {self.num_past_covariates}.")
        levels = self.quantiles or []
        if levels != sorted(set(levels)) or not all(0 < level < 1 for level in levels) or self.quantiles == []:
            raise ValueError(f"`quantiles` must rise between 0 and 1; got {self.quantiles}.")

    def validate_sizes(self) -> None:
        """Every count is positive, every factor and rate is in its range."""
        counts = [
            *["vocab_size"][self.vocab_size == 0 and self.input_size is not None :], "hidden_size", "num_hidden_layers",
            "num_heads", "slstm_num_heads", "num_labels", "chunk_size", "qkv_proj_blocksize",
            "proj_round_up_to_multiple_of", "ffn_round_up_to_multiple_of",
        ]  # fmt: skip
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {getattr(self, name)}.")
        factors = ("qk_dim_factor", "v_dim_factor", "proj_factor")
        for name in (*factors, "norm_eps", "gate_soft_cap", "output_logit_soft_cap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                way_out = " Use None to leave the cap out." if name.endswith("soft_cap") else ""
                raise ValueError(f"`{name}` must be above 0 and finite; got {value}.{way_out}")
        for name in ("normalizer_eps", "ffn_proj_factor", "input_gate_bias_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be 0 or above, and finite; got {getattr(self, name)}.")
        for name in ("dropout", "ffn_dropout", "embedding_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is a probability, 0 <= p < 1; got {getattr(self, name)}.")
        if self.ffn_proj_factor and not self.ffn_size:
            raise ValueError(
                f"`ffn_proj_factor` must give a width above 0; got {self.ffn_proj_factor}, rounded down to none. "
                "Use 0 to leave the feed-forward part out, or ffn_rounding='ceil'."
            )

    def validate_initialisation(self) -> None:
        """Biases that are drawn are numbers."""
        if not math.isfinite(self.input_gate_bias_mean):
            raise ValueError(f"`input_gate_bias_mean` must be finite; got {self.input_gate_bias_mean}.")

    def validate_block_types(self) -> None:
        """One known type for each block."""
        # Rules run in alphabetical order; this one comes first, and those after it divide by the counts.
        self.validate_sizes()
        types = self.block_types or []
        if len(types) != self.num_hidden_layers:
            raise ValueError(
                f"`block_types` must name one type for each of the {self.num_hidden_layers} blocks; got {len(types)}. "
                "Change `num_hidden_layers` and `block_types` together."
            )
        unknown = sorted(set(types) - {"mlstm", "slstm"})
        if unknown:
            raise ValueError(f"`block_types` may hold 'mlstm' and 'slstm'; got {unknown}.")

    def validate_heads(self) -> None:
        """Every width that is split over heads divides."""
        types = self.block_types or []
        if "slstm" in types:
            self._must_divide("hidden_size", self.hidden_size, "slstm_num_heads")
        if "mlstm" not in types:
            return
        if self.block_style == "neurips":
            self._must_divide("inner width, proj_factor * hidden_size rounded,", self.inner_size, "num_heads")
            self._must_divide("inner width, proj_factor * hidden_size rounded,", self.inner_size, "qkv_proj_blocksize")
        elif self.block_style == "residual" and (self.head_dim or 0) < 1:
            raise ValueError(
                f"`head_dim` must be at least 1; got {self.head_dim}. It can be left out only if `hidden_size` is a "
                f"multiple of `num_heads`; got {self.hidden_size} and {self.num_heads}."
            )
        else:
            self._must_divide("int(hidden_size * qk_dim_factor)", self.qk_size, "num_heads")
            self._must_divide("int(hidden_size * v_dim_factor)", self.v_size, "num_heads")

    def _must_divide(self, what: str, size: int, by: str) -> None:
        divisor = getattr(self, by)
        low = size // divisor * divisor
        if size != low or size < 1:
            nearest = " and ".join(str(works) for works in (low, low + divisor) if works)
            raise ValueError(
                f"`{what}` must be a multiple of `{by}`; got {size} and {divisor}. The nearest that works is {nearest}."
            )

    def validate_convolution(self) -> None:
        """A window holds the current token and at least one before it."""
        if self.block_style == "neurips" and "mlstm" in (self.block_types or []) and self.conv_kernel_size < 2:
            raise ValueError(
                f"`conv_kernel_size` must be at least 2 in the neurips style; got {self.conv_kernel_size}."
            )
        if self.slstm_conv_kernel_size < 0 or self.slstm_conv_kernel_size == 1:
            raise ValueError(
                f"`slstm_conv_kernel_size` must be 0 (no convolution) or at least 2; got {self.slstm_conv_kernel_size}."
            )

    def validate_style(self) -> None:
        """No field is set that the style has no use for."""
        for name, value in STYLE_FIXED[self.block_style].items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"`{name}` has no use with block_style={self.block_style!r} and must be {value}; "
                    f"got {getattr(self, name)}. Leave it out, or choose the style it belongs to."
                )
