"""Which keywords the course passes to its libraries, and which ones an installed library takes.

`python -m helpers.signatures` prints, as JSON, what the installed versions take of every callable
that lessons and helpers pass a keyword to. `helpers.versions` stores it for two environments.
"""

import ast
import importlib
import inspect
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
# A method called on a value has no name that an import gives; these classes are asked for it …
OWNERS = (
    "torch.Tensor",
    "torch.nn.Module",
    "torch.optim.Optimizer",
    "accelerate.Accelerator",
    "peft.PeftModel",
    "peft.tuners.lora.LoraModel",
    "transformers.PreTrainedModel",
    "transformers.GenerationMixin",
    "transformers.PreTrainedTokenizerBase",
    "transformers.Trainer",
)
# … unless one of these has a method of that name too.
OTHERS = (
    *("pandas.DataFrame", "pandas.Series", "pandas.core.groupby.DataFrameGroupBy"),
    *("numpy.ndarray", "matplotlib.axes.Axes", "matplotlib.figure.Figure"),
    *("builtins.str", "builtins.list", "builtins.dict", "pathlib.Path", "psutil.Process"),
)
# What takes the `**kwargs` of a callable, where the callable itself does not read them.
HANDED_ON = {
    r"transformers\.Auto\w*Model\w*\.from_pretrained": (
        "transformers.PreTrainedModel.from_pretrained"
    ),
    r"\.generate": "transformers.GenerationConfig.__init__",
}
_READ = re.compile(r"""kwargs\.(?:pop|get)\(\s*["'](\w+)["']""")
_IN_DOC = re.compile(r"\s*[\w.]+\((.*?)\)(?: *->|\s*\n)", re.DOTALL)
# These would swallow a misspelt keyword, so only those that they name count.
NAMED_ONLY = ("transformers.BitsAndBytesConfig",)
Calls = dict[str, set[str]]  # "peft.LoraConfig" or ".merge_and_unload" to the keywords passed


def of_course(root: Path = ROOT) -> Calls:
    """Every keyword that a lesson's cell or a helper passes to one of LIBRARIES."""
    found: Calls = defaultdict(set)
    for source in _sources(root):
        for name, keywords in of_source(source).items():
            found[name] |= keywords
    return dict(found)


def _sources(root: Path) -> Iterator[str]:
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        yield "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    for path in sorted((root / "helpers").rglob("*.py")):
        yield path.read_text(encoding="utf-8")


def of_source(source: str) -> Calls:
    """The calls with keywords in one source: by the import's full name, or ".method" of a value."""
    tree = ast.parse(source)
    names = _imported(tree)
    found: Calls = defaultdict(set)
    for node in ast.walk(tree):
        keywords = {k.arg for k in getattr(node, "keywords", []) if k.arg}
        if isinstance(node, ast.Call) and keywords:
            name = _full_name(node.func, names)
            if name.startswith((".", *(f"{library}." for library in LIBRARIES))):
                found[name] |= keywords
    return dict(found)


def _imported(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for, such as F: torch.nn.functional."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                names[each.asname or each.name.split(".")[0]] = (
                    each.name if each.asname else each.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for each in node.names:
                names[each.asname or each.name] = f"{node.module}.{each.name}"
    return names


def _full_name(node: ast.expr, names: dict[str, str]) -> str:
    """ "peft.PeftModel.from_pretrained", ".save_pretrained" of a value, or "" for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if not isinstance(node, ast.Attribute):
        return ""
    base = _full_name(node.value, names)
    return f"{base}.{node.attr}" if base and not base.startswith(".") else f".{node.attr}"


def takes(name: str) -> list[str] | None:
    """The keywords that an installed callable takes.

    "**" among them: any other too, since it hands them on or keeps them.
    None: the installed version has no such callable; for a method, none of OWNERS has it, or one
    of OTHERS has it as well.
    """
    owners = OWNERS if name.startswith(".") else ("",)
    found = [value for owner in owners if (value := _find((owner + name).strip("."))) is not None]
    if not found or (name.startswith(".") and any(_find(other + name) for other in OTHERS)):
        return None
    found += [_find(to) for pattern, to in HANDED_ON.items() if re.fullmatch(pattern, name)]
    return sorted(set().union(*map(_parameters, found)))


def _find(name: str) -> object | None:
    """The object behind a full name, whichever part of the name is the module."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            value = getattr(value, part, None)
        return value
    return None


def _parameters(value: object) -> set[str]:
    """The parameters, and the words that it takes out of its `**kwargs`.

    A function of PyTorch's in C++ has no signature; its parameters stand at the head of its text.
    """
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return _in_text(value.__doc__ or "")
    names = {"**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters}
    if "**" in names:
        names |= _read(value)
    # A model's configuration keeps whatever it is given as an attribute.
    return names | {"**"} if "PreTrainedConfig" in str(getattr(value, "__mro__", "")) else names


def _in_text(text: str) -> set[str]:
    """The names in "zeros(*size, *, out=None, requires_grad: bool = False) -> Tensor"."""
    head = _IN_DOC.match(text)
    if not head:
        return {"**"}
    return {re.split("[=:]", part)[0].strip() for part in head[1].split(",")} - {"*", ""}


def _read(value: object) -> set[str]:
    try:
        return set(_READ.findall(inspect.getsource(getattr(value, "__func__", value))))
    except (OSError, TypeError):
        return set()


def hidden(calls: Calls, taken: dict[str, list[str] | None]) -> set[str]:
    """The calls of which nobody can tell: "name keyword", taken by a `**kwargs` without a word."""
    open_ = {name: has for name, has in taken.items() if "**" in (has or ())}
    return {
        f"{name} {keyword}"
        for name in calls.keys() & open_.keys() - set(NAMED_ONLY)
        for keyword in calls[name] - set(open_[name])
    }


def problems(calls: Calls, taken: dict[str, list[str] | None], edge: str) -> list[str]:
    """One sentence for each keyword or callable that an edge lacks."""
    found = []
    for name, keywords in sorted(calls.items()):
        if name not in taken:
            found.append(
                f"{name} is not in data/signatures/{edge}.json: run "
                f"`python -m helpers.versions {edge} --signatures`"
            )
        elif taken[name] is None:
            if not name.startswith("."):  # a method of a class of our own, or of pandas
                found.append(f"the {edge} libraries have no {name}")
        elif "**" not in taken[name] or name in NAMED_ONLY:
            missing = sorted(keywords - set(taken[name]))
            found += [f"the {edge} {name} takes no {keyword}=" for keyword in missing]
    return found


def main() -> int:
    """Prints what the installed libraries take."""
    json.dump({name: takes(name) for name in of_course()}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
