"""Runs the lessons and stores their outputs: in place, in order, in a fresh kernel.

`python -m helpers.notebooks [NAME …]` runs all of them, or those named ("01", "00_start_here").
`python -m helpers.notebooks stamp [ADDRESS]` writes the repository's address into all of them.
"""

import argparse
import difflib
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from helpers import stamp
from helpers.atomic import put_text

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CELL_SECONDS = 900  # a lesson takes two minutes; a busy machine takes several times as long
DEAD = (
    "The kernel died, as it does when memory runs out: close other programs, then run the same "
    "command again."
)
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
# In a traceback, the folders that lead to the course or to a package on one machine.
MACHINE_FOLDERS = re.compile(
    r"(?:~|…|[A-Za-z]:)?[/\\][^\s:'\"<>|\x1b]*[/\\](?=site-packages[/\\]|helpers[/\\]|python3\.\d+[/\\])"
)
# The same whoever ran it last: no Python patch version, no name of somebody's environment.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path, *, cell_seconds: int = CELL_SECONDS) -> float:
    """Runs a notebook in a fresh kernel, stores its outputs in the same file, returns the seconds.

    A cell tagged `raises-exception` may fail. After any other failure, or when stopped, the file
    is as it was before.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
        nbclient.exceptions.DeadKernelError: the kernel died, most often for lack of memory.
        TimeoutError: one cell ran for more than `cell_seconds`.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=cell_seconds,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    started = time.perf_counter()
    client.execute()
    seconds = time.perf_counter() - started
    store(tidy(notebook), path)
    return seconds


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Takes out, in place, what differs from run to run or cannot be shown later.

    Widgets keep their plain text only: their stored state stops some viewers from showing the
    notebook at all, and without its state a widget is an error message.
    """
    notebook.metadata.pop("widgets", None)
    notebook.metadata.update(nbformat.from_dict(METADATA))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:  # progress bars and warnings are for whoever watches the run
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET_VIEW, None)
            if output.output_type == "error":
                output.traceback = [_without_folders(line) for line in output.traceback]
    return notebook


def _without_folders(line: str) -> str:
    # The checkout by its name first: the pattern would stop at a space in it.
    checkout = str(NOTEBOOKS.parent)
    for name in (checkout, checkout.replace(str(Path.home()), "~", 1)):
        line = line.replace(name + os.sep, "…/")
    return MACHINE_FOLDERS.sub("…/", line)


def store(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Writes a notebook beside `path` and renames it, so that no reader meets half a file."""
    nbformat.validate(notebook)
    put_text(path, nbformat.writes(notebook) + "\n")


def find(names: list[str], folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks of a folder, in order, or those whose names begin with one of `names`.

    Raises:
        ValueError: a name fits none; the message gives the nearest one.
    """
    every = sorted(folder.glob("*.ipynb"))
    if not names:
        return every
    wanted = [Path(name).name.removesuffix(".ipynb") for name in names]
    for name in wanted:
        if not any(path.stem.startswith(name) for path in every):
            stems = [path.stem for path in every]
            near = difflib.get_close_matches(name, stems, n=1, cutoff=0.3)
            hint = (
                f"did you mean {near[0]!r}" if near else f"there are {', '.join(stems) or 'none'}"
            )
            raise ValueError(f"No notebook in {folder} begins with {name!r}; {hint}.")
    return [path for path in every if any(path.stem.startswith(name) for name in wanted)]


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 when every notebook ran to its end."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["stamp"]:
        return stamp.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m helpers.notebooks",
        description="Run notebooks in place, each in a fresh kernel, and store their outputs.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help='such as "01"; default: all')
    try:
        for path in find(parser.parse_args(arguments).names):
            print(f"{path.stem}: ", end="", flush=True)
            print(f"{execute(path):.1f} s", flush=True)
    except DeadKernelError:
        print(f"failed, the file is unchanged\n{DEAD}", file=sys.stderr)
        return 1
    except (ValueError, CellExecutionError, OSError) as error:
        print(f"failed, the file is unchanged\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped, the file is unchanged", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
