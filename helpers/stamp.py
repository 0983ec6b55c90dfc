"""The repository's address: kept in pyproject.toml, stamped into badges and Colab cells.

``python -m helpers.notebooks stamp`` repairs them from pyproject.toml;
``python -m helpers.notebooks stamp https://github.com/OWNER/NAME`` moves the course to another
address.
"""

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from helpers.atomic import put_text

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+")

_COLAB_LINK = re.compile(r"https://colab\.research\.google\.com/github/[^/\s]+/[^/\s]+/blob/")
_COLAB_FILE = re.compile(_COLAB_LINK.pattern + r"[^\s)]*")

# Learners read this cell in every lesson: plain, short, and the same everywhere.
_COLAB_CELL = """\
# In Colab, this fetches the course and what it needs; on your own machine it does nothing.
import os
import subprocess
import sys

if "COLAB_RELEASE_TAG" in os.environ:
    address = "{address}"
    address = os.environ.get("PEFT_MEASURED_REPOSITORY", address)
    if not os.path.isdir("peft-measured"):
        subprocess.run(["git", "clone", "--depth=1", address, "peft-measured"], check=True)
    sys.path.insert(0, os.path.abspath("peft-measured"))
    from helpers import colab

    colab.install_missing()"""


def address(root: Path = ROOT) -> str:
    """The repository's address, from ``[project.urls]`` in pyproject.toml."""
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]["urls"]["Repository"]


def colab_cell(repository: str) -> str:
    """The source of the first code cell of every lesson."""
    return _COLAB_CELL.format(address=repository)


def colab_link(repository: str, path: str) -> str:
    """Where Colab opens a file of the repository; ``path`` is relative to its root."""
    return f"{_link_start(repository)}main/{path}"


def badge(repository: str, path: str) -> str:
    """The markdown of an "Open in Colab" badge."""
    picture = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open this lesson in Colab]({picture})]({colab_link(repository, path)})"


def stamp(root: Path, repository: str | None = None) -> list[Path]:
    """Write the address into pyproject.toml, README.md and the notebooks; return what changed.

    In a notebook, the Colab cell is the one tagged ``colab``, and the badge stands below the title
    of the first cell, where it is added when it is missing.

    Args:
        root: the checkout.
        repository: the new address; None takes the one in pyproject.toml.

    Raises:
        ValueError: the address is not one that Colab can open.
    """
    repository = repository or address(root)
    if not ADDRESS.fullmatch(repository):
        raise ValueError(
            f"{repository!r} is not an address that Colab opens; "
            "expected https://github.com/OWNER/NAME, without a slash or .git at the end."
        )
    texts = {root / "pyproject.toml": _stamp_pyproject, root / "README.md": _stamp_links}
    changed = [path for path, change in texts.items() if _rewrite(path, change, repository)]
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        _stamp_notebook(notebook, repository, path.relative_to(root).as_posix())
        if notebook != nbformat.read(path, as_version=4):
            put_text(path, nbformat.writes(notebook).rstrip("\n") + "\n")
            changed.append(path)
    return changed


def main(arguments: list[str]) -> int:
    """Command line of ``python -m helpers.notebooks stamp [ADDRESS]``."""
    try:
        changed = stamp(ROOT, *arguments[:1])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    names = ", ".join(path.relative_to(ROOT).as_posix() for path in changed)
    print(f"{address()} is stamped; changed: {names or 'nothing'}")
    return 0


def _rewrite(path: Path, change: Callable[[str, str], str], repository: str) -> bool:
    if not path.exists():
        return False
    before = path.read_text(encoding="utf-8")
    after = change(before, repository)
    if after != before:
        put_text(path, after)
    return after != before


def _link_start(repository: str) -> str:
    owner_and_name = repository.removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{owner_and_name}/blob/"


def _stamp_pyproject(text: str, repository: str) -> str:
    return re.sub(r'^(Repository = ")[^"]*', rf"\g<1>{repository}", text, flags=re.MULTILINE)


def _stamp_links(text: str, repository: str) -> str:
    return _COLAB_LINK.sub(_link_start(repository), text)


def _stamp_notebook(notebook: NotebookNode, repository: str, path: str) -> None:
    for cell in notebook.cells:
        if "colab" in cell.metadata.get("tags", []):
            cell.source = colab_cell(repository)
    first = next((cell for cell in notebook.cells if cell.cell_type == "markdown"), None)
    if first is None:
        return
    if not _COLAB_LINK.search(first.source):
        title, _, rest = first.source.partition("\n")
        first.source = f"{title}\n\n{badge(repository, path)}\n{rest}".rstrip("\n")
    first.source = _COLAB_FILE.sub(colab_link(repository, path), first.source)
