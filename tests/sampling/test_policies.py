"""What every policy promises, and each one's rule against a plain reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffulm.process import MaskedDiffusion
from diffulm.sampling import (
    Ancestral,
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
from diffulm.sampling.canvas import Canvas
from diffulm.sampling.denoise import committed
from diffulm.sampling.policies import confidence, drawn_confidence, entropy, margin, scheduled_count, top
from diffulm.schedule import Cosine, Linear, Polynomial, Schedule

from ..toy import LAYOUT, Noise

V = 7
MASK = V - 1
INF = float("inf")


def step_of(
    masked: list[list[bool]],
    *,
    eligible: list[list[bool]] | None = None,
    log_probs: torch.Tensor | None = None,
    reveal_prob: float = 0.5,
    seed: int = 0,
) -> Step:
    """A step with random predictions, proposals and uniforms for everything not given."""
    generator = torch.Generator().manual_seed(seed)
    masked_BL = torch.tensor(masked)
    if log_probs is None:
        log_probs = torch.randn(int(masked_BL.sum()), V, generator=generator, dtype=torch.float64) * 2
        log_probs[:, MASK] = -INF
        log_probs = log_probs.log_softmax(-1)
    ids = torch.randint(0, MASK, masked_BL.shape, generator=generator).masked_fill(masked_BL, MASK)
    proposal = torch.where(masked_BL, torch.randint(0, MASK, masked_BL.shape, generator=generator), ids)
    uniforms = {
        name: torch.rand(masked_BL.shape, generator=generator, dtype=torch.float64) for name in ("reveal", "order")
    }
    return Step(
        index=0, steps=4, s=0.5, t=1.0, ids=ids, masked=masked_BL,
        eligible=masked_BL if eligible is None else torch.tensor(eligible) & masked_BL,
        log_probs=log_probs, proposal=proposal, uniforms=uniforms, reveal_prob=reveal_prob,
        committed_upto=committed(masked_BL),
    )  # fmt: skip


def probs_of(values: list[list[float]]) -> torch.Tensor:
    """Log-probabilities with a mask column from rows of MASK probabilities."""
    return torch.tensor([[*row, 0.0] for row in values], dtype=torch.float64).log()


COUNTED = [RandomOrder(), TopConfidence(), TopConfidence("drawn"), Entropy(), Margin()]
THRESHOLDS = [Threshold(0.5), Threshold(0.5, "leftmost"), Threshold(1.0), Threshold(1e-6)]
ALL: list[Policy] = [Ancestral(), *COUNTED, *THRESHOLDS]

grids_st = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4)
)


# ------------------------------------------------------------------------------------------- what all of them promise


@pytest.mark.parametrize("policy", ALL, ids=str)
@given(grids_st, st.integers(0, 2**9 - 1), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_every_policy_keeps_what_stands_and_reveals_only_what_it_may(
    policy: Policy, masked: list[list[bool]], bits: int, reveal_prob: float, seed: int
) -> None:
    """Samples with different numbers of masks, none among them; some masks not eligible."""
    eligible = [[bool(bits >> i & 1) for i in range(len(row))] for row in masked]
    step = step_of(masked, eligible=eligible, reveal_prob=reveal_prob, seed=seed)
    holds = policy(step)
    assert holds.shape == step.masked.shape
    assert holds.dtype == torch.bool
    assert holds[~step.masked].all()
    revealed = holds & step.masked
    assert not (revealed & ~step.eligible).any()
    if not isinstance(policy, Ancestral):
        assert torch.equal(revealed.any(1), step.eligible.any(1))
    if policy in COUNTED:
        assert torch.equal(revealed.sum(1), scheduled_count(step))


@pytest.mark.parametrize("policy", ALL, ids=str)
def test_a_sample_is_decided_without_its_batch_mates(policy: Policy) -> None:
    masked = [[True] * 6, [False, True, False, True, True, False], [False] * 6, [True, *[False] * 4, True]]
    step = step_of(masked, reveal_prob=0.4, seed=3)
    together, first = policy(step), 0
    for b, row in enumerate(masked):
        n = sum(row)
        alone = Step(
            step.index, step.steps, step.s, step.t, step.ids[b : b + 1], step.masked[b : b + 1],
            step.eligible[b : b + 1], step.log_probs[first : first + n], step.proposal[b : b + 1],
            {name: u[b : b + 1] for name, u in step.uniforms.items()}, step.reveal_prob, step.committed_upto[b : b + 1],
        )  # fmt: skip
        assert policy(alone)[0].tolist() == together[b].tolist()
        first += n


# --------------------------------------------------------------------------------------------------- how many a step


def counts(n: int, steps: int, schedule: Schedule) -> list[int]:
    """Tokens a counted policy reveals at each step of `denoise`, the forced last step included."""
    process, out, left = MaskedDiffusion(MASK, schedule), [], n
    blank = probs_of([[1.0] * MASK])
    for k in range(steps):
        if not left:
            break
        reveal = float(process.reveal_prob(1 - (k + 1) / steps, 1 - k / steps))
        step = step_of([[True] * left], log_probs=blank.expand(left, -1), reveal_prob=reveal)
        out.append(int(scheduled_count(step)) if k + 1 < steps else left)
        left -= out[-1]
    assert left == 0
    return out


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 30, 64, 1000])
def test_as_many_steps_as_tokens_reveals_one_a_step(n: int) -> None:
    assert counts(n, n, Linear()) == [1] * n


@given(st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_fewer_steps_than_tokens_share_them_evenly(n: int, steps: int) -> None:
    out = counts(n, steps, Linear())
    assert sum(out) == n
    if steps <= n:
        assert len(out) == steps
        assert set(out) <= {n // steps, -(-n // steps)}
    else:  # never more than needed, and done after n of them
        assert out == [1] * n


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Polynomial(2.0), Polynomial(0.5)], ids=str)
def test_the_expected_share_stays_masked(schedule: Schedule) -> None:
    for n, steps in [(40, 8), (100, 10), (64, 64), (5, 20), (1000, 7)]:
        left = n
        for k, count in enumerate(counts(n, steps, schedule)):
            left -= count
            share = n * (1 - float(schedule.alpha(torch.tensor(1 - (k + 1) / steps, dtype=torch.float64))))
            # Rounding down at each step costs less than one token each, and only one a step is forced.
            assert share - (k + 1) - 1e-6 <= left <= share + 1e-6


@given(grids_st, st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_count_of_each_sample_is_its_own(masked: list[list[bool]], reveal_prob: float) -> None:
    got = scheduled_count(step_of(masked, reveal_prob=reveal_prob)).tolist()
    for count, row in zip(got, masked, strict=True):
        n = sum(row)
        expected = min(max(n - math.floor(n * (1 - reveal_prob) + 1e-9), 1), n)
        assert count == expected


# ------------------------------------------------------------------------------------------------- scores and ranking


def test_scores_against_plain_sums() -> None:
    masked = [[True, False, True, True], [False, True, False, False]]
    step = step_of(masked, seed=5)
    rows = iter(step.log_probs.exp().tolist())
    for b, line in enumerate(masked):
        for i, m in enumerate(line):
            p = next(rows) if m else None
            best, second = sorted(p, reverse=True)[:2] if p else (-INF, 0.0)
            expected = {
                confidence: best,
                drawn_confidence: p[int(step.proposal[b, i])] if p else -INF,
                entropy: -sum(x * math.log(x) for x in p if x) if p else INF,
                margin: best - second,
            }
            for score, value in expected.items():
                assert float(score(step)[b, i]) == pytest.approx(value, abs=1e-12), score


SCORES: list[tuple[Policy, Callable[[Step], torch.Tensor]]] = [
    (TopConfidence(), confidence),
    (TopConfidence("drawn"), drawn_confidence),
    (Entropy(), lambda step: -entropy(step)),
    (Margin(), margin),
    (RandomOrder(), lambda step: step.uniforms["order"]),
]


@pytest.mark.parametrize(("policy", "score"), SCORES, ids=[str(p) for p, _ in SCORES])
@given(grids_st, st.integers(0, 2**9 - 1), st.floats(0, 1), st.integers(0, 99), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_counted_policy_takes_the_best_and_ties_go_left(
    policy: Policy, score: Any, masked: list[list[bool]], bits: int, reveal_prob: float, seed: int, tied: bool
) -> None:
    eligible = [[bool(bits >> i & 1) for i in range(len(row))] for row in masked]
    n = sum(map(sum, masked))
    levels = probs_of([[0.5, 0.3, 0.2, 0, 0, 0], [0.9, 0.1, 0, 0, 0, 0]])
    ties = levels[torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed))] if tied else None
    step = step_of(masked, eligible=eligible, log_probs=ties, reveal_prob=reveal_prob, seed=seed)
    if tied:
        step.proposal[step.masked] = 0
    revealed = policy(step) & step.masked
    values, allowed = score(step).tolist(), step.eligible.tolist()
    for b, count in enumerate(scheduled_count(step).tolist()):
        ranked = sorted((i for i, e in enumerate(allowed[b]) if e), key=lambda i: (-values[b][i], i))
        assert revealed[b].nonzero()[:, 0].tolist() == sorted(ranked[:count])


def test_what_each_score_prefers() -> None:
    """Three positions on which the rules disagree."""
    values = [[0.5, 0.49, 0.01, 0, 0, 0], [0.51, 0.1, 0.1, 0.1, 0.1, 0.09], [0.52, 0.12, 0.12, 0.12, 0.12, 0]]
    log_probs = probs_of(values)
    step = step_of([[True] * 3], log_probs=log_probs, reveal_prob=0.0)
    chosen = {str(p): (p(step)[0].nonzero()[:, 0].tolist()) for p in (TopConfidence(), Entropy(), Margin())}
    assert chosen == {"TopConfidence(of='max')": [2], "Entropy()": [0], "Margin()": [1]}
    step.proposal[0] = torch.tensor([0, 1, 1])
    assert TopConfidence("drawn")(step).tolist() == [[True, False, False]]


def test_top_with_equal_scores_takes_the_leftmost_in_any_length() -> None:
    for n in (3, 16, 17, 300):  # sorts change their algorithm with the length
        flat, yes = torch.zeros(2, n), torch.ones(2, n, dtype=torch.bool)
        yes[1, 0] = False
        chosen = top(flat, yes, torch.tensor([2, 1]))
        assert [row.nonzero()[:, 0].tolist() for row in chosen] == [[0, 1], [1]]


# ----------------------------------------------------------------------------------------------- threshold, ancestral


@pytest.mark.parametrize("fallback", ["confident", "leftmost"])
def test_threshold_reveals_exactly_what_reaches_it(fallback: Any) -> None:
    """The fallback speaks only where nothing does: a position below tau is not revealed beside one above it."""
    log_probs = probs_of([[0.6, 0.4, 0, 0, 0, 0], [0.9, 0.1, 0, 0, 0, 0], [0.75, 0.25, 0, 0, 0, 0]] * 2)
    step = step_of([[True, True, True, False]] * 2, log_probs=log_probs)
    policy = Threshold(0.75, fallback)
    assert policy(step).tolist() == [[False, True, True, True]] * 2
    high = Threshold(0.95, fallback)
    one = [True, False, False, True] if fallback == "leftmost" else [False, True, False, True]
    assert high(step).tolist() == [one] * 2


def test_threshold_counts_each_sample_by_itself_and_only_the_eligible() -> None:
    values = [[0.6, 0.4, 0, 0, 0, 0], [0.9, 0.1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0, 0]]
    log_probs = probs_of(values)
    step = step_of([[True, True], [True, True]], eligible=[[True, False], [False, True]], log_probs=log_probs)
    assert Threshold(0.8)(step).tolist() == [[True, False], [False, True]]
    assert Threshold(0.8, "leftmost")(step).tolist() == [[True, False], [False, True]]


SCHEDULES = [Linear(), Cosine(), Polynomial(2.0), Polynomial(0.5)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_ancestral_reveals_at_the_rate_of_the_schedule(schedule: Schedule) -> None:
    """End to end: of n masks, n (1 - alpha(s)) are left at time s, within five standard deviations."""
    n, steps = 4000, 6
    yes = torch.ones(1, n, dtype=torch.bool)
    canvas = Canvas(torch.full((1, n), MASK), yes, yes)
    noise = Noise(V, MASK, length=n + 1)
    process = MaskedDiffusion(MASK, schedule)
    before = n
    for step in denoise(noise, process, canvas, steps=steps, policy=Ancestral(), draw=Draw(), layout=LAYOUT, seeds=[7]):
        left = int((step.ids == MASK).sum())
        alpha = float(schedule.alpha(torch.tensor(step.s, dtype=torch.float64)))
        assert abs(left - n * (1 - alpha)) <= 5 * math.sqrt(n * alpha * (1 - alpha)) + 1e-6
        assert abs((before - left) - before * step.reveal_prob) <= 5 * math.sqrt(before * 0.25)
        before = left
    assert left == 0


def test_ancestral_reveals_each_token_on_its_own() -> None:
    """Exactly where its uniform lies below the probability: none at 0, all at 1."""
    step = step_of([[True] * 50, [True] * 25 + [False] * 25], reveal_prob=0.3, seed=9)
    assert torch.equal(Ancestral()(step), ~step.masked | (step.uniforms["reveal"] < 0.3))
    assert torch.equal(Ancestral()(step_of([[True] * 9], reveal_prob=0.0)), torch.zeros(1, 9, dtype=torch.bool))
    assert Ancestral()(step_of([[True] * 9], reveal_prob=1.0)).all()


@pytest.mark.parametrize(
    "wrong", [lambda: Threshold(0.0), lambda: Threshold(1.1), lambda: Threshold(float("nan")),
              lambda: Threshold(0.5, "rightmost"), lambda: TopConfidence("min")],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong: Callable[[], Policy]) -> None:
    with pytest.raises(ValueError, match=r"threshold|Threshold|TopConfidence"):
        wrong()
