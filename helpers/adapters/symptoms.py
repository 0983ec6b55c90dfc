"""The checks of the doctor: each looks at one thing that goes wrong, and says how to fix it.

Source: peft's troubleshooting guide; the checks are this course's own.
Taught in: notebook 10, section 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .matching import close_names, own_modules
from .methods import TASK_HEADS
from .patient import (
    BASE,
    PREFIX_TYPES,
    PROMPT_MLP,
    Parameter,
    Patient,
    dtype_of,
    embedding_of,
    is_quantised,
    kind_of,
    names_of,
    size_of,
)

SEVERITIES = ("error", "warning", "info")
_HEADS = ("classifier", "score", "qa_outputs")
_LORAS = ("LORA", "LORA with DoRA")
_LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing. ``code`` is its short name, ``severity`` one of SEVERITIES."""

    code: str
    severity: str
    what: str
    fix: str


def _nothing_trains(patient: Patient) -> Iterator[Finding]:
    if patient.trainable():
        return
    fix = (
        "load the adapter with PeftModel.from_pretrained(..., is_trainable=True), or call "
        "model.set_adapter(name)"
        if patient.configs
        else "wrap the model with peft.get_peft_model(model, config)"
    )
    yield Finding("nothing-trains", "error", "no parameter trains", fix)


def _no_adapter(patient: Patient) -> Iterator[Finding]:
    if not patient.configs and patient.trainable():
        yield Finding(
            "no-adapter",
            "info",
            "the model has no adapter: its own weights train, and saving writes all of them",
            "nothing, if full fine-tuning is meant; otherwise peft.get_peft_model(model, config)",
        )


def _targets_not_found(patient: Patient) -> Iterator[Finding]:
    modules = own_modules(patient.model)
    for name, config in patient.configs.items():
        asked = getattr(config, "target_modules", None) or ()
        if isinstance(asked, str):
            continue  # a regular expression that finds nothing has already been refused by peft
        # A target that also stands in modules_to_save trains in full instead.
        trains = BaseTunerLayer | AuxiliaryTrainingWrapper
        adapted = {n for n, m in modules.items() if isinstance(m, trains)}
        missing = [
            entry
            for entry in sorted(asked)
            if not any(f".{n}".endswith(f".{entry}") for n in adapted)
        ]
        for entry in missing:
            close = close_names(modules, entry)
            yield Finding(
                "target-not-found",
                "warning",
                f"adapter {name!r} asked for the target {entry!r}, which is not adapted",
                f"the closest names are {', '.join(close)}"
                if close
                else "adapters.match(model, pattern) shows what a pattern reaches",
            )


def _modules_to_save_not_found(patient: Patient) -> Iterator[Finding]:
    wrapped = [
        name
        for name, module in patient.model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    ]
    for name, config in patient.configs.items():
        own = set(getattr(config, "modules_to_save", None) or ())
        own -= set(TASK_HEADS.get(config.task_type, ()))  # peft adds both usual names of a head
        for entry in sorted(own):
            if not any(module.endswith(entry) for module in wrapped):
                close = close_names(own_modules(patient.model), entry)
                yield Finding(
                    "modules-to-save-not-found",
                    "warning",
                    f"adapter {name!r} asked for {entry!r} in modules_to_save, which is not there",
                    f"the closest names are {', '.join(close)}" if close else "check the name",
                )


def _lost_on_save(patient: Patient) -> Iterator[Finding]:
    if not patient.configs:
        return
    lost = [p for p in patient.trainable(BASE) if id(p.tensor) not in patient.saved]
    if lost:
        yield Finding(
            "lost-on-save",
            "error",
            f"{sum(size_of(p.tensor) for p in lost):,} parameters train but would be lost by "
            f"save_pretrained: {names_of(lost)}",
            "name their modules in modules_to_save of the config, and do not set "
            "requires_grad by hand",
        )


def _adapter_lost_on_save(patient: Patient) -> Iterator[Finding]:
    """peft leaves out what stands under another adapter's name, and a layer's number is a name."""
    for name, config in patient.configs.items():
        if kind_of(config) not in _LORAS:
            continue
        own = [p for p in patient.parameters if p.adapter == name]
        lost = [p for p in own if id(p.tensor) not in patient.saved]
        if lost:
            yield Finding(
                "adapter-lost-on-save",
                "error",
                f"{len(lost)} of {len(own)} tensors of adapter {name!r} would be lost by "
                f"save_pretrained: {names_of(lost)}",
                "rename the other adapter: a name that is part of a module's name, such as '1' or "
                "'mlp', hides what stands under it",
            )


def _left_over(patient: Patient) -> Iterator[Finding]:
    """`get_peft_model` on a base that it changed before keeps what the new config does not name."""
    for name, config in patient.configs.items():
        if kind_of(config) not in _LORAS or config.target_parameters:
            continue
        adapted = [n for n, layer in patient.tuner_layers.items() if name in layer.lora_A]
        keys = {n: n.removeprefix("base_model.model.") for n in adapted}
        left = [n for n, key in keys.items() if not check_target_module_exists(config, key)]
        if left:
            yield Finding(
                "left-over",
                "error",
                f"{len(left)} layers have adapter {name!r} and its config does not name them, such "
                f"as {left[0]}: they are left from an earlier adapter of that name",
                "start from a fresh base, or take the old adapter off with model.unload()",
            )


def _wrapped_twice(patient: Patient) -> Iterator[Finding]:
    if any(isinstance(m, PeftModel) for m in patient.model.modules() if m is not patient.model):
        yield Finding(
            "wrapped-twice",
            "error",
            "a model that was wrapped by peft was wrapped again: the names in its file fit no "
            "plain base",
            "call get_peft_model once, and model.add_adapter(name, config) for another adapter",
        )


def _resized_embedding(patient: Patient) -> Iterator[Finding]:
    if not patient.configs:
        return
    embedding = embedding_of(patient.model)
    embedding = embedding.get_base_layer() if isinstance(embedding, BaseTunerLayer) else embedding
    rows = getattr(embedding, "num_embeddings", None)
    original = _original_rows(patient.model)
    if rows is None or original is None or rows == original:
        return
    if id(embedding.weight) in patient.saved:
        yield Finding(
            "embedding-saved-whole",
            "info",
            f"the embedding was resized from {original} to {rows} rows, so peft saves all of it "
            f"({embedding.weight.nbytes:,} bytes) with the adapter",
            "nothing, or train the new rows alone with trainable_token_indices",
        )
    else:
        yield Finding(
            "embedding-lost",
            "error",
            f"the embedding was resized from {original} to {rows} rows, and its new rows would "
            "be lost by save_pretrained",
            "save_pretrained(folder, save_embedding_layers=True), or name the embedding in "
            "modules_to_save",
        )


def _original_rows(model: nn.Module) -> int | None:
    """Vocabulary size of the base: from its folder, or else from its configuration in memory."""
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    folder = getattr(config, "_name_or_path", None)
    if folder and (Path(folder) / "config.json").is_file():
        config = type(config).from_pretrained(folder)  # Auto does not know every class
    return getattr(config.get_text_config(), "vocab_size", None)


def _quantised_training(patient: Patient) -> Iterator[Finding]:
    found = [p for p in patient.trainable() if is_quantised(p.tensor)]
    if found:
        yield Finding(
            "trainable-quantised",
            "error",
            f"quantised weights are marked as trainable: {names_of(found)}",
            "call requires_grad_(False) on them (prepare_model_for_kbit_training does) and train "
            "an adapter; an optimiser would write into packed codes",
        )


def _dtypes(patient: Patient) -> Iterator[Finding]:
    low = [p for p in patient.trainable() if p.tensor.dtype in _LOW_PRECISION]
    low = [p for p in low if not is_quantised(p.tensor)]
    if low:
        yield Finding(
            "low-precision-training",
            "warning",
            f"{len(low)} trainable tensors are stored in {_list_dtypes(low)}: small updates "
            f"round to nothing ({names_of(low)})",
            "keep trainable weights in float32: autocast_adapter_dtype=True for adapters, "
            "module.float() for copies in modules_to_save",
        )
    base = [p for p in patient.parameters if p.part == BASE]
    added = [p for p in patient.parameters if p.adapter]
    if added and _list_dtypes(added) != _list_dtypes(base):
        yield Finding(
            "mixed-dtypes",
            "info",
            f"the adapter is in {_list_dtypes(added)} over a base in {_list_dtypes(base)}",
            "nothing: this is peft's default for stable training; inputs are cast on the way",
        )
    plain = {p.tensor.dtype for p in base if not is_quantised(p.tensor)}
    if len(plain) > 1:
        yield Finding(
            "mixed-base-dtypes",
            "info",
            f"the base holds {_list_dtypes(base)}",
            "usual after prepare_model_for_kbit_training; otherwise load with one dtype",
        )


def _list_dtypes(parameters: list[Parameter]) -> str:
    return ", ".join(sorted({dtype_of(p.tensor) for p in parameters}))


def _adapter_state(patient: Patient) -> Iterator[Finding]:
    layers = patient.tuner_layers.values()
    if any(layer.disable_adapters for layer in layers):
        yield Finding(
            "adapters-disabled",
            "warning",
            "the adapters are switched off: the model answers as its base does",
            "leave the disable_adapter() block, or call model.enable_adapter_layers()",
        )
    merged = sorted({name for layer in layers for name in getattr(layer, "merged_adapters", ())})
    if merged:
        yield Finding(
            "adapter-merged",
            "warning",
            f"merged into the base weights at the moment: {', '.join(merged)}; training would "
            "not reach the output",
            "call model.unmerge_adapter() before training",
        )
    idle = [name for name in patient.configs if name not in patient.active]
    if idle:
        yield Finding(
            "adapter-inactive",
            "info",
            f"present, but not active: {', '.join(idle)}",
            f"model.set_adapter({idle[0]!r}) to use it",
        )


def _random_head(patient: Patient) -> Iterator[Finding]:
    if not patient.configs:
        return
    for name, module in patient.model.named_modules():
        parent, _, leaf = name.rpartition(".")
        if leaf not in _HEADS or isinstance(module, AuxiliaryTrainingWrapper | BaseTunerLayer):
            continue
        if isinstance(patient.model.get_submodule(parent), AuxiliaryTrainingWrapper):
            continue
        own = list(module.parameters())
        if own and not any(p.requires_grad or id(p) in patient.saved for p in own):
            yield Finding(
                "random-head",
                "warning",
                f"the head {leaf!r} is frozen and not saved: unless it came with the checkpoint, "
                "it is random now, and another random one after loading",
                f'pass task_type="SEQ_CLS" (or the one that fits), or modules_to_save=["{leaf}"]',
            )


def _mlp_not_saved(patient: Patient) -> Iterator[Finding]:
    if patient.trainable(PROMPT_MLP):
        yield Finding(
            "prompt-mlp-not-saved",
            "info",
            "the MLP that computes the prompt is not saved, only what it computes",
            "nothing for inference; to resume training, keep a checkpoint of the full state",
        )


def _cut_off_gradient(patient: Patient) -> Iterator[Finding]:
    """Re-entrant checkpointing passes no gradient when none of a block's inputs needs one."""
    if not patient.trainable() or not any(map(_reentrant, patient.model.modules())):
        return
    embedding = embedding_of(patient.model)
    if embedding is None or not patient.tuner_layers:
        return
    with torch.enable_grad():
        token = torch.zeros(1, 1, dtype=torch.long, device=next(embedding.parameters()).device)
        reaches = embedding(token).requires_grad  # runs the hook that asks for input gradients
    if not reaches:
        yield Finding(
            "checkpointing-without-input-grad",
            "error",
            "re-entrant gradient checkpointing is on and the embeddings' output needs no "
            "gradient: the adapters in the blocks would get none",
            "checkpoint with use_reentrant=False, or call model.enable_input_require_grads()",
        )


def _prefix_without_cache(patient: Patient) -> Iterator[Finding]:
    """Checkpointing drops the cache, in which a prefix lives; an encoder does so without a word."""
    prefixes = [n for n in patient.active if kind_of(patient.configs[n]) in PREFIX_TYPES]
    if prefixes and any(
        getattr(m, "gradient_checkpointing", False) for m in patient.model.modules()
    ):
        yield Finding(
            "prefix-with-checkpointing",
            "error",
            f"gradient checkpointing is on, which drops the cache that holds the prefix of "
            f"{prefixes[0]!r}: training fails, or goes on without the prefix",
            "model.gradient_checkpointing_disable(), or a prompt or LoRA in place of the prefix",
        )


def _reentrant(module: nn.Module) -> bool:
    if not getattr(module, "gradient_checkpointing", False):
        return False
    run = getattr(module, "_gradient_checkpointing_func", None)
    return bool(getattr(run, "keywords", {}).get("use_reentrant", True))


CHECKS: tuple[Callable[[Patient], Iterator[Finding]], ...] = (
    _nothing_trains,
    _no_adapter,
    _targets_not_found,
    _modules_to_save_not_found,
    _lost_on_save,
    _adapter_lost_on_save,
    _left_over,
    _wrapped_twice,
    _resized_embedding,
    _quantised_training,
    _dtypes,
    _adapter_state,
    _random_head,
    _mlp_not_saved,
    _cut_off_gradient,
    _prefix_without_cache,
)
