"""Tokens that must not be drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Banned:
    """Tokens that are never drawn, and sequences of two or more that are never completed.

    Each token of a sequence gets probability 0 wherever all the others stand around it, given text included. So
    a sequence cannot come about while one token is revealed at a time; two that are revealed in one forward
    may form it together, since neither is known to the other.
    """

    tokens: tuple[int, ...] = ()
    sequences: tuple[tuple[int, ...], ...] = ()

    def __call__(self, log_probs_NV: Tensor, ids_BL: Tensor, wanted_BL: Tensor) -> Tensor:
        """(N, V) log-probabilities at the wanted positions without what is banned there, summing to 1 again.

        ValueError where nothing is left.
        """
        out = log_probs_NV.clone()
        out[:, list(self.tokens)] = float("-inf")
        for sequence in self.sequences:
            for place, token in enumerate(sequence):
                completes = wanted_BL
                for other, expected in enumerate(sequence):
                    if other != place:
                        completes = completes & _beside(ids_BL == expected, other - place)
                out[completes[wanted_BL], token] = float("-inf")
        if bool(out.amax(-1).isneginf().any()):
            raise ValueError("the banned words leave no token to draw; ban fewer")
        return out.log_softmax(-1)


def _beside(is_BL: Tensor, distance: int) -> Tensor:
    """What holds `distance` places to the right of each position (negative: to the left), False beyond the edge."""
    L = is_BL.shape[1]
    out = torch.zeros_like(is_BL)
    if abs(distance) < L:
        to, of = slice(max(0, -distance), L - max(0, distance)), slice(max(0, distance), L + min(0, distance))
        out[:, to] = is_BL[:, of]
    return out
