"""Tokenising in pieces: each a file that is there or not, so that processes share the work and a killed one goes on.

A piece is the next kept documents of a source, up to PIECE_BYTES of text. Its file holds their token ids and which
held-out 13-grams their text contains. When all are there, they are put together in order and deleted.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..runtime import log, write_atomic
from .split import MAX_LEFT_OUT, MAX_SHARED, Scan, found_in
from .tokens import ShardWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: UTF-8 bytes of text in a piece: some ten seconds of work, and what a killed process loses.
PIECE_BYTES = 2**24
_BATCH = 128  # documents given to the tokenizer at a time


@dataclass(frozen=True)
class Encoder:
    """All that a process needs to turn texts into a piece. `grams`: sorted held-out 13-grams of all sources."""

    tokenizer: PreTrainedTokenizerBase
    dtype: str
    grams: NDArray[np.uint64]

    def write(self, path: Path, documents: list[tuple[bool, str]]) -> int:
        """Tokenise (held out?, text) pairs into one file; returns the UTF-8 bytes of their text."""
        ids: list[NDArray[Any]] = []
        for first in range(0, len(documents), _BATCH):
            texts = [text for _, text in documents[first : first + _BATCH]]
            rows = encode_plain(self.tokenizer, texts)
            ids += [np.array(row, self.dtype) for row in rows]
        sizes = [len(text.encode()) for _, text in documents]
        found = [np.empty(0, np.int64) if held else found_in(self.grams, text) for held, text in documents]
        arrays = {
            "ids": np.concatenate(ids),
            "lengths": np.array([len(row) for row in ids], np.int64),
            "bytes": np.array(sizes, np.int64),
            "heldout": np.array([held for held, _ in documents], bool),
            "shared": np.array([len(row) for row in found], np.int64),
            "grams": np.concatenate(found),
        }
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        write_atomic(path, buffer.getvalue())
        return sum(sizes)


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, without special tokens.

    The name of a special token in a text is ordinary text: nothing in data may open, end or mask anything. Where the
    tokenizer is a Rust one it is asked directly: what transformers builds around its answer takes half the time again.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        rows: list[list[int]] = tokenizer(texts, **options)["input_ids"]
        return rows
    # transformers sets these three anew in each call of its own.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _cut(texts: Iterator[tuple[bool, str]]) -> Iterator[list[tuple[bool, str]]]:
    piece: list[tuple[bool, str]] = []
    size = 0
    for held, text in texts:
        piece.append((held, text))
        size += len(text.encode())
        if size >= PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def path_of(folder: Path, number: int) -> Path:
    return folder / f"piece-{number:06d}.npz"


def write_pieces(
    item: Scan, folder: Path, encoder: Encoder, workers: int, report: Callable[[int], None] = lambda n: None
) -> int:
    """Write the pieces of a source that are not in `folder` yet; returns how many it has. `report` takes documents.

    Few pieces wait at a time, so memory does not grow with the text.
    """
    folder.mkdir(exist_ok=True)
    pieces = enumerate(_cut(item.texts()))
    if workers == 1 or item.kept < 2:
        number = -1
        for number, piece in pieces:
            if not path_of(folder, number).exists():
                encoder.write(path_of(folder, number), piece)
            report(len(piece))
        return number + 1
    # Started afresh and not forked: a fork of a process with threads may hang, and forks share no locks sensibly.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(encoder,))
    waiting: dict[Future[int], int] = {}
    count = 0

    def settle(until: int) -> None:
        while len(waiting) > until:
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                done.result()
                report(waiting.pop(done))

    try:
        for number, piece in pieces:
            count = number + 1
            if path_of(folder, number).exists():
                report(len(piece))
            else:
                waiting[pool.submit(_work, path_of(folder, number), piece)] = len(piece)
                settle(2 * workers)
        settle(0)
    finally:
        pool.shutdown(cancel_futures=True)
    return count


_encoder: Encoder | None = None


def _begin(encoder: Encoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    _encoder = encoder


def _work(path: Path, documents: list[tuple[bool, str]]) -> int:
    assert _encoder is not None
    return _encoder.write(path, documents)


@dataclass(frozen=True)
class Joined:
    """`left_out` train documents repeated held-out passages; `seen`: which 13-grams the kept train text holds."""

    left_out: int
    seen: NDArray[np.bool_]


def join_pieces(item: Scan, folder: Path, count: int, grams: int, train: ShardWriter, heldout: ShardWriter) -> Joined:
    """Add the documents of all pieces to the two stores, without those that repeat held-out passages.

    Where that would take more than MAX_LEFT_OUT of a source's train documents, the text they share is boilerplate
    (licences, templates): all are kept, with a warning, and the overlap is in the report.
    """
    repeats = documents = 0
    for number in range(count):
        with np.load(path_of(folder, number), allow_pickle=False) as piece:
            repeats += int((piece["shared"] > MAX_SHARED).sum())
            documents += int((~piece["heldout"]).sum())
    keep_all = repeats > MAX_LEFT_OUT * documents
    if keep_all:
        log.warning(
            "source %s: %d of %d train documents share passages with held-out ones; all are kept",
            item.source.name, repeats, documents,
        )  # fmt: skip
    seen = np.zeros(grams, bool)
    for number in range(count):
        with np.load(path_of(folder, number), allow_pickle=False) as piece:
            ids, shared, lengths = piece["ids"], piece["shared"], piece["lengths"]
            keep = np.full(len(shared), True) if keep_all else shared <= MAX_SHARED
            seen[piece["grams"][np.repeat(keep, shared)]] = True
            ends = np.cumsum(lengths).tolist()
            rows = zip(
                itertools.pairwise([0, *ends]), piece["bytes"].tolist(), piece["heldout"].tolist(), keep.tolist()
            )
            for (start, end), size, held, kept in rows:
                if kept:
                    (heldout if held else train).add(ids[start:end], size)
    return Joined(0 if keep_all else repeats, seen)
