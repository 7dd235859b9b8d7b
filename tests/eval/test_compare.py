"""Paired comparison: exact p-values, intervals, totals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from diffulm.eval.compare import (
    PUBLISHED,
    accuracy,
    mcnemar,
    paired_accuracy,
    paired_texts,
    published,
    task_figures,
    text_figures,
    undecided,
)
from diffulm.eval.generation_tasks import GENERATION
from diffulm.eval.likelihood import Estimate
from diffulm.eval.masks import Score
from diffulm.eval.tasks import TASKS


@pytest.mark.parametrize(("a", "b"), [(0, 0), (1, 0), (3, 5), (5, 3), (10, 2), (6, 6)])
def test_mcnemar_is_the_coin_test_by_enumeration(a: int, b: int) -> None:
    tosses = list(itertools.product([0, 1], repeat=a + b))
    extreme = sum(abs(2 * sum(t) - (a + b)) >= abs(a - b) for t in tosses) / len(tosses)
    assert mcnemar(a, b) == pytest.approx(extreme, abs=1e-12)


def test_mcnemar_rejects_a_true_difference_only() -> None:
    assert mcnemar(2000, 2100) > 0.1 and mcnemar(2000, 2400) < 1e-8


def test_paired_accuracy() -> None:
    rng = np.random.default_rng(0)
    both = (rng.random(2000) < 0.5).astype(float)
    better = np.where(rng.random(2000) < 0.05, 1.0, both)
    found = paired_accuracy(better, both)
    assert found["difference"] == pytest.approx(better.mean() - both.mean()) and found["p"] < 1e-6
    assert found["only_parent"] == 0 and found["only_model"] == int((better > both).sum())
    gaps = [np.subtract(better, both)[rng.integers(0, 2000, 2000)].mean() for _ in range(2000)]
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(gaps, [0.025, 0.975]), abs=0.002)
    assert paired_accuracy(both, both) == {
        "difference": 0.0, "low": 0.0, "high": 0.0, "only_model": 0, "only_parent": 0, "p": 1.0,
    }  # fmt: skip
    assert accuracy([1.0, 0.0, 1.0, 1.0]) == {"value": 0.75, "stderr": 0.25}
    assert accuracy([1.0])["stderr"] is None


def test_undecided_is_within_two_standard_errors() -> None:
    def score(nats: float, stderr: float) -> Score:
        return Score(nats, stderr, 5, 9, 0)

    assert undecided([score(10, 1), score(12, 1), score(99, 0)]) and not undecided([score(10, 1), score(13, 1)])
    assert not undecided([score(10, 0), score(10, 0)]), "exact scores are decided, ties and all"
    assert undecided([score(10, math.nan), score(50, 0)]) and not undecided([score(10, 9)])


def test_figures() -> None:
    mine = {"a": {"acc": 1.0, "perplexity": -2.0}, "b": {"acc": 0.0, "perplexity": -4.0}}
    other = {"b": {"acc": 0.0, "perplexity": -1.0}, "a": {"acc": 0.0, "perplexity": -1.0}}
    found = task_figures(mine, other, seed=0)
    assert found["acc"]["model"]["value"] == 0.5 and found["acc"]["paired"]["only_model"] == 1
    assert found["perplexity"]["model"]["value"] == pytest.approx(math.exp(3))
    assert found["perplexity"]["parent"]["value"] == pytest.approx(math.e)

    def text(nats: float, tokens: int, size: float) -> Estimate:
        return Estimate(nats, tokens, nats / tokens, 0.0, math.nan, 4, 0, bytes=size)

    one = [text(30, 10, 40.0), text(90, 30, 110.0)]
    figures = text_figures(one, words=20)
    assert figures["nats_per_token"] == 3.0 and figures["token_perplexity"] == pytest.approx(math.exp(3))
    assert figures["bits_per_byte"] == pytest.approx(120 / math.log(2) / 150) and figures["forwards"] == 8
    assert figures["word_perplexity"] == pytest.approx(math.exp(6)) and figures["stderr"] > 0
    gap = paired_texts(one, [text(20, 10, 40.0), text(60, 30, 110.0)])
    assert gap["difference"] == pytest.approx(40 / math.log(2) / 150)
    assert paired_texts(one[:1], one[1:])["stderr"] is None


def test_published_numbers_go_by_name() -> None:
    assert published("diffusionfamily/diffugpt-s", "hellaswag") == 33.4 and published("gpt2", "piqa") == 62.1
    assert published("runs/demo/model", "hellaswag") is None and published("gpt2", "boolq") is None
    known = {*TASKS, *GENERATION}
    assert all(set(row) <= known and all(0 < v < 80 for v in row.values()) for row in PUBLISHED.values())
