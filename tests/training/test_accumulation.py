"""Four batches of four give the gradient of one batch of sixteen."""

import itertools

import pytest
import torch
from tiny_rows import stack, tiny_lora

from helpers import data, models, training


def uneven_rows(n: int = 16) -> list[dict]:
    """Rows with 1 to 9 targets each."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(n):
        ids = torch.randint(3, 90, (10,), generator=generator)
        labels = ids.clone()
        labels[: 9 - i % 9] = data.IGNORED
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def weights_after(batches: list[training.Batch], accumulate: int) -> torch.Tensor:
    model = tiny_lora()
    steps = len(batches) // accumulate
    training.train(model, batches, steps=steps, learning_rate=1e-2, accumulate=accumulate)
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def parts(rows: list[dict], size: int) -> list[training.Batch]:
    return [stack(rows[i : i + size]) for i in range(0, len(rows), size)]


def test_four_times_four_is_sixteen():
    rows = uneven_rows()
    one = weights_after([stack(rows)] * 3, 1)
    four = weights_after(parts(rows, 4) * 3, 4)
    assert (one - four).abs().max() <= 1e-6


def test_the_mean_of_the_batches_losses_would_not_be_it():
    """What the weighting is for: the plain mean of unequal batches is another gradient."""
    rows = uneven_rows()
    whole, plain = tiny_lora(), tiny_lora()
    whole(**stack(rows)).loss.backward()
    for batch in parts(rows, 4):
        (plain(**batch).loss / 4).backward()
    pairs = zip(whole.parameters(), plain.parameters(), strict=True)
    gap = max((a.grad - b.grad).abs().max() for a, b in pairs if a.requires_grad)
    assert gap > 1e-4


def test_the_trainer_weights_in_the_same_way(tmp_path):
    rows = uneven_rows()
    model = tiny_lora()
    trainer = training.trainer(
        model,
        rows,
        stack,
        steps=1,
        learning_rate=1e-2,
        batch_size=4,
        accumulate=4,
        seed=0,
        output_dir=tmp_path,
    )
    trainer.train()
    theirs = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    # one step from the same weights: the order of the rows within it does not matter
    assert (theirs - weights_after(parts(rows, 4), 4)).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("model", "batch", "count"),
    [
        (models.tiny("llama"), {"labels": torch.tensor([[5, 6, -100]])}, 1),
        (models.tiny("t5"), {"labels": torch.tensor([[5, 6, -100]])}, 2),
        (models.tiny("bert", "token_cls"), {"labels": torch.tensor([[1, -100, 1]])}, 2),
        (models.tiny("bert", "seq_cls"), {"labels": torch.tensor([1, 0, 1])}, 3),
        (models.tiny("bert", "qa"), {"start_positions": torch.tensor([1, 2])}, 2),
    ],
)
def test_targets_by_hand(model, batch, count):
    assert training.target_count(model, batch) == count


def test_targets_are_what_the_models_loss_is_a_mean_over():
    """Duplicating a row with fewer targets moves the loss by the count that we give it."""
    rows = uneven_rows(2)
    for model in (tiny_lora(), models.tiny("t5")):
        single = [model(**stack([row])).loss.item() for row in rows]
        n = [training.target_count(model, stack([row])) for row in rows]
        both = model(**stack(rows)).loss.item()
        mean = sum(a * b for a, b in zip(single, n, strict=True)) / sum(n)
        assert both == pytest.approx(mean, rel=1e-5)


def test_data_that_end_within_a_step():
    rows = itertools.islice(parts(uneven_rows(), 4), 3)
    with pytest.raises(training.TrainingError, match="ended after 1 of 2"):
        training.train(tiny_lora(), rows, steps=2, learning_rate=1e-3, accumulate=2)
    with pytest.raises(ValueError, match="accumulate must be .* but was 0"):
        training.train(tiny_lora(), [], steps=2, learning_rate=1e-3, accumulate=0)
