"""The model of pretrained parts: questions, processor, stored file, training."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers import data, vlm
from helpers.assets import AssetError
from helpers.data import IGNORED
from helpers.vlm import __main__ as command
from helpers.vlm import train
from helpers.vlm.questions import right_blank


@pytest.fixture(scope="module")
def model():
    """A wrapped model of two decoder layers with a connector that has seen the patches."""
    torch.manual_seed(0)
    return vlm.with_lora(vlm.untrained(layers=2)).eval()


@pytest.fixture(scope="module")
def test_rows() -> vlm.Questions:
    return vlm.questions("test")


def test_cached_patches_give_the_whole_models_logits(model, test_rows: vlm.Questions) -> None:
    which = [0, 700, 4004]  # of unlike lengths: padding on the left must not matter
    rows = data.easy_vqa()["test"].select(which)
    batch = vlm.inputs(list(rows["image"]), list(rows["question"]))
    with torch.no_grad():
        whole = model(**batch).logits[:, -1, vlm.answer_tokens()]
        cached = vlm.answer_logits(model, test_rows.rows(torch.tensor(which)))
        blank = vlm.answer_logits(model, test_rows.rows(torch.tensor(which)).blank())
    assert torch.allclose(whole, cached, atol=1e-4)
    assert not torch.allclose(whole, blank, atol=1e-2)


def test_the_processor_writes_nine_places_for_an_image() -> None:
    image = Image.new("RGB", (64, 64), "red")
    batch = vlm.inputs([image, image], ["what?", "what shape is in the image?"])
    places = vlm.tokenizer().convert_tokens_to_ids(vlm.IMAGE_TOKEN)
    assert (batch["input_ids"] == places).sum(1).tolist() == [vlm.IMAGE_TOKENS] * 2 == [9, 9]
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][:, -1].all()
    assert batch["pixel_values"].shape == (2, 3, 84, 84)


def test_the_collators_loss_is_that_of_the_answers_token(model) -> None:
    image = Image.new("RGB", (64, 64), "teal")
    rows = [{"image": image, "question": "What color?", "answer": a} for a in ("teal", "red")]
    batch = vlm.collate(rows)
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [1, 1]
    given = vlm.inputs([image] * 2, ["What color?"] * 2)
    with torch.no_grad():
        logits = model(**given).logits[:, -1]
        wanted = torch.nn.functional.cross_entropy(logits, batch["labels"][:, -1])
        assert torch.allclose(model(**batch).loss, wanted, atol=1e-4)


def test_a_question_is_worth_nothing_on_balanced_rows(test_rows: vlm.Questions) -> None:
    balanced, everything = test_rows.of("yes/no").balanced(), test_rows.of("yes/no")
    counts = Counter(zip(balanced.text.tolist(), balanced.answer.tolist(), strict=True))
    for text in set(balanced.text.tolist()):
        assert counts[text, 0] == counts[text, 1] > 0
    assert vlm.question_only(vlm.questions("train"), balanced) == 0.5
    assert vlm.question_only(vlm.questions("train"), everything) > 0.8


def test_splits_ask_the_same_texts_under_the_same_numbers() -> None:
    texts = [sorted(set(data.easy_vqa()[split]["question"])) for split in ("train", "test")]
    assert texts[0] == texts[1] and len(texts[0]) == 107


def test_blank_images_are_asked_once_for_each_text(model, test_rows: vlm.Questions) -> None:
    given = test_rows.rows(torch.arange(0, 600, 20))
    short = right_blank(model, given)
    assert torch.equal(short, vlm.right(model, given.blank()))


def test_rows_are_drawn_in_their_shares_and_evenly_within_a_text() -> None:
    given = vlm.questions("train")
    cycle = train.Cycle(steps=600, yes_no=0.6)
    drawn = torch.cat(train.drawn(given, cycle, seed=1))
    kinds = Counter(data.QUESTION_TYPES[k] for k in given.kind[drawn].tolist())
    for kind, share in {"yes/no": 0.6, "shape": 0.2, "colour": 0.2}.items():
        assert abs(kinds[kind] / len(drawn) - share) < 0.02
    yes_no = given.rows(drawn).of("yes/no")
    assert abs((yes_no.answer == 0).float().mean() - 0.5) < 0.02
    assert torch.equal(drawn, torch.cat(train.drawn(given, cycle, seed=1)))


def test_connector_and_lora_have_their_own_rate(model) -> None:
    groups = train.parameter_groups(model)
    assert [group["lr"] for group in groups] == [train.CONNECTOR_RATE, train.LORA_RATE]
    assert sum(w.numel() for w in groups[0]["params"]) == 384 * 576 + 576 * 576 + 2 * 576
    trained = [w for w in model.parameters() if w.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained)


def test_the_stored_file_gives_the_model_again(tmp_path: Path, test_rows) -> None:
    torch.manual_seed(3)
    model = vlm.with_lora(vlm.untrained())
    model.get_base_model().model.multi_modal_projector.standardise(test_rows.pooled)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    file = tmp_path / "vlm" / "some.safetensors"
    vlm.store(model, {"seed": 3}, file)
    again, given = vlm.trained(file), test_rows.rows(torch.arange(3))
    with torch.no_grad():
        wanted, found = vlm.answer_logits(model.eval(), given), vlm.answer_logits(again, given)
    assert torch.allclose(wanted, found, atol=0.05) and vlm.about(file) == {"seed": 3}
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    weights = load_file(file)
    weights.pop(next(iter(weights)))
    save_file(weights, file)
    with pytest.raises(AssetError, match="not made for this model"):
        vlm.trained(file)


def test_a_missing_file_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="python -m helpers.vlm"):
        vlm.trained(tmp_path / "none.safetensors")


def test_the_stored_model_keeps_what_it_claims() -> None:
    """On a few questions, well above its controls; the whole test set is in the file."""
    stored, model = vlm.about()["test"], vlm.trained()
    given = {n: q.rows(torch.arange(80)) for n, q in vlm.subsets(vlm.questions("test")).items()}
    for name, rows in given.items():
        measured = vlm.right(model, rows).float().mean().item()
        assert abs(measured - stored[name]["model"]) < 0.12, name
    for name, least in {"shape": 0.97, "colour": 0.94, "yes/no, balanced": 0.9}.items():
        assert stored[name]["model"] >= least > stored[name]["blank image"] + 0.35
    cycles = [(cycle["steps"], cycle["yes_no"]) for cycle in vlm.about()["cycles"]]
    assert cycles == [(cycle.steps, cycle.yes_no) for cycle in train.CYCLES]
    assert vlm.FILE.stat().st_size < 8e6


def test_the_command_refuses_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--score", "--out", str(tmp_path / "none.safetensors")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_stop_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "kept.safetensors"
    file.write_bytes(b"as before")
    monkeypatch.setattr(command, "train", stopped)
    assert command.main(["--out", str(file)]) == 130
    assert file.read_bytes() == b"as before"
