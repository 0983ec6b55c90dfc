"""Does a longer stack of the same layers repay its cost, and does LoRA suffice to mend it?

SmolLM2-135M has 30 layers; [[0, 23], [8, 30]] makes 45 of them, the share by which SOLAR grew a
model of 32 layers to 48. Both stacks train on trivia questions with LoRA (rank 16, as in the note,
on query and value) and with all weights, each layer then with weights of its own. Equal for all
arms: the steps, the batches and their order, fp32. Each arm chooses its learning rate on the
validation rows of the first seed.

A step through 45 layers computes 1.5 times what a step through 30 does. So the test loss is also
taken after two thirds of the steps (the rate is constant after the warm-up): the longer stack has
then done no more work than the shorter one at the end.

Source: this course's own study of peft's `layer_replication`.
Taught in: notebook 04, section 13.
"""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForTokenClassification

from helpers import adapters, models, training
from helpers.adapters import replication
from helpers.experiments import texts
from helpers.experiments.study import Study

TEXT = "plain text"
RANGES = {30: [[0, 30]], 45: [[0, 23], [8, 30]]}
STEPS, EARLY, BATCH, RANK = 21, 14, 4, 16
GRID = {"lora": (3e-4, 1e-3, 3e-3, 1e-2), "all weights": (3e-5, 1e-4, 3e-4)}


def adapted(layers: int) -> PeftModel:
    """SmolLM2 with so many layers, that share their weights, and a new LoRA adapter on each.

    Raises:
        ValueError: a number of layers that the study does not have.
    """
    if layers not in RANGES:
        raise ValueError(f"The study has stacks of {', '.join(map(str, RANGES))}, not {layers!r}.")
    config = adapters.config("lora", task_type="CAUSAL_LM", rank=RANK)
    config.layer_replication = RANGES[layers]
    # Loaded anew for each run: peft replaces the base's layers, and unload leaves it so.
    return get_peft_model(AutoModelForCausalLM.from_pretrained(models.path("smollm2")), config)


def start(layers: int, trained: str) -> torch.nn.Module:
    """The model of one arm before its first step."""
    model = adapted(layers)
    if trained == "lora":
        return model
    model = model.unload()
    replication.separate(model)
    return model.requires_grad_(True)


def run(settings: dict, seed: int) -> dict[str, float]:
    """Train one arm at one rate; losses in nats per token, the test loss also after `EARLY`."""
    torch.manual_seed(seed)
    model = start(settings["layers"], settings["trained"])
    measured: dict[str, float] = {}

    def look(step: int) -> None:
        if step == EARLY:
            measured["test_loss_early"] = texts.loss(model, TEXT, "test")

    if settings["trained"] == "nothing":
        measured["test_loss_early"] = texts.loss(model, TEXT, "test")
    else:
        collate = DataCollatorForTokenClassification(texts.tokenizer())
        rows = texts.rows(TEXT, "train")
        training.train(
            model,
            training.batches(rows, collate, batch_size=BATCH, seed=seed),
            steps=STEPS,
            learning_rate=settings["learning_rate"],
            warmup_steps=2,
            watch=look,
            label=f"{settings['layers']} layers, {settings['trained']}",
        )
    return {f"{part}_loss": texts.loss(model, TEXT, part) for part in ("validation", "test")} | (
        measured
    )


STUDY = Study(
    name="replication",
    settings=tuple(
        {"layers": layers, "trained": trained, "learning_rate": rate}
        for layers in RANGES
        for trained, rates in {"nothing": (0.0,), **GRID}.items()
        for rate in rates
    ),
    metrics=("validation_loss", "test_loss", "test_loss_early"),
    run=run,
    tuned="learning_rate",
    seeds=5,
)
