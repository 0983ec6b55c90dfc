"""Slides and learner copies, made from the lessons as they are stored; nothing is run.

`python -m helpers.workshop slides [NAME …]` writes `build/slides/NAME.slides.html`.
`python -m helpers.workshop learner [NAME …]` writes `build/learner/NAME.ipynb`, without solutions.
A NAME is what a lesson's name begins with, such as "03"; `--out FOLDER` writes elsewhere.
"""

import argparse
import copy
import math
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter
from nbconvert.preprocessors import TagRemovePreprocessor
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook
from traitlets.config import Config

from helpers import assets, notebooks
from helpers.atomic import put_text

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "workshop" / "templates"

WIDTH, HEIGHT = 1280, 800  # pixels of a slide; reveal.js scales it to the screen
LINES = 29  # what fits on a slide at the template's font size
LETTERS = 110  # of prose in a line
FIGURE_LINES = 17
FIGURE = "figure"  # the tag of a cell whose code a slide leaves out
# How a lesson asks for a prediction: "**Predict:** …", "**predict**: …", "Predict: …".
PREDICT = re.compile(r"\*\*[^*]*\bpredict:?\*\*(?!,)|\bPredict: ", re.IGNORECASE)
MATHJAX = "mathjax/MathJax.js?config=TeX-AMS-MML_HTMLorMML-full,Safe"

# Where in its wheel an archive keeps what a browser reads.
IN_WHEEL = {
    "reveal": "sphinx_revealjs/_static/revealjs/",
    "mathjax": "jupyter_server_mathjax/static/",
}


# --- Learner copies ------------------------------------------------------------------------------


def learner(path: Path, out: Path) -> Path:
    """Writes a lesson without its solutions; returns the file."""
    target = out / path.name
    out.mkdir(parents=True, exist_ok=True)
    notebooks.store(without_solutions(nbformat.read(path, as_version=4)), target)
    return target


def without_solutions(lesson: NotebookNode) -> NotebookNode:
    """A copy whose cells tagged `solution` are gone and whose exercises have no output."""
    remove = TagRemovePreprocessor(
        enabled=True, remove_cell_tags={"solution"}, remove_all_outputs_tags={"exercise"}
    )
    changed, _ = remove.preprocess(copy.deepcopy(lesson), {})
    return changed


# --- Slides --------------------------------------------------------------------------------------


def slides(path: Path, out: Path) -> Path:
    """Writes a lesson as slides that need no network; returns the file.

    reveal.js and MathJax come to lie beside it, in folders of their own, so that `out` can be
    carried away as a whole.

    Raises:
        AssetError: reveal.js or MathJax is neither in the cache nor to be had.
    """
    for asset in IN_WHEEL:
        assets.build_once(out / asset, lambda part, asset=asset: _unpack(asset, part))
    lesson = with_slides(nbformat.read(path, as_version=4))
    page, _ = _exporter().from_notebook_node(lesson, {"metadata": {"name": path.stem}})
    target = out / f"{path.stem}.slides.html"
    put_text(target, page)
    return target


def with_slides(lesson: NotebookNode) -> NotebookNode:
    """A copy in which each cell says which slide it stands on; no cell has an output less.

    A heading '## ' begins a slide. A heading '### ' begins a slide below it, and so does a cell
    that no longer fits. What answers a question to predict appears on the next click. A figure
    stands without its code. The Colab cell, set-up before section 1 and solutions are skipped.
    """
    cells = [part for cell in _marked(lesson) for part in _split(cell)]
    used, asked = 0, False
    for cell in cells:
        if _kind(cell) == "skip":
            continue
        height = lines(cell)
        kind = _kind(cell) or _placed(height, used, asked)
        used = used + height if kind in {"-", "fragment"} else height
        cell.metadata.slideshow = {"slide_type": kind}
        if _shows_figure(cell):
            cell.metadata.tags = [*cell.metadata.get("tags", []), FIGURE]
        asked = cell.cell_type == "markdown" and bool(PREDICT.search(cell.source))
    return new_notebook(cells=cells, metadata=lesson.metadata)


_HEADING = re.compile(r"(#{1,3}) ")
_BADGE = re.compile(r"^\[!\[.*\n?", re.MULTILINE)
_LINK = re.compile(r"\]\((\d\d_\w+)\.ipynb\)")
_TYPES = {"#": "slide", "##": "slide", "###": "subslide"}


def lines(cell: NotebookNode) -> int:
    """About how many lines of a slide a cell takes, its outputs included."""
    prose = cell.cell_type == "markdown"
    texts = [] if _shows_figure(cell) else cell.source.splitlines()
    size = sum(max(1, math.ceil(len(text) / LETTERS)) for text in texts) if prose else len(texts)
    return size + 1 + sum(map(_output_lines, cell.get("outputs", [])))


def _shows_figure(cell: NotebookNode) -> bool:
    outputs = cell.get("outputs", [])
    return any("<img" in output.get("data", {}).get("text/html", "") for output in outputs)


def _output_lines(output: NotebookNode) -> int:
    html = output.get("data", {}).get("text/html", "")
    if "<img" in html:
        return FIGURE_LINES
    if "<tr" in html:
        return html.count("<tr") + 1
    plain = output.get("text") or output.get("data", {}).get("text/plain", "")
    return sum(max(1, math.ceil(len(text) / LETTERS)) for text in plain.splitlines())


def _marked(lesson: NotebookNode) -> Iterator[NotebookNode]:
    """Copies of the cells; those that no slide shows are marked to be skipped."""
    begun = False
    for cell in copy.deepcopy(lesson.cells):
        begun = begun or cell.source.startswith("## 1. ")
        tags = set(cell.metadata.get("tags", []))
        if tags & {"colab", "solution"} or (cell.cell_type == "code" and not begun):
            cell.metadata.slideshow = {"slide_type": "skip"}
        yield cell


def _split(cell: NotebookNode) -> list[NotebookNode]:
    """A markdown cell in parts, one for each heading; any other cell as it is."""
    if cell.cell_type != "markdown":
        return [cell]
    parts, fenced = [""], False
    for line in _for_slides(cell.source).splitlines(keepends=True):
        fenced ^= line.startswith(("```", "~~~"))
        if _HEADING.match(line) and not fenced:
            parts.append("")
        parts[-1] += line
    return [new_markdown_cell(part.strip()) for part in parts if part.strip()]


def _for_slides(markdown: str) -> str:
    """Links lead to slides, and the Colab badge, a picture from the network, is gone."""
    return _LINK.sub(r"](\1.slides.html)", _BADGE.sub("", markdown))


def _kind(cell: NotebookNode) -> str | None:
    """What a cell's mark or its heading says; None where the room on the slide decides."""
    if "slideshow" in cell.metadata:
        return cell.metadata.slideshow.slide_type
    heading = _HEADING.match(cell.source) if cell.cell_type == "markdown" else None
    return _TYPES[heading[1]] if heading else None


def _placed(height: int, used: int, asked: bool) -> str:
    if used + height > LINES:
        return "subslide"
    return "fragment" if asked else "-"


def _exporter() -> SlidesExporter:
    without_code = {"enabled": True, "remove_input_tags": {FIGURE}}
    return SlidesExporter(
        config=Config({"TagRemovePreprocessor": without_code}),
        extra_template_basedirs=[str(TEMPLATES)],
        template_name="course",
        reveal_url_prefix="reveal",
        reveal_theme="white",
        reveal_transition="none",
        reveal_number="c/t",
        reveal_width=str(WIDTH),
        reveal_height=str(HEIGHT),
        mathjax_url=MATHJAX,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )


def _unpack(asset: str, folder: Path) -> None:
    """What a browser reads of an archive, without the folders around it."""
    start = IN_WHEEL[asset]
    with zipfile.ZipFile(assets.fetch(asset)) as wheel:
        for name in wheel.namelist():
            if name.startswith(start) and not name.endswith(("/", ".map")):
                target = folder / name.removeprefix(start)
                target.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(name) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)


# --- The command line ----------------------------------------------------------------------------


WAYS: dict[str, Callable[[Path, Path], Path]] = {"slides": slides, "learner": learner}


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 when everything was written."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.workshop",
        description="Slides and learner copies of the lessons, from what is stored in them.",
    )
    parser.add_argument("what", choices=WAYS)
    parser.add_argument("names", nargs="*", metavar="NAME", help='such as "03"; default: all')
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: build/WHAT")
    chosen = parser.parse_args(arguments)
    out = chosen.out or ROOT / "build" / chosen.what
    try:
        for path in notebooks.find(chosen.names):
            print(WAYS[chosen.what](path, out.resolve()), flush=True)
    except (ValueError, assets.AssetError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{out} cannot be written ({error.strerror}): give --out FOLDER.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
