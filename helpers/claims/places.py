"""Where claims are settled, and whether the ledger says what was computed there.

Source: this course's own.
Taught in: notebook 00, section 3.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .book import VERDICTS, Claim, read, write
from .rules import ClaimError
from .verdicts import RECORD, parse_line, stored


@dataclass(frozen=True)
class Found:
    """A printed judgement where it was computed: a notebook's stored output, or a test's record."""

    place: str
    line: str

    @property
    def parts(self) -> dict[str, str]:
        """The columns of the ledger that the line states."""
        return parse_line(self.line) or {}

    @property
    def id(self) -> str:
        """The claim that the line judges, such as C017."""
        return self.parts["id"]


_CALL = re.compile(r"\b(?:judge|out_of_reach)\(\s*[\"'](C\d+)[\"']")


def in_notebooks(root: Path) -> list[Found]:
    """Every verdict stored in an output of the notebooks, in their order."""
    return [Found(place, line) for place, cell in _cells(root) for line in _shown(cell)]


def _notebooks(root: Path) -> list[Path]:
    files = sorted((root / "notebooks").rglob("*.ipynb"))
    return [file for file in files if ".ipynb_checkpoints" not in file.parts]


def _cells(root: Path) -> Iterator[tuple[str, dict]]:
    """Notebook and code cell, in order."""
    for file in _notebooks(root):
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                yield file.relative_to(root).as_posix(), cell


def _shown(cell: dict) -> list[str]:
    texts = [
        "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))
        for output in cell["outputs"]
    ]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return [line for line in lines if parse_line(line)]


_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


def headings(root: Path) -> dict[tuple[str, str], str]:
    """Notebook and claim to the heading above the cell that settles it, "" where there is none."""
    found: dict[tuple[str, str], str] = {}
    for file in _notebooks(root):
        place, above = file.relative_to(root).as_posix(), [""]
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                above += _HEADING.findall(_FENCE.sub("", "".join(cell["source"])))
            elif cell["cell_type"] == "code":
                for line in _shown(cell):
                    found.setdefault((place, Found(place, line).id), above[-1])
    return found


def in_tests(root: Path) -> list[tuple[str, str]]:
    """Test and claim of every `claims.settle("C…", …)` that the tests contain."""
    return [
        (f"{file.relative_to(root).as_posix()}::{name}", id)
        for file in sorted((root / "tests").rglob("test_*.py"))
        for name, id in _settled(ast.parse(file.read_text(encoding="utf-8")), "")
    ]


def _settled(tree: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from _settled(node, f"{prefix}{node.name}::")
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            for call in filter(_is_settle, ast.walk(node)):
                yield prefix + node.name, call.args[0].value


def _is_settle(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) == "settle"
        and bool(node.args)
        and isinstance(node.args[0], ast.Constant)
    )


def problems(root: Path) -> list[str]:
    """What in the ledger, the notebooks and the tests does not agree; empty when all does."""
    claims = {claim.id: claim for claim in read(root)}
    found, tests = in_notebooks(root), in_tests(root)
    places = _places(found, tests)
    wrong = [_unlike(claims.get(one.id), one) for one in found]
    wrong += [_misplaced(claim, places.get(claim.id, [])) for claim in claims.values()]
    wrong += [f"{test} settles {id}, no such claim" for test, id in tests if id not in claims]
    return [text for text in wrong if text] + list(_cell_problems(root))


def _places(found: Iterable[Found], tests: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    places: dict[str, list[str]] = {}
    for place, id in [*((one.place, one.id) for one in found), *tests]:
        known = places.setdefault(id, [])
        if place not in known:
            known.append(place)
    return places


def _unlike(claim: Claim | None, found: Found) -> str:
    if claim is None:
        return f"{found.place} judges {found.id}, no such claim"
    row = repr(stored(claim))
    return "" if row == found.line else f"{found.place} has `{found.line}`, the ledger `{row}`"


def _misplaced(claim: Claim, places: list[str]) -> str:
    stored = claim.settled_by.split("; ") if claim.settled_by else []
    if claim.verdict not in VERDICTS:
        return f"{claim.id}: {claim.verdict!r} is no verdict"
    if claim.verdict == "open" and not stored and not places:
        return ""
    if not stored and not places:
        return f"{claim.id}: {claim.verdict} in the ledger, settled nowhere"
    if stored != places:
        return (
            f"{claim.id}: ledger names {stored or 'no place'}, it is settled in {places or 'none'}"
        )
    return f"{claim.id}: settled in {places}, open in the ledger" if claim.verdict == "open" else ""


def _cell_problems(root: Path) -> Iterator[str]:
    """Cells that judge without showing it, or show a verdict that they typed."""
    for place, cell in _cells(root):
        source = "".join(cell["source"])
        shown = {Found(place, line).id for line in _shown(cell)}
        stopped = any(output["output_type"] == "error" for output in cell["outputs"])
        for id in sorted(set(_CALL.findall(source)) - shown) if not stopped else ():
            yield f"{place} judges {id}, but its cell shows no verdict line for it"
        for id in sorted(id for id in shown if id not in source):
            yield f"{place} shows a verdict on {id} in a cell that does not judge it"
        if "· the note says" in source:
            yield f"{place} types a verdict line instead of computing it"


def update(root: Path) -> list[str]:
    """Writes into the ledger what notebooks and tests compute; returns a line for each change.

    Raises:
        ClaimError: two places disagree, a claim is unknown, or a test does not run.
    """
    before = read(root)
    found: dict[str, list[Found]] = {}
    for one in [*in_notebooks(root), *_run_tests(root)]:
        found.setdefault(one.id, []).append(one)
    if unknown := sorted(set(found) - {claim.id for claim in before}):
        raise ClaimError(f"No such claim in the ledger: {', '.join(unknown)}.")
    after = [_settle_row(claim, found.get(claim.id, [])) for claim in before]
    write(root, after)
    return [
        f"{old.verdict} → {stored(new)!r}"
        for old, new in zip(before, after, strict=True)
        if old != new
    ]


def _settle_row(claim: Claim, found: list[Found]) -> Claim:
    if not found:
        return replace(claim, settled_by="", verdict="open", measured="", condition="")
    if len({one.line for one in found}) > 1:
        texts = "\n".join(f"  {one.place}: {one.line}" for one in found)
        raise ClaimError(f"{claim.id} has different results in different places:\n{texts}")
    places = "; ".join(dict.fromkeys(one.place for one in found))
    return replace(claim, settled_by=places, **found[0].parts)


def _run_tests(root: Path) -> list[Found]:
    """Runs the tests that settle claims, and returns what they computed."""
    nodes = list(dict.fromkeys(test for test, _ in in_tests(root)))
    if not nodes:
        return []
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.tsv"
        record.touch()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *nodes]
        environment = {**os.environ, RECORD: str(record)}
        run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise ClaimError(f"A test that settles a claim fails:\n{run.stdout[-2000:]}")
        lines = record.read_text(encoding="utf-8").splitlines()
    return [Found(*line.split("\t")) for line in lines]
