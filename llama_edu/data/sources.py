"""Documents from wherever text is: this interpreter, files and folders, compressed or not, or a Hub data set.

Every reader is a generator: nothing larger than one document (or one batch of a parquet file) is in memory.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from llama_edu.errors import UserError

__all__ = ["BUILTIN", "Document", "Split", "held_out", "put_aside", "read_documents"]

BUILTIN = "builtin"
FORMATS = (".txt", ".md", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
# Folders of the standard library that hold test data or tables of numbers rather than text people wrote.
_NO_PROSE = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    name: str


def read_documents(spec: str | Path | Sequence[str | Path], *, field: str = "text") -> Iterator[Document]:
    """Documents of a source, in a fixed order; empty ones are left out.

    Args:
        spec: `"builtin"` (this interpreter's documentation topics and the sources of its library, with their
            docstrings: real text that is on every machine), a file, a folder (searched for files of the formats below),
            a glob pattern, or `"hf:NAME"` for the training split of a Hub data set, which is streamed (needs the extra
            `hub`; NAME may be a local folder that `datasets` reads). `"hf:NAME?config=en&split=test&revision=v1"`
            chooses among what the data set offers. Several of these: a list, read one after the other.
            Formats: `.txt` and `.md` (a file is a document), `.jsonl` and `.parquet` (a row is a document), each as it
            is or with `.gz` or `.zst` after it.
        field: where a row of `.jsonl`, `.parquet` or a Hub data set has its text.

    Raises:
        UserError: nothing is there, a file is of another format, or its content is damaged or no UTF-8; the sentence
            names file and line or offset.
    """
    if not isinstance(spec, (str, Path)):
        return (document for one in spec for document in read_documents(one, field=field))
    spec = str(spec)
    if spec == BUILTIN:
        readers: Iterator[Document] = _builtin()
    elif spec.startswith("hf:"):
        readers = _hub(spec.removeprefix("hf:"), field)
    else:
        readers = (document for path in _files(spec) for document in _read_file(path, field))
    return (document for document in readers if document.text.strip())


@dataclass(frozen=True)
class Split:
    """A corpus divided into text to learn from and text to be tested on."""

    train: list[Document]
    held_out: list[Document]


def held_out(documents: Iterable[Document], *, fraction: float = 0.05, max_bytes: int = 500_000) -> Split:
    """Put a share of the text aside, the same share every time.

    Twenty documents or more are split by document, chosen by a hash of the name, so that no document is on both sides
    and adding one moves no other. Fewer are each cut near their end, at a line break where there is one within a tenth
    of the share.

    Args:
        fraction: share that is put aside.
        max_bytes: documents chosen beyond this total stay in the training part.

    Raises:
        UserError: there is no text, or too little to divide.
    """
    documents = list(documents)
    if not documents:
        raise UserError("the corpus is empty: no document with any text was found in it")
    train, aside, size = [], [], 0
    for document in documents:
        if len(documents) < 20:
            cut = max(int(len(document.text) * (1 - fraction)), len(document.text) - max_bytes // len(documents))
            share = len(document.text) - cut
            cut = document.text.rfind("\n", max(cut - share // 10, 0), cut) + 1 or cut
            train.append(Document(document.text[:cut], document.name))
            aside.append(Document(document.text[cut:], document.name))
            continue
        length = len(document.text.encode())
        if put_aside(document, fraction) and size + length <= max_bytes:
            aside.append(document)
            size += length
        else:
            train.append(document)
    train, aside = ([d for d in part if d.text.strip()] for part in (train, aside))
    if not train or not aside:
        total = sum(len(d.text) for d in documents)
        raise UserError(
            f"the corpus has {total} characters in {len(documents)} documents, too little to put {fraction:.0%} aside "
            "for testing; give it more text"
        )
    return Split(train, aside)


def put_aside(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the share for testing: by a hash of its name, so always the same ones.

    For a corpus too large for `held_out`: read it twice, once for those that do and once for those that do not.
    """
    digest = hashlib.blake2b(document.name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _builtin() -> Iterator[Document]:
    """The interpreter's own text. Which files there are differs from one Python to the next: rely on no size."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship it apart
        topics = {}
    for name in sorted(topics):
        yield Document(topics[name], f"pydoc/{name}")
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if not _NO_PROSE & set(inside.parts[:-1]):
            text = path.read_bytes().decode("utf-8", "ignore")  # a few sources declare a historic encoding
            yield Document(text, f"stdlib/{inside.as_posix()}")


def _suffixes(path: Path) -> tuple[str, str]:
    """(format, compression) of a file name, each possibly empty: "a.jsonl.gz" -> (".jsonl", ".gz")."""
    name = path.name.lower()
    compression = next((c for c in COMPRESSIONS if name.endswith(c)), "")
    name = name.removesuffix(compression)
    return next((f for f in FORMATS if name.endswith(f)), ""), compression


def expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{str(path)!r} begins with the home of a user whom this machine does not know; write the path in full, or "
            f"./{path} where it is a name"
        ) from error


def _files(spec: str) -> list[Path]:
    path = expanded(spec)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _suffixes(p)[0])
        if not files:
            raise UserError(
                f"the folder {path} holds no text: no file ends in {', '.join(FORMATS)}, alone or with .gz or .zst"
            )
        return files
    if path.exists():
        return [path]
    files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not files:
        raise UserError(f"there is no file, folder or match for {spec!r}")
    return files


class _ZstdFrames(io.RawIOBase):
    """What the frames of a zstd file hold, one after the other.

    The reader of `zstandard` takes an end inside a frame for the end of the text, and goes no further than the first.
    """

    def __init__(self, raw: io.BufferedIOBase) -> None:
        self._raw, self._input, self._output = raw, b"", memoryview(b"")
        self._frame = self._next_frame()

    @staticmethod
    def _next_frame():
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        while not self._output:
            data = self._input or self._raw.read(512)  # small: five bytes may stand for a block of 128 KiB
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            if self._frame is None:
                self._frame = self._next_frame()
            self._output, self._input = memoryview(self._frame.decompress(data)), b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        n = min(len(target), len(self._output))
        target[:n], self._output = self._output[:n], self._output[n:]
        return n


@contextmanager
def _open(path: Path, compression: str) -> Iterator[io.BufferedIOBase]:
    try:
        if compression == ".gz":
            with gzip.open(path, "rb") as file:
                yield file
        elif compression == ".zst":
            with open(path, "rb") as raw:
                yield io.BufferedReader(_ZstdFrames(raw))
        else:
            with open(path, "rb") as file:
                yield file
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: permission denied") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is no whole {'zstd' if compression == '.zst' else 'gzip'} file: {error}") from error
    except Exception as error:
        if type(error).__module__.startswith("zstandard"):
            raise UserError(f"{path} is no whole zstd file: {error}") from error
        raise


def _read_file(path: Path, field: str) -> Iterator[Document]:
    kind, compression = _suffixes(path)
    if not kind:
        raise UserError(f"{path} is of no known format: a name ends in {', '.join(FORMATS)}, alone or with .gz or .zst")
    with _open(path, compression) as file:
        if kind == ".parquet":
            yield from _parquet(path, file if compression else None, field)
        elif kind == ".jsonl":
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Document(_row(line, path, number, field), f"{path.as_posix()}:{number}")
        else:
            yield Document(_decode(file.read(), path), path.as_posix())


def _decode(data: bytes, path: Path, line: int | None = None) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"line {line}, byte {error.start}" if line else f"offset {error.start}"
        raise UserError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at {where}; convert it to UTF-8 or leave it out"
        ) from error


def _row(line: bytes, path: Path, number: int, field: str) -> str:
    content = _decode(line, path, number)
    try:
        row = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number} is no JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise UserError(f"{path}, line {number} cannot be read: its brackets are nested too deep") from error
    except ValueError as error:  # Python reads no integer of more than 4300 digits
        raise UserError(f"{path}, line {number} cannot be read: it holds a number of too many digits") from error
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise UserError(f'{path}, line {number} has no text: a line is an object with a string under "{field}"')
    text = row[field]
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path}, line {number} is no text that UTF-8 can hold: character {error.start} is "
            f"U+{ord(text[error.start]):04X}, one half of a surrogate pair; mend the line or leave it out"
        ) from error
    return text


def _parquet(path: Path, file: io.BufferedIOBase | None, field: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = path if file is None else pa.BufferReader(file.read())
    try:
        table = pq.ParquetFile(content)
        if field not in table.schema_arrow.names:
            raise UserError(f"{path} has no column {field!r}; its columns are {', '.join(table.schema_arrow.names)}")
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            try:
                texts = batch.column(0).to_pylist()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8: one of the rows {number + 1} to {number + len(batch)} has a text with byte "
                    f"0x{error.object[error.start]:02x} at offset {error.start}; convert it to UTF-8 or leave it out"
                ) from error
            for text in texts:
                number += 1
                if text is None:
                    continue
                if not isinstance(text, str):
                    raise UserError(f"{path}: column {field!r} holds {type(text).__name__} values, not strings")
                yield Document(text, f"{path.as_posix()}:{number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no readable parquet file: {' '.join(str(error).split())}") from error


def _hub(name: str, field: str) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError("reading a Hub data set needs the extra 'hub': pip install 'llama-edu[hub]'") from error
    path, _, query = name.partition("?")
    choices = dict(parse_qsl(query))
    if unknown := sorted(set(choices) - {"config", "split", "revision"}):
        raise UserError(f"hf:{name} chooses {unknown[0]!r}; a data set has config, split and revision to choose")
    if "config" in choices:
        choices["name"] = choices.pop("config")
    choices = {"split": "train"} | choices
    try:
        rows = load_dataset(path, streaming=True, **choices)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get(field), str):
                raise UserError(f"the data set {path!r} has no string field {field!r}; its fields are {', '.join(row)}")
            yield Document(row[field], f"hf:{name}:{number}")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the data set {path!r} could not be read from the Hub: {str(error).splitlines()[0]}"
        ) from error
