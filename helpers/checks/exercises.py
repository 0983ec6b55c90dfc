"""Exercise checks in which the message names the broken rule.

Source: this course's own.
Taught in: notebook 01, section 1.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from helpers import adapters


class Broken(AssertionError):
    """An answer breaks a rule; the message is one sentence that begins with the rule."""

    def __init__(self, rule: str, why: str) -> None:
        super().__init__(f"{rule}: {why}")
        self.rule = rule

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the sentence, since the learner's mistake is not in our frames."""
        return [f"Broken rule · {self}"]


class Passed(str):
    """The line that a passed check returns; a notebook shows it without quotation marks."""

    def __repr__(self) -> str:
        return str(self)


def plain(found: object) -> object:
    """An answer as a plain value: a tensor or an array of one number is that number.

    Raises:
        RuntimeError: it has several; so call it where `running` says what the learner did.
    """
    return found.item() if hasattr(found, "item") else found


# ------------------------------------------------------------------------------- the LoRA layer

SHAPES = ((12, 8, 4, 16.0), (8, 10, 2, 6.0))  # in, out, rank, alpha: neither alpha/rank is 1
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def lora_layer(cls: type[nn.Module]) -> Passed:
    """Checks a LoRA layer that a learner wrote: `cls(base, rank, alpha)`.

    It keeps A (rank, in) and B (out, rank) as the parameters `A` and `B` (or `lora_A`, `lora_B`),
    computes base(x) + alpha / rank * x A^T B^T, and has `merge()`, which returns a linear layer
    or its weight (out, in).

    Raises:
        Broken: constructor, base frozen, shapes, A random, B zero, only A and B train, starts as
            identity, gradient reaches B, update rank, scaling, or merge.

    Source: Hu et al. 2021, "LoRA", section 4.1 and equation 3. Taught in: notebook 01, exercise 1.
    """
    with torch.random.fork_rng(devices=[]):
        for shape in SHAPES:
            torch.manual_seed(0)  # the answer's own random start; the fork puts the seed back
            _check_layer(cls, *shape)
    return Passed(
        "passed: the layer starts as its frozen base, trains A and B alone, adds alpha / rank "
        "times B A, and merges into one linear layer"
    )


def _check_layer(cls: type[nn.Module], ins: int, outs: int, rank: int, alpha: float) -> None:
    base = nn.Linear(ins, outs)
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    layer = _build(cls, base, rank, alpha)
    a, b = _matrix(layer, "A"), _matrix(layer, "B")
    x = torch.randn(3, 5, ins)
    plain = nn.functional.linear(x, weight, bias)

    _check_frozen(base)
    _check_shapes(a, b, ins, outs, rank)
    _check_start(cls, a, b, ins, outs, rank, alpha)
    _check_trainable(layer, a, b)
    _check_identity(layer, x, plain)
    _check_gradient(layer, x, b)
    with torch.no_grad():
        b.normal_()
        _check_update(layer, a, b, weight, bias, alpha, rank)
        _check_merge(layer, x, weight.shape, bias)


def _build(cls: type[nn.Module], base: nn.Linear, rank: int, alpha: float) -> nn.Module:
    with running("constructor", "cls(base, rank, alpha)"):
        layer = cls(base, rank, alpha)
    if not isinstance(layer, nn.Module):
        raise Broken("constructor", f"the class has to be an nn.Module, not {cls.__name__}")
    return layer


def _matrix(layer: nn.Module, name: str) -> Tensor:
    for attribute in (name, f"lora_{name}"):
        found = getattr(layer, attribute, None)
        found = found.weight if isinstance(found, nn.Linear) else found
        if isinstance(found, nn.Parameter):
            return found
        if isinstance(found, Tensor):
            raise Broken(
                f"{name} trains", f"self.{attribute} is a plain tensor; wrap it in nn.Parameter"
            )
    names = ", ".join(dict(layer.named_parameters())) or "no parameter at all"
    raise Broken("shapes", f"the layer has no parameter {name}, it has {names}")


def _check_frozen(base: nn.Linear) -> None:
    free = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    if free:
        raise Broken(
            "base frozen", f"the base's {' and '.join(free)} would train; set requires_grad False"
        )


def _check_shapes(a: Tensor, b: Tensor, ins: int, outs: int, rank: int) -> None:
    for name, found, wanted, meaning in (
        ("A", a, (rank, ins), "rank, in"),
        ("B", b, (outs, rank), "out, rank"),
    ):
        if tuple(found.shape) != wanted:
            raise Broken(
                "shapes",
                f"{name} is {tuple(found.shape)}, it should be ({meaning}) = {wanted} "
                f"for a base of {ins} in, {outs} out and rank {rank}",
            )


def _check_start(
    cls: type[nn.Module], a: Tensor, b: Tensor, ins: int, outs: int, rank: int, alpha: float
) -> None:
    if b.count_nonzero():
        raise Broken(
            "B zero", f"{b.count_nonzero()} of {b.numel()} entries of B start other than 0"
        )
    if not a.isfinite().all() or a.std() == 0:
        raise Broken(
            "A random", f"A starts with every entry {a.flatten()[0]:g}; B then never moves"
        )
    again = _matrix(_build(cls, nn.Linear(ins, outs), rank, alpha), "A")
    if torch.equal(a, again):
        raise Broken("A random", "two layers start with the same A; set no seed inside the class")


def _check_trainable(layer: nn.Module, a: Tensor, b: Tensor) -> None:
    trains = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    more = [name for name, p in trains.items() if p is not a and p is not b]
    if more:
        raise Broken("only A and B train", f"{', '.join(more)} would train too")
    for name, matrix in (("A", a), ("B", b)):
        if not matrix.requires_grad:
            raise Broken("only A and B train", f"{name} is frozen")


def _check_identity(layer: nn.Module, x: Tensor, plain: Tensor) -> None:
    y = _forward(layer, x)
    if y.shape != plain.shape:
        raise Broken(
            "forward",
            f"for x {tuple(x.shape)} it returns {tuple(y.shape)}, not {tuple(plain.shape)}",
        )
    if not torch.allclose(y, plain, **TOLERANCE):
        raise Broken(
            "starts as identity",
            f"before training the output differs from the base's by up to {_gap(y, plain)}",
        )


def _check_gradient(layer: nn.Module, x: Tensor, b: Tensor) -> None:
    y = _forward(layer, x)
    if y.requires_grad:
        y.square().sum().backward()
    if b.grad is None or not b.grad.count_nonzero():
        raise Broken(
            "gradient reaches B", "after one backward pass B has no gradient, so it cannot learn"
        )


def _check_update(
    layer: nn.Module, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, alpha: float, rank: int
) -> None:
    """The update that the forward pass makes, read off by sending in the identity matrix."""
    update = (_forward(layer, torch.eye(weight.shape[1])) - bias).T - weight
    found = int(torch.linalg.matrix_rank(update, rtol=1e-4))
    if found > rank:
        raise Broken("update rank", f"the update has rank {found}, more than r = {rank}")
    product = b @ a
    if torch.allclose(update, alpha / rank * product, **TOLERANCE):
        return
    factor = float((update * product).sum() / product.square().sum())
    if torch.allclose(update, factor * product, **TOLERANCE):
        raise Broken(
            "scaling",
            f"B A is multiplied by {factor:.4g}, it should be "
            f"alpha / rank = {alpha:g} / {rank} = {alpha / rank:g}",
        )
    raise Broken("forward", "the update is not a multiple of B A")


def _check_merge(layer: nn.Module, x: Tensor, shape: torch.Size, bias: Tensor) -> None:
    before = _forward(layer, x)
    with running("merge", "merge()"):
        merged = layer.merge()
    if not isinstance(merged, nn.Linear | Tensor):
        raise Broken(
            "merge", f"merge() returns a linear layer or its weight, not {type(merged).__name__}"
        )
    if isinstance(merged, nn.Linear):
        after = merged(x)
    elif merged.shape != shape:
        raise Broken("merge", f"the merged weight is {tuple(merged.shape)}, not (out, in)")
    else:
        after = nn.functional.linear(x, merged, bias)
    if not torch.allclose(before, after, **TOLERANCE):
        raise Broken("merge", f"merged and unmerged outputs differ by up to {_gap(before, after)}")


@contextmanager
def running(rule: str, call: str) -> Iterator[None]:
    """Turns an error inside the learner's code into a sentence that names what was called.

    Args:
        rule: the rule that such an error breaks.
        call: what was called, as the sentence's subject: "merge()", "the function, called with x,".

    Raises:
        Broken: the block raised anything; a `Broken` from inside passes unchanged.
    """
    try:
        yield
    except Broken:
        raise
    except Exception as error:
        why = f"{call} raises {type(error).__name__}: {error}"
        raise Broken(rule, why) from error


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    with running("forward", "the layer, called with x,"):
        y = layer(x)
    if not isinstance(y, Tensor):
        raise Broken("forward", f"it returns a tensor of shape (..., out), not {type(y).__name__}")
    return y


def _gap(one: Tensor, other: Tensor) -> str:
    return f"{float((one - other).detach().abs().max()):.3g}"


# ------------------------------------------------------------------------- targets and counting


def targets(pattern: str | Collection[str], model: nn.Module, expected: Collection[str]) -> Passed:
    """Checks that a `target_modules` value reaches exactly the `expected` module names.

    Raises:
        Broken: the pattern reaches nothing, misses a module, or reaches one too many.

    Source: peft, ``LoraConfig.target_modules``.
    Taught in: notebook 01, exercise 2.
    """
    with running("a pattern", f"adapters.match with {pattern!r}"):
        found = adapters.match(model, pattern)
    if not found.matched:
        raise Broken("reaches something", f"{pattern!r} matches no module. {found.note}".strip())
    extra, missed = (
        sorted(set(found.matched) - set(expected)),
        sorted(set(expected) - set(found.matched)),
    )
    if extra:
        raise Broken("reaches nothing else", f"{len(extra)} too many, such as {extra[0]}")
    if missed:
        raise Broken("reaches all of them", f"{len(missed)} are missing, such as {missed[0]}")
    if found.unmatched:
        raise Broken("every entry matches", f"{', '.join(found.unmatched)} matches nothing")
    return Passed(f"passed: exactly the {len(expected)} modules that were asked for")


def trainable_parameters(answer: int, in_features: int, out_features: int, rank: int) -> Passed:
    """Checks a learner's count of the parameters that LoRA trains in one linear layer.

    Raises:
        Broken: the answer is not rank * (in + out); names the usual slip when it is one.

    Source: Hu et al. 2021, "LoRA", section 4.2. Taught in: notebook 00, exercise 1.
    """
    right = rank * (in_features + out_features)
    if answer == right:
        return Passed(f"passed: {rank} x ({in_features} + {out_features}) = {right:,}")
    slips = {
        in_features * out_features: "that is the frozen base weight; LoRA trains A and B",
        rank * in_features: "that is A alone; B trains too",
        rank * out_features: "that is B alone; A trains too",
        rank * in_features * out_features: "A and B are added up, not multiplied",
        right + in_features * out_features: "the base weight is frozen and does not count",
    }
    why = slips.get(answer, "A has rank x in and B has out x rank numbers")
    raise Broken("A and B are counted", f"{answer!r} is not right: {why}")
