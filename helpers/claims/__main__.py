"""`python -m helpers.claims status | update | check`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from .book import ROOT, VERDICTS, read
from .places import problems, update
from .rules import ClaimError


def status(root: Path) -> pd.DataFrame:
    """How many claims of each section have which verdict, with totals."""
    claims = pd.DataFrame([asdict(claim) for claim in read(root)])
    counts = pd.crosstab(claims["section"], claims["verdict"], margins=True, margins_name="all")
    order = [*dict.fromkeys(claims["section"]), "all"]
    columns = [verdict for verdict in VERDICTS if verdict in counts] + ["all"]
    return counts.loc[order, columns].rename_axis(index=None, columns=None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when all agrees."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.claims",
        description="The ledger of claims in data/claims.csv.",
        epilog="status: counts. update: collect the verdicts from notebooks and tests. "
        "check: compare them with the ledger, exit 1 on a difference.",
    )
    parser.add_argument("command", choices=("status", "update", "check"))
    command = parser.parse_args(arguments).command
    if command == "status":
        lines = [status(ROOT).to_string()]
    elif command == "update":
        try:
            lines = update(ROOT) or ["The ledger was up to date."]
        except ClaimError as error:
            print(error, file=sys.stderr)
            return 1
    else:
        lines = problems(ROOT)
    print("\n".join(lines or ["Ledger, notebooks and tests agree."]))
    return 1 if command == "check" and lines else 0


if __name__ == "__main__":
    sys.exit(main())
