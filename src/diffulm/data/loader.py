"""Batches as a pure function: global batch n depends on (seed, n, batch size) and nothing else.

A rank takes a slice of it, a micro-batch a slice of that; noise is seeded per sample by its index in the stream. So
the data and the noise are the same on one process or many, for any accumulation, and after any resume: the loader's
whole state is the step number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..layout import Annealing, Block, Causal, Full, Growth, NoisedBatch, Rows
from ..process import Form, MaskedDiffusion, stratified_levels
from ..runtime import generator
from .mixture import ORDER, Mixture
from .sequences import Sequences

__all__ = ["ORDER", "Loader", "Mixture", "Sequences"]


@dataclass(frozen=True)
class Loader:
    """Rows of global batch n.

    batch: sequences in a global batch, over all ranks and micro-batches. complementary: each sequence enters twice
    in a row, with complementary masks. fixed_shapes: pad the wanted rows to multiples of B * L / 8 (CUDA).
    process None: the autoregressive parent (layout Causal). growth: block sizes by step (layout Block).
    """

    mixture: Mixture
    layout: Full | Block | Causal
    process: MaskedDiffusion | None
    batch: int
    micro_batch: int
    seed: int
    form: Form = "count"
    complementary: bool = False
    annealing: Annealing | None = None
    growth: Growth | None = None
    fixed_shapes: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1 or self.micro_batch < 1:
            raise ValueError("batch and micro_batch must be at least 1 sequence")
        if self.complementary and (self.batch % 2 or self.form != "count"):
            raise ValueError("complementary masks need an even batch and form = 'count'")
        if self.growth and not isinstance(self.layout, Block):
            raise ValueError(f"the {self.layout.name} layout has no blocks that could grow; use Block or no growth")

    def layout_at(self, n: int) -> Full | Block | Causal:
        """The layout of global batch n: the loader's, while blocks grow with a size of its own."""
        if self.growth and isinstance(self.layout, Block):
            return replace(self.layout, size=self.growth.size(n))
        return self.layout

    def rows(self, n: int, rank: int = 0, world: int = 1) -> list[Rows]:
        """The micro-batches of one rank's share of global batch n (indices rank, rank + world, ...)."""
        if self.batch % world:
            fits = [w for w in range(1, world + 1) if self.batch % w == 0]
            raise ValueError(f"{world} processes do not divide a batch of {self.batch}; use one of {fits}")
        first = n * self.batch
        mine = list(range(first + rank, first + self.batch, world))
        return [self.micro(mine[i : i + self.micro_batch], n) for i in range(0, len(mine), self.micro_batch)]

    def count(self, n: int, *, normalisation: str) -> int:
        """Tokens that global batch n is divided by: maskable ones ("nelbo") or noised ones ("masked")."""
        parts = self.rows(n)
        return sum(rows.maskable if normalisation == "nelbo" else rows.noised for rows in parts)

    def micro(self, indices: list[int], n: int) -> Rows:
        """Rows of the given samples of the stream, noised for global batch n."""
        step = 2 if self.complementary else 1
        where = self.mixture.locate([i // step for i in indices])
        arrays = [self.mixture.sources[source].read(sequence) for source, sequence in where]
        x0_BL, maskable_BL, document_BL, valid_BL = (
            torch.from_numpy(np.stack(part)) for part in zip(*arrays, strict=True)
        )
        noised = self._noised(indices, step, n, x0_BL, maskable_BL, document_BL, valid_BL)
        factors = [self.mixture.sources[source].weights(sequence) for source, sequence in where]
        if any(factor is not None for factor in factors):
            ones = np.ones(x0_BL.shape[1], dtype=np.float32)
            factor_BL = torch.from_numpy(np.stack([ones if factor is None else factor for factor in factors]))
            noised = replace(noised, weight_BL=noised.weight_BL * factor_BL)
        rows = self.layout_at(n).training_rows(noised)
        if self.fixed_shapes:
            unit = -(-x0_BL.numel() // 8)
            wanted = len(rows.source)
            return rows.padded(max(1, -(-wanted // unit)) * unit)
        return rows

    def _noised(
        self,
        indices: list[int],
        step: int,
        n: int,
        x0_BL: Tensor,
        maskable_BL: Tensor,
        document_BL: Tensor,
        valid_BL: Tensor,
    ) -> NoisedBatch:
        group_BL = torch.zeros_like(x0_BL)
        if self.process is None:
            nothing = torch.zeros_like(maskable_BL)
            return NoisedBatch(x0_BL, x0_BL, nothing, maskable_BL, nothing.float(), document_BL, valid_BL, group_BL)
        groups = 1
        if isinstance(layout := self.layout_at(n), Block):
            group_BL = layout.noise_groups(document_BL)
            groups = int(group_BL.max()) + 1
        stream = [i // step for i in indices]
        first, count = min(stream), max(stream) + 1 - min(stream)
        levels = stratified_levels(self.seed, first, count, batch=self.batch // step, groups=groups)
        levels = levels[[i - first for i in stream]]
        seeds = [int(generator(self.seed, i, purpose="noise").integers(2**62)) for i in stream]
        mirror = torch.tensor([i % 2 == 1 for i in indices]) if self.complementary else None
        ids_BL, noised_BL, weight_BL = self.process.corrupt(
            x0_BL, maskable_BL, group_BL, levels, seeds, form=self.form, mirror_B=mirror
        )
        annealed = self.annealing.matrix(n, x0_BL.shape[1]) if self.annealing else None
        return NoisedBatch(x0_BL, ids_BL, noised_BL, maskable_BL, weight_BL, document_BL, valid_BL, group_BL, annealed)
