"""Which cards, and how large a batch: against predictions for every candidate."""

import dataclasses

import pytest

from helpers import memory, models
from helpers.memory import fit
from helpers.memory.gpus import CONTEXT, GIB, MIB, Gpu


@pytest.fixture(scope="module")
def tiny() -> memory.Prediction:
    return memory.predict(models.tiny("llama").config, "lora", batch=2, seq=16)


def test_cards_come_smallest_first_and_all_of_them_fit(tiny):
    run = dataclasses.replace(tiny, reserved=40 * GIB)
    names = [card.name for card in memory.cards_that_fit(run)]
    assert names == ["l40s", "a6000", "h100", "a100-80gb", "h200", "b200"]
    assert memory.cards_that_fit(dataclasses.replace(tiny, reserved=999 * GIB)) == []


@pytest.mark.parametrize("guess", [-5, 1, 37, 10**9])
@pytest.mark.parametrize("growth", [1.0, 7.0, 1e9])
@pytest.mark.parametrize("answer", [0, 1, 36, 37, 5000, fit.LARGEST])
def test_the_bracket_closes_wherever_it_starts(guess, growth, answer):
    tried = []

    def spare(batch: int) -> int:
        tried.append(batch)
        return (answer - batch) * 7 if batch <= answer else (answer - batch) * 70

    assert fit.bracket(spare, guess, growth) == answer
    assert len(tried) == len(set(tried)) < 60
    assert min(tried) >= 1 and max(tried) <= fit.LARGEST


def test_a_straight_line_takes_few_tries():
    tried = []
    fit.bracket(lambda batch: tried.append(batch) or 1000 - 7 * batch, 120, 8.0)
    assert len(tried) <= 4


def test_the_largest_batch_fits_and_the_next_does_not(tiny):
    plan = dataclasses.replace(tiny.plan, gpu=Gpu("small", 64 * MIB + CONTEXT, (8, 0)), seq=128)
    found = memory.largest_batch(plan)
    assert found > 1
    sizes = [
        fit.predict_plan(dataclasses.replace(plan, batch=batch)).reserved
        for batch in (found, found + 1)
    ]
    assert sizes[0] <= 64 * MIB < sizes[1]


@pytest.mark.parametrize("exact", [True, False])
def test_no_batch_fits_a_card_smaller_than_the_model(exact):
    config = models.published_config("gpt2")
    plan = memory.predict(config, "lora", batch=1, seq=8, exact=False).plan
    plan = dataclasses.replace(plan, gpu=Gpu("small", 100 * MIB + CONTEXT, (8, 0)))
    assert memory.largest_batch(plan, exact=exact) == 0


def test_a_question_without_an_answer_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(fit, "LARGEST", 64)
    with pytest.raises(ValueError, match="Even 64 rows fit a100-80gb"):
        memory.largest_batch(tiny.plan)
