"""What is asked of numbers and folders: kept as they are, or refused with what was given."""

import numpy as np
import pytest

from helpers import given, models


@pytest.mark.parametrize("number", [0, -1, True, 2.0, float("nan"), "8", None])
def test_what_is_no_whole_number_from_one_is_named(number) -> None:
    with pytest.raises(ValueError, match=f"rank must be a whole number .* was {number!r}"):
        given.whole("rank", number)


def test_a_whole_number_comes_back_as_one_that_json_takes() -> None:
    assert given.whole("rank", 8) == 8 and type(given.whole("rank", np.int64(8))) is int
    with pytest.raises(ValueError, match="from 1 to 4, but was 5"):
        given.whole("rank", 5, most=4)


@pytest.mark.parametrize("number", [-0.1, float("nan"), float("inf"), "8", None])
def test_what_is_no_finite_number_is_named(number) -> None:
    with pytest.raises(ValueError, match=f"rate must be a finite number .* was {number!r}"):
        given.number("rate", number, least=0)


def test_a_name_that_is_known_comes_back_and_another_is_named_with_the_nearest() -> None:
    assert given.one_of("task", "QA", {"LM": 1, "QA": 2}) == "QA"
    with pytest.raises(ValueError, match=r"^Unknown task 'qa'; did you mean 'QA'\? Known"):
        given.one_of("task", "qa", ("LM", "QA"))
    with pytest.raises(UnicodeError, match=r"^Unknown task None\. Known: LM, QA\.$"):
        given.one_of("task", None, ("LM", "QA"), UnicodeError)


def test_a_generator_starts_at_its_seed_or_refuses_it() -> None:
    assert given.generator(3).initial_seed() == 3
    with pytest.raises(ValueError, match="seed must be a whole number"):
        given.generator(2**70)


def test_a_folder_holds_a_whole_model_or_says_what_it_lacks(tmp_path) -> None:
    with pytest.raises(ValueError, match="is not there"):
        given.model_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        given.model_folder(tmp_path)
    models.tiny("llama").save_pretrained(tmp_path)
    assert given.model_folder(str(tmp_path)) == tmp_path
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="no model that can be loaded"):
        given.model_folder(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="no weights as safetensors"):
        given.model_folder(tmp_path)
