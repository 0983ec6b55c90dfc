"""Does text that is further from pre-training need a higher rank? SmolLM2-135M on three texts.

Plain: trivia questions in English. Address: United States addresses. Cipher: the same
trivia questions with every letter replaced by another one, a language the model never saw. Equal
for all ranks: the steps, the batches and their order, fp32, the targets (query and value) and
alpha / rank = 2; the rate is chosen on the validation rows of the first seed. Rank 0 is the
untrained model.

Source: this course's own.
Taught in: notebook 02, section 4.
"""

from __future__ import annotations

import random
import string
from functools import cache

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForTokenClassification

from helpers import adapters, data, models, training
from helpers.experiments.ranks import RANKS, rates, size_of
from helpers.experiments.study import Study
from helpers.given import one_of

TEXTS = ("plain text", "address text", "cipher text")
STEPS, BATCH, MAX_TOKENS = 20, 4, 32
EVALUATED = 20  # rows of validation and of test


def cipher() -> dict[int, str]:
    """A fixed permutation of the alphabet for ``str.translate``, capitals alike."""
    letters = list(string.ascii_lowercase)
    random.Random(0).shuffle(letters)
    small = "".join(letters)
    return str.maketrans(string.ascii_letters, small + small.upper())


def lines(text: str, part: str) -> list[str]:
    """The rows of one text and split.

    Raises:
        ValueError: unknown text or split; the message gives the nearest.
    """
    one_of("text", text, TEXTS)
    one_of("split", part, data.trivia())
    if text == "address text":
        return [" ".join(tokens) for tokens in data.addresses()[part]["tokens"]]
    plain = list(data.trivia()[part]["question"])
    return plain if text == "plain text" else [line.translate(cipher()) for line in plain]


@cache
def tokenizer():
    """SmolLM2's tokenizer."""
    return AutoTokenizer.from_pretrained(models.path("smollm2"))


@cache
def rows(text: str, part: str) -> Dataset:
    """Token ids and labels; every token but the first is a target."""
    chosen = lines(text, part) if part == "train" else lines(text, part)[:EVALUATED]
    ids = tokenizer()(chosen, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


@cache
def base() -> torch.nn.Module:
    """SmolLM2, loaded once; each run wraps it and takes the adapter off again."""
    return AutoModelForCausalLM.from_pretrained(models.path("smollm2"))


def loss(model: torch.nn.Module, text: str, part: str) -> float:
    """Nats per token on a held-out split."""
    collate = DataCollatorForTokenClassification(tokenizer())
    batches = training.ordered_batches(rows(text, part), collate, batch_size=EVALUATED)
    return round(training.answer_loss(model, batches), 4)


def run(settings: dict, seed: int) -> dict[str, float]:
    """Train one rank at one rate on a text; losses in nats per token."""
    text, rank, rate = settings["task"], settings["rank"], settings["learning_rate"]
    torch.manual_seed(seed)
    if not rank:
        return measure(base(), text)
    model = get_peft_model(base(), adapters.config("lora", task_type="CAUSAL_LM", rank=rank))
    collate = DataCollatorForTokenClassification(tokenizer())
    batches = training.batches(rows(text, "train"), collate, batch_size=BATCH, seed=seed)
    try:
        training.train(
            model,
            batches,
            steps=STEPS,
            learning_rate=rate,
            warmup_steps=2,
            label=f"{text} r={rank} {rate:g}",
        )
        return measure(model, text)
    finally:
        model.unload()


def measure(model: torch.nn.Module, text: str) -> dict[str, float]:
    """Both held-out losses, and the size of the update."""
    held_out = {f"{part}_loss": loss(model, text, part) for part in ("validation", "test")}
    return held_out | size_of(model)


STUDY = Study(
    name="rank_by_text",
    settings=tuple(
        {"task": text, "rank": rank, "learning_rate": rate}
        for text in TEXTS
        for rank in (0, *RANKS)
        for rate in (rates(rank) if rank else (0.0,))
    ),
    metrics=("validation_loss", "test_loss", "update_norm", "used_rank"),
    run=run,
    tuned="learning_rate",
    seeds=5,
)
