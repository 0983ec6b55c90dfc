"""Does DoRA change lengths and directions as full fine-tuning does? MiniLM on movie reviews.

Equal for all arms: the steps, the batches and their order, the head and fp32; LoRA and DoRA have
rank 8 on query and value. Each arm chooses its learning rate on the validation rows of the first
seed. After each quarter of a run every query and value weight is compared with its pre-trained
self: a point of the paper's figure 2.

Source: Liu et al., "DoRA" (2024), section 3.2 and figure 2.
Taught in: notebook 04, section 2.
"""

from __future__ import annotations

import itertools

import pandas as pd
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

from helpers import adapters, updates
from helpers.experiments import tasks
from helpers.experiments.study import Study

TASK = "movies"
GRID = {
    "full": (3e-5, 1e-4, 3e-4),
    "lora": (1e-3, 3e-3, 1e-2),
    "dora": (1e-3, 3e-3, 1e-2),
}
MODULES = ("query", "value")
LAYERS = 6
PARTS = (25, 50, 75, 100)  # per cent of the steps
KINDS = ("magnitude", "direction")


def column(kind: str, module: str, layer: int, part: int) -> str:
    """The column of one point's coordinate."""
    return f"{kind}_{module}_{layer}_{part}"


PLACES = tuple(itertools.product(MODULES, range(LAYERS), PARTS))


def weight(model: torch.nn.Module, module: str, layer: int) -> torch.Tensor:
    """A query or value weight of MiniLM, with its adapter merged into a copy."""
    found = model.get_submodule(f"bert.encoder.layer.{layer}.attention.self.{module}")
    return updates.merged_weight(found) if isinstance(found, LoraLayer) else found.weight.detach()


def run(settings: dict, seed: int) -> dict[str, float]:
    """Train one arm at one rate; losses in nats per review, magnitudes in the weights' unit."""
    method, rate = settings["method"], settings["learning_rate"]
    model = bare = tasks.base(TASK, seed)
    if method != "full":
        model = get_peft_model(bare, adapters.config(method, task_type="SEQ_CLS"))
    places = list(itertools.product(MODULES, range(LAYERS)))
    before = {place: weight(bare, *place).clone() for place in places}
    looks = {round(tasks.TASKS[TASK].steps * part / 100): part for part in PARTS}
    measured: dict[str, float] = {}

    def look(step: int) -> None:
        for place in places if step in looks else ():
            change = updates.magnitude_and_direction(before[place], weight(bare, *place))
            for kind in KINDS:
                measured[column(kind, *place, looks[step])] = round(getattr(change, kind), 8)

    label = f"{method} {rate:g}"
    tasks.fine_tune(model, TASK, learning_rate=rate, seed=seed, label=label, watch=look)
    measured |= tasks.measure(model, TASK, "validation") | tasks.measure(model, TASK, "test")
    return {metric: measured[metric] for metric in STUDY.metrics}


def points(results: pd.DataFrame) -> pd.DataFrame:
    """Stored runs as points: method, learning_rate, seed, module, layer, part, and both changes.

    Taught in: notebook 04, section 2.
    """
    keys = ["method", "learning_rate", "seed"]
    return pd.concat(
        [
            results[keys].assign(
                module=module,
                layer=layer,
                part=part,
                **{kind: results[column(kind, module, layer, part)] for kind in KINDS},
            )
            for module, layer, part in PLACES
        ],
        ignore_index=True,
    )


def relation(points: pd.DataFrame) -> pd.DataFrame:
    """For each method, module and seed: correlation and slope of magnitude against direction.

    Over layers and checkpoints together, as the paper's figure 2. The slope is that of the least
    squares line, in the weights' unit for each unit of 1 - cosine.

    Taught in: notebook 04, section 2.
    """
    groups = points.groupby(["method", "module", "seed"])[list(KINDS)]
    correlation = groups.apply(lambda group: group["magnitude"].corr(group["direction"]))
    spread = groups.std()
    slope = correlation * spread["magnitude"] / spread["direction"]
    return pd.DataFrame({"correlation": correlation, "slope": slope}).reset_index()


STUDY = Study(
    name="magnitude_direction",
    settings=tuple({"method": m, "learning_rate": r} for m, rates in GRID.items() for r in rates),
    metrics=(
        "validation_loss",
        "validation_score",
        "test_loss",
        "test_score",
        *(column(kind, *place) for kind in KINDS for place in PLACES),
    ),
    run=run,
    tuned="learning_rate",
    seeds=5,
)
