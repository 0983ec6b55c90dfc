"""Imported before the libraries: what they say unasked must not reach a command's output."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

# At import bitsandbytes complains that no kernels are fetched from the hub, which none here are.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no log lines, both as before afterwards; what fails still raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
