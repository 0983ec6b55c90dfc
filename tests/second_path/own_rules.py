"""The ledger's rules once more, without helpers.claims.rules: what a second measurement implies.

Only the ledger's stored rows are read through `helpers.claims`.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from helpers import claims
from helpers.assets import DATA

Row = dict[str, str]


def verdict_of(conditions: Mapping[str, bool | None]) -> str:
    """Some hold, or all, or none; None is what the seeds leave undecided."""
    found = list(conditions.values())
    if any(found):
        return "confirmed" if all(found) else "partly"
    return "undecided" if None in found else "wrong"


def agrees(id: str, found: bool | Mapping[str, bool | None] | None) -> None:
    """The ledger has the verdict that `found` implies, under the same conditions."""
    claim = claims.find(id)
    if not isinstance(found, Mapping):
        expected = {True: "confirmed", False: "wrong", None: "undecided"}[found]
        assert claim.verdict == expected, f"{id}: {claim.verdict} in the ledger, found {found}"
        return
    groups = {"holds": True, "fails": False, "undecided": None}
    pairs = [part.split(": ", 1) for part in claim.condition.split(" · ")]
    stored = {key: groups[name] for name, keys in pairs for key in keys.split("; ")}
    assert stored == {key: truth(value) for key, value in found.items()}, id
    assert claim.verdict == verdict_of(found), f"{id}: {claim.verdict} in the ledger"


def truth(value: bool | None) -> bool | None:
    return None if value is None else bool(value)


@functools.cache
def quantile(freedom: int) -> float:
    """97.5 % of Student's t lies below it: the density summed up, no table."""
    x, step = np.linspace(0, 40, 400_001, retstep=True)
    log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = np.exp(log) / math.sqrt(freedom * math.pi)
    density = density * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    below = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) * step / 2)])
    return float(np.interp(0.475, below, x))


def lead(a: Sequence[float], b: Sequence[float], larger_is_better: bool) -> tuple[float, float]:
    """The 95 % interval of how much better a is than b, paired by seed."""
    difference = (np.array(a) - np.array(b)) * (1 if larger_is_better else -1)
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    reach = quantile(len(difference) - 1) * error
    return float(difference.mean() - reach), float(difference.mean() + reach)


def exceeds(interval: tuple[float, float], floor: float = 0.0) -> bool | None:
    """Whether the whole interval lies above the floor; None where the floor lies inside."""
    low, high = interval
    if low > floor:
        return True
    return False if high <= floor else None


@functools.cache
def stored(name: str) -> tuple[Row, ...]:
    """The rows of a stored study, as text."""
    with (DATA / "results" / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
        return tuple(csv.DictReader(stream))


def only(rows: Sequence[Row], /, **wanted: object) -> list[Row]:
    """The rows with these values, numbers compared as numbers, in the order of their seeds."""

    def fits(row: Row) -> bool:
        return all(
            row[key] == value if isinstance(value, str) else float(row[key]) == value
            for key, value in wanted.items()
        )

    return sorted(filter(fits, rows), key=lambda row: int(row["seed"]))


def column(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def best_rate(rows: Sequence[Row], measure: str = "validation_loss") -> float:
    """The rate of the lowest mean over the seeds that tried every rate."""
    rates = sorted({float(row["learning_rate"]) for row in rows})
    tried = {
        seed: {float(row["learning_rate"]): float(row[measure]) for row in rows_of(rows, seed)}
        for seed in {row["seed"] for row in rows}
    }
    whole = [found for found in tried.values() if len(found) == len(rates)]
    assert whole, "no seed ran the whole grid"
    return min(rates, key=lambda rate: float(np.mean([found[rate] for found in whole])))


def rows_of(rows: Sequence[Row], seed: str) -> list[Row]:
    return [row for row in rows if row["seed"] == seed]


def tuned(rows: Sequence[Row], measure: str = "validation_loss") -> list[Row]:
    """The rows of one arm at its best rate."""
    return only(rows, learning_rate=best_rate(rows, measure))
