"""The loop, its errors, evaluation, and the Trainer route."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers import adapters, models, training


def lm_rows(n: int = 12, length: int = 6) -> list[dict]:
    generator = torch.Generator().manual_seed(7)
    rows = []
    for _ in range(n):
        ids = torch.randint(3, 90, (length,), generator=generator)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return rows


def stack(rows: list[dict]) -> training.Batch:
    return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}


@pytest.fixture
def lora() -> torch.nn.Module:
    torch.manual_seed(0)
    return get_peft_model(
        models.tiny("llama"),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )


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


def test_batches_depend_on_the_seed_and_cover_every_row_once_an_epoch():
    rows = [{"x": torch.tensor([i])} for i in range(10)]

    def order(seed):
        found = itertools.islice(training.batches(rows, stack, batch_size=5, seed=seed), 4)
        return [b["x"].flatten().tolist() for b in found]

    assert order(0) == order(0) != order(1)
    first, second = ([i for batch in half for i in batch] for half in (order(0)[:2], order(0)[2:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


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


def test_the_trainer_route_takes_the_same_first_step_as_the_loop(lora, tmp_path):
    """Same rows in one batch: the first loss is the same number on both routes."""
    rows = lm_rows(4)
    expected = lora.train()(**stack(rows)).loss.item()
    trainer = training.trainer(
        lora, rows, stack, steps=2, learning_rate=1e-3, batch_size=4, seed=0, output_dir=tmp_path
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(expected, abs=1e-3)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
