"""The published figures: the stored table is what the code predicts, and near what was measured."""

import pandas as pd
import pytest

from helpers.memory import validate


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return validate.stored()


def test_every_published_row_is_in_the_table(table):
    for card, quantities in (("t4", 2), ("l40s", 1)):
        assert len(table[table.card == card]) == quantities * len(validate.measured(card))


@pytest.mark.parametrize(("card", "number"), [("t4", 3), ("t4", 24), ("l40s", 16), ("l40s", 11)])
def test_a_row_predicted_again_is_the_stored_one(table, card, number):
    row = validate.measured(card).iloc[number]
    for found in validate.predict_row(card, row):
        stored = table[
            (table.row == found["row"])
            & (table.quantity == found["quantity"])
            & (table.measured == found["measured"])
        ]
        assert list(stored.predicted) == [found["predicted"]]


@pytest.mark.parametrize(
    ("rows", "median", "share", "near"),
    [
        (("t4", "allocated"), 0.3, 1.0, 1.5),
        (("t4", "reserved"), 1.0, 0.9, 5.0),
        (("l40s", "reserved"), 0.5, 0.9, 2.0),
    ],
)
def test_errors_in_per_cent(table, rows, median, share, near):
    card, quantity = rows
    error = table[(table.card == card) & (table.quantity == quantity)].error_percent.abs()
    assert error.median() <= median
    assert (error <= near).mean() >= share  # a row without a prediction is not near


def test_at_least_95_per_cent_of_the_l40s_rows_are_predicted_and_the_rest_says_why(table):
    rows = table[table.card == "l40s"]
    assert rows.predicted.notna().mean() >= 0.95
    assert rows[rows.predicted.isna()].reason.str.len().gt(20).all()


def test_the_constant_is_far_worse(table):
    found = validate.against_the_anchor(table)
    assert found.loc["mean", "prediction"] <= 0.1 < found.loc["mean", "constant"]
    assert found.loc["median", "prediction"] < 0.1


def test_a_wrong_prediction_is_seen(table):
    wrong = table.assign(error_percent=table.error_percent + 3)
    assert validate.summary(wrong).loc[("l40s", "reserved"), "median %"] > 2


def test_a_row_that_fails_is_listed_with_its_reason():
    row = validate.measured("l40s").iloc[1].copy()
    row["peft_config"] = (
        row["peft_config"].replace('"q_proj"', '"no_such_layer"').replace('"v_proj"', '"nor_this"')
    )
    (found,) = validate.predict_row("l40s", row)
    assert "predicted" not in found and found["reason"]
