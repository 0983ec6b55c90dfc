"""AdaLoRA's ranks: the budget that a schedule allows, the ranks of a model, and the Trainer.

AdaLoRA writes the update of a weight as P Λ Q with a diagonal Λ and prunes entries of Λ while it
trains, the least important of all modules first.
In peft P is `lora_B`, the diagonal of Λ is `lora_E`, and Q is `lora_A`.

Source: AdaLoRA (Zhang et al. 2023), section 3.2; peft's AdaLoraConfig and update_and_allocate.
Taught in: notebook 04, section 8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import RankAllocator
from torch import nn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


def rank_budget(config: AdaLoraConfig, modules: int) -> pd.DataFrame:
    """The rank that all modules together may have after each step, as peft's allocator sets it.

    Args:
        config: its ``tinit``, ``tfinal``, ``deltaT`` and ``total_step`` make the schedule.
        modules: how many modules AdaLoRA wraps; the budget is shared by all of them.

    Returns:
        A row per step, 0 to ``total_step - 1``, with `rank` (the sum over the modules), `masked`
        (True where singular values outside the budget are set to zero) and `phase`: "warm-up",
        "pruning", or "final", in which every mask repeats the last one. Where a step does not
        mask, the rank is what a mask there would leave, and pruned entries train on.

    Raises:
        ValueError: ``modules`` or the config's ``init_r`` is below 1.

    Source: Zhang et al. 2023, "AdaLoRA", section 3.3; peft, ``RankAllocator.budget_schedule``.
    Taught in: notebook 04, section 7.
    """
    if modules < 1:
        raise ValueError(f"a budget is shared by at least one module, not by {modules}")
    if config.init_r < 1:
        raise ValueError(
            f"every module starts with a rank of at least 1, not init_r={config.init_r}"
        )
    allocator = RankAllocator(_bare(config.init_r, modules), config, "default")
    end = config.total_step - config.tfinal
    rows = [
        # peft forces a mask where pruning ends, whatever deltaT says
        (rank, masked or step == end, _phase(step, config.tinit, end))
        for step in range(config.total_step)
        for rank, masked in [allocator.budget_schedule(step)]
    ]
    columns = ["rank", "masked", "phase"]
    return pd.DataFrame(rows, columns=columns).rename_axis(index="step")


def _phase(step: int, tinit: int, end: int) -> str:
    if step <= tinit:
        return "warm-up"
    return "pruning" if step <= end else "final"


def _bare(rank: int, modules: int) -> nn.Module:
    """What the allocator looks at: for each module an A with `rank` rows, here without columns."""
    factors = [nn.ParameterDict({"default": torch.empty(rank, 0)}) for _ in range(modules)]
    return nn.ModuleList(nn.ModuleDict({"lora_A": factor}) for factor in factors)


def live_ranks(model: nn.Module) -> pd.Series:
    """How many singular values of each AdaLoRA module are not zero now.

    All are zero before the first step, since training starts from the plain model; and right
    before a mask there are more than right after it, since pruned ones keep training.

    Returns:
        Whole numbers, indexed by the modules' names in the base model.

    Raises:
        ValueError: the model has no AdaLoRA module.

    Taught in: notebook 04, section 8.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = {
        name: int((next(iter(module.lora_E.values())) != 0).sum())
        for name, module in base.named_modules()
        if hasattr(module, "lora_E")
    }
    if not found:
        raise ValueError(
            f"{type(base).__name__} has no AdaLoRA module: wrap it with "
            'get_peft_model(model, adapters.config("adalora", …))'
        )
    return pd.Series(found, name="rank").rename_axis("module")


class AllocateRanks(TrainerCallback):
    """Lets AdaLoRA prune inside transformers' Trainer, which does not call it by itself.

    The call belongs right behind the optimiser's step, `on_optimizer_step`: at `on_step_end` the
    gradients that the importance scores need are gone, and a mask at `on_pre_optimizer_step`
    would be undone at once by the step that follows, as AdamW's moments move a zero too.

    Pass it as ``Trainer(…, callbacks=[AllocateRanks()])``.

    Raises:
        ValueError: when training begins: the model has no AdaLoRA, its ``total_step`` is not the
            Trainer's number of steps, or the run goes on from a checkpoint, which holds no
            importance scores.

    Source: peft, ``AdaLoraModel.update_and_allocate``; transformers, ``TrainerCallback``.
    Taught in: notebook 04, section 9.
    """

    # The Trainer passes what a callback may want by keyword; these take what they need of it.
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Refuses a run that the schedule does not fit.

        Raises:
            ValueError: as the class says.
        """
        if not hasattr(getattr(model, "base_model", None), "update_and_allocate"):
            raise ValueError(
                f"AllocateRanks needs a model with a trainable AdaLoRA, not {type(model).__name__}"
            )
        planned = model.active_peft_config.total_step
        if planned != state.max_steps:
            raise ValueError(
                f"AdaLoRA's schedule is laid over total_step={planned}, but the Trainer takes "
                f"{state.max_steps} steps: build the config with total_step={state.max_steps}"
            )
        if state.global_step > 0:
            raise ValueError(
                f"the run goes on at step {state.global_step}, but a checkpoint holds none of "
                "AdaLoRA's importance scores: train it in one run, or use LoRA"
            )

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Updates the importance scores and masks; `global_step` still counts from 0 here."""
        model.base_model.update_and_allocate(state.global_step)
