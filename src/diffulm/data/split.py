"""Which documents are kept, which of them are held out, and how much training text repeats them."""

from __future__ import annotations

import fnmatch
import hashlib
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime import log
from .sources import Document, Source, open_source

NGRAM = 13  # words; the length GPT-3 and later work use to look for test text in training text
MAX_SHARED = 20  # 13-grams: a train document that shares more with held-out text repeats a passage of it
MAX_LEFT_OUT = 0.1  # of the train documents: beyond it the shared text is boilerplate, not leakage

#: Two different texts among 10^8 have the same digest with probability 3e-4; one of them would then be left out.
_DIGEST_BITS = 64


@dataclass
class Scan:
    """What one reading of a source found. `limit`: a document is held out when its digest is below it."""

    source: Source
    read: Callable[[], Iterator[Document]]
    excluded: int = 0
    empty: int = 0
    invalid_utf8: int = 0
    fingerprint: str = ""
    limit: int = 0
    unused_exclude: list[str] = field(default_factory=list)
    digests: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))  # of documents with text
    first: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))  # the first of its text
    grams: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))  # held-out ones, distinct

    @property
    def kept(self) -> int:
        """Documents: not excluded, not empty, the first of their text."""
        return int(self.first.sum())

    @property
    def duplicates(self) -> int:
        return len(self.first) - self.kept

    def texts(self) -> Iterator[tuple[bool, str]]:
        """(held out?, text) of every kept document; ValueError when the source is no longer what was scanned."""
        changed = ValueError(f"source {self.source.name!r} changed while it was read; run prepare again")
        number = 0
        for document in self.read():
            if _excluded(document.id, self.source.exclude) or not document.text.strip():
                continue
            if number == len(self.digests) or digest_of(document.text) != self.digests[number]:
                raise changed
            if self.first[number]:
                yield bool(self.digests[number] < self.limit), document.text
            number += 1
        if number != len(self.digests):
            raise changed


def digest_of(text: str) -> int:
    """A 64-bit hash of a text, the same everywhere."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_DIGEST_BITS // 4).digest()[:8], "big")


def _excluded(document: str, patterns: Sequence[str]) -> set[str]:
    return {pattern for pattern in patterns if fnmatch.fnmatchcase(document, pattern)}


def scan(source: Source, cache: Path, *, heldout_fraction: float, strict: bool) -> Scan:
    """Read a source once: count, fingerprint, decide the split. ValueError when it has no text."""
    result = Scan(source, open_source(source, cache))
    # Comparing whole digests with the fraction of their range; float times a power of two is exact.
    nominal = int(heldout_fraction * 2.0**_DIGEST_BITS)
    content, unused, digests = hashlib.sha256(), set(source.exclude), array("Q")
    grams: list[NDArray[np.uint64]] = []
    for document in result.read():
        if matched := _excluded(document.id, source.exclude):
            unused -= matched
            result.excluded += 1
            continue
        if document.problem:
            if strict:
                raise ValueError(f"{document.problem}; repair the file, or prepare without strict to replace it")
            result.invalid_utf8 += 1
        digest = digest_of(document.text)
        content.update(document.id.encode("utf-8", "surrogateescape") + b"\0" + digest.to_bytes(8, "big"))
        if not document.text.strip():
            result.empty += 1
            continue
        digests.append(digest)
        if digest < nominal:
            grams.append(np.unique(ngrams(document.text)))
    result.fingerprint, result.unused_exclude = content.hexdigest(), sorted(unused)
    result.digests = np.array(digests, np.uint64)
    result.first = np.zeros(len(digests), bool)
    result.first[np.unique(result.digests, return_index=True)[1]] = True
    if not result.kept:
        raise ValueError(
            f"source {source.name!r} ({source.path}) has no text: {result.empty} documents are empty, "
            f"{result.excluded} excluded"
        )
    if result.kept > 1 and heldout_fraction:  # neither side may be empty by chance
        result.limit = min(max(nominal, int(result.digests.min()) + 1), int(result.digests.max()))
    if result.limit != nominal:  # a single document is trained on
        grams = [np.unique(ngrams(text)) for held, text in result.texts() if held]
    result.grams = np.unique(np.concatenate([*grams, np.empty(0, np.uint64)]))
    if result.unused_exclude:
        log.warning("source %s: exclude patterns that match no document: %s", source.name, result.unused_exclude)
    return result


def ngrams(text: str) -> NDArray[np.uint64]:
    """A 64-bit hash of every run of NGRAM words (between ASCII white space), (words - NGRAM + 1,)."""
    words = text.encode().split()
    count = len(words) - NGRAM + 1
    if count < 1:
        return np.empty(0, np.uint64)
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    hashes *= np.uint64(0xBF58476D1CE4E5B9)  # spread the 32 bits over 64
    hashes ^= hashes >> np.uint64(31)
    result = np.zeros(count, np.uint64)
    for k in range(NGRAM):  # a polynomial modulo 2^64, so that the order of the words counts
        result *= np.uint64(0x9E3779B97F4A7C15)
        result += hashes[k : k + count]
    return result


def found_in(grams: NDArray[np.uint64], text: str) -> NDArray[np.int64]:
    """Which of the sorted `grams` a text holds, as indices, each once."""
    row = ngrams(text)
    if not len(grams) or not len(row):
        return np.empty(0, np.int64)
    at = np.minimum(np.searchsorted(grams, row), len(grams) - 1)
    return np.unique(at[grams[at] == row])
