"""The measuring of times takes turns, so that a busy moment hits everything that is compared."""

import pytest

from helpers import bench


def test_calls_take_turns_and_the_order_rotates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    rounds = list(bench.interleaved(calls, 2))
    assert "".join(seen) == "abcbca"
    assert rounds == [dict.fromkeys("abc", 1)] * 2


def test_a_failing_call_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        list(bench.interleaved({"bad": lambda: 1 / 0}, 1))
