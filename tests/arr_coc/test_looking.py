"""The stand-in's parts: shapes, gradients, budgets, batch mates, leaving out and masking."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.arr_coc import model as arr
from helpers.arr_coc import selectors, world
from helpers.arr_coc.base import at_random
from helpers.arr_coc.modules import entropy, texture


@pytest.fixture(scope="module")
def given():
    return world.scenes(12, seed=0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return arr.ArrCoc(arr.ArrCocConfig())


def gradients(model):
    return {
        name: p.grad is not None and bool(p.grad.abs().max() > 0)
        for part in selectors.MODULES
        for name, p in getattr(model, part).named_parameters(prefix=part)
    }


def test_sizes_are_those_of_the_specification(model):
    sizes = {n: sum(p.numel() for p in getattr(model, n).parameters()) for n in selectors.MODULES}
    assert sizes == {"knowing": 4676, "balancing": 4614, "attending": 257}


@pytest.mark.parametrize("selection", ["sparse", "dense", "soft"])
def test_every_parameter_of_the_three_modules_gets_a_gradient(model, given, selection):
    model.config.selection = selection
    model.train()(given.images, given.questions, given.answers).loss.backward()
    assert all(gradients(model).values()), gradients(model)


def test_exploring_moves_the_tension_that_damps_it(model, given):
    model.train()(given.images, given.questions, given.answers).loss.backward()
    assert model.balancing.decide[2].weight.grad[4].abs().max() > 0


def test_plain_top_k_gives_knowing_and_balancing_no_gradient(model, given):
    model.config.selection = "topk"
    model.train()(given.images, given.questions, given.answers).loss.backward()
    found = gradients(model)
    assert not any(found[n] for n in found if not n.startswith("attending.detail"))
    frozen = selectors.only_modules(copy.deepcopy(model))
    frozen.attending.detail.requires_grad_(False)
    assert not frozen.train()(given.images, given.questions, given.answers).loss.requires_grad


@pytest.mark.parametrize("cells", [0, 1, 2, 16])
def test_leaving_out_is_masking(model, given, cells):
    model.eval()
    where = at_random(given, cells, torch.Generator().manual_seed(1))
    with torch.no_grad():
        gathered = model.read(given.images, given.questions, where)
        masked = model.read_masked(given.images, given.questions, where.float())
    assert torch.allclose(gathered, masked, atol=1e-5)


@pytest.mark.parametrize("cells", [1, 2, 5])
def test_the_budget_is_kept_exactly(model, given, cells):
    model.config.cells = cells
    look = model.look(given.images, given.questions)
    assert (look.chosen.sum(1) == cells).all() and (look.share <= 1).all()


def test_batch_mates_do_not_matter(model, given):
    model.eval()
    with torch.no_grad():
        together = model(given.images, given.questions)
        alone = model(given.images[3:4], given.questions[3:4])
    assert torch.allclose(together.logits[3], alone.logits[0], atol=1e-5)
    assert torch.allclose(together.look.relevance[3], alone.look.relevance[0], atol=1e-5)


def test_the_answer_does_not_reach_the_modules(model, given):
    model.train()
    looks = []
    for answers in (given.answers, given.answers.roll(1)):
        torch.manual_seed(1)
        looks.append(model(given.images, given.questions, answers).look)
    assert torch.equal(looks[0].chosen, looks[1].chosen)


def test_padding_does_not_change_the_question(model, given):
    padded = torch.cat([torch.zeros(12, 2, dtype=torch.long), given.questions], 1)
    assert torch.allclose(model.question(padded), model.question(given.questions))


def test_a_blind_model_looks_at_the_same_cells_for_every_question(given):
    torch.manual_seed(0)
    blind = arr.ArrCoc(arr.ArrCocConfig(blind=True)).eval()
    again = world.asked_again(given, seed=1)
    chosen = [blind.look(given.images, q).chosen for q in (given.questions, again.questions)]
    assert torch.equal(*chosen)


def test_fixed_weights_and_tensions_stay(given):
    torch.manual_seed(0)
    config = arr.ArrCocConfig(weights=[0.0, 1.0, 0.0], tensions=[0.5, None, 1.0])
    look = arr.ArrCoc(config).look(given.images, given.questions)
    assert torch.equal(look.weights, torch.tensor([[0.0, 1.0, 0.0]]).expand(12, -1))
    assert (look.tensions[:, 0] == 0.5).all() and (look.tensions[:, 2] == 1).all()
    assert torch.allclose(look.relevance, look.scores[:, 1], atol=1e-5)


def test_a_new_lora_changes_nothing(model, given):
    model.eval()
    with torch.no_grad():
        before = model(given.images, given.questions).logits
        config = LoraConfig(
            target_modules=r".*language_model.*(q_proj|up_proj)",
            modules_to_save=list(selectors.MODULES),
        )
        wrapped = get_peft_model(model, config).eval()
        assert torch.allclose(wrapped(given.images, given.questions).logits, before, atol=1e-5)


def test_merged_is_unmerged(model, given):
    config = LoraConfig(
        target_modules=r".*language_model.*(q_proj|up_proj)",
        modules_to_save=list(selectors.MODULES),
        init_lora_weights=False,
    )
    wrapped = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        before = wrapped(given.images, given.questions).logits
        after = wrapped.merge_and_unload()(given.images, given.questions).logits
    assert torch.allclose(after, before, atol=1e-4)


def test_rows_with_different_budgets_are_refused(model, given):
    where = torch.zeros(12, 16, dtype=torch.bool)
    where[0, 0] = True
    with pytest.raises(ValueError, match=r"equally many chosen cells, not \[0, 1\]"):
        model.read(given.images, given.questions, where)


def test_an_unknown_selection_is_named(model, given):
    model.config.selection = "hard"
    with pytest.raises(ValueError, match="no selection 'hard'"):
        model.train()(given.images, given.questions, given.answers)


def test_texture_is_standardised_in_its_image(given):
    maps = texture(given.images, 4).flatten(2)[:, :11]
    assert maps.shape == (12, 11, 16)
    assert maps.mean(-1).abs().max() < 1e-4
    assert ((maps.std(-1, unbiased=False) - 1).abs() < 0.1).float().mean() > 0.8
    with pytest.raises(ValueError, match="66 x 64 pixels"):
        texture(torch.zeros(1, 3, 66, 64), 4)


def test_entropy_is_shannons():
    flat, two = torch.full((1, 1, 8, 8), 0.5), torch.full((1, 1, 8, 8), 0.1)
    two[..., ::2] = 0.9
    assert entropy(flat, 2).abs().max() < 1e-5
    assert torch.allclose(entropy(two, 2), torch.tensor(2.0).log().expand(1, 1, 2, 2), atol=1e-5)


def test_saved_and_loaded_it_is_the_same(model, given, tmp_path):
    model.save_pretrained(tmp_path)
    back = arr.ArrCoc.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        pair = [m.eval()(given.images, given.questions).logits for m in (model, back)]
    assert torch.equal(*pair)
