"""Ways to choose cells, with and without training."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.arr_coc import model as arr
from helpers.arr_coc import selectors, world


@pytest.fixture(scope="module")
def given():
    return world.scenes(64, seed=0, kinds=("pattern",))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return arr.ArrCoc(arr.ArrCocConfig())


@pytest.mark.parametrize("name", ["random", "fixed", "salience", "information", "oracle"])
def test_untrained_choices_keep_the_budget(given, name):
    assert (selectors.without_training(name, given, 2).sum(1) == 2).all()


def test_the_oracle_hits_and_chance_rarely_does(given):
    def hit(name):
        return (selectors.without_training(name, given, 2) & given.needed).any(1).float().mean()

    assert hit("oracle") == 1 and hit("random") < 0.4


def test_an_unknown_choice_is_named(given):
    with pytest.raises(ValueError, match="no choice 'best'; there is random"):
        selectors.without_training("best", given, 2)


@pytest.mark.parametrize("name", selectors.LOSSES)
def test_a_step_moves_the_modules_and_nothing_else(model, name):
    selectors.only_modules(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    scenes = world.batches(16, seed=1)
    rates = (("", 1e-2),)
    selectors.learn(model, scenes, selectors.LOSSES[name], steps=3, rates=rates)
    moved = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    frozen = name == "plain top-K"
    assert moved == ({"attending"} if frozen else set(selectors.MODULES))


def test_reinforce_makes_a_draw_likelier_that_was_answered_well(model, given, monkeypatch):
    """Cell 3 is always right, whatever was asked: its probability has to grow."""
    selectors.only_modules(model)
    some = given.rows(slice(32))

    def read(images, questions, chosen, weight=None):
        answers = torch.nn.functional.one_hot(some.answers, len(world.WORDS)).float()
        seen = chosen[:, 3:4].float()
        return (5 * answers * seen) + 0 * model.attending.detail.weight.sum()

    monkeypatch.setattr(model, "read", read)

    def share():
        look = model.look(some.images, some.questions)
        return (look.relevance / look.temperature.unsqueeze(1)).softmax(-1)[:, 3].mean().item()

    before = share()
    selectors.learn(model, iter([some] * 30), selectors.reinforce, steps=30, rates=(("", 1e-2),))
    assert share() > before + 0.05


def test_an_unsure_reader_has_a_flatter_loss(model, given):
    torch.manual_seed(0)
    selectors.only_modules(model)
    sure, unsure = (selectors.answer_loss("topk", t)(model.eval(), given) for t in (1.0, 4.0))
    uniform = math.log(len(world.WORDS))
    assert abs(unsure.item() - uniform) < abs(sure.item() - uniform)


def test_a_rate_goes_to_the_first_name_that_fits(model):
    selectors.only_modules(model)
    before = model.knowing.log_scale.clone(), model.balancing.decide[0].bias.clone()
    rates = (("knowing", 0.0), ("", 1e-2))
    scenes = world.batches(16, seed=1)
    selectors.learn(model, scenes, selectors.LOSSES["soft"], steps=2, rates=rates)
    assert torch.equal(model.knowing.log_scale, before[0])
    assert not torch.equal(model.balancing.decide[0].bias, before[1])


def test_the_probability_of_a_draw_is_plackett_and_luces():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).log_softmax(-1)
    p = logits.exp()[0]
    wanted = math.log(p[0] * p[2] / (1 - p[0]))
    found = selectors._log_probability(logits, torch.tensor([[0, 2]]))
    assert abs(found.item() - wanted) < 1e-5


def test_sensitivity_counts_what_moved():
    one = torch.tensor([[1, 1, 0, 0]]).bool()
    assert selectors.sensitivity(one, one) == 0
    assert selectors.sensitivity(one, ~one) == 1
    assert selectors.sensitivity(one, torch.tensor([[1, 0, 1, 0]]).bool()) == pytest.approx(2 / 3)


def test_choosing_with_another_budget_leaves_the_model_as_it_was(model, given):
    assert (selectors.chosen(model, given, 5).sum(1) == 5).all()
    assert model.config.cells == 2
