"""What all xLSTM models share in Transformers: loading, saving and initialisation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from .configuration_xlstm import XLSTMConfig
from .layers_xlstm import (
    CausalConv,
    FeedForward,
    HeadNorm,
    HeadwiseLinear,
    LayerNorm,
    MLSTMLayer,
    RMSNorm,
    SLSTMLayer,
    UpMLSTMLayer,
)
from .ops_products import LEAST, is_any_packed, pack, unpack

# `auto_map` of every checkpoint: its code holds all of these, whichever of the models was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_xlstm.XLSTMConfig",
    "AutoModel": "modeling_xlstm.XLSTMModel",
    "AutoModelForCausalLM": "modeling_xlstm.XLSTMForCausalLM",
    "AutoModelForSequenceClassification": "modeling_xlstm.XLSTMForSequenceClassification",
    "AutoModelForTimeSeriesPrediction": "forecasting_xlstm.XLSTMForForecasting",
    "AutoModelForTokenClassification": "modeling_xlstm.XLSTMForTokenClassification",
}


class XLSTMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, common to all xLSTM models."""

    config: XLSTMConfig
    config_class = XLSTMConfig
    base_model_prefix = "model"
    _no_split_modules = ["XLSTMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    supports_gradient_checkpointing = True

    def __init__(self, config: XLSTMConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if not config.vocab_size:  # reads frames alone
            self._input_embed_layer = "frame_proj"
            self.main_input_name = "input_features" if self.main_input_name == "input_ids" else self.main_input_name

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in Transformers, for models that read ids; raises ValueError for others."""
        if not self.config.vocab_size:
            raise ValueError(
                "`resize_token_embeddings` needs a model with a `vocab_size`; this one reads frames alone."
            )
        return super().resize_token_embeddings(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in Transformers, which would name this class only: a language model is a classifier's start too."""
        if self._auto_class is not None:
            self.config.auto_map = {**AUTO_MAP, **(getattr(self.config, "auto_map", None) or {})}
        super().save_pretrained(save_directory, *args, **kwargs)

    def pack_weights(self, packed: bool = True) -> None:
        """Keep the matrices of large linear layers once more, in the order in which this CPU reads them the fastest.

        Products of up to 64 rows without gradients read these then: decoding in half precision, and of batches in
        float32. It costs the memory of those matrices again. Parameters stay as they are, and so does what is saved. A
        weight that changes is packed anew when it is next read: whatever torch writes is noticed, and what is written
        through `.data` if it changes one of 64 numbers of a matrix that are looked at; call this again after writing
        fewer. `train()`, moving and converting the model undo it; a compiled model does without. Packed weights cannot
        be swapped (`torch.utils.swap_tensors`).

        Args:
            packed: False undoes it.

        Raises:
            ValueError: no matrix of this model can be packed.
        """
        linear = (module for module in self.modules() if type(module) is nn.Linear)
        layers = [module for module in linear if type(module.weight) is nn.Parameter]
        for module in self.modules():
            if (stepper := module.__dict__.get("stepper")) is not None:
                stepper.drop()
        for layer in layers:
            unpack(layer.weight)
        if packed and not sum([pack(layer.weight) for layer in layers]):
            kinds = sorted({f"{layer.weight.dtype} on {layer.weight.device}" for layer in layers})
            raise ValueError(
                f"`pack_weights` needs linear layers of at least {LEAST} numbers, in float32 or a half precision that "
                f"oneDNN knows on this CPU; got {', '.join(kinds) or 'none'}. Load the model so, or leave it unpacked."
            )

    def train(self, mode: bool = True) -> XLSTMPreTrainedModel:
        """As in torch; training undoes `pack_weights`."""
        if mode and is_any_packed():  # Trainer calls this before every step
            self.pack_weights(False)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> XLSTMPreTrainedModel:
        self.pack_weights(False)  # the memory that weights move out of
        return super()._apply(*args, **kwargs)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As in Transformers; reentrant checkpoints, too, pass the gradients of the states on."""
        func = gradient_checkpointing_func
        if getattr(func, "keywords", {}).get("use_reentrant") is not False:
            func = functools.partial(_checkpoint_flat, func)
        super()._set_gradient_checkpointing(enable, func, *args, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, but what it would compute wrongly is refused.

        Raises:
            ImportError: tensor parallelism by a Transformers before 5.23, which cuts an sLSTM's gates as an mLSTM's.
            ValueError: a tied embedding that does not divide over the processes of `fsdp_size`. The last of them would
                have two padded copies of its part, of which one is trained and the other multiplied by.
        """
        tp_size, fsdp_size = (getattr(distributed_config, name, None) or 1 for name in ("tp_size", "fsdp_size"))
        if tp_size > 1 and not hasattr(PreTrainedModel, "_resolve_parallel_plans"):
            raise ImportError(
                f"Tensor parallelism needs transformers 5.23 or newer; this is {transformers.__version__}. Update it, "
                "or use the processes for data (`fsdp_size`)."
            )
        if model.all_tied_weights_keys and model.config.vocab_size % fsdp_size:
            raise ValueError(
                f"`fsdp_size` must divide `vocab_size` where embeddings are tied; got {fsdp_size} and "
                f"{model.config.vocab_size}. Save the model after `resize_token_embeddings(pad_to_multiple_of="
                f"{fsdp_size})`, or cut it with Accelerate's FSDP2."
            )
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def _resolve_parallel_plans(self, distributed_config: Any) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
        # A plan tells blocks apart by their names only, and both kinds of mixers have gates of the same names.
        kinds = {name: type(module) for name, module in self.named_modules()}
        heads, processes = self.config.num_heads, distributed_config.tp_size
        if MLSTMLayer in kinds.values() and heads % processes:
            raise ValueError(
                f"`tp_size` must divide `num_heads`, for a head's state stays in one process; got {processes} and "
                f"{heads}. Use {math.gcd(heads, processes)}, and the other processes for data (`fsdp_size`)."
            )
        whole = tuple(f"{name}." for name, kind in kinds.items() if kind is SLSTMLayer)
        tp_plan, ep_plan, fsdp_plan = super()._resolve_parallel_plans(distributed_config)
        return {name: style for name, style in tp_plan.items() if not name.startswith(whole)}, ep_plan, fsdp_plan

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module by its type, as in the official packages; parents after, and over, their children."""
        config = self.config
        D, N = config.hidden_size, config.num_hidden_layers
        small = math.sqrt(2 / (5 * D))
        if isinstance(module, (RMSNorm, LayerNorm, HeadNorm)):
            if module.weight is not None:
                init.constant_(module.weight, 1.0 - getattr(module, "offset", 0.0))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, CausalConv):
            bound = module.window**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, FeedForward):
            self._init_projection(
                module.down_proj, 2 / (N * math.sqrt(D if config.block_style == "neurips" else config.ffn_size))
            )
        elif isinstance(module, (MLSTMLayer, UpMLSTMLayer)):
            out = module.out_proj if isinstance(module, MLSTMLayer) else module.down_proj
            self._init_projection(out, 2 / (N * math.sqrt(D)))
            self._init_mlstm_gates(module)
        elif isinstance(module, SLSTMLayer):
            self._init_slstm(module)
        elif isinstance(module, (nn.Linear, nn.Embedding, HeadwiseLinear)):
            self._init_projection(module, small)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Transformers passes over custom code's modules that have no parameter, or no missing one, of their own; ours
        # initialise their children, and through `init` only, which leaves loaded weights alone.
        super()._initialize_weights(module, is_custom_code=False)

    def _init_projection(self, module: Any, std: float) -> None:
        init.normal_(module.weight, mean=0.0, std=std)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)

    def _init_mlstm_gates(self, module: MLSTMLayer | UpMLSTMLayer) -> None:
        """Gates that do not look at their input at first: the forget gates nearly open, from 3 to 6 over the heads."""
        config = self.config
        init.zeros_(module.igate.weight)
        init.zeros_(module.fgate.weight)
        init.normal_(module.igate.bias, mean=config.input_gate_bias_mean, std=config.input_gate_bias_std)
        init.copy_(module.fgate.bias, torch.linspace(3.0, 6.0, config.num_heads))
        if isinstance(module, UpMLSTMLayer):
            init.ones_(module.skip)

    def _init_slstm(self, module: SLSTMLayer) -> None:
        config = self.config
        # Not from the parameters, which ZeRO-3 leaves empty while a checkpoint is loaded.
        H, P, N = module.num_heads, config.hidden_size // module.num_heads, config.num_hidden_layers
        bound = config.hidden_size**-0.5
        if config.recurrent_weight_init == "standard":
            init.uniform_(module.recurrent, -bound, bound)
        else:
            init.zeros_(module.recurrent)
        if config.slstm_bias_init == "standard":
            init.uniform_(module.bias, -bound, bound)
            return
        bias = torch.zeros(4, H, P)
        if config.slstm_bias_init == "small_init":
            bias[1] = torch.linspace(3.0, 6.0, P)
        elif config.slstm_bias_init == "powerlaw_blockdependent":
            ratio = module.layer_idx / (N - 1) if N > 1 else 0.0
            # One cell per head has no spread to lay out: it takes the first value.
            spread = torch.arange(P) / max(P - 1, 1)
            bias[1] = 5.0 - 12.0 * spread ** (0.3 + 1.3 * ratio)
        init.copy_(module.bias, bias)


def _checkpoint_flat(apply: Callable[..., Any], run: Callable[..., Any], *inputs: Any) -> Any:
    """apply(run, *inputs) for a checkpoint that knows only the tensors that are arguments and results themselves."""
    leaves, form = tree_flatten(inputs)
    forms = []

    def run_flat(*leaves: Any) -> tuple[Any, ...]:
        made, form_made = tree_flatten(run(*tree_unflatten(leaves, form)))
        forms.append(form_made)
        return tuple(made)

    made = apply(run_flat, *leaves)
    return tree_unflatten(made, forms[0])
