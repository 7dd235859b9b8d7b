"""Packing as arrays: every token once, best fit, and a large store's packing kept beside it."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffulm.data import packing
from diffulm.data.loader import Sequences
from diffulm.data.packing import Packing, best_fit
from diffulm.data.tokens import TokenStore, write_shards
from diffulm.tokenizer import SpecialTokens

KEYS = {"tokenizer": "a" * 64, "source": "b" * 64}
SPECIAL = SpecialTokens(bos=0, eos=1, pad=2, mask=3)


def one_by_one(sizes: list[int], length: int) -> list[list[int]]:
    """The definition: longest first, each into the fullest bin with room."""
    bins: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fits = [b for b in bins if length - sum(b) >= size]
        if fits:
            max(fits, key=sum).append(size)
        else:
            bins.append([size])
    return bins


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 30))
def test_best_fit_is_what_its_name_says(data: st.DataObject, length: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, length), max_size=40))
    bin_of, bins = best_fit(np.array(sizes, np.int64), length)
    found = [[s for s, b in zip(sizes, bin_of, strict=True) if b == k] for k in range(bins)]
    assert all(sum(b) <= length for b in found) and all(found)
    # Bins with equal room are equally good, so only the fill is determined.
    assert Counter(map(sum, found)) == Counter(map(sum, one_by_one(sizes, length)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=25), st.integers(2, 17), st.data())
def test_positions_in_the_joined_text(sizes: list[int], shard: int, data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        store = write_shards(Path(place), [(range(n), n) for n in sizes], dtype="uint16", **KEYS, shard_tokens=shard)
        ends = np.cumsum(np.array(sizes) + 1)
        for position in range(int(ends[-1])):
            document = int(np.searchsorted(ends, position, side="right"))
            assert store.at(position) == (document, position - (int(ends[document - 1]) if document else 0))


def sample_store(folder: Path) -> TokenStore:
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 40, 60)
    return write_shards(folder, [(rng.integers(4, 99, n), n) for n in sizes], dtype="uint16", **KEYS, shard_tokens=99)


def all_of(sequences: Sequences) -> list[list[Any]]:
    return [[part.tolist() for part in sequences.read(i)] for i in range(len(sequences))]


def test_the_packing_of_a_large_store_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small = sample_store(tmp_path / "small")
    expected = all_of(Sequences.cut(small, 16, SPECIAL))
    assert not list((tmp_path / "small").glob(".packing*"))
    monkeypatch.setattr(packing, "KEPT", 10)
    store = sample_store(tmp_path / "large")
    assert all_of(Sequences.cut(store, 16, SPECIAL)) == expected
    assert len(list((tmp_path / "large").glob(".packing-*-16-*.npy"))) == 3

    def made(*_: Any) -> Packing:
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(Packing, "_made", made)
        again = Sequences.cut(TokenStore.open(tmp_path / "large"), 16, SPECIAL)
        assert isinstance(again.packing.tails, np.memmap) and all_of(again) == expected  # type: ignore[union-attr]
        with pytest.raises(AssertionError, match="made again"):
            Sequences.cut(store, 17, SPECIAL)  # another length is another packing
    for path in (tmp_path / "large").glob(".packing-*-tails.npy"):  # what a full disk leaves
        path.write_bytes(path.read_bytes()[:100])
    assert all_of(Sequences.cut(store, 16, SPECIAL)) == expected

    def full(*_: Any) -> None:
        raise OSError(30, "read-only")

    monkeypatch.setattr(packing, "write_atomic", full)
    with caplog.at_level(logging.WARNING):
        Sequences.cut(store, 18, SPECIAL)
    assert "made anew each time" in caplog.text


def test_a_new_store_in_the_folder_drops_the_kept_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "KEPT", 1)
    Sequences.cut(sample_store(tmp_path / "a"), 16, SPECIAL)
    for path in (tmp_path / "a").glob("shard-*"):
        path.unlink()
    rng = np.random.default_rng(1)  # as many documents, other lengths
    other = write_shards(tmp_path / "a", [(rng.integers(4, 99, n), n) for n in range(60)], dtype="uint16", **KEYS)
    sequences = Sequences.cut(other, 16, SPECIAL)
    tokens = sum(int((valid & (ids > 3)).sum()) for ids, _, _, valid in map(sequences.read, range(len(sequences))))
    assert tokens == other.tokens
