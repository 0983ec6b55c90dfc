"""The rules that every lesson keeps, each a pure function from a notebook to its violations.

A rule returns readable sentences, and an empty list when the notebook keeps it. ``RULES`` hold
for every notebook, ``LESSON_RULES`` for the lessons from 01 on. ``tests/test_notebooks.py`` runs
them and shows of each that it can fail.
"""

import ast
import itertools
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser

from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

Rule = Callable[[NotebookNode], list[str]]

MAX_CELL_LINES = 30
CODE_CELLS = (18, 50)  # a lesson aims at 20 to 40
WORDS = (1_000, 2_600)  # a lesson aims at 1,200 to 2,000
MARKDOWN_PER_CODE = (1.0, 2.0)
EXERCISES = (2, 4)
MIN_ALT = 20  # characters: enough for "what is drawn, and what to see in it"

FRAME_START = ["Questions", "Objectives", "You need"]
FRAME_END = ["Your turn", "What can go wrong", "Key points", "Next"]

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

TAGS = {
    "colab",
    "exercise",
    "solution",
    "nbval-check-output",
    "nbval-ignore-output",
    "raises-exception",
    "quoted-seconds",  # the seconds in this output are quoted from a text, not measured
}


# --- reading a notebook -----------------------------------------------------------------------


def cells(nb: NotebookNode, kind: str) -> Iterator[tuple[str, NotebookNode]]:
    """Cells of one kind ("code", "markdown"), each with the name that a violation calls it."""
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type == kind:
            first = next((line for line in cell.source.splitlines() if line.strip()), "")
            yield f"cell {number} ({first.strip()[:50]!r})", cell


def tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def headings(nb: NotebookNode, level: int) -> list[str]:
    """The texts of the markdown headings of one level, in order, code fences left out."""
    pattern = re.compile(rf"^#{{{level}}}\s+(.+?)\s*$", re.MULTILINE)
    found = [pattern.findall(without_fences(cell.source)) for _, cell in cells(nb, "markdown")]
    return list(itertools.chain.from_iterable(found))


def without_fences(markdown: str) -> str:
    return re.sub(r"^(```|~~~).*?^\1\s*$", "", markdown, flags=re.MULTILINE | re.DOTALL)


def output_texts(cell: NotebookNode) -> Iterator[str]:
    """What a reader sees of a cell's outputs, as text: no pictures, no markup."""
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            yield output.text
        elif output.output_type == "error":
            yield f"{output.ename}: {output.evalue}"
            yield re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output.traceback))
        else:
            for kind, data in output.data.items():
                if kind == "text/html":
                    yield without_markup(data)
                elif kind.startswith("text/"):
                    yield data


def without_markup(html: str) -> str:
    html = re.sub(r"<(style|script).*?</\1>", " ", html, flags=re.DOTALL)
    return re.sub(r"<!--.*?-->|</?[a-zA-Z][^>]*>", " ", html, flags=re.DOTALL)


class _Images(HTMLParser):
    """Collects the alternative text of every ``<img>``; None where there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.alts: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.alts.append(dict(attrs).get("alt"))


def image_alts(html: str) -> list[str | None]:
    parser = _Images()
    parser.feed(html)
    return parser.alts


# --- run and stored ---------------------------------------------------------------------------


def executed_in_order(nb: NotebookNode) -> list[str]:
    """Run once from top to bottom: the counts are 1, 2, 3, …, and no code cell is empty."""
    found = []
    for expected, (name, cell) in enumerate(cells(nb, "code"), 1):
        if not cell.source.strip():
            found.append(f"{name} is an empty code cell: delete it")
        elif cell.execution_count is None:
            found.append(f"{name} was not executed: run the whole notebook and store it")
        elif cell.execution_count != expected:
            found.append(
                f"{name} has execution count {cell.execution_count}, expected {expected}: "
                "restart the kernel and run all cells"
            )
    return found


_RETURN_NOTHING = {
    "append",
    "backward",
    "extend",
    "update",
    "sort",
    "clear",
    "add",
    "insert",
    "remove",
}
_RETURN_NOTHING |= {"seed", "use_style"}
_SHOW = {"print", "display", "show"}


def _called(statement: ast.stmt) -> str | None:
    """The name of the function that an expression statement calls; "" for no call at all."""
    if not isinstance(statement, ast.Expr):
        return None
    if not isinstance(statement.value, ast.Call):
        return ""
    function = statement.value.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def promises_output(source: str) -> bool:
    """Whether a cell shows something when it runs: it prints, or ends in a bare expression."""
    plain = TransformerManager().transform_cell(source)
    body = ast.parse(plain).body
    if any(_called(statement) in _SHOW for statement in body):
        return True
    if not body or plain.rstrip().endswith(";"):
        return False
    name = _called(body[-1])
    if isinstance(body[-1], ast.Expr) and isinstance(body[-1].value, ast.Constant):
        return body[-1].value.value is not None
    return name is not None and name not in _RETURN_NOTHING | {"run_line_magic", "run_cell_magic"}


def outputs_present(nb: NotebookNode) -> list[str]:
    """Nobody cleared the outputs: nbval would compare nothing with them."""
    return [
        f"{name} prints or ends in an expression, but has no stored output: run it again "
        "(or end it with ';' when nothing shall be shown)"
        for name, cell in cells(nb, "code")
        if promises_output(cell.source) and not cell.outputs
    ]


def no_widgets(nb: NotebookNode) -> list[str]:
    """GitHub does not render a notebook with widget state, and shows nothing for a widget."""
    found = ["the notebook has metadata.widgets: delete it"] if "widgets" in nb.metadata else []
    return found + [
        f"{name} stores a widget as output: GitHub shows nothing there"
        for name, cell in cells(nb, "code")
        if any(WIDGET_VIEW in output.get("data", {}) for output in cell.outputs)
    ]


def errors_are_tagged(nb: NotebookNode) -> list[str]:
    """An error is stored only where it is meant, and then it is also compared by nbval."""
    found = []
    for name, cell in cells(nb, "code"):
        stored = any(output.output_type == "error" for output in cell.outputs)
        meant = "raises-exception" in tags(cell)
        if stored and not meant:
            found.append(f"{name} stores an error but is not tagged raises-exception")
        if meant and not stored:
            found.append(f"{name} is tagged raises-exception but stores no error")
        if meant and "nbval-check-output" not in tags(cell):
            found.append(
                f"{name} is tagged raises-exception and must also be tagged nbval-check-output, "
                "or a run that raises nothing passes"
            )
    return found


def known_tags(nb: NotebookNode) -> list[str]:
    """A mistyped tag does nothing and says nothing; nbval-skip would hide a broken cell."""
    return [
        f"{name} has the tag {tag!r}, which means nothing here; known: {', '.join(sorted(TAGS))}"
        for name, cell in cells(nb, "code")
        for tag in sorted(tags(cell) - TAGS)
    ]


def no_nbval_comments(nb: NotebookNode) -> list[str]:
    """Learners read the code: nbval is told by tags in the metadata."""
    return [
        f"{name} has an nbval comment: use the cell's tags instead"
        for name, cell in cells(nb, "code")
        if re.search(r"^\s*#\s*(NBVAL_|PYTEST_VALIDATE_)", cell.source, re.MULTILINE)
    ]


def short_cells(nb: NotebookNode) -> list[str]:
    found = []
    for name, cell in cells(nb, "code"):
        lines = len(cell.source.splitlines())
        if lines > MAX_CELL_LINES:
            found.append(f"{name} has {lines} lines; at most {MAX_CELL_LINES} are allowed")
    return found


_MACHINE_PATH = re.compile(
    r"(?<![\w.:/<~\-])/(?:home|root|Users|tmp|work|workspace|content|opt|mnt|var|private|usr|etc|"
    r"srv|data|proc|venv)/[\w.\-]+"
    r"|\b[A-Z]:\\+\w+"
    r"|\bfile:///\S+"
)


def no_machine_paths(nb: NotebookNode) -> list[str]:
    """No absolute path of the machine on which the lesson was written."""
    found = []
    for kind in ("code", "markdown"):
        for name, cell in cells(nb, kind):
            for text in [cell.source, *output_texts(cell)]:
                found += [
                    f"{name} shows the path {match.group()!r} of one machine"
                    for match in _MACHINE_PATH.finditer(text)
                ]
    return found


_SECONDS = re.compile(
    r"(?<![\w.])\d+(?:\.\d+)?\s?(?:s|sec|secs|seconds?|ms|milliseconds?|µs|us|min|minutes?)\b"
    r"|\b\d+:\d\d:\d\d\b|\b(?:tokens|it|samples|steps)/s\b"
)
_SECONDS_COLUMN = re.compile(r"<th[^>]*>[^<]*\b(?:seconds|minutes|ms)\b[^<]*</th>")


def measured_seconds_ignored(nb: NotebookNode) -> list[str]:
    """Times differ from run to run: nbval must not compare them."""
    found = []
    for name, cell in cells(nb, "code"):
        if tags(cell) & {"nbval-ignore-output", "quoted-seconds"}:
            continue
        html = "".join(o.get("data", {}).get("text/html", "") for o in cell.outputs)
        match = _SECONDS_COLUMN.search(html) or next(
            filter(None, map(_SECONDS.search, output_texts(cell))), None
        )
        if match:
            found.append(
                f"{name} shows a time ({without_markup(match.group()).strip()!r}): tag it "
                "nbval-ignore-output and print what can be compared in the next cell, or tag it "
                "quoted-seconds if the time is not measured"
            )
    return found


# --- readers ----------------------------------------------------------------------------------


def figures_have_alt(nb: NotebookNode) -> list[str]:
    """Every picture says in words what it shows, in the markdown and in the outputs."""
    found = []
    for name, cell in cells(nb, "markdown"):
        text = without_fences(cell.source)
        if any(not alt.strip() for alt in re.findall(r"!\[([^\]]*)\]", text)):
            found.append(f"{name} has an image without alt text: write ![what it shows](…)")
        if any(not (alt or "").strip() for alt in image_alts(text)):
            found.append(f"{name} has an <img> without alt text")
    for name, cell in cells(nb, "code"):
        for output in cell.outputs:
            data = output.get("data", {})
            if any(kind.startswith("image/") for kind in data):
                found.append(
                    f"{name} shows a bare picture without alt text: use "
                    "plots.show(fig, alt='what it shows')"
                )
            short = [a for a in image_alts(data.get("text/html", "")) if len(a or "") < MIN_ALT]
            if short:
                found.append(
                    f"{name} has a figure with the alt text {short[0]!r}: say in at least "
                    f"{MIN_ALT} characters what is drawn and what to see"
                )
    return found


def titled(nb: NotebookNode) -> list[str]:
    """The first cell is markdown, with the only first-level heading and a sentence below it."""
    titles = headings(nb, 1)
    found = [] if len(titles) == 1 else [f"there are {len(titles)} first-level headings, not one"]
    first = nb.cells[0] if nb.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        return [*found, "the first cell is not markdown that starts with '# title'"]
    promise = [line for line in first.source.splitlines()[1:] if re.match(r"\w", line)]
    return found if promise else [*found, "the first cell has no sentence that says the promise"]


def frame_in_order(nb: NotebookNode) -> list[str]:
    """Second-level headings of the frame that are there come in the frame's order."""
    order = FRAME_START + FRAME_END
    present = [heading for heading in headings(nb, 2) if heading in order]
    wanted = [heading for heading in order if heading in present]
    if present != wanted:
        return [f"the headings come as {', '.join(present)}; expected: {', '.join(wanted)}"]
    return []


def frame_complete(nb: NotebookNode) -> list[str]:
    """All of the frame, around sections numbered 1, 2, 3, …, and nothing beside it."""
    present = headings(nb, 2)
    numbered = [heading for heading in present if re.match(r"\d+\.\s", heading)]
    found = []
    if not numbered:
        found.append("there is no numbered section ('## 1. …')")
    for expected, heading in enumerate(numbered, 1):
        if not heading.startswith(f"{expected}. "):
            found.append(f"section {heading!r} should have the number {expected}")
    wanted = FRAME_START + numbered + FRAME_END
    if present != wanted:
        found.append(f"the '## ' headings are {present}; expected {wanted}")
    return found


def words(markdown: str) -> int:
    """Words that a learner reads: no code, no addresses, no markup."""
    text = re.sub(r"`[^`]*`", " code ", without_fences(markdown))
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return len(re.findall(r"[^\W\d_]+(?:['\u2019\-][^\W\d_]+)*", without_markup(text)))


def proportions(nb: NotebookNode) -> list[str]:
    """Generous bounds around the rhythm of STYLE: code cells, words, markdown per code cell."""
    code = len(list(cells(nb, "code")))
    markdown = [cell.source for _, cell in cells(nb, "markdown")]
    sizes = [
        ("code cells", code, CODE_CELLS),
        ("words", sum(map(words, markdown)), WORDS),
        ("markdown cells per code cell", round(len(markdown) / max(code, 1), 2), MARKDOWN_PER_CODE),
    ]
    return [
        f"the notebook has {size:,} {what}; expected {low:,} to {high:,}"
        for what, size, (low, high) in sizes
        if not low <= size <= high
    ]


# --- exercises --------------------------------------------------------------------------------


def _is_exercise(cell: NotebookNode) -> bool:
    return cell.cell_type == "markdown" and bool(
        re.search(r"^### Exercise", cell.source, re.MULTILINE)
    )


def _solution_faults(cell: NotebookNode) -> list[str]:
    found = []
    if not cell.metadata.get("jupyter", {}).get("source_hidden"):
        found.append("its solution is not folded: set metadata.jupyter.source_hidden to true")
    if "checks." not in cell.source:
        found.append("its solution does not call the exercise's check (checks.…)")
    if not any("passed" in text.lower() for text in output_texts(cell)):
        found.append("the output of its solution does not say 'passed'")
    return found


def exercises_solved(nb: NotebookNode) -> list[str]:
    """Each '### Exercise' has the learner's stub and, folded, a solution that passes the check."""
    found, paired = [], 0
    starts = [i for i, cell in enumerate(nb.cells) if _is_exercise(cell)]
    for start, end in itertools.pairwise([*starts, len(nb.cells)]):
        title = re.search(r"^### (Exercise.*)$", nb.cells[start].source, re.MULTILINE).group(1)
        code = [cell for cell in nb.cells[start + 1 : end] if cell.cell_type == "code"]
        stubs = [cell for cell in code if "exercise" in tags(cell)]
        solutions = [cell for cell in code if "solution" in tags(cell)]
        paired += len(stubs) + len(solutions)
        faults = []
        if len(stubs) != 1 or code[0] is not stubs[0]:
            faults.append("the code cell after it is not the stub (tag: exercise)")
        if len(solutions) != 1 or (stubs and code.index(solutions[0]) < code.index(stubs[0])):
            faults.append("no single solution (tag: solution) follows the stub")
        else:
            faults += _solution_faults(solutions[0])
        found += [f"{title}: {fault}" for fault in faults]
    tagged = sum(bool(tags(cell) & {"exercise", "solution"}) for _, cell in cells(nb, "code"))
    if tagged != paired:
        found.append("a cell is tagged exercise or solution outside of a '### Exercise'")
    return found


def enough_exercises(nb: NotebookNode) -> list[str]:
    count = sum(map(_is_exercise, nb.cells))
    low, high = EXERCISES
    kept = low <= count <= high
    return [] if kept else [f"there are {count} exercises; expected {low} to {high}"]


# --- numbers ----------------------------------------------------------------------------------

_SCALES = {"thousand": 1e3, "k": 1e3, "million": 1e6, "m": 1e6, "billion": 1e9, "b": 1e9}
_BYTES = {
    "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip

_PROSE_NUMBER = re.compile(
    r"(?<![\w.,/])(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)"
    r"(?:\s?(?P<scale>thousand|million|billion|[kKMB](?=\b)))?"
    r"(?:\s?(?P<unit>%|percent\b|[KMGT]i?B\b|\u00d7|x\b|ms\b|seconds?\b|s\b|tokens/s))?"
    r"(?![\w]|\.\d)"
)
_NAMED_VERSION = re.compile(
    r"\b(?:Python|PyTorch|torch|transformers|peft|PEFT|bitsandbytes|datasets|accelerate|numpy|"
    r"JupyterLab|CUDA|Llama|Qwen|Mistral|Phi|GPT|version|section|sections|lesson|lessons|"
    r"notebook|equation|Equation|Table|Figure)\s+v?\d+(?:\.\d+)*"
    r"|\bv?\d+\.\d+\.\d+\w*|\bC\d{3}\b|\barXiv:\S+"
)
_CELL_NUMBER = re.compile(r"(?<![\w.])\d[\d,_]*(?:\.\d+)?(?:[eE][+-]?\d+)?")


def plain_prose(markdown: str) -> str:
    """What is left to check: no code, formulas, headings, quoted lines, addresses, versions."""
    text = without_fences(markdown)
    text = re.sub(r"^\s*(?:>|#{1,6}\s).*$", " ", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*\d+[.)]\s", " ", text, flags=re.MULTILINE)
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$|``.+?``|`[^`]*`", " ", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", " ", text)
    return _NAMED_VERSION.sub(" ", without_markup(re.sub(r"https?://\S+", " ", text)))


def _needs_source(match: re.Match[str]) -> bool:
    """At least three significant digits, a decimal point or a unit; no year, no model's size."""
    number, scale, unit = match["number"], match["scale"], match["unit"]
    if scale in {"M", "B", "k", "K"} and "." not in number and not unit:
        return False  # "a 7B model", "135M parameters": a name
    if re.fullmatch(r"(?:19[5-9]\d|20[0-3]\d)", number) and not unit:
        return False
    before = match.string[max(match.start() - 2, 0) : match.start()]
    if re.search(r"\w-$", before):
        return False  # part of a name: "DINOv2-small-518"
    significant = number.replace(",", "").lstrip("0.").rstrip("0" if "." not in number else "")
    return "." in number or bool(unit) or len(significant.replace(".", "")) >= 3


def _close(measured: float, prose: str) -> bool:
    """Whether the measured value, rounded to the digits that the prose shows, is the prose's."""
    digits = prose.replace(",", "")
    if "." in digits:
        step = 10.0 ** -len(digits.split(".")[1])
    else:
        zeros = len(digits) - len(digits.rstrip("0"))
        step = 10.0**zeros if zeros >= 3 else 1.0
    return abs(measured - float(digits)) <= 0.5 * step * (1 + 1e-9)


def _candidates(value: float, scale: str | None, unit: str | None) -> Iterator[float]:
    """The value as the prose may have written it: in millions, percent, megabytes, …"""
    if scale:
        yield value / _SCALES[scale.lower()]
    yield value
    if unit in {"%", "percent"}:
        yield value * 100
    if unit in _BYTES:
        yield value / _BYTES[unit]
    if unit == "ms":
        yield value * 1000


def cell_numbers(nb: NotebookNode) -> set[float]:
    """Every number in the sources and outputs of the code cells."""
    texts = (t for _, cell in cells(nb, "code") for t in [cell.source, *output_texts(cell)])
    found = itertools.chain.from_iterable(_CELL_NUMBER.findall(text) for text in texts)
    return {float(number.rstrip(",_").replace(",", "").replace("_", "")) for number in found}


def prose_numbers_measured(nb: NotebookNode) -> list[str]:
    """A number in the prose is among those of a code cell's source or output.

    Checked are numbers with three significant digits, a decimal point or a unit. Exempt are
    quoted lines ('> …'), code, headings, links, formulas, versions, years, claims' ids, sizes in
    names ("7B") and the section 'You need', whose minutes and memory are conditions.
    """
    known = cell_numbers(nb)
    found = []
    for name, section, text in _sections(nb):
        if section == "You need":
            continue
        for match in _PROSE_NUMBER.finditer(plain_prose(text)):
            number, scale, unit = match["number"], match["scale"], match["unit"]
            if _needs_source(match) and not any(
                _close(candidate, number)
                for value in known
                for candidate in _candidates(value, scale, unit)
            ):
                found.append(f"{name} says {match.group().strip()!r}, which no code cell shows")
    return found


def _sections(nb: NotebookNode) -> Iterator[tuple[str, str, str]]:
    """The markdown in parts (cell's name, '## ' heading that it stands under, text)."""
    section = ""
    for name, cell in cells(nb, "markdown"):
        for part in re.split(r"^(?=## )", cell.source, flags=re.MULTILINE):
            if part.startswith("## "):
                section = part[3:].partition("\n")[0].strip()
            yield name, section, part


RULES: tuple[Rule, ...] = (
    executed_in_order,
    outputs_present,
    no_widgets,
    errors_are_tagged,
    known_tags,
    no_nbval_comments,
    short_cells,
    no_machine_paths,
    measured_seconds_ignored,
    figures_have_alt,
    titled,
    frame_in_order,
    exercises_solved,
    prose_numbers_measured,
)
LESSON_RULES: tuple[Rule, ...] = (frame_complete, proportions, enough_exercises)
