"""The rules that the ledger's column `expects` spells, and how a measurement meets them.

Source: this course's own; the intervals are Student's t for paired differences.
Taught in: notebook 00, section 3.
"""

import math
import re
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Student's t, 97.5 % quantile, for 3 to 20 seeds (2 to 19 degrees of freedom).
T_QUANTILES = (
    *(4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930),
)


class ClaimError(ValueError):
    """A claim cannot be judged as asked; the message is one sentence that says why."""


@dataclass(frozen=True)
class Interval:
    """Mean and 95 % confidence interval of a paired difference, in the measurement's unit."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Seeds:
    """Results of two arms over the same seeds: `a[i]` and `b[i]` share a seed.

    Args:
        a: the arm that the claim speaks for, one number per seed (3 to 20 seeds).
        b: the arm it is compared with.
        larger_is_better: True for an accuracy, False for a loss.
        untrained: the same measure before training, for a margin in "% of gain".
        names: how the two arms are called in the printed line.
        of: what the numbers are of, when it is layers or texts that are compared in pairs.

    Raises:
        ClaimError: fewer than 3 or more than 20 seeds, unequal lengths, or a value not finite.

    Source: Student 1908, "The Probable Error of a Mean"; for `comparable`, Schuirmann 1987, two
    one-sided tests (read off the 95 % interval, each test is held to 2.5 %).
    Taught in: notebook 01, section 3.
    """

    a: Sequence[float]
    b: Sequence[float]
    larger_is_better: bool
    untrained: float | None = None
    names: tuple[str, str] = ("a", "b")
    of: str = "seeds"

    def __post_init__(self) -> None:
        if len(self.a) != len(self.b):
            raise ClaimError(
                f"Seeds are compared in pairs, but a has {len(self.a)} and b has {len(self.b)}."
            )
        if not 3 <= len(self.a) <= len(T_QUANTILES) + 2:
            raise ClaimError(
                f"A spread needs 3 to {len(T_QUANTILES) + 2} seeds; {len(self.a)} were given."
            )
        for name in (*self.names, self.of):
            plain(name)
        if not all(math.isfinite(value) for value in [*self.a, *self.b]):
            raise ClaimError("Every seed needs a finite number; one is infinite or not a number.")

    def lead(self) -> Interval:
        """By how much a is better than b; negative where it is worse."""
        sign = 1 if self.larger_is_better else -1
        leads = [sign * (a - b) for a, b in zip(self.a, self.b, strict=True)]
        mean = statistics.fmean(leads)
        error = statistics.stdev(leads) / math.sqrt(len(leads))
        reach = T_QUANTILES[len(leads) - 3] * error
        return Interval(mean, mean - reach, mean + reach)

    def gain(self) -> float:
        """What b improved over the untrained model; positive.

        Raises:
            ClaimError: no ``untrained`` value, or b is no better than it.
        """
        if self.untrained is None:
            raise ClaimError("A margin in % of gain needs Seeds(…, untrained=…).")
        change = statistics.fmean(self.b) - self.untrained
        gain = change if self.larger_is_better else -change
        if gain <= 0:
            raise ClaimError(
                f"{self.names[1]} did not improve on the untrained model ({gain:.3g}), "
                "so a margin in % of its gain means nothing."
            )
        return gain


@dataclass(frozen=True)
class Outcome:
    """One value against a rule: whether it holds (None: inside the seed spread), and as text."""

    holds: bool | None
    measured: str
    detail: str = ""
    verdict: str = ""  # only where holding or not is too coarse


@dataclass(frozen=True)
class Rule:
    """What `expects` says: as printed, the conditions it names, and the test of one value."""

    says: str
    test: Callable[[object], Outcome]
    keys: tuple[str, ...] = ()


def outcome(rule: Rule, measured: object) -> tuple[str, str, str]:
    """A measurement, one value or a dict of them, under a rule: its text, verdict and condition.

    Raises:
        ClaimError: the rule cannot read that measurement.
    """
    if isinstance(measured, Mapping):
        return _many(rule, measured)
    if rule.keys:
        raise ClaimError(f"give a dict with the conditions {'; '.join(rule.keys)}.")
    one = rule.test(measured)
    verdict = one.verdict or {True: "confirmed", False: "wrong", None: "undecided"}[one.holds]
    return one.measured, verdict, one.detail


def _many(rule: Rule, measured: Mapping[str, object]) -> tuple[str, str, str]:
    _check_keys(rule, measured)
    outcomes = {plain(key): rule.test(value) for key, value in measured.items()}
    groups = {
        "holds": [key for key, one in outcomes.items() if one.holds],
        "fails": [key for key, one in outcomes.items() if one.holds is False],
        "undecided": [key for key, one in outcomes.items() if one.holds is None],
    }
    condition = " · ".join(f"{name}: {'; '.join(keys)}" for name, keys in groups.items() if keys)
    return _many_text(outcomes, len(groups["holds"])), _many_verdict(groups), condition


def _many_text(outcomes: dict[str, Outcome], held: int) -> str:
    if all(one.measured in ("true", "false") for one in outcomes.values()):
        return f"{held} of {len(outcomes)} conditions"
    return "; ".join(
        f"{key}: {', '.join(filter(None, [one.measured, one.detail]))}"
        for key, one in outcomes.items()
    )


def _many_verdict(groups: dict[str, list[str]]) -> str:
    present = {name for name, keys in groups.items() if keys}
    if present == {"holds"}:
        return "confirmed"
    if "holds" in present:
        return "partly"
    return "wrong" if present == {"fails"} else "undecided"


def _check_keys(rule: Rule, measured: Mapping[str, object]) -> None:
    if not measured:
        raise ClaimError("the dict of conditions is empty.")
    if not rule.keys or set(measured) == set(rule.keys):
        return
    missing = [key for key in rule.keys if key not in measured]
    extra = [key for key in measured if key not in rule.keys]
    parts = [f"missing: {'; '.join(missing)}"] if missing else []
    parts += [f"not asked for: {'; '.join(map(str, extra))}"] if extra else []
    raise ClaimError(f"the conditions differ ({', '.join(parts)}).")


def plain(text: str) -> str:
    """The text, unless it would break the one line that a judgement is.

    Raises:
        ClaimError: no text, an empty one, or one that holds "·" or a line break.
    """
    if not isinstance(text, str) or not text.strip() or "·" in text or "\n" in text:
        raise ClaimError(f"a name or condition is one line of text without '·', not {text!r}.")
    return text


_NUMBER = r"(-?\d+(?:\.\d+)?)"
_UNIT = r"(?: (\S.*))?"


def parse(expects: str) -> Rule:
    """The rule that a cell of the column `expects` spells.

    Raises:
        ClaimError: the text is none of the forms in this module's docstring.
    """
    for pattern, build in _FORMS:
        if match := re.fullmatch(pattern, expects):
            return build(*match.groups())
    raise ClaimError(f"The ledger's rule {expects!r} is none of: {', '.join(_FORM_NAMES)}.")


def _true() -> Rule:
    return Rule("", _bool)


def _all(keys: str) -> Rule:
    return Rule("", _bool, tuple(key.strip() for key in keys.split(";")))


def _bool(value: object) -> Outcome:
    if not isinstance(value, bool | np.bool_):
        raise ClaimError(f"a condition is True or False, not {_shown(value)}.")
    return Outcome(bool(value), "true" if value else "false")


def _equal(number: str, unit: str | None) -> Rule:
    says = _figure(float(number) if "." in number else int(number), unit)
    return _numeric(says, unit, lambda value: value == float(number))


def _near(number: str, tolerance: str, unit: str | None) -> Rule:
    # The last factor: 0.0625 lies at half a unit of 0.062, whatever binary makes of it.
    reach = float(tolerance) * (1 + 1e-9)
    says = f"{number} {unit}" if unit else number
    return _numeric(says, unit, lambda value: abs(value - float(number)) <= reach)


def _inside(low: str, high: str, unit: str | None) -> Rule:
    says = f"{low} to {high} {unit}" if unit else f"{low} to {high}"
    return _numeric(says, unit, lambda value: float(low) <= value <= float(high))


def _limit(side: str, number: str, unit: str | None) -> Rule:
    says = f"{'at most' if side == '<=' else 'at least'} {number}{' ' + unit if unit else ''}"
    sign = 1 if side == "<=" else -1
    return _numeric(says, unit, lambda value: sign * value <= sign * float(number))


def _numeric(says: str, unit: str | None, holds: Callable[[float], bool]) -> Rule:
    def test(value: object) -> Outcome:
        number = _number(value)
        # bool: a NumPy number compares to a NumPy truth, which is not the object False.
        return Outcome(bool(holds(number)), _figure(number, unit))

    return Rule(says, test)


def _number(value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise ClaimError(f"the measurement is a number, not {_shown(value)}.")
    if not math.isfinite(value):
        raise ClaimError(f"the measurement is a finite number, not {value}.")
    return value


def _figure(number: int | float, unit: str | None) -> str:
    """Whole numbers and thousands in full, the rest with four digits: enough for the ledger."""
    whole = isinstance(number, int | np.integer) or abs(number) >= 1000
    text = f"{number:,.0f}" if whole else f"{number:.4g}"
    return f"{text} {unit}" if unit else text


def _set(names: str) -> Rule:
    said = [name.strip() for name in names.split(",")]

    def test(value: object) -> Outcome:
        if isinstance(value, str) or not isinstance(value, Collection):
            raise ClaimError(f"the measurement is a collection of names, not {_shown(value)}.")
        found = {plain(name) for name in value}
        missing = [name for name in said if name not in found]
        extra = sorted(found - set(said))
        parts = [f"missing: {', '.join(missing)}"] if missing else []
        parts += [f"not named by the note: {', '.join(extra)}"] if extra else []
        partly = "partly" if parts and found & set(said) else ""
        text = ", ".join(sorted(found)) or "none"
        return Outcome(not parts, text, "; ".join(parts), partly)

    return Rule(", ".join(said), test)


def _better() -> Rule:
    return _compared(None, lambda lead, margin: _decide(lead, 0, math.inf))


def _at_least(margin: str) -> Rule:
    return _compared(margin, lambda lead, margin: _decide(lead, -margin, math.inf))


def _comparable(margin: str) -> Rule:
    return _compared(margin, lambda lead, margin: _decide(lead, -margin, margin))


def _decide(lead: Interval, floor: float, ceiling: float) -> bool | None:
    """True when the whole interval lies between the two, False when it lies outside."""
    if floor < lead.low and lead.high < ceiling:
        return True
    return False if lead.high <= floor or lead.low >= ceiling else None


def _compared(margin: str | None, decide: Callable[[Interval, float], bool | None]) -> Rule:
    def test(value: object) -> Outcome:
        if not isinstance(value, Seeds):
            raise ClaimError(f"the measurement is claims.Seeds(a=…, b=…), not {_shown(value)}.")
        lead, allowed = value.lead(), _margin(margin, value)
        text = _lead_text(value, lead)
        if margin is not None:
            text += f", margin {allowed:.2g}"
        return Outcome(decide(lead, allowed), _arms(value), text)

    return Rule("", test)


def _margin(margin: str | None, seeds: Seeds) -> float:
    if margin is None:
        return 0.0
    number = float(margin.split(" ")[0])
    return number / 100 * seeds.gain() if margin.endswith("of gain") else number


def _arms(seeds: Seeds) -> str:
    means = [statistics.fmean(arm) for arm in (seeds.a, seeds.b)]
    arms = " and ".join(
        f"{mean:.4g} ({name})" for mean, name in zip(means, seeds.names, strict=True)
    )
    return f"{arms}, means of {len(seeds.a)} {seeds.of}"


def _lead_text(seeds: Seeds, lead: Interval) -> str:
    span = f"95 % interval {lead.low:.2g} to {lead.high:.2g}"
    return f"{seeds.names[0]} leads by {lead.mean:.2g}, {span}"


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '…'} ({type(value).__name__})"


_WITHIN = r"within (\d+(?:\.\d+)?(?: % of gain)?)"
_FORMS: tuple[tuple[str, Callable[..., Rule]], ...] = (
    (r"true", _true),
    (r"all (\S.*)", _all),
    (rf"= {_NUMBER}{_UNIT}", _equal),
    (rf"~ {_NUMBER} ± {_NUMBER}{_UNIT}", _near),
    (rf"in {_NUMBER} \.\. {_NUMBER}{_UNIT}", _inside),
    (rf"(<=|>=) {_NUMBER}{_UNIT}", _limit),
    (r"set (\S.*)", _set),
    (r"better", _better),
    (rf"at least as good {_WITHIN}", _at_least),
    (rf"comparable {_WITHIN}", _comparable),
)
_FORM_NAMES = (
    *("true", "all KEY; KEY", "= N", "~ N ± N", "in N .. N", "<= N", ">= N", "set A, B"),
    *("better", "at least as good within N", "comparable within N"),
)
