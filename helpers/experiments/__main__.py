"""``python -m helpers.experiments [NAME …] [--seeds N]``: run or finish the stored studies.

Every finished run is one row of ``data/results/NAME.csv``, so that a study that was stopped goes on
where it was, and only what is missing is run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from helpers.atomic import DiskFull
from helpers.experiments import (
    adalora,
    dora,
    dora_speed,
    duration,
    freezing,
    full_vs_lora,
    hybrid,
    learning_rates,
    looks,
    magnitude_direction,
    merge_routes,
    onnx_export,
    ranks,
    replication,
    serving,
    soft_prompts,
    targets,
    texts,
    towers,
    weighted_merges,
)
from helpers.experiments.study import StudyError, run_study, set_aside

STUDIES = {
    study.name: study
    for study in (
        full_vs_lora.STUDY,
        learning_rates.STUDY,
        duration.STUDY,
        ranks.BY_TASK,
        ranks.BY_SIZE,
        texts.STUDY,
        targets.STUDY,
        towers.STUDY,
        freezing.STUDY,
        freezing.BY_TOWER,
        dora.RATES,
        dora.BY_TASK,
        magnitude_direction.STUDY,
        dora_speed.STUDY,
        adalora.STUDY,
        soft_prompts.STUDY,
        soft_prompts.ENCODER,
        replication.STUDY,
        merge_routes.STUDY,
        weighted_merges.STUDY,
        serving.STUDY,
        serving.START,
        onnx_export.STUDY,
        looks.STUDY,
        hybrid.STUDY,
        hybrid.RANKS,
    )
}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(prog="python -m helpers.experiments", description=__doc__)
    made.add_argument("name", nargs="*", help=f"one of: {', '.join(STUDIES)} (default: all)")
    made.add_argument("--seeds", type=int, help="seeds 0 to N-1 (default: 3, or 5 where stored so)")
    made.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the stored rows and run what is missing (the default); with --no-resume the "
        "stored table is kept as NAME.csv.old and everything is run again",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named studies, all of them by default."""
    options = parser()
    args = options.parse_args(arguments)
    unknown = [name for name in args.name if name not in STUDIES]
    if unknown:
        options.error(f"unknown study {unknown[0]!r}; there is {', '.join(STUDIES)}")
    if args.seeds is not None and args.seeds < 1:
        options.error(f"--seeds must be at least 1, not {args.seeds}")
    try:
        for name in args.name or STUDIES:
            if not args.resume:
                set_aside(STUDIES[name])
            run_study(STUDIES[name], seeds=range(args.seeds or STUDIES[name].seeds))
    except KeyboardInterrupt:
        print("stopped; finished runs are stored, the same command goes on", file=sys.stderr)
        return 130
    except (StudyError, DiskFull) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
