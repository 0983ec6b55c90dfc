"""From a claim and a measurement to a verdict.

Source: this course's own.
Taught in: notebook 00, section 3.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from .book import VERDICTS, Claim, find
from .rules import ClaimError, outcome, parse, plain

RECORD = "PEFT_MEASURED_RECORD"  # a file: `settle` writes there while `update` runs the tests


@dataclass(frozen=True, repr=False)
class Judgement:
    """A claim beside its measurement, with the verdict that follows from the two."""

    id: str
    claim: str
    says: str
    measured: str
    verdict: str
    condition: str

    def __repr__(self) -> str:
        says = f" {self.says}" if self.says else f": {self.claim}"
        parts = [f"{self.id} {self.verdict}", f"the note says{says}"]
        parts += [f"measured {self.measured}"] if self.measured else []
        return " · ".join([*parts, self.condition] if self.condition else parts)


def stored(claim: Claim) -> Judgement:
    """The judgement that the ledger's row holds."""
    return Judgement(
        claim.id, claim.claim, _says(claim), claim.measured, claim.verdict, claim.condition
    )


_LINE = re.compile(
    rf"(?P<id>C\d{{3}}) (?P<verdict>{'|'.join(VERDICTS[1:])}) · the note says:? .+?"
    r"( · measured (?P<measured>.+?))?( · (?P<condition>.+))?"
)


def parse_line(line: str) -> dict[str, str] | None:
    """id, verdict, measured and condition of a printed judgement; None for any other line."""
    match = _LINE.fullmatch(line)
    return {name: text or "" for name, text in match.groupdict().items()} if match else None


class Table(tuple[Judgement, ...]):
    """Judgements, shown one on each line."""

    def __repr__(self) -> str:
        return "\n".join(map(repr, self))


def judge(id: str, measured: object) -> Judgement:
    """Compares a measurement with what the note says.

    Args:
        id: of the ledger, such as "C017".
        measured: a bool, number, collection of names or `Seeds`, as the claim's rule asks, or a
            dict of condition to such a value.

    Raises:
        ClaimError: unknown id, a claim without a rule, or a value that the rule cannot read.

    Taught in: notebook 00, section 2.
    """
    return weigh(find(id), measured)


def out_of_reach(id: str, needs: str) -> Judgement:
    """The verdict on a claim that cannot be measured here; `needs` says what it would take.

    Raises:
        ClaimError: unknown id, or `needs` is no line of text.

    Taught in: notebook 02, section 4.
    """
    claim = find(id)
    condition = f"needs {plain(needs)}"
    return Judgement(id, claim.claim, _says(claim), "", "out of reach", condition)


def _says(claim: Claim) -> str:
    return parse(claim.expects).says if claim.expects else ""


def table(judgements: Iterable[Judgement]) -> Table:
    """Several judgements as the last value of one cell, a line each."""
    return Table(judgements)


def settle(id: str, measured: object) -> Judgement:
    """Judges a claim inside a test, and compares the verdict with the ledger's.

    Raises:
        AssertionError: the ledger has another verdict.
        ClaimError: as `judge`.
    """
    found = judge(id, measured)
    if record := os.environ.get(RECORD):
        place = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0].split("[")[0]
        with open(record, "a", encoding="utf-8") as stream:
            stream.write(f"{place}\t{found!r}\n")
        return found
    stored = find(id).verdict
    if found.verdict != stored:
        raise AssertionError(
            f"The ledger has {id} as {stored}, this test computes: {found!r}; "
            "if the test is right, run `python -m helpers.claims update`."
        )
    return found


def weigh(claim: Claim, measured: object) -> Judgement:
    """`judge` for a claim in hand: a pure function of the row and the measurement.

    Raises:
        ClaimError: the claim has no rule yet, or the measurement does not fit its rule.
    """
    if not claim.expects:
        raise ClaimError(f"{claim.id} has no rule yet: fill its `expects` in data/claims.csv.")
    rule = parse(claim.expects)
    try:
        text, verdict, condition = outcome(rule, measured)
    except ClaimError as error:
        raise ClaimError(f"{claim.id} expects `{claim.expects}`: {error}") from None
    if verdict == "wrong" and claim.was_true_in:
        verdict = "outdated"
        condition = " · ".join(filter(None, [f"was true in {claim.was_true_in}", condition]))
    return Judgement(claim.id, claim.claim, rule.says, text, verdict, condition)
