"""The process and its schedules: what corrupt may and may not do, for any batch (hypothesis), and the identities."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffulm.process import MaskedDiffusion, stratified_levels
from diffulm.schedule import Cosine, Linear, Polynomial, Schedule, schedule_from_name, schedule_name

MASK = 99
PROCESS = MaskedDiffusion(MASK)
SCHEDULES: list[Schedule] = [Linear(), Cosine(), Polynomial(), Polynomial(0.5), Polynomial(3.0)]
some = settings(max_examples=60, deadline=None)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """(x0, maskable, group, level, seeds); groups are not contiguous and may hold nothing maskable."""
    B, L, G = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 3))

    def table(values: st.SearchStrategy[int]) -> Tensor:
        return torch.tensor(draw(st.lists(values, min_size=B * L, max_size=B * L))).view(B, L)

    quantile = st.floats(0, 1, exclude_max=True)
    level = torch.tensor(draw(st.lists(quantile, min_size=B * G, max_size=B * G)), dtype=torch.float64).view(B, G)
    seeds = draw(st.lists(st.integers(0, 2**62), min_size=B, max_size=B))
    return table(st.integers(0, 50)), table(st.integers(0, 1)).bool(), table(st.integers(0, G - 1)), level, seeds


@some
@given(inputs(), st.sampled_from(["count", "rate"]))
def test_only_maskable_tokens_change_and_only_into_the_mask(case: tuple, form: str) -> None:
    x0, maskable, *_ = case
    before = x0.clone()
    ids, noised, weight = PROCESS.corrupt(*case, form=form)  # type: ignore[arg-type]
    assert not (noised & ~maskable).any() and x0.equal(before)
    assert ids[noised].eq(MASK).all() and ids[~noised].equal(x0[~noised])
    assert not weight[~noised].any() and bool((weight[noised] > 0).all()) and weight.dtype == torch.float32


@some
@given(inputs(), st.booleans())
def test_the_count_is_exact_in_every_group_and_weighs_n_over_l(case: tuple, mirrored: bool) -> None:
    x0, maskable, group, level, _ = case
    mirror = torch.full((len(x0),), mirrored) if mirrored else None
    _, noised, weight = PROCESS.corrupt(*case, mirror_B=mirror)
    for b, g in itertools.product(range(len(x0)), range(level.shape[1])):
        inside = (group[b] == g) & maskable[b]
        n = int(inside.sum())
        count = min(n, 1 + math.floor(float(level[b, g]) * n))
        if mirrored and count < n:
            count = n - count
        assert int((noised[b] & inside).sum()) == count
        assert weight[b][noised[b] & inside].tolist() == pytest.approx([n / count] * count if n else [])


@some
@given(inputs())
def test_a_mirror_gives_the_complement_and_full_stays_full(case: tuple) -> None:
    x0, maskable, group, level, _ = case
    _, a, _ = PROCESS.corrupt(*case)
    _, b, _ = PROCESS.corrupt(*case, mirror_B=torch.ones(len(x0), dtype=torch.bool))
    for row, g in itertools.product(range(len(x0)), range(level.shape[1])):
        inside = (group[row] == g) & maskable[row]
        if a[row][inside].all():
            assert b[row][inside].all()
        else:
            assert (a ^ b)[row][inside].all()
    # One batch may hold both: each sample by its own flag.
    flags = torch.arange(len(x0)) % 2 == 1
    _, mixed, _ = PROCESS.corrupt(*case, mirror_B=flags)
    assert mixed.equal(torch.where(flags[:, None], b, a))


@some
@given(inputs(), st.sampled_from(["count", "rate"]), st.integers(0, 5))
def test_a_samples_noise_depends_on_nothing_but_itself(case: tuple, form: str, padding: int) -> None:
    """Not on its batch mates, nor on how far the batch is padded to the right."""
    x0, maskable, group, level, seeds = case
    ids, noised, weight = PROCESS.corrupt(*case, form=form)  # type: ignore[arg-type]
    for b in range(len(x0)):
        wide = torch.nn.functional.pad
        alone = PROCESS.corrupt(
            wide(x0[b : b + 1], (0, padding), value=7),
            wide(maskable[b : b + 1], (0, padding)),
            wide(group[b : b + 1], (0, padding)),
            level[b : b + 1],
            seeds[b : b + 1],
            form=form,  # type: ignore[arg-type]
        )
        for whole, part in zip((ids, noised, weight), alone, strict=True):
            assert whole[b].equal(part[0, : x0.shape[1]])
        assert not alone[1][0, x0.shape[1] :].any()


@some
@given(inputs(), st.sampled_from(["count", "rate"]), st.floats(0, 1, exclude_max=True))
def test_groups_are_independent(case: tuple, form: str, other: float) -> None:
    """A group's noise does not move with another group's level, nor with what else may be noised there."""
    x0, maskable, group, level, seeds = case
    _, noised, weight = PROCESS.corrupt(*case, form=form)  # type: ignore[arg-type]
    for g in range(level.shape[1]):
        levels = torch.full_like(level, other)
        levels[:, g] = level[:, g]
        here = group == g
        changed = PROCESS.corrupt(x0, maskable & (here | (x0 % 2 == 0)), group, levels, seeds, form=form)  # type: ignore[arg-type]
        assert changed[1][here].equal(noised[here]) and changed[2][here].equal(weight[here])


def test_the_rate_form_masks_at_the_rate_of_its_schedule() -> None:
    n, level, t_min = 40_000, 0.6, 1e-3
    x0 = torch.zeros(1, n, dtype=torch.long)
    yes = torch.ones_like(x0, dtype=torch.bool)
    t = torch.tensor(t_min + (1 - t_min) * level, dtype=torch.float64)
    for schedule in SCHEDULES:
        process = MaskedDiffusion(MASK, schedule, t_min)
        _, noised, weight = process.corrupt(x0, yes, x0, torch.tensor([[level]]), [5], form="rate")
        rate = 1 - float(schedule.alpha(t))
        assert abs(noised.double().mean().item() - rate) < 4 * math.sqrt(rate * (1 - rate) / n)
        assert weight[noised].unique().tolist() == pytest.approx([float(schedule.weight(t))])


def test_seeds_give_different_noise_and_the_same_again() -> None:
    x0 = torch.zeros(4, 30, dtype=torch.long)
    yes, level = torch.ones_like(x0, dtype=torch.bool), torch.full((4, 1), 0.5)
    _, noised, _ = PROCESS.corrupt(x0, yes, x0, level, [1, 2, 1, 3])
    assert noised[0].equal(noised[2]) and not noised[0].equal(noised[1]) and not noised[1].equal(noised[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "counts"}, r"unknown form 'counts': use count or rate"),
        ({"form": "rate", "mirror_B": torch.tensor([True])}, r"complementary masks need form = 'count'"),
    ],
)
def test_corrupt_refuses(arguments: dict, message: str) -> None:
    x0 = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        PROCESS.corrupt(x0, x0.bool(), x0, torch.zeros(1, 1), [0], **arguments)


@pytest.mark.parametrize(("mask", "t_min"), [(-1, 1e-3), (0, 1.0), (0, -0.1)])
def test_a_process_refuses_what_is_none(mask: int, t_min: float) -> None:
    with pytest.raises(ValueError, match=r"mask_token_id must be|t_min must lie in"):
        MaskedDiffusion(mask, t_min=t_min)


# ------------------------------------------------------------------------------------------------- noise levels


@some
@given(st.integers(0, 2**31), st.integers(0, 40), st.integers(1, 20), st.integers(1, 12), st.integers(1, 3))
def test_levels_do_not_depend_on_how_they_are_asked_for(
    seed: int, first: int, count: int, batch: int, groups: int
) -> None:
    together = stratified_levels(seed, first, count, batch=batch, groups=groups)
    alone = [stratified_levels(seed, i, 1, batch=batch, groups=groups) for i in range(first, first + count)]
    assert together.equal(torch.cat(alone)) and together.dtype == torch.float64
    assert together.shape == (count, groups) and bool(((together >= 0) & (together < 1)).all())


@some
@given(st.integers(0, 2**31), st.integers(0, 5), st.integers(1, 32), st.integers(1, 4))
def test_every_batch_covers_every_stratum_once(seed: int, n: int, batch: int, groups: int) -> None:
    levels = stratified_levels(seed, n * batch, batch, batch=batch, groups=groups).numpy()
    for g in range(groups):
        assert sorted(np.floor(levels[:, g] * batch).astype(int)) == list(range(batch))
        assert np.ptp(levels[:, g] * batch % 1) < 1e-6 or np.ptp((levels[:, g] * batch + 0.5) % 1) < 1e-6  # one offset


def test_levels_of_groups_batches_and_purposes_differ() -> None:
    levels = stratified_levels(0, 0, 64, batch=64, groups=3)
    assert all(abs(np.corrcoef(levels[:, a], levels[:, b])[0, 1]) < 0.4 for a, b in itertools.combinations(range(3), 2))
    assert not levels.equal(stratified_levels(0, 64, 64, batch=64, groups=3))
    assert not levels.equal(stratified_levels(1, 0, 64, batch=64, groups=3))
    assert not levels.equal(stratified_levels(0, 0, 64, batch=64, groups=3, purpose="eval"))
    # One offset per batch and group: where a batch stands within its strata.
    offsets = [
        float(stratified_levels(0, n * 8, 8, batch=8, groups=2)[:, g].min()) for n in range(20) for g in range(2)
    ]
    assert len(set(offsets)) == 40 and min(offsets) < 0.02 < 0.1 < max(offsets) < 1 / 8


# ---------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_schedule_falls_from_1_to_0_and_its_weight_is_the_one_of_the_bound(schedule: Schedule) -> None:
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([1.0, 0.0], abs=1e-12)
    t = torch.linspace(0.01, 0.999, 500, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    assert bool((slope < 0).all())
    torch.testing.assert_close(schedule.weight(t), -slope / (1 - alpha), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_reveal_prob_is_the_chance_of_a_masked_token(schedule: Schedule) -> None:
    process = MaskedDiffusion(MASK, schedule)
    s, t = 0.3, 0.7
    alpha_s, alpha_t = (float(schedule.alpha(torch.tensor(x, dtype=torch.float64))) for x in (s, t))
    assert float(process.reveal_prob(s, t)) == pytest.approx((alpha_s - alpha_t) / (1 - alpha_t), abs=1e-14)
    # Two steps leave as many masked as one: (1 - r(s, t)) (1 - r(u, s)) = 1 - r(u, t).
    stay = [1 - float(process.reveal_prob(a, b)) for a, b in ((s, t), (0.1, s), (0.1, t))]
    assert stay[0] * stay[1] == pytest.approx(stay[2], abs=1e-14)
    # The last step reveals everything, the first is alpha itself.
    assert float(process.reveal_prob(0.0, t)) == pytest.approx(1.0, abs=1e-14)
    assert float(process.reveal_prob(s, 1.0)) == pytest.approx(alpha_s, abs=1e-14)
    grid = process.reveal_prob(torch.tensor([0.0, 0.5]), torch.tensor([0.5, 1.0]))
    assert grid.dtype == torch.float64 and grid.shape == (2,)


@pytest.mark.parametrize(("s", "t"), [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_reveal_prob_refuses_times_out_of_order(s: float, t: float) -> None:
    with pytest.raises(ValueError, match=r"needs 0 <= s < t <= 1"):
        PROCESS.reveal_prob(s, t)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_names_go_there_and_back(schedule: Schedule) -> None:
    assert schedule_from_name(schedule_name(schedule)) == schedule


def test_names_as_written_in_recipes() -> None:
    assert schedule_from_name("polynomial") == Polynomial(2.0) and schedule_name(Polynomial(2)) == "polynomial:2"
    assert schedule_from_name("polynomial:0.1") == Polynomial(0.1)
    assert schedule_from_name(schedule_name(Polynomial(1 / 3))) == Polynomial(1 / 3), "every digit survives"


@pytest.mark.parametrize("name", ["", "Linear", "linear:2", "sine", "polynomial:x", "polynomial:-1", "polynomial:nan"])
def test_unknown_names_say_what_there_is(name: str) -> None:
    with pytest.raises(ValueError, match=r"schedule '.*': (use linear, cosine or )?(write )?polynomial:POWER"):
        schedule_from_name(name)
