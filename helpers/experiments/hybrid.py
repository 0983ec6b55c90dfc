"""Modules in full beside LoRA on the decoder: which part of the hybrid does what?

The world calls every pattern by another one's name, so that two things have to be learned at
once: where to look, which the base cannot do, and how to answer, which it does wrongly now. The
arms take one part away, give the modules low rank instead of all their weights, fix a tension, or
leave one map alone. Everybody gets the same scenes and steps; LoRA's rate is chosen for each arm
on the first seed, out of two, on validation scenes. The modules have a rate of their own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from helpers.arr_coc import selectors, world
from helpers.arr_coc.base import at_random, base
from helpers.experiments.looks import KEPT_FROM
from helpers.experiments.study import Study

STEPS, BATCH, CELLS, ROWS = 400, 64, 2, 2048
TEST_SEED, VALIDATION_SEED = 2 * 10**9, 2 * 10**9 + 1
MODULE_RATE = 3e-3
RATES = (1e-3, 3e-3)
ATTENTION = r".*language_model.*self_attn\.(q_proj|k_proj|v_proj|o_proj)"
MLP = r".*language_model.*mlp\.(gate_proj|up_proj|down_proj)"
LOOKING = r".*(knowing\.project\.[02]|balancing\.decide\.[02])"


@dataclass(frozen=True)
class Arm:
    """What trains: ``lora`` targets and rank, the modules ``in_full`` or not, who chooses cells."""

    lora: str = f"{ATTENTION}|{MLP}"
    rank: int = 8
    in_full: bool = True
    cells: str = "modules"
    settings: dict = field(default_factory=dict)


def _low_rank(rank: int) -> Arm:
    # the decoder keeps its rank of 8 through rank_pattern
    return Arm(lora=f"{ATTENTION}|{MLP}|{LOOKING}", rank=rank, in_full=False)


ARMS: dict[str, Arm] = {
    "hybrid": Arm(),
    "modules only": Arm(lora=""),
    "LoRA only, random cells": Arm(in_full=False, cells="random"),
    "LoRA only, oracle's cells": Arm(in_full=False, cells="oracle"),
    **{f"modules at rank {rank}": _low_rank(rank) for rank in (1, 4, 16)},
    "attention only": Arm(lora=ATTENTION, rank=19),  # as many parameters as both at rank 8
    "MLP only": Arm(lora=MLP, rank=14),
    "particularize fixed": Arm(settings={"tensions": [0.5, None, None]}),
    "exploit fixed": Arm(settings={"tensions": [None, 1.0, None]}),
    "focus fixed": Arm(settings={"tensions": [None, None, 1.0]}),
    **{name: Arm(settings=KEPT_FROM[name]) for name in KEPT_FROM if "alone" in name},
}


@functools.cache
def rows(seed: int) -> world.Scenes:
    """Validation or test scenes of the renamed world."""
    return world.renamed(world.scenes(ROWS, seed=seed))


def adapted(arm: Arm, seed: int) -> nn.Module:
    """The base with new modules and what the arm trains, wrapped by peft.

    Taught in: notebook 09, section 5.
    """
    model = selectors.with_new_modules(base(), seed, **arm.settings)
    model.config.selection = "sparse"
    if not arm.lora:
        return selectors.only_modules(model)
    config = LoraConfig(
        r=arm.rank,
        lora_alpha=2 * arm.rank,
        target_modules=arm.lora,
        rank_pattern={ATTENTION: 8, MLP: 8} if "knowing" in arm.lora else {},
        alpha_pattern={ATTENTION: 16, MLP: 16} if "knowing" in arm.lora else {},
        modules_to_save=list(selectors.MODULES) if arm.in_full else None,
    )
    return get_peft_model(model, config)


def run(settings: dict, seed: int) -> dict[str, float]:
    """Train one arm at one rate and measure it."""
    arm = ARMS[settings["arm"]]
    model = adapted(arm, seed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    generator = torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, given: world.Scenes) -> Tensor:
        where = None
        if arm.cells != "modules":
            where = at_random(given, CELLS, generator, needed=float(arm.cells == "oracle"))
        return model(given.images, given.questions, given.answers, where).loss

    scenes = (world.renamed(given) for given in world.batches(BATCH, seed=seed + 1))
    rates = (("language_model", settings["learning_rate"]), ("", MODULE_RATE))
    selectors.learn(model, scenes, loss, steps=STEPS, rates=rates, label=settings["arm"])
    found = {"validation_loss": measure(model, arm, rows(VALIDATION_SEED), seed)["test_loss"]}
    found |= measure(model, arm, rows(TEST_SEED), seed) | {"parameters": trained}
    return {name: round(value, 4) for name, value in found.items()}


@torch.no_grad()
def measure(model: nn.Module, arm: Arm, given: world.Scenes, seed: int) -> dict[str, float]:
    """Accuracy for each kind of question, nats and hit rate, with the unchosen tokens left out."""
    model.eval()
    where = _where(model, arm, given, seed)
    parts = torch.arange(len(given)).split(256)
    logits = torch.cat([model.read(given.images[i], given.questions[i], where[i]) for i in parts])
    right = (logits.argmax(-1) == given.answers).float()
    pattern = given.kinds == 0
    return {
        **{kind: right[given.kinds == i].mean().item() for i, kind in enumerate(world.KINDS)},
        "test_loss": functional.cross_entropy(logits, given.answers).item(),
        "hit": (where & given.needed)[pattern].any(1).float().mean().item(),
    }


def _where(model: nn.Module, arm: Arm, given: world.Scenes, seed: int) -> Tensor:
    if arm.cells == "modules":
        return model.look(given.images, given.questions).chosen
    return selectors.without_training(arm.cells, given, CELLS, seed)


STUDY = Study(
    name="hybrid",
    settings=tuple(
        {"arm": name, "learning_rate": rate}
        for name, arm in ARMS.items()
        for rate in (RATES if arm.lora else (0.0,))
    ),
    metrics=("validation_loss", *world.KINDS, "test_loss", "hit", "parameters"),
    run=run,
    tuned="learning_rate",
    seeds=3,
)
