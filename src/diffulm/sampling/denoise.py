"""The one loop: from masks to text. Completion, infilling, streaming and display all consume this iterator.

What varies is handed in as values: the policy (which positions to reveal), the draw (which token), the layout (which
row predicts), the end (what makes the rest of a sample not worth a forward). Randomness is one seeded uniform per
(sample, step, position, purpose), so a sample depends neither on the samples beside it nor on the order of
computation. That also makes the shortcuts exact: a forward that is left out moves no other number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..layout import Denoiser, Layout
from ..process import MaskedDiffusion
from .canvas import Canvas
from .draw import Draw
from .end import EndOfText
from .policies import Policy
from .step import Step, Uniforms, committed


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
    end: EndOfText | None = None,
) -> Iterator[Step]:
    """Fill the holes of a canvas in at most `steps` forwards; yields after every step that changed something.

    Time runs over a uniform grid from 1 to 0. The last step reveals whatever is left, so no mask remains; the loop
    ends early when nothing is masked. A token that stands is never ranked or drawn again, and the mask token is never
    drawn (its logit is -inf).

    No forward without a change: while the canvas stands still, predictions are used again; a blind policy is asked
    before the forward, which is spent only where it reveals; samples without a wanted prediction, and padding that
    only they needed, are left out of the batch. So ancestral sampling takes at most min(steps, holes) forwards a sample
    however fine its grid (the idea of first hitting times, arXiv 2409.02908), with the tokens of the plain loop.

    Args:
        seeds: one per sample; default 0, 1, 2, ...
        cache: for block decoding; None. Its slots belong to samples, so with one the batch stays whole.
        end: early stop, for completions. It acts only under a policy that says it never masks again (`remasks`).

    Raises:
        ValueError: steps < 1, or not one seed per sample.
    """
    B, L = canvas.ids.shape
    seeds = list(range(B)) if seeds is None else list(seeds)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if len(seeds) != B:
        raise ValueError(f"there are {len(seeds)} seeds for {B} samples; give one each")
    blind, remasks = bool(getattr(policy, "blind", False)), getattr(policy, "remasks", None)
    ids, masked = canvas.ids.clone(), canvas.editable & (canvas.ids == process.mask_token_id)
    none, nothing = torch.zeros_like(masked), torch.empty(0, process.mask_token_id + 1, device=ids.device)
    predictions: Tensor | None = None
    for k, (t, s, alpha_t, reveal_prob) in enumerate(_grid(process, steps)):
        if not bool(masked.any()) and (remasks is not True or k == 0):
            return
        step = Step(
            k, steps, s, t, ids, masked, masked, none, nothing, draw, Uniforms(seeds, k, L, ids.device), reveal_prob,
            alpha_t, committed(masked), none,
        )  # fmt: skip
        last = k + 1 == steps
        holds = policy(step) | last if blind else None
        wanted = masked if holds is None else masked & holds
        if not bool(wanted.any()):
            predictions = nothing
        elif predictions is None or blind:
            predictions = _predict(denoiser, layout, canvas, ids, wanted, cache)
        step = replace(step, predicted=wanted, log_probs=predictions)
        if holds is None:
            holds = torch.ones_like(masked) if last else policy(step)
        if remasks is not True:  # a finished sample stays so, alone or beside others that go on
            holds = holds | ~masked.any(1, keepdim=True)
        after, left = apply(step, holds, canvas, process)
        if torch.equal(left, masked):
            continue
        if end is not None and remasks is False:
            after, left = end(after, left, canvas.editable)
        yield replace(step, ids=after, committed_upto=committed(left), revealed=masked & holds)
        ids, masked, predictions = after, left, None


def apply(step: Step, holds: Tensor, canvas: Canvas, process: MaskedDiffusion) -> tuple[Tensor, Tensor]:
    """(ids, masked) after a policy's decision: proposals where a masked position now holds, masks where it does not."""
    left = canvas.editable & ~holds
    return step.filled(step.masked & holds).masked_fill(left, process.mask_token_id), left


def _grid(process: MaskedDiffusion, steps: int) -> list[tuple[float, float, float, float]]:
    """(t, s, alpha_t, reveal probability) of every step."""
    times = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    t, s = times[:-1], times[1:]
    columns = t, s, process.schedule.alpha(t), process.reveal_prob(s, t)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _predict(denoiser: Denoiser, layout: Layout, canvas: Canvas, ids: Tensor, wanted: Tensor, cache: Any) -> Tensor:
    """(N, V) log-probabilities at the wanted positions (one at least), in row-major order."""
    valid = canvas.valid
    if cache is None:
        here = wanted.any(1)
        length = int(valid[here].sum(1).max())  # padding is on the right
        ids, valid, wanted = ids[here, :length], valid[here, :length], wanted[here, :length]
    return denoiser(layout.decoding_rows(ids, valid, wanted), cache=cache).log_softmax(-1)
