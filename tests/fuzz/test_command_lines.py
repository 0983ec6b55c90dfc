"""Every command line: words that make no sense end in one sentence and a status that says so."""

import importlib
from collections.abc import Callable

import pytest
import strange  # noqa: F401 - its profile
from hypothesis import given
from hypothesis import strategies as st

MAINS = {
    "helpers.adapters.__main__": ("--base", "nowhere"),
    "helpers.assets": ("smolm2", "--chek"),
    "helpers.bundle": ("check", "nowhere.zip", "--fast"),
    "helpers.claims.__main__": ("satus", "--all"),
    "helpers.experiments.__main__": ("rank", "--seeds", "-1"),
    "helpers.memory.__main__": ("gpt5", "--batch", "-1", "--gpu", "t5"),
    "helpers.merging.__main__": ("nowhere", "--out", "--dtype"),
    "helpers.notebooks": ("99", "--all"),
    "helpers.robustness.__main__": ("99", "--only", "flood"),
    "helpers.site.__main__": ("build", "--chek"),
    "helpers.training.__main__": ("--steps", "-1", "--model"),
    "helpers.versions": ("eldest", "--all"),
    "helpers.vlm.__main__": ("--seed", "x", "--further"),
    "helpers.workshop": ("slide", "99", "--out"),
}
WORDS = st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), max_size=6)


def status(main: Callable[[list[str]], int], words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as stop:  # argparse
        return stop.code


@pytest.mark.parametrize("module", MAINS)
@given(data=st.data())
def test_nonsense_is_refused_in_words(module, data, capsys) -> None:
    word = st.sampled_from(MAINS[module]) | WORDS
    words = ["--no-such-option", *data.draw(st.lists(word, max_size=4))]
    found = status(importlib.import_module(module).main, words)
    said = capsys.readouterr().err
    assert found in (1, 2) and said.strip() and "Traceback" not in said, (words, found, said)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("helpers.adapters.__main__", ["nowhere"]),
        ("helpers.assets", ["smolm2"]),
        ("helpers.bundle", ["check", "nowhere.zip"]),
        ("helpers.memory.__main__", ["gpt5", "--batch", "1", "--seq", "8"]),
        ("helpers.memory.__main__", ["gpt2", "--batch", "-1", "--seq", "8"]),
        ("helpers.memory.__main__", ["gpt2", "--batch", "1", "--seq", "0"]),
        ("helpers.merging.__main__", ["nowhere", "--out", "there"]),
        ("helpers.notebooks", ["99"]),
        ("helpers.workshop", ["slides", "99"]),
        ("helpers.memory.__main__", ["gpt2", "--targets", "("]),
        ("helpers.memory.__main__", ["gpt2", "--rank", "8.0"]),
        ("helpers.memory.__main__", ["gpt2", "--gpu", "t5"]),
        ("helpers.stamp", ["not an address"]),
        ("helpers.vlm.__main__", ["--score", "--out", "nowhere"]),
        ("helpers.vlm.__main__", ["--further", "--out", "nowhere"]),
        ("helpers.experiments.__main__", ["no_such_study"]),
    ],
)
def test_what_is_not_there_is_said(module, words, capsys) -> None:
    found = status(importlib.import_module(module).main, words)
    said = capsys.readouterr().err.strip()
    assert found in (1, 2) and "Traceback" not in said
    assert len(said.splitlines()[-1].split()) > 3 and words[-1].split()[0]


@pytest.mark.parametrize(
    ("option", "number"),
    [
        ("--steps", "-1"),
        ("--learning-rate", "nan"),
        ("--warmup-steps", "-2"),
        ("--batch-size", "0"),
        ("--accumulate", "0"),
        ("--save-every", "0"),
        ("--rank", "0"),
        ("--dropout", "2"),
        ("--seed", "-1"),
    ],
)
def test_a_run_that_makes_no_sense_is_not_begun(option, number, tmp_path, capsys) -> None:
    words = ["tiny", "--out", str(tmp_path / "out"), option, number]
    found = status(importlib.import_module("helpers.training.__main__").main, words)
    said = capsys.readouterr().err.strip()
    assert found in (1, 2) and number.rstrip(".0") in said and not list(tmp_path.iterdir())
