"""The oldest and the newest supported libraries: installed apart, tested, and their keywords kept.

`python course.py versions -- oldest` (or `newest`) installs what constraints-oldest.txt says into
an environment of its own in the cache folder; the learner's `.venv` stays as it is. It runs every
test and every lesson there, and closes with a table and the row for the README. More words go to
pytest: `… oldest -- tests/adapters`.

A lesson's outputs are compared strictly with the stored ones. A test that fails, a cell that
raises, one that should raise and does not, and a claim with another verdict are failures. Other
differences, of rounding or of words, are counted and named, and are none.

`… oldest --signatures` writes data/signatures/oldest.json instead: which keywords each callable
that the course uses takes. A test compares both files with the sources.
"""

import argparse
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from packaging.utils import canonicalize_name

import course
from helpers import assets, outcomes
from helpers.atomic import put_text

ROOT = course.CHECKOUT
EDGES = ("oldest", "newest")
NAMED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
FREE_BYTES = (10 if sys.platform == "linux" else 4) * 10**9  # CUDA's libraries, and unpacking
STOPPED = "pytest stopped before its end: the table has what ran until then."
BEFOREHAND = (
    "This installs the {edge} supported libraries into {folder}: on Linux about 3 GB to download "
    "(torch brings CUDA) and 7 GB of disk, less where pip has kept them. Installing takes about "
    "five minutes, all tests and lessons about half an hour on two cores. Ctrl-C stops it, and the "
    "same command goes on with what is installed; remove that folder when you are done."
)


def constraints(edge: str) -> str:
    """constraints.txt, with the lines of constraints-EDGE.txt in place of its own."""
    changed = _pins(ROOT / f"constraints-{edge}.txt")
    merged = {**_pins(ROOT / "constraints.txt"), **changed}
    return "".join(f"{name}=={version}\n" for name, version in merged.items())


def _pins(file: Path) -> dict[str, str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def place(edge: str) -> Path:
    """The folder of an edge's environment."""
    return assets.cache_dir() / "versions" / edge


def environment(edge: str) -> Path:
    """The Python of an environment with the versions of one edge, made when it is missing.

    Raises:
        SetupError: what `course.environment` says: no disk, no network, nowhere to write.
    """
    folder = place(edge)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ".venv").exists():
        course.check_disk(folder, needed=FREE_BYTES)
    put_text(folder / "constraints.txt", constraints(edge))
    put_text(folder / "pyproject.toml", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return course.environment(folder)


def installed(python: Path) -> dict[str, str]:
    """The versions that an environment really has, of the libraries that the course is about."""
    code = "import importlib.metadata as m, json; "
    code += f"print(json.dumps({{n: m.version(n) for n in {NAMED}}}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def run_tests(python: Path, words: list[str], report: Path) -> tuple[int, list[outcomes.Case]]:
    """pytest over all tests and lessons, or over `words`: its exit status and what happened.

    `report` gets pytest's JUnit file, with the whole text of every difference.
    """
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    command = [str(python), "-m", *course.PYTEST]
    command += ["-o", "verbosity_assertions=2", f"--junitxml={report}", *words]
    variables = {"OMP_NUM_THREADS": course.threads(), **_variables(python)}
    status = subprocess.run(command, cwd=ROOT, env=variables).returncode
    return status, outcomes.cases(report) if report.exists() else []


def write_signatures(edge: str, python: Path) -> Path:
    """Stores which keywords the callables of the course take, in the environment of one edge."""
    target = ROOT / "data" / "signatures" / f"{edge}.json"
    command = [str(python), "-m", "helpers.signatures"]
    done = subprocess.run(
        command, cwd=ROOT, env=_variables(python), capture_output=True, text=True, check=True
    )
    table = {"versions": installed(python), "callables": json.loads(done.stdout)}
    target.parent.mkdir(exist_ok=True)
    put_text(target, json.dumps(table, indent=1, sort_keys=True) + "\n")
    return target


def _variables(python: Path) -> dict[str, str]:
    """As course.py gives them, with this checkout's `helpers` before any other."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    made = {**course.variables(python), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return {**made, "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]])}


def row(edge: str, found: dict[str, str], cases: list[outcomes.Case]) -> str:
    """One row of the README's table of what was tested on what."""
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    return f"| the {edge}: {versions} | {outcomes.summary(cases)} |"


def exit_status(pytests: int, cases: list[outcomes.Case]) -> int:
    """0 when pytest ran to its end and nothing failed; its own is 1 for other words, too."""
    if pytests in (0, 1) and cases:
        return int(outcomes.has_failed(cases))
    return pytests or 1


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 when every test passed."""
    said = BEFOREHAND.format(edge="oldest or newest", folder=place("EDGE"))
    parser = argparse.ArgumentParser(
        prog="python course.py versions --",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{__doc__}\n{textwrap.fill(said, 98, break_on_hyphens=False)}",
    )
    parser.add_argument("edge", choices=EDGES)
    parser.add_argument("--signatures", action="store_true", help="only store the keywords")
    parser.add_argument("pytest", nargs="*", metavar="-- WORDS", help="for pytest")
    chosen = parser.parse_args(arguments)
    try:
        print(BEFOREHAND.format(edge=chosen.edge, folder=place(chosen.edge)), flush=True)
        python = environment(chosen.edge)
        if chosen.signatures:
            print(write_signatures(chosen.edge, python).relative_to(ROOT))
            return 0
        report = ROOT / "build" / "versions" / f"{chosen.edge}.xml"
        status, cases = run_tests(python, chosen.pytest, report)
        whole = row(chosen.edge, installed(python), cases) if status in (0, 1) else STOPPED
        print(f"\n{outcomes.table(cases)}\n\n{whole}")
        return exit_status(status, cases)
    except course.SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"{error.stderr or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
