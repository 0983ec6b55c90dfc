"""Losses and accuracies on held-out rows."""

from types import SimpleNamespace

import pytest
import torch
from tiny_rows import lm_rows, stack

from helpers import models, training


def test_answer_loss_is_weighted_by_targets():
    rows = lm_rows(5)
    rows[0] = rows[0] | {"labels": torch.tensor([-100, -100, -100, -100, -100, 9])}
    model = models.tiny("llama")
    one = training.answer_loss(model, training.ordered_batches(rows, stack, batch_size=1))
    all_at_once = training.answer_loss(model, training.ordered_batches(rows, stack, batch_size=5))
    assert one == pytest.approx(all_at_once, rel=1e-5)
    with pytest.raises(training.TrainingError, match="no target"):
        training.answer_loss(model, [])


def fixed(logits: torch.Tensor, **outputs: torch.Tensor) -> torch.nn.Module:
    """A stand-in model that always answers the same."""
    model = torch.nn.Module()
    model.forward = lambda **_: SimpleNamespace(logits=logits, **outputs)
    return model


def test_accuracy_by_hand():
    model = fixed(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]))
    batch = {"labels": torch.tensor([[0, 0, -100]])}
    assert training.accuracy(model, [batch]) == 0.5
    with pytest.raises(training.TrainingError):
        training.accuracy(model, [{"labels": torch.full((1, 3), -100)}])


def test_span_accuracy_needs_both_ends():
    model = fixed(
        torch.zeros(1),
        start_logits=torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
        end_logits=torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
    )
    batch = {"start_positions": torch.tensor([1, 1]), "end_positions": torch.tensor([1, 1])}
    assert training.span_accuracy(model, [batch]) == 0.5


def test_word_error_rate_by_hand() -> None:
    said = ["the red kettle", "near the barn"]
    assert training.word_error_rate(["The red kettle.", "near the barn!"], said) == 0
    # one word replaced, one missing, one too many
    assert training.word_error_rate(["the bed kettle", "near barn"], said) == 2 / 6
    assert training.word_error_rate(["the very red kettle", "near the barn"], said) == 1 / 6
    assert training.word_error_rate(["", ""], said) == 1
    assert training.word_error_rate(["a b c d", ""], ["x", "y"]) == 5 / 2  # above 1
    # a word in front is one error, not every word shifted
    assert training.word_error_rate(["oh one two three"], ["one two three"]) == 1 / 3


def test_word_error_rate_needs_words_and_equal_lists() -> None:
    with pytest.raises(training.TrainingError, match="no word"):
        training.word_error_rate([""], ["..."])
    with pytest.raises(ValueError, match="1 texts were heard and 2 were said"):
        training.word_error_rate(["one"], ["one", "two"])
