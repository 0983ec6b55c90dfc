"""`python -m helpers.vlm` trains the model of lesson 08 again and stores what was trained of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from helpers.assets import AssetError

from .model import FILE, about, store, trained
from .questions import questions, scores
from .train import CYCLES, SEED, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, stores, scores what was stored; 0 when done, 2 with one sentence when not."""
    parser = argparse.ArgumentParser(prog="python -m helpers.vlm", description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED, help="(%(default)s)")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=FILE, help="the file (the lesson's own)"
    )
    parser.add_argument(
        "--further", action="store_true", help="go on with the cycles that FILE lacks"
    )
    parser.add_argument("--score", action="store_true", help="score the stored file, train nothing")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if not args.score:
            done = about(args.out)["cycles"] if args.further else []
            model = trained(args.out) if args.further else None
            for cycle in CYCLES[len(done) :]:
                model, facts = train(cycle, args.seed, further=model)
                done = [*done, facts]
                store(model, {"cycles": done}, args.out)
        model = trained(args.out)  # what is scored is what was stored
        table = scores(model, questions("test"))
        store(model, about(args.out) | {"test": table.to_dict("index")}, args.out)
    except (AssetError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the file holds the cycles that were finished", file=sys.stderr)
        return 130
    print(table.round(3).to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
