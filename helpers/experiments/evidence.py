"""What the stored rank sweeps say: the tuned arms, and a rank with the strength of its evidence.

Source: this course's own.
Taught in: notebook 02, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from helpers.claims import Seeds
from helpers.claims.rules import Interval
from helpers.experiments.study import lowest, need, results
from helpers.given import one_of

MARGIN = 0.05  # of what the best rank gained over the control
SWEEPS = ("rank_by_task", "rank_by_text")


class EvidenceError(ValueError):
    """The stored studies cannot answer the question; the message says what they can answer."""


def tuned(name: str, by: Sequence[str]) -> pd.DataFrame:
    """The rows of a stored study at each arm's own learning rate, every seed.

    An arm is one combination of the columns ``by``; :func:`at_best_rate` says how it chooses.

    Raises:
        StudyError: the study is not stored, or has no such column.

    Taught in: notebook 02, section 4.
    """
    return at_best_rate(results(name), by)


def at_best_rate(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The rows of each arm at its own learning rate, sorted by arm and seed.

    That rate has the smallest mean validation loss over the seeds that ran every rate of the arm,
    so no test row chooses anything.

    Args:
        rows: of a study, with learning_rate, seed and validation_loss.
        by: the columns whose combinations are the arms.

    Raises:
        StudyError: a column is missing.

    Taught in: notebook 04, section 3.
    """
    need(rows, ["validation_loss"])
    mean = whole_grid(rows, by).groupby([*by, "learning_rate"], as_index=False)
    best = lowest(mean["validation_loss"].mean(), by=by, metric="validation_loss")
    best = best[[*by, "learning_rate"]]
    return rows.merge(best, on=[*by, "learning_rate"]).sort_values([*by, "seed"])


def whole_grid(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The rows of the seeds that ran every rate of an arm.

    Raises:
        StudyError: a column is missing.
    """
    need(rows, by)
    need(rows, ["learning_rate", "seed"])
    rates = rows.groupby([*by])["learning_rate"].transform("nunique")
    return rows[rows.groupby([*by, "seed"])["learning_rate"].transform("nunique") == rates]


@dataclass(frozen=True)
class Recommendation:
    """A rank, and what speaks for it.

    Attributes:
        rank: the smallest rank that loses at most 5 % of what the best rank gained.
        strength: "strong", "moderate" or "weak".
        because: one sentence with the figures.
        table: per rank: mean test loss, its range over the seeds, share of the best gain.
    """

    rank: int
    strength: str
    because: str
    table: pd.DataFrame

    def __str__(self) -> str:
        return f"r = {self.rank} ({self.strength} evidence): {self.because}"


def recommend_rank(task: str) -> Recommendation:
    """The smallest rank that was enough on a measured task, and how strong that evidence is.

    Enough: on the mean over seeds, the test loss is at most 5 % of the best rank's gain above the
    best rank's loss; the gain counts from the control (the head alone, or the untrained model).
    Proofs are 95 % intervals of paired differences over the seeds. *Weak*: they do not prove that
    the rank beats the control, or they prove nothing else. *Moderate*: they also prove one of two
    things, that a higher rank gains less than those 5 %, or that the next smaller rank that was
    tried is not enough. *Strong*: both.

    Raises:
        EvidenceError: the task was not measured; names the nearest that was.
        StudyError: a study is not stored.

    Taught in: notebook 02, section 4.
    """
    losses = _losses(task)
    ranks = [rank for rank in losses.columns if rank > 0]
    best = losses[ranks].mean().idxmin()
    gain = (losses[0] - losses[best]).mean()
    if gain <= 0:
        raise EvidenceError(f"no rank improved {task!r} over its control, so none is recommended")
    allowed = MARGIN * gain
    enough = next(r for r in ranks if (losses[r] - losses[best]).mean() <= allowed)
    return Recommendation(
        enough,
        _strength(losses, enough, best, allowed),
        _because(losses, enough, best, gain),
        _table(losses, gain),
    )


def measured_tasks() -> list[str]:
    """The tasks that the stored sweeps know."""
    return [task for name in SWEEPS for task in results(name)["task"].unique()]


def _losses(task: str) -> pd.DataFrame:
    """Test losses of the tuned arms, a row per seed and a column per rank (0 is the control)."""
    one_of("task", task, measured_tasks(), EvidenceError)
    rows = pd.concat([tuned(name, ["task", "rank"]) for name in SWEEPS])
    rows = rows[rows["task"] == task]
    return rows.pivot(index="seed", columns="rank", values="test_loss").dropna()


def _strength(losses: pd.DataFrame, rank: int, best: int, allowed: float) -> str:
    """How much the seeds prove about a rank that is enough on the mean."""
    if _lead(losses, rank, 0).low <= 0:
        return "weak"
    higher = best if best != rank else _neighbour(losses, rank, +1)
    lower = _neighbour(losses, rank, -1)
    proofs = [
        higher is not None and _lead(losses, rank, higher).low > -allowed,
        lower is not None and _lead(losses, lower, best).high < -allowed,
    ]
    return ("weak", "moderate", "strong")[sum(proofs)]


def _neighbour(losses: pd.DataFrame, rank: int, step: int) -> int | None:
    """The next higher or lower rank that was tried; None where there is none."""
    ranks = [r for r in losses.columns if r > 0]
    place = ranks.index(rank) + step
    return ranks[place] if 0 <= place < len(ranks) else None


def _lead(losses: pd.DataFrame, rank: int, other: int) -> Interval:
    """By how much a rank's loss is lower than another's, over the seeds."""
    return Seeds(losses[rank].tolist(), losses[other].tolist(), larger_is_better=False).lead()


def _because(losses: pd.DataFrame, rank: int, best: int, gain: float) -> str:
    def share(r: int) -> str:
        return f"{100 * (losses[0] - losses[r]).mean() / gain:.0f} %"

    text = f"it keeps {share(rank)} of the gain of the best of {len(losses.columns) - 1} ranks"
    text += f", {best}" if best != rank else ", itself"
    if (lower := _neighbour(losses, rank, -1)) is not None:
        text += f"; the next smaller one, {lower}, keeps {share(lower)}"
    return f"{text} ({len(losses)} seeds, gain {gain:.2f} nats over the control)"


def _table(losses: pd.DataFrame, gain: float) -> pd.DataFrame:
    shares = (losses[0].mean() - losses.mean()) / gain
    return pd.DataFrame(
        {
            "test loss": losses.mean().round(3),
            "lowest seed": losses.min().round(3),
            "highest seed": losses.max().round(3),
            "share of the best gain": shares.round(2),
        }
    ).rename_axis(index="rank", columns=None)
