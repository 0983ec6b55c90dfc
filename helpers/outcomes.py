"""What happened in a run of the tests and lessons on other versions: failed, or only worded anew.

A lesson's outputs are compared strictly with the stored ones. On other versions a number may be
rounded, or a sentence worded, in another way, and that is no failure. A cell has failed when it
raised, when it did not raise the error that it shows, when a claim in it has another verdict, or
when it prints False for True.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from helpers.claims import VERDICTS

KINDS = ("passed", "worded anew", "failed", "skipped")
_DIFFERS = "Cell outputs differ"
# It no longer raises, or raises something else.
_OTHER_ERROR = re.compile(
    r"Missing output fields from running code: \{[^}]*'ename'|mismatch 'ename'"
)
_VERDICT = re.compile(rf"(C\d{{3}}) ({'|'.join(VERDICTS)}) ·")
_CHECK = re.compile(r"\b(True|False)\b")
_JUDGES = re.compile(r"claims\.(judge|weigh|table)\(")


@dataclass(frozen=True)
class Case:
    """One test, or one cell of a lesson; ``part`` is a folder of tests or a lesson."""

    part: str
    name: str
    kind: str  # one of KINDS


def cases(report: Path) -> list[Case]:
    """The cases of a JUnit report that pytest wrote, less those that a stop left without a name.

    Raises:
        ValueError: the report is cut short, or no XML.
    """
    try:
        every = ElementTree.parse(report).getroot().iter("testcase")
    except ElementTree.ParseError as error:
        raise ValueError(f"{report} is no whole JUnit report: {error}.") from error
    return [_case(each) for each in every if each.get("classname")]


def _case(element: ElementTree.Element) -> Case:
    group, name = element.get("classname", ""), element.get("name", "")
    return Case(_part(group), f"{group}::{name}", _kind(element))


def _part(group: str) -> str:
    """ "tests.adapters.test_files" → "tests/adapters"; a lesson is a part of its own."""
    path = group.removesuffix(".ipynb").split(".")
    return "/".join(each for each in path if not each.startswith(("test_", "Test")))


def _kind(element: ElementTree.Element) -> str:
    for child in element:
        if child.tag in ("failure", "error"):
            is_same = only_worded_anew(f"{child.get('message')}\n{child.text}")
            return "worded anew" if is_same else "failed"
        if child.tag == "skipped":
            return "skipped"
    return "passed"


def only_worded_anew(message: str) -> bool:
    """Whether a failed cell ran as it should and has the stored verdicts, in other words.

    A cell that judges claims and whose message shows no verdict counts as failed: what is not seen
    is not known.
    """
    if _DIFFERS not in message or _OTHER_ERROR.search(message):
        return False
    if _held(message, "+") != _held(message, "-"):
        return False
    return bool(_VERDICT.search(message)) or not _JUDGES.search(message)


def _held(message: str, sign: str) -> tuple[set[tuple[str, ...]], list[str]]:
    """Verdicts and checks in the lines of one side of a difference: "+" is what was stored."""
    lines = re.findall(rf"^\s*{re.escape(sign)} (.*)$", message, re.MULTILINE)
    return set(_VERDICT.findall("\n".join(lines))), _CHECK.findall("\n".join(lines))


def table(found: Iterable[Case]) -> str:
    """A row for each part with the number of cases of each kind, then the names of the others."""
    found = list(found)
    parts = sorted({case.part for case in found})
    rows = [("", *KINDS), *(_row(part, [c for c in found if c.part == part]) for part in parts)]
    rows.append(_row("together", found))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    named = sorted(f"{c.kind}: {c.name}" for c in found if c.kind in ("failed", "worded anew"))
    return "\n".join([*lines, "", *named])


def _row(name: str, found: Sequence[Case]) -> tuple[str, ...]:
    counts = Counter(case.kind for case in found)
    return name, *(str(counts[kind]) for kind in KINDS)


def summary(found: Iterable[Case]) -> str:
    """All cases in one sentence: "1,800 passed, 3 worded anew, 0 failed, 4 skipped"."""
    counts = Counter(case.kind for case in found)
    return ", ".join(f"{counts[kind]:,} {kind}" for kind in KINDS)


def has_failed(found: Iterable[Case]) -> bool:
    """Whether anything failed; other words alone are no failure."""
    return any(case.kind == "failed" for case in found)
