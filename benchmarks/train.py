"""Training steps beside `transformers`, `litgpt` and a nanoGPT-style loop: tokens a second, memory, MFU.

    python benchmarks/train.py                                  15M and 110M, float32 and bf16, eager
    python benchmarks/train.py --compiled                       under torch.compile instead
    python benchmarks/train.py --sizes 15m --dtypes float32 --repeats 3
    python benchmarks/train.py --profile "ours" --sizes 15m     where the time of one contestant goes
    python benchmarks/train.py --gpu                            1B, bf16, one sequence of 8192, compiled, on a GPU

A step is what each project's own loop does: forward, loss, backward, clipping at 1, AdamW (fused in all of them). Every
contestant has a process of its own, in which its memory is measured; the processes step in turns, so that they meet the
same machine, and a ratio is the median over the rounds of the ratio within each round. On a busy machine, compare with
`OMP_NUM_THREADS=1 python benchmarks/train.py --clock cpu`.

Ours computes the loss in chunks, clips inside the optimiser's step, and lets the allocator keep what is freed, as
`llama-edu train --loss-chunk 512` does; --keep-freed gives the allocator of the others the same order. "ours, bf16" has
bfloat16 products beside float32 weights and a bfloat16 residual stream (`--precision bf16_copies`); plain "ours" is
autocast then. Compiled means a layer at a time for ours, with `--recompute selective`, the whole model for the others.

"moved" counts the bytes that a step reads and writes outside of matrix products and attention. It is the same on every
machine, busy or not, and is what is left of the time where products are quick. A processor without instructions for
bfloat16 emulates its products, slower than float32: the ratios in bf16 then say little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from model import SHAPES, installed, litgpt, resident_mib
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llama_edu import LlamaConfig, Transformer
from llama_edu.data.tokens import Batch
from llama_edu.training import backward_batch, has_bf16, make_optimizer, measured_peak, mfu, published_peak
from llama_edu.training.loss import CHUNK
from llama_edu.training.optimizer import clip_in_step
from llama_edu.training.precision import bf16_products
from llama_edu.training.recompute import compile_layers
from llama_edu.training.utilisation import keep_freed_memory

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
CONTESTANTS = ("ours", "ours, bf16", "transformers", "litgpt", "nanogpt style")
GPU_SHAPE = "llama-3.2-1b"


class Block(nn.Module):
    """A GPT-2 layer as nanoGPT has it: LayerNorm, one matrix for q, k and v, GELU; learned positions, no biases."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """As many FLOPs as a Llama of the same width: its two matrices of 4 * dim weigh what three of 8/3 * dim do."""

    def __init__(self, cfg: LlamaConfig) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(cfg.vocab_size, cfg.dim), nn.Embedding(cfg.max_seq_len, cfg.dim)
        self.blocks = nn.Sequential(*[Block(cfg.dim, cfg.n_heads) for _ in range(cfg.n_layers)])
        self.norm, self.head = nn.LayerNorm(cfg.dim, bias=False), nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def peer_step(model: nn.Module, loss: Callable[[], Tensor], device: str, autocast: bool) -> float:
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        value = loss()
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    model.optimizer.step()
    model.optimizer.zero_grad(set_to_none=True)
    return value.item()


def our_step(model: nn.Module, batch: Batch, autocast: bool) -> float:
    chunk = 8 * CHUNK if batch.tokens.is_cuda else CHUNK  # a GPU is filled only by larger products
    loss = backward_batch(model, batch, autocast=autocast, chunk_size=chunk)
    clip_in_step(model.optimizer, 1.0)
    model.optimizer.step()
    model.optimizer.zero_grad(set_to_none=True)
    return loss.item()


def make_step(name: str, cfg: LlamaConfig, batch: int, seq: int, dtype: str, compiled: bool, device: str = "cpu"):
    """A function that trains one step and returns the loss."""
    torch.manual_seed(0)
    tokens = torch.randint(cfg.vocab_size, (batch, seq + 1), device=device)
    x, y, autocast = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), dtype == "bf16"
    if name.startswith("ours"):
        keep_freed_memory()
        model = Transformer(cfg).to(device)
        model.optimizer = make_optimizer(model, 1e-4)
        if name.endswith("bf16"):
            bf16_products(model, model.optimizer)
            autocast = False
        if compiled:
            compile_layers(model, "selective")
        return partial(our_step, model, Batch(x, y, torch.zeros_like(x)), autocast)
    if name == "transformers":
        from transformers import LlamaConfig as HFConfig
        from transformers import LlamaForCausalLM

        settings = {k: v for k, v in cfg.to_hf().items() if k not in ("architectures", "model_type")}
        model = LlamaForCausalLM(HFConfig(**settings, attn_implementation="sdpa")).to(device).train()
        call = torch.compile(model) if compiled else model
        loss = lambda: call(x, labels=tokens[:, 1:], shift_labels=y, use_cache=False).loss
    elif name == "litgpt":
        from litgpt.utils import chunked_cross_entropy

        model = litgpt(cfg)[0].to(device)
        call = torch.compile(model) if compiled else model
        loss = lambda: chunked_cross_entropy(call(x), y, chunk_size=0)
    else:
        model = GPT(cfg).to(device)
        call = torch.compile(model) if compiled else model
        loss = lambda: call(x, y)
    model.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return partial(peer_step, model, loss, device, autocast)


class Moved(TorchDispatchMode):
    """Bytes that operations read and write, apart from products, attention, and what moves nothing."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        still = ("mm", "addmm", "addmm_", "bmm", "detach", "_unsafe_view", "nll_loss_forward", "scatter_add_")
        if view or name in still or "dot_product" in name or "empty" in name:
            return out
        read, written = (sum(t.nbytes for t in flat(x) if isinstance(t, Tensor)) for x in (args, [out]))
        if name in ("gather", "embedding", "index_select"):
            read = written
        elif name == "copy_":
            read -= written
        elif name in ("fill_", "zero_") or name.startswith("new_"):
            read = 0
        self.total += read + written
        return out


def flat(values) -> list:
    return [x for v in values for x in (flat(v) if isinstance(v, list | tuple) else [v])]


def worker(args: argparse.Namespace) -> None:
    """One contestant: a step for every line on standard input."""
    cfg = LlamaConfig(**SHAPES[args.sizes[0]], vocab_size=args.vocab, max_seq_len=max(1024, args.seq))
    if args.keep_freed:
        keep_freed_memory()
    start = resident_mib(peak=False)
    step = make_step(args.worker, cfg, args.batch, args.seq, args.dtypes[0], args.compiled)
    for line in sys.stdin:
        if line.strip() == "moved":
            with Moved() as moved:
                step()
            print(json.dumps({"moved": moved.total}), flush=True)
            continue
        clock = time.process_time if args.clock == "cpu" else time.perf_counter
        began = clock()
        loss = step()
        seconds = clock() - began
        print(json.dumps({"seconds": seconds, "loss": loss, "peak": resident_mib(peak=True) - start}), flush=True)


class Contestant:
    def __init__(self, name: str, args: argparse.Namespace, size: str, dtype: str, compiled: bool) -> None:
        self.name, self.seconds, self.peak, self.loss = name, [], 0.0, 0.0
        command = [sys.executable, __file__, "--worker", name, "--sizes", size, "--dtypes", dtype]
        command += ["--batch", str(args.batch), "--seq", str(args.seq), "--vocab", str(args.vocab)]
        command += ["--clock", args.clock]
        command += ["--compiled"] if compiled else []
        command += ["--keep-freed"] if args.keep_freed else []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, what: str) -> dict:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of {self.name} has ended: try --profile {self.name!r} to see its error")
        return json.loads(answer)

    def step(self, counts: bool) -> None:
        answer = self.ask("step")
        self.peak = max(self.peak, answer["peak"])
        if counts:
            self.seconds.append(answer["seconds"])

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(args: argparse.Namespace, size: str, dtype: str, compiled: bool) -> None:
    cfg = LlamaConfig(**SHAPES[size], vocab_size=args.vocab, max_seq_len=max(1024, args.seq))
    names = [n for n in CONTESTANTS if not (n.endswith("bf16") and dtype == "float32")]
    names = [n for n in names if n.startswith(("ours", "nanogpt")) or installed(n)]
    field = [Contestant(name, args, size, dtype, compiled) for name in names]
    try:
        for round_ in range(args.repeats + 1):  # the first round warms up
            first = round_ % len(field)  # nobody always follows the same one
            for one in field[first:] + field[:first]:
                one.step(counts=round_ > 0)
        moved = {one.name: None if compiled else one.ask("moved")["moved"] / 1e9 for one in field}
    finally:
        for one in field:
            one.close()
    peak = measured_peak("cpu", DTYPES[dtype]) if args.clock == "wall" else float("inf")
    title = f"{size}, {dtype}, {'compiled' if compiled else 'eager'}, {args.batch} x {args.seq} tokens"
    print(f"\n### {title}\n")
    if args.clock == "wall":
        print(f"Measured peak of {dtype} products: {peak / 1e12:.3f} TFLOP/s\n")
    print("| | tokens/s | MFU | peak MiB | moved GB | ours is faster by |\n|---|---|---|---|---|---|")
    ours = min((one for one in field if one.name.startswith("ours")), key=lambda one: statistics.median(one.seconds))
    for one in field:
        speed = args.batch * args.seq / statistics.median(one.seconds)
        ratio = statistics.median(theirs / mine for mine, theirs in zip(ours.seconds, one.seconds))
        share = f"{mfu(cfg, speed, seq_len=args.seq, peak=peak):.0%}" if args.clock == "wall" else "-"
        bytes_ = "-" if moved[one.name] is None else f"{moved[one.name]:.2f}"
        print(f"| {one.name} | {speed:.0f} | {share} | {one.peak:.0f} | {bytes_} | {ratio:.2f} |", flush=True)


def profile(args: argparse.Namespace) -> None:
    cfg = LlamaConfig(**SHAPES[args.sizes[0]], vocab_size=args.vocab, max_seq_len=max(1024, args.seq))
    step = make_step(args.profile, cfg, args.batch, args.seq, args.dtypes[0], args.compiled)
    for _ in range(2):
        step()
    with torch.profiler.profile() as record:
        step()
    print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=45))
    print("| part | ms | share |\n|---|---|---|")
    parts = time_by_part(record)
    for part, ms in parts.items():
        print(f"| {part} | {ms:.0f} | {ms / sum(parts.values()):.0%} |")


# The first part whose words stand in the name of an operation, or of one that it is called by, gets its time.
PARTS = {
    "attention": ("dot_product", "block_attention", "ScaledDotProduct"),
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn"),
    "optimiser and clipping": ("Optimizer", "foreach_norm", "linalg_vector_norm", "clip"),
    "loss": ("CrossEntropy", "softmax", "nll_loss", "cross_entropy"),
    "norms": ("RMSNorm", "rms_norm", "layer_norm"),
}


def time_by_part(record: torch.profiler.profile) -> dict[str, float]:
    """Milliseconds of a profile by part; what the words of PARTS do not name is "the rest"."""
    parts = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for event in record.events():
        names, above = [event.name], event.cpu_parent
        while above is not None:
            names.append(above.name)
            above = above.cpu_parent
        called = [part for part, words in PARTS.items() if any(word in name for name in names for word in words)]
        parts[called[0] if called else "the rest"] += event.self_cpu_time_total / 1e3
    return parts


def gpu(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("--gpu: this machine or this torch has no CUDA; run it on one that has")
    name, seq = torch.cuda.get_device_name(), 8192
    cfg = LlamaConfig.preset(GPU_SHAPE)
    batch = max(1, args.gpu_batch)
    peak = published_peak(name) or measured_peak("cuda", torch.bfloat16)
    print(f"{name}, torch {torch.__version__}, {GPU_SHAPE}, {batch} x {seq} tokens, bf16, compiled, AdamW fused")
    step = make_step("ours", cfg, batch, seq, "bf16", compiled=True, device="cuda")
    seconds = []
    for number in range(3 + 5 * args.repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        loss = step()  # ends with .item(), which waits for the device
        seconds.append(time.perf_counter() - began)
        print(f"step {number + 1}: loss {loss:.3f}, {batch * seq / seconds[-1]:,.0f} tokens/s", flush=True)
    speed = batch * seq / statistics.median(seconds[3:])
    memory = torch.cuda.max_memory_allocated() / 2**30
    share, measured = mfu(cfg, speed, seq_len=seq, peak=peak), measured_peak("cuda", torch.bfloat16)
    print(
        f"median {speed:,.0f} tokens/s, {memory:.1f} GiB, MFU {share:.1%} of {peak / 1e12:.0f} TFLOP/s "
        f"({mfu(cfg, speed, seq_len=seq, peak=measured):.1%} of the measured {measured / 1e12:.0f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds; the median is reported")
    parser.add_argument("--compiled", action="store_true", help="measure under torch.compile")
    parser.add_argument(
        "--emulated", action="store_true", help="bf16 at 110M even where it is emulated (minutes a step)"
    )
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of this process alone")
    parser.add_argument("--keep-freed", action="store_true", help="let every contestant's allocator keep what is freed")
    parser.add_argument("--profile", choices=CONTESTANTS, help="print where one contestant's time goes, and stop")
    parser.add_argument("--gpu", action="store_true", help="measure ours on a GPU, and stop")
    parser.add_argument("--gpu-batch", type=int, default=2, help="sequences of 8192 a step on the GPU")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if args.gpu:
        return gpu(args)
    if args.profile:
        return profile(args)
    emulated = not has_bf16("cpu")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, bfloat16 {'emulated' if emulated else 'native'}"
    )
    for size in args.sizes:
        for dtype in args.dtypes:
            if dtype == "bf16" and emulated and size != "15m" and not args.emulated:
                print(f"\n{size}, bf16: left out, this processor only emulates it; --emulated measures it all the same")
                continue
            compare(args, size, dtype, args.compiled)


if __name__ == "__main__":
    main()
