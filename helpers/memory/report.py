"""A prediction to read: as a table, in words, as a picture, and as plain numbers for a program.

Source: this course's own.
Taught in: notebook 03, section 6.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftType
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING

from helpers import plots
from helpers.given import number
from helpers.memory.fit import cards_that_fit
from helpers.memory.gpus import CONTEXT, GIB, Gpu
from helpers.memory.predict import DTYPES, Prediction
from helpers.memory.replay import PHASES
from helpers.memory.simulate import Plan
from helpers.memory.tracker import CATEGORIES

NOT_SIMULATED = "CUDA's own context, evaluation, generation, several cards"
ROUNDING = "rounding to blocks"
POINTS = 600  # of a picture; more cannot be told apart
MARGIN = 1.12  # of room above the highest line of a picture


def table(prediction: Prediction) -> pd.DataFrame:
    """Each category's GiB at the peak of allocation and its share; the rows add up to "allocated".

    Columns: GiB, share (a fraction of allocated). "rounding to blocks" is what the allocator gives
    beyond what was asked for; in an extrapolated prediction it also takes up what the lines through
    two depths do not explain. Where that is less than nothing, the larger of activations and
    temporaries, which are the least certain, gives it up.

    Taught in: notebook 03, section 7.
    """
    sizes = {kind: prediction.categories.get(kind, 0) for kind in CATEGORIES}
    rounding = prediction.allocated - sum(sizes.values())
    sizes[max("activations", "temporaries", key=sizes.get)] += min(0, rounding)
    sizes[ROUNDING] = max(0, rounding)
    sizes["allocated"] = prediction.allocated
    frame = pd.DataFrame({"GiB": pd.Series(sizes, dtype=float) / GIB})
    frame["share"] = frame["GiB"] / frame["GiB"]["allocated"]
    return frame


def summary(prediction: Prediction) -> str:
    """The answer in a few lines: what it takes, when it peaks, whether the card is large enough.

    `Prediction.notes` follow the verdict.

    Taught in: notebook 03, section 7.
    """
    how = "every layer simulated" if prediction.exact else "extrapolated from shallow models"
    lines = [
        f"run        {settings_in_words(prediction.plan)}",
        f"allocated  {_gib(prediction.allocated)} at the peak ({how})",
        f"reserved   {_gib(prediction.reserved)} from the card, with what the allocator keeps",
        f"peak       in the {prediction.phase} phase, at {prediction.operator}",
        f"verdict    {verdict(prediction)}",
    ]
    lines += [f"note       {note}" for note in prediction.notes]
    if prediction.paged:
        lines.append(
            f"paged      {_gib(prediction.paged)} of the optimiser's state, which CUDA moves "
            "to the host when the card is full; not in the numbers above"
        )
    lines.append(
        f"left out   {NOT_SIMULATED}; {_gib(CONTEXT)} of the card are set aside for the context"
    )
    return "\n".join(lines)


def verdict(prediction: Prediction, card: Gpu | None = None) -> str:
    """One line: whether the run fits the card (default: the plan's), and by how much.

    Between the two answers lies a third. Where the allocated bytes fit and the reserved ones do
    not, PyTorch gives cached memory back before it fails, which may or may not be enough.
    """
    card = card or prediction.plan.gpu
    spare = card.usable - prediction.reserved
    if spare >= 0:
        return f"fits {card.name} with {_gib(spare)} to spare"
    fitting = cards_that_fit(prediction)
    smallest = f"{fitting[0].name} is the smallest card that does" if fitting else "no card does"
    if prediction.allocated > card.usable:
        return f"does not fit {card.name}: {_gib(-spare)} are missing; {smallest}"
    return (
        f"may not fit {card.name}: what is allocated does, what is reserved lacks {_gib(-spare)}, "
        f"so PyTorch has to give cached memory back, which may fail; {smallest} without that"
    )


def settings_in_words(plan: Plan) -> str:
    """A run in one line."""
    parts = [plan.config.name_or_path or plan.config.model_type, method_name(plan)]
    found = _adapter_settings(plan.adapter)
    if "targets" not in found and (chosen := _choice_of_peft(plan)):
        found["targets"] = f"{_listed(chosen)} (peft's choice)"
    parts += [f"{name.replace('_', ' ')} {_listed(value)}" for name, value in found.items()]
    parts += [f"batch {plan.batch}", f"{plan.seq} tokens a row", dtype_name(plan)]
    parts += [plan.optimizer, plan.attention]
    if plan.checkpointing:
        parts.append("checkpointing")
    if plan.padded:
        parts.append("padded")
    if plan.quant_type:
        parts.append(plan.quant_type + (" with" if plan.double_quant else " without"))
        parts[-1] += " double quantisation"
    return ", ".join(parts)


def method_name(plan: Plan) -> str:
    """The method as the course calls it; peft's own name for one that the course does not have."""
    if plan.adapter is None:
        return "full"
    kind = plan.adapter.peft_type.value.lower()
    if kind == "lora":
        kind = "dora" if plan.adapter.use_dora else kind
        return "qlora" if plan.quant_type and kind == "lora" else kind
    if kind == "prefix_tuning":
        return "prefix" if plan.adapter.prefix_projection else "p-tuning-v2"
    return {"prompt_tuning": "prompt", "p_tuning": "p-tuning"}.get(kind, kind)


def dtype_name(plan: Plan) -> str:
    """The dtype as `predict` takes it."""
    if plan.autocast is not None:
        return "mixed"
    return next(name for name, dtype in DTYPES.items() if dtype == plan.dtype)


def _adapter_settings(adapter: PeftConfig | None) -> dict[str, int | str | list[str]]:
    """Rank, targets and virtual tokens: those that a method has."""
    found = {
        "rank": getattr(adapter, "r", None),
        "targets": getattr(adapter, "target_modules", None),
        "virtual_tokens": getattr(adapter, "num_virtual_tokens", None),
    }
    if isinstance(found["targets"], set):
        found["targets"] = sorted(found["targets"])
    if getattr(adapter, "init_r", None):  # AdaLoRA starts above its rank, and has that in memory
        found["rank"] = adapter.init_r
    return {name: value for name, value in found.items() if value is not None}


def _choice_of_peft(plan: Plan) -> list[str] | str:
    """The targets that peft takes for the architecture if none are given."""
    kind = getattr(plan.adapter, "peft_type", None)
    known = getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(kind), "target_module_mapping", {})
    if kind == PeftType.IA3:  # its class keeps the list elsewhere
        known = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    return known.get(plan.config.model_type, [])


def _listed(value: object) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def as_dict(prediction: Prediction) -> dict:
    """A prediction for a program: all sizes in bytes as whole numbers, settings included.

    Every key is always there; a setting that the method does not have is None.

    Taught in: notebook 03, section 11.
    """
    plan = prediction.plan
    return {
        "settings": _settings(plan),
        "allocated": prediction.allocated,
        "reserved": prediction.reserved,
        "paged": prediction.paged,
        "exact": prediction.exact,
        "phase": prediction.phase,
        "operator": prediction.operator,
        "categories": {kind: prediction.categories.get(kind, 0) for kind in CATEGORIES},
        "phases": {
            name: {"allocated": peak.allocated, "operator": peak.operator}
            for name, peak in prediction.phases.items()
        },
        "card": {"name": plan.gpu.name, "memory": plan.gpu.memory, "usable": plan.gpu.usable},
        "fits": prediction.fits(),
        "notes": prediction.notes,
        "cards_that_fit": [card.name for card in cards_that_fit(prediction)],
    }


def _settings(plan: Plan) -> dict[str, object]:
    adapter = dict.fromkeys(("rank", "targets", "virtual_tokens"))
    return {
        "architecture": plan.config.model_type,
        "method": method_name(plan),
        **adapter,
        **_adapter_settings(plan.adapter),
        "batch": plan.batch,
        "seq": plan.seq,
        "dtype": dtype_name(plan),
        "quant_type": plan.quant_type,
        "double_quant": plan.double_quant if plan.quant_type else None,
        "optimizer": plan.optimizer,
        "attention": plan.attention,
        "checkpointing": plan.checkpointing,
        "padded": plan.padded,
    }


def picture(prediction: Prediction, top: float | None = None) -> Figure:
    """The course of the second step: bytes by category, stacked, over its allocations and frees.

    Phases are marked; lines show what is reserved and, if it is near, what the card has to give.
    The axis ends a little above them, or at `top` GiB, so that pictures can be compared.

    Raises:
        ValueError: the prediction is extrapolated, so nobody has seen the course of its step, or
            `top` is no height.

    Taught in: notebook 03, section 6.
    """
    events, phases, sizes = _course(prediction)
    if top is not None:
        number("top", top, least=0)
    fig = Figure(figsize=(7.5, 4.2), facecolor="white", layout="constrained")
    ax = fig.add_subplot()
    kinds = [kind for kind in CATEGORIES if sizes[kind].any()]
    areas = ax.stackplot(
        events,
        [sizes[kind] / GIB for kind in kinds],
        labels=kinds,
        colors=[plots.COLOURS[CATEGORIES.index(kind)] for kind in kinds],
        alpha=0.85,
        step="post",
    )
    for area, hatch in zip(areas, ("", "//", "", "\\\\", "", "..", ""), strict=False):
        area.set(hatch=hatch, edgecolor="white", linewidth=0)  # told apart in grey, too
    highest = _lines(ax, prediction, top)
    ax.set(xlim=(events[0], events[-1]), ylim=(0, top or highest * MARGIN))
    ax.set(xlabel="allocations and frees of one step", ylabel="GiB")
    _mark_phases(ax, events, phases)
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    return fig


def _course(prediction: Prediction) -> tuple[np.ndarray, list[str], dict[str, np.ndarray]]:
    """Positions of the drawn events, their phases, and the bytes of each category there.

    Of each bucket of events the highest is drawn, so that no peak is lost.
    """
    if not prediction.exact:
        raise ValueError(
            "An extrapolated prediction has no course to draw: its step was simulated at a few "
            "layers only. Predict with exact=True."
        )
    history = prediction.replayed.history
    matrix = np.array([[now.get(kind, 0) for kind in CATEGORIES] for _, _, now in history])
    total = matrix.sum(axis=1)
    phases = [phase for phase, _, _ in history]
    start = phases.index("forward")  # before it only the batch arrives
    phases[:start] = ["forward"] * start
    buckets = _buckets(phases)
    events = np.array([bucket[total[bucket].argmax()] for bucket in buckets])
    sizes = {kind: matrix[events, place] for place, kind in enumerate(CATEGORIES)}
    return events, [phases[event] for event in events], sizes


def _buckets(phases: list[str]) -> list[np.ndarray]:
    """Neighbouring events to draw as one, `POINTS` of them or few more; none spans two phases."""
    found = []
    for _, members in groupby(range(len(phases)), key=lambda event: phases[event]):
        events = np.array(list(members))
        number = -(-POINTS * len(events) // len(phases))
        found += np.array_split(events, min(number, len(events)))
    return found


def _lines(ax: Axes, prediction: Prediction, top: float | None) -> float:
    """Draw what is reserved and what the card has; returns the GiB that must be in sight."""
    card, reserved = prediction.plan.gpu, prediction.reserved / GIB
    usable = card.usable / GIB
    ax.axhline(reserved, color="black", linestyle=":", label=f"reserved: {reserved:.1f} GiB")
    far = usable > (top or 2 * reserved)
    label = f"{card.name}: {usable:.1f} GiB" + (" (above)" if far else "")
    ax.axhline(usable, color=plots.COLOURS[5], linestyle="--", linewidth=2, label=label)
    return reserved if far else max(reserved, usable)


def _mark_phases(ax: Axes, events: np.ndarray, phases: list[str]) -> None:
    first = 0
    for phase, members in groupby(phases):
        last = first + len(list(members))
        middle = (events[first] + events[last - 1]) / 2
        narrow = events[last - 1] - events[first] < 0.08 * (events[-1] - events[0])
        ax.text(
            middle,
            1.0,
            phase,
            transform=ax.get_xaxis_transform(),
            ha="right" if narrow and last == len(phases) else "center",
            va="bottom",
        )
        if first:
            ax.axvline(events[first], color="black", linewidth=0.8)
        first = last


def alt(prediction: Prediction) -> str:
    """The alternative text of `picture`: what is drawn, and what is to be seen in it."""
    kinds = sorted(
        (kind for kind in CATEGORIES if prediction.categories.get(kind)),
        key=lambda kind: -prediction.categories[kind],
    )
    parts = ", ".join(f"{kind} {_gib(prediction.categories[kind])}" for kind in kinds)
    peaks = ", ".join(f"{name} {_gib(prediction.phases[name].allocated)}" for name in PHASES)
    return (
        f"Stacked areas: memory by category over one training step. Peaks of the phases: {peaks}. "
        f"At the highest, in the {prediction.phase} phase: {parts}. A dotted line shows "
        f"{_gib(prediction.reserved)} reserved, a dashed one what the card has: the run "
        f"{verdict(prediction)}."
    )


def _gib(size: int) -> str:
    """Bytes in words; small sizes in MiB, so that they do not read as nothing."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 1024**2:.1f} MiB"
