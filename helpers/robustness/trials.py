"""One lesson under hardship: in a copy of the checkout, and compared as `make test` compares.

The kernel runs as the learner's does; nbval decides whether each checked output is the stored one.
Nothing is written into the checkout itself.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

import course
from helpers import assets, bundle, namespaces
from helpers.robustness.memory import Peak, descendants, size

CHECKOUT = bundle.ROOT
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of a traceback
GRACE = 5.0  # seconds in which what a dead kernel had started may end by itself


@dataclass(frozen=True)
class Hardship:
    """How a lesson is run.

    Attributes:
        name: its column in the table.
        threads: for torch, numpy and every other library that reads OMP_NUM_THREADS.
        hash_seed: PYTHONHASHSEED, which decides in which order Python walks through a set.
        cut_off: no network but the machine's own, and checkout and cache that are read-only.
        killed_before: a first run's kernel is killed in the middle, in the same folders.
        full_disk: temporary files lie on a disk that is too small, and the lesson has to stop.
    """

    name: str
    threads: int
    hash_seed: int
    cut_off: bool = False
    killed_before: bool = False
    full_disk: bool = False

    def in_words(self) -> str:
        """One line that says what the lesson has to bear."""
        if self.full_disk:
            return (
                "the disk for temporary files has no room; the lesson must stop in its set-up cell "
                "with a sentence that says so, and the stored notebook must stay as it is"
            )
        parts = [f"{self.threads} thread{'s' * (self.threads > 1)}"]
        parts += [f"PYTHONHASHSEED={self.hash_seed}"]
        if self.cut_off:
            parts += ["no network but the machine's own address", "checkout and cache read-only"]
        if self.killed_before:
            parts += ["after a run whose kernel was killed in the middle, in the same folders"]
        if self == AGAIN:
            parts += ["in the folders of the run before it"]
        return ", ".join(parts)


# The last two share a copy and a folder for temporary files: the second finds what the first left.
CUT_OFF = Hardship("cut off", threads=1, hash_seed=1, cut_off=True)
KILLED = Hardship("after a kill", threads=4, hash_seed=3, killed_before=True)
AGAIN = Hardship("once more", threads=2, hash_seed=2)
FULL = Hardship("full disk", threads=2, hash_seed=2, full_disk=True)
EVERY = (CUT_OFF, KILLED, AGAIN, FULL)
FULL_MEGABYTES = 8  # the kernel starts in it; no lesson does


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    Attributes:
        seconds: of the whole run, with the kernel's start.
        memory: peak bytes of the kernel and of what it started, see `memory.Peak`.
        disk: peak bytes of temporary files, less those that an earlier run had left.
        cells: how many cells ran to their end and gave the stored output, where it is checked.
        broken: what did not survive; empty when all did.
        details: nbval's message for each cell that differs.
    """

    seconds: float
    memory: int
    disk: int
    cells: int
    broken: tuple[str, ...]
    details: str = ""


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder with a copy of the checkout in `checkout`, and an empty `tmp`; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="robustness-") as name:
        folder = Path(name)
        bundle.copy(folder / "checkout", CHECKOUT)
        (folder / "tmp").mkdir()
        yield folder


def attempt(lesson: str, hardship: Hardship, folder: Path) -> Outcome:
    """Runs a lesson under a hardship in a `scratch` folder, and looks at what it leaves behind.

    Args:
        lesson: the notebook's name without its ending.
    """
    notebook = folder / "checkout" / "notebooks" / f"{lesson}.ipynb"
    before = _files(folder / "checkout") | half_written(assets.cache_dir())
    broken = []
    if hardship.killed_before:
        broken += kill_in_the_middle(notebook, variables(hardship, folder))
    outcome = (stopped if hardship.full_disk else run)(notebook, hardship, folder)
    after = _files(folder / "checkout") | half_written(assets.cache_dir())
    broken += [f"changed {name}" for name in sorted({name for name, *_ in before ^ after})]
    return replace(outcome, broken=(*broken, *outcome.broken))


def run(notebook: Path, hardship: Hardship, folder: Path) -> Outcome:
    """One pytest with nbval over one notebook, with the conftest.py of its checkout."""
    checkout, report = notebook.parent.parent, folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval"]
    command += ["--nbval-current-env", f"--junitxml={report}", str(notebook)]
    if hardship.cut_off:
        command = namespaces.cut_off(command, [checkout, assets.cache_dir()])
    left = size(folder / "tmp")
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=checkout,
        env=variables(hardship, folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    with Peak(process.pid, folder / "tmp") as peak:
        words = process.communicate()[0]
    seconds = time.perf_counter() - started
    cells, broken, details = read(report) if report.exists() else (0, ("did not start",), words)
    return Outcome(seconds, peak.memory, max(0, peak.disk - left), cells, broken, details)


def stopped(notebook: Path, hardship: Hardship, folder: Path) -> Outcome:
    """Stores a lesson again, as `make notebooks` does, with no room for its temporary files."""
    command = [sys.executable, "-m", "helpers.notebooks", notebook.stem]
    started = time.perf_counter()
    done = subprocess.run(
        namespaces.on_small_disk(command, folder / "tmp", FULL_MEGABYTES),
        cwd=notebook.parent.parent,
        env=variables(hardship, folder),
        capture_output=True,
        text=True,
        errors="replace",
    )
    broken = () if done.returncode == 1 else (f"ended with {done.returncode}",)
    if f"NoRoom: Lesson {notebook.stem[:2]} writes up to" not in COLOURS.sub("", done.stderr):
        broken += ("did not say that there is no room",)
    seconds = time.perf_counter() - started
    return Outcome(seconds, 0, 0, 0, broken, done.stdout + done.stderr)


def read(report: Path) -> tuple[int, tuple[str, ...], str]:
    """Cells that passed, names of those that did not, and nbval's messages, of a JUnit report."""
    passed, broken, details = 0, [], []
    for case in ET.parse(report).getroot().iter("testcase"):
        wrong = [one for kind in ("failure", "error", "skipped") for one in case.findall(kind)]
        passed += not wrong
        if wrong:
            broken.append(case.get("name", "").lower())
            details += [f"{case.get('name')}: {one.text or one.get('message')}" for one in wrong]
    if not passed and not broken:
        broken.append("has no cells")
    return passed, tuple(broken), "\n".join(details)


def variables(hardship: Hardship, folder: Path) -> dict[str, str]:
    """The environment of pytest and of the kernel; `helpers` is the copy's."""
    number = str(hardship.threads)
    return {
        **course.variables(Path(sys.executable)),
        "PYTHONPATH": str(folder / "checkout"),
        "PYTHONHASHSEED": str(hardship.hash_seed),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": number,
        "MKL_NUM_THREADS": number,
        "TMPDIR": str(folder / "tmp"),
        "HF_HUB_OFFLINE": "1",
    }


def kill_in_the_middle(notebook: Path, env: dict[str, str]) -> list[str]:
    """Runs a notebook, kills its kernel one second into the middle cell; returns what is broken.

    The file is not written: only a run that comes to its end would be stored.
    """
    cells = nbformat.read(notebook, as_version=4)
    middle = [i for i, cell in enumerate(cells.cells) if cell.cell_type == "code"]
    middle = middle[len(middle) // 2]
    children: list[psutil.Process] = []

    def strike(pid: int) -> None:
        kernel = psutil.Process(pid)
        children.extend(descendants(kernel))
        kernel.send_signal(signal.SIGKILL)

    def before_a_cell(cell: nbformat.NotebookNode, cell_index: int) -> None:
        if cell_index == middle:
            pid = client.km.provisioner.process.pid
            threading.Timer(1.0, strike, (pid,)).start()

    client = NotebookClient(
        cells,
        kernel_name="python3",
        resources={"metadata": {"path": str(notebook.parent)}},
        on_cell_execute=before_a_cell,
    )
    try:
        client.execute(env=env)
    except DeadKernelError:
        return _still_running(children)
    return ["the kernel was not killed"]


def _still_running(children: list[psutil.Process]) -> list[str]:
    """What a dead kernel had started and left; it is ended here."""
    _, alive = psutil.wait_procs(children, timeout=GRACE)
    left = [f"left running: {process.name()}" for process in alive]
    for process in alive:
        process.kill()
    return left


def half_written(cache: Path) -> set[tuple[str, int, int]]:
    """What a killed process has left in the cache, which others may be using meanwhile."""
    return {(file.name, 0, 0) for file in cache.glob("*/.*.part*")}


def _files(folder: Path) -> set[tuple[str, int, int]]:
    """Name, bytes and time of change of every file; compiled code does not count."""
    found = (file for file in folder.rglob("*") if file.suffix != ".pyc")
    states = ((file, file.stat()) for file in found if file.is_file())
    return {
        (file.relative_to(folder).as_posix(), state.st_size, state.st_mtime_ns)
        for file, state in states
    }
