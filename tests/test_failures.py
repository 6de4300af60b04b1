"""Failures at scale: Table 5 as printed, Young and Daly against a search, the simulation against the formula."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_edu.errors import UserError
from llama_edu.parallel.failures import (
    HARDWARE,
    LLAMA3_CAUSES,
    daly_interval,
    effective_time,
    mean_time_to_interruption,
    simulate,
    spares_needed,
    young_interval,
)


def test_table_5_is_kept_as_printed_with_its_contradiction():
    counts = {c.name: c.count for c in LLAMA3_CAUSES}
    assert sum(counts.values()) == 419 and len(counts) == len(LLAMA3_CAUSES) == 18
    wrong = [c.name for c in LLAMA3_CAUSES if abs(100 * c.count / 419 - c.printed) > 0.06]
    assert wrong == ["Faulty GPU"] and round(100 * 126 / 419, 1) == 30.1
    gpu = sum(c.count for c in LLAMA3_CAUSES if c.kind == "GPU")
    assert round(100 * gpu / 419, 1) == 64.0 and round(100 * (gpu - 22) / 419, 1) == 58.7
    assert 0.75 < HARDWARE < 0.79  # the paper says about 78 %


def test_rate_scales_with_the_number_of_gpus():
    assert mean_time_to_interruption(16_384) == pytest.approx(54 * 86_400 / 419)
    assert mean_time_to_interruption(16_384, planned=True) == pytest.approx(54 * 86_400 / 466)
    assert mean_time_to_interruption(1024) == pytest.approx(16 * mean_time_to_interruption(16_384))


@given(st.floats(1, 3000), st.floats(1000, 1e6))
@settings(max_examples=50, deadline=None)
def test_daly_is_near_the_best_interval(write, mtti):
    grid = np.geomspace(mtti / 1e4, 5 * mtti, 4001)
    value = grid / np.expm1((grid + write) / mtti)
    daly = daly_interval(write, mtti)
    assert effective_time(daly, write, 1.0, mtti) * mtti * math.exp(1 / mtti) >= 0.97 * value.max()
    if write < mtti / 1000:
        assert young_interval(write, mtti) == pytest.approx(daly, rel=0.05)


def test_young_and_daly_by_hand():
    assert young_interval(50, 10_000) == 1000
    assert daly_interval(50, 10_000) == pytest.approx(1000 * (1 + 0.05 / 3 + 0.0025 / 9) - 50)
    assert daly_interval(500, 200) == 200
    for bad in ((0, 10), (10, -1)):
        with pytest.raises(UserError, match="above 0"):
            young_interval(*bad)


@pytest.mark.parametrize(
    "interval, write, restart, mtti", [(1800, 60, 600, 11_000), (600, 5, 60, 3000), (3000, 300, 900, 4000)]
)
def test_simulation_agrees_with_the_formula(interval, write, restart, mtti):
    runs = [
        simulate(work=2e6, mtti=mtti, interval=interval, write=write, restart=restart, seed=seed) for seed in range(8)
    ]
    shares = np.array([run.effective for run in runs])
    expected = effective_time(interval, write, restart, mtti)
    assert abs(shares.mean() - expected) < 4 * shares.std(ddof=1) / math.sqrt(8) + 0.002
    for run in runs:
        assert run.total == pytest.approx(run.trained + run.lost) and run.trained == 2e6


def test_without_failures_only_writing_costs():
    run = simulate(work=1000, mtti=1e12, interval=100, write=5, restart=10)
    assert (run.interruptions, run.writing, run.total) == (0, 45, 1045)  # nothing is written after the last step


def test_the_number_of_interruptions_is_poisson():
    runs = [simulate(work=1e5, mtti=1000, interval=10, write=0.0, restart=0.0, seed=s) for s in range(40)]
    counts = np.array([run.interruptions for run in runs])
    expected = np.mean([run.total for run in runs]) / 1000
    assert abs(counts.mean() - expected) < 4 * math.sqrt(expected / 40)
    assert simulate(work=1e5, mtti=1000, interval=10, write=0, restart=0, seed=3) == runs[3]


def test_asynchronous_checkpoints_fall_back_to_one_that_is_through():
    base = {"work": 3e6, "mtti": 10_000, "restart": 600, "seed": 2}
    slow = 120.0
    blocking = simulate(**base, interval=daly_interval(slow, 10_000), write=slow)
    behind = simulate(**base, interval=300, write=1, background=slow)
    instant = simulate(**base, interval=300, write=1)
    assert instant.effective > behind.effective > blocking.effective + 0.05
    assert behind.redone / behind.interruptions == pytest.approx(instant.redone / instant.interruptions + slow, rel=0.2)


def test_detection_and_spares():
    base = {"work": 2e6, "mtti": 10_000, "interval": 300, "write": 2, "restart": 600, "hardware": 0.8, "seed": 5}
    waits = [simulate(**base, spares=s).waiting for s in (0, 4, 8, 30)]
    assert waits == sorted(waits, reverse=True) and waits[-1] == 0 < waits[0]
    late = simulate(**base, spares=30, detect=1800)
    assert late.detecting / late.interruptions == pytest.approx(1800, rel=0.1)


def test_llama_3_reached_90_percent_because_it_restarted_quickly():
    mtti = mean_time_to_interruption(16_384, planned=True)
    write = 12 * 405_853_388_800 / 2e12
    tau = daly_interval(write, mtti)
    assert effective_time(tau, write, 13 * 60, mtti) > 0.9 > effective_time(tau, write, 15 * 60, mtti)
    run = simulate(
        work=54 * 86_400 * 0.9,
        mtti=mtti,
        interval=tau,
        write=write,
        restart=600,
        detect=120,
        hardware=HARDWARE,
        spares=16,
    )
    assert 0.9 < run.effective < 0.93


def test_spares_needed_is_the_poisson_quantile():
    from scipy.stats import poisson

    for mtti, share, repair, risk in ((11_000, 0.77, 86_400, 0.01), (3000, 0.5, 7200, 0.05), (1e6, 0.1, 3600, 0.01)):
        assert spares_needed(mtti, share, repair, risk=risk) == poisson.ppf(1 - risk, share * repair / mtti)


@given(st.floats(1e-3, 1e5), st.floats(1e-30, 0.9))
@settings(max_examples=100, deadline=None)
def test_no_fewer_spares_would_do(mean, risk):
    from scipy.stats import poisson

    spares = spares_needed(1.0, 1.0, mean, risk=risk)
    assert poisson.sf(spares, mean) <= risk * (1 + 1e-6)
    assert spares == 0 or poisson.sf(spares - 1, mean) > risk * (1 - 1e-6)


def test_many_spares_and_small_risks_take_no_time():
    assert spares_needed(mean_time_to_interruption(100_000), HARDWARE, 30 * 86_400) > 1000
    assert spares_needed(11_000, HARDWARE, 86_400, risk=1e-17) > spares_needed(11_000, HARDWARE, 86_400, risk=1e-15)
    assert spares_needed(11_000, 0.0, 86_400) == 0


RUN = {"work": 1e5, "mtti": 1000, "interval": 300, "write": 5, "restart": 60}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"restart": math.nan}, "restart is nan; .* 0 or more"),
        ({"write": -100}, "write is -100; .* 0 or more"),
        ({"detect": math.inf}, "detect is inf; .* finite"),
        ({"work": math.inf}, "work is inf; .* finite"),
        ({"interval": math.nan}, "interval is nan"),
        ({"hardware": 5}, "hardware is 5; it is a share"),
        ({"hardware": 0.5, "spares": -3}, "spares is -3; .* whole number"),
        ({"mtti": 10, "restart": 600}, "no progress.* mtti 10 s, detect .* 600 s"),
        ({"mtti": 10, "interval": 1000}, "no progress.* 1005 s"),
        ({"background": 1e9}, "no progress"),
        ({"mtti": 1, "restart": 600, "hardware": 0.8, "spares": 10**5}, "no progress"),
    ],
)
def test_a_run_that_cannot_be_or_never_ends_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        simulate(**{**RUN, **change})


def test_formulas_check_their_arguments_and_have_limits():
    assert effective_time(600, 10, 1000, 1.0) == 0.0 == effective_time(1e6, 10, 0, 1.0)
    assert effective_time(600, 10, 0, 1e15) == pytest.approx(600 / 610)
    for arguments in ((600, -700, 10, 1000), (600, 10, -1, 1000), (600, 10, math.nan, 1000), (600, 10, 10, math.inf)):
        with pytest.raises(UserError, match="finite number of seconds"):
            effective_time(*arguments)
    for bad in ({"risk": 0}, {"risk": 1}, {"risk": math.nan}, {"hardware": 2}, {"repair": math.inf}):
        with pytest.raises(UserError, match=f"{next(iter(bad))} is "):
            spares_needed(**{"mtti": 1e4, "hardware": 0.5, "repair": 86_400, **bad})
