"""What the docstrings of the package owe a reader, each demand a pure function to its violations.

A rule takes one public name and returns readable sentences, an empty list when it is kept.
``tests/test_docstrings.py`` runs them over ``helpers/`` and shows of each that it can fail.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Methods = Mapping[str, Function]
Place = tuple[str, str, int]  # ("03", "section", 2)

# A tensor's shape: "(rows, width)", "(n,)", "(..., in)", "()", or said in words.
SHAPE = re.compile(
    r"(?<!\w)\((?:\)|\.\.\.\)|(?![^()]*\b(?:and|or|but|no|not|is|are|which|such)\b)"
    r"[^\s(),]+(?: [^\s(),]+){0,4},[^()]*\))"
    r"|\b(?:scalars?|any shape|same shape|one shape|shape of)\b"
)
ARRAY = re.compile(r"\b(?:Tensor|ndarray)\b")

# What a number can be counted in.
UNIT = re.compile(
    r"\b(?:bytes?|[kMG]i?B|seconds?|minutes?|ms|milliseconds?|nats?|bits?|tokens?|parameters?"
    r"|pixels?|rows?|weights?|numbers?|values?|samples?|units?)\b"
)
MEASURED = re.compile(r"(?:^|_)(?:bytes|seconds|minutes|size|memory|nats|loss|losses|gib|mib)$")

_SECTION = r"(?:Args|Attributes|Returns|Yields|Raises|Source|Taught in):"
_NAMED = re.compile(
    r"(?<!\w)((?:\w+\.)*[A-Z]\w*(?:Error|Refused|Broken|Exit|Interrupt|Exception))\b"
)
_FILLER = {
    *("a", "an", "the", "of", "to", "in", "for", "with", "and", "its", "this", "that"),
    *("is", "are", "get", "gets", "return", "returns"),
}


@cache
def parts(node: ast.AST) -> tuple[ast.AST, ...]:
    """All nodes below a node, walked once: walking is what takes the time here."""
    return tuple(ast.walk(node))


# --- what is public -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """A source file: its dotted name and its text."""

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def doc(self) -> str:
        return ast.get_docstring(self.tree) or ""

    @cached_property
    def functions(self) -> dict[str, Function]:
        """Functions at the top of the file, by name."""
        return {node.name: node for node in self.tree.body if isinstance(node, Function)}


@dataclass(frozen=True)
class Public:
    """A public name, and the texts that its reader has.

    Attributes:
        parent: the class of a method.
        exported: it is in its package's ``__all__``, or a lesson takes it from its module.
    """

    module: Module
    node: Function | ast.ClassDef
    parent: ast.ClassDef | None = None
    exported: bool = False

    @property
    def name(self) -> str:
        outer = f"{self.parent.name}." if self.parent else ""
        return f"{self.module.name}.{outer}{self.node.name}"

    @cached_property
    def doc(self) -> str:
        return ast.get_docstring(self.node) or ""

    @cached_property
    def around(self) -> str:
        """Its own docstring, then that of its class."""
        return self.doc + "\n\n" + ((self.parent and ast.get_docstring(self.parent)) or "")


def read(root: Path) -> list[Module]:
    """Every module of the package at ``root``, in the order of their paths."""
    return [
        Module(
            ".".join(file.relative_to(root.parent).with_suffix("").parts), file.read_text("utf8")
        )
        for file in sorted(root.rglob("*.py"))
    ]


def public(module: Module, exported: frozenset[str] = frozenset()) -> Iterator[Public]:
    """Its public functions, classes and their public methods; ``exported`` holds dotted names."""
    for node in module.tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        known = f"{module.name}.{node.name}" in exported
        yield Public(module, node, None, known)
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, Function) and not inner.name.startswith("_"):
                yield Public(module, inner, node, known)


# --- the first sentence -------------------------------------------------------------------------


def first_sentence(name: str, doc: str) -> list[str]:
    """A docstring begins with a whole sentence, which is not the name said again."""
    if not doc:
        return [f"{name} has no docstring"]
    opening = " ".join(doc.split("\n\n")[0].split())
    sentence = re.match(r"(.*?[.?])(?:\s|$)", opening)
    if not sentence or re.match(_SECTION, opening):
        return [f"{name} does not begin with a sentence: {opening[:60]!r}"]
    said = set(re.findall(r"[a-z0-9]+", sentence[1].lower())) - _FILLER
    own = set(re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()))
    return [f"{name} only says its name again: {sentence[1]!r}"] if said <= own else []


# --- types, shapes and units --------------------------------------------------------------------


def _arguments(node: Function) -> list[ast.arg]:
    args = node.args
    every = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    return [arg for arg in every if arg and arg.arg not in {"self", "cls"}]


def typed(item: Public) -> list[str]:
    """Every parameter and the result of a function have a type."""
    if not isinstance(item.node, Function):
        return []
    bare = [arg.arg for arg in _arguments(item.node) if arg.annotation is None]
    bare += [] if item.node.returns else ["the result"]
    return [f"{item.name}: {name} has no type" for name in bare]


def shapes(item: Public) -> list[str]:
    """A function that takes or gives a tensor says its shape, there or in its class."""
    if not isinstance(item.node, Function):
        return []
    types = [arg.annotation for arg in _arguments(item.node)] + [item.node.returns]
    tensors = any(kind and ARRAY.search(ast.unparse(kind)) for kind in types)
    if tensors and not SHAPE.search(item.around):
        return [f"{item.name} takes or gives a tensor and names no shape"]
    return []


def units(item: Public) -> list[str]:
    """A number with a unit has it named: a parameter, a function's result, a field of a class."""
    if isinstance(item.node, ast.ClassDef):
        fields = [part for part in item.node.body if isinstance(part, ast.AnnAssign)]
        held = [(ast.unparse(part.target), part.annotation) for part in fields]
    else:
        held = [(arg.arg, arg.annotation) for arg in _arguments(item.node)]
        held.append((item.node.name, item.node.returns))
    return [
        f"{item.name}: {name} is a number without a unit"
        for name, kind in held
        if kind and re.search(r"\b(?:int|float)\b", ast.unparse(kind)) and MEASURED.search(name)
        if not UNIT.search(item.around)
    ]


# --- errors -------------------------------------------------------------------------------------


def raised(
    node: ast.AST, module: Module, methods: Methods, seen: frozenset[str] = frozenset()
) -> set[str]:
    """What a body raises and does not catch, itself or through private functions beside it."""
    if isinstance(node, ast.Raise) and node.exc is not None:
        return _class_of(node.exc, module)
    found = set()
    if isinstance(node, ast.Call):
        name = _private(node.func)
        called = methods.get(name) or module.functions.get(name)
        if called is not None and name not in seen:
            found = raised(called, module, methods, seen | {name})
    guarded = node.body if isinstance(node, ast.Try | ast.With) else []
    inside = set().union(*(raised(part, module, methods, seen) for part in guarded))
    caught = _caught(node, module)
    found |= set() if "Exception" in caught else inside - caught
    rest = (part for part in ast.iter_child_nodes(node) if part not in guarded)
    return found.union(*(raised(part, module, methods, seen) for part in rest))


def _private(called: ast.expr) -> str:
    """The name in `_name(…)` and `self._name(…)`, else nothing."""
    own = isinstance(called, ast.Attribute) and ast.unparse(called.value) in {"self", "cls"}
    name = called.attr if own else getattr(called, "id", "")
    return name if name.startswith("_") else ""


def _class_of(exception: ast.expr, module: Module) -> set[str]:
    """The class behind `raise`; where a function makes the exception, what it returns."""
    made = exception.func if isinstance(exception, ast.Call) else exception
    name = made.attr if isinstance(made, ast.Attribute) else getattr(made, "id", "")
    if name in module.functions and module.functions[name].returns:
        name = ast.unparse(module.functions[name].returns)
    return {name} if name[:1].isupper() else set()


def _caught(block: ast.AST, module: Module) -> set[str]:
    """What `try` catches for good, or `with` a context manager of this file."""
    handlers = block.handlers if isinstance(block, ast.Try) else []
    for entered in block.items if isinstance(block, ast.With) else ():
        name = _private(getattr(entered.context_expr, "func", entered.context_expr))
        if name in module.functions:
            inside = parts(module.functions[name])
            handlers = [part for part in inside if isinstance(part, ast.ExceptHandler)]
    return {
        name.id
        for handler in handlers
        if not any(isinstance(part, ast.Raise) and part.exc is None for part in parts(handler))
        for name in parts(handler.type or ast.Name("Exception"))
        if isinstance(name, ast.Name)
    }


def stated(doc: str) -> str:
    """The text behind "Raises:", up to an empty line or the next section."""
    found = re.search(
        rf"^\s*Raises:(.*?)(?=\n\s*\n|\n\s*{_SECTION}|\Z)", doc, re.DOTALL | re.MULTILINE
    )
    return found[1] if found else ""


def raises(item: Public) -> list[str]:
    """What a body raises stands under "Raises:"; a constructor's in the class's docstring."""
    owner = item.node if isinstance(item.node, ast.ClassDef) else item.parent
    within = owner.body if owner else []
    methods = {part.name: part for part in within if isinstance(part, Function)}
    bodies = [item.node]
    if owner is item.node:
        bodies = [methods[name] for name in ("__init__", "__post_init__") if name in methods]
    owed = set().union(*(raised(body, item.module, methods) for body in bodies))
    text = stated(item.doc)
    return [
        f"{item.name} raises {kind}, which its Raises: does not name"
        for kind in sorted(owed)
        if not re.search(rf"\b{kind}\b", text)
    ]


def real_errors(item: Public, known: Callable[[str], bool]) -> list[str]:
    """Whatever stands under "Raises:" is an exception that exists."""
    return [
        f"{item.name} says that it raises {name}, which does not exist"
        for name in sorted(set(_NAMED.findall(stated(item.doc))))
        if not known(name)
    ]


# --- source and lesson --------------------------------------------------------------------------

_TAUGHT = re.compile(r"\bTaught in:\s+(.*?)(?:\.\s|\.$|\n\s*\n|\Z)", re.DOTALL)
_PLACE = re.compile(r"\b(section|exercise|failure)s? (\d+(?:(?:, | and | to )\d+)*)")


def places(doc: str) -> list[Place]:
    """Every place that "Taught in:" names; a notebook without one gives ("03", "section", 0)."""
    found: list[Place] = []
    for text in _TAUGHT.findall(doc):
        for chunk in re.split(r"\bnotebook (?=\d\d)", " ".join(text.split()))[1:]:
            inside = [
                (chunk[:2], kind, number)
                for kind, numbers in _PLACE.findall(chunk)
                for number in _numbers(numbers)
            ]
            found += inside or [(chunk[:2], "section", 0)]
    return found


def _numbers(text: str) -> list[int]:
    """ "6, 8 and 9" and "7 to 11", as numbers."""
    numbers: list[int] = []
    for joint, number in re.findall(r"(, | and | to |^)(\d+)", text):
        start = numbers[-1] + 1 if joint == " to " else int(number)
        numbers += range(start, int(number) + 1)
    return numbers


def traced(item: Public) -> list[str]:
    """A source and a lesson stand in its docstring, in its class's, or in its module's."""
    text = item.around + "\n\n" + item.module.doc
    missing = [] if re.search(r"\bSource:\s+\S", text) else [f"{item.name} names no source"]
    return missing + ([] if places(text) else [f"{item.name} names no section of a lesson"])


def real_places(name: str, doc: str, headings: Mapping[str, set[tuple[str, int]]]) -> list[str]:
    """The notebooks and their numbered headings that "Taught in:" names are there."""
    return [
        f"{name} is taught in notebook {notebook}, {kind} {number}, it says; that is not there"
        for notebook, kind, number in places(doc)
        if (kind, number) not in headings.get(notebook, set())
    ]


def used_there(
    item: Public, taken: Mapping[str, set[str]], reached: Mapping[str, set[str]]
) -> list[str]:
    """The lessons that an exported name points to have it in a cell.

    Where lessons take it by name, it points to one of these; each lesson that it points to runs
    its module, be it inside another helper.

    Args:
        taken: notebook to the dotted names that its cells take.
        reached: notebook to the modules that its cells run.
    """
    pointed = {notebook for notebook, _, _ in places(item.doc) or places(item.module.doc)}
    takers = {notebook for notebook, names in taken.items() if item.name in names}
    found = [
        f"{item.name} is taught in notebook {notebook}, it says; no cell there runs its module"
        for notebook in sorted(pointed)
        if item.module.name not in reached.get(notebook, set())
    ]
    if takers and not takers & pointed:
        found.append(
            f"{item.name} stands in the cells of notebook {min(takers)}, which it leaves out"
        )
    return found
