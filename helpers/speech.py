"""The spoken phrases in data/speech: how they were made, and how they are read.

`python -m helpers.speech` makes the two files again. It needs the program espeak-ng; reading them
needs nothing. The clips have the quality of a telephone line: 8,000 samples a second, each in one
byte (mu-law).

Source: espeak-ng, which speaks; the phrases and the files are this course's own.
Taught in: notebook 01, section 5.
"""

import csv
import hashlib
import io
import itertools
import lzma
import shutil
import subprocess
import sys
import wave
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from helpers.assets import DATA, AssetError
from helpers.atomic import whole_file

FOLDER = DATA / "speech"
SOUND, TABLE = "clips.ulaw.xz", "clips.csv"

COLOURS = (
    "amber", "copper", "crimson", "golden", "ivory", "maroon", "olive", "orange",
    "purple", "scarlet", "silver", "turquoise", "violet", "yellow",
)  # fmt: skip
THINGS = (
    "anchor", "basket", "candle", "feather", "fiddle", "hammer", "kettle", "ladder",
    "lantern", "mitten", "needle", "pillow", "ribbon", "saddle", "thimble", "trumpet",
)  # fmt: skip
WHERE = ("above", "behind", "beside", "near", "under")
PLACES = (
    "attic", "barn", "cellar", "chapel", "garden", "harbour", "meadow", "mill",
    "orchard", "pantry", "stable", "tower",
)  # fmt: skip
VOICES = (
    "en-us", "en-gb-scotland", "en-029", "en-gb-x-rp+f3", "en-us+m7", "en-gb-x-gbclan+croak",
)  # fmt: skip
WORDS_PER_MINUTE = (180, 200, 220)
SPLITS = {"test": 40, "validation": 20, "train": 120}

LINE_RATE = 8_000  # samples a second as stored
MODEL_RATE = 16_000  # samples a second as Whisper reads them
SILENCE = 0.01  # of full scale; what is quieter at both ends is cut off
MU = 255


@dataclass(frozen=True)
class Clip:
    """One row of clips.csv; `samples` counts samples at `LINE_RATE`."""

    split: str
    voice: str
    words_per_minute: int
    samples: int
    text: str


def phrases() -> list[tuple[str, str]]:
    """Split and text of every phrase, such as ("test", "ivory kettle near the barn").

    The grammar allows thousands; the first 180 in the order of SHA-256 are taken, each once.
    """
    every = itertools.product(COLOURS, THINGS, WHERE, PLACES)
    texts = [f"{colour} {thing} {where} the {place}" for colour, thing, where, place in every]
    texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    splits = [split for split, count in SPLITS.items() for _ in range(count)]
    return list(zip(splits, texts, strict=False))


def read(folder: Path = FOLDER) -> list[tuple[Clip, np.ndarray]]:
    """Every clip with its sound: float32 between -1 and 1, 16,000 samples a second.

    Raises:
        AssetError: a file is missing or damaged.
    """
    try:
        with (folder / TABLE).open(encoding="utf-8", newline="") as table:
            clips = [_clip(row) for row in csv.DictReader(table)]
        stored = np.frombuffer(lzma.decompress((folder / SOUND).read_bytes()), np.uint8)
        if not clips or len(stored) != sum(clip.samples for clip in clips):
            raise ValueError("the table's lengths do not add up to the sound's")
    except (OSError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
        raise AssetError(
            f"The speech in data/speech is missing or damaged: take {SOUND} and {TABLE} from the "
            "repository again, or make both with `python -m helpers.speech`."
        ) from error
    ends = np.cumsum([clip.samples for clip in clips])
    sounds = np.split(from_mu_law(stored), ends[:-1])
    return [
        (clip, resampled(sound, LINE_RATE, MODEL_RATE).astype(np.float32))
        for clip, sound in zip(clips, sounds, strict=True)
    ]


def make(folder: Path = FOLDER) -> None:
    """Speaks every phrase with espeak-ng and writes the two files.

    Raises:
        AssetError: espeak-ng is not installed, or lacks a voice.
    """
    clips, sounds = [], []
    for number, (split, text) in enumerate(phrases()):
        voice = VOICES[number % len(VOICES)]
        speed = WORDS_PER_MINUTE[number // len(VOICES) % len(WORDS_PER_MINUTE)]
        sounds.append(to_mu_law(_telephone(*_spoken(text, voice, speed))))
        clips.append(Clip(split, voice, speed, len(sounds[-1]), text))
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / SOUND, lzma.compress(np.concatenate(sounds).tobytes(), preset=9))
    _write(folder / TABLE, _table(clips).encode())


def to_mu_law(sound: np.ndarray) -> np.ndarray:
    """Sound between -1 and 1 as bytes: fine steps where it is quiet, coarse where it is loud.

    Source: ITU-T recommendation G.711 (the continuous form of its mu-law).
    """
    squeezed = np.sign(sound) * np.log1p(MU * np.abs(sound)) / np.log1p(MU)
    return np.round((squeezed + 1) / 2 * MU).astype(np.uint8)


def from_mu_law(stored: np.ndarray) -> np.ndarray:
    """The inverse of `to_mu_law`, up to its rounding."""
    squeezed = stored / MU * 2 - 1
    return np.sign(squeezed) * np.expm1(np.abs(squeezed) * np.log1p(MU)) / MU


def resampled(sound: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """The same sound at another rate: its spectrum is cut off, or continued with zeros.

    Raises:
        ValueError: no sample would be left.
    """
    count = round(len(sound) * wanted / rate) if rate > 0 else 0
    if count < 1:
        raise ValueError(
            f"{len(sound)} samples at {rate} a second leave no sound at {wanted} a second."
        )
    spectrum, bins = np.fft.rfft(sound), count // 2 + 1
    spectrum = np.pad(spectrum, (0, max(0, bins - len(spectrum))))[:bins]
    return np.fft.irfft(spectrum, count) * (count / len(sound))


def _clip(row: dict[str, str]) -> Clip:
    numbers = {name: int(row[name]) for name in ("words_per_minute", "samples")}
    return Clip(split=row["split"], voice=row["voice"], text=row["text"], **numbers)


def _spoken(text: str, voice: str, speed: int) -> tuple[np.ndarray, int]:
    """What espeak-ng says, and its samples a second."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise AssetError(
            "espeak-ng is not installed, and only it can make the speech again; install it "
            "(Debian: apt install espeak-ng), or keep the files of the repository."
        )
    command = [program, "-v", voice, "-s", str(speed), "--stdout", text]
    result = subprocess.run(command, capture_output=True)
    if result.returncode != 0 or not result.stdout:
        raise AssetError(f"espeak-ng could not speak with the voice {voice!r}; update it.")
    with wave.open(io.BytesIO(result.stdout)) as spoken:
        # Written to a pipe, the header's length is a placeholder: read what there is.
        raw = spoken.readframes(spoken.getnframes())
        rate = spoken.getframerate()
    return np.frombuffer(raw[: len(raw) // 2 * 2], "<i2") / 32_768, rate


def _telephone(sound: np.ndarray, rate: int) -> np.ndarray:
    loud = np.flatnonzero(np.abs(sound) > SILENCE)
    margin = rate // 25
    cut = sound[max(0, loud[0] - margin) : loud[-1] + margin]
    slow = resampled(cut, rate, LINE_RATE)
    return 0.9 * slow / np.abs(slow).max()


def _table(clips: Iterable[Clip]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Clip)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(clip) for clip in clips)
    return text.getvalue()


def _write(file: Path, content: bytes) -> None:
    with whole_file(file) as part:
        part.write_bytes(content)


def main() -> int:
    """Command line; 0 when both files are written."""
    try:
        make()
    except AssetError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{sum(SPLITS.values())} clips are in {FOLDER}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
