"""Adapter folders: checked before they are loaded, and written whole or not at all.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. `save` adds
``SHA256SUMS``, which `check_folder` and the command ``sha256sum -c SHA256SUMS`` read. The sums
tell a damaged file; whoever can write into the folder can write new sums as well.

Source: peft's checkpoint format (adapter_config.json beside adapter_model.safetensors).
Taught in: notebook 07, section 8.
"""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from helpers.assets import sha256
from helpers.atomic import beside, whole_folder
from helpers.given import one_of

from .fitting import Shapes, misfit
from .patient import kind_of

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
SUMS = "SHA256SUMS"


class AdapterFileError(ValueError):
    """An adapter folder that is not to be used, or cannot be written."""


@dataclass(frozen=True)
class AdapterFolder:
    """A folder that passed all checks.

    Attributes:
        kind: peft's name of the method.
        rank: None for a method without one.
        bytes: of the weights' file.
        shapes: of each tensor in it.
        notes: what is worth knowing and no fault.
    """

    folder: Path
    config: PeftConfig
    kind: str
    rank: int | None
    bytes: int
    shapes: Shapes
    notes: tuple[str, ...]

    def __str__(self) -> str:
        rank = f", rank {self.rank}" if self.rank else ""
        head = f"{self.kind}{rank}, {len(self.shapes)} tensors, {self.bytes:,} bytes"
        return "; ".join((head, *self.notes))


def check_folder(folder: Path | str, base: nn.Module | None = None) -> AdapterFolder:
    """Look at an adapter folder without loading it; refuse what would fail, or load wrongly.

    Nothing is unpickled, nothing is fetched, and neither ``base`` nor the folder is changed.
    Without ``base`` the files are checked by themselves. The shapes of a base tell whether an
    adapter fits it; they do not tell two bases of the same shapes apart.

    Args:
        base: the model to load it on, with or without weights (meta device), in 4 bits or not.

    Raises:
        AdapterFileError: with one sentence: no such folder; no or no valid configuration; weights
            that are pickled, cut short, altered, or not finite; tensors that do not fit the base.

    Source: the format description of safetensors; peft's page "PEFT checkpoint format".
    Taught in: notebook 07, section 8.
    """
    folder = Path(folder)
    config = _read_config(folder)
    _refuse_pickle(folder)
    sums = _compare_sums(folder)
    shapes = _read_shapes(folder)
    if base is not None and (fault := misfit(config, shapes, base)):
        raise AdapterFileError(f"{folder} does not fit this {_class_name(base)}: {fault}.")
    return AdapterFolder(
        folder=folder,
        config=config,
        kind=kind_of(config),
        rank=getattr(config, "r", None),
        bytes=(folder / WEIGHTS).stat().st_size,
        shapes=shapes,
        notes=(sums, *_notes(folder, config, base)),
    )


def load(
    base: nn.Module, folder: Path | str, *, name: str = "default", trainable: bool = False
) -> PeftModel:
    """Check an adapter folder, then put the adapter on the base with peft.

    A refused folder leaves ``base`` as it was; peft alone has wrapped its layers by then. On a
    model that has adapters already, it becomes one more of them, under ``name``.

    Raises:
        AdapterFileError: as `check_folder`, or a name that is taken.

    Taught in: notebook 07, section 8.
    """
    check_folder(folder, base)
    if not isinstance(base, PeftModel):
        return PeftModel.from_pretrained(
            base, str(folder), name, is_trainable=trainable, local_files_only=True
        )
    if name in base.peft_config:
        raise AdapterFileError(
            f"The model has an adapter {name!r} already; choose another name, or call "
            f"model.delete_adapter({name!r}) first."
        )
    base.load_adapter(str(folder), name, is_trainable=trainable, local_files_only=True)
    return base


def save(
    model: PeftModel, folder: Path | str, *, adapter: str | None = None, replace: bool = False
) -> Path:
    """Write one adapter with its checksums; whole or not at all.

    It is written beside and renamed. When it is stopped, killed, or the disk is full, what was
    in ``folder`` before is still there. Several processes: call it in one of them.

    Args:
        adapter: its name; may be left out where there is only one.
        replace: put it in the place of an adapter that is there.

    Raises:
        AdapterFileError: no such adapter; weights that are not finite; a folder that is there
            and may not be replaced, is no adapter folder, or cannot be written.

    Taught in: notebook 07, section 8.
    """
    folder = Path(folder).resolve()
    adapter = _chosen(model, adapter)
    _refuse_occupied(folder, replace)
    try:
        with whole_folder(folder) as part:
            _write(model, adapter, part)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own way
        raise AdapterFileError(
            f"{folder} could not be written ({error}); make room or name another folder and save "
            "again, the model is still in memory and nothing that was there has changed."
        ) from error
    return folder


def _read_config(folder: Path) -> PeftConfig:
    file = folder / CONFIG
    if not file.is_file():
        missing = f"{folder} has no {CONFIG}" if folder.is_dir() else f"There is no folder {folder}"
        raise AdapterFileError(f"{missing}; {_nearest(folder)}.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise AdapterFileError(
            f"{file} is not valid JSON ({error}): it was cut short or altered; take the file "
            "again from where it came from."
        ) from error
    kind = found.get("peft_type") if isinstance(found, dict) else None
    known = {str(one.value) for one in PEFT_TYPE_TO_CONFIG_MAPPING}
    if not isinstance(kind, str) or kind not in known:
        near = difflib.get_close_matches(str(kind).upper(), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}" if near else "it names one, such as LORA, ADALORA or IA3"
        raise AdapterFileError(f"{file} has the peft_type {kind!r}, unknown to this peft; {hint}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same remarks appear on loading
            return PeftConfig.from_peft_type(**found)
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{file} is no {kind} configuration: {error}.") from error


def _nearest(folder: Path) -> str:
    """What to name instead of a folder that has no configuration, or is not there."""
    if folder.is_file():
        return "that is a file: name the folder that it is in"
    if (old := beside(folder.absolute(), "old")).is_dir():
        return f"a save was killed halfway: rename {old} to it"
    if inside := sorted(folder.glob(f"*/{CONFIG}"), key=lambda file: file.stat().st_mtime):
        return f"name an adapter inside it, such as the newest, {inside[-1].parent}"
    if (folder / "config.json").is_file():
        return "it is the folder of a full model: load it with from_pretrained, without peft"
    there = [one.parent.name for one in folder.parent.glob(f"*/{CONFIG}")]
    near = difflib.get_close_matches(folder.name, there, n=1, cutoff=0.5)
    return f"did you mean {folder.parent / near[0]}" if near else "name the folder that holds one"


def _refuse_pickle(folder: Path) -> None:
    file, other = folder / WEIGHTS, folder / PICKLE
    if not file.is_file() and not other.is_file():
        raise AdapterFileError(f"{folder} has {CONFIG} but no {WEIGHTS}; copy that file too.")
    if not file.is_file() or _is_pickle(file):
        what = f"{WEIGHTS}, which is a pickle" if file.is_file() else f"{PICKLE}, a pickle"
        raise AdapterFileError(
            f"{folder} holds {what}, a format that can carry code, so it was not opened: have it "
            "saved again with safe_serialization=True, peft's default."
        )


def _is_pickle(file: Path) -> bool:
    """Whether a file begins as torch.save's zip or a pickle does, and not as safetensors do."""
    with file.open("rb") as stream:
        head = stream.read(8)
    header = int.from_bytes(head, "little")  # what these bytes are in a safetensors file
    return head.startswith((b"PK\x03\x04", b"\x80")) and header > file.stat().st_size


def _compare_sums(folder: Path) -> str:
    """A note on the checksums; refuses a file that differs from them."""
    file = folder / SUMS
    if not file.is_file():
        return f"no {SUMS}, so an altered number would go unnoticed"
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in (CONFIG, WEIGHTS):
        if sha256(folder / name) != listed.get(name):
            raise AdapterFileError(
                f"{folder / name} differs from its sum in {SUMS}, so it was cut short or altered: "
                f"take it again from where it came from, or remove {SUMS} if the change was yours."
            )
    return "checksums agree"


def _read_shapes(folder: Path) -> Shapes:
    """Reads all numbers once; refuses a file that is not whole, and numbers that are not finite."""
    file = folder / WEIGHTS
    try:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()  # an open file is no dictionary
            found = {name: tensors.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise AdapterFileError(
            f"{file} is cut short, damaged, or no safetensors file ({file.stat().st_size:,} bytes; "
            f"{error}): copy it again."
        ) from error
    if bad := [name for name, tensor in found.items() if not _finite(tensor)]:
        raise AdapterFileError(
            f"{file} holds NaN or infinity in {bad[0]}, in {len(bad)} of {len(found)} tensors; "
            "the training diverged or the file was altered: take an earlier save."
        )
    return {name: tuple(tensor.shape) for name, tensor in found.items()}


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


def _notes(folder: Path, config: PeftConfig, base: nn.Module | None) -> Iterator[str]:
    stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if strange := sorted(set(stored) - {*config.to_dict(), "auto_mapping", "peft_version"}):
        yield f"{CONFIG} has {', '.join(strange)}, which this peft does not know and ignores"
    if (folder / PICKLE).is_file():
        yield f"{PICKLE} lies beside and is not read"
    made_for = config.base_model_name_or_path
    here = getattr(getattr(base, "config", None), "_name_or_path", "")
    if made_for and here and str(made_for) != str(here):
        yield f"made for {made_for}, checked on {here}"


def _class_name(base: nn.Module) -> str:
    return type(base.get_base_model() if isinstance(base, PeftModel) else base).__name__


def _chosen(model: PeftModel, adapter: str | None) -> str:
    if not isinstance(model, PeftModel):
        raise AdapterFileError(
            f"{type(model).__name__} has no adapter to save: wrap it with peft.get_peft_model, or "
            "call model.save_pretrained for the whole model."
        )
    names = list(model.peft_config)
    if adapter is None and len(names) == 1:
        return names[0]
    if adapter is None:
        raise AdapterFileError(f"The model has several adapters: pass adapter=, one of {names}.")
    return one_of("adapter", adapter, names, AdapterFileError)


def _refuse_occupied(folder: Path, replace: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / CONFIG).is_file():
        raise AdapterFileError(
            f"{folder} is there and is no adapter folder, so it is not replaced; name a new one."
        )
    if not replace:
        raise AdapterFileError(f"{folder} is there: pass replace=True, or name a new folder.")


def _write(model: PeftModel, adapter: str, part: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(part, selected_adapters=[adapter])
    inner = part / adapter  # where peft puts every adapter that is not called "default"
    if adapter != "default":
        for file in inner.iterdir():
            os.replace(file, part / file.name)
        inner.rmdir()
    _read_shapes(part)
    lines = [f"{sha256(part / name)}  {name}\n" for name in (CONFIG, WEIGHTS)]
    (part / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")
