"""The Colab cell prepares a fresh machine and leaves its torch and numpy alone."""

import json
import os
import shutil
import subprocess
import venv
from importlib import metadata
from pathlib import Path

import pytest
from checkout import repository
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import colab, stamp

# Older than what this environment has, so that pip would move it if it were allowed to.
OLDER_NUMPY = "numpy==2.3.*"
VERSIONS = "import numpy, torch; print(torch.__version__, numpy.__version__)"
IMPORTS = (
    "import sys; sys.path.insert(0, 'peft-measured');"
    "import peft, transformers, datasets, bitsandbytes, pandas;"
    "import helpers.models, helpers.data, helpers.adapters;"
    "print(helpers.adapters.__file__)"
)


# --- the parts --------------------------------------------------------------------------------


def test_requirements_leave_colabs_front_end_alone(tmp_path):
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text('[project]\ndependencies = ["JupyterLab>=4", "peft>=0.21"]\n', "utf-8")
    assert colab.requirements(pyproject) == ["peft>=0.21"]
    names = {Requirement(line).name for line in colab.requirements()}
    assert {"torch", "numpy", "peft", "transformers"} <= names
    assert not names & colab.NOT_IN_COLAB


def test_pins_name_the_exact_build():
    versions = [f"{name}=={metadata.version(name)}" for name in ("torch", "numpy")]
    assert colab.pins() == versions


def test_a_machine_without_torch_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(colab, "_versions", lambda: {"numpy": "2.3.0"})
    with pytest.raises(colab.ColabError, match=r"torch is not installed.*course\.py lab"):
        colab.pins()


def test_a_failing_installation_says_so_in_one_sentence(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="noise\nERROR: no such version\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(colab.ColabError, match="beside .*torch==.*: ERROR: no such version"):
        colab.install_missing()


def test_nothing_is_installed_where_nothing_is_missing(monkeypatch, capsys):
    commands = []
    done = subprocess.CompletedProcess([], 0, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or done)
    colab.install_missing()
    assert "Installed: nothing." in capsys.readouterr().out
    assert "--constraint" in commands[0]


# --- the whole, on a fresh machine ------------------------------------------------------------


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Path:
    """A Python as Colab has it: torch and numpy installed, little else. Returns the interpreter."""
    folder = tmp_path_factory.mktemp("colab") / "venv"
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    packages = python_says(python, "import sysconfig; print(sysconfig.get_path('purelib'))")
    # The wheel would take a minute to unpack; the files of this environment's torch are the same.
    for name in closure("torch"):
        link_package(name, Path(packages))
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", OLDER_NUMPY]
    done = subprocess.run(command, capture_output=True, text=True, env=plain_environment())
    if done.returncode:
        pytest.skip(f"pip cannot reach packages: {done.stderr.strip().splitlines()[-1]}")
    return python


def closure(name: str) -> set[str]:
    """A package and what it needs here, by name."""
    seen, waiting = set(), {(name, "")}
    while waiting:
        current, extra = waiting.pop()
        seen.add((current, extra))
        for needed in map(Requirement, metadata.requires(current) or []):
            if not needed.marker or needed.marker.evaluate({"extra": extra}):
                own = canonicalize_name(needed.name)
                waiting |= {(own, wanted) for wanted in ("", *needed.extras)} - seen
    return {current for current, _ in seen}


def link_package(name: str, target: Path) -> None:
    """Make a package of this environment appear in another one, without copying its bytes."""
    for file in metadata.files(name):
        source = Path(file.locate())
        inside = ".." not in file.parts and "__pycache__" not in file.parts
        # CUDA's packages share files, such as nvidia/__init__.py.
        if inside and source.is_file() and not (target / file).exists():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target / file)
            except OSError:  # another disk
                shutil.copy2(source, target / file)


def plain_environment(**more: str) -> dict[str, str]:
    """This process's variables without those that would leak its packages or its checkout."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_USER"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**kept, "PIP_NO_COMPILE": "1", **more}


def python_says(python: Path, code: str, folder: Path | None = None) -> str:
    done = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, cwd=folder,
        env=plain_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def first_code_cell(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])


@pytest.mark.slow
def test_the_first_cell_prepares_a_fresh_machine(machine, tmp_path):
    origin = repository(tmp_path / "origin")
    content = tmp_path / "content"  # what Colab opens: a folder that holds only the notebook
    content.mkdir()
    notebooks = sorted((origin / "notebooks").glob("*.ipynb"))
    source = stamp.colab_cell(stamp.address())
    if notebooks:
        shutil.copy2(notebooks[0], content)
        source = first_code_cell(content / notebooks[0].name)
    before = python_says(machine, VERSIONS)
    assert before.split()[1] != metadata.version("numpy")

    variables = plain_environment(
        COLAB_RELEASE_TAG="release", PEFT_MEASURED_REPOSITORY=origin.as_uri()
    )
    done = subprocess.run(
        [str(machine), "-c", source], cwd=content, env=variables, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert python_says(machine, VERSIONS) == before
    # A wheel from PyPI says "2.8.0" to pip and "2.8.0+cu128" in torch.__version__.
    kept = f"Kept: torch=={metadata.version('torch')}, numpy=={before.split()[1]}."
    assert kept in done.stdout
    assert "peft" in done.stdout and "bitsandbytes" in done.stdout
    assert python_says(machine, IMPORTS, content).startswith(str(content))
    # Once more, as after a restart of the session: there is nothing left to do.
    again = subprocess.run(
        [str(machine), "-c", source], cwd=content, env=variables, capture_output=True, text=True
    )
    assert again.returncode == 0 and "Installed: nothing." in again.stdout, again.stderr
