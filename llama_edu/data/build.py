"""Large corpora become token shards: many processes, bounded memory, and a killed build goes on where it was.

A build cuts the documents, in their order, into shards of about `shard_bytes` of text. Which document goes where
depends on the text alone; so does every byte that is written, whoever writes it. A shard gets its name when it is
whole, and `index.json` is written last.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from llama_edu.data.sources import Document, expanded
from llama_edu.data.tokens import TokenFile, TokenShards, _sync, _write_shard, n_bytes, tokenizer_hash
from llama_edu.errors import UserError

__all__ = ["unfinished", "write_shards"]

VERSION = 1


def write_shards(
    documents: Iterable[str | Document],
    tokenizer: Any,
    out_dir: str | Path,
    *,
    workers: int | None = None,
    shard_bytes: int = 1 << 25,
    progress: bool = False,
    total_bytes: int | None = None,
) -> TokenShards:
    """Encode documents into a folder of shards; called again after a kill, it keeps what is whole and does the rest.

    The result is the same to the last byte for any number of workers and however often it was killed. Memory holds
    `workers` + 2 shards of text. Goes through all documents at each call, but encodes only those that are missing.

    Args:
        documents: texts in a fixed order, as `read_documents` gives them; empty ones are left out.
        tokenizer: as for `write_tokens`. Each worker gets a copy of its own.
        out_dir: folder of the shards; new, empty, or left by a build of the same documents.
        workers: processes that encode beside this one; 0: none. None: one for each core, or for every four cores where
            the tokenizer encodes on several cores by itself, as `BPETokenizer` does.
        shard_bytes: UTF-8 bytes of text after which a shard is full.
        progress: show a progress bar with MB/s.
        total_bytes: of text, if known, for the time left.

    Raises:
        UserError: the folder holds something else, the documents or the tokenizer have changed, the disk is full, a
            worker died, or there is no text. What is whole stays.
    """
    if shard_bytes < 1:
        raise UserError(f"shard_bytes is {shard_bytes}; it must be 1 or larger")
    if workers is not None and workers < 0:
        raise UserError(f"workers is {workers}; it must be 0 or larger")
    out = expanded(out_dir)
    settings = {"version": VERSION, "shard_bytes": shard_bytes, "tokenizer_sha256": tokenizer_hash(tokenizer)}
    bar: Any = nullcontext()
    if progress:
        from tqdm import tqdm

        bar = tqdm(desc="encoding", total=total_bytes, unit="B", unit_scale=True, disable=None)
    with _claimed(out, settings), _Team(tokenizer, _usual(tokenizer) if workers is None else workers) as team, bar:
        names, pending = [], deque()

        def finish() -> None:
            size = pending.popleft().result()
            if progress:
                bar.update(size)

        for number, texts in enumerate(_groups(documents, shard_bytes)):
            folder, digest, size = out / f"shard-{number:05d}", _digest(texts), sum(map(n_bytes, texts))
            names.append(folder.name)
            if _is_whole(folder, digest):
                if progress and not bar.disable:
                    bar.initial += size  # what was there does not count for the speed
                    bar.update(size)
                continue
            _check_space(out, texts, size, tokenizer.n_vocab)
            hashes = {"tokenizer_sha256": settings["tokenizer_sha256"], "text_sha256": digest}
            pending.append(team.submit(texts, folder, hashes, size))
            del texts
            if len(pending) > team.size:
                finish()
        while pending:
            finish()
        if not names:
            raise UserError("there is no text to encode: no document holds a character")
        if left := sorted({p.name for p in out.glob("shard-*")} - set(names)):
            raise UserError(
                f"{out / left[0]} is beyond the end of the text: the documents have changed, choose another folder"
            )
        shards = TokenShards([out / name for name in names], out)
        index = {
            **settings,
            "shards": names,
            "n_tokens": shards.n_tokens,
            "n_documents": shards.n_documents,
            "n_bytes": shards.n_bytes,
            "tokens_sha256": shards.tokens_sha256,
        }
        _write_json(out / "index.json", index)
    return shards


def unfinished(folder: Path) -> str | None:
    """A sentence when a build into this folder has begun and not ended, or when shards of it have gone since."""
    if not (folder / "build.json").exists():
        return None
    if not (folder / "index.json").exists():
        return f"the shards in {folder} are unfinished: run the same build again, it goes on where it was"
    try:
        names = json.loads((folder / "index.json").read_text())["shards"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{folder / 'index.json'} is damaged ({type(error).__name__}); run the same build again"
    gone = [name for name in names if not (folder / name / "meta.json").exists()]
    return f"{folder / gone[0]} is missing; run the same build again to make it" if gone else None


def _groups(documents: Iterable[str | Document], shard_bytes: int) -> Iterator[list[str]]:
    """The texts of each shard."""
    group: list[str] = []
    size = 0
    for document in documents:
        text = document if isinstance(document, str) else document.text
        if text:
            group.append(text)
            size += n_bytes(text)
        if size >= shard_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _digest(texts: list[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d " % len(data))
        digest.update(data)
    return digest.hexdigest()


def _is_whole(folder: Path, text_sha256: str) -> bool:
    """Whether the shard is there and undamaged. One that is damaged is removed; one of other text is refused."""
    if not folder.exists():
        return False
    try:
        shard = TokenFile(folder)
        shard.verify()
    except UserError:
        shutil.rmtree(folder)
        return False
    if shard.text_sha256 != text_sha256:
        raise UserError(
            f"{folder} was made from other text: the documents have changed since, so choose another folder for them"
        )
    return True


def _check_space(out: Path, texts: list[str], size: int, n_vocab: int) -> None:
    """A token is a byte or more of text; so this much is enough for a shard."""
    need = (size + 2 * len(texts)) * (2 if n_vocab <= 1 << 16 else 4) + 8 * len(texts) + 4096
    free = shutil.disk_usage(out).free
    if free < need:
        raise UserError(
            f"{out} has {free / 1e6:,.0f} MB free, and the next shard may need {need / 1e6:,.0f} MB: make room and run "
            "the same build again, what is whole is kept"
        )


@contextmanager
def _claimed(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """The folder, held by this process alone, with the settings of the build in it."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another place for the shards")
    out.mkdir(parents=True, exist_ok=True)
    record = out / "build.json"
    if record.exists():
        try:
            found = json.loads(record.read_text())
            if not isinstance(found, dict):
                raise TypeError
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{record} is damaged; remove the folder and build again") from error
        for key, value in settings.items():
            if found.get(key) != value:
                raise UserError(
                    f"{out} was begun with {key} {str(found.get(key))[:12]} and not {str(value)[:12]}; choose another "
                    "folder, or build with what it was begun with"
                )
    elif stranger := next((p.name for p in out.iterdir() if p.name != ".lock" and not p.name.endswith(".tmp")), None):
        raise UserError(f"{out} holds {stranger!r}, which is no part of a build; choose an empty folder for the shards")
    with open(out / ".lock", "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such lock on this system
            pass
        except OSError as error:
            raise UserError(f"another build is writing to {out}; wait for it or choose another folder") from error
        for leftover in out.glob(".shard-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if not record.exists():
            _write_json(record, settings)
        yield
    (out / ".lock").unlink(missing_ok=True)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """All of it or nothing."""
    partial = file.with_name(file.name + ".tmp")
    with open(partial, "w") as out:
        json.dump(content, out, indent=1)
        _sync(out)
    os.replace(partial, file)


def _write_one(texts: list[str], tokenizer: Any, folder: Path, hashes: dict[str, str]) -> None:
    """One shard, under its name when it is whole. The name of the unfinished one is this process's own."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write_shard(texts, tokenizer, partial, False, hashes)
        os.rename(partial, folder)
    except OSError as error:
        if (folder / "meta.json").exists():  # a worker of a killed build was quicker: it wrote the same bytes
            return
        raise UserError(
            f"{folder} could not be written ({error.strerror or error}); what is whole is kept, run the build again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# --- workers: processes of their own that read tasks on standard input ------------------------------------------------
#
# Not multiprocessing: fork after threads of numba or CUDA is unsafe, and spawn runs the caller's script again. A worker
# ends with its standard input, so none outlives a build that was killed.


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _usual(tokenizer: Any) -> int:
    """Workers that pay: a start costs seconds, and one process keeps about four cores busy if its tokenizer can."""
    return _cores() // 4 if hasattr(tokenizer, "encode_corpus") else _cores()


class _Worker:
    def __init__(self, tokenizer: bytes) -> None:
        command = [sys.executable, "-c", "from llama_edu.data.build import _work; _work()"]
        places = [str(Path(__file__).parents[2]), *(p for p in sys.path if p)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        self.tokenizer = tokenizer

    def do(self, task: tuple) -> None:
        """Have a shard written. Raises what the worker met."""
        try:
            for message in (self.tokenizer, pickle.dumps(task, protocol=5)):
                if message:
                    self.process.stdin.write(len(message).to_bytes(8, "little"))
                    self.process.stdin.write(message)
            self.tokenizer = b""
            self.process.stdin.flush()
            kind, what = pickle.load(self.process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError, ValueError) as error:
            code = self.process.wait()
            raise UserError(
                f"a worker ended with exit code {code}, perhaps for want of memory: lower workers or shard_bytes, and "
                "run the build again, what is whole is kept"
            ) from error
        if kind == "user":
            raise UserError(what)
        if kind == "error":
            raise RuntimeError(f"a worker failed: {what}")


class _Team:
    """Workers. The first shard is written by this process, so that one that is alone need not wait for any to start."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size
        self.submitted = 0
        self.pool: ThreadPoolExecutor | None = None
        self.workers: list[_Worker] = []
        self.free: SimpleQueue[_Worker] = SimpleQueue()

    def __enter__(self) -> _Team:
        return self

    def __exit__(self, *failure: object) -> None:
        for worker in self.workers:
            worker.process.stdin.close() if failure[0] is None else worker.process.kill()
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        for worker in self.workers:
            worker.process.wait()
            worker.process.stdout.close()
            try:
                worker.process.stdin.close()
            except OSError:  # what was not yet sent to a killed worker
                pass

    def submit(self, texts: list[str], folder: Path, hashes: dict[str, str], size: int) -> Any:
        """A future of the bytes of text that were written."""
        if self.pool is None:
            self.pool = ThreadPoolExecutor(self.size + 1)
        self.submitted += 1
        if self.submitted == 1 or not self.size:
            return self.pool.submit(self._do_here, texts, folder, hashes, size)
        if not self.workers:
            sent = _pickled(self.tokenizer)
            self.workers = [_Worker(sent) for _ in range(self.size)]
            for worker in self.workers:
                self.free.put(worker)
        return self.pool.submit(self._do, texts, folder, hashes, size)

    def _do_here(self, texts: list[str], folder: Path, hashes: dict[str, str], size: int) -> int:
        _write_one(texts, self.tokenizer, folder, hashes)
        return size

    def _do(self, texts: list[str], folder: Path, hashes: dict[str, str], size: int) -> int:
        worker = self.free.get()
        try:
            worker.do((texts, str(folder), hashes))
        finally:
            self.free.put(worker)
        return size


def _pickled(tokenizer: Any) -> bytes:
    """A tokenizer without what it has cached, which may not travel and is made again."""
    try:
        light = copy.copy(tokenizer)
        for kind in type(tokenizer).__mro__:
            for name, value in vars(kind).items():
                if isinstance(value, cached_property):
                    vars(light).pop(name, None)
        return pickle.dumps(light, protocol=5)
    except Exception as error:
        raise UserError(
            f"a {type(tokenizer).__name__} cannot be sent to another process ({error}); give workers=0"
        ) from error


def _work() -> None:
    """The life of a worker."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anyone prints goes to standard error
    messages: SimpleQueue[bytes] = SimpleQueue()

    def read() -> None:
        while head := sys.stdin.buffer.read(8):
            messages.put(sys.stdin.buffer.read(int.from_bytes(head, "little")))
        os._exit(0)  # the build has ended, or was killed

    threading.Thread(target=read, daemon=True).start()
    sent, tokenizer = messages.get(), None
    while True:
        task = messages.get()
        try:
            if tokenizer is None:
                tokenizer = _unpickled(sent)
            texts, folder, hashes = pickle.loads(task)
            _write_one(texts, tokenizer, Path(folder), hashes)
            answer = ("done", None)
        except UserError as error:
            answer = ("user", str(error))
        except Exception as error:
            answer = ("error", f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


def _unpickled(sent: bytes) -> Any:
    try:
        return pickle.loads(sent)
    except Exception as error:
        raise UserError(
            f"the tokenizer is not known in another process ({error}): define it in a module, or give workers=0"
        ) from error
