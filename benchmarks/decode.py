"""Decoding side by side, in one run: ours, `transformers`, `litgpt`, gpt-fast's method, llama.cpp.

    python benchmarks/decode.py                        the goals' cells at 15M, 110M and the Llama 3.2 1B shape
    python benchmarks/decode.py --sizes 15m 110m
    python benchmarks/decode.py --sizes 110m --dtypes float32 --batches 1 --peers llama.cpp --repeats 5
    python benchmarks/decode.py --sizes 1b 8b --dtypes bfloat16 fp8 --batches 1 --device cuda     on a GPU

The peers: `pip install transformers gguf llama-cpp-python` (the last one is compiled, by cmake and a C++ compiler, for
the processor it is installed on; that takes some minutes) and `pip install --no-deps litgpt lightning
lightning-utilities torchmetrics psutil`: without dependencies, because litgpt pins a huggingface_hub that transformers
refuses.

Every contender is a process of its own, so its memory is its own; they load first and then measure in turns, one at a
time, so that a busy machine is busy for all. A round is a prefill of 512 tokens for each sequence and 128 greedy steps
(fewer where these take longer than --seconds). Printed are medians over the rounds, the median of the ratios within a
round, and the peak of resident memory. Each round also reads a large array with all threads: that rate over the bytes
of weights, keys and values that a step reads is the memory limit, and our share of it is printed. Weights are random. A
peer that is not installed, or has not the weights, is named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, DECODE = 512, 128
SHAPES: dict[str, dict[str, Any]] = {
    "15m": {"dim": 288, "n_layers": 6, "n_heads": 6, "ffn_dim": 768, "vocab_size": 32_000, "tie_embeddings": True},
    "110m": {"dim": 768, "n_layers": 12, "n_heads": 12, "ffn_dim": 2048, "vocab_size": 32_000, "tie_embeddings": True},
    "1b": {"preset": "llama-3.2-1b"},
    "8b": {"preset": "llama-3-8b"},
}
# What is measured when nothing is asked for: (dtype, batch) of each size.
CELLS = {
    "15m": [("bfloat16", 1), ("bfloat16", 16), ("int8", 1)],
    "110m": [("bfloat16", 1), ("bfloat16", 16), ("float32", 1)],
    "1b": [("bfloat16", 1), ("bfloat16", 16), ("int8", 1)],
    "8b": [("bfloat16", 1)],
}
# (size, dtype, batch) -> [(our work, against whom, goal)]; "pytorch" is the best of the peers in PyTorch.
GOALS = {
    ("15m", "bfloat16", 1): [("decode", "transformers", 3.5), ("decode", "llama.cpp", 2.5)],
    ("110m", "bfloat16", 1): [("decode", "pytorch", 2.6), ("decode", "llama.cpp", 1.0), ("prefill", "best", 1.2)],
    ("110m", "float32", 1): [("decode", "llama.cpp", 1.0)],
    ("1b", "bfloat16", 1): [("decode", "pytorch", 2.2), ("decode", "llama.cpp", 0.95)],
    ("15m", "int8", 1): [("decode", "llama.cpp", 1.0)],
    ("1b", "int8", 1): [("decode", "llama.cpp", 1.0)],
}


def configuration(size: str):
    from dataclasses import replace

    from llama_edu import LlamaConfig

    shape = SHAPES[size]
    if "preset" in shape:
        return replace(LlamaConfig.preset(shape["preset"]), max_seq_len=1024)
    return LlamaConfig(**shape, max_seq_len=1024)


def fill(model: Any) -> Any:
    """Random weights of a trained model's size, quickly: one block of normal numbers over and over."""
    import torch

    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.fill_(1.0)
            else:
                flat = p.view(-1)
                for start in range(0, len(flat), len(block)):
                    flat[start : start + len(block)] = block[: len(flat) - start].to(p)
    return model


class Ours:
    engine: str | None = None

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from llama_edu import Transformer
        from llama_edu.generation import FastDecoder
        from llama_edu.generation.quantize import quantize

        cfg = configuration(args.size)
        with torch.device("meta"):
            model = Transformer(cfg)
        dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16
        model = fill(model.to(dtype).to_empty(device=args.device))
        if args.dtype == "fp8":
            model = quantize(model, "fp8")
        weights = None if args.dtype == "fp8" else args.dtype
        room = PROMPT + DECODE
        self.decoder = FastDecoder(model, weights=weights, batch_size=args.batch, max_seq_len=room, engine=self.engine)

    def bytes_a_step(self) -> float:
        """Weights, and the keys and values of a step in the middle of a round."""
        d = self.decoder
        cache = d.keys.nbytes + d.values.nbytes
        return d.weights.nbytes + cache * (PROMPT + DECODE / 2) / d.max_seq_len

    def prefill(self, ids: list[list[int]]) -> None:
        self.ids = self.decoder.prefill(ids).argmax(-1).tolist()

    def step(self) -> None:
        self.decoder.step(self.ids)
        self.ids = self.decoder._run.likeliest(len(self.ids))[0]


class OursCompiled(Ours):
    engine = "compiled"


class Torch:
    """What the PyTorch peers share: a forward pass with positions, compiled for one token."""

    def finish(self, args: argparse.Namespace) -> None:
        import torch

        self.device, self.position = args.device, 0
        self.compiled = torch.compile(self.forward, fullgraph=True, dynamic=False) if args.compile else self.forward

    def _run(self, forward: Callable, tokens: Any, position: Any) -> None:
        import torch

        with torch.no_grad():
            self.tokens = forward(tokens, position)[:, -1].argmax(-1, keepdim=True)
        self.tokens.sum().item()

    def prefill(self, ids: list[list[int]]) -> None:
        import torch

        self.start()
        self.position = len(ids[0])
        self._run(self.forward, torch.tensor(ids, device=self.device), torch.arange(self.position, device=self.device))

    def step(self) -> None:
        import torch

        self._run(self.compiled, self.tokens, torch.tensor([self.position], device=self.device))
        self.position += 1

    def start(self) -> None:
        pass


class HuggingFace(Torch):
    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

        settings = {
            k: v for k, v in configuration(args.size).to_hf().items() if k not in ("architectures", "model_type")
        }
        config = LlamaConfig(**settings, attn_implementation="sdpa")
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        rotary = type(model.model.rotary_emb)(config)
        model = fill(model.to(getattr(torch, args.dtype)).to_empty(device=args.device)).eval()
        model.model.rotary_emb = rotary.to(args.device)
        if config.tie_word_embeddings:
            model.tie_weights()
        self.model = model
        self.cache = StaticCache(config=config, max_cache_len=PROMPT + DECODE)
        self.finish(args)

    def start(self) -> None:
        self.cache.reset()

    def forward(self, tokens: Any, position: Any) -> Any:
        out = self.model(tokens, past_key_values=self.cache, position_ids=position[None], logits_to_keep=1)
        return out.logits


class LitGPT(Torch):
    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from litgpt import GPT, Config

        cfg = configuration(args.size)
        scaling = cfg.rope_scaling and {
            "factor": cfg.rope_scaling.factor,
            "low_freq_factor": cfg.rope_scaling.low_freq_factor,
            "high_freq_factor": cfg.rope_scaling.high_freq_factor,
            "original_max_seq_len": cfg.rope_scaling.original_max_seq_len,
        }
        config = Config(
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
            rope_adjustments=scaling,
        )
        dtype = getattr(torch, args.dtype)
        torch.set_default_dtype(dtype)
        model = GPT(config)
        torch.set_default_dtype(torch.float32)
        if cfg.tie_embeddings:
            model.lm_head.weight = model.transformer.wte.weight
        self.model = fill(model).to(args.device).eval()
        self.model.max_seq_length = PROMPT + DECODE
        self.model.set_kv_cache(batch_size=args.batch, device=args.device, dtype=dtype)
        self.finish(args)

    def forward(self, tokens: Any, position: Any) -> Any:
        return self.model(tokens, input_pos=position)


class GPTFast(Torch):
    """The method of gpt-fast in our words: plain PyTorch, one static cache, everything compiled."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        cfg = self.cfg = configuration(args.size)
        dtype = getattr(torch, args.dtype)
        linear = lambda rows, cols: torch.nn.Linear(cols, rows, bias=False, dtype=dtype, device=args.device)
        heads = (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.head_dim
        self.table = torch.nn.Embedding(cfg.vocab_size, cfg.dim, dtype=dtype, device=args.device)
        self.output = self.table.weight if cfg.tie_embeddings else linear(cfg.vocab_size, cfg.dim).weight
        sizes = ((heads, cfg.dim), (cfg.dim, cfg.n_heads * cfg.head_dim), (2 * cfg.ffn_dim, cfg.dim))
        self.layers = [[linear(*s) for s in (*sizes, (cfg.dim, cfg.ffn_dim))] for _ in range(cfg.n_layers)]
        for module in (self.table, *(m for layer in self.layers for m in layer)):
            fill(module)
        from llama_edu.model.rope import rope_table

        self.cos, self.sin = (t.to(args.device) for t in rope_table(cfg))
        zeros = lambda: torch.zeros(
            (args.batch, cfg.n_kv_heads, PROMPT + DECODE, cfg.head_dim), dtype=dtype, device=args.device
        )
        # Tensors of their own: of one tensor for all layers the compiler would copy the whole for each layer's tokens.
        self.cache = [(zeros(), zeros()) for _ in range(cfg.n_layers)]
        self.norm = torch.ones(cfg.dim, dtype=dtype, device=args.device)
        self.finish(args)

    def forward(self, tokens: Any, position: Any) -> Any:
        import torch
        import torch.nn.functional as F

        cfg, x = self.cfg, self.table(tokens)
        cos, sin = self.cos[position], self.sin[position]
        mask = (torch.arange(PROMPT + DECODE, device=tokens.device) <= position[:, None])[None, None]
        normalise = lambda x: F.rms_norm(x, self.norm.shape, self.norm, cfg.norm_eps)

        def turn(t: Any) -> Any:
            a, b = t.float().unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(t.dtype)

        for i, (wqkv, wo, w13, w2) in enumerate(self.layers):
            t = wqkv(normalise(x)).unflatten(-1, (-1, cfg.head_dim)).transpose(1, 2)
            q, k, v = t.split([cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads], dim=1)
            keys, values = self.cache[i]
            keys.index_copy_(2, position, turn(k))
            values.index_copy_(2, position, v)
            grouped = cfg.n_heads != cfg.n_kv_heads
            y = F.scaled_dot_product_attention(turn(q), keys, values, mask, enable_gqa=grouped)
            x = x + wo(y.transpose(1, 2).flatten(2))
            gate, up = w13(normalise(x)).chunk(2, -1)
            x = x + w2(F.silu(gate) * up)
        return F.linear(normalise(x[:, -1:]), self.output)


class LlamaCpp:
    def __init__(self, args: argparse.Namespace) -> None:
        import ctypes

        import llama_cpp as lib
        import numpy as np

        self.lib, self.np, self.vocab = lib, np, configuration(args.size).vocab_size
        quiet = lib.llama_log_callback(lambda level, text, data: None)
        self._quiet = quiet
        lib.llama_log_set(quiet, ctypes.c_void_p(0))
        lib.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(path, args.size, args.dtype)
            parameters = lib.llama_model_default_params()
            parameters.use_mmap = False
            self.model = lib.llama_model_load_from_file(str(path).encode(), parameters)
        threads = args.threads
        context = lib.llama_context_default_params()
        context.n_ctx = (PROMPT + DECODE) * args.batch
        context.n_seq_max = args.batch
        context.n_batch = context.n_ubatch = PROMPT
        context.n_threads = context.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError("llama.cpp gives no context")
        self.batch = lib.llama_batch_init(PROMPT, 0, 1)

    def _decode(self, tokens: list[int], slots: list[int], positions: list[int], wanted: list[bool]) -> list[int]:
        b = self.batch
        b.n_tokens = len(tokens)
        for i, (token, slot, position, want) in enumerate(zip(tokens, slots, positions, wanted)):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, 1, want
            b.seq_id[i][0] = slot
        if self.lib.llama_decode(self.context, b) != 0:
            raise RuntimeError("llama_decode failed")
        rows = [i for i, want in enumerate(wanted) if want]
        pick = lambda i: self.np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (self.vocab,))
        return [int(pick(i).argmax()) for i in rows]

    def prefill(self, ids: list[list[int]]) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        n, self.position, self.ids = len(ids[0]), len(ids[0]), []
        for slot, row in enumerate(ids):
            self.ids += self._decode(row, [slot] * n, list(range(n)), [False] * (n - 1) + [True])

    def step(self) -> None:
        n = len(self.ids)
        self.ids = self._decode(self.ids, list(range(n)), [self.position] * n, [True] * n)
        self.position += 1


def write_gguf(path: Path, size: str, dtype: str) -> None:
    """A GGUF file of random weights: no tokenizer, q8_0 for int8, q4_0 for int4."""
    import gguf
    import numpy as np

    cfg = configuration(size)
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_context_length(cfg.max_seq_len)
    w.add_embedding_length(cfg.dim)
    w.add_block_count(cfg.n_layers)
    w.add_feed_forward_length(cfg.ffn_dim)
    w.add_head_count(cfg.n_heads)
    w.add_head_count_kv(cfg.n_kv_heads)
    w.add_layer_norm_rms_eps(cfg.norm_eps)
    w.add_rope_dimension_count(cfg.head_dim)
    w.add_key_length(cfg.head_dim)
    w.add_value_length(cfg.head_dim)
    w.add_rope_freq_base(cfg.rope_theta)
    w.add_vocab_size(cfg.vocab_size)
    w.add_tokenizer_model("no_vocab")
    kinds = gguf.GGMLQuantizationType
    kind = {"float32": kinds.F32, "bfloat16": kinds.BF16, "int8": kinds.Q8_0, "int4": kinds.Q4_0}[dtype]
    random = np.random.default_rng(0)

    def put(name: str, *shape: int) -> None:
        if len(shape) == 1:
            return w.add_tensor(name, np.ones(shape, np.float32), raw_dtype=kinds.F32)
        few = min(shape[0], 256)  # rows drawn; the others repeat them
        rows = gguf.quants.quantize(0.02 * random.standard_normal((few, shape[1]), np.float32), kind)
        w.add_tensor(name, np.tile(rows, (-(-shape[0] // few), 1))[: shape[0]], raw_dtype=kind)

    heads, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    put("token_embd.weight", cfg.vocab_size, cfg.dim)
    put("output_norm.weight", cfg.dim)
    if not cfg.tie_embeddings:
        put("output.weight", cfg.vocab_size, cfg.dim)
    matrices = {
        "attn_q": (heads, cfg.dim),
        "attn_k": (kv, cfg.dim),
        "attn_v": (kv, cfg.dim),
        "attn_output": (cfg.dim, heads),
        "ffn_gate": (cfg.ffn_dim, cfg.dim),
        "ffn_up": (cfg.ffn_dim, cfg.dim),
        "ffn_down": (cfg.dim, cfg.ffn_dim),
        "attn_norm": (cfg.dim,),
        "ffn_norm": (cfg.dim,),
    }
    for i in range(cfg.n_layers):
        for name, shape in matrices.items():
            put(f"blk.{i}.{name}.weight", *shape)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


# name -> (class, modules it needs, kinds of weights it has, compiled)
CONTENDERS: dict[str, tuple[type, tuple[str, ...], tuple[str, ...], bool]] = {
    "ours": (Ours, (), ("float32", "bfloat16", "int8", "int4", "fp8"), False),
    "ours, torch.compile": (OursCompiled, (), ("float32", "bfloat16", "int8", "int4", "fp8"), True),
    "transformers": (HuggingFace, ("transformers",), ("float32", "bfloat16"), True),
    "transformers, eager": (HuggingFace, ("transformers",), ("float32", "bfloat16"), False),
    "litgpt": (LitGPT, ("litgpt",), ("float32", "bfloat16"), True),
    "gpt-fast's method": (GPTFast, (), ("float32", "bfloat16"), True),
    "llama.cpp": (LlamaCpp, ("llama_cpp", "gguf"), ("float32", "bfloat16", "int8", "int4"), False),
}
PYTORCH = ("transformers", "transformers, eager", "litgpt", "gpt-fast's method")


def resident_mib() -> float:
    """Peak of this process's resident memory."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reading_rate(args: argparse.Namespace) -> Callable[[], float]:
    """A function that reads an array much larger than the caches with all threads, and gives bytes a second."""
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    # On a CPU numpy's memory, which comes in large pages; a sum of whole numbers costs nothing beside the reading.
    if args.device == "cpu":
        array = torch.from_numpy(np.ones(1 << 25, np.int64))
    else:
        array = torch.ones(1 << 28, dtype=torch.int64, device=args.device)

    def once() -> float:
        start = time.perf_counter()
        array.sum().item()
        return array.nbytes / (time.perf_counter() - start)

    return lambda: max(once() for _ in range(8))


def worker(args: argparse.Namespace) -> None:
    """One contender: builds, says so, and measures a round for each line that it reads."""
    import random

    import torch

    torch.set_num_threads(args.threads)
    kind, _, _, args.compile = CONTENDERS[args.worker]
    out, sys.stdout = sys.stdout, sys.stderr

    def say(**what: Any) -> None:
        print(json.dumps(what), file=out, flush=True)

    try:
        contender = kind(args)
        draw = random.Random(0)
        prompts = [[draw.randrange(1, 30_000) for _ in range(PROMPT)] for _ in range(args.batch)]
        contender.prefill([p[:16] for p in prompts] if args.size in ("1b", "8b") else prompts)
        for _ in range(3):
            contender.step()
        say(ready=True, bytes=getattr(contender, "bytes_a_step", lambda: 0)())
        for _ in sys.stdin:
            start = time.perf_counter()
            contender.prefill(prompts)
            middle = time.perf_counter()
            steps = 0
            while steps < DECODE - 1 and time.perf_counter() - middle < args.seconds:
                contender.step()
                steps += 1
            end = time.perf_counter()
            say(
                prefill=args.batch * PROMPT / (middle - start),
                decode=args.batch * steps / (end - middle),
                peak=resident_mib(),
            )
    except Exception as error:
        say(error=f"{type(error).__name__}: {error}".splitlines()[0][:200])


def cell(args: argparse.Namespace, size: str, dtype: str, batch: int) -> None:
    """Measure one cell and print its table."""
    workers: dict[str, subprocess.Popen] = {}
    absent: dict[str, str] = {}
    errors = Path(tempfile.mkdtemp())
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}

    sizes: dict[str, float] = {}  # bytes that a step reads

    def answer(name: str) -> dict[str, Any]:
        line = workers[name].stdout.readline()
        result = json.loads(line) if line else {"error": (errors / name).read_text()[-200:].replace("\n", " ")}
        if "error" in result:
            absent[name] = result["error"]
            workers.pop(name).kill()
        elif result.get("bytes"):
            sizes[name] = result["bytes"]
        return result

    for name in ("ours", *(n for n in CONTENDERS if n in args.peers)):
        _, needs, kinds, _ = CONTENDERS[name]
        missing = [m for m in needs if importlib.util.find_spec(m) is None]
        if missing:
            absent[name] = f"not installed (pip install {' '.join(missing)})"
        elif dtype not in kinds:
            absent[name] = f"has no {dtype} here"
        elif args.device != "cpu" and name == "llama.cpp":
            absent[name] = "is a CPU build here"
        else:
            command = [sys.executable, __file__, "--worker", name, "--size", size, "--dtype", dtype]
            command += ["--batch", str(batch), "--threads", str(args.threads), "--seconds", str(args.seconds)]
            command += ["--device", args.device]
            log = (errors / name).open("w")
            workers[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
            if size in ("1b", "8b"):
                answer(name)  # one after the other: building takes more memory than having
    if size not in ("1b", "8b"):
        for name in list(workers):
            answer(name)
    rounds: list[dict[str, dict[str, float]]] = []
    rate = reading_rate(args)
    for _ in range(args.repeats):
        results = {"memory": {"rate": rate()}}
        for name in list(workers):
            workers[name].stdin.write("go\n")
            workers[name].stdin.flush()
            result = answer(name)
            if "error" not in result:
                results[name] = result
        rounds.append(results)
    for process in workers.values():
        process.stdin.close()
        process.wait()
    report(size, dtype, batch, rounds, list(workers), absent, sizes)


def report(
    size: str, dtype: str, batch: int, rounds: list, names: list[str], absent: dict[str, str], sizes: dict[str, float]
) -> None:
    median = lambda name, what: statistics.median(r[name][what] for r in rounds)
    ratio = lambda name, what: statistics.median(r["ours"][what] / r[name][what] for r in rounds)
    print(f"\n### {size}, {dtype}, batch {batch}\n")
    print("| | decode, tokens/s | ours is faster by | prefill, tokens/s | ours is faster by | peak memory, MiB |")
    print("|---|---|---|---|---|---|")
    for name in names:
        cells = [f"{median(name, 'decode'):.1f}", f"{ratio(name, 'decode'):.2f}" if "ours" in names else "-"]
        cells += [f"{median(name, 'prefill'):.0f}", f"{ratio(name, 'prefill'):.2f}" if "ours" in names else "-"]
        print(f"| {name} | {' | '.join(cells)} | {median(name, 'peak'):.0f} |")
    for name, read in ((n, sizes[n]) for n in names if n in sizes):
        rate = statistics.median(r["memory"]["rate"] for r in rounds)
        share = statistics.median(r[name]["decode"] / batch * read / r["memory"]["rate"] for r in rounds)
        print(
            f"\n{name}: a step reads {read / 1e6:.0f} MB; memory gives {rate / 1e9:.1f} GB/s: {share:.0%} of the limit"
        )
    for name, why in absent.items():
        print(f"\nabsent: {name}: {why}")
    print()
    for what, peer, goal in GOALS.get((size, dtype, batch), ()):
        pool = {"pytorch": PYTORCH, "best": [n for n in names if not n.startswith("ours")]}.get(peer, [peer])
        pool = [name for name in pool if name in names]
        if pool and "ours" in names:
            rival = max(pool, key=lambda name: median(name, what))
            got = ratio(rival, what)
            verdict = "reached" if got >= goal else "missed"
            print(
                f"goal: {what} {goal} times {rival}{' (the best)' if peer != rival else ''}; ours {got:.2f}: {verdict}"
            )
        else:
            print(f"goal: {what} {goal} times {peer}: not measured")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["15m", "110m", "1b"], choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "int8", "int4", "fp8"])
    parser.add_argument("--batches", nargs="+", type=int)
    peers = [name for name in CONTENDERS if name != "ours"]
    parser.add_argument("--peers", nargs="*", default=[p for p in peers if "," not in p], choices=peers)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="most seconds of decoding in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    for name, kind in (("--worker", str), ("--size", str), ("--dtype", str), ("--batch", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    import torch

    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"torch {torch.__version__}, {args.threads} threads of {os.cpu_count()} cores{load}; {args.repeats} rounds")
    start = time.perf_counter()
    for size in args.sizes:
        cells = CELLS[size]
        if args.dtypes or args.batches:
            cells = [(d, b) for d in args.dtypes or ["bfloat16"] for b in args.batches or [1, 16]]
        for dtype, batch in cells:
            cell(args, size, dtype, batch)
    print(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
