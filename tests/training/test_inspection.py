"""Batches that cannot be trained on are refused in one sentence, before the model sees them."""

import pytest
import torch
from peft import get_peft_model
from tiny_rows import lm_rows, stack, tiny_lora

from helpers import adapters, models, training


def long(length: int) -> training.Batch:
    return {"input_ids": torch.full((1, length), 5), "labels": torch.full((1, length), 5)}


def train_on(model: torch.nn.Module, batch: training.Batch) -> None:
    training.train(model, [batch], steps=1, learning_rate=1e-3)


@pytest.mark.parametrize("arch", ["gpt2", "bert", "roberta", "llama"])
def test_a_row_longer_than_the_models_positions(arch):
    model = models.tiny(arch)
    room = training.max_positions(model)
    train_on(model, long(room))
    with pytest.raises(training.TrainingError, match=f"{room + 1} tokens, .* room for {room}"):
        train_on(model, long(room + 1))


def test_without_the_check_gpt2_crashes_with_an_index_error():
    model = models.tiny("gpt2")
    with pytest.raises(IndexError):
        model(**long(training.max_positions(model) + 1))


def test_virtual_tokens_take_positions():
    config = adapters.config("prompt", task_type="CAUSAL_LM", virtual_tokens=5)
    assert training.max_positions(get_peft_model(models.tiny("llama"), config)) == 128 - 5
    assert training.max_positions(models.tiny("t5")) is None
    assert training.max_positions(torch.nn.Linear(1, 1)) is None


def test_batches_without_rows_or_targets():
    empty = {name: tensor[:0] for name, tensor in stack(lm_rows(2)).items()}
    for nothing in (empty, {}):
        with pytest.raises(training.TrainingError, match="has no rows"):
            train_on(tiny_lora(), nothing)
    masked = stack(lm_rows(2))
    masked["labels"] = torch.full_like(masked["labels"], -100)
    with pytest.raises(training.TrainingError, match="every label .* masked"):
        train_on(tiny_lora(), masked)
