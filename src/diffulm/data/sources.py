"""Where text comes from: files, folders, tables, Hub data sets, and what every Python carries.

The only file that imports `datasets`.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime import read_json, write_atomic
from .files import SUFFIXES, Document, field, read_file, read_stdlib, read_topics, walk

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

#: Bytes of streamed text after which a part is written: what an interruption costs at most.
PART_BYTES = 2**26


@dataclass(frozen=True)
class Source:
    """One body of text.

    `path`: `builtin:topics`, `builtin:stdlib`, a .txt or .jsonl file (also .gz), a .parquet file, a folder of those;
    or, streamed, a Hub dataset as `name` or `name:subset`, or the address of such files (s3://, gs://, hf://, https://,
    with * and ** where the protocol lists folders; fsspec's package for the protocol must be installed). `weight` is
    the share the loader draws, relative to the other sources. `exclude` are fnmatch patterns on document ids: the path
    inside the folder for .txt, `path:line` for .jsonl (from 1), `path:row` for tables (from 0), the topic, the path
    inside the standard library. `more` are further paths of the same body of text: one split, one share. `subset` and
    `split` choose from a Hub dataset. Reading ends with the document that reaches `limit_documents` or `limit_bytes`
    (UTF-8 bytes of text).
    """

    name: str
    path: str
    weight: float = 1.0
    text_field: str = "text"
    exclude: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    subset: str | None = None
    split: str = "train"
    limit_documents: int | None = None
    limit_bytes: int | None = None

    def __post_init__(self) -> None:
        if any(limit is not None and limit < 1 for limit in (self.limit_documents, self.limit_bytes)):
            raise ValueError(f"source {self.name!r}: a limit of text must be at least 1, or left out")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name):
            raise ValueError(f"source name {self.name!r} becomes a folder: use letters, digits, - and _ only")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"source {self.name!r} has weight {self.weight}: use a finite number above 0, or drop it")


def _read_table(name: str, table: Dataset, text_field: str) -> Iterator[Document]:
    if text_field not in table.column_names:
        field(dict.fromkeys(table.column_names), text_field, name)  # raises
    for number, row in enumerate(table.select_columns([text_field])):
        yield Document(f"{name}:{number}", *field(row, text_field, f"{name}, row {number}"))


#: What `datasets` reads files behind an address as, by their suffix: (builder, its options).
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}), ".parquet": ("parquet", {}), ".txt": ("text", {"sample_by": "document"}),
}  # fmt: skip


def _hub_stream(source: Source) -> IterableDataset:
    """A Hub dataset, or files behind an address, read over the network as it goes. ValueError: a path that is not
    there, or nothing loads."""
    from datasets import load_dataset

    if "://" in source.path:
        suffix = Path(source.path.lower().removesuffix(".gz")).suffix
        if suffix not in _BUILDERS:
            raise ValueError(f"source {source.name!r}: {source.path} must end in one of {', '.join(SUFFIXES)}")
        builder, options = _BUILDERS[suffix]
        try:
            return load_dataset(builder, data_files=source.path, split="train", streaming=True, **options)
        except Exception as error:  # as many kinds as there are protocols
            raise ValueError(
                f"source {source.name!r}: {source.path} could not be opened ({type(error).__name__}: {error})"
            ) from error
    if source.path.lower().endswith(SUFFIXES) or source.path.startswith(("/", ".", "~")):
        raise ValueError(f"source {source.name!r}: there is no file or folder {source.path}")
    name, _, subset = source.path.partition(":")
    try:
        return load_dataset(name, source.subset or subset or None, split=source.split, streaming=True)
    except Exception as error:  # the Hub's client raises many kinds, most of them not about this path
        raise ValueError(
            f"source {source.name!r}: {source.path!r} is neither here nor, as a Hub dataset, could be loaded "
            f"({type(error).__name__}: {error})"
        ) from error


def head_of_stream(source: Source) -> Iterator[str]:
    """The texts of a source's Hub datasets, read over the network as they are asked for, up to its limits."""

    def documents() -> Iterator[Document]:
        for path in (source.path, *source.more):
            for row in _hub_stream(replace(source, path=path, more=())):
                yield Document("", *field(row, source.text_field, path))

    return (document.text for document in _limited(source, documents))


def hub_size(source: Source) -> tuple[int, int] | None:
    """(rows, bytes) that a Hub dataset says it has; None where it does not say."""
    info = _hub_stream(source).info
    split = (info.splits or {}).get(source.split)
    return (split.num_examples, split.num_bytes) if split and split.num_examples else None


def _spool(source: Source, folder: Path) -> Path:
    """The text of a Hub dataset as parts of compressed lines on disk, since it is read more than once.

    The dataset's own position is stored after each part, so that an interrupted download goes on behind it.
    """
    here = folder / f".stream-{source.name}-{_digest(source)}"
    here.mkdir(exist_ok=True)
    state: dict[str, Any] = {"parts": 0, "rows": 0, "bytes": 0, "done": False, "position": None}
    if (here / "state.json").is_file():
        state = read_json(here / "state.json")
    if state["done"]:
        return here
    stream = _hub_stream(source)
    if state["position"]:
        stream.load_state_dict(state["position"])
    lines: list[bytes] = []
    size = 0

    def write(done: bool) -> None:
        nonlocal size
        write_atomic(here / f"part-{state['parts']:06d}.jsonl.gz", gzip.compress(b"".join(lines), 1))
        state.update(parts=state["parts"] + 1, done=done, position=None if done else stream.state_dict())
        write_atomic(here / "state.json", json.dumps(state))
        lines.clear()
        size = 0

    for row in stream:
        text, problem = field(row, source.text_field, f"{source.path}, row {state['rows']},")
        lines.append(json.dumps([text, problem]).encode() + b"\n")
        n = len(text.encode())
        state.update(rows=state["rows"] + 1, bytes=state["bytes"] + n)
        size += n
        if _reached(source, state["rows"], state["bytes"]):
            break
        if size >= PART_BYTES:
            write(False)
    write(True)
    return here


def _read_spool(source: Source, folder: Path) -> Iterator[Document]:
    row = 0
    for path in sorted(folder.glob("part-*.jsonl.gz")):
        with gzip.open(path, "rb") as file:
            for line in file:
                text, problem = json.loads(line)
                yield Document(f"{source.path}:{row}", text, problem)
                row += 1


def _reached(source: Source, documents: int, n_bytes: int) -> bool:
    limits = (source.limit_documents, documents), (source.limit_bytes, n_bytes)
    return any(limit is not None and so_far >= limit for limit, so_far in limits)


def _limited(source: Source, read: Callable[[], Iterator[Document]]) -> Iterator[Document]:
    if source.limit_documents is None and source.limit_bytes is None:
        yield from read()
        return
    n_bytes = 0
    for documents, document in enumerate(read(), 1):
        yield document
        n_bytes += len(document.text.encode())
        if _reached(source, documents, n_bytes):
            return


def _digest(source: Source) -> str:
    """What decides which rows of a Hub dataset are read, in 12 hex digits."""
    parts = (source.path, source.subset, source.split, source.text_field, source.limit_documents, source.limit_bytes)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def is_stream(path: str) -> bool:
    """Whether a source's path leads to the Hub, or to an address."""
    return not path.startswith("builtin:") and not Path(path).exists()


def stamp(source: Source) -> list[Any]:
    """What tells cheaply that a source is still what it was: names, sizes and times of its files, Python's version
    for what it carries, the choice of rows for a Hub dataset (whose content is taken as fixed)."""
    found: list[Any] = [_digest(source), list(source.exclude)]
    for name in (source.path, *source.more):
        path = Path(name)
        if name.startswith("builtin:"):
            found.append([name, platform.python_version()])
        elif path.exists():
            files = walk(path, SUFFIXES) if path.is_dir() else [(path.name, path)]
            found.append([[key, (facts := file.stat()).st_size, facts.st_mtime_ns] for key, file in files])
        else:
            found.append(name)
    return found


def open_source(source: Source, cache: Path) -> Callable[[], Iterator[Document]]:
    """A function that reads the source from the start, in the same order each time. ValueError: no such source.

    `cache` is a folder for tables that goes with the run; what is streamed is kept beside it, to go on with.
    """
    if source.more:
        parts = [open_source(replace(source, path=p, more=()), cache) for p in (source.path, *source.more)]
        return lambda: _limited(source, lambda: itertools.chain.from_iterable(part() for part in parts))
    if source.path.startswith("builtin:"):
        readers = {"builtin:topics": read_topics, "builtin:stdlib": read_stdlib}
        if source.path not in readers:
            raise ValueError(f"source {source.name!r}: unknown {source.path!r}; use {' or '.join(readers)}")
        return lambda: _limited(source, readers[source.path])
    path = Path(source.path)
    if is_stream(source.path):
        spool = _spool(source, cache.parent)
        return lambda: _read_spool(source, spool)
    files = walk(path, SUFFIXES) if path.is_dir() else [(path.name, path)]
    if not files or not (path.is_dir() or path.name.lower().endswith(SUFFIXES)):
        raise ValueError(f"source {source.name!r}: {path} is or holds none of {', '.join(SUFFIXES)}")
    tables = {name: _open_parquet(file, cache) for name, file in files if name.lower().endswith(".parquet")}

    def read() -> Iterator[Document]:
        for name, file in files:
            if name in tables:
                yield from _read_table(name, tables[name], source.text_field)
            else:
                yield from read_file(name, file, source.text_field)

    return lambda: _limited(source, read)


def open_parts(source: Source, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path | Iterator[dict[str, Any]]]]:
    """For rows that are more than one text: (name, file) of every file of a source with one of `suffixes`, (name, rows)
    of its parquet tables and Hub datasets, which are read as they go.

    ValueError: no such source; a damaged table, when its rows are read.
    """
    known = (*suffixes, ".parquet")
    for reference in (source.path, *source.more):
        if is_stream(reference):
            yield reference, iter(_hub_stream(replace(source, path=reference, more=())))
            continue
        path = Path(reference)
        files = [file for _, file in walk(path, known)] if path.is_dir() else [path]
        if not files or not files[0].name.lower().endswith(known):
            raise ValueError(f"source {source.name!r}: {reference} is or holds none of {', '.join(known)}")
        for file in files:
            yield str(file), _parquet_rows(file) if file.suffix.lower() == ".parquet" else file


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as parquet ({error}); repair it or take it out") from error


def _open_parquet(path: Path, cache: Path) -> Dataset:
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return Dataset.from_parquet(str(path), cache_dir=str(cache))
    except (DatasetGenerationError, ValueError) as error:  # a bad footer is arrow's own ValueError
        cause = error.__cause__ or error
        raise ValueError(f"{path} cannot be read as parquet ({cause}); repair it or take it out") from error


@contextlib.contextmanager
def progress_bars(wanted: bool) -> Iterator[None]:
    """`datasets`' progress bars, off inside the block unless wanted."""
    import datasets

    quiet = not wanted and not datasets.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            datasets.enable_progress_bars()
