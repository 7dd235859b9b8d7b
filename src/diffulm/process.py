"""Absorbing-state (masked) diffusion: noise levels, corruption, and the probability of a reveal.

The vocabulary of the whole package. t = 0 clean, t = 1 fully masked; `alpha(t)` = probability that a token is still
clean; losses in nats; bool masks, True = yes. `maskable` = may be noised. A *level* is a noise quantile u in [0, 1).
Shape suffixes: B batch, L length, G noise groups (blocks; 1 for a whole sequence), R rows, N wanted rows, V vocabulary.

The continuous-time bound (arXiv 2410.17891) is an integral over t of weight(t) times the cross-entropy of
the masked tokens. Its *count form* draws instead the number l of masked tokens uniformly from 1..n and weights by
n / l: the same mean as the rate form at t_min = 0, without the noise of the count (docs/concepts/paper.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .runtime import generator, uniforms
from .schedule import Linear, Schedule

Form = Literal["count", "rate"]


@dataclass(frozen=True)
class MaskedDiffusion:
    """The process: no weights, no state, no random numbers of its own.

    `t_min` is the smallest time the rate form draws: the weight 1/t has infinite variance at 0. The count form
    does not use it, nor the schedule.
    """

    mask_token_id: int
    schedule: Schedule = field(default_factory=Linear)
    t_min: float = 1e-3

    def __post_init__(self) -> None:
        if self.mask_token_id < 0:
            raise ValueError(f"mask_token_id must be a token id, not {self.mask_token_id}")
        if not 0 <= self.t_min < 1:
            raise ValueError(f"t_min must lie in [0, 1), not {self.t_min}")

    def corrupt(
        self,
        x0_BL: Tensor,
        maskable_BL: Tensor,
        group_BL: Tensor,
        level_BG: Tensor,
        seeds_B: Sequence[int],
        *,
        form: Form = "count",
        mirror_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noised ids, which tokens were noised, and the weight of each in the bound.

        Args:
            x0_BL: clean token ids, int64.
            maskable_BL: bool; nothing else is ever noised.
            group_BL: int64 in 0..G-1, the noise group of each token; groups have independent noise levels.
            level_BG: float64 quantiles in [0, 1): l = 1 + floor(level * n) (count) or
                t = t_min + (1 - t_min) * level (rate).
            seeds_B: one seed per sample; a sample's noise depends on nothing else.
            form: "count" or "rate".
            mirror_B: bool, samples that take the complement of the mask their level and seed give
                (count form only). A group whose every token is noised stays so, which keeps the mirrored
                count uniform on 1..n and the estimate unbiased.

        Returns:
            ids_BL int64, noised_BL bool, weight_BL float32 (n / l or -alpha'/(1 - alpha) where noised, else 0):
            the sum over noised tokens of weight * cross-entropy estimates the bound in nats.
        """
        if form not in ("count", "rate"):
            raise ValueError(f"unknown form {form!r}: use count or rate")
        if mirror_B is not None and form == "rate":
            raise ValueError("complementary masks need form = 'count': the rate form has no fixed count to mirror")
        B, L = x0_BL.shape
        G = level_BG.shape[1]
        u_BL = torch.from_numpy(np.stack([uniforms(int(s), purpose="noise", n=L) for s in seeds_B]))
        if form == "rate":
            t_BG = self.t_min + (1 - self.t_min) * level_BG.double()
            rate_BL = (1 - self.schedule.alpha(t_BG)).gather(1, group_BL)
            weight_BL = self.schedule.weight(t_BG).gather(1, group_BL)
            noised_BL = maskable_BL & (u_BL < rate_BL)
        else:
            n_BG = torch.zeros(B, G, dtype=torch.long).scatter_add_(1, group_BL, maskable_BL.long())
            l_BG = (1 + (level_BG.double() * n_BG).floor().long()).clamp(max=n_BG)
            rank_BL = _rank_in_group(u_BL, maskable_BL, group_BL, n_BG)
            if mirror_B is not None:
                mirror_B1 = mirror_B[:, None]
                rank_BL = torch.where(mirror_B1, n_BG.gather(1, group_BL) - 1 - rank_BL, rank_BL)
                l_BG = torch.where(mirror_B1 & (l_BG < n_BG), n_BG - l_BG, l_BG)
            noised_BL = maskable_BL & (rank_BL < l_BG.gather(1, group_BL))
            weight_BL = (n_BG.double() / l_BG.clamp(min=1)).gather(1, group_BL)
        ids_BL = x0_BL.masked_fill(noised_BL, self.mask_token_id)
        return ids_BL, noised_BL, weight_BL.masked_fill(~noised_BL, 0.0).float()

    def reveal_prob(self, s: float | Tensor, t: float | Tensor) -> Tensor:
        """Probability that a token masked at t is revealed by s < t: (alpha_s - alpha_t) / (1 - alpha_t), float64."""
        s, t = torch.as_tensor(s, dtype=torch.float64), torch.as_tensor(t, dtype=torch.float64)
        if not bool(((s >= 0) & (s < t) & (t <= 1)).all()):
            raise ValueError(f"reveal_prob needs 0 <= s < t <= 1, not s = {s}, t = {t}")
        alpha_s, alpha_t = self.schedule.alpha(s), self.schedule.alpha(t)
        return (alpha_s - alpha_t) / (1 - alpha_t)


def _rank_in_group(u_BL: Tensor, maskable_BL: Tensor, group_BL: Tensor, n_BG: Tensor) -> Tensor:
    """Rank of each maskable token's uniform among the maskable tokens of its group; others get garbage."""
    # Sorting group + u sorts by group first; what may not be masked goes behind everything.
    order_BL = (group_BL + u_BL).masked_fill(~maskable_BL, float("inf")).argsort(dim=1, stable=True)
    place_BL = torch.empty_like(order_BL).scatter_(
        1, order_BL, torch.arange(order_BL.shape[1]).expand_as(order_BL).contiguous()
    )
    first_BG = n_BG.cumsum(1) - n_BG
    return place_BL - first_BG.gather(1, group_BL)


def stratified_levels(
    seed: int, first: int, count: int, *, batch: int, groups: int = 1, purpose: str = "level"
) -> Tensor:
    """Noise quantiles of samples first..first+count-1 of the stream, (count, groups) float64 in [0, 1).

    Within each global batch of `batch` samples the quantiles form a systematic grid with one random offset per
    group, so every batch covers all noise levels evenly. They depend on (seed, stream index, batch) alone: the same
    on one process or many, and for any accumulation.
    """
    index = np.arange(first, first + count)
    out = np.empty((count, groups))
    for n in np.unique(index // batch):
        offset_G = uniforms(seed, int(n), purpose=purpose, n=groups)
        here = index // batch == n
        # Each group walks the grid in its own order, else the blocks of a sample would share one stratum.
        slots = np.stack([generator(seed, int(n), g, purpose=purpose).permutation(batch) for g in range(groups)], 1)
        out[here] = (slots[index[here] % batch] + offset_G) / batch
    return torch.from_numpy(out)
