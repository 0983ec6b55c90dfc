"""Which tower of a vision-language model needs LoRA, and at which rank? A tiny VLM, three shifts.

The base is :mod:`helpers.experiments.tiny_vlm`, trained by the course: 0.56 million parameters,
not pretrained at scale. Three shifts are made from the real questions: the images change their
colour channels and get darker, the answers' words are renamed, or both. LoRA goes on every linear
layer of the vision tower, of the language decoder, or of both; the projector and the word
embeddings stay frozen. One rank costs the same in either tower, so "both" at rank r trains
exactly as many parameters as one tower at rank 2r. Equal for every arm: the steps, the batches
and their order. The learning rate is chosen for each arm on the validation rows, out of two. The
verdict is read on the test rows.

Thirty steps are few: they show who adapts fast, and no limit of what a tower can learn.

Source: this course's own study.
Taught in: notebook 02, section 8.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import default_collate

from helpers import data, training
from helpers.claims import Seeds
from helpers.experiments import tiny_vlm
from helpers.experiments.study import Study
from helpers.experiments.tiny_vlm import Examples
from helpers.given import one_of

SHIFTS = ("images", "words", "images and words")
RANKS = (1, 2, 4, 8, 16, 32, 64)
BOTH_RANKS = (4, 16)
# With alpha = rank, the rate that learns best falls about as the root of the rank.
RATES_AT_RANK_1 = (0.012, 0.03)
STEPS, BATCH = 30, 32
VALIDATION_ROWS, TEST_ROWS = 300, 600
BRIGHTNESS = 0.6
TARGETS = {
    "vision": r".*vision_tower.*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    "language": r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
}
TARGETS["both"] = "|".join(TARGETS.values())


def shifted(questions: Examples, shift: str) -> Examples:
    """The questions after a shift: "none", "images", "words" or "images and words".

    "images" hands red to green, green to blue and blue to red, and keeps 60 % of the brightness;
    the right answer stays. "words" renames each shape to the next shape and each colour to the
    next colour; the questions stay.

    Raises:
        ValueError: another name.
    """
    one_of("shift", shift, ("none", *SHIFTS))
    pixels, ids = questions.pixels, questions.input_ids
    if "images" in shift:
        pixels = (pixels.roll(1, dims=1) + 1) * BRIGHTNESS - 1  # -1 is black
    if "words" in shift:
        ids = ids.clone()
        ids[:, -1] = _next_word()[ids[:, -1]]
    return replace(questions, pixels=pixels, input_ids=ids)


def with_lora(model: nn.Module, tower: str, rank: int) -> PeftModel:
    """LoRA of one rank, with alpha = rank, on every linear layer of "vision", "language", "both".

    Taught in: notebook 02, section 8.
    """
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS[tower]))


def run(settings: dict, seed: int) -> dict[str, float]:
    """Adapt one arm at one rate and return its accuracies.

    The controls train nothing: tower "none" is the base as it is, "majority" the commonest answer
    of the shifted training rows to a shape and to a colour question.
    """
    torch.manual_seed(seed)
    shift, tower = settings["shift"], settings["tower"]
    validation, test = (shifted(held_out(name), shift) for name in ("validation", "test"))
    if tower == "majority":
        train = shifted(tiny_vlm.examples("train"), shift)
        right = [majority(train, questions) for questions in (validation, test)]
        return _measures(right[0], right[1], right[1], validation, test) | {"parameters": 0}
    if tower == "none":
        return _adapted(tiny_vlm.base(), shift)
    model = with_lora(tiny_vlm.base(), tower, settings["rank"])
    label = f"{tower} r={settings['rank']}"
    return fit_and_score(model, shift, settings["learning_rate"], seed, label)


def fit_and_score(
    model: PeftModel, shift: str, rate: float, seed: int, label: str
) -> dict[str, float]:
    """Train a model's adapter on a shift for thirty steps, and return what :func:`run` does."""
    training.train(
        model,
        training.batches(_train_rows(shift), default_collate, batch_size=BATCH, seed=seed),
        steps=STEPS,
        learning_rate=rate,
        warmup_steps=3,
        label=label,
    )
    parameters = model.get_nb_trainable_parameters()[0]
    return _adapted(model, shift) | {"parameters": parameters}


def chosen(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each shift, tower, rank and seed: at the rate that validates best for the arm.

    An arm is a shift, a tower and a rank; its rate has the best mean validation accuracy over
    the seeds. Controls are left out.
    """
    arm = ["shift", "tower", "rank"]
    runs = table[table["rank"] > 0]
    means = runs.groupby([*arm, "learning_rate"], as_index=False)["validation"].mean()
    best = means.sort_values("validation", ascending=False).drop_duplicates(arm)
    kept = runs.merge(best[[*arm, "learning_rate"]], on=[*arm, "learning_rate"])
    return kept.sort_values([*arm, "seed"], ignore_index=True)


def accuracy_by_seed(table: pd.DataFrame, shift: str, tower: str, rank: int) -> list[float]:
    """The test accuracy of one arm at its chosen rate, in the order of the seeds."""
    of_arm = "shift == @shift and tower == @tower and rank == @rank"
    return chosen(table).query(of_arm)["test"].tolist()


def language_against(table: pd.DataFrame, shift: str, other: str, rank: int) -> Seeds:
    """The language decoder alone at a rank, and "both" or "vision" with as many parameters."""
    other_rank = rank // 2 if other == "both" else rank
    return Seeds(
        a=accuracy_by_seed(table, shift, "language", rank),
        b=accuracy_by_seed(table, shift, other, other_rank),
        larger_is_better=True,
        names=("language only", other if other == "both" else "vision only"),
    )


def held_out(split: str) -> Examples:
    """The first rows of "validation" or "test": as many as a study is read on."""
    rows = {"validation": VALIDATION_ROWS, "test": TEST_ROWS}[split]
    whole = tiny_vlm.examples(split)
    return Examples(whole.pixels[:rows], whole.input_ids[:rows], whole.is_shape[:rows])


def _next_word() -> Tensor:
    """(words,) the token that each token becomes; only answers change."""
    known = tiny_vlm.vocabulary()
    becomes = torch.arange(len(known))
    for group in (data.SHAPES, data.COLOURS):
        for word, after in zip(group, (*group[1:], group[0]), strict=True):
            becomes[known[word]] = known[after]
    return becomes


@functools.cache
def _train_rows(shift: str) -> list[dict[str, Tensor]]:
    return shifted(tiny_vlm.examples("train"), shift).rows()


def _adapted(model: nn.Module, shift: str) -> dict[str, float]:
    """The measures of a model as it is; no parameter counts as trained."""
    validation, test = (shifted(held_out(name), shift) for name in ("validation", "test"))
    right = [tiny_vlm.right(model, questions) for questions in (validation, test)]
    blank = tiny_vlm.right_blank(model, test)
    return _measures(*right, blank, validation, test) | {"parameters": 0}


def majority(train: Examples, questions: Examples) -> Tensor:
    """(rows,) True where the commonest training answer to a question of that kind is right."""
    answers = [train.input_ids[train.is_shape == kind, -1].mode().values for kind in (False, True)]
    return torch.stack(answers)[questions.is_shape.long()] == questions.input_ids[:, -1]


def _measures(
    right_validation: Tensor,
    right_test: Tensor,
    right_blank: Tensor,
    validation: Examples,
    test: Examples,
) -> dict[str, float]:
    shape, colour = shares(right_test, test)
    measures = {
        "validation": sum(shares(right_validation, validation)) / 2,
        "test": (shape + colour) / 2,
        "test_shape": shape,
        "test_colour": colour,
        "test_blank": sum(shares(right_blank, test)) / 2,
    }
    return {name: round(value, 4) for name, value in measures.items()}


def shares(right: Tensor, questions: Examples) -> tuple[float, float]:
    """Share right of the shape and of the colour questions: each kind counts the same."""
    kinds = (questions.is_shape, ~questions.is_shape)
    return tuple(right[kind].float().mean().item() for kind in kinds)


def rates(rank: int) -> tuple[float, ...]:
    """The learning rates that an arm of this rank is tried at."""
    return tuple(round(rate / math.sqrt(rank), 5) for rate in RATES_AT_RANK_1)


STUDY = Study(
    name="towers",
    settings=(
        {"shift": "none", "tower": "none", "rank": 0, "learning_rate": 0.0},
        *(
            {"shift": shift, "tower": tower, "rank": 0, "learning_rate": 0.0}
            for shift in SHIFTS
            for tower in ("majority", "none")
        ),
        *(
            {"shift": shift, "tower": tower, "rank": rank, "learning_rate": rate}
            for shift in SHIFTS
            for tower in TARGETS
            for rank in (BOTH_RANKS if tower == "both" else RANKS)
            for rate in rates(rank)
        ),
    ),
    metrics=("validation", "test", "test_shape", "test_colour", "test_blank", "parameters"),
    run=run,
    seeds=5,
)
