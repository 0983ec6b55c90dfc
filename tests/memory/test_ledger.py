"""A real step's bytes, against PyTorch's profiler, and the same step on fake tensors."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.memory import build, ledger, simulate

METHODS = ("full", "lora", "dora", "qlora")


def base(four_bit: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    if four_bit:
        for name in build.linear_layers(model):
            build.pack(model, name, torch.float32, "nf4", True)
        model.is_loaded_in_4bit = True
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def adapted(method: str, checkpointing: bool) -> nn.Module:
    model = base(method == "qlora")
    if method != "full":
        lora = LoraConfig(
            r=8, target_modules="all-linear", use_dora=method == "dora", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, lora)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        model.enable_input_require_grads()
    return model.train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.zeros(4, 128, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)


def peak(found: ledger.Replayed) -> int:
    return max(phase.allocated for phase in found.phases.values())


def resident(model: nn.Module, chosen: torch.optim.Optimizer, inputs: dict) -> int:
    """Bytes that exist before a step."""
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    tensors = [t for layer in layers for t in build.quantised_tensors(layer)]
    tensors += [*model.parameters(), *model.buffers(), *inputs.values()]
    tensors += [t for state in chosen.state.values() for t in state.values() if t.dim()]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_the_ledger_is_within_a_thousandth_of_the_profiler(method, checkpointing):
    torch.manual_seed(0)
    model, inputs = adapted(method, checkpointing), batch()
    chosen = optimizer(model)
    found = ledger.measure(model, inputs, chosen)
    truth = resident(model, chosen, inputs) + ledger.profiler_peak(model, inputs, chosen)
    assert peak(found) == pytest.approx(truth, rel=1e-3)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_fake_step_is_the_real_one(method, checkpointing):
    torch.manual_seed(0)
    real = ledger.measure(adapted(method, checkpointing), batch())
    with simulate.fake_tensors():
        fake = ledger.measure(adapted(method, checkpointing), batch())
    assert peak(fake) == pytest.approx(peak(real), rel=1e-3)
    for phase, found in real.phases.items():
        assert fake.phases[phase].categories == pytest.approx(found.categories, rel=2e-3, abs=512)


def test_measuring_leaves_the_weights_and_no_hooks_behind():
    torch.manual_seed(0)
    model = adapted("lora", False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ledger.measure(model, batch())
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name])
        assert param.grad is None
        assert not param._post_accumulate_grad_hooks


def test_categories_by_hand():
    torch.manual_seed(0)
    found = ledger.measure(adapted("full", False), batch())
    weights = 4 * sum(p.numel() for p in base(False).parameters())
    categories = found.phases["optimizer"].categories
    assert categories["gradients"] == weights
    assert categories["optimizer state"] == 2 * weights


def test_adalora_keeps_three_scores_for_each_number_of_its_matrices():
    config = AdaLoraConfig(total_step=100, tfinal=10, target_modules=["q_proj"])
    model = get_peft_model(base(four_bit=False), config).train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    scored = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    before = [p.detach().clone() for p in model.parameters()]
    found = ledger.measure(model, batch()).phases["optimizer"].categories
    assert found["optimizer state"] == pytest.approx(4 * (2 * trained + 3 * scored), rel=0.01)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
