"""Whether a lesson has the memory and the disk that it took when it was measured.

Source: what `python -m helpers.robustness` measured, in data/robustness.csv, and for the limits of
a container the Linux kernel's documents on control groups, versions 1 and 2.
Taught in: notebook 00, section 1.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd
import psutil

from helpers.assets import DATA

MEASURED = DATA / "robustness.csv"  # `python -m helpers.robustness` writes it
GROUPS = Path("/sys/fs/cgroup")
SPARE = 20e6  # bytes, for the kernel's own small files
NO_LIMIT = 1 << 60  # bytes; older kernels write a number of this size for "none"


class NoRoom(RuntimeError):
    """The disk for temporary files is too full for a lesson; the message says what to do."""


def room(lesson: str) -> None:
    """Says before a lesson starts what it will lack; does nothing where there is enough.

    Too little memory is said on stderr and the lesson goes on, since a system may find more, by
    swapping for one. Without room for its temporary files it would stop in the middle of a save,
    so it stops here.

    Args:
        lesson: its number, such as "03".

    Raises:
        NoRoom: there is less room for temporary files than the lesson writes.

    Taught in: notebook 00, section 1.
    """
    took = needs(lesson)
    free = free_memory()
    if free < took["memory"]:
        print(
            f"Lesson {lesson} takes up to {took['memory'] / 1e9:.1f} GB of memory, and "
            f"{free / 1e9:.1f} GB are free: close other programs first, or its kernel may die on "
            "the way (nothing that is stored is lost; Restart & Run All begins anew).",
            file=sys.stderr,
        )
    place = tempfile.gettempdir()
    left = shutil.disk_usage(place).free
    if left < took["disk"] + SPARE:
        raise NoRoom(
            f"Lesson {lesson} writes up to {(took['disk'] + SPARE) / 1e9:.2f} GB of temporary "
            f"files, and {left / 1e9:.2f} GB are free in {place}: free some, or set TMPDIR to a "
            "folder on another disk, and start again."
        )


def needs(lesson: str, measured: Path = MEASURED) -> dict[str, float]:
    """The most bytes of "memory" and of "disk" (temporary files) that a lesson was seen to take.

    Both 0 for a lesson that was never measured, such as one that somebody is writing.
    """
    rows = pd.read_csv(measured) if measured.exists() else pd.DataFrame(columns=["lesson"])
    rows = rows[rows.lesson.str.startswith(f"{lesson}_")]
    if rows.empty:
        return {"memory": 0.0, "disk": 0.0}
    return {"memory": rows.memory_gb.max() * 1e9, "disk": rows.disk_gb.max() * 1e9}


def free_memory() -> float:
    """Bytes that a new program can have: of this machine, or less where a container has a limit."""
    return min(psutil.virtual_memory().available, free_in_groups(GROUPS, _own_groups()))


def free_in_groups(root: Path, groups: list[Path]) -> float:
    """Bytes that Linux's control groups leave to this process; infinite without a limit.

    Pages that only cache a file do not count as used: the system gives them up when asked.
    """
    free = float("inf")
    for group in groups:
        for place in (group, *group.parents):
            if place == root.parent:
                break
            limit = _number(place / "memory.max", place / "memory.limit_in_bytes")
            used = _number(place / "memory.current", place / "memory.usage_in_bytes")
            if limit < NO_LIMIT:
                free = min(free, limit - used + _cached(place / "memory.stat"))
    return free


def _own_groups() -> list[Path]:
    """Where this process's limits may be found; in a container, at the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = [GROUPS, GROUPS / "memory"]
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            found.append(GROUPS / path.lstrip("/"))
        elif "memory" in kinds.split(","):
            found.append(GROUPS / "memory" / path.lstrip("/"))
    return found


def _number(*files: Path) -> float:
    """The number in the first of the files that is there; infinite for "max" and for none."""
    for file in files:
        try:
            return float(file.read_text(encoding="utf-8").replace("max", "inf"))
        except (OSError, ValueError):
            continue
    return float("inf")


def _cached(file: Path) -> float:
    try:
        rows = dict(line.split() for line in file.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return 0.0
    return float(rows.get("total_inactive_file", rows.get("inactive_file", 0)))
