"""Figures of generated text against what they are by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from diffulm import hub
from diffulm.bench.quality import describe, interval, nats_under_parent
from diffulm.denoiser import HFDenoiser
from diffulm.eval.likelihood import ratio_stderr
from diffulm.eval.masks import student
from diffulm.eval.quality import distinct_n, unigram_entropy


@pytest.fixture(scope="module")
def scorer(parent: Path) -> HFDenoiser:
    return HFDenoiser(hub.load_parent(str(parent), dtype=torch.float64)[0].eval(), None)


def test_nats_are_the_parents_own_for_the_new_tokens_alone(scorer: HFDenoiser) -> None:
    drawn = torch.randint(3, 100, (11, 6), generator=torch.Generator().manual_seed(0))
    texts = [torch.arange(5 + b, 5 + 2 * b + 1).tolist() for b in range(11)]  # unequal lengths, more than one batch
    found = nats_under_parent(scorer, drawn, texts)
    for given, text, nats in zip(drawn, texts, found, strict=True):
        ids = torch.cat([given, torch.tensor(text)])
        with torch.no_grad():
            by_hand = -scorer.model(ids[None]).logits[0, 5:-1].log_softmax(-1).gather(1, ids[6:, None]).sum()
        assert nats == pytest.approx(float(by_hand), abs=1e-9)


def test_entropy_and_distinct_pairs() -> None:
    assert unigram_entropy([7, 7, 7]) == 0
    assert unigram_entropy([1, 2, 3, 4]) == pytest.approx(math.log(4))
    assert unigram_entropy([1, 1, 2, 3]) == pytest.approx(1.5 * math.log(2))
    assert distinct_n([1, 2, 1, 2, 1], 2) == 0.5 and distinct_n([1, 2, 3], 2) == 1 and math.isnan(distinct_n([1], 2))


def test_an_interval_counts_prompts_and_not_texts() -> None:
    above, below = [10.0, 12.0, 30.0, 36.0], [5.0, 6.0, 10.0, 12.0]
    once = interval(above[::2], below[::2], [0, 1])
    twice = interval(above, below, [0, 0, 1, 1])  # the same prompts again tell less than new ones
    new = interval(above, below, [0, 1, 2, 3])
    assert once is not None and twice is not None and new is not None
    assert twice["value"] == pytest.approx(88 / 33) and twice["prompts"] == once["prompts"] == 2
    error = ratio_stderr(np.array(above), np.array(below), np.array([0, 0, 1, 1]))
    assert twice["half_width"] == pytest.approx(student(1.96, 1) * error)
    assert new["half_width"] < twice["half_width"]
    assert interval([4.0], [2.0], [0]) == {"value": 2.0, "half_width": None, "prompts": 1}
    assert interval([math.nan], [1.0], [0]) is None
    known = interval([math.nan, 3.0], [1.0, 1.0], [0, 1])
    assert known == {"value": 3.0, "half_width": None, "prompts": 1}


def test_without_a_parent_there_is_no_likelihood() -> None:
    found = describe(None, torch.zeros(2, 3, dtype=torch.long), [[1, 2, 3], [4, 4, 4]], [0, 1])
    assert found["nats_per_token_under_parent"] is None
    assert found["unigram_entropy"]["value"] == pytest.approx(math.log(3) / 2)
    assert found["distinct_2"]["value"] == 0.75
