"""What a batch has to be like before it may reach the model.

Source: torch's cross entropy, which ignores -100; transformers' position limits.
Taught in: notebook 06, sections 3 and 9, and notebook 10, failure 8.
"""

from __future__ import annotations

import torch
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from helpers.data import IGNORED
from helpers.training.batches import Batch, TrainingError


def check_batch(batch: Batch, positions: int | None = None) -> None:
    """Refuse a batch without rows, longer than ``positions`` tokens, or without any target.

    Raises:
        TrainingError: one sentence that names the cause.
    """
    if not batch or not _rows(batch):
        raise TrainingError(
            "a batch has no rows, so it has no loss: leave empty batches out of the data"
        )
    ids = batch.get("input_ids")
    if positions is not None and ids is not None and ids.dim() and ids.shape[-1] > positions:
        raise TrainingError(
            f"a row has {ids.shape[-1]} tokens, and the model has room for {positions}: "
            f"tokenise with max_length={positions} or shorter, or leave long rows out"
        )
    check_targets(batch)


def check_targets(batch: Batch) -> None:
    """Refuse a batch whose labels are all masked: its loss would be NaN.

    Raises:
        TrainingError: no label of (batch size, length) is a target.
    """
    labels = batch.get("labels")
    if labels is not None and not labels.is_floating_point() and bool((labels == IGNORED).all()):
        raise TrainingError(
            "every label of this batch is masked (-100): the answers were cut off or never marked; "
            "raise max_length or check how the labels are made"
        )


def max_positions(model: torch.nn.Module) -> int | None:
    """How many input tokens the model has positions for; None where it sets no limit.

    A virtual token of prompt tuning takes a position of its own.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    if limit is None:
        return None
    if "roberta" in getattr(text, "model_type", ""):
        limit -= text.pad_token_id + 1  # its positions are counted from behind the padding's
    return limit - _virtual_tokens(model)


def _virtual_tokens(model: torch.nn.Module) -> int:
    config = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if getattr(config, "is_prompt_learning", False) else 0


def token_count(batch: Batch) -> int:
    """Input positions in a batch, padding included; rows where there are no token ids.

    Raises:
        TrainingError: no tensor has rows.
    """
    ids = batch.get("input_ids")
    return ids.numel() if ids is not None else _rows(batch)


def _rows(batch: Batch) -> int:
    first = next(iter(batch.values()), None)
    if first is None or not first.dim():
        raise TrainingError("a batch has tensors with one row for each example, and this has none")
    return len(first)


def target_count(model: torch.nn.Module, batch: Batch) -> int:
    """Over how many targets the model's loss on this batch is a mean.

    A decoder predicts position t+1 at position t, so the first label of a row is no target
    for it, unless virtual tokens stand before it. Rows, where there are no labels.

    Raises:
        TrainingError: no tensor has rows.

    Source: transformers, ``Trainer.get_batch_samples`` (``num_items_in_batch``).
    """
    labels = batch.get("labels")
    if labels is None:
        return _rows(batch)
    if _shifts_labels(model):
        labels = labels[..., 1:]
    return int((labels != IGNORED).sum())


def _shifts_labels(model: torch.nn.Module) -> bool:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    kind = str(getattr(getattr(model, "active_peft_config", None), "peft_type", ""))
    if _virtual_tokens(model) and "PREFIX" not in kind:
        return False
    return LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
