"""What helpers ask of a name, a number, a seed or a model's folder: each refused in one sentence.

Source: this course's own.
Taught in: notebook 10, section 1.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

LARGEST_SEED = 2**63 - 1  # torch's generators take 64 bits
LARGEST = 1e30  # beyond it, a product in 32 bits is soon infinite


def whole(what: str, given: int, least: int = 1, most: int | None = None) -> int:
    """The number again, if it is a whole one from ``least`` to ``most``.

    Raises:
        ValueError: it is not; says what was given.
    """
    # bool is an int in Python; True would silently become 1.
    is_whole = isinstance(given, Integral) and not isinstance(given, bool)
    if not is_whole or given < least or (most is not None and given > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{what} must be a whole number {limits}, but was {given!r}.")
    return int(given)  # numpy's, as a table gives it, is no int for json


def number(what: str, given: float, least: float = -math.inf) -> float:
    """The number again, if it is not below ``least``, and small enough to calculate with.

    Raises:
        ValueError: it is not; says what was given.
    """
    if not isinstance(given, Real) or not abs(given) <= LARGEST or given < least:
        limit = "" if least == -math.inf else f" of at least {least:g}"
        raise ValueError(f"{what} must be a finite number{limit}, but was {given!r}.")
    return given


def one_of(
    kind: str, given: str, known: Iterable[str], error: type[ValueError] = ValueError
) -> str:
    """The name again, if it is one of those that are known.

    Raises:
        error: it is not; the message gives the nearest, and all.
    """
    known = tuple(known)
    if given not in known:
        raise error(unknown(kind, given, known))
    return given


def unknown(kind: str, given: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not known, with the nearest one that is, and all."""
    folded = {str(name).casefold(): name for name in known}
    near = difflib.get_close_matches(str(given).casefold(), folded, n=1, cutoff=0.4)
    hint = f"; did you mean {folded[near[0]]!r}?" if near else "."
    return f"Unknown {kind} {given!r}{hint} Known: {', '.join(map(str, folded.values()))}."


def letters(name: str) -> str:
    """A name without case, spaces and punctuation: "Llama-2 7B" is "llama27b"."""
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def generator(seed: int) -> torch.Generator:
    """A generator that starts at ``seed``.

    Raises:
        ValueError: the seed is no whole number from 0 to `LARGEST_SEED`.
    """
    return torch.Generator().manual_seed(whole("seed", seed, 0, LARGEST_SEED))


def model_folder(folder: Path | str) -> Path:
    """The folder again, if it holds a model that can be loaded: a configuration, whole weights.

    transformers takes a folder that is not there for a name on a hub, and reports that.

    Raises:
        ValueError: no such folder, no or no valid config.json, or weights that are missing or cut
            short.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not there, or is no folder"
        raise ValueError(f"{folder} {what}; name the folder that save_pretrained of a model wrote.")
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(found, dict) or "model_type" not in found:
            raise ValueError("its config.json names no model_type")
        weights = sorted(folder.glob("*.safetensors"))
        for file in weights:
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split(". ")[0].split())
        raise ValueError(f"{folder} holds no model that can be loaded ({reason}).") from error
    if not weights:
        raise ValueError(f"{folder} has no weights as safetensors; save the model with them.")
    return folder
