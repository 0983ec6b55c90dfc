"""Many adapters on one base: bytes, names, and a swap while requests run."""

from threading import Thread

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

from helpers import models
from helpers.adapters.files import AdapterFileError
from helpers.merging.many import LiveAdapter, SwapError, ambiguous_names, memory

IDS = torch.arange(3, 19).reshape(2, 8)


def base(arch="llama"):
    torch.manual_seed(0)
    return models.tiny(arch)


def settings(**extra):
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return LoraConfig(**(chosen | {"init_lora_weights": False} | extra))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture
def stored(tmp_path):
    """Writes an adapter of a tiny Llama and returns its folder."""

    def write(name, seed=0, config=None):
        model = base()
        torch.manual_seed(seed + 1)
        get_peft_model(model, config or settings()).save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


def served(folder, name="default"):
    return PeftModel.from_pretrained(base(), folder, adapter_name=name).eval()


# ------------------------------------------------------------------------------------- memory


def test_bytes_of_ten_adapters_by_hand():
    plain = base()
    wanted = sum(p.nbytes for p in plain.parameters()) + sum(b.nbytes for b in plain.buffers())
    model = get_peft_model(plain, settings(), adapter_name="task0")
    for number in range(1, 10):
        model.add_adapter(f"task{number}", settings())
    found = memory(model)
    # two layers; q: 4 x (32 + 32) numbers, v: 4 x (32 + its outputs)
    v = plain.config.num_key_value_heads * plain.config.head_dim
    assert found.base == wanted
    assert found.adapters == {f"task{n}": 2 * 4 * 4 * (64 + 32 + v) for n in range(10)}
    assert found.together == wanted + sum(found.adapters.values())
    assert found.merged == 10 * wanted


def test_the_meta_device_and_tied_weights_count_alike():
    with torch.device("meta"):
        shapes = memory(get_peft_model(models.tiny("gpt2"), LoraConfig(target_modules=["c_attn"])))
    real = memory(get_peft_model(base("gpt2"), LoraConfig(target_modules=["c_attn"])))
    assert shapes == real
    plain = base("gpt2")  # its embedding and head are one tensor
    assert real.base == sum(t.nbytes for t in [*plain.parameters(), *plain.buffers()])


def test_memory_refuses_what_it_cannot_count():
    with pytest.raises(TypeError, match="has none"):
        memory(base())
    model = get_peft_model(base(), settings(), adapter_name="one")
    model.add_adapter("1", settings())
    assert ambiguous_names(model) == ["1"]
    with pytest.raises(ValueError, match="called '1'"):
        memory(model)


# --------------------------------------------------------------------------------------- swap

FITS = [
    {},
    {"lora_alpha": 32},
    {"r": 8, "lora_alpha": 4},
    {"r": 2},
    {"target_modules": ["q_proj"]},
    {"layers_to_transform": [1]},
]


@pytest.mark.parametrize("extra", FITS, ids=str)
def test_a_swap_gives_the_new_adapter_and_the_model_can_be_saved(extra, stored, tmp_path):
    new = stored("new", 1, settings(**extra))
    live = LiveAdapter(served(stored("old")))
    live.swap(new)
    wanted = logits(served(new))
    assert torch.allclose(live(input_ids=IDS).logits, wanted, atol=1e-6)
    live.model.save_pretrained(tmp_path / "again")
    assert torch.allclose(logits(served(tmp_path / "again")), wanted, atol=1e-6)


def test_a_smaller_rank_under_rslora_can_be_saved_too(stored, tmp_path):
    new = stored("new", 1, settings(r=1, use_rslora=True))
    live = LiveAdapter(served(stored("old", 0, settings(use_rslora=True))))
    live.swap(new)
    live.model.save_pretrained(tmp_path / "again")
    assert torch.allclose(logits(served(tmp_path / "again")), logits(served(new)), atol=1e-6)


def test_pefts_own_swap_leaves_settings_that_do_not_fit(stored, tmp_path):
    new = stored("new", 1, settings(lora_alpha=32))
    model = served(stored("old"))
    hotswap_adapter(model, new, "default", torch_device="cpu")
    model.save_pretrained(tmp_path / "again")
    assert not torch.allclose(logits(served(tmp_path / "again")), logits(model), atol=1e-3)


REFUSED = {
    "k_proj, which the old one does not": settings(target_modules=["q_proj", "k_proj"]),
    "use_dora=True": settings(use_dora=True),
    "use_rslora=True": settings(use_rslora=True),
    "has rank_pattern": settings(rank_pattern={"v_proj": 2}),
    "has alpha_pattern": settings(alpha_pattern={"v_proj": 2}),
    "has modules_to_save": settings(modules_to_save=["lm_head"]),
    "has lora_bias": settings(lora_bias=True),
    "has bias": settings(bias="all"),
    "has trainable_token_indices": settings(trainable_token_indices=[3]),
    "only LoRA": IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_fit_is_refused_and_the_old_one_stays(reason, stored):
    new = stored("new", 1, REFUSED[reason])
    live = LiveAdapter(served(stored("old")))
    before = live(input_ids=IDS).logits
    with pytest.raises(SwapError, match=reason):
        live.swap(new)
    assert torch.equal(live(input_ids=IDS).logits, before)


def test_pefts_own_swap_gets_a_rank_pattern_wrong(stored):
    new = stored("new", 1, settings(rank_pattern={"v_proj": 2}))
    model = served(stored("old"))
    hotswap_adapter(model, new, "default", torch_device="cpu")
    assert not torch.allclose(logits(model), logits(served(new)), atol=1e-3)


def test_an_adapter_of_another_base_is_refused(stored, tmp_path):
    config = base().config
    config.hidden_size, config.head_dim = 16, 4
    get_peft_model(type(base())(config), settings()).save_pretrained(tmp_path / "narrow")
    live = LiveAdapter(served(stored("old")))
    with pytest.raises(SwapError, match="made for another base"):
        live.swap(tmp_path / "narrow")


def test_a_damaged_or_missing_file_leaves_the_old_one(stored, tmp_path):
    new = stored("new", 1)
    file = new / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    live = LiveAdapter(served(stored("old")))
    before = live(input_ids=IDS).logits
    for folder in (new, tmp_path / "nowhere"):
        with pytest.raises(AdapterFileError):
            live.swap(folder)
    assert torch.equal(live(input_ids=IDS).logits, before)


def test_peft_empties_an_adapter_whose_name_contains_the_swapped_one(stored):
    new = stored("new", 1)
    model = served(stored("old"), "task1")
    model.load_adapter(new, "task10")
    with pytest.raises(SwapError, match="the adapter 'task10' for 'task1'"):
        LiveAdapter(model, "task1").swap(new)
    hotswap_adapter(model, new, "task1", torch_device="cpu")
    model.set_adapter("task10")
    with_it = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), with_it)  # nothing is left of it


def test_other_names_are_left_alone(stored):
    new = stored("new", 1)
    model = served(stored("old"), "task1")
    model.load_adapter(new, "task2")
    model.set_adapter("task2")
    before = logits(model)
    LiveAdapter(model, "task1").swap(new)
    model.set_adapter("task2")
    assert torch.equal(logits(model), before)


def test_wrong_names_and_merged_weights(stored):
    with pytest.raises(SwapError, match="no adapter 'one'; adapters of the model: none"):
        LiveAdapter(base(), "one")
    model = served(stored("old"), "1")
    with pytest.raises(SwapError, match="a part of the model"):
        LiveAdapter(model, "1").swap(stored("new", 1))
    model = served(stored("old"))
    live = LiveAdapter(model)
    model.merge_adapter()
    with pytest.raises(SwapError, match="unmerge_adapter"):
        live.swap(stored("new", 1))


def test_serving_asks_for_no_gradient(stored):
    live = LiveAdapter(served(stored("old")))
    live.swap(stored("new", 1))
    assert not any(p.requires_grad for p in live.model.parameters())
    assert not live(input_ids=IDS).logits.requires_grad


def test_a_request_in_the_middle_of_pefts_swap_gets_neither(stored):
    folders = [stored("old"), stored("new", 1)]
    old, new = (logits(served(folder)) for folder in folders)
    model = served(folders[0])
    second = model.get_base_model().model.layers[1]
    hook = second.register_forward_pre_hook(
        lambda *_: hotswap_adapter(model, folders[1], "default", torch_device="cpu")
    )
    during = logits(model)
    hook.remove()
    assert not torch.allclose(during, old, atol=1e-4)
    assert not torch.allclose(during, new, atol=1e-4)


def test_requests_and_swaps_wait_for_each_other(stored):
    folders = [stored("old"), stored("new", 1)]
    wanted = [logits(served(folder)) for folder in folders]
    live = LiveAdapter(served(folders[0]))
    swaps = Thread(target=lambda: [live.swap(folders[i % 2]) for i in range(1, 16)])
    swaps.start()
    answers = []
    while swaps.is_alive():
        answers.append(live(input_ids=IDS).logits)
    swaps.join()
    assert answers
    for answer in answers:
        assert any(torch.allclose(answer, one, atol=1e-6) for one in wanted)
