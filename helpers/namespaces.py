"""A command with less than the machine has: no network, folders to read only, a small disk.

Linux gives a command namespaces of its own; that needs no rights, where the system allows it.
"""

import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path


def cut_off(command: list[str], read_only: Iterable[Path] = ()) -> list[str]:
    """The command in a network of its own, with read-only folders.

    The loopback address works there: a kernel's messages and a lesson's own server go over it.
    """
    steps = ["ip link set lo up"]
    for place in map(shlex.quote, map(str, read_only)):
        steps += [f"mount --bind {place} {place}", f"mount -o remount,ro,bind {place}"]
        steps += [f"! touch {place}/written 2>/dev/null"]  # or the hardship would be none
    steps += ['cd "$PWD"']  # the folder as it is now, not as it was before the mounts
    return ["unshare", "-rnm", "sh", "-c", " && ".join([*steps, f"exec {shlex.join(command)}"])]


def on_small_disk(command: list[str], place: Path, megabytes: int) -> list[str]:
    """The command with an empty disk of so many megabytes in an existing folder."""
    mount = f"mount -t tmpfs -o size={megabytes}m none {shlex.quote(str(place))}"
    return ["unshare", "-rm", "sh", "-c", f"{mount} && exec {shlex.join(command)}"]


def refusal() -> str:
    """Why this system cuts no command off, or "" where it does."""
    try:
        done = subprocess.run(cut_off(["true"]), capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return done.stderr.strip() or f"it ended with {done.returncode}" if done.returncode else ""
