"""What the note's code does on the stand-in, and what it would cost on published models."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file

from helpers import adapters, merging, models
from helpers.arr_coc import full_size, note, world
from helpers.arr_coc.model import ArrCoc, ArrCocConfig
from helpers.arr_coc.selectors import MODULES
from helpers.merging import exact
from helpers.quantization import HEADS

GIVEN = world.scenes(8, seed=0)
ASKED = {"images": GIVEN.images, "questions": GIVEN.questions}
BATCH = ASKED | {"answers": GIVEN.answers}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("arr-coc") / "base"
    ArrCoc(ArrCocConfig()).save_pretrained(path)
    return path


@pytest.fixture
def wrapped(folder) -> PeftModel:
    return get_peft_model(ArrCoc.from_pretrained(folder), note.config())


def gradless(model: PeftModel) -> set[str]:
    """What trains and gets no gradient."""
    model.train()(**BATCH).loss.backward()
    return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}


def test_the_mended_configuration_trains_all_of_the_modules_and_the_decoder_alone(wrapped):
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    lora = {name for name in trained if "lora_" in name}
    assert all("language_model" in name for name in lora)
    assert len(lora) == 2 * len(note.LAYERS) * 3  # A and B in three layers
    inside = sum(
        p.numel() for n in MODULES for p in getattr(ArrCoc(ArrCocConfig()), n).parameters()
    )
    numbers = dict(wrapped.named_parameters())
    assert sum(numbers[name].numel() for name in trained - lora) == inside
    assert not gradless(wrapped)


def test_the_list_of_the_note_matches_nothing(folder):
    config = note.config()
    config.target_modules = {"language_model.*.self_attn.q_proj"}
    with pytest.raises(ValueError, match="No modules were targeted"):
        get_peft_model(ArrCoc.from_pretrained(folder), config)


def test_names_that_are_not_there_train_nothing_and_are_found(folder):
    config = LoraConfig(target_modules=note.DECODER, modules_to_save=["balancer"])
    model = get_peft_model(ArrCoc.from_pretrained(folder), config)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    codes = [finding.code for finding in adapters.inspect(model).findings]
    assert codes == ["modules-to-save-not-found"]  # also for a class that Auto does not know


def test_the_loop_wakes_copies_that_get_no_gradient(wrapped):
    for name, parameter in wrapped.named_parameters():
        if any(part in name for part in MODULES):
            parameter.requires_grad = True
    dead = gradless(wrapped)
    assert dead and all(".original_module." in name for name in dead)


@pytest.mark.parametrize("kept", [note.KEPT, HEADS])
def test_what_is_kept_out_of_four_bits(folder, kept):
    model = note.in_four_bits(folder, kept=kept)
    packed = {name for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    assert {name.split(".")[0] for name in packed} >= {"language_model"}
    assert ("balancing.decide.0" in packed) == (kept == HEADS)
    assert any(name.startswith("vision") for name in packed) == (kept == HEADS)


def in_four_bits(folder: Path, **settings) -> PeftModel:
    base = note.in_four_bits(folder, **settings)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return get_peft_model(base, note.config())


def test_modules_kept_out_train_on_a_base_in_four_bits(folder):
    assert not gradless(in_four_bits(folder))


def test_packed_modules_are_refused_or_silently_not_trained(folder):
    with pytest.raises(RuntimeError, match="floating point"):
        in_four_bits(folder, kept=HEADS)
    dead = gradless(in_four_bits(folder, kept=HEADS, storage=torch.bfloat16))
    assert dead and all(".balancing.modules_to_save." in name for name in dead)


SCRIPT = """
import sys
sys.modules["peft"] = None
import torch
from safetensors.torch import load_file, save_file
from helpers.arr_coc.model import ArrCoc
model = ArrCoc.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(sys.argv[2])).logits}, sys.argv[3])
"""


def test_merged_with_its_modules_it_answers_alike_without_peft(folder, tmp_path):
    model = exact.disturbed(in_four_bits(folder), seed=0, size=0.05).eval()
    done = merging.merge_for_deployment(model, tmp_path / "out", batch=ASKED)
    assert done.route == "dequantised"
    with pytest.raises(merging.MergeRefused, match="another base"):
        merging.merge_for_deployment(model, tmp_path / "other", batch=ASKED, route="full precision")
    save_file(ASKED, tmp_path / "asked")
    places = [str(tmp_path / name) for name in ("out", "asked", "logits")]
    subprocess.run([sys.executable, "-c", SCRIPT, *places], check=True)
    logits = load_file(tmp_path / "logits")["logits"]
    assert torch.allclose(logits, exact.output(model, ASKED), atol=1e-4)


def test_saved_and_loaded_the_modules_are_the_trained_ones(folder, wrapped, tmp_path):
    exact.disturbed(wrapped, seed=0).save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(ArrCoc.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(exact.output(again.eval(), ASKED), exact.output(wrapped.eval(), ASKED))
    bare = copy.deepcopy(wrapped).unload().eval()
    assert not torch.equal(exact.output(bare, ASKED), exact.output(wrapped, ASKED))


def test_costs_of_a_published_model_by_hand():
    cost = full_size.cost("llava-1.5-7b", rank=32)
    wide, inner, layers = 4096, 11008, 32
    assert cost.attention == layers * 4 * wide * wide
    assert cost.mlp == layers * 3 * wide * inner
    assert cost.lora_attention == layers * 3 * 32 * 2 * wide
    assert cost.lora_mlp == layers * 3 * 32 * (wide + inner)
    knowing = 13 * 32 + 32 + 32 * wide + wide + 3 + 1
    balancing = (9 + wide) * 32 + 32 + 32 * 6 + 6
    attending = 2 * wide + 1
    assert cost.modules == knowing + balancing + attending
    assert cost.optimizer == 8 * (cost.lora + cost.modules)
    assert cost.base_16_bits == 2 * models.full_size("llava-1.5-7b").num_parameters()
    assert cost.base_16_bits / 4 < cost.base_4_bits < cost.base_16_bits / 3


def test_the_repository_s_layers_at_the_width_of_its_model():
    # 134,016 + 280,323, counted in the repository's own code
    layers = full_size.as_in_the_repository(2048)
    assert sum(p.numel() for p in layers.parameters()) == 414_339


def test_peft_compares_the_end_of_a_name_only():
    net = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("unknowing", "up_proj")})
    config = LoraConfig(target_modules=["up_proj"], modules_to_save=["knowing"])
    trained = [n for n, p in get_peft_model(net, config).named_parameters() if p.requires_grad]
    assert any("unknowing.modules_to_save" in name for name in trained)
