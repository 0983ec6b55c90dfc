"""``python -m helpers.experiments [NAME …] [--seeds N]``: run or finish the stored studies."""

from __future__ import annotations

import argparse
import sys

from helpers.experiments.full_vs_lora import STUDY as FULL_VS_LORA
from helpers.experiments.study import StudyError, run_study

STUDIES = {study.name: study for study in (FULL_VS_LORA,)}


def main() -> int:
    """Run the named studies, all of them by default; finished rows are kept and skipped."""
    parser = argparse.ArgumentParser(prog="python -m helpers.experiments", description=__doc__)
    parser.add_argument("name", nargs="*", help=f"one of: {', '.join(STUDIES)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1 (default 3)")
    args = parser.parse_args()
    unknown = [name for name in args.name if name not in STUDIES]
    if unknown:
        parser.error(f"unknown study {unknown[0]!r}; there is {', '.join(STUDIES)}")
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {args.seeds}")
    try:
        for name in args.name or STUDIES:
            run_study(STUDIES[name], seeds=range(args.seeds))
    except KeyboardInterrupt:
        print("stopped; finished runs are stored, the same command goes on", file=sys.stderr)
        return 130
    except StudyError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
