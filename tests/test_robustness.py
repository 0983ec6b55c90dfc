"""The command that runs lessons under hardship sees each kind of damage that it looks for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers import namespaces
from helpers.robustness import __main__ as command
from helpers.robustness import memory, stored, trials

ROOT = Path(__file__).resolve().parent.parent
NEEDS_UNSHARE = pytest.mark.skipif(
    bool(namespaces.refusal()), reason="this system does not allow `unshare -rnm`"
)
SURVIVED = trials.Outcome(12.4, 3_210_000_000, 55_000_000, 14, ())


def notebook(path: Path, *cells: tuple[str, str]) -> Path:
    """A notebook with code cells, each with what its stored output prints."""
    made = [
        new_code_cell(
            source, execution_count=i, outputs=[new_output("stream", text=text)] if text else []
        )
        for i, (source, text) in enumerate(cells, start=1)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=made), path)
    return path


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of one lesson, whose cache is empty, too."""
    made = tmp_path / "a checkout"
    (made / "tests").mkdir(parents=True)
    for name in (".gitignore", "conftest.py", "pyproject.toml", "tests/nbval_sanitize.cfg"):
        shutil.copy(ROOT / name, made / name)
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("PEFT_MEASURED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trials, "CHECKOUT", made)
    return made


OFFLINE = """
import socket
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
except OSError as error:
    print(type(error).__name__, error.errno)
"""
READ_ONLY = """
from pathlib import Path
try:
    Path("written").touch()
except OSError as error:
    print(error.strerror)
"""
SETTINGS = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['PYTHONHASHSEED'])"


@NEEDS_UNSHARE
def test_a_lesson_is_cut_off_and_compared(checkout: Path) -> None:
    notebook(
        checkout / "notebooks" / "00_a.ipynb",
        (OFFLINE, "OSError 101\n"),  # the network is unreachable, which no firewall would say
        (READ_ONLY, "Read-only file system\n"),
        (SETTINGS, "1 1\n"),
        ("print('other')", "stored\n"),
    )
    with trials.scratch() as folder:
        outcome = trials.attempt("00_a", trials.CUT_OFF, folder)
    assert (outcome.cells, outcome.broken) == (3, ("cell 3",)), outcome.details
    assert outcome.memory > 20e6 and "stored" in outcome.details


def test_a_kernel_is_killed_and_what_it_leaves_is_seen(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trials, "GRACE", 0.2)
    start = "import subprocess, sys\n"
    start += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    path = notebook(tmp_path / "a.ipynb", (start, ""), ("import time; time.sleep(60)", ""))
    before = path.read_bytes()
    (left,) = trials.kill_in_the_middle(path, dict(os.environ))
    assert left.startswith("left running: python") and path.read_bytes() == before


def test_a_notebook_that_is_over_before_the_kill_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trials, "NotebookClient", lambda *_, **__: subprocess_like())
    path = notebook(tmp_path / "a.ipynb", ("1", ""))
    assert trials.kill_in_the_middle(path, {}) == ["the kernel was not killed"]


def subprocess_like():
    class Client:
        def execute(self, env: dict) -> None: ...

    return Client()


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ('<testcase name="Cell 0"/>', (1, ())),
        ('<testcase name="Cell 0"/><testcase name="Cell 1"><failure>x</failure></testcase>',
         (1, ("cell 1",))),
        ('<testcase name="Cell 0"><error>x</error></testcase>', (0, ("cell 0",))),
        ('<testcase name="Cell 0"><skipped>dead kernel</skipped></testcase>', (0, ("cell 0",))),
        ("", (0, ("has no cells",))),
    ],
)  # fmt: skip
def test_a_report_is_read(case: str, found: tuple, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    assert trials.read(report)[:2] == found


def test_changed_files_and_halves_are_seen(checkout: Path, monkeypatch) -> None:
    notebook(checkout / "notebooks" / "00_a.ipynb", ("1", ""))

    def run(path: Path, *_: object) -> trials.Outcome:
        path.write_text("damaged")
        (path.parent / "new").touch()
        (trials.assets.cache_dir() / "models").mkdir()
        (trials.assets.cache_dir() / "models" / ".smollm2.1.part").touch()
        return SURVIVED

    monkeypatch.setattr(trials, "run", run)
    with trials.scratch() as folder:
        broken = trials.attempt("00_a", trials.AGAIN, folder).broken
    names = [".smollm2.1.part", "notebooks/00_a.ipynb", "notebooks/new"]
    assert list(broken) == [f"changed {name}" for name in names]


def test_memory_of_a_child_is_seen(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    code = "held = bytearray(80_000_000); import time; time.sleep(0.7)"
    shell = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    process = subprocess.Popen([sys.executable, "-c", shell, code])
    with memory.Peak(process.pid, tmp_path) as peak:
        process.wait()
    assert 80e6 < peak.memory < 300e6 and peak.disk == 1000


def test_a_run_replaces_the_one_before_it_and_the_page_shows_both_kinds(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    broken = trials.Outcome(9, 10**9, 0, 3, ("cell 4",))
    stored.put("01_a", trials.KILLED, broken, table)
    stored.put("00_b", trials.CUT_OFF, broken, table)
    rows = stored.put("00_b", trials.CUT_OFF, SURVIVED, table)
    assert stored.load(table)[["lesson", "seconds", "broken"]].to_numpy().tolist() == [
        ["00_b", 12, ""],
        ["01_a", 9, "cell 4"],
    ]
    assert stored.done(table) == {("00_b", "cut off")}
    page = stored.page(rows, ["a text"])
    assert "| 00_b | 12 | – |" in page and "| 01_a | – | broken: cell 4 |" in page
    assert "| 00_b | 3.21 | 0.055 |" in page and "a text" in page


def test_the_line_says_what_broke() -> None:
    good, bad = (
        command.line("00", trials.AGAIN, trials.Outcome(1, 0, 0, 2, broken, "why"))
        for broken in ((), ("cell 4",))
    )
    assert good.endswith("survived") and bad.endswith("cell 4\nwhy")


def test_the_stored_page_is_that_of_the_stored_table() -> None:
    from helpers.robustness import disk

    page = stored.page(stored.load(), disk.writers())
    assert stored.PAGE.read_text(encoding="utf-8") == page, (
        "run `python -m helpers.robustness page`"
    )


def test_an_unknown_lesson_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(["peft_basic"])
    assert "did you mean '01_peft_basics'" in capsys.readouterr().err
