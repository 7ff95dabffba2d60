"""xLSTM in Transformers: the base model, the language model and the classification heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple, logging

from .blocks_xlstm import XLSTMBlock
from .cache_xlstm import XLSTMCache
from .configuration_xlstm import XLSTMConfig
from .debug_xlstm import check_finite
from .decoding_xlstm import DecodeLoop, XLSTMGenerationMixin
from .layers_xlstm import block_norm
from .ops_lean import causal_lm_loss, soft_cap
from .ops_linear import multiply
from .pretrained_xlstm import XLSTMPreTrainedModel
from .states_xlstm import Call, LayerState
from .step_xlstm import Stepper
from .tokens_xlstm import TokenLayout, last_of, lay_out_tokens, mean_of, next_real_tokens

logger = logging.get_logger(__name__)


class XLSTMModel(XLSTMPreTrainedModel):
    """Embedding, xLSTM blocks and final norm, without a head."""

    def __init__(self, config: XLSTMConfig):
        super().__init__(config)
        config.validate()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if config.vocab_size else None
        self.frame_proj = nn.Linear(config.frame_size, config.hidden_size) if config.frame_size else None
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(XLSTMBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = block_norm(config) if config.add_out_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.stepper = Stepper()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: XLSTMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        input_features: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run T tokens from the states in the cache, or from the start.

        Args:
            input_ids: token ids, [B, T].
            attention_mask: 1 at real tokens, 0 at padding anywhere, [B, T] or [B, past + T].
            position_ids: positions have no meaning here but one: where they do not grow, a packed document begins.
            past_key_values: an `XLSTMCache`; it is updated, and returned, whenever it is given.
            inputs_embeds: embeddings instead of ids, [B, T, D].
            use_cache: whether to return the states; by default `config.use_cache`, and not while training.
            output_hidden_states: whether to return the embeddings and every block's output, the last one normalised.
            seq_idx: number of each token's document in a packed row, [B, T].
            cu_seq_lens_q: first token of each document of a single packed row, then T, [documents + 1].
            input_features: frames instead of ids, [B, T, config.frame_size]; for configurations with an `input_size`.
            kwargs: `return_dict` is honoured; a keyword that no part of the model knows is warned about.

        Returns:
            output: with `last_hidden_state` [B, T, D], `past_key_values` and `hidden_states`.

        Raises:
            ValueError: not one of ids, embeddings and frames; a mask, cache or packing that does not fit.
            FloatingPointError: `config.debug` is set and a block gave values that are not finite.
        """
        warn_unused(kwargs)
        x = self._embed(input_ids, inputs_embeds, input_features)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        B, T = x.shape[:2]
        cache = self._open_cache(past_key_values, use_cache, B)
        past = 0 if cache is None else cache.get_seq_length()
        layout = lay_out_tokens((B, T), x.device, past, attention_mask, seq_idx, cu_seq_lens_q, position_ids)
        if input_features is not None:
            x = self._project(x, layout.real)
        x = self.embedding_dropout(x)

        layers: Any = self.layers
        if len(layers) != self.config.num_hidden_layers:  # fewer while drafting with `assistant_early_exit`
            layers = layers[: self.config.num_hidden_layers]
        hidden: list[Tensor] = []
        stepped = None if T > 1 or output_hidden_states else self._step(layers, x, cache, layout)
        if stepped is not None:
            x, states = stepped
        else:
            x, states = self._run_blocks(
                layers, layout.pack(x), cache, layout, hidden if output_hidden_states else None
            )
            x = layout.unpack(self.norm(x))
        if cache is not None:
            cache.store_(states, T, layout.real)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*hidden, x) if output_hidden_states else None,
        )

    def _step(
        self, layers: Any, x: Tensor, cache: XLSTMCache | None, layout: TokenLayout
    ) -> tuple[Tensor, list[LayerState]] | None:
        """A token [B, 1, D] through blocks and norm by the short way, or None where it may not take it."""
        plain = cache is not None and cache.tokens_seen > 0 and layout.lengths is None and layout.reset is None
        if not plain or torch.is_grad_enabled() or cache.recording or self.config.debug:  # type: ignore[union-attr]
            return None
        if self.config.kernel_backend not in ("auto", "torch") or not Stepper.is_for(x):
            return None
        x, states = x[:, 0], cache.states  # type: ignore[union-attr]
        plan = self.stepper.plan_for(layers, self.norm, x, states)
        if plan is None:
            return None
        y, after = plan.run(x, states)
        return y[:, None], after

    def _run_blocks(
        self, layers: Any, x: Tensor, cache: XLSTMCache | None, layout: TokenLayout, hidden: list[Tensor] | None
    ) -> tuple[Tensor, list[LayerState]]:
        """Packed tokens [B, T, D] through all blocks; what each of them gets is appended to `hidden`."""
        recording, donated = (False, False) if cache is None else (cache.recording, cache.donates)
        states = []
        befores = [None] * len(layers) if cache is None else cache.states
        for i, (layer, before) in enumerate(zip(layers, befores, strict=True)):
            if hidden is not None:
                hidden.append(layout.unpack(x))
                x = layout.pack(hidden[-1])  # what is returned lies on the way of the gradients
            y, state = layer(x, Call(before, layout.lengths, layout.reset, recording, donated))
            if self.config.debug:
                check_finite(f"layers.{i}", layer, x, y, before, state)
            x = y
            states.append(state)
        return x, states

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, input_features: Tensor | None) -> Tensor:
        """What was given, as [B, T, D]; frames as they are, [B, T, .], for `_project`."""
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "input_features": input_features}
        if sum(x is not None for x in given.values()) != 1:
            raise ValueError(f"Pass exactly one of {', '.join(f'`{name}`' for name in given)}.")
        name, x = next((name, x) for name, x in given.items() if x is not None)
        is_ids = name == "input_ids"
        if name != "inputs_embeds":
            reader, field = (self.embed_tokens, "vocab_size") if is_ids else (self.frame_proj, "input_size")
            if reader is None:
                raise ValueError(f"`{name}` cannot be read: this model was made without `{field}`.")
        if is_ids:
            if x.dim() != 2 or x.dtype not in (torch.int64, torch.int32):
                got = f"shape {tuple(x.shape)} of {x.dtype}"
                raise ValueError(f"`input_ids` must be [B, T] integers, int64 or int32; got {got}.")
        else:
            width = self.config.hidden_size if name == "inputs_embeds" else self.config.frame_size
            if x.dim() != 3 or x.shape[-1] != width or not x.is_floating_point():
                got = f"shape {tuple(x.shape)} of {x.dtype}"
                raise ValueError(f"`{name}` must be [B, T, {width}] and floating point; got {got}.")
        if name == "input_features" and x.dtype is torch.float64 and self.dtype is not torch.float64:
            raise ValueError(f"`{name}` must be float32 in a model of {self.dtype}; got {x.dtype}. Use `.float()`.")
        return self.embed_tokens(x) if is_ids else x  # type: ignore[misc]

    def _project(self, frames: Tensor, real: Tensor | None) -> Tensor:
        """Frames [B, T, .] as [B, T, D]; what padding holds reaches no gradient, which 0 times NaN would.

        A model of half precision rounds them, as Trainer's `bf16_full_eval` asks it to.
        """
        frames = frames.to(self.dtype)
        x: Tensor = self.frame_proj(frames if real is None else frames.masked_fill(~real[..., None], 0.0))  # type: ignore[misc]
        return x

    def _open_cache(self, cache: XLSTMCache | None, use_cache: bool | None, B: int) -> XLSTMCache | None:
        """The cache to read and write: the one given, a new one, or None."""
        if cache is None:
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training
            elif use_cache and self.gradient_checkpointing and self.training:
                logger.warning_once("`use_cache=True` is turned off: gradient checkpointing is on.")
                use_cache = False
            return XLSTMCache(self.config) if use_cache else None
        # Remote code loads this class once per checkpoint, so another copy of it must pass too: ask what it can do.
        if not hasattr(cache, "store_") or len(cache) != self.config.num_hidden_layers:
            raise ValueError(
                f"`past_key_values` must be an XLSTMCache of {self.config.num_hidden_layers} layers; got "
                f"{type(cache).__name__} of {len(cache)}. Make one with XLSTMCache(model.config), or pass none. Prefix "
                "tuning makes keys and values, which an xLSTM has not: tune a prompt or the states instead."
            )
        cache.check_model_(self.config)
        if cache.batch_size not in (-1, B):
            raise ValueError(
                f"`past_key_values` holds {cache.batch_size} rows and the input has {B}. Use batch_select_indices or "
                "batch_repeat_interleave on the cache first."
            )
        return cache


def warn_unused(kwargs: dict[str, Any]) -> None:
    """Warn once about keywords that change nothing here; those that are None or False ask for nothing."""
    # The collators that write `cu_seq_lens_q` describe the same packing three times more; TRL tells a language model's
    # base model too how many logits it wants.
    known = {"cu_seq_lens_k", "max_length_q", "max_length_k", "logits_to_keep"}
    unused = sorted(
        name for name, value in kwargs.items() if name not in known and value is not None and value is not False
    )
    if unused:
        logger.warning_once(f"An xLSTM has no use for {unused}: ignored.")


class XLSTMForCausalLM(XLSTMPreTrainedModel, XLSTMGenerationMixin):
    """xLSTM language model: next-token logits, with a soft cap if the configuration has one.

    Raises:
        ValueError: the configuration has no vocabulary.
    """

    _loss_function = staticmethod(causal_lm_loss)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: XLSTMConfig):
        super().__init__(config)
        if not config.vocab_size:
            raise ValueError("A language model needs a `vocab_size`; got 0, the default with an `input_size`.")
        self.model = XLSTMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.decode_loop = DecodeLoop()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: XLSTMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        input_features: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the loss if labels are given.

        Arguments are those of `XLSTMModel.forward`, and: `labels`, token ids to predict, [B, T], shifted here: each
        token predicts the next real one of its document, -100 and padding left out; `logits_to_keep`, logits of the
        last so many tokens only, or of the given positions, 0 for all; `shift_labels`, what each token predicts,
        [B, T], in place of shifted `labels`; `num_items_in_batch`, what the loss is divided by under gradient
        accumulation.

        Returns:
            output: with `loss`, `logits` [B, T or fewer, vocab_size], `past_key_values` and `hidden_states`.
        """
        # `shift_labels` is not named in the signature: Trainer would take batches without it for ones without labels.
        loss_kwargs = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        # Named in the signature, as in every model with a head: Trainer drops columns that are not.
        packing = {"seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q, "position_ids": position_ids}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            input_features=input_features,
            return_dict=True,
            **packing,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = soft_cap(multiply(self.lm_head, outputs.last_hidden_state[:, kept]), self.config.output_logit_soft_cap)
        loss, predicted = None, loss_kwargs.pop("shift_labels", None)
        if predicted is None and labels is not None:
            predicted = next_real_tokens(labels, attention_mask, **packing)
        if predicted is not None:
            given = {"labels": labels, "shift_labels": predicted, "vocab_size": self.config.vocab_size}
            loss = self.loss_function(logits=logits, **given, **loss_kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def get_compiled_call(self, compile_config: Any) -> Any:
        """What `generate` decodes with where it may: steps in a CUDA graph, or compiled as it was told."""
        return self.decode_loop.bind(self, compile_config)


class XLSTMForSequenceClassification(XLSTMPreTrainedModel):
    """A linear head over the last real token of each row, or the mean over all: classification or regression."""

    accepts_loss_kwargs = False  # the loss is a mean over rows, which Trainer is to divide by the accumulation steps

    def __init__(self, config: XLSTMConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.model = XLSTMModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: XLSTMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        input_features: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits of each row, and the loss if labels are given.

        Arguments are those of `XLSTMModel.forward`, and: `labels`, class indices [B], or targets [B] or [B, num_labels]
        for regression. Without an `attention_mask`, `pad_token_id` in the ids tells where a row ends.
        `config.pooling` chooses what is classified, over the tokens of this call.

        Returns:
            output: with `loss`, `logits` [B, num_labels], `past_key_values` and `hidden_states`.

        Raises:
            ValueError: several rows, no mask and no `pad_token_id`: where a row ends cannot be known.
        """
        packing = {"seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q, "position_ids": position_ids}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            input_features=input_features,
            return_dict=True,
            **packing,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        real = self._real_tokens(input_ids, attention_mask, hidden)
        pooled = self.score(last_of(hidden, real) if self.config.pooling == "last" else mean_of(hidden, real))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=pooled, labels=labels, pooled_logits=pooled, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _real_tokens(self, input_ids: Tensor | None, attention_mask: Tensor | None, hidden: Tensor) -> Tensor:
        """Which tokens are real, [B, T]."""
        B, T, _ = hidden.shape
        pad = self.config.pad_token_id
        if attention_mask is not None:
            return attention_mask[:, -T:].to(hidden.device) != 0
        if input_ids is not None and pad is not None:
            return input_ids.to(hidden.device) != pad
        if B == 1 or input_ids is None:
            return hidden.new_ones(B, T, dtype=torch.bool)
        raise ValueError(
            f"`attention_mask` or `config.pad_token_id` must say where each of the {B} rows ends; got neither. "
            "Pass the mask your tokenizer returns."
        )


class XLSTMForTokenClassification(XLSTMPreTrainedModel):
    """A linear head over every token."""

    def __init__(self, config: XLSTMConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.model = XLSTMModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: XLSTMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        input_features: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits of each token, and the loss if labels are given.

        Arguments are those of `XLSTMModel.forward`, and: `labels`, class indices, [B, T], -100 and padding left out;
        `num_items_in_batch`, as in `XLSTMForCausalLM.forward`.

        Returns:
            output: with `loss`, `logits` [B, T, num_labels] and `hidden_states`.
        """
        items = kwargs.pop("num_items_in_batch", None)
        packing = {"seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q, "position_ids": position_ids}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            input_features=input_features,
            return_dict=True,
            **packing,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            if attention_mask is not None:
                labels = labels.masked_fill(attention_mask[:, -labels.shape[1] :] == 0, -100)
            labels = labels.contiguous()  # Transformers' loss takes a view
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=items)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


# Where Trainer looks for classes whose labels it is to shift before it smooths them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(XLSTMConfig.model_type, XLSTMForCausalLM.__name__)

__all__ = [
    "XLSTMForCausalLM",
    "XLSTMForSequenceClassification",
    "XLSTMForTokenClassification",
    "XLSTMModel",
    "XLSTMPreTrainedModel",
]
