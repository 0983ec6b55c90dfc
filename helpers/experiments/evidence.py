"""What the stored rank sweeps say: the tuned arms, and a rank with the strength of its evidence."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from helpers.claims import Seeds
from helpers.experiments.study import results

MARGIN = 0.05  # of what the best rank gained over the control
SWEEPS = ("rank_by_task", "rank_by_text")


class EvidenceError(ValueError):
    """The stored studies cannot answer the question; the message says what they can answer."""


def tuned(name: str, by: Sequence[str], *, metric: str = "validation_loss") -> pd.DataFrame:
    """The rows of a stored study at each arm's own learning rate, every seed.

    An arm is one combination of the columns ``by``. Its rate is the one with the smallest
    validation loss on the first seed, so no test row chooses anything.

    Raises:
        StudyError: the study is not stored.

    Taught in: notebook 02, section 4.
    """
    stored = results(name)
    first = stored[stored["seed"] == stored["seed"].min()]
    best = first.loc[first.groupby(list(by))[metric].idxmin(), [*by, "learning_rate"]]
    return stored.merge(best, on=[*by, "learning_rate"]).sort_values([*by, "seed"])


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
    *Strong*: the seeds prove both that it is enough and that the next smaller rank is not (95 %
    intervals of paired differences). *Moderate*: one of the two. *Weak*: neither.

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
    smaller = [rank for rank in ranks if rank < enough]
    proofs = [_proven_enough(losses, enough, best, allowed)]
    proofs.append(_proven_short(losses, smaller[-1], best, allowed) if smaller else enough == 1)
    strength = {2: "strong", 1: "moderate", 0: "weak"}[sum(proofs)]
    return Recommendation(
        enough, strength, _because(losses, enough, best, gain, smaller), _table(losses, best, gain)
    )


def measured_tasks() -> list[str]:
    """The tasks that the stored sweeps know."""
    return [task for name in SWEEPS for task in results(name)["task"].unique()]


def _losses(task: str) -> pd.DataFrame:
    """Test losses of the tuned arms, a row per seed and a column per rank (0 is the control)."""
    known = measured_tasks()
    if task not in known:
        near = difflib.get_close_matches(str(task), known, n=1, cutoff=0.0)[0]
        raise EvidenceError(
            f"no sweep on {task!r}; the nearest is {near!r}, of: {', '.join(known)}"
        )
    rows = pd.concat([tuned(name, ["task", "rank"]) for name in SWEEPS])
    rows = rows[rows["task"] == task]
    return rows.pivot(index="seed", columns="rank", values="test_loss").dropna()


def _proven_enough(losses: pd.DataFrame, rank: int, best: int, allowed: float) -> bool:
    return rank == best or _lead(losses, rank, best).low > -allowed


def _proven_short(losses: pd.DataFrame, rank: int, best: int, allowed: float) -> bool:
    return _lead(losses, rank, best).high < -allowed


def _lead(losses: pd.DataFrame, rank: int, best: int):
    return Seeds(losses[rank].tolist(), losses[best].tolist(), larger_is_better=False).lead()


def _because(
    losses: pd.DataFrame, rank: int, best: int, gain: float, smaller: Sequence[int]
) -> str:
    def share(r: int) -> str:
        return f"{100 * (losses[0] - losses[r]).mean() / gain:.0f} %"

    text = f"it keeps {share(rank)} of the gain of the best rank, {best}"
    if smaller:
        text += f", the next smaller rank, {smaller[-1]}, keeps {share(smaller[-1])}"
    return f"{text} ({len(losses)} seeds, gain {gain:.2f} nats over the control)"


def _table(losses: pd.DataFrame, best: int, gain: float) -> pd.DataFrame:
    shares = (losses[0].mean() - losses.mean()) / gain
    return pd.DataFrame(
        {
            "test loss": losses.mean().round(3),
            "lowest seed": losses.min().round(3),
            "highest seed": losses.max().round(3),
            "share of the best gain": shares.round(2),
        }
    ).rename_axis(index="rank", columns=None)
