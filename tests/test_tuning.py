"""Fine-tuning: LoRA on every block style through PEFT, and states as the only parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import STYLES, tiny_model, tokens
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tolerances import assert_identical, assert_same
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_xlstm import XLSTMCache, XLSTMForCausalLM
from modeling_xlstm.tuning_xlstm import StateTuner, lora_targets

# PEFT asks for it by Transformers' older name, which the newest Transformers warns about.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(style: str) -> tuple[Any, Any]:
    """A model, and the same with LoRA, whose second factors are not zero."""
    model = tiny_model(XLSTMForCausalLM, style)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    options = LoraConfig(r=2, target_modules=lora_targets(model), task_type="CAUSAL_LM", init_lora_weights=False)
    plain = tiny_model(XLSTMForCausalLM, style)
    plain.load_state_dict(before)
    return plain, get_peft_model(model, options).double().eval()


@pytest.mark.parametrize("style", STYLES)
def test_every_adapter_changes_the_logits_and_has_a_gradient(style: str) -> None:
    plain, lora = adapted(style)
    ids = tokens(2, 9)
    assert (lora(ids).logits - plain(ids).logits).abs().max() > 0
    lora(ids, labels=ids).loss.backward()
    trained = {name: x for name, x in lora.named_parameters() if x.requires_grad}
    assert len(trained) == 2 * len(lora_targets(plain)) > 0
    assert all(x.grad is not None and x.grad.any() for x in trained.values())
    kinds = {type(plain.get_submodule(name)) for name in lora_targets(plain)}
    assert kinds == {nn.Linear}


@pytest.mark.parametrize("style", STYLES)
def test_a_second_adapter_has_the_targets_of_the_first(style: str) -> None:
    plain, lora = adapted(style)
    assert lora_targets(lora.get_base_model()) == lora_targets(plain)
    lora.add_adapter("second", LoraConfig(r=2, target_modules=lora_targets(lora.get_base_model())))
    count = sum("second" in name for name, _ in lora.named_parameters())
    assert count == 2 * len(lora_targets(plain))


@pytest.mark.parametrize("style", STYLES)
def test_merged_adapters_give_the_same_logits_and_the_merged_model_loads_anywhere(style: str, tmp_path: Path) -> None:
    _, lora = adapted(style)
    ids = tokens(2, 9)
    logits = lora(ids).logits
    lora.save_pretrained(tmp_path / "adapter")
    base = lora.unload()
    base.save_pretrained(tmp_path / "base")
    load: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float64}
    remote = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **load)
    again = PeftModel.from_pretrained(remote, tmp_path / "adapter").double().eval()
    assert_same(again(ids).logits, logits)
    merged = again.merge_and_unload()
    assert_same(merged(ids).logits, logits)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **load)
    assert_same(loaded.eval()(ids).logits, logits)


@pytest.mark.parametrize("style", STYLES)
def test_a_tuned_prompt_lowers_the_loss_and_generates_from_the_cache_as_without(style: str) -> None:
    options = PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB", task_type="CAUSAL_LM")
    learnt: Any = get_peft_model(tiny_model(XLSTMForCausalLM, style), options)
    ids, mask = tokens(1, 9).repeat(3, 1), torch.ones(3, 9, dtype=torch.long)
    mask[0, :2] = 0  # padding between the prompt and the text
    (prompt,) = (x for x in learnt.parameters() if x.requires_grad)
    optimizer, losses = torch.optim.Adam([prompt], 0.1), []
    for _ in range(20):
        loss = learnt(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    learnt.eval()
    inputs: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    inputs |= {"input_ids": ids[:, :4], "attention_mask": mask[:, :4]}
    greedy = ids[:, :4]
    for _ in range(4):
        seen = nn.functional.pad(mask[:, :4], (0, greedy.shape[1] - 4), value=1)
        greedy = torch.cat([greedy, learnt(input_ids=greedy, attention_mask=seen).logits[:, -1:].argmax(-1)], 1)
    assert_identical(learnt.generate(**inputs), greedy)
    assert_identical(learnt.generate(**inputs, use_cache=False), greedy)


def test_prefix_tuning_is_refused_with_what_to_do_instead() -> None:
    prefix: Any = get_peft_model(
        tiny_model(XLSTMForCausalLM), PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match="Prefix tuning makes keys and values, which an xLSTM has not: tune a prompt"):
        prefix(input_ids=tokens(1, 4))


def tune(tuner: StateTuner, ids: torch.Tensor, steps: int) -> list[float]:
    optimizer, losses = torch.optim.Adam([x for x in tuner.parameters() if x.requires_grad], 0.1), []
    for _ in range(steps):
        loss = tuner(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("style", STYLES)
def test_tuned_states_lower_the_loss_of_a_frozen_model(style: str) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(1, 9).repeat(3, 1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        after_prompt = model(torch.cat([torch.ones(3, 2, dtype=torch.long), ids], 1)).logits[:, 2:-1]
    expected = nn.functional.cross_entropy(after_prompt.flatten(0, 1), ids[:, 1:].flatten()).item()
    tuner = StateTuner(model, [1, 1])
    losses = tune(tuner, ids, 20)
    assert_same(losses[0], expected)  # training begins with the state of the prompt
    assert losses[-1] < 0.9 * losses[0]
    assert_identical(model.state_dict(), before)
    trained = {name.split("_")[-1] for name, x in tuner.named_parameters() if x.requires_grad}
    assert trained == ({"C", "c", "h", "conv"})


@pytest.mark.parametrize("style", STYLES)
def test_a_tuned_state_is_saved_as_that_of_a_prompt_which_generate_goes_on_from(style: str, tmp_path: Path) -> None:
    model, ids = tiny_model(XLSTMForCausalLM, style), tokens(1, 9)
    tuner = StateTuner(model, [1])
    tune(tuner, ids, 5)
    tuner.save(tmp_path / "tuned.safetensors")
    cache = XLSTMCache.load(tmp_path / "tuned.safetensors", model.config)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    mask = torch.ones(1, 1 + 3, dtype=torch.long)
    out = model.generate(ids[:, :3], past_key_values=cache, attention_mask=mask, **options)
    greedy = ids[:, :3]
    for _ in range(5):
        greedy = torch.cat([greedy, tuner(greedy).logits[:, -1:].argmax(-1)], 1)
    assert_identical(out, greedy)


def test_packed_rows_are_refused_and_whole_ones_described_as_packed_are_not() -> None:
    tuner, ids = StateTuner(tiny_model(XLSTMForCausalLM), [1]), tokens(1, 6)
    packed = {
        "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]]),
        "cu_seq_lens_q": torch.tensor([0, 3, 6]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
    }
    for name, value in packed.items():
        with pytest.raises(ValueError, match="one text each"):
            tuner(ids, **{name: value})
    whole = tuner(ids, position_ids=torch.arange(6)[None], seq_idx=torch.zeros(1, 6, dtype=torch.long))
    assert_identical(whole.logits, tuner(ids).logits)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token id; got none"):
        StateTuner(tiny_model(XLSTMForCausalLM), [])
