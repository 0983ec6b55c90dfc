"""The oldest and the newest supported libraries: installed apart, tested, and their keywords kept.

`python -m helpers.versions oldest` (or `newest`) installs what constraints-oldest.txt says into an
environment of its own in the cache folder, runs every test and every lesson there, the lessons'
stored outputs compared, and prints what the README's table needs. More words go to pytest:
`… oldest -- tests/adapters`.
`python -m helpers.versions oldest --signatures` writes data/signatures/oldest.json instead: which
keywords each callable that the course uses takes. A test compares both files with the sources.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from packaging.utils import canonicalize_name

import course
from helpers import assets
from helpers.atomic import put_text

ROOT = course.CHECKOUT
EDGES = ("oldest", "newest")
NAMED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


def constraints(edge: str) -> str:
    """constraints.txt, with the lines of constraints-EDGE.txt in place of its own."""
    changed = _pins(ROOT / f"constraints-{edge}.txt")
    merged = {**_pins(ROOT / "constraints.txt"), **changed}
    return "".join(f"{name}=={version}\n" for name, version in merged.items())


def _pins(file: Path) -> dict[str, str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def environment(edge: str) -> Path:
    """The Python of an environment with the versions of one edge, made when it is missing.

    Raises:
        SetupError: what `course.environment` says: no disk, no network, nowhere to write.
    """
    folder = assets.cache_dir() / "versions" / edge
    folder.mkdir(parents=True, exist_ok=True)
    put_text(folder / "constraints.txt", constraints(edge))
    put_text(folder / "pyproject.toml", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return course.environment(folder)


def installed(python: Path) -> dict[str, str]:
    """The versions that an environment really has, of the libraries that the course is about."""
    code = f"import importlib.metadata as m; print({{n: m.version(n) for n in {NAMED}}})"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.replace("'", '"'))


def run_tests(python: Path, words: list[str]) -> tuple[int, str]:
    """pytest over all tests and lessons; its exit status and its closing line."""
    command = [str(python), "-m", "pytest", "--nbval", "--nbval-current-env", *words]
    last = ""
    with subprocess.Popen(
        command, cwd=ROOT, env=_variables(python), stdout=subprocess.PIPE, text=True
    ) as program:
        for line in program.stdout:
            print(line, end="", flush=True)
            last = line.strip("= \n") or last
    return program.returncode, last


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


def row(edge: str, found: dict[str, str], closing: str) -> str:
    """One row of the README's table of what was tested on what."""
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    return f"| {closing} | the {edge}: {versions} |"


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 when every test passed."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.versions",
        description="Install the oldest or the newest supported libraries apart, and test there. "
        "Downloads up to 4 GB (on Linux, torch brings CUDA) and takes half an hour.",
    )
    parser.add_argument("edge", choices=EDGES)
    parser.add_argument("--signatures", action="store_true", help="only store the keywords")
    parser.add_argument("pytest", nargs="*", metavar="-- WORDS", help="for pytest")
    chosen = parser.parse_args(arguments)
    try:
        python = environment(chosen.edge)
        if chosen.signatures:
            print(write_signatures(chosen.edge, python).relative_to(ROOT))
            return 0
        status, closing = run_tests(python, chosen.pytest)
        print(row(chosen.edge, installed(python), closing))
        return status
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
