"""`llama-edu generate`: continue one prompt, or a batch of them, with a saved model."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from llama_edu import generate
from llama_edu.cli.text_model import CacheDtype, Dtype, TextModel, cache_dtype, for_one, load, print_anything, sampling
from llama_edu.errors import UserError
from llama_edu.generation import ContinuousBatcher, Sampler

NEW_TOKENS = 200
BLOCK = 16


def generate_text(
    text: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    *,
    model: Path,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    batch: int = 16,
    dtype: Dtype | None = None,
    cache: CacheDtype = "model",
    device: str = "auto",
) -> int:
    """Continue a prompt, printing text as it comes; or each line of standard input, printing a line for each.

    A line's answer is printed when it and all before it are complete; line breaks in it are written as \\n. A line that
    cannot be continued gets an empty line, and a sentence on standard error. Speed is told on standard error.

    Args:
        text: what to go on from; the lines of standard input when left out.
        model: folder of a saved model with its tokenizer (`llama-edu tour` makes one).
        prompt: another way to give the text.
        max_new_tokens: most tokens to add; by default 200, or as many as the model's context has room for.
        temperature: 0 always takes the likeliest token; higher is more varied.
        top_k: draw from this many likeliest tokens only.
        top_p: draw from the smallest set of tokens with this much probability; 0.95 where none of the three is given.
        min_p: draw from the tokens at least this many times as likely as the likeliest.
        seed: the same seed draws the same text.
        batch: lines worked on at a time.
        dtype: of the weights; by default as they were saved.
        cache: numbers in which keys and values are kept: the model's own, or fewer bits.
        device: "cpu", "cuda", "cuda:1"; "auto" takes a GPU where there is one.
    """
    if text is not None and prompt is not None:
        raise UserError("the text is given twice: once by itself, once with --prompt")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if batch < 1:
        raise UserError(f"batch is {batch}; it must be at least 1")
    options = sampling(temperature, top_k, top_p, min_p, 0.95) | {"seed": seed}
    try:
        Sampler(**options)
    except ValueError as error:  # before the time it takes to load
        raise UserError(str(error)) from None
    text = prompt if text is None else text
    lines = [text] if text is not None else read_lines()
    print_anything()
    folder = load(model, dtype, device)
    if len(lines) == 1:
        return one(folder, lines[0], max_new_tokens, options, cache)
    return many(folder, lines, max_new_tokens, options, cache, batch)


def read_lines() -> list[str]:
    """The lines of standard input."""
    if sys.stdin is None:
        raise UserError("standard input is closed: give a text")
    try:
        lines = sys.stdin.read().splitlines()
    except UnicodeDecodeError:
        raise UserError("standard input is no UTF-8 text") from None
    if not lines:
        raise UserError("the prompt is empty: give a text, or one prompt a line on standard input")
    return lines


def room(folder: TextModel, text: str, wanted: int | None) -> tuple[list[int], int]:
    """Ids of a prompt, and how many to add. Raises UserError for an empty one, or one that fills the context."""
    if not text:
        raise UserError("the prompt is empty: give at least one character")
    ids = folder.encode(text)
    left = folder.context - len(ids)
    if left < 1:
        raise UserError(
            f"the prompt has {len(ids)} tokens, which leaves no room in the model's context of {folder.context}: "
            f"shorten it by {1 - left} or more"
        )
    return ids, min(NEW_TOKENS, left) if wanted is None else wanted


def one(folder: TextModel, text: str, wanted: int | None, options: dict, cache: CacheDtype) -> int:
    """Print the continuation as it comes."""
    ids, wanted = room(folder, text, wanted)
    stream, n, began, first = folder.tokenizer.stream(), 0, time.perf_counter(), 0.0
    try:
        for _, token in generate(
            folder.network,
            [ids],
            max_new_tokens=wanted,
            stop_ids=folder.stop_ids,
            stream=True,
            choose=Sampler(**options),
            cache_dtype=cache_dtype(cache),
        ):
            first = first or time.perf_counter()
            n += 1
            print(stream.push(token), end="", flush=True)
    except ValueError as error:  # what came before it has been printed
        print(stream.finish(), flush=True)
        raise UserError(for_one(str(error))) from None
    print(stream.finish(), flush=True)
    say_speed(n, time.perf_counter() - first, f"{len(ids)} of the prompt read in {first - began:.2f} s" if n else "")
    return 0


def say_speed(n: int, seconds: float, more: str) -> None:
    rate = f", {(n - 1) / seconds:,.1f} tokens a second" if n > 1 and seconds > 0 else ""
    print(f"{n} tokens{rate}{'; ' if more else ''}{more}", file=sys.stderr)


def many(folder: TextModel, lines: list[str], wanted: int | None, options: dict, cache: CacheDtype, batch: int) -> int:
    """Print a line for each line, in order, as soon as it can be; those that are done are kept whatever happens."""
    jobs: dict[int, tuple[list[int], int]] = {}
    trouble: dict[int, str] = {}
    for i, line in enumerate(lines):
        try:
            jobs[i] = room(folder, line, wanted)
        except UserError as error:
            trouble[i] = str(error)
    sizes = sorted((-(-(len(ids) + n) // BLOCK) for ids, n in jobs.values()), reverse=True)
    batcher = ContinuousBatcher(
        folder.network,
        n_blocks=max(1, sum(sizes[:batch])),
        block_size=BLOCK,
        max_batch=batch,
        dtype=cache_dtype(cache),
    )
    number: dict[int, int] = {}
    for i, (ids, n) in jobs.items():
        try:
            number[i] = batcher.submit(ids, max_new_tokens=n, choose=_Row(options, i), stop_ids=folder.stop_ids)
        except ValueError as error:
            trouble[i] = for_one(str(error))
    printed, began = 0, time.perf_counter()

    def answer(i: int) -> str | None:
        """The line to print, or None while it is being written."""
        request = batcher.requests[number[i]] if i in number else None
        if request is None or request.state == "failed":
            trouble.setdefault(i, for_one(request.error) if request else "")
            return ""
        return one_line(folder, request.new) if request.ended else None

    try:
        while True:
            while printed < len(lines) and (ready := answer(printed)) is not None:
                print(ready, flush=True)
                printed += 1
            if not batcher.open:
                break
            batcher.step()
    except BaseException as error:
        if not isinstance(error, BrokenPipeError):
            keep_done(lines, printed, answer)
        raise
    for i, sentence in sorted(trouble.items()):
        print(f"llama-edu: line {i + 1}: {sentence}", file=sys.stderr)
    n = sum(len(request.new) for request in batcher.requests.values())
    say_speed(n, time.perf_counter() - began, f"{len(lines) - len(trouble)} of {len(lines)} lines")
    return 2 if trouble else 0


def keep_done(lines: list[str], printed: int, answer) -> None:
    """Print the lines that are complete behind one that is not, each in its place."""
    rest = [answer(i) for i in range(printed, len(lines))]
    while rest and not rest[-1]:
        rest.pop()
    for line in rest:
        print(line or "")
    sys.stdout.flush()


def one_line(folder: TextModel, ids: list[int]) -> str:
    stream = folder.tokenizer.stream()
    text = "".join(stream.push(i) for i in ids) + stream.finish()
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


class _Row(Sampler):
    """The draws of one row of a batch: as `generate` would draw them for this row of all prompts."""

    def __init__(self, options: dict, row: int) -> None:
        super().__init__(**options)
        self.row = row

    def __call__(self, logits, rows, step, ids):
        return super().__call__(logits, [self.row] * len(rows), step, ids)
