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


def put_text(path: Path, text: str) -> None:
    """Write a text beside ``path`` and rename it, so that no reader meets half a file.

    A file that stands there keeps its rights.

    Raises:
        OSError: a folder that cannot be written, or a full disk; the old file is then as it was.
    """
    number, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".part", dir=path.parent)
    os.close(number)
    part = Path(name)
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.chmod(path.stat().st_mode if path.exists() else 0o644)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target`` to write into; it gets that name when the block ends.

    A block that fails, or that somebody stops, leaves what stood there before, and nothing else.

    Raises:
        OSError: see `put_folder`.

    Taught in: notebook 07, section 8.
    """
    part = beside(target, "part")
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
