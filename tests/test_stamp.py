"""The repository's address is in one place, and every badge and Colab cell agrees with it."""

import ast
import hashlib
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers import stamp

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OTHER = "https://github.com/somebody/other.name"


@pytest.fixture
def course(tmp_path):
    """A small course whose notebook was never stamped."""
    (tmp_path / "notebooks").mkdir()
    urls = '[project.urls]\nRepository = "https://github.com/first/course"\n'
    (tmp_path / "pyproject.toml").write_text(urls, encoding="utf-8")
    readme = stamp.badge("https://github.com/first/course", "notebooks/00_x.ipynb")
    (tmp_path / "README.md").write_text(f"# Course\n\n{readme}\n", encoding="utf-8")
    notebook = new_notebook(
        cells=[
            new_markdown_cell("# Título\nA promise."),
            new_code_cell("", metadata={"tags": ["colab"]}),
            new_code_cell("print(1)"),
        ]
    )
    nbformat.write(notebook, tmp_path / "notebooks" / "00_x.ipynb")
    stamp.stamp(tmp_path)
    return tmp_path


def contents(root: Path) -> dict[str, str]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_stamp_fills_the_badge_and_the_colab_cell(course):
    title, colab, other = nbformat.read(course / "notebooks" / "00_x.ipynb", as_version=4).cells
    assert title.source == (
        "# Título\n\n"
        "[![Open this lesson in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        "(https://colab.research.google.com/github/first/course/blob/main/notebooks/00_x.ipynb)\n"
        "A promise."
    )
    assert colab.source == stamp.colab_cell("https://github.com/first/course")
    assert other.source == "print(1)"


def test_another_address_and_back_is_the_identity(course):
    before = contents(course)
    assert len(stamp.stamp(course, OTHER)) == 3
    after = contents(course)
    assert all(after[file] != before[file] for file in before)
    assert stamp.address(course) == OTHER
    everything = "".join(f.read_text("utf-8") for f in course.rglob("*") if f.is_file())
    assert "first/course" not in everything
    stamp.stamp(course, "https://github.com/first/course")
    assert contents(course) == before


def test_stamping_twice_changes_nothing(course):
    assert stamp.stamp(course) == []


@pytest.mark.parametrize(
    "wrong", ["github.com/a/b", "https://github.com/a", "https://example.org/a/b", f"{OTHER}/"]
)
def test_an_address_that_colab_cannot_open_is_refused(course, wrong):
    before = contents(course)
    with pytest.raises(ValueError, match=r"expected https://github.com/OWNER/NAME"):
        stamp.stamp(course, wrong)
    assert contents(course) == before


def test_the_colab_cell_is_short_plain_python():
    source = stamp.colab_cell(stamp.address())
    assert len(source.splitlines()) <= 15
    assert max(map(len, source.splitlines())) <= 100
    ast.parse(source)  # no magics: it runs under plain Python too


def test_the_colab_cell_does_nothing_on_other_machines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    exec(stamp.colab_cell(OTHER), {})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_is_stamped(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    hint = "run: python -m helpers.notebooks stamp"
    assert code[0].metadata.get("tags") == ["colab"], "the first code cell is tagged colab"
    assert code[0].source == stamp.colab_cell(stamp.address()), hint
    badge = stamp.badge(stamp.address(), path.relative_to(ROOT).as_posix())
    assert badge in notebook.cells[0].source, hint


def test_the_address_is_the_same_everywhere():
    texts = [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *NOTEBOOKS]]
    links = re.findall(r"colab\.research\.google\.com/github/([^/\s]+/[^/\s]+)/blob/", texts[0])
    assert links, "README.md has no Colab badge"
    wanted = stamp.address().removeprefix("https://github.com/")
    for text in texts:
        links = re.findall(r"colab\.research\.google\.com/github/([^/\s]+/[^/\s]+)/blob/", text)
        assert set(links) <= {wanted}, "run: python -m helpers.notebooks stamp"
