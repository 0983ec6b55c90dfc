"""What the course writes leaves the old one whole when the disk is full, and says one sentence."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import atomic
from helpers.experiments import study
from helpers.robustness import disk

resource = pytest.importorskip("resource", reason="the system has no limit on a file's size")
LIMIT = 50_000  # bytes; what is written a second time is larger


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """The system itself refuses, as a full disk does: no file may become larger than LIMIT."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "trial"
    made.mkdir()
    return made


@pytest.mark.parametrize("name", disk.writers())
def test_the_old_one_stays_whole(name: str, folder: Path) -> None:
    assert disk.survives(disk.writers()[name], folder, no_room) == []


def careless(folder: Path, turn: int) -> None:
    (folder / "file").write_bytes(b"x" * (1 + turn * disk.LARGE))


def untidy(folder: Path, turn: int) -> None:
    (folder / f"left-{turn}").touch()
    with atomic.plain_when_full(folder):
        careless(folder / "..", turn)


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (careless, "no sentence but OSError"),
        (untidy, "changed left-1"),
        (lambda folder, turn: None, "was not full"),
    ],
)
def test_the_trial_can_fail(write: disk.Writer, why: str, folder: Path) -> None:
    assert why in disk.survives(write, folder, no_room)[0]


def test_a_row_that_was_cut_short_is_taken_back(folder: Path, monkeypatch) -> None:
    """A full disk may take the first half of a row without an error."""
    table = folder / "study.csv"
    study.append(table, ["a"], {"a": 1})
    real = Path.open

    def half(path: Path, *args, **kwargs):
        stream = real(path, *args, **kwargs)

        class Half:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                stream.close()

            def write(self, data: bytes) -> int:
                return stream.write(data[:1])

            def __getattr__(self, name: str):
                return getattr(stream, name)

        return Half()

    monkeypatch.setattr(Path, "open", half)
    with pytest.raises(atomic.DiskFull, match="No space left"):
        study.append(table, ["a"], {"a": 22})
    monkeypatch.undo()
    assert table.read_text() == "a\n1\n"


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("I/O error: File too large (os error 27)"), True),
        (OSError(errno.EACCES, "x"), False),
        (ValueError("no"), False),
    ],
)
def test_only_a_full_disk_is_called_full(error: Exception, full: bool) -> None:
    assert atomic.is_full(error) is full
    with pytest.raises(atomic.DiskFull if full else type(error)), atomic.plain_when_full(Path("a")):
        raise error
