"""The offline bundle: what is in it, and how a damaged or foreign one is refused."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import course
from helpers import assets, bundle, namespaces


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with one file that belongs to it and several that do not."""
    root = tmp_path / "kurs äöü"
    for name in (".venv/lib/x.py", "build/a", "helpers/__pycache__/x.pyc", ".git/config"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (root / "helpers" / "x.py").write_text("x = 1\n")
    for name in (".gitignore", "pyproject.toml"):
        shutil.copy(bundle.ROOT / name, root)
    return root


@pytest.fixture
def offline(root: Path) -> Path:
    """The folder of a bundle, with one wheel that is none."""
    offline = root / course.OFFLINE
    (offline / "wheels").mkdir(parents=True)
    (offline / "wheels" / "a-1-py3-none-any.whl").write_bytes(b"a")
    bundle.describe(offline)
    return offline


def test_the_files_are_those_that_git_would_track(root: Path) -> None:
    found = {file.as_posix() for file in bundle.files(root)}
    assert found == {".gitignore", "pyproject.toml", "helpers/x.py"}


def test_this_checkout_has_lessons_helpers_and_data_in_it() -> None:
    found = {file.as_posix() for file in bundle.files()}
    assert {"course.py", "data/claims.csv", "notebooks/00_start_here.ipynb"} <= found
    assert not any(name.startswith((".venv/", ".git/", "build/", "offline/")) for name in found)


def test_the_name_says_what_it_is_for() -> None:
    python = f"python-{sys.version_info.major}.{sys.version_info.minor}"
    assert bundle.file_name().startswith(f"peft-measured-0.1.0-{python}-on-")


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with one small wheel and one small archive in place of the large ones."""

    def one_wheel(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "a-1-py3-none-any.whl").write_bytes(b"a")

    (tmp_path / "archive.whl").write_bytes(b"model")
    monkeypatch.setattr(bundle, "wheels", one_wheel)
    monkeypatch.setattr(assets, "fetch", lambda name: tmp_path / "archive.whl")
    return bundle.write(tmp_path / "out" / "bundle.zip")


def test_a_bundle_unpacks_to_the_course_and_what_it_needs(written: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(written).extractall(tmp_path)
    folder = tmp_path / bundle.FOLDER
    names = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
    offline = {name for name in names if name.parts[0] == course.OFFLINE}
    assert names - offline == set(bundle.files())
    assert {name.as_posix() for name in offline} == {
        "offline/bundle.json",
        "offline/wheels/a-1-py3-none-any.whl",
        "offline/archives/archive.whl",
    }
    assert course.where_from(folder)[:2] == ["--no-index", "--find-links"]
    assert [file.name for file in written.parent.iterdir()] == ["bundle.zip"]


def test_a_disk_that_fills_up_keeps_the_older_bundle(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = written.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    assert bundle.main(["write", str(written)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert written.read_bytes() == before
    assert [file.name for file in written.parent.iterdir()] == ["bundle.zip"]


def test_what_is_no_bundle_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.zip").write_bytes(b"no zip")
    assert bundle.main(["check", str(tmp_path / "x.zip")]) == 1
    assert "x.zip is no bundle: write one with `make bundle`" in capsys.readouterr().err


def test_without_a_bundle_pip_is_told_nothing(root: Path) -> None:
    assert course.where_from(root) == []


def test_an_intact_bundle_is_where_pip_looks(offline: Path) -> None:
    words = course.where_from(offline.parent)
    assert words == ["--no-index", "--find-links", str(offline / "wheels")]


def test_another_system_is_refused(offline: Path) -> None:
    made = json.loads((offline / course.BUNDLE).read_text())
    (offline / course.BUNDLE).write_text(json.dumps({**made, "system": "Python 3.9 on Plan 9"}))
    with pytest.raises(course.SetupError, match=r"is for Python 3\.9 on Plan 9, and this is Pyth"):
        course.where_from(offline.parent)


@pytest.mark.parametrize("name", ["wheels/a-1-py3-none-any.whl", course.BUNDLE])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_damaged_bundle_is_refused(name: str, how: str, offline: Path) -> None:
    (offline / name).unlink() if how == "missing" else (offline / name).write_text("changed")
    with pytest.raises(course.SetupError, match=f"{Path(name).name} is damaged or missing"):
        course.where_from(offline.parent)


def test_models_come_from_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = assets.asset("easy-vqa")
    kept = assets.fetch("easy-vqa")
    monkeypatch.setenv("PEFT_MEASURED_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(assets, "BUNDLED", tmp_path / "offline")
    (tmp_path / "offline").mkdir()
    shutil.copy(kept, tmp_path / "offline")
    assert assets.is_here("easy-vqa")
    fetched = assets.fetch("easy-vqa")
    assert fetched == tmp_path / "empty" / "archives" / item.file
    for file in (fetched, tmp_path / "offline" / item.file):
        file.write_bytes(b"damaged")

    def no_pip(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "NewConnectionError")

    monkeypatch.setattr(assets.subprocess, "run", no_pip)
    with pytest.raises(assets.AssetError, match="could not download .*no network"):
        assets.fetch("easy-vqa")


def test_the_cut_leaves_the_loopback_and_nothing_else() -> None:
    try:
        bundle._can_cut_off()
    except bundle.BundleError as error:
        pytest.skip(str(error))
    outside = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=2)"
    inside = "import socket; s = socket.create_server(('127.0.0.1', 0)); "
    inside += "socket.create_connection(s.getsockname(), timeout=2)"
    to_outside, to_inside = (
        namespaces.cut_off([sys.executable, "-c", code]) for code in (outside, inside)
    )
    assert b"unreachable" in subprocess.run(to_outside, capture_output=True).stderr
    assert subprocess.run(to_inside).returncode == 0
