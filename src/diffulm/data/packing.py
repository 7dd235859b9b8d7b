"""Which windows of which documents make up each sequence, as flat arrays: no Python object per sequence.

Every document, closed by EOS, is cut into windows of `room` tokens (a sequence less its start token). Full windows are
sequences of their own, in document order; what is left of each document, its tail, shares a sequence with others.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime import log, write_atomic
from .tokens import TokenStore

#: Documents from which on the arrays are kept beside the store: below, making them again takes less than a second.
KEPT = 2**20
_VERSION = 1


@dataclass(frozen=True)
class Packing:
    """`full_ends` (documents,): full windows in documents 0..i. `tails`: the documents with a tail, sequence by
    sequence. `firsts` (shared sequences + 1,): where in `tails` each begins. All int64, or mapped from disk."""

    room: int
    full_ends: NDArray[np.int64]
    tails: NDArray[np.int64]
    firsts: NDArray[np.int64]

    @classmethod
    def of(cls, store: TokenStore, length: int) -> Packing:
        """The packing of a store into sequences of `length` tokens; that of a large store is kept in its folder."""
        folder = store.folder if isinstance(store, TokenStore) and store.documents >= KEPT else None
        names = ("full_ends", "tails", "firsts")
        if folder is not None:
            stem = f".packing-{_VERSION}-{length}-{store.index_crc:08x}"
            paths = {name: folder / f"{stem}-{name}.npy" for name in names}
            if kept := _read(paths, store.documents):
                return cls(length - 1, **kept)
        made = cls._made(np.asarray(store.lengths) + 1, length)  # with EOS
        if folder is not None:
            try:
                for name, path in paths.items():
                    buffer = io.BytesIO()
                    np.save(buffer, getattr(made, name), allow_pickle=False)
                    write_atomic(path, buffer.getvalue())
            except OSError as error:  # a store that may not be written to
                log.warning("the packing of %s cannot be kept beside it (%s); it is made anew each time", folder, error)
        return made

    @classmethod
    def _made(cls, sizes: NDArray[np.int64], length: int) -> Packing:
        room = length - 1
        full, tail = np.divmod(sizes, room)
        owners = np.flatnonzero(tail)
        bins, count = best_fit(tail[owners] + 1, length)  # each with a start token
        order = np.argsort(bins, kind="stable")
        firsts = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=count))])
        return cls(room, np.cumsum(full), owners[order], firsts.astype(np.int64))

    @property
    def full(self) -> int:
        """Sequences that are one full window."""
        return int(self.full_ends[-1]) if len(self.full_ends) else 0

    def __len__(self) -> int:
        return self.full + len(self.firsts) - 1

    def pieces(self, index: int) -> Iterator[tuple[int, int]]:
        """(document, first token) of each window in a sequence; a window ends with its document or after `room`."""
        if index < self.full:
            document = int(np.searchsorted(self.full_ends, index, side="right"))
            before = int(self.full_ends[document - 1]) if document else 0
            yield document, (index - before) * self.room
            return
        first, last = (int(at) for at in self.firsts[index - self.full : index - self.full + 2])
        for document in self.tails[first:last].tolist():
            before = int(self.full_ends[document - 1]) if document else 0
            yield document, (int(self.full_ends[document]) - before) * self.room


def best_fit(sizes: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], int]:
    """(bin of each item, bins): longest items first, each into the fullest bin that still has room for it.

    `sizes` in 1..length. Items of one size are placed together, and there are at most `length` sizes, so the work in
    Python does not grow with the number of items. Best fit needs at most 11/9 of the fewest bins, and one.
    """
    order = np.argsort(-sizes, kind="stable")
    counts = np.bincount(sizes, minlength=length + 1)
    bin_of = np.empty(len(sizes), np.int64)
    spare: dict[int, NDArray[np.int64]] = {}  # room -> bins with just that much of it
    at = bins = 0
    for need in np.flatnonzero(counts)[::-1].tolist():
        end = at + int(counts[need])
        for room in [*sorted(r for r in spare if r >= need), length]:
            if at == end:
                break
            each = room // need
            if room == length:
                chosen = np.arange(bins, bins - (at - end) // each, dtype=np.int64)  # rounded up
                bins += len(chosen)
            else:
                there = spare.pop(room)
                used = min(len(there), -((at - end) // each))
                chosen, rest = there[:used], there[used:]
                if len(rest):
                    spare[room] = rest
            taken = np.repeat(chosen, each)[: end - at]
            bin_of[order[at : at + len(taken)]] = taken
            at += len(taken)
            last = len(taken) - each * (len(chosen) - 1)  # items of the last bin
            for left, which in ((room - each * need, chosen[:-1]), (room - last * need, chosen[-1:])):
                if left and len(which):
                    spare[left] = np.concatenate([spare[left], which]) if left in spare else which
    return bin_of, bins


def _read(paths: dict[str, Path], documents: int) -> dict[str, NDArray[np.int64]] | None:
    """The arrays mapped from their files, None unless all are there and fit the store."""
    try:
        found = {name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in paths.items()}
    except (OSError, ValueError, EOFError):
        return None
    fits = len(found["full_ends"]) == documents and found["firsts"][-1] == len(found["tails"])
    return found if fits else None
