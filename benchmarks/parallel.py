"""Step time, exposed communication and scaling efficiency of any plan.

    python benchmarks/parallel.py                                     a few plans on forked CPU ranks
    python benchmarks/parallel.py --plans dp=2 tp=2 "dp=2,tp=2"       these plans
    torchrun --nproc-per-node 8 benchmarks/parallel.py --plans dp=4,tp=2 --size 1b     on GPUs, through NCCL

One step is forward, backward and clipping of a fixed global batch. For each plan, on the same ranks in the same run:

- *step*: the median over the steps of the slowest rank.
- *computing*: the same step with collectives that return at once with whatever lies in their buffers (torch's fake
  process group): what remains when communication is free. Not defined for a pipeline, whose stages wait for content.
- *exposed*: the difference, as a share of the step: what communication costs beyond what it hides behind arithmetic.
- *efficiency*: time of one rank alone for the same batch, divided by ranks times the step. With more ranks than cores
  the ranks take turns, so that numbers above `cores` ranks say nothing about a real cluster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from contextlib import nullcontext
from unittest import mock

import torch
import torch.distributed as dist

from llama_edu import LlamaConfig, Transformer
from llama_edu.data import Batch
from llama_edu.parallel import ParallelPlan, run_ranks
from llama_edu.parallel.engine import ParallelEngine, join_ranks
from llama_edu.training import TrainConfig

SHAPES = {
    "15m": {"dim": 288, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "ffn_dim": 768},
    "110m": {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "ffn_dim": 2048},
    "1b": {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 8192},
}


def config_of(args: argparse.Namespace) -> TrainConfig:
    model = LlamaConfig(**SHAPES[args.size], vocab_size=32_000, max_seq_len=args.seq_len)
    return TrainConfig(
        model=model, train_data="-", out_dir="-", steps=1, warmup=0, batch_size=args.batch_size, seq_len=args.seq_len
    )


def use_fake_group() -> None:
    """Leave the process group for one of the same size whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


def step_seconds(args: argparse.Namespace, plan: ParallelPlan, fake: bool) -> list[float]:
    """Seconds of each counted step, on this rank."""
    if fake:
        use_fake_group()
    with mock.patch("torch.distributed.new_group", return_value=None) if fake else nullcontext():
        engine = ParallelEngine(plan)  # its small groups are not used in a step
    config = config_of(args)
    device = engine.device("auto")
    torch.manual_seed(0)
    model = engine.prepare(Transformer(config.model), config)
    ids = torch.randint(config.model.vocab_size, (config.batch_size, config.seq_len + 1))
    first, count = engine.share(0, config.batch_size)
    rows = ids[first : first + count].to(device)
    batch = Batch(rows[:, :-1], rows[:, 1:], torch.zeros_like(rows[:, 1:]))
    targets = torch.tensor(config.batch_size * config.seq_len, device=device)
    seconds = []
    for _ in range(args.warmup + args.repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        if not fake:
            dist.barrier()
        started = time.perf_counter()
        engine.backward(model, batch, targets, config, autocast=False)
        engine.clip(model, 1.0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        for p in model.parameters():
            p.grad = None
    return seconds[args.warmup :]


def slowest(ranks: list[list[float]]) -> float:
    """Median over the steps of the time of the slowest rank."""
    return statistics.median(max(step) for step in zip(*ranks))


def run(args: argparse.Namespace, plan: ParallelPlan, fake: bool) -> float | None:
    """The time of a step; under torchrun, None on all ranks but the first."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return slowest(run_ranks(step_seconds, plan.world_size, args, plan, fake, timeout=args.timeout))
    join_ranks()
    mine = step_seconds(args, plan, fake)
    if fake:  # back to the real group, to compare
        dist.destroy_process_group()
        join_ranks()
    everybody: list = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return slowest(everybody) if dist.get_rank() == 0 else None


def parse_plan(text: str) -> ParallelPlan:
    values = dict(part.split("=") for part in text.split(","))
    return ParallelPlan(**{k: int(v) if v.isdigit() else v for k, v in values.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="+", default=["dp=1", "dp=2", "tp=2", "pp=2", "cp=2", "dp=2,tp=2"])
    parser.add_argument("--size", choices=SHAPES, default="15m")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0)
    args = parser.parse_args()
    first = int(os.environ.get("RANK", 0)) == 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if first:
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {cores} cores"
        print(f"{args.size}, batch {args.batch_size} x {args.seq_len}, torch {torch.__version__}, {where}")
        print("| plan | ranks | step (s) | computing (s) | exposed | efficiency |\n|---|---|---|---|---|---|")
    alone = None
    for text in args.plans:
        plan = parse_plan(text)
        step = run(args, plan, fake=False)
        computing = run(args, plan, fake=True) if plan.pp == 1 and plan.world_size > 1 else None
        if not first:
            continue
        alone = step if plan.world_size == 1 else alone
        exposed = f"{max(0.0, 1 - computing / step):.0%}" if computing else "-"
        share = f"{alone / (plan.world_size * step):.0%}" if alone else "-"
        shown = f"{computing:.3f}" if computing else "-"
        print(f"| {text} | {plan.world_size} | {step:.3f} | {shown} | {exposed} | {share} |", flush=True)


if __name__ == "__main__":
    main()
