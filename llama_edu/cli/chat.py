"""`llama-edu chat`: a conversation with a saved model, kept in its cache of keys and values."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama_edu import KVCache, generate
from llama_edu.cli.text_model import CacheDtype, Dtype, TextModel, cache_dtype, for_one, load, print_anything, sampling
from llama_edu.errors import UserError
from llama_edu.generation import Sampler
from llama_edu.tokenizer import ChatFormat

HELP = """\
/reset      begin a new conversation
/save FILE  write this one to a file, as JSON
/help       show this
/quit       leave (so does Ctrl-D); Ctrl-C stops an answer"""
MOST_CONTEXT = 8192  # a cache for 131,072 tokens is gigabytes: more only on demand


def chat(
    *,
    model: Path,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.6,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    context: int | None = None,
    format: Literal["auto", "llama3", "plain"] = "auto",
    dtype: Dtype | None = None,
    cache: CacheDtype = "model",
    device: str = "auto",
) -> int:
    """Talk with a model. What was said stays in the cache and is not read again.

    When the context is full, the oldest turns are dropped, and a sentence says so. Lines that begin with / are
    commands; /help lists them.

    Args:
        model: folder of a saved model with its tokenizer.
        system: instructions that stand before the conversation.
        max_new_tokens: most tokens of one answer.
        temperature: 0 always takes the likeliest token; higher is more varied.
        top_k: draw from this many likeliest tokens only.
        top_p: draw from the smallest set of tokens with this much probability; 0.9 where none of the three is given.
        min_p: draw from the tokens at least this many times as likely as the likeliest.
        seed: the same seed draws the same answers; by default others each time.
        context: tokens of the conversation that are kept; by default the model's, at most 8192.
        format: "llama3" for an Instruct model, "plain" (User: ..., Assistant: ...) for a base model; "auto" takes the
            first where the tokenizer has its special tokens.
        dtype: of the weights; by default as they were saved.
        cache: numbers in which keys and values are kept: the model's own, or fewer bits.
        device: "cpu", "cuda", "cuda:1"; "auto" takes a GPU where there is one.
    """
    options = sampling(temperature, top_k, top_p, min_p, 0.9)
    try:
        Sampler(**options, seed=seed)
    except ValueError as error:  # before the time it takes to load
        raise UserError(str(error)) from None
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if sys.stdin is None:
        raise UserError("standard input is closed: a conversation needs a terminal, or lines on standard input")
    print_anything()
    folder = load(model, dtype, device)
    if context is not None and not 16 <= context <= folder.context:
        raise UserError(f"context is {context}; it must be from 16 to the model's own, {folder.context}")
    conversation = Conversation(
        folder,
        choose_format(folder, format),
        context=context or min(folder.context, MOST_CONTEXT),
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=options,
        seed=seed,
        cache=cache,
    )
    note(f"{conversation.format.name}, {conversation.context} tokens of context; /help lists the commands")
    return converse(conversation)


def note(sentence: str) -> None:
    """Something about the conversation that is no part of it."""
    print(f"[{sentence}]", file=sys.stderr, flush=True)


def converse(conversation: Conversation) -> int:
    """Read lines and answer them until the end of input."""
    terminal, warned = sys.stdin.isatty(), False
    while True:
        try:
            line = read_line(terminal)
            warned = False
            if line is None or line.strip() == "/quit":
                return 0
            if not line.strip():
                continue
            if line.startswith("/"):
                command(conversation, line.strip())
            else:
                answer(conversation, line)
        except KeyboardInterrupt:
            if warned:
                raise
            print(flush=True)
            note("Ctrl-C stops an answer; /quit or a second Ctrl-C leaves")
            warned = True
        except UserError as error:
            note(str(error))


def read_line(terminal: bool) -> str | None:
    """One line of input, or None at its end."""
    try:
        if terminal:
            return input("> ")
        # Decoded line by line: a text stream decodes many lines at once, and one bad byte would take them all.
        raw = getattr(sys.stdin, "buffer", sys.stdin).readline()
        line = raw if isinstance(raw, str) else raw.decode("utf-8").replace("\r\n", "\n")
    except EOFError:
        print()
        return None
    except UnicodeDecodeError:
        raise UserError("this line is no UTF-8 text, and was not read") from None
    return line.rstrip("\n") if line else None


def answer(conversation: Conversation, line: str) -> None:
    """Print the answer to a line as it comes, then how quick it was."""
    began, first, stopped = time.perf_counter(), 0.0, False
    before, pieces = conversation.written, conversation.say(line)
    try:
        for piece in pieces:
            first = first or time.perf_counter()
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
    finally:
        pieces.close()  # interrupted while printing, the turn is not complete yet
    print(flush=True)
    n, now = conversation.written - before, time.perf_counter()
    rate = f", {(n - 1) / (now - first):,.1f} a second" if n > 1 and now > first > 0 else ""
    waited = f", the first after {first - began:.2f} s" if first else ""
    held = f"{len(conversation.ids)} of {conversation.context} tokens of context"
    note(f"{'stopped; ' if stopped else ''}{n} tokens{rate}{waited}; {held}")


def command(conversation: Conversation, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name == "/reset":
        conversation.reset()
        note("a new conversation")
    elif name == "/save":
        save(conversation, argument.strip())
    elif name == "/help":
        print(HELP, file=sys.stderr, flush=True)
    else:
        raise UserError(f"there is no command {name}; /help lists those there are")


def save(conversation: Conversation, file: str) -> None:
    """Write the conversation as a list of messages. A file that this conversation did not write is left alone."""
    if not file:
        raise UserError("/save needs the name of a file")
    path = Path(file)
    try:
        path = path.expanduser()
        if path.exists() and path.resolve() not in conversation.saved:
            raise UserError(f"{path} exists already: choose another name")
        temporary = path.with_name(path.name + ".tmp")
        text = json.dumps(conversation.messages(), indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        temporary.replace(path)
        conversation.saved.add(path.resolve())
    except UserError:  # a ValueError, and a sentence already
        raise
    except (OSError, ValueError, RuntimeError) as error:  # ~nobody is a RuntimeError, a name with \0 a ValueError
        raise UserError(f"{str(path)!r} was not written: {getattr(error, 'strerror', None) or error}") from None
    note(f"wrote {path}")


# --- formats ---------------------------------------------------------------------------------------------------------


class Llama3Chat:
    """Messages between special tokens, as the Instruct models of Llama 3 were trained on."""

    name = "Llama 3's chat format"
    stop_text = None

    def __init__(self, tokenizer: Any) -> None:
        self.format, self.special = ChatFormat(tokenizer), tokenizer.special_tokens

    def begin(self, system: str | None) -> list[int]:
        system_ids = [] if system is None else self.format.encode_message({"role": "system", "content": system})
        return [self.special["<|begin_of_text|>"], *system_ids]

    def ask(self, text: str) -> list[int]:
        """A message of the user, and the header after which the assistant speaks."""
        return self.format.encode_message({"role": "user", "content": text}) + self.format.encode_header("assistant")

    def end(self) -> list[int]:
        """What closes an answer."""
        return [self.special["<|eot_id|>"]]


class PlainChat:
    """A script with two speakers, for a base model, which continues any kind of text."""

    name = "plain format for a base model"
    stop_text = "\nUser:"

    def __init__(self, folder: TextModel) -> None:
        self.folder = folder

    def begin(self, system: str | None) -> list[int]:
        system = "A conversation between a user and an assistant." if system is None else system
        return self.folder.encode(system + "\n")

    def ask(self, text: str) -> list[int]:
        return self.folder.tokenizer.encode(f"\nUser: {text}\nAssistant:")

    def end(self) -> list[int]:
        return []


def choose_format(folder: TextModel, wanted: str) -> Llama3Chat | PlainChat:
    """The format of a conversation. Raises UserError for special tokens that the tokenizer does not have."""
    needed = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    missing = [name for name in needed if name not in folder.tokenizer.special_tokens]
    if wanted == "llama3" and missing:
        raise UserError(f"the tokenizer has no {missing[0]}, which the format of Llama 3 needs: use --format plain")
    return PlainChat(folder) if missing or wanted == "plain" else Llama3Chat(folder.tokenizer)


# --- the conversation ------------------------------------------------------------------------------------------------


@dataclass
class Turn:
    """A message and its answer, as ids and as text."""

    ids: list[int]
    user: str
    answer: str = ""


@dataclass
class Conversation:
    """What has been said: as text, as ids, and as keys and values of all ids that the model has read.

    `ids` is the truth: beginning, then the ids of all turns. The cache holds the keys of a first part of it; the rest
    is what the model reads next.
    """

    folder: TextModel
    format: Llama3Chat | PlainChat
    context: int
    system: str | None
    max_new_tokens: int
    sampling: dict[str, Any]
    seed: int | None
    cache: CacheDtype
    turns: list[Turn] = field(default_factory=list)
    written: int = 0  # tokens of all answers
    saved: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.beginning = self.format.begin(self.system)
        if len(self.beginning) > self.context // 2:
            raise UserError(
                f"the instructions have {len(self.beginning)} tokens, more than half of the context of {self.context}: "
                "shorten them"
            )
        network = self.folder.network
        weight = network.tok_embeddings.weight
        self.kept = KVCache(
            network.cfg,
            batch_size=1,
            max_seq_len=self.context,
            dtype=cache_dtype(self.cache) or weight.dtype,
            device=weight.device,
        )
        self.count = 0  # of answers, for their seeds

    @property
    def ids(self) -> list[int]:
        return self.beginning + [i for turn in self.turns for i in turn.ids]

    def reset(self) -> None:
        """Forget all turns; the beginning stays in the cache."""
        self.turns = []
        self._cut(len(self.beginning))
        self.saved = set()

    def messages(self) -> list[dict[str, str]]:
        """The conversation as a list of messages with role and content."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        pairs = [
            ({"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer})
            for turn in self.turns
        ]
        return system + [message for pair in pairs for message in pair]

    def say(self, text: str) -> Iterator[str]:
        """Yield the answer to a message, piece by piece. Left early, it keeps what was said until then.

        Raises:
            UserError: the message is longer than the context, or the model gives no finite numbers.
        """
        asked = self.format.ask(text)
        room = min(self.max_new_tokens, self.context // 4)  # at least this much for the answer
        most = self.context - len(self.beginning) - room
        if len(asked) > most:
            raise UserError(f"the message has {len(asked)} tokens; there is room for {most}: shorten it")
        self._make_room(len(asked) + room)
        turn = Turn(asked, text)
        self.turns.append(turn)
        try:
            yield from self._answer(turn)
        except ValueError as error:
            self.turns.remove(turn)
            self._cut(len(self.ids))
            raise UserError(for_one(str(error))) from None

    def _answer(self, turn: Turn) -> Iterator[str]:
        self.count += 1
        ids = self.ids
        held = int(self.kept.lengths)
        stream, stop = self.folder.tokenizer.stream(), self.format.stop_text
        shown = text = ""
        asked = len(turn.ids)
        steps = generate(
            self.folder.network,
            [ids[held:]],
            max_new_tokens=min(self.max_new_tokens, self.context - len(ids)),
            stop_ids=self.folder.stop_ids,
            choose=Sampler(**self.sampling, seed=None if self.seed is None else self.seed + self.count),
            cache=self.kept,
            stream=True,
        )
        try:
            for _, token in steps:
                turn.ids.append(token)
                self.written += 1
                text += stream.push(token)
                if stop and stop in text:
                    text = text[: text.index(stop)]
                    turn.ids = turn.ids[:asked] + self._before(turn.ids[asked:], len(text))
                    self._cut(min(int(self.kept.lengths), len(self.ids)))
                    break
                ready = text[: len(text) - held_back(text, stop)]
                yield ready[len(shown) :]
                shown = ready
            else:
                text += stream.finish()
            yield text[len(shown) :]
        finally:
            steps.close()
            turn.ids += self.format.end()
            turn.answer = text.strip()

    def _before(self, ids: list[int], length: int) -> list[int]:
        """The ids whose text ends within the first `length` characters."""
        stream, n = self.folder.tokenizer.stream(), 0
        for place, token in enumerate(ids):
            n += len(stream.push(token))
            if n > length:
                return ids[:place]
        return ids

    def _make_room(self, wanted: int) -> None:
        """Drop the oldest turns until `wanted` more tokens fit."""
        dropped = 0
        while self.turns and len(self.ids) + wanted > self.context:
            self.turns.pop(0)
            dropped += 1
        if dropped:  # what remains moves to earlier positions, so its keys have to be made anew
            self._cut(len(self.beginning))
            turns = "turn was" if dropped == 1 else f"{dropped} turns were"
            note(f"the oldest {turns} dropped: the conversation fills the context of {self.context} tokens")

    def _cut(self, length: int) -> None:
        """Let the cache hold the first `length` ids at most."""
        self.kept.truncate([min(length, int(self.kept.lengths))])


def held_back(text: str, stop: str | None) -> int:
    """How many of the last characters may be the beginning of `stop`, and are not shown yet."""
    if stop is None:
        return 0
    return max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
