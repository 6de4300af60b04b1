"""Pipeline schedules: everything is done once, nobody waits for ever, bubbles and memory are what the formulas say."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_edu.parallel.planner import chunks_in_flight
from llama_edu.parallel.schedules import (
    Action,
    draw_timeline,
    gpipe,
    interleaved,
    one_f_one_b,
    simulate,
    zero_bubble,
)

SIZES = {"ranks": st.integers(2, 6), "micro_batches": st.integers(1, 14), "virtual_stages": st.integers(1, 4)}


def all_schedules(ranks, micro_batches, virtual_stages):
    yield 1, gpipe(ranks, micro_batches)
    yield 1, one_f_one_b(ranks, micro_batches)
    for contiguous in {ranks, ranks + 1, max(ranks, micro_batches)}:
        yield virtual_stages, interleaved(ranks, micro_batches, virtual_stages, contiguous)
    yield virtual_stages, zero_bubble(ranks, micro_batches, virtual_stages)


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_every_schedule_ends_and_does_everything_once(ranks, micro_batches, virtual_stages):
    for v, schedule in all_schedules(ranks, micro_batches, virtual_stages):
        timeline = simulate(schedule)
        assert len(timeline.spans) == sum(map(len, schedule))
        kinds = "FIW" if any(a.kind == "I" for a in schedule[0]) else "FB"
        wanted = {Action(k, s, m) for k in kinds for s in range(ranks * v) for m in range(micro_batches)}
        done = [span.action for span in timeline.spans]
        assert set(done) == wanted and len(done) == len(wanted)
        assert all(span.rank == span.action.stage % ranks for span in timeline.spans)


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_the_bubble_is_the_formula(ranks, micro_batches, virtual_stages):
    micro_batches = max(ranks, micro_batches)
    for v, schedule in all_schedules(ranks, micro_batches, virtual_stages):
        part = 3 if any(a.kind == "I" for a in schedule[0]) else 1
        if part == 3 and micro_batches % ranks:
            continue
        assert simulate(schedule).bubble == pytest.approx((ranks - 1) / (part * v * micro_batches), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(**SIZES)
def test_what_is_kept_is_the_planners_count(ranks, micro_batches, virtual_stages):
    micro_batches *= ranks
    timeline = simulate(interleaved(ranks, micro_batches, virtual_stages))
    assert timeline.kept == [chunks_in_flight(ranks, virtual_stages, micro_batches, r) for r in range(ranks)]
    assert simulate(gpipe(ranks, micro_batches)).kept == [micro_batches] * ranks
    assert simulate(zero_bubble(ranks, micro_batches)).kept == [min(ranks, micro_batches)] * ranks


@settings(max_examples=40, deadline=None)
@given(hop=st.floats(0, 2), **SIZES)
def test_no_action_starts_before_what_it_needs(hop, ranks, micro_batches, virtual_stages):
    for _, schedule in all_schedules(ranks, micro_batches, virtual_stages):
        spans = simulate(schedule, hop=hop).spans
        at = {("B" if s.action.kind == "I" else s.action.kind, s.action.stage, s.action.micro_batch): s for s in spans}
        last = max(s.action.stage for s in spans)
        for (kind, stage, m), span in at.items():
            if kind == "F" and stage > 0:
                assert span.start >= at["F", stage - 1, m].end + hop
            if kind == "B":
                assert span.start >= at["F", stage, m].end
                assert stage == last or span.start >= at["B", stage + 1, m].end + hop
            if kind == "W":
                assert span.start >= at["B", stage, m].end
        for rank in range(ranks):
            mine = [s for s in spans if s.rank == rank]
            assert all(a.end <= b.start for a, b in pairwise(mine))


def test_ranks_that_wait_for_each_other_are_named():
    with pytest.raises(ValueError, match=r"does not end: rank 0 before 0B0, rank 1 before 1B0"):
        simulate([[Action("F", 0, 0), Action("B", 0, 0)], [Action("B", 1, 0), Action("F", 1, 0)]])


def test_seconds_by_action_and_a_picture():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    timeline = simulate(one_f_one_b(2, 2), lambda a: 3.0 if a.stage == 1 else 1.0)
    assert timeline.busy == [4.0, 12.0] and timeline.seconds == 14.0 and timeline.bubble == pytest.approx(2 / 12)
    ax = draw_timeline(timeline, plt.figure().gca())
    assert ax.get_xlim() == (0, 14) and len(ax.texts) == len(timeline.spans)
    plt.close("all")


@pytest.mark.parametrize(
    "name, v, ours",
    [
        ("GPipe", 1, gpipe(4, 8)),
        ("Interleaved1F1B", 2, interleaved(4, 8, 2)),
        ("Interleaved1F1B", 3, interleaved(4, 12, 3)),
        ("InterleavedZeroBubble", 2, zero_bubble(4, 8, 2)),
    ],
)
def test_pytorch_runs_the_same_actions(name, v, ours):
    visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")
    m = 1 + max(a.micro_batch for a in ours[0])
    theirs = [[str(a) for a in rank if a is not None] for rank in visualizer.get_schedule_ops(name, 4, m, v)]
    assert [[a for a in rank if "REDUCE" not in a] for rank in theirs] == [[str(a) for a in rank] for rank in ours]
