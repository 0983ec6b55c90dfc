"""`python -m helpers.site [--check]`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from helpers.claims.book import ROOT

from .build import SiteError, build
from .links import broken

SITE = ROOT / "build" / "site"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when the site is there and every link in it leads somewhere."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.site",
        description="Render the course from its stored outputs into build/site.",
    )
    parser.add_argument("--check", action="store_true", help="check the links of what is there")
    try:
        return _check(SITE) if parser.parse_args(arguments).check else _build(SITE)
    except SiteError as error:
        print(error, file=sys.stderr)
        return 1


def _build(site: Path) -> int:
    started = time.perf_counter()
    build(ROOT, site)
    pages = len(list(site.rglob("*.html")))
    print(f"{pages} pages in {time.perf_counter() - started:.0f} s: open {site / 'index.html'}")
    return 0


def _check(site: Path) -> int:
    if not site.is_dir():
        raise SiteError(f"{site} is not there: run `python course.py site` first.")
    problems = broken(site)
    print("\n".join(problems or ["Every link leads somewhere."]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
