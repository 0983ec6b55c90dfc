"""The table of what the lessons survived, and the page that shows it."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from helpers.assets import DATA
from helpers.atomic import put_text
from helpers.experiments.study import VERSIONS, processor
from helpers.robustness.trials import EVERY, Hardship, Outcome

TABLE = DATA / "robustness.csv"
PAGE = DATA.parent / "docs" / "robustness.md"
KEY = ["lesson", "hardship"]

TEXT = """\
# What the lessons survive

Written by `python -m helpers.robustness`, which runs each lesson under hardship in a copy of the
checkout. A run survives when every cell comes to its end, every checked output is the stored one to
the letter, no file of the checkout has changed, and nothing half-written or still running is left.

{hardships}

Seconds of each run, on a machine that had other work too; what broke, where something did; a dash
where it was not run yet:

{runs}

The most memory (the kernel and all it started) and the most temporary files that a run had at one
time. The set-up cell of a lesson compares both with what is free, before it starts:

{peaks}

What is written on a full disk — {written} — leaves the old one whole and says in one sentence that
there is no room: `python -m helpers.robustness disk` tries it on a small disk of its own, and
`tests/test_full_disk.py` with a limit on the size of a file.

Measured with {versions}.
"""


def put(lesson: str, hardship: Hardship, outcome: Outcome, table: Path = TABLE) -> pd.DataFrame:
    """Puts one run into the stored table, in the place of the same lesson's and hardship's."""
    row = {
        "lesson": lesson,
        "hardship": hardship.name,
        "threads": hardship.threads,
        "hash_seed": hardship.hash_seed,
        "seconds": round(outcome.seconds),
        "memory_gb": round(outcome.memory / 1e9, 2),
        "disk_gb": round(outcome.disk / 1e9, 3),
        "cells": outcome.cells,
        "broken": "; ".join(outcome.broken),
        "python": platform.python_version(),
        **{package: version(package) for package in VERSIONS},
        "processor": processor(),
    }
    rows = pd.DataFrame([row])
    if table.exists():
        rows = pd.concat([load(table), rows])
    rows = rows.drop_duplicates(KEY, keep="last").sort_values(KEY)
    put_text(table, rows.to_csv(index=False))
    return rows


def load(table: Path = TABLE) -> pd.DataFrame:
    """The stored rows; `broken` is "" where everything survived."""
    return pd.read_csv(table, dtype={"broken": str}).fillna({"broken": ""})


def done(table: Path = TABLE) -> set[tuple[str, str]]:
    """Lesson and hardship of every stored run that survived."""
    if not table.exists():
        return set()
    rows = load(table)
    return set(rows[rows.broken == ""][KEY].itertuples(index=False, name=None))


def page(rows: pd.DataFrame, written: Iterable[str]) -> str:
    """The page of a stored table, and of the names of what is written on a full disk."""
    ran = rows[rows.memory_gb > 0]  # a lesson that was stopped took nothing
    return TEXT.format(
        hardships="\n".join(f"- **{one.name}**: {one.in_words()}" for one in EVERY),
        runs=_markdown(rows.assign(shown=_shown(rows)).pivot_table(**RUNS)[_present(rows)]),
        peaks=_markdown(ran.groupby("lesson")[list(PEAKS)].max().rename(columns=PEAKS)),
        written=", ".join(written),
        versions="; ".join(_versions(rows)),
    )


RUNS = {"index": "lesson", "columns": "hardship", "values": "shown", "aggfunc": "first"}
PEAKS = {"memory_gb": "memory, GB", "disk_gb": "temporary files, GB"}


def _present(rows: pd.DataFrame) -> list[str]:
    return [one.name for one in EVERY if one.name in set(rows.hardship)]


def _shown(rows: pd.DataFrame) -> pd.Series:
    """Seconds, or what broke; a dash in the table means that it was not run yet."""
    return rows.seconds.astype(str).where(rows.broken == "", "broken: " + rows.broken)


def _versions(rows: pd.DataFrame) -> list[str]:
    columns = ["python", *VERSIONS, "processor"]
    every = rows[columns].drop_duplicates().itertuples(index=False)
    return [", ".join(f"{k} {v}" for k, v in zip(columns, one, strict=True)) for one in every]


def _markdown(table: pd.DataFrame) -> str:
    """A table in Markdown; what was not run is a dash."""
    rows = table.reset_index().fillna("–").astype(str).to_numpy().tolist()
    head = [table.index.name, *map(str, table.columns)]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
