"""The arms of the study on layer replication, and its stored rows."""

import pytest
import torch

from helpers import adapters
from helpers.adapters import replication
from helpers.experiments.replication import EARLY, RANGES, STEPS, STUDY, start
from helpers.experiments.study import results


def test_the_early_look_is_where_both_stacks_have_done_the_same_work():
    assert EARLY * 45 == STEPS * 30
    depths = {depth: len(replication.layers(ranges, 30)) for depth, ranges in RANGES.items()}
    assert depths == {30: 30, 45: 45}


def test_lora_trains_its_adapters_on_shared_weights():
    model = start(45, "lora")
    found = replication.storages(model)
    assert found.held * 30 == found.stored * 45
    # rank 16 on query (576 to 576) and value (576 to 192) of each layer
    assert adapters.count(model).trainable == 45 * 16 * (576 + 576 + 576 + 192)


def test_all_weights_train_apart():
    model = start(45, "all weights")
    found = replication.storages(model)
    assert found.held == found.stored
    assert all(weight.requires_grad for weight in model.parameters())
    assert not hasattr(model, "peft_config")
    weights = [layer.mlp.up_proj.weight for layer in model.model.layers]
    assert torch.equal(weights[8], weights[23])  # the same layer, now twice


def test_the_controls_are_measured_again():
    stored = results("replication").query("trained == 'nothing'").set_index("layers")
    for layers in RANGES:
        settings = {"layers": layers, "trained": "nothing", "learning_rate": 0.0}
        again = STUDY.run(settings, seed=0)["test_loss"]
        # fp32 sums in another order on another processor: a thousandth of a nat is generous
        values = stored["test_loss"][[layers]]
        assert values.tolist() == pytest.approx([again] * len(values), abs=1e-3)
