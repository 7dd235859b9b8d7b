"""Batches as a pure function: global batch n depends on (seed, n, batch size) and nothing else.

A rank takes a slice of it, a micro-batch a slice of that; noise is seeded per sample by its index in the stream. So
the data and the noise are the same on one process or many, for any accumulation, and after any resume: the loader's
whole state is the step number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..layout import Annealing, Block, Causal, Full, NoisedBatch, Rows
from ..process import Form, MaskedDiffusion, stratified_levels
from ..runtime import generator
from ..tokenizer import SpecialTokens
from .tokens import TokenStore


@dataclass(frozen=True)
class Sequences:
    """Fixed-length sequences cut from one token store.

    pack "documents": every document in windows of length - 1 tokens behind a start token; a document's last window
    ends with EOS; short windows share a sequence, kept apart by a document mask. pack "concat" (the paper's released
    code): documents joined by EOS and cut every `length` tokens, no document mask, no start token.
    """

    store: TokenStore
    length: int
    special: SpecialTokens
    pieces: list[list[tuple[int, int, int]]]  # per sequence: (document, start, tokens)
    concat: bool

    @classmethod
    def cut(cls, store: TokenStore, length: int, special: SpecialTokens, *, pack: str = "documents") -> Sequences:
        """Lay the store out. ValueError when it has less than one sequence, or `pack` is unknown."""
        if length < 2:
            raise ValueError(f"sequences need at least 2 tokens, not {length}")
        sizes = np.asarray(store.lengths) + 1  # with EOS
        if pack == "concat":
            total = int(sizes.sum())
            if total < length:
                raise ValueError(f"the text has {total} tokens, less than one sequence of {length}; give more text")
            return cls(store, length, special, [[(0, i * length, length)] for i in range(total // length)], True)
        if pack != "documents":
            raise ValueError(f"unknown packing {pack!r}: use documents or concat")
        room = length - 1
        full, tails = [], []
        for document, size in enumerate(sizes.tolist()):
            starts = range(0, size, room)
            full += [[(document, s, room)] for s in starts if size - s >= room]
            tails += [(document, s, size - s) for s in starts if size - s < room]
        packed = _first_fit(tails, length)
        if not full and not packed:
            raise ValueError("the text holds no tokens; give more text")
        if sum(n for piece in full + packed for *_, n in piece) < room:
            raise ValueError(
                f"the text is shorter than one window of {length} tokens; give more text or a smaller length"
            )
        return cls(store, length, special, full + packed, False)

    def __len__(self) -> int:
        return len(self.pieces)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(ids, maskable, document, valid) of one sequence, each (length,)."""
        L = self.length
        ids = np.full(L, self.special.pad, dtype=np.int64)
        maskable, valid = np.zeros(L, dtype=bool), np.zeros(L, dtype=bool)
        document = np.zeros(L, dtype=np.int64)
        if self.concat:
            ((_, start, _),) = self.pieces[index]
            ids[:] = self._stream(start, L)
            maskable[1:] = valid[:] = True
        else:
            at = 0
            for k, (doc, start, n) in enumerate(self.pieces[index]):
                ids[at] = self.special.bos
                ids[at + 1 : at + 1 + n] = self._with_eos(doc, start, n)
                valid[at : at + 1 + n] = True
                maskable[at + 1 : at + 1 + n] = True
                document[at:] = k
                at += 1 + n
            document[at:] = len(self.pieces[index])
        if self.special.mask is not None:
            maskable &= ids != self.special.mask  # natural occurrences of a reused mask token
        return ids, maskable, document, valid

    def _with_eos(self, document: int, start: int, n: int) -> np.ndarray:
        """Tokens start..start + n of a document that ends with EOS (fewer at its end); reads no more than these."""
        part = self.store.document(document, start, n)
        return np.append(part, self.special.eos) if len(part) < n else part

    def _stream(self, start: int, n: int) -> np.ndarray:
        ends = np.cumsum(np.asarray(self.store.lengths) + 1)
        document = int(np.searchsorted(ends, start, side="right"))
        offset = start - (int(ends[document - 1]) if document else 0)
        parts: list[np.ndarray] = []
        while n > 0:
            part = self._with_eos(document, offset, n)
            parts.append(part)
            n -= len(part)
            document, offset = document + 1, 0
        return np.concatenate(parts)


def _first_fit(tails: list[tuple[int, int, int]], length: int) -> list[list[tuple[int, int, int]]]:
    """Short windows into sequences: longest first, each into the fullest sequence that still has room for it."""
    bins: list[list[tuple[int, int, int]]] = []
    by_room: dict[int, list[int]] = {}
    for piece in sorted(tails, key=lambda p: (-p[2], p)):
        need = piece[2] + 1
        room = next((r for r in range(need, length + 1) if by_room.get(r)), None)
        if room is None:
            bins.append([piece])
            index, room = len(bins) - 1, length
        else:
            index = by_room[room].pop()
            bins[index].append(piece)
        by_room.setdefault(room - need, []).append(index)
    return bins


@lru_cache(maxsize=16)
def _order(seed: int, kind: int, epoch: int, size: int) -> np.ndarray:
    """One epoch's shuffle; kept, since every micro-batch of the epoch asks for it."""
    return generator(seed, kind, epoch, purpose="shuffle").permutation(size)


@dataclass(frozen=True)
class Mixture:
    """Which sequence is sample i of the stream: sources in proportion to their weights, each in shuffled epochs."""

    sources: Sequence[Sequences]
    weights: Sequence[float]
    seed: int

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.weights) or not self.sources:
            raise ValueError("a mixture needs at least one source and one weight for each")
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ValueError(f"mixture weights must be non-negative and not all zero, not {list(self.weights)}")

    @property
    def shares(self) -> list[int]:
        """Sequences of each source in one epoch of the mixture."""
        total = sum(len(s) for s in self.sources)
        scale = total / sum(self.weights)
        return [max(1, round(w * scale)) if w > 0 else 0 for w in self.weights]

    def locate(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """(source, sequence) of samples of the stream."""
        shares = self.shares
        epoch_size = sum(shares)
        owner = np.repeat(np.arange(len(shares)), shares)
        slot = np.concatenate([np.arange(n) for n in shares])
        found = []
        for i in indices:
            epoch, at = divmod(int(i), epoch_size)
            entry = _order(self.seed, -1, epoch, epoch_size)[at]
            source = int(owner[entry])
            turn, place = divmod(epoch * shares[source] + int(slot[entry]), len(self.sources[source]))
            found.append((source, int(_order(self.seed, source, turn, len(self.sources[source]))[place])))
        return found

    def epochs(self, samples: int) -> float:
        """How often the text is passed over in a number of samples (the most repeated source)."""
        per_epoch = [share / len(source) for share, source in zip(self.shares, self.sources, strict=True)]
        return samples / sum(self.shares) * max(per_epoch)


@dataclass(frozen=True)
class Loader:
    """Rows of global batch n.

    batch: sequences in a global batch, over all ranks and micro-batches. complementary: each sequence enters twice
    in a row, with complementary masks. fixed_shapes: pad the wanted rows to multiples of B * L / 8 (CUDA).
    process None: the autoregressive parent (layout Causal).
    """

    mixture: Mixture
    layout: Full | Block | Causal
    process: MaskedDiffusion | None
    batch: int
    micro_batch: int
    seed: int
    form: Form = "count"
    complementary: bool = False
    annealing: Annealing | None = None
    fixed_shapes: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1 or self.micro_batch < 1:
            raise ValueError("batch and micro_batch must be at least 1 sequence")
        if self.complementary and (self.batch % 2 or self.form != "count"):
            raise ValueError("complementary masks need an even batch and form = 'count'")

    def rows(self, n: int, rank: int = 0, world: int = 1) -> list[Rows]:
        """The micro-batches of one rank's share of global batch n (indices rank, rank + world, ...)."""
        if self.batch % world:
            fits = [w for w in range(1, world + 1) if self.batch % w == 0]
            raise ValueError(f"{world} processes do not divide a batch of {self.batch}; use one of {fits}")
        first = n * self.batch
        mine = list(range(first + rank, first + self.batch, world))
        return [self.micro(mine[i : i + self.micro_batch], n) for i in range(0, len(mine), self.micro_batch)]

    def count(self, n: int, *, normalisation: str) -> int:
        """Tokens that global batch n is divided by: maskable ones ("nelbo") or noised ones ("masked")."""
        parts = self.rows(n)
        return sum(rows.maskable if normalisation == "nelbo" else rows.noised for rows in parts)

    def micro(self, indices: list[int], n: int) -> Rows:
        """Rows of the given samples of the stream, noised for global batch n."""
        step = 2 if self.complementary else 1
        where = self.mixture.locate([i // step for i in indices])
        arrays = [self.mixture.sources[source].read(sequence) for source, sequence in where]
        x0_BL, maskable_BL, document_BL, valid_BL = (
            torch.from_numpy(np.stack(part)) for part in zip(*arrays, strict=True)
        )
        rows = self.layout.training_rows(self._noised(indices, step, n, x0_BL, maskable_BL, document_BL, valid_BL))
        if self.fixed_shapes:
            unit = -(-x0_BL.numel() // 8)
            wanted = len(rows.source)
            return rows.padded(max(1, -(-wanted // unit)) * unit)
        return rows

    def _noised(
        self,
        indices: list[int],
        step: int,
        n: int,
        x0_BL: Tensor,
        maskable_BL: Tensor,
        document_BL: Tensor,
        valid_BL: Tensor,
    ) -> NoisedBatch:
        L = x0_BL.shape[1]
        group_BL = torch.zeros_like(x0_BL)
        if self.process is None:
            nothing = torch.zeros_like(maskable_BL)
            return NoisedBatch(x0_BL, x0_BL, nothing, maskable_BL, nothing.float(), document_BL, valid_BL, group_BL)
        groups = 1
        if isinstance(self.layout, Block):
            group_BL = self.layout.groups(L).expand_as(x0_BL).contiguous()
            groups = int(group_BL[0, -1]) + 1
        stream = [i // step for i in indices]
        levels = torch.cat(
            [stratified_levels(self.seed, i, 1, batch=self.batch // step, groups=groups) for i in stream]
        )
        seeds = [int(generator(self.seed, i, purpose="noise").integers(2**62)) for i in stream]
        mirror = torch.tensor([i % 2 == 1 for i in indices]) if self.complementary else None
        ids_BL, noised_BL, weight_BL = self.process.corrupt(
            x0_BL, maskable_BL, group_BL, levels, seeds, form=self.form, mirror_B=mirror
        )
        annealed = self.annealing.matrix(n, L) if self.annealing else None
        return NoisedBatch(x0_BL, ids_BL, noised_BL, maskable_BL, weight_BL, document_BL, valid_BL, group_BL, annealed)
