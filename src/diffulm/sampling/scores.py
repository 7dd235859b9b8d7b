"""How sure the model is of each position, and picking positions by that."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .step import Step

#: Rows as wide as the vocabulary that a CPU works on at a time: so many stay in its cache. An accelerator takes more.
ROWS = 4


def spread(step: Step, values_N: Tensor, elsewhere: float = float("-inf")) -> Tensor:
    """(B, L) of one value per predicted position."""
    out = torch.full(step.predicted.shape, elsewhere, dtype=values_N.dtype, device=values_N.device)
    return out.masked_scatter(step.predicted, values_N)


def confidence(step: Step) -> Tensor:
    """Highest probability of any token at each predicted position, (B, L), -inf elsewhere."""
    return spread(step, step.log_probs.amax(-1).exp())


def drawn_confidence(step: Step) -> Tensor:
    """Probability of the proposed token at each predicted position, (B, L), -inf elsewhere."""
    drawn = step.log_probs.gather(1, step.proposal[step.predicted][:, None])[:, 0]
    return spread(step, drawn.exp())


def entropy(step: Step) -> Tensor:
    """Entropy in nats at each predicted position, (B, L), inf elsewhere (callers negate it)."""
    values = torch.empty_like(step.log_probs[:, 0])
    lowest = torch.finfo(values.dtype).min  # 0 * -inf would be NaN
    rows = ROWS if values.device.type == "cpu" else 16 * ROWS
    for i in range(0, len(values), rows):
        part = step.log_probs[i : i + rows]
        values[i : i + rows] = -(part.exp() * part.clamp(min=lowest)).sum(-1)
    return spread(step, values, float("inf"))


def margin(step: Step) -> Tensor:
    """Lead of the best token over the second in probability, (B, L), -inf elsewhere."""
    best = step.log_probs.topk(2, dim=-1).values.exp()
    return spread(step, best[:, 0] - best[:, 1])


def scheduled_count(step: Step) -> Tensor:
    """(B,) tokens to reveal so that the expected share stays masked, at least one while any is masked."""
    masked = step.eligible.sum(1)
    # The small term keeps a product like 3 * (1 - 1/3) from falling below 2.
    keep = (masked.double() * (1 - step.reveal_prob) + 1e-9).floor().long()
    return torch.minimum((masked - keep).clamp(min=1), masked)


def ranking(score_BL: Tensor, eligible_BL: Tensor) -> Tensor:
    """Positions from the best score to the worst, int64 (B, L); those not eligible come last, ties go left."""
    return torch.where(eligible_BL, score_BL.double(), float("-inf")).argsort(dim=1, descending=True, stable=True)


def top(score_BL: Tensor, eligible_BL: Tensor, count_B: Tensor) -> Tensor:
    """The `count_B` eligible positions of highest score in each sample, bool (B, L)."""
    return first_ranked(ranking(score_BL, eligible_BL), eligible_BL, count_B)


def first_ranked(ranked_BL: Tensor, eligible_BL: Tensor, count_B: Tensor) -> Tensor:
    """The first `count_B` eligible positions of a ranking, bool (B, L)."""
    places = torch.arange(ranked_BL.shape[1], device=ranked_BL.device).expand_as(ranked_BL).contiguous()
    place = torch.empty_like(ranked_BL).scatter_(1, ranked_BL, places)
    return eligible_BL & (place < count_B[:, None])


def reveal_best(step: Step, score_BL: Tensor) -> Tensor:
    """What stands, and the scheduled number of best-scored positions."""
    return ~step.masked | top(score_BL, step.eligible, scheduled_count(step))


def reveal_prefix(step: Step, cost_BL: Tensor, passes: Callable[[Tensor], Tensor]) -> Tensor:
    """What stands, and the positions of lowest cost up to the first that does not pass; at least one.

    `passes` gets the costs in rising order, float64 (B, L), and answers for each place, bool (B, L).
    """
    ranked = ranking(-cost_BL, step.eligible)
    count = passes(cost_BL.double().gather(1, ranked)).long().cumprod(1).sum(1).clamp(min=1)
    return ~step.masked | first_ranked(ranked, step.eligible, count)
