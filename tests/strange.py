"""What the properties of tests/fuzz share: strange values, and when an error is the course's own.

The rule: whatever value of the annotated type a public helper is given, it either returns, or one
of its own `raise` statements says what was wrong. An error out of torch, peft, pandas or json, or
one that Python raises by itself (KeyError of a dict, IndexError of a list), is a bug. A value of a
wrong type may raise whatever Python raises.

`HYPOTHESIS_PROFILE=long python -m pytest tests/fuzz` looks twenty times as far, in some minutes.
"""

import linecache
import os
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, settings

import helpers

HELPERS = str(Path(helpers.__file__).parent)
QUIET = dict(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("short", max_examples=15, derandomize=True, database=None, **QUIET)
settings.register_profile("long", max_examples=300, **QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


class NotOurs(AssertionError):
    """An error that no `raise` of the course's made."""


def own(error: BaseException) -> bool:
    """Whether a `raise` in helpers/ made the error, with words, and it is of a kind to expect."""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    code = frame.tb_frame.f_code
    lines = (linecache.getline(code.co_filename, n) for n in range(frame.tb_lineno, 0, -1))
    line = next(line for line in lines if line.strip())
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
