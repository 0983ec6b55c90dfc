"""A lesson says before it starts what it will lack, and says nothing where there is enough."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from helpers import checks, notebooks

module = importlib.import_module("helpers.checks.room")  # the name itself is the function's

TABLE = "lesson,memory_gb,disk_gb\n03_memory,3.5,0.2\n03_memory,4.2,0.1\n04_dora,1.0,0.0\n"
LESSONS = notebooks.find([])


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that fakes the free memory and the free disk, in GB."""
    table = tmp_path / "measured.csv"
    table.write_text(TABLE)
    needs = module.needs
    monkeypatch.setattr(module, "needs", lambda lesson: needs(lesson, table))
    monkeypatch.setattr(module, "_own_groups", list)

    def fake(memory: float, disk: float) -> None:
        found = SimpleNamespace(available=memory * 1e9)
        monkeypatch.setattr(module.psutil, "virtual_memory", lambda: found)
        free = SimpleNamespace(free=disk * 1e9)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda place: free)

    return fake


def test_enough_is_silent(machine, capsys) -> None:
    machine(memory=4.3, disk=0.23)
    checks.room("03")
    assert capsys.readouterr() == ("", "")


def test_too_little_memory_is_said_in_one_sentence_and_nowhere_that_is_compared(
    machine, capsys
) -> None:
    machine(memory=4.0, disk=1)
    checks.room("03")
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "takes up to 4.2 GB of memory, and 4.0 GB are free" in err
    checks.room("04")  # the same machine does for another lesson
    assert capsys.readouterr() == ("", "")


def test_too_little_disk_stops_the_lesson(machine) -> None:
    machine(memory=8, disk=0.1)
    with pytest.raises(checks.NoRoom, match=r"up to 0\.22 GB .* 0\.10 GB are free in .*TMPDIR"):
        checks.room("03")
    checks.room("04")


def test_a_lesson_that_somebody_is_writing_is_not_stopped(machine, capsys) -> None:
    machine(memory=0.1, disk=0.1)
    checks.room("11")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, float("inf")),
        ({"memory.max": "max\n", "memory.current": "100"}, float("inf")),
        ({"memory.max": "4000", "memory.current": "1000"}, 3000),
        ({"memory.limit_in_bytes": "4000", "memory.usage_in_bytes": "1000"}, 3000),
        ({"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": "1"}, float("inf")),
        (
            {"memory.max": "4000", "memory.current": "1000", "memory.stat": "inactive_file 600\n"},
            3600,
        ),
    ],
)
def test_a_container_s_limit_counts_from_any_group_above(tmp_path: Path, files, free) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for name, text in files.items():
        (inner.parent / name).write_text(text)
    assert module.free_in_groups(tmp_path, [inner]) == free


def test_this_machine_has_some_memory() -> None:
    assert 0 < module.free_memory() < 1e14


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem[:2])
def test_each_lesson_asks_for_its_own_room_before_anything_else_runs(path: Path) -> None:
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert re.findall(r'checks\.room\("(\d\d)"\)', "\n".join(cells)) == [path.stem[:2]]
    assert "checks.room(" in cells[1], "it belongs into the set-up cell, the first after Colab's"


def stated(path: Path, what: str) -> list[float]:
    """The GB of memory or of disk that a lesson names under "You need"."""
    (text,) = [
        cell.source.split("## You need")[1]
        for cell in nbformat.read(path, as_version=4).cells
        if "## You need" in cell.source
    ]
    return [float(number) for number in re.findall(rf"([\d.]+) GB of (?:free )?{what}", text)]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem[:2])
def test_what_a_lesson_says_it_needs_is_what_was_measured(path: Path) -> None:
    took = {name: amount / 1e9 for name, amount in module.needs(path.stem[:2]).items()}
    if not took["memory"]:
        pytest.skip(f"not measured yet: python -m helpers.robustness {path.stem[:2]}")
    (memory,) = stated(path, "memory")
    assert took["memory"] <= memory <= took["memory"] + 2, f"it took {took['memory']:.2f} GB"
    disk = [round(took["disk"], 1)] if took["disk"] >= 0.5 else []
    assert stated(path, "disk") == disk, f"it wrote {took['disk']:.2f} GB"


def test_the_disk_that_the_readme_asks_for_holds_what_it_lists() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"\| Free disk \| (.*) \|", readme)
    total, packages, models = map(float, re.findall(r"([\d.]+) GB", row))
    written = max(module.needs(path.stem[:2])["disk"] for path in LESSONS) / 1e9
    assert packages + models + written <= total
