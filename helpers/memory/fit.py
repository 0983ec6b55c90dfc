"""The questions after "does it fit?": which cards are large enough, how large a batch may be.

Source: this course's own.
Taught in: notebook 03, section 9.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tqdm import tqdm

from helpers.memory.gpus import GPUS, Gpu
from helpers.memory.predict import Prediction, predict_plan
from helpers.memory.simulate import Plan

LARGEST = 2**16  # rows; a search that gets there stops
PATIENCE = 5  # seconds before a bar shows
_FEW, _MORE = 1, 8  # rows of the two predictions that give the first guess


def cards_that_fit(prediction: Prediction) -> list[Gpu]:
    """The cards of `GPUS` that hold the run, smallest first.

    The kernels stay those of the card that was predicted for. Predict again for the card that is
    chosen: one before Ampere lacks flash attention, Hopper's workspaces are larger.

    Taught in: notebook 03, section 9.
    """
    return [card for card in sorted(GPUS.values(), key=lambda c: c.memory) if prediction.fits(card)]


def largest_batch(plan: Plan, *, exact: bool = True) -> int:
    """The largest batch that fits the plan's card; 0 if not even one row does.

    Bytes grow about linearly with the batch. Two extrapolated predictions give a line, the line a
    first guess; each exact prediction then narrows the bracket between a batch that fits and one
    that does not, until they are neighbours. So the answer b was simulated and fits, and b + 1 was
    simulated and does not. Reserved bytes go in steps and may fall again: a batch above b + 1 that
    happens to fit is not looked for. A bar on stderr shows the tries after five seconds.

    Args:
        plan: the run, such as `predict(...).plan`; its own batch does not matter.
        exact: simulate every layer for each batch that is tried (about four of them). Otherwise
            each is extrapolated from shallow models: seconds for any model, but rough.

    Raises:
        ValueError: 65536 rows would fit, so the question makes no sense.

    Taught in: notebook 03, section 9.
    """

    def spare(batch: int) -> int:
        """Bytes left on the card; negative where the run does not fit."""
        with_batch = dataclasses.replace(plan, batch=batch)
        return plan.gpu.usable - predict_plan(with_batch, exact=exact).reserved

    guess, growth = _first_guess(plan)
    found = bracket(spare, guess, growth)
    if found == LARGEST:
        raise ValueError(
            f"Even {LARGEST} rows fit {plan.gpu.name}; ask for longer rows or a smaller card."
        )
    return found


def _first_guess(plan: Plan) -> tuple[int, float]:
    """A batch from the line through two extrapolated predictions, and its bytes per row.

    The optimiser's peak is left out: it does not grow with the batch.
    """
    few, more = (
        predict_plan(dataclasses.replace(plan, batch=batch), exact=False).phases
        for batch in (_FEW, _MORE)
    )
    low, high = (max(p["forward"].allocated, p["backward"].allocated) for p in (few, more))
    growth = max(1.0, (high - low) / (_MORE - _FEW))
    return int(_FEW + (plan.gpu.usable - low) / growth), growth


def bracket(spare: Callable[[int], int], guess: int, growth: float) -> int:
    """The largest whole number between 0 and `LARGEST` at which a falling function is not negative.

    Args:
        spare: the function; each call is dear. 0 is taken to be fine and is not tried.
        guess: where to start.
        growth: by how much the function falls per step, roughly.
    """
    low, high = 0, LARGEST + 1
    known: dict[int, int] = {}
    with tqdm(desc="largest batch", unit=" tried", leave=False, delay=PATIENCE) as bar:
        while high - low > 1:
            guess = min(max(guess, low + 1), high - 1)
            known[guess] = left = spare(guess)
            low, high = (guess, high) if left >= 0 else (low, guess)
            bar.update()
            if len(known) > 1:  # the line through the ends, or through the last two tries
                one, other = (low, high) if low in known and high in known else list(known)[-2:]
                growth = max(1.0, (known[one] - known[other]) / (other - one))
            guess += int(left // growth) or 1
            if len(known) % 4 == 0:  # a bent line would creep
                guess = (low + high) // 2 if high <= LARGEST else 2 * low
    return low
