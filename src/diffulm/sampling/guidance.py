"""Classifier-free guidance (arXiv 2207.12598): predictions pushed away from what the model says without the prompt.

The guided law of a token is p(x | prompt, rest)^s p(x | rest)^(1 - s), normalised, with scale s: the prompt is dropped
by masking it (as in LLaDA, arXiv 2502.09992, whose cfg_scale is s - 1). Scale 1 is the plain model, 0 the model without
the prompt, more than 1 guidance. A mixture of two conditionals is no model's conditional, so guided text has no
likelihood, and at scales other than 0 and 1 each step costs two forwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..layout import Denoiser, Full, Layout
from ..rows import Rows
from .caches import Uncached
from .canvas import Canvas


def forwards_of_a_step(scale: float | None) -> int:
    """1 without guidance and at the two scales that need only one of the predictions, else 2."""
    return 1 if scale in (None, 0, 1) else 2


@dataclass(frozen=True)
class Guided:
    """A denoiser that is asked twice, with the given tokens and with masks in their place; it satisfies `Denoiser`.

    Args:
        denoiser: of a full-attention checkpoint; row r of its rows is position r.
        scale: s above; 0 or more.
        given_BL: bool, tokens that are masked in the second forward. Sample b of the rows is sample b here, so a loop
            must leave none out: hand `denoise` the cache `EverySample()`.

    ValueError for a scale below 0, a cache, rows of other samples, and where no token is given.
    """

    denoiser: Denoiser
    scale: float
    mask_token_id: int
    given_BL: Tensor

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"the guidance scale must be 0 or a positive number, not {self.scale}")
        if not bool(self.given_BL.any()):
            raise ValueError("guidance needs a prompt to be guided by; give some text, or leave the guidance out")

    @classmethod
    def by_canvas(cls, denoiser: Denoiser, scale: float, mask_token_id: int, canvas: Canvas) -> Guided:
        """Guided by everything that a canvas gives, except the start token, which models never saw masked."""
        given_BL = canvas.valid & ~canvas.editable
        given_BL[:, 0] = False
        return cls(denoiser, scale, mask_token_id, given_BL)

    def __call__(self, rows: Rows, *, cache: Any = None) -> Tensor:
        """(N, V) logits: scale * (with the given tokens) + (1 - scale) * (without), which is the usual
        without + scale * (with - without); -inf stays -inf."""
        if cache is not None:
            raise ValueError(
                "guidance cannot decode from a cache: its second forward masks text whose keys and values are kept; "
                "use cache none"
            )
        if rows.ids.shape != self.given_BL.shape:
            raise ValueError(
                f"guidance knows {tuple(self.given_BL.shape)} given tokens and is asked for rows "
                f"{tuple(rows.ids.shape)}; hand the loop the cache EverySample()"
            )
        # The two ends are exact, and cost one forward.
        if self.scale == 1:
            return self.denoiser(rows)
        without = self.denoiser(replace(rows, ids=rows.ids.masked_fill(self.given_BL, self.mask_token_id)))
        if self.scale == 0:
            return without
        plain = self.denoiser(rows)
        # -inf - -inf would be NaN, and what one of them rules out (the mask column) the guided law rules out.
        never = plain.isneginf() | without.isneginf()
        return torch.where(never, float("-inf"), self.scale * plain + (1 - self.scale) * without)

    def nll(self, rows: Rows) -> Tensor:
        """(N,) nats of the targets under the guided law."""
        return -self(rows).log_softmax(-1).gather(1, rows.target[:, None])[:, 0]


@dataclass(frozen=True)
class EverySample(Uncached):
    """No cache, and every sample with all its padding in every forward: rows that `Guided` can tell apart."""

    def check(self, layout: Layout) -> None:
        """ValueError for a layout in which rows are not positions."""
        if not isinstance(layout, Full):
            raise ValueError(
                f"guidance masks given text, which the {layout.name} layout reads from its clean rows; it needs a "
                "checkpoint with full attention"
            )

    def rows(self, layout: Any, canvas: Canvas, wanted_BL: Tensor, region_BL: Tensor, size: int) -> Rows:
        rows: Rows = layout.decoding_rows(canvas.ids, canvas.valid, wanted_BL)
        return rows
