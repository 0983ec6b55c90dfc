"""The arms of the soft-prompt study are what their names say; training itself is stored."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import adapters, models, training
from helpers.experiments import soft_prompts


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(models.path("smollm2")).eval()


def test_the_text_fills_the_virtual_tokens_exactly():
    ids = soft_prompts.tokenizer()(soft_prompts.TEXT)["input_ids"]
    assert len(ids) == adapters.DEFAULT_VIRTUAL_TOKENS


@torch.no_grad()
def test_the_control_of_words_is_the_words_before_the_input(base):
    ids = soft_prompts.tokenizer()(soft_prompts.TEXT)["input_ids"]
    row = soft_prompts.examples("test")[0]["input_ids"].unsqueeze(0)
    control = soft_prompts.trained("words alone", 0.0, seed=0).eval()
    written = base(torch.cat([torch.tensor([ids]), row], dim=1)).logits
    found = control(input_ids=row).logits
    torch.testing.assert_close(found, written, rtol=0, atol=1e-4)
    random = soft_prompts.trained("random prompt", 0.0, seed=0).eval()
    assert not torch.allclose(random(input_ids=row).logits, written, atol=1e-1)


def test_arms_and_controls():
    assert not set(soft_prompts.CONTROLS) & set(soft_prompts.GRID)
    for study in (soft_prompts.STUDY, soft_prompts.ENCODER):
        keys = [(s["method"], s["learning_rate"]) for s in study.settings]
        assert len(keys) == len(set(keys))
    for rates in soft_prompts.GRID.values():
        assert len(rates) >= 3 and list(rates) == sorted(rates)


@pytest.mark.parametrize(
    ("study", "trains"),
    [(soft_prompts.STUDY, "soft_prompts.trained"), (soft_prompts.ENCODER, "tasks.fine_tune")],
)
def test_a_run_that_breaks_down_is_a_row_and_not_the_end(study, trains, monkeypatch):
    def breaks(*args, **settings):
        raise training.TrainingError("the loss is nan")

    monkeypatch.setattr(f"helpers.experiments.{trains}", breaks)
    measured = study.run({"method": "prompt", "learning_rate": 0.1}, seed=0)
    assert set(measured) == set(study.metrics)
    assert set(measured.values()) == {soft_prompts.NOT_FINITE}
