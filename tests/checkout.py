"""A copy of the working tree, uncommitted changes included, for tests that must not touch it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import bundle


def snapshot(target: Path) -> Path:
    """Copy what belongs to the course."""
    return bundle.copy(target)


def repository(target: Path) -> Path:
    """A git repository whose only commit is the snapshot; skips the test where there is no git."""
    if not shutil.which("git"):
        pytest.skip("needs git")
    snapshot(target)
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "core.hooksPath="]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "snapshot"]):
        subprocess.run(["git", "-C", str(target), *identity, *arguments], check=True)
    return target
