"""Tokens that must not be drawn, anywhere or at some places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Bans(Protocol):
    """What the loop asks for what may be drawn."""

    def __call__(self, log_probs_NV: Tensor, ids_BL: Tensor, wanted_BL: Tensor) -> Tensor: ...


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
        return _normalised(out)


@dataclass(frozen=True)
class Opening:
    """Places, bool (B, L), at which only some tokens (int64 ids) may be drawn; and the bans that hold everywhere.

    So begins a hole behind a space that is left to it: with a token that brings the space.
    """

    places_BL: Tensor
    tokens: Tensor
    banned: Banned | None = None

    def __call__(self, log_probs_NV: Tensor, ids_BL: Tensor, wanted_BL: Tensor) -> Tensor:
        """As `Banned`, whose error it shares."""
        out = log_probs_NV if self.banned is None else self.banned(log_probs_NV, ids_BL, wanted_BL)
        here_N = self.places_BL[wanted_BL]
        if not bool(here_N.any()):
            return out
        kept = torch.full_like(out[here_N], float("-inf"))
        kept[:, self.tokens] = out[here_N][:, self.tokens]
        out = out.clone()
        out[here_N] = _normalised(kept)
        return out


def _normalised(log_probs_NV: Tensor) -> Tensor:
    """Log-probabilities that sum to 1 again; ValueError where nothing is left."""
    if bool(log_probs_NV.amax(-1).isneginf().any()):
        raise ValueError("the banned words leave no token to draw; ban fewer")
    return log_probs_NV.log_softmax(-1)


def _beside(is_BL: Tensor, distance: int) -> Tensor:
    """What holds `distance` places to the right of each position (negative: to the left), False beyond the edge."""
    L = is_BL.shape[1]
    out = torch.zeros_like(is_BL)
    if abs(distance) < L:
        to, of = slice(max(0, -distance), L - max(0, distance)), slice(max(0, distance), L + min(0, distance))
        out[:, to] = is_BL[:, of]
    return out
