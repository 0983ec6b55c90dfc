"""What adapters do to a model, on plain models that are given the same numbers by hand.

The lessons look at peft's modules and attributes; here peft's outputs are held against a model
that never met peft, and its tables and sources are read instead of its objects.
"""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
import re
from collections.abc import Callable

import numpy as np
import peft
import torch
from own_rules import agrees
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import constants, peft_types
from safetensors.numpy import load_file
from torch import Tensor, nn
from transformers import DynamicCache

from helpers import claims, models

IDS = torch.arange(3, 15).reshape(2, 6)
QV = ["q_proj", "v_proj"]
RANKS = (1, 2, 4, 8, 16, 32, 64)


def llama() -> nn.Module:
    torch.manual_seed(0)
    return models.tiny("llama")


@torch.no_grad()
def logits(model: nn.Module, **inputs: object) -> Tensor:
    return model.eval()(**(inputs or {"input_ids": IDS})).logits


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def randomised(model: PeftModel, part: str, seed: int, spread: float = 0.5) -> PeftModel:
    """Random numbers in every trained tensor whose name has this part."""
    generator = torch.Generator().manual_seed(seed)
    found = [p for name, p in model.named_parameters() if part in name]
    assert found
    for parameter in found:
        parameter.normal_(std=spread, generator=generator)
    return model


def updates(model: PeftModel, adapter: str, factor: float) -> dict[str, np.ndarray]:
    """factor * B A of each module, from tensors by their names."""
    held = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return {
        name.removeprefix("base_model.model.").split(".lora_A")[0]: factor
        * held[name.replace("lora_A", "lora_B")]
        @ a
        for name, a in held.items()
        if f"lora_A.{adapter}." in name
    }


@torch.no_grad()
def moved(*changes: dict[str, np.ndarray]) -> nn.Module:
    """A plain model with these updates added to its weights."""
    plain = llama()
    for name, update in itertools.chain.from_iterable(change.items() for change in changes):
        plain.get_submodule(name).weight += torch.from_numpy(update)
    return plain


def three_adapters(names: tuple[str, ...] = ("one", "two", "three")) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=QV)
    model = get_peft_model(llama(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for seed, name in enumerate(names):
        randomised(model, f"lora_B.{name}.", seed)
    return model


# -------------------------------------------------------------------------------- LoRA


def test_c004_switching_and_merging():
    """Each adapter against a plain model with that adapter's update in its weights."""
    model = three_adapters()
    plain = {name: logits(moved(updates(model, name, 8 / 4))) for name in ("one", "two", "three")}
    seen = {}
    for name in plain:
        model.set_adapter(name)
        seen[name] = logits(model)
    model.set_adapter("one")
    back, distinct = logits(model), [logits(llama()), *plain.values()]
    agrees(
        "C004",
        {
            "each adapter gives its own logits": all(near(seen[n], plain[n]) for n in plain)
            and not any(near(a, b) for a, b in itertools.combinations(distinct, 2)),
            "switching back restores the logits": near(back, plain["one"]),
            "merging keeps the logits": near(logits(model.merge_and_unload()), plain["one"]),
        },
    )


def test_c008_a_product_of_two_low_rank_matrices(tmp_path):
    """From the saved file in NumPy, with no layer of peft or of the course."""
    model = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=QV))
    randomised(model, "lora_B", 0).save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    plain = llama().state_dict()
    merged = model.merge_and_unload().state_dict()
    same, ranks = [], []
    for name in (n for n in file if "lora_A" in n):
        weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
        update = merged[weight].numpy() - plain[weight].numpy()
        product = 2.0 * file[name.replace("lora_A", "lora_B")] @ file[name]
        same.append(np.abs(update - product).max() <= 1e-6)
        ranks.append(np.linalg.matrix_rank(update, tol=1e-5 * np.linalg.norm(update, 2)))
    assert len(same) == 4
    agrees(
        "C008",
        {
            "merged - base = scaling * B @ A": all(same),
            "its rank is at most r": max(ranks) <= 4,
        },
    )


@torch.no_grad()
def measured_factor(**options: object) -> float:
    """By how much a layer multiplies B A x: the factor is read off its output."""
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    nn.init.zeros_(layer[0].weight)
    model = get_peft_model(layer, LoraConfig(target_modules=["0"], **options))
    for parameter in model.parameters():
        parameter.fill_(0.5)
    model.base_model.model[0].base_layer.weight.zero_()
    x = torch.ones(1, 64)
    by_hand = 64 * 0.5 * options["r"] * 0.5  # A x has r equal entries, and B adds them up
    return float(model(x)[0, 0]) / by_hand


def test_c033_rslora_divides_by_the_root():
    found = [measured_factor(r=r, lora_alpha=16, use_rslora=True) for r in RANKS]
    agrees("C033", bool(np.allclose(found, 16 / np.sqrt(RANKS), rtol=1e-5)))


def test_c044_lora_divides_by_the_rank():
    grid = [(r, alpha) for r in RANKS for alpha in (r, 2 * r, 16)]
    found = [measured_factor(r=r, lora_alpha=alpha) for r, alpha in grid]
    agrees("C044", bool(np.allclose(found, [alpha / r for r, alpha in grid], rtol=1e-5)))


def update_after(steps: int, rank: int, factor: float, seed: int) -> float:
    """Norm of factor * B A after steps of Adam on a least-squares problem, all in NumPy."""
    random = np.random.default_rng(seed)
    x, y = random.standard_normal((64, 64)), random.standard_normal((64, 64))
    a = random.uniform(-1 / 8, 1 / 8, (rank, 64))
    b = np.zeros((64, rank))
    state = [[np.zeros_like(w), np.zeros_like(w)] for w in (a, b)]
    for step in range(1, steps + 1):
        gradient = 2 * (factor * b @ a @ x - y) @ x.T / y.size
        gradients = (factor * b.T @ gradient, factor * gradient @ a.T)
        for weight, grad, moments in zip((a, b), gradients, state, strict=True):
            moments[0] = 0.9 * moments[0] + 0.1 * grad
            moments[1] = 0.999 * moments[1] + 0.001 * grad**2
            first, second = moments[0] / (1 - 0.9**step), moments[1] / (1 - 0.999**step)
            weight -= 1e-3 * first / (np.sqrt(second) + 1e-8)
    return float(np.linalg.norm(factor * b @ a))


def test_c047_rslora_lowers_the_rate_as_the_rank_grows():
    rooted, plain = 16 / np.sqrt(RANKS), 16 / np.array(RANKS)
    norms = [
        np.mean([update_after(5, rank, factor, seed) for seed in range(3)])
        for rank, factor in zip(RANKS, rooted, strict=True)
    ]
    agrees(
        "C047",
        {
            "the factor falls as r grows": bool((np.diff(rooted) < 0).all()),
            "it is lower than plain alpha / r at the same alpha": bool((rooted <= plain).all()),
            "the update becomes smaller as r grows": bool(norms[-1] < norms[0]),
        },
    )


def test_c117_replicated_layers():
    """A plain stack of copies in the order that the note gives has the outputs of peft's."""
    config = llama().config
    config.num_hidden_layers = 5
    torch.manual_seed(0)
    five = type(llama())(config).eval()
    short, tall = logits(five), copy.deepcopy(five)
    order = [0, 1, 2, 3, 2, 3, 4]
    tall.model.layers = nn.ModuleList(copy.deepcopy(five.model.layers[i]) for i in order)
    tall.config.num_hidden_layers = len(order)
    for place, layer in enumerate(tall.model.layers):
        layer.self_attn.layer_idx = place
    replicated = logits(get_peft_model(five, LoraConfig(layer_replication=[[0, 4], [2, 5]], r=16)))
    assert not near(replicated, short)
    agrees("C117", near(replicated, logits(tall)))


def test_c153_a_list_of_adapters_adds_their_updates():
    """Against a plain model with both updates in its weights; the lesson compares states."""
    model = three_adapters()
    model.base_model.set_adapter(["one", "two"])
    found = logits(model)
    first, second = (updates(model, name, 8 / 4) for name in ("one", "two"))
    one, two, both = logits(moved(first)), logits(moved(second)), logits(moved(first, second))
    own = all(near(found[i], one[i]) or near(found[i], two[i]) for i in range(len(IDS)))
    agrees(
        "C153",
        {
            "each row gets one adapter": own,
            "each row gets the sum of both updates": near(found, both),
        },
    )


def test_c098_dora_splits_magnitude_and_direction():
    """On a tiny Llama, with the formula of the paper in NumPy."""
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=QV,
        lora_dropout=0.05,
        task_type="CAUSAL_LM",
        use_dora=True,
    )
    model = get_peft_model(llama(), config)
    started = logits(model)
    layers = [m for m in model.modules() if hasattr(m, "lora_magnitude_vector") and m.lora_A]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    pieces = {n.split("self_attn.")[1].split(".")[1] for n in trained}
    weights = [layer.base_layer.weight.detach().numpy() for layer in layers]
    lengths = [np.sqrt((w.astype(np.float64) ** 2).sum(1)) for w in weights]
    magnitudes = [m.lora_magnitude_vector["default"].weight.detach().numpy().copy() for m in layers]
    randomised(model, "lora_B", 0, spread=0.05)
    by_hand = []
    for layer, weight, length in zip(layers, weights, lengths, strict=True):
        turned = (
            weight
            + 2.0
            * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().numpy()
        )
        by_hand.append(length[:, None] * turned / np.linalg.norm(turned, axis=1, keepdims=True))
    model.merge_and_unload()
    merged = [m.get_base_layer().weight.detach().numpy() for m in layers]
    for mine, theirs, weight in zip(by_hand, merged, weights, strict=True):
        np.testing.assert_allclose(theirs, mine, atol=1e-5)
        assert np.abs(mine - weight).max() > 1e-3
    start = [np.allclose(m, n, rtol=1e-5) for m, n in zip(magnitudes, lengths, strict=True)]
    kept = [
        np.allclose(np.linalg.norm(m, axis=1), n, rtol=1e-4)
        for m, n in zip(merged, lengths, strict=True)
    ]
    agrees(
        "C098",
        {
            "the snippet runs": len(layers) == 4,
            "A, B and a magnitude train in each target": len(trained) == 12
            and pieces == {"lora_A", "lora_B", "lora_magnitude_vector"},
            "the magnitude starts as the lengths of the weight's rows": all(start),
            "the wrapped model starts as the plain one": near(started, logits(llama())),
            "with the magnitude at its start no row changes its length": all(kept),
        },
    )


# -------------------------------------------------------------------------------- prompts, IA3


def prompted(
    config: PrefixTuningConfig | PromptTuningConfig, part: str
) -> tuple[PeftModel, Tensor]:
    model = randomised(get_peft_model(llama(), config), part, 0).eval()
    (table,) = [p for n, p in model.named_parameters() if part in n]
    return model, table.detach()


def cache(table: Tensor, rows: int) -> DynamicCache:
    """The rows of a prefix as keys and values: token, layer, key or value, head, width."""
    config = llama().config
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    parts = table.reshape(len(table), layers, 2, heads, -1).permute(1, 2, 3, 0, 4)
    found = DynamicCache()
    for layer, (key, value) in enumerate(parts):
        found.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
    return found


@torch.no_grad()
def greedy(step: Callable[[Tensor], Tensor], words: int) -> Tensor:
    ids = IDS
    for _ in range(words):
        ids = torch.cat([ids, step(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


def test_c010_prefixes_in_every_layer():
    """A plain model with the prefixes in its cache, layer by layer, and a loop that writes."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model, table = prompted(config, "prompt_encoder")
    plain = llama()

    def step(ids: Tensor) -> Tensor:
        mask = torch.ones(len(ids), 5 + ids.shape[1])
        return plain(
            input_ids=ids, attention_mask=mask, past_key_values=cache(table, len(ids))
        ).logits

    with torch.no_grad():
        same = near(logits(model), step(IDS)) and not near(logits(model), logits(plain))
    written = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    agrees(
        "C010",
        {
            "every layer has a key and a value prefix": same,
            "only the prefixes train": len(trained) == 1 and trained[0].shape == table.shape,
            "generate runs": torch.equal(written, greedy(step, 3)),
        },
    )


def test_c012_prompts_at_the_input():
    """A plain model that reads the prompt's rows before the words' embeddings."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model, table = prompted(config, "prompt_encoder")
    plain = llama()
    words = plain.get_input_embeddings()(IDS).detach()
    joined = torch.cat([table.expand(len(IDS), -1, -1), words], dim=1)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = logits(model)
    agrees(
        "C012",
        {
            "virtual tokens x hidden size numbers train": trained == 5 * words.shape[-1],
            "the prompt lengthens the input": near(found, logits(plain, inputs_embeds=joined))
            and found.shape[1] == 5 + IDS.shape[1],
        },
    )


def test_c014_ia3_rescales():
    """A plain model whose weights are rescaled by hand: rows of k and v, columns of down."""
    model = randomised(get_peft_model(llama(), IA3Config(task_type="CAUSAL_LM")), "ia3_l", 0)
    plain = llama()
    vectors = {n: p.detach().flatten() for n, p in model.named_parameters() if "ia3_l" in n}
    with torch.no_grad():
        for name, vector in vectors.items():
            layer = name.removeprefix("base_model.model.").split(".ia3_l")[0]
            weight = plain.get_submodule(layer).weight
            weight *= vector[None] if "down_proj" in layer else vector[:, None]
    targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING["llama"]
    inside = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING["llama"]
    before, by_hand = logits(model), logits(plain)
    reached = set(targets) == {"k_proj", "v_proj", "down_proj"} and inside == ["down_proj"]
    text = " ".join(inspect.getdoc(peft.IA3Model).split())
    (called,) = re.findall(r"Infused Adapter by [\w ]+", text)[:1]
    agrees(
        "C014",
        {
            "keys, values and feed-forward are rescaled": reached and near(before, by_hand),
            "merging keeps the logits": near(logits(model.merge_and_unload()), by_hand),
            "the name is the one peft gives": "Inhibited and Amplified Inner Activations" in called,
        },
    )


# -------------------------------------------------------------------------------- tables, sources


def members(of: type) -> set[str]:
    """Names that a class body gives values or types to, from its source."""
    (body,) = ast.parse(inspect.getsource(of)).body
    plain = {t.id for n in body.body if isinstance(n, ast.Assign) for t in n.targets}
    return plain | {n.target.id for n in body.body if isinstance(n, ast.AnnAssign)}


def test_c011_p_tuning_version_2():
    """The table of configurations, and the encoder that is built without a model."""
    from peft.tuners.prefix_tuning import PrefixEncoder

    names = [str(kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
    names += [config.__name__ for config in PEFT_TYPE_TO_CONFIG_MAPPING.values()]
    encoder = PrefixEncoder(
        PrefixTuningConfig(
            num_virtual_tokens=5, token_dim=16, num_layers=2, prefix_projection=False
        )
    )
    (table,) = encoder.parameters()
    encoder(torch.arange(5)).sum().backward()
    agrees(
        "C011",
        {
            "peft has a class or type of that name": any("v2" in name.lower() for name in names),
            "deep prompts without reparameterisation train": table.shape == (5, 2 * 2 * 16)
            and bool((table.grad == 1).all()),
        },
    )


def test_c015_dora_is_an_option_of_lora():
    names = [str(kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
    names += [config.__name__ for config in PEFT_TYPE_TO_CONFIG_MAPPING.values()]
    assert "use_dora" in members(LoraConfig)
    agrees(
        "C015", {"a config class or PeftType of its own": any("dora" in n.lower() for n in names)}
    )


def test_c020_the_task_types():
    """From the source and from the table of model classes, where the lesson lists the enum."""
    from peft.mapping_func import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    named = members(peft_types.TaskType)
    assert {str(getattr(kind, "value", kind)) for kind in MODEL_TYPE_TO_PEFT_MODEL_MAPPING} == named
    note = "CAUSAL_LM SEQ_2_SEQ_LM SEQ_CLS TOKEN_CLS QUESTION_ANS FEATURE_EXTRACTION"
    agrees("C020", named == set(note.split()))


def test_c027_the_options_of_lora():
    """Counted in the source, where the other test counts fields."""
    # LoraConfig inherits task_type; the note's snippet shows it among the options
    found = len(members(LoraConfig) | {"task_type"})
    assert f"{found} options" == claims.find("C027").measured
    agrees("C027", found == 12)
