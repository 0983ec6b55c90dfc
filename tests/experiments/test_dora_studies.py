"""The DoRA studies: what is read off their tables, by hand, and that their tables are whole."""

import itertools

import pandas as pd
import pytest
import torch
from peft import get_peft_model

from helpers import adapters
from helpers.experiments import (
    dora,
    dora_evidence,
    dora_speed,
    evidence,
    magnitude_direction,
    tasks,
)


def rows(**columns) -> pd.DataFrame:
    """LoRA and DoRA at two rates with two seeds; DoRA is best at the lower rate."""
    keys = ["method", "learning_rate", "seed"]
    made = itertools.product(("lora", "dora"), (0.1, 0.2), (0, 1))
    table = pd.DataFrame(made, columns=keys).assign(task="addresses", rank=1)
    losses = {("lora", 0.1): 2.0, ("lora", 0.2): 1.0, ("dora", 0.1): 1.0, ("dora", 0.2): 3.0}
    table["validation_loss"] = [
        losses[m, r] for m, r in zip(table.method, table.learning_rate, strict=True)
    ]
    return table.assign(first_loss=3.0, last_loss=1.0, roughness=0.1, **columns)


def test_each_arm_has_its_own_rate():
    best = (
        evidence.at_best_rate(rows(), dora_evidence.ARM).groupby("method")["learning_rate"].unique()
    )
    assert best["lora"].tolist() == [0.2] and best["dora"].tolist() == [0.1]
    assert len(evidence.at_best_rate(rows(), dora_evidence.ARM)) == 4


def test_a_share_of_the_steps_is_on_the_line_between_two_looks():
    table = pd.DataFrame(
        {"test_loss_60": [4.0], "test_loss_80": [2.0], "test_loss_90": [1.5], "test_loss_100": [1]}
    )
    for share, loss in ((0.6, 4), (0.7, 3), (0.85, 1.75), (1.0, 1)):
        assert dora_evidence.at_share(table, share).item() == pytest.approx(loss)
    with pytest.raises(ValueError, match="50% is outside"):
        dora_evidence.at_share(table, 0.5)


def test_a_run_that_does_not_fall_or_is_not_finite_diverged():
    table = pd.DataFrame(
        {"first_loss": [2.0, 2.0, dora.NOT_FINITE], "last_loss": [1.9, 2.0, dora.NOT_FINITE]}
    )
    assert dora_evidence.diverged(table).tolist() == [False, True, True]


def test_stability_by_hand():
    table = rows()
    # LoRA's best rate is the highest of the grid: no rank has a step above with both methods
    assert dora_evidence.stability(table)["loss one step above"].empty
    table.loc[(table.method == "lora") & (table.learning_rate == 0.1), "validation_loss"] = 0.5
    bad = (table.method == "dora") & (table.learning_rate == 0.2) & (table.seed == 1)
    table.loc[bad, ["validation_loss", "first_loss", "last_loss", "roughness"]] = dora.NOT_FINITE
    found = dora_evidence.stability(table)
    assert found["diverged runs"].to_dict("list") == {"dora": [0, 1], "lora": [0, 0]}
    # the rate at which one run diverged takes no part in the roughness of either method
    assert found["roughness"].to_dict("list") == {"dora": [0.1, 0.1], "lora": [0.1, 0.1]}
    # the run in NaN counts with the highest finite loss of the table, 3
    above = found["loss one step above"]
    assert above.to_dict("list") == {"dora": [3.0, 3.0], "lora": [1.0, 1.0]}


def test_points_and_their_relation_by_hand():
    study = magnitude_direction.STUDY
    row = {"method": "lora", "learning_rate": 1e-3, "seed": 0} | dict.fromkeys(study.metrics, 0.0)
    for i, (module, layer, part) in enumerate(magnitude_direction.PLACES):
        row[magnitude_direction.column("direction", module, layer, part)] = float(i)
        sign = 3 if module == "query" else -2
        row[magnitude_direction.column("magnitude", module, layer, part)] = 7.0 + sign * i
    points = magnitude_direction.points(pd.DataFrame([row]))
    assert len(points) == 2 * 6 * 4
    found = magnitude_direction.relation(points).set_index("module")
    assert found.loc["query", ["correlation", "slope"]].tolist() == pytest.approx([1, 3])
    assert found.loc["value", ["correlation", "slope"]].tolist() == pytest.approx([-1, -2])


@torch.no_grad()
def test_the_watched_weight_is_the_merged_one():
    bare = tasks.base("movies", 0)
    before = magnitude_direction.weight(bare, "value", 5).clone()
    get_peft_model(bare, adapters.config("dora", task_type="SEQ_CLS"))
    layer = bare.bert.encoder.layer[5].attention.self.value
    torch.testing.assert_close(magnitude_direction.weight(bare, "value", 5), before)
    layer.lora_magnitude_vector["default"].weight *= 2
    torch.testing.assert_close(magnitude_direction.weight(bare, "value", 5), 2 * before)
    assert torch.equal(layer.base_layer.weight, before)


def test_times_become_ratios_within_a_round():
    rounds = [
        {"lora": 1.0, "dora": 3.0, "lora again": 2.0},
        {"lora": 10.0, "dora": 11.0, "lora again": 10.0},
        {"lora": 2.0, "dora": 2.2, "lora again": 2.0},
    ]
    assert dora_speed.summary(rounds) == {"ratio": 1.1, "control": 1.0, "lora_seconds": 2.0}
