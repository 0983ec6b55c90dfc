"""A vision-language model of pretrained parts: DINOv2-small, a connector, SmolLM2's first layers.

It is transformers' own LLaVA class with a connector of ours. The vision tower stays as it is; the
connector and LoRA on the decoder are trained on easy-VQA by ``python -m helpers.vlm`` and stored
as one small file, from which `trained` puts the model together again.
"""

from .model import (
    FILE,
    IMAGE_TOKEN,
    IMAGE_TOKENS,
    Connector,
    about,
    image_processor,
    store,
    tokenizer,
    trained,
    untrained,
    with_lora,
)
from .processor import collate, inputs, processor
from .questions import (
    Questions,
    answer_logits,
    answer_tokens,
    question_only,
    question_text,
    questions,
    right,
    scores,
    subsets,
)

__all__ = [
    "FILE",
    "IMAGE_TOKEN",
    "IMAGE_TOKENS",
    "Connector",
    "Questions",
    "about",
    "answer_logits",
    "answer_tokens",
    "collate",
    "image_processor",
    "inputs",
    "processor",
    "question_only",
    "question_text",
    "questions",
    "right",
    "scores",
    "store",
    "subsets",
    "tokenizer",
    "trained",
    "untrained",
    "with_lora",
]
