"""Checks for the exercises of lesson 45: memory under ZeRO, the bubble, a plan that fits, when to write checkpoints."""

from __future__ import annotations

import math

from llama_edu.config import LlamaConfig
from llama_edu.errors import UserError
from llama_edu.exercises import exercise
from llama_edu.parallel.planner import plan_cluster

__all__ = ["check_bubble", "check_checkpoint_interval", "check_fit_a100", "check_zero_memory"]


def _same(a: object, b: float) -> bool:
    return isinstance(a, (int, float)) and math.isclose(a, b, rel_tol=1e-6)


@exercise(lesson="45_cluster", level=1, minutes=5)
def check_zero_memory(attempt) -> str | None:
    n, r = 8_000_000_000, 64
    right = [18 * n, 6 * n + 12 * n / r, 2 * n + 16 * n / r, 18 * n / r]
    got = [attempt(n, stage, r) for stage in range(4)]
    if all(_same(g, w) for g, w in zip(got, right, strict=True)):
        return None
    if not isinstance(got[0], (int, float)):
        return f"Return a number of bytes; yours is {got[0]!r}."
    if _same(got[0], 16 * n):
        return "Gradients are float32 here, 4 bytes each: stage 0 needs 2 + 4 + 12 = 18 bytes a parameter, not 16."
    if _same(got[0], 10 * n) or _same(got[0], 14 * n):
        return "The optimiser holds three float32 numbers a parameter: the master copy and both moments."
    if _same(got[0], 18 * n / r):
        return "Stage 0 shards nothing: without ZeRO every rank holds everything."
    if not _same(got[0], right[0]):
        return f"Stage 0 must give 18 bytes a parameter, {right[0]:,} here; yours gives {got[0]:,.0f}."
    if _same(got[1], 18 * n / r) or _same(got[2], 18 * n / r):
        return "You shard all at once. Stage 1 shards the optimiser only, stage 2 also gradients, stage 3 also weights."
    if _same(got[1], 14 * n + 4 * n / r):
        return "The order is wrong: the optimiser is sharded first, then gradients, then weights."
    if _same(got[2], 4 * n + 14 * n / r):
        return "Stage 2 shards gradients, stage 3 weights: you exchanged them."
    wrong = next(s for s in range(4) if not _same(got[s], right[s]))
    return (
        f"Stage {wrong} must give {right[wrong]:,.0f} bytes for {n:,} parameters on {r} ranks, not {got[wrong]:,.0f}."
    )


@exercise(lesson="45_cluster", level=1, minutes=10)
def check_bubble(attempt) -> str | None:
    def right(pp, v, limit):
        needed = max(1, math.ceil((pp - 1) / (v * limit) - 1e-9))
        return math.ceil(needed / pp) * pp if v > 1 else needed

    cases = [(16, 8, 0.12), (16, 8, 0.05), (8, 1, 0.1), (4, 1, 0.3), (4, 2, 0.1), (1, 1, 0.1)]
    got = {case: attempt(*case) for case in cases}
    if all(_same(got[case], right(*case)) for case in cases):
        return None
    mistakes = {
        "You left out the virtual stages: the bubble is (PP-1)/(V M).": (
            lambda pp, v, limit: (
                math.ceil(max(1, math.ceil((pp - 1) / limit - 1e-9)) / pp) * pp if v > 1 else right(pp, v, limit)
            )
        ),
        "The bubble has PP-1 in it, not PP: the first stage waits for no one.": (
            lambda pp, v, limit: (
                math.ceil(math.ceil(pp / (v * limit) - 1e-9) / pp) * pp if v > 1 else math.ceil(pp / limit - 1e-9)
            )
        ),
        "With virtual stages the number must be a multiple of pp: round up once more.": (
            lambda pp, v, limit: max(1, math.ceil((pp - 1) / (v * limit) - 1e-9))
        ),
        "Only virtual stages need a multiple of pp; with one stage a rank any number will do.": (
            lambda pp, v, limit: math.ceil(max(1, math.ceil((pp - 1) / (v * limit) - 1e-9)) / pp) * pp
        ),
        "You rounded down: then the bubble is above the limit.": (
            lambda pp, v, limit: max(
                1, math.floor((pp - 1) / (v * limit) + 1e-9) // (pp if v > 1 else 1) * (pp if v > 1 else 1)
            )
        ),
    }
    for words, wrong in mistakes.items():
        if all(_same(got[case], wrong(*case)) for case in cases):
            return words
    case = next(c for c in cases if not _same(got[c], right(*c)))
    if case[0] == 1:
        return f"One stage has no bubble, so one micro-batch is enough; yours says {got[case]!r}."
    return f"PP {case[0]}, V {case[1]}, limit {case[2]}: {right(*case)} micro-batches are needed, not {got[case]!r}."


@exercise(lesson="45_cluster", level=2, minutes=20)
def check_fit_a100(attempt) -> str | None:
    chosen = attempt()
    if not isinstance(chosen, dict) or not {"tp", "cp", "pp", "dp"} <= set(chosen):
        return "Return a dict with tp, cp, pp and dp."
    allowed = {"tp", "cp", "pp", "dp", "recompute", "micro_batch", "virtual_stages", "trim_ends", "zero"}
    if extra := set(chosen) - allowed:
        return f"Only degrees and schedule may be chosen, not {', '.join(sorted(extra))}."
    if chosen.get("zero", 2) > 2:
        return "ZeRO 3 gathers the weights for every micro-batch; the exercise allows up to stage 2."
    if chosen["tp"] > 8:
        return f"tp {chosen['tp']} leaves the server, and with it NVLink: take at most 8."
    if 128 % chosen["dp"]:
        return f"128 sequences do not divide by dp {chosen['dp']}."
    try:
        report = plan_cluster(
            LlamaConfig.preset("llama-3-70b"),
            gpus=64,
            seq_len=8192,
            batch_per_dp=128 // chosen["dp"],
            gpu="a100",
            **chosen,
        )
    except UserError as error:
        return f"That plan cannot be: {error}."
    if not report.fits:
        largest = max(report.memory, key=report.memory.__getitem__)
        return (
            f"It needs {report.memory_bytes / 1e9:.0f} GB, {report.excess_bytes / 1e9:.0f} GB too much; the most, "
            f"{report.memory[largest] / 1e9:.0f} GB, are {largest}."
        )
    if report.mfu < 0.47:
        causes = {k: s for k, s in report.seconds.items() if k in ("tp", "cp", "pp", "dp", "bubble")}
        if report.plan.recompute == "full":
            return f"It fits, but the MFU is {report.mfu:.1%}: full recomputation repeats every product. Keep more."
        worst = max(causes, key=causes.__getitem__)
        share = causes[worst] / report.step_seconds
        return f"It fits, but the MFU is {report.mfu:.1%}: {worst} takes {share:.0%} of the step."
    return None


@exercise(lesson="45_cluster", level=2, minutes=10)
def check_checkpoint_interval(attempt) -> str | None:
    gpus, hours, write = 16_384, 50_000.0, 30.0
    right = (2 * write * hours * 3600 / gpus) ** 0.5
    got = attempt(gpus, hours, write)
    if _same(got, right):
        second = attempt(1024, 20_000.0, 120.0)
        return (
            None
            if _same(second, (240 * 20_000 * 3600 / 1024) ** 0.5)
            else "Right for one case only: use the arguments."
        )
    mtti = hours * 3600 / gpus
    wrong = {
        "You used the time between failures of one GPU; the job fails when any of them does.": (
            2 * write * hours * 3600
        )
        ** 0.5,
        "Hours and seconds are mixed: turn hours into seconds first.": (2 * write * hours / gpus) ** 0.5,
        "The factor 2 is missing: half an interval is lost on average.": (write * mtti) ** 0.5,
        "More GPUs fail more often: divide by their number, do not multiply.": (2 * write * hours * 3600 * gpus) ** 0.5,
        "The root is missing.": 2 * write * mtti,
        "The answer is asked in seconds; yours is in hours.": right / 3600,
        "That is the mean time between failures. Between two failures there should be many checkpoints.": mtti,
    }
    for words, value in wrong.items():
        if _same(got, value):
            return words
    return f"For {gpus:,} GPUs, {hours:,.0f} hours each and {write:.0f} s to write it is {right:.0f} s, not {got!r}."
