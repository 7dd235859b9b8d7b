"""Which sequence of which source is sample i of the stream: arithmetic on i, nothing as long as an epoch in memory."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ..runtime import generator
from .sequences import Sequences

#: Says how samples are ordered and packed; kept with a run's settings, because another order is another run.
ORDER = "feistel-1"

_ROUNDS = 8  # even, so that halves of unequal width end as they began
_WORD = 2**64 - 1


@lru_cache(maxsize=256)
def _keys(seed: int, kind: int, epoch: int) -> tuple[int, ...]:
    """The round keys of one shuffle."""
    return tuple(generator(seed, kind, epoch, purpose="shuffle").integers(2**63, size=_ROUNDS).tolist())


def shuffled(place: int, size: int, keys: tuple[int, ...]) -> int:
    """Where a keyed permutation of 0..size - 1 sends `place`, without a table (about 10 microseconds).

    A Feistel network permutes the numbers of the smallest power of two that is not below `size` (16 at least, or the
    halves would be too narrow to mix); a result outside the range is sent through again, until one is inside ("cycle
    walking"; Black and Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002). The walk stays on one cycle of a
    permutation that `place` is on, so it ends, and no two places end on the same number. Fewer than two passes are
    expected for 16 or more.
    """
    bits = max(4, (size - 1).bit_length())
    while True:
        narrow, wide = bits // 2, bits - bits // 2
        left, right = place >> wide, place & ((1 << wide) - 1)
        for key in keys:
            # splitmix64's finaliser: every bit of its input moves every bit of its output.
            x = (right + key) & _WORD
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
            left, right = right, left ^ ((x ^ (x >> 31)) & ((1 << narrow) - 1))
            narrow, wide = wide, narrow
        place = left << wide | right
        if place < size:
            return place


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

    @cached_property
    def shares(self) -> list[int]:
        """Sequences of each source in one epoch of the mixture."""
        total = sum(len(s) for s in self.sources)
        scale = total / sum(self.weights)
        return [max(1, round(w * scale)) if w > 0 else 0 for w in self.weights]

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(self.shares))

    def locate(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """(source, sequence) of samples of the stream.

        A shuffle of the mixture's epoch says which source and which entry of its share; the source itself is passed
        over in shuffled turns of its own, so that all its sequences are seen before one is seen again.
        """
        found = []
        for i in indices:
            epoch, at = divmod(int(i), self._ends[-1])
            entry = shuffled(at, self._ends[-1], _keys(self.seed, -1, epoch))
            source = bisect.bisect_right(self._ends, entry)
            share, size = self.shares[source], len(self.sources[source])
            turn, place = divmod(epoch * share + entry - self._ends[source] + share, size)
            found.append((source, shuffled(place, size, _keys(self.seed, source, turn))))
        return found

    def epochs(self, samples: int) -> float:
        """How often the text is passed over in a number of samples (the most repeated source)."""
        per_epoch = [share / len(source) for share, source in zip(self.shares, self.sources, strict=True)]
        return samples / sum(self.shares) * max(per_epoch)
