"""The stored study can be remade: its cheapest row is measured again."""

import pytest

from helpers.experiments.full_vs_lora import GRID, STUDY, run
from helpers.experiments.study import results


def test_the_control_row_is_measured_again():
    stored = results("full_vs_lora").query("method == 'untrained'")
    again = run({"method": "untrained", "learning_rate": 0.0}, seed=0)
    for split in ("validation_loss", "test_loss"):
        # fp32 sums in another order on another processor: a thousandth of a nat is generous
        assert stored[split].tolist() == pytest.approx([again[split]] * len(stored), abs=1e-3)


def test_the_stored_study_is_complete():
    stored = results("full_vs_lora")
    assert list(stored.columns) == STUDY.columns
    wanted = {("untrained", 0.0)} | {(m, rate) for m, rates in GRID.items() for rate in rates}
    for seed in (0, 1, 2):
        rows = stored[stored.seed == seed]
        assert set(zip(rows.method, rows.learning_rate, strict=True)) == wanted
