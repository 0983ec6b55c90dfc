"""How much memory a training run takes on a card, without the card and without the weights.

Source: this course's own predictor, compared with measured runs.
Taught in: notebook 03, section 6.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftConfig
from peft.utils import (
    TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from transformers import AutoConfig, PreTrainedConfig

from helpers import adapters, models
from helpers.given import one_of, whole
from helpers.memory import build
from helpers.memory.check import check
from helpers.memory.gpus import Gpu, gpu
from helpers.memory.optimizers import OPTIMIZERS
from helpers.memory.replay import PHASES, Peak, Replayed, replay
from helpers.memory.simulate import Plan, simulate
from helpers.memory.tracker import Trace
from helpers.quantization import QUANT_TYPES

METHODS = ("full", *adapters.METHODS)
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "mixed": torch.float32,  # weights in 32 bits, products in bfloat16
}
ATTENTIONS = ("sdpa", "eager")
SHALLOW = (2, 4)  # layers of the two simulations from which a deeper model is extrapolated


@dataclass(frozen=True)
class Prediction:
    """What a run takes at its peak.

    allocated and reserved: bytes at the peak, as `torch.cuda.max_memory_allocated` and
    `max_memory_reserved` would say; categories: bytes of each kind at the peak of allocation;
    phase and operator: when that peak is; phases: the peak of each phase; paged: bytes of a paged
    optimiser's state, which live outside PyTorch's allocator; exact: whether every layer was
    simulated; replayed: the course of the (deepest) simulated step.
    """

    plan: Plan
    allocated: int
    reserved: int
    categories: dict[str, int]
    phase: str
    operator: str
    phases: dict[str, Peak]
    paged: int
    exact: bool
    replayed: Replayed

    def fits(self, card: Gpu | None = None) -> bool:
        """Whether the reserved bytes fit beside CUDA's own on a card (default: the plan's)."""
        return self.reserved <= (card or self.plan.gpu).usable

    @property
    def notes(self) -> list[str]:
        """What the bytes do not show: a dtype that the card lacks, rows beyond the positions."""
        plan, found = self.plan, []
        if torch.bfloat16 in (plan.dtype, plan.autocast) and not plan.gpu.bf16:
            found.append(f"{plan.gpu.name} has no bf16 units: train with --dtype fp16")
        text = plan.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None) or plan.seq
        tokens = plan.seq + (getattr(plan.adapter, "num_virtual_tokens", None) or 0)
        if tokens > limit:
            found.append(
                f"rows of {tokens:,} tokens are longer than the {limit:,} positions that the "
                "model is made for"
            )
        return found


def predict(
    model: str | Path | PreTrainedConfig,
    method: str | PeftConfig = "lora",
    *,
    batch: int,
    seq: int,
    rank: int | None = None,
    targets: Sequence[str] | str | None = None,
    virtual_tokens: int | None = None,
    dtype: str = "bf16",
    quant_type: Literal["nf4", "fp4"] = "nf4",
    double_quant: bool = True,
    optimizer: str = "adamw",
    attention: str = "sdpa",
    checkpointing: bool = False,
    padded: bool = False,
    gpu: str = "a100-80gb",
    exact: bool = True,
) -> Prediction:
    """Peak memory of a training step, by running it on tensors without data.

    The step is the libraries' own: transformers' model, peft's adapter, PyTorch's optimiser, on
    fake tensors. Every allocation is written down and replayed through a model of PyTorch's CUDA
    allocator. Nothing is fitted to measurements. Not simulated: CUDA's context, several cards,
    evaluation and generation.

    Args:
        model: a published model of `models.CONFIGS`, a folder with a config.json or such a file,
            or a configuration.
        method: "full", a name of `adapters.METHODS` ("qlora" loads the base in 4 bits), or a
            configuration of peft.
        batch: rows of a batch.
        seq: tokens of a row, an image's among them.
        rank, targets, virtual_tokens: as `adapters.config` takes them.
        dtype: of the weights and the products: "fp32", "fp16", "bf16", or "mixed" (weights in 32
            bits, products in bfloat16). For QLoRA the dtype of the products.
        quant_type, double_quant: how QLoRA packs the base.
        optimizer: one of `OPTIMIZERS`.
        attention: "sdpa" (fused where the card can) or "eager" (the whole table of scores).
        checkpointing: layers are computed again in backward.
        padded: the batch carries an attention mask, as a batch of rows of several lengths does.
        gpu: a card of `GPUS`; decides which kernels run.
        exact: simulate every layer (7B: seconds; 65B: a quarter of a minute). Otherwise extrapolate
            from 2 and 4 layers: allocated bytes agree within about a per cent; reserved ones are
            rough, since blocks of few layers fit otherwise.

    Raises:
        ValueError: an unknown name or a number that makes no sense; says what would do.

    Source: PyTorch, notes "CUDA semantics: memory management"; xMem (arXiv 2510.21048) for
    replaying a run's allocations.
    Taught in: notebook 03, sections 6 to 11.
    """
    plan = make_plan(
        model,
        method,
        batch=batch,
        seq=seq,
        rank=rank,
        targets=targets,
        virtual_tokens=virtual_tokens,
        dtype=dtype,
        quant_type=quant_type,
        double_quant=double_quant,
        optimizer=optimizer,
        attention=attention,
        checkpointing=checkpointing,
        padded=padded,
        gpu=gpu,
    )
    check(plan)
    return predict_plan(plan, exact=exact)


def predict_plan(plan: Plan, *, exact: bool = True) -> Prediction:
    """`predict` for a plan that is already made, such as one of another project's script.

    Raises:
        ValueError: the libraries cannot run this plan without data; says why.
    """
    depth = _depth(plan.config)
    if exact or depth <= max(SHALLOW):
        return _whole(plan, True)
    low, high = (_whole(_with_depth(plan, layers), False) for layers in SHALLOW)
    return _extrapolated(plan, low, high, depth)


def _whole(plan: Plan, exact: bool) -> Prediction:
    """Every layer of the plan's model is simulated."""
    record = _simulated(plan, first_step=exact)
    found = replay(record)
    phase = max(PHASES, key=lambda name: found.phases[name].allocated)
    peak = found.phases[phase]
    return Prediction(
        plan,
        peak.allocated,
        found.reserved,
        peak.categories,
        phase,
        peak.operator,
        found.phases,
        record.paged,
        exact,
        found,
    )


def _simulated(plan: Plan, *, first_step: bool) -> Trace:
    """Raises: ValueError that names what could not be simulated, and why."""
    try:
        return simulate(plan, first_step=first_step)
    except (RuntimeError, NotImplementedError, AttributeError, ImportError) as error:
        method = "full fine-tuning" if plan.adapter is None else plan.adapter.peft_type.value
        raise ValueError(
            f"{method} of a {plan.config.model_type} model with {plan.seq} tokens cannot be "
            f"simulated: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}"
        ) from error


def _extrapolated(plan: Plan, low: Prediction, high: Prediction, depth: int) -> Prediction:
    """Layers repeat, so each phase's peak grows by the same bytes with each."""

    def line(small: float, large: float) -> int:
        return round(large + (large - small) * (depth - SHALLOW[1]) / (SHALLOW[1] - SHALLOW[0]))

    phases = {
        name: Peak(
            line(low.phases[name].allocated, high.phases[name].allocated),
            high.phases[name].operator,
            {
                kind: max(0, line(low.phases[name].categories.get(kind, 0), size))
                for kind, size in high.phases[name].categories.items()
            },
        )
        for name in PHASES
    }
    phase = max(PHASES, key=lambda name: phases[name].allocated)
    peak = phases[phase]
    return dataclasses.replace(
        high,
        plan=plan,
        allocated=peak.allocated,
        reserved=max(peak.allocated, line(low.reserved, high.reserved)),
        categories=peak.categories,
        phase=phase,
        operator=peak.operator,
        phases=phases,
        paged=line(low.paged, high.paged),
    )


def make_plan(
    model: str | Path | PreTrainedConfig,
    method: str | PeftConfig,
    *,
    batch: int,
    seq: int,
    rank: int | None,
    targets: Sequence[str] | str | None,
    virtual_tokens: int | None,
    dtype: str,
    quant_type: str,
    double_quant: bool,
    optimizer: str,
    attention: str,
    checkpointing: bool,
    padded: bool,
    gpu: str,
) -> Plan:
    """The checked and completed settings of a run; arguments as for `predict`.

    Raises:
        ValueError: an unknown name, a number that makes no sense, or settings that exclude each
            other.
    """
    config = model_config(model)
    for kind, given, known in (
        ("dtype", dtype, DTYPES),
        ("quant_type", quant_type, QUANT_TYPES),
        ("optimizer", optimizer, OPTIMIZERS),
        ("attention", attention, ATTENTIONS),
    ):
        one_of(kind, given, known)
    for kind, number in (("batch", batch), ("seq", seq)):
        whole(kind, number)
    if method == "qlora" and dtype == "mixed":
        raise ValueError(
            "'qlora' has no dtype 'mixed': its weights are packed; give the dtype of the products, "
            "such as 'bf16'."
        )
    return Plan(
        config=config,
        adapter=_adapter(method, config, rank, targets, virtual_tokens),
        batch=batch,
        seq=seq,
        dtype=DTYPES[dtype],
        gpu=_gpu(gpu),
        autocast=torch.bfloat16 if dtype == "mixed" else None,
        quant_type=quant_type if method == "qlora" else None,
        double_quant=double_quant,
        checkpointing=checkpointing,
        optimizer=optimizer,
        attention=attention,
        padded=padded,
    )


_gpu = gpu


def model_config(model: str | Path | PreTrainedConfig) -> PreTrainedConfig:
    """The configuration that is meant by a name, a folder, a file or itself.

    What was asked for becomes its `name_or_path`, as `from_pretrained` has it.

    Raises:
        ValueError: neither a known name nor a readable config.json.
    """
    if isinstance(model, PreTrainedConfig):
        return model
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        return _published(str(model))
    try:
        config = AutoConfig.for_model(**json.loads(file.read_text()))
    except Exception as error:  # each configuration class complains in its own way
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{file} is no configuration that transformers knows: it needs a model_type such as "
            f"'llama' and shapes that fit ({reason})."
        ) from None
    config.name_or_path = str(model)
    return config


def _published(name: str) -> PreTrainedConfig:
    """A name with a slash may be an author's model or a path: only the disk tells."""
    path = Path(name)
    try:
        config = models.published_config(name)
    except ValueError as error:
        if path.is_dir():
            why = f"There is no config.json in the folder {name}."
        elif path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".json":
            why = f"There is no file {name}; give a config.json or the folder that holds one."
        else:
            why = f"{error} Or give the path of its config.json."
        raise ValueError(why) from None
    config.name_or_path = name
    return config


def _adapter(
    method: str | PeftConfig,
    config: PreTrainedConfig,
    rank: int | None,
    targets: Sequence[str] | str | None,
    virtual_tokens: int | None,
) -> PeftConfig | None:
    if isinstance(method, PeftConfig):
        return method
    one_of("method", method, METHODS)
    if method == "full":
        if (rank, targets, virtual_tokens) != (None, None, None):
            raise ValueError(
                "'full' trains every weight and takes no rank, targets or virtual_tokens; "
                "use 'lora' for those."
            )
        return None
    if targets is None and method in _WITH_TARGETS:
        targets = _default_targets(method, config)
    return adapters.config(
        method,
        task_type=build.task_type(config),
        rank=rank,
        target_modules=targets,
        virtual_tokens=virtual_tokens,
        total_steps=1000 if method == "adalora" else None,
    )


def _default_targets(method: str, config: PreTrainedConfig) -> list[str] | str | None:
    """None leaves the choice to peft, which has none for pictures and for AdaLoRA a short list."""
    if hasattr(config, "text_config"):
        return LANGUAGE_TARGETS
    kind = config.model_type
    if method == "adalora" and kind not in TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING:
        return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    return None


_WITH_TARGETS = ("lora", "qlora", "dora", "adalora", "ia3")
LANGUAGE_TARGETS = r".*language_model.*\.(q_proj|v_proj)"
_DEPTHS = ("num_hidden_layers", "num_decoder_layers")


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configurations that have layers: the model's own, or its parts'."""
    parts = [getattr(config, name, None) for name in ("text_config", "vision_config")]
    return [part for part in parts if part is not None] or [config]


def _depth(config: PreTrainedConfig) -> int:
    """Layers of the language model, which is the one that is made shallow."""
    return _parts(config)[0].num_hidden_layers


def _with_depth(plan: Plan, layers: int) -> Plan:
    config = copy.deepcopy(plan.config)
    text = _parts(config)[0]
    for name in _DEPTHS:
        if getattr(text, name, None) is not None:
            setattr(text, name, layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return dataclasses.replace(plan, config=config)
