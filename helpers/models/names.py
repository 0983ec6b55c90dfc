"""Names of models as people write them, and one sentence for a name that is not known."""

import difflib
import re


def letters(name: str) -> str:
    """A name without case, spaces and punctuation: "Llama-2 7B" is "llama27b"."""
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def unknown(kind: str, given: str, known: tuple[str, ...]) -> str:
    """The sentence for a name that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(str(given).lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"Unknown {kind} {given!r}; {hint}Known: {', '.join(known)}."
