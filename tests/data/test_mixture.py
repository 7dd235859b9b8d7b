"""The shuffle without a table is a permutation, and a fair one; the order of samples is arithmetic."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffulm.data.mixture import Mixture, _keys, shuffled


def order(size: int, *key: int) -> list[int]:
    keys = _keys(*key)
    return [shuffled(place, size, keys) for place in range(size)]


@pytest.mark.parametrize("size", [*range(1, 70), 100, 127, 128, 129, 1000, 4096, 4097])
def test_every_size_is_permuted(size: int) -> None:
    for seed in range(3):
        assert sorted(order(size, seed, 0, 0)) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**40), st.integers(0, 2**31), st.data())
def test_large_ranges_keep_places_apart(size: int, seed: int, data: st.DataObject) -> None:
    keys = _keys(seed, 1, 2)
    places = data.draw(st.lists(st.integers(0, size - 1), max_size=30, unique=True))
    found = [shuffled(place, size, keys) for place in places]
    assert len(set(found)) == len(places) and all(0 <= place < size for place in found)


def test_the_same_key_gives_the_same_order_and_another_key_another() -> None:
    same = order(500, 3, 1, 4)
    assert order(500, 3, 1, 4) == same
    for key in ((4, 1, 4), (3, 2, 4), (3, 1, 5)):
        other = order(500, *key)
        # A random permutation has one fixed point on average; so have two against each other.
        assert sum(a == b for a, b in zip(same, other, strict=True)) < 8


def test_the_order_of_an_old_run_never_changes() -> None:
    assert [shuffled(i, 10**8, _keys(7, -1, 3)) for i in range(3)] == [61985738, 33294751, 48658619]


@pytest.mark.parametrize("size", [3, 5, 16, 24])
def test_every_place_goes_everywhere_equally_often(size: int) -> None:
    """Chi-square of (place, where it goes) over keys; each row of the table is a multinomial of `trials` draws."""
    trials = 800
    table = np.zeros((size, size))
    for seed in range(trials):
        table[np.arange(size), order(size, seed, 0, 0)] += 1
    chi2 = ((table - trials / size) ** 2 / (trials / size)).sum()
    freedom = (size - 1) ** 2
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5 + 2


def test_neighbours_do_not_stay_neighbours() -> None:
    found = np.array(order(10_000, 0, 0, 0))
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(10_000), found)[0, 1]) < 0.05
    steps = np.diff(found)
    assert Counter(steps.tolist()).most_common(1)[0][1] < 12


class Many:
    """A source of 10^8 sequences that holds none of them."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def test_a_hundred_million_sequences_cost_no_more_than_a_hundred() -> None:
    sources: Any = [Many(10**8), Many(6 * 10**7)]
    mixture = Mixture(sources, [0.6936, 0.3064], 0)
    assert mixture.shares == [round(0.6936 * 16e7), round(0.3064 * 16e7)]
    start = time.perf_counter()
    for epoch in range(3):
        found = mixture.locate(range(epoch * 16 * 10**7, epoch * 16 * 10**7 + 300))
        assert len(set(found)) == 300
        assert 60 < sum(source for source, _ in found) < 125
    assert time.perf_counter() - start < 2
