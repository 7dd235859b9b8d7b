"""Which tokens of a continuation are masked, and what the bound makes of the answers (count form).

Sum over l = 1..n of the mean cross-entropy of a uniformly drawn set of l tokens, divided by l: the full mask (l = n) is
one set; the others come as pairs of a mask and its complement with strata over l. With few tokens all sets are taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np


def every_mask(n: int) -> tuple[np.ndarray, np.ndarray]:
    """All 2^n - 1 masks over n tokens, bool, and the weight of each in the bound."""
    masks = np.array([m for m in itertools.product([False, True], repeat=n) if any(m)])
    counts = masks.sum(1)
    return masks, np.array([1 / (c * math.comb(n, int(c))) for c in counts])


def paired_masks(n: int, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Masks over n > 1 tokens, bool (2 * pairs, n): each even row with its complement below it.

    The count of the even rows runs over 1..n/2 and its complement over the rest, which together are uniform on 1..n-1;
    the quantiles of the pairs are stratified. Read column by column: more tokens leave the first ones as they are.
    """
    offset = rng.random()
    rank = rng.random((n, pairs)).T.argsort(1).argsort(1)
    count = 1 + ((np.arange(pairs) + offset) / pairs * (n - 1) / 2).astype(int)
    chosen = rank < count[:, None]
    # Which of the two is the smaller one does not matter to the sum, so no coin is tossed for it.
    return np.stack([chosen, ~chosen], 1).reshape(2 * pairs, n)


def plan_masks(n: int, draws: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Masks over n tokens, bool (M, n), and weights (M,): sum of weight * cross-entropy of masked tokens is unbiased.

    All 2^n - 1 masks when that is no more than `draws` (then exact). Else the one full mask with weight 1/n, then
    complementary pairs with the count stratified on 1..n-1 and total weight (n-1)/n.
    """
    if n < 1:
        raise ValueError("there is nothing to score: the continuation has no tokens")
    if enumerable(n, draws):
        return every_mask(n)
    pairs = max(1, (draws - 1) // 2)
    masks = np.concatenate([np.ones((1, n), dtype=bool), paired_masks(n, pairs, rng)])
    weights = (n - 1) / (masks.sum(1) * 2 * pairs)
    weights[0] = 1 / n
    return masks, weights


def enumerable(n: int, draws: int) -> bool:
    """Whether all masks over n tokens cost no more than `draws`."""
    return n < 30 and 2**n - 1 <= draws


def spread(values: np.ndarray) -> float:
    """Variance of the mean of pair values, from differences of neighbours: those lie in neighbouring strata."""
    if len(values) < 2:
        return math.nan
    return float((np.diff(values) ** 2).sum() / (2 * len(values) * (len(values) - 1)))


#: Estimates with fewer draws that are kept of each option, to show accuracy against draws.
FEWER = 4


@dataclass
class Tally:
    """What is known of one segment of n tokens: its exact value, or the full mask and pairs, round by round."""

    n: int
    known: float = 0.0
    enumerated: bool = False
    rounds: list[np.ndarray] = field(default_factory=list)
    every: np.ndarray | None = None  # nats of all masks, in the order of `every_mask`

    def fewer(self, draws: int) -> list[float] | None:
        """What up to FEWER estimates with `draws` masks would have said, from masks that were scored; None: unknown.

        Of the first round's P pairs, every P/m-th are an estimate with m pairs, from starts spread evenly about the
        middle: pairs lie in order of their strata, and starts near the first would bias the mean. A segment whose
        masks were all scored looks the masks of fresh plans up.
        """
        if enumerable(self.n, draws):
            return [self.known] * FEWER if self.every is not None else None
        pairs = max(1, (draws - 1) // 2)
        if self.every is not None:
            place = 2 ** np.arange(self.n - 1, -1, -1)
            plans = [plan_masks(self.n, draws, np.random.default_rng((draws, r))) for r in range(FEWER)]
            return [float(self.every[masks @ place - 1] @ weights) for masks, weights in plans]
        if not self.rounds or len(self.rounds[0]) < pairs:
            return None
        stride = len(self.rounds[0]) // pairs
        starts = [(2 * k + 1) * stride // (2 * FEWER) for k in range(FEWER)]
        return [self.known + float(self.rounds[0][r::stride].mean()) for r in starts]

    def add(self, masks: np.ndarray, nats: np.ndarray, *, first: bool) -> None:
        """Take in the summed cross-entropy of each mask, (M,) nats, of one round's masks (M, n)."""
        if self.enumerated:
            self.known, self.every = float((nats * every_mask(self.n)[1]).sum()), nats
            return
        if first:
            self.known, masks, nats = float(nats[0]) / self.n, masks[1:], nats[1:]
        share = nats / masks.sum(1)
        self.rounds.append((self.n - 1) / 2 * (share[::2] + share[1::2]))

    @property
    def nats(self) -> float:
        pairs = sum(map(len, self.rounds))
        return self.known + (float(sum(x.sum() for x in self.rounds)) / pairs if pairs else 0.0)


def pooled_variance(rounds: Sequence[np.ndarray]) -> float:
    """Variance of the mean over all pairs of independent rounds."""
    pairs = sum(map(len, rounds))
    return sum((len(x) / pairs) ** 2 * spread(x) for x in rounds) if pairs else 0.0


@dataclass(frozen=True)
class Score:
    """-log p of a continuation in nats (an upper bound for diffusion) and what it cost.

    stderr: of the masks drawn, in nats (0 when exact or enumerated, nan from a single pair); forwards: sequences that
    went through the model; truncated: tokens cut from the front of the context; skipped: tokens left out because they
    are the reused mask token; fewer: by number of draws, what a few estimates with that many would have been.
    """

    nats: float
    stderr: float
    tokens: int
    forwards: int
    seed: int
    truncated: int = 0
    skipped: int = 0
    fewer: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Option:
    """One continuation on its way: its sequence, where its tokens stand, and one tally per segment. start: tokens of
    the context, start token included."""

    ids: list[int]
    places: list[np.ndarray]  # positions of the scored tokens, by segment
    truncated: int
    skipped: int
    size: float
    tallies: list[Tally] = field(default_factory=list)
    forwards: int = 0
    start: int = 1

    @property
    def nats(self) -> float:
        return sum(t.nats for t in self.tallies)

    @property
    def enumerated(self) -> bool:
        return all(t.enumerated for t in self.tallies)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the standard error, of the segment that has fewest; infinite when enumerated."""
        return min((sum(max(1, len(x) - 1) for x in t.rounds) for t in self.tallies if t.rounds), default=math.inf)

    def score(self, seed: int, draws: int = 0) -> Score:
        variance = sum(pooled_variance(t.rounds) for t in self.tallies)
        tokens = sum(map(len, self.places))
        fewer = {str(k): found for k in (4, 8, 16, 32, 64, 128) if k < draws and (found := self.fewer(k))}
        return Score(self.nats, math.sqrt(variance), tokens, self.forwards, seed, self.truncated, self.skipped, fewer)

    def fewer(self, draws: int) -> list[float]:
        """Estimates of the whole with `draws` masks a segment, to 5 decimals; empty where they are not known."""
        parts = [found for tally in self.tallies if (found := tally.fewer(draws))]
        if len(parts) < len(self.tallies):
            return []
        return [round(sum(part[r % len(part)] for part in parts), 5) for r in range(FEWER)]


def difference_variance(a: Option, b: Option, scale_a: float = 1.0, scale_b: float = 1.0) -> float:
    """Variance of a / scale_a - b / scale_b: masks are shared, so the pairs are compared pair by pair."""
    total = 0.0
    for x, y in itertools.zip_longest(a.tallies, b.tallies):
        left = [] if x is None else [v / scale_a for v in x.rounds]
        right = [] if y is None else [v / scale_b for v in y.rounds]
        if [len(v) for v in left] == [len(v) for v in right]:
            total += pooled_variance([v - w for v, w in zip(left, right)])
        else:  # one of them is enumerated
            total += pooled_variance(left) + pooled_variance(right)
    return total


def student(z: float, freedom: float) -> float:
    """The normal quantile z as one of Student's t (Cornish-Fisher series): few pairs know their own spread badly."""
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def contenders(options: Sequence[Option], alive: Sequence[int], confidence: float) -> list[int]:
    """Those of `alive` that may yet be the best, by nats or by nats per character; empty once both are decided."""
    z, left = NormalDist().inv_cdf(confidence), set()
    for by_size in (False, True):
        scale = {i: options[i].size if by_size else 1.0 for i in alive}
        value = {i: options[i].nats / scale[i] for i in alive}
        best = min(alive, key=value.__getitem__)
        close = set()
        for i in alive:
            error = math.sqrt(difference_variance(options[i], options[best], scale[i], scale[best]))
            needed = student(z, min(options[i].freedom, options[best].freedom)) * error
            if i != best and not value[i] - value[best] > needed:  # an unknown error (nan) decides nothing
                close.add(i)
        left |= {best, *close} if close else set()
    return sorted(left) if any(not options[i].enumerated for i in left) else []
