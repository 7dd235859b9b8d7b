"""The one loop: from masks to text. Completion, infilling, streaming and display all consume this iterator.

What varies is handed in as values: the policy (which positions to reveal), the draw (which token), the layout (which
row predicts), the end (what makes the rest of a sample not worth a forward), the cache (which rows a forward need not
compute), bans (tokens that must not be drawn). Randomness is one seeded uniform per (sample, step, position, purpose),
so a sample depends neither on the samples beside it nor on the order of computation. That also makes the shortcuts
exact: a forward that is left out moves no other number.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..layout import Denoiser, Layout
from ..process import MaskedDiffusion
from .caches import Caching, Uncached
from .canvas import Canvas
from .constraints import Bans
from .draw import Draw
from .end import EndOfText
from .policies import Policy
from .step import Step, Uniforms, committed

#: Steps of a time grid at most. Beyond them nothing changes but the waiting: few steps have a token to reveal.
FINEST = 100_000


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
    cache: Caching | None = None,
    seeds: Sequence[int] | None = None,
    end: EndOfText | None = None,
    block: int | None = None,
    banned: Bans | None = None,
) -> Iterator[Step]:
    """Fill the holes of a canvas in at most `steps` forwards a block; yields after every step that changed something.

    Time runs over a uniform grid from 1 to 0. The last step reveals whatever is left, so no mask remains; the loop
    ends early when nothing is masked. A token that stands is never ranked or drawn again, and the mask token is never
    drawn (its logit is -inf). With blocks, each sample's first block with a hole is filled, then its next: every one on
    a time grid of its own.

    No forward without a change: while the canvas stands still, predictions are used again; a blind policy is asked
    before the forward, which is spent only where it reveals; samples without a wanted prediction, and padding that
    only they needed, are left out of the batch. So ancestral sampling takes at most min(steps, holes) forwards a sample
    however fine its grid (the idea of first hitting times, arXiv 2409.02908), with the tokens of the plain loop.

    Args:
        steps: steps of the canvas, or of each block.
        seeds: one per sample; default 0, 1, 2, ...
        cache: what forwards keep for later ones (caches.py), its slots empty: `BlockCache`, exact, for the block
            layout; `PrefixCache` or `DualCache`, approximate, for the full one. Default: nothing. Slots belong to
            samples, so with one a sample stays in the batch until its block's last forward.
        end: early stop, for completions. It acts only under a policy that says it never masks again (`remasks`).
        block: tokens filled together, positions counted from 0; default the layout's own size, else all of them.
        banned: tokens and sequences that must not appear (constraints.py); the policy ranks by what they leave.

    Raises:
        ValueError: steps < 1 or > 100,000, not one seed per sample, a block size that the layout was not trained for,
            a cache of another layout, or bans that leave no token.
    """
    B, L = canvas.ids.shape
    seeds = list(range(B)) if seeds is None else list(seeds)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if steps > FINEST:
        raise ValueError(
            f"steps must be at most {FINEST} (of a block, where there are blocks), not {steps}; as many steps as "
            "tokens are one token a step, and the policy first-hitting is the limit of ever more ancestral ones"
        )
    if len(seeds) != B:
        raise ValueError(f"there are {len(seeds)} seeds for {B} samples; give one each")
    trained = getattr(layout, "size", None)
    if block is not None and (block < 1 or trained not in (None, block)):
        raise ValueError(f"blocks of {block} tokens: this layout decodes {trained or 'at least 1'} at a time")
    cache = cache or Uncached()
    cache.check(layout)
    size = block or trained or L

    ids = canvas.ids
    for region in regions(canvas.editable, size):
        if end is not None and getattr(policy, "remasks", None) is False:
            region = region & (ids == process.mask_token_id)  # what an end of text has filled is done

        def predict(ids: Tensor, wanted: Tensor, region: Tensor = region) -> Tensor:
            """(N, V) log-probabilities at the wanted positions (one at least), in row-major order."""
            rows = cache.rows(layout, replace(canvas, ids=ids), wanted, region, size)
            log_probs = denoiser(rows, cache=cache.slots).log_softmax(-1)
            return log_probs if banned is None else banned(log_probs, ids, wanted)

        cache.begin()
        ids = yield from _fill(predict, process, canvas, ids, region, steps, policy, draw, seeds, end)


def regions(editable: Tensor, size: int) -> list[Tensor]:
    """What is filled one after the other, bool (B, L) each: entry r holds every sample's r-th block with a hole."""
    L = editable.shape[1]
    owner = torch.arange(L, device=editable.device) // size
    touched = torch.stack([(editable & (owner == k)).any(1) for k in range(int(owner[-1]) + 1)], 1)
    turn = (touched.cumsum(1) - 1).masked_fill(~touched, -1)  # (B, blocks): when each is filled
    return [editable & (turn == r)[:, owner] for r in range(int(turn.max()) + 1)]


def _fill(
    predict: Callable[[Tensor, Tensor], Tensor],
    process: MaskedDiffusion,
    canvas: Canvas,
    ids: Tensor,
    region: Tensor,
    steps: int,
    policy: Policy,
    draw: Draw,
    seeds: Sequence[int],
    end: EndOfText | None,
) -> Generator[Step, None, Tensor]:
    """Fill one region, bool (B, L), of the canvas that stands at `ids`; returns what it then holds."""
    L = ids.shape[1]
    blind, remasks = bool(getattr(policy, "blind", False)), getattr(policy, "remasks", None)
    masked = region & (ids == process.mask_token_id)
    none, nothing = torch.zeros_like(masked), torch.empty(0, process.mask_token_id + 1, device=ids.device)
    predictions: Tensor | None = None
    for k, (t, s, alpha_t, reveal_prob) in enumerate(_grid(process, steps)):
        if not bool(masked.any()) and (remasks is not True or k == 0):
            break
        everywhere = canvas.editable & (ids == process.mask_token_id)
        step = Step(
            k, steps, s, t, ids, masked, masked, none, nothing, draw, Uniforms(seeds, k, L, ids.device), reveal_prob,
            alpha_t, committed(everywhere), none,
        )  # fmt: skip
        last = k + 1 == steps
        holds = policy(step) | last if blind else None
        wanted = masked if holds is None else masked & holds
        if not bool(wanted.any()):
            predictions = nothing
        elif predictions is None or blind:
            predictions = predict(ids, wanted)
        step = replace(step, predicted=wanted, log_probs=predictions)
        if holds is None:
            holds = torch.ones_like(masked) if last else policy(step)
        if remasks is not True:  # a finished sample stays so, alone or beside others that go on
            holds = holds | ~masked.any(1, keepdim=True)
        after, left = apply(step, holds, region, process)
        if torch.equal(left, masked):
            continue
        everywhere = (everywhere & ~region) | left
        if end is not None and remasks is False:
            after, everywhere = end(after, everywhere, canvas.editable)
            left = left & everywhere
        yield replace(step, ids=after, committed_upto=committed(everywhere), revealed=masked & holds)
        ids, masked, predictions = after, left, None
    return ids


def apply(step: Step, holds: Tensor, region: Tensor, process: MaskedDiffusion) -> tuple[Tensor, Tensor]:
    """(ids, masked) after a policy's decision: proposals where a masked position now holds, masks where it does not.

    Positions outside the region, bool (B, L), stay as they are.
    """
    left = region & ~holds
    return step.filled(step.masked & holds).masked_fill(left, process.mask_token_id), left


def _grid(process: MaskedDiffusion, steps: int) -> list[tuple[float, float, float, float]]:
    """(t, s, alpha_t, reveal probability) of every step."""
    times = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    t, s = times[:-1], times[1:]
    columns = t, s, process.schedule.alpha(t), process.reveal_prob(s, t)
    return list(zip(*(column.tolist() for column in columns), strict=True))
