"""Files and folders that stand under their name whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2
# A full disk, a user's share of one that is used up, and a file larger than may be written.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_IN_WORDS = ("No space left", "os error 28)", "os error 27)", "os error 122)")


class DiskFull(OSError):
    """There is no room where something was to be written; one sentence says where."""

    def __init__(self, place: Path) -> None:
        super().__init__(
            f"No space left on the disk of {place}: free some, or write to another disk, and do it "
            "again; what stood there before has not changed."
        )
        self.errno = errno.ENOSPC


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk takes no more; safetensors says so in words only."""
    told = any(words in str(error) for words in _FULL_IN_WORDS)
    return told or (isinstance(error, OSError) and error.errno in _FULL)


@contextmanager
def plain_when_full(place: Path) -> Iterator[None]:
    """Turns whatever a full disk raises in the block into one sentence that names ``place``.

    Raises:
        DiskFull: there is no room; the block is the one that leaves the old bytes as they were.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFull) or not is_full(error):
            raise
        raise DiskFull(place) from error


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """An empty file beside ``target`` to write into; it gets that name when the block ends.

    A file that stands there keeps its rights. After a block that fails it is as it was.

    Raises:
        DiskFull: there is no room.
        OSError: a folder that cannot be written.
    """
    with plain_when_full(target.parent):
        number, name = tempfile.mkstemp(
            prefix=f".{target.stem}.", suffix=".part", dir=target.parent
        )
        os.close(number)
        part = Path(name)
        try:
            yield part
            part.chmod(target.stat().st_mode if target.exists() else 0o644)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def put_text(path: Path, text: str) -> None:
    """Write a text beside ``path`` and rename it, so that no reader meets half a file.

    Raises:
        OSError: see `whole_file`.
    """
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target`` to write into; it gets that name when the block ends.

    A block that fails, or that somebody stops, leaves what stood there before, and nothing else.

    Raises:
        DiskFull: there is no room.
        OSError: see `put_folder`.

    Taught in: notebook 07, section 8.
    """
    part = beside(target, "part")
    with plain_when_full(target.parent):
        shutil.rmtree(part, ignore_errors=True)  # what a killed process left
        part.mkdir(parents=True)
        try:
            yield part
            put_folder(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def put_folder(part: Path, target: Path) -> None:
    """Give a finished folder its name; what stood under that name is gone afterwards.

    The bytes reach the disk first. On Linux the two folders change places in one step, so that
    a kill at any moment leaves the old one or the new one. Where the system cannot do that, it
    takes two renames: a kill between them leaves the old folder as `beside(target, "old")`.

    Args:
        part: on the same disk as ``target``, best beside it.

    Raises:
        OSError: a name that cannot be written; the old folder is then as it was.

    Source: the manual page of renameat2. Taught in: notebook 07, section 8.
    """
    for file in part.rglob("*"):  # a renamed folder must not name bytes that were never written
        if file.is_file():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
    _sync(part)
    if not target.exists():
        os.replace(part, target)
    elif _exchange(part, target):
        shutil.rmtree(part, ignore_errors=True)  # it is the old one now
    else:
        _replace_in_two_steps(part, target)
    _sync(target.parent)


def beside(target: Path, kind: str) -> Path:
    """The hidden name next to ``target`` for what is being written, or about to be removed."""
    return target.with_name(f".{target.name}.{kind}")


def _replace_in_two_steps(part: Path, target: Path) -> None:
    old = beside(target, "old")
    shutil.rmtree(old, ignore_errors=True)
    try:
        os.replace(target, old)
        os.replace(part, target)
    except BaseException:  # a Ctrl-C too
        if not target.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system or the disk cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _sync(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
