"""Where text comes from: files, folders, tables, Hub data sets, and what every Python carries.

The only file that imports `datasets`.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import itertools
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "encodings", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}
)
_STDLIB_CHARACTERS = range(300, 200_001)


@dataclass(frozen=True)
class Source:
    """One body of text.

    `path`: `builtin:topics`, `builtin:stdlib`, a .txt or .jsonl file (also .gz), a .parquet file, a folder of those,
    or a Hub dataset as `name` or `name:config` (its train split). `weight` is the share the loader draws, relative to
    the other sources. `exclude` are fnmatch patterns on document ids: the path inside the folder for .txt,
    `path:line` for .jsonl (from 1), `path:row` for tables (from 0), the topic, the path inside the standard library.
    `more` are further paths of the same body of text: one split, one share.
    """

    name: str
    path: str
    weight: float = 1.0
    text_field: str = "text"
    exclude: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name):
            raise ValueError(f"source name {self.name!r} becomes a folder: use letters, digits, - and _ only")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"source {self.name!r} has weight {self.weight}: use a finite number above 0, or drop it")


class Document(NamedTuple):
    """`problem` says where the text was not valid UTF-8 (it then holds U+FFFD there); empty when it was."""

    id: str
    text: str
    problem: str


def _decode(data: bytes, where: str, start: int = 0) -> tuple[str, str]:
    """(text, problem) of UTF-8 bytes that begin at byte `start` of `where` (decompressed)."""
    try:
        return data.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        return data.decode("utf-8", errors="replace"), f"{where} is not valid UTF-8 at byte {start + error.start}"


def _field(row: Any, key: str, where: str) -> tuple[str, str]:
    """(text, problem) of one field of a row; a null is an empty text; ValueError when it is no text at all."""
    if not isinstance(row, dict) or key not in row:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where} has no field {key!r} (found: {found}); set the source's text_field")
    text = "" if row[key] is None else row[key]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {key!r} is {type(text).__name__}, not text; set the source's text_field")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, UTF-8 cannot
        repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return repaired, f"{where} holds half a surrogate pair"
    return text, ""


def _walk(root: Path, suffixes: tuple[str, ...], skipped: frozenset[str] = frozenset()) -> list[tuple[str, Path]]:
    """(posix path inside root, file) of every file with one of the suffixes, sorted; hidden ones are left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        paths = [Path(folder, name) for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    return sorted(found)


def _read_topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    yield from (Document(key, topics[key], "") for key in sorted(topics))


def _read_stdlib() -> Iterator[Document]:
    for name, path in _walk(Path(sysconfig.get_path("stdlib")), (".py",), _STDLIB_SKIPPED):
        # _sysconfigdata is no source: the build writes it, with this machine's paths in it.
        if path.name.startswith("_sysconfigdata"):
            continue
        text, problem = _decode(path.read_bytes(), name)
        if len(text) in _STDLIB_CHARACTERS:
            yield Document(name, text, problem)


def _read_file(name: str, path: Path, text_field: str) -> Iterator[Document]:
    """The documents of one .txt or .jsonl file, compressed or not. Line ends inside a text stay as they are."""
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            if name.lower().endswith((".txt", ".txt.gz")):
                yield Document(name, *_decode(file.read().removeprefix(codecs.BOM_UTF8), str(path)))
            else:
                yield from _read_lines(name, path, file, text_field)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}); fetch or compress it again") from error


def _read_lines(name: str, path: Path, file: Iterable[bytes], text_field: str) -> Iterator[Document]:
    start = 0  # of the line in the file, bytes
    for number, line in enumerate(file, 1):  # a binary file breaks lines at \n only: U+2028 and \r stay text
        where = f"{path}, line {number},"
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        decoded, problem = _decode(content, where, start + len(line) - len(content))
        start += len(line)
        if not decoded.strip():
            continue
        try:
            row = json.loads(decoded)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not valid JSON ({error}); repair or remove the line") from error
        text, surrogate = _field(row, text_field, where)
        yield Document(f"{name}:{number}", text, problem or surrogate)


def _read_table(name: str, table: Dataset, text_field: str) -> Iterator[Document]:
    if text_field not in table.column_names:
        _field(dict.fromkeys(table.column_names), text_field, name)  # raises
    for number, row in enumerate(table.select_columns([text_field])):
        yield Document(f"{name}:{number}", *_field(row, text_field, f"{name}, row {number}"))


def _open_hub(source: Source, cache: Path) -> Dataset:
    """The train split of a Hub dataset. ValueError when the path is a file that is not there, or nothing loads."""
    from datasets import load_dataset

    if source.path.lower().endswith(_SUFFIXES) or source.path.startswith(("/", ".", "~")):
        raise ValueError(f"source {source.name!r}: there is no file or folder {source.path}")
    name, _, config = source.path.partition(":")
    try:
        return load_dataset(name, config or None, split="train", cache_dir=str(cache))
    except Exception as error:  # the Hub's client raises many kinds, most of them not about this path
        raise ValueError(
            f"source {source.name!r}: {source.path!r} is neither here nor, as a Hub dataset, could be loaded "
            f"({type(error).__name__}: {error})"
        ) from error


def open_source(source: Source, cache: Path) -> Callable[[], Iterator[Document]]:
    """A function that reads the source from the start, in the same order each time. ValueError: no such source."""
    if source.more:
        parts = [open_source(replace(source, path=p, more=()), cache) for p in (source.path, *source.more)]
        return lambda: itertools.chain.from_iterable(part() for part in parts)
    if source.path.startswith("builtin:"):
        readers = {"builtin:topics": _read_topics, "builtin:stdlib": _read_stdlib}
        if source.path not in readers:
            raise ValueError(f"source {source.name!r}: unknown {source.path!r}; use {' or '.join(readers)}")
        return readers[source.path]
    path = Path(source.path)
    if not path.exists():
        table = _open_hub(source, cache)
        return lambda: _read_table(source.path, table, source.text_field)
    files = _walk(path, _SUFFIXES) if path.is_dir() else [(path.name, path)]
    if not files or not (path.is_dir() or path.name.lower().endswith(_SUFFIXES)):
        raise ValueError(f"source {source.name!r}: {path} is or holds none of {', '.join(_SUFFIXES)}")
    tables = {name: _open_parquet(file, cache) for name, file in files if name.lower().endswith(".parquet")}

    def read() -> Iterator[Document]:
        for name, file in files:
            if name in tables:
                yield from _read_table(name, tables[name], source.text_field)
            else:
                yield from _read_file(name, file, source.text_field)

    return read


def _open_parquet(path: Path, cache: Path) -> Dataset:
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return Dataset.from_parquet(str(path), cache_dir=str(cache))
    except (DatasetGenerationError, ValueError) as error:  # a bad footer is arrow's own ValueError
        cause = error.__cause__ or error
        raise ValueError(f"{path} cannot be read as parquet ({cause}); repair it or take it out") from error


# ---------------------------------------------------------------------------------------------------- tokenising


def tokenised(
    name: str,
    records: Callable[[], Iterator[tuple[bool, str]]],
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    workers: int,
    cache: Path,
    *,
    fingerprint: str,
) -> Dataset:
    """Rows `ids`, `heldout`, `bytes` of every (held out?, text) record, on disk under `cache`."""
    from datasets import Dataset, Features, Value
    from datasets import List as ListOf
    from datasets.exceptions import DatasetGenerationError

    def rows() -> Iterator[dict[str, Any]]:
        for held, text in records():
            yield {"text": text, "heldout": held, "bytes": len(text.encode())}

    def encode(texts: Sequence[str]) -> dict[str, Any]:
        # The name of a special token in a text is ordinary text: nothing in data may open, end or mask anything.
        plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return {"ids": tokenizer(list(texts), **plain)["input_ids"]}

    columns = {"heldout": Value("bool"), "bytes": Value("int64")}
    wide = Features(columns | {"text": Value("large_string")})  # arrow's plain strings end at 2 GiB a batch
    try:
        texts = Dataset.from_generator(rows, features=wide, cache_dir=str(cache))
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None  # a full disk, a changed source: in its own words
    return texts.map(
        encode,
        batched=True,
        batch_size=128,
        writer_batch_size=128,
        input_columns=["text"],
        remove_columns=["text"],
        features=Features(columns | {"ids": ListOf(Value(dtype))}),
        num_proc=min(workers, len(texts)) if workers > 1 else None,
        new_fingerprint=fingerprint[:32],  # else the tokenizer is pickled and hashed to name a cache file
        desc=f"tokenise {name}",
    )


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
