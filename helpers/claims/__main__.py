"""`python -m helpers.claims status | update | check | page`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from . import page
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
        epilog="status: counts. update: collect the verdicts from notebooks and tests, and write "
        "the page. check: compare them with the ledger, exit 1 on a difference. page: write "
        "docs/claims.md and the README's findings from the ledger.",
    )
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(arguments).command
    try:
        lines = COMMANDS[command](ROOT)
    except ClaimError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(lines or [NOTHING[command]]))
    return 1 if command == "check" and lines else 0


def _pages(root: Path) -> list[str]:
    return [f"{name} is written." for name in page.write(root)]


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "status": lambda root: [status(root).to_string()],
    "update": lambda root: [*update(root), *_pages(root)],
    "check": problems,
    "page": _pages,
}
NOTHING = {
    "update": "The ledger was up to date.",
    "check": "Ledger, notebooks and tests agree.",
    "page": f"{page.PAGE} and README.md were up to date.",
}


if __name__ == "__main__":
    sys.exit(main())
