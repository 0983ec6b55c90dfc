"""From a method's name to its peft configuration.

Source: peft, the configuration classes.
Taught in: notebook 01, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
)

from helpers.given import one_of, whole

DEFAULT_RANK = 8
DEFAULT_VIRTUAL_TOKENS = 16

# The heads that peft trains and saves in full for a task, whatever the targets are.
TASK_HEADS: dict[TaskType | None, list[str]] = {
    TaskType.SEQ_CLS: ["classifier", "score"],
    TaskType.TOKEN_CLS: ["classifier", "score"],
    TaskType.QUESTION_ANS: ["qa_outputs"],
}

# The second linear layer of a feed-forward block by its usual names: (IA)3 rescales its input,
# all other targets are rescaled at their output. peft only knows them for listed architectures.
_FEEDFORWARD = r".*\.(down_proj|fc2|fc_out|mlp\.c_proj|dense_4h_to_h|output\.dense|wo|w2)"


@dataclass(frozen=True)
class _Choices:
    """What the caller of `config` chose, checked and completed."""

    task_type: TaskType | None
    rank: int
    target_modules: list[str] | str | None
    virtual_tokens: int
    total_steps: int


@dataclass(frozen=True)
class _Method:
    build: Callable[[_Choices], PeftConfig]
    takes: frozenset[str]


def _heads(c: _Choices) -> list[str] | None:
    """Heads to put out of reach of a string pattern such as "all-linear"."""
    # For SEQ_CLS peft does so itself; for the others it would wrap the head, then refuse.
    if c.task_type is TaskType.SEQ_CLS or not isinstance(c.target_modules, str):
        return None
    return [*TASK_HEADS.get(c.task_type, [])] or None


def _lora(c: _Choices) -> LoraConfig:
    return LoraConfig(
        task_type=c.task_type,
        r=c.rank,
        lora_alpha=2 * c.rank,
        lora_dropout=0.0,
        target_modules=c.target_modules,
        modules_to_save=_heads(c),
    )


def _dora(c: _Choices) -> LoraConfig:
    return replace(_lora(c), use_dora=True)


def _adalora(c: _Choices) -> AdaLoraConfig:
    start = max(c.rank + c.rank // 2, c.rank + 1)
    return AdaLoraConfig(
        task_type=c.task_type,
        init_r=start,
        target_r=c.rank,
        lora_alpha=2 * start,
        lora_dropout=0.0,
        target_modules=c.target_modules,
        modules_to_save=_heads(c),
        total_step=c.total_steps,
        # A tenth to warm up, three tenths to settle: pruning takes place in between.
        tinit=c.total_steps // 10,
        tfinal=3 * c.total_steps // 10,
    )


def _ia3(c: _Choices) -> IA3Config:
    return IA3Config(
        task_type=c.task_type,
        target_modules=c.target_modules,
        modules_to_save=_heads(c),
        feedforward_modules=None if c.target_modules is None else _FEEDFORWARD,
    )


def _prefix(c: _Choices) -> PrefixTuningConfig:
    return PrefixTuningConfig(
        task_type=c.task_type, num_virtual_tokens=c.virtual_tokens, prefix_projection=True
    )


def _p_tuning_v2(c: _Choices) -> PrefixTuningConfig:
    return PrefixTuningConfig(
        task_type=c.task_type, num_virtual_tokens=c.virtual_tokens, prefix_projection=False
    )


def _prompt(c: _Choices) -> PromptTuningConfig:
    return PromptTuningConfig(task_type=c.task_type, num_virtual_tokens=c.virtual_tokens)


def _p_tuning(c: _Choices) -> PromptEncoderConfig:
    return PromptEncoderConfig(task_type=c.task_type, num_virtual_tokens=c.virtual_tokens)


_LOW_RANK = frozenset({"rank", "target_modules"})
_PROMPT = frozenset({"virtual_tokens"})

_METHODS = {
    "lora": _Method(_lora, _LOW_RANK),
    "qlora": _Method(_lora, _LOW_RANK),
    "prefix": _Method(_prefix, _PROMPT),
    "p-tuning-v2": _Method(_p_tuning_v2, _PROMPT),
    "prompt": _Method(_prompt, _PROMPT),
    "adalora": _Method(_adalora, _LOW_RANK | {"total_steps"}),
    "ia3": _Method(_ia3, frozenset({"target_modules"})),
    "dora": _Method(_dora, _LOW_RANK),
    "p-tuning": _Method(_p_tuning, _PROMPT),
}

METHODS: tuple[str, ...] = tuple(_METHODS)


def config(
    method: str,
    *,
    task_type: str | None = None,
    rank: int | None = None,
    target_modules: Sequence[str] | str | None = None,
    virtual_tokens: int | None = None,
    total_steps: int | None = None,
) -> PeftConfig:
    """The peft configuration of a method, with defaults that suit short runs.

    - ``lora``: ``LoraConfig`` with rank 8 and alpha = 2 rank. alpha / rank is then 2 at every
      rank, so one learning rate serves a whole comparison of ranks. Dropout is 0: the runs here
      are too short to overfit, and without it two runs differ by their seed only.
    - ``qlora``: the same ``LoraConfig``. What is quantised in QLoRA is the base model, so it is
      decided where the base is loaded.
    - ``dora``: the same with ``use_dora=True``: a trained magnitude for each output.
    - ``adalora``: ``AdaLoraConfig`` that starts at one and a half times the rank and prunes to an
      average of ``rank``. It needs ``total_steps``, since the schedule is laid over the run.
      peft divides its alpha by the starting rank, so alpha is twice that.
    - ``ia3``: ``IA3Config``; one factor per activation, so it has no rank.
    - ``prompt``: ``PromptTuningConfig``: trained embeddings before the input.
    - ``p-tuning``: ``PromptEncoderConfig`` (version 1): such embeddings, computed by a small MLP
      that is left out when saving.
    - ``prefix``: ``PrefixTuningConfig`` with ``prefix_projection=True``: trained keys and values
      in every layer, computed during training by an MLP that is left out when saving.
    - ``p-tuning-v2``: ``PrefixTuningConfig`` with ``prefix_projection=False``: the same keys and
      values in every layer, trained directly. peft has no class of that name. Both write
      a file of the same size.

    ``rank`` defaults to 8 and ``virtual_tokens`` to 16. ``target_modules=None`` leaves the choice
    to peft, which knows it by architecture. ``task_type`` is a name of ``peft.TaskType`` such as
    "CAUSAL_LM"; the prompt methods need it, and for "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS"
    peft also trains and saves the head.

    Raises: ValueError for an unknown method or task, a size below 1, no name among the targets, or
    a setting that the method does not have; TypeError for targets that are no names.
    Source: peft's pages "LoRA", "AdaLoRA", "IA3", "Prompt-based methods".
    Taught in: notebook 01, section 4.
    """
    chosen = _METHODS[one_of("method", method, METHODS)]
    sizes = {"rank": rank, "virtual_tokens": virtual_tokens, "total_steps": total_steps}
    _refuse_strangers(method, chosen.takes, sizes | {"target_modules": target_modules})
    sizes = {name: whole(name, size) for name, size in sizes.items() if size is not None}
    task = parse_task(task_type)
    if task is None and chosen.takes == _PROMPT:
        raise ValueError(
            f"{method!r} needs a task_type, because peft places the virtual tokens differently "
            f"for each task: one of {', '.join(t.value for t in TaskType)}."
        )
    return chosen.build(
        _Choices(
            task_type=task,
            rank=sizes.get("rank", DEFAULT_RANK),
            target_modules=_targets(target_modules),
            virtual_tokens=sizes.get("virtual_tokens", DEFAULT_VIRTUAL_TOKENS),
            total_steps=sizes.get("total_steps", 0),
        )
    )


def parse_task(name: str | None) -> TaskType | None:
    """The task of that name, None for None.

    Raises:
        ValueError: unknown name; the message gives the nearest one.
    """
    if name is None:
        return None
    return TaskType(one_of("task_type", name, [task.value for task in TaskType]))


def _targets(target_modules: Sequence[str] | str | None) -> list[str] | str | None:
    if target_modules is None:
        return None
    names = pattern_entries(target_modules)
    return target_modules if isinstance(target_modules, str) else list(names)


def pattern_entries(pattern: str | Collection[str]) -> tuple[str, ...]:
    """The names in a list of targets, each once; a string is one of them.

    Raises:
        TypeError: neither a string nor a list of strings.
        ValueError: nothing to match.
    """
    given = [pattern] if isinstance(pattern, str) else pattern
    if not isinstance(given, list | tuple | set | frozenset) or not all(
        isinstance(entry, str) for entry in given
    ):
        raise TypeError(
            f"A pattern is a string or a list of strings, but was {pattern!r}; "
            'for instance ["q_proj", "v_proj"] or "all-linear".'
        )
    if not given or not all(given):
        raise ValueError(
            f"The pattern {pattern!r} has nothing to match; name at least one module, "
            'for instance ["q_proj"], or pass "all-linear".'
        )
    ordered = sorted(given) if isinstance(given, set | frozenset) else given
    return tuple(dict.fromkeys(ordered))


_WHY_NOT = {
    "rank": "it trains no low-rank matrices",
    "target_modules": "it does not wrap modules, but adds virtual tokens",
    "virtual_tokens": "it adds no tokens, but wraps modules",
    "total_steps": "it has no schedule of its own",
}


def _refuse_strangers(method: str, takes: frozenset[str], given: dict[str, object]) -> None:
    for name, value in given.items():
        if value is not None and name not in takes:
            users = ", ".join(other for other, m in _METHODS.items() if name in m.takes)
            raise ValueError(
                f"{method!r} takes no {name} (given: {value!r}), because {_WHY_NOT[name]}; "
                f"{name} is for {users}."
            )
    if "total_steps" in takes and given["total_steps"] is None:
        raise ValueError(
            f"{method!r} needs total_steps, the number of optimiser steps of the run, because it "
            "lays its rank schedule over them; for instance total_steps=200."
        )
