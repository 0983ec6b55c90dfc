"""Which learning rate suits which method? MiniLM on movie reviews, the whole grid with every seed.

Equal for all arms: the steps, the batches and their order, warm-up, fp32 arithmetic and the head.
LoRA and QLoRA have rank 8 on query and value; QLoRA's base is in NF4 with double quantisation.

Source: this course's own study.
Taught in: notebook 06, section 2.
"""

from __future__ import annotations

import torch
from peft import get_peft_model, prepare_model_for_kbit_training

from helpers import adapters, models, quantization
from helpers.experiments import tasks
from helpers.experiments.study import Study

TASK = "movies"
GRID = {
    "full": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    "lora": (1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 3e-2),
    "qlora": (1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 3e-2),
}


def adapted(method: str, seed: int) -> torch.nn.Module:
    """MiniLM with a head: all of it to train, or LoRA on an fp32 or a 4-bit base."""
    if method == "full":
        return tasks.base(TASK, seed)
    lora = adapters.config("lora", task_type="SEQ_CLS")
    if method == "lora":
        return get_peft_model(tasks.base(TASK, seed), lora)
    torch.manual_seed(seed)
    base = quantization.load_in_4bit(models.path("minilm"), tasks.TASKS[TASK].auto)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return get_peft_model(base, lora)


def run(settings: dict, seed: int) -> dict[str, float]:
    """Train one method at one rate and measure it on both held-out splits."""
    method, rate = settings["method"], settings["learning_rate"]
    model = adapted(method, seed)
    tasks.fine_tune(model, TASK, learning_rate=rate, seed=seed, label=f"{method} {rate:g}")
    return tasks.measure(model, TASK, "validation") | tasks.measure(model, TASK, "test")


STUDY = Study(
    name="learning_rates",
    settings=tuple({"method": m, "learning_rate": r} for m, rates in GRID.items() for r in rates),
    metrics=("validation_loss", "validation_score", "test_loss", "test_score"),
    run=run,
    seeds=5,
)
