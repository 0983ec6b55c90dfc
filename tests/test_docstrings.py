"""Every public name of `helpers` says what it is; those that lessons use say all of it.

Public is what has no underscore. Exported is what a package lists in `__all__` or a lesson uses:
its docstring, or its module's, names the source and the section that teaches it, its own docstring
the shapes of tensors, the units of numbers, and every exception that its body raises.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

import helpers

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
# What carries the course and belongs to no lesson: nothing is taught by it, no paper defines it.
PLUMBING = {
    "helpers.atomic",
    "helpers.colab",
    "helpers.data",  # its functions name the data's source each; data/LICENSES.md has the rest
    "helpers.plots",
    "helpers.memory._quiet",
}
TAUGHT = re.compile(r"Taught in: notebook (\d\d)(?:, section (\d+))?")
SOURCE = re.compile(r"Source: \S")
# "(batch, length)", "(rank, in_features)", "(n,)", "a scalar", "same shape"
SHAPE = re.compile(r"\((?:…|\*|[\w*+/ -]+), ?(?:[\w…*+/ -]+(?:, ?)?)*\)|\bscalar\b|\bshape", re.I)
# Not a batch, dict[str, Tensor], whose shapes are the model's affair.
TENSORS = re.compile(r"(?<!str, )(?<!str, torch\.)\b(?:Tensor|ndarray)\b")
UNITS = {
    r"bytes|memory$": r"byte|GiB|MiB|GB",
    r"block_size": r"weights",
    r"batch_size": r"rows",
    r"seconds|_time$": r"second",
    r"milliseconds": r"millisecond",
    r"gib$": r"GiB",
}


# --- Finding the names ---------------------------------------------------------------------------


@cache
def modules() -> dict[str, ModuleType]:
    names = [each.name for each in pkgutil.walk_packages(helpers.__path__, "helpers.")]
    return {n: importlib.import_module(n) for n in names if not n.endswith("__main__")}


def is_ours(value: object) -> bool:
    is_named = inspect.isfunction(value) or inspect.isclass(value)
    return is_named and value.__module__.startswith("helpers.")


def public() -> Iterator[object]:
    """Functions, classes, and the methods of classes, without an underscore."""
    for name, module in modules().items():
        for key, value in vars(module).items():
            if is_ours(value) and value.__module__ == name and not key.startswith("_"):
                yield value
                yield from methods(value)


def methods(value: object) -> Iterator[object]:
    for key, method in vars(value).items() if inspect.isclass(value) else ():
        method = getattr(method, "fget", None) or getattr(method, "__func__", method)
        if inspect.isfunction(method) and not key.startswith("_"):
            yield method


@cache
def exported() -> tuple[object, ...]:
    """What a package lists, and what a cell of a lesson uses."""
    listed = [getattr(m, key) for m in modules().values() for key in getattr(m, "__all__", [])]
    cells = [used_by(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
    found = [value for values in (listed, *cells) for value in values if is_ours(value)]
    return tuple(dict.fromkeys(found))


def used_by(path: Path) -> list[object]:
    cells = nbformat.read(path, as_version=4).cells
    tree = ast.parse("\n".join(cell.source for cell in cells if cell.cell_type == "code"))
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helpers"):
            for each in node.names:
                names[each.asname or each.name] = resolve(node.module, each.name)
    return [
        value
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name) and (value := value_of(node, names))
    ]


def resolve(module: str, name: str) -> object:
    known = modules().get(f"{module}.{name}")
    return known or getattr(importlib.import_module(module), name, None)


def value_of(node: ast.expr, names: dict[str, object]) -> object | None:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (base := value_of(node.value, names)) is not None:
        return getattr(base, node.attr, None)
    return None


def title(value: object) -> str:
    return f"{value.__module__}.{value.__qualname__}"


# --- What a docstring lacks ----------------------------------------------------------------------


def begins_badly(docstring: str | None) -> str:
    first = " ".join((docstring or "").strip().split("\n\n")[0].split())
    if not first:
        return "has no docstring"
    return "" if re.search(r"[.?:!]['\"`)]*$", first) else "does not begin with a whole sentence"


def annotations(value: object) -> dict[str, str]:
    """Name to annotation, of a function's parameters and result, or of a class's fields."""
    if inspect.isclass(value):
        return {name: str(kind) for name, kind in vars(value).get("__annotations__", {}).items()}
    signature = inspect.signature(value)
    found = {name: each.annotation for name, each in signature.parameters.items()}
    found["return"] = signature.return_annotation
    return {
        name: "" if kind is inspect.Parameter.empty else getattr(kind, "__name__", "") + str(kind)
        for name, kind in found.items()
        if name not in {"self", "cls"}
    }


def lacks_annotations(value: object) -> str:
    bare = [name for name, kind in annotations(value).items() if not kind]
    return f"annotates not {', '.join(bare)}" if bare else ""


def lacks_shapes(value: object, docstring: str) -> str:
    if inspect.isclass(value):  # a field's shape may stand beside it
        docstring = inspect.getsource(value)
    tensors = [name for name, kind in annotations(value).items() if TENSORS.search(kind)]
    return f"gives no shape for {tensors[0]}" if tensors and not SHAPE.search(docstring) else ""


def lacks_units(value: object, docstring: str) -> str:
    for names, unit in UNITS.items():
        for name, kind in annotations(value).items():
            name = value.__name__ if name == "return" else name
            is_number = re.search(r"\b(?:int|float)\b", kind)
            if is_number and re.search(names, name) and not re.search(unit, docstring, re.I):
                return f"gives no unit for {name}"
    return ""


def raised(value: object) -> set[str]:
    """The exceptions that a body raises itself; not those that it makes and hands on."""
    (tree,) = ast.parse(inspect.cleandoc("\n" + dedented(value))).body
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func).split(".")[-1]
            found |= {name} if name[0].isupper() else set()
    return found - {"NotImplementedError", "SystemExit"}


def dedented(value: object) -> str:
    lines = inspect.getsource(value).splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] for line in lines)


def lacks_errors(value: object, docstring: str) -> str:
    section = docstring.split("Raises:")[1] if "Raises:" in docstring else ""
    missing = [] if inspect.isclass(value) else sorted(raised(value) - words(section))
    return f"raises {', '.join(missing)} and does not say so" if missing else ""


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def sections() -> dict[str, set[str]]:
    """The numbers of the headings "## N. …" of each notebook."""
    found = {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        found[path.stem[:2]] = set(re.findall(r"^## (\d+)\. ", text, re.MULTILINE))
    return found


def wrong_places(text: str, known: dict[str, set[str]]) -> list[str]:
    return [
        f"notebook {lesson}, section {section or '–'} does not exist"
        for lesson, section in TAUGHT.findall(text)
        if lesson not in known or (section and section not in known[lesson])
    ]


# --- The rules -----------------------------------------------------------------------------------


def test_every_public_name_says_what_it_is() -> None:
    found = [f"{name} {bad}" for name, m in modules().items() if (bad := begins_badly(m.__doc__))]
    found += [f"{title(v)} {bad}" for v in public() if (bad := begins_badly(v.__doc__))]
    assert not found, "\n".join(found)


def test_what_is_exported_is_annotated() -> None:
    assert len(exported()) > 250
    found = [f"{title(v)} {bad}" for v in exported() if (bad := lacks_annotations(v))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("rule", [lacks_shapes, lacks_units, lacks_errors])
def test_what_is_exported_gives_shapes_units_and_errors(rule) -> None:
    found = [f"{title(v)} {bad}" for v in exported() if (bad := rule(v, v.__doc__ or ""))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("pattern", [TAUGHT, SOURCE])
def test_what_is_exported_names_its_source_and_its_lesson(pattern: re.Pattern) -> None:
    found = []
    for value in exported():
        text = f"{value.__doc__}\n{modules()[value.__module__].__doc__}"
        if value.__module__ not in PLUMBING and not pattern.search(text):
            found.append(f"{title(value)} and its module lack {pattern.pattern!r}")
    assert not found, "\n".join(found)


def test_every_lesson_and_section_that_is_named_exists() -> None:
    known = sections()
    texts = {title(value): value.__doc__ or "" for value in public()}
    texts |= {name: module.__doc__ or "" for name, module in modules().items()}
    found = [f"{name}: {bad}" for name, text in texts.items() for bad in wrong_places(text, known)]
    assert not found, "\n".join(found)


# --- Each rule can fail --------------------------------------------------------------------------


def test_a_docstring_that_lacks_something_is_found() -> None:
    import torch

    def bad(x: torch.Tensor, size_bytes: int, y) -> torch.Tensor:
        """Doubles"""
        if size_bytes < 0:
            raise ValueError(f"{size_bytes} bytes")
        return 2 * x

    assert begins_badly(bad.__doc__) and begins_badly(None)
    assert lacks_annotations(bad) == "annotates not y"
    assert lacks_shapes(bad, bad.__doc__) == "gives no shape for x"
    assert lacks_units(bad, bad.__doc__) == "gives no unit for size_bytes"
    assert lacks_errors(bad, bad.__doc__) == "raises ValueError and does not say so"
    good = "Doubles (batch, length).\n\nsize_bytes: bytes.\n\nRaises:\n    ValueError: no."
    assert not begins_badly(good)
    assert not any(rule(bad, good) for rule in (lacks_shapes, lacks_units, lacks_errors))
    assert wrong_places("Taught in: notebook 99, section 1.", {"00": {"1"}})
    assert not wrong_places("Taught in: notebook 00, section 1.", {"00": {"1"}})
