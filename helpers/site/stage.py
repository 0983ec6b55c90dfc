"""What Sphinx reads: copies of the course's own texts, with the few changes that a site needs."""

import os
import re
import shutil
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from helpers import stamp
from helpers.claims.page import PAGE

LICENCES = "data/LICENSES.md"

_BADGE = re.compile(r"\[!\[([^\]]*)\]\([^)]*\)\]")  # a picture from elsewhere that is a link
_LESSON = re.compile(r"\[([^\]]+)\]\((notebooks/[\w.-]+)\.ipynb\)")
_TEST = re.compile(r"\]\(\.\./tests/([\w/]+)\.py\)")
_ANCHOR = re.compile(r'<a id="(\w+)"></a>(\w+)')
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)")
_TAGS = {"colab": "remove-cell", "solution": "hide-input"}


def stage(root: Path, target: Path) -> None:
    """Fills an empty folder with the sources of the site, laid out as the repository is.

    Args:
        root: the repository.
        target: the folder; its `docs` is Sphinx's configuration, copied from `docs/` too.
    """
    _put(target / "index.md", outward(front_page(root), root, "."))
    for file in sorted((root / "notebooks").glob("*.ipynb")):
        notebook = lesson(nbformat.read(file, as_version=4))
        for cell in (cell for cell in notebook.cells if cell.cell_type == "markdown"):
            cell.source = outward(cell.source, root, "notebooks")
        _put(target / "notebooks" / file.name, nbformat.writes(notebook))
    claims = (root / PAGE).read_text(encoding="utf-8")
    for name in sorted(set(_TEST.findall(claims))):
        _put(target / "tests" / f"{name}.md", source_page(root, f"tests/{name}.py"))
    _put(target / PAGE, claims_page(claims))
    _put(target / LICENCES, outward(licences(root), root, "data"))
    shutil.copytree(root / "docs" / "site", target / "docs" / "site")


def front_page(root: Path) -> str:
    """The README, and behind it the table of contents that the site's side bar shows."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    contents = [
        _contents("Lessons", lessons(root)),
        _contents("Reference", {"The claims": PAGE, "Licences": LICENCES}),
    ]
    text = _BADGE.sub(r"[\1]", readme).replace("](LICENSE)", f"]({LICENCES}#the-course-itself)")
    return "\n\n".join([text, *contents]) + "\n"


def lessons(root: Path) -> dict[str, str]:
    """Title to path of every lesson: titles of the README's table, else the file's own."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    titles = {f"{path}.ipynb": title for title, path in _LESSON.findall(readme)}
    files = sorted((root / "notebooks").glob("*.ipynb"))
    names = [file.relative_to(root).as_posix() for file in files]
    return {titles.get(name, Path(name).stem.replace("_", " ")): name for name in names}


def lesson(notebook: NotebookNode) -> NotebookNode:
    """A notebook for readers: no cell that only Colab needs, folded solutions, no foreign picture.

    The notebook is changed in place and returned.
    """
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata["tags"] = tags + [_TAGS[tag] for tag in tags if tag in _TAGS]
        if cell.cell_type == "markdown":
            cell.source = _BADGE.sub(r"[\1]", cell.source)
    return notebook


def outward(text: str, root: Path, folder: str) -> str:
    """The text with links to files that are no page of the site led to the repository's address.

    Args:
        text: Markdown.
        root: the repository.
        folder: where in the repository the text stands; its links are relative to that.
    """

    def lead(link: re.Match[str]) -> str:
        path = os.path.normpath(f"{folder}/{link[1]}").replace(os.sep, "/")
        if path == "README.md":
            return f"]({os.path.relpath('index.md', folder).replace(os.sep, '/')}"
        is_page = path in (PAGE, LICENCES) or path.endswith(".ipynb")
        if is_page or not (root / path).exists():  # what is not there is for Sphinx to complain of
            return link[0]
        return f"]({stamp.address(root)}/blob/main/{path}"

    return _LINK.sub(lead, text)


def claims_page(text: str) -> str:
    """The page of all claims, with links to the tests' pages and an anchor for each claim."""
    wide = "---\nhide-toc: true\n---\n"
    return wide + _TEST.sub(r"](../tests/\1.md)", _ANCHOR.sub(r"[\2]{#\1}", text))


def licences(root: Path) -> str:
    """The licences of models and data sets, then the course's own."""
    others = (root / LICENCES).read_text(encoding="utf-8")
    own = (root / "LICENSE").read_text(encoding="utf-8")
    return f"{others}\n## The course itself\n\n{own}"


def source_page(root: Path, name: str) -> str:
    """A page that shows a file of the repository."""
    text = (root / name).read_text(encoding="utf-8")
    fence = "`" * 5
    return f"---\norphan: true\n---\n# {name}\n\n{fence}python\n{text}{fence}\n"


def _contents(caption: str, pages: dict[str, str]) -> str:
    lines = [f"{title} <{Path(path).with_suffix('').as_posix()}>" for title, path in pages.items()]
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *lines, "```"])


def _put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="\n")
