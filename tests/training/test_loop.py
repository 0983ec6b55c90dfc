"""The loop, its errors, and what it leaves alone."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from tiny_rows import lm_rows, stack, tiny_lora

from helpers import adapters, models, training


@pytest.fixture
def lora() -> torch.nn.Module:
    return tiny_lora()


def test_the_loop_equals_a_bare_pytorch_loop(lora):
    twin = copy.deepcopy(lora)
    rows = list(itertools.islice(training.batches(lm_rows(), stack, batch_size=4, seed=1), 6))
    history = training.train(lora, rows, steps=6, learning_rate=1e-2)

    weights = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    twin.train()
    losses = []
    for batch in rows:
        loss = twin(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert history.losses == losses
    for ours, bare in zip(lora.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, bare)
    assert history.tokens == 6 * 4 * 6 and history.tokens_per_second > 0


def test_training_moves_the_adapter_and_not_the_base(lora):
    before = {n: p.detach().clone() for n, p in lora.named_parameters()}
    rows = training.batches(lm_rows(), stack, batch_size=4, seed=1)
    training.train(lora, rows, steps=3, learning_rate=1e-2)
    for name, parameter in lora.named_parameters():
        assert torch.equal(before[name], parameter) == (not parameter.requires_grad), name


def test_warmup_starts_low():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    seen = []

    def forward(x):
        seen.append(model.weight.item())
        return SimpleNamespace(loss=model(x).sum())

    wrapped = torch.nn.Module()
    wrapped.inner = model
    wrapped.forward = forward
    rows = [{"x": torch.ones(1, 1)}] * 4
    training.train(wrapped, rows, steps=4, learning_rate=0.1, warmup_steps=1)
    steps = [a - b for a, b in itertools.pairwise(seen)]
    # AdamW moves by the rate itself when the gradient is constant
    assert steps == pytest.approx([0.05, 0.1, 0.1], rel=1e-3)


def test_adalora_budget_moves_in_the_loop():
    torch.manual_seed(0)
    config = adapters.config("adalora", task_type="CAUSAL_LM", total_steps=10)
    model = get_peft_model(models.tiny("llama"), config)
    calls = []
    original = model.base_model.update_and_allocate
    model.base_model.update_and_allocate = lambda step: (calls.append(step), original(step))
    rows = training.batches(lm_rows(), stack, batch_size=4, seed=1)
    training.train(model, rows, steps=3, learning_rate=1e-3)
    assert calls == [0, 1, 2]


@pytest.mark.parametrize(
    ("rows", "steps", "says"),
    [
        ([], 1, "ended after 0 of 1"),
        (lm_rows(2), 3, "ended after 2 of 3"),
    ],
)
def test_data_that_end_early(lora, rows, steps, says):
    with pytest.raises(training.TrainingError, match=says):
        training.train(lora, [stack([r]) for r in rows], steps=steps, learning_rate=1e-3)


def test_errors_name_the_cause(lora):
    masked = stack(lm_rows(2))
    masked["labels"] = torch.full_like(masked["labels"], -100)
    with pytest.raises(training.TrainingError, match="every label .* masked"):
        training.train(lora, [masked], steps=1, learning_rate=1e-3)
    with pytest.raises(training.TrainingError, match="no rows"):
        next(training.batches([], stack, batch_size=2, seed=0))
    frozen = models.tiny("llama").requires_grad_(False)
    with pytest.raises(training.TrainingError, match="no parameter asks for a gradient"):
        training.train(frozen, [], steps=1, learning_rate=1e-3)
    for parameter in lora.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(math.nan)
    with pytest.raises(training.TrainingError, match="loss is nan at step 0"):
        training.train(lora, [stack(lm_rows(2))], steps=1, learning_rate=1e-3)


def test_watching_sees_every_step_and_does_not_change_the_run():
    seen = []
    plain, watched = tiny_lora(dropout=0.3), tiny_lora(dropout=0.3)
    for model, watch in ((plain, None), (watched, lambda n: seen.append((n, watched.eval())))):
        torch.manual_seed(1)
        rows = training.batches(lm_rows(), stack, batch_size=4, seed=1)
        training.train(model, rows, steps=3, learning_rate=1e-2, watch=watch)
    assert [n for n, _ in seen] == [1, 2, 3]
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
