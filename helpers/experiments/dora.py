"""Is DoRA better than LoRA, and at which rank? MiniLM with both on query and value.

Equal for all arms: the steps, the batches and their order, the head, fp32 and alpha / rank = 2. The
test loss is also taken on the way: the learning rate is constant after the warm-up, so a run
looked at after 80 % of its steps is the run of 80 % of the steps. That gives DoRA against LoRA at
equal seconds, once the ratio of their times is measured.

`RATES` runs the whole grid of learning rates with three seeds, to see how both behave where the
rate is too high, and each arm's best rate with two more; `BY_TASK` repeats the comparison on
another task, each arm at its own best rate.

Source: Liu et al. 2024, "DoRA"; the comparison is this course's own.
Taught in: notebook 04, section 3.
"""

from __future__ import annotations

import itertools
import statistics

from peft import get_peft_model

from helpers import adapters, training
from helpers.experiments import tasks
from helpers.experiments.study import Study

METHODS = ("lora", "dora")
RANKS = (1, 2, 4, 8, 16)
GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
GRID_BY_TASK = GRID[:-1]
PARTS = (60, 80, 90, 100)  # per cent of the steps
NOT_FINITE = 1e9  # stands for the loss of a run that ended in infinity or NaN
METRICS = (
    "validation_loss",
    "validation_score",
    "test_score",
    *(f"test_loss_{part}" for part in PARTS),
    "first_loss",
    "last_loss",
    "roughness",
)


def run(settings: dict, seed: int) -> dict[str, float]:
    """Train one arm at one rate; losses in nats per target, the test loss at each of `PARTS`."""
    task, rank, rate = settings["task"], settings["rank"], settings["learning_rate"]
    model = tasks.base(task, seed)
    kind = tasks.TASKS[task].task_type
    model = get_peft_model(model, adapters.config(settings["method"], task_type=kind, rank=rank))
    steps = tasks.TASKS[task].steps
    looks = {round(steps * part / 100): f"test_loss_{part}" for part in PARTS}
    measured: dict[str, float] = {}

    def look(step: int) -> None:
        if step in looks:
            measured[looks[step]] = tasks.measure(model, task, "test")["test_loss"]

    label = f"{task} {settings['method']} r={rank} {rate:g}"
    try:
        history = tasks.fine_tune(
            model, task, learning_rate=rate, seed=seed, label=label, watch=look
        )
    except training.TrainingError:
        return {metric: measured.get(metric, NOT_FINITE) for metric in METRICS}
    measured |= tasks.measure(model, task, "validation")
    measured["test_score"] = tasks.measure(model, task, "test")["test_score"]
    return {metric: (measured | course(history.losses))[metric] for metric in METRICS}


def course(losses: list[float]) -> dict[str, float]:
    """The training loss at both ends (mean of an eighth of the steps), and how rough its course is.

    Roughness is the standard deviation of the change from one step to the next over the second
    half of the run. All arms of a seed see the same batches, so what batches add is equal.
    """
    few, late = max(1, len(losses) // 8), losses[len(losses) // 2 :]
    changes = [b - a for a, b in itertools.pairwise(late)]
    return {
        "first_loss": round(statistics.fmean(losses[:few]), 4),
        "last_loss": round(statistics.fmean(losses[-few:]), 4),
        "roughness": round(statistics.stdev(changes), 4),
    }


def arms(task: str, rates: tuple[float, ...]) -> tuple[dict, ...]:
    """Both methods at every rank and rate."""
    return tuple(
        {"task": task, "method": method, "rank": rank, "learning_rate": rate}
        for rank in RANKS
        for method in METHODS
        for rate in rates
    )


RATES = Study(
    name="dora_rates",
    settings=arms("addresses", GRID),
    metrics=METRICS,
    run=run,
    tuned="learning_rate",
    seeds=5,
    explored=3,
)

BY_TASK = Study(
    name="dora_by_task",
    settings=arms("movies", GRID_BY_TASK),
    metrics=METRICS,
    run=run,
    tuned="learning_rate",
    seeds=5,
)
