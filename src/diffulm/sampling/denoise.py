"""The one loop: from masks to text. Completion, infilling, streaming and display all consume this iterator.

What varies is handed in as values: the policy (which positions to reveal), the draw (which token), the layout (which
row predicts). Randomness is one seeded uniform per (sample, step, position, purpose), so a sample depends neither on
the samples beside it nor on the order of computation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..layout import Denoiser, Layout
from ..process import MaskedDiffusion
from ..runtime import uniforms
from .canvas import Canvas
from .draw import Draw
from .policies import Policy


@dataclass(frozen=True)
class Step:
    """One step from time t down to s. Given to the policy with the canvas before it, yielded with the canvas after.

    ids (B, L) int64; masked and eligible (B, L) bool: masked when the step began, and of these the ones it may
    reveal; log_probs (M, V): the model's log-probabilities at the masked positions in row-major order; proposal
    (B, L): the token drawn for each masked position; uniforms: (B, L) float64 for "reveal" and "order";
    reveal_prob: (alpha_s - alpha_t) / (1 - alpha_t); committed_upto (B,): leading positions without a mask, which
    will not change unless the policy masks again.
    """

    index: int
    steps: int
    s: float
    t: float
    ids: Tensor
    masked: Tensor
    eligible: Tensor
    log_probs: Tensor
    proposal: Tensor
    uniforms: Mapping[str, Tensor]
    reveal_prob: float
    committed_upto: Tensor

    @property
    def revealed(self) -> Tensor:
        """Positions this step gave a token (on a yielded step), bool (B, L)."""
        return self.masked & (self.ids == self.proposal)


@torch.no_grad()
def denoise(
    denoiser: Denoiser,
    process: MaskedDiffusion,
    canvas: Canvas,
    *,
    steps: int,
    policy: Policy,
    draw: Draw,
    layout: Layout,
    cache: Any = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[Step]:
    """Fill the holes of a canvas in at most `steps` forwards; yields after each.

    Time runs over a uniform grid from 1 to 0. The last step reveals whatever is left, so no mask remains; the loop
    ends early when nothing is masked. A token that stands is never ranked or drawn again, and the mask token is never
    drawn (its logit is -inf).

    Args:
        seeds: one per sample; default 0, 1, 2, ...
        cache: for block decoding; None.

    Raises:
        ValueError: steps < 1, or not one seed per sample.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    B, L = canvas.ids.shape
    seeds = list(range(B)) if seeds is None else list(seeds)
    if len(seeds) != B:
        raise ValueError(f"there are {len(seeds)} seeds for {B} samples; give one each")
    ids, device = canvas.ids.clone(), canvas.ids.device
    masked = canvas.editable & (ids == process.mask_token_id)
    for k in range(steps):
        if not bool(masked.any()):
            return
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        rows = layout.decoding_rows(ids, canvas.valid, masked)
        log_probs = denoiser(rows, cache=cache).log_softmax(-1)
        u_token = _uniforms(seeds, k, "token", L, device)
        proposal = ids.masked_scatter(masked, draw(log_probs, u_token[masked]))
        step = Step(
            index=k,
            steps=steps,
            s=s,
            t=t,
            ids=ids,
            masked=masked,
            eligible=masked,
            log_probs=log_probs,
            proposal=proposal,
            uniforms={purpose: _uniforms(seeds, k, purpose, L, device) for purpose in ("reveal", "order")},
            reveal_prob=float(process.reveal_prob(s, t)),
            committed_upto=committed(masked),
        )
        ids, masked = apply(step, policy(step) if k + 1 < steps else torch.ones_like(masked), canvas, process)
        yield replace(step, ids=ids, committed_upto=committed(masked))


def apply(step: Step, holds: Tensor, canvas: Canvas, process: MaskedDiffusion) -> tuple[Tensor, Tensor]:
    """(ids, masked) after a policy's decision: proposals where a masked position now holds, masks where it does not."""
    ids = torch.where(step.masked & holds, step.proposal, step.ids)
    ids = torch.where(canvas.editable & ~holds, process.mask_token_id, ids)
    return ids, canvas.editable & ~holds


def committed(masked: Tensor) -> Tensor:
    """(B,) length of the leading stretch without a mask."""
    L = masked.shape[1]
    first = masked.long().argmax(1)
    return torch.where(masked.any(1), first, L)


def _uniforms(seeds: Sequence[int], step: int, purpose: str, n: int, device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack([uniforms(seed, step, purpose=purpose, n=n) for seed in seeds])).to(device)
