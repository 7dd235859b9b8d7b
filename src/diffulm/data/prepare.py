"""Text to token stores: read sources, split off held-out documents, tokenise, report.

    out/prepare.json             written last: request, statistics per source (the dict `prepare` returns)
    out/<source>/train/          token store (tokens.py)
    out/<source>/heldout/        token store

One source is read four times (scan; tokenise; held-out and train 13-grams), so that its text is never all in memory.
A document is held out by a hash of its text alone: the split depends neither on order nor on workers, and a document
that is in two sources falls on the same side in both. The only file that imports `datasets`.
"""

from __future__ import annotations

import codecs
import contextlib
import fnmatch
import gzip
import hashlib
import json
import os
import re
import shutil
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffulm.data.tokens import ShardWriter, TokenStore, smallest_dtype
from diffulm.runtime import atomic_folder, fsync_folder, log, read_json, write_atomic

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
NGRAM = 13  # words; the length GPT-3 and later work use to look for test text in training text

_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "encodings", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}
)
_STDLIB_CHARACTERS = range(300, 200_001)
_DIGEST_BITS = 128
_SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Source:
    """One body of text.

    `path`: `builtin:topics`, `builtin:stdlib`, a .txt or .jsonl file (also .gz), a .parquet file, a folder of those,
    or a Hub dataset as `name` or `name:config` (its train split). `weight` is the share the loader draws, relative to
    the other sources. `exclude` are fnmatch patterns on document ids: the path inside the folder for .txt,
    `path:line` for .jsonl (from 1), `path:row` for tables (from 0), the topic, the path inside the standard library.
    """

    name: str
    path: str
    weight: float = 1.0
    text_field: str = "text"
    exclude: tuple[str, ...] = ()

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


# ------------------------------------------------------------------------------------------------------- reading


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


def _open(source: Source, cache: Path) -> Callable[[], Iterator[Document]]:
    """A function that reads the source from the start, in the same order each time. ValueError: no such source."""
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


# -------------------------------------------------------------------------------------------- scanning, splitting


@dataclass
class Scan:
    """What one reading of a source found. `limit`: a document is held out when its digest is below it."""

    source: Source
    read: Callable[[], Iterator[Document]]
    kept: int = 0  # documents: not excluded, not empty, the first of their text
    excluded: int = 0
    empty: int = 0
    duplicates: int = 0
    invalid_utf8: int = 0
    fingerprint: str = ""
    limit: int = 0
    unused_exclude: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Fingerprint of the stores: the kept text and how it is split."""
        return hashlib.sha256(f"{self.fingerprint} {self.limit}".encode()).hexdigest()

    def texts(self) -> Iterator[tuple[bool, str]]:
        """(held out?, text) of every kept document; ValueError when the source is no longer what was scanned."""
        again = Scan(self.source, self.read)
        for digest, text in again.documents(strict=False):
            yield digest < self.limit, text
        if again.fingerprint != self.fingerprint:
            raise ValueError(f"source {self.source.name!r} changed while it was read; run prepare again")

    def documents(self, *, strict: bool) -> Iterator[tuple[int, str]]:
        """(digest, text) of the documents that are kept; fills every field but `limit` on the way."""
        content, seen, unused = hashlib.sha256(), set(), set(self.source.exclude)
        for document in self.read():
            matched = {pattern for pattern in self.source.exclude if fnmatch.fnmatchcase(document.id, pattern)}
            unused -= matched
            if matched:
                self.excluded += 1
                continue
            if document.problem:
                if strict:
                    raise ValueError(f"{document.problem}; repair the file, or prepare without strict to replace it")
                self.invalid_utf8 += 1
            data = hashlib.blake2b(document.text.encode(), digest_size=_DIGEST_BITS // 8).digest()
            content.update(document.id.encode("utf-8", "surrogateescape") + b"\0" + data)
            digest = int.from_bytes(data, "big")
            if not document.text.strip():
                self.empty += 1
            elif digest in seen:
                self.duplicates += 1
            else:
                seen.add(digest)
                self.kept += 1
                yield digest, document.text
        self.fingerprint, self.unused_exclude = content.hexdigest(), sorted(unused)


def scan(source: Source, cache: Path, *, heldout_fraction: float, strict: bool) -> Scan:
    """Read a source once: count, fingerprint, decide the split. ValueError when it has no text."""
    result = Scan(source, _open(source, cache))
    # Comparing whole digests with the fraction of their range; float times a power of two is exact.
    limit = int(heldout_fraction * 2.0**_DIGEST_BITS)
    lowest, highest = 2**_DIGEST_BITS, -1
    for digest, _ in result.documents(strict=strict):
        lowest, highest = min(lowest, digest), max(highest, digest)
    if not result.kept:
        raise ValueError(
            f"source {source.name!r} ({source.path}) has no text: {result.empty} documents are empty, "
            f"{result.excluded} excluded"
        )
    if result.kept == 1 or not heldout_fraction:
        result.limit = 0  # a single document is trained on
    else:  # neither side may be empty by chance
        result.limit = min(max(limit, lowest + 1), highest)
    if result.unused_exclude:
        log.warning("source %s: exclude patterns that match no document: %s", source.name, result.unused_exclude)
    return result


def ngrams(text: str) -> NDArray[np.uint64]:
    """A 64-bit hash of every run of NGRAM whitespace words, (words - NGRAM + 1,); valid inside one process."""
    words = text.split()
    count = len(words) - NGRAM + 1
    if count < 1:
        return np.empty(0, np.uint64)
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    result = np.zeros(count, np.uint64)
    for k in range(NGRAM):  # a polynomial modulo 2^64, so that the order of the words counts
        result = result * np.uint64(0x9E3779B97F4A7C15) + hashes[k : k + count]
    return result


def overlaps(scans: Sequence[Scan]) -> list[dict[str, float]]:
    """Per source: `heldout`, its distinct held-out 13-grams; `overlap`, the fraction of them in ANY train text."""
    heldout = []
    for item in scans:
        rows = [np.unique(ngrams(text)) for held, text in item.texts() if held]
        heldout.append(np.unique(np.concatenate([*rows, np.empty(0, np.uint64)])))
    found = [np.zeros(len(grams), bool) for grams in heldout]
    if any(len(grams) for grams in heldout):
        for text in (text for item in scans for held, text in item.texts() if not held):
            row = ngrams(text)
            for grams, hit in zip(heldout, found, strict=True):
                if len(grams):
                    at = np.minimum(np.searchsorted(grams, row), len(grams) - 1)
                    hit[at[grams[at] == row]] = True
    return [{"heldout": len(hit), "overlap": float(hit.mean()) if len(hit) else 0.0} for hit in found]


# ---------------------------------------------------------------------------------------------------- tokenising


def _tokenised(item: Scan, tokenizer: PreTrainedTokenizerBase, dtype: str, workers: int, cache: Path) -> Dataset:
    """Rows `ids`, `heldout`, `bytes` of every kept document, on disk under `cache`."""
    from datasets import Dataset, Features, Value
    from datasets import List as ListOf
    from datasets.exceptions import DatasetGenerationError

    def records() -> Iterator[dict[str, Any]]:
        for held, text in item.texts():
            yield {"text": text, "heldout": held, "bytes": len(text.encode())}

    def encode(texts: Sequence[str]) -> dict[str, Any]:
        return {"ids": tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]}

    columns = {"heldout": Value("bool"), "bytes": Value("int64")}
    wide = Features(columns | {"text": Value("large_string")})  # arrow's plain strings end at 2 GiB a batch
    try:
        texts = Dataset.from_generator(records, features=wide, cache_dir=str(cache))
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
        num_proc=min(workers, item.kept) if workers > 1 else None,
        new_fingerprint=item.fingerprint[:32],  # else the tokenizer is pickled and hashed to name a cache file
        desc=f"tokenise {item.source.name}",
    )


def _write_stores(
    item: Scan, folder: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: str, workers: int, cache: Path
) -> None:
    """`folder` with the two stores of one source; it appears whole or not at all."""
    dtype = smallest_dtype(len(tokenizer))
    with tempfile.TemporaryDirectory(dir=cache) as scratch, atomic_folder(folder) as aside:
        rows = _tokenised(item, tokenizer, dtype, workers, Path(scratch)).with_format("numpy")
        train = ShardWriter(aside / "train", dtype=dtype, tokenizer=vocabulary, source=item.key)
        heldout = ShardWriter(aside / "heldout", dtype=dtype, tokenizer=vocabulary, source=item.key)
        with train, heldout:
            for row in rows:
                (heldout if row["heldout"] else train).add(row["ids"], int(row["bytes"]))


def _stores(item: Scan, folder: Path, tokenizer: str, *, verify: bool) -> dict[str, TokenStore] | None:
    """The two stores in `folder`, None unless both are whole and hold just what was scanned."""
    try:
        stores = {split: TokenStore.open(folder / split, tokenizer=tokenizer, verify=verify) for split in _SPLITS}
    except ValueError:
        return None
    return stores if all(store.source == item.key for store in stores.values()) else None


@contextlib.contextmanager
def _workspace(out: Path, progress: bool) -> Iterator[Path]:
    """Claim `out`; yields a folder inside it for `datasets`' cache, removed at the end. ValueError: not ours."""
    import datasets

    marker = out / "prepare.partial"
    if not marker.exists() and not (out / "prepare.json").exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} holds something that is no prepared text; choose a new or empty folder")
        out.mkdir(parents=True, exist_ok=True)
        marker.touch()
    for leftover in [*out.glob(".*.tmp"), *out.glob(".cache-*")]:  # of a killed run
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    quiet = not progress and not datasets.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".cache-") as cache:
            yield Path(cache)
    finally:
        if quiet:
            datasets.enable_progress_bars()
        if list(out.iterdir()) == [marker]:  # refused before anything was written
            marker.unlink()


def prepare(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    heldout_fraction: float = 0.05,
    min_window: int | None = None,
    strict: bool = False,
    workers: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenise `sources` into `out` and return the statistics written to `out/prepare.json`.

    `heldout_fraction` of the documents (not of the tokens), at least one where a source has two, is held out of each
    source; 0 holds out nothing. `min_window`: fewest train tokens, over all sources, worth going on with. `strict`
    refuses invalid UTF-8 instead of replacing and counting it. `workers`: processes that tokenise.

    A second call with the same text, tokenizer and fraction tokenises nothing; after an interruption, finished sources
    are kept. ValueError for sources without text, bad input files, a foreign `out`, or one of another request.
    """
    from diffulm.tokenizer import fingerprint

    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"prepare needs one or more sources with different names, not {names}")
    if not 0 <= heldout_fraction < 1 or workers < 1:
        raise ValueError(f"heldout_fraction {heldout_fraction} must be in [0, 1), workers {workers} at least 1")
    out, vocabulary = Path(out), fingerprint(tokenizer)
    with _workspace(out, progress) as cache:
        scans = [scan(source, cache, heldout_fraction=heldout_fraction, strict=strict) for source in sources]
        content = [FORMAT, vocabulary, heldout_fraction, [[item.source.name, item.fingerprint] for item in scans]]
        request = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        before = _finished_before(out, request)
        stores = []
        for item in scans:
            folder = out / item.source.name
            found = _stores(item, folder, vocabulary, verify=before is None)
            if found is None:
                _write_stores(item, folder, tokenizer, vocabulary, workers, cache)
                found = _stores(item, folder, vocabulary, verify=False)
            assert found is not None
            stores.append(found)
        tokens = sum(found["train"].tokens for found in stores)
        if min_window is not None and tokens < min_window:
            raise ValueError(f"text shorter than one window: {tokens} train tokens, {min_window} needed; add text")
        if before is None:
            grams = overlaps(scans)
        else:
            grams = [before["sources"][name]["ngram13"] for name in names]
        statistics = [_statistics(*found) for found in zip(scans, stores, grams, strict=True)]
        report = {"format": FORMAT, "request": request, "tokenizer": vocabulary, "heldout_fraction": heldout_fraction}
        report["sources"] = dict(zip(names, statistics))
        if report != before:
            write_atomic(out / "prepare.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        (out / "prepare.partial").unlink(missing_ok=True)
        fsync_folder(out)
    return report


def _finished_before(out: Path, request: str) -> dict[str, Any] | None:
    """The report of an earlier finished run of the same request; ValueError when it was another request."""
    path = out / "prepare.json"
    if not path.exists():
        return None
    report = read_json(path)
    if not isinstance(report, dict) or report.get("format") != FORMAT or report.get("request") != request:
        raise ValueError(
            f"{out} holds prepared text of another request (other text, tokenizer, fraction or version); "
            "choose another folder or delete it"
        )
    return report


def _statistics(item: Scan, stores: dict[str, TokenStore], grams: dict[str, float]) -> dict[str, Any]:
    return {
        "path": item.source.path,
        "weight": item.source.weight,
        "fingerprint": item.key,
        "excluded": item.excluded,
        "unused_exclude": item.unused_exclude,
        "empty": item.empty,
        "duplicates": item.duplicates,
        "invalid_utf8": item.invalid_utf8,
        **{
            split: {"documents": store.documents, "tokens": store.tokens, "bytes": store.bytes}
            for split, store in stores.items()
        },
        "ngram13": grams,
    }
