"""The documents of files and folders, and of what every Python carries."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "encodings", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}
)
_STDLIB_CHARACTERS = range(300, 200_001)


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


def field(row: Any, key: str, where: str) -> tuple[str, str]:
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


def walk(root: Path, suffixes: tuple[str, ...], skipped: frozenset[str] = frozenset()) -> list[tuple[str, Path]]:
    """(posix path inside root, file) of every file with one of the suffixes, sorted; hidden ones are left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        paths = [Path(folder, name) for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    return sorted(found)


def read_topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    yield from (Document(key, topics[key], "") for key in sorted(topics))


def read_stdlib() -> Iterator[Document]:
    for name, path in walk(Path(sysconfig.get_path("stdlib")), (".py",), _STDLIB_SKIPPED):
        # _sysconfigdata is no source: the build writes it, with this machine's paths in it.
        if path.name.startswith("_sysconfigdata"):
            continue
        text, problem = _decode(path.read_bytes(), name)
        if len(text) in _STDLIB_CHARACTERS:
            yield Document(name, text, problem)


def read_file(name: str, path: Path, text_field: str) -> Iterator[Document]:
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
        text, surrogate = field(row, text_field, where)
        yield Document(f"{name}:{number}", text, problem or surrogate)
