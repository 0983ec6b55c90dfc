"""The ledger itself: the rows of `data/claims.csv`.

Source: `data/claims.csv`, this course's ledger.
Taught in: notebook 00, section 3.
"""

import csv
import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd

from helpers.assets import DATA
from helpers.atomic import whole_file

from .rules import ClaimError

ROOT = DATA.parent
VERDICTS = ("open", "confirmed", "wrong", "outdated", "partly", "undecided", "out of reach")


@dataclass(frozen=True)
class Claim:
    """One row of the ledger; every field is the text of its column."""

    id: str
    section: str
    claim: str
    kind: str
    how_to_check: str
    expects: str = ""
    reading: str = ""  # how the claim was read into that rule, and why this tolerance
    was_true_in: str = ""  # older versions of which the claim was true
    settled_by: str = ""  # notebooks/NAME.ipynb or tests/FILE.py::TEST, several joined by "; "
    verdict: str = "open"
    measured: str = ""
    condition: str = ""


def ledger() -> pd.DataFrame:
    """The 209 claims, indexed by id; every column is text, empty where nothing is known."""
    return pd.DataFrame([asdict(claim) for claim in read(ROOT)]).set_index("id")


def find(id: str) -> Claim:
    """One claim of the ledger.

    Raises:
        ClaimError: no such id; the message names the nearest one.
    """
    claims = {claim.id: claim for claim in read(ROOT)}
    if id in claims:
        return claims[id]
    digits = "".join(filter(str.isdigit, str(id)))
    wanted = f"C{digits:0>3}"  # "17" and "C17" mean C017
    near = difflib.get_close_matches(wanted, claims, n=1, cutoff=0)
    raise ClaimError(f"There is no claim {id!r}; the nearest is {near[0]}.")


def read(root: Path) -> list[Claim]:
    """The rows of `data/claims.csv` under a repository's root."""
    with (root / "data" / "claims.csv").open(encoding="utf-8", newline="") as stream:
        return [Claim(**row) for row in csv.DictReader(stream)]


def write(root: Path, claims: Iterable[Claim]) -> None:
    """Writes the ledger beside the old one, then puts it in its place."""
    target = root / "data" / "claims.csv"
    with whole_file(target) as part, part.open("w", encoding="utf-8", newline="") as stream:
        columns = [field.name for field in fields(Claim)]
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(claim) for claim in claims)
