"""What the book's interactive figures stand on: numbers from the package, and a still picture of each for print."""

from __future__ import annotations

import json
from pathlib import Path

from llama_edu import LlamaConfig, plotting

ROPE_MODELS = ("llama-2-7b", "llama-3-8b", "llama-3.1-8b")


def data() -> dict:
    """Shapes of the family and the frequencies of three members, as the scripts read them."""
    from llama_edu.model.rope import rope_frequencies

    family = {}
    for name in LlamaConfig.preset_names():
        cfg = LlamaConfig.preset(name)
        fields = ("n_layers", "n_heads", "n_kv_heads", "head_dim", "max_seq_len")
        family[name] = {f: getattr(cfg, f) for f in fields} | {"parameters": cfg.num_parameters()}
    rope = {name: rope_frequencies(LlamaConfig.preset(name)).tolist() for name in ROPE_MODELS}
    return {"family": family, "rope": rope}


def bpe(ax) -> None:
    text = "the cat sat on the mat, and that was that: the cat sat there, and the rat sat on the cat's hat"
    from llama_edu.tokenizer import BPETokenizer

    merges = range(0, 27)
    ax.plot(merges, [len(BPETokenizer.train([text], 256 + n).encode(text)) for n in merges], "o-")
    ax.set(xlabel="merges", ylabel="tokens of the sample sentence", ylim=(0, None))


def rope(ax) -> None:
    import torch

    from llama_edu.model.rope import rope_frequencies

    distance = torch.logspace(0, 5.1175, 700, dtype=torch.float64) - 1
    for name in ROPE_MODELS:
        angles = distance[:, None] * rope_frequencies(LlamaConfig.preset(name)).double()
        ax.plot(distance + 1, angles.cos().mean(1), label=name, lw=1.2)
    ax.set(xscale="log", xlabel="distance + 1 (tokens)", ylabel="score of two equal vectors")
    ax.legend()


def masks(ax) -> None:
    import torch

    from llama_edu.model.attention import document_mask

    documents = torch.tensor([[0] * 7 + [1] * 10 + [2] * 7])
    ax.imshow(document_mask(documents)[0, 0], cmap="Blues", vmax=1.4)
    ax.set(xlabel="key (token)", ylabel="query (token)")
    ax.grid(False)


def pipeline(ax) -> None:
    """1F1B of 4 stages and 8 micro-batches, from the rule: a stage starts as soon as its input is there."""
    stages, count = 4, 8
    end: dict[tuple[bool, int, int], float] = {}
    free = [0.0] * stages
    orders = []
    for r in range(stages):
        warm = min(count, stages - r - 1)
        order = [(True, m) for m in range(warm)]
        for m in range(warm, count):
            order += [(True, m), (False, m - warm)]
        orders.append(order + [(False, m) for m in range(count - warm, count)])
    while any(orders):
        for r in range(stages):
            while orders[r]:
                forward, m = orders[r][0]
                first = forward and r == 0
                before = (True, r - 1, m) if forward else (True, r, m) if r == stages - 1 else (False, r + 1, m)
                if not first and before not in end:
                    break
                start = max(free[r], 0 if first else end[before])
                length = 1 if forward else 2
                free[r] = end[forward, r, m] = start + length
                colour = plotting.BLUE if forward else plotting.ORANGE
                ax.barh(r, length, left=start, color=colour, edgecolor="white")
                orders[r].pop(0)
    ax.set(xlabel="time (forwards of one micro-batch)", ylabel="stage", yticks=range(stages))
    ax.invert_yaxis()
    ax.grid(False)


def cache(ax) -> None:
    for name in ("llama-1-7b", "llama-2-70b", "llama-3.1-8b", "llama-3.1-405b", "llama-3.2-1b"):
        cfg = LlamaConfig.preset(name)
        lengths = [2**p for p in range(8, 18)]
        ax.plot(lengths, [cfg.kv_cache_bytes(n) / 2**30 for n in lengths], label=name)
    ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="cache of one sequence (GiB, bfloat16)")
    ax.legend()


FIGURES = {"bpe": bpe, "rope": rope, "masks": masks, "pipeline": pipeline, "cache": cache}


def write(folder: Path) -> None:
    """Write data.js and a still picture of each figure."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plotting.use_style()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.js").write_text(f"const LLAMA_EDU = {json.dumps(data(), separators=(',', ':'))};\n")
    for name, draw in FIGURES.items():
        figure, ax = plt.subplots()
        draw(ax)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
