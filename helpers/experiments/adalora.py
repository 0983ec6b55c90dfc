"""Does AdaLoRA spend a budget of ranks better than LoRA does? MiniLM, every linear layer.

LoRA gives each of the 36 linear layers of the encoder the same rank. AdaLoRA starts at one and a
half times that rank and prunes to the same sum, wherever it finds the least important part. A
third arm is AdaLoRA without `update_and_allocate`: nothing is pruned, so it ends with half as many
ranks again as the other two, and it shows what the form P Λ Q does without any allocation.

Equal for all arms: the steps, the batches and their order, the head, fp32 and alpha / rank = 2
(peft divides AdaLoRA's alpha by the starting rank). Each arm chooses its learning rate on the
validation rows of the first seed. Losses are the task's own: the penalty on P and Q that peft adds
to AdaLoRA's loss is left out when measuring. The sum of the ranks is equal at the end, the number
of parameters is not quite, since a rank costs more in a wide layer; both are measured.

Source: this course's own study of AdaLoRA (Zhang et al. 2023).
Taught in: notebook 04, section 8.
"""

from __future__ import annotations

from peft import PeftModel, get_peft_model
from torch import nn

from helpers import adapters, training
from helpers.experiments import tasks
from helpers.experiments.dora import NOT_FINITE
from helpers.experiments.study import Study

TARGETS = r".*encoder.*\.(query|key|value|dense)"
RANKS = (2, 4)  # at the end of training, averaged over the layers
RATES = {
    "lora": (3e-4, 1e-3, 3e-3, 1e-2),
    "adalora": (3e-3, 1e-2, 3e-2, 1e-1),
    "adalora, never pruned": (3e-3, 1e-2, 3e-2, 1e-1),
}
METRICS = (
    "validation_loss",
    "validation_score",
    "test_loss",
    "test_score",
    "mean_rank",
    "lowest_rank",
    "highest_rank",
    "parameters",
)


def adapted(task: str, method: str, rank: int, seed: int) -> PeftModel:
    """MiniLM with the task's head and one arm's adapter on every linear layer of the encoder.

    Taught in: notebook 04, section 8.
    """
    chosen = tasks.TASKS[task]
    name = method.split(",")[0]
    steps = {"total_steps": chosen.steps} if name == "adalora" else {}
    config = adapters.config(
        name, task_type=chosen.task_type, rank=rank, target_modules=TARGETS, **steps
    )
    return get_peft_model(tasks.base(task, seed), config)


def run(settings: dict, seed: int) -> dict[str, float]:
    """Train one arm at one rate; losses in nats per target, ranks and parameters at the end."""
    task, method, rank = settings["task"], settings["method"], settings["rank"]
    model = adapted(task, method, rank, seed)
    if method == "adalora, never pruned":
        model.base_model.update_and_allocate = lambda step: None  # the loop calls it every step
    rate = settings["learning_rate"]
    label = f"{task} {method} r={rank} {rate:g}"
    try:
        tasks.fine_tune(model, task, learning_rate=rate, seed=seed, label=label)
    except training.TrainingError:
        return dict.fromkeys(METRICS, NOT_FINITE)
    inside = model.get_base_model()  # with the adapter, without peft's penalty on the loss
    measured = tasks.measure(inside, task, "validation") | tasks.measure(inside, task, "test")
    return measured | final_size(model, rank)


def final_size(model: PeftModel, rank: int) -> dict[str, float]:
    """Ranks of the layers, and the parameters that are not pruned, the head left out.

    Args:
        model: a trained arm.
        rank: what LoRA's layers have.
    """
    layers = layers_of(model)
    adaptive = hasattr(next(iter(layers.values())), "lora_E")
    ranks = dict(adapters.live_ranks(model)) if adaptive else dict.fromkeys(layers, rank)
    costs = {name: m.in_features + m.out_features + adaptive for name, m in layers.items()}
    return {
        "mean_rank": round(float(sum(ranks.values())) / len(ranks), 4),
        "lowest_rank": int(min(ranks.values())),
        "highest_rank": int(max(ranks.values())),
        "parameters": int(sum(ranks[name] * costs[name] for name in layers)),
    }


def layers_of(model: PeftModel) -> dict[str, nn.Module]:
    """The layers with an adapter, by their names in the base model."""
    named = model.get_base_model().named_modules()
    return {name: module for name, module in named if hasattr(module, "lora_A")}


STUDY = Study(
    name="adalora",
    settings=tuple(
        {"task": task, "method": method, "rank": rank, "learning_rate": rate}
        for task in ("movies", "addresses")
        for rank in RANKS
        for method, rates in RATES.items()
        for rate in rates
    ),
    metrics=METRICS,
    run=run,
    tuned="learning_rate",
    seeds=5,
)
