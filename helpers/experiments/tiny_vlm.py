"""A tiny vision-language model in LLaVA's form, trained by the course on easy-VQA.

A CLIP vision tower, LLaVA's two-layer projector and a Llama decoder, hidden size 128, about 0.56
million parameters: small, and not pretrained at scale. It is built in the order in which larger
ones are: the vision tower first learns to see (shape and colour as plain classes), then the whole
model learns to answer. Only the questions about shape and colour are used, since most yes/no
questions can be answered without the image. A word is a token; every answer is one word.

Source: transformers' LlavaForConditionalGeneration, made small; easy-VQA.
Taught in: notebook 08, section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from helpers import assets, data, training
from helpers.atomic import whole_folder
from helpers.data import IGNORED

SIDE, PATCH, HIDDEN, HEADS = 32, 8, 128, 4
PATCHES = (SIDE // PATCH) ** 2
QUESTION_WORDS = 8
PAD, IMAGE = 0, 1
ANSWERS = (*data.SHAPES, *data.COLOURS)
SEED = 0
STORED = assets.DATA / "tiny_vlm"
# (steps, learning rate), one after the other: a lower rate at the end sharpens the answers.
SEE = ((1200, 2e-3), (400, 4e-4))
ANSWER = ((500, 1e-3), (200, 2e-4))


@dataclass(frozen=True)
class Examples:
    """Open-ended questions about images, row by row.

    Attributes:
        pixels: (rows, 3, 32, 32), from -1 (black) to 1 (white).
        input_ids: (rows, 25): padding, 16 image tokens, the question's words, the answer.
        is_shape: (rows,), True where the shape is asked for, False where the colour is.
    """

    pixels: Tensor
    input_ids: Tensor
    is_shape: Tensor

    def rows(self) -> list[dict[str, Tensor]]:
        """The model's inputs; the loss sees the answer's word only."""
        labels = torch.full_like(self.input_ids, IGNORED)
        labels[:, -1] = self.input_ids[:, -1]
        columns = {
            "pixel_values": self.pixels,
            "input_ids": self.input_ids,
            "attention_mask": (self.input_ids != PAD).long(),
            "labels": labels,
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@functools.cache
def vocabulary() -> dict[str, int]:
    """Each word of the training questions and each answer, with its token id."""
    questions = _open_ended("train")["question"]
    words = {word for question in questions for word in _words(question)} | set(ANSWERS)
    return {word: i for i, word in enumerate(["<pad>", "<image>", *sorted(words)])}


@functools.cache
def examples(split: str) -> Examples:
    """The open-ended questions of one split of easy-VQA, with images of 32 by 32 pixels."""
    rows, known = _open_ended(split), vocabulary()
    names = rows.features["answer"].names
    pixels, ids = _pixels(split), []
    for question, answer in zip(rows["question"], rows["answer"], strict=True):
        words = [known[word] for word in _words(question)]
        padding = [PAD] * (QUESTION_WORDS - len(words))
        ids.append([*padding, *[IMAGE] * PATCHES, *words, known[names[answer]]])
    shape = rows.features["type"].str2int("shape")
    return Examples(
        torch.stack([pixels[image_id] for image_id in rows["image_id"]]),
        torch.tensor(ids),
        torch.tensor(rows["type"]) == shape,
    )


def untrained() -> LlavaForConditionalGeneration:
    """The model before training.

    MLP widths are chosen so that one rank of LoRA on every linear layer costs the same in either
    tower: 2 layers of 4·(128+128) + 2·(128+256) = 4·(128+128) + 3·(128+128) parameters.
    """
    size = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    vision = CLIPVisionConfig(
        **size, intermediate_size=256, image_size=SIDE, patch_size=PATCH, projection_dim=HIDDEN
    )
    text = LlamaConfig(
        **size,
        intermediate_size=128,
        vocab_size=len(vocabulary()),
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        # CLIP's start of 0.02 is made for far wider layers: here the image would not get through
        for parameter in model.model.vision_tower.embeddings.parameters():
            parameter.mul_(5)
    return model


def base() -> LlavaForConditionalGeneration:
    """The trained model, as stored in ``data/tiny_vlm``.

    Stored, because training on another processor ends in another base: sums run in another order.
    """
    return LlavaForConditionalGeneration.from_pretrained(STORED)


def store(folder: Path = STORED) -> None:
    """Train the model anew (about two minutes of one core) and put it in place of the stored one.

    Raises:
        AssetError: easy-VQA is missing.
    """
    with whole_folder(folder) as part:
        _train().save_pretrained(part)
        (part / "generation_config.json").unlink()  # defaults only


@torch.no_grad()
def guesses(model: nn.Module, questions: Examples) -> Tensor:
    """(rows,) the token that the model finds likeliest as the answer."""
    model.eval()
    parts = []
    for batch in training.ordered_batches(questions.rows(), default_collate, batch_size=100):
        del batch["labels"]
        # the position before the answer predicts it; a decoder cannot look ahead
        parts.append(model(**batch, logits_to_keep=2).logits[:, -2].argmax(-1))
    return torch.cat(parts)


def right(model: nn.Module, questions: Examples) -> Tensor:
    """(rows,) True where the model's likeliest token is the answer."""
    return guesses(model, questions) == questions.input_ids[:, -1]


def right_blank(model: nn.Module, questions: Examples) -> Tensor:
    """(rows,) the same with every image grey: what the question alone gives."""
    # all that the model still sees is the question: each text is asked once
    texts, which = questions.input_ids.unique(dim=0, return_inverse=True)
    grey = torch.zeros(len(texts), *questions.pixels.shape[1:])
    blank = Examples(grey, texts, torch.zeros(len(texts), dtype=torch.bool))
    return right(model, blank)[which]


def _train() -> LlavaForConditionalGeneration:
    torch.manual_seed(SEED)
    model = untrained()
    classifier = _Classifier(model.model.vision_tower)
    for module, rows, stages, label in (
        (classifier, _classes(), SEE, "the vision tower learns to see"),
        (model, examples("train").rows(), ANSWER, "the model learns to answer"),
    ):
        batches = _flipped(training.batches(rows, default_collate, batch_size=64, seed=SEED), SEED)
        for steps, rate in stages:
            training.train(
                module, batches, steps=steps, learning_rate=rate, warmup_steps=50, label=label
            )
    return model


class _Classifier(nn.Module):
    """Shape and colour from the mean of the patches; only the tower is kept."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.shape = nn.Linear(HIDDEN, len(data.SHAPES))
        self.colour = nn.Linear(HIDDEN, len(data.COLOURS))

    def forward(self, pixel_values: Tensor, shape: Tensor, colour: Tensor) -> SimpleNamespace:
        seen = self.tower(pixel_values=pixel_values).last_hidden_state[:, 1:].mean(1)
        losses = (
            functional.cross_entropy(head(seen), target, ignore_index=IGNORED)
            for head, target in ((self.shape, shape), (self.colour, colour))
        )
        return SimpleNamespace(loss=sum(losses))


def _classes() -> list[dict[str, Tensor]]:
    """Each training image with its shape and colour, as far as a question asks for them."""
    rows = _open_ended("train")
    names, seen = rows.features["answer"].names, {}
    for image_id, answer in zip(rows["image_id"], rows["answer"], strict=True):
        known = seen.setdefault(image_id, {"shape": IGNORED, "colour": IGNORED})
        for kind, group in (("shape", data.SHAPES), ("colour", data.COLOURS)):
            if names[answer] in group:
                known[kind] = group.index(names[answer])
    pixels = _pixels("train")
    return [
        {"pixel_values": pixels[image_id]} | {k: torch.tensor(v) for k, v in known.items()}
        for image_id, known in seen.items()
    ]


def _flipped(batches: Iterator[dict[str, Tensor]], seed: int) -> Iterator[dict[str, Tensor]]:
    """Half of the batches mirrored, half upside down: no shape or colour changes by it."""
    coin = torch.Generator().manual_seed(seed)
    for batch in batches:
        axes = [axis for axis in (-1, -2) if torch.rand(1, generator=coin) < 0.5]
        yield batch | {"pixel_values": batch["pixel_values"].flip(axes)}


@functools.cache
def _open_ended(split: str):
    rows = data.easy_vqa()[split]
    yes_no = rows.features["type"].str2int("yes/no")
    return rows.select([i for i, kind in enumerate(rows["type"]) if kind != yes_no])


@functools.cache
def _pixels(split: str) -> dict[str, Tensor]:
    """Each image once: (3, 32, 32), -1 to 1."""
    rows = _open_ended(split)
    first = {image_id: i for i, image_id in reversed([*enumerate(rows["image_id"])])}
    return {image_id: _small(rows[i]["image"]) for image_id, i in first.items()}


def _small(image: Image.Image) -> Tensor:
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1


def _words(question: str) -> list[str]:
    return question.replace("?", " ?").split()
