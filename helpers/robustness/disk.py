"""Everything that the course writes, written again where there is no room for it.

`python -m helpers.robustness disk` does it on a small disk of its own, which needs Linux but no
rights; the tests do it with a limit on the size of a file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import nbformat
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from helpers import adapters, assets, merging, models, namespaces, notebooks, training
from helpers.adapters import AdapterFileError
from helpers.assets import AssetError
from helpers.atomic import DiskFull, put_text, whole_folder
from helpers.experiments import study

MEGABYTES = 64  # of the small disk
LARGE = 200_000  # bytes of what is written a second time: more than is left

Writer = Callable[[Path, int], object]


def writers() -> dict[str, Writer]:
    """What the course writes: a function of a folder, and of 0 for the first time and 1 then."""
    return {
        "a text, such as the page of claims": _text,
        "a folder": _folder,
        "an executed notebook": _notebook,
        "a study's next row": _row,
        "a converted model in the cache": _built,
        "an adapter": _adapter,
        "a checkpoint of a run": _checkpoint,
        "a merged model": _merged,
    }


def survives(write: Writer, folder: Path, fill: Callable[[], AbstractContextManager]) -> list[str]:
    """Writes, takes the room away, writes again; returns what is broken, empty when nothing is.

    Args:
        folder: empty, on the disk that `fill` fills.
        fill: a context manager's function: there is no room inside its block.
    """
    write(folder, 0)
    before = contents(folder)
    try:
        with fill():
            write(folder, 1)
    except (DiskFull, AssetError, AdapterFileError) as error:
        sentence = str(error)
    except Exception as error:
        return [f"no sentence but {type(error).__name__}: {error}"]
    else:
        return ["it was written: the disk was not full"]
    differ = before.items() ^ contents(folder).items()
    broken = [f"changed {name}" for name in sorted({name for name, _ in differ})]
    if "\n" in sentence or str(folder) not in sentence:
        broken.append(f"not one sentence that names the place: {sentence}")
    return broken


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file under a folder, but for locks."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"]
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def _text(folder: Path, turn: int) -> None:
    put_text(folder / "page.md", str(turn) * (1 + turn * LARGE))


def _folder(folder: Path, turn: int) -> None:
    with whole_folder(folder / "made") as part:
        (part / "file").write_text(str(turn) * (1 + turn * LARGE))


def _notebook(folder: Path, turn: int) -> None:
    cell = nbformat.v4.new_markdown_cell("x" * (1 + turn * LARGE), id="one")
    notebooks.store(nbformat.v4.new_notebook(cells=[cell]), folder / "lesson.ipynb")


def _row(folder: Path, turn: int) -> None:
    study.append(folder / "study.csv", ["setting"], {"setting": "x" * (1 + turn * LARGE)})


def _built(folder: Path, turn: int) -> None:
    def build(part: Path) -> None:
        (part / "weights").write_bytes(bytes(1 + turn * LARGE))

    assets.build_once(folder / f"model-{turn}", build)


def _adapter(folder: Path, turn: int) -> None:
    adapters.save(_adapted(turn), folder / "adapter", replace=bool(turn))


def _checkpoint(folder: Path, turn: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 90, (8,), generator=generator) for _ in range(8)]
    data = training.batches(rows, _collated, batch_size=2, seed=0)
    run = {"learning_rate": 1e-3, "checkpoints": folder / "run", "save_every": 1}
    training.train(_adapted(1), data, steps=1 + turn, **run)


def _collated(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def _merged(folder: Path, turn: int) -> None:
    merging.merge_for_deployment(
        _adapted(turn), folder / f"merged-{turn}", base=_base(folder.parent / "base")
    )


def _adapted(turn: int) -> PeftModel:
    torch.manual_seed(turn)
    lora = LoraConfig(r=(4, 64)[turn], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(models.tiny("llama"), lora)


def _base(folder: Path) -> Path:
    if not folder.exists():
        torch.manual_seed(0)
        models.tiny("llama").save_pretrained(folder)
    return folder


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """A file beside the folder takes every byte that is left on its disk, until the block ends."""
    filler = folder.with_name("filler")
    with filler.open("wb", buffering=0) as stream, suppress(OSError):
        while stream.write(bytes(4096)) == 4096:
            pass
    try:
        yield
    finally:
        filler.unlink()


def on_a_small_disk() -> int:
    """Runs this module once more, with its temporary files on a disk of a few megabytes."""
    with tempfile.TemporaryDirectory(prefix="robustness-") as name:
        command = [sys.executable, "-m", "helpers.robustness.disk"]
        small = namespaces.on_small_disk(command, Path(name), MEGABYTES)
        return subprocess.run(small, env={**os.environ, "TMPDIR": name}).returncode


def main() -> int:
    """Tries every writer on the disk of the temporary files, which it fills; 0 if all survive.

    Call `on_a_small_disk` instead: this one would fill whatever disk it is given.
    """
    place = Path(tempfile.gettempdir())
    if shutil.disk_usage(place).total > MEGABYTES * 2**20:
        print("This fills the disk: use `python -m helpers.robustness disk`.", file=sys.stderr)
        return 2
    whole = True
    for name, write in writers().items():
        folder = place / name.replace(" ", "-") / "trial"
        folder.mkdir(parents=True)
        broken = survives(write, folder, lambda at=folder: filled(at))
        whole &= not broken
        print(f"{name}: {'; '.join(broken) or 'the old one is whole, and one sentence says why'}")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
