"""Claims of the sections Overview and 1 that need no lesson: each is measured and judged here."""

from __future__ import annotations

import torch
from peft import AdaLoraConfig, IA3Config, IA3Model, LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from helpers import adapters, claims, models, quantization, training

IDS = torch.arange(3, 15).reshape(2, 6)
QV = ["q_proj", "v_proj"]


def tiny_llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.tiny("llama")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def randomise(model: torch.nn.Module, adapter: str, seed: int) -> None:
    """Give an adapter's B random values, so that it changes the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}." in name:
            parameter.data.normal_(std=0.5, generator=generator)


def test_the_trainer_takes_a_wrapped_model(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=QV, task_type="CAUSAL_LM"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    trainer = training.trainer(
        model,
        rows,
        lambda items: {k: torch.stack([row[k] for row in items]) for k in items[0]},
        steps=4,
        learning_rate=1e-2,
        batch_size=2,
        seed=0,
        output_dir=tmp_path,
    )
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    checkpoint = tmp_path / "checkpoint-4"
    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
    claims.settle(
        "C002",
        measured={
            "four steps run": trainer.state.global_step == 4,
            "only adapter weights move": bool(moved) and all("lora_" in n for n in moved),
            "a checkpoint holds the adapter and not the base": all("lora_" in n for n in stored)
            and not (checkpoint / "model.safetensors").exists(),
        },
    )


def test_four_bit_loading(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model = quantization.load_in_4bit(tmp_path, AutoModelForCausalLM)
    kind = type(model.model.layers[0].self_attn.q_proj).__name__
    claims.settle("C003", measured=kind == "Linear4bit")


def test_switching_and_merging():
    base = tiny_llama()
    plain = logits(base)
    config = LoraConfig(target_modules=QV, task_type="CAUSAL_LM")
    model = get_peft_model(base, config, adapter_name="one")
    for name in ("two", "three"):
        model.add_adapter(name, config)
    seen = {}
    for seed, name in enumerate(("one", "two", "three")):
        randomise(model, name, seed)
        model.set_adapter(name)
        seen[name] = logits(model)
    model.set_adapter("one")
    back = logits(model)
    merged = logits(model.merge_and_unload())
    different = [plain, *seen.values()]
    claims.settle(
        "C004",
        measured={
            "each adapter gives its own logits": not any(
                close(a, b) for i, a in enumerate(different) for b in different[:i]
            ),
            "switching back restores the logits": torch.equal(back, seen["one"]),
            "merging keeps the logits": close(merged, seen["one"]),
        },
    )


def training_bytes(double_quant: bool, rank: int = 16, tokens: int = 512) -> float:
    """GB to train Llama-65B in 4 bits: a sum over the true shapes, one sequence of ``tokens``.

    4-bit weights in blocks of 64 with a fp32 absmax each, or with double quantisation an 8-bit
    one and a fp32 constant per 256 blocks (QLoRA, section 3); the rest in 16 bits; adapter,
    gradients and two AdamW states in fp32, and the optimiser's temporary copy of the trainables;
    a 16-bit input per checkpointed layer, and the logits in 16 and 32 bits with their gradient.
    """
    model = models.full_size("llama-65b")
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    quantised = sum(m.weight.numel() for m in linear if m is not model.lm_head)
    config = model.config
    absmax = 1 + 4 / 256 if double_quant else 4
    weights = quantised * (0.5 + absmax / 64) + 2 * (model.num_parameters() - quantised)
    lora = get_peft_model(model, adapters.config("lora", rank=rank, target_modules="all-linear"))
    state = adapters.count(lora).trainable * 4 * 5
    activations = tokens * (config.num_hidden_layers * config.hidden_size * 2)
    logit_bytes = tokens * config.vocab_size * (2 + 4 + 4)
    # while one checkpointed layer is recomputed, its inner activations are there in 16 bits
    inner = tokens * 2 * (8 * config.hidden_size + 4 * config.intermediate_size)
    dequantised = 2 * config.hidden_size * config.intermediate_size
    return (weights + state + activations + logit_bytes + inner + dequantised) / 1e9


def test_65b_on_48_gb():
    with_dq, without = training_bytes(True), training_bytes(False)
    assert 33 < with_dq < without
    claims.settle(
        "C005",
        measured={
            "with double quantisation": round(with_dq, 1),
            "without": round(without, 1),
        },
    )


def test_prefixes_in_every_layer():
    base = tiny_llama()
    config = base.config
    width = config.num_key_value_heads * config.head_dim
    model = get_peft_model(
        base, adapters.config("p-tuning-v2", task_type="CAUSAL_LM", virtual_tokens=5)
    )
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    shape = tuple(model.prompt_encoder.default.embedding.weight.shape)
    text = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False
    )
    assert shape == (5, config.num_hidden_layers * 2 * width)
    assert trainable and all("prompt_encoder" in n for n in trainable)
    assert text.shape[1] == IDS.shape[1] + 3


def test_prompts_at_the_input():
    config = adapters.config("prompt", task_type="CAUSAL_LM", virtual_tokens=5)
    model = get_peft_model(tiny_llama(), config)
    assert adapters.count(model).trainable == 5 * model.config.hidden_size
    assert logits(model).shape[1] == IDS.shape[1] + 5


def test_adalora_is_there():
    config = AdaLoraConfig(target_modules=QV, task_type="CAUSAL_LM", total_step=10)
    model = get_peft_model(tiny_llama(), config)
    names = [n for n, p in model.named_parameters() if p.requires_grad and "lora_E" in n]
    claims.settle("C013", measured=bool(names))


def test_ia3_rescales_and_merges():
    model = get_peft_model(tiny_llama(), IA3Config(task_type="CAUSAL_LM"))
    vectors = {n: p for n, p in model.named_parameters() if "ia3_l" in n}
    for seed, parameter in enumerate(vectors.values()):
        parameter.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(seed))
    before = logits(model)
    reached = {name.split(".ia3_l")[0].rsplit(".", 1)[-1] for name in vectors}
    kept = close(logits(model.merge_and_unload()), before)
    assert reached == {"k_proj", "v_proj", "down_proj"}
    assert kept
    assert "Infused Adapter by Inhibiting and Amplifying Inner Activations" in IA3Model.__doc__
