"""Theorems about the bound, by enumeration on the three-token toy (design: section 6)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from diffulm.eval.masks import plan_masks
from diffulm.layout import NoisedBatch
from diffulm.objective import diffusion_loss
from diffulm.process import MaskedDiffusion, stratified_levels
from diffulm.schedule import Cosine, Linear, Polynomial, Schedule

from .toy import LAYOUT, MASK, ORDERS, PROCESS, TEXTS, L, Table, joint, masks

P = joint()
EXACT = Table.exact(P)
WRONG = Table.inconsistent()
SCHEDULES: list[Schedule] = [Linear(), Cosine(), Polynomial(0.5), Polynomial(2.0), Polynomial(3.0)]


def count_form(table: Table, text: tuple[int, ...]) -> float:
    """Mean over l uniform on 1..L and masks uniform given l of (L / l) * cross-entropy."""
    return sum(
        table.cross_entropy(text, m) * (L / sum(m)) / (L * math.comb(L, sum(m))) for m in masks()
    )  # fmt: skip


def rate_form(table: Table, text: tuple[int, ...], schedule: Schedule, t_min: float) -> float:
    """Mean over t uniform on [t_min, 1] of weight(t) * expected cross-entropy, by Gauss-Legendre quadrature."""
    x, w = np.polynomial.legendre.leggauss(200)
    # Nodes in log t: the integrand of fractional powers is not smooth at 0.
    low, high = math.log(t_min), 0.0
    t = torch.from_numpy(np.exp((high - low) / 2 * (x + 1) + low))
    weights = w * (high - low) / 2 * t.numpy()
    rate, weight = (1 - schedule.alpha(t)).numpy(), schedule.weight(t).numpy()
    total = 0.0
    for m in masks():
        chance = rate ** sum(m) * (1 - rate) ** (L - sum(m))
        total += float((weights * weight * chance).sum()) * table.cross_entropy(text, m)
    return total / (1 - t_min)


@pytest.mark.parametrize("text", TEXTS)
def test_count_form_is_the_likelihood(text: tuple[int, ...]) -> None:
    assert count_form(EXACT, text) == pytest.approx(-math.log(P[text]), abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_rate_form_tends_to_the_likelihood_for_every_schedule(schedule: Schedule) -> None:
    errors = [
        max(abs(rate_form(EXACT, x, schedule, t_min) + math.log(P[x])) for x in TEXTS) for t_min in (1e-3, 1e-9, 1e-16)
    ]
    assert errors[2] < 1e-6 and errors[1] < errors[0]
    # At the t_min that training uses the form is off, by an amount that no tolerance should hide.
    assert errors[0] > 1e-3


def test_rate_and_count_form_agree_for_an_inconsistent_denoiser() -> None:
    for text in TEXTS:
        for schedule in (Linear(), Cosine(), Polynomial(2.0)):
            assert rate_form(WRONG, text, schedule, 1e-9) == pytest.approx(count_form(WRONG, text), abs=1e-7)


def test_the_bound_is_the_mean_over_orders_and_above_the_random_order_law() -> None:
    gaps = []
    for text in TEXTS:
        orders = [WRONG.order_nll(text, order) for order in ORDERS]
        law = sum(math.exp(-x) for x in orders) / len(orders)
        assert count_form(WRONG, text) == pytest.approx(sum(orders) / len(orders), abs=1e-12)
        gaps.append(count_form(WRONG, text) + math.log(law))
    assert min(gaps) > -1e-12 and max(gaps) > 0.01, "the bound must be a bound, and not tight here"
    # For the consistent denoiser all orders agree and there is no gap.
    assert all(EXACT.order_nll(x, o) == pytest.approx(-math.log(P[x]), abs=1e-12) for x in TEXTS for o in ORDERS)


def loss_of(text: tuple[int, ...], process: MaskedDiffusion, level: torch.Tensor, seed: int, **kwargs: object) -> float:
    """The package's own path: corrupt -> layout -> diffusion_loss, one sample, nats."""
    x0 = torch.tensor([text])
    yes, zeros = torch.ones_like(x0, dtype=torch.bool), torch.zeros_like(x0)
    ids, noised, weight = process.corrupt(x0, yes, zeros, level, [seed], **kwargs)  # type: ignore[arg-type]
    rows = LAYOUT.training_rows(NoisedBatch(x0, ids, noised, yes, weight, zeros, yes, zeros))
    loss = diffusion_loss(EXACT, rows)
    assert loss.count == L and float(loss.by_level[:, 1].sum()) == int(noised.sum())
    return float(loss.sum)


def test_corrupt_layout_and_loss_estimate_the_likelihood() -> None:
    """The code path of training has the mean the theorem says, and the count form the smaller variance."""
    text, n = (0, 2, 1), 6000
    truth = -math.log(P[text])
    levels = torch.from_numpy(np.random.default_rng(0).random((n, 1)))
    count = np.array([loss_of(text, PROCESS, levels[i : i + 1], i) for i in range(n)])
    unmin = MaskedDiffusion(MASK, t_min=1e-9)
    rate = np.array([loss_of(text, unmin, levels[i : i + 1], i, form="rate") for i in range(n)])
    for values in (count, rate):
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(n)
    assert count.var() < rate.var()


def test_stratified_levels_and_complementary_pairs_keep_the_mean() -> None:
    text, batch = (1, 1, 0), 6
    truth = -math.log(P[text])
    stratified, paired = [], []
    for n in range(500):
        levels = stratified_levels(0, n * batch, batch, batch=batch)
        stratified.append(np.mean([loss_of(text, PROCESS, levels[i : i + 1], n * batch + i) for i in range(batch)]))
        both = [
            loss_of(text, PROCESS, levels[i : i + 1], n * batch + i, mirror_B=torch.tensor([mirror]))
            for i in range(0, batch, 2)
            for mirror in (False, True)
        ]
        paired.append(np.mean(both))
    for values in (np.array(stratified), np.array(paired)):
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(len(values))


def test_plan_masks_enumerates_short_texts_exactly() -> None:
    rng = np.random.default_rng(0)
    chosen, weights = plan_masks(L, 7, rng)
    assert len(chosen) == 2**L - 1
    for text in TEXTS:
        total = sum(w * EXACT.cross_entropy(text, tuple(m)) for m, w in zip(chosen.tolist(), weights, strict=True))
        assert total == pytest.approx(-math.log(P[text]), abs=1e-12)


@pytest.mark.parametrize("draws", [3, 5, 6])
def test_plan_masks_pairs_are_unbiased(draws: int) -> None:
    """n = 3 with fewer draws than masks: the full mask once, complementary pairs for the rest."""
    text, rng = (2, 0, 2), np.random.default_rng(1)
    values = []
    for _ in range(4000):
        chosen, weights = plan_masks(L, draws, rng)
        assert chosen[0].all() and weights[0] == pytest.approx(1 / L)
        assert (chosen[1::2] ^ chosen[2::2]).all()
        values.append(
            sum(w * WRONG.cross_entropy(text, tuple(m)) for m, w in zip(chosen.tolist(), weights, strict=True))
        )
    assert abs(np.mean(values) - count_form(WRONG, text)) < 4 * np.std(values) / math.sqrt(len(values))


def test_every_count_form_mask_is_reached_uniformly() -> None:
    """corrupt draws each of the C(n, l) masks of a level equally often (chi-square, fixed seeds)."""
    n, draws = 4, 6000
    x0, yes = torch.zeros(1, n, dtype=torch.long), torch.ones(1, n, dtype=torch.bool)
    seen: dict[tuple[bool, ...], int] = {}
    for seed in range(draws):
        _, noised, weight = PROCESS.corrupt(x0, yes, torch.zeros_like(x0), torch.tensor([[0.3]]), [seed])
        assert int(noised.sum()) == 2 and weight[noised].tolist() == [2.0, 2.0]
        key = tuple(noised[0].tolist())
        seen[key] = seen.get(key, 0) + 1
    expected = draws / math.comb(n, 2)
    assert set(seen) == {m for m in itertools.product([False, True], repeat=n) if sum(m) == 2}
    assert sum((k - expected) ** 2 / expected for k in seen.values()) < 20.5  # 99.9% point of chi-square, 5 d.o.f.
