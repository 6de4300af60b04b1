"""Checks for the exercises of lesson 43: the bubble, what 1F1B keeps, a rank's actions, and a pipeline to choose."""

from __future__ import annotations

import math

from llama_edu.exercises import exercise
from llama_edu.parallel.schedules import Action, interleaved, one_f_one_b, simulate

__all__ = ["check_actions_1f1b", "check_bubble", "check_choose_pipeline", "check_kept_1f1b"]


@exercise(lesson="43_pipeline_parallel", level=1, minutes=5)
def check_bubble(attempt) -> str | None:
    p, m, v = 4, 8, 2
    got = attempt(p, m, v)
    same = lambda value: math.isclose(got, value, rel_tol=1e-9)
    wrong = {
        "You left the stages a rank out: smaller stages fill and drain faster.": (p - 1) / m,
        "The stages multiplied the bubble; they divide it: filling takes (ranks - 1) passes of a *smaller* stage.": (
            v * (p - 1) / m
        ),
        "That is idle time over the whole step. Divide by the work alone.": (p - 1) / (v * m + p - 1),
        "A rank waits while the other ranks - 1 fill the pipeline, not while all do.": p / (v * m),
        "You took the pipeline to be ranks * virtual_stages deep. A rank waits only for the ranks - 1 others, one "
        "small stage each.": (p * v - 1) / (v * m),
        "That is the zero-bubble schedule.": (p - 1) / (3 * v * m),
    }
    for verdict, value in wrong.items():
        if same(value):
            return verdict
    for p, m, v in ((4, 8, 2), (2, 4, 1), (8, 16, 3)):
        right = simulate(interleaved(p, m, v)).bubble
        if not math.isclose(attempt(p, m, v), right, rel_tol=1e-9):
            return (
                f"For {p} ranks, {m} micro-batches and {v} stages a rank the bubble is {right:.4f}; yours is "
                f"{attempt(p, m, v):.4f}."
            )
    return None


@exercise(lesson="43_pipeline_parallel", level=1, minutes=5)
def check_kept_1f1b(attempt) -> str | None:
    cases = [(r, p, m) for p, m in ((4, 8), (4, 3), (6, 6)) for r in range(p)]
    got = [attempt(*case) for case in cases]
    if got == [simulate(one_f_one_b(p, m)).kept[r] for r, p, m in cases]:
        return None
    wrong = {
        "All of them? That is GPipe. 1F1B frees one before it takes the next.": lambda r, p, m: m,
        "Only the first rank keeps so many: a later rank gets its first gradient sooner.": lambda r, p, m: min(m, p),
        "That is the warm-up. During the first backward pass one micro-batch more is there.": lambda r, p, m: min(
            m, p - 1 - r
        ),
        "The other way round: the first rank waits longest for a gradient, the last keeps one.": lambda r, p, m: min(
            m, r + 1
        ),
        "With fewer micro-batches than ranks a rank cannot keep more than there are.": lambda r, p, m: p - r,
        "Also without the micro-batch at work, and there may be fewer micro-batches.": lambda r, p, m: p - 1 - r,
    }
    for verdict, value in wrong.items():
        if got == [value(*case) for case in cases]:
            return verdict
    return "Count along the list: each F keeps one more, each B frees one. Rank 1 of 4 with 8 micro-batches keeps 3."


def _schedule(attempt, ranks: int, micro_batches: int) -> list[list[str]]:
    return [list(attempt(r, ranks, micro_batches)) for r in range(ranks)]


@exercise(lesson="43_pipeline_parallel", level=2, minutes=15)
def check_actions_1f1b(attempt) -> str | None:
    for ranks, m in ((4, 8), (4, 3), (2, 5)):
        lists = _schedule(attempt, ranks, m)
        right = [[f"{a.kind}{a.micro_batch}" for a in actions] for actions in one_f_one_b(ranks, m)]
        if lists == right:
            continue
        where = f"with {ranks} ranks and {m} micro-batches"
        every = {f"{kind}{i}" for kind in "FB" for i in range(m)}
        for r, actions in enumerate(lists):
            missing, unknown = every - set(actions), set(actions) - every
            if unknown:
                return f"Rank {r} has {min(map(str, unknown))!r}; {where} there are F0 to F{m - 1} and B0 to B{m - 1}."
            if missing:
                return f"Rank {r} {where} never does {', '.join(sorted(missing))}: finish what the warm-up left over."
            if len(actions) != 2 * m:
                return f"Rank {r} does something twice."
        if lists == right[::-1]:
            return "The other way round: the first rank warms up longest, the last not at all."
        if any([a for a in actions if a[0] == "B"] != [f"B{i}" for i in range(m)] for actions in lists):
            return "Gradients come back in the order in which the micro-batches went: B0, B1, B2, ..."
        if all(actions[:m] == [f"F{i}" for i in range(m)] for actions in lists):
            return "All forwards first is GPipe: it keeps every micro-batch. Alternate after the warm-up."
        made = [[Action(a[0], r, int(a[1:])) for a in actions] for r, actions in enumerate(lists)]
        try:
            timeline = simulate(made)
        except ValueError as error:
            return f"With these lists {error}. Does each rank warm up once more than the rank after it?"
        best = simulate(one_f_one_b(ranks, m))
        for r, (yours, needed) in enumerate(zip(timeline.kept, best.kept)):
            if yours > needed:
                return (
                    f"Rank {r} {where} keeps {yours} micro-batches where {needed} are enough: the warm-up is "
                    "ranks - 1 - rank forwards."
                )
        return (
            f"It runs, but takes {timeline.seconds:g} s where 1F1B takes {best.seconds:g} s {where}: the warm-up is "
            "too short, so a rank waits for a gradient while it could go forward."
        )
    return None


@exercise(lesson="43_pipeline_parallel", level=3, minutes=20)
def check_choose_pipeline(attempt) -> str | None:
    p, v, m = attempt()
    layers, batch = 64, 32
    if min(p, v, m) < 1 or layers % (p * v):
        return f"P * V = {p * v} stages do not divide 64 layers evenly."
    if batch % m:
        return f"32 sequences do not divide into {m} micro-batches."
    if m % p:
        return f"M = {m} is not a multiple of P = {p}, as the interleaved schedule needs."
    if layers // p > 16:
        return f"A rank would hold {layers // p} layers, and 16 are allowed: take more ranks."
    idle = simulate(interleaved(p, m, v)).bubble
    sent = 2 * v * batch * 4096 * 8192 * 2
    too_much = f"a middle rank sends {sent / 1e9:.1f} GB, and 10 are allowed: each of its stages costs a border's worth"
    if idle > 0.05 and sent > 10e9:
        return f"Neither fits: the bubble is {idle:.1%}, and {too_much}. Fewer ranks help, more stages do not."
    if idle > 0.05:
        return f"The bubble is {idle:.1%}, and 5 % are allowed: more micro-batches are free of bytes, more ranks cost."
    if sent > 10e9:
        return f"The bubble fits, but {too_much}. Use more micro-batches instead."
    return None
