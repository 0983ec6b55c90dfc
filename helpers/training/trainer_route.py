"""The route through transformers' Trainer.

Source: transformers' Trainer.
Taught in: notebook 06, section 5.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from helpers.given import number, whole
from helpers.training.batches import Collate, Rows

if TYPE_CHECKING:  # importing the Trainer takes a second that only this route needs
    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer


def trainer(
    model: PreTrainedModel | PeftModel,
    dataset: Rows,
    collate: Collate,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    output_dir: Path,
    warmup_steps: int = 0,
    accumulate: int = 1,
    held_out: Rows | None = None,
    patience: int | None = None,
) -> Trainer:
    """A transformers Trainer with the same optimiser, clipping and order rule as :func:`train`.

    It reports nowhere and writes into ``output_dir`` only. ``.train()`` runs it, and
    ``.train(resume_from_checkpoint=True)`` goes on from the newest checkpoint in that folder.

    Args:
        batch_size: rows; four times as many in an evaluation.
        steps: optimiser steps, with ``accumulate`` batches each.
        held_out: rows to evaluate on. With them the Trainer evaluates and saves at the end of
            every epoch, and ends with the weights that had the lowest loss there; without them
            it saves once, at the end.
        patience: stop after so many evaluations without a new lowest loss; needs ``held_out``.

    Raises:
        ValueError: ``patience`` without ``held_out``, or a setting that is no whole number, not
            finite, or below its least value.

    Taught in: notebook 06, sections 1 and 5.
    """
    from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

    if patience is not None and held_out is None:
        raise ValueError(f"patience={patience} needs held_out rows to see that nothing improves")
    for name, count in {"batch_size": batch_size, "steps": steps, "accumulate": accumulate}.items():
        whole(name, count)
    whole("warmup_steps", warmup_steps, 0)
    whole("seed", seed, 0, 2**32 - 1)  # the Trainer also seeds numpy, which takes no larger one
    number("learning_rate", learning_rate, least=0)
    when = "steps" if held_out is None else "epoch"
    args = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=4 * batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=warmup_steps,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        eval_strategy="no" if held_out is None else "epoch",
        save_strategy=when,
        save_steps=steps,
        load_best_model_at_end=held_out is not None,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    return Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=held_out,
        data_collator=collate,
        callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
    )
