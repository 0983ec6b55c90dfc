"""Does LoRA reach what full fine-tuning reaches? SmolLM2-135M on trivia answers.

Equal for both arms: the steps, the batches and their order, fp32. Each arm has its own grid of
learning rates; the rate is chosen on the validation rows, the verdict is read on the test rows.
"""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForTokenClassification

from helpers import adapters, data, models, training
from helpers.experiments.study import Study

STEPS, BATCH = 20, 4
GRID = {"full": (5e-5, 1e-4, 2e-4), "lora": (1e-3, 2e-3, 4e-3)}


def run(settings: dict, seed: int) -> dict[str, float]:
    """Train one arm at one rate and return its losses (nats per answer token)."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(models.path("smollm2"))
    model = AutoModelForCausalLM.from_pretrained(models.path("smollm2"))
    if settings["method"] == "lora":
        model = get_peft_model(model, adapters.config("lora", task_type="CAUSAL_LM"))
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
