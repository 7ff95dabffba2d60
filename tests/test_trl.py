"""TRL's trainers on our models: packed, flattened and padded batches train alike, with the model's own loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from inputs import STYLES, tiny_model, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from tolerances import FLOAT32, assert_same
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from modeling_xlstm import XLSTMForCausalLM

# TRL sets it by Transformers' older name, which the newest Transformers warns about.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

LENGTHS = [9, 4, 17, 2, 6]
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"per_device_train_batch_size": len(LENGTHS), "max_length": None},
    "padding_free": {"per_device_train_batch_size": len(LENGTHS), "max_length": None, "padding_free": True},
    "packed": {"per_device_train_batch_size": 1, "max_length": sum(LENGTHS), "packing": True},
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word for each of the 61 ids of the tiny models."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, 61))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def sft(folder: Path, style: str, documents: list[list[int]], **options: Any) -> SFTTrainer:
    """TRL computes the loss in float32; plain gradient descent does not blow its rounding up as Adam would."""
    torch.manual_seed(0)
    model = tiny_model(XLSTMForCausalLM, style, output_logit_soft_cap=2.0)  # low enough to bend every logit
    arguments = SFTConfig(
        str(folder), max_steps=3, learning_rate=0.3, optim="sgd", logging_steps=1, report_to="none", save_strategy="no",
        use_cpu=True, bf16=False, disable_tqdm=True, **options,
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": documents})
    return SFTTrainer(model, arguments, train_dataset=data, processing_class=word_tokenizer())


@pytest.mark.parametrize("style", STYLES)
def test_packed_flattened_and_padded_batches_train_alike_with_the_loss_of_the_model(style: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    documents = [tokens(1, n)[0].tolist() for n in LENGTHS]
    results = {}
    for layout, options in LAYOUTS.items():
        trainer = sft(tmp_path / layout, style, documents, **options)
        if layout == "padded":
            ids = [torch.tensor(document)[None] for document in documents]
            with torch.no_grad():
                nats = sum(trainer.model(x, labels=x).loss * (x.shape[1] - 1) for x in ids)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results[layout] = losses, {name: x.detach() for name, x in trainer.model.named_parameters()}
    assert_same(results["padded"][0][0], float(nats) / sum(n - 1 for n in LENGTHS), FLOAT32)
    assert_same(results["padding_free"], results["padded"], FLOAT32)
    assert_same(results["packed"], results["padded"], FLOAT32)
