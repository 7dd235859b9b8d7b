"""The training objective: one weighted sum of cross-entropies, whatever the layout.

`diffusion_loss` returns a sum and a count, never a mean: the training loop adds the sums of all micro-batches and
ranks and divides once by the global count, so accumulation and data parallelism are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .layout import Denoiser, Rows

Normalisation = Literal["nelbo", "masked"]
#: Bins of `Loss.by_level`: 0 holds clean (AR) rows, k in 1..10 the levels in ((k-1)/10, k/10].
LEVEL_BINS = 11


@dataclass(frozen=True)
class Loss:
    """sum: weighted nats, a scalar with gradient; count: the tokens to divide by, known on the host;
    by_level: (LEVEL_BINS, 2) float32, unweighted nats and number of predictions per noise level, no gradient."""

    sum: Tensor
    count: int
    by_level: Tensor


def diffusion_loss(denoiser: Denoiser, rows: Rows, *, normalisation: Normalisation = "nelbo") -> Loss:
    """The continuous-time objective of arXiv 2410.17891 on one micro-batch of rows, as a sum in nats and a count.

    `normalisation` "nelbo" counts the maskable tokens (sum / count is the bound per token); "masked" counts the
    noised ones, as the paper's released code does (about twice as large, a ratio estimator).
    With nothing noised the sum is 0 and still has a gradient (of zeros), so no rank of a group is left waiting.
    """
    nll_N = denoiser.nll(rows)
    nll_N = nll_N.to(torch.promote_types(nll_N.dtype, torch.float32))
    total = (nll_N * rows.weight).sum()
    bins_N = (rows.level * (LEVEL_BINS - 1)).ceil().long().clamp(0, LEVEL_BINS - 1)
    seen_N = (rows.weight > 0).float()
    by_level = torch.zeros(LEVEL_BINS, 2, device=nll_N.device)
    by_level.index_add_(0, bins_N, torch.stack([nll_N.detach().float() * seen_N, seen_N], 1))
    return Loss(total, rows.maskable if normalisation == "nelbo" else rows.noised, by_level)
