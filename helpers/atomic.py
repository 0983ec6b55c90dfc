"""Files and folders that stand under their name whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2


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


def put_text(target: Path, text: str) -> None:
    """Write a text file beside ``target``, then rename it: nobody ever reads half of it."""
    part = beside(target, f"{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


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
