"""The report of a run: its figures, samples and configuration in one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_edu.errors import UserError
from llama_edu.training.metrics import read_metrics

__all__ = ["write_report"]

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --soft: #f3f3f0; --line: #d9d9d4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e4; --paper: #16181a; --soft: #22262a; --line: #3a4046; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
       max-width: 52rem; padding: 1.5rem 1rem 4rem; }
h1 { line-height: 1.2; overflow-wrap: anywhere; } h2 { margin-top: 2.4rem; }
table { border-collapse: collapse; } th, td { text-align: left; vertical-align: top; padding: .3rem 1.2rem .3rem 0;
        border-bottom: 1px solid var(--line); } td { overflow-wrap: anywhere; }
th { font-weight: 600; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { font-size: .9rem; } .scroll { overflow-x: auto; }
pre { background: var(--soft); padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere;
      border-radius: 4px; font-size: .87rem; margin: .4rem 0; }
mark { background: none; color: inherit; font-weight: 700; }
"""


def write_report(out_dir: str | Path) -> Path:
    """Write `report.html` into the folder of a run, from its metrics and configuration. Returns its path.

    Text that the model wrote is escaped; nothing in it is markup.

    Raises:
        UserError: the folder holds no run.
    """
    folder = Path(out_dir)
    history = list(read_metrics(folder / "metrics.jsonl"))
    if not history:
        raise UserError(f"{folder} holds no run to report: its metrics.jsonl is missing or empty")
    discarded = list(read_metrics(folder / "discarded.jsonl"))
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        config = {}
    page = _page(folder.resolve(), history, discarded, config)
    path = folder / "report.html"
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _page(folder: Path, history: Sequence[dict], discarded: Sequence[dict], config: dict[str, Any]) -> str:
    name = folder.parent.name if folder.name == "run" else folder.name
    title = html.escape(f"Training run {name}")
    parts = [
        f"<h1>{title}</h1>",
        _table(_summary(history, discarded, config)),
        "<h2>How it went</h2>",
        _figure(history, discarded),
        _faults(history, discarded),
        _samples(history),
        "<h2>Configuration</h2>",
        _table(sorted((key, _plain(value)) for key, value in _flat(config).items())),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{title}</title><style>{STYLE}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _summary(history: Sequence[dict], discarded: Sequence[dict], config: dict[str, Any]) -> list[tuple[str, str]]:
    last = history[-1]
    of = f" of {config['steps']:,}" if config.get("steps", last["step"]) != last["step"] else ""
    rows = [("steps", f"{last['step']:,}{of}"), ("tokens", f"{last.get('tokens', 0):,}")]
    final = next((entry for entry in reversed(history) if entry["loss"] is not None), None)
    if final is not None:
        rows.append(("training loss", f"{final['loss']:.3f} nats a token at the end"))
    held_out = [entry for entry in history if entry.get("val_loss") is not None]
    if held_out:
        at = "" if held_out[-1] is last else f" at step {held_out[-1]['step']:,}"
        bits = held_out[-1]["val_bits_per_byte"]
        rows.append(("held-out text", f"{held_out[-1]['val_loss']:.3f} nats a token, {bits:.3f} bits a byte{at}"))
    speed = statistics.median(entry["tokens_per_second"] for entry in history)
    shares = [entry["mfu"] for entry in history if "mfu" in entry]
    share = f", {statistics.median(shares):.0%} of the device's peak" if shares else ""
    rows.append(("speed", f"{speed:,.0f} tokens a second (median){share}"))
    skipped = sum(entry["skipped"] for entry in [*history, *discarded])
    rewinds = sum("rewound_from" in entry for entry in history)
    rows.append(("steps skipped", f"{skipped}; the run went back to a checkpoint {_times(rewinds)}"))
    waits = [entry["checkpoint_seconds"] for entry in history if "checkpoint_seconds" in entry]
    if waits:
        rows.append(("checkpoints", f"{len(waits)} before the last held the run up for {sum(waits):.2f} s in all"))
    return rows


def _times(n: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(n, f"{n} times")


def _figure(history: Sequence[dict], discarded: Sequence[dict]) -> str:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from llama_edu import plotting

    plotting.use_style()
    fig, axes = plt.subplots(nrows=4, sharex=True, figsize=(7.6, 8.4), height_ratios=[3, 1, 1.4, 1])
    top, rate, norm, speed = axes

    def column(entries: Sequence[dict], name: str) -> list[float]:
        return [math.nan if entry.get(name) is None else entry[name] for entry in entries]

    steps, loss = column(history, "step"), column(history, "loss")
    dot = "." if len(history) == 1 else None
    if discarded:
        top.plot(column(discarded, "step"), column(discarded, "loss"), ".", color="#888888", ms=3, label="discarded")
    top.plot(steps, loss, color=plotting.SKY, lw=0.8, marker=dot, label="training, each step")
    width = len(loss) // 50
    if width > 1 and not any(map(math.isnan, loss)):
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        top.plot(steps[width - 1 :], smooth, color=plotting.BLUE, label=f"training, mean of {width}")
    held_out = [entry for entry in history if entry.get("val_loss") is not None]
    if held_out:
        style = {"color": plotting.RED, "ms": 4, "label": "held-out text"}
        top.plot(column(held_out, "step"), column(held_out, "val_loss"), "o", **style)
    rate.plot(steps, column(history, "lr"), color=plotting.GREEN, marker=dot)
    norm.semilogy(steps, column(history, "grad_norm"), color=plotting.ORANGE, lw=0.8, marker=dot)
    speed.plot(steps, column(history, "tokens_per_second"), color=plotting.PURPLE, lw=0.8, marker=dot)
    skipped = [entry["step"] for entry in history if entry["skipped"]]
    if skipped:
        marks = {"transform": top.get_xaxis_transform(), "clip_on": False, "color": plotting.BLACK}
        top.plot(skipped, [0] * len(skipped), "x", ms=5, label="skipped", **marks)
    back = [entry["step"] for entry in history if "rewound_from" in entry]
    for number, step in enumerate(back):
        top.axvline(step, color=plotting.BLACK, ls="--", lw=1, label=None if number else "went back to here")
    top.set(ylabel="loss (nats a token)")
    top.legend()
    rate.set(ylabel="learning rate", ylim=(0, None))
    norm.set(ylabel="gradient norm")
    speed.set(ylabel="tokens / s", xlabel="step", ylim=(0, None))
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=130)
    plt.close(fig)
    finite = [value for value in loss if not math.isnan(value)]
    fall = f"from {finite[0]:.2f} to {finite[-1]:.2f} nats a token " if finite else ""
    alt = f"Loss {fall}over {len(history)} steps; below it learning rate, gradient norm and tokens a second."
    caption = (
        "Loss, learning rate, gradient norm before clipping (logarithmic) and speed against the step. Where the "
        "held-out points leave the training line, the model has begun to memorise; a jump of the gradient's norm often "
        "comes before a jump of the loss."
    )
    image = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{image}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _faults(history: Sequence[dict], discarded: Sequence[dict]) -> str:
    lines = []
    for entry in history:
        if "rewound_from" in entry:
            lines.append(
                f"Before step {entry['step']} the run went back from step {entry['rewound_from']}, and on without "
                f"{entry['sequences_passed_over']:,} sequences."
            )
    for name, entries in (("kept", history), ("later discarded", discarded)):
        steps = [entry["step"] for entry in entries if entry["skipped"]]
        if steps:
            shown = ", ".join(map(str, steps[:50])) + (", ..." if len(steps) > 50 else "")
            lines.append(f"Steps without a finite loss and gradient, {name}: {shown}.")
    if not lines:
        return ""
    return "<h2>What went wrong</h2>" + "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _samples(history: Sequence[dict]) -> str:
    found = [entry for entry in history if entry.get("samples")]
    if not found:
        return ""
    shown = found if len(found) <= 8 else [found[i * (len(found) - 1) // 7] for i in range(8)]
    parts = ["<h2>What it wrote</h2>"]
    for entry in shown:
        parts.append(f"<p>after step {entry['step']:,}</p>")
        for sample in entry["samples"]:
            parts.append(f"<pre><mark>{html.escape(sample['prompt'])}</mark>{html.escape(sample['text'])}</pre>")
    return "".join(parts)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th scope=row>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows)
    return f'<div class="scroll"><table>{cells}</table></div>'
