"""Early stop: what follows an end-of-text token is not worth a forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .step import committed


@dataclass(frozen=True)
class EndOfText:
    """Tokens that end a completion, and when the loop may act on one.

    As soon as a generated end token has no mask before it, the text before it is final: the positions after it are
    filled with that token and the sample is done. The text up to the end is exactly that of a run without early stop.

    settle = True fills the positions behind an end token already while masks remain before it. That saves more
    steps when a model writes ends far ahead of its text, but these masks then see ends in place of masks, so the text
    may differ.
    """

    tokens: tuple[int, ...]
    settle: bool = False

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("EndOfText needs at least one token id; hand no end to denoise to run without early stop")

    def __call__(self, ids: Tensor, masked: Tensor, editable: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, masked) with everything behind the end of each sample filled; all (B, L). Given text is no end."""
        L = ids.shape[1]
        ends = editable & ~masked & torch.isin(ids, torch.tensor(self.tokens, device=ids.device))
        first = torch.where(ends.any(1), ends.long().argmax(1), L)
        if not self.settle:
            first = torch.where(first < committed(masked), first, L)
        behind = editable & (torch.arange(L, device=ids.device) > first[:, None])
        fill = ids.gather(1, first.clamp(max=L - 1)[:, None])
        return torch.where(behind, fill, ids), masked & ~behind
