"""Which rank is enough? MiniLM on tasks of growing difficulty, and on more or less data.

Equal for all ranks of a task: the steps, the batches and their order, the targets (query and value)
and alpha / rank = 2. Each rank chooses its learning rate on the validation rows of the first seed.
Rank 0 is the control: the head alone is trained on the frozen encoder.

Source: this course's own study.
Taught in: notebook 02, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft import get_peft_model

from helpers import adapters, updates
from helpers.experiments import tasks
from helpers.experiments.study import Study

RANKS = (1, 4, 8, 16, 32, 64)
FEW = (1, 8, 64)  # for the other domains of sentiment
SWEEPS = {
    "movies": RANKS,
    "addresses": RANKS,
    "questions": RANKS,
    "products": FEW,
    "news": FEW,
    "tweets": FEW,
}
HEAD_RATES = (3e-3, 1e-2, 3e-2)
SIZES = (64, 256)  # rows of addresses; the sweep by task has them all, 1,112
METRICS = (
    "validation_loss",
    "validation_score",
    "test_loss",
    "test_score",
    "update_norm",
    "used_rank",
)


def rates(rank: int) -> tuple[float, ...]:
    """The learning rates that a rank is tried at, a factor of about three apart.

    At fixed alpha / rank the best rate falls as the rank rises. Rank 0 is the head alone.
    """
    if rank == 0:
        return HEAD_RATES
    if rank == 1:
        return (1e-3, 3e-3, 1e-2, 3e-2)
    return (1e-3, 3e-3, 1e-2) if rank < 32 else (3e-4, 1e-3, 3e-3, 1e-2)


def adapted(task: str, rank: int, seed: int) -> torch.nn.Module:
    """MiniLM with the task's head and LoRA on query and value; rank 0 trains the head alone."""
    model = tasks.base(task, seed)
    if rank:
        kind = tasks.TASKS[task].task_type
        return get_peft_model(model, adapters.config("lora", task_type=kind, rank=rank))
    model.requires_grad_(False)
    head = "qa_outputs" if hasattr(model, "qa_outputs") else "classifier"
    getattr(model, head).requires_grad_(True)
    return model


def run(settings: dict, seed: int) -> dict[str, float]:
    """Train one rank at one rate on a task and measure it on both held-out splits."""
    task, rank, rate = settings["task"], settings["rank"], settings["learning_rate"]
    model = adapted(task, rank, seed)
    tasks.fine_tune(
        model,
        task,
        learning_rate=rate,
        seed=seed,
        label=f"{task} r={rank} {rate:g}",
        first_rows=settings.get("rows"),
    )
    measured = tasks.measure(model, task, "validation") | tasks.measure(model, task, "test")
    return measured | size_of(model)


def size_of(model: torch.nn.Module) -> dict[str, float]:
    """Mean Frobenius norm and mean used rank of the updates; 0 where there are none."""
    found = updates.table(model) if hasattr(model, "peft_config") else None
    if found is None:
        return {"update_norm": 0.0, "used_rank": 0.0}
    return {
        "update_norm": round(float(found["norm"].mean()), 4),
        "used_rank": round(float(found["used_rank"].mean()), 2),
    }


def arms(ranks: Iterable[int], **fixed: str | int) -> tuple[dict, ...]:
    """The settings of one sweep: the head alone (rank 0) and every rank, each with its rates."""
    return tuple(
        {**fixed, "rank": rank, "learning_rate": rate}
        for rank in (0, *ranks)
        for rate in rates(rank)
    )


BY_TASK = Study(
    name="rank_by_task",
    settings=tuple(s for task, ranks in SWEEPS.items() for s in arms(ranks, task=task)),
    metrics=METRICS,
    run=run,
    tuned="learning_rate",
    seeds=5,
)

BY_SIZE = Study(
    name="rank_by_size",
    settings=tuple(s for rows in SIZES for s in arms(RANKS, task="addresses", rows=rows)),
    metrics=METRICS,
    run=run,
    tuned="learning_rate",
    seeds=5,
)
