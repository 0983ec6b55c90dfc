"""Images and questions in, the model's inputs out: a processor, and a collator for training.

Source: transformers' LlavaProcessor.
Taught in: notebook 08, section 1.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import LlavaProcessor

from helpers.data import IGNORED

from .model import IMAGE_TOKEN, PATCH, POOL, image_processor, tokenizer


@functools.cache
def processor() -> LlavaProcessor:
    """LLaVA's processor with DINOv2's image processor and SmolLM2's tokenizer.

    It writes an image's places into the text itself: one ``<file_sep>`` becomes nine, one for
    each 28 by 28 pixels, which is what the connector leaves of them.

    Taught in: notebook 08, sections 1 and 2.
    """
    return LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer(),
        patch_size=PATCH * POOL,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE_TOKEN,
    )


def inputs(images: list, questions: list[str]) -> dict[str, Tensor]:
    """input_ids and attention_mask (rows, length), pixel_values (rows, 3, 84, 84).

    Raises:
        ValueError: no pairs of an image and a question.

    Taught in: notebook 08, sections 1 and 2.
    """
    if not questions or len(images) != len(questions):
        raise ValueError(f"{len(images)} images and {len(questions)} questions are no pairs.")
    texts = [f"{IMAGE_TOKEN}{question} Answer:" for question in questions]
    return dict(processor()(images=images, text=texts, padding=True, return_tensors="pt"))


def collate(rows: Iterable[Mapping[str, object]]) -> dict[str, Tensor]:
    """Rows with image, question and answer (a word) to a batch; the loss sees the answer only.

    As `inputs`, with the answer's first token at the end of each row, and labels (rows, length).

    Raises:
        ValueError: no rows, or one without image, question or answer.

    Taught in: notebook 08, sections 1 and 2.
    """
    rows = list(rows)
    for row in rows:
        if missing := [name for name in ("image", "question", "answer") if name not in row]:
            raise ValueError(f"A row has no {missing[0]!r}, but: {', '.join(row) or 'nothing'}.")
    batch = inputs([row["image"] for row in rows], [row["question"] for row in rows])
    answers = torch.tensor(
        [tokenizer()(f" {row['answer']}")["input_ids"][:1] for row in rows], dtype=torch.long
    )
    ignored = torch.full_like(batch["input_ids"], IGNORED)
    return {
        "input_ids": torch.cat([batch["input_ids"], answers], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(answers)], 1),
        "pixel_values": batch["pixel_values"],
        "labels": torch.cat([ignored, answers], 1),
    }
