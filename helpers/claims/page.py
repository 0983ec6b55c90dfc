"""The ledger for readers: a page with every claim, and the few lines about them in the README.

`python -m helpers.claims page` writes both. Their texts and figures are those of the ledger; by
hand are only the ids of `data/surprises.csv`, each with a line that says why it surprises.

Source: this course's own.
Taught in: notebook 00, section 3.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from helpers.atomic import put_text

from .book import VERDICTS, Claim, read
from .places import headings
from .rules import ClaimError

PAGE = "docs/claims.md"
LONGEST = 140  # letters of a figure or a condition in a table; the page folds the whole beside it
MARKS = ("<!-- findings: python -m helpers.claims page -->", "<!-- end of findings -->")

_SPECIAL = re.compile(r"[\\`*_\[\]<>|~$#&]")
_GROUP = re.compile(r"(holds|fails|undecided): (.+)")
_NO_FIGURE = re.compile(r"true|false|\d+ of \d+ conditions")

_MEANS = {
    "open": "no cell or test has settled it yet",
    "confirmed": "what was measured is what the note says",
    "wrong": "what was measured is something else",
    "outdated": "it was true in the older version that stands beside it, and is no longer",
    "partly": "it holds under some of the conditions that were tried, and not under others",
    "undecided": "the difference lies inside the spread of the seeds",
    "out of reach": "it cannot be measured here; the condition says what it would take",
}
_HEAD = ("claim", "the note says", "verdict", "measured", "condition", "settled in")


def write(root: Path) -> list[str]:
    """Writes the page and the README's part where they differ; returns the names of the changed.

    Raises:
        ClaimError: the README has no place for the findings, or `data/surprises.csv` names a
            claim that the ledger does not have.
    """
    texts = {PAGE: page(root), "README.md": readme(root)}
    changed = [name for name, text in texts.items() if _stored(root / name) != text]
    for name in changed:
        (root / name).parent.mkdir(exist_ok=True)
        put_text(root / name, texts[name])
    return changed


def page(root: Path) -> str:
    """The page of all claims, in Markdown: counts, then a table for each section of the note."""
    claims = read(root)
    sections = {claim.section: [] for claim in claims}
    for claim in claims:
        sections[claim.section].append(claim)
    above = headings(root)
    texts = [_opening(claims), _counts(sections)]
    for name, rows in sections.items():
        texts += [f"## {name}", f"{len(rows)} claims: {counted(rows)}."]
        texts += [_table(_HEAD, (_row(claim, above) for claim in rows))]
    return "\n\n".join(texts) + "\n"


def readme(root: Path) -> str:
    """The README with the findings of today between its two marks.

    Raises:
        ClaimError: a mark is missing.
    """
    text = (root / "README.md").read_text(encoding="utf-8")
    before, start, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (start and end):
        raise ClaimError(
            f"README.md has no place for the findings: put the lines `{MARKS[0]}` and "
            f"`{MARKS[1]}` where they belong."
        )
    return f"{before}{start}\n{findings(root)}\n{end}{after}"


def findings(root: Path) -> str:
    """How many claims have which verdict, and the ten that surprise most, in Markdown.

    Raises:
        ClaimError: data/surprises.csv names a claim that the ledger does not have.
    """
    claims = read(root)
    known = {claim.id: claim for claim in claims}
    chosen = surprises(root)
    if missing := [id for id in chosen if id not in known]:
        raise ClaimError(f"data/surprises.csv names {', '.join(missing)}, no claim of the ledger.")
    rows = [_surprise(known[id], why) for id, why in chosen.items()]
    head = ("", "the note says", "verdict", "measured", "why it surprises")
    link = f"[The page of all claims]({PAGE})"
    return (
        f"The verdicts on the note's {len(claims)} claims: {counted(claims)}.\n{link} has the "
        "figure, the condition and the cell for each. The ten that surprise most:\n\n"
        + _table(head, rows)
    )


def _surprise(claim: Claim, why: str) -> list[str]:
    link = f"[{claim.id}]({PAGE}#{claim.id.lower()})"
    return [link, _plain(claim.claim), claim.verdict, _plain(figure(claim)), _plain(why)]


def surprises(root: Path) -> dict[str, str]:
    """Claim to why it surprises, from `data/surprises.csv`, in its order."""
    with (root / "data" / "surprises.csv").open(encoding="utf-8", newline="") as stream:
        return {row["id"]: row["why"] for row in csv.DictReader(stream)}


def counted(claims: Iterable[Claim]) -> str:
    """Such as "67 confirmed, 34 wrong and 5 open"; verdicts that nobody has are left out."""
    numbers = Counter(claim.verdict for claim in claims)
    order = [*VERDICTS[1:], VERDICTS[0]]  # what is open comes last
    *most, last = [f"{numbers[verdict]} {verdict}" for verdict in order if numbers[verdict]]
    return f"{', '.join(most)} and {last}" if most else last


def figure(claim: Claim) -> str:
    """The measured figure in one short piece; where there is none, what held and what failed."""
    if claim.verdict == "open":
        return "not settled yet"
    if _NO_FIGURE.fullmatch(claim.measured) and claim.condition:
        return short(claim.condition)
    return short(claim.measured) or "–"


def short(text: str) -> str:
    """A figure or a condition in at most about `LONGEST` letters.

    Of several figures the first stays, without the spread of its seeds, and of a long condition
    how many held and failed.
    """
    if len(text) <= LONGEST:
        return text
    groups = [_GROUP.fullmatch(part) for part in text.split(" · ")]
    if all(groups):
        return " · ".join(f"{g[1]}: {_conditions(len(g[2].split('; ')))}" for g in groups)
    first, *others = text.split("; ")
    more = f", and {len(others)} more" if others else ""
    return first.partition(", means of ")[0] + more


def anchor(heading: str) -> str:
    """The fragment under which GitHub and the site know a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _conditions(number: int) -> str:
    return f"{number} condition{'s' if number > 1 else ''}"


def _stored(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _opening(claims: list[Claim]) -> str:
    verdicts = [verdict for verdict in VERDICTS if any(c.verdict == verdict for c in claims)]
    return "\n".join(
        [
            "# The claims and their verdicts",
            "",
            f"The note that this course measures makes {len(claims)} claims: {counted(claims)}.",
            "Each is held to a rule, in the column `expects` of `data/claims.csv`; the last column",
            "leads to the section or the test that settles it, and that you can run again.",
            "",
            *[f"- *{verdict}*: {_MEANS[verdict]}" for verdict in verdicts],
            "",
            "This page is made from the ledger: `python -m helpers.claims page`.",
        ]
    )


def _counts(sections: dict[str, list[Claim]]) -> str:
    every = [claim for rows in sections.values() for claim in rows]
    order = [verdict for verdict in VERDICTS if any(c.verdict == verdict for c in every)]
    linked = {f"[{name}](#{anchor(name)})": rows for name, rows in sections.items()}
    lines = []
    for name, rows in {**linked, "all": every}.items():
        numbers = Counter(claim.verdict for claim in rows)
        lines.append([name, *(str(numbers[verdict] or "–") for verdict in order), str(len(rows))])
    return _table(("section", *order, "all"), lines)


def _row(claim: Claim, above: dict[tuple[str, str], str]) -> list[str]:
    measured, condition = short(claim.measured), short(claim.condition)
    whole = [("measured", claim.measured, measured), ("condition", claim.condition, condition)]
    hidden = [f"{name}: {_plain(full)}" for name, full, shown in whole if full != shown]
    fold = f"<details><summary>in full</summary>{'<br>'.join(hidden)}</details>" if hidden else ""
    return [
        f'<a id="{claim.id.lower()}"></a>{claim.id}',
        _plain(claim.claim),
        claim.verdict,
        _plain(measured or ("not settled yet" if claim.verdict == "open" else "–")) + fold,
        _plain(condition) or "–",
        "<br>".join(_link(place, claim.id, above) for place in _split(claim.settled_by)) or "–",
    ]


def _split(places: str) -> list[str]:
    return places.split("; ") if places else []


def _link(place: str, id: str, above: dict[tuple[str, str], str]) -> str:
    """From the page to the heading above the cell, or to the test's file."""
    file, _, test = place.partition("::")
    if test:
        words = test.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        return f"[test: {words}](../{file})"
    heading = above.get((place, id), "")
    lesson = f"lesson {Path(file).stem.partition('_')[0]}"
    if not heading:
        return f"[{lesson}](../{file})"
    return f"[{lesson}: {_plain(heading)}](../{file}#{anchor(heading)})"


def _plain(text: str) -> str:
    """The text as Markdown that shows just that, in a cell of a table too."""
    return _SPECIAL.sub(lambda found: rf"\{found[0]}", text)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head)]
    lines += [["---"] * len(lines[0]), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
