"""Does every lesson survive what happens to learners? Each is run under three hardships.

`python -m helpers.robustness [NAME …]` runs the lessons in scratch copies, compares their outputs
with the stored ones as `make test` does, and writes `docs/robustness.md` and, with the memory that
each lesson took, `data/lesson_memory.csv`. It needs Linux, and takes half an hour on two cores.
"""

import argparse
import csv
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from helpers import bundle, notebooks, versions
from helpers.atomic import put_text

ROOT = bundle.ROOT
PAGE = ROOT / "docs" / "robustness.md"
MEMORY = ROOT / "data" / "lesson_memory.csv"
LIMIT = 4 * 10**9  # bytes: a small machine
EVERY = 0.2  # seconds between two looks at the memory
CGROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))  # version 1, version 2


class HardshipError(RuntimeError):
    """This machine cannot make a hardship; the message says what is missing."""


@dataclass(frozen=True)
class Outcome:
    """How a lesson fared: what failed ("" for nothing), seconds, peak bytes of its processes."""

    failed: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Hardship:
    """What a lesson has to survive; `run` gets a scratch checkout and the lesson's name."""

    name: str
    run: Callable[[Path, str], Outcome]


# --- The hardships -------------------------------------------------------------------------------


def alone(checkout: Path, lesson: str) -> Outcome:
    """One thread, no network but the loopback, and a checkout that cannot be written."""
    read_only = 'mount --bind "$PWD" "$PWD" && mount -o remount,ro,bind "$PWD" && cd "$PWD" && '
    script = f'ip link set lo up && {read_only}exec "$@"'
    cut_off = ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c", script, "sh"]
    return compared(checkout, lesson, cut_off, threads=1, hash_seed=1)


def again(checkout: Path, lesson: str) -> Outcome:
    """Two threads, within four gigabytes, and twice from a fresh kernel."""
    with within(LIMIT) as prefix:
        first = compared(checkout, lesson, prefix, threads=2, hash_seed=2)
        second = compared(checkout, lesson, prefix, threads=2, hash_seed=2)
    return Outcome(
        first.failed or second.failed,
        first.seconds + second.seconds,
        max(first.peak_bytes, second.peak_bytes),
    )


def killed(checkout: Path, lesson: str) -> Outcome:
    """Four threads; the kernel dies in the middle, then the lesson is run again."""
    before = {file: file.read_bytes() for file in _beside(checkout)}
    code = "import sys, pathlib; from helpers import notebooks; "
    code += "notebooks.execute(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(checkout / "notebooks" / f"{lesson}.ipynb")]
    with subprocess.Popen(
        command, cwd=checkout, env=_variables(checkout, 4, 3), stderr=subprocess.PIPE, text=True
    ) as program:
        _kill_kernel(program)
        words = program.communicate()[1]
    if "DeadKernelError" not in words:
        return Outcome(f"the killed kernel was not noticed: {words.strip()[-200:]}", 0.0, 0)
    if {file: file.read_bytes() for file in _beside(checkout)} != before:
        return Outcome("the kill left another file, or changed one", 0.0, 0)
    return compared(checkout, lesson, [], threads=4, hash_seed=3)


HARDSHIPS = (
    Hardship("1 thread, no network, read-only folder", alone),
    Hardship("2 threads, 4 GB of memory, run twice", again),
    Hardship("4 threads, kernel killed, run again", killed),
)


def _beside(checkout: Path) -> list[Path]:
    return sorted(file for file in (checkout / "notebooks").rglob("*") if file.is_file())


def _kill_kernel(program: subprocess.Popen, after: float = 6.0) -> None:
    """Kill the kernel that a program starts, so many seconds after it was there."""
    while program.poll() is None:
        if kernels := _kernels(program.pid):
            time.sleep(after)
            kernels[0].kill()
            return
        time.sleep(EVERY)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def within(limit: int) -> Iterator[list[str]]:
    """The words before a command that let it have so many bytes of memory and no more.

    Raises:
        HardshipError: this user may not make a control group.
    """
    root = next(each for each in CGROUPS if (each / "cgroup.procs").exists())
    name = "memory.limit_in_bytes" if root.name == "memory" else "memory.max"
    group = root / f"peft-measured-{os.getpid()}-{time.monotonic_ns()}"
    try:
        group.mkdir()
        (group / name).write_text(str(limit))
    except OSError as error:
        raise HardshipError(f"no control group with {limit} bytes can be made: {error}") from error
    try:
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    for _ in range(50):  # its last process may still be on its way out
        try:
            return group.rmdir()
        except OSError:
            time.sleep(0.1)


# --- One run -------------------------------------------------------------------------------------


def compared(
    checkout: Path, lesson: str, prefix: list[str], *, threads: int, hash_seed: int
) -> Outcome:
    """Run a lesson from a fresh kernel and compare its outputs with the stored ones."""
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "--nbval", "--nbval-current-env"]
    command += ["-p", "no:cacheprovider", f"notebooks/{lesson}.ipynb"]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        program = subprocess.Popen(
            command,
            cwd=checkout,
            env=_variables(checkout, threads, hash_seed),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        peak = _watch(program)
        log.seek(0)
        words = log.read()
    failed = [line for line in words.splitlines() if line.startswith(("FAILED", "ERROR"))]
    problem = "; ".join(failed)[:300] or words.strip()[-300:] if program.returncode else ""
    return Outcome(problem, time.monotonic() - started, peak)


def _watch(program: subprocess.Popen) -> int:
    """Waits; the largest sum of bytes that the kernel and what it started have held."""
    peak = 0
    while program.poll() is None:
        peak = max(peak, sum(_resident(process) for process in _kernels(program.pid)))
        time.sleep(EVERY)
    return peak


def _kernels(pid: int) -> list[psutil.Process]:
    try:
        below = psutil.Process(pid).children(recursive=True)
        kernels = [p for p in below if "ipykernel_launcher" in " ".join(_words(p))]
        return kernels + [child for kernel in kernels for child in kernel.children(recursive=True)]
    except psutil.Error:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _variables(checkout: Path, threads: int, hash_seed: int) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONHASHSEED": str(hash_seed),
        "PYTHONPATH": str(checkout),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
    }


# --- All of them ---------------------------------------------------------------------------------


def run(lesson: str, hardship: Hardship) -> Outcome:
    """One lesson under one hardship, in a copy of the course that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="robustness-") as scratch:
        for name in bundle.files():
            (Path(scratch) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(scratch) / name)
        outcome = hardship.run(Path(scratch), lesson)
    print(f"{lesson}: {hardship.name}: {cell(outcome)}", flush=True)
    return outcome


def cell(outcome: Outcome) -> str:
    """An outcome in a table."""
    if outcome.failed:
        return f"failed: {outcome.failed}"
    return f"passed, {outcome.seconds:.0f} s"


def page(outcomes: dict[str, list[Outcome]]) -> str:
    """The table in Markdown: a row for each lesson, a column for each hardship."""
    found = versions.installed(Path(sys.executable))
    lines = [
        "# What each lesson survives",
        "",
        "Written by `python -m helpers.robustness`. Passed means: it ran from a fresh kernel to "
        "its end, and its outputs were the stored ones, compared as `make test` does. Two lessons "
        "ran at a time on two cores; memory is the most that the kernel and its children held.",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in found.items()) + ".",
        "",
        "| lesson | " + " | ".join(each.name for each in HARDSHIPS) + " | memory |",
        "|---" * (len(HARDSHIPS) + 2) + "|",
    ]
    for lesson, row in outcomes.items():
        memory = f"{max(each.peak_bytes for each in row) / 1e9:.1f} GB"
        lines.append(" | ".join([f"| {lesson}", *map(cell, row), memory]) + " |")
    return "\n".join(lines) + "\n"


def memory(outcomes: dict[str, list[Outcome]]) -> str:
    """The lessons' memory as a table for programs: lesson, peak in bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["lesson", "peak_bytes"])
    for lesson, row in outcomes.items():
        writer.writerow([lesson[:2], max(each.peak_bytes for each in row)])
    return text.getvalue()


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 when every lesson survived everything."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.robustness",
        description="Run every lesson under hardship (Linux, as root); half an hour on two cores.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help='such as "01"; default: all')
    chosen = parser.parse_args(arguments)
    try:
        lessons = [path.stem for path in notebooks.find(chosen.names)]
        with within(LIMIT):
            pass  # said before anything runs
        with ThreadPoolExecutor(2) as pool:
            futures = {n: [pool.submit(run, n, each) for each in HARDSHIPS] for n in lessons}
        outcomes = {name: [each.result() for each in row] for name, row in futures.items()}
    except (ValueError, HardshipError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; nothing was stored.", file=sys.stderr)
        return 130
    if chosen.names:
        print(page(outcomes))
    else:
        put_text(PAGE, page(outcomes))
        put_text(MEMORY, memory(outcomes))
    return int(any(each.failed for row in outcomes.values() for each in row))


if __name__ == "__main__":
    sys.exit(main())
