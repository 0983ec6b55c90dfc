"""Verdicts from the raw CSV files with csv and NumPy.

The lessons read the same files with helpers.experiments and judge with helpers.claims: rates are
chosen, seeds are paired and intervals are computed here anew, with a Student quantile that is
integrated instead of looked up.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from own_rules import (
    agrees,
    best_rate,
    column,
    exceeds,
    lead,
    only,
    quantile,
    stored,
    tuned,
)


def losses(study: str, /, **arm: object) -> list[float]:
    """Test losses of an arm at its best rate, by seed."""
    return column(tuned(only(stored(study), **arm)), "test_loss")


def test_the_quantile_is_student_s():
    """With two degrees of freedom it has a formula, and more of them bring it nearer to 1.96."""
    assert quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-3)
    assert 1.96 < quantile(19) < quantile(4) < quantile(2)
    assert exceeds((0.1, 0.2)) is True and exceeds((-0.2, 0)) is False
    assert exceeds((-0.1, 0.1)) is None


# -------------------------------------------------------------------------------- ranks, methods


def test_c006_lora_is_comparable_with_full_fine_tuning():
    lora, full = (losses("full_vs_lora", method=name) for name in ("lora", "full"))
    untrained = np.mean(column(only(stored("full_vs_lora"), method="untrained"), "test_loss"))
    margin = 0.05 * (untrained - np.mean(full))
    low, high = lead(lora, full, larger_is_better=False)
    comparable = True if -margin < low and high < margin else None
    if high <= -margin or low >= margin:
        comparable = False
    agrees("C006", comparable)


def test_c039_harder_tasks_need_higher_ranks():
    def of_rank_16(task: str) -> np.ndarray:
        arms = [np.array(losses("rank_by_task", task=task, rank=r)) for r in (4, 16)]
        return arms[0] - arms[1]

    found = {
        task: exceeds(lead(of_rank_16(task), of_rank_16("movies"), larger_is_better=True))
        for task in ("questions", "addresses")
    }
    agrees("C039", found)


def test_c041_more_data_supports_higher_ranks():
    def of_rank_32(study: str, /, **arm: object) -> np.ndarray:
        low, high = (np.array(losses(study, rank=r, **arm)) for r in (4, 32))
        return low - high

    many = of_rank_32("rank_by_task", task="addresses")
    few = of_rank_32("rank_by_size", rows=64)
    agrees("C041", exceeds(lead(many, few, larger_is_better=True)))


def test_c121_a_taller_model_needs_no_full_training():
    def not_worse(layers: int, trained: str) -> bool | None:
        other = losses("replication", layers=layers, trained=trained)
        nothing = column(only(stored("replication"), layers=layers, trained="nothing"), "test_loss")
        margin = 0.1 * (np.mean(nothing) - np.mean(other))
        taller = losses("replication", layers=45, trained="lora")
        return exceeds(lead(taller, other, larger_is_better=False), -margin)

    agrees(
        "C121",
        {
            "as training all weights of the taller model": not_worse(45, "all weights"),
            "as LoRA on the plain model": not_worse(30, "lora"),
        },
    )


# -------------------------------------------------------------------------------- learning rates


def rates(study: str, method: str) -> list[float]:
    """The logarithm of each seed's best rate, among the seeds that tried every rate."""
    rows = only(stored(study), method=method)
    grid = {row["learning_rate"] for row in rows}
    found = []
    for seed in sorted({row["seed"] for row in rows}, key=int):
        own = [row for row in rows if row["seed"] == seed]
        assert {row["learning_rate"] for row in own} == grid
        best = min(own, key=lambda row: float(row["validation_loss"]))
        found.append(math.log10(float(best["learning_rate"])))
    return found


def higher(study: str, method: str) -> bool | None:
    return exceeds(lead(rates(study, method), rates(study, "full"), larger_is_better=True))


def rate_of(study: str, method: str) -> float:
    return best_rate(only(stored(study), method=method))


def test_c086_qlora_needs_a_higher_rate_than_full_fine_tuning():
    studies = {"MiniLM": "learning_rates", "SmolLM2": "full_vs_lora"}
    agrees("C086", {name: higher(study, "qlora") for name, study in studies.items()})


def test_c087_the_rate_of_full_fine_tuning():
    agrees(
        "C087",
        {
            "best on MiniLM": rate_of("learning_rates", "full") == 5e-5,
            "best on SmolLM2": rate_of("full_vs_lora", "full") == 5e-5,
            "in the note's own range, 5e-6 to 2e-5": 5e-6 <= 5e-5 <= 2e-5,
        },
    )


def test_c125_the_rate_of_lora():
    """The untrained loss is that of a coin, ln 2; the lesson runs the untrained model."""
    rows = only(stored("learning_rates"), method="lora")
    at, best = column(only(rows, learning_rate=3e-4), "test_loss"), column(tuned(rows), "test_loss")
    margin = 0.1 * (math.log(2) - np.mean(best))
    agrees("C125", exceeds(lead(at, best, larger_is_better=False), -margin))


def test_c134_the_ranges_of_rates():
    ranges = {
        "LoRA on MiniLM": ("lora", 1e-4, 3e-4),
        "QLoRA on MiniLM": ("qlora", 2e-4, 5e-4),
        "full fine-tuning on MiniLM": ("full", 5e-6, 2e-5),
    }
    inside = {
        name: low <= rate_of("learning_rates", method) <= high
        for name, (method, low, high) in ranges.items()
    }
    agrees("C134", inside)


def test_c135_peft_needs_a_higher_rate_than_full_fine_tuning():
    methods = {"LoRA": "lora", "QLoRA": "qlora"}
    agrees("C135", {name: higher("learning_rates", method) for name, method in methods.items()})


# -------------------------------------------------------------------------------- epochs


def curves(method: str, which: str) -> np.ndarray:
    """Loss after each epoch, a row for each seed, at the rate of the lowest reached loss."""
    rows = only(stored("duration"), method=method)
    epochs = sorted(name for name in rows[0] if name.startswith("validation_"))
    by_rate = {
        rate: only(rows, learning_rate=rate) for rate in {float(r["learning_rate"]) for r in rows}
    }

    def reached(rate: float) -> float:
        return float(np.mean([min(float(row[e]) for e in epochs) for row in by_rate[rate]]))

    names = [name.replace("validation", which) for name in epochs]
    return np.array([[float(r[n]) for n in names] for r in by_rate[min(by_rate, key=reached)]])


def test_c140_epochs_until_the_lowest_validation_loss():
    mean = {name: (curves(name, "validation").argmin(1) + 1).mean() for name in ("lora", "full")}
    agrees(
        "C140",
        {
            "LoRA in 3 to 10 epochs": 3 <= mean["lora"] <= 10,
            "full fine-tuning in 10 to 30": 10 <= mean["full"] <= 30,
        },
    )


def stopped(curve: np.ndarray, patience: int = 2) -> int:
    """The epoch whose weights are kept: the best one before so many without a better one."""
    for end in range(len(curve)):
        best = int(curve[: end + 1].argmin())
        if end - best == patience:
            return best
    return int(curve.argmin())


def test_c141_early_stopping():
    def better(method: str) -> bool | None:
        test = curves(method, "test")
        kept = [stopped(curve) for curve in curves(method, "validation")]
        early = test[np.arange(len(kept)), kept]
        return exceeds(lead(early, test[:, -1], larger_is_better=False))

    agrees("C141", {"LoRA": better("lora"), "full fine-tuning": better("full")})


# -------------------------------------------------------------------------------- merging, time


def by_adapter(route: str, name: str) -> dict[str, list[float]]:
    """Seeds of a way to merge, apart for each number of steps that the adapter was trained."""
    rows = only(stored("merge_routes"), route=route)
    steps = sorted({row["steps"] for row in rows}, key=int)
    return {f"{n} steps": column(only(rows, steps=int(n)), name) for n in steps}


def distances(route: str) -> list[float]:
    return [d for seeds in by_adapter(route, "distance_percent").values() for d in seeds]


def test_c158_dequantise_first():
    agrees(
        "C158",
        {
            "dequantised first it is the trained model": max(distances("dequantised")) <= 2,
            "without that it is another": min(distances("into four bits")) > 2,
        },
    )


def test_c159_merge_onto_the_16_bit_base():
    apart, merged = (by_adapter(r, "test_loss") for r in ("kept apart", "full precision"))
    pairs = [(a, m) for key in apart for a, m in zip(apart[key], merged[key], strict=True)]
    agrees(
        "C159",
        {
            "it gives the trained model": max(distances("full precision")) <= 2,
            "it predicts held-out answers at least as well": all(m <= a for a, m in pairs),
        },
    )


def test_c161_quantise_the_merged_model():
    alone = by_adapter("four bits alone", "test_loss")
    apart = by_adapter("kept apart", "test_loss")
    again = by_adapter("full precision, requantised", "test_loss")
    found = {}
    for key in apart:
        margin = 0.05 * (np.mean(alone[key]) - np.mean(apart[key]))
        found[key] = exceeds(lead(again[key], apart[key], larger_is_better=False), -margin)
    agrees("C161", found)


def test_c102_dora_is_10_to_15_per_cent_slower():
    ratios: dict[str, list[float]] = {}
    for row in stored("dora_speed"):
        name = f"{row['model']} {row['rows']} x {row['tokens']}, {row['targets']}"
        ratios.setdefault(name, []).append(100 * (float(row["ratio"]) - 1))
    agrees("C102", {name: 10 <= np.median(found) <= 15 for name, found in ratios.items()})


def overhead() -> dict[str, float]:
    """Per cent of time that an adapter adds to a pass of the 4-bit base: the median."""
    ratios: dict[str, list[float]] = {}
    for row in stored("serving"):
        many = "s" if int(row["tokens"]) > 1 else ""
        name = f"{row['tokens']} token{many}, {row['targets']}"
        ratios.setdefault(name, []).append(100 * (float(row["apart_4bit"]) - 1))
    return {name: float(np.median(found)) for name, found in ratios.items()}


def test_c162_an_adapter_on_four_bits_costs_little():
    agrees("C162", {name: more <= 10 for name, more in overhead().items()})


def test_c164_an_adapter_on_four_bits_costs_1_to_2_per_cent():
    agrees("C164", {name: 0.5 <= more <= 2.5 for name, more in overhead().items()})


# -------------------------------------------------------------------------------- freezing

SHIFTS = ("colours", "inverted", "questions", "colours and questions")


def right(shift: str, setting: str, strategy: str) -> list[float]:
    rows = only(stored("freezing"), shift=shift, setting=setting, strategy=strategy)
    return column(tuned(rows, "validation_error"), "test")


def against(setting: str, one: str, *others: str, margin: float = 0) -> dict[str, bool | None]:
    return {
        f"{shift}, {setting}, against {other}": exceeds(
            lead(right(shift, setting, one), right(shift, setting, other), larger_is_better=True),
            -margin,
        )
        for shift in SHIFTS
        for other in others
    }


def test_c172_the_vision_tower_needs_the_higher_rank():
    def of(shift: str, vision: int, language: int) -> list[float]:
        rows = only(stored("tower_ranks"), shift=shift, vision=vision, language=language)
        return column(tuned(rows, "validation_error"), "test")

    found = {
        f"{shift} changed": exceeds(
            lead(of(shift, 64, 16), of(shift, 16, 64), larger_is_better=True)
        )
        for shift in ("images", "words", "images and words")
    }
    agrees("C172", found)


def test_c178_lora_on_the_decoder_only():
    agrees("C178", against("equal", "conservative", "moderate", "aggressive", margin=0.02))


def test_c179_the_connector_in_full():
    equal = against("equal", "moderate", "conservative")
    agrees("C179", equal | against("note", "moderate", "conservative"))


def test_c180_lora_on_both_towers():
    agrees("C180", against("note", "aggressive", "conservative", "moderate"))
