"""The studies of looking and of the hybrid: their targets, and a row of each measured again."""

import pytest

from helpers.experiments import hybrid, looks
from helpers.experiments.evidence import at_best_rate
from helpers.experiments.study import results


def arm(name: str):
    rows = results("looks")
    return rows[rows["arm"] == name].set_index("seed").sort_index()


def test_reinforce_closes_the_gap_on_every_seed() -> None:
    low, high, learned = (arm(name).pattern for name in ("random", "oracle", "reinforce"))
    assert len(learned) == 3 and looks.gap_closed(learned, low, high).min() >= 0.95
    assert arm("reinforce").sensitivity.min() > 0.8


def test_plain_top_k_is_not_above_random_beyond_the_spread() -> None:
    plain, random = arm("plain top-K").pattern, arm("random").pattern
    assert plain.mean() <= random.max()
    hits = [arm("plain top-K")[f"hit_{step}"] for step in looks.WATCHED]
    assert all((hit == hits[0]).all() for hit in hits)  # nothing moves it


def test_every_learned_arm_reads_as_many_tokens_as_random() -> None:
    rows = results("looks").query("arm != 'everything'")
    assert set(rows.tokens) == {24}


@pytest.mark.parametrize("name", ["random", "oracle"])
def test_an_untrained_row_is_measured_again(name: str) -> None:
    again, stored = looks.run({"arm": name}, seed=0), arm(name).loc[0]
    for metric in ("pattern", "colour", "count", "hit", "trap", "pattern_k4"):
        assert again[metric] == pytest.approx(stored[metric], abs=0.01)


def test_training_begins_as_the_stored_run_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "STEPS", 25)
    stored = arm("proxy").loc[0]
    again = looks.run({"arm": "proxy"}, seed=0)
    assert again["hit_25"] == pytest.approx(stored["hit_25"], abs=0.1)


def test_targets_are_compared_at_equal_parameters() -> None:
    rows = at_best_rate(results("hybrid"), ["arm"]).groupby("arm").parameters.first()
    for name in ("attention only", "MLP only"):
        assert abs(rows[name] / rows["hybrid"] - 1) < 0.03


def test_the_stored_parameters_are_those_of_the_arms() -> None:
    stored = results("hybrid").groupby("arm").parameters.first()
    for name in ("hybrid", "modules only", "LoRA only, random cells", "decoder in full"):
        model = hybrid.adapted(hybrid.ARMS[name], seed=0)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == stored[name]


def test_low_rank_leaves_the_decoders_rank_alone() -> None:
    model = hybrid.adapted(hybrid.BY_RANK["rank 4"], seed=0)
    ranks = {
        ("decoder" if "language_model" in name else "modules"): p.shape[0]
        for name, p in model.named_parameters()
        if "lora_A" in name
    }
    assert ranks == {"decoder": 8, "modules": 4}


def test_full_modules_with_the_hybrids_seed_are_the_hybrid() -> None:
    one = at_best_rate(results("hybrid"), ["arm"]).query("arm == 'hybrid'").set_index("seed")
    rows = results("hybrid_module_ranks").query("arm == 'in full'").set_index("seed")
    for seed in one.index:
        assert rows.test_loss[seed] == pytest.approx(one.test_loss[seed], abs=0.05)
