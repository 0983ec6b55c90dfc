"""ARR-COC's idea on a scale that a laptop trains: look closely where the question needs it.

`world` draws scenes and asks questions, `modules` decide where to look, `model` reads, `selectors`
are the ways to train the choice, `base` is the reader that can read and not choose.
"""

from .base import at_random, base
from .model import ArrCoc, ArrCocConfig

__all__ = ["ArrCoc", "ArrCocConfig", "at_random", "base"]
