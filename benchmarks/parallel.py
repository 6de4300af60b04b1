"""Step time, exposed communication and scaling efficiency of any plan.

    python benchmarks/parallel.py                                     a few plans on forked CPU ranks
    python benchmarks/parallel.py --plans dp=2 tp=2 "dp=2,tp=2"       these plans
    torchrun --nproc-per-node 8 benchmarks/parallel.py --plans dp=4,tp=2 --size 1b     on GPUs, through NCCL

One step is forward, backward, clipping and AdamW for a fixed global batch. The first row is one process without any of
this package's machinery for many. For each plan, on the same ranks in the same run:

- *step*: the median over the steps of the slowest rank.
- *computing*: the same step with collectives that return at once with whatever lies in their buffers (torch's fake
  process group): what remains when nobody waits for anybody. The stages of a pipeline cannot start on nothing; there it
  is the step without the time that a rank waits for its neighbours and for the last stage's sums, on the rank where
  most remains. On GPUs the host does not see these waits, and the columns stay empty.
- *exposed*: the difference, as a share of the step: what communication costs beyond what it hides behind arithmetic; in
  a pipeline together with the bubble.
- *efficiency*: time of one process for the same batch, divided by ranks times the step.

A forked CPU rank computes with one thread, and so does the one process: with two threads it would have the cores of two
ranks. With more ranks than cores the ranks take turns, so that such numbers say nothing about a real cluster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.pipelining.schedules as schedules

from llama_edu import LlamaConfig, Transformer
from llama_edu.data import Batch
from llama_edu.parallel import ParallelPlan, run_ranks
from llama_edu.parallel.engine import ParallelEngine, join_ranks
from llama_edu.training import TrainConfig
from llama_edu.training.engine import Engine

SHAPES = {
    "15m": {"dim": 288, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "ffn_dim": 768},
    "110m": {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "ffn_dim": 2048},
    "1b": {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 8192},
}


def config_of(args: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        model=LlamaConfig(**SHAPES[args.size], vocab_size=32_000, max_seq_len=args.seq_len),
        train_data="-",
        out_dir="-",
        steps=1,
        warmup=0,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        loss_chunk=args.loss_chunk,
        precision=args.precision or ("bf16" if torch.cuda.is_available() else "float32"),
    )


def use_fake_group() -> None:
    """Leave the process group for one of the same size whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


@contextmanager
def waiting() -> Iterator[list[float]]:
    """One number: the seconds spent inside in waits between stages and in sums over ranks."""
    spent = [0.0]

    def timed(wait):
        def run(*args, **kwargs):
            started = time.perf_counter()
            try:
                return wait(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - started

        return run

    with ExitStack() as stack:
        for module, name in ((schedules, "_wait_batch_p2p"), (dist, "all_reduce")):
            stack.enter_context(mock.patch.object(module, name, timed(getattr(module, name))))
        yield spent


def step_seconds(args: argparse.Namespace, plan: ParallelPlan | None, fake: bool) -> list[tuple[float, float]]:
    """For each counted step, on this rank: its seconds, and those of them without waiting for other stages.

    Without a plan: of one process.
    """
    if fake:
        use_fake_group()
    with mock.patch("torch.distributed.new_group", return_value=None) if fake else nullcontext():
        # The small groups of a ParallelEngine are not used in a step.
        engine = Engine() if plan is None else ParallelEngine(plan)
    config = config_of(args)
    device = engine.device("auto")
    torch.manual_seed(0)
    model = engine.prepare(Transformer(config.model), config)
    ids = torch.randint(config.model.vocab_size, (config.batch_size, config.seq_len + 1))
    first, count = engine.share(0, config.batch_size)
    rows = ids[first : first + count].to(device)
    batch = Batch(rows[:, :-1], rows[:, 1:], torch.zeros_like(rows[:, 1:]))
    targets = torch.tensor(config.batch_size * config.seq_len, device=device)
    optimizer = engine.optimizer(model, config)
    seconds = []
    for _ in range(args.warmup + args.repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        if not fake:
            dist.barrier()
        with waiting() as spent:
            started = time.perf_counter()
            engine.backward(model, batch, targets, config, autocast=config.precision == "bf16")
            engine.clip(model, 1.0, optimizer)
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            whole = time.perf_counter() - started
        seconds.append((whole, whole - spent[0]))
        optimizer.zero_grad()
    return seconds[args.warmup :]


def slowest(ranks: list[list[tuple[float, float]]]) -> tuple[float, float]:
    """Medians over the steps of the time of the slowest rank, and of the busiest rank without its waits."""
    steps = list(zip(*ranks))
    return tuple(statistics.median(max(rank[i] for rank in step) for step in steps) for i in (0, 1))


def run(args: argparse.Namespace, plan: ParallelPlan | None, fake: bool = False) -> tuple[float, float] | None:
    """What `slowest` says of a plan; under torchrun, None on all ranks but the first."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        n = 1 if plan is None else plan.world_size
        return slowest(run_ranks(step_seconds, n, args, plan, fake, timeout=args.timeout))
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
    parser.add_argument("--plans", nargs="+", default=["dp=1", "dp=2", "tp=2", "cp=2", "pp=2", "pp=2,micro_batches=8"])
    parser.add_argument("--size", choices=SHAPES, default="15m")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--precision", choices=["float32", "bf16"], help="default: bf16 on a GPU, float32 without")
    parser.add_argument("--loss-chunk", type=int, default=0, help="tokens whose scores exist at a time; 0: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0)
    args = parser.parse_args()
    first = int(os.environ.get("RANK", 0)) == 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if first:
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {cores} cores"
        precision = config_of(args).precision
        print(f"{args.size}, {precision}, batch {args.batch_size} x {args.seq_len}, torch {torch.__version__}, {where}")
        print("| plan | ranks | step (s) | computing (s) | exposed | efficiency |\n|---|---|---|---|---|---|")
    alone = run(args, None)
    if first:
        print(f"| one process | 1 | {alone[0]:.3f} | - | - | 100% |", flush=True)
    for text in args.plans:
        plan = parse_plan(text)
        real = run(args, plan)
        fake = run(args, plan, fake=True) if plan.pp == 1 else None
        if not first:
            continue
        step, computing = real[0], real[1] if fake is None else fake[0]
        hidden = fake is None and torch.cuda.is_available()
        numbers = "- | -" if hidden else f"{computing:.3f} | {max(0.0, 1 - computing / step):.0%}"
        efficiency = alone[0] / (plan.world_size * step)
        print(f"| {text} | {plan.world_size} | {step:.3f} | {numbers} | {efficiency:.0%} |", flush=True)


if __name__ == "__main__":
    main()
