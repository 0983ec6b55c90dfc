"""Files and folders get their name whole or not at all, also when killed in between."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from helpers import atomic
from helpers.atomic import beside, put_folder, put_text, whole_folder

# A process that replaces a folder and is killed at a moment that an argument names.
KILLED = """
import os, signal, sys
from pathlib import Path
from helpers import atomic

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

part, target, moment = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if moment == "while the bytes go to the disk":
    atomic.os.fsync = die
if moment == "before the names change":
    atomic._exchange = die
if moment == "before the old one is removed":
    atomic.shutil.rmtree = die
if moment == "between two renames":
    atomic._exchange = lambda *_: False
    real, seen = os.replace, []
    atomic.os.replace = lambda *names: die() if seen else (seen.append(1), real(*names))
atomic.put_folder(part, target)
"""
NEEDS_KILL = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
NEEDS_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone swaps two names")


@pytest.fixture
def part(tmp_path):
    return folder(tmp_path / ".run.part", "new")


@pytest.fixture
def target(tmp_path):
    return folder(tmp_path / "run", "old")


def folder(path, text):
    (path / "inner").mkdir(parents=True)
    for name in ("a", "b", "inner/c"):
        (path / name).write_text(text)
    return path


def whole(path):
    """The one text that all files of a whole folder have; an error for a mixture."""
    (text,) = {file.read_text() for file in path.rglob("*") if file.is_file()}
    assert len([file for file in path.rglob("*") if file.is_file()]) == 3
    return text


def names(path):
    return sorted(one.name for one in path.iterdir())


def test_a_name_that_was_free(part, tmp_path):
    put_folder(part, tmp_path / "fresh")
    assert names(tmp_path) == ["fresh"] and whole(tmp_path / "fresh") == "new"


def test_what_was_there_is_replaced_and_gone(part, target, tmp_path):
    (target / "of the old one").write_text("not to be mixed in")
    put_folder(part, target)
    assert names(tmp_path) == ["run"] and whole(target) == "new"


def test_a_block_writes_a_whole_folder(target, tmp_path):
    folder(beside(target, "part"), "left by a kill")
    with whole_folder(target) as inside:
        assert not list(inside.iterdir())
        (inside / "one").write_text("new")
    assert names(tmp_path) == ["run"] and names(target) == ["one"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_block_that_fails_leaves_what_was_there(target, tmp_path, stop):
    with pytest.raises(stop), whole_folder(target) as inside:
        (inside / "one").write_text("new")
        raise stop
    assert names(tmp_path) == ["run"] and whole(target) == "old"


def test_where_names_cannot_be_swapped(part, target, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    folder(beside(target, "old"), "older")  # of a save that was killed
    put_folder(part, target)
    assert names(tmp_path) == ["run"] and whole(target) == "new"


def test_a_stop_between_the_two_renames_puts_the_old_one_back(part, target, monkeypatch):
    real = os.replace

    def stopped(one, other):
        if one == part:
            raise KeyboardInterrupt
        real(one, other)

    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    monkeypatch.setattr(atomic.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        put_folder(part, target)
    assert whole(target) == "old" and whole(part) == "new"


@NEEDS_LINUX
@pytest.mark.parametrize(
    ("number", "left"), [(errno.EINVAL, "False"), (errno.EACCES, "PermissionError")]
)
def test_a_disk_that_cannot_is_told_from_one_that_may_not(part, target, monkeypatch, number, left):
    class Library:
        def renameat2(self, *_):
            atomic.ctypes.set_errno(number)
            return -1

    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: Library())
    try:
        found = str(atomic._exchange(part, target))
    except OSError as error:
        found = type(error).__name__
    assert found == left and whole(target) == "old"


@NEEDS_LINUX
def test_linux_swaps_in_one_step(part, target):
    """Without this, the tests above might all have gone the slow way."""
    assert atomic._exchange(part, target)
    assert whole(target) == "new" and whole(part) == "old"


def test_a_folder_that_is_not_there(tmp_path, target):
    with pytest.raises(FileNotFoundError):
        put_folder(tmp_path / ".nothing", target)
    assert whole(target) == "old"


@NEEDS_KILL
@pytest.mark.parametrize(
    ("moment", "stands"),
    [
        ("while the bytes go to the disk", "old"),
        ("before the names change", "old"),
        pytest.param("before the old one is removed", "new", marks=NEEDS_LINUX),
    ],
)
def test_killed_at_any_moment_there_is_a_whole_folder(part, target, moment, stands):
    assert replaced_in_a_process(part, target, moment) == -signal.SIGKILL
    assert whole(target) == stands


@NEEDS_KILL
def test_killed_between_two_renames_the_old_one_has_the_name_that_is_documented(part, target):
    assert replaced_in_a_process(part, target, "between two renames") == -signal.SIGKILL
    assert not target.exists() and whole(beside(target, "old")) == "old"


def test_the_process_that_is_not_killed_ends_well(part, target):
    assert replaced_in_a_process(part, target, "never") == 0
    assert whole(target) == "new"


def replaced_in_a_process(part, target, moment):
    command = [sys.executable, "-c", KILLED, str(part), str(target), moment]
    return subprocess.run(command, check=False).returncode


def test_a_text_is_replaced_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    target = tmp_path / "page.md"
    put_text(target, "old\n")
    put_text(target, "new ü\n")
    assert target.read_bytes() == "new ü\n".encode()

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(atomic.DiskFull, match=r"No space left on the disk of .*test_a_text"):
        put_text(target, "newer")
    assert [file.name for file in tmp_path.iterdir()] == ["page.md"]
    assert target.read_text(encoding="utf-8") == "new ü\n"
