"""The study of durations: its first epochs are measured again, and early stopping by hand."""

import pytest

from helpers.experiments import duration
from helpers.experiments.study import results


@pytest.mark.parametrize("method", ["lora"])
def test_the_first_epochs_are_measured_again(method, monkeypatch):
    monkeypatch.setattr(duration, "EPOCHS", 2)
    rate = duration.GRID[method][0]
    again = duration.run({"method": method, "learning_rate": rate}, seed=0)
    stored = results("duration").query("method == @method and learning_rate == @rate and seed == 0")
    assert len(again) == 4
    for name, loss in again.items():
        # fp32 sums in another order, over sixteen steps of AdamW
        assert stored[name].item() == pytest.approx(loss, abs=5e-3), name


def test_the_stored_study_is_complete():
    stored = results("duration")
    assert list(stored.columns) == duration.STUDY.columns
    wanted = {(m, rate) for m, rates in duration.GRID.items() for rate in rates}
    for seed in (0, 1, 2):
        rows = stored[stored.seed == seed]
        assert set(zip(rows.method, rows.learning_rate, strict=True)) == wanted
    curves = duration.curves(stored, "validation")
    assert list(curves.columns) == list(range(1, duration.EPOCHS + 1))


@pytest.mark.parametrize(
    ("losses", "patience", "epoch"),
    [
        ([3, 2, 1], 1, 3),
        ([3, 1, 2, 2, 0], 2, 2),
        ([3, 1, 2, 0.5, 2, 2, 0], 2, 4),
        ([1, 1, 1], 2, 1),
    ],
)
def test_early_stopping_by_hand(losses, patience, epoch):
    assert duration.early_stop(losses, patience) == epoch
