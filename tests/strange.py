"""What the properties of tests/fuzz share: strange values, and when an error is the course's own.

The rule: whatever value of the annotated type a public helper is given, it either returns, or one
of its own `raise` statements says what was wrong. An error out of torch, peft, pandas or json, or
one that Python raises by itself (KeyError of a dict, IndexError of a list), is a bug. Where a whole
number is asked for, True, 2.0, "8" and NaN are strange values too.

Not held to it: a value of another wrong type, for which Python's own error does; an error of the
system that names the file; more memory than there is; and a batch that a model cannot read, which
is the model's business.

`HYPOTHESIS_PROFILE=long python -m pytest tests/fuzz` looks twenty times as far, in some minutes.
"""

import linecache
import os
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import helpers

HELPERS = str(Path(helpers.__file__).parent)
QUIET = dict(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("short", max_examples=15, derandomize=True, database=None, **QUIET)
settings.register_profile("long", max_examples=300, **QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


# --- Strange values -----------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
WHOLE = st.one_of(st.integers(-2, 70), st.sampled_from([0, 2**31, -(10**12), 10**9]))
SHARE = st.one_of(st.floats(), st.sampled_from([0.0, 0.5, 1.0, -1.0, 1e-300]))
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
SMALL = torch.float32, torch.float16, torch.bfloat16


def names(*known: str) -> st.SearchStrategy[str]:
    """Names that are known, nearly known, and not at all."""
    near = st.sampled_from(known).flatmap(
        lambda name: st.sampled_from([name.upper(), name[:-1], f"{name}s", f" {name}", name[::-1]])
    )
    return st.one_of(st.sampled_from(known), near, TEXT)


PATTERNS = st.one_of(
    names("q_proj", "v_proj", "all-linear", ".*attn", "lm_head"),
    st.lists(names("q_proj", "down_proj", ".*", "layers.0"), max_size=3),
    st.sampled_from(["(", "[", "*", "q_proj|", "\\", "(?P<x>", ".*{99999}", "a**"]),
)


@st.composite
def tensors(draw, dtypes=DTYPES, shapes=SHAPES) -> torch.Tensor:
    """Small tensors: empty, of whole numbers, with NaN and infinity, transposed."""
    shape, dtype = draw(shapes), draw(dtypes)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    if values.numel() and draw(st.booleans()):
        values.view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf"), 0.0, -1e30]))
    values = values.nan_to_num(0, 0, 0) if not dtype.is_floating_point else values
    made = values.to(dtype)
    return made.mT if made.dim() > 1 and draw(st.booleans()) else made


FLOATS = tensors(dtypes=st.sampled_from(SMALL))

# For what is not whole, and what is not even a number.
ODD = st.sampled_from([True, False, 2.0, float("nan"), float("inf"), "8", "", [1], -(10**30)])
COUNTS = st.one_of(st.integers(-2, 9), ODD)


# --- Whose error it is ---------------------------------------------------------------------------


class NotOurs(AssertionError):
    """An error that no `raise` of the course's made."""


def own(error: BaseException) -> bool:
    """Whether a `raise` in helpers/ made the error, with words, and it is of a kind to expect."""
    if isinstance(error, OSError) and error.filename:
        return True
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    code = frame.tb_frame.f_code
    lines = (linecache.getline(code.co_filename, n) for n in range(frame.tb_lineno, 0, -1))
    line = next((line for line in lines if line.strip()), "")
    unexpected = KeyError | IndexError | AttributeError | ArithmeticError
    return (
        code.co_filename.startswith(HELPERS)
        and "raise " in line
        and not isinstance(error, unexpected)
        and len(str(error).split()) > 3
    )


def tried(call: Callable[[], object]) -> object | None:
    """What the call returns, or None after an error of the course's own.

    Raises:
        NotOurs: any other error.
    """
    try:
        return call()
    except Exception as error:
        if not own(error):
            raise NotOurs(f"{type(error).__name__}: {error}") from error
        return None
