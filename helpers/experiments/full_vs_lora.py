"""Do LoRA and QLoRA reach what full fine-tuning reaches? SmolLM2-135M on trivia answers.

Equal for all arms: the steps, the batches and their order, fp32. Each arm has its own grid of
learning rates; the rate is chosen on the validation rows, the verdict is read on the test rows.

Source: this course's own.
Taught in: notebook 01, section 3, and notebook 03, section 5.
"""

from __future__ import annotations

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForTokenClassification

from helpers import adapters, data, models, quantization, training
from helpers.experiments.study import Study

STEPS, BATCH = 20, 4
GRID = {"full": (5e-5, 1e-4, 2e-4), "lora": (1e-3, 2e-3, 4e-3), "qlora": (1e-3, 2e-3, 4e-3)}


def adapted(method: str) -> torch.nn.Module:
    """SmolLM2, as it is or with LoRA on its fp32 weights or on 4-bit ones."""
    folder = models.path("smollm2")
    if method == "qlora":
        base = quantization.load_in_4bit(folder, AutoModelForCausalLM)
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    else:
        base = AutoModelForCausalLM.from_pretrained(folder)
    if method in ("full", "untrained"):
        return base
    return get_peft_model(base, adapters.config("lora", task_type="CAUSAL_LM"))


def run(settings: dict, seed: int) -> dict[str, float]:
    """Train one arm at one rate and return its losses (nats per answer token)."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(models.path("smollm2"))
    model = adapted(settings["method"])
    splits = {k: data.chat_examples(v, tokenizer) for k, v in data.trivia().items()}
    collate = DataCollatorForTokenClassification(tokenizer)
    if settings["method"] != "untrained":
        rows = training.batches(splits["train"], collate, batch_size=BATCH, seed=seed)
        training.train(
            model,
            rows,
            steps=STEPS,
            learning_rate=settings["learning_rate"],
            warmup_steps=2,
            label=f"{settings['method']} {settings['learning_rate']:g}",
        )
    losses = {
        split: training.answer_loss(
            model, training.ordered_batches(splits[split], collate, batch_size=10)
        )
        for split in ("validation", "test")
    }
    return {f"{split}_loss": round(value, 5) for split, value in losses.items()}


STUDY = Study(
    name="full_vs_lora",
    settings=(
        {"method": "untrained", "learning_rate": 0.0},
        *({"method": m, "learning_rate": r} for m, rates in GRID.items() for r in rates),
    ),
    metrics=("validation_loss", "test_loss"),
    run=run,
)
