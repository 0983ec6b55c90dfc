"""AdaLoRA's schedule from the paper's formula, and from what peft's model does step by step.

The lesson asks peft's allocator for the budget of every step; it masks nothing there.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from own_rules import agrees
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora import RankAllocator

from helpers import models

# The note sets `r`, and peft says that it ignores it.
pytestmark = pytest.mark.filterwarnings("ignore:Note that `r` is not used")

MODULES = 4  # q and v in each of two layers


def note(total: int = 3000, rank: int = 12) -> AdaLoraConfig:
    """The note's values; the number of steps is what it leaves out."""
    return AdaLoraConfig(
        r=rank,
        target_r=8,
        init_r=12,
        tinit=0,
        tfinal=1000,
        deltaT=10,
        target_modules=["q_proj", "v_proj"],
        total_step=total,
    )


def budget(step: int, total: int) -> float:
    """Zhang et al. 2023, section 3.3: from 12 to 8 for each module, with the cube of what is left.

    No rank of its own enters: there is none in the formula.
    """
    left = min(1.0, max(0.0, 1 - step / (total - 1000)))
    return MODULES * (8 + (12 - 8) * left**3)


@functools.cache
def masks(total: int) -> dict[int, tuple[int, bool]]:
    """Step to the budget of its mask, and whether ranks are chosen anew there.

    A tiny model goes through every step; what would need a gradient is left out, and the two
    functions that mask write down that they were called.
    """
    torch.manual_seed(0)
    model = get_peft_model(models.tiny("llama"), note(total)).base_model
    found: dict[int, tuple[int, bool]] = {}
    step = 0

    def chosen(self: RankAllocator, model: object, allowed: int) -> dict[str, list[bool]]:
        found[step] = (allowed, True)
        return {"a": [True]}

    def repeated(self: RankAllocator, model: object, pattern: object) -> None:
        found[step] = (self.target_bgt, False)

    with (
        patch.object(RankAllocator, "update_ipt", lambda self, model: None),
        patch.object(RankAllocator, "mask_to_budget", chosen),
        patch.object(RankAllocator, "mask_using_rank_pattern", repeated),
    ):
        for step in range(total):  # the two functions above read it
            model.update_and_allocate(step)
    return found


def last_choice(total: int) -> int:
    return max(step for step, (_, anew) in masks(total).items() if anew)


def test_the_masks_follow_the_formula():
    pruning = {step: allowed for step, (allowed, anew) in masks(3000).items() if anew}
    assert len(pruning) == 200
    assert all(abs(allowed - budget(step, 3000)) <= 1 for step, allowed in pruning.items())


def test_c106_r_is_the_average_rank():
    """The formula's ends, where the lesson wraps models; r is in neither."""
    first, last = budget(0, 3000) / MODULES, budget(2999, 3000) / MODULES
    for rank in (4, 12, 32):  # and peft ignores it, too
        model = get_peft_model(models.tiny("llama"), note(rank=rank)).base_model
        allocator = model.rankallocator
        assert allocator.init_bgt == first * MODULES and allocator.target_bgt == last * MODULES
    agrees("C106", all(rank in (first, last) for rank in (4, 12, 32)))


def test_c108_init_r_is_the_initial_rank():
    """The rank of a random update, where the lesson counts rows."""
    torch.manual_seed(0)
    model = get_peft_model(models.tiny("llama"), note())
    layers = [module for module in model.modules() if hasattr(module, "lora_E")]
    ranks = []
    for layer in layers:
        layer.lora_E["default"].data.normal_()
        update = layer.get_delta_weight("default").detach()
        ranks.append(int(torch.linalg.matrix_rank(update)))
    agrees("C108", {f"module {i}": rank == 12 for i, rank in enumerate(ranks, start=1)})


def test_c109_pruning_from_step_0():
    agrees(
        "C109",
        {
            "the budget falls from there on": budget(1, 3000) < budget(0, 3000),
            "a mask falls on it": 0 in masks(3000),
        },
    )


def test_c110_pruning_ends_at_step_1000():
    agrees("C110", {f"total_step={n}": last_choice(n) == 1000 for n in (1001, 2000, 3000)})


def test_c111_the_interval_between_two_masks():
    steps = sorted(step for step, (_, anew) in masks(3000).items() if anew)
    apart = [b - a for a, b in pairwise(steps)]
    agrees("C111", {"shortest distance": min(apart) == 10, "longest distance": max(apart) == 10})
