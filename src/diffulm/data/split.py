"""Which documents are held out, and that training text does not repeat them."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffulm.data.sources import Document, Source, open_source
from diffulm.runtime import log

NGRAM = 13  # words; the length GPT-3 and later work use to look for test text in training text
MAX_SHARED = 20  # 13-grams: a train document that shares more with held-out text repeats a passage of it
MAX_LEFT_OUT = 0.1  # of the train documents: beyond it the shared text is boilerplate, not leakage

_DIGEST_BITS = 128


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
    left_out: set[int] = field(default_factory=set)  # digests of train documents that repeat held-out passages

    @property
    def key(self) -> str:
        """Fingerprint of the stores: the kept text and how it is split."""
        return hashlib.sha256(f"{self.fingerprint} {self.limit} {sorted(self.left_out)}".encode()).hexdigest()

    def texts(self) -> Iterator[tuple[bool, str]]:
        """(held out?, text) of every kept document; ValueError when the source is no longer what was scanned."""
        for digest, text in self.digests():
            if digest not in self.left_out:
                yield digest < self.limit, text

    def digests(self) -> Iterator[tuple[int, str]]:
        """(digest, text) of every kept document, those left out included."""
        again = Scan(self.source, self.read)
        yield from again.documents(strict=False)
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
    result = Scan(source, open_source(source, cache))
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


def leave_out_repeats(scans: Sequence[Scan]) -> None:
    """Leave out of training the documents that repeat passages of held-out text, in any source.

    Where that would take more than MAX_LEFT_OUT of a source's train documents, the text they share is boilerplate
    (licences, templates): all are kept, with a warning, and the overlap is in the report.
    """
    held = [np.unique(ngrams(text)) for item in scans for digest, text in item.digests() if digest < item.limit]
    grams = np.unique(np.concatenate([*held, np.empty(0, np.uint64)]))
    if not len(grams):
        return
    for item in scans:
        documents, repeats = 0, set()
        for digest, text in item.digests():
            if digest >= item.limit:
                documents += 1
                row = np.unique(ngrams(text))
                at = np.minimum(np.searchsorted(grams, row), len(grams) - 1)
                if int((grams[at] == row).sum()) > MAX_SHARED:
                    repeats.add(digest)
        if len(repeats) > MAX_LEFT_OUT * documents:
            log.warning(
                "source %s: %d of %d train documents share passages with held-out ones; all are kept",
                item.source.name, len(repeats), documents,
            )  # fmt: skip
        else:
            item.left_out = repeats


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
