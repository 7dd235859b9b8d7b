"""Which rows a forward computes: all of them, or those whose keys and values are not held from earlier forwards.

One small frozen class each, handed to `denoise` as its `cache`. `slots` is where the denoiser keeps keys and values
(`HFDenoiser.new_cache()`), None for a forward that keeps none.

    cache        layout  rows of a forward                                             predictions
    Uncached     any     all, of the samples that want one                             exact
    BlockCache   block   the block, and finished tokens that are not held yet          exact
    PrefixCache  full    all at a block's first, then the block and what is behind it  exact at a block's first forward
    DualCache    full    all at a block's first, then the block                        exact at a block's first forward
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..layout import Block, Full, Layout
from ..rows import Rows
from .canvas import Canvas

#: Tokens filled together when an approximate cache is asked for and no block is: Fast-dLLM's best trade-off.
BLOCK = 32


class Caching(Protocol):
    """What the loop asks: whether the layout fits, that a new block begins, and the rows of a forward.

    Rows come from the canvas as it stands, the positions to be predicted, and those that are being filled, which lie in
    one block of `size` tokens a sample: both bool (B, L).
    """

    @property
    def slots(self) -> Any: ...

    def check(self, layout: Layout) -> None: ...

    def begin(self) -> None: ...

    def rows(self, layout: Any, canvas: Canvas, wanted_BL: Tensor, region_BL: Tensor, size: int) -> Rows: ...


@dataclass(frozen=True)
class Uncached:
    """Everything anew. Samples without a wanted prediction, and padding that only they needed, are left out."""

    slots: None = None

    def check(self, layout: Layout) -> None:
        """Any layout will do."""

    def begin(self) -> None:
        """Nothing is held."""

    def rows(self, layout: Any, canvas: Canvas, wanted_BL: Tensor, region_BL: Tensor, size: int) -> Rows:
        rows: Rows = layout.decoding_rows(*_only(wanted_BL.any(1), canvas.ids, canvas.valid, wanted_BL))
        return rows


@dataclass(frozen=True)
class BlockCache:
    """Finished tokens of the block layout, by the rows they had in training: the predictions are the uncached ones.

    The forward that proposes a block's first tokens commits the block before it.
    """

    slots: Any

    def check(self, layout: Layout) -> None:
        """ValueError for a layout that sees finished tokens anew."""
        if not isinstance(layout, Block):
            raise ValueError(
                "the full layout sees everything anew at each step, so no cache of it is exact: leave it out, or hand "
                "over a PrefixCache or DualCache"
            )

    def begin(self) -> None:
        """What is held stays true."""

    def rows(self, layout: Any, canvas: Canvas, wanted_BL: Tensor, region_BL: Tensor, size: int) -> Rows:
        held = self.slots.held
        # A slot for each finished token, and no other.
        held_B = wanted_BL.sum(1) * 0 if held is None else held.valid.sum(1)
        rows: Rows = layout.cached_rows(canvas.ids, canvas.valid, wanted_BL, held_B)
        return rows


@dataclass(frozen=True)
class DualCache:
    """Full attention, approximately: while a block is filled, tokens before and behind it keep their keys and values.

    They are computed with everything else at the block's first forward, whose predictions are therefore exact; later
    ones see the rest of the text as it was when the block had none of its tokens yet. Under the shift the row before
    the block is computed too: it predicts the block's first token. Fast-dLLM (arXiv 2505.22618).
    """

    slots: Any
    behind: ClassVar[bool] = False

    def check(self, layout: Layout) -> None:
        """ValueError for a layout whose cache can be exact."""
        if not isinstance(layout, Full):
            raise ValueError(
                f"the {layout.name} layout needs no approximate cache: leave prefix and dual to checkpoints with full "
                "attention"
            )

    def begin(self) -> None:
        """Forget what was computed for another block."""
        self.slots.clear()

    def rows(self, layout: Any, canvas: Canvas, wanted_BL: Tensor, region_BL: Tensor, size: int) -> Rows:
        # Slots belong to samples: from a block's first forward to its last the same ones take part.
        here = region_BL.any(1)
        ids_BL, valid_BL, wanted_BL = _only(here, canvas.ids, canvas.valid, wanted_BL)
        rows: Rows = layout.decoding_rows(ids_BL, valid_BL, wanted_BL)
        if self.slots.held is None:
            return replace(rows, keep=ids_BL.shape[1])
        start_B = region_BL[here].long().argmax(1) // size * size
        length_B = valid_BL.sum(1)
        end_B = length_B if self.behind else torch.minimum(start_B + size, length_B)
        return rows.window(start_B - layout.offset, int((end_B - start_B).max()) + layout.offset)


@dataclass(frozen=True)
class PrefixCache(DualCache):
    """`DualCache` for what stands before the block alone: what is behind it is computed anew with the block."""

    behind: ClassVar[bool] = True


def _only(here_B: Tensor, ids_BL: Tensor, valid_BL: Tensor, wanted_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Some samples of a batch, without padding that only the others needed (it is on the right)."""
    length = int(valid_BL[here_B].sum(1).max())
    return ids_BL[here_B, :length], valid_BL[here_B, :length], wanted_BL[here_B, :length]


def agreement(a_BL: Tensor, b_BL: Tensor) -> float:
    """Share of places at which two runs have the same token, in [0, 1]; ids of one shape.

    Place by place: texts that say the same one token later count as different. ValueError for unequal shapes.
    """
    if a_BL.shape != b_BL.shape or not a_BL.numel():
        raise ValueError(f"compare runs of one canvas: {tuple(a_BL.shape)} and {tuple(b_BL.shape)} are its new tokens")
    return float((a_BL == b_BL).double().mean())
