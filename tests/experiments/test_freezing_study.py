"""The freezing studies: shifts do what they say, arms train what they say, rows come back."""

import pandas as pd
import pytest
import torch

from helpers.experiments import freezing, tiny_vlm, towers
from helpers.experiments.study import Study, results

PARTS = {
    "conservative": {"language_model"},
    "moderate": {"language_model", "multi_modal_projector"},
    "aggressive": {"language_model", "vision_tower"},
    "vision only": {"vision_tower"},
    "connector only": {"multi_modal_projector"},
}
CONTROL = {"shift": "colours", "strategy": "untrained", "setting": "none", "learning_rate": 0.0}


@pytest.fixture(scope="module")
def few() -> tiny_vlm.Examples:
    whole = tiny_vlm.examples("validation")
    return tiny_vlm.Examples(whole.pixels[:80], whole.input_ids[:80], whole.is_shape[:80])


def words(ids: torch.Tensor) -> str:
    known = {i: word for word, i in freezing.vocabulary().items()}
    return " ".join(known[i] for i in ids.tolist() if i > tiny_vlm.IMAGE)


@pytest.mark.parametrize("setting", freezing.SETTINGS)
@pytest.mark.parametrize("strategy", freezing.STRATEGIES)
def test_a_strategy_trains_its_parts_and_no_other(strategy, setting):
    model = freezing.adapted(tiny_vlm.untrained(), strategy, setting)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parts = {part for part in set.union(*PARTS.values()) if any(part in n for n in names)}
    assert parts == PARTS[strategy]
    assert not any("embed" in name or "lm_head" in name for name in names)


def test_arms_at_equal_train_as_many_parameters_and_the_connector_half():
    counts = {
        s: freezing.trainable(freezing.adapted(tiny_vlm.untrained(), s, "equal"))
        for s in freezing.STRATEGIES
    }
    half = counts.pop("connector only")
    assert max(counts.values()) <= 1.02 * min(counts.values())
    assert 0.5 <= half / min(counts.values()) <= 0.52


def test_the_notes_ranks_and_scalings_reach_their_towers():
    model = freezing.adapted(tiny_vlm.untrained(), "aggressive", "note")
    found = {
        (module.r["default"], module.scaling["default"], "vision_tower" in name)
        for name, module in model.named_modules()
        if hasattr(module, "scaling") and hasattr(module, "r")
    }
    assert found == {(32, 2.0, True), (16, 2.0, False)}


def test_two_ranks_cost_as_much_when_exchanged():
    counts = {}
    for pair in ((4, 1), (1, 4)):
        model = freezing.with_ranks(tiny_vlm.untrained(), *pair)
        counts[pair] = freezing.trainable(model)
        ranks = {
            ("vision_tower" in name, module.r["default"], module.scaling["default"])
            for name, module in model.named_modules()
            if hasattr(module, "scaling") and hasattr(module, "r")
        }
        assert ranks == {(True, pair[0], 1.0), (False, pair[1], 1.0)}
    assert len(set(counts.values())) == 1


def test_images_change_and_questions_stay(few):
    for shift in ("colours", "inverted"):
        moved = freezing.shifted(few, shift)
        assert torch.equal(moved.input_ids, few.input_ids)
        clean = -few.pixels if shift == "inverted" else few.pixels.roll(1, dims=1)
        noise = moved.pixels - clean
        inside = (clean.abs() < 0.6).nonzero(as_tuple=True)  # there, noise is not cut off
        assert noise[inside].std() == pytest.approx(freezing.NOISE, rel=0.1)
        assert moved.pixels.abs().max() <= 1


def test_questions_change_and_images_stay(few):
    moved = freezing.shifted(few, "questions")
    assert torch.equal(moved.pixels, few.pixels)
    both = freezing.shifted(few, "colours and questions")
    assert torch.equal(both.input_ids, moved.input_ids) and not torch.equal(both.pixels, few.pixels)
    old = set(tiny_vlm.vocabulary())
    for before, after in zip(few.input_ids, moved.input_ids, strict=True):
        asked, anew = words(before).split(), words(after).split()
        assert anew[-1] == freezing.NEW_ANSWERS[asked[-1]] and anew[-1] not in old
        assert ("hue" in anew) == ("color" in asked)
        assert (after == tiny_vlm.IMAGE).sum() == tiny_vlm.PATCHES
    texts = {words(a)[: words(a).rindex(" ")] for a in few.input_ids}
    assert "what color is the shape ?" in texts
    asked = [words(a).startswith("what color is the shape ?") for a in few.input_ids]
    anew = moved.input_ids[asked.index(True)]
    assert words(anew).startswith("name the hue of the form ")


def test_an_unknown_name_is_refused(few):
    with pytest.raises(ValueError, match="Unknown shift 'color'; did you mean 'colours'"):
        freezing.shifted(few, "color")
    with pytest.raises(ValueError, match="no strategy 'bold' at 'equal'"):
        freezing.settings_of("bold", "equal")
    strange = tiny_vlm.Examples(few.pixels[:1], few.input_ids[:1].flip(1), few.is_shape[:1])
    with pytest.raises((ValueError, KeyError)):
        freezing.shifted(strange, "questions")


def test_new_words_are_new_rows_and_old_answers_stay(few):
    torch.manual_seed(0)
    model = tiny_vlm.untrained()
    before = tiny_vlm.guesses(model, few)
    head = model.get_output_embeddings().weight.detach().clone()
    freezing.grow(model)
    grown = model.get_output_embeddings().weight.detach()
    assert len(grown) == len(head) + len(freezing.NEW_WORDS) == len(freezing.vocabulary())
    assert torch.equal(grown[: len(head)], head)
    assert grown[len(head) :].std().item() == pytest.approx(head.std().item(), rel=0.1)
    grown[len(head) :] = -grown[len(head) :]  # new rows alone decide whether a new word is said
    old = tiny_vlm.guesses(model, few) < len(head)
    assert torch.equal(tiny_vlm.guesses(model, few)[old], before[old])


def test_the_base_knows_its_questions_and_none_of_the_new():
    scores = freezing.scores(freezing.base("questions"), "questions")
    assert scores["test_before"] > 0.9 and scores["test"] < 0.1


def test_the_control_row_is_measured_again():
    stored = results("freezing").query("shift == 'colours' and strategy == 'untrained'").iloc[0]
    again = freezing.run(CONTROL, seed=0)
    for measure in freezing.METRICS:
        assert again[measure] == pytest.approx(stored[measure], abs=0.01)


def test_a_shift_breaks_the_base_and_a_blank_image_leaves_the_majority():
    stored = results("freezing")
    for shift in freezing.SHIFTS:
        rows = stored[(stored["shift"] == shift) & (stored["seed"] == 0)].set_index("strategy")
        majority = rows.loc["majority", "test"]
        assert rows.loc["untrained", "test"] < 0.7 < rows.loc["untrained", "test_before"]
        assert rows["test_blank"].max() < majority + 0.05


def made_up() -> pd.DataFrame:
    """Two seeds; the rate that validates best on seed 0 tests worst."""
    rows = [
        ("colours", "moderate", "note", rate, seed, error, test)
        for rate, error, test in ((0.1, 0.1, 0.3), (0.2, 0.4, 0.9))
        for seed in range(2)
        if seed == 0 or rate == 0.1
    ]
    names = ["shift", "strategy", "setting", "learning_rate", "seed", "validation_error", "test"]
    return pd.DataFrame(rows, columns=names)


def test_the_rate_is_chosen_without_the_test_rows():
    rows = freezing.chosen(made_up(), freezing.STUDY)
    assert set(rows["learning_rate"]) == {0.1}
    assert freezing.by_seed(rows, strategy="moderate", shift="colours") == [0.3, 0.3]


def test_the_rank_study_begins_where_towers_ends():
    """Its two missing cells are rows of "towers": the same ranks, rates and steps."""
    missing = {(a, a) for a in towers.BOTH_RANKS}
    grid = {(a, b) for a in freezing.RANKS for b in freezing.RANKS}
    assert grid - set(freezing.PAIRS["images and words"]) == missing
    for rank in towers.BOTH_RANKS:
        assert freezing.rates_of(rank, rank) == towers.rates(rank)
    equal = freezing.with_ranks(tiny_vlm.untrained(), 4, 4)
    assert freezing.trainable(equal) == freezing.trainable(
        towers.with_lora(tiny_vlm.untrained(), "both", 4)
    )


@pytest.mark.parametrize("study", [freezing.STUDY, freezing.BY_TOWER], ids=lambda s: s.name)
def test_the_stored_parameters_are_what_the_arms_train(study: Study):
    stored = results(study.name)
    stored = stored[stored["learning_rate"] > 0]
    arms = stored.drop_duplicates(list(study.settings[0])[1:-1])
    for row in arms.to_dict("records"):
        model = tiny_vlm.untrained()
        made = (
            freezing.adapted(model, row["strategy"], row["setting"])
            if study is freezing.STUDY
            else freezing.with_ranks(model, row["vision"], row["language"])
        )
        assert freezing.trainable(made) == row["parameters"]
