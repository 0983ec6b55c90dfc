"""Command line: `python -m helpers.robustness [LESSON …]`."""

import argparse
import sys

from helpers import namespaces, notebooks
from helpers.atomic import put_text
from helpers.robustness import disk, stored, trials


def main(arguments: list[str] | None = None) -> int:
    """Runs lessons under hardships and stores the table; 0 when everything survived."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.robustness",
        description="Run lessons under hardship in a copy of the checkout, and store what came "
        "of it in data/robustness.csv and docs/robustness.md. The word `disk` instead of a lesson "
        "tries what the course writes on a disk that is full; `page` only writes the page anew.",
    )
    parser.add_argument("lessons", nargs="*", metavar="LESSON", help='such as "03"; default: all')
    parser.add_argument(
        "--only",
        action="append",
        choices=[one.name for one in trials.EVERY],
        help="a hardship; may be given several times; default: all",
    )
    parser.add_argument(
        "--missing", action="store_true", help="only what did not survive, or was not run, before"
    )
    options = parser.parse_args(arguments)
    if options.lessons == ["disk"]:
        return disk.on_a_small_disk()
    if options.lessons == ["page"]:
        put_text(stored.PAGE, stored.page(stored.load(), disk.writers()))
        return 0
    if namespaces.refusal():
        parser.error("this needs Linux, and a system that allows `unshare -rnm`")
    try:
        names = [path.stem for path in notebooks.find(options.lessons)]
    except ValueError as error:
        parser.error(str(error))
    wanted = [one for one in trials.EVERY if one.name in (options.only or [one.name])]
    stands = stored.done() if options.missing else set()
    survived = True
    for lesson in names:
        todo = [one for one in wanted if (lesson, one.name) not in stands]
        if not todo:
            continue
        with trials.scratch() as folder:
            for hardship in todo:
                outcome = trials.attempt(lesson, hardship, folder)
                rows = stored.put(lesson, hardship, outcome)
                put_text(stored.PAGE, stored.page(rows, disk.writers()))
                survived &= not outcome.broken
                print(line(lesson, hardship, outcome), flush=True)
    return 0 if survived else 1


def line(lesson: str, hardship: trials.Hardship, outcome: trials.Outcome) -> str:
    """One line for one run, and nbval's messages when something broke."""
    text = (
        f"{lesson}, {hardship.name}: {outcome.seconds:.0f} s, {outcome.memory / 1e9:.2f} GB, "
        f"{outcome.disk / 1e9:.2f} GB on disk, {outcome.cells} cells; "
        f"{'; '.join(outcome.broken) or 'survived'}"
    )
    return f"{text}\n{outcome.details}" if outcome.broken else text


if __name__ == "__main__":
    sys.exit(main())
