"""Every lesson keeps the rules, and every rule can fail."""

import copy
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_rules import (
    LESSON_RULES,
    RULES,
    WIDGET_VIEW,
    Rule,
    cell_numbers,
    enough_exercises,
    errors_are_tagged,
    executed_in_order,
    exercises_solved,
    figures_have_alt,
    frame_complete,
    frame_in_order,
    known_tags,
    measured_seconds_ignored,
    no_machine_paths,
    no_nbval_comments,
    no_widgets,
    outputs_present,
    promises_output,
    proportions,
    prose_numbers_measured,
    short_cells,
    titled,
    words,
)

from helpers import notebooks

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if not path.name.startswith("00_")]


# --- the lessons ------------------------------------------------------------------------------


def must_keep(rule: Rule, path: Path) -> None:
    violations = rule(nbformat.read(path, as_version=4))
    if violations:
        pytest.fail(
            "\n".join([f"{path.name}: {rule.__doc__ or rule.__name__}", *violations]), False
        )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_rule_for_every_notebook(path: Path, rule: Rule):
    must_keep(rule, path)


@pytest.mark.parametrize("rule", LESSON_RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_rule_for_every_lesson(path: Path, rule: Rule):
    must_keep(rule, path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_notebook_names_this_checkout_or_home(path: Path):
    text = path.read_text(encoding="utf-8")
    for place in (ROOT, Path.home()):
        assert len(place.parts) < 3 or str(place) not in text


# --- a lesson that keeps every rule, and ways to break it -------------------------------------

PROSE = "Adapters train few parameters and leave the pretrained weights alone. " * 16
FIGURE = '<img alt="Loss falls from two to one over the steps" src="data:image/png;base64,AAAA">'


def printed(source: str, text: str, tag: str = "") -> NotebookNode:
    return new_code_cell(
        source,
        outputs=[new_output("stream", text=text)],
        metadata={"tags": [tag]} if tag else {},
    )


def shown(source: str, data: dict[str, str]) -> NotebookNode:
    return new_code_cell(source, outputs=[new_output("display_data", data=data)])


def exercise(number: int) -> list[NotebookNode]:
    solution = printed("checks.rank(4)", "passed: the rank is 4\n", "solution")
    solution.metadata["jupyter"] = {"source_hidden": True}
    return [
        new_markdown_cell(f"### Exercise {number}: the rank\nSet it."),
        printed("rank = None\nprint('your turn')", "your turn\n", "exercise"),
        solution,
    ]


def section(number: int) -> list[NotebookNode]:
    made = []
    for _ in range(4):
        made += [new_markdown_cell(PROSE), printed("print(trained)", "294,912 of 134,809,920\n")]
    return [new_markdown_cell(f"## {number}. A section"), *made]


def number_cells(nb: NotebookNode) -> NotebookNode:
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, 1):
        cell.execution_count = count
    return nb


@pytest.fixture
def lesson() -> NotebookNode:
    nb = new_notebook(
        cells=[
            new_markdown_cell("# 01 A lesson\n\n![badge](x.svg)\n\nIt promises something."),
            printed("import os", ""),
            new_markdown_cell("## Questions\n- Why?"),
            new_markdown_cell("## Objectives\n- Know it."),
            new_markdown_cell("## You need\n17 minutes, 3.7 GB of memory."),
            *section(1),
            shown("plots.show(fig, alt='…')", {"text/html": FIGURE}),
            *section(2),
            new_markdown_cell("Of 134.8 million, 294,912 train, about 295,000 or 0.22 %."),
            printed("print(f'{294912 / 134809920:.4%}')", "0.2188%\n"),
            *section(3),
            new_markdown_cell("## Your turn"),
            *exercise(1),
            *exercise(2),
            new_markdown_cell("## What can go wrong"),
            new_markdown_cell("## Key points"),
            new_markdown_cell("## Next"),
        ]
    )
    return number_cells(nb)


def code(nb: NotebookNode, index: int) -> NotebookNode:
    return [cell for cell in nb.cells if cell.cell_type == "code"][index]


def markdown(nb: NotebookNode, start: str) -> NotebookNode:
    return next(c for c in nb.cells if c.cell_type == "markdown" and c.source.startswith(start))


@pytest.mark.parametrize("rule", RULES + LESSON_RULES, ids=lambda rule: rule.__name__)
def test_the_good_lesson_passes(lesson, rule):
    assert rule(lesson) == []


def change(index: int, **values: object) -> Callable[[NotebookNode], None]:
    """A way to break the lesson: other values of the code cell at this index."""

    def apply(nb: NotebookNode) -> None:
        code(nb, index).update(nbformat.from_dict(values))

    return apply


def write(start: str, text: str) -> Callable[[NotebookNode], None]:
    """A way to break the lesson: another text of the markdown cell that starts like this."""

    def apply(nb: NotebookNode) -> None:
        markdown(nb, start).source = text

    return apply


def say(text: str) -> Callable[[NotebookNode], None]:
    return write("Of 134.8 million", text)


def outputs(*made: NotebookNode, tag: str | None = None) -> Callable[[NotebookNode], None]:
    def apply(nb: NotebookNode) -> None:
        code(nb, 1).outputs = list(made)
        if tag:
            code(nb, 1).metadata["tags"] = [tag]

    return apply


def text_output(text: str) -> Callable[[NotebookNode], None]:
    return outputs(new_output("stream", text=text))


def html_output(html: str) -> Callable[[NotebookNode], None]:
    return outputs(new_output("display_data", data={"text/html": html}))


def drop(start: str) -> Callable[[NotebookNode], None]:
    def apply(nb: NotebookNode) -> None:
        nb.cells.remove(markdown(nb, start))

    return apply


def swap_solution(nb: NotebookNode) -> None:
    stub = nb.cells.index(code(nb, -2))
    nb.cells[stub], nb.cells[stub + 1] = nb.cells[stub + 1], nb.cells[stub]


ERROR = new_output("error", ename="ValueError", evalue="rank 0", traceback=["ValueError: rank 0"])
TRACEBACK = new_output("error", ename="E", evalue="", traceback=["File \x1b[32m/home/me/x.py"])
PATH_FAULT = "of one machine"
NO_CELL = "which no code cell shows"

BROKEN = [
    (executed_in_order, change(3, execution_count=9), "has execution count 9, expected 4"),
    (executed_in_order, change(3, execution_count=None), "was not executed"),
    (executed_in_order, change(3, source="  \n"), "is an empty code cell"),
    (outputs_present, change(2, outputs=[]), "has no stored output"),
    (outputs_present, change(0, source="x = 1\nx", outputs=[]), "has no stored output"),
    (no_widgets, lambda nb: nb.metadata.update(widgets={}), "metadata.widgets"),
    (no_widgets, outputs(new_output("display_data", data={WIDGET_VIEW: {}})), "widget as output"),
    (errors_are_tagged, outputs(ERROR), "not tagged raises-exception"),
    (errors_are_tagged, outputs(ERROR, tag="raises-exception"), "also be tagged nbval-check"),
    (errors_are_tagged, outputs(tag="raises-exception"), "stores no error"),
    (known_tags, change(1, metadata={"tags": ["nbval-skip"]}), "means nothing here"),
    (no_nbval_comments, change(1, source="# NBVAL_IGNORE_OUTPUT\nprint(1)"), "nbval comment"),
    (short_cells, change(1, source="\n".join(["x = 1"] * 31)), "has 31 lines"),
    (no_machine_paths, text_output("saved to /home/me/x"), PATH_FAULT),
    (no_machine_paths, text_output(r"saved to C:\Users\me"), PATH_FAULT),
    (no_machine_paths, change(1, source="print('/tmp/x')"), PATH_FAULT),
    (no_machine_paths, outputs(TRACEBACK), PATH_FAULT),
    (no_machine_paths, say("Look into `/content/drive`."), PATH_FAULT),
    (measured_seconds_ignored, text_output("trained in 3.2 s"), "shows a time"),
    (measured_seconds_ignored, text_output("350 tokens/s"), "shows a time"),
    (measured_seconds_ignored, html_output("<th>seconds</th><td>3</td>"), "shows a time"),
    (figures_have_alt, say("![](x.png)"), "image without alt text"),
    (figures_have_alt, say("<img src='x.png'>"), "<img> without alt text"),
    (figures_have_alt, html_output("<img src='x.png'>"), "alt text None"),
    (figures_have_alt, html_output("<img alt='plot' src='x.png'>"), "alt text 'plot'"),
    (figures_have_alt, outputs(new_output("display_data", data={"image/png": ""})), "bare picture"),
    (titled, write("# 01", "# 01 A lesson"), "no sentence"),
    (titled, write("## Next", "# Next"), "2 first-level headings"),
    (titled, write("# 01", "A lesson"), "not markdown that starts with"),
    (frame_in_order, write("## Questions", "## Key points"), "the headings come as"),
    (frame_complete, drop("## What can go wrong"), "expected ['Questions'"),
    (frame_complete, write("## 2.", "## 4. A section"), "should have the number 2"),
    (frame_complete, write("## Next", "## Next\n\n## More"), "expected ['Questions'"),
    (proportions, say("word " * 2_000), "words; expected 1,000 to 2,600"),
    (proportions, lambda nb: nb.cells.extend([new_markdown_cell()] * 30), "per code cell"),
    (proportions, lambda nb: nb.cells.extend([new_code_cell()] * 40), "code cells; expected"),
    (exercises_solved, change(-1, outputs=[]), "does not say 'passed'"),
    (exercises_solved, change(-1, source="print('passed')"), "does not call the exercise's check"),
    (exercises_solved, change(-1, metadata={"tags": ["solution"]}), "is not folded"),
    (exercises_solved, change(-1, metadata={}), "no single solution"),
    (exercises_solved, change(-2, metadata={}), "is not the stub"),
    (exercises_solved, swap_solution, "no single solution (tag: solution) follows"),
    (exercises_solved, drop("### Exercise 1"), "outside of a '### Exercise'"),
    (enough_exercises, write("### Exercise 2", "### A question"), "there are 1 exercises"),
    (prose_numbers_measured, say("It trains 294,913 parameters."), NO_CELL),
    (prose_numbers_measured, say("It trains 0.35 % of them."), NO_CELL),
    (prose_numbers_measured, say("It takes 13 GB."), NO_CELL),
    (prose_numbers_measured, say("It is 7× as fast."), NO_CELL),
    (prose_numbers_measured, say("It takes 17 seconds."), NO_CELL),
    (prose_numbers_measured, say("| a | b |\n|---|---|\n| x | 0.87 |"), NO_CELL),
    (prose_numbers_measured, say("Of 134.7 million, most are frozen."), NO_CELL),
]


@pytest.mark.parametrize(
    ("rule", "damage", "sentence"), BROKEN, ids=[f"{r.__name__}-{s[:30]}" for r, _, s in BROKEN]
)
def test_a_broken_lesson_fails(lesson, rule, damage, sentence):
    damage(lesson)
    found = rule(lesson)
    assert any(sentence in violation for violation in found), found


def test_each_rule_is_shown_to_fail():
    assert {rule for rule, _, _ in BROKEN} == set(RULES + LESSON_RULES)


def test_rules_change_nothing(lesson):
    before = copy.deepcopy(lesson)
    for rule in RULES + LESSON_RULES:
        rule(lesson)
    assert lesson == before


# --- the parts that need judgement ------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "promises"),
    [
        ("print(1)", True),
        ("print(1)\nx = 2", True),
        ("x = 2\nx", True),
        ("model.eval()", True),
        ("%matplotlib inline\nx", True),
        ("x;", False),
        ("x = 2", False),
        ("rows.append(1)", False),
        ("def f():\n    print(1)", False),
        ("import os", False),
        ("%matplotlib inline", False),
    ],
)
def test_which_cells_promise_output(source, promises):
    assert promises_output(source) == promises


@pytest.mark.parametrize(
    "text",
    [
        "Three seeds, 16 of 32 ranks, 100 steps.",
        "> the note says 12,345 and 99.9 %",
        "```\n0.12345\n```",
        "`alpha=0.333` and $W + 0.125 BA$",
        "# Result 0.987",
        "[the paper, 2.345](https://example.org/2106.09685)",
        "Since 2021, with torch 2.13 and peft 0.21.2, Llama-2-7B, Llama 3.2, a 7B or 135M model.",
        "Claim C017 of lesson 01, DINOv2-small-518.",
        "images of 64×64 pixels",
        "r < 0 and > 1, 294,912 parameters",
        "0.219 percent, 294.9 thousand, -0.219 or 0.0022",
    ],
)
def test_numbers_that_need_no_cell_or_have_one(lesson, text):
    markdown(lesson, "Of 134.8 million").source = text
    code(lesson, 1).outputs = [new_output("stream", text="0.00219 294912\n")]
    assert prose_numbers_measured(lesson) == []


@pytest.mark.parametrize(
    ("prose", "printed_number"),
    [
        ("8.4 million", "8,388,608"),
        ("8.39 million", "8_388_608"),
        ("17.5 MB", "17479000"),
        ("3.5 GiB", "3758096384"),
        ("12.5 %", "0.1249"),
        ("1,230 parameters", "1,230.4"),
        ("0.80", "0.8"),
        ("2.5×", "2.4996"),
        ("350 ms", "0.35 s"),
        ("1.5 million", "1.5e6"),
    ],
)
def test_prose_may_round_and_scale(lesson, prose, printed_number):
    markdown(lesson, "Of 134.8 million").source = f"It is {prose} here."
    assert prose_numbers_measured(lesson) != []
    code(lesson, 1).outputs = [new_output("stream", text=printed_number)]
    assert prose_numbers_measured(lesson) == []


def test_numbers_in_pictures_and_markup_are_not_measured(lesson):
    html = '<table width="4321"><tr><td>8,765</td></tr></table><img src="data:x,9876">'
    lesson.cells = [shown("x", {"text/html": html})]
    assert cell_numbers(lesson) == {8765.0}


def test_a_stored_error_keeps_no_path_of_the_machine_that_ran_it(tmp_path):
    path = tmp_path / "fails.ipynb"
    source = "import json\n\nfrom helpers import plots\n\n"
    cells = [new_code_cell(source + fails) for fails in ("plots.show(None, '')", "json.loads('{')")]
    for cell in cells:
        cell.metadata["tags"] = ["raises-exception", "nbval-check-output"]
    nbformat.write(new_notebook(cells=cells), path)
    notebooks.execute(path)
    ran = nbformat.read(path, as_version=4)
    assert errors_are_tagged(ran) == []
    assert no_machine_paths(ran) == []
    assert "helpers" in str(code(ran, 0).outputs) and "json" in str(code(ran, 1).outputs)


def test_words_are_those_that_are_read():
    text = (
        "# A title\n\nRead *this* [link](https://example.org/a/b).\n\n```\ncode here\n```\n<b>x</b>"
    )
    assert words(text) == 6
