"""How much longer does a step of DoRA take than one of LoRA? MiniLM and SmolLM2 on a processor.

LoRA, DoRA and LoRA again, three models in one process, each takes a step in every round, in an
order that rotates: whatever slows the machine down meets all three. The second LoRA is the
control. A seed is a repeat of its own; random token ids of fixed shapes stand for the batches. The
two short shapes of MiniLM are those of the studies on addresses and on movie reviews.

Source: this course's own study of DoRA (Liu et al. 2024).
Taught in: notebook 04, section 4.
"""

from __future__ import annotations

import itertools
import statistics
import time

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers import adapters, models
from helpers.experiments.study import Study
from helpers.training import Batch

SHAPES = {"minilm": ((8, 20), (8, 32), (8, 128)), "smollm2": ((4, 32), (1, 256))}  # rows, tokens
TARGETS = {
    "minilm": {"query and value": ["query", "value"], "all linear": "all-linear"},
    "smollm2": {"query and value": ["q_proj", "v_proj"], "all linear": "all-linear"},
}
ARMS = ("lora", "dora", "lora again")
SECONDS = 8.0  # of rounds at least
RANK = 8


def adapted(model: str, method: str, targets: str) -> torch.nn.Module:
    """MiniLM with a head of two classes, or SmolLM2, with LoRA or DoRA of rank 8."""
    path = models.path(model)
    if model == "minilm":
        kind, base = "SEQ_CLS", AutoModelForSequenceClassification.from_pretrained(path)
    else:
        kind, base = "CAUSAL_LM", AutoModelForCausalLM.from_pretrained(path)
    chosen = TARGETS[model][targets]
    config = adapters.config(method, task_type=kind, rank=RANK, target_modules=chosen)
    return get_peft_model(base, config).train()


def batch(model: str, rows: int, length: int) -> Batch:
    """Random token ids (rows, length) with labels."""
    ids = torch.randint(1000, 20_000, (rows, length))
    labels = torch.arange(rows) % 2 if model == "minilm" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def run(settings: dict, seed: int) -> dict[str, float]:
    """Medians over the rounds: DoRA's time over LoRA's, LoRA's over LoRA's, seconds a step."""
    torch.manual_seed(seed)
    name = settings["model"]
    inputs = batch(name, settings["rows"], settings["tokens"])
    trained = {arm: adapted(name, arm.split()[0], settings["targets"]) for arm in ARMS}
    optimisers = {arm: torch.optim.AdamW(_trained(model)) for arm, model in trained.items()}

    def seconds(arm: str) -> float:
        start = time.perf_counter()
        trained[arm](**inputs).loss.backward()
        optimisers[arm].step()
        optimisers[arm].zero_grad()
        return time.perf_counter() - start

    for arm in ARMS:  # the first step allocates
        seconds(arm)
    rounds: list[dict[str, float]] = []
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS:  # whole cycles: each arm comes first equally often
        rounds += [{arm: seconds(arm) for arm in order} for order in itertools.permutations(ARMS)]
    return summary(rounds)


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    """From the seconds of each arm in each round to medians; ratios are taken within a round."""
    ratios = [r["dora"] / statistics.fmean((r["lora"], r["lora again"])) for r in rounds]
    controls = [r["lora again"] / r["lora"] for r in rounds]
    return {
        "ratio": round(statistics.median(ratios), 4),
        "control": round(statistics.median(controls), 4),
        "lora_seconds": round(statistics.median(r["lora"] for r in rounds), 4),
    }


STUDY = Study(
    name="dora_speed",
    settings=tuple(
        {"model": model, "rows": rows, "tokens": tokens, "targets": targets}
        for model, shapes in SHAPES.items()
        for rows, tokens in shapes
        for targets in TARGETS[model]
    ),
    metrics=("ratio", "control", "lora_seconds"),
    run=run,
    seeds=3,
)
