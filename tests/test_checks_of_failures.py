"""The checks of lesson 10's exercises pass right answers and name the rule of wrong ones."""

import math
from pathlib import Path
from tempfile import mkdtemp

import pytest
from peft import PeftModel
from safetensors.torch import load_file

from helpers import checks


def trust(losses: list[float]) -> bool:
    quarter = len(losses) // 4
    if not quarter or not all(map(math.isfinite, losses)):
        return False
    return sum(losses[-quarter:]) < sum(losses[:quarter])


def finite_or_not(losses: list[float]) -> bool:
    quarter = max(len(losses) // 4, 1)
    return sum(losses[-quarter:]) < sum(losses[:quarter])


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (lambda losses: True, "is flat"),
        (lambda losses: False, "falls"),
        (finite_or_not, "has a NaN"),
        (lambda losses: None, "falls"),
        (lambda losses: losses[-1] < losses[0], "has a NaN"),
    ],
)
def test_losses(wrong, rule: str) -> None:
    assert "passed" in checks.trustworthy_losses(trust)
    with pytest.raises(checks.Broken, match=rule):
        checks.trustworthy_losses(wrong)


def lost(model: PeftModel) -> list[str]:
    folder = Path(mkdtemp())
    model.save_pretrained(folder)
    kept = {n.replace(".default", "") for n in load_file(folder / "adapter_model.safetensors")}
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    short = [n.replace(".default", "").replace(".modules_to_save", "") for n in trains]
    return [n for n, s in zip(trains, short, strict=True) if s not in kept]


def everything(model: PeftModel) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad]


def only_the_head(model: PeftModel) -> list[str]:
    return [n for n in lost(model) if "classifier" in n]


def without_originals(model: PeftModel) -> list[str]:
    return [n for n in lost(model) if "original_module" not in n]


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (everything, "nothing lost"),
        (only_the_head, "base weight"),
        (without_originals, "original head"),
        (lambda model: [], "base weight"),
    ],
)
def test_lost(wrong, rule: str) -> None:
    assert "passed" in checks.lost_on_save(lost)
    with pytest.raises(checks.Broken, match=rule):
        checks.lost_on_save(wrong)
