"""Which way to train where to look works, when the reader is frozen? A stand-in for ARR-COC.

The base (:mod:`helpers.arr_coc.base`) reads whatever it is shown and has no policy. Knowing,
balancing and attending are trained on the answers' loss alone, by each way of
:data:`helpers.arr_coc.selectors.LOSSES`, or, with REINFORCE, kept from something: from seeing the
question, from weighing the maps, from more than one map. Untrained choices stand beside, at as
many visual tokens. Every arm is evaluated on the same test rows by leaving out what was not
chosen.

Source: this course's own study.
Taught in: notebook 09, section 5.
"""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd
import torch

from helpers.arr_coc import selectors, world
from helpers.arr_coc.base import base
from helpers.arr_coc.model import ArrCoc
from helpers.experiments.study import Study
from helpers.given import one_of

STEPS, BATCH, TEST_ROWS, TEST_SEED = 300, 64, 1024, 10**9
CELLS = 2
RATES = (("", 1e-2),)
WATCHED = (25, 50, 100, 200, 300)
BUDGETS = (1, 4, 8)
UNTRAINED = ("random", "fixed", "salience", "information", "oracle", "everything")
KEPT_FROM = {
    "blind": {"blind": True},
    "equal weights": {"weights": [1 / 3, 1 / 3, 1 / 3]},
    "information alone": {"weights": [1.0, 0.0, 0.0], "tensions": [0.5, None, None]},
    "salience alone": {"weights": [0.0, 1.0, 0.0], "tensions": [0.5, None, None]},
    "participation alone": {"weights": [0.0, 0.0, 1.0], "tensions": [0.5, None, None]},
}
ARMS = (*UNTRAINED, *selectors.LOSSES, *KEPT_FROM)


@functools.cache
def test_rows() -> world.Scenes:
    """The same for every arm; no training scene has its seed."""
    return world.scenes(TEST_ROWS, seed=TEST_SEED)


@functools.cache
def trap_rows() -> world.Scenes:
    """Two cells that nobody asks about have three times the contrast."""
    return world.scenes(TEST_ROWS, seed=TEST_SEED + 1, trap=True)


def trained(arm: str, seed: int, watch=None) -> ArrCoc:
    """The base with modules that learned to look, fresh for every seed.

    Raises:
        ValueError: unknown arm, or one that does not learn; the message gives the nearest.

    Taught in: notebook 09, section 5.
    """
    one_of("arm that learns", arm, [a for a in ARMS if a not in UNTRAINED])
    model = selectors.with_new_modules(base(), seed, **KEPT_FROM.get(arm, {}))
    selectors.only_modules(model)
    loss = selectors.LOSSES.get(arm, selectors.reinforce)
    scenes = world.batches(BATCH, seed=seed + 1)
    follow = None if watch is None else (lambda step: watch(step, model))
    selectors.learn(model, scenes, loss, steps=STEPS, rates=RATES, watch=follow, label=arm)
    return model.eval()


def run(settings: dict, seed: int) -> dict[str, float]:
    """Train one arm, if it trains, and measure it."""
    arm, given, trap = settings["arm"], test_rows(), trap_rows()
    again = world.asked_again(given, seed=TEST_SEED + 2)
    hits: dict[int, float] = {}
    if arm in UNTRAINED:
        model = base().eval()

        def look(rows: world.Scenes, cells: int) -> torch.Tensor:
            # a random choice does not know that it saw the image before
            return selectors.without_training(arm, rows, cells, seed + 100 * (rows is again))
    else:
        some = given.rows(given.kinds == 0).rows(slice(512))

        def follow(step: int, model: ArrCoc) -> None:
            if step in WATCHED:
                where = selectors.chosen(model, some)
                hits[step] = (where & some.needed).sum().item() / len(some)

        model = trained(arm, seed, follow)

        def look(rows: world.Scenes, cells: int) -> torch.Tensor:
            return selectors.chosen(model, rows, cells)

    where = look(given, CELLS)
    measured = selectors.score(model, given, where)
    pattern = given.kinds == 0
    found = {
        **measured.accuracy,
        "test_loss": measured.loss,
        "hit": measured.hit,
        "trap": selectors.score(model, trap, look(trap, CELLS)).accuracy["pattern"],
        "sensitivity": selectors.sensitivity(where[pattern], look(again, CELLS)[pattern]),
        "tokens": int(16 + 4 * where[0].sum()),
        **{f"hit_{step}": hits.get(step, float("nan")) for step in WATCHED},
        **{
            f"pattern_k{k}": selectors.score(model, given, look(given, k)).accuracy["pattern"]
            for k in BUDGETS
        },
        **_leanings(model, given, arm),
    }
    return {name: round(value, 4) for name, value in found.items()}


@torch.no_grad()
def _leanings(model: ArrCoc, given: world.Scenes, arm: str) -> dict[str, float]:
    """Mean weights and tensions for each kind of question; nothing where nothing was trained."""
    look = None if arm in UNTRAINED else model.look(given.images, given.questions)
    found = {}
    for i, kind in enumerate(world.KINDS):
        for part, names in (("weights", _WEIGHTS), ("tensions", _TENSIONS)):
            for column, name in enumerate(names):
                value = float("nan")
                if look is not None:
                    value = getattr(look, part)[given.kinds == i, column].mean().item()
                found[f"{name}_{kind}"] = value
    return found


_WEIGHTS = ("w_information", "w_salience", "w_participation")
_TENSIONS = ("t_particularize", "t_exploit", "t_focus")


def gap_closed(
    accuracy: float | pd.Series, random: float | pd.Series, oracle: float | pd.Series
) -> float | pd.Series:
    """0 where a choice answers like a random one, 1 where like the oracle's.

    Raises:
        ValueError: there is no gap.
    """
    if np.any(oracle == random):  # numbers, or a column with a row for each seed
        raise ValueError(f"random and oracle answer alike ({oracle}), so there is no gap to close")
    return (accuracy - random) / (oracle - random)


STUDY = Study(
    name="looks",
    settings=tuple({"arm": arm} for arm in ARMS),
    metrics=(
        *world.KINDS,
        *("test_loss", "hit", "trap", "sensitivity", "tokens"),
        *(f"hit_{step}" for step in WATCHED),
        *(f"pattern_k{k}" for k in BUDGETS),
        *(f"{name}_{kind}" for kind in world.KINDS for name in (*_WEIGHTS, *_TENSIONS)),
    ),
    run=run,
    seeds=3,
)
