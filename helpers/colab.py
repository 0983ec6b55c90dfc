"""Prepares a rented notebook machine (Google Colab), where torch and numpy are already there.

Standard library only: it runs before the course's dependencies exist.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A build of these that fits the machine's GPU is there, and other packages are compiled for it.
KEPT = ("torch", "numpy")
# Colab brings its own notebook front end; another version of these would break it.
NOT_IN_COLAB = frozenset({"jupyterlab", "ipywidgets", "nbclient", "nbformat"})


class ColabError(RuntimeError):
    """What stopped the installation, in one sentence."""


def requirements(pyproject: Path = ROOT / "pyproject.toml") -> list[str]:
    """The course's requirements as pip reads them, without those that Colab brings itself.

    Raises:
        FileNotFoundError: there is no such ``pyproject.toml``.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return [line for line in project["dependencies"] if _name(line) not in NOT_IN_COLAB]


def pins() -> list[str]:
    """The installed versions of torch and numpy as constraints, local tags ("+cu126") included.

    Raises:
        ColabError: one of them is not installed, so that this is no Colab machine.
    """
    found = _versions()
    for name in KEPT:
        if name not in found:
            raise ColabError(
                f"{name} is not installed here, and Colab always has it; on your own machine use "
                "`python course.py lab` instead."
            )
    return [f"{name}=={found[name]}" for name in KEPT]


def install_missing() -> None:
    """Install what the course needs and this machine lacks; torch and numpy stay as they are.

    pip leaves alone whatever satisfies the course's ranges. Prints what was done, since a cell
    ends with this call.

    Raises:
        ColabError: pip could not install; the message ends with pip's own last line.
    """
    before, kept = _versions(), pins()
    _pip_install(requirements(), kept)
    changed = {n: v for n, v in _versions().items() if before.get(n) != v}
    print(f"Kept: {', '.join(kept)}.")
    print(f"Installed: {', '.join(f'{n} {v}' for n, v in sorted(changed.items())) or 'nothing'}.")
    stale = sorted(n for n in changed if n in before and n.replace("-", "_") in sys.modules)
    if stale:
        print(f"Restart the session once (Runtime, Restart session): {', '.join(stale)} in use.")


def _pip_install(wanted: list[str], kept: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("\n".join(kept) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--progress-bar=off"]
        command += ["--disable-pip-version-check", "--constraint", str(constraints), *wanted]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ColabError(f"pip could not install what the course needs beside {kept}: {last}")


def _name(requirement: str) -> str:
    """The normalised project name at the start of a requirement."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower()


def _versions() -> dict[str, str]:
    return {_name(d.metadata["Name"]): d.version for d in metadata.distributions()}
