"""The study of AdaLoRA against LoRA: equal arms, and sizes counted by hand."""

import pytest

from helpers import adapters
from helpers.experiments import adalora

LAYERS = 36
# hidden 384, feed-forward 1536: four square layers and two wide ones in each of six blocks
PER_RANK = 6 * (4 * (384 + 384) + 2 * (384 + 1536))


def test_lora_has_its_rank_everywhere():
    model = adalora.adapted("movies", "lora", 2, seed=0)
    size = adalora.final_size(model, 2)
    assert size == {
        "mean_rank": 2,
        "lowest_rank": 2,
        "highest_rank": 2,
        "parameters": 2 * PER_RANK,
    }
    trained = adapters.count(model).trainable - sum(
        p.numel() for p in model.classifier.modules_to_save.parameters()
    )
    assert size["parameters"] == trained


def test_adalora_counts_what_is_not_pruned():
    model = adalora.adapted("movies", "adalora", 4, seed=0)
    values = [p for name, p in model.named_parameters() if "lora_E" in name]
    for value in values:
        value.data.fill_(1)
    full = adalora.final_size(model, 4)
    assert full["mean_rank"] == full["lowest_rank"] == full["highest_rank"] == 6
    assert full["parameters"] == 6 * (PER_RANK + LAYERS)  # and the singular values themselves
    values[0].data[1:] = 0  # five ranks less in a query, 384 x 384
    pruned = adalora.final_size(model, 4)
    assert pruned["lowest_rank"] == 1 and pruned["highest_rank"] == 6
    assert full["parameters"] - pruned["parameters"] == 5 * (384 + 384 + 1)
    assert pruned["mean_rank"] == pytest.approx(6 - 5 / LAYERS, abs=1e-4)


def test_the_arms_have_the_same_layers_and_budgets():
    models = [adalora.adapted("movies", name, 2, seed=0) for name in adalora.RATES]
    layers = [list(adalora.layers_of(model)) for model in models]
    assert len(layers[0]) == LAYERS and all(other == layers[0] for other in layers)
    assert models[1].active_peft_config.target_r == models[0].active_peft_config.r == 2
    ranks = {setting["method"]: [] for setting in adalora.STUDY.settings}
    for setting in adalora.STUDY.settings:
        ranks[setting["method"]].append(setting["rank"])
    assert len({tuple(found) for found in ranks.values()}) == 1
