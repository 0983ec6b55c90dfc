"""Attention, MLP or both? MiniLM on addresses, at equal trainable parameters.

Equal for the three arms at each budget: the parameters of the adapter within 2 %, the steps, the
batches and their order, alpha / rank = 2. Each arm chooses its learning rate on the validation rows
of the first seed. The head trains too and counts for no arm.

Source: this course's own study.
Taught in: notebook 02, section 7.
"""

from __future__ import annotations

from peft import get_peft_model
from torch import nn

from helpers.adapters import config_for_budget
from helpers.experiments import tasks
from helpers.experiments.ranks import rates
from helpers.experiments.study import Study

TASK = "addresses"
UNIT = 41_472  # parameters of rank 1 on attention and MLP together
BUDGETS = tuple(UNIT * n for n in (1, 2, 4, 8, 16, 32))
TARGETS = {
    "attention": r".*attention\.(self\.(query|key|value)|output\.dense)",
    "mlp": r".*layer\.\d+\.(intermediate|output)\.dense",
    "both": r".*layer\.\d+\..*(query|key|value|dense)",
}


def run(settings: dict, seed: int) -> dict[str, float]:
    """Train one arm with one budget at one rate and measure it on both held-out splits."""
    targets, rate = settings["targets"], settings["learning_rate"]
    base = tasks.base(TASK, seed)
    lora = config_for_budget(
        base, settings["parameters"], TARGETS[targets], task_type=tasks.TASKS[TASK].task_type
    )
    model = get_peft_model(base, lora)
    tasks.fine_tune(model, TASK, learning_rate=rate, seed=seed, label=f"{targets} {rate:g}")
    measured = tasks.measure(model, TASK, "validation") | tasks.measure(model, TASK, "test")
    return measured | {"adapter_parameters": adapter_parameters(model)}


def adapter_parameters(model: nn.Module) -> int:
    """The numbers in A and B, without the head."""
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def rates_of(budget: int) -> tuple[float, ...]:
    """The learning rates for a budget, as for ranks of about its size."""
    units = budget // UNIT
    return rates(32) if units >= 16 else rates(units)


STUDY = Study(
    name="equal_targets",
    settings=tuple(
        {"parameters": budget, "targets": targets, "learning_rate": rate}
        for budget in BUDGETS
        for targets in TARGETS
        for rate in rates_of(budget)
    ),
    metrics=(
        "validation_loss",
        "validation_score",
        "test_loss",
        "test_score",
        "adapter_parameters",
    ),
    run=run,
    tuned="learning_rate",
)
