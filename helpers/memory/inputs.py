"""A fake batch for any of the architectures: text, labels and pictures.

Source: transformers, the arguments of its models.
Taught in: notebook 03, section 7.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


def fake_batch(
    config: PreTrainedConfig, model: PreTrainedModel, batch: int, seq: int, *, padded: bool
) -> dict[str, Tensor]:
    """Tensors to call the model with; a padded batch carries an attention mask.

    Shapes: input_ids and labels (batch, seq); for a classifier labels (batch,); for a model that
    sees pictures pixel_values (batch, channels, height, width), the picture's tokens being part
    of seq. A model whose pictures have no fixed size, such as Qwen-VL, is fed text alone.
    """
    ids = torch.zeros(batch, seq, dtype=torch.long)
    inputs = {"input_ids": ids}
    classifier = getattr(model, "classifier", None) is not None
    inputs["labels"] = torch.zeros(batch, dtype=torch.long) if classifier else ids.clone()
    if padded:
        inputs["attention_mask"] = torch.ones(batch, seq, dtype=torch.long)
    vision = getattr(config, "vision_config", None)
    if hasattr(vision, "image_size"):
        side = vision.image_size
        inputs["pixel_values"] = torch.zeros(batch, 3, side, side, dtype=model.dtype)
    return inputs
