"""Modules in full beside LoRA on the decoder: which part of the hybrid does what?

The world has other names for half of the patterns, so that two things have to be learned at once:
where to look, which the base cannot do, and how to answer, which it does wrongly now. The arms
take one part away, give the modules low rank instead of all their weights, switch off a tension,
or leave one map alone. All get the same scenes and steps, and modules that choose learn by
REINFORCE, with a rate of their own. Where targets or what trains of the decoder are compared, the
rate is chosen on the first seed, on validation scenes; the other arms have LoRA's larger one. A
second table compares modules in full with modules of low rank over more seeds.

Source: this course's own study.
Taught in: notebook 09, section 6.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from helpers.arr_coc import note, selectors, world
from helpers.arr_coc.base import at_random, base
from helpers.experiments.looks import KEPT_FROM
from helpers.experiments.study import Study

STEPS, BATCH, CELLS, ROWS = 300, 64, 2, 1024
TEST_SEED, VALIDATION_SEED = 2 * 10**9, 2 * 10**9 + 1
MODULE_RATE = 1e-2
RATES = (3e-3, 1e-3)  # of LoRA
FULL_RATES = (1e-3, 3e-4)  # of the decoder's own weights
NOTE_RATE = 2e-4
ATTENTION = r".*language_model.*self_attn\.(q_proj|k_proj|v_proj|o_proj)"
MLP = r".*language_model.*mlp\.(gate_proj|up_proj|down_proj)"
LOOKING = r".*(knowing\.project\.[02]|balancing\.decide\.[02])"


@dataclass(frozen=True)
class Arm:
    """What trains and how.

    Attributes:
        lora: which layers get LoRA, of this rank; "" for none.
        modules: "full" through modules_to_save, "low rank", or "frozen".
        module_rank: of LoRA on the modules, where they have low rank.
        cells: who chooses: "modules", "random" or "oracle".
        rates: of the decoder's part, to choose from on the first seed.
        module_rate: of knowing, balancing and attending.
        as_noted: the note's cosine and weight decay, in place of neither.
        settings: of :class:`helpers.arr_coc.model.ArrCocConfig`.
    """

    lora: str = f"{ATTENTION}|{MLP}"
    rank: int = 8
    modules: str = "full"
    module_rank: int = 0
    cells: str = "modules"
    rates: tuple[float, ...] = RATES[:1]
    module_rate: float = MODULE_RATE
    as_noted: bool = False
    settings: dict = field(default_factory=dict)


NOTED = {"lora": note.DECODER, "rank": 32, "rates": (NOTE_RATE,), "as_noted": True}
ARMS: dict[str, Arm] = {
    "hybrid": Arm(rates=RATES),
    "modules only": Arm(lora="", rates=(0.0,)),
    "LoRA only, random cells": Arm(modules="frozen", cells="random"),
    "LoRA only, oracle's cells": Arm(modules="frozen", cells="oracle"),
    "decoder in full": Arm(lora="", rates=FULL_RATES),
    "attention only": Arm(lora=ATTENTION, rank=19, rates=RATES),  # as many as both at rank 8
    "MLP only": Arm(lora=MLP, rank=14, rates=RATES),
    "the note's rates": Arm(**NOTED, module_rate=NOTE_RATE),
    "the note's rate for LoRA": Arm(**NOTED),
    "particularize off": Arm(settings={"tensions": [0.5, None, None]}),
    "exploit off": Arm(settings={"tensions": [None, 0.0, None]}),  # the noise is never damped
    "focus off": Arm(settings={"tensions": [None, None, 1.0]}),
    **{name: Arm(settings=KEPT_FROM[name]) for name in KEPT_FROM if "alone" in name},
}
FULL = "in full"
BY_RANK = {FULL: Arm()} | {
    f"rank {rank}": Arm(modules="low rank", module_rank=rank) for rank in (1, 4, 16)
}


@functools.cache
def rows(seed: int) -> world.Scenes:
    """Validation or test scenes of the renamed world."""
    return world.renamed(world.scenes(ROWS, seed=seed))


def adapted(arm: Arm, seed: int) -> nn.Module:
    """The base with new modules and what the arm trains, wrapped by peft where it has LoRA.

    Taught in: notebook 09, section 6.
    """
    model = selectors.with_new_modules(base(), seed, **arm.settings)
    if not arm.lora:
        selectors.only_modules(model)
        model.language_model.requires_grad_(arm.rates != (0.0,))
        return model
    low = arm.modules == "low rank"
    config = LoraConfig(
        r=arm.rank,
        lora_alpha=2 * arm.rank,
        target_modules=f"{arm.lora}|{LOOKING}" if low else arm.lora,
        rank_pattern={LOOKING: arm.module_rank} if low else {},
        alpha_pattern={LOOKING: 2 * arm.module_rank} if low else {},
        modules_to_save=list(selectors.MODULES) if arm.modules == "full" else None,
    )
    return get_peft_model(model, config)


def run(arms: dict[str, Arm], settings: dict, seed: int) -> dict[str, float]:
    """Train one arm at one rate and measure it."""
    arm = arms[settings["arm"]]
    model = adapted(arm, seed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    generator = torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, given: world.Scenes) -> Tensor:
        if arm.cells == "modules":
            return selectors.reinforce(model, given)
        where = at_random(given, CELLS, generator, needed=float(arm.cells == "oracle"))
        return model(given.images, given.questions, given.answers, where).loss

    scenes = (world.renamed(given) for given in world.batches(BATCH, seed=seed + 1))
    selectors.learn(
        model,
        scenes,
        loss,
        steps=STEPS,
        rates=(("language_model", settings["learning_rate"]), ("", arm.module_rate)),
        cosine=arm.as_noted,
        weight_decay=0.01 if arm.as_noted else 0.0,
        label=settings["arm"],
    )
    found = {"validation_loss": measure(model, arm, rows(VALIDATION_SEED), seed)["test_loss"]}
    found |= measure(model, arm, rows(TEST_SEED), seed) | {"parameters": trained}
    return {name: round(value, 4) for name, value in found.items()}


def measure(model: nn.Module, arm: Arm, given: world.Scenes, seed: int) -> dict[str, float]:
    """Accuracy for each kind of question, nats and hit rate, with the unchosen tokens left out."""
    measured = selectors.score(model, given, _where(model, arm, given, seed))
    return {**measured.accuracy, "test_loss": measured.loss, "hit": measured.hit}


def _where(model: nn.Module, arm: Arm, given: world.Scenes, seed: int) -> Tensor:
    if arm.cells == "modules":
        return selectors.chosen(model, given)
    return selectors.without_training(arm.cells, given, CELLS, seed)


def _study(name: str, arms: dict[str, Arm], seeds: int) -> Study:
    return Study(
        name=name,
        settings=tuple(
            {"arm": name, "learning_rate": rate} for name, arm in arms.items() for rate in arm.rates
        ),
        metrics=("validation_loss", *world.KINDS, "test_loss", "hit", "parameters"),
        run=functools.partial(run, arms),
        tuned="learning_rate",
        seeds=seeds,
    )


STUDY = _study("hybrid", ARMS, seeds=3)
RANKS = _study("hybrid_module_ranks", BY_RANK, seeds=5)
