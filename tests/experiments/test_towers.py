"""The towers study: complete, remakeable, and its arms really are equal where they must be."""

from itertools import pairwise

import pandas as pd
import pytest
import torch

from helpers.experiments import tiny_vlm, towers
from helpers.experiments.study import results

CONTROL = {"shift": "images", "tower": "none", "rank": 0, "learning_rate": 0.0}


@pytest.fixture(scope="module")
def stored() -> pd.DataFrame:
    return results("towers")


@pytest.fixture(scope="module")
def questions() -> tiny_vlm.Examples:
    return tiny_vlm.examples("validation")


def trainable(tower: str, rank: int) -> int:
    model = towers.with_lora(tiny_vlm.untrained(), tower, rank)
    return model.get_nb_trainable_parameters()[0]


def test_the_stored_study_is_complete(stored):
    assert list(stored.columns) == towers.STUDY.columns
    wanted = {tuple(s.values()) for s in towers.STUDY.settings}
    keys = list(towers.STUDY.settings[0])
    for seed in range(5):
        rows = stored[stored.seed == seed]
        assert set(rows[keys].itertuples(index=False, name=None)) == wanted
        assert len(rows) == len(wanted)


def test_the_control_row_is_measured_again(stored):
    again = towers.run(CONTROL, seed=0)
    row = stored.query("shift == 'images' and tower == 'none'").iloc[0]
    for measure in ("test", "test_shape", "test_colour", "test_blank"):
        assert again[measure] == pytest.approx(row[measure], abs=0.01)


def test_the_base_sees_and_a_blank_image_leaves_nothing(stored):
    base = stored.query("shift == 'none'").iloc[0]
    majority = stored.query("tower == 'majority'").iloc[0]
    assert base.test_shape > 0.85 and base.test_colour > 0.95
    assert abs(base.test_blank - majority.test) < 0.05


def test_arms_compared_train_exactly_as_many_parameters(stored):
    for rank in towers.BOTH_RANKS:
        counts = {
            trainable("both", rank),
            *(trainable(t, 2 * rank) for t in ("vision", "language")),
        }
        assert len(counts) == 1
        kept = stored.query(
            "tower == 'both' and rank == @rank or tower != 'both' and rank == 2 * @rank"
        )
        assert set(kept.parameters) == counts
    assert trainable("vision", 4) != trainable("both", 4)


def test_lora_reaches_its_tower_only():
    for tower, other in (("vision", "language_model"), ("language", "vision_tower")):
        model = towers.with_lora(tiny_vlm.untrained(), tower, 1)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert names and not any(part in n for n in names for part in (other, "projector", "head"))


def test_shifts_change_what_they_say(questions):
    images, words = (towers.shifted(questions, shift) for shift in ("images", "words"))
    red, green, blue = (questions.pixels[0, channel] for channel in range(3))
    for channel, was in enumerate((blue, red, green)):
        torch.testing.assert_close(images.pixels[0, channel] + 1, 0.6 * (was + 1))
    assert torch.equal(images.input_ids, questions.input_ids)
    assert torch.equal(words.pixels, questions.pixels)
    assert torch.equal(words.input_ids[:, :-1], questions.input_ids[:, :-1])
    known = tiny_vlm.vocabulary()
    for before, after in (("circle", "rectangle"), ("triangle", "circle"), ("yellow", "black")):
        asked = questions.input_ids[:, -1] == known[before]
        assert asked.any() and (words.input_ids[asked, -1] == known[after]).all()
    with pytest.raises(ValueError, match="Unknown shift 'image'; did you mean 'images'"):
        towers.shifted(questions, "image")


def test_blank_answers_depend_on_the_question_only(questions):
    torch.manual_seed(0)
    model = tiny_vlm.untrained()
    few = tiny_vlm.Examples(
        questions.pixels[:50], questions.input_ids[:50], questions.is_shape[:50]
    )
    grey = tiny_vlm.Examples(torch.zeros_like(few.pixels), few.input_ids, few.is_shape)
    assert torch.equal(tiny_vlm.right_blank(model, few), tiny_vlm.right(model, grey))


def made_up(by_rank: dict[int, float]) -> pd.DataFrame:
    """Five seeds per rank, 0.01 apart, at a good rate and at a bad one that tests too well."""
    rows = [
        ("words", "vision", rank, rate, seed, accuracy + offset, accuracy + seed / 100 + extra)
        for rank, accuracy in by_rank.items()
        for rate, offset, extra in ((0.1, 0.0, 0.0), (0.2, -0.2, 0.5))
        for seed in range(5)
    ]
    return pd.DataFrame(
        rows, columns=["shift", "tower", "rank", "learning_rate", "seed", "validation", "test"]
    )


def test_the_rate_is_chosen_without_the_test_rows():
    table = made_up(dict.fromkeys(towers.RANKS, 0.5))
    assert set(towers.chosen(table).learning_rate) == {0.1}


def test_rates_fall_with_the_rank():
    assert all(towers.rates(a) > towers.rates(b) for a, b in pairwise(towers.RANKS))
