"""The course as one archive that needs no network: lessons, packages, models and data.

`python -m helpers.bundle` writes it to `build/`; it serves the system and the Python that made
it. Unpacked, its folder `offline/` is where course.py installs from and `assets.fetch` copies from.
`python -m helpers.bundle check FILE` unpacks an archive elsewhere, cuts the network, and does
what a learner does first; `--tests` runs the whole of `make test` there as well.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import course
from helpers import assets, namespaces

ROOT = course.CHECKOUT
FOLDER = "peft-measured"  # what the archive unpacks to
STORED = {".whl", ".gz", ".safetensors", ".png"}  # compressed already
FIRST_ADAPTER = "01"  # the lesson that trains it


class BundleError(RuntimeError):
    """An archive could not be made, or does not do what it is for; the message says why."""


def files(root: Path = ROOT) -> list[Path]:
    """What belongs to the course, relative to `root`: all but git's folder and .gitignore's names.

    Changes that nobody has committed are in it, and it needs no git.
    """
    lines = (root / ".gitignore").read_text(encoding="utf-8").splitlines()
    skipped = [".git", *(line.rstrip("/") for line in lines if line)]
    found = []
    for folder, names, here in os.walk(root):
        names[:] = [name for name in names if not _is_any(name, skipped)]
        found += [Path(folder, name) for name in here if not _is_any(name, skipped)]
    return sorted(file.relative_to(root) for file in found)


def _is_any(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def copy(target: Path, root: Path = ROOT) -> Path:
    """Copies what belongs to the course into a folder; returns the folder."""
    for name in files(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name)
    return target


def file_name(root: Path = ROOT) -> str:
    """The archive's name, which says what it is for: …-python-3.11-on-linux-x86_64.zip."""
    system = re.sub(r"[^a-z0-9._]+", "-", course.system().lower())
    return f"{FOLDER}-{course.read_project(root)['version']}-{system}.zip"


def write(target: Path) -> Path:
    """Writes the archive beside `target` and renames it; about a gigabyte, in some minutes.

    Raises:
        BundleError: pip could not fetch a package.
        AssetError: a model or data set could not be fetched.
        OSError: a folder that cannot be written, or a full disk; an older archive is kept.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bundle.", dir=target.parent) as scratch:
        offline = Path(scratch) / course.OFFLINE
        wheels(offline / "wheels")
        (offline / "archives").mkdir()
        for name in assets.assets():
            shutil.copy(assets.fetch(name), offline / "archives")
        describe(offline)
        course.say(f"Writing {target}")
        _pack(offline, Path(scratch) / target.name)
        os.replace(Path(scratch) / target.name, target)
    return target


def _pack(offline: Path, archive: Path) -> None:
    """The course's own files, and the folder `offline` with what it needs."""
    packed = {file: ROOT / file for file in files()}
    fetched = [file for file in sorted(offline.rglob("*")) if file.is_file()]
    packed |= {file.relative_to(offline.parent): file for file in fetched}
    with zipfile.ZipFile(archive, "w") as opened:
        for inside, file in packed.items():
            kind = zipfile.ZIP_STORED if file.suffix in STORED else zipfile.ZIP_DEFLATED
            opened.write(file, Path(FOLDER, inside), kind)


def wheels(folder: Path) -> None:
    """Fills a folder with every package of pyproject.toml as a wheel, in the tested versions.

    Raises:
        BundleError: pip failed; its words are shown as they come.
    """
    course.say("Fetching every package as a wheel")
    needed = course.requirements(ROOT) + course.requirements_of("site", ROOT)
    command = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-input"]
    command += ["--constraint", str(ROOT / "constraints.txt"), "--wheel-dir", str(folder), *needed]
    if subprocess.run(command).returncode:
        raise BundleError("pip could not fetch all packages (its message is above).")


def describe(offline: Path) -> None:
    """Writes beside the wheels what they are for, and the SHA-256 that course.py compares."""
    sums = {file.name: assets.sha256(file) for file in sorted((offline / "wheels").iterdir())}
    text = json.dumps({"system": course.system(), "wheels": sums}, indent=1)
    (offline / course.BUNDLE).write_text(text + "\n", encoding="utf-8")


# --- Does it do what it is for? -----------------------------------------------------------------


def check(archive: Path, *, tests: bool = False) -> dict[str, float]:
    """Unpacks an archive, cuts the network, trains the first adapter; the seconds that each took.

    The cache is empty and the network really gone: `unshare` gives the commands a network
    namespace of their own. "first adapter" is the whole lesson that trains it.

    Raises:
        BundleError: a step failed, or this system cannot cut the network off.
    """
    _can_cut_off()
    with tempfile.TemporaryDirectory(prefix="bundle check ") as scratch:
        course.say(f"Unpacking {archive.name}")
        with zipfile.ZipFile(archive) as file:
            file.extractall(scratch)
        folder, seconds = Path(scratch, FOLDER), {}
        for name, command in _steps(folder, tests).items():
            course.say(name)
            started = time.monotonic()
            with _trying(name, archive):
                subprocess.run(
                    namespaces.cut_off(command), cwd=folder, env=_bare(Path(scratch)), check=True
                )
            seconds[name] = time.monotonic() - started
    return seconds


def _steps(folder: Path, tests: bool) -> dict[str, list[str]]:
    """What a learner does, in order; the last one only when somebody asks for it."""
    base = getattr(sys, "_base_executable", "") or sys.executable
    own = str(course.venv_python(folder / ".venv"))
    no_network = "import socket; socket.create_connection(('1.1.1.1', 53), timeout=3)"
    steps = {
        "no network": ["sh", "-c", f'! {base} -c "{no_network}" 2>/dev/null'],
        "set up": [base, "course.py", "models"],
        "first adapter": [own, "-m", "helpers.notebooks", FIRST_ADAPTER],
        "JupyterLab answers": [own, "-c", _LAB],
    }
    return {**steps, "make test": [base, "course.py", "test"]} if tests else steps


# Starts what `make lab` starts, and opens the address that it prints, a little before it listens.
_LAB = """
import re, subprocess, sys, time, urllib.request
lab = subprocess.Popen([sys.executable, "course.py", "--no-venv", "lab", "--", "--no-browser"],
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
try:
    lines = iter(lab.stdout.readline, "")
    found = (re.search(r"http://localhost:\\d+/lab\\S*token=\\w+", line) for line in lines)
    address = next(filter(None, found))[0]
    for _ in range(60):
        try:
            sys.exit(urllib.request.urlopen(address).status != 200)
        except OSError:
            time.sleep(1)
    sys.exit(f"{address} does not answer")
finally:
    lab.terminate()
"""


def _can_cut_off() -> None:
    if reason := namespaces.refusal():
        raise BundleError(
            "The check cuts the network with `unshare --net` and `ip`, which needs a Linux that "
            f"lets you ({reason}): take one, or pull the plug and run the two commands by hand."
        )


def _bare(scratch: Path) -> dict[str, str]:
    """Environment variables of somebody who has never run the course, nor set up pip."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PEFT_", "VIRTUAL_"))}
    kept.pop("PYTHONPATH", None)
    return {**kept, "PEFT_MEASURED_CACHE": str(scratch / "cache"), "PIP_CONFIG_FILE": os.devnull}


@contextmanager
def _trying(name: str, archive: Path) -> Iterator[None]:
    try:
        yield
    except subprocess.CalledProcessError as error:
        raise BundleError(f"{archive.name} failed at {name!r} (its message is above).") from error


# --- The command line ----------------------------------------------------------------------------


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.bundle",
        description="Write the course as one archive that needs no network, or check one.",
    )
    parser.add_argument("what", nargs="?", choices=["write", "check"], default="write")
    default = ROOT / "build" / file_name()
    parser.add_argument("file", nargs="?", type=Path, default=default, help=f"{default.name}")
    parser.add_argument(
        "--tests", action="store_true", help="check: the whole of `make test` too (25 minutes)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 when the archive stands, or does what it is for."""
    chosen = _arguments(arguments)
    try:
        if chosen.what == "write":
            size = write(chosen.file).stat().st_size
            print(f"{chosen.file} ({size / 1e9:.2f} GB), for {course.system()}")
            return 0
        if not zipfile.is_zipfile(chosen.file):
            raise BundleError(f"{chosen.file} is no bundle: write one with `make bundle`.")
        for name, seconds in check(chosen.file, tests=chosen.tests).items():
            print(f"{seconds:7.1f} s  {name}")
    except (BundleError, assets.AssetError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; nothing is left half written.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
