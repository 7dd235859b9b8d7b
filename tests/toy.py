"""The three-token toy: one fixed random joint over V = 3, L = 3, and its exact conditionals as a denoiser.

No start token, source "own", mask id 3. Small enough that every mask, order and outcome can be enumerated, so the
theorems the package rests on are tested as equalities.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from diffulm.layout import Full, Rows
from diffulm.process import MaskedDiffusion

V, L, MASK = 3, 3, 3
LAYOUT = Full("own")
PROCESS = MaskedDiffusion(MASK)
TEXTS = list(itertools.product(range(V), repeat=L))
ORDERS = list(itertools.permutations(range(L)))


def joint(seed: int = 0) -> np.ndarray:
    """p[x1, x2, x3], float64, far from independent."""
    p = np.random.default_rng(seed).gamma(0.4, size=(V, V, V)) + 1e-3
    return p / p.sum()


@dataclass(frozen=True)
class Table:
    """A denoiser that knows p(token at i | revealed tokens) for every partly masked text: (ids) -> (L, V)."""

    rows: dict[tuple[int, ...], np.ndarray]

    @classmethod
    def exact(cls, p: np.ndarray) -> Table:
        """The conditionals of a joint: consistent, the perfect denoiser."""
        rows = {}
        for ids in itertools.product(range(V + 1), repeat=L):
            view = p[tuple(slice(None) if t == MASK else slice(t, t + 1) for t in ids)]
            total = view.sum()
            marginals = [view.sum(axis=tuple(a for a in range(L) if a != i)) / total for i in range(L)]
            rows[ids] = np.stack([np.resize(m, V) for m in marginals])
        return cls(rows)

    @classmethod
    def inconsistent(cls, seed: int = 1) -> Table:
        """Conditionals drawn at random: no joint has them, as no trained network's do."""
        rng = np.random.default_rng(seed)
        return cls({ids: rng.dirichlet(np.ones(V) * 0.7, size=L) for ids in itertools.product(range(V + 1), repeat=L)})

    def __call__(self, rows: Rows, *, cache: object = None) -> Tensor:
        states_B = (rows.ids * torch.tensor([(V + 1) ** (L - 1 - i) for i in range(L)])).sum(1)
        return self.log_probs[states_B].flatten(0, 1)[rows.source]

    @cached_property
    def log_probs(self) -> Tensor:
        """(states, L, V + 1): every row at once, states in the order of `itertools.product`; the mask has mass 0."""
        states = itertools.product(range(V + 1), repeat=L)
        return torch.from_numpy(np.stack([np.pad(self.rows[ids], ((0, 0), (0, 1))) for ids in states])).log()

    def nll(self, rows: Rows) -> Tensor:
        return -self(rows).gather(1, rows.target[:, None])[:, 0]

    def cross_entropy(self, text: tuple[int, ...], mask: tuple[bool, ...]) -> float:
        """Nats of the masked tokens of a text given the others."""
        ids = tuple(MASK if m else t for t, m in zip(text, mask, strict=True))
        return -sum(float(np.log(self.rows[ids][i, text[i]])) for i in range(L) if mask[i])

    def order_nll(self, text: tuple[int, ...], order: tuple[int, ...]) -> float:
        """Nats of a text revealed one token at a time in an order."""
        ids, total = [MASK] * L, 0.0
        for i in order:
            total -= float(np.log(self.rows[tuple(ids)][i, text[i]]))
            ids[i] = text[i]
        return total


def masks() -> Iterator[tuple[bool, ...]]:
    """Every mask but the empty one."""
    return (m for m in itertools.product([False, True], repeat=L) if any(m))
