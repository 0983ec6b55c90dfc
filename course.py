"""The course's one entry point: sets everything up, then runs what you ask for.

    python course.py lab          JupyterLab on the first lesson
    python course.py test         ruff, pytest, and every notebook run and compared
    python course.py notebooks    run the notebooks and store their outputs
    python course.py models       only fetch and check the base models and data sets
    python course.py experiments  run the studies that are too slow for a lesson
    python course.py bench        the training loop's speed beside two others
    python course.py slides       slides of the lessons, from their stored outputs
    python course.py learner      copies of the lessons without the solutions
    python course.py site         the lessons and claims as a site, in build/site
    python course.py bundle       all of it as one archive that needs no network, in build
    python course.py versions     the tests on the oldest or newest libraries: `-- oldest`

More arguments follow two dashes: `python course.py test -- -k models`.
Only the standard library is used here, since nothing else is installed when it starts.
"""

# Everything down to the version check has to run on an old Python 3, which it refuses clearly;
# the rest only has to parse there.
import os
import shutil
import sys

OLDEST = (3, 11)


def python_problem(version: tuple, executable: str, command: str) -> str:
    """One sentence that says which Python to use instead, or "" when this one will do."""
    if tuple(version[:2]) >= OLDEST:
        return ""
    known = ["python3.%d" % minor for minor in range(14, 10, -1)]
    newer = next((name for name in known if shutil.which(name)), "")
    advice = "this machine has one, so run: make %s PYTHON=%s   (or: %s course.py %s)" % (
        command,
        newer,
        newer,
        command,
    )
    if not newer:
        advice = "install one, then run: python3.12 course.py %s   (Windows: py -3.12)" % command
    return "Python 3.11 or newer is needed, but %s is Python %s; %s." % (
        executable,
        ".".join(str(part) for part in version[:3]),
        advice,
    )


if python_problem(sys.version_info, sys.executable, "lab"):
    word = next((word for word in sys.argv[1:] if not word.startswith("-")), "lab")
    sys.exit(python_problem(sys.version_info, sys.executable, word))

import argparse
import contextlib
import errno
import hashlib
import importlib.util
import json
import platform
import signal
import subprocess
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent
STAMP = "peft-measured.stamp"
UNFINISHED = "unfinished"
WORKERS = 2  # processes of `make test`; each holds a model or two
PYTEST = ("pytest", "--nbval", "--nbval-current-env", "--numprocesses", str(WORKERS))
PYTEST += ("--dist", "loadfile", "--no-loadscope-reorder")
OFFLINE = "offline"  # a folder that only a bundle has: packages, models, data
BUNDLE = "bundle.json"  # in it: which system the packages are for, and their SHA-256
FREE_BYTES = 4 * 10**9  # the environment, the base models, and what pip unpacks meanwhile
STARTED = time.monotonic()


class SetupError(Exception):
    """What failed and what to do about it, in one sentence."""


def main(arguments: list[str]) -> int:
    """Sets up, then hands over to the command; returns the exit status."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a console that lacks a path's letters
    sys.stderr.reconfigure(errors="backslashreplace")
    own, extra = split_extra(arguments)
    options = parser().parse_args(own)
    try:
        python = this_python() if options.no_venv else environment(CHECKOUT)
        return COMMANDS[options.command](python, extra)
    except SetupError as error:
        print(f"\ncourse.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command cleans up and goes on.", file=sys.stderr)
        return 130


def split_extra(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, and what stands behind it."""
    if "--" not in arguments:
        return arguments, []
    cut = arguments.index("--")
    return arguments[:cut], arguments[cut + 1 :]


def parser() -> argparse.ArgumentParser:
    """The command line; everything behind `--` belongs to the command's own program."""
    made = argparse.ArgumentParser(
        prog="course.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python course.py [-h] [--no-venv] COMMAND [-- MORE ARGUMENTS]",
    )
    made.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    made.add_argument(
        "--no-venv",
        action="store_true",
        help="install nothing and use the Python that runs this (a conda environment, an image)",
    )
    return made


def say(text: str) -> None:
    """One progress line with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


# --- The virtual environment ---------------------------------------------------------------------


def environment(checkout: Path) -> Path:
    """The Python of a complete environment for this checkout, made or repaired when needed.

    Raises:
        SetupError: nowhere to write, too little disk, no venv module, or pip failed.
    """
    expected = fingerprint(checkout)
    places = (checkout / ".venv", fallback(checkout))
    for venv in places:
        if is_ready(venv, expected):
            return venv_python(venv)
    venv = first_writable(places)
    try:
        with lock(venv.parent / f"{venv.name}.lock") as handle:
            if not is_ready(venv, expected):  # another set-up may have made it meanwhile
                install(checkout, venv, expected, handle)
    except OSError as error:
        raise SetupError(disk_sentence(error, venv)) from error
    return venv_python(venv)


def fingerprint(checkout: Path) -> str:
    """Changes whenever the environment has to be installed again."""
    parts = [
        "%d.%d" % sys.version_info[:2],
        str(checkout),  # the environment points at it
        *requirements(checkout),
        (checkout / "constraints.txt").read_text(encoding="utf-8"),
    ]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def requirements(checkout: Path) -> list[str]:
    """Every requirement of pyproject.toml, those of the extra `dev` included."""
    return read_project(checkout)["dependencies"] + requirements_of("dev", checkout)


def requirements_of(extra: str, checkout: Path) -> list[str]:
    """The requirements of one extra of pyproject.toml."""
    return read_project(checkout)["optional-dependencies"][extra]


def read_project(checkout: Path) -> dict:
    """The table `project` of pyproject.toml."""
    return tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def cache_folder() -> Path:
    """Where to write when the checkout cannot be written."""
    if os.environ.get("PEFT_MEASURED_CACHE"):
        return Path(os.environ["PEFT_MEASURED_CACHE"]).expanduser().resolve()
    return Path("~/.cache/peft-measured").expanduser()


def fallback(checkout: Path) -> Path:
    """The environment's place outside a checkout; two checkouts never share one."""
    name = hashlib.sha256(os.fsencode(checkout)).hexdigest()[:12]
    return cache_folder() / f"venv-{name}"


def first_writable(places: tuple[Path, ...]) -> Path:
    """The first place whose parent folder can be written (tried, since Windows only tells then)."""
    for place in places:
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place.parent):
                return place
    folders = " nor ".join(str(place.parent) for place in places)
    raise SetupError(
        f"Neither {folders} can be written (no right to, or the disk is full): "
        "set PEFT_MEASURED_CACHE to a folder that you may write to."
    )


def venv_python(venv: Path) -> Path:
    """The interpreter inside a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_ready(venv: Path, expected: str) -> bool:
    """Whether the last installation was completed, for the same requirements and Python."""
    return read_stamp(venv) == expected and os.access(venv_python(venv), os.X_OK)


def read_stamp(venv: Path) -> str:
    """A fingerprint, UNFINISHED, or "" where this script has never installed anything."""
    try:
        return (venv / STAMP).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def write_stamp(venv: Path, text: str) -> None:
    """Replaces the stamp in one step, so that a killed set-up never looks complete."""
    beside = venv / f"{STAMP}.new"
    beside.write_text(text + "\n", encoding="ascii")
    os.replace(beside, venv / STAMP)


def install(checkout: Path, venv: Path, expected: str, handle: int) -> None:
    """Fills `venv`; what an interrupted set-up has left is removed first."""
    check_disk(venv.parent)
    check_disk(Path(tempfile.gettempdir()), needed=10**9, advice="set TMPDIR to a larger disk")
    fresh = read_stamp(venv) == UNFINISHED or not has_this_python(venv)
    if fresh:
        clear(venv)
    write_stamp(venv, UNFINISHED)
    if fresh:
        make(venv, handle)
    pip_install(checkout, venv, requirements(checkout), handle)
    make_importable(checkout, venv)
    write_stamp(venv, expected)
    say("The environment is complete.")


def disk_sentence(error: OSError, venv: Path) -> str:
    """What an error of the file system means for a reader."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk of {venv} is full: free about 4 GB, then run the same command again."
    return (
        f"{venv} could not be written ({error.strerror}): close the programs that use it, "
        "remove that folder, then run the same command again."
    )


def check_disk(
    folder: Path, needed: int = FREE_BYTES, advice: str = "move the course to another disk"
) -> None:
    """Raises SetupError when fewer than `needed` bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(
            f"Only {free / 1e9:.1f} GB are free on the disk of {folder} and a first set-up needs "
            f"about {needed / 1e9:.0f} GB there: free some space, or {advice}."
        )


def has_this_python(venv: Path) -> bool:
    """Whether an environment exists that works and has the running Python's minor version."""
    try:
        config = (venv / "pyvenv.cfg").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    lines = dict(line.split(" = ", 1) for line in config.splitlines() if " = " in line)
    wanted = ["%d" % part for part in sys.version_info[:2]]
    is_same = lines.get("version", "").split(".")[:2] == wanted
    return is_same and os.access(venv_python(venv), os.X_OK)


def clear(venv: Path) -> None:
    """Empties the folder, which itself stays: it may be a link to another disk."""
    venv.mkdir(parents=True, exist_ok=True)
    for entry in venv.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def make(venv: Path, handle: int) -> None:
    """A new virtual environment, from the Python below any environment that runs this."""
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        raise SetupError(
            "This Python cannot make virtual environments, since its venv module is missing: on "
            "Debian or Ubuntu run `sudo apt install python3-venv`, then the same command again."
        )
    say(f"Making the virtual environment {venv} with Python {sys.version.split()[0]}")
    base = getattr(sys, "_base_executable", "") or sys.executable
    status, _ = run([base, "-m", "venv", str(venv)], handle)
    if status:
        raise SetupError(
            f"Python could not make the virtual environment {venv} (its message is above): "
            "on Debian or Ubuntu `sudo apt install python3-venv` gives it what is missing."
        )


def pip_install(checkout: Path, venv: Path, needed: list[str], handle: int) -> None:
    """Installs requirements, in the versions of constraints.txt."""
    say(f"Installing {len(needed)} packages and what they need, in the versions that were tested")
    command = [str(venv_python(venv)), "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--no-input", "--constraint", str(checkout / "constraints.txt")]
    command += [*where_from(checkout), *needed]
    status, words = run(command, handle)
    if status:
        raise SetupError(pip_sentence(words, venv))


def where_from(checkout: Path) -> list[str]:
    """pip's words for the packages of a bundle, checked; none where there is no bundle.

    Raises:
        SetupError: a bundle made for another system, or damaged.
    """
    offline = checkout / OFFLINE
    if not offline.is_dir():
        return []
    try:
        made = json.loads((offline / BUNDLE).read_text(encoding="utf-8"))
        wheels = made["wheels"].items()
        damaged = [name for name, sha in wheels if sha != digest(offline / "wheels" / name)]
    except (OSError, ValueError, KeyError):
        made, damaged = {"system": system()}, [BUNDLE]
    if made["system"] != system():
        raise SetupError(
            f"This bundle is for {made['system']}, and this is {system()}: take that Python or "
            f"another bundle, or remove the folder {offline}, connect to the network and run the "
            "same command again."
        )
    if damaged:
        raise SetupError(
            f"{offline} is not as it was packed ({damaged[0]} is damaged or missing): unpack the "
            "bundle again, then run the same command again."
        )
    return ["--no-index", "--find-links", str(offline / "wheels")]


def digest(file: Path) -> str:
    """The SHA-256 of a file, "" where there is none."""
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def system() -> str:
    """What a compiled package has to fit, such as "Python 3.11 on Linux x86_64"."""
    version = "%d.%d" % sys.version_info[:2]
    return f"Python {version} on {platform.system()} {platform.machine()}"


def pip_sentence(words: str, venv: Path) -> str:
    """What pip's error output means, and what to do."""
    again = "then run the same command again"
    if "No space left" in words or "Disk quota" in words:
        return (
            f"The disk of {venv} or of {tempfile.gettempdir()} (pip's own TMPDIR) is full: free "
            f"about 4 GB, or set TMPDIR to a larger disk, {again}."
        )
    if any(sign in words for sign in NO_NETWORK):
        return (
            "The packages could not be downloaded, since there is no network and pip has not "
            f"cached them: connect, {again} (behind a proxy, set HTTPS_PROXY)."
        )
    if "No matching distribution" in words:
        return (
            "A package has no version for this machine (its name is above): the course was "
            f"tested with Python 3.11 to 3.13 on 64-bit systems, so try one of those, {again}."
        )
    return f"pip could not install the packages (its message is above): solve that, {again}."


NO_NETWORK = (
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ProxyError",
    "Temporary failure in name resolution",
)


def run(command: list[str], handle: int) -> tuple[int, str]:
    """Exit status and error output of a program whose output is shown as it comes.

    The program inherits the lock: should this script be killed, the next one still waits for it.
    """
    held = {} if os.name == "nt" else {"pass_fds": (handle,)}
    with subprocess.Popen(
        command, env=clean_variables(), stderr=subprocess.PIPE, errors="replace", **held
    ) as program:
        words = []
        for line in program.stderr:
            sys.stderr.write(line)
            words.append(line)
    return program.returncode, "".join(words)


def clean_variables() -> dict[str, str]:
    """The environment variables, less those that lead a Python out of its virtual environment.

    PyTorch's threads wait for each other by spinning. On a machine with other work that can make a
    training step ten times as long, so they spin briefly and then sleep; alone it costs nothing.
    """
    variables = {**os.environ, "PIP_USER": "0"}
    if "OMP_WAIT_POLICY" not in variables:
        variables.setdefault("GOMP_SPINCOUNT", "10000")  # of GNU's OpenMP; others do not read it
    for name in ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX"):
        variables.pop(name, None)
    return variables


def make_importable(checkout: Path, venv: Path) -> None:
    """Lets `import helpers` work in every folder, and writes nothing into the checkout.

    A path in a .pth file is read in the locale's encoding; an escaped literal works in any.
    """
    base = {"base": str(venv), "platbase": str(venv)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=base))
    line = f"import sys; sys.path.append({str(checkout)!a})\n"
    (packages / "peft_measured.pth").write_text(line, encoding="ascii")


@contextlib.contextmanager
def lock(file: Path) -> Iterator[int]:
    """Held by one set-up at a time; a second one says so and waits. Freed when a process dies."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        told = False
        while not try_lock(handle):
            if not told:
                say(f"Another set-up is running in {file.parent}, waiting for it")
                told = True
            time.sleep(0.2)
        yield handle
    finally:
        os.close(handle)


def try_lock(handle: int) -> bool:
    """Takes the lock, or says that somebody else has it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network drives have no locks at all: better no lock than no course.
        return error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
    return True


def this_python() -> Path:
    """The running Python, for `--no-venv`; raises SetupError when packages are missing in it."""
    names = [name_of(line) for line in requirements(CHECKOUT)]
    missing = [name for name in names if not is_installed(name)]
    if missing:
        raise SetupError(
            f"{sys.executable} lacks {', '.join(missing)}: create the conda environment again from "
            "environment.yml and activate it, or leave out --no-venv."
        )
    return Path(sys.executable)


def install_extra(python: Path, extra: str) -> None:
    """Adds the packages of an extra to the environment; with `--no-venv` it only looks for them.

    Raises:
        SetupError: a package is missing, or pip failed.
    """
    needed = requirements_of(extra, CHECKOUT)
    if python == Path(sys.executable):
        missing = [name for name in map(name_of, needed) if not is_installed(name)]
        if missing:
            raise SetupError(
                f"{sys.executable} lacks {', '.join(missing)}: leave out --no-venv, or run "
                f"`pip install --constraint constraints.txt {' '.join(map(repr, needed))}`."
            )
        return
    venv = python.parent.parent
    with lock(venv.parent / f"{venv.name}.lock") as handle:
        pip_install(CHECKOUT, venv, needed, handle)


def name_of(requirement: str) -> str:
    """The package's name in a requirement such as "torch>=2.6,<3"."""
    end = next((i for i, letter in enumerate(requirement) if letter in "<>=!~[; "), None)
    return requirement[:end]


def is_installed(name: str) -> bool:
    """Whether the running Python has a package of that name."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


# --- The commands --------------------------------------------------------------------------------


def lab(python: Path, extra: list[str]) -> int:
    """JupyterLab on the first lesson, for this machine alone and behind its token."""
    assets(python)
    folder = lab_folder()
    say("JupyterLab starts; open the address with the token below, and stop it with Ctrl-C.")
    command = ["jupyterlab", "--ip=localhost", f"--ServerApp.root_dir={folder}"]
    command += ["--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # containers, where there is no other user
    return hand_over(python, [*command, *extra], folder)


def lab_folder() -> Path:
    """The checkout, or, where that cannot be written, a folder with the learner's own copies."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=CHECKOUT / "notebooks"):
        return CHECKOUT
    own = fallback(CHECKOUT).with_name(fallback(CHECKOUT).name.replace("venv", "work"))
    (own / "notebooks").mkdir(parents=True, exist_ok=True)
    for notebook in sorted((CHECKOUT / "notebooks").glob("*.ipynb")):
        if not (own / "notebooks" / notebook.name).exists():  # never over a learner's work
            shutil.copyfile(notebook, own / "notebooks" / notebook.name)
    say(f"This checkout cannot be written, so your copies of the notebooks are in {own}")
    return own


def threads() -> str:
    """How many threads each of pytest's processes may use."""
    return str(max(1, (os.cpu_count() or 2) // WORKERS))


def test(python: Path, extra: list[str]) -> int:
    """ruff, then one pytest over the tests and every notebook; pytest has the last word.

    Two processes share the files, and the threads: two that both want every core hinder each other.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", threads())
    assets(python)
    for arguments in (["check"], ["format", "--check"]):
        say(f"ruff {' '.join(arguments)}")
        check = [str(python), "-m", "ruff", *arguments, "--no-cache", "."]
        if subprocess.run(check, cwd=CHECKOUT, env=variables(python)).returncode:
            raise SetupError(
                "ruff found the places above: mend them, or let "
                f"`{python} -m ruff check --fix .` and `{python} -m ruff format .` do it."
            )
    say("pytest, over the tests and every notebook")
    command = [*PYTEST, *extra]
    if not os.access(CHECKOUT, os.W_OK):
        command[1:1] = ["-p", "no:cacheprovider"]
    return hand_over(python, command, CHECKOUT)


def program(*module_and_words: str) -> Callable[[Path, list[str]], int]:
    """A command that only runs a module of the course, with the extra arguments."""

    def command(python: Path, extra: list[str]) -> int:
        assets(python)
        return hand_over(python, [*module_and_words, *extra], CHECKOUT)

    return command


def models(python: Path, extra: list[str]) -> int:
    """Fetches and checks the base models and data sets; `-- --check` reads every byte."""
    return hand_over(python, ["helpers.assets", *extra], CHECKOUT)


def site(python: Path, extra: list[str]) -> int:
    """The rendered course in build/site, from the stored outputs; its tools are installed first."""
    install_extra(python, "site")
    return hand_over(python, ["helpers.site", *extra], CHECKOUT)


COMMANDS = {
    "lab": lab,
    "test": test,
    "notebooks": program("helpers.notebooks"),
    "models": models,
    "experiments": program("helpers.experiments"),
    "bench": program("helpers.bench"),
    "slides": program("helpers.workshop", "slides"),
    "learner": program("helpers.workshop", "learner"),
    "site": site,
    "bundle": program("helpers.bundle"),
    "versions": program("helpers.versions"),
}


def assets(python: Path) -> None:
    """Base models and data sets, fetched and checked; takes no time when all are there."""
    say("Base models and data sets")
    command = [str(python), "-m", "helpers.assets"]
    if subprocess.run(command, cwd=CHECKOUT, env=variables(python)).returncode:
        raise SetupError("The base models are not complete; the sentence above says what to do.")


def variables(python: Path) -> dict[str, str]:
    """The environment variables of the course's programs: offline, and `helpers` importable."""
    made = {"HF_HUB_OFFLINE": "1", **clean_variables()}
    del made["PIP_USER"]
    if python == Path(sys.executable):
        made["PYTHONPATH"] = str(CHECKOUT)
    return made


def hand_over(python: Path, module_and_arguments: list[str], folder: Path) -> int:
    """Runs a module as the last thing; its exit status and its Ctrl-C are its own."""
    command = [str(python), "-m", *module_and_arguments]
    sys.stdout.flush()
    if os.name != "nt":
        os.chdir(folder)
        os.execve(command[0], command, variables(python))
    with subprocess.Popen(command, cwd=folder, env=variables(python)) as process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Jupyter asks before it stops
        return process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
