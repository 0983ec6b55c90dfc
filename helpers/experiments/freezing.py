"""Which parts of a vision-language model to freeze, and which rank each tower needs: two studies.

The base is :mod:`helpers.experiments.tiny_vlm`, trained by the course: 0.56 million parameters,
not pretrained at scale. Four shifts are made from the real questions. "colours": the colour
channels change places and noise is added. "inverted": light and dark are exchanged and noise is
added, which changes every pixel, the background's too. "questions": they are phrased anew and have
new answer words, none of which the base knows. "colours and questions": both.

Five strategies follow each shift with fifty steps, at two settings. "equal": LoRA on every linear
layer of a tower, ranks such that all train the same number of parameters within 2 %; the connector
alone has half of it, and no more. "note": the note's layers, ranks, alpha and dropout. Equal for
every arm: the steps, the batches and their order. Each arm's learning rate is chosen on validation
rows. Fifty steps show who adapts fast, and no limit of what a part can learn.

The second study gives each tower a rank of its own, on the shifts of :mod:`towers`.

Source: this course's own study.
Taught in: notebook 08, section 3.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import default_collate

from helpers import training
from helpers.claims import Seeds
from helpers.experiments import tiny_vlm, towers
from helpers.experiments.study import Study, lowest
from helpers.experiments.tiny_vlm import Examples
from helpers.given import one_of

SHIFTS = ("colours", "inverted", "questions", "colours and questions")
STRATEGIES = ("conservative", "moderate", "aggressive", "vision only", "connector only")
SETTINGS = ("equal", "note")
RATES = (2e-3, 6e-3)
STEPS, BATCH = 50, 16
BEFORE_ROWS = 200
NOISE = 0.1
CONNECTOR = "multi_modal_projector"
RANK_OF_ONE, RANK_OF_TWO = 18, 9

# The question as it was, and as it is asked after the shift. The base knows neither "hue", "form",
# "name" nor "which", and has not seen the other words in this order.
PHRASES = (
    (r"what color is the (\w+) \?", r"name the hue of the \1"),
    (r"what is the color of the (\w+) \?", r"of which hue is the \1"),
    (r"what shape is in the image \?", "name the form in the image"),
    (r"what shape does the image contain \?", "which form does the image contain"),
    (r"what shape is present \?", "name the form present"),
    (r"what is the (\w+) shape \?", r"name the \1 form"),
)
NEW_ANSWERS = {
    "circle": "disc",
    "rectangle": "box",
    "triangle": "wedge",
    "black": "ebony",
    "blue": "azure",
    "brown": "umber",
    "gray": "slate",
    "green": "emerald",
    "red": "scarlet",
    "teal": "cyan",
    "yellow": "amber",
}
NEW_WORDS = ("hue", "form", "name", "which", *NEW_ANSWERS.values())

_NOTE_LANGUAGE = r".*language_model.*\.(q_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
_NOTE_VISION = r".*vision_tower.*\.(q_proj|v_proj)"


@functools.cache
def vocabulary() -> dict[str, int]:
    """The base's words and, behind them, the words that only the new questions use."""
    known = tiny_vlm.vocabulary()
    return known | {word: len(known) + i for i, word in enumerate(NEW_WORDS)}


def shifted(questions: Examples, shift: str) -> Examples:
    """The questions after a shift: "none" or one of :data:`SHIFTS`; the right answers stay right.

    Args:
        questions: as the base was trained on them.
        shift: "colours" hands red to green, green to blue and blue to red; "inverted" exchanges
            light and dark; both add noise with a standard deviation of 0.1, where black to white
            is 2. "questions" rewrites the question and the answer.

    Raises:
        ValueError: no such shift, or a question that is none of the six known ones.

    Taught in: notebook 08, section 3.
    """
    one_of("shift", shift, ("none", *SHIFTS))
    pixels, ids = questions.pixels, questions.input_ids
    if shift != "questions" and shift != "none":
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
        moved = -pixels if shift == "inverted" else pixels.roll(1, dims=1)
        pixels = (moved + NOISE * noise).clamp(-1, 1)
    if "questions" in shift:
        texts, which = ids.unique(dim=0, return_inverse=True)
        ids = torch.stack([_asked_anew(text) for text in texts])[which]
    return replace(questions, pixels=pixels, input_ids=ids)


def base(shift: str) -> nn.Module:
    """The tiny VLM, with rows for the new words where a shift has them.

    The rows are drawn at random with the mean and spread of the trained ones; every strategy
    leaves them frozen, like all word embeddings.
    """
    model = tiny_vlm.base()
    if "questions" in shift:
        grow(model)
    return model


@torch.no_grad()
def grow(model: nn.Module) -> None:
    """Give the tiny VLM rows for the new words, in its embedding and in its head."""
    known = len(tiny_vlm.vocabulary())
    model.resize_token_embeddings(len(vocabulary()), mean_resizing=False)
    generator = torch.Generator().manual_seed(0)
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        old, new = table[:known], table[known:]
        noise = torch.randn(new.shape, generator=generator)
        new.copy_(old.mean(0) + old.std(0) * noise)


def settings_of(strategy: str, setting: str) -> dict | None:
    """peft's LoRA settings of a strategy; None where only the connector trains, without peft.

    Args:
        strategy: one of :data:`STRATEGIES`.
        setting: "equal" or "note".

    Raises:
        ValueError: no such strategy or setting.

    Taught in: notebook 08, section 3.
    """
    if strategy not in STRATEGIES or setting not in SETTINGS:
        raise ValueError(
            f"no strategy {strategy!r} at {setting!r}; there is {', '.join(STRATEGIES)}, "
            f"each at {' and '.join(SETTINGS)}"
        )
    if strategy == "connector only":
        return None
    made = _of_note(strategy) if setting == "note" else _of_equal(strategy)
    if strategy == "moderate":
        made["modules_to_save"] = [CONNECTOR]
    return made | {"lora_alpha": 2 * made["r"]}


def adapted(model: nn.Module, strategy: str, setting: str) -> nn.Module:
    """The model with a strategy's parts trainable and all others frozen.

    Taught in: notebook 08, section 3.
    """
    chosen_settings = settings_of(strategy, setting)
    if chosen_settings is not None:
        return get_peft_model(model, LoraConfig(**chosen_settings))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = CONNECTOR in name
    return model


def with_ranks(model: nn.Module, vision: int, language: int) -> nn.Module:
    """LoRA on every linear layer of both towers, a rank for each, with alpha = rank.

    Taught in: notebook 08, section 4.
    """
    of_vision = {towers.TARGETS["vision"]: vision}
    return get_peft_model(
        model,
        LoraConfig(
            r=language,
            lora_alpha=language,
            target_modules=towers.TARGETS["both"],
            rank_pattern=of_vision,
            alpha_pattern=of_vision,
        ),
    )


def trainable(model: nn.Module) -> int:
    """How many parameters ask for a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def run(settings: dict, seed: int) -> dict[str, float]:
    """Adapt one arm at one rate and return its accuracies.

    The controls train nothing: strategy "untrained" is the base as it is, "majority" the commonest
    answer of the shifted training rows to a shape and to a colour question.
    """
    torch.manual_seed(seed)
    shift, strategy = settings["shift"], settings["strategy"]
    if strategy == "majority":
        return _majority(shift)
    model, parameters = base(shift), 0
    if strategy != "untrained":
        model = adapted(model, strategy, settings["setting"])
        parameters = trainable(model)
        fit(model, shift, settings["learning_rate"], seed)
    return scores(model, shift) | {"parameters": parameters}


def run_ranks(settings: dict, seed: int) -> dict[str, float]:
    """Adapt one pair of ranks at one rate, on the shifts and with the steps of "towers".

    Its table has what one tower alone reaches, and both at one rank; the base is the same.
    """
    torch.manual_seed(seed)
    model = with_ranks(tiny_vlm.base(), settings["vision"], settings["language"])
    measured = towers.fit_and_score(
        model, settings["shift"], settings["learning_rate"], seed, label="two ranks"
    )
    return {"validation_error": round(1 - measured["validation"], 4)} | {
        name: measured[name] for name in METRICS_BY_TOWER[1:]
    }


def fit(model: nn.Module, shift: str, rate: float, seed: int, steps: int = STEPS) -> None:
    """Train what is trainable on the shifted training rows."""
    training.train(
        model,
        training.batches(_train_rows(shift), default_collate, batch_size=BATCH, seed=seed),
        steps=steps,
        learning_rate=rate,
        warmup_steps=5,
        label=shift,
    )


def scores(model: nn.Module, shift: str) -> dict[str, float]:
    """Shares of right answers; questions about shapes and about colours count the same.

    Returns:
        validation_error: the share wrong of 300 validation rows.
        test, test_shape, test_colour: of 600 test rows.
        test_blank: of the same with every image grey.
        test_before: of 200 of the same before the shift, what the model knew.
    """
    validation, test = _rows("validation", shift), _rows("test", shift)
    before = _first(_rows("test"), BEFORE_ROWS)
    shape, colour = towers.shares(tiny_vlm.right(model, test), test)
    measures = {
        "validation_error": 1 - _mean(tiny_vlm.right(model, validation), validation),
        "test": (shape + colour) / 2,
        "test_shape": shape,
        "test_colour": colour,
        "test_blank": _mean(tiny_vlm.right_blank(model, test), test),
        "test_before": _mean(tiny_vlm.right(model, before), before),
    }
    return {name: round(value, 4) for name, value in measures.items()}


def chosen(table: pd.DataFrame, study: Study) -> pd.DataFrame:
    """The rows of each arm at the rate that it chose on the seeds that tried every rate."""
    arm = [name for name in study.settings[0] if name != study.tuned]
    first = table[table["seed"] < study.explored]
    means = first.groupby([*arm, study.tuned], as_index=False)[study.tuned_by].mean()
    best = lowest(means, by=arm, metric=study.tuned_by)[[*arm, study.tuned]]
    return table.merge(best).sort_values([*arm, "seed"], ignore_index=True)


def by_seed(rows: pd.DataFrame, measure: str = "test", **arm: str | int) -> list[float]:
    """One measure of one arm among the :func:`chosen` rows, in the order of the seeds."""
    for name, value in arm.items():
        rows = rows[rows[name] == value]
    return rows.sort_values("seed")[measure].tolist()


def against(
    rows: pd.DataFrame, shift: str, setting: str, strategy: str, other: str, measure: str = "test"
) -> Seeds:
    """Two strategies at the same setting and shift, seed by seed.

    Taught in: notebook 08, section 3.
    """
    arms = [
        by_seed(rows, measure, shift=shift, strategy=one, setting=setting)
        for one in (strategy, other)
    ]
    return Seeds(*arms, larger_is_better=True, names=(strategy, other))


def ranks_against(
    rows: pd.DataFrame, shift: str, ranks: Sequence[int], others: Sequence[int]
) -> Seeds:
    """Two pairs of ranks (vision, language) at the same shift, seed by seed.

    Taught in: notebook 08, section 4.
    """
    arms, names = [], []
    for vision, language in (ranks, others):
        arms.append(by_seed(rows, shift=shift, vision=vision, language=language))
        names.append(f"vision {vision}, language {language}")
    return Seeds(*arms, larger_is_better=True, names=tuple(names))


def _of_equal(strategy: str) -> dict:
    one = {"conservative": "language", "vision only": "vision", "moderate": "language"}
    rank = RANK_OF_TWO if strategy in ("moderate", "aggressive") else RANK_OF_ONE
    return {"r": rank, "target_modules": towers.TARGETS[one.get(strategy, "both")]}


def _of_note(strategy: str) -> dict:
    if strategy == "vision only":
        return {"r": 32, "target_modules": _NOTE_VISION, "lora_dropout": 0.1}
    if strategy == "aggressive":
        return {
            "r": 16,
            "target_modules": f"{_NOTE_LANGUAGE}|{_NOTE_VISION}",
            "rank_pattern": {_NOTE_VISION: 32},
            "alpha_pattern": {_NOTE_VISION: 64},
        }
    return {"r": 16, "target_modules": _NOTE_LANGUAGE, "lora_dropout": 0.05}


def _asked_anew(ids: Tensor) -> Tensor:
    """One row of token ids, rewritten; images and padding stay in front."""
    words = {i: word for word, i in tiny_vlm.vocabulary().items()}
    asked = [words[i] for i in ids[:-1].tolist() if i not in (tiny_vlm.PAD, tiny_vlm.IMAGE)]
    text = " ".join(asked)
    found = next((p for p in PHRASES if re.fullmatch(p[0], text)), None)
    if found is None:
        raise ValueError(f"no new phrasing for the question {text!r}")
    anew = re.sub(*found, text).replace("shape", "form").split()
    known = vocabulary()
    row = [*[tiny_vlm.IMAGE] * tiny_vlm.PATCHES, *[known[word] for word in anew]]
    row.append(known[NEW_ANSWERS[words[int(ids[-1])]]])
    return torch.tensor([tiny_vlm.PAD] * (len(ids) - len(row)) + row)


@functools.cache
def _rows(split: str, shift: str = "none") -> Examples:
    return shifted(towers.held_out(split), shift)


def _first(questions: Examples, rows: int) -> Examples:
    return Examples(questions.pixels[:rows], questions.input_ids[:rows], questions.is_shape[:rows])


@functools.cache
def _train_rows(shift: str) -> list[dict[str, Tensor]]:
    return shifted(tiny_vlm.examples("train"), shift).rows()


def _majority(shift: str) -> dict[str, float]:
    train = shifted(tiny_vlm.examples("train"), shift)
    validation, test = _rows("validation", shift), _rows("test", shift)
    before = _first(_rows("test"), BEFORE_ROWS)
    right = [towers.majority(train, questions) for questions in (validation, test, before)]
    shape, colour = towers.shares(right[1], test)
    measures = {
        "validation_error": 1 - _mean(right[0], validation),
        "test": (shape + colour) / 2,
        "test_shape": shape,
        "test_colour": colour,
        "test_blank": (shape + colour) / 2,
        "test_before": _mean(right[2], before),
    }
    return {name: round(value, 4) for name, value in measures.items()} | {"parameters": 0}


def _mean(right: Tensor, questions: Examples) -> float:
    return sum(towers.shares(right, questions)) / 2


def rates_of(vision: int, language: int) -> tuple[float, ...]:
    """The learning rates of a pair of ranks: they fall with the root of the ranks' mean."""
    mean = math.sqrt(vision * language)
    return tuple(round(rate / math.sqrt(mean), 5) for rate in towers.RATES_AT_RANK_1)


METRICS = (
    *("validation_error", "test", "test_shape", "test_colour", "test_blank", "test_before"),
    "parameters",
)
STUDY = Study(
    name="freezing",
    settings=(
        *(
            {"shift": shift, "strategy": control, "setting": "none", "learning_rate": 0.0}
            for shift in SHIFTS
            for control in ("majority", "untrained")
        ),
        *(
            {"shift": shift, "strategy": strategy, "setting": setting, "learning_rate": rate}
            for shift in SHIFTS
            for setting in SETTINGS
            for strategy in STRATEGIES
            # the connector alone has no rank: one setting is both
            if (strategy, setting) != ("connector only", "note")
            for rate in RATES
        ),
    ),
    metrics=METRICS,
    run=run,
    tuned="learning_rate",
    tuned_by="validation_error",
    seeds=5,
)

RANKS = (4, 16, 64)
# The whole grid where both change (its two missing cells are in "towers"); where one changes, the
# note's ranks and the same ranks exchanged.
PAIRS = {
    "images and words": tuple(
        (a, b) for a in RANKS for b in RANKS if a != b or a not in towers.BOTH_RANKS
    ),
    "images": ((64, 16), (16, 64)),
    "words": ((64, 16), (16, 64)),
}
METRICS_BY_TOWER = (
    *("validation_error", "test", "test_shape", "test_colour", "test_blank"),
    "parameters",
)
BY_TOWER = Study(
    name="tower_ranks",
    settings=tuple(
        {"shift": shift, "vision": vision, "language": language, "learning_rate": rate}
        for shift, pairs in PAIRS.items()
        for vision, language in pairs
        for rate in rates_of(vision, language)
    ),
    metrics=METRICS_BY_TOWER,
    run=run_ranks,
    tuned="learning_rate",
    tuned_by="validation_error",
    seeds=5,
    explored=2,
)
