"""The most memory and temporary disk that a process and its children held at one time."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

import psutil

EVERY = 0.2  # seconds between two looks


class Peak:
    """Watches a process from entering the block to leaving it.

    Attributes:
        memory: bytes, the largest sum of resident memory of the process's children and theirs.
            Pages that two of them share count twice, so that it errs on the large side.
        disk: bytes, the largest sum of the files in the folder for temporary files.
    """

    def __init__(self, pid: int, folder: Path) -> None:
        self.memory = self.disk = 0
        self._parent, self._folder = psutil.Process(pid), folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(EVERY):
            self.memory = max(self.memory, resident(self._parent))
            self.disk = max(self.disk, size(self._folder))


def resident(parent: psutil.Process) -> int:
    """Bytes of resident memory of all descendants of a process; 0 when it is gone."""
    total = 0
    for process in descendants(parent):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it has just ended
            continue
    return total


def descendants(parent: psutil.Process) -> list[psutil.Process]:
    """Children of a process and theirs; none when it is gone."""
    try:
        return parent.children(recursive=True)
    except psutil.Error:
        return []


def size(folder: Path) -> int:
    """Bytes of all files in a folder, which others may be removing meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):  # passes over a folder that is just gone
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total
