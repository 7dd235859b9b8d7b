"""What every policy promises, and each one's rule against a plain reference."""

from __future__ import annotations

import dataclasses
import itertools
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
from diffulm.sampling.canvas import Canvas
from diffulm.sampling.scores import confidence, drawn_confidence, entropy, margin, scheduled_count, top
from diffulm.sampling.step import committed
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
    alpha_t: float = 0.3,
    seed: int = 0,
) -> Step:
    """A step with random predictions, proposals and uniforms for everything not given, as a policy is shown it."""
    generator = torch.Generator().manual_seed(seed)
    masked_BL = torch.tensor(masked)
    if log_probs is None:
        log_probs = torch.randn(int(masked_BL.sum()), V, generator=generator, dtype=torch.float64) * 2
        log_probs[:, MASK] = -INF
        log_probs = log_probs.log_softmax(-1)
    ids = torch.randint(0, MASK, masked_BL.shape, generator=generator).masked_fill(masked_BL, MASK)
    uniforms = {
        name: torch.rand(masked_BL.shape, generator=generator, dtype=torch.float64)
        for name in ("token", "reveal", "order")
    }
    return Step(
        index=0, steps=40, s=0.5, t=1.0, ids=ids, masked=masked_BL,
        eligible=masked_BL if eligible is None else torch.tensor(eligible) & masked_BL, predicted=masked_BL,
        log_probs=log_probs, draw=Draw(), uniforms=uniforms, reveal_prob=reveal_prob, alpha_t=alpha_t,
        committed_upto=committed(masked_BL), revealed=torch.zeros_like(masked_BL),
    )  # fmt: skip


def probs_of(values: list[list[float]]) -> torch.Tensor:
    """Log-probabilities with a mask column from rows of MASK probabilities."""
    return torch.tensor([[*row, 0.0] for row in values], dtype=torch.float64).log()


COUNTED = [RandomOrder(), TopConfidence(), TopConfidence("drawn"), Entropy(), Margin()]
THRESHOLDS = [Threshold(0.5), Threshold(0.5, "confident"), Threshold(1.0), Threshold(1e-6)]
PREFIXES = [Factor(0.5), Factor(1.0), Factor(9.0), EntropyBound(0.0), EntropyBound(0.3), EntropyBound(5.0)]
REMASKS = [Remask(), Remask(0.7), Remask(0.4, "rescale"), Remask(1.0, "rescale")]
KEEPING: list[Policy] = [Ancestral(), FirstHitting(), *COUNTED, *THRESHOLDS, *PREFIXES]
ALL: list[Policy] = [*KEEPING, *REMASKS]

grids_st = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4)
)


# ------------------------------------------------------------------------------------------- what all of them promise


@pytest.mark.parametrize("policy", KEEPING, ids=str)
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
        here = slice(b, b + 1)
        fields = ("ids", "masked", "eligible", "predicted", "committed_upto", "revealed")
        alone = dataclasses.replace(
            step, **{name: getattr(step, name)[here] for name in fields}, log_probs=step.log_probs[first : first + n],
            uniforms={name: u[here] for name, u in step.uniforms.items()},
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


def test_threshold_falls_back_to_the_leftmost_unless_told() -> None:
    assert Threshold() == Threshold(0.9, "leftmost")


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
    assert Threshold(0.8, "confident")(step).tolist() == [[True, False], [False, True]]


# -------------------------------------------------------------------------------------------- factor, entropy bound


def certainties(masked: list[list[bool]], seed: int, sharpness: float) -> torch.Tensor:
    """Predictions from nearly uniform to nearly sure, so that prefixes of every length occur."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(map(sum, masked))
    scale = torch.rand(n, 1, generator=generator, dtype=torch.float64) * sharpness
    logits = torch.randn(n, V, generator=generator, dtype=torch.float64) * scale
    logits[:, MASK] = -INF
    return logits.log_softmax(-1)


def factor_rule(doubts: list[float], f: float) -> set[int] | None:
    """The largest n with (n + 1)(1 - c_n) < f, every n tried; one at least. None where rounding decides."""
    order = sorted(range(len(doubts)), key=lambda i: (doubts[i], i))
    costs = [(n + 1) * doubts[order[n - 1]] for n in range(1, len(doubts) + 1)]
    if any(abs(cost - f) < 1e-12 for cost in costs):
        return None
    return set(order[: max((n for n, cost in enumerate(costs, 1) if cost < f), default=1)])


def entropy_bound_rule(nats: list[float], gamma: float) -> set[int] | None:
    """The largest prefix in order of entropy with sum - max <= gamma, every n tried; None where rounding decides."""
    order = sorted(range(len(nats)), key=lambda i: (nats[i], i))
    prefixes = [[nats[i] for i in order[:n]] for n in range(1, len(nats) + 1)]
    costs = [math.fsum(prefix) - max(prefix) for prefix in prefixes]
    if any(abs(cost - gamma) < 1e-12 for cost in costs[1:]):
        return None
    return set(order[: max(n for n, cost in enumerate(costs, 1) if n == 1 or cost <= gamma)])


@given(grids_st, st.integers(0, 2**9 - 1), st.integers(0, 999), st.floats(0, 60), st.floats(0.01, 8), st.floats(0, 6))
@settings(max_examples=150, deadline=None)
def test_factor_and_entropy_bound_take_the_largest_prefix(
    masked: list[list[bool]], bits: int, seed: int, sharpness: float, f: float, gamma: float
) -> None:
    """Against the rule tried for every length, in batches, with masks that are not eligible."""
    eligible = [[m and bool(bits >> i & 1) for i, m in enumerate(row)] for row in masked]
    step = step_of(masked, eligible=eligible, log_probs=certainties(masked, seed, sharpness))
    doubt = torch.full(step.masked.shape, INF, dtype=torch.float64)
    doubt[step.masked] = -torch.expm1(step.log_probs.max(-1).values)
    for policy, rule, values, limit in (
        (Factor(f), factor_rule, doubt, f), (EntropyBound(gamma), entropy_bound_rule, entropy(step), gamma),
    ):  # fmt: skip
        got = policy(step) & step.masked
        for b, row in enumerate(eligible):
            at = [i for i, e in enumerate(row) if e]
            expected = rule(values[b, at].tolist(), limit) if at else set()
            if expected is not None:
                assert set(got[b].nonzero()[:, 0].tolist()) == {at[i] for i in expected}, rule.__name__


@given(grids_st, st.integers(0, 999), st.floats(0, 60))
@settings(max_examples=60, deadline=None)
def test_a_wider_limit_never_reveals_less(masked: list[list[bool]], seed: int, sharpness: float) -> None:
    step = step_of(masked, log_probs=certainties(masked, seed, sharpness))
    families: list[list[Policy]] = [
        [Factor(f) for f in (1e-9, 0.1, 0.5, 1.0, 2.0, 50.0)],
        [EntropyBound(g) for g in (0.0, 1e-6, 0.1, 0.5, 2.0, 99.0)],
        [Threshold(tau, "confident") for tau in (1.0, 0.99, 0.9, 0.5, 1e-9)],
        [Threshold(tau) for tau in (1.0, 0.99, 0.9, 0.5, 1e-9)],
    ]
    for family in families:
        shown = [policy(step) for policy in family]
        for narrow, wide in itertools.pairwise(shown):
            assert (narrow.sum(1) <= wide.sum(1)).all()
            # The leftmost, revealed where nothing passes, need not pass a lower threshold that others do.
            assert family[0] == Threshold(1.0) or not (narrow & ~wide).any()
        assert ((shown[0] & step.masked).sum(1) >= step.masked.any(1).long()).all()
        assert shown[-1].all()  # 9 positions: (9 + 1)(1 - c) < 50, nine times ln 6 < 99


def test_factor_counts_the_next_token_too() -> None:
    """(n + 1)(1 - c_n) < f with c = 0.9, 0.8, 0.7: 0.2, 0.6, 1.2; strictly below."""
    log_probs = probs_of([[0.7, 0.3, 0, 0, 0, 0], [0.9, 0.1, 0, 0, 0, 0], [0.8, 0.2, 0, 0, 0, 0]])
    step = step_of([[True] * 3], log_probs=log_probs)
    for f, count in [(1e-6, 1), (0.19, 1), (0.21, 1), (0.59, 1), (0.61, 2), (1.19, 2), (1.21, 3)]:
        assert Factor(f)(step).tolist() == [[count > 2, True, count > 1]], f


def test_entropy_bound_is_inclusive_and_leaves_out_the_largest() -> None:
    """Entropies 0, ln 2, ln 2, ln 4: without the largest 0, 0, ln 2, 2 ln 2."""
    half, quarter = [0.5, 0.5, 0, 0, 0, 0], [0.25] * 4 + [0, 0]
    step = step_of([[True] * 4], log_probs=probs_of([half, quarter, [1.0, 0, 0, 0, 0, 0], half]))
    order = [2, 0, 3, 1]
    for gamma, count in [(0.0, 2), (0.6, 2), (math.log(2) + 1e-12, 3), (1.3, 3), (2 * math.log(2) + 1e-12, 4)]:
        chosen = EntropyBound(gamma)(step)[0].nonzero()[:, 0].tolist()
        assert chosen == sorted(order[:count]), gamma


def test_factor_tells_sure_positions_apart_in_float32() -> None:
    """1 - c is taken from the logarithm: in float32 c itself would be 1 for all of them."""
    doubts = torch.tensor([3e-9, 1e-9, 2e-9])
    log_probs = torch.full((3, V), -INF)
    log_probs[:, 0] = torch.log1p(-doubts)
    step = step_of([[True] * 3], log_probs=log_probs)
    assert Factor(5e-9)(step).tolist() == [[False, True, False]]
    assert Factor(7e-9)(step).tolist() == [[False, True, True]]


# ----------------------------------------------------------------------------------------- first hitting, remasking


def test_first_hitting_reveals_one_token_whatever_the_schedule() -> None:
    masked = [[True] * 9, [False] * 6 + [True] * 3, [False] * 9]
    for reveal_prob in (0.0, 0.5, 1.0):
        step = step_of(masked, reveal_prob=reveal_prob, seed=4)
        revealed = FirstHitting()(step) & step.masked
        assert revealed.sum(1).tolist() == [1, 1, 0]
        best = step.uniforms["order"].masked_fill(~step.masked, -1).argmax(1)
        assert revealed[:2].long().argmax(1).tolist() == best[:2].tolist()


def test_first_hitting_refuses_fewer_steps_than_tokens() -> None:
    enough = dataclasses.replace(step_of([[True] * 3]), index=1, steps=4)
    FirstHitting()(enough)
    with pytest.raises(ValueError, match=r"3 masked tokens need 3 steps, not 2"):
        FirstHitting()(dataclasses.replace(enough, index=2))
    for steps in (1, 3):  # also where the loop would not need to ask
        canvas = Canvas(torch.full((1, 5), MASK), *[torch.ones(1, 5, dtype=torch.bool)] * 2)
        with pytest.raises(ValueError, match=f"5 masked tokens need 5 steps, not {steps}"):
            list(
                denoise(
                    Noise(V, MASK), MaskedDiffusion(MASK), canvas, steps=steps, policy=FirstHitting(), draw=Draw(),
                    layout=LAYOUT,
                )
            )  # fmt: skip


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


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_remasking_keeps_the_share_of_masks(eta: float, a: float, b: float) -> None:
    """Masked at t with probability 1 - alpha_t, then one step: masked with probability 1 - alpha_s, for every rate."""
    alpha_t, alpha_s = sorted((a, b))
    if alpha_t > 1 - 1e-6:
        return
    plain = (alpha_s - alpha_t) / (1 - alpha_t)
    for kind in ("cap", "rescale"):
        sigma, reveal = Remask(eta, kind).rates(alpha_t, plain)  # type: ignore[arg-type]
        assert -1e-12 <= sigma <= 1
        assert plain - 1e-12 <= reveal <= 1 + 1e-9
        assert (1 - alpha_t) * (1 - reveal) + alpha_t * sigma == pytest.approx(1 - alpha_s, abs=1e-9)
        most = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t else 1.0
        assert sigma == pytest.approx(min(eta, most) if kind == "cap" else eta * most, abs=1e-6)


def test_remask_decides_by_one_uniform_at_each_position() -> None:
    step = step_of([[True] * 30 + [False] * 70], reveal_prob=0.5, alpha_t=0.4, seed=8)
    for policy in REMASKS:
        sigma, reveal = policy.rates(0.4, 0.5)
        u = step.uniforms["reveal"]
        expected = torch.where(step.masked, u < reveal, u >= sigma)
        assert torch.equal(policy(step), expected)
    assert torch.equal(Remask(0.0)(step), Ancestral()(step))  # without remasking it is the reverse process


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("policy", [Remask(0.2), Remask(0.9), Remask(0.5, "rescale"), Remask(1.0, "rescale")], ids=str)
def test_remask_follows_the_schedule_end_to_end(policy: Remask, schedule: Schedule) -> None:
    """As for `Ancestral` below the same bound holds, although tokens come and go."""
    n, steps = 4000, 8
    yes = torch.ones(1, n, dtype=torch.bool)
    canvas = Canvas(torch.full((1, n), MASK), yes, yes)
    taken_back, before = 0, canvas.ids
    for step in denoise(
        Noise(V, MASK, length=n + 1), MaskedDiffusion(MASK, schedule), canvas, steps=steps, policy=policy, draw=Draw(),
        layout=LAYOUT, seeds=[7],
    ):  # fmt: skip
        left = int((step.ids == MASK).sum())
        alpha = float(schedule.alpha(torch.tensor(step.s, dtype=torch.float64)))
        assert abs(left - n * (1 - alpha)) <= 5 * math.sqrt(n * alpha * (1 - alpha)) + 1e-6
        taken_back += int(((step.ids == MASK) & (before != MASK)).sum())
        before = step.ids
    assert left == 0
    assert taken_back > n / 20


@pytest.mark.parametrize(
    "wrong", [lambda: Threshold(0.0), lambda: Threshold(1.1), lambda: Threshold(float("nan")),
              lambda: Threshold(0.5, "rightmost"), lambda: TopConfidence("min"), lambda: Factor(0.0),
              lambda: Factor(-1.0), lambda: Factor(INF), lambda: Factor(float("nan")), lambda: EntropyBound(-0.1),
              lambda: EntropyBound(INF), lambda: EntropyBound(float("nan")), lambda: Remask(-0.1), lambda: Remask(1.1),
              lambda: Remask(float("nan")), lambda: Remask(0.1, "conf")],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong: Callable[[], Policy]) -> None:
    with pytest.raises(ValueError, match=r"threshold|Threshold|TopConfidence|factor|entropy bound|eta"):
        wrong()
