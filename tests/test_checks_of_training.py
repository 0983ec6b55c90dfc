"""The exercise checks of lesson 06 pass right answers and name what is wrong with others."""

import pytest
import torch

from helpers import checks
from helpers.experiments.duration import early_stop as stop


def weighted(losses, targets):
    return sum(loss * n for loss, n in zip(losses, targets, strict=True)) / sum(targets)


def test_the_weighted_mean_passes():
    assert "passed" in checks.group_loss(weighted)


@pytest.mark.parametrize(
    ("answer", "rule", "says"),
    [
        (lambda losses, targets: sum(losses) / len(losses), "weights", "plain mean"),
        (lambda losses, targets: sum(losses), "weights", "that is the sum"),
        (
            lambda losses, targets: weighted(losses, targets) * sum(targets),
            "weights",
            "divide by their number",
        ),
        (lambda losses, targets: None, "gradient", "a tensor to call backward on"),
        (lambda losses, targets: weighted(losses, targets).detach(), "gradient", "no graph"),
        (
            lambda losses, targets: weighted(losses, targets).detach().requires_grad_(),
            "gradient",
            "it reaches no loss",
        ),
        (
            lambda losses, targets: weighted(losses, targets).detach() + 0 * sum(losses),
            "gradient",
            "the batches count",
        ),
        (lambda losses, targets: losses[2] and weighted(losses, targets), "one batch", "raises"),
        (lambda losses: losses[0], "weights", "raises TypeError"),
    ],
)
def test_other_losses_are_named(answer, rule, says):
    with pytest.raises(checks.Broken, match=says) as caught:
        checks.group_loss(answer)
    assert caught.value.rule == rule


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda losses, patience: stop(losses, patience) - 1, "count epochs from 1"),
        (lambda losses, patience: len(losses), "stops after"),
        (lambda losses, patience: losses.index(min(losses)) + 1, "stops after"),
        (lambda losses, patience: stop(losses, patience + 1), "stops after|patience 1"),
        (lambda losses, patience: 1, "goes on while"),
        (lambda losses, patience: losses.later(), "raises AttributeError"),
    ],
)
def test_other_stopping_rules_are_named(answer, says):
    with pytest.raises(checks.Broken, match=says):
        checks.early_stopping(answer)


def test_early_stopping_passes_and_needs_no_torch_state():
    state = torch.get_rng_state()
    assert "passed" in checks.early_stopping(stop)
    assert torch.equal(state, torch.get_rng_state())
