"""Births and deaths of storages, on real and on fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.memory.replay import replay
from helpers.memory.tracker import Trace, Tracker


def sizes(trace: Trace) -> list[int]:
    return [event.bytes for event in trace.events]


@pytest.fixture(params=["real", "fake"])
def tensors(request):
    if request.param == "real":
        yield
    else:
        with FakeTensorMode():
            yield


def test_a_storage_is_born_once_and_dies_with_its_last_view(tensors):
    with Tracker(Trace()) as tracker:
        a = torch.empty(256, dtype=torch.float32)
        view = a[:10]
        a.add_(1)
        assert sizes(tracker.trace) == [1024]
        del a
        assert sizes(tracker.trace) == [1024]
        del view
    assert sizes(tracker.trace) == [1024, -1024]


def test_claims_relabel_and_what_is_left_becomes_an_activation(tensors):
    with Tracker(Trace()) as tracker:
        weight, kept = torch.empty(4), torch.empty(8)
        tracker.claim([weight], "weights")
        tracker.keep_alive_as("activations")
    assert list(tracker.trace.category.values()) == ["weights", "activations"]
    del kept


def test_bytes_inside_an_operator_come_and_go_around_its_output():
    def extra(func, args, kwargs):
        return ((100,), (7,)) if func is torch.ops.aten.mm.default else ((), ())

    with Tracker(Trace(), extra) as tracker:
        out = torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    around = [e.bytes for e in tracker.trace.events if e.operator == "mm"]
    assert around[:5] == [100, 16, 7, -100, -7]
    del out


def test_replay_counts_the_second_step_by_phase():
    trace = Trace()
    weight = trace.allocate(1000, "weights", "load")
    trace.mark("step 1")
    trace.mark("phase forward")
    first = trace.allocate(10**6, "temporaries", "mm")
    trace.free(first)
    trace.mark("step 2")
    trace.mark("phase forward")
    trace.free(trace.allocate(600, "activations", "mm"))
    trace.mark("phase backward")
    trace.free(trace.allocate(2000, "gradients", "bmm"))
    found = replay(trace)
    assert {p: peak.allocated for p, peak in found.phases.items()} == {
        "forward": 1024 + 1024,
        "backward": 1024 + 2048,
        "optimizer": 0,
    }
    assert found.phases["backward"].categories["gradients"] == 2000
    assert found.reserved == 2 * 2**20
    assert trace.size[weight] == 1000


def test_what_lives_on_the_host_is_not_counted():
    trace = Trace()
    trace.allocate(10**9, "host", "rng")
    assert replay(trace).reserved == 0
