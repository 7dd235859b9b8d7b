"""Which positions hold a token after a step. One small frozen class each, all with the same call.

A policy sees a `Step` (denoise.py) and returns bool (B, L): True where a token stands afterwards. Left out and
masked = still masked; left out though revealed = masked again. Ties go to the leftmost position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .denoise import Step


class Policy(Protocol):
    """Positions that hold a token after this step, bool (B, L)."""

    def __call__(self, step: Step) -> Tensor: ...


@dataclass(frozen=True)
class Ancestral:
    """Each masked token is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t), on its own.

    The reverse process itself (D3PM, arXiv 2107.03006). With T steps the law misses the model's by the tokens
    that are revealed together; it is exact only as T grows.
    """

    def __call__(self, step: Step) -> Tensor:
        return ~step.masked | (step.eligible & (step.uniforms["reveal"] < step.reveal_prob))


@dataclass(frozen=True)
class RandomOrder:
    """As many tokens as the schedule expects, in uniformly random order ("origin" in Dream)."""

    def __call__(self, step: Step) -> Tensor:
        return reveal_best(step, step.uniforms["order"])


@dataclass(frozen=True)
class TopConfidence:
    """The positions the model is surest of (MaskGIT, arXiv 2202.04200): highest maximum probability.

    of = "drawn" ranks by the probability of the token drawn instead. That is what the paper's released sampler does;
    at temperature 1 it does not sample the model's law even one token at a time (tests/sampling).
    """

    of: Literal["max", "drawn"] = "max"

    def __post_init__(self) -> None:
        if self.of not in ("max", "drawn"):
            raise ValueError(f"TopConfidence ranks of = 'max' or 'drawn', not {self.of!r}")

    def __call__(self, step: Step) -> Tensor:
        return reveal_best(step, confidence(step) if self.of == "max" else drawn_confidence(step))


@dataclass(frozen=True)
class Entropy:
    """The positions of lowest entropy (Dream, arXiv 2508.15487)."""

    def __call__(self, step: Step) -> Tensor:
        return reveal_best(step, -entropy(step))


@dataclass(frozen=True)
class Margin:
    """The positions where the best token leads the second by most (arXiv 2502.06768)."""

    def __call__(self, step: Step) -> Tensor:
        return reveal_best(step, margin(step))


@dataclass(frozen=True)
class Threshold:
    """Every position whose maximum probability reaches tau, at least one (Fast-dLLM, arXiv 2505.22618).

    When none does, `fallback` says which one is revealed: the most "confident" or the "leftmost".
    """

    tau: float = 0.9
    fallback: Literal["confident", "leftmost"] = "confident"

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError(f"the threshold must lie in (0, 1], not {self.tau}")
        if self.fallback not in ("confident", "leftmost"):
            raise ValueError(f"Threshold falls back to 'confident' or 'leftmost', not {self.fallback!r}")

    def __call__(self, step: Step) -> Tensor:
        sure = confidence(step)
        order = (
            sure if self.fallback == "confident" else -torch.arange(sure.shape[1], device=sure.device).expand_as(sure)
        )
        reached = step.eligible & (sure >= self.tau)
        one = top(order, step.eligible, (~reached.any(1)).long())
        return ~step.masked | reached | one


# --------------------------------------------------------------------------------------------- scores and selection


def spread(step: Step, values_M: Tensor) -> Tensor:
    """(B, L) of one value per masked row; -inf elsewhere."""
    out = torch.full(step.masked.shape, float("-inf"), dtype=values_M.dtype, device=values_M.device)
    out[step.masked] = values_M
    return out


def confidence(step: Step) -> Tensor:
    """Maximum probability at each masked position, (B, L), -inf elsewhere."""
    return spread(step, step.log_probs.max(-1).values.exp())


def drawn_confidence(step: Step) -> Tensor:
    """Probability of the proposed token at each masked position, (B, L), -inf elsewhere."""
    drawn = step.log_probs.gather(1, step.proposal[step.masked][:, None])[:, 0]
    return spread(step, drawn.exp())


def entropy(step: Step) -> Tensor:
    """Entropy in nats at each masked position, (B, L), inf elsewhere (callers negate it)."""
    values = torch.special.entr(step.log_probs.exp()).sum(-1)
    return torch.where(step.masked, spread(step, values), float("inf"))


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


def top(score_BL: Tensor, eligible_BL: Tensor, count_B: Tensor) -> Tensor:
    """The `count_B` eligible positions of highest score in each sample, bool (B, L)."""
    ranked = torch.where(eligible_BL, score_BL.double(), float("-inf")).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked).contiguous()
    place = torch.empty_like(ranked).scatter_(1, ranked, places)
    return eligible_BL & (place < count_B[:, None])


def reveal_best(step: Step, score_BL: Tensor) -> Tensor:
    """What stands, and the scheduled number of best-scored positions."""
    return ~step.masked | top(score_BL, step.eligible, scheduled_count(step))
