"""The ledger of claims: what the note says, what was measured, and the verdict that follows.

`judge` computes a verdict, it never takes one. The rule that a claim is held to stands in the
column `expects` of `data/claims.csv`, so that a cell cannot bend it:

    true                            a bool
    all KEY; KEY                    a dict with exactly these conditions, each a bool
    = 4194304 UNIT                  a number, exactly
    ~ 0.062 ± 0.0005 UNIT           a number, within a tolerance
    in 0.2 .. 0.5 UNIT              a number in a range
    <= 48 UNIT   or   >= 2 UNIT     a number on one side of a limit
    set A, B                        a collection of names
    better                          Seeds: a beats b
    at least as good within M       Seeds: a loses at most M against b
    comparable within M             Seeds: a and b differ by less than M

M is a number in the unit of the measurement, or "5 % of gain": of what b improved over the
untrained model. Every rule but `all` also takes a dict of condition to value: each value is held
to the rule, and a claim that holds for some of them only is *partly* true.

Command line: `python -m helpers.claims status | update | check | page`.
"""

from .book import VERDICTS, Claim, find, ledger
from .rules import ClaimError, Seeds
from .verdicts import Judgement, Table, judge, out_of_reach, settle, table, weigh

__all__ = [
    "VERDICTS",
    "Claim",
    "ClaimError",
    "Judgement",
    "Seeds",
    "Table",
    "find",
    "judge",
    "ledger",
    "out_of_reach",
    "settle",
    "table",
    "weigh",
]
