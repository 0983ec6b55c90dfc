"""The two commands: what is installed, and how course.py behaves when a machine is not ready."""

import ast
import errno
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import course

ROOT = course.CHECKOUT
OLD = (3, 8, 18)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, str]:
    """Name and version of each line of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in rows}


def differences(environment: dict, requirements: list[str]) -> set[str]:
    """Requirements that only one of environment.yml and pyproject.toml has."""
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    listed = {str(Requirement(line)) for line in pip if not line.startswith("-")}
    return listed ^ {str(Requirement(line)) for line in requirements}


def unmet(requirements: list[str], pinned: dict[str, str]) -> list[str]:
    """Requirements without an exact version, or whose exact version lies outside the range."""
    parsed = [Requirement(line) for line in requirements]
    return [
        str(each)
        for each in parsed
        if not each.specifier.contains(pinned.get(canonicalize_name(each.name), "0.dev0"))
    ]


# --- What is installed ---------------------------------------------------------------------------


def test_conda_and_pip_install_the_same() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert differences(environment, course.requirements(ROOT)) == set()
    assert f"python{project()['requires-python']}" in environment["dependencies"][0]
    pip = environment["dependencies"][-1]["pip"]
    assert "--constraint constraints.txt" in pip
    pip.remove("torch>=2.8,<3")
    assert differences(environment, course.requirements(ROOT)) == {"torch<3,>=2.8"}


def test_constraints_pin_every_dependency_inside_its_range() -> None:
    assert unmet(course.requirements(ROOT), pins()) == []
    assert unmet(course.requirements_of("site", ROOT), pins()) == []
    assert pins()["torch"] == "2.13.0"
    assert unmet(["torch>=3", "numpy>=2"], pins()) == ["torch>=3"]
    assert unmet(["absent>=1"], pins()) == ["absent>=1"]


def test_constraints_hold_versions_only() -> None:
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins().values()), (
        "no path, address or local part such as +cpu"
    )


def shut_out(python: str, wanted: dict[str, str | None]) -> list[str]:
    """Packages whose own Requires-Python excludes a Python version."""
    return [name for name, range_ in wanted.items() if python not in SpecifierSet(range_ or "")]


def test_the_pinned_versions_admit_every_python_that_the_course_admits() -> None:
    """Debian 12 has 3.11.2, and a pin that asks for 3.11.5 makes its pip search for minutes."""
    here = {canonicalize_name(each.name): each for each in metadata.distributions()}
    wanted = {
        name: here[name].metadata["Requires-Python"]
        for name, version in pins().items()
        if name in here and here[name].version.split("+")[0] == version
    }
    assert len(wanted) > 100
    for python in ("3.11.0", "3.12.0", "3.13.0"):
        assert shut_out(python, wanted) == []
    assert shut_out("3.11.2", {"a": ">=3.11.5", "b": None, "c": ">=3.8"}) == ["a"]


def test_course_asks_for_the_python_that_pyproject_asks_for() -> None:
    assert project()["requires-python"] == f">={course.OLDEST[0]}.{course.OLDEST[1]}"


def test_makefile_and_ci_call_course() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^([a-z ]+):\n\t@\$\(PYTHON\) course\.py \$@", makefile, re.MULTILINE)
    assert targets and set(targets[1].split()) == set(course.COMMANDS)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in ci and ci.splitlines()[-1] == "make test"
    is_clone = (ROOT / ".git").exists()  # an unpacked archive may have lost the right to run
    assert not is_clone or os.name == "nt" or os.access(ROOT / ".ci" / "run", os.X_OK)


# --- An old Python -------------------------------------------------------------------------------


def source() -> str:
    return (ROOT / "course.py").read_text(encoding="utf-8")


def test_an_old_python_can_parse_course() -> None:
    ast.parse(source(), feature_version=(3, 6))
    with pytest.raises(SyntaxError):
        ast.parse("(a := 1)", feature_version=(3, 6))


def test_an_old_python_reaches_the_check_first() -> None:
    """What stands above the check may only import what Python 3.6 has."""
    above = source().split("sys.exit(")[0]
    assert set(re.findall(r"^(?:import|from) (\S+)", above, re.MULTILINE)) == {
        "os",
        "shutil",
        "sys",
    }


def test_an_old_python_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course.shutil, "which", lambda name: None)
    said = course.python_problem(OLD, "/usr/bin/python3", "test")
    assert "3.11 or newer is needed, but /usr/bin/python3 is Python 3.8.18" in said
    assert "python3.12 course.py test" in said
    monkeypatch.setattr(course.shutil, "which", lambda name: name == "python3.13" or None)
    assert "make test PYTHON=python3.13" in course.python_problem(OLD, "python3", "test")
    assert course.python_problem((3, 11, 0), "python3", "test") == ""


# --- A machine that is not ready -----------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout's two lists, under a path with spaces and non-ASCII letters."""
    folder = tmp_path / "mein kurs äöü ł"
    folder.mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFT_MEASURED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pretend_complete(venv: Path, stamp: str) -> Path:
    """An environment as a complete set-up leaves it, with nothing in it."""
    python = course.venv_python(venv)
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text("")
    python.chmod(0o755)
    version = sys.version.split()[0]
    (venv / "pyvenv.cfg").write_text(f"home = x\nversion = {version}\n")
    course.write_stamp(venv, stamp)
    return python


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the slow steps, and lists those that were taken."""
    steps: list[str] = []

    def record(name: str) -> Callable[..., None]:
        def step(*arguments: object, needed: int = 0, advice: str = "") -> None:
            steps.append(name)
            if name == "make":
                pretend_complete(arguments[0], course.UNFINISHED)

        return step

    for name in ("make", "pip_install", "make_importable", "check_disk"):
        monkeypatch.setattr(course, name, record(name))
    return steps


def test_a_full_disk_is_said_before_anything_is_made(
    checkout: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = course.shutil._ntuple_diskusage(10**12, 10**12 - 10**9, 10**9)
    monkeypatch.setattr(course.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(
        course.SetupError, match=r"Only 1\.0 GB are free .* needs about 4 GB there: free"
    ):
        course.environment(checkout)
    assert not (checkout / ".venv").exists()


def test_a_disk_that_fills_up_meanwhile(
    checkout: Path, cache: Path, installs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(course, "pip_install", full)
    with pytest.raises(course.SetupError, match="is full: free about 4 GB"):
        course.environment(checkout)


def test_a_python_without_venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(course.SetupError, match="sudo apt install python3-venv"):
        course.make(tmp_path / ".venv", 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("OSError: [Errno 28] No space left on device", "is full"),
        ("Retrying after NewConnectionError: ...", "there is no network"),
        ("ERROR: No matching distribution found for torch==2.13.0", "Python 3.11 to 3.13"),
        ("ERROR: something else", "its message is above"),
    ],
)
def test_what_pip_says_becomes_one_sentence(words: str, said: str, tmp_path: Path) -> None:
    sentence = course.pip_sentence(words, tmp_path)
    assert said in sentence and "run the same command again" in sentence


def test_a_failed_program_shows_and_returns_its_words(capfd: pytest.CaptureFixture[str]) -> None:
    handle = os.open(os.devnull, os.O_RDWR)
    script = "import sys; sys.stderr.write('ERROR: Größe\\n'); sys.exit(3)"
    try:
        assert course.run([sys.executable, "-X", "utf8", "-c", script], handle)[0] == 3
    finally:
        os.close(handle)
    assert "ERROR: Gr" in capfd.readouterr().err


# --- The stamp -----------------------------------------------------------------------------------


def test_the_second_time_nothing_is_done(checkout: Path, cache: Path, installs: list[str]) -> None:
    python = course.environment(checkout)
    assert python == course.venv_python(checkout / ".venv")
    assert installs == ["check_disk", "check_disk", "make", "pip_install", "make_importable"]
    installs.clear()
    assert course.environment(checkout) == python
    assert installs == []


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml"])
def test_a_changed_list_is_installed_over(
    name: str, checkout: Path, cache: Path, installs: list[str]
) -> None:
    course.environment(checkout)
    installs.clear()
    text = (checkout / name).read_text(encoding="utf-8")
    (checkout / name).write_text(text.replace("torch", "tonch"), encoding="utf-8")
    course.environment(checkout)
    assert "pip_install" in installs and "make" not in installs


def test_what_is_no_dependency_installs_nothing(
    checkout: Path, cache: Path, installs: list[str]
) -> None:
    course.environment(checkout)
    installs.clear()
    text = (checkout / "pyproject.toml").read_text(encoding="utf-8")
    (checkout / "pyproject.toml").write_text(text.replace("OWNER", "somebody"), encoding="utf-8")
    course.environment(checkout)
    assert installs == []


def test_an_interrupted_set_up_starts_clean(
    checkout: Path, cache: Path, installs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        (checkout / ".venv" / "half a package").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(course, "pip_install", interrupted)
        with pytest.raises(KeyboardInterrupt):
            course.environment(checkout)
    assert course.read_stamp(checkout / ".venv") == course.UNFINISHED
    installs.clear()
    course.environment(checkout)
    assert "make" in installs
    assert not (checkout / ".venv" / "half a package").exists()


def test_another_python_version_starts_clean(
    checkout: Path, cache: Path, installs: list[str]
) -> None:
    pretend_complete(checkout / ".venv", "made by another version")
    (checkout / ".venv" / "pyvenv.cfg").write_text("home = x\nversion = 3.9.1\n")
    course.environment(checkout)
    assert "make" in installs


def test_somebody_elses_environment_is_kept(
    checkout: Path, cache: Path, installs: list[str]
) -> None:
    """An editor may have made `.venv` already: it is installed into, not removed."""
    pretend_complete(checkout / ".venv", "x")
    (checkout / ".venv" / course.STAMP).unlink()
    (checkout / ".venv" / "theirs").mkdir()
    course.environment(checkout)
    assert "make" not in installs
    assert (checkout / ".venv" / "theirs").exists()


def test_clear_keeps_what_a_link_points_at(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("")
    (tmp_path / ".venv" / "lib" / "deep").mkdir(parents=True)
    (tmp_path / ".venv" / "lib64").symlink_to(tmp_path / "elsewhere")
    course.clear(tmp_path / ".venv")
    assert list((tmp_path / ".venv").iterdir()) == []
    assert (tmp_path / "elsewhere" / "kept").exists()


# --- A checkout that cannot be written -----------------------------------------------------------


@pytest.fixture
def unwritable(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders in which no file can be made (chmod does not stop an administrator)."""
    closed = [checkout]
    real = tempfile.TemporaryFile

    def refuse(*, dir: Path) -> object:
        if dir in closed:
            raise PermissionError(errno.EROFS, "Read-only file system")
        return real(dir=dir)

    monkeypatch.setattr(course.tempfile, "TemporaryFile", refuse)
    return closed


def test_a_read_only_checkout_uses_the_cache(
    checkout: Path, cache: Path, installs: list[str], unwritable: list[Path]
) -> None:
    before = sorted(checkout.iterdir())
    python = course.environment(checkout)
    assert python.is_relative_to(cache)
    assert sorted(checkout.iterdir()) == before
    installs.clear()
    assert course.environment(checkout) == python and installs == []
    assert course.fallback(checkout) != course.fallback(checkout.parent)


def test_a_prepared_checkout_serves_those_who_cannot_write_it(
    checkout: Path, cache: Path, installs: list[str], unwritable: list[Path]
) -> None:
    python = pretend_complete(checkout / ".venv", course.fingerprint(checkout))
    assert course.environment(checkout) == python and installs == []


def test_nowhere_to_write(checkout: Path, cache: Path, unwritable: list[Path]) -> None:
    unwritable.append(cache)
    with pytest.raises(course.SetupError, match="set PEFT_MEASURED_CACHE to a folder that you"):
        course.environment(checkout)


def test_a_read_only_checkout_gives_the_learner_copies(
    checkout: Path, cache: Path, unwritable: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    notebooks = checkout / "notebooks"
    notebooks.mkdir()
    (notebooks / "00.ipynb").write_text("lesson")
    monkeypatch.setattr(course, "CHECKOUT", checkout)
    assert course.lab_folder() == checkout
    unwritable.append(notebooks)
    own = course.lab_folder() / "notebooks" / "00.ipynb"
    assert own.is_relative_to(cache) and own.read_text() == "lesson"
    own.write_text("my work")
    course.lab_folder()
    assert own.read_text() == "my work"


# --- Paths and locks -----------------------------------------------------------------------------


def test_helpers_can_be_imported_from_any_folder(checkout: Path, tmp_path: Path) -> None:
    """In a real, empty environment, and in a locale that cannot write the path's letters."""
    (checkout / "helpers").mkdir()
    (checkout / "helpers" / "__init__.py").write_text("WORD = 'found'\n")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    course.make_importable(checkout, venv)
    shown = subprocess.run(
        [course.venv_python(venv), "-c", "import helpers; print(helpers.WORD)"],
        cwd=tmp_path,
        env={**course.clean_variables(), "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "found\n" and shown.stderr == ""
    assert not list(checkout.glob("*.egg-info"))


HOLD = """
import os, sys, time, pathlib, course
with course.lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
    print("freed at", time.time(), flush=True)
"""


def start_holding(file: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file), str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_second_set_up_waits_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with start_holding(tmp_path / "lock", 0.7) as other:
        assert other.stdout.readline() == "held\n"
        with course.lock(tmp_path / "lock"):
            taken = time.time()
        freed = float(other.stdout.read().split()[-1])
    assert taken >= freed
    assert capsys.readouterr().out.count("Another set-up is running") == 1


def test_a_killed_set_up_frees_the_lock(tmp_path: Path) -> None:
    with start_holding(tmp_path / "lock", 600) as other:
        assert other.stdout.readline() == "held\n"
        other.kill()
    started = time.monotonic()
    with course.lock(tmp_path / "lock"):
        assert time.monotonic() - started < 5


@pytest.mark.skipif(os.name == "nt", reason="the lock is handed to child programs on POSIX only")
def test_a_killed_set_up_whose_pip_still_runs_keeps_the_lock(tmp_path: Path) -> None:
    with course.lock(tmp_path / "lock") as handle:
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(handle,)
        )
    other = os.open(tmp_path / "lock", os.O_RDWR)
    try:
        assert not course.try_lock(other)
        child.communicate(b"\n")
        assert course.try_lock(other)
    finally:
        os.close(other)


# --- The commands --------------------------------------------------------------------------------


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Module and arguments of each program that would have been started last."""
    seen: list[list[str]] = []
    monkeypatch.setattr(course, "assets", lambda python: None)
    monkeypatch.setattr(course, "environment", lambda checkout: Path("python-of-the-course"))
    monkeypatch.setattr(
        course, "hand_over", lambda python, arguments, folder: seen.append(arguments) or 0
    )
    return seen


def test_lab_starts_jupyterlab_on_this_machine_with_its_token(handed: list[list[str]]) -> None:
    assert course.main(["lab", "--", "--no-browser", "--port", "8899"]) == 0
    (words,) = handed
    assert words[0] == "jupyterlab" and words[-3:] == ["--no-browser", "--port", "8899"]
    assert "--ip=localhost" in words
    assert any(word.endswith("/lab/tree/notebooks/00_start_here.ipynb") for word in words)
    assert not any("token" in word or "password" in word for word in words)


def test_site_adds_its_tools_to_the_environment_then_builds(
    handed: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[list[str]] = []
    python = course.venv_python(tmp_path / ".venv")
    monkeypatch.setattr(course, "environment", lambda checkout: python)
    monkeypatch.setattr(
        course, "pip_install", lambda checkout, venv, needed, handle: installed.append(needed)
    )
    assert course.main(["site", "--", "--check"]) == 0
    assert handed == [["helpers.site", "--check"]]
    (needed,) = installed
    assert "sphinx" in [course.name_of(line) for line in needed]
    assert not set(needed) & set(course.requirements(ROOT)), "a tool of the site, no dependency"


def test_site_without_a_virtual_environment_names_what_is_missing(
    handed: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(course, "is_installed", lambda name: name != "furo")
    monkeypatch.setattr(course, "this_python", lambda: Path(sys.executable))
    assert course.main(["--no-venv", "site"]) == 1 and handed == []
    assert "lacks furo: leave out --no-venv" in capsys.readouterr().err


def test_test_checks_the_style_then_runs_pytest_once(
    handed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def done(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(command[2:])
        return subprocess.CompletedProcess(command, len(ran) == 3)

    monkeypatch.setattr(course.subprocess, "run", done)
    assert course.main(["test", "--", "-k", "models"]) == 0
    assert [words[:2] for words in ran] == [["ruff", "check"], ["ruff", "format"]]
    (pytest_words,) = handed
    assert pytest_words[0] == "pytest" and pytest_words[-2:] == ["-k", "models"]
    assert {"--nbval", "--nbval-current-env"} <= set(pytest_words)
    assert course.main(["test"]) == 1, "ruff found something, so pytest must not hide it"
    assert len(handed) == 1


def test_pytest_collects_tests_and_notebooks() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]
    assert options["ini_options"]["testpaths"] == ["tests", "notebooks"]


def test_a_failure_is_one_sentence_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(checkout: Path) -> Path:
        raise course.SetupError("No room: free some.")

    monkeypatch.setattr(course, "environment", fail)
    assert course.main(["lab"]) == 1
    assert capsys.readouterr().err == "\ncourse.py: No room: free some.\n"


def test_help_names_every_command() -> None:
    shown = subprocess.run(
        [sys.executable, ROOT / "course.py", "--help"], capture_output=True, text=True, check=True
    )
    assert all(name in shown.stdout for name in course.COMMANDS)


def test_no_venv_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert course.this_python() == Path(sys.executable)
    monkeypatch.setattr(course, "requirements", lambda checkout: ["pytest>=8", "absent-one>=1,<2"])
    with pytest.raises(course.SetupError, match="lacks absent-one: create the conda environment"):
        course.this_python()


def test_names_of_requirements() -> None:
    lines = ["torch>=2.8,<3", "pillow", "numpy ; python_version > '3'", "a-b[c]==1"]
    assert [course.name_of(line) for line in lines] == ["torch", "pillow", "numpy", "a-b"]


def test_foreign_python_variables_do_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("PIP_USER", "1")
    assert "PYTHONPATH" not in course.clean_variables()
    assert course.clean_variables()["PIP_USER"] == "0"
    assert course.variables(Path("x"))["HF_HUB_OFFLINE"] == "1"


def test_threads_spin_briefly_unless_the_user_says_otherwise(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert course.clean_variables()["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "GOMP_SPINCOUNT" not in course.clean_variables()
