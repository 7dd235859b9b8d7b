"""The canvas: known tokens, and the holes to fill. Completion is infilling with the hole at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tokenizer import SpecialTokens


@dataclass(frozen=True)
class Canvas:
    """A batch of texts with holes, (B, L): `ids` int64, the mask token in every hole; `editable` bool, True = hole;
    `valid` bool (False = padding, always on the right, so positions count from 0 in every sample)."""

    ids: Tensor
    editable: Tensor
    valid: Tensor

    @classmethod
    def from_holes(cls, samples: Sequence[Sequence[int | None]], special: SpecialTokens) -> Canvas:
        """Texts of token ids in which None is a hole of one token. The start token is put in front of each.

        ValueError when there is no sample, no hole, or a given token is the mask token.
        """
        if special.mask is None:
            raise ValueError("the tokenizer has no mask token; convert the model with `diffulm convert`")
        if not samples:
            raise ValueError("there is nothing to fill: give at least one text")
        L = 1 + max(len(sample) for sample in samples)
        ids = torch.full((len(samples), L), special.pad)
        editable = torch.zeros(len(samples), L, dtype=torch.bool)
        valid = torch.zeros(len(samples), L, dtype=torch.bool)
        for b, sample in enumerate(samples):
            if None not in sample:
                raise ValueError(f"text {b} has no hole; leave at least one token to fill")
            if special.mask in sample:
                raise ValueError(f"text {b} holds the mask token itself; mark what is to be filled as a hole instead")
            n = len(sample)
            ids[b, 0] = special.bos
            ids[b, 1 : 1 + n] = torch.tensor([special.mask if x is None else x for x in sample])
            editable[b, 1 : 1 + n] = torch.tensor([x is None for x in sample])
            valid[b, : 1 + n] = True
        return cls(ids, editable, valid)

    @classmethod
    def from_prompt(cls, prompts: Sequence[Sequence[int]], max_tokens: int, special: SpecialTokens) -> Canvas:
        """Prompts, of any lengths, each followed by `max_tokens` tokens to fill."""
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        return cls.from_holes([[*prompt, *[None] * max_tokens] for prompt in prompts], special)

    @classmethod
    def unconditional(cls, samples: int, length: int, special: SpecialTokens) -> Canvas:
        """`samples` texts of `length` tokens, nothing given but the start token."""
        return cls.from_prompt([[]] * samples, length, special)

    def to(self, device: torch.device | str) -> Canvas:
        """The same canvas on another device."""
        return Canvas(self.ids.to(device), self.editable.to(device), self.valid.to(device))
