"""A copy of the working tree, uncommitted changes included, for tests that must not touch it."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def snapshot(target: Path) -> Path:
    """Copy what git would track, and skip the test where there is no git checkout."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    try:
        done = subprocess.run([*command, "--exclude-standard"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs git and a git checkout: {error}")
    for name in done.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():  # listed, but deleted and not yet committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def repository(target: Path) -> Path:
    """A git repository whose only commit is the snapshot."""
    snapshot(target)
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "core.hooksPath="]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "snapshot"]):
        subprocess.run(["git", "-C", str(target), *identity, *arguments], check=True)
    return target
