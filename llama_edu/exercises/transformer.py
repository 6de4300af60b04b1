"""Checks for the exercises of lesson 24: the transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llama_edu.config import LlamaConfig, parameter_counts
from llama_edu.exercises import exercise

_LESSON = "24_transformer"


@exercise(lesson=_LESSON, level=1, minutes=5)
def check_block(attempt):
    generator = torch.Generator().manual_seed(0)
    x, wa, wf, ga, gf = (torch.randn(*s, generator=generator) for s in [(2, 3, 8), (8, 8), (8, 8), (8,), (8,)])

    def attention(t):
        return torch.tanh(t @ wa)

    def feed_forward(t):
        return torch.sigmoid(t @ wf)

    def attention_norm(t):
        return F.rms_norm(t, (8,)) * ga

    def ffn_norm(t):
        return F.rms_norm(t, (8,)) * gf

    before = x.clone()
    out = attempt(x, attention, feed_forward, attention_norm, ffn_norm)
    if not torch.equal(x, before):
        return "x was changed in place: others still need it. Write `x = x + ...`, not `x += ...`."
    if out.shape != before.shape:
        return f"The result has shape {tuple(out.shape)}; the stream keeps its shape, {tuple(x.shape)}."
    out, h = out.to(x.dtype), x + attention(attention_norm(x))
    wrong = {
        "The second half reads the block's input; it must read the stream after attention was added.": (
            h + feed_forward(ffn_norm(x))
        ),
        "The attention half is not added to x: without this path the stream is replaced, not extended.": (
            attention(attention_norm(x)) + feed_forward(ffn_norm(attention(attention_norm(x))))
        ),
        "The feed-forward half is not added to the stream: its result replaces it.": feed_forward(ffn_norm(h)),
        "The norms are missing: each half reads a normalised copy.": x + attention(x) + feed_forward(x + attention(x)),
        "This is post-norm: the norm stands on the stream. In a Llama it stands in front of each half only.": ffn_norm(
            attention_norm(x + attention(x)) + feed_forward(attention_norm(x + attention(x)))
        ),
        "The two norms are exchanged, or one is used twice.": x
        + attention(ffn_norm(x))
        + feed_forward(attention_norm(x + attention(ffn_norm(x)))),
        "attention_norm is used twice: the feed-forward half has its own.": h + feed_forward(attention_norm(h)),
        "You add the normalised copy instead of the stream itself.": attention_norm(x)
        + attention(attention_norm(x))
        + feed_forward(ffn_norm(attention_norm(x) + attention(attention_norm(x)))),
    }
    if torch.allclose(out, h + feed_forward(ffn_norm(h)), atol=1e-5):
        return None
    for diagnosis, value in wrong.items():
        if torch.allclose(out, value, atol=1e-5):
            return diagnosis
    return "The numbers are not those of x + attention(norm(x)), followed by the same with the feed-forward half."


@exercise(lesson=_LESSON, level=1, minutes=10)
def check_count_parameters(attempt):
    cfg = LlamaConfig(dim=96, n_layers=5, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=250, vocab_size=1009)
    tied = LlamaConfig(**{**cfg.to_dict(), "tie_embeddings": True})
    got, right = attempt(cfg), cfg.num_parameters()
    if got == right:
        if attempt(tied) != tied.num_parameters():
            return "Right for two matrices of the vocabulary; when tie_embeddings is set there is only one."
        return None
    counts = parameter_counts(cfg)
    heads = cfg.dim * cfg.head_dim
    wrong = {
        right - cfg.dim: "The last norm is missing: one more vector of dim.",
        right - counts["norms"]: "The norms are missing: two a layer and one at the end.",
        right
        - counts["output"]: "The output matrix is missing: it is a matrix of its own unless tie_embeddings is set.",
        right - cfg.n_layers * cfg.dim * cfg.ffn_dim: "You counted two feed-forward matrices; SwiGLU has three.",
        right + cfg.n_layers * heads * 2 * (cfg.n_heads - cfg.n_kv_heads): (
            "wk and wv were counted with n_heads; they have n_kv_heads heads."
        ),
        right - counts["attention"] + cfg.n_layers * (2 * cfg.dim**2 + 2 * cfg.dim * cfg.n_kv_heads * cfg.head_dim): (
            "wq and wo were counted as dim x dim; they are dim x (n_heads * head_dim)."
        ),
        right - counts["attention"] + cfg.n_layers * heads * (cfg.n_heads + 2 * cfg.n_kv_heads): "wo is missing.",
        right
        - (cfg.n_layers - 1) * (sum(counts[k] for k in ("attention", "feed_forward")) // cfg.n_layers + 2 * cfg.dim): (
            "You counted one layer; there are n_layers."
        ),
    }
    return wrong.get(
        got, f"For {cfg} you count {got}, which is {abs(got - right)} too {'many' if got > right else 'few'}."
    )


@exercise(lesson=_LESSON, level=2, minutes=10)
def check_next_token_loss(attempt):
    generator = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(3, 7, 11, generator=generator), torch.randint(0, 11, (3, 7), generator=generator)
    got = torch.as_tensor(attempt(logits.clone(), tokens.clone()))
    if got.numel() != 1:
        return f"The loss must be one number, the mean; yours has shape {tuple(got.shape)}."

    def entropy(z, t, **kwargs):
        return F.cross_entropy(z.flatten(0, 1), t.flatten(), **kwargs)

    z, t = logits[:, :-1], tokens[:, 1:]
    wrong = {
        "Nothing is shifted: the logits at t are compared with token t, which the model has just read.": entropy(
            logits, tokens
        ),
        "The shift goes the wrong way: logits at t + 1 are compared with token t.": entropy(
            logits[:, 1:], tokens[:, :-1]
        ),
        "The tokens are rolled: the last logits are compared with the first token of the sequence.": entropy(
            logits, tokens.roll(-1, 1)
        ),
        "You summed; the loss is the mean over all predicted tokens.": entropy(z, t, reduction="sum"),
        "Softmax is applied twice: cross_entropy takes logits, not probabilities.": entropy(z.softmax(-1), t),
        "The sign is turned round: the loss is minus the log-probability.": -entropy(z, t),
        "You divided by the number of sequences; divide by the number of predicted tokens.": (
            entropy(z, t, reduction="sum") / len(tokens)
        ),
    }
    if torch.allclose(got.double(), entropy(z, t).double(), atol=1e-5):
        return None
    for diagnosis, value in wrong.items():
        if torch.allclose(got.double(), value.double(), atol=1e-5):
            return diagnosis
    return "The number is not the mean of -log p(next token); check on one sequence of two tokens."
