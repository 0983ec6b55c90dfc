"""Reports of predictions: numbers worked out by hand, and nothing lost on the way to a picture."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from peft import get_peft_model
from transformers import PreTrainedConfig

from helpers import memory, models, plots
from helpers.memory import report
from helpers.memory.gpus import CONTEXT, GIB, Gpu
from helpers.memory.predict import make_plan
from helpers.memory.replay import PHASES
from helpers.memory.simulate import Plan


@pytest.fixture(scope="module")
def tiny() -> memory.Prediction:
    config = models.tiny("llama").config
    return memory.predict(config, "lora", batch=2, seq=16, rank=4, targets=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def gpt2() -> memory.Prediction:
    return memory.predict("gpt2", "qlora", batch=2, seq=64, rank=4, checkpointing=True, gpu="t4")


def of(prediction: memory.Prediction, **changes: object) -> memory.Prediction:
    return dataclasses.replace(prediction, **changes)


def on(prediction: memory.Prediction, card: Gpu) -> memory.Prediction:
    return of(prediction, plan=dataclasses.replace(prediction.plan, gpu=card))


def plan(model: str | PreTrainedConfig, method: str) -> Plan:
    return make_plan(
        model,
        method,
        batch=1,
        seq=8,
        rank=None,
        targets=None,
        virtual_tokens=None,
        dtype="bf16",
        quant_type="nf4",
        double_quant=True,
        optimizer="adamw",
        attention="sdpa",
        checkpointing=False,
        padded=False,
        gpu="t4",
    )


def card(gib: float) -> Gpu:
    """A card with so many GiB for PyTorch."""
    return Gpu("own", int(gib * GIB) + CONTEXT, (8, 0))


def test_categories_are_less_than_allocated_by_rounding_only(gpt2):
    requested = sum(gpt2.categories.values())
    assert 0.99 * gpt2.allocated <= requested <= gpt2.allocated


def test_adapters_and_their_state_by_hand(tiny):
    """Two layers, q: 4 x 32 in, 32 x 4 out; v: two of four heads of 8, so 16 x 4 out; fp32."""
    numbers = 2 * ((4 * 32 + 32 * 4) + (4 * 32 + 16 * 4))
    assert tiny.categories["adapters"] == 4 * numbers
    assert tiny.categories["optimizer state"] == 2 * 4 * numbers


def test_the_table_adds_up(gpt2):
    frame = memory.table(gpt2)
    assert list(frame.index) == [*memory.CATEGORIES, report.ROUNDING, "allocated"]
    assert frame["GiB"][:-1].sum() == pytest.approx(gpt2.allocated / GIB)
    assert frame["share"][:-1].sum() == pytest.approx(1)
    assert frame["GiB"]["weights"] == gpt2.categories["weights"] / GIB


def test_the_tables_shares_by_hand(tiny):
    frame = memory.table(of(tiny, allocated=4 * GIB, categories={"weights": 3 * GIB}))
    assert frame["share"].to_dict() == {
        **dict.fromkeys(memory.CATEGORIES, 0.0),
        "weights": 0.75,
        report.ROUNDING: 0.25,
        "allocated": 1.0,
    }


@pytest.mark.parametrize("larger", ["activations", "temporaries"])
def test_a_guess_that_explains_too_much_has_no_negative_row(tiny, larger):
    sizes = {"weights": 3 * GIB, "activations": GIB // 4, "temporaries": GIB // 4}
    sizes[larger] *= 3
    frame = memory.table(of(tiny, allocated=4 * GIB - GIB // 8, categories=sizes, exact=False))
    assert frame["GiB"][larger] == 0.625
    assert frame["GiB"][report.ROUNDING] == 0
    assert frame["GiB"][:-1].sum() == frame["GiB"]["allocated"] == 3.875


@pytest.mark.parametrize(
    ("allocated", "reserved", "says"),
    [
        (2, 3, "fits own with 1.00 GiB to spare"),
        (2, 4, "fits own with 0.0 MiB to spare"),
        (3, 5, "may not fit own: what is allocated does, what is reserved lacks 1.00 GiB"),
        (5, 6.5, "does not fit own: 2.50 GiB are missing; rtx-3060 is the smallest card that does"),
        (900, 900, "does not fit own: 896.00 GiB are missing; no card does"),
    ],
)
def test_three_verdicts(tiny, allocated, reserved, says):
    run = of(tiny, allocated=int(allocated * GIB), reserved=int(reserved * GIB))
    assert memory.verdict(run, card(4)).startswith(says)
    assert memory.verdict(on(run, card(4))) == memory.verdict(run, card(4))


def test_the_summary_says_what_counts(gpt2):
    text = memory.summary(gpt2)
    for part in ("qlora", "rank 4", "batch 2", "64 tokens", "checkpointing", "nf4 with double"):
        assert part in text
    for part in (gpt2.operator, gpt2.phase, "every layer", "fits t4", "CUDA's own context"):
        assert part in text
    assert "paged" not in text


def test_the_summary_names_a_paged_state_and_a_guess(tiny):
    text = memory.summary(of(tiny, paged=3 * GIB, exact=False))
    assert "paged      3.00 GiB" in text
    assert "extrapolated" in text


def test_notes_are_in_the_summary_and_in_the_dictionary(gpt2):
    said = "t4 has no bf16 units: train with --dtype fp16"
    assert f"\nnote       {said}\n" in memory.summary(gpt2)
    assert memory.as_dict(gpt2)["notes"] == [said]
    assert "note" not in memory.summary(on(gpt2, card(4)))


@pytest.mark.parametrize(
    ("model", "method", "says"),
    [
        ("meta-llama/Llama-2-7b-hf", "lora", "q_proj, v_proj (peft's choice)"),
        ("gpt2", "qlora", "c_attn (peft's choice)"),
        ("t5-small", "dora", "q, v (peft's choice)"),
        ("mistral-7b", "ia3", "k_proj, v_proj, down_proj (peft's choice)"),
        ("mistral-7b", "adalora", "q_proj, v_proj"),
    ],
)
def test_a_run_names_the_model_that_was_asked_for_and_the_default_targets(model, method, says):
    words = report.settings_in_words(plan(model, method))
    assert words.startswith(f"{model}, {method}, ")
    assert f", targets {says}, batch" in words


def test_default_targets_are_those_that_peft_takes():
    for method in ("lora", "dora", "adalora", "ia3"):
        run = plan(models.tiny("llama").config, method)
        with torch.device("meta"):
            adapted = get_peft_model(models.tiny("llama"), copy.deepcopy(run.adapter))
        taken = adapted.peft_config["default"].target_modules
        words = report.settings_in_words(run)
        assert taken and all(name in words for name in taken), words


def test_a_run_without_targets_and_without_a_name():
    words = report.settings_in_words(plan(models.tiny("llama").config, "full"))
    assert words.startswith("llama, full, batch 1,")


@pytest.mark.parametrize("method", memory.METHODS)
def test_methods_keep_their_names(method):
    run = memory.predict(models.tiny("llama").config, method, batch=1, seq=8)
    assert memory.as_dict(run)["settings"]["method"] == method


def test_a_dictionary_of_whole_numbers_that_survives_json(gpt2):
    found = memory.as_dict(gpt2)
    assert json.loads(json.dumps(found)) == found
    assert (found["allocated"], found["reserved"]) == (gpt2.allocated, gpt2.reserved)
    assert all(type(size) is int for size in found["categories"].values())
    assert found["settings"] == {
        "architecture": "gpt2",
        "method": "qlora",
        "rank": 4,
        "targets": None,
        "virtual_tokens": None,
        "batch": 2,
        "seq": 64,
        "dtype": "bf16",
        "quant_type": "nf4",
        "double_quant": True,
        "optimizer": "adamw",
        "attention": "sdpa",
        "checkpointing": True,
        "padded": False,
    }


@pytest.mark.parametrize("method", ["full", "prompt", "adalora"])
def test_keys_do_not_depend_on_the_method(gpt2, method):
    run = memory.predict(models.tiny("llama").config, method, batch=1, seq=8, dtype="mixed")
    found = memory.as_dict(run)
    assert found.keys() == memory.as_dict(gpt2).keys()
    assert found["settings"].keys() == memory.as_dict(gpt2)["settings"].keys()
    assert found["settings"]["dtype"] == "mixed"


def test_the_picture_keeps_the_peak(gpt2, monkeypatch):
    monkeypatch.setattr(report, "POINTS", 50)
    history = gpt2.replayed.history
    highest = max(sum(now.values()) for _, _, now in history)
    events, phases, sizes = report._course(gpt2)
    assert 50 <= len(events) <= 53 < len(history)
    assert sum(sizes.values()).max() == highest
    assert list(dict.fromkeys(phases)) == list(PHASES)
    assert (np.diff(events) > 0).all()


def test_no_drawn_point_spans_two_phases():
    buckets = report._buckets(["forward"] * 1000 + ["backward"] * 3)
    assert [len(bucket) for bucket in buckets[-2:]] != [3]
    assert sum(len(bucket) for bucket in buckets) == 1003
    assert not any(bucket[0] < 1000 <= bucket[-1] for bucket in buckets)


def test_the_picture_draws_each_category_in_its_colour_to_its_height(gpt2):
    ax = memory.picture(gpt2).axes[0]
    drawn = {area.get_label(): area for area in ax.collections}
    assert set(drawn) == {kind for kind in memory.CATEGORIES if gpt2.categories.get(kind) != 0} | {
        "gradients"
    }
    for kind, area in drawn.items():
        colour = plots.COLOURS[memory.CATEGORIES.index(kind)]
        assert to_hex(area.get_facecolor()[0]) == colour.lower()
    top = max(path.vertices[:, 1].max() for path in drawn["workspace"].get_paths())
    assert top == pytest.approx(max(sum(now.values()) for *_, now in gpt2.replayed.history) / GIB)
    assert [text.get_text() for text in ax.texts] == list(PHASES)


@pytest.mark.parametrize(("gib", "in_sight"), [(1.5, True), (100, False)])
def test_the_cards_line_is_in_sight_if_it_is_near(gpt2, gib, in_sight):
    ax = memory.picture(on(of(gpt2, reserved=GIB), card(gib))).axes[0]
    line = next(line for line in ax.lines if line.get_label().startswith("own"))
    assert line.get_ydata()[0] == pytest.approx(gib)
    assert (line.get_ydata()[0] < ax.get_ylim()[1]) == in_sight
    assert ("(above)" in line.get_label()) != in_sight


@pytest.mark.parametrize(("top", "in_sight"), [(110, True), (90, False)])
def test_a_given_top_decides_whether_the_cards_line_is_in_sight(gpt2, top, in_sight):
    ax = memory.picture(on(of(gpt2, reserved=GIB), card(100)), top=top).axes[0]
    line = next(line for line in ax.lines if line.get_label().startswith("own"))
    assert ax.get_ylim() == (0, top)
    assert ("(above)" in line.get_label()) != in_sight


def test_no_picture_of_a_course_that_was_not_run(gpt2):
    with pytest.raises(ValueError, match="exact=True"):
        memory.picture(of(gpt2, exact=False))


def test_alternative_text_names_peaks_and_verdict(gpt2):
    text = memory.alt(gpt2)
    largest = max(gpt2.categories, key=gpt2.categories.get)
    assert largest in text and memory.verdict(gpt2) in text
    assert all(phase in text for phase in PHASES)
    assert "\n" not in text
