"""Fixed-length sequences cut from one token store, laid out by arithmetic: reading one costs the same in any store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..tokenizer import SpecialTokens
from .packing import Packing
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
    packing: Packing | None  # None: concat
    count: int

    @classmethod
    def cut(cls, store: TokenStore, length: int, special: SpecialTokens, *, pack: str = "documents") -> Sequences:
        """Lay the store out. ValueError when it has less than one sequence, or `pack` is unknown."""
        if length < 2:
            raise ValueError(f"sequences need at least 2 tokens, not {length}")
        if pack == "concat":
            total = store.tokens + store.documents  # each with EOS
            if total < length:
                raise ValueError(f"the text has {total} tokens, less than one sequence of {length}; give more text")
            return cls(store, length, special, None, total // length)
        if pack != "documents":
            raise ValueError(f"unknown packing {pack!r}: use documents or concat")
        packing = Packing.of(store, length)
        if not len(packing):
            raise ValueError("the text holds no tokens; give more text")
        if not packing.full and int(np.asarray(store.lengths).sum()) + len(store.lengths) < length - 1:
            raise ValueError(
                f"the text is shorter than one window of {length} tokens; give more text or a smaller length"
            )
        return cls(store, length, special, packing, len(packing))

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(ids, maskable, document, valid) of one sequence, each (length,)."""
        L = self.length
        ids = np.full(L, self.special.pad, dtype=np.int64)
        maskable, valid = np.zeros(L, dtype=bool), np.zeros(L, dtype=bool)
        document = np.zeros(L, dtype=np.int64)
        if self.packing is None:
            ids[:] = self._stream(index * L, L)
            maskable[1:] = valid[:] = True
        else:
            at = k = 0
            for k, (doc, start) in enumerate(self.packing.pieces(index), 1):
                part = self._with_eos(doc, start, L - 1)
                n = len(part)
                ids[at] = self.special.bos
                ids[at + 1 : at + 1 + n] = part
                valid[at : at + 1 + n] = True
                maskable[at + 1 : at + 1 + n] = True
                document[at:] = k - 1
                at += 1 + n
            document[at:] = k
        if self.special.mask is not None:
            maskable &= ids != self.special.mask  # natural occurrences of a reused mask token
        return ids, maskable, document, valid

    def weights(self, index: int) -> np.ndarray | None:
        """Factor of each token's weight in the loss, float32 (length,); None: all are 1, as in any text."""
        return None

    def _with_eos(self, document: int, start: int, n: int) -> np.ndarray:
        """Tokens start..start + n of a document that ends with EOS (fewer at its end); reads no more than these."""
        part = self.store.document(document, start, n)
        return np.append(part, self.special.eos) if len(part) < n else part

    def _stream(self, start: int, n: int) -> np.ndarray:
        """Tokens start..start + n of all documents joined, each with EOS."""
        document, offset = self.store.at(start)
        parts: list[np.ndarray] = []
        while n > 0:
            part = self._with_eos(document, offset, n)
            parts.append(part)
            n -= len(part)
            document, offset = document + 1, 0
        return np.concatenate(parts)
