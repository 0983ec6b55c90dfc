"""The pass/fail table of lesson 00: is this machine able to run the course?

Source: this course's own.
Taught in: notebook 00, section 1.
"""

import os
import platform
import shutil
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pandas as pd
from packaging.requirements import Requirement

from helpers import assets, models
from helpers.checks.room import free_memory

PYTHON = (3, 11)
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
FREE_RAM_GIB = 6.0
FREE_DISK_GIB = 1.0
PYPROJECT = assets.DATA.parent / "pyproject.toml"

_FETCH = "run `python -m helpers.assets` once, with a network"


@dataclass(frozen=True)
class Machine:
    """What `look` found; memory and disk in GiB.

    `packages`: name to (range that pyproject.toml asks for, installed version), either None when
    unknown. `cached`: name of each archive of the lessons to whether it stands ready offline.
    """

    python: tuple[int, int, int]
    packages: dict[str, tuple[str | None, str | None]]
    free_ram: float
    free_disk: float
    cores: int
    device: str
    cached: dict[str, bool]
    offline: bool


def look() -> Machine:
    """Looks at this machine; downloads nothing and loads no model."""
    major, minor, patch = map(int, platform.python_version_tuple())
    ranges = _ranges(PYPROJECT)
    return Machine(
        python=(major, minor, patch),
        packages={name: (ranges.get(name), _installed(name)) for name in PACKAGES},
        free_ram=free_memory() / 2**30,
        free_disk=shutil.disk_usage(_existing(assets.cache_dir())).free / 2**30,
        cores=_cores(),
        device=_device(),
        cached={name: _cached(name) for name in assets.of_lessons()},
        offline=os.environ.get("HF_HUB_OFFLINE") == "1",
    )


def machine(found: Machine | None = None) -> pd.DataFrame:
    """One row for each thing the course needs: check, needed, found, result, what to do.

    `result` is "pass", "fail", or "info" where nothing is required. Looks at this machine unless
    it is given another one.

    Taught in: notebook 00, section 1.
    """
    found = found or look()
    rows = [
        _python(found),
        *(_package(name, *versions) for name, versions in found.packages.items()),
        _free("free memory", found.free_ram, FREE_RAM_GIB, "close other programs"),
        _free("free disk", found.free_disk, FREE_DISK_GIB, "free some, or set PEFT_MEASURED_CACHE"),
        ("processor cores", "", str(found.cores), "info", ""),
        ("device", "", found.device, "info", ""),
        *(_asset(name, ready) for name, ready in found.cached.items()),
        _offline(found.offline),
    ]
    columns = ["check", "needed", "found", "result", "what to do"]
    return pd.DataFrame(rows, columns=columns).set_index("check")


Row = tuple[str, str, str, str, str]


def _row(check: str, needed: str, found: str, passes: bool, remedy: str) -> Row:
    return (check, needed, found, "pass" if passes else "fail", "" if passes else remedy)


def _python(found: Machine) -> Row:
    needed = ".".join(map(str, PYTHON))
    return _row(
        "Python",
        f"{needed} or newer",
        ".".join(map(str, found.python)),
        found.python[:2] >= PYTHON,
        f"install Python {needed} or newer, then run `make lab` again",
    )


def _package(name: str, needed: str | None, installed: str | None) -> Row:
    if installed is None:
        return (name, needed or "", "not installed", "fail", f"pip install '{name}{needed or ''}'")
    if needed is None:
        return (name, "", installed, "info", "")
    # The base version: "2.13.0+cpu" and a release candidate count as what they are built from.
    fits = Requirement(f"x{needed}").specifier.contains(installed, prereleases=True)
    return _row(name, needed, installed, fits, f"pip install '{name}{needed}'")


def _free(check: str, found: float, needed: float, remedy: str) -> Row:
    return _row(check, f"{needed:g} GiB", f"{found:.1f} GiB", found >= needed, remedy)


def _asset(name: str, ready: bool) -> Row:
    kind = "base model" if name in models.CONVERTED else "data set"
    return _row(f"{kind} {name}", "in the cache", "ready" if ready else "missing", ready, _FETCH)


def _offline(offline: bool) -> Row:
    found = "the hub is not asked for anything" if offline else "the hub may be asked"
    return ("offline", "", found, "info", "")


def _ranges(pyproject: Path) -> dict[str, str]:
    """Package to version range; empty where the file is not there, as in a hosted notebook."""
    try:
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return {}
    needed = map(Requirement, project.get("dependencies", []))
    return {one.name: str(one.specifier) for one in needed}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cached(name: str) -> bool:
    """Whether a lesson finds it without a network: the converted model, or the archive."""
    if name in models.CONVERTED:
        return models.folder(name).is_dir()
    return assets.is_here(name)


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


def _cores() -> int:
    # A container or a batch system may allow fewer cores than the machine has.
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _device() -> str:
    try:
        return models.describe_device()
    except ValueError as error:  # PEFT_MEASURED_DEVICE names a device that does not work here
        return str(error)
