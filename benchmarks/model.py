"""Forward and backward passes of our model beside `transformers` (eager and SDPA) and `litgpt`, where installed.

    python benchmarks/model.py                          both sizes, float32 and the two kinds of bf16
    python benchmarks/model.py --sizes 15m --dtypes float32 --repeats 3
    python benchmarks/model.py --compiled               each model under torch.compile instead

`litgpt` 0.5.13 asks for an older huggingface_hub than `transformers` 5 does, and needs neither the old nor the new one
here: `pip install --no-deps litgpt lightning lightning-utilities torchmetrics`.

All models of one size and precision are built from the same shape and measured in turns, in one process for speed and
in one process each for memory, so that they meet the same machine. Each takes two steps in its turn, and the second
counts. "forward" gives float32 scores of all tokens,
without gradients; "forward+backward" is the gradient of each project's own loss on the same tokens. Printed: the median
of the tokens a second, the ratio to the best peer (the median over the rounds of the ratio within each round), and the
peak of resident memory. "autocast" is bfloat16 products over float32 weights, as in training; "ours, bf16 stream" keeps
copies of the weights for them and a bfloat16 residual stream (`llama_edu.training.precision`). "bfloat16" has weights
and everything else in bfloat16.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from llama_edu import LlamaConfig, Transformer
from llama_edu.training import next_token_loss
from llama_edu.training.loss import CHUNK
from llama_edu.training.precision import bf16_products

SHAPES = {
    "15m": {"dim": 288, "n_layers": 6, "n_heads": 6, "ffn_dim": 768, "tie_embeddings": True},
    "110m": {"dim": 768, "n_layers": 12, "n_heads": 12, "ffn_dim": 2048, "tie_embeddings": True},
}
DTYPES = ("float32", "autocast", "bfloat16")
Parts = tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]  # model, scores, loss


def ours(cfg: LlamaConfig) -> Parts:
    model = Transformer(cfg)
    # It sets autocast itself, on or off.
    options = lambda: {"chunk_size": CHUNK, "autocast": torch.is_autocast_enabled("cpu")}
    loss = lambda x, y: next_token_loss(model, x, y, **options()) / y.numel()
    return model, model, loss


def ours_bf16_stream(cfg: LlamaConfig) -> Parts:
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

    def forward() -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            scores(x).float()

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = own_loss(x, y)
        loss.backward()

    return {"forward": forward, "forward+backward": forward_backward}


def peak_mib(name: str, args: argparse.Namespace, size: str, dtype: str, compiled: bool) -> float:
    """Peak resident memory of forward+backward in a process of its own, above that of imports and weights."""
    command = [sys.executable, __file__, "--memory-of", name, "--sizes", size, "--dtypes", dtype]
    command += ["--batch", str(args.batch), "--seq", str(args.seq), "--vocab", str(args.vocab)]
    command += ["--compiled"] if compiled else []
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return float(out.stdout.split()[-1])


def resident_mib(peak: bool) -> float:
    """Resident memory of this process now, or its peak."""
    if sys.platform == "linux":  # ru_maxrss would remember the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def own_peak(args: argparse.Namespace) -> None:
    steps = make_step(args.memory_of, args, args.sizes[0], args.dtypes[0], args.compiled)
    before = resident_mib(peak=False)
    for _ in range(2):
        steps["forward+backward"]()
    print(resident_mib(peak=True) - before)


def compare(args: argparse.Namespace, size: str, dtype: str, compiled: bool) -> None:
    names = [name for name in BUILDERS if installed(name) and (dtype == "autocast" or name != "ours, bf16 stream")]
    steps = {name: make_step(name, args, size, dtype, compiled) for name in names}
    memory = {name: peak_mib(name, args, size, dtype, compiled) for name in names} if args.memory else {}
    print(f"\n{size}, {dtype}, {'compiled' if compiled else 'eager'}, {args.batch} x {args.seq} tokens")
    for work in ("forward", "forward+backward"):
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for round_ in range(args.repeats + 1):
            for name in names:
                steps[name][work]()  # again what it will do: memory is its own then, and not what another gave back
                start = time.perf_counter()
                steps[name][work]()
                if round_:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
        peers = [name for name in names if not name.startswith("ours")]
        for name in names:
            speed = args.batch * args.seq / statistics.median(seconds[name])
            line = f"  {work:17} {name:19} {speed:9.0f} tokens/s"
            if work == "forward+backward" and memory:
                line += f"  peak {memory[name]:7.0f} MiB above the weights"
            print(line)
        if peers:
            best = min(peers, key=lambda name: statistics.median(seconds[name]))
            for name in names[: len(names) - len(peers)]:
                ratio = statistics.median(theirs / mine for mine, theirs in zip(seconds[name], seconds[best]))
                print(f"  {work:17} {name} / {best}: {ratio:.2f} times as fast", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds; the median is reported")
    parser.add_argument("--compiled", action="store_true", help="measure under torch.compile")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip the processes for peak memory")
    parser.add_argument("--memory-of", choices=BUILDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        return own_peak(args)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("compared:", ", ".join(name for name in BUILDERS if installed(name)))
    for size in args.sizes:
        for dtype in args.dtypes:
            compare(args, size, dtype, args.compiled)


if __name__ == "__main__":
    main()
