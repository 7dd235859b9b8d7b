"""The law of each decoding rule, by enumeration on the three-token toy (design: section 6).

The law is computed from the package's own policies and `apply`: at every state all proposals, and all outcomes of the
policy's uniforms, are followed with their probabilities.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from diffulm.sampling import (
    Ancestral,
    Canvas,
    Draw,
    Entropy,
    EntropyBound,
    Factor,
    FirstHitting,
    Margin,
    Policy,
    RandomOrder,
    Remask,
    Step,
    Threshold,
    TopConfidence,
    denoise,
)
from diffulm.sampling.denoise import apply
from diffulm.sampling.step import committed

from ..toy import LAYOUT, MASK, PROCESS, TEXTS, L, Table, V, joint

P = joint()
EXACT = Table.exact(P)
#: (alpha_t, reveal probability, masked) -> each outcome of the policy's uniforms with its probability.
Outcomes = Callable[[float, float, list[bool]], Iterator[tuple[float, dict[str, torch.Tensor]]]]


def no_randomness(
    alpha_t: float, reveal_prob: float, masked: list[bool]
) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
    zeros = torch.zeros(1, L, dtype=torch.float64)
    yield 1.0, {"reveal": zeros, "order": zeros}


def all_orders(
    alpha_t: float, reveal_prob: float, masked: list[bool]
) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
    for order in itertools.permutations((0.1, 0.5, 0.9)):
        yield 1 / 6, {"reveal": torch.zeros(1, L), "order": torch.tensor([order], dtype=torch.float64)}


def all_reveals(
    alpha_t: float, reveal_prob: float, masked: list[bool]
) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
    for shown in itertools.product([True, False], repeat=L):
        chance = np.prod([reveal_prob if r else 1 - reveal_prob for r in shown])
        yield float(chance), {"reveal": torch.tensor([[0.0 if r else 1.0 for r in shown]]), "order": torch.zeros(1, L)}


def reveals_and_remasks(policy: Remask) -> Outcomes:
    """A mask is revealed and a token taken back, each on its own: uniforms just below and just above the rates."""

    def outcomes(
        alpha_t: float, reveal_prob: float, masked: list[bool]
    ) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
        sigma, reveal = policy.rates(alpha_t, reveal_prob)
        rates = [reveal if m else sigma for m in masked]
        for low in itertools.product([True, False], repeat=L):
            chance = np.prod([r if yes else 1 - r for yes, r in zip(low, rates, strict=True)])
            u = [max(r - 1e-9, 0.0) if yes else r for yes, r in zip(low, rates, strict=True)]
            yield float(chance), {"reveal": torch.tensor([u], dtype=torch.float64)}

    return outcomes


def law(policy: Policy, steps: int, outcomes: Outcomes, shares: list[float] | None = None) -> np.ndarray:
    """P(text) under `steps` steps of a policy at temperature 1; `shares` is given the share of masks after each."""
    yes = torch.ones(1, L, dtype=torch.bool)
    canvas = Canvas(torch.full((1, L), MASK), yes, yes)
    states = {tuple([MASK] * L): 1.0}
    for k in range(steps):
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        reveal, alpha = float(PROCESS.reveal_prob(s, t)), 1 - t
        following: dict[tuple[int, ...], float] = {}
        for state, weight in states.items():
            ids = torch.tensor([state])
            masked = ids == MASK
            if not masked.any() and not isinstance(policy, Remask):
                following[state] = following.get(state, 0.0) + weight
                continue
            where = masked[0].nonzero()[:, 0].tolist()
            log_probs = EXACT(LAYOUT.decoding_rows(ids, yes, masked)).log_softmax(-1)
            for tokens in itertools.product(range(V), repeat=len(where)):
                drawn = float(sum(log_probs[r, tok] for r, tok in enumerate(tokens)).exp()) if tokens else 1.0
                # The uniforms carry the tokens of this branch, and the draw reads them off.
                token = torch.zeros(1, L, dtype=torch.float64)
                token[0, where] = torch.tensor(tokens, dtype=torch.float64)
                for chance, uniforms in outcomes(alpha, reveal, masked[0].tolist()):
                    if chance * drawn == 0:
                        continue
                    step = Step(
                        k, steps, s, t, ids, masked, masked, masked, log_probs, lambda _, u: u.long(),
                        {**uniforms, "token": token}, reveal, alpha, committed(masked), torch.zeros_like(masked),
                    )  # fmt: skip
                    holds = policy(step) if k + 1 < steps else torch.ones_like(masked)
                    after = tuple(apply(step, holds, canvas.editable, PROCESS)[0][0].tolist())
                    following[after] = following.get(after, 0.0) + weight * drawn * chance
        states = following
        if shares is not None:
            shares.append(sum(p * text.count(MASK) / L for text, p in states.items()))
    assert all(MASK not in text for text in states), "a mask was left"
    return np.array([states.get(text, 0.0) for text in TEXTS])


TRUTH = np.array([P[text] for text in TEXTS])


def total_variation(a: np.ndarray) -> float:
    assert a.sum() == pytest.approx(1.0, abs=1e-12)
    return float(abs(a - TRUTH).sum() / 2)


@pytest.mark.parametrize(
    ("policy", "outcomes"),
    [(RandomOrder(), all_orders), (Entropy(), no_randomness), (Margin(), no_randomness),
     (TopConfidence(), no_randomness), (FirstHitting(), all_orders),
     (Threshold(1.0), no_randomness), (Threshold(1.0, "confident"), no_randomness),
     (Factor(1e-9), no_randomness), (EntropyBound(0.0), no_randomness)],
    ids=["random", "entropy", "margin", "confidence", "first-hitting", "threshold", "threshold-confident", "factor",
         "entropy-bound"],
)  # fmt: skip
def test_one_token_a_step_reproduces_the_joint(policy: Policy, outcomes: Outcomes) -> None:
    assert total_variation(law(policy, L, outcomes)) < 1e-12


def test_ancestral_with_few_steps_misses_the_joint() -> None:
    """Tokens revealed together are drawn independently; the same test that the exact rules pass must fail here."""
    errors = [total_variation(law(Ancestral(), steps, all_reveals)) for steps in (1, 3, 12)]
    assert errors[0] > errors[1] > errors[2] > 0.03


def test_confidence_of_the_drawn_token_misses_the_joint() -> None:
    assert total_variation(law(TopConfidence(of="drawn"), L, no_randomness)) > 0.2


def test_first_hitting_is_the_limit_of_ancestral() -> None:
    """The difference goes to nothing like 1 / T."""
    limit = law(FirstHitting(), L, all_orders)
    errors = [abs(law(Ancestral(), steps, all_reveals) - limit).sum() / 2 for steps in (4, 8, 16)]
    assert errors[0] > 0.06
    for coarse, fine in itertools.pairwise(errors):
        assert 1.7 < coarse / fine < 2.3


@pytest.mark.parametrize("policy", [Remask(0.5), Remask(0.1, "rescale")], ids=str)
def test_remasking_keeps_the_schedule_exactly_but_does_not_near_the_joint(policy: Remask) -> None:
    """Each step leaves the share of masks at 1 - alpha_s. With exact predictions that buys nothing: what is taken back
    must be revealed again, so more tokens are drawn together than in ancestral sampling of as many steps."""
    shares: list[float] = []
    steps = 6
    error = total_variation(law(policy, steps, reveals_and_remasks(policy), shares))
    assert shares == pytest.approx([1 - (k + 1) / steps for k in range(steps)], abs=1e-12)
    plain = total_variation(law(Remask(0.0), steps, reveals_and_remasks(Remask(0.0))))
    assert plain == pytest.approx(total_variation(law(Ancestral(), steps, all_reveals)), abs=1e-12)
    assert error > plain + 1e-3


# --------------------------------------------------------------------------------- the theorems behind parallel rules


def chosen_together(policy: Policy, seed: int, shape: float) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Of a random joint, for every state: the joint of the positions a policy reveals at once, and their marginals."""
    p = np.random.default_rng(seed).gamma(shape, size=(V,) * L) + 1e-9
    table = Table.exact(p / p.sum())
    yes = torch.ones(1, L, dtype=torch.bool)
    for state in itertools.product(range(V + 1), repeat=L):
        ids = torch.tensor([state])
        masked = ids == MASK
        if int(masked.sum()) < 2:
            continue
        log_probs = table(LAYOUT.decoding_rows(ids, yes, masked))
        step = Step(
            0, 9, 0.5, 1.0, ids, masked, masked, masked, log_probs, Draw(), {}, 0.5, 0.0, committed(masked), ~yes
        )
        at = (policy(step) & masked)[0].nonzero()[:, 0].tolist()
        view = p[tuple(slice(None) if t == MASK else slice(t, t + 1) for t in state)]
        joint_of = view.sum(axis=tuple(i for i in range(L) if i not in at))
        joint_of = joint_of / joint_of.sum()
        marginals = [joint_of.sum(axis=tuple(j for j in range(len(at)) if j != i)) for i in range(len(at))]
        if len(at) > 1:
            yield joint_of, marginals


def divergences(gamma: float) -> list[float]:
    """Nats from the product of the marginals to the joint, for every set revealed together."""
    out = []
    for seed in range(30):
        for joint_of, marginals in chosen_together(EntropyBound(gamma), seed, 0.05):
            product = functools.reduce(np.multiply.outer, marginals)
            out.append(float((joint_of * np.log(joint_of / product)).sum()))
    return out


@pytest.mark.parametrize("gamma", [0.02, 0.1, 0.4])
def test_the_entropy_bound_bounds_the_error_of_drawing_together(gamma: float) -> None:
    found = divergences(gamma)
    assert len(found) > 20
    assert max(found) <= gamma + 1e-12


def test_the_entropy_bound_is_not_idle() -> None:
    """A wider one lets larger errors pass, so the test above can fail."""
    assert max(divergences(2.0)) > 0.4


def agreement(f: float) -> list[bool]:
    """Whether the most probable tokens of each position are the most probable text, for every set revealed together."""
    return [
        np.unravel_index(joint_of.argmax(), joint_of.shape) == tuple(int(m.argmax()) for m in marginals)
        for seed in range(40)
        for joint_of, marginals in chosen_together(Factor(f), seed, 0.15)
    ]


def test_factor_1_takes_the_greedy_tokens_that_greedy_one_by_one_takes() -> None:
    found = agreement(1.0)
    assert len(found) > 50
    assert all(found)
    assert not all(agreement(1.9))  # beyond 1 there is no such theorem


def chi_square(policy: Policy, n: int = 6000) -> float:
    """Of `denoise` end to end, n seeded samples in one batch, against the joint; rare texts pooled."""
    yes = torch.ones(n, L, dtype=torch.bool)
    canvas = Canvas(torch.full((n, L), MASK), yes, yes)
    *_, last = denoise(EXACT, PROCESS, canvas, steps=L, policy=policy, draw=Draw(), layout=LAYOUT)
    counts = np.zeros(len(TEXTS))
    for text in last.ids.tolist():
        counts[TEXTS.index(tuple(text))] += 1
    rare = TRUTH * n < 5
    seen, expected = np.append(counts[~rare], counts[rare].sum()), np.append(TRUTH[~rare], TRUTH[rare].sum()) * n
    return float(((seen - expected) ** 2 / expected.clip(1e-9)).sum())


@pytest.mark.parametrize(
    "policy", [RandomOrder(), FirstHitting(), Entropy(), Margin(), TopConfidence(), EntropyBound(0.0)], ids=str
)
def test_the_loop_samples_that_law(policy: Policy) -> None:
    assert chi_square(policy) < 54.1  # 99.9% point at 26 degrees of freedom


def test_the_loop_misses_it_where_the_theorem_says() -> None:
    assert chi_square(TopConfidence(of="drawn")) > 500
