"""Which modules a `target_modules` pattern reaches, without wrapping the model.

Source: peft's `target_modules`: a list names endings, a string is a full pattern.
Taught in: notebook 01, section 3.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from html import escape

import pandas as pd
from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from .methods import TASK_HEADS, parse_task, pattern_entries

ALL_LINEAR = "all-linear"
SUPPORTED = (
    nn.Linear,
    Conv1D,
    nn.Embedding,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.MultiheadAttention,
)
_META = re.compile(r"[*?|()\[\]^$\\+{}]")


@dataclass(frozen=True)
class Match:
    """What a pattern reaches in a model.

    ``matched``: full names of the modules that LoRA would wrap, in the model's order.
    ``per_entry``: how many modules each entry of the pattern matches.
    ``unmatched``: each entry that matches nothing, with the closest names in this model.
    ``kinds``: the module types among the matched ones, with their numbers.
    ``unsupported``: matched modules of a type that LoRA cannot wrap.
    ``raises``: the reason why ``get_peft_model`` would refuse, or None.
    ``advice``: for an entry that matches nothing, what to write instead.
    ``parameters``: stacked expert weights that peft adapts in place of modules of that name, in
    architectures such as Mixtral.
    ``note``: all of it in words; empty when there is nothing to say.
    """

    pattern: str | tuple[str, ...]
    matched: list[str]
    per_entry: dict[str, int]
    unmatched: dict[str, list[str]]
    kinds: dict[str, int]
    unsupported: list[str]
    raises: str | None
    advice: dict[str, str]
    module_kinds: dict[str, str]
    parameters: list[str]

    @property
    def note(self) -> str:
        """All of it in words; empty when there is nothing to say."""
        parts = [self.raises] if self.raises else []
        if self.unmatched and not self.raises:
            parts.append("peft wraps the rest and says nothing about what it did not find.")
        if self.parameters:
            parts.append(
                "peft also adapts the stacked expert weights called "
                f"{', '.join(self.parameters)}, which are parameters and no modules."
            )
        parts += [f"{entry!r}: {text}" for entry, text in self.advice.items()]
        return "\n".join(parts)

    def table(self) -> pd.DataFrame:
        """One row for each entry and kind of place, layer numbers written as ``*``."""
        rows = [row for entry in self.per_entry for row in self._rows(entry)]
        columns = ["entry", "modules", "where", "kind", "advice"]
        return pd.DataFrame(rows, columns=columns)

    def _rows(self, entry: str) -> list[tuple[str, int, str, str, str]]:
        if not self.per_entry[entry]:
            return [(entry, 0, "", "", self.advice.get(entry, ""))]
        names = self.matched if isinstance(self.pattern, str) else _with_entry(self.matched, entry)
        places = Counter((_collapse(name), self.module_kinds[name]) for name in names)
        return [(entry, n, where, kind, "") for (where, kind), n in places.items()]

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.kinds.items())
        head = f"{len(self.matched)} modules match" + (f": {kinds}" if kinds else "")
        lines = self.table().drop(columns="advice").to_string(index=False)
        return "\n".join(part for part in (head, lines, self.note) if part)

    def _repr_html_(self) -> str:
        return f"{self.table().to_html(index=False)}<p>{escape(self.raises or '')}</p>"


def match(
    model: nn.Module, pattern: str | Collection[str], *, task_type: str | None = None
) -> Match:
    """Show which modules ``target_modules=pattern`` reaches in a model, and what it misses.

    The rules are peft's, and its own functions decide. An entry of a list matches a module's
    whole name, or its end after a dot; it is never a regular expression. A string is a regular
    expression that has to match the whole name. ``"all-linear"`` as a string stands for every
    linear layer but the output layer. The model may be on the meta device; it is not changed.

    ``task_type`` matters with a head, which peft trains in full. For "SEQ_CLS" no pattern reaches
    it; for "TOKEN_CLS" and "QUESTION_ANS" peft refuses a pattern that does, "all-linear" included.

    Raises: TypeError for a pattern that is neither a string nor a list of strings, ValueError for
    an empty one or an unknown task_type.
    Source: ``peft.tuners.tuners_utils.check_target_module_exists``; peft's page
    "Troubleshooting". Taught in: notebook 01, section 2.
    """
    entries = pattern_entries(pattern)
    as_given = pattern if isinstance(pattern, str) else list(entries)
    modules = own_modules(model)
    broken = _regex_error(as_given)
    experts, taken = [], set()
    if not broken:
        experts, taken, broken = _stacked_experts(model, as_given)
    reached = [] if broken else _reached(model, modules, as_given, task_type)
    per_entry = _per_entry(as_given, entries, reached)
    unmatched = {
        e: close_names(modules, e) for e, n in per_entry.items() if not n and e not in taken
    }
    unsupported = [name for name in reached if not isinstance(_base(modules[name]), SUPPORTED)]
    kinds = {name: type(_base(modules[name])).__name__ for name in reached}
    return Match(
        pattern=pattern if isinstance(pattern, str) else entries,
        matched=reached,
        per_entry=per_entry,
        unmatched=unmatched,
        kinds=dict(Counter(kinds.values())),
        unsupported=unsupported,
        raises=_refusal(broken, reached or experts, unsupported, kinds, task_type),
        advice={
            e: _advice(model, modules, e, close, isinstance(pattern, str))
            for e, close in unmatched.items()
        },
        module_kinds=kinds,
        parameters=experts,
    )


def close_names(modules: dict[str, nn.Module], entry: str, limit: int = 3) -> list[str]:
    """The closest names that would match something, as short as the entry is."""
    depth = entry.count(".") + 1
    ends = {
        ".".join(name.split(".")[-depth:])
        for name, module in modules.items()
        if isinstance(_base(module), SUPPORTED)
    }
    folded = {end.casefold(): end for end in sorted(ends)}
    close = difflib.get_close_matches(entry.casefold(), folded, n=limit, cutoff=0.6)
    return [folded[name] for name in close]


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by name, without the insides of adapters that are already there."""
    modules: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in _base_model(model).named_modules():
        if not name or name.startswith(inside or ("\0",)):
            continue
        modules[name] = module
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
    return modules


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _regex_error(pattern: str | list[str]) -> str | None:
    if not isinstance(pattern, str):
        return None
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{pattern!r} is not a valid regular expression: {error}."
    return None


def _stacked_experts(
    model: nn.Module, pattern: str | list[str]
) -> tuple[list[str], set[str], str | None]:
    """Expert weights that peft adapts as parameters, the entries that named them, a refusal."""
    probe = LoraConfig(target_modules=pattern)
    try:
        convert_peft_config_for_transformers(probe, model=_base_model(model), conversions=None)
    except ValueError as error:
        return [], set(), str(error)
    experts = sorted(probe.target_parameters or ())
    given = {pattern} if isinstance(pattern, str) else set(pattern)
    taken = given - set(probe.target_modules) if experts else set()
    return experts, taken, None


def _base_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _reached(
    model: nn.Module,
    modules: dict[str, nn.Module],
    pattern: str | list[str],
    task_type: str | None,
) -> list[str]:
    task = parse_task(task_type)
    # For SEQ_CLS peft knows the head before it matches; for the other tasks it does not.
    heads = [*TASK_HEADS[task]] if task is TaskType.SEQ_CLS else None
    rule = LoraConfig(target_modules=pattern, task_type=task, modules_to_save=heads)
    rule = _maybe_include_all_linear_layers(rule, _base_model(model))
    # An excluded module answers with an object that is false.
    return [name for name in modules if check_target_module_exists(rule, name)]


def _with_entry(names: Collection[str], entry: str) -> list[str]:
    return [name for name in names if name == entry or name.endswith(f".{entry}")]


def _per_entry(
    pattern: str | list[str], entries: tuple[str, ...], reached: list[str]
) -> dict[str, int]:
    if isinstance(pattern, str):
        return {pattern: len(reached)}
    return {entry: len(_with_entry(reached, entry)) for entry in entries}


def _refusal(
    broken: str | None,
    reached: list[str],
    unsupported: list[str],
    kinds: dict[str, str],
    task_type: str | None,
) -> str | None:
    if broken:
        return f"get_peft_model would refuse: {broken}"
    if not reached:
        return "get_peft_model would refuse: the pattern matches no module."
    if unsupported:
        first = unsupported[0]
        return (
            f"get_peft_model would refuse: {first!r} is a {kinds[first]}, which LoRA cannot wrap "
            f"({len(unsupported)} such of {len(reached)}); end the pattern in the names of the "
            "linear layers inside it."
        )
    heads = TASK_HEADS.get(parse_task(task_type), [])
    wrapped = [name for name in reached if name.endswith(tuple(heads))] if heads else []
    if wrapped:
        return (
            f"get_peft_model would refuse: for {task_type} it trains the head {wrapped[0]!r} in "
            f"full, and the pattern reaches it too; add modules_to_save={[wrapped[0]]} to the "
            "config, which takes it out of the pattern's reach."
        )
    return None


def _advice(
    model: nn.Module, modules: dict[str, nn.Module], entry: str, close: list[str], alone: bool
) -> str:
    """What to write instead of an entry that matches nothing."""
    bare = re.sub(r"\.(weight|bias)$", "", entry)
    if not alone and entry.casefold() == ALL_LINEAR:
        return f'"{ALL_LINEAR}" works only as a string by itself: target_modules="{ALL_LINEAR}".'
    if bare != entry and _with_entry(modules, bare):
        return f"that is a parameter, targets are modules; write {bare!r}."
    if not alone and _with_entry(modules, entry):
        return "the task's head trains in full, so it gets no adapter; leave it out."
    if alone and _with_entry(modules, entry):
        return (
            "a string is a regular expression for the whole name; "
            f'pass a list, ["{entry}"], or the string r".*\\.{re.escape(entry)}".'
        )
    working = _as_string(modules, entry)
    if working and (_META.search(entry) or "." in entry):
        why = "the whole name has to match" if alone else "an entry of a list is never a pattern"
        return f'{why}; pass the string r"{working}".'
    default = _default_targets(model)
    if close and (not default or default & set(close)):
        return f"no such module; the closest names are {', '.join(close)}."
    near = f"the closest names are {', '.join(close)}, but " if close else ""
    return f"no such module; {near}{_what_there_is(model, modules, default)}."


def _as_string(modules: dict[str, nn.Module], entry: str) -> str | None:
    """A regular expression that does what the entry seems to mean, tried on this model."""
    glob = re.escape(entry).replace(r"\*", ".*").replace(r"\?", ".")
    # ".*" before a lone name would also match "foo_q_proj", hence the optional parent.
    glob = glob if glob.startswith(".*") else rf"(.*\.)?{glob}"
    regexy = re.search(r"[\\|()\[\]^$+]", entry)
    tries = [entry, rf".*{entry}", glob] if regexy else [entry, glob]
    for candidate in tries:
        try:
            regex = re.compile(candidate)
        except re.error:
            continue
        found = [module for name, module in modules.items() if regex.fullmatch(name)]
        if found and all(isinstance(_base(module), SUPPORTED) for module in found):
            return candidate
    return None


def _default_targets(model: nn.Module) -> set[str]:
    """The names that peft itself takes for this architecture; empty where it knows none."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    default = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, ())
    return {default} if isinstance(default, str) else set(default)


def _what_there_is(model: nn.Module, modules: dict[str, nn.Module], default: set[str]) -> str:
    if default:
        return f"for {model.config.model_type} peft itself takes {', '.join(sorted(default))}"
    leaves = Counter(
        name.rsplit(".", 1)[-1]
        for name, module in modules.items()
        if isinstance(_base(module), nn.Linear | Conv1D)
    )
    return "the linear layers here are called " + ", ".join(n for n, _ in leaves.most_common(8))


def _collapse(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
