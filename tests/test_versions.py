"""The edges of what is supported: what is installed for them, and what is printed of a run."""

import sys
from pathlib import Path

import pytest

import course
from helpers import outcomes, versions


@pytest.mark.parametrize("edge", versions.EDGES)
def test_an_edge_replaces_only_its_own_lines(edge: str) -> None:
    locked = (course.CHECKOUT / "constraints.txt").read_text(encoding="utf-8")
    own = (course.CHECKOUT / f"constraints-{edge}.txt").read_text(encoding="utf-8")
    names = {line.split("==")[0] for line in own.splitlines() if not line.startswith("#")}
    merged = versions.constraints(edge).splitlines()
    assert {line for line in own.splitlines() if "==" in line} <= set(merged)
    assert len(merged) == sum("==" in line for line in locked.splitlines())
    assert any(line.startswith("numpy==") for line in merged) and "torch" in names


def test_what_pytest_reports_is_told_and_its_status_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    test = tmp_path / "test_x.py"
    test.write_text("def test_x():\n    assert 1 == 2\n\ndef test_y():\n    pass\n")
    words = ["-q", "-p", "no:cacheprovider", str(test)]
    status, found = versions.run_tests(Path(sys.executable), words, tmp_path / "made" / "x.xml")
    assert status == 1 and [case.kind for case in found] == ["failed", "passed"]
    assert versions.exit_status(status, found) == 1
    row = versions.row("oldest", {"torch": "2.8.0", "peft": "0.21.0"}, found)
    assert row.startswith("| the oldest: torch 2.8.0, peft 0.21.0 | 1 passed, 0 worded anew, 1 f")


def test_other_words_alone_are_no_failure_but_a_stopped_pytest_is() -> None:
    fine = [outcomes.Case("notebooks/01", "a", "passed"), outcomes.Case("b", "b", "worded anew")]
    assert versions.exit_status(1, fine) == 0
    assert versions.exit_status(1, [*fine, outcomes.Case("c", "c", "failed")]) == 1
    assert versions.exit_status(2, fine) == 2  # interrupted
    assert versions.exit_status(0, []) == 1  # no report: nothing is known


def test_what_it_takes_is_said_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(edge: str) -> Path:
        assert "3 GB to download" in capsys.readouterr().out
        raise KeyboardInterrupt

    monkeypatch.setattr(versions, "environment", interrupted)
    assert versions.main(["oldest"]) == 130
    assert capsys.readouterr().err == "Stopped; the same command goes on.\n"
    with pytest.raises(SystemExit, match="0"):
        versions.main(["--help"])
    assert "half an hour" in " ".join(capsys.readouterr().out.split())


def test_an_unknown_edge_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        versions.main(["eldest"])
    assert "choose from" in capsys.readouterr().err


def test_what_stops_a_set_up_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(edge: str) -> Path:
        raise course.SetupError("no disk")

    monkeypatch.setattr(versions, "environment", refuse)
    assert versions.main(["newest"]) == 1
    assert capsys.readouterr().err == "no disk\n"


def test_a_full_disk_is_said_before_anything_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = course.shutil._ntuple_diskusage(10**12, 10**12 - 10**9, 10**9)
    monkeypatch.setattr(course.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(versions, "place", lambda edge: tmp_path / edge)
    assert versions.main(["oldest"]) == 1
    assert "Only 1.0 GB are free" in capsys.readouterr().err
    assert not (tmp_path / "oldest" / ".venv").exists()
