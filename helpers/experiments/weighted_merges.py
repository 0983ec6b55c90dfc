"""What does each task keep when adapters of several tasks become one? MiniLM on three tasks.

One encoder carries three LoRA adapters (rank 8 on query and value), each trained with a head of
its own: the sign of tweets, the tags of addresses, questions about addresses. A merged adapter is
judged on every task with that task's head. The weight of a merge is the same for all its adapters,
chosen on the validation rows of the first seed. Controls: no adapter, and each adapter alone on all
tasks; a head that reads an encoder it was not trained with shows what a task has to lose.

Source: this course's own study of peft's add_weighted_adapter.
Taught in: notebook 07, section 5.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pandas as pd
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from helpers import adapters, training
from helpers.assets import DATA
from helpers.experiments import tasks
from helpers.experiments.study import Study, lowest
from helpers.merging.weighted import PRUNING, weighted

TASKS = ("tweets", "addresses", "questions")
SETS = {"two": ("tweets", "addresses"), "three": TASKS}
METHODS = (
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
)
WEIGHTS = (0.5, 1.0, 1.5, 2.0)
# dare_linear multiplies what it keeps in A and in B; TIES divides by how many adapters agree.
GRID = {"dare_linear": (0.25, 0.5, 1.0, 1.5), "ties": (1.0, 1.5, 2.0, 3.0)}
GRID |= {"dare_ties": GRID["ties"], "ties_svd": GRID["ties"]}
RATE, RANK, DENSITY = 3e-3, 8, 0.5
FOLDER = DATA / "adapters"


def encoder_with_heads(seed: int, names: tuple[str, ...] = TASKS):
    """One MiniLM under several heads.

    Returns:
        The encoder with a new adapter for each task, and task to model: each model is the same
        encoder under another head, so that an adapter switched in one is switched in all.

    Taught in: notebook 07, section 5.
    """
    models = {name: tasks.base(name, seed) for name in names}
    for model in models.values():
        model.bert = models[names[0]].bert
    settings = adapters.config("lora", task_type="FEATURE_EXTRACTION", rank=RANK)
    encoder = get_peft_model(models[names[0]].bert, settings, adapter_name=names[0])
    for number, name in enumerate(names[1:], start=1):
        torch.manual_seed(1000 * number + seed)  # adapters of other tasks start elsewhere
        encoder.add_adapter(name, settings)
    return encoder, models


def trained(seed: int, names: tuple[str, ...] = TASKS):
    """The same, each adapter and its head trained on its task.

    Raises:
        TrainingError: a loss is no longer finite.

    Taught in: notebook 07, section 5.
    """
    encoder, models = encoder_with_heads(seed, names)
    for name, model in models.items():
        encoder.set_adapter(name)
        tasks.fine_tune(model, name, learning_rate=RATE, seed=seed, label=name)
    return encoder, models


def store(encoder: PeftModel, models: dict[str, torch.nn.Module], folder: Path = FOLDER) -> None:
    """Write each adapter and its head into a folder of its own, as `stored` reads them.

    What lies in ``data/adapters`` is ``store(*trained(0))``.
    """
    encoder.save_pretrained(folder)
    (folder / "README.md").unlink()  # an empty model card
    for name, model in models.items():
        head = _head(model)
        tensors = {f"{head}.{key}": t.contiguous() for key, t in _state(model, head).items()}
        save_file(tensors, folder / name / "head.safetensors")
        # peft writes the path of this machine's copy of the base
        config = PeftConfig.from_pretrained(folder / name)
        config.base_model_name_or_path = "all-MiniLM-L6-v2"
        config.save_pretrained(folder / name)


def with_stored_heads(
    encoder: torch.nn.Module, names: tuple[str, ...] = TASKS, folder: Path = FOLDER
) -> dict[str, torch.nn.Module]:
    """Task to model: the encoder as it is, under the head that was trained with that task.

    Taught in: notebook 07, section 5.
    """
    models = {name: tasks.base(name, seed=0) for name in names}
    for name, model in models.items():
        model.bert = encoder
        model.load_state_dict(load_file(folder / name / "head.safetensors"), strict=False)
        model.eval()
    return models


def _head(model: torch.nn.Module) -> str:
    return "qa_outputs" if hasattr(model, "qa_outputs") else "classifier"


def _state(model: torch.nn.Module, head: str) -> dict[str, torch.Tensor]:
    return getattr(model, head).state_dict()


def scores(models: dict[str, torch.nn.Module]) -> dict[str, float]:
    """Every task's test score with the adapter that is active now: share of right labels or spans.

    Taught in: notebook 07, section 5.
    """
    return {
        name: round(tasks.TASKS[name].score(model, tasks.evaluation(name, "test")), 4)
        for name, model in models.items()
    }


def merge(encoder: PeftModel, names: tuple[str, ...], method: str, weight: float, seed: int) -> str:
    """Make one adapter of several, activate it, and return its name."""
    encoder.set_adapter(names[0])
    if "merged" in encoder.peft_config:
        encoder.delete_adapter("merged")
    density = DENSITY if method in PRUNING else None
    made = weighted(
        encoder, dict.fromkeys(names, weight), "merged", method=method, density=density, seed=seed
    )
    encoder.set_adapter("merged")
    return made.name


@lru_cache(maxsize=1)
def _of_seed(seed: int):
    """The runs of one seed share their trained adapters."""
    return trained(seed)


def run(settings: dict, seed: int) -> dict[str, float]:
    """Merge one set in one way and measure every task; the validation loss is in nats per target.

    The validation loss is the mean over the tasks that were merged.
    """
    encoder, models = _of_seed(seed)
    chosen, method, weight = settings["adapters"], settings["method"], settings["weight"]
    names = SETS.get(chosen, TASKS if chosen == "nothing" else (chosen,))
    if chosen == "nothing":
        with encoder.disable_adapter():
            return _measured(models, names)
    if chosen in SETS:
        merge(encoder, names, method, weight, seed)
    else:
        encoder.set_adapter(chosen)
    return _measured(models, names)


def _measured(models: dict[str, torch.nn.Module], names: tuple[str, ...]) -> dict[str, float]:
    losses = [training.mean_loss(models[n], tasks.evaluation(n, "validation")) for n in names]
    return scores(models) | {"validation_loss": round(sum(losses) / len(losses), 4)}


def chosen(rows: pd.DataFrame) -> pd.DataFrame:
    """The stored rows of each arm (adapters, method) at the weight that it chose, every seed.

    Chosen is the smallest validation loss of seed 0, so no test row chooses anything.

    Taught in: notebook 07, section 5.
    """
    arm = ["adapters", "method"]
    best = lowest(rows[rows["seed"] == 0], by=arm, metric="validation_loss")
    return rows.merge(best[[*arm, "weight"]], on=[*arm, "weight"])


STUDY = Study(
    name="weighted_merges",
    settings=(
        {"adapters": "nothing", "method": "none", "weight": 0.0},
        *({"adapters": name, "method": "none", "weight": 1.0} for name in TASKS),
        *(
            {"adapters": chosen, "method": method, "weight": weight}
            for chosen in SETS
            for method in METHODS
            for weight in GRID.get(method, WEIGHTS)
        ),
    ),
    metrics=(*TASKS, "validation_loss"),
    run=run,
    tuned="weight",
    seeds=5,
)
