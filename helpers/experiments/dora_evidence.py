"""What the stored DoRA studies say: equal seconds, and how stable both methods are.

Source: this course's own study of DoRA (Liu et al. 2024).
Taught in: notebook 04, section 3.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from helpers.experiments.dora import NOT_FINITE, PARTS
from helpers.experiments.evidence import at_best_rate, whole_grid

ARM = ["task", "method", "rank"]


def at_share(rows: pd.DataFrame, share: float) -> pd.Series:
    """Test loss after a share of the steps (0.6 to 1), on the line between the stored looks.

    Raises:
        ValueError: the share is outside of what was looked at.

    Taught in: notebook 04, section 4.
    """
    lowest = PARTS[0] / 100
    if not lowest <= share <= 1:
        raise ValueError(
            f"the studies looked at {lowest:.0%} to 100% of the steps, and {share:.0%} is outside"
        )
    looks = rows[[f"test_loss_{part}" for part in PARTS]].to_numpy()
    values = [np.interp(100 * share, PARTS, row) for row in looks]
    return pd.Series(values, index=rows.index)


def diverged(rows: pd.DataFrame) -> pd.Series:
    """Runs that ended in infinity or NaN, or with a training loss no lower than at their start.

    Start and end are the means over an eighth of the steps.

    Taught in: notebook 04, section 3.
    """
    return rows["last_loss"] >= rows["first_loss"]


def stability(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Three readings of "stable", each with a row per seed and a column per method; low is stable.

    "diverged runs": how many, over all ranks and rates. "roughness": mean over the ranks and rates
    at which no run of either method diverged, in nats. "loss one step above": validation loss one
    step of the grid above the best rate, mean over the ranks that have that step with every
    method; a run that ended in NaN counts with the highest finite loss.

    Args:
        rows: one task; seeds that ran only some rates are left out.

    Taught in: notebook 04, section 3.
    """
    rows = whole_grid(rows, ARM)
    rows = rows.assign(diverged=diverged(rows))
    calm = ~rows.groupby(["rank", "learning_rate"])["diverged"].transform("any")
    above = _one_step_above(rows)
    return {
        "diverged runs": _by_seed(rows, "diverged", "sum"),
        "roughness": _by_seed(rows[calm], "roughness", "mean"),
        "loss one step above": _by_seed(above, "validation_loss", "mean"),
    }


def _by_seed(rows: pd.DataFrame, column: str, how: str) -> pd.DataFrame:
    return rows.pivot_table(index="seed", columns="method", values=column, aggfunc=how)


def _one_step_above(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows at the next rate above each arm's best, of ranks that have one in every method."""
    grid = sorted(rows["learning_rate"].unique())
    following = dict(itertools.pairwise(grid))
    best = at_best_rate(rows, ARM)[[*ARM, "learning_rate"]].drop_duplicates()
    best["learning_rate"] = best["learning_rate"].map(following)
    missing = best.loc[best["learning_rate"].isna(), "rank"]
    best = best[~best["rank"].isin(missing)]
    finite = rows.loc[rows["validation_loss"] < NOT_FINITE, "validation_loss"]
    capped = rows.assign(validation_loss=rows["validation_loss"].clip(upper=finite.max()))
    return capped.merge(best, on=[*ARM, "learning_rate"])
