"""The spoken phrases: what is stored, how it is coded, and what is said when it is not there."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers import speech
from helpers.assets import AssetError


def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(speech.FOLDER, tmp_path / "speech"))


def test_mu_law_keeps_quiet_and_loud() -> None:
    sound = np.array([-1.0, -0.5, -0.001, 0.0, 0.001, 0.5, 1.0])
    back = speech.from_mu_law(speech.to_mu_law(sound))
    assert np.abs(back[[0, -1]]) == pytest.approx(1)
    # 256 steps over a logarithmic scale: 2.2 % of the value, and 0.0001 around zero
    assert np.all(np.abs(back - sound) <= 0.0225 * np.abs(sound) + 1e-4)
    plain = np.round(sound * 127) / 127
    assert abs(plain[4] - sound[4]) > 5 * abs(back[4] - sound[4])


def test_resampling_keeps_a_tone() -> None:
    def tone(rate: int) -> np.ndarray:
        return np.sin(2 * np.pi * 440 * np.arange(rate // 10) / rate)

    assert np.allclose(speech.resampled(tone(8000), 8000, 16000), tone(16000), atol=1e-9)
    assert np.allclose(speech.resampled(tone(22050), 22050, 8000), tone(8000), atol=1e-9)
    assert not np.allclose(speech.resampled(tone(8000), 8000, 16000), tone(16000)[::-1], atol=0.1)


def test_stored_clips_are_the_phrases_of_the_grammar() -> None:
    clips = [clip for clip, _ in speech.read()]
    assert [(clip.split, clip.text) for clip in clips] == speech.phrases()
    assert {clip.voice for clip in clips} == set(speech.VOICES)
    assert {clip.words_per_minute for clip in clips} == set(speech.WORDS_PER_MINUTE)
    assert sum(file.stat().st_size for file in speech.FOLDER.iterdir()) < 1_600_000


def test_sound_is_loud_and_fits_two_seconds() -> None:
    for clip, sound in speech.read():
        assert sound.dtype == np.float32 and len(sound) == 2 * clip.samples
        assert 0.5 < len(sound) / speech.MODEL_RATE < 2
        assert 0.8 < np.abs(sound).max() < 1


@pytest.mark.parametrize("name", [speech.SOUND, speech.TABLE])
def test_a_damaged_file_is_said_in_one_sentence(name: str, tmp_path: Path) -> None:
    folder = copy(tmp_path)
    assert speech.read(folder)
    file = folder / name
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(AssetError, match=r"missing or damaged: take .* or make both with"):
        speech.read(folder)
    file.unlink()
    with pytest.raises(AssetError, match="missing or damaged"):
        speech.read(folder)


def test_without_espeak_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech.shutil, "which", lambda _: None)
    with pytest.raises(AssetError, match=r"^espeak-ng is not installed.*apt install espeak-ng"):
        speech.make(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_espeak_says_the_first_phrase_as_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alike, not equal: another release of espeak-ng may round otherwise."""
    [(clip, stored), *_] = speech.read()
    sound, rate = speech._spoken(clip.text, clip.voice, clip.words_per_minute)
    again = speech.resampled(speech._telephone(sound, rate), speech.LINE_RATE, speech.MODEL_RATE)
    assert abs(len(again) - len(stored)) < speech.MODEL_RATE / 10
    end = min(len(again), len(stored))
    assert np.corrcoef(again[:end], stored[:end])[0, 1] > 0.9
