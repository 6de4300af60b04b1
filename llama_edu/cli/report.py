"""The report of a tour: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama_edu import plotting

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --soft: #f3f3f0; --line: #d9d9d4; --link: #00507f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e4; --paper: #16181a; --soft: #22262a; --line: #3a4046; --link: #7cc4f0; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
       max-width: 46rem; padding: 1.5rem 1rem 4rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.4rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .3rem 1.2rem .3rem 0;
        border-bottom: 1px solid var(--line); } td { overflow-wrap: anywhere; } td.n, th.n { text-align: right;
        font-variant-numeric: tabular-nums; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { font-size: .9rem; }
pre { background: var(--soft); padding: .8rem 1rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
      border-radius: 4px; font-size: .87rem; }
mark { background: none; color: inherit; font-weight: 700; } a { color: var(--link); }
.scroll { overflow-x: auto; }
"""


@dataclass(frozen=True)
class Figure:
    """A picture as base64 PNG, what it shows in words, and what to see in it."""

    png: str
    alt: str
    caption: str

    def html(self) -> str:
        return (
            f'<figure><img alt="{html.escape(self.alt, quote=True)}" src="data:image/png;base64,{self.png}">'
            f"<figcaption>{html.escape(self.caption)}</figcaption></figure>"
        )


def _render(fig, alt: str, caption: str) -> Figure:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=130)
    plt.close(fig)
    return Figure(base64.b64encode(buffer.getvalue()).decode(), alt, caption)


def _canvas(**kwargs):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plotting.use_style()
    return plt.subplots(**kwargs)


def training_figure(steps, loss, lr, tokens_per_second, held_out: tuple[Sequence[int], Sequence[float]]) -> Figure:
    """Loss (training and held-out), learning rate and speed against the step."""
    fig, (top, middle, bottom) = _canvas(nrows=3, sharex=True, figsize=(7.2, 6), height_ratios=[3, 1, 1])
    top.plot(steps, loss, color=plotting.SKY, lw=0.8, label="training, each step")
    width = len(loss) // 50
    if width > 1:
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        top.plot(steps[width - 1 :], smooth, color=plotting.BLUE, label=f"training, mean of {width}")
    if held_out[0]:
        top.plot(*held_out, "o", color=plotting.RED, ms=4, label="held-out text")
    top.set(ylabel="loss (nats a token)")
    top.legend()
    middle.plot(steps, lr, color=plotting.GREEN)
    middle.set(ylabel="learning rate")
    bottom.plot(steps, tokens_per_second, color=plotting.PURPLE, lw=0.8)
    bottom.set(ylabel="tokens / s", xlabel="step", ylim=(0, None))
    return _render(
        fig,
        f"Loss falls from {loss[0]:.2f} to {loss[-1]:.2f} nats a token over {len(loss)} steps, below it the learning "
        "rate with its warm-up and decay, and the speed in tokens a second.",
        "Loss falls while the learning rate warms up and decays. Held-out text was never trained on: where its points "
        "leave the training line, the model has begun to memorise.",
    )


def token_figure(lengths: np.ndarray, counts: np.ndarray) -> Figure:
    """How long tokens are: in the vocabulary, and weighted by use in the text."""
    edges = np.arange(1, min(int(lengths.max()), 20) + 2)
    fig, ax = _canvas(figsize=(7.2, 3))
    clipped = np.minimum(lengths, edges[-2])
    used = np.bincount(clipped, weights=counts, minlength=edges[-1])[1:] / max(counts.sum(), 1)
    kinds = np.bincount(clipped, minlength=edges[-1])[1:] / len(clipped)
    ax.bar(edges[:-1] - 0.2, kinds, 0.4, color=plotting.SKY, label="of the vocabulary")
    ax.bar(edges[:-1] + 0.2, used, 0.4, color=plotting.BLUE, label="of the text's tokens")
    ax.set(xlabel="bytes in the token", ylabel="share", xticks=edges[:-1])
    ax.legend()
    mean = float((lengths * counts).sum() / max(counts.sum(), 1))
    return _render(
        fig,
        f"Histogram of token lengths in bytes; a token of the text has {mean:.2f} bytes on average.",
        f"Frequent pieces of text became tokens. A token of the training text stands for {mean:.2f} bytes on average; "
        "the last bar gathers all longer ones.",
    )


def attention_figure(weights: np.ndarray, labels: Sequence[str], title: str) -> Figure:
    """One head's attention over a short text."""
    fig, ax = _canvas(figsize=(7.2, 6.4))
    image = ax.imshow(weights, vmin=0, vmax=weights[1:].max())  # the first token can only look at itself
    ticks = range(len(labels))
    # Text from outside is drawn as it is: a dollar sign must not start matplotlib's mathematics.
    shown = [label.replace("$", r"\$") for label in labels]
    ax.set_xticks(ticks, shown, rotation=90, fontsize=7, family="monospace")
    ax.set_yticks(ticks, shown, fontsize=7, family="monospace")
    ax.set(xlabel="looks at", ylabel="token", title=title)
    ax.grid(False)
    fig.colorbar(image, ax=ax, shrink=0.7, label="attention")
    return _render(
        fig,
        f"Attention weights of one head over {len(labels)} tokens, a lower triangle: no token sees a later one.",
        f"{title}: each row is a token, and the bright columns are what it looks at. Above the diagonal is the future: "
        "zero everywhere.",
    )


@dataclass(frozen=True)
class Sample:
    """A prompt, what the model went on with, and how it was drawn."""

    prompt: str
    answer: str
    how: str


def write_report(
    path: Path,
    *,
    title: str,
    summary: Sequence[tuple[str, str]],
    scores: Sequence[tuple[str, float]],
    figures: Sequence[Figure],
    samples: Sequence[Sample],
    notes: Sequence[str],
) -> None:
    """Write the page. Text from outside is escaped; nothing in it is markup.

    Args:
        summary: rows of the table at the top, (what, value).
        scores: rows of the comparison, (model, bits per byte).
        notes: sentences at the end.
    """
    e = html.escape
    rows = "".join(f"<tr><th scope=row>{e(k)}</th><td>{e(v)}</td></tr>" for k, v in summary)
    bits = "".join(f'<tr><th scope=row>{e(k)}</th><td class="n">{v:.3f}</td></tr>' for k, v in scores)
    drawn = "".join(f"<p>{e(s.how)}</p><pre><mark>{e(s.prompt)}</mark>{e(s.answer)}</pre>" for s in samples)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{e(title)}</title><style>{STYLE}</style></head><body><main>
<h1>{e(title)}</h1>
<div class="scroll"><table>{rows}</table></div>
<h2>How well it predicts text it has never seen</h2>
<div class="scroll"><table>
<tr><th scope=col>predictor</th><th scope=col class="n">bits per byte</th></tr>{bits}</table></div>
<p>Bits per byte is what the held-out text would take if it were compressed with the predictor, divided by its length:
lower is better, and tokenizers of any size compare.</p>
{"".join(f.html() for f in figures[:1])}
<h2>The tokenizer</h2>
{"".join(f.html() for f in figures[1:2])}
<h2>What one head looks at</h2>
{"".join(f.html() for f in figures[2:])}
<h2>Samples</h2>
<p>The bold part is the prompt, the rest the model's.</p>
{drawn}
<h2>Notes</h2>
<ul>{"".join(f"<li>{e(n)}</li>" for n in notes)}</ul>
</main></body></html>
"""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
