"""A draw is the inverse CDF of exactly the cut distribution, and of nothing else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffulm.sampling.draw as module
from diffulm.sampling import Draw
from diffulm.sampling.draw import CHUNK, nucleus

INF = float("inf")
EDGE = 1 - 2**-53  # the largest float64 below 1

logit_st = st.one_of(st.integers(-6, 6).map(float), st.floats(-30, 30), st.just(-INF))
logits_st = st.lists(logit_st, min_size=1, max_size=9).filter(lambda x: max(x) > -INF)
cuts_st = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.05, 4),
        "top_k": st.none() | st.integers(1, 10),
        "top_p": st.none() | st.floats(0.01, 1.0),
    }
)


def rows(logits: list[float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor([logits], dtype=dtype).log_softmax(-1)


def drawn(draw: Draw, log_probs_V: torch.Tensor, uniforms: Any) -> torch.Tensor:
    """The token of one distribution at each of many uniforms."""
    u = torch.as_tensor(uniforms, dtype=torch.float64)
    return draw(log_probs_V.expand(len(u), -1), u)


def reference(log_probs: list[float], *, temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """Temperature, then top-k (ties at the edge stay), then top-p of what is left (ties: the lower id)."""
    best = max(log_probs)
    p = [math.exp((x - best) / temperature) for x in log_probs]
    if top_k is not None and top_k < len(p):
        edge = sorted(log_probs, reverse=True)[top_k - 1]
        p = [v if x >= edge else 0.0 for v, x in zip(p, log_probs, strict=True)]
    total = math.fsum(p)
    p = [v / total for v in p]
    if top_p is not None and top_p < 1:
        kept, mass = set(), 0.0
        for i in sorted(range(len(p)), key=lambda i: (-p[i], i)):
            if abs(mass - top_p) < 1e-9:
                return []  # whether one more token fits is a matter of rounding here
            if mass < top_p:
                kept.add(i)
            mass += p[i]
        total = math.fsum(p[i] for i in kept)
        p = [v / total if i in kept else 0.0 for i, v in enumerate(p)]
    return p


# -------------------------------------------------------------------------------------------------------- the law


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
@settings(max_examples=60, deadline=None)
def test_a_grid_of_uniforms_falls_in_proportion(weights: list[int]) -> None:
    """Of n equally spaced uniforms each token gets n p of them, give or take the one at its edge."""
    n, p = 2000, np.array(weights) / sum(weights)
    tokens = drawn(Draw(), torch.from_numpy(p).log(), (np.arange(n) + 0.5) / n)
    counts = np.bincount(tokens.numpy(), minlength=len(p))
    assert abs(counts / n - p).max() <= 1 / n + 1e-12
    assert not counts[p == 0].any()
    assert (tokens.diff() >= 0).all()


def test_dyadic_edges_are_exact() -> None:
    """A uniform on an edge of the CDF belongs to the token that begins there."""
    log_probs = torch.tensor([0.25, 0.0, 0.5, 0.25], dtype=torch.float64).log()
    edges = [0.0, np.nextafter(0.25, 0), 0.25, np.nextafter(0.75, 0), 0.75, EDGE]
    assert drawn(Draw(), log_probs, edges).tolist() == [0, 0, 2, 2, 3, 3]


def test_the_sum_over_a_large_vocabulary_is_float64() -> None:
    """float32 logits, 50,000 tokens: the same tokens as numpy's float64; a float32 sum gives others."""
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(50_000, generator=generator).log_softmax(-1)
    u = (np.arange(400) + 0.5) / 400
    cumulative = log_probs.double().softmax(-1).cumsum(-1).numpy()
    expected = np.searchsorted(cumulative, u * cumulative[-1], side="right")
    assert drawn(Draw(), log_probs, u).tolist() == expected.tolist()
    coarse = log_probs.softmax(-1).cumsum(-1).numpy()
    assert np.searchsorted(coarse, (u * coarse[-1]).astype(np.float32), side="right").tolist() != expected.tolist()


# ------------------------------------------------------------------------------------------------------- the cuts


@given(logits_st, cuts_st)
@settings(max_examples=400, deadline=None)
def test_temperature_top_k_and_top_p_are_what_they_say(logits: list[float], cuts: dict[str, Any]) -> None:
    log_probs = rows(logits)
    expected = reference(log_probs[0].tolist(), **cuts)
    if expected:
        probs = Draw(**cuts).probs(log_probs)[0]
        assert probs.dtype == torch.float64
        assert probs.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("draw", "kept"),
    [(Draw(top_p=0.5), [0]), (Draw(top_p=0.51), [0, 1]), (Draw(top_p=0.75), [0, 1]), (Draw(top_p=0.8), [0, 1, 2]),
     (Draw(top_p=1.0), [0, 1, 2, 3]), (Draw(top_p=1e-9), [0]), (Draw(top_k=1), [0]), (Draw(top_k=2), [0, 1]),
     (Draw(top_k=3), [0, 1, 2, 3]), (Draw(top_k=99), [0, 1, 2, 3]), (Draw(top_k=3, top_p=0.8), [0, 1, 2])],
    ids=str,
)  # fmt: skip
def test_cuts_at_exact_edges_and_ties(draw: Draw, kept: list[int]) -> None:
    """Tokens 2 and 3 are equally likely: top-k keeps both or neither, top-p takes the lower id first."""
    probs = draw.probs(torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log())[0]
    assert probs.nonzero()[:, 0].tolist() == kept
    assert float(probs.sum()) == pytest.approx(1.0, abs=1e-15)


@given(
    logits_st,
    cuts_st,
    st.lists(st.floats(0, EDGE), max_size=5),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=300, deadline=None)
def test_a_token_of_probability_0_is_never_drawn(
    logits: list[float], cuts: dict[str, Any], uniforms: list[float], dtype: torch.dtype
) -> None:
    """Not at the ends of [0, 1), not on an edge of the CDF, not where a column is -inf."""
    draw, log_probs = Draw(**cuts), rows(logits, dtype)
    probs = draw.probs(log_probs)[0]
    edges = probs.cumsum(-1).clamp(max=EDGE).tolist()
    for u in [0.0, 5e-324, 2**-53, EDGE, *edges, *(float(np.nextafter(e, 0)) for e in edges), *uniforms]:
        token = int(draw(log_probs, torch.tensor([u], dtype=torch.float64)))
        assert probs[token] > 0
        assert log_probs[0, token] > -INF


def test_the_last_uniform_takes_the_last_token_with_mass() -> None:
    """Also where the tail's mass is lost in rounding, and where the mask token stands at the end."""
    log_probs = torch.tensor([0.7, 0.2, 0.1, 0.0, 0.0]).log()
    assert drawn(Draw(), log_probs, [EDGE]).tolist() == [2]
    tail = torch.tensor([0.0, -100.0, -INF])
    assert drawn(Draw(), tail, [EDGE, 1 - 2**-52, 0.0]).tolist() == [0, 0, 0]
    one = torch.tensor([EDGE], dtype=torch.float32)  # rounds to 1, on devices without float64
    assert float(one) == 1.0
    assert Draw()(log_probs[None], one).tolist() == [2]
    generator = torch.Generator().manual_seed(1)
    many = torch.randn(300, 5000, generator=generator)
    many[:, -40:] = -INF
    assert (Draw()(many.log_softmax(-1), torch.full((300,), EDGE, dtype=torch.float64)) < 4960).all()


@pytest.mark.parametrize("temperature", [1e-300, 1e-320, 5e-324])
def test_a_tiny_temperature_is_greedy_and_not_nan(temperature: float) -> None:
    log_probs = rows([1.0, 3.0, 2.0, -INF])
    assert drawn(Draw(temperature), log_probs[0], [0.0, 0.5, EDGE]).tolist() == [1, 1, 1]


# ----------------------------------------------------------------------------------------------------- the others


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_temperature_0_takes_the_most_probable_token(dtype: torch.dtype) -> None:
    log_probs = torch.randn(100, 17, generator=torch.Generator().manual_seed(2)).to(dtype)
    u = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    best = [max(range(17), key=row.__getitem__) for row in log_probs.tolist()]  # max takes the first of equals
    assert Draw(0.0)(log_probs, u).tolist() == best
    assert Draw(0.0, top_k=3, top_p=0.5)(log_probs, 1 - u).tolist() == best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("draw", [Draw(), Draw(0.7, top_k=20), Draw(1.3, top_p=0.9), Draw(0.0)], ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(draw: Draw, dtype: torch.dtype) -> None:
    n = 2 * CHUNK + 7
    generator = torch.Generator().manual_seed(4)
    log_probs = (torch.randn(n, 301, generator=generator, dtype=dtype) * 3).log_softmax(-1)
    u = torch.rand(n, dtype=torch.float64, generator=generator)
    together = draw(log_probs, u)
    assert together.shape == (n,)
    assert together.dtype == torch.long
    assert together.tolist() == [int(draw(log_probs[i : i + 1], u[i : i + 1])) for i in range(n)]
    order = torch.randperm(n, generator=generator)
    assert torch.equal(draw(log_probs[order], u[order]), together[order])
    assert draw(log_probs[:0], u[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"temperature": -0.1}, "temperature"), ({"temperature": math.nan}, "temperature"),
     ({"temperature": INF}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 0.0}, "top_p"),
     ({"top_p": 1.5}, "top_p"), ({"top_p": math.nan}, "top_p")],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Draw(**wrong)


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=12, max_size=12).filter(any), min_size=1, max_size=5),
    st.floats(0.01, 0.999), st.integers(1, 12),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_the_cut_found_among_the_best_tokens_is_the_cut_of_all(weights: list[list[int]], mass: float, few: int) -> None:
    """With many ties, and however few tokens are sorted first: the same bits."""
    probs = torch.tensor(weights, dtype=torch.float64)
    probs = probs / probs.sum(-1, keepdim=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NUCLEUS", few)
        found = nucleus(probs, mass)
    for row, got in zip(probs.tolist(), found.tolist(), strict=True):
        before, expected = 0.0, [0.0] * len(row)
        for i in sorted(range(len(row)), key=lambda i: (-row[i], i)):
            if abs(before - mass) < 1e-12:
                break  # a matter of rounding
            if before < mass:
                expected[i] = row[i]
            before += row[i]
        else:
            assert got == expected
