"""What a model is worth on held-out rows: loss, accuracy, answers.

Source: the field's usual measures: accuracy, span accuracy, word error rate.
Taught in: notebook 01, section 5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch

from helpers.data import IGNORED, chat_prompt
from helpers.training.batches import Batch, TrainingError
from helpers.training.inspection import target_count

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


@torch.no_grad()
def answer_loss(model: torch.nn.Module, data: Iterable[Batch]) -> float:
    """Mean loss per target token (nats) of a language model, weighted over batches of any size.

    Raises:
        TrainingError: there is no target in the data.
    """
    # a decoder predicts position t+1 at t, so the first label of a row is never a target
    return _weighted_loss(model, data, lambda batch: int((_labels(batch)[:, 1:] != IGNORED).sum()))


@torch.no_grad()
def mean_loss(model: torch.nn.Module, data: Iterable[Batch]) -> float:
    """The loss that the model itself reports (nats), each batch weighted by its targets.

    A target is a label that is not masked; where the answer is a span, a row.

    Raises:
        TrainingError: there is no target in the data.

    Taught in: notebook 06, section 2.
    """
    return _weighted_loss(model, data, partial(target_count, model))


def _weighted_loss(
    model: torch.nn.Module, data: Iterable[Batch], targets_of: Callable[[Batch], int]
) -> float:
    model.eval()
    total, targets = 0.0, 0
    for batch in data:
        if n := targets_of(batch):
            total += model(**batch).loss.item() * n
            targets += n
    if not targets:
        raise TrainingError("no target in the evaluation data")
    return total / targets


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Iterable[Batch]) -> float:
    """Share of right labels, for sequence classification (B,) and token classification (B, T).

    Raises:
        TrainingError: there is no label in the data.
    """
    model.eval()
    return _share((_right_labels(model, batch) for batch in data), "label")


@torch.no_grad()
def span_accuracy(model: torch.nn.Module, data: Iterable[Batch]) -> float:
    """Share of rows whose answer span (first and last token) is found exactly.

    Raises:
        TrainingError: there is no row in the data.
    """
    model.eval()
    return _share((_right_spans(model, batch) for batch in data), "row")


def _right_labels(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    labels = _labels(batch)
    return (model(**batch).logits.argmax(-1) == labels)[labels != IGNORED]


def _labels(batch: Batch) -> torch.Tensor:
    if "labels" not in batch:
        raise TrainingError(f"a batch has no labels to compare with, but {', '.join(batch)}")
    return batch["labels"]


def _right_spans(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    out = model(**batch)
    first = out.start_logits.argmax(-1) == batch["start_positions"]
    return first & (out.end_logits.argmax(-1) == batch["end_positions"])


def _share(right: Iterable[torch.Tensor], what: str) -> float:
    """The share of True over all batches."""
    found, total = 0, 0
    for one in right:
        found += int(one.sum())
        total += one.numel()
    if not total:
        raise TrainingError(f"no {what} in the evaluation data")
    return found / total


@torch.no_grad()
def transcripts(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    data: Iterable[Batch],
    *,
    max_new_tokens: int = 20,
) -> list[str]:
    """What a speech model hears in each row, greedily, in the order of the rows.

    Taught in: notebook 01, section 5.
    """
    model.eval()
    heard: list[str] = []
    for batch in data:
        ids = model.generate(
            input_features=batch["input_features"], max_new_tokens=max_new_tokens, do_sample=False
        )
        heard += processor.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in heard]


def word_error_rate(heard: Iterable[str], said: Iterable[str]) -> float:
    """Words wrong, missing or too many, divided by the words that were said; it can exceed 1.

    Case and punctuation do not count. The errors of a row are the fewest insertions, deletions and
    replacements of words that turn what was heard into what was said (Levenshtein, 1966).

    Raises:
        TrainingError: nothing was said.
        ValueError: the two lists differ in length.

    Taught in: notebook 01, section 5.
    """
    heard, said = list(heard), list(said)
    if len(heard) != len(said):
        raise ValueError(f"{len(heard)} texts were heard and {len(said)} were said; give pairs")
    errors, words = 0, 0
    for ours, theirs in zip(heard, said, strict=True):
        truth = _words(theirs)
        errors += _edits(_words(ours), truth)
        words += len(truth)
    if not words:
        raise TrainingError("no word in the evaluation data")
    return errors / words


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _edits(ours: list[str], theirs: list[str]) -> int:
    """Fewest insertions, deletions and replacements; one row of the usual table at a time."""
    row = list(range(len(theirs) + 1))
    for i, word in enumerate(ours, start=1):
        above, row = row, [i]
        for j, other in enumerate(theirs, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != other)))
    return row[-1]


@torch.no_grad()
def answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    *,
    max_new_tokens: int = 32,
) -> list[str]:
    """The model's greedy answers to chat questions, one string each, special tokens removed.

    The questions run as one batch padded on the left, so that each answer follows its question.

    Taught in: notebook 01, section 3.
    """
    model.eval()
    prompts = [chat_prompt(question, tokenizer) for question in questions]
    inputs = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    inputs = inputs.to(next(model.parameters()).device)
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
