"""Each rule of an exercise check is broken on purpose, and the message names it."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers import by_hand, checks, models
from helpers.checks import Broken


class Right(nn.Module):
    """A layer that keeps every rule; the wrong ones below change one line each."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling = alpha / rank

    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.A.T @ self.B.T)

    def merge(self):
        return self.base.weight + self.scaling * self.B @ self.A


def broken(method: str):
    """A subclass of Right with one method replaced."""

    def wrap(function):
        return type("Wrong", (Right,), {method: function})

    return wrap


@broken("__init__")
def TrainsBase(self, base, rank, alpha):
    Right.__init__(self, base, rank, alpha)
    base.requires_grad_(True)


@broken("__init__")
def SwappedShapes(self, base, rank, alpha):
    Right.__init__(self, base, rank, alpha)
    self.A = nn.Parameter(torch.randn(base.in_features, rank))


@broken("__init__")
def RandomB(self, base, rank, alpha):
    Right.__init__(self, base, rank, alpha)
    self.B = nn.Parameter(torch.randn(base.out_features, rank))


@broken("__init__")
def ZeroA(self, base, rank, alpha):
    Right.__init__(self, base, rank, alpha)
    self.A = nn.Parameter(torch.zeros(rank, base.in_features))


@broken("__init__")
def UnscaledByRank(self, base, rank, alpha):
    Right.__init__(self, base, rank, alpha)
    self.scaling = alpha


@broken("__init__")
def ExtraBias(self, base, rank, alpha):
    Right.__init__(self, base, rank, alpha)
    self.extra = nn.Parameter(torch.zeros(3))


@broken("__init__")
def FrozenB(self, base, rank, alpha):
    Right.__init__(self, base, rank, alpha)
    self.B.requires_grad_(False)


@broken("__init__")
def PlainTensor(self, base, rank, alpha):
    Right.__init__(self, base, rank, alpha)
    del self.A
    self.A = torch.randn(rank, base.in_features)


@broken("forward")
def ShiftedStart(self, x):
    return self.base(x) + 1


@broken("forward")
def DetachedB(self, x):
    return self.base(x) + self.scaling * (x @ self.A.T @ self.B.detach().T)


@broken("forward")
def Raises(self, x):
    return x @ self.A @ self.B


@broken("merge")
def MergesUnscaled(self):
    return self.base.weight + self.B @ self.A


@broken("merge")
def MergesTransposed(self):
    return (self.base.weight + self.scaling * self.B @ self.A).T


class NoArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()


@pytest.mark.parametrize("right", [Right, by_hand.LoRALinear])
def test_a_right_layer_passes(right):
    assert "passed" in checks.lora_layer(right)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (NoArguments, "constructor"),
        (TrainsBase, "base frozen"),
        (SwappedShapes, "shapes"),
        (RandomB, "B zero"),
        (ZeroA, "A random"),
        (UnscaledByRank, "scaling"),
        (ExtraBias, "only A and B train"),
        (FrozenB, "only A and B train"),
        (PlainTensor, "A trains"),
        (ShiftedStart, "starts as identity"),
        (DetachedB, "gradient reaches B"),
        (Raises, "forward"),
        (MergesUnscaled, "merge"),
        (MergesTransposed, "merge"),
    ],
)
def test_the_message_names_the_broken_rule(wrong, rule):
    with pytest.raises(checks.Broken) as caught:
        checks.lora_layer(wrong)
    assert caught.value.rule == rule
    assert str(caught.value).startswith(f"{rule}: ")
    assert caught.value._render_traceback_() == [f"Broken rule · {caught.value}"]


def test_the_check_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    checks.lora_layer(Right)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (1024 * 4096, "frozen base"),
        (4 * 1024, "A alone"),
        (4 * 4096, "B alone"),
        (4 * 1024 * 4096, "added up"),
        (7, "rank x in"),
    ],
)
def test_counting(answer, says):
    assert "passed" in checks.trainable_parameters(20_480, 1024, 4096, 4)
    with pytest.raises(checks.Broken, match=says):
        checks.trainable_parameters(answer, 1024, 4096, 4)


def test_targets():
    llava = models.tiny("llava")
    wanted = [
        name
        for name, _ in llava.named_modules()
        if "language_model" in name and name.endswith(("q_proj", "v_proj"))
    ]
    right = r".*language_model.*\.(q_proj|v_proj)"
    assert "passed" in checks.targets(right, llava, wanted)
    for pattern, rule in (
        (["q_proj", "v_proj"], "reaches nothing else"),
        ([right], "reaches something"),
        (r".*language_model.*\.q_proj", "reaches all of them"),
        ([*wanted, "v_porj"], "every entry matches"),
        (3, "a pattern"),
    ):
        with pytest.raises(checks.Broken) as caught:
            checks.targets(pattern, llava, wanted)
        assert caught.value.rule == rule


def test_the_machine_table_can_fail():
    found = checks.look()
    assert "result" in checks.machine(found).columns
    for change in (
        {"python": (3, 10, 0)},
        {"free_ram": 0.5},
        {"free_disk": 0.1},
        {"cached": {"smollm2": False}},
        {"packages": {"torch": (">=2.6,<3", "1.0")}},
        {"packages": {"peft": (">=0.21", None)}},
    ):
        table = checks.machine(replace(found, **change))
        assert (table.result == "fail").sum() >= 1, change
        assert table[table.result == "fail"].iloc[:, -1].str.len().min() > 10


GROUPED = {"q": (8, 8), "v": (8, 2)}  # in, out: v has fewer outputs, as with shared heads


def grouped() -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(*shape) for name, shape in GROUPED.items()})


def test_adapter_size_counts_each_target_by_its_shape():
    assert "104 parameters in 2 layers" in checks.adapter_size(
        4 * (16 + 10), grouped(), 4, ["q", "v"]
    )


@pytest.mark.parametrize(
    ("answer", "why"),
    [(4 * 32, "as large as the largest"), (26, "multiply by the rank"), (5, "add rank x")],
)
def test_adapter_size_names_the_slip(answer, why):
    with pytest.raises(Broken, match=why):
        checks.adapter_size(answer, grouped(), 4, ["q", "v"])


def wrapped_with(**options) -> nn.Module:
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | options
    return get_peft_model(models.tiny("llama"), LoraConfig(**settings))


SECOND = "model.layers.1.self_attn.q_proj"
RANKS = {"model.layers.0.self_attn.q_proj": 2, SECOND: 8}


def test_lora_ranks_passes_the_right_answer():
    right = wrapped_with(rank_pattern={SECOND: 8}, alpha_pattern={SECOND: 16})
    assert checks.lora_ranks(right, RANKS, 2.0).startswith("passed")


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"rank_pattern": {SECOND: 8}}, "alpha_pattern"),
        ({}, "rank_pattern"),
        ({"layers_to_transform": [0]}, "reaches all of them"),
        ({"target_modules": ["q_proj", "v_proj"]}, "reaches nothing else"),
    ],
)
def test_lora_ranks_names_the_broken_rule(options, rule):
    with pytest.raises(Broken) as broken:
        checks.lora_ranks(wrapped_with(**options), RANKS, 2.0)
    assert broken.value.rule == rule
