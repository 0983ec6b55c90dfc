"""The edges of what is supported: what is installed for them, and what is printed of a run."""

import sys
from pathlib import Path

import pytest

import course
from helpers import versions


@pytest.mark.parametrize("edge", versions.EDGES)
def test_an_edge_replaces_only_its_own_lines(edge: str) -> None:
    locked = (course.CHECKOUT / "constraints.txt").read_text(encoding="utf-8")
    own = (course.CHECKOUT / f"constraints-{edge}.txt").read_text(encoding="utf-8")
    names = {line.split("==")[0] for line in own.splitlines() if not line.startswith("#")}
    merged = versions.constraints(edge).splitlines()
    assert {line for line in own.splitlines() if "==" in line} <= set(merged)
    assert len(merged) == sum("==" in line for line in locked.splitlines())
    assert any(line.startswith("numpy==") for line in merged) and "torch" in names


def test_pytests_closing_line_and_status_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "test_x.py").write_text("def test_x():\n    assert False\n")
    status, closing = versions.run_tests(
        Path(sys.executable), ["-q", "-p", "no:cacheprovider", str(tmp_path / "test_x.py")]
    )
    assert status == 1 and closing.startswith("1 failed")
    found = versions.row("oldest", {"torch": "2.6.0", "peft": "0.21.0"}, closing)
    assert found.startswith("| 1 failed") and "torch 2.6.0, peft 0.21.0 |" in found


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
