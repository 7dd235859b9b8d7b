"""benchmarks/likelihood_estimators.py: the estimators it compares are what their authors compute."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from . import toy

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import likelihood_estimators
    finally:
        sys.path.remove(str(BENCHMARKS))
    return likelihood_estimators


def test_what_the_estimators_estimate(benchmark: ModuleType) -> None:
    """LLaDA's count form is unbiased; so is, but for the grid, the released mean over rates times n + 1."""
    table, text, n = toy.Table.inconsistent(), (2, 0, 1), toy.L
    cost = {m: table.cross_entropy(text, m) for m in toy.masks()}
    bound = float(np.mean([table.order_nll(text, order) for order in toy.ORDERS]))
    for kind, truth in (("count", bound), ("released", bound)):
        rng, values = np.random.default_rng(0), []
        for _ in range(3000):
            masks, weights = benchmark.simple(kind, n, 64, rng)
            values.append(sum(w * cost[tuple(m)] for m, w in zip(masks.tolist(), weights, strict=True) if any(m)))
        # rates 1/64, 2/64, ..., 1 stand for a mean over (0, 1]: a grid error of up to 1/128 at either end
        error = 4 * float(np.std(values)) / len(values) ** 0.5 + (0.02 * bound if kind == "released" else 0)
        assert abs(float(np.mean(values)) - truth) < error, kind


def test_the_cost_at_a_mark(benchmark: ModuleType) -> None:
    points = [(4.0, 0.5), (8.0, 0.6), (16.0, 0.8), (32.0, 0.8)]
    assert benchmark.cost_at(points, 0.5) == 4.0 and benchmark.cost_at(points, 0.8) == pytest.approx(16)
    assert benchmark.cost_at(points, 0.7) == pytest.approx(8 * 2**0.5) and benchmark.cost_at(points, 0.9) is None
