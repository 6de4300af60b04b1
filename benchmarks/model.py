"""Forward and backward passes of our model beside `transformers` (eager and SDPA) and `litgpt`, where installed.

    python benchmarks/model.py                          both sizes, float32 and the two kinds of bf16
    python benchmarks/model.py --sizes 15m --dtypes float32 --repeats 3
    python benchmarks/model.py --compiled               each model under torch.compile instead

`litgpt` 0.5.13 asks for an older huggingface_hub than `transformers` 5 does, and needs neither the old nor the new one
here: `pip install --no-deps litgpt lightning lightning-utilities torchmetrics`.

All models of one size and precision are built from the same shape, each in a process of its own, as it would be used:
in a shared one a step had the memory that another project's had just freed, and what one project does to the process
when it is imported (ours: `llama_edu/model/transformer.py`) served the others. They take their steps in turns, so that
they meet the same machine. "forward" gives float32 scores of all tokens, without gradients; "forward+backward" is the
gradient of each project's own loss on the same tokens. Printed: the median of the tokens a second, the ratio to the
best peer (the median over the rounds of the ratio within each round), and how far resident memory rises in a step.
"autocast" is bfloat16 products over float32 weights, as in training; "ours, bf16 stream" keeps copies of the weights
for them and a bfloat16 residual stream (`llama_edu.training.precision`). "bfloat16" has weights and everything else in
bfloat16.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from llama_edu import LlamaConfig

SHAPES = {
    "15m": {"dim": 288, "n_layers": 6, "n_heads": 6, "ffn_dim": 768, "tie_embeddings": True},
    "110m": {"dim": 768, "n_layers": 12, "n_heads": 12, "ffn_dim": 2048, "tie_embeddings": True},
}
DTYPES = ("float32", "autocast", "bfloat16")
# The model, its scores, and its loss; ours has `backward_batch` for that.
Parts = tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor] | None]


def ours(cfg: LlamaConfig) -> Parts:
    from llama_edu import Transformer

    model = Transformer(cfg)
    return model, model, None


def ours_bf16_stream(cfg: LlamaConfig) -> Parts:
    from llama_edu.training.precision import bf16_products

    parts = ours(cfg)
    bf16_products(parts[0], torch.optim.SGD(parts[0].parameters()))
    return parts


def hugging_face(implementation: str) -> Callable[[LlamaConfig], Parts]:
    def build(cfg: LlamaConfig) -> Parts:
        from transformers import LlamaConfig as HFConfig
        from transformers import LlamaForCausalLM

        settings = {k: v for k, v in cfg.to_hf().items() if k not in ("architectures", "model_type")}
        model = LlamaForCausalLM(HFConfig(**settings, attn_implementation=implementation)).train()
        scores = lambda x: model(x, use_cache=False).logits
        return model, scores, lambda x, y: model(x, labels=y, shift_labels=y, use_cache=False).loss

    return build


def litgpt(cfg: LlamaConfig) -> Parts:
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    model = GPT(
        Config(
            block_size=cfg.max_seq_len,
            padded_vocab_size=cfg.vocab_size,
            vocab_size=cfg.vocab_size,
            n_layer=cfg.n_layers,
            n_head=cfg.n_heads,
            n_query_groups=cfg.n_kv_heads,
            n_embd=cfg.dim,
            head_size=cfg.head_dim,
            intermediate_size=cfg.ffn_dim,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=cfg.norm_eps,
            mlp_class_name="LLaMAMLP",
            rope_base=int(cfg.rope_theta),
        )
    )
    if cfg.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return model, model, lambda x, y: chunked_cross_entropy(model(x), y, chunk_size=0)


BUILDERS = {
    "ours": ours,
    "ours, bf16 stream": ours_bf16_stream,
    "transformers sdpa": hugging_face("sdpa"),
    "transformers eager": hugging_face("eager"),
    "litgpt": litgpt,
}


def installed(name: str) -> bool:
    from importlib.util import find_spec

    return name.startswith("ours") or find_spec(name.split()[0]) is not None


def make_step(name: str, args: argparse.Namespace, size: str, dtype: str, compiled: bool) -> dict[str, Callable]:
    torch.manual_seed(0)
    cfg = LlamaConfig(**SHAPES[size], vocab_size=args.vocab, max_seq_len=max(1024, args.seq))
    model, scores, own_loss = BUILDERS[name](cfg)
    if compiled:  # in the way each project does it: ours a layer at a time, under a loss that is not compiled
        if name.startswith("ours"):
            for layer in model.layers.values():
                layer.compile(dynamic=False)
        else:
            scores, own_loss = torch.compile(scores), torch.compile(own_loss)
    if dtype == "bfloat16":
        model.to(torch.bfloat16)
    tokens = torch.randint(0, args.vocab, (args.batch, args.seq + 1))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    autocast = dtype == "autocast" and name != "ours, bf16 stream"

    if own_loss is None:
        from llama_edu.data.tokens import Batch
        from llama_edu.training import backward_batch
        from llama_edu.training.loss import CHUNK

    def forward() -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            scores(x).float()

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        if own_loss is None:
            backward_batch(model, Batch(x, y, x), chunk_size=CHUNK, autocast=autocast)
            return
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = own_loss(x, y)
        loss.backward()

    release = lambda: model.zero_grad(set_to_none=True)
    return {"forward": forward, "forward+backward": forward_backward, "release": release}


def resident_mib(peak: bool) -> float:
    """Resident memory of this process now, or the most since `forget_peak`."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of the whole life of the process


def forget_peak() -> None:
    """Give freed memory back to the system, and let `resident_mib` count anew (Linux)."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def worker(args: argparse.Namespace) -> None:
    """Do what the lines of standard input ask for, and answer each with a number."""
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    steps = make_step(args.worker, args, args.sizes[0], args.dtypes[0], args.compiled)
    for line in sys.stdin:
        work = line.strip()
        if work == "memory":
            steps["release"]()
            forget_peak()
            before = resident_mib(peak=False)
            steps["forward+backward"]()
            answer = resident_mib(peak=True) - before
        else:
            start = time.perf_counter()
            steps[work]()
            answer = time.perf_counter() - start
        print(answer, file=out, flush=True)


class Contestant:
    """A project in a process of its own."""

    def __init__(self, name: str, args: argparse.Namespace, size: str, dtype: str) -> None:
        command = [sys.executable, __file__, "--worker", name, "--sizes", size, "--dtypes", dtype]
        command += ["--batch", str(args.batch), "--seq", str(args.seq), "--vocab", str(args.vocab)]
        command += ["--compiled"] if args.compiled else []
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, work: str) -> float:
        """Seconds that a step takes, or the MiB of "memory"."""
        print(work, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended with code {self.process.wait()}; what it said stands above")
        return float(answer)


def compare(args: argparse.Namespace, size: str, dtype: str) -> None:
    names = [name for name in BUILDERS if installed(name) and (dtype == "autocast" or name != "ours, bf16 stream")]
    contestants = [Contestant(name, args, size, dtype) for name in names]
    print(f"\n{size}, {dtype}, {'compiled' if args.compiled else 'eager'}, {args.batch} x {args.seq} tokens")
    for work in ("forward", "forward+backward"):
        for ask in contestants:
            ask(work)  # compiles and warms up
        rounds = []
        for first in range(args.repeats):  # the order turns from round to round
            turns = [contestants[(first + i) % len(contestants)] for i in range(len(contestants))]
            rounds.append({ask.name: ask(work) for ask in turns})
        seconds = {name: statistics.median(times[name] for times in rounds) for name in names}
        for ask in contestants:
            line = f"  {work:17} {ask.name:19} {args.batch * args.seq / seconds[ask.name]:9.0f} tokens/s"
            if work == "forward+backward":
                line += f"  {ask('memory'):7.0f} MiB above what stays"
            print(line)
        peers = [name for name in names if not name.startswith("ours")]
        if peers:
            best = min(peers, key=seconds.get)
            for name in names[: len(names) - len(peers)]:
                ratio = statistics.median(times[best] / times[name] for times in rounds)
                print(f"  {work:17} {name} / {best}: {ratio:.2f} times as fast", flush=True)
    for ask in contestants:
        ask.process.stdin.close()
        ask.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds; the median is reported")
    parser.add_argument("--compiled", action="store_true", help="measure under torch.compile")
    parser.add_argument("--worker", choices=BUILDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("compared:", ", ".join(name for name in BUILDERS if installed(name)))
    for size in args.sizes:
        for dtype in args.dtypes:
            compare(args, size, dtype)


if __name__ == "__main__":
    main()
