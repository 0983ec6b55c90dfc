"""A study is a table of runs: each finished run is one appended row, so nothing is run twice.

Source: this course's own.
Taught in: notebook 01, section 3.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from helpers.assets import DATA
from helpers.atomic import plain_when_full, put_text

RESULTS = DATA / "results"
VERSIONS = ("torch", "transformers", "peft")


class StudyError(RuntimeError):
    """A study that cannot be read or run; the message says why."""


@dataclass(frozen=True)
class Study:
    """A named table of runs.

    Attributes:
        name: file name in ``data/results`` without its ending.
        settings: one dict per run, without the seed; the keys are columns.
        metrics: the columns that :attr:`run` measures.
        run: ``run(settings, seed) -> metrics``.
        tuned: a setting, such as the learning rate, whose value each arm chooses on the first
            seeds; later seeds run the chosen value only. None runs every value with every seed.
        tuned_by: the metric that chooses, smallest first, such as a validation loss.
        seeds: how many seeds the stored table has, 0 and up.
        explored: how many seeds run every value of the tuned setting; their mean chooses.
    """

    name: str
    settings: tuple[dict[str, str | float | int], ...]
    metrics: tuple[str, ...]
    run: Callable[[dict, int], dict[str, float]]
    tuned: str | None = None
    tuned_by: str = "validation_loss"
    seeds: int = 3
    explored: int = 1

    @property
    def columns(self) -> list[str]:
        """Every column of the stored table, in order."""
        return [
            *self.settings[0],
            "seed",
            *self.metrics,
            "seconds",
            *VERSIONS,
            "processor",
        ]


def results(name: str, folder: Path = RESULTS) -> pd.DataFrame:
    """The stored rows of a study.

    Raises:
        StudyError: there are none yet, or their table is damaged; names the command that makes
            them.
    """
    path = folder / f"{name}.csv"
    if not path.exists():
        raise StudyError(
            f"no stored results for {name}: run `python -m helpers.experiments {name}`"
        )
    try:
        return pd.read_csv(path)
    except ValueError as error:  # no text, no columns, or cut short
        raise StudyError(
            f"{path} is damaged ({error}): move it away and run `python -m helpers.experiments "
            f"{name}`"
        ) from error


def need(rows: pd.DataFrame, columns: Sequence[str]) -> None:
    """Refuse a table that lacks one of the columns that are asked for.

    Raises:
        StudyError: names the first that is missing, and those that are there.
    """
    if not columns:
        raise StudyError("no column is named, so there are no arms to tell apart")
    if missing := [name for name in columns if name not in rows]:
        there = ", ".join(map(str, rows)) or "none"
        raise StudyError(f"the table has no column {missing[0]!r}; it has: {there}")


def processor() -> str:
    """The processor's name as the system gives it, for the provenance of a row."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run_study(
    study: Study,
    *,
    seeds: Iterable[int],
    folder: Path = RESULTS,
    report: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Run what is missing, append a row for each finished run, return the whole table.

    Where the study tunes a setting, the first seeds run all its values and the others the best.

    Raises:
        StudyError: the stored table has other columns than the study.
    """
    path = folder / f"{study.name}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    seeds = list(seeds)
    first, others = seeds[: study.explored], seeds[study.explored :]
    _finish(study, [(s, seed) for seed in first for s in study.settings], path, report)
    chosen = list(study.settings)
    if study.tuned and others:
        best = tuned(study, results(study.name, folder).query("seed in @first"))
        chosen = [s for s in chosen if _key(study, s) in best]
    _finish(study, [(s, seed) for seed in others for s in chosen], path, report)
    return results(study.name, folder)


def set_aside(study: Study, folder: Path = RESULTS) -> None:
    """Rename the stored table to ``NAME.csv.old``, so that the study starts anew."""
    path = folder / f"{study.name}.csv"
    if path.exists():
        os.replace(path, path.with_suffix(".csv.old"))


def tuned(study: Study, rows: pd.DataFrame) -> set[tuple[str, ...]]:
    """The keys of the settings that each arm chose: the smallest mean `tuned_by` in ``rows``.

    Raises:
        StudyError: a column is missing.
    """
    need(rows, [*study.settings[0], study.tuned_by])
    arms = [name for name in study.settings[0] if name != study.tuned]
    means = rows.groupby(list(study.settings[0]), as_index=False)[study.tuned_by].mean()
    best = lowest(means, by=arms, metric=study.tuned_by)
    return {_key(study, row) for row in best.to_dict("records")}


def lowest(rows: pd.DataFrame, *, by: Sequence[str], metric: str) -> pd.DataFrame:
    """For each combination of the columns ``by``, its row with the smallest ``metric``.

    Raises:
        StudyError: a column is missing, or an arm has no number there.
    """
    need(rows, by)
    need(rows, [metric])
    if (rows.groupby(list(by))[metric].count() == 0).any():
        raise StudyError(f"an arm has no {metric} that is a number, so nothing is its lowest")
    return rows.loc[rows.groupby(list(by))[metric].idxmin()]


def _finish(
    study: Study, wanted: list[tuple[dict, int]], path: Path, report: Callable[[str], None]
) -> None:
    """Run and append those of the wanted runs that are not stored yet, with the time left."""
    done = set(_finished(path, study))
    todo = [(s, seed) for s, seed in wanted if (*_key(study, s), str(seed)) not in done]
    report(f"{study.name}: {len(done)} runs stored, {len(todo)} to do")
    start = time.perf_counter()
    for i, (settings, seed) in enumerate(todo):
        began = time.perf_counter()
        measured = study.run(settings, seed)
        row = {**settings, "seed": seed, **measured}
        row |= {"seconds": round(time.perf_counter() - began, 1), "processor": processor()}
        row |= {package: version(package) for package in VERSIONS}
        append(path, study.columns, row)
        left = (time.perf_counter() - start) / (i + 1) * (len(todo) - i - 1)
        report(
            f"[{i + 1}/{len(todo)}] {settings} seed {seed}: {measured} · {left / 60:.0f} min left"
        )


def _key(study: Study, row: dict) -> tuple[str, ...]:
    return tuple(str(row[c]) for c in study.settings[0])


def _finished(path: Path, study: Study) -> Iterator[tuple[str, ...]]:
    """Keys of the stored rows; a half row left by a killed run is cut off first."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        put_text(path, text)
    reader = csv.DictReader(io.StringIO(text))
    if reader.fieldnames is not None and reader.fieldnames != study.columns:
        raise StudyError(
            f"{path.name} has other columns than this version of the study: "
            "move it away and run again"
        )
    for row in reader:
        yield (*_key(study, row), row["seed"])


def append(path: Path, columns: list[str], row: dict) -> None:
    """Write one whole row (and the header, when the file is new) and force it to the disk.

    Raises:
        DiskFull: there is no room; the rows that stand there stay, and none is cut short.
        OSError: the file cannot be written.
        StudyError: the row has a value for no column.
    """
    if strange := [name for name in row if name not in columns]:
        raise StudyError(f"{path.name} has no column {strange[0]!r}; it has: {', '.join(columns)}")
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    if not path.exists() or path.stat().st_size == 0:
        writer.writeheader()
    writer.writerow(row)
    line = buffer.getvalue().encode()
    with plain_when_full(path.parent), path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except BaseException:  # a Ctrl-C too
            file.truncate(end)
            raise
