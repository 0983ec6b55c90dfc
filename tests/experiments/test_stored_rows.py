"""Every stored study is whole, and its cheapest trained row is measured again."""

import pandas as pd
import pytest

from helpers.experiments import (
    adalora,
    dora,
    dora_speed,
    freezing,
    hybrid,
    learning_rates,
    looks,
    magnitude_direction,
    merge_routes,
    ranks,
    replication,
    soft_prompts,
    targets,
    texts,
    weighted_merges,
)
from helpers.experiments.study import Study, results, tuned

# Sums run in another order on another processor, and forty steps carry that on: a run is the same
# run when its loss comes back within these nats.
TOLERANCE = 0.05


def row(study: Study, **settings) -> pd.Series:
    stored = results(study.name)
    for name, value in {**settings, "seed": 0}.items():
        stored = stored[stored[name] == value]
    assert len(stored) == 1
    return stored.iloc[0]


@pytest.mark.parametrize(
    ("study", "settings"),
    [
        (learning_rates.STUDY, {"method": "lora", "learning_rate": 3e-3}),
        (ranks.BY_TASK, {"task": "addresses", "rank": 1, "learning_rate": 1e-2}),
        (ranks.BY_SIZE, {"task": "addresses", "rows": 64, "rank": 4, "learning_rate": 1e-3}),
        (targets.STUDY, {"parameters": 82_944, "targets": "both", "learning_rate": 1e-3}),
        (texts.STUDY, {"task": "plain text", "rank": 1, "learning_rate": 1e-2}),
    ],
    ids=lambda value: value.name if isinstance(value, Study) else "",
)
def test_a_row_is_measured_again(study, settings):
    again, stored = study.run(settings, seed=0), row(study, **settings)
    for metric in ("validation_loss", "test_loss"):
        assert again[metric] == pytest.approx(stored[metric], abs=TOLERANCE)


@pytest.mark.parametrize(
    "study",
    [
        learning_rates.STUDY,
        ranks.BY_TASK,
        ranks.BY_SIZE,
        targets.STUDY,
        texts.STUDY,
        dora.RATES,
        dora.BY_TASK,
        dora_speed.STUDY,
        magnitude_direction.STUDY,
        adalora.STUDY,
        replication.STUDY,
        soft_prompts.STUDY,
        soft_prompts.ENCODER,
        weighted_merges.STUDY,
        merge_routes.STUDY,
        freezing.STUDY,
        freezing.BY_TOWER,
        looks.STUDY,
        hybrid.STUDY,
        hybrid.RANKS,
    ],
    ids=lambda study: study.name,
)
def test_a_stored_table_is_whole(study):
    stored = results(study.name)
    assert list(stored.columns) == study.columns
    keys = [tuple(str(v) for v in values) for values in stored[list(study.settings[0])].values]
    every = {tuple(str(v) for v in settings.values()) for settings in study.settings}
    found = {
        seed: {key for key, of in zip(keys, stored["seed"], strict=True) if of == seed}
        for seed in range(study.seeds)
    }
    first = range(study.explored)
    wanted = tuned(study, stored.query("seed in @first")) if study.tuned else every
    for seed, ran in found.items():
        assert ran == (every if seed in first else wanted)
    assert not stored.duplicated([*study.settings[0], "seed"]).any()


def test_ranks_and_seeds_are_enough_for_a_verdict():
    assert len(ranks.RANKS) >= 6 and len(targets.BUDGETS) >= 6
    for study in (ranks.BY_TASK, ranks.BY_SIZE, targets.STUDY, texts.STUDY):
        assert results(study.name)["seed"].nunique() >= 3
