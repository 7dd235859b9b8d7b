"""The law of each decoding rule, by enumeration on the three-token toy (design: section 6).

The law is computed from the package's own policies and `apply`: at every state all proposals, and all outcomes of the
policy's uniforms, are followed with their probabilities.
"""

from __future__ import annotations

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
    Margin,
    Policy,
    RandomOrder,
    Step,
    Threshold,
    TopConfidence,
    denoise,
)
from diffulm.sampling.denoise import apply, committed

from ..toy import LAYOUT, MASK, PROCESS, TEXTS, L, Table, V, joint

P = joint()
EXACT = Table.exact(P)
Outcomes = Callable[[float], Iterator[tuple[float, dict[str, torch.Tensor]]]]


def no_randomness(reveal_prob: float) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
    zeros = torch.zeros(1, L, dtype=torch.float64)
    yield 1.0, {"reveal": zeros, "order": zeros}


def all_orders(reveal_prob: float) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
    for order in itertools.permutations((0.1, 0.5, 0.9)):
        yield 1 / 6, {"reveal": torch.zeros(1, L), "order": torch.tensor([order], dtype=torch.float64)}


def all_reveals(reveal_prob: float) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
    for shown in itertools.product([True, False], repeat=L):
        chance = np.prod([reveal_prob if r else 1 - reveal_prob for r in shown])
        yield float(chance), {"reveal": torch.tensor([[0.0 if r else 1.0 for r in shown]]), "order": torch.zeros(1, L)}


def law(policy: Policy, steps: int, outcomes: Outcomes) -> np.ndarray:
    """P(text) under `steps` steps of a policy at temperature 1."""
    yes = torch.ones(1, L, dtype=torch.bool)
    canvas = Canvas(torch.full((1, L), MASK), yes, yes)
    states = {tuple([MASK] * L): 1.0}
    for k in range(steps):
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        reveal = float(PROCESS.reveal_prob(s, t))
        following: dict[tuple[int, ...], float] = {}
        for state, weight in states.items():
            ids = torch.tensor([state])
            masked = ids == MASK
            if not masked.any():
                following[state] = following.get(state, 0.0) + weight
                continue
            where = masked[0].nonzero()[:, 0].tolist()
            log_probs = EXACT(LAYOUT.decoding_rows(ids, yes, masked)).log_softmax(-1)
            for tokens in itertools.product(range(V), repeat=len(where)):
                drawn = float(torch.stack([log_probs[r, tok] for r, tok in enumerate(tokens)]).sum().exp())
                proposal = ids.clone()
                proposal[0, where] = torch.tensor(tokens)
                for chance, uniforms in outcomes(reveal):
                    if chance * drawn == 0:
                        continue
                    step = Step(
                        k, steps, s, t, ids, masked, masked, log_probs, proposal, uniforms, reveal, committed(masked)
                    )
                    holds = policy(step) if k + 1 < steps else torch.ones_like(masked)
                    after = tuple(apply(step, holds, canvas, PROCESS)[0][0].tolist())
                    following[after] = following.get(after, 0.0) + weight * drawn * chance
        states = following
    assert all(MASK not in text for text in states), "a mask was left"
    return np.array([states.get(text, 0.0) for text in TEXTS])


TRUTH = np.array([P[text] for text in TEXTS])


def total_variation(a: np.ndarray) -> float:
    assert a.sum() == pytest.approx(1.0, abs=1e-12)
    return float(abs(a - TRUTH).sum() / 2)


@pytest.mark.parametrize(
    ("policy", "outcomes"),
    [(RandomOrder(), all_orders), (Entropy(), no_randomness), (Margin(), no_randomness),
     (TopConfidence(), no_randomness),
     (Threshold(1.0), no_randomness), (Threshold(1.0, "leftmost"), no_randomness)],
    ids=["random", "entropy", "margin", "confidence", "threshold", "threshold-leftmost"],
)  # fmt: skip
def test_one_token_a_step_reproduces_the_joint(policy: Policy, outcomes: Outcomes) -> None:
    assert total_variation(law(policy, L, outcomes)) < 1e-12


def test_ancestral_with_few_steps_misses_the_joint() -> None:
    """Tokens revealed together are drawn independently; the same test that the exact rules pass must fail here."""
    errors = [total_variation(law(Ancestral(), steps, all_reveals)) for steps in (1, 3, 12)]
    assert errors[0] > errors[1] > errors[2] > 0.03


def test_confidence_of_the_drawn_token_misses_the_joint() -> None:
    assert total_variation(law(TopConfidence(of="drawn"), L, no_randomness)) > 0.2


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


@pytest.mark.parametrize("policy", [RandomOrder(), Entropy(), Margin(), TopConfidence()], ids=str)
def test_the_loop_samples_that_law(policy: Policy) -> None:
    assert chi_square(policy) < 54.1  # 99.9% point at 26 degrees of freedom


def test_the_loop_misses_it_where_the_theorem_says() -> None:
    assert chi_square(TopConfidence(of="drawn")) > 500
