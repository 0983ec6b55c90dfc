"""easy-VQA as the model sees it: cached patches, the questions' tokens, scores by type.

Source: easy-VQA (Victor Zhou).
Taught in: notebook 08, section 1.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, replace

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel

from helpers import assets, data, models
from helpers.given import one_of, whole

from .model import IMAGE_TOKEN, IMAGE_TOKENS, SIDE, image_processor, pool, tokenizer

YES, NO = data.ANSWERS.index("yes"), data.ANSWERS.index("no")


@dataclass(frozen=True)
class Questions:
    """Rows of easy-VQA as the model sees them.

    Attributes:
        pooled: (images, 9, 384) patches of each image once, standardised later.
        image: (rows,) which image.
        words: (rows, length) tokens: padding, nine places for the image, the question.
        answer: (rows,) index into `data.ANSWERS`.
        kind: (rows,) index into `data.QUESTION_TYPES`.
        text: (rows,) which question text.
    """

    pooled: Tensor
    image: Tensor
    words: Tensor
    answer: Tensor
    kind: Tensor
    text: Tensor

    def rows(self, which: Tensor) -> Questions:
        """Some of the rows; the images stay."""
        names = ("image", "words", "answer", "kind", "text")
        return replace(self, **{name: getattr(self, name)[which] for name in names})

    def blank(self) -> Questions:
        """The same questions about an image that shows nothing: every patch the mean patch."""
        return replace(self, pooled=self.pooled.mean((0, 1)).expand_as(self.pooled))

    def of(self, kind: str) -> Questions:
        """The questions of one of `data.QUESTION_TYPES`.

        Raises:
            ValueError: another kind.
        """
        one_of("kind of question", kind, data.QUESTION_TYPES)
        return self.rows((self.kind == data.QUESTION_TYPES.index(kind)).nonzero()[:, 0])

    def balanced(self) -> Questions:
        """Yes/no questions, each text as often with the answer yes as with no.

        Who sees only the question is right in exactly half of them. The first rows are kept;
        texts with one answer only drop out.

        Taught in: notebook 08, section 1.
        """
        seen: dict[tuple[int, int], list[int]] = {}
        pairs = zip(self.text.tolist(), self.answer.tolist(), strict=True)
        for row, pair in enumerate(pairs):
            seen.setdefault(pair, []).append(row)
        kept = [
            row
            for text in sorted(set(self.text.tolist()))
            for pair in zip(seen.get((text, YES), []), seen.get((text, NO), []), strict=False)
            for row in pair
        ]
        return self.rows(torch.tensor(kept, dtype=torch.long))


def question_text(question: str) -> str:
    """The model's input: the image's places, then the question."""
    return f"{IMAGE_TOKEN * IMAGE_TOKENS}{question} Answer:"


@functools.cache
def answer_tokens() -> Tensor:
    """(13,) the first token of each answer; they all differ."""
    return torch.tensor([tokenizer()(f" {word}")["input_ids"][0] for word in data.ANSWERS])


@functools.cache
def questions(split: str) -> Questions:
    """A split of easy-VQA with the vision tower's patches, which are computed once and cached.

    Raises:
        ValueError: unknown split; the message gives the nearest.
    """
    splits = data.easy_vqa()
    rows = splits[one_of("split", split, splits)].remove_columns("image")
    rows = rows[:]  # lists: columns are slow row by row
    names = sorted(set(rows["image_id"]))
    place = {name: i for i, name in enumerate(names)}
    texts = {text: i for i, text in enumerate(sorted(set(rows["question"])))}
    encoded = tokenizer()([question_text(t) for t in texts], padding=True, return_tensors="pt")
    text = torch.tensor([texts[question] for question in rows["question"]])
    return Questions(
        pooled=_pooled(split, names),
        image=torch.tensor([place[name] for name in rows["image_id"]]),
        words=encoded["input_ids"][text],
        answer=torch.tensor(rows["answer"]),
        kind=torch.tensor(rows["type"]),
        text=text,
    )


def _pooled(split: str, names: list[str]) -> Tensor:
    folder = assets.build_once(
        assets.cache_dir() / "features" / f"easy-vqa-{split}-dinov2-{SIDE}",
        lambda part: save_file({"pooled": _seen(split, names)}, part / "pooled.safetensors"),
    )
    return load_file(folder / "pooled.safetensors")["pooled"]


@torch.no_grad()
def _seen(split: str, names: list[str]) -> Tensor:
    tower = AutoModel.from_pretrained(models.path("dinov2")).eval()
    rows = data.easy_vqa()[split]
    first = {name: i for i, name in reversed([*enumerate(rows["image_id"][:])])}
    parts = []
    for start in tqdm(range(0, len(names), 50), desc=f"images of {split}", leave=False):
        images = [rows[first[name]]["image"] for name in names[start : start + 50]]
        pixels = image_processor()(images=images, return_tensors="pt")["pixel_values"]
        parts.append(pool(tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]))
    return torch.cat(parts)


def answer_logits(model: nn.Module, given: Questions) -> Tensor:
    """(rows, 13) logits of the answers, from cached patches: what the whole model computes.

    Args:
        model: `untrained`, `trained`, or either wrapped by peft.
    """
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    connector, decoder = whole.model.multi_modal_projector, whole.model.language_model
    mask = given.words != tokenizer().pad_token_id
    longest = int(mask.sum(1).max())  # columns that are padding in every row cost time
    words, mask = given.words[:, -longest:], mask[:, -longest:]
    seen = connector.project((given.pooled[given.image] - connector.mean) / connector.spread)
    vectors = decoder.get_input_embeddings()(words)
    is_image = (words == whole.config.image_token_id).unsqueeze(-1)
    vectors = vectors.masked_scatter(is_image, seen.to(vectors.dtype))
    last = decoder(inputs_embeds=vectors, attention_mask=mask.long()).last_hidden_state[:, -1]
    return last @ whole.lm_head.weight[answer_tokens()].T


@torch.no_grad()
def right(model: nn.Module, given: Questions, batch_size: int = 100) -> Tensor:
    """(rows,) True where the likeliest of the 13 answers is right; ``batch_size`` rows at once.

    Raises:
        ValueError: no questions, or no whole number of rows.
    """
    whole("batch_size", batch_size)
    _some(given)
    model.eval()
    by_length = (given.words != tokenizer().pad_token_id).sum(1).argsort(stable=True)
    out = torch.empty(len(by_length), dtype=torch.bool)
    for which in by_length.split(batch_size):
        rows = given.rows(which)
        out[which] = answer_logits(model, rows).argmax(-1) == rows.answer
    return out


def _some(given: Questions) -> None:
    if not len(given.answer):
        raise ValueError("There are no questions of that kind, so nobody can be right.")


def right_blank(model: nn.Module, given: Questions) -> Tensor:
    """(rows,) the same with every image blank: what the question alone gives."""
    # all that the model still sees is the text: each is asked once with each answer it has
    pairs = given.text * len(data.ANSWERS) + given.answer
    _, which = pairs.unique(return_inverse=True)
    first = torch.stack([(which == i).nonzero()[0, 0] for i in range(int(which.max()) + 1)])
    return right(model, given.rows(first).blank())[which]


def subsets(given: Questions) -> dict[str, Questions]:
    """The three sets that are scored: shape, colour, and yes/no balanced for each text."""
    return {
        "shape": given.of("shape"),
        "colour": given.of("colour"),
        "yes/no, balanced": given.of("yes/no").balanced(),
    }


def question_only(train: Questions, given: Questions) -> float:
    """Share that is right for who knows, of every text, its commonest answer in training.

    Both splits of easy-VQA ask the same 107 texts, so a text has one number.

    Raises:
        ValueError: no questions in one of the two.
    """
    _some(train)
    _some(given)
    counts = torch.zeros(int(train.text.max()) + 1, len(data.ANSWERS), dtype=torch.long)
    counts.index_put_((train.text, train.answer), torch.tensor(1), accumulate=True)
    return (counts.argmax(1)[given.text] == given.answer).float().mean().item()


def scores(model: nn.Module, given: Questions) -> pd.DataFrame:
    """Accuracy by type of question, with the image and with the image blanked.

    Returns:
        One row each for shape, colour and balanced yes/no; columns rows, model, blank image,
        majority (the answer that is commonest among these rows).

    Raises:
        ValueError: no questions of one of the three kinds.
    """
    table = {}
    for name, rows in subsets(given).items():
        _some(rows)
        common = Counter(rows.answer.tolist()).most_common(1)[0][1]
        table[name] = {
            "rows": len(rows.answer),
            "model": right(model, rows).float().mean().item(),
            "blank image": right_blank(model, rows).float().mean().item(),
            "majority": common / len(rows.answer),
        }
    return pd.DataFrame(table).T.astype({"rows": int})
