"""The sources of the site: the course's own texts, with no second copy of the lesson table."""

import re

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers import stamp
from helpers.claims.book import ROOT
from helpers.site import __main__ as command
from helpers.site import build, stage


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    target = tmp_path_factory.mktemp("sources")
    stage.stage(ROOT, target)
    return target


def test_every_lesson_stands_once_in_the_side_bar(staged):
    text = (staged / "index.md").read_text(encoding="utf-8")
    contents = text.partition(":caption: Lessons\n")[2].partition("```")[0]
    listed = re.findall(r"<(notebooks/\w+)>", contents)
    files = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert listed == [f"notebooks/{file.stem}" for file in files]
    assert "00 Start here <notebooks/00_start_here>" in contents, "titles come from the README"


def test_a_lesson_that_the_readme_lacks_is_listed_by_its_name(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "README.md").write_text("| [00 First](notebooks/00_a.ipynb) | x |\n")
    for name in ("00_a", "01_the_second"):
        (tmp_path / "notebooks" / f"{name}.ipynb").touch()
    assert list(stage.lessons(tmp_path)) == ["00 First", "01 the second"]


def test_no_page_shows_a_picture_from_elsewhere(staged):
    for file in [*staged.rglob("*.md"), *staged.rglob("*.ipynb")]:
        assert not re.search(r"!\[[^\]]*\]\(http", file.read_text(encoding="utf-8")), file.name
    assert "[Open in Colab](https://colab" in (staged / "index.md").read_text(encoding="utf-8")


def test_a_lesson_is_shown_without_colab_and_with_folded_solutions():
    badge = "# Title\n\n[![Open](https://example.org/b.svg)](https://example.org/open)"
    tags = [{"tags": ["colab"]}, {"tags": ["solution", "x"]}, {}]
    cells = [new_markdown_cell(badge), *[new_code_cell("1", metadata=each) for each in tags]]
    shown = stage.lesson(new_notebook(cells=cells)).cells
    assert shown[0].source == "# Title\n\n[Open](https://example.org/open)"
    assert [cell.metadata["tags"] for cell in shown[1:]] == [
        ["colab", "remove-cell"],
        ["solution", "x", "hide-input"],
        [],
    ]


@pytest.mark.parametrize(
    ("folder", "link", "shown"),
    [
        ("notebooks", "../helpers/data.py", "ADDRESS/blob/main/helpers/data.py"),
        (".", "tests", "ADDRESS/blob/main/tests"),
        ("notebooks", "../README.md", "../index.md"),
        ("notebooks", "01_peft_basics.ipynb#next", "01_peft_basics.ipynb#next"),
        (".", "docs/claims.md#c001", "docs/claims.md#c001"),
        (".", "absent.md", "absent.md"),
        (".", "#here", "#here"),
        (".", "https://example.org/README.md", "https://example.org/README.md"),
    ],
)
def test_a_file_that_is_no_page_is_linked_in_the_repository(folder, link, shown):
    expected = shown.replace("ADDRESS", stamp.address(ROOT))
    assert stage.outward(f"a [b]({link}) c", ROOT, folder) == f"a [b]({expected}) c"


def test_a_claim_has_an_anchor_and_a_test_has_a_page(staged):
    text = (staged / "docs" / "claims.md").read_text(encoding="utf-8")
    assert re.findall(r"\[C(\d+)\]\{#c\1\}", text) == [f"{n:03d}" for n in range(1, 210)]
    names = set(re.findall(r"\(\.\./tests/(\w+)\.(md|py)\)", text))
    assert names and all(suffix == "md" for _, suffix in names)
    for name, _ in names:
        page = (staged / "tests" / f"{name}.md").read_text(encoding="utf-8")
        assert (ROOT / "tests" / f"{name}.py").read_text(encoding="utf-8") in page


def test_the_courses_own_licence_is_on_the_page_of_licences(staged):
    text = (staged / "data" / "LICENSES.md").read_text(encoding="utf-8")
    assert "## The course itself\n\nMIT License" in text
    front = (staged / "index.md").read_text(encoding="utf-8")
    assert "[MIT licence](data/LICENSES.md#the-course-itself)" in front


def test_missing_tools_are_named_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "TOOLS", ("re", "absent_tool"))
    with pytest.raises(build.SiteError, match=r"absent_tool are missing: run `python course\.py"):
        build.build(ROOT, tmp_path / "site")
    assert list(tmp_path.iterdir()) == []


def test_command_line_checks_links(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "SITE", tmp_path / "site")
    assert command.main(["--check"]) == 1
    assert "run `python course.py site` first" in capsys.readouterr().err
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text('<a href="gone.html">x</a>')
    assert command.main(["--check"]) == 1
    assert capsys.readouterr().out == "index.html: gone.html\n"
    (tmp_path / "site" / "index.html").write_text("")
    assert command.main(["--check"]) == 0
