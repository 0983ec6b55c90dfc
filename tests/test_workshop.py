"""A teacher's pages agree with the lessons; slides and copies show what is stored, run nothing."""

import html
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert.preprocessors import ExecutePreprocessor
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_rules import headings, prose_numbers_measured, tags

import course
from helpers import assets, workshop

ROOT = Path(__file__).resolve().parent.parent
LESSONS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
PAGES = ROOT / "workshop"
WAITING: set[str] = set()  # lessons whose page is still to be written
AGENDAS = {"Two hours": 120, "Half a day": 210, "A full day": 420}
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="module")
def lessons() -> dict[str, NotebookNode]:
    return {name: nbformat.read(path, as_version=4) for name, path in LESSONS.items()}


# --- Reading a page ------------------------------------------------------------------------------


def page(name: str) -> str:
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def rows(markdown: str, first: str) -> list[list[str]]:
    """The rows below the table head whose first cell is `first`."""
    lines = markdown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def minutes(markdown: str) -> dict[str, int]:
    """Each section's minutes, the line Together included."""
    return {row[0].strip("*"): int(row[1].strip("*")) for row in rows(markdown, "section")}


def numbered(lesson: NotebookNode) -> list[str]:
    """The names of the numbered sections, without their numbers."""
    found = [re.fullmatch(r"\d+\. (.+)", heading) for heading in headings(lesson, 2)]
    return [match[1] for match in found if match]


def exercises(lesson: NotebookNode) -> set[str]:
    titles = [heading for heading in headings(lesson, 3) if heading.startswith("Exercise")]
    return {title.partition(": ")[2].lower() for title in titles}


def questions(lesson: NotebookNode) -> list[str]:
    """What stands behind each call to predict, to the end of its paragraph."""
    paragraphs = [
        " ".join(part.split())
        for cell in lesson.cells
        if cell.cell_type == "markdown"
        for part in cell.source.split("\n\n")
    ]
    return [part[match.end() :] for part in paragraphs for match in workshop.PREDICT.finditer(part)]


def bullet(markdown: str, word: str) -> str:
    return next(line for line in markdown.splitlines() if line.startswith(f"- **{word}"))


def italics(text: str) -> list[str]:
    return re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", text)


# --- The rules of a page: each a function to its violations ---------------------------------------


def sections_are_the_lessons(markdown: str, lesson: NotebookNode) -> list[str]:
    wanted = ["Opening", *numbered(lesson), "Your turn", "Key points", "Together"]
    found = list(minutes(markdown))
    return [] if found == wanted else [f"the table's sections are {found}; expected {wanted}"]


def minutes_add_up(markdown: str, lesson: NotebookNode) -> list[str]:
    *parts, together = minutes(markdown).values()
    return [] if sum(parts) == together else [f"{sum(parts)} minutes are called {together}"]


def predictions_are_the_lessons(markdown: str, lesson: NotebookNode) -> list[str]:
    quoted = [row[0] for row in rows(markdown, "they are asked")]
    asked = questions(lesson)
    found = [
        f"{quote!r} is not among the words of {question!r}"
        for quote, question in zip(quoted, asked, strict=False)
        if quote not in question
    ]
    if len(quoted) != len(asked):
        found.append(f"the lesson asks {len(asked)} times to predict, the page has {len(quoted)}")
    return found


def predictions_are_answered(markdown: str, lesson: NotebookNode) -> list[str]:
    return [
        f"the row of {row[0]!r} lacks a wrong answer in quotes or a sentence against it"
        for row in rows(markdown, "they are asked")
        if '"' not in row[1] or not row[2].endswith((".", "!"))
    ]


def figures_are_stored(markdown: str, lesson: NotebookNode) -> list[str]:
    """Numbers outside minutes and quoted answers are among the lesson's sources and outputs."""
    said = re.sub(r'"[^"]*"', "", markdown[markdown.index("\n## Predict") :])
    code = [cell for cell in lesson.cells if cell.cell_type == "code"]
    return prose_numbers_measured(new_notebook(cells=[*code, new_markdown_cell(said)]))


def cuts_name_sections(markdown: str, lesson: NotebookNode) -> list[str]:
    known = tuple(numbered(lesson))
    return [
        f"no section begins with {name!r}"
        for word in ("Keep", "Cut")
        for name in italics(bullet(markdown, word))
        if not any(section.startswith(name) for section in known)
    ]


def exercises_are_placed(markdown: str, lesson: NotebookNode) -> list[str]:
    named = {name.lower() for name in italics(bullet(markdown, "Exercise"))}
    wrong = named ^ exercises(lesson)
    return [f"named on one side only: {sorted(wrong)}"] if wrong else []


RULES: tuple[Callable[[str, NotebookNode], list[str]], ...] = (
    sections_are_the_lessons,
    minutes_add_up,
    predictions_are_the_lessons,
    predictions_are_answered,
    figures_are_stored,
    cuts_name_sections,
    exercises_are_placed,
)


def test_every_lesson_has_a_page() -> None:
    written = {path.stem for path in PAGES.glob("[0-9]*.md")}
    assert written == set(LESSONS) - WAITING
    assert not written & WAITING, "take a lesson that has its page out of WAITING"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", sorted(set(LESSONS) - WAITING))
def test_a_page_agrees_with_its_lesson(
    name: str, rule: Callable, lessons: dict[str, NotebookNode]
) -> None:
    assert rule(page(name), lessons[name]) == []


@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        (sections_are_the_lessons, "| LoRA by hand |", "| LoRA by foot |"),
        (
            sections_are_the_lessons,
            "| Which models | 10 | names differ by",
            "| | 10 | names differ",
        ),
        (minutes_add_up, "| LoRA by hand | 20 |", "| LoRA by hand | 21 |"),
        (predictions_are_the_lessons, "will peft complain?", "will torch complain?"),
        (predictions_are_the_lessons, "| Who hears more words right? |", "Gone: |"),
        (predictions_are_answered, '"all of them"', "nothing"),
        (figures_are_stored, "384 numbers train", "385 numbers train"),
        (figures_are_stored, "from 6.16 to 2.13", "from 6.17 to 2.13"),
        (cuts_name_sections, "**Cut** *Six task types*", "**Cut** *Seven task types*"),
        (exercises_are_placed, "*Hit one tower only*", "*Hit both towers*"),
    ],
)
def test_each_rule_of_a_page_can_fail(
    rule: Callable, old: str, new: str, lessons: dict[str, NotebookNode]
) -> None:
    text = page("01_peft_basics")
    assert old in text
    assert rule(text.replace(old, new), lessons["01_peft_basics"]) != []


# --- The agendas ---------------------------------------------------------------------------------


def agenda(readme: str, title: str) -> list[list[str]]:
    return rows(readme[readme.index(f"### {title}\n") :], "lesson")


def agenda_faults(readme: str, title: str, length: int) -> list[str]:
    """Sections that the notes do not have, and minutes that are not theirs or do not add up."""
    *lines, last = agenda(readme, title)
    found, total = [], 0
    for number, sections, written in lines:
        total += int(written)
        if number == "–":
            continue
        (name,) = (name for name in LESSONS if name.startswith(f"{number}_"))
        planned = minutes(page(name))
        unknown = [each for each in sections.split(" · ") if each not in planned]
        found += [f"lesson {number} has no section {each!r}" for each in unknown]
        if not unknown and sum(planned[each] for each in sections.split(" · ")) != int(written):
            found.append(f"the sections of lesson {number} do not take {written} minutes")
    if not total == int(last[2].strip("*")) == length:
        found.append(f"{title} takes {total} minutes, says {last[2]}, and should take {length}")
    return found


@pytest.fixture
def readme() -> str:
    return (PAGES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("title", "length"), AGENDAS.items())
def test_agendas_add_up(title: str, length: int, readme: str) -> None:
    assert agenda_faults(readme, title, length) == []
    words = readme[readme.index(f"### {title}\n") :].split("### ")[1]
    assert "Break" in words and "\nCut: " in words


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| – | Break | 10 |", "| – | Break | 15 |"),
        ("| LoRA by hand · What the library wraps | 30 |", "| LoRA by hand | 30 |"),
        ("| What a rank costs | 10 |", "| What a rank weighs | 10 |"),
        ("| **120** |", "| **125** |"),
    ],
)
def test_an_agenda_can_fail(old: str, new: str, readme: str) -> None:
    start = readme.index("### Two hours\n")
    assert old in readme[start:]
    broken = readme[:start] + readme[start:].replace(old, new, 1)
    assert agenda_faults(broken, "Two hours", AGENDAS["Two hours"]) != []


def test_the_readme_lists_every_page_with_its_minutes(readme: str) -> None:
    listed = {row[0]: (row[1], int(row[2])) for row in rows(readme, "lesson")}
    for name in set(LESSONS) - WAITING:
        link, together = listed.pop(name[:2])
        assert f"]({name}.md)" in link and together == minutes(page(name))["Together"]
    assert listed == {}


# --- Copies without solutions --------------------------------------------------------------------


@pytest.mark.parametrize("name", LESSONS)
def test_a_copy_has_no_solution_and_all_the_rest(
    name: str, lessons: dict[str, NotebookNode]
) -> None:
    before = lessons[name]
    copy = workshop.without_solutions(before)
    nbformat.validate(copy)
    kept = [cell for cell in before.cells if "solution" not in tags(cell)]
    assert len(kept) < len(before.cells), "the lesson has no solution to take out"
    assert [cell.source for cell in copy.cells] == [cell.source for cell in kept]
    for old, new in zip(kept, copy.cells, strict=True):
        if "exercise" in tags(old):
            assert new.outputs == []
        else:
            assert new == old


def test_a_copy_clears_the_output_of_an_exercise_only() -> None:
    said = [new_output("stream", text="42")]
    exercise = new_code_cell("answer = 42", outputs=said, metadata={"tags": ["exercise"]})
    solution = new_code_cell("6 * 7", outputs=said, metadata={"tags": ["solution"]})
    lesson = new_notebook(cells=[exercise, solution, new_code_cell("print(42)", outputs=said)])
    first, last = workshop.without_solutions(lesson).cells
    assert first.outputs == [] and last.outputs[0].text == "42"
    assert len(lesson.cells) == 3 and exercise.outputs, "the lesson itself is as it was"


def test_the_command_writes_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert workshop.main(["learner", "00", "--out", str(tmp_path / "new")]) == 0
    (file,) = (tmp_path / "new").iterdir()
    assert file.name == "00_start_here.ipynb" and str(file) in capsys.readouterr().out
    assert (
        nbformat.read(file, as_version=4).metadata == nbformat.read(LESSONS[file.stem], 4).metadata
    )


def test_faults_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert workshop.main(["learner", "99_nowhere"]) == 1
    assert "begins with '99_nowhere'" in capsys.readouterr().err
    (tmp_path / "file").write_text("no folder")
    assert workshop.main(["learner", "00", "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.strip().endswith("give --out FOLDER.")


# --- Slides --------------------------------------------------------------------------------------


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small stand-ins for the two archives, so that nothing is fetched."""
    folder = tmp_path / "archives"
    folder.mkdir()
    for name, start in workshop.IN_WHEEL.items():
        with zipfile.ZipFile(folder / name, "w") as wheel:
            wheel.writestr(f"{start}LICENSE", "free")
            wheel.writestr(f"{start}dist/{name}.js", "let it = 1")
            wheel.writestr(f"{start}dist/{name}.js.map", "left out")
            wheel.writestr("elsewhere/setup.py", "left out")
    monkeypatch.setattr(assets, "fetch", lambda name: folder / name)
    return folder


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a lesson was executed")

    for name in ("execute", "setup_kernel", "execute_cell"):
        monkeypatch.setattr(NotebookClient, name, refuse)
    with pytest.raises(AssertionError, match="executed"):  # so would an exporter that executes
        ExecutePreprocessor().preprocess(new_notebook(cells=[new_code_cell("1")]), {})


def test_slides_show_a_lesson_without_running_it(
    archives: Path, nothing_runs: None, tmp_path: Path, lessons: dict[str, NotebookNode]
) -> None:
    file = workshop.slides(LESSONS["01_peft_basics"], tmp_path / "slides")
    text = file.read_text(encoding="utf-8")
    lesson = lessons["01_peft_basics"]
    for heading in headings(lesson, 1) + headings(lesson, 2) + headings(lesson, 3):
        assert html.escape(heading, quote=False) in text, heading
    plain = html.unescape(re.sub(r"<[^>]+>", "", text))
    assert "held-out loss, untrained adapter: 6.16 nats a token" in plain, "a stored output"
    assert "class MyLoRA" in plain, "the exercise"
    assert "Four directions of change" in plain and "ax.axvline(4.5" not in plain, "a figure's code"
    assert '<img alt="Singular values of the merged update' in text
    for hidden in ("class Solved", "COLAB_RELEASE_TAG", "import warnings", "colab-badge.svg"):
        assert hidden not in plain and hidden not in text
    assert "(00_start_here.ipynb)" not in text and ".ipynb" not in re.findall('href="[^"]*"', text)


def test_nothing_on_a_slide_comes_from_the_network(archives: Path, tmp_path: Path) -> None:
    file = workshop.slides(LESSONS["00_start_here"], tmp_path)
    text = file.read_text(encoding="utf-8")
    loaded = re.findall(r'<(?:script|link|img)\b[^>]*?(?:src|href)="([^"]*)"', text)
    assert loaded and not [name for name in loaded if name.startswith(("http", "//"))]
    assert not re.search(r"@import|import .* from 'http", text)
    assert {f.relative_to(tmp_path).as_posix() for f in tmp_path.glob("reveal/**/*.*")} == {
        "reveal/dist/reveal.js",
        f"reveal/{assets.MANIFEST}",
    }


def test_a_missing_archive_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> Path:
        raise assets.AssetError(f"{name} is not in the cache: connect to the network.")

    monkeypatch.setattr(assets, "fetch", fail)
    assert workshop.main(["slides", "00", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "reveal is not in the cache: connect to the network.\n"
    assert not list(tmp_path.glob("*.html"))


def kinds(*cells: NotebookNode) -> list[str]:
    begin = new_markdown_cell("## 1. Begin")
    made = workshop.with_slides(new_notebook(cells=[begin, *cells]))
    return [cell.metadata.slideshow.slide_type for cell in made.cells[1:]]


def test_headings_begin_slides() -> None:
    both = new_markdown_cell("## Your turn\n\n### Exercise\n\nText.")
    assert kinds(new_markdown_cell("text"), both) == ["-", "slide", "subslide"]
    assert kinds(new_markdown_cell("```\n## a comment\n```")) == ["-"]


def test_what_does_not_fit_goes_below() -> None:
    half = "\n".join(["x"] * (workshop.LINES // 2))
    assert kinds(*map(new_code_cell, [half] * 3)) == ["-", "subslide", "subslide"]
    assert kinds(new_code_cell("x", outputs=[new_output("stream", text="y\n" * 40)])) == [
        "subslide"
    ]


def test_an_answer_waits_for_a_click() -> None:
    asked, told = "**Predict:** how much?", "We predict nothing."
    cells = [new_markdown_cell(asked), new_code_cell("1 + 1"), new_code_cell("2")]
    assert kinds(*cells) == ["-", "fragment", "-"]
    assert kinds(new_markdown_cell(told), new_code_cell("1 + 1")) == ["-", "-"]


def test_set_up_and_solutions_are_skipped() -> None:
    solution = new_code_cell("6 * 7", metadata={"tags": ["solution"]})
    assert kinds(solution, new_code_cell("1")) == ["skip", "-"]
    early = [new_markdown_cell("# Title"), new_code_cell("import os"), new_markdown_cell("## 1. A")]
    made = workshop.with_slides(new_notebook(cells=early))
    assert [cell.metadata.slideshow.slide_type for cell in made.cells] == ["slide", "skip", "slide"]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason=f"needs one of the browsers {', '.join(NAMES)}")
def test_slides_work_in_a_browser_without_a_network(
    tmp_path: Path, lessons: dict[str, NotebookNode]
) -> None:
    """The true reveal.js and MathJax, where they have been fetched: pages, formulas, no request."""
    browsers = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    for name in workshop.IN_WHEEL:
        if not (assets.cache_dir() / "archives" / assets.asset(name).file).exists():
            pytest.skip(f"{name} has not been fetched: build the slides once")
    file = workshop.slides(LESSONS["02_rank_selection"], tmp_path)
    with browsers.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab, asked, absent = browser.new_page(), [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("requestfailed", lambda request: absent.append(request.url))
        tab.goto(file.as_uri())
        tab.wait_for_function("window.Reveal && Reveal.isReady()")
        tab.wait_for_selector(".MathJax, .MathJax_SVG, mjx-container", state="attached")
        shown = tab.evaluate("Reveal.getTotalSlides()")
        browser.close()
    outside = [url for url in asked if not url.startswith(("file:", "data:", "about:", "blob:"))]
    assert asked and outside == []
    assert shown > len(headings(lessons["02_rank_selection"], 2))
    assert [url for url in absent if url.startswith("file:")] == []


# --- The commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["slides", "learner"])
def test_course_hands_over(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[list[str]] = []
    monkeypatch.setattr(course, "environment", lambda checkout: Path("python"))
    monkeypatch.setattr(course, "assets", lambda python: None)
    monkeypatch.setattr(
        course, "hand_over", lambda python, words, folder: handed.append(words) or 0
    )
    assert course.main([what, "--", "03"]) == 0
    assert handed == [["helpers.workshop", what, "03"]]


def test_a_learner_set_up_fetches_nothing_for_slides() -> None:
    assert set(workshop.IN_WHEEL) == set(assets.assets()) - set(assets.of_lessons())


def test_build_is_not_committed() -> None:
    assert "build/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
