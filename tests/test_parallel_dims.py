"""Plans and meshes: what is refused, in which sentence; and ranks forked from this process."""

import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from tqdm import tqdm

from llama_edu import LlamaConfig
from llama_edu.errors import UserError
from llama_edu.parallel import ParallelPlan, RankError, build_mesh, dims, run_ranks
from llama_edu.parallel.planner import coordinates

MODEL = LlamaConfig(dim=64, n_layers=4, n_heads=8, n_kv_heads=2, ffn_dim=96, vocab_size=100, max_seq_len=64)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tp": 0}, "tp is 0"),
        ({"dp": 4, "dp_replicate": 3}, "dp 4 does not divide by dp_replicate 3"),
        ({"micro_batches": -1}, "micro_batches is -1"),
        ({"virtual_stages": 2}, "needs pp of at least 2"),
        ({"pp": 2, "virtual_stages": 2}, "the schedule interleaved or zero-bubble"),
        ({"pp": 2, "layers": (1, 2, 1)}, "names 3 stages, pp . virtual_stages makes 2"),
        ({"pp": 2, "schedule": "interleaved", "virtual_stages": 2, "micro_batches": 3}, "does not divide by pp 2"),
        ({"pp": 2, "schedule": "zero-bubble", "micro_batches": 5}, "5 does not divide into 2 rounds.*multiple of pp"),
        ({"pp": 4, "micro_batches": 2}, "micro_batches is 2; the schedule 1f1b needs at least pp 4"),
        ({"contiguous": -1}, "contiguous is -1; it must be at least 0"),
        ({"pp": 2, "contiguous": 2}, r"the schedule interleaved \(here 1f1b\)"),
        (
            {"pp": 4, "schedule": "interleaved", "virtual_stages": 2, "micro_batches": 8, "contiguous": 3},
            "contiguous is 3; it must lie between pp 4 and micro_batches 8",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        ParallelPlan(**fields)


@pytest.mark.parametrize(
    ("fields", "changes", "words"),
    [
        ({"tp": 3}, {}, "n_heads 8 does not divide by tp 3"),
        ({"tp": 4}, {"n_heads": 12, "n_kv_heads": 6, "head_dim": 8}, "n_kv_heads 6 and tp 4: .* take another tp"),
        ({"tp": 2}, {"ffn_dim": 97}, "ffn_dim 97 does not divide by tp 2"),
        ({"tp": 2}, {"vocab_size": 101}, "or a vocabulary of 102"),
        ({"pp": 8}, {}, "4 layers do not fill 8 pipeline stages"),
        ({"pp": 2, "layers": (2, 3)}, {}, "have the sum 5; the model has 4"),
        ({"pp": 3, "layers": (2, 0, 2)}, {}, "leave rank 1 of the 3 of the pipeline without any"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(fields, changes, words):
    with pytest.raises(UserError, match=words):
        ParallelPlan(**fields).check_model(LlamaConfig(**{**MODEL.to_dict(), **changes}))


def test_a_sequence_batch_or_world_that_cannot_be_divided_is_refused():
    with pytest.raises(UserError, match=r"62 tokens does not divide by 2 \* cp = 4"):
        ParallelPlan(cp=2).check_sequence(62)
    with pytest.raises(UserError, match=r"the 18 tokens .* do not divide by tp 4"):
        ParallelPlan(cp=2, tp=4).check_sequence(36)
    with pytest.raises(UserError, match=r"batch_size 6 does not divide by dp 4 \* accumulate 1"):
        ParallelPlan(dp=4).check_batch(6)
    with pytest.raises(UserError, match=r"the 3 sequences .* do not divide into 2 micro_batches"):
        ParallelPlan(dp=2, pp=2).check_batch(6)
    with pytest.raises(UserError, match=r"dp 2 \* pp 1 \* cp 1 \* tp 2 makes 4 ranks, and 8 are running"):
        ParallelPlan(dp=2, tp=2).check_world(8)


def test_a_schedule_that_cannot_run_is_refused(monkeypatch):
    plan = ParallelPlan(pp=2, schedule="zero-bubble", virtual_stages=2)
    monkeypatch.setattr(dims, "splits_backward", lambda: True)
    plan.check_schedule()
    for recompute in ("selective", "full"):
        plan.check_schedule(recompute, compile=True)
        with pytest.raises(UserError, match=f"recompute is {recompute} .* take recompute none, compile the layers, or"):
            plan.check_schedule(recompute)
    with pytest.raises(UserError, match=r"reshard is always .* gradients would be lost"):
        replace(plan, reshard="always").check_schedule()
    monkeypatch.setattr(dims, "splits_backward", lambda: False)
    with pytest.raises(UserError, match=r"needs torch 2\.13, and this is .*: install torch 2\.13, or"):
        plan.check_schedule()
    ParallelPlan(pp=2, schedule="interleaved", virtual_stages=2).check_schedule("selective")


def test_llama_3_takes_a_layer_off_the_first_and_last_stage():
    layers = ParallelPlan(pp=16).stage_layers(126)
    assert layers == (7, *[8] * 14, 7)
    assert ParallelPlan(pp=16, schedule="interleaved", virtual_stages=8, micro_batches=16).stage_layers(126) == (
        0,
        *[1] * 126,
        0,
    )
    assert ParallelPlan(pp=2, layers=(1, 3)).stage_layers(4) == (1, 3)
    assert ParallelPlan(pp=1).stage_layers(4) == (4,)


def _where(plan):
    mesh = build_mesh(plan)
    return {name: mesh.get_local_rank(name) for name in mesh.mesh_dim_names}


def test_the_mesh_has_tensor_parallel_innermost():
    for rank, at in enumerate(run_ranks(_where, 8, ParallelPlan(dp=2, cp=2, tp=2))):
        assert at == coordinates(rank, dp=2, cp=2, tp=2)
    assert run_ranks(_where, 8, ParallelPlan(dp=4, dp_replicate=2, tp=2))[5] == {
        "dp_replicate": 1,
        "dp_shard": 0,
        "pp": 0,
        "cp": 0,
        "tp": 1,
    }


def _sum(x):
    x = x + dist.get_rank()
    dist.all_reduce(x)
    print("rank", dist.get_rank())
    return x


def test_ranks_return_values_and_print_in_order(capsys):
    results = run_ranks(_sum, 4, torch.ones(2))
    assert [r.tolist() for r in results] == [[10.0, 10.0]] * 4
    assert capsys.readouterr().out == "rank 0\nrank 1\nrank 2\nrank 3\n"


def _fail(how):
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("this one is broken")
        if how == "sentence":
            raise UserError("lower tp")
        if how == "die":
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", "rank 1: ValueError: this one is broken"),
        ("sentence", "rank 1: lower tp"),
        ("die", "rank 1: was killed by SIGKILL"),
        ("hang", "rank 1: did not finish in 2 s"),
    ],
)
def test_a_rank_that_fails_ends_all_and_is_named(how, words):
    started = time.monotonic()
    with pytest.raises(RankError, match=words) as caught:
        run_ranks(_fail, 3, how, timeout=2 if how == "hang" else 60)
    assert caught.value.rank == 1
    assert time.monotonic() - started < 30


def test_a_rank_needs_no_lock_that_a_thread_of_its_parents_held():
    """The lock of tqdm belongs to all forks: a bar in a rank would wait for whoever had it at the fork."""
    held, done = threading.Event(), threading.Event()

    def hold():
        with tqdm.get_lock():
            held.set()
            done.wait()

    def train():
        with tqdm(total=1, disable=True) as bar:
            return bar.n

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        assert run_ranks(train, 2, timeout=20) == [0, 0]
    finally:
        done.set()
        thread.join()
