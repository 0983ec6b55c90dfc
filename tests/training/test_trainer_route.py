"""The route through the Trainer: same first step, early stopping, and resuming."""

import pytest
import torch
from tiny_rows import lm_rows, stack, tiny_lora

from helpers import training


def route(model: torch.nn.Module, folder, *, steps: int, **more):
    return training.trainer(
        model,
        lm_rows(),
        stack,
        steps=steps,
        learning_rate=1e-2,
        batch_size=4,
        seed=0,
        output_dir=folder,
        **more,
    )


def test_the_trainer_route_takes_the_same_first_step_as_the_loop(tmp_path):
    """Same rows in one batch: the first loss is the same number on both routes."""
    model, rows = tiny_lora(), lm_rows(4)
    expected = model.train()(**stack(rows)).loss.item()
    trainer = training.trainer(
        model, rows, stack, steps=2, learning_rate=1e-3, batch_size=4, seed=0, output_dir=tmp_path
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(expected, abs=1e-3)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()


def test_warmup_is_linear(tmp_path):
    trainer = route(tiny_lora(), tmp_path, steps=4, warmup_steps=2)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0, 5e-3, 1e-2, 1e-2])


def test_it_stops_early_and_keeps_the_best(tmp_path):
    """Random tokens cannot be generalised: the held-out loss rises from the first epoch on."""
    model = tiny_lora()
    held_out = [row | {"labels": row["labels"].flip(0)} for row in lm_rows(4)]
    trainer = route(model, tmp_path, steps=300, held_out=held_out, patience=2)
    trainer.train()
    seen = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    best = min(range(len(seen)), key=seen.__getitem__)
    assert len(seen) == best + 3 < 100
    rows = training.ordered_batches(held_out, stack, batch_size=4)
    assert training.answer_loss(model, rows) == pytest.approx(seen[best], abs=1e-4)
    with pytest.raises(ValueError, match="held_out"):
        route(model, tmp_path, steps=2, patience=2)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(("every", "held_out"), [(2, None), (3, lm_rows())])
def test_resuming_the_trainer_is_exact_too(tmp_path, every, held_out):
    """With dropout, from within an epoch, and from the end of one with its evaluation."""

    def run(resume_from):
        model = tiny_lora(dropout=0.3)
        trainer = route(model, tmp_path / "whole", steps=6, held_out=held_out)
        trainer.args.save_steps = every
        trainer.train(resume_from_checkpoint=resume_from)
        return weights(model)

    whole = run(None)
    assert torch.equal(whole, run(str(tmp_path / "whole" / f"checkpoint-{every}")))


def test_an_evaluation_moves_the_trainers_dropout(tmp_path):
    """Why two Trainer runs differ that only differ in evaluating: it draws a random number."""

    def run(dropout, held_out):
        model = tiny_lora(dropout=dropout)
        route(model, tmp_path, steps=6, held_out=held_out).train()
        return weights(model)

    assert torch.equal(run(0.0, None), run(0.0, lm_rows()))
    assert not torch.equal(run(0.3, None), run(0.3, lm_rows()))
