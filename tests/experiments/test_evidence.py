"""A recommendation follows from stored rows, and its strength from the seeds."""

import pandas as pd
import pytest

from helpers.experiments import evidence, study


def sweep(losses: dict[int, list[float]], task: str = "toy") -> pd.DataFrame:
    """One rate per rank; the validation loss is the test loss."""
    rows = [
        {"task": task, "rank": r, "learning_rate": 0.1, "seed": s, "validation_loss": v}
        for r, values in losses.items()
        for s, v in enumerate(values)
    ]
    return pd.DataFrame(rows).assign(test_loss=lambda rows: rows["validation_loss"])


@pytest.fixture
def stored(monkeypatch):
    """Makes the given table the only stored sweep."""

    def put(table: pd.DataFrame) -> None:
        monkeypatch.setattr(evidence, "SWEEPS", ("toy",))
        monkeypatch.setattr(evidence, "results", lambda name: table)

    return put


CLEAR = {0: [2.0, 2.01, 1.99], 1: [1.5, 1.51, 1.49], 4: [1.0, 1.01, 0.99], 8: [1.0, 1.011, 0.989]}


def test_clear_seeds_give_strong_evidence(stored):
    stored(sweep(CLEAR))
    found = evidence.recommend_rank("toy")
    assert (found.rank, found.strength) == (4, "strong")
    assert "the next smaller one, 1, keeps 50 %" in str(found)
    assert found.table.loc[4, "share of the best gain"] == 1.0


def test_the_smallest_rank_has_no_smaller_one_to_prove_it(stored):
    flat = {0: [2.0, 2.1, 1.9], 1: [1.0, 1.1, 0.9], 8: [1.0, 1.1, 0.901]}
    stored(sweep(flat))
    found = evidence.recommend_rank("toy")
    assert (found.rank, found.strength) == (1, "moderate")


def test_the_largest_rank_has_no_larger_one_to_prove_it(stored):
    rising = {0: [2.0, 2.01, 1.99], 1: [1.5, 1.51, 1.49], 8: [1.0, 1.01, 0.99]}
    stored(sweep(rising))
    found = evidence.recommend_rank("toy")
    assert (found.rank, found.strength) == (8, "moderate")


@pytest.mark.parametrize(
    "losses",
    [
        {0: [2.0, 2.0, 2.0], 1: [0.9, 1.5, 1.0], 4: [1.3, 0.8, 1.1], 8: [0.9, 1.3, 0.95]},
        {0: [1.1, 1.0, 1.2], 1: [1.0, 1.1, 0.9], 8: [1.0, 1.1, 0.901]},  # no better than nothing
    ],
)
def test_seeds_that_scatter_give_weak_evidence(stored, losses):
    stored(sweep(losses))
    assert evidence.recommend_rank("toy").strength == "weak"


def test_what_was_not_measured_is_refused(stored):
    stored(sweep(CLEAR, "addresses"))
    with pytest.raises(evidence.EvidenceError, match="did you mean 'addresses'"):
        evidence.recommend_rank("adresses")
    worse = {0: [1.0, 1.0, 1.0], 1: [2.0, 2.0, 2.0]}
    stored(sweep(worse))
    with pytest.raises(evidence.EvidenceError, match="no rank improved"):
        evidence.recommend_rank("toy")


def test_the_rate_is_chosen_by_the_mean_of_the_seeds_that_ran_every_rate(monkeypatch):
    keys = ["learning_rate", "seed", "validation_loss"]
    runs = [(0.1, 0, 1.0), (0.2, 0, 2.0), (0.2, 1, 0.1), (0.1, 2, 1.0), (0.2, 2, 2.5)]
    rows = pd.DataFrame(runs, columns=keys).assign(task="t", rank=1)
    monkeypatch.setattr(evidence, "results", lambda name: rows)
    chosen = evidence.tuned("toy", ["task", "rank"])
    # seed 1 ran one rate only and chooses nothing, although it would turn the mean
    assert chosen["learning_rate"].tolist() == [0.1, 0.1]
    rows.loc[len(rows)] = {"learning_rate": 0.1, "seed": 1, "validation_loss": 9.0} | {
        "task": "t",
        "rank": 1,
    }
    assert evidence.tuned("toy", ["task", "rank"])["learning_rate"].tolist() == [0.2] * 3


def test_every_stored_task_gets_a_recommendation():
    for task in evidence.measured_tasks():
        assert evidence.recommend_rank(task).rank in study.results("rank_by_task")["rank"].unique()
