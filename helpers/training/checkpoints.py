"""Checkpoints of a run: written whole or not at all, and resumed to the bit.

A checkpoint is a folder ``step-00000100`` with ``weights.safetensors`` (what trains, and the
model's buffers), ``optimizer.safetensors`` (AdamW's moments and step counts), one
``random-N.json`` per process, and ``state.json`` (losses, position in the data, settings, and the
size of every other file). It is written under another name and then renamed.

Source: this course's own.
Taught in: notebook 06, section 6.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from helpers.atomic import plain_when_full, put_folder
from helpers.training.batches import Batch, Batches, TrainingError
from helpers.training.run import Run
from helpers.training.team import Team

KEPT = 2  # the newest, and one before it in case that a disk loses the newest

Settings = dict[str, str | float | int | None]


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
        folder: made when it is not there.
        settings: what has to be the same for a run to go on from here.
        team: the processes of the run; the main one writes.

    Raises:
        TrainingError: the processes hold parts of the weights only.
    """

    def __init__(self, folder: Path, settings: Settings, team: Team) -> None:
        if team.sharded:
            raise TrainingError(
                "checkpoints hold whole weights, but each process has a part of them only: leave "
                "checkpoints out and use accelerator.save_state(folder)"
            )
        self._folder, self._settings, self._team = Path(folder), settings, team

    def resume(self, run: Run) -> None:
        """Put the newest whole checkpoint into ``run``; leave it as it is when there is none.

        Raises:
            TrainingError: the checkpoint was made with other settings.
        """
        if self._team.main:
            self._folder.mkdir(parents=True, exist_ok=True)
            for half in self._folder.glob(".step-*.part"):  # what a killed run left
                shutil.rmtree(half)
        self._team.wait()
        newest = next((f for f in reversed(self._all()) if _whole(f)), None)
        if newest is None:
            return
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        self._refuse_others(newest, state["settings"])
        _load_tensors(run, newest)
        _set_random(json.loads((newest / f"random-{self._team.index}.json").read_text()))
        run.position = state["position"]
        for name, value in state["history"].items():
            setattr(run.history, name, value)

    def save(self, run: Run) -> None:
        """Write a checkpoint of the run as it is now, then drop all but the newest ones.

        Raises:
            DiskFull: there is no room; the checkpoints that are there stay.
        """
        with plain_when_full(self._folder):
            self._save(run)

    def _save(self, run: Run) -> None:
        name = f"step-{len(run.history.losses):08d}"
        part = self._folder / f".{name}.part"
        try:
            if self._team.main:
                part.mkdir()
            self._team.wait()
            _write(part / f"random-{self._team.index}.json", json.dumps(_random()))
            self._team.wait()
            if self._team.main:
                self._fill(part, run)
                self._put(part, self._folder / name)
        finally:
            if self._team.main:
                shutil.rmtree(part, ignore_errors=True)
        self._team.wait()

    def _fill(self, part: Path, run: Run) -> None:
        save_file(_contiguous(_weights(run)), part / "weights.safetensors")
        save_file(_contiguous(_moments(run)), part / "optimizer.safetensors")
        state = {
            "settings": self._settings,
            "position": run.position,
            "history": asdict(run.history),
            "files": {file.name: file.stat().st_size for file in part.iterdir()},
        }
        _write(part / "state.json", json.dumps(state, indent=1))

    def _put(self, part: Path, target: Path) -> None:
        put_folder(part, target)  # one that is there is not whole, or it were resumed
        for old in self._all()[:-KEPT]:
            shutil.rmtree(old)

    def _all(self) -> list[Path]:
        found = self._folder.glob("step-*")
        return sorted(f for f in found if re.fullmatch(r"step-\d{8}", f.name))

    def _refuse_others(self, folder: Path, settings: Settings) -> None:
        for name, now in self._settings.items():
            if settings.get(name) != now:
                raise TrainingError(
                    f"{folder.name} in {folder.parent.name} was made with another {name} "
                    f"({settings.get(name)}, now {now}): use the same settings to go on, or "
                    "another folder to start anew"
                )


def fingerprint(model: torch.nn.Module, data: Iterable[Batch]) -> Settings:
    """What tells one run's model and data from another's, in names that a message can use.

    Of each frozen weight, sixteen numbers count: another base differs in some of them.

    Raises:
        TrainingError: AdaLoRA, which keeps importance scores outside of its weights.
    """
    if hasattr(getattr(model, "base_model", None), "update_and_allocate"):
        raise TrainingError(
            "AdaLoRA keeps its importance scores outside of the weights, so a checkpoint could "
            "not go on exactly: train it in one run, or use LoRA"
        )
    shapes = [(n, p.dtype, p.shape, p.requires_grad) for n, p in model.named_parameters()]
    frozen = [_sample(p) for p in model.parameters() if not p.requires_grad]
    order = data.settings if isinstance(data, Batches) else {}
    return {
        "model": _digest([type(model).__name__, *shapes]),
        "base model": _digest(frozen),
        "adapter configuration": _digest(_adapters(model)),
        **{f"{name.replace('_', ' ')} of the data": value for name, value in order.items()},
    }


def _adapters(model: torch.nn.Module) -> list[str]:
    configs = getattr(model, "peft_config", {})
    left_out = ("base_model_name_or_path", "inference_mode")
    return [
        f"{name} {key} {sorted(map(str, value)) if isinstance(value, set) else value}"
        for name, config in configs.items()
        for key, value in config.to_dict().items()
        if key not in left_out
    ]


def _sample(weight: torch.Tensor) -> list[float]:
    flat = weight.detach().flatten()
    return flat[:: max(1, flat.numel() // 16)][:16].float().tolist()


def _digest(parts: list) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / "state.json").read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _weights(run: Run) -> dict[str, torch.Tensor]:
    """What training changes in a model: parameters with a gradient, and stored buffers."""
    found = {n: p.detach() for n, p in run.model.named_parameters() if p.requires_grad}
    for prefix, module in run.model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                found[name] = buffer
    return found


def _moments(run: Run) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value
        for name, weight in run.model.named_parameters()
        for key, value in run.optimizer.state.get(weight, {}).items()
    }


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def _load_tensors(run: Run, folder: Path) -> None:
    for name, stored in load_file(folder / "weights.safetensors").items():
        _weights(run)[name].copy_(stored)
    parameters = dict(run.model.named_parameters())
    for key, stored in load_file(folder / "optimizer.safetensors").items():
        name, _, kind = key.rpartition("/")
        weight = parameters[name]
        # AdamW counts its steps on the processor, wherever the weight is
        place = stored.device if kind == "step" else weight.device
        run.optimizer.state[weight][kind] = stored.to(place)


def _random() -> dict[str, object]:
    """The state of every generator that dropout or a collator may draw from."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(state) for state in torch.cuda.get_rng_state_all()],
        "numpy": [kind, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def _set_random(state: dict) -> None:
    torch.set_rng_state(_bytes(state["torch"]))
    torch.cuda.set_rng_state_all([_bytes(one) for one in state["cuda"]])
    np.random.set_state(tuple(state["numpy"]))
    version, numbers, spare = state["python"]
    random.setstate((version, tuple(numbers), spare))


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
