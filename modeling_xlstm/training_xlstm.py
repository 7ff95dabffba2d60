"""Training with Transformers' Trainer: the published recipe, packed documents, and states carried between segments.

Truncated back-propagation through time: a segment starts from the states that the one before it left, detached, so
the model learns from a past of any length at the memory of one segment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.data import default_data_collator

from .cache_xlstm import XLSTMCache
from .configuration_xlstm import XLSTMConfig
from .tokens_xlstm import next_real_tokens

IGNORED = -100  # the label that counts in no loss


class StoredDocuments(Protocol):
    """Documents that are not held in memory."""

    @property
    def ids(self) -> Any:
        """Token ids of all documents, end to end: `ids[places]` reads those at places [T], `len(ids)` counts them."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each document, [documents]."""


class Segments(Dataset[dict[str, Tensor]]):
    """Documents laid end to end, cut into lanes of one length, and every lane into segments.

    Item i is segment i // lanes of lane i % lanes: read in order, `lanes` items are one segment of every lane, and the
    next `lanes` items are what follows each. Every token but the first of a document is predicted exactly once, across
    the ends of segments and lanes too. The end of a lane cuts at most one document, whose rest opens the next lane from
    an empty state. Nothing is left out; the last segment of a lane is padded.

    Args:
        documents: token ids of each document, none of them empty; or `StoredDocuments`.
        lanes: rows of one optimizer step over all processes: processes x batch size x accumulation steps.
        segment_tokens: tokens of a segment, T; gradients reach no further back.
        seed: shuffles the documents, anew in every epoch; None keeps their order.

    Raises:
        ValueError: a document is empty or no row of integers, or there is less than a token for each lane.
    """

    def __init__(
        self,
        documents: Iterable[Sequence[int] | Tensor] | StoredDocuments,
        lanes: int,
        segment_tokens: int,
        seed: int | None,
    ):
        if hasattr(documents, "lengths"):
            stored: Any = documents
            ids, lengths = stored.ids, stored.lengths
        else:
            parts = [_as_ids(number, document) for number, document in enumerate(documents)]
            ids, lengths = torch.cat([torch.empty(0, dtype=torch.int32), *parts]), torch.tensor([*map(len, parts)])
        if len(lengths) == 0 or int(lengths.min()) == 0:
            raise ValueError(
                f"`documents` must hold at least one document, and no empty one; got {len(lengths)}, of them "
                f"{int((lengths == 0).sum())} empty. Leave the empty ones out."
            )
        if lanes < 1 or segment_tokens < 1 or int(lengths.sum()) < lanes:
            raise ValueError(
                f"`lanes` and `segment_tokens` must be at least 1, with a token for each lane; got {lanes} and "
                f"{segment_tokens} for {int(lengths.sum())} tokens. Use a smaller batch, or more text."
            )
        self.ids, self.lengths = ids, lengths
        self.begins = lengths.cumsum(0) - lengths  # where each document begins in `ids`
        self.lanes, self.segment_tokens, self.seed = lanes, segment_tokens, seed
        self.edges = [len(self.ids) * lane // lanes for lane in range(lanes + 1)]  # of the lanes, in the stream
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Lay the documents out in the order of this epoch."""
        order = torch.arange(len(self.lengths))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.lengths), generator=generator)
        self.ends = self.lengths[order].cumsum(0)  # of the documents, in the stream
        # How far a document's place in `ids` is from its place in the stream.
        self.shifts = self.begins[order] - (self.ends - self.lengths[order])

    def __len__(self) -> int:
        longest = -(-len(self.ids) // self.lanes)
        return -(-longest // self.segment_tokens) * self.lanes

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One segment of one lane.

        Returns:
            item: `input_ids`, `attention_mask`, `seq_idx` (numbers of documents), and `shift_labels` and `labels`, both
                what each token predicts, [T]; `lane`, and `fresh`, whether no state is to be carried into the segment.
        """
        segment, lane = divmod(index, self.lanes)
        start, stop = self.edges[lane] + segment * self.segment_tokens, self.edges[lane + 1]
        # One token more on either side: what comes before tells whether a document begins, what follows is predicted.
        places = torch.arange(start - 1, start + self.segment_tokens + 1)  # [T + 2]
        document = torch.searchsorted(self.ends, places, right=True)
        ids = self.ids[
            (places + self.shifts[document.clamp(max=len(self.ends) - 1)]).clamp(0, len(self.ids) - 1)
        ].long()
        return {
            **packed_row(ids[1:], document[1:], places[1:-1] < stop),
            "lane": torch.tensor(lane),
            "fresh": torch.tensor(segment == 0 or bool(document[0] != document[1])),
        }


def _as_ids(number: int, document: Any) -> Tensor:
    """Token ids of one document, [T]."""
    try:
        ids = torch.as_tensor(document)
    except (TypeError, ValueError):
        ids = torch.empty(())  # words
    if ids.dim() != 1 or (len(ids) and ids.is_floating_point()):
        raise ValueError(
            f"`documents` must hold token ids, integers [T]; number {number} is a {type(document).__name__}, read as "
            f"{ids.dtype} {list(ids.shape)}. Tokenise text, and give each document a row of its own."
        )
    return ids.to(torch.int32)  # half the memory of torch's own integers; a vocabulary needs no more


def packed_row(ids: Tensor, document: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
    """One row as a model and Trainer take it.

    Args:
        ids: of its tokens and of the one after them, [T + 1].
        document: numbers of their documents, [T + 1].
        real: False at padding, [T]; None if there is none.

    Returns:
        row: `input_ids`, `attention_mask`, `seq_idx`, and `labels` and `shift_labels`, what each token predicts, [T].
    """
    real = torch.ones(len(ids) - 1, dtype=torch.bool) if real is None else real
    targets = ids[1:].masked_fill(~real | (document[:-1] != document[1:]), IGNORED)
    return {
        "input_ids": ids[:-1].masked_fill(~real, 0),
        "attention_mask": real.long(),
        "seq_idx": document[:-1],
        "labels": targets,
        "shift_labels": targets,
    }


def decayed_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay acts on, in the model's order: the published recipe's choice.

    Those of projections, gates and convolutions, and of a head that is not tied. Not norms, biases, the skip, the
    recurrent weights of the sLSTM, and the embedding.
    """
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if "weight" in name and "norm" not in name and "embed_tokens" not in name]


class ResumableTrainer(Trainer):
    """Transformers' Trainer, which would train one step more if it is resumed at the last step of a run."""

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """As in Trainer: how many epochs, and batches of the next one, are behind; at the last step, all of them."""
        trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None or self.state.global_step < max_steps:
            return trained
        self._load_rng_state(resume_from_checkpoint)  # which else the first epoch does
        return num_train_epochs, 0


class XLSTMTrainer(ResumableTrainer):
    """Transformers' Trainer with the published recipe: its weight-decay groups, and a z-loss on request.

    Columns of a dataset that describe packing reach the model, and a language model's loss, smoothed or not, is divided
    by the number of tokens that are predicted, which padding and the first tokens of documents are not. With
    `compute_metrics=sum_nats` and `preprocess_logits_for_metrics=nats_of_labels`, an evaluation on `Segments` has exact
    sums, `eval_nats` and `eval_predicted_tokens`, where `eval_loss` is a mean over batches.

    Args:
        z_loss: weight of the mean squared log of the softmax's normaliser, which keeps logits from drifting; 1e-4 is
            usual, 0 leaves it out. What is logged as the loss of the training includes it.
        args, kwargs: those of Trainer.

    Raises:
        ValueError: `z_loss` is negative or not finite, or the model is no language model and it is not 0.
    """

    def __init__(self, *args: Any, z_loss: float = 0.0, **kwargs: Any):
        if not 0 <= z_loss < float("inf"):
            raise ValueError(f"`z_loss` must be a finite number of at least 0; got {z_loss}. 1e-4 is usual.")
        super().__init__(*args, **kwargs)
        self.z_loss = z_loss
        head = getattr(self.model, "get_output_embeddings", None)
        self._is_language_model = head is None or head() is not None  # a wrapper without one is a `StateTuner`
        if z_loss and not self._is_language_model:
            raise ValueError(
                f"`z_loss` needs a language model, whose logits it keeps from drifting; got {z_loss} for "
                f"{type(self.model).__name__}. Leave it out."
            )
        if self._is_language_model and self.label_smoother is not None and self.compute_loss_func is None:
            self.compute_loss_func = self._smoothed

    def _smoothed(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The loss with smoothed labels, which are shifted already: Trainer would shift by one place."""
        smoother: Any = self.label_smoother
        return smoother(outputs, labels, num_items_in_batch=num_items_in_batch)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """As in Trainer, but of what the model's loss counts."""
        if self._is_language_model and all("labels" in batch for batch in batch_samples):
            batch_samples = [{**batch, "shift_labels": next_labels(batch)} for batch in batch_samples]
        else:
            batch_samples = [without_padded_labels(batch) for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Called by `create_optimizer`."""
        return decayed_parameters(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer, which writes no model at all where FSDP writes its checkpoints in shards."""
        if not self.is_fsdp_enabled or _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))

    def _set_signature_columns_if_needed(self) -> None:
        # Trainer drops the columns that forward does not name, and this one is not named but passed on.
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            self._signature_columns = [*columns, "shift_labels"]  # type: ignore[assignment]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As in Trainer, and the z-loss while training."""
        if self.compute_loss_func == self._smoothed and "labels" in inputs:
            shifted = next_labels(inputs)  # what a function of the labels alone cannot know
            inputs = {**inputs, "labels": shifted, "shift_labels": shifted}
        elif not self._is_language_model:
            inputs = without_padded_labels(inputs)
        if not self.z_loss or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        predicted = next_labels(inputs) != IGNORED  # first, for Trainer takes the labels out for a function of its own
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        wide = torch.promote_types(outputs.logits.dtype, torch.float32)
        squares = outputs.logits.to(wide).logsumexp(-1).square()[predicted].sum()
        items = predicted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # As for the loss: the items are those of all processes, whose gradients are averaged.
            squares = squares * self.accelerator.num_processes
        loss = loss + self.z_loss * squares / items
        return (loss, outputs) if return_outputs else loss


def without_padded_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch of a classifier; the labels of tokens, [B, T], are left out at padding, as the model's loss does."""
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    if labels is None or mask is None or labels.shape != mask.shape or labels.is_floating_point():
        return inputs
    return {**inputs, "labels": labels.masked_fill(mask == 0, IGNORED)}


def next_labels(inputs: dict[str, Any]) -> Tensor:
    """What each token of a batch predicts, [B, T], as the model's loss has it."""
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]
    described = ("attention_mask", "seq_idx", "cu_seq_lens_q", "position_ids")
    return next_real_tokens(inputs["labels"], **{name: inputs.get(name) for name in described})


def nats_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [B, T, vocab_size] reduced to the loss at each place, [B, T], for labels that are shifted already."""
    return nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)


def sum_nats(prediction: EvalPrediction) -> dict[str, float]:
    """Loss of all places together, and how many they were."""
    labels: Any = prediction.label_ids
    nats: Any = prediction.predictions
    predicted = labels != IGNORED
    return {"nats": float(nats[predicted].sum(dtype="float64")), "predicted_tokens": int(predicted.sum())}


class CarriedStateTrainer(XLSTMTrainer):
    """Transformers' Trainer on `Segments`: the states of every lane go from one optimizer step to the next, detached.

    Each micro-batch of each process has lanes of its own, so accumulation and processes only say where a lane is
    computed. States are reset where a lane begins a document, saved in every checkpoint, and read again on resuming.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._carried: dict[int, XLSTMCache] = {}  # by the first lane of a micro-batch
        self._carried_in_evaluation: dict[int, XLSTMCache] = {}

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The segments in order, `per_device_train_batch_size` lanes for each process and micro-batch.

        Raises:
            ValueError: an argument would take a segment to another lane, or the number of lanes is not that of a step.
        """
        check_arguments(self.args)
        return self._in_order(self.train_dataset, self._train_batch_size, self._lanes)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As in Trainer; segments are read in order, and every evaluation starts from empty states."""
        chosen: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, str):
            chosen = self.eval_dataset[chosen]  # type: ignore[index]
        return self._judging(chosen) if isinstance(chosen, Segments) else super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """The same, for `predict`."""
        is_carried = isinstance(test_dataset, Segments)
        return self._judging(test_dataset) if is_carried else super().get_test_dataloader(test_dataset)

    def _judging(self, segments: Segments) -> DataLoader[Any]:
        self._carried_in_evaluation = {}
        rows = self.args.eval_batch_size
        return self._in_order(segments, rows, rows * self.args.world_size)

    def _in_order(self, segments: Any, batch_size: int, per_step: int) -> DataLoader[Any]:
        if not isinstance(segments, Segments) or segments.lanes != per_step:
            raise ValueError(
                f"The dataset must be `Segments` of {per_step} lanes, the rows of one step over all processes; got "
                f"{type(segments).__name__} of {getattr(segments, 'lanes', 'no')} lanes."
            )
        loader: DataLoader[Any] = DataLoader(
            segments,
            batch_size=batch_size,
            sampler=SequentialSampler(segments),
            collate_fn=default_data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in Trainer, from the states that the lanes' last segment left; what comes out is detached."""
        inputs, cache = self._carry(inputs, self._carried)
        if num_items_in_batch is not None:
            # The last segments of an epoch may hold the last tokens of documents only, which predict nothing.
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        loss = super().training_step(model, inputs, num_items_in_batch)
        cache.detach_()
        return loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; segments from the states their lanes' last segment left."""
        if "lane" in inputs:
            inputs, _ = self._carry(inputs, self._carried_in_evaluation)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _carry(self, inputs: dict[str, Any], carried: dict[int, XLSTMCache]) -> tuple[dict[str, Any], XLSTMCache]:
        """What the model takes of a batch, and the states to start it from."""
        inputs = dict(inputs)
        lane, fresh = int(inputs.pop("lane")[0]), inputs.pop("fresh")
        cache = carried.setdefault(lane, XLSTMCache(self._config))
        cache.reset_rows_(fresh)
        return {**inputs, "past_key_values": cache}, cache

    @property
    def _lanes(self) -> int:
        """Rows of one step over all processes."""
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    @property
    def _config(self) -> XLSTMConfig:
        model: Any = self.model
        return model.config

    # Trainer calls the next two in every process, where it saves and restores all else that belongs to one process,
    # and before the file that tells a checkpoint was written to its end.

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        for path in self._states_of_others(output_dir):
            path.unlink(missing_ok=True)  # left by another run, which wrote a checkpoint of this name
        for lane, cache in self._carried.items():
            cache.save(states_file(output_dir, lane))

    def _states_of_others(self, checkpoint: str) -> set[Path]:
        """What a checkpoint holds beside the states of this training's micro-batches, of all processes."""
        own = {states_file(checkpoint, lane) for lane in range(0, self._lanes, self._train_batch_size)}
        return set(Path(checkpoint).glob("states_*.safetensors")) - own

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        for micro_batch in range(self.args.gradient_accumulation_steps):
            lane = (micro_batch * self.args.world_size + self.args.process_index) * self._train_batch_size
            path = states_file(checkpoint, lane)
            if not path.is_file():
                raise ValueError(
                    f"To resume, {checkpoint} must hold the states of lane {lane} and those after it; there is no "
                    f"{path.name}. Resume with the processes, batch size and accumulation steps it was trained with."
                )
            cache = XLSTMCache.load(path, self._config, self.args.device)
            if cache.batch_size != self._train_batch_size:
                raise ValueError(
                    f"To resume, {path} must hold {self._train_batch_size} lanes, the batch size; got "
                    f"{cache.batch_size}. Resume with the processes, batch size and accumulation steps it was trained "
                    "with."
                )
            self._carried[lane] = cache
        if others := self._states_of_others(checkpoint):
            raise ValueError(
                f"To resume, {checkpoint} must hold the states of {self._lanes} lanes; there is {min(others).name} "
                "too. Resume with the processes, batch size and accumulation steps it was trained with."
            )


def states_file(checkpoint: str, lane: int) -> Path:
    """Where a checkpoint keeps the states of a micro-batch whose first lane is `lane`."""
    return Path(checkpoint) / f"states_{lane:05d}.safetensors"


def check_arguments(arguments: TrainingArguments) -> None:
    """Raise ValueError, with the way out, for arguments under which a lane's segments would not follow each other."""
    accelerate: Any = arguments.accelerator_config
    faults = {
        "accelerator_config.split_batches": accelerate.split_batches,
        "accelerator_config.dispatch_batches": accelerate.dispatch_batches,
        "ignore_data_skip": arguments.ignore_data_skip,
        # Workers that stay would go on with the order of the first epoch.
        "dataloader_persistent_workers": arguments.dataloader_persistent_workers,
    }
    for name, value in faults.items():
        if value:
            raise ValueError(f"`{name}` cannot be combined with carried states; got {value}. Leave it out.")
    if arguments.n_gpu > 1:
        raise ValueError(
            f"Carried states need one process per GPU; got one for {arguments.n_gpu}. Launch with torchrun."
        )
