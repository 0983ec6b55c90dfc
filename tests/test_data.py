"""Data sets: fixed splits without leakage, true counts, and labels that say what they should."""

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from helpers import assets, data
from helpers import models as base_models
from helpers.assets import DATA, AssetError

SETS: dict[str, Callable[[], DatasetDict]] = {
    **{f'sentiment("{domain}")': lambda d=domain: data.sentiment(d) for domain in data.DOMAINS},
    "addresses()": data.addresses,
    "address_questions()": data.address_questions,
    "easy_vqa()": data.easy_vqa,
    "trivia()": data.trivia,
    "speech()": data.speech,
}


@cache
def load(name: str) -> DatasetDict:
    return SETS[name]()


def texts(name: str, split: Dataset) -> Iterable[str]:
    """What must not be in two splits."""
    if name == "addresses()":
        return [" ".join(tokens) for tokens in split["tokens"]]
    if name == "easy_vqa()":
        return split["image_id"]
    columns = {"address_questions()": "context", "trivia()": "question"}
    return split[columns.get(name, "text")]


def shared(splits: Iterable[Iterable[str]]) -> set[str]:
    """Texts that occur in more than one split; case, spaces and punctuation do not matter."""
    counts = Counter(key for split in splits for key in {data._key(text) for text in split})
    return {key for key, count in counts.items() if count > 1}


# The data sets


@pytest.mark.parametrize("name", SETS)
def test_no_text_is_in_two_splits(name: str) -> None:
    sets = load(name)
    assert list(sets) == ["train", "validation", "test"]
    assert shared(texts(name, split) for split in sets.values()) == set()


def test_the_leakage_check_can_fail() -> None:
    assert shared([["Great player."], ["great  player!"]]) == {"great player"}


@pytest.mark.parametrize("name", SETS)
def test_no_row_is_there_twice(name: str) -> None:
    for split in load(name).values():
        plain = (
            split.cast_column("image", Image(decode=False)) if "image" in split.features else split
        )
        rows = [repr({k: v for k, v in row.items() if k != "image"}) for row in plain]
        assert len(set(rows)) == len(rows) > 0


@pytest.mark.parametrize("name", [name for name in SETS if name != "easy_vqa()"])
def test_splits_are_the_same_each_time(name: str) -> None:
    assert SETS[name]()["train"].to_dict() == load(name)["train"].to_dict()


def test_splits_do_not_depend_on_the_process() -> None:
    """Sets and hashes of strings are ordered differently in each Python process."""
    code = "from helpers import data; print(data.trivia()['test']['question'][:])"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=DATA.parent, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(load("trivia()")["test"]["question"][:])


def test_order_is_sha256_of_seed_and_key() -> None:
    by_hand = sorted("abc", key=lambda key: hashlib.sha256(b"0/" + key.encode()).hexdigest())
    parts = data._cut({key: [] for key in "abc"}, 1, 1)
    assert [next(iter(parts[name])) for name in ("test", "validation", "train")] == by_hand


@pytest.mark.parametrize("domain", data.DOMAINS)
def test_sentiment_label_is_the_sign_of_a_clear_rating(domain: str) -> None:
    for split in load(f'sentiment("{domain}")').values():
        assert split.features["label"] == ClassLabel(names=["negative", "positive"])
        ratings = torch.tensor(split["rating"][:])
        assert ratings.abs().min() >= data.NEUTRAL and ratings.abs().max() <= 4
        assert torch.equal((ratings > 0).long(), torch.tensor(split["label"][:]))
        assert 0.2 < (ratings > 0).float().mean() < 0.8


@pytest.mark.parametrize("domain", ["products", "news"])
def test_sentences_of_one_document_stay_together(domain: str) -> None:
    document_of = {
        text.strip(): document.split("_")[0]
        for document, _, text in reversed(data._ratings(data.VADER_FILES[domain]))
    }
    splits = load(f'sentiment("{domain}")').values()
    assert shared([document_of[text] for text in split["text"]] for split in splits) == set()


def test_domains_share_no_text() -> None:
    every = [
        texts(name, part) for name in SETS if "sentiment" in name for part in load(name).values()
    ]
    # A few stock phrases ("wow") occur in two domains.
    assert all(len(text.split()) <= 5 for text in shared(every))


def test_unknown_domain_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Unknown domain 'movie'; did you mean 'movies'"):
        data.sentiment("movie")


def test_addresses_have_one_tag_a_token_and_no_names() -> None:
    for split in load("addresses()").values():
        names = split.features["tags"].feature.names
        assert len(names) == 28 and "Recipient" not in names
        assert all(len(row["tokens"]) == len(row["tags"]) > 0 for row in split)
    assert names == sorted(names)


def test_rows_with_a_recipient_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    xml = (
        b"<A><S><Recipient>Ann</Recipient> <ZipCode>12345</ZipCode></S>"
        b"<S><PlaceName>Reno,</PlaceName> <StateName>NV</StateName></S>"
        b"<S><PlaceName>RENO</PlaceName> <StateName>NV</StateName></S></A>"
    )
    monkeypatch.setattr(data, "_member", lambda asset, path: xml)
    row = {"tokens": ["Reno,", "NV"], "tags": ["PlaceName", "StateName"]}
    assert data._labelled_addresses() == {"reno nv": [row]}


def test_questions_by_hand() -> None:
    tokens = ["12", "Elm", "Grove", "Ave.,", "Reno,", "NV"]
    tags = ["AddressNumber", "StreetName", "StreetName", "StreetNamePostType", "PlaceName"]
    found = [
        (row["tag"], row["answers"]["text"][0], row["answers"]["answer_start"][0])
        for row in data._questions(tokens, [*tags, "StateName"])
    ]
    assert found == [
        ("AddressNumber", "12", 0),
        ("StreetName", "Elm Grove", 3),
        ("StreetNamePostType", "Ave.", 13),
        ("PlaceName", "Reno", 19),
        ("StateName", "NV", 25),
    ]


def test_a_tag_in_two_places_is_not_asked_for() -> None:
    tags = ["PlaceName", "ZipCode", "PlaceName"]
    assert [row["tag"] for row in data._questions(["Reno", "1", "Ely"], tags)] == ["ZipCode"]


def test_answers_stand_where_they_say() -> None:
    for split in load("address_questions()").values():
        for row in split:
            text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
            assert text and row["context"][start : start + len(text)] == text


def test_questions_keep_the_splits_of_the_addresses() -> None:
    for name, split in load("address_questions()").items():
        assert set(split["context"]) <= set(texts("addresses()", load("addresses()")[name]))


def test_easy_vqa_keeps_the_packages_test_images_apart() -> None:
    pixels = {}
    for name, split in load("easy_vqa()").items():
        assert {key.split("/")[0] for key in split["image_id"]} == {
            "test" if name == "test" else "train"
        }
        plain = split.cast_column("image", Image(decode=False)).select_columns(
            ["image", "image_id"]
        )
        by_image = {row["image_id"]: row["image"]["bytes"] for row in plain}
        pixels[name] = {hashlib.sha256(png).hexdigest() for png in by_image.values()}
    assert {name: len(found) for name, found in pixels.items()} == {
        "train": 3600,
        "validation": 400,
        "test": 1000,
    }
    assert len(set.union(*pixels.values())) == 5000


def test_easy_vqa_types_follow_from_the_answers() -> None:
    split = load("easy_vqa()")["validation"]
    answer, kind = split.features["answer"], split.features["type"]
    groups = {"yes/no": ("yes", "no"), "shape": data.SHAPES, "colour": data.COLOURS}
    pairs = set(zip(split["answer"], split["type"], strict=True))
    assert len(pairs) == answer.num_classes == 13
    assert all(answer.int2str(a) in groups[kind.int2str(t)] for a, t in pairs)
    assert split[0]["image"].size == (64, 64) and split[0]["image"].mode == "RGB"


def test_easy_vqa_is_built_once_and_without_progress_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "small.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for part in ("train", "test"):
            rows = [["is it red?", "no", 0], ["what shape?", "circle", 0]]
            archive.writestr(f"easy_vqa/data/{part}/questions.json", json.dumps(rows))
            archive.writestr(f"easy_vqa/data/{part}/images/0.png", b"png of " + part.encode())
    monkeypatch.setattr(assets, "fetch", lambda name: wheel)
    monkeypatch.setattr(assets, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(data, "_cut", lambda groups, *_: {"train": groups, "validation": groups})
    assert {name: len(split) for name, split in data.easy_vqa().items()} == {
        "train": 2,
        "validation": 2,
        "test": 2,
    }
    wheel.unlink()  # the second call needs the built folder only
    assert set(data.easy_vqa()["test"]["image_id"]) == {"test/0"}
    assert capfd.readouterr() == ("", "")


def test_progress_bars_are_left_as_they_were() -> None:
    for switch, disabled in (
        (data.datasets.enable_progress_bars, False),
        (disable_progress_bars, True),
    ):
        switch()
        with data._no_progress_bars():
            assert data.datasets.are_progress_bars_disabled()
        assert data.datasets.are_progress_bars_disabled() is disabled
    data.datasets.enable_progress_bars()


def test_trivia_answers_are_a_few_words() -> None:
    rows = [row for split in load("trivia()").values() for row in split]
    words = sorted(len(row["answer"].split()) for row in rows)
    assert words[0] == 1 and words[len(words) // 2] <= 2 and words[-1] <= 12
    assert all(row["question"] == row["question"].strip() for row in rows)
    assert not any(re.search(r"\? - '", row["question"]) for row in rows)


# Missing and damaged archives


def _tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("load_set", "file", "missing"),
    [
        (data.addresses, "a.tar.gz", "usaddress archive has no training/labeled.xml: "),
        (
            lambda: data.sentiment("news"),
            "a.tar.gz",
            "vader archive has no additional_resources/hutto_ICWSM_2014.tar.gz: ",
        ),
        (data.trivia, "a.whl", "trivia archive has no chatterbot_corpus/data/english/trivia.yml: "),
        (
            lambda: data._vqa_groups("test"),
            "a.whl",
            "easy-vqa archive has no easy_vqa/data/test/questions.json: ",
        ),
    ],
)
def test_an_archive_without_its_file_says_so(
    load_set: Callable[[], object],
    file: str,
    missing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    archive = tmp_path / file
    if file.endswith(".whl"):
        zipfile.ZipFile(archive, "w").close()
    else:
        _tar(archive, {"x-1/other.txt": b"hello"})
    monkeypatch.setattr(assets, "fetch", lambda name: archive)
    with pytest.raises(AssetError, match=f"^{re.escape(missing)}"):
        load_set()


def test_the_inner_archive_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = _tar(tmp_path / "in.tar.gz", {"hutto_ICWSM_2014/other.txt": b""}).read_bytes()
    outer = _tar(tmp_path / "out.tar.gz", {f"v-1/{data.VADER_MEMBER}": inner})
    monkeypatch.setattr(assets, "fetch", lambda name: outer)
    with pytest.raises(AssetError, match=r"vader archive has no tweets_GroundTruth\.txt"):
        data.sentiment("tweets")


@pytest.mark.parametrize(
    ("load_set", "file"), [(data.addresses, "a.tar.gz"), (data.trivia, "a.whl")]
)
@pytest.mark.parametrize("content", [b"not an archive", b""])
def test_a_damaged_archive_says_so(
    load_set: Callable[[], object],
    file: str,
    content: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / file).write_bytes(content)
    monkeypatch.setattr(assets, "fetch", lambda name: tmp_path / file)
    with pytest.raises(AssetError, match=r"^\w+ archive is damaged: .*`python -m helpers\.assets"):
        load_set()


def test_a_missing_archive_passes_the_sentence_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str) -> Path:
        raise AssetError(f"{name}: no network")

    monkeypatch.setattr(assets, "fetch", fetch)
    for load_set in (data.addresses, data.address_questions, data.trivia):
        with pytest.raises(AssetError, match="no network"):
            load_set()


# Licences


def table(first: str) -> dict[str, dict[str, str]]:
    """The rows of the table of LICENSES.md whose first column is called so, by that column."""
    lines = (DATA / "LICENSES.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    start = next(i for i, row in enumerate(cells) if row[0] == first)
    end = next((i for i in range(start, len(cells)) if not lines[i].startswith("|")), len(cells))
    head, rows = cells[start], cells[start + 2 : end]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_every_archive_has_a_licence_row() -> None:
    named = tomllib.loads((DATA / "assets.toml").read_text(encoding="utf-8"))
    rows = table("name")
    assert set(rows) == set(named)
    for name, asset in named.items():
        assert re.fullmatch("[0-9a-f]{64}", asset["sha256"])
        assert rows[name]["package"] == asset["requirement"]
        assert rows[name]["licence"].split()[0].startswith(("MIT", "Apache-2.0", "BSD"))
        assert asset["licence"].split()[0].startswith(rows[name]["licence"].split()[0])
        assert all(rows[name].values())


def test_licences_give_the_true_row_counts() -> None:
    rows = table("data set")
    assert set(rows) == set(SETS)
    archives = table("name")
    for name, row in rows.items():
        said = {
            split: int(row[split].replace(",", "")) for split in ("train", "validation", "test")
        }
        assert said == {split: len(part) for split, part in load(name).items()}, name
        assert row["from"] in archives or (DATA.parent / row["from"]).is_dir()


# Token ids, by hand


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """One id a word, except that "Reno" is two pieces: "Re" and "##no"."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "who", "?", "Re", "##no", ",", "NV", "me"]
    ids = {word: i for i, word in enumerate([*vocabulary, "eos", "user", "model"])}
    core = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="eos",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    made.chat_template = (
        "{% for m in messages %}user {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}model {% endif %}"
    )
    return made


def test_chat_examples_by_hand(words: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict({"question": ["who ?", "who"], "answer": ["me", "Reno NV"]})
    made = data.chat_examples(rows, words)
    # user who ? model | me eos
    assert made[0]["input_ids"].tolist() == [12, 4, 5, 13, 10, 11]
    assert made[0]["labels"].tolist() == [-100, -100, -100, -100, 10, 11]
    # user who model | Re ##no NV eos
    assert made[1]["labels"].tolist() == [-100, -100, -100, 6, 7, 9, 11]
    assert made[1]["attention_mask"].tolist() == [1] * 7
    assert data.chat_prompt("who ?", words) == "user who ? model "


def test_classification_examples_by_hand(words: PreTrainedTokenizerFast) -> None:
    made = data.classification_examples(
        Dataset.from_dict({"text": ["me", "Reno , NV"], "label": [0, 1]}), words, max_length=4
    )
    assert [ids.tolist() for ids in made["input_ids"]] == [[2, 10, 3], [2, 6, 7, 3]]
    assert made["labels"][:].tolist() == [0, 1]


def test_tagging_examples_by_hand(words: PreTrainedTokenizerFast) -> None:
    row = {"tokens": [["Reno,", "NV", "Reno"]], "tags": [[5, 8, 5]]}
    made = data.tagging_examples(Dataset.from_dict(row), words)[0]
    # [CLS] Re ##no , NV Re ##no [SEP]
    assert made["input_ids"].tolist() == [2, 6, 7, 8, 9, 6, 7, 3]
    assert made["labels"].tolist() == [-100, 5, -100, -100, 8, 5, -100, -100]


def _question(text: str, start: int) -> Dataset:
    answers = [{"text": [text], "answer_start": [start]}]
    return Dataset.from_dict({"question": ["who ?"], "context": ["Reno, NV"], "answers": answers})


@pytest.mark.parametrize(("text", "start", "first", "last"), [("Reno", 0, 4, 5), ("NV", 6, 7, 7)])
def test_qa_examples_by_hand(
    words: PreTrainedTokenizerFast, text: str, start: int, first: int, last: int
) -> None:
    made = data.qa_examples(_question(text, start), words)[0]
    # [CLS] who ? [SEP] Re ##no , NV [SEP]
    assert made["input_ids"].tolist() == [2, 4, 5, 3, 6, 7, 8, 9, 3]
    assert (int(made["start_positions"]), int(made["end_positions"])) == (first, last)
    assert made["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("text", "start", "message"),
    [
        ("Reno", 1, "'Reno' does not stand at character 1"),
        ("NV", 60, "'NV' does not stand at character 60"),
        ("", 0, "'' does not stand"),
        ("V", 7, "the tokens of 'V' cover 'NV' instead"),
        (" NV", 5, "no token where ' NV' starts"),
    ],
)
def test_qa_examples_refuse_a_wrong_place(
    words: PreTrainedTokenizerFast, text: str, start: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        data.qa_examples(_question(text, start), words)


def test_a_label_that_would_be_cut_is_refused(words: PreTrainedTokenizerFast) -> None:
    chat = Dataset.from_dict({"question": ["who ?", "who"], "answer": ["me", "Reno NV"]})
    tags = Dataset.from_dict({"tokens": [["Reno", "NV"]], "tags": [[1, 2]]})
    refuse = pytest.raises(ValueError, match=r"1 of 2 rows .* max_length=6 .* pass max_length=7")
    with refuse:
        data.chat_examples(chat, words, max_length=6)
    with pytest.raises(ValueError, match="pass max_length=5"):
        data.tagging_examples(tags, words, max_length=4)
    with pytest.raises(ValueError, match="pass max_length=9"):
        data.qa_examples(_question("NV", 6), words, max_length=8)
    assert len(data.chat_examples(chat, words, max_length=7)) == 2


@pytest.mark.filterwarnings("error")  # a warning would stand in the learner's notebook
def test_collators_pad_every_kind(words: PreTrainedTokenizerFast) -> None:
    chat = Dataset.from_dict({"question": ["who ?", "who"], "answer": ["me", "Reno NV"]})
    batch = DataCollatorForTokenClassification(words)(list(data.chat_examples(chat, words)))
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 7)
    assert batch["labels"][0, -1] == -100 and batch["attention_mask"][0, -1] == 0

    tags = Dataset.from_dict({"tokens": [["Reno", "NV"], ["NV"]], "tags": [[1, 2], [2]]})
    batch = DataCollatorForTokenClassification(words)(list(data.tagging_examples(tags, words)))
    assert batch["labels"].tolist() == [[-100, 1, -100, 2, -100], [-100, 2, -100, -100, -100]]

    text = Dataset.from_dict({"text": ["Reno", "me"], "label": [1, 0]})
    batch = DataCollatorWithPadding(words)(list(data.classification_examples(text, words)))
    assert batch["labels"].tolist() == [1, 0] and batch["input_ids"].shape == (2, 4)

    batch = DataCollatorWithPadding(words)(list(data.qa_examples(_question("NV", 6), words)) * 2)
    assert batch["start_positions"].tolist() == [7, 7]


# Token ids of the real tokenizers, on every row


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base_models.path("smollm2"))


@pytest.fixture(scope="module")
def minilm() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base_models.path("minilm"))


def test_chat_labels_decode_to_the_answer(smollm2: PreTrainedTokenizerBase) -> None:
    for split in load("trivia()").values():
        for source, row in zip(split, data.chat_examples(split, smollm2), strict=True):
            target = row["labels"][row["labels"] != data.IGNORED]
            assert smollm2.decode(target[:-1]) == source["answer"]
            assert target[-1] == smollm2.eos_token_id
            prompt = smollm2.decode(row["input_ids"][row["labels"] == data.IGNORED])
            assert prompt == data.chat_prompt(source["question"], smollm2)


def test_chat_examples_are_what_the_template_writes(smollm2: PreTrainedTokenizerBase) -> None:
    """Built from two pieces, they are the ids of the whole conversation up to the end of turn."""
    split = load("trivia()")["test"]
    for source, row in zip(split, data.chat_examples(split, smollm2), strict=True):
        turns = [("user", source["question"]), ("assistant", source["answer"])]
        whole = smollm2.apply_chat_template(
            [{"role": role, "content": text} for role, text in turns], tokenize=False
        )
        ids = smollm2(whole, add_special_tokens=False)["input_ids"]
        assert ids[: len(row["input_ids"])] == row["input_ids"].tolist()
        assert smollm2.decode(ids[len(row["input_ids"]) :]).strip() == ""


def test_tags_align_on_every_address(minilm: PreTrainedTokenizerBase) -> None:
    for split in load("addresses()").values():
        labels = data.tagging_examples(split, minilm)["labels"]
        for row, tags in zip(split, labels, strict=True):
            assert tags[tags != data.IGNORED].tolist() == row["tags"]


def test_positions_decode_to_every_answer(minilm: PreTrainedTokenizerBase) -> None:
    for split in load("address_questions()").values():
        for row, made in zip(split, data.qa_examples(split, minilm), strict=True):
            ids = made["input_ids"][made["start_positions"] : made["end_positions"] + 1]
            assert _bare(minilm.decode(ids)) == _bare(row["answers"]["text"][0])


def _bare(text: str) -> str:
    return re.sub(r"\s", "", text).lower()


# Speech


@pytest.fixture(scope="module")
def ears() -> WhisperProcessor:
    """A processor whose window is cut to two seconds."""
    folder = base_models.path("whisper")
    processor = WhisperProcessor.from_pretrained(folder)
    whisper = WhisperForConditionalGeneration.from_pretrained(folder)
    base_models.shorten_audio(whisper, processor, seconds=2)
    return processor


def test_speech_has_every_test_word_in_training() -> None:
    splits = load("speech()")
    words = {name: set(" ".join(part["text"]).split()) for name, part in splits.items()}
    assert words["test"] | words["validation"] <= words["train"]


def test_speech_labels_spell_the_text_and_end(ears: WhisperProcessor) -> None:
    rows = load("speech()")["validation"]
    made = data.speech_examples(rows, ears)
    assert made[0]["input_features"].shape == (80, 200)
    for text, labels in zip(rows["text"], made["labels"], strict=True):
        assert ears.decode(labels) == f"<|notimestamps|> {text}<|endoftext|>"


def test_speech_batch_masks_the_padding_and_keeps_the_end(ears: WhisperProcessor) -> None:
    rows = [
        {"input_features": torch.zeros(80, 200), "labels": torch.tensor([1, end])}
        for end in (2, ears.tokenizer.eos_token_id)
    ]
    rows[0]["labels"] = torch.tensor([1, 5, 6, ears.tokenizer.eos_token_id])
    batch = data.speech_batch(rows)
    end = ears.tokenizer.pad_token_id  # the same token
    assert batch["labels"].tolist() == [[1, 5, 6, end], [1, end, data.IGNORED, data.IGNORED]]
    assert batch["input_features"].shape == (2, 80, 200)


def test_speech_longer_than_the_window_is_refused(ears: WhisperProcessor) -> None:
    rows = Dataset.from_list([{"audio": [0.0] * 40_000, "text": "barn"}])
    with pytest.raises(ValueError, match=r"2\.50 seconds does not fit .* no less than 3 seconds"):
        data.speech_examples(rows, ears)
