"""Which merge gives the model that was trained on four bits? SmolLM2-135M on trivia answers.

QLoRA runs of each seed (NF4 with double quantisation, fp32 compute, rank 8 on all linear layers)
leave adapters of several sizes: `SIZES` holds the steps after which one is kept, at each rate. Each
route of `helpers.merging.ROUTES` makes a model of base and adapter, which is compared with the
trained model itself, the 4-bit base with its adapter, on the logits that predict held-out answers.
The distance is a share of the adapter's own effect, the same distance with the adapter switched
off: 100 % is as far as having no adapter at all.

Two controls have no adapter: the 4-bit base and the full-precision one. The row "kept apart" is the
trained model once more, in smaller batches: the noise of the arithmetic. Weights of 16 bits are
computed with in fp32, so that only their own rounding counts.

SmolLM2's weights come from a file of 4 bits on another grid (Q4_1), so how far its NF4 weights lie
from the original is a matter of this model.

Source: this course's own study.
Taught in: notebook 07, section 3.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers import adapters, data, merging, models, training
from helpers.experiments import soft_prompts
from helpers.experiments.study import Study
from helpers.training import Batch

SIZES = {2e-3: (2, 20)}  # learning rate: optimiser steps
RANK, BATCH = 8, 4
ROWS, AGAIN = 10, 5  # held-out rows a batch: all of them, and the control's
ASKED, NEW_TOKENS = 5, 8  # questions answered in writing, and the tokens of an answer
CONTROLS = ("four bits alone", "full precision alone")


@dataclass(frozen=True)
class Said:
    """What a model says: logits (answer tokens, vocabulary), nats a token, written answers."""

    logits: Tensor
    loss: float
    answers: list[list[int]]


def adapted() -> PeftModel:
    """SmolLM2 in four bits with a new adapter."""
    config = adapters.config("qlora", task_type="CAUSAL_LM", rank=RANK, target_modules="all-linear")
    base = merging.NF4.load(models.path("smollm2"), AutoModelForCausalLM)
    return get_peft_model(base, config)


def train(seed: int, rate: float, sizes: Sequence[int], folder: Path) -> PeftModel:
    """Trains an adapter and stores it under ``folder / STEPS`` after each of these steps."""
    torch.manual_seed(seed)
    model = adapted()

    def keep(step: int) -> None:
        if step in sizes:
            model.save_pretrained(folder / str(step))

    training.train(
        model,
        training.batches(
            soft_prompts.examples("train"), soft_prompts.collator(), batch_size=BATCH, seed=seed
        ),
        steps=max(sizes),
        learning_rate=rate,
        warmup_steps=2,
        watch=keep,
        label=f"QLoRA {rate:g}, seed {seed}",
    )
    return model.eval()


def batches(rows_each: int) -> list[Batch]:
    """The held-out rows in order."""
    rows = soft_prompts.examples("test").select(range(ROWS))
    return list(training.ordered_batches(rows, soft_prompts.collator(), batch_size=rows_each))


@torch.no_grad()
def predict(model: nn.Module, rows_each: int = ROWS) -> tuple[Tensor, Tensor]:
    """Logits (answer tokens, vocabulary) and the tokens that they should predict, held out."""
    model.eval()
    logits, labels = [], []
    for batch in batches(rows_each):
        wanted = batch["labels"][:, 1:] != data.IGNORED
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits.append(found[:, :-1][wanted].float())
        labels.append(batch["labels"][:, 1:][wanted])
    return torch.cat(logits), torch.cat(labels)


def distance(one: Tensor, other: Tensor) -> float:
    """Root mean square difference of two models' logits, which have the same shape."""
    return (one - other).square().mean().sqrt().item()


def ask(model: nn.Module, rows_each: int = ROWS) -> Said:
    """Logits and loss on the held-out answers' tokens, and what the model answers itself."""
    logits, labels = predict(model, rows_each)
    return Said(logits, nn.functional.cross_entropy(logits, labels).item(), answers(model))


def answers(model: nn.Module) -> list[list[int]]:
    """The first tokens of the greedy answers to some held-out questions."""
    tokenizer = soft_prompts.tokenizer()
    asked = data.trivia()["test"]["question"][:ASKED]
    batch = tokenizer(
        [data.chat_prompt(question, tokenizer) for question in asked],
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    written = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    return written[:, batch["input_ids"].shape[1] :].tolist()


@lru_cache(maxsize=1)  # the runs of one seed follow each other
def adapters_of(seed: int, rate: float) -> tempfile.TemporaryDirectory:
    """A folder with the adapters of one run; it is removed with the object."""
    keeper = tempfile.TemporaryDirectory()
    train(seed, rate, SIZES[rate], Path(keeper.name))
    return keeper


def folder_of(seed: int, rate: float, steps: int) -> Path:
    """Where that adapter lies."""
    return Path(adapters_of(seed, rate).name) / str(steps)


@lru_cache(maxsize=1)
def trained(seed: int, rate: float, steps: int) -> tuple[Said, Said]:
    """What the trained model says with its adapter and without."""
    folder = folder_of(seed, rate, steps)
    model = merging.kept_apart(models.path("smollm2"), folder, AutoModelForCausalLM)
    with model.disable_adapter():
        off = ask(model)
    return ask(model), off


def compared(said: Said, wanted: Said, off: Said) -> dict[str, float]:
    """The metrics of a row; see `run`."""
    effect = distance(wanted.logits, off.logits)
    same = (said.logits.argmax(1) == wanted.logits.argmax(1)).float().mean().item()
    pairs = zip(said.answers, wanted.answers, strict=True)
    return {
        "effect": round(effect, 5),
        "distance_percent": float(f"{100 * distance(said.logits, wanted.logits) / effect:.4g}"),
        "test_loss": round(said.loss, 5),
        "same_token_percent": round(100 * same, 1),
        "same_answers": sum(a == b for a, b in pairs),
    }


def model_of(route: str, adapter: Path) -> nn.Module:
    """The model of a route or a control."""
    base = models.path("smollm2")
    if route == "four bits alone":
        return merging.NF4.load(base, AutoModelForCausalLM)
    if route == "full precision alone":
        return AutoModelForCausalLM.from_pretrained(base)
    model = merging.ROUTES[route](base, adapter, AutoModelForCausalLM)
    return model.float() if model.dtype.itemsize == 2 else model


def run(settings: dict, seed: int) -> dict[str, float]:
    """One route for one adapter.

    ``effect``: distance of the trained model's logits with and without adapter.
    ``distance_percent``: of the route's model from the trained one, in % of that.
    ``test_loss``: nats per answer token. ``same_token_percent``: answer tokens at which both find
    the same token most likely. ``same_answers``: of `ASKED` written answers.
    """
    size = (seed, settings["learning_rate"], settings["steps"])
    wanted, off = trained(*size)
    again = settings["route"] == "kept apart"
    said = ask(model_of(settings["route"], folder_of(*size)), AGAIN if again else ROWS)
    return compared(said, wanted, off)


STUDY = Study(
    name="merge_routes",
    settings=tuple(
        {"learning_rate": rate, "steps": steps, "route": route}
        for rate, kept in SIZES.items()
        for steps in kept
        for route in (*CONTROLS, *merging.ROUTES)
    ),
    metrics=("effect", "distance_percent", "test_loss", "same_token_percent", "same_answers"),
    run=run,
    seeds=3,
)
