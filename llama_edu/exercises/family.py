"""Checks for the exercises of lesson 00: bytes of a context, days of a run, and where attention outweighs the rest."""

from __future__ import annotations

import math

from llama_edu.config import LlamaConfig, parameter_counts
from llama_edu.exercises import exercise

__all__ = ["check_cache_bytes", "check_crossover", "check_training_days"]


def _verdict(results: list[float], right: list[float], wrong: dict[str, list[float]], otherwise: str) -> str | None:
    """The sentence whose answers these are, over several shapes at once; None where they are right."""
    same = lambda values: all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(results, values))
    if same(right):
        return None
    return next((sentence for sentence, values in wrong.items() if same(values)), otherwise)


@exercise(lesson="00_llama_family", level=1, minutes=5)
def check_cache_bytes(attempt) -> str | None:
    shapes = [(32, 32, 8, 128, 1000), (28, 24, 8, 128, 77), (16, 32, 8, 64, 4096)]
    results = [attempt(*shape) for shape in shapes]
    bytes_of = lambda numbers: [2 * numbers(*shape) for shape in shapes]
    right = bytes_of(lambda layers, heads, kv, width, tokens: 2 * layers * kv * width * tokens)
    wrong = {
        "You counted the query heads; only the key/value heads leave something behind.": bytes_of(
            lambda layers, heads, kv, width, tokens: 2 * layers * heads * width * tokens
        ),
        "Yours is half: every token leaves a key and a value, and every number of them is 2 bytes.": bytes_of(
            lambda layers, heads, kv, width, tokens: layers * kv * width * tokens
        ),
        "Yours is a quarter: a key and a value, and 2 bytes a number in bfloat16.": bytes_of(
            lambda layers, heads, kv, width, tokens: layers * kv * width * tokens / 2
        ),
        "You counted one layer: each keeps keys and values of its own.": bytes_of(
            lambda layers, heads, kv, width, tokens: 2 * kv * width * tokens
        ),
        "You counted one token: multiply by all of them.": bytes_of(
            lambda layers, heads, kv, width, tokens: 2 * layers * kv * width
        ),
        "You counted one head: there are n_kv_heads in every layer.": bytes_of(
            lambda layers, heads, kv, width, tokens: 2 * layers * width * tokens
        ),
    }
    return _verdict(results, right, wrong, "The bytes differ from 2 · L · K · h numbers a token, of 2 bytes each.")


@exercise(lesson="00_llama_family", level=1, minutes=10)
def check_training_days(attempt) -> str | None:
    runs = [(8e9, 15e12, 1024, 989e12, 0.4), (65e9, 1.4e12, 2048, 312e12, 0.5)]
    results = [attempt(*run) for run in runs]
    days = lambda seconds: [seconds(*run) / 86_400 for run in runs]
    right = days(lambda n, d, gpus, peak, share: 6 * n * d / (gpus * peak * share))
    wrong = {
        "You counted the forward pass only: the backward pass computes two products for each of its own, so 6ND.": days(
            lambda n, d, gpus, peak, share: 2 * n * d / (gpus * peak * share)
        ),
        "You counted the backward pass only: with the forward pass it is 6ND.": days(
            lambda n, d, gpus, peak, share: 4 * n * d / (gpus * peak * share)
        ),
        "You took the whole peak; only the share `utilisation` of it is reached.": days(
            lambda n, d, gpus, peak, share: 6 * n * d / (gpus * peak)
        ),
        "You multiplied the time by the utilisation: a smaller share makes the run longer.": days(
            lambda n, d, gpus, peak, share: 6 * n * d / (gpus * peak) * share
        ),
        "That is the time on one GPU: they share the work.": days(
            lambda n, d, gpus, peak, share: 6 * n * d / (peak * share)
        ),
        "Those are seconds: a day has 86,400.": [86_400 * value for value in right],
        "Those are hours: a day has 24.": [24 * value for value in right],
    }
    return _verdict(results, right, wrong, "The days differ from 6ND divided by what all GPUs reach in a day.")


@exercise(lesson="00_llama_family", level=2, minutes=10)
def check_crossover(attempt) -> str | None:
    models = [LlamaConfig.preset(name) for name in ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-405b")]
    shapes = []
    for cfg in models:
        counts = parameter_counts(cfg)
        weights = counts["attention"] + counts["feed_forward"] + cfg.vocab_size * cfg.dim
        shapes.append((weights, cfg.n_layers, cfg.n_heads, cfg.head_dim))
    results = [attempt(*shape) for shape in shapes]
    whole = [weights / (layers * heads * width) for weights, layers, heads, width in shapes]
    if all(abs(result + 0.5 - length) < 1 for result, length in zip(results, whole)):
        return None  # with or without the 1 of (T + 1) / 2, rounded or not
    near = lambda factor: all(abs(r / (factor * length) - 1) < 0.01 for r, length in zip(results, whole))
    if near(0.5):
        return (
            "Yours is half the length: over a causal sequence a token sees (T + 1) / 2 others on average, not T; and a "
            "weight costs 2 FLOPs, not 1."
        )
    if near(2):
        return "Yours is twice the length: attention has two products without weights, scores and mix."
    if near(4):
        return "Yours is four times the length: two products, of 2 FLOPs for each pair of numbers."
    layers = [shape[1] for shape in shapes]
    heads = [shape[2] for shape in shapes]
    for name, sizes in (("layers", layers), ("heads", heads)):
        if all(abs(r / (length * n) - 1) < 0.01 for r, length, n in zip(results, whole, sizes)):
            return f"You counted the products of one of the {name}: every one of them has its own."
    return "At your length 2 · weights FLOPs differ from L · 4 · h · H · (T + 1) / 2."
