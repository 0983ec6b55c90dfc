"""After how many epochs is the held-out loss lowest, and what comes after? MiniLM, 64 reviews.

Equal for both methods: the 64 training rows (chosen by the seed), the batches and their order, 16
epochs of 8 steps, fp32. Each method runs at three learning rates, the middle one near its best,
because the rate decides about the duration too. The losses (nats per row) are those of 100
validation and 100 test rows after each epoch; early stopping may look at the validation rows only.

Source: this course's own study; early stopping as transformers' EarlyStoppingCallback does it.
Taught in: notebook 06, section 5.
"""

from __future__ import annotations

import itertools

import pandas as pd
from peft import get_peft_model

from helpers import adapters, training
from helpers.experiments import tasks
from helpers.experiments.study import Study, need

EPOCHS, ROWS, BATCH, HELD_OUT = 16, 64, 8, 100
GRID = {"full": (1e-5, 3e-5, 1e-4), "lora": (3e-4, 1e-3, 3e-3)}
PARTS = ("validation", "test")


def column(part: str, epoch: int) -> str:
    """The column of a part's loss after an epoch, counted from 1."""
    return f"{part}_{epoch:02d}"


def run(settings: dict, seed: int) -> dict[str, float]:
    """Train one method at one rate; the loss of both held-out parts after every epoch."""
    model = tasks.base("movies", seed)
    if settings["method"] == "lora":
        model = get_peft_model(model, adapters.config("lora", task_type="SEQ_CLS"))
    splits, collate = tasks.rows("movies"), tasks.collator("movies")
    chosen = splits["train"].shuffle(seed=seed).select(range(ROWS))
    held_out = {
        part: list(
            training.ordered_batches(splits[part].select(range(HELD_OUT)), collate, batch_size=25)
        )
        for part in PARTS
    }
    measured: dict[str, float] = {}

    def evaluate(steps: int) -> None:
        if steps % (ROWS // BATCH) == 0:
            for part in PARTS:
                loss = training.mean_loss(model, held_out[part])
                measured[column(part, steps * BATCH // ROWS)] = round(loss, 5)

    training.train(
        model,
        training.batches(chosen, collate, batch_size=BATCH, seed=seed),
        steps=EPOCHS * ROWS // BATCH,
        learning_rate=settings["learning_rate"],
        watch=evaluate,
        label=f"{settings['method']} {settings['learning_rate']:g}",
    )
    return measured


def early_stop(losses: list[float], patience: int) -> int:
    """The epoch, counted from 1, whose weights early stopping keeps.

    It stops after ``patience`` epochs in a row without a new lowest loss, and keeps the lowest
    until then.

    Raises:
        ValueError: no epoch was run.

    Taught in: notebook 06, section 5.
    """
    if not losses:
        raise ValueError("no epoch was run, so there is no loss to choose by")
    best = 0
    for epoch, loss in enumerate(losses):
        if loss < losses[best]:
            best = epoch
        elif epoch - best >= patience:
            break
    return best + 1


def curves(results: pd.DataFrame, part: str) -> pd.DataFrame:
    """A part's losses as one row a run (method, learning_rate, seed) and one column an epoch.

    Raises:
        StudyError: a column is missing.
    """
    keys = ["method", "learning_rate", "seed"]
    need(results, [*keys, *(column(part, e) for e in range(1, EPOCHS + 1))])
    table = results.set_index(keys)[[column(part, e) for e in range(1, EPOCHS + 1)]]
    return table.set_axis(range(1, EPOCHS + 1), axis=1)


STUDY = Study(
    name="duration",
    settings=tuple({"method": m, "learning_rate": r} for m, rates in GRID.items() for r in rates),
    metrics=tuple(column(p, e) for p, e in itertools.product(PARTS, range(1, EPOCHS + 1))),
    run=run,
)
