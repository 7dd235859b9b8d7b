"""Which positions hold a token after a step. One small frozen class each, all with the same call.

A policy sees a `Step` (step.py) and returns bool (B, L): True where a token stands afterwards. Left out and
masked = still masked; left out though revealed = masked again. Ties go to the leftmost position.

Any function from a step to such a tensor is a policy. Two class attributes are promises that save forwards:

    blind = True      it reads no predictions, so it is asked before the forward, with none in the step
    remasks = False   it never masks again what stands, so a sample may end at its end-of-text token
    remasks = True    it does, so the grid is walked to its end even while nothing is masked

Without a promise the loop takes no shortcut, and a sample without a mask is finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from .scores import confidence, drawn_confidence, entropy, margin, reveal_best, reveal_prefix, spread, top

if TYPE_CHECKING:
    from .step import Step


class Policy(Protocol):
    """Positions that hold a token after this step, bool (B, L)."""

    def __call__(self, step: Step) -> Tensor: ...


class Keeps:
    """What a policy inherits that never masks again what stands."""

    remasks: ClassVar[bool] = False


@dataclass(frozen=True)
class Ancestral(Keeps):
    """Each masked token is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t), on its own.

    The reverse process itself (D3PM, arXiv 2107.03006). With T steps the law misses the model's by the tokens
    that are revealed together; it is exact only as T grows. Steps that reveal nothing cost no forward, so a fine grid
    costs little more than one token a step (`FirstHitting` is its limit).
    """

    blind: ClassVar[bool] = True

    def __call__(self, step: Step) -> Tensor:
        return ~step.masked | (step.eligible & (step.uniforms["reveal"] < step.reveal_prob))


@dataclass(frozen=True)
class RandomOrder(Keeps):
    """As many tokens as the schedule expects, in uniformly random order ("origin" in Dream)."""

    blind: ClassVar[bool] = True

    def __call__(self, step: Step) -> Tensor:
        return reveal_best(step, step.uniforms["order"])


@dataclass(frozen=True)
class FirstHitting(Keeps):
    """One token a step in uniformly random order: the law of `Ancestral` as its steps grow without end.

    First-hitting sampling (arXiv 2409.02908): the times at which tokens are revealed order them uniformly, and a model
    that is not told the time needs only the order. One forward for each token; fewer steps than tokens are refused,
    since the last would reveal the rest together.
    """

    blind: ClassVar[bool] = True

    def __call__(self, step: Step) -> Tensor:
        left, steps = int(step.masked.sum(1).max()), step.steps - step.index
        if left > steps:
            raise ValueError(
                f"first-hitting order reveals one token a step: {left} masked tokens need {left} steps, not {steps}; "
                "give more steps, or use RandomOrder (`random`), which shares the tokens among few steps"
            )
        return ~step.masked | top(step.uniforms["order"], step.eligible, step.eligible.any(1).long())


@dataclass(frozen=True)
class TopConfidence(Keeps):
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
class Entropy(Keeps):
    """The positions of lowest entropy (Dream, arXiv 2508.15487)."""

    def __call__(self, step: Step) -> Tensor:
        return reveal_best(step, -entropy(step))


@dataclass(frozen=True)
class Margin(Keeps):
    """The positions where the best token leads the second by most (arXiv 2502.06768)."""

    def __call__(self, step: Step) -> Tensor:
        return reveal_best(step, margin(step))


@dataclass(frozen=True)
class Threshold(Keeps):
    """Every position whose maximum probability reaches tau, at least one (Fast-dLLM, arXiv 2505.22618).

    When none does, `fallback` says which one is revealed: the "leftmost" or, as in the source, the most "confident".
    The leftmost gave the likelier text at the same speed (docs/concepts/scores.md).
    """

    tau: float = 0.9
    fallback: Literal["leftmost", "confident"] = "leftmost"

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError(f"the threshold must lie in (0, 1], not {self.tau}")
        if self.fallback not in ("leftmost", "confident"):
            raise ValueError(f"Threshold falls back to 'leftmost' or 'confident', not {self.fallback!r}")

    def __call__(self, step: Step) -> Tensor:
        sure = confidence(step)
        order = (
            sure if self.fallback == "confident" else -torch.arange(sure.shape[1], device=sure.device).expand_as(sure)
        )
        reached = step.eligible & (sure >= self.tau)
        one = top(order, step.eligible, (~reached.any(1)).long())
        return ~step.masked | reached | one


@dataclass(frozen=True)
class Factor(Keeps):
    """The n most confident positions, n the largest with (n + 1) (1 - c_n) < f, c_n the n-th confidence; at least one.

    Fast-dLLM (arXiv 2505.22618): when each of n tokens is more probable than 1 - e and (n + 1) e <= 1, the greedy
    tokens taken together are those taken one by one. Hence f = 1; a smaller f reveals fewer.
    """

    f: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.f < float("inf"):
            raise ValueError(f"the factor must be a positive number, not {self.f}")

    def __call__(self, step: Step) -> Tensor:
        # 1 - c from the logarithm: c itself rounds to 1 where the model is sure.
        doubt_BL = spread(step, -torch.expm1(step.log_probs.amax(-1)), float("inf"))
        n_L = torch.arange(1, doubt_BL.shape[1] + 1, device=doubt_BL.device)
        return reveal_prefix(step, doubt_BL, lambda ordered_BL: (n_L + 1) * ordered_BL < self.f)


@dataclass(frozen=True)
class EntropyBound(Keeps):
    """The positions of lowest entropy, as many as keep (sum of their entropies) - (the largest) <= gamma, in nats.

    The EB sampler (arXiv 2505.24857): that difference bounds the error of drawing the tokens independently
    (the Kullback-Leibler divergence from drawing them one after the other). One position always qualifies.
    """

    gamma: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < float("inf"):
            raise ValueError(f"the entropy bound must be 0 or a positive number of nats, not {self.gamma}")

    def __call__(self, step: Step) -> Tensor:
        def passes(nats_BL: Tensor) -> Tensor:
            # In rising order the largest of a prefix is its last, so sum - max is the sum of those before it.
            before_BL = torch.cat([torch.zeros_like(nats_BL[:, :1]), nats_BL[:, :-1].cumsum(1)], 1)
            return before_BL <= self.gamma

        return reveal_prefix(step, entropy(step), passes)


@dataclass(frozen=True)
class Remask:
    """`Ancestral` that takes back: what was generated is masked again with probability sigma.

    ReMDM (arXiv 2503.00307). At most sigma_max = min(1, (1 - alpha_s) / alpha_t) keeps the share of masks at time s
    what the process says. kind "cap": sigma = min(eta, sigma_max); "rescale": sigma = eta * sigma_max. A mask is
    revealed with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), more often than in `Ancestral`, which
    is eta = 0. Meant for imperfect models, more steps than tokens and top_p < 1; with exact predictions it is farther
    from the model's law than `Ancestral` at as many steps, since more is drawn together (tests/sampling).

    What stands is not scored, a coin decides; given text always stands. A sample is final only when the steps are
    over, so nothing stops at an end-of-text token.
    """

    eta: float = 0.02
    kind: Literal["cap", "rescale"] = "cap"
    blind: ClassVar[bool] = True
    remasks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"the remasking rate eta must lie in [0, 1], not {self.eta}")
        if self.kind not in ("cap", "rescale"):
            raise ValueError(f"Remask limits eta by 'cap' or 'rescale', not {self.kind!r}")

    def rates(self, alpha_t: float, reveal_prob: float) -> tuple[float, float]:
        """(sigma, probability that a mask is revealed) of a step, `reveal_prob` being that without remasking."""
        still_masked = (1 - alpha_t) * (1 - reveal_prob)  # 1 - alpha_s
        most = min(1.0, still_masked / alpha_t) if alpha_t > 0 else 1.0
        sigma = min(self.eta, most) if self.kind == "cap" else self.eta * most
        return sigma, reveal_prob + sigma * alpha_t / (1 - alpha_t)

    def __call__(self, step: Step) -> Tensor:
        sigma, reveal = self.rates(step.alpha_t, step.reveal_prob)
        u = step.uniforms["reveal"]  # one number serves both: a position is masked or it stands
        return torch.where(step.masked, step.eligible & (u < reveal), u >= sigma)
