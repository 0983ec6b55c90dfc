"""The docstrings of the package: what they owe is in `docstring_rules`; here it is asked and tried.

Sources and notebooks are read, and no helper is imported or run.
"""

import ast
import builtins
import importlib
import itertools
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import docstring_rules as rules
import pytest
from docstring_rules import Module, Public

ROOT = Path(__file__).parents[1]
Rule = Callable[[Public], list[str]]

# Modules that no lesson is about, each with the reason; their docstrings need no source.
PLUMBING = {
    "helpers.assets": "fetches and checks archives",
    "helpers.atomic": "writes files whole or not at all",
    "helpers.bundle": "packs the course for a room without network",
    "helpers.colab": "runs before the course's dependencies exist",
    "helpers.memory._quiet": "silences libraries while they are imported",
    "helpers.namespaces": "takes network and disk from a command",
    "helpers.notebooks": "executes the lessons",
    "helpers.outcomes": "reads what pytest says of a run",
    "helpers.robustness": "runs the lessons under hardship",
    "helpers.signatures": "compares the course with other versions of its libraries",
    "helpers.site": "renders the course as a site",
    "helpers.stamp": "keeps the repository's address",
    "helpers.versions": "runs the tests with other versions of the libraries",
    "helpers.workshop": "makes slides and copies without solutions",
}
# Command lines: their module docstring is the text of --help, and what they call has its source.
# What a lesson takes from them has to name source and lesson nevertheless.
COMMANDS = {"helpers.bench", "helpers.memory.on_cuda", "helpers.memory.validate"}


# --- what there is ------------------------------------------------------------------------------


@cache
def modules() -> dict[str, Module]:
    return {module.name: module for module in rules.read(ROOT / "helpers")}


def origin(node: ast.ImportFrom, package: str) -> str:
    """The module that an import takes from, as a dotted name; `package` is where it stands."""
    if not node.level:
        return node.module or ""
    above = package.split(".")[: package.count(".") + 2 - node.level]
    return ".".join([*above, *filter(None, [node.module])])


@cache
def reexported(package: str) -> dict[str, str]:
    """What a package's ``__init__`` takes from its modules: name to where it is defined."""
    init = modules().get(f"{package}.__init__")
    return {
        alias.asname or alias.name: f"{origin(node, package)}.{alias.name}"
        for node in (init.tree.body if init else ())
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def uses(tree: ast.Module, package: str = "") -> set[str]:
    """What a source takes from the helpers, each by the dotted name of its definition."""
    taken = {
        alias.asname or alias.name: defined(origin(node, package), alias.name)
        for node in rules.parts(tree)
        if isinstance(node, ast.ImportFrom) and origin(node, package).split(".")[0] == "helpers"
        for alias in node.names
    }
    chains = (node for node in rules.parts(tree) if isinstance(node, ast.Attribute))
    inside = {
        defined(taken[node.value.id], node.attr)
        for node in chains
        if isinstance(node.value, ast.Name) and node.value.id in taken
    }
    return set(taken.values()) | inside


def defined(owner: str, name: str) -> str:
    return reexported(owner).get(name, f"{owner}.{name}")


def module_of(name: str) -> str:
    """The module in which a dotted name is defined, "" where it is none of the helpers'."""
    parts = name.split(".")
    ends = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((end for end in ends if end in modules()), "")


@cache
def notebooks() -> dict[str, list[dict]]:
    """The cells of every lesson by its number."""
    files = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    return {file.name[:2]: json.loads(file.read_text("utf8"))["cells"] for file in files}


@cache
def taken(notebook: str) -> frozenset[str]:
    """What a lesson's cells take from the helpers."""
    sources = (
        "".join(cell["source"]) for cell in notebooks()[notebook] if cell["cell_type"] == "code"
    )
    lines = "\n".join(sources).splitlines()
    plain = "\n".join("pass" if line[:1] in "%!" else line for line in lines if line)
    return frozenset(uses(ast.parse(plain)))


@cache
def reached(notebook: str) -> frozenset[str]:
    """The modules that a lesson's cells run: those it takes from, and what these take from."""
    todo, seen = {module_of(name) for name in taken(notebook)} - {""}, set()
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= imported(name) - seen
    return frozenset(seen)


@cache
def imported(module: str) -> frozenset[str]:
    """The modules that a module takes something from."""
    found = uses(modules()[module].tree, module.rpartition(".")[0])
    return frozenset(map(module_of, found)) - {""}


@cache
def headings() -> dict[str, set[tuple[str, int]]]:
    """Notebook to its numbered sections, exercises and failures."""
    kinds = (("section", r"## (\d+)\."), ("exercise", r"### Exercise(?: (\d+))?:"))
    kinds += (("failure", r"### (\d+)\. "),)
    return {
        number: {
            (kind, int(match or 1))
            for cell in cells
            if cell["cell_type"] == "markdown"
            for kind, pattern in kinds
            for match in re.findall(rf"^{pattern}", "".join(cell["source"]), re.MULTILINE)
        }
        for number, cells in notebooks().items()
    }


@cache
def exported() -> frozenset[str]:
    """What packages name in ``__all__`` and what lessons take, by where it is defined."""
    named = {
        defined(name.removesuffix(".__init__"), text.value)
        for name, module in modules().items()
        for node in module.tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for text in node.value.elts
    }
    return frozenset(named.union(*map(taken, notebooks())))


def names() -> Iterator[Public]:
    for module in modules().values():
        yield from rules.public(module, exported())


def plumbing(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in PLUMBING)


def owes_source(item: Public) -> bool:
    name = item.module.name
    command = name in COMMANDS or name.endswith(".__main__")
    return not plumbing(name) and (item.exported or not command)


@cache
def classes() -> frozenset[str]:
    """The classes of the package and of course.py, by their last name."""
    trees = [module.tree for module in modules().values()]
    trees.append(ast.parse((ROOT / "course.py").read_text("utf8")))
    found = itertools.chain.from_iterable(map(rules.parts, trees))
    return frozenset(node.name for node in found if isinstance(node, ast.ClassDef))


def exists(exception: str) -> bool:
    """Whether there is such a class: Python's, the package's, or another's with its module."""
    module, _, name = exception.rpartition(".")
    if module and not module.startswith("helpers"):
        return hasattr(importlib.import_module(module), name)
    return hasattr(builtins, name) or name in classes()


def kept(*violations: list[str]) -> None:
    found = list(itertools.chain(*violations))
    assert not found, "\n".join(found)


# --- the package --------------------------------------------------------------------------------


def test_every_docstring_begins_with_a_sentence() -> None:
    texts = [(module.name, module.doc) for module in modules().values()]
    texts += [(item.name, item.doc) for item in names()]
    assert len(texts) > 800
    kept(*(rules.first_sentence(name, doc) for name, doc in texts))


@pytest.mark.parametrize("rule", [rules.typed, rules.shapes, rules.units])
def test_what_is_exported_says_types_shapes_and_units(rule: Rule) -> None:
    asked = [item for item in names() if item.exported]
    assert len(asked) > 300
    kept(*map(rule, asked))


def test_what_is_raised_is_named_and_exists() -> None:
    kept(*map(rules.raises, names()))
    kept(*(rules.real_errors(item, exists) for item in names()))


def test_every_name_has_a_source_and_a_lesson() -> None:
    kept(*(rules.traced(item) for item in names() if owes_source(item)))


def test_the_lessons_that_are_named_are_there_and_use_the_name() -> None:
    asked = [item for item in names() if item.exported and owes_source(item)]
    taken_in = {number: taken(number) for number in notebooks()}
    reached_in = {number: reached(number) for number in notebooks()}
    kept(*(rules.used_there(item, taken_in, reached_in) for item in asked))
    kept(*(rules.real_places(item.name, item.doc, headings()) for item in names()))
    kept(*(rules.real_places(m.name, m.doc, headings()) for m in modules().values()))


def test_the_exceptions_from_these_rules_are_modules() -> None:
    for name in (*PLUMBING, *COMMANDS):
        assert name in modules() or f"{name}.__init__" in modules(), name


# --- each rule can fail -------------------------------------------------------------------------


def one(source: str, name: str = "") -> Public:
    """The public name of a small source, by default its first."""
    module = Module("helpers.small", textwrap.dedent(source))
    every = frozenset(f"helpers.small.{getattr(node, 'name', '')}" for node in module.tree.body)
    items = {item.name: item for item in rules.public(module, every)}
    return items[f"helpers.small.{name}"] if name else next(iter(items.values()))


def with_doc(doc: str, signature: str = "f(x: int) -> int", body: str = "return x") -> Public:
    lines = textwrap.indent(f'"""{doc}"""\n{body}', "    ")
    return one(f"def {signature}:\n{lines}\n")


@pytest.mark.parametrize(
    "doc", ["", "Mean loss", "The mean loss.", "Returns the mean loss of this.", "Args:\n    x: a."]
)
def test_a_first_sentence_that_says_nothing_is_found(doc: str) -> None:
    assert rules.first_sentence("helpers.training.mean_loss", doc)


@pytest.mark.parametrize("doc", ["Nats per target, over all rows.", "Is it large?\n\nMore."])
def test_a_first_sentence_that_says_something_is_enough(doc: str) -> None:
    assert not rules.first_sentence("helpers.training.mean_loss", doc)


@pytest.mark.parametrize("signature", ["f(x) -> int", "f(x: int)", "f(x: int, **more) -> int"])
def test_a_missing_type_is_found(signature: str) -> None:
    assert len(rules.typed(with_doc("Adds one.", signature))) == 1


@pytest.mark.parametrize("doc", ["Adds one.", "Adds one (and no more, ever).", "As f(x, y)."])
def test_a_missing_shape_is_found(doc: str) -> None:
    assert rules.shapes(with_doc(doc, "f(x: Tensor) -> int"))
    assert rules.shapes(with_doc(doc, "f(x: int) -> dict[str, torch.Tensor]"))


@pytest.mark.parametrize(
    "doc", ["(rows, 3) to (rows,).", "x of (..., in).", "A scalar.", "Of any shape.", "To (n,)."]
)
def test_a_shape_is_understood(doc: str) -> None:
    assert not rules.shapes(with_doc(doc, "f(x: Tensor) -> Tensor"))


def test_a_shape_may_stand_in_the_class() -> None:
    item = '''
        class Layer:
            """Adds one to x, (rows, width)."""
            def forward(self, x: Tensor) -> Tensor:
                """Adds one."""
    '''
    assert not rules.shapes(one(item, "Layer.forward"))
    assert rules.shapes(one(item.replace(", (rows, width)", ""), "Layer.forward"))


def test_a_missing_unit_is_found() -> None:
    for signature in ("peak_bytes() -> int", "f(size: int) -> str", "f(loss: float | None) -> str"):
        assert rules.units(with_doc("How large it gets.", signature, "pass"))
        assert not rules.units(with_doc("How large it gets, in bytes.", signature, "pass"))
    assert rules.units(one('class A:\n    """What it takes."""\n    memory: int\n'))
    assert not rules.units(one('class A:\n    """What it takes, in GiB."""\n    memory: int\n'))


@pytest.mark.parametrize(
    "body",
    [
        "raise ValueError(x)",
        "return _part(x)",
        "try:\n    int(x)\nexcept ValueError:\n    raise ValueError(x) from None",
        "try:\n    _part(x)\nexcept ValueError:\n    raise",
        "try:\n    pass\nexcept ValueError:\n    pass\nelse:\n    _part(x)",
    ],
)
def test_an_error_that_is_not_named_is_found(body: str) -> None:
    part = "\n\ndef _part(x):\n    raise ValueError(x)\n"
    source = "def f(x: int) -> int:\n    '''Adds one.{}'''\n" + textwrap.indent(body, "    ") + part
    assert rules.raises(one(source.format("")))
    assert rules.raises(one(source.format("\n\n    Raises: TypeError for a text.\n    ")))
    assert not rules.raises(one(source.format("\n\n    Raises: ValueError for a text.\n    ")))
    assert not rules.raises(
        one(source.format("\n\n    Raises:\n        ValueError: a text.\n    "))
    )


@pytest.mark.parametrize(
    "body",
    [
        "try:\n    raise ValueError(x)\nexcept ValueError:\n    return 0",
        "try:\n    _part(x)\nexcept Exception:\n    return 0",
        "with _quiet():\n    _part(x)",
    ],
)
def test_an_error_that_is_caught_is_not_asked_for(body: str) -> None:
    parts = """
def _part(x):
    raise ValueError(x)


@contextmanager
def _quiet():
    try:
        yield
    except ValueError:
        pass
"""
    source = "def f(x: int) -> int:\n    '''Adds one.'''\n" + textwrap.indent(body, "    ") + parts
    assert not rules.raises(one(source))


def test_a_constructor_and_private_methods_are_read_too() -> None:
    source = '''
        class A:
            """Holds a number."""
            def __init__(self, x: int) -> None:
                self._check(x)
            def _check(self, x: int) -> None:
                raise TypeError(x)
    '''
    assert rules.raises(one(source)) == [
        "helpers.small.A raises TypeError, which its Raises: does not name"
    ]


@pytest.mark.parametrize("name", ["NoSuchError", "helpers.small.NoSuchError", "json.NoSuchError"])
def test_an_error_that_does_not_exist_is_found(name: str) -> None:
    assert rules.real_errors(with_doc(f"Adds one.\n\nRaises: {name} for a text."), exists)


def test_an_error_that_exists_is_left_alone() -> None:
    for name in (
        "ValueError",
        "TrainingError",
        "json.JSONDecodeError",
        "helpers.assets.AssetError",
    ):
        assert not rules.real_errors(with_doc(f"Adds one.\n\nRaises: {name} for a text."), exists)


@pytest.mark.parametrize(
    ("doc", "missing"),
    [
        ("Adds one.", 2),
        ("Adds one.\n\nSource: Hu et al. 2021, equation 3.", 1),
        ("Adds one.\n\nTaught in: notebook 03, section 2.", 1),
        ("Adds one.\n\nTaught in: the third notebook.", 2),
        ("Adds one.\n\nSource: peft. Taught in: notebook 03, section 2.", 0),
    ],
)
def test_a_missing_source_or_lesson_is_found(doc: str, missing: int) -> None:
    assert len(rules.traced(with_doc(doc))) == missing


def test_source_and_lesson_may_stand_at_the_top_of_the_module() -> None:
    top = '"""Numbers.\n\nSource: peft.\nTaught in: notebook 03, section 2.\n"""\n'
    assert not rules.traced(one(top + 'def f() -> int:\n    """One more."""\n'))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("notebook 03, section 2.", [("03", "section", 2)]),
        ("notebook 03, sections 2 and\n4.", [("03", "section", 2), ("03", "section", 4)]),
        ("notebook 03, sections 7 to 9.", [("03", "section", n) for n in (7, 8, 9)]),
        ("notebook 10, failure 8.", [("10", "failure", 8)]),
        ("notebook 03, section 4, and notebook 10.", [("03", "section", 4), ("10", "section", 0)]),
    ],
)
def test_places_are_read(text: str, expected: list) -> None:
    assert rules.places(f"Adds one.\n\nTaught in: {text}\n") == expected


def test_a_place_that_is_not_there_is_found() -> None:
    there = {"03": {("section", 1), ("section", 2), ("exercise", 1)}}
    for text in ("notebook 03, section 3", "notebook 04, section 1", "notebook 03, exercise 2"):
        assert rules.real_places("f", f"Adds one.\n\nTaught in: {text}.", there)
    for text in ("notebook 03, sections 1 and 2", "notebook 03, exercise 1"):
        assert not rules.real_places("f", f"Adds one.\n\nTaught in: {text}.", there)
    assert len(headings()["03"]) == 13 and ("failure", 18) in headings()["10"]


def test_a_lesson_that_has_no_use_for_the_name_is_found() -> None:
    item = with_doc("Adds one.\n\nTaught in: notebook 03, section 2.")
    reached_ = {"03": {"helpers.small"}, "04": {"helpers.small"}}
    assert rules.used_there(item, {}, {"04": {"helpers.small"}})
    assert rules.used_there(item, {"04": {"helpers.small.f"}}, reached_)
    assert not rules.used_there(item, {"03": {"helpers.small.f"}}, reached_)
    assert not rules.used_there(item, {}, reached_)


def test_what_a_source_takes_is_traced_to_its_definition() -> None:
    source = """
from helpers import adapters, updates
from helpers.experiments import study
adapters.match(model, "q_proj"); updates.table(model); study.results("ranks")
"""
    assert {
        "helpers.adapters.matching.match",
        "helpers.updates.table",
        "helpers.experiments.study.results",
    } <= uses(ast.parse(source))
    inside = uses(
        ast.parse("from ..models import tiny\nfrom .sizes import count"), "helpers.adapters"
    )
    assert {"helpers.models.architectures.tiny", "helpers.adapters.sizes.count"} <= inside
