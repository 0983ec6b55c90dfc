"""Sphinx, called on the staged sources; the site gets its name only when it is whole."""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers.atomic import beside, put_folder

from .links import broken
from .stage import stage

TOOLS = ("sphinx", "myst_nb", "furo")


class SiteError(RuntimeError):
    """The site could not be built; the message says what to do."""


def build(root: Path, target: Path) -> None:
    """Builds the site of a repository, without running a cell, and puts it in `target`.

    Raises:
        SiteError: the tools are missing, Sphinx has something to say, or a link leads nowhere;
            what stood in `target` is then as it was.
    """
    if missing := [name for name in TOOLS if importlib.util.find_spec(name) is None]:
        raise SiteError(
            f"The packages {', '.join(missing)} are missing: run `python course.py site`, "
            "which installs them."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".site.") as folder:
        sources, part = Path(folder) / "sources", Path(folder) / beside(target, "part").name
        stage(root, sources)
        _render(sources, part)
        if problems := broken(part):
            raise SiteError("\n".join(["These links of the site lead nowhere:", *problems]))
        put_folder(part, target)


def _render(sources: Path, part: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "--fail-on-warning"]
    command += ["--keep-going", "-c", str(sources / "docs" / "site"), "-d"]
    command += [str(part.with_name("doctrees")), str(sources), str(part)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.replace(f"{sources}/", "")
        raise SiteError(f"Sphinx could not render the course without a warning:\n{words}")
    (part / ".buildinfo").unlink(missing_ok=True)
