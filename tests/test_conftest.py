"""nbval, as conftest.py sets it up, ignores chance and sees every change that matters."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from helpers import notebooks

ROOT = Path(__file__).resolve().parent.parent

PICTURE = '<img alt="a rising line" src="data:image/png;base64,QUJD">'
DRAWING = '<svg xmlns="http://www.w3.org/2000/svg"></svg>'
SOURCES = [
    "import sys\nprint('progress', file=sys.stderr)",
    "import os\nprint(os.environ['HF_HUB_OFFLINE'])",
    "object()",
    f"from IPython.display import HTML, SVG\nHTML({PICTURE!r})",
    f"SVG({DRAWING!r})",
    "print('loss 0.4321')",
    "raise ValueError('rank 0')",
]
CHANCE = [
    (r"0x[0-9a-f]{8,}", "0x7f0123456789"),
    ("base64,QUJD", "base64,REVG"),
    ("<svg ", '<svg id=\\"r1\\" '),
]
MEANING = [
    (r'"1\\n"', r'"0\\n"'),
    ("<object at", "<thing at"),
    ("a rising line", "a falling line"),
    ("loss 0.4321", "loss 0.4322"),
    ("rank 0", "rank 1"),
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> str:
    """The text of a small notebook with all kinds of output, as it was run and stored."""
    path = tmp_path_factory.mktemp("nbval") / "sample.ipynb"
    cells = [new_code_cell(source) for source in SOURCES]
    cells[-1].metadata["tags"] = ["raises-exception", "nbval-check-output"]
    nbformat.write(new_notebook(cells=cells), path)
    notebooks.execute(path)
    return path.read_text(encoding="utf-8")


def edit_outputs(stored: str, changes: list[tuple[str, str]]) -> str:
    """Other outputs, same sources: what nbval meets when a cell now gives something else."""
    notebook = nbformat.reads(stored, as_version=4)
    for cell in notebook.cells:
        text = nbformat.writes(new_notebook(cells=[cell]))
        for pattern, other in changes:
            text = re.sub(pattern, other, text)
        cell.outputs = nbformat.reads(text, as_version=4).cells[0].outputs
    return nbformat.writes(notebook)


def nbval(folder: Path, *texts: str) -> subprocess.CompletedProcess:
    """pytest over these notebooks, with the course's conftest, from a folder far away."""
    for number, text in enumerate(texts):
        (folder / f"n{number}.ipynb").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider"]
    command += ["--nbval", "--nbval-current-env", "--rootdir", str(folder), str(folder)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}  # where `-p conftest` is found
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=variables)


def test_chance_is_not_compared(stored, tmp_path):
    changed = edit_outputs(stored, CHANCE)
    for pattern, other in CHANCE:
        assert other in changed, pattern
    done = nbval(tmp_path, changed)
    assert done.returncode == 0, done.stdout
    assert f"{len(SOURCES)} passed" in done.stdout


def test_meaning_is_compared(stored, tmp_path):
    changed = [edit_outputs(stored, [change]) for change in MEANING]
    done = nbval(tmp_path, *changed)
    failed = re.findall(r"^FAILED .*?n(\d)\.ipynb", done.stdout, re.MULTILINE)
    assert sorted(map(int, failed)) == list(range(len(MEANING))), done.stdout


def test_a_cell_that_no_longer_raises_fails(stored, tmp_path):
    done = nbval(tmp_path, stored.replace("raise ValueError('rank 0')", "ValueError('rank 0')"))
    assert "1 failed" in done.stdout, done.stdout


def test_tests_come_before_notebooks(request):
    suffixes = [item.path.suffix for item in request.session.items]
    assert suffixes == sorted(suffixes, key=lambda suffix: suffix == ".ipynb")
