"""The MiniLM tasks that the studies share: data, head and score of each, loaded once a process.

Source: this course's own; data/LICENSES.md names the data.
Taught in: notebook 02, sections 2 to 5, notebook 06, section 2, and notebook 07, section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from datasets import DatasetDict
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from helpers import data, models, training
from helpers.given import one_of

BATCH = 8
EVALUATED = 200  # rows of validation and of test, at most
SENTENCE = 32  # tokens of a rated text; a longer one loses its end


@dataclass(frozen=True)
class Task:
    """One task on MiniLM.

    Attributes:
        task_type: peft's name of it, which decides the head that trains with the adapter.
        auto: the transformers class with that head.
        load: the data set, with its splits.
        prepare: from rows to token ids and labels.
        score: share of right labels or spans.
        steps: optimiser steps of a run.
    """

    task_type: str
    auto: type
    load: Callable[[], DatasetDict]
    prepare: Callable
    score: Callable[[torch.nn.Module, object], float]
    steps: int


def _sentiment(domain: str) -> Task:
    return Task(
        task_type="SEQ_CLS",
        auto=AutoModelForSequenceClassification,
        load=lambda: data.sentiment(domain),
        prepare=partial(data.classification_examples, max_length=SENTENCE),
        score=training.accuracy,
        steps=40,
    )


TASKS: dict[str, Task] = {
    **{domain: _sentiment(domain) for domain in data.DOMAINS},
    "addresses": Task(
        task_type="TOKEN_CLS",
        auto=AutoModelForTokenClassification,
        load=data.addresses,
        prepare=data.tagging_examples,
        score=training.accuracy,
        steps=80,
    ),
    "questions": Task(
        task_type="QUESTION_ANS",
        auto=AutoModelForQuestionAnswering,
        load=data.address_questions,
        prepare=data.qa_examples,
        score=training.span_accuracy,
        steps=100,
    ),
}


def task(name: str) -> Task:
    """A task of that name.

    Raises:
        ValueError: unknown name; the message gives the nearest.
    """
    return TASKS[one_of("task", name, TASKS)]


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """MiniLM's tokenizer."""
    return AutoTokenizer.from_pretrained(models.path("minilm"))


@cache
def rows(name: str) -> DatasetDict:
    """The prepared splits of a task; validation and test cut to `EVALUATED` rows."""
    splits = task(name).load()
    for part in ("validation", "test"):
        splits[part] = splits[part].select(range(min(EVALUATED, len(splits[part]))))
    return DatasetDict(
        {part: task(name).prepare(chosen, tokenizer()) for part, chosen in splits.items()}
    )


def collator(name: str) -> DataCollatorForTokenClassification | DataCollatorWithPadding:
    """Pads a batch of a task to its longest row."""
    padding = {"TOKEN_CLS": DataCollatorForTokenClassification}
    return padding.get(task(name).task_type, DataCollatorWithPadding)(tokenizer())


def base(name: str, seed: int) -> PreTrainedModel:
    """MiniLM with the task's head; the head's random start is fixed by the seed."""
    torch.manual_seed(seed)
    found = task(name)
    return found.auto.from_pretrained(models.path("minilm"), **_head(found.task_type))


@cache
def _head(task_type: str) -> dict[str, int]:
    """How many classes the head has, where a task has classes."""
    if task_type == "SEQ_CLS":
        return {"num_labels": 2}
    if task_type == "TOKEN_CLS":
        return {"num_labels": len(data.addresses()["train"].features["tags"].feature.names)}
    return {}


@cache
def evaluation(name: str, part: str) -> tuple[training.Batch, ...]:
    """A split's rows by length in batches of 50, so that little padding is computed."""
    chosen = rows(name)[part]
    lengths = [len(ids) for ids in chosen["input_ids"]]
    by_length = sorted(range(len(chosen)), key=lengths.__getitem__)
    return tuple(training.ordered_batches(chosen.select(by_length), collator(name), batch_size=50))


def measure(model: torch.nn.Module, name: str, part: str) -> dict[str, float]:
    """Score and mean loss (nats per target), as ``{part}_score`` and ``{part}_loss``."""
    batches = evaluation(name, part)
    return {
        f"{part}_score": round(TASKS[name].score(model, batches), 4),
        f"{part}_loss": round(training.mean_loss(model, batches), 4),
    }


def fine_tune(
    model: torch.nn.Module,
    name: str,
    *,
    learning_rate: float,
    seed: int,
    label: str,
    first_rows: int | None = None,
    watch: Callable[[int], None] | None = None,
) -> training.History:
    """The run that every study shares: the task's steps, `BATCH` rows a step, a short warm-up.

    ``first_rows`` trains on that many rows only, chosen by the seed; ``watch`` is called after
    every step with the number of steps done.
    """
    chosen = rows(name)["train"]
    if first_rows is not None:
        chosen = chosen.shuffle(seed=seed).select(range(first_rows))
    return training.train(
        model,
        training.batches(chosen, collator(name), batch_size=BATCH, seed=seed),
        steps=TASKS[name].steps,
        learning_rate=learning_rate,
        warmup_steps=5,
        watch=watch,
        label=label,
    )
