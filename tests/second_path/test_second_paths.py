"""At least thirty settled claims have a second path, and each test names the claim it settles."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from own_rules import agrees, verdict_of

from helpers import claims

HERE = Path(__file__).resolve().parent


def named() -> list[ast.FunctionDef]:
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted(HERE.glob("test_*.py"))]
    return [
        node
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and re.match(r"test_c\d{3}_", node.name)
    ]


def settles(test: ast.FunctionDef) -> list[str]:
    """The ids that a test hands to `agrees`."""
    calls = [n for n in ast.walk(test) if isinstance(n, ast.Call) and n.args]
    return [c.args[0].value for c in calls if getattr(c.func, "id", "") == "agrees"]


def test_at_least_thirty_claims_each_settled_once():
    ids = [f"C{test.name[6:9]}" for test in named()]
    assert [settles(test) for test in named()] == [[id] for id in ids]
    assert max(Counter(ids).values()) == 1
    assert len(set(ids)) >= 30
    ledger = claims.ledger()
    for id in ids:
        assert ledger.loc[id, "verdict"] not in ("open", "out of reach"), id
    assert {"confirmed", "wrong", "partly"} <= set(ledger.loc[ids, "verdict"])


def test_a_second_path_that_finds_something_else_fails():
    with pytest.raises(AssertionError, match="C017"):
        agrees("C017", True)
    with pytest.raises(AssertionError, match="C004"):
        agrees("C004", {"merging keeps the logits": True})
    held = {"as written": True, "after importing TaskType": True}
    with pytest.raises(AssertionError, match="C026"):
        agrees("C026", held)
    agrees("C026", held | {"as written": False})


def test_verdicts_of_conditions():
    assert verdict_of({"a": True, "b": True}) == "confirmed"
    assert verdict_of({"a": True, "b": None}) == verdict_of({"a": True, "b": False}) == "partly"
    assert verdict_of({"a": False}) == "wrong"
    assert verdict_of({"a": False, "b": None}) == "undecided"
