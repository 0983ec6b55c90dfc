"""What the study of merge routes measures, and what its stored rows have to say."""

import pytest
import torch

from helpers import merging
from helpers.experiments import merge_routes
from helpers.experiments.merge_routes import Said
from helpers.experiments.study import results
from helpers.merging.deploy import LIMIT


def test_a_distance_is_a_share_of_the_adapters_effect():
    off = Said(torch.tensor([[0.0, 0.0, 1.0]]), 2.0, [[1], [2]])
    on = Said(torch.tensor([[4.0, 0.0, 1.0]]), 1.0, [[3], [4]])
    quarter = Said(torch.tensor([[3.0, 0.0, 1.0]]), 1.5, [[3], [5]])
    found = merge_routes.compared(quarter, on, off)
    assert found["distance_percent"] == 25
    assert found["effect"] == pytest.approx((16 / 3) ** 0.5, abs=1e-5)
    assert (found["same_token_percent"], found["same_answers"]) == (100, 1)
    assert merge_routes.compared(off, on, off)["distance_percent"] == 100
    assert merge_routes.compared(on, on, off)["distance_percent"] == 0
    assert merge_routes.compared(off, on, off)["same_token_percent"] == 0


def test_every_route_and_control_is_an_arm():
    routes = [settings["route"] for settings in merge_routes.STUDY.settings]
    assert set(routes) == {*merging.ROUTES, *merge_routes.CONTROLS}
    sizes = sum(map(len, merge_routes.SIZES.values()))
    assert len(routes) == sizes * len(set(routes))


def test_only_the_dequantised_base_stays_within_the_limit_of_a_deployment():
    distance = results("merge_routes").groupby("route")["distance_percent"]
    within = set(distance.max()[distance.max() <= 100 * LIMIT].index)
    assert within == {"kept apart", "dequantised", "dequantised, bf16"}
    assert distance.max()["kept apart"] < 0.1, "the noise of the arithmetic"
    assert distance.min()["into four bits"] > 90


def test_the_controls_are_what_they_are_called():
    rows = results("merge_routes").set_index("route")
    assert (rows.loc["four bits alone"].distance_percent == 100).all()
    for control in merge_routes.CONTROLS:
        assert rows.loc[control].test_loss.nunique() == 1, "without adapter no seed matters"
