"""Batches are a pure function of (seed, n, batch size); every token of the text is seen once an epoch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffulm.data.loader import Loader, Mixture, Sequences
from diffulm.layout import Annealing, Block, Causal, Full, Growth, Rows
from diffulm.process import MaskedDiffusion, stratified_levels
from diffulm.tokenizer import SpecialTokens

SPECIAL = SpecialTokens(bos=0, eos=1, pad=2, mask=3)
PROCESS = MaskedDiffusion(3)
FIRST = 4  # ids from here on are text


@dataclass
class Texts:
    """A token store in memory whose every token is different: coverage can be counted."""

    sizes: list[int]
    first: int = FIRST

    @property
    def lengths(self) -> np.ndarray:
        return np.array(self.sizes)

    @property
    def tokens(self) -> int:
        return sum(self.sizes)

    @property
    def documents(self) -> int:
        return len(self.sizes)

    def at(self, position: int) -> tuple[int, int]:
        ends = np.cumsum(self.lengths + 1)
        document = int(np.searchsorted(ends, position, side="right"))
        return document, position - int(ends[document - 1] if document else 0)

    def document(self, i: int, start: int = 0, n: int | None = None) -> np.ndarray:
        first = self.first + sum(self.sizes[:i])
        return np.arange(first, first + self.sizes[i])[start : None if n is None else start + n]


def cut(sizes: list[int], length: int, *, pack: str = "documents", first: int = FIRST) -> Sequences:
    return Sequences.cut(Texts(sizes, first), length, SPECIAL, pack=pack)  # type: ignore[arg-type]


def loader(**changes: Any) -> Loader:
    """Batches of 8 from 40 documents of 1..30 tokens in windows of 12."""
    sizes = np.random.default_rng(5).integers(1, 31, 40).tolist()
    kind: dict[str, Any] = {"layout": Full(), "process": PROCESS, "batch": 8, "micro_batch": 8, "seed": 7}
    return Loader(Mixture([cut(sizes, 12)], [1.0], 7), **{**kind, **changes})


def same(a: Rows, b: Rows) -> bool:
    """Every field equal, bit for bit."""
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Rows)]
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def samples(parts: list[Rows]) -> list[tuple[Any, ...]]:
    """Each sample of some micro-batches by itself: tokens, and (position, target, weight, level) of what is wanted."""
    out = []
    for rows in parts:
        R = rows.ids.shape[1]
        for b in range(len(rows.ids)):
            mine = rows.source // R == b
            wanted = torch.stack([rows.source[mine] % R, rows.target[mine]]).T.tolist()
            numbers = torch.stack([rows.weight[mine], rows.level[mine]]).T.tolist()
            out.append((rows.ids[b].tolist(), rows.document[b].tolist(), rows.valid[b].tolist(), wanted, numbers))
    return out


# --------------------------------------------------------------------------------------------------- sequences


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=25), st.integers(2, 17))
def test_documents_packing_covers_every_token_once(sizes: list[int], length: int) -> None:
    if sum(sizes) + len(sizes) < length - 1:
        with pytest.raises(ValueError, match="shorter than one window"):
            cut(sizes, length)
        return
    sequences = cut(sizes, length)
    tokens: Counter[int] = Counter()
    ends = 0
    for index in range(len(sequences)):
        ids, maskable, document, valid = sequences.read(index)
        assert len(ids) == length
        n = int(valid.sum())
        assert valid[:n].all() and (ids[n:] == SPECIAL.pad).all() and not maskable[n:].any()
        starts = np.flatnonzero(np.diff(document[:n], prepend=-1))
        assert document[:n].tolist() == sorted(document[:n]) and (ids[starts] == SPECIAL.bos).all()
        # Only starts and padding are not maskable; padding belongs to no document.
        assert (maskable[:n] == ~np.isin(np.arange(n), starts)).all()
        assert n == length or document[n] not in document[:n]
        for start, stop in zip(starts, [*starts[1:], n], strict=True):
            piece = ids[start + 1 : stop]
            text = piece[:-1] if piece[-1] == SPECIAL.eos else piece
            assert len(piece) and (np.diff(text) == 1).all(), "one stretch of one document"
            if piece[-1] != SPECIAL.eos:
                assert len(piece) == length - 1, "only a full window goes on in another"
            ends += piece[-1] == SPECIAL.eos
            tokens.update(text.tolist())
    assert tokens == Counter(range(FIRST, FIRST + sum(sizes))) and ends == len(sizes)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=25), st.integers(2, 17))
def test_concat_packing_is_the_joined_text_cut(sizes: list[int], length: int) -> None:
    texts = Texts(sizes)
    joined = np.concatenate([np.append(texts.document(i), SPECIAL.eos) for i in range(len(sizes))])
    if len(joined) < length:
        with pytest.raises(ValueError, match="less than one sequence"):
            cut(sizes, length, pack="concat")
        return
    sequences = cut(sizes, length, pack="concat")
    parts = [sequences.read(i) for i in range(len(sequences))]
    # All but the rest that fills no sequence, in order, nothing between.
    assert np.concatenate([p[0] for p in parts]).tolist() == joined[: len(joined) // length * length].tolist()
    for _, maskable, document, valid in parts:
        assert valid.all() and not document.any() and not maskable[0] and maskable[1:].all()


def test_short_windows_share_sequences_closely() -> None:
    # 1 + 3 + EOS = 5 rows each: two fill a sequence of 10; 9 tokens are a full window.
    sequences = cut([3] * 6 + [9, 8], 10)
    assert sequences.packing is not None
    assert sorted(len(list(sequences.packing.pieces(i))) for i in range(6)) == [1, 1, 1, 2, 2, 2]
    assert all(sequences.read(i)[3].sum() in (10, 2) for i in range(6))


def test_natural_mask_tokens_are_not_maskable() -> None:
    texts = Texts([12])
    ids = np.array([5, 3, 6, 3, 3, 7, 8, 9, 10, 11, 12, 13])
    texts.document = lambda i, start=0, n=None: ids[start:][:n]  # type: ignore[method-assign]
    for pack in ("documents", "concat"):
        read, maskable, _, _ = Sequences.cut(texts, 13, SPECIAL, pack=pack).read(0)  # type: ignore[arg-type]
        assert (maskable == ((read != SPECIAL.mask) & (np.arange(13) > 0))).all()
        assert (read == SPECIAL.mask).sum() == 3
    mixture = Mixture([Sequences.cut(texts, 14, SPECIAL)], [1.0], 0)  # type: ignore[arg-type]
    for n in range(20):
        rows = Loader(mixture, Full(), PROCESS, 1, 1, 0).rows(n)[0]
        assert rows.maskable == 10 and SPECIAL.mask not in rows.target.tolist()


def test_errors_of_cutting() -> None:
    with pytest.raises(ValueError, match="unknown packing 'pages': use documents or concat"):
        cut([9], 4, pack="pages")
    with pytest.raises(ValueError, match="at least 2 tokens"):
        cut([9], 1)


# ----------------------------------------------------------------------------------------------------- mixture


def test_shares_follow_the_weights_and_epochs_visit_everything_once() -> None:
    sources = [cut([10] * 10, 12), cut([10] * 25, 12, first=1000), cut([10] * 5, 12, first=2000)]
    mixture = Mixture(sources, [3.0, 1.0, 0.0], seed=1)
    assert mixture.shares == [30, 10, 0]
    found = mixture.locate(range(40 * 50))
    for epoch in range(50):
        part = Counter(source for source, _ in found[epoch * 40 : (epoch + 1) * 40])
        assert part == {0: 30, 1: 10}
    # 30 entries a mixture epoch are three turns of the first source; 5 epochs are two of the second.
    for source, size, epochs, turns in ((0, 10, 1, 3), (1, 25, 5, 2)):
        for first in range(0, 50, epochs):
            part = Counter(s for i, s in found[first * 40 : (first + epochs) * 40] if i == source)
            assert part == dict.fromkeys(range(size), turns)
    assert mixture.epochs(40) == 3.0


def test_the_order_changes_from_epoch_to_epoch_and_with_the_seed() -> None:
    source = cut([10] * 30, 12)
    one = [s for _, s in Mixture([source], [1.0], 0).locate(range(60))]
    assert sorted(one[:30]) == sorted(one[30:]) == list(range(30))
    assert one[:30] != one[30:] and one != [s for _, s in Mixture([source], [1.0], 1).locate(range(60))]


@pytest.mark.parametrize("weights", [[1.0], [-1.0, 2.0], [0.0, 0.0]])
def test_errors_of_mixtures(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="mixture"):
        Mixture([cut([10], 12)] * 2, weights, 0)


# ---------------------------------------------------------------------------------------------------- batches

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "own": {"layout": Full("own")},
    "rate": {"form": "rate"},
    "complementary": {"complementary": True},
    "block": {"layout": Block(4, "launch", 0.5)},
    "complementary blocks": {"layout": Block(4), "complementary": True},
    "growing blocks": {"layout": Block(8, "launch", 0.5), "growth": Growth((1, 2, 4, 8), 18)},
    "parent": {"layout": Causal(), "process": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_pure_function_of_its_number(kind: str) -> None:
    batches, again = loader(**KINDS[kind]), loader(**KINDS[kind])
    forward = {n: batches.rows(n)[0] for n in (0, 1, 5, 17)}
    assert all(same(again.rows(n)[0], forward[n]) for n in (17, 5, 1, 0, 5))
    assert samples([forward[0]]) != samples([forward[1]])


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_micro_batches_change_nothing(kind: str) -> None:
    """1, 2 and 4 processes and micro-batches of 1, 2, 3, 8 see the same samples with the same noise, in order."""
    whole = samples(loader(**KINDS[kind]).rows(3))
    assert len(whole) == 8
    for world in (1, 2, 4):
        for micro in (1, 2, 3, 8):
            batches = loader(**{**KINDS[kind], "micro_batch": micro})
            ranks = [samples(batches.rows(3, rank, world)) for rank in range(world)]
            assert [ranks[i % world][i // world] for i in range(8)] == whole, (world, micro)
            assert batches.count(3, normalisation="nelbo") == loader(**KINDS[kind]).rows(3)[0].maskable
            assert batches.count(3, normalisation="masked") == loader(**KINDS[kind]).rows(3)[0].noised


def test_the_seed_changes_the_noise() -> None:
    masks = [[(s[0], [p for p, _ in s[3]]) for s in samples(loader(seed=seed).rows(0))] for seed in range(4)]
    assert all(masks[a] != masks[b] for a in range(4) for b in range(a))


def test_complementary_pairs_are_complementary() -> None:
    batches = loader(complementary=True, batch=16, micro_batch=16)
    halves = full = 0
    for n in range(8):
        rows = batches.rows(n)[0]
        noised = torch.zeros(16, 12, dtype=torch.bool)
        noised.view(-1)[rows.source + 1] = True
        clean = torch.zeros(16, 12, dtype=torch.long)
        clean.view(-1)[rows.source + 1] = rows.target
        clean = torch.where(noised, clean, rows.ids)
        for k in range(0, 16, 2):
            assert torch.equal(clean[k], clean[k + 1]), "a pair is one sequence twice"
            maskable = (clean[k] != SPECIAL.bos) & rows.valid[k]
            if torch.equal(noised[k], maskable):
                assert torch.equal(noised[k + 1], maskable), "everything noised has no complement"
                full += 1
            else:
                assert torch.equal(noised[k] ^ noised[k + 1], maskable)
                halves += 1
    assert halves > 40 and full > 0


def test_levels_are_stratified_over_the_global_batch() -> None:
    """Of 8 samples with 11 maskable tokens each, one falls in each eighth of the levels."""
    mixture = Mixture([cut([10] * 40, 12)], [1.0], 0)
    batches = Loader(mixture, Full(), PROCESS, 8, 2, 0)
    for n in range(20):
        levels = stratified_levels(0, 8 * n, 8, batch=8)[:, 0]
        assert sorted((levels * 8).floor().long().tolist()) == list(range(8))
        counts = [len(wanted) for *_, wanted, _ in samples(batches.rows(n))]
        assert counts == [1 + int(level * 11) for level in levels.tolist()]


def test_fixed_shapes_pads_to_eighths_with_weight_zero() -> None:
    plain, fixed = loader(micro_batch=4), loader(micro_batch=4, fixed_shapes=True)
    unit = 4 * 12 // 8
    seen = set()
    for n in range(12):
        for a, b in zip(plain.rows(n), fixed.rows(n), strict=True):
            k = len(a.source)
            assert len(b.source) % unit == 0 and 0 <= len(b.source) - k < unit
            assert torch.equal(b.source[:k], a.source) and torch.equal(b.target[:k], a.target)
            assert torch.equal(b.weight[:k], a.weight) and not b.weight[k:].any() and not b.level[k:].any()
            assert (a.noised, a.maskable) == (b.noised, b.maskable)
            seen.add(len(b.source))
    assert 2 < len(seen) <= 8


def test_the_parent_reads_every_token_and_sees_no_noise() -> None:
    rows = loader(**KINDS["parent"]).rows(2)[0]
    noisy = loader().rows(2)[0]
    assert rows.pattern == "causal" and SPECIAL.mask not in rows.ids.tolist() and rows.maskable == len(rows.target)
    assert torch.equal(rows.target, rows.ids.reshape(-1)[rows.source + 1]) and SPECIAL.bos not in rows.target.tolist()
    visible = noisy.ids != SPECIAL.mask
    assert torch.equal(rows.ids[visible], noisy.ids[visible]), "both arms read the same sequences"


def test_annealing_hands_the_matrix_of_the_step_to_every_micro_batch() -> None:
    annealing = Annealing(3, seed=9)
    batches = loader(annealing=annealing, micro_batch=2)
    for n in range(2):
        expected = annealing.matrix(n, 12)
        assert expected is not None and all(torch.equal(r.annealed, expected) for r in batches.rows(n))  # type: ignore[arg-type]
    assert all(rows.annealed is None for rows in batches.rows(2) + batches.rows(9))


def test_growing_blocks_are_those_of_their_step() -> None:
    growing = loader(layout=Block(8, "launch"), growth=Growth((1, 4, 8), 9))
    for n in range(11):
        fixed = loader(layout=Block((1, 4, 8)[min(2, n // 3)], "launch"))
        assert all(same(a, b) for a, b in zip(growing.rows(n), fixed.rows(n), strict=True))
    assert loader(layout=Block(4)).layout_at(3) == Block(4) and loader().layout_at(3) == Full()


def test_every_block_of_every_document_has_a_noise_level_of_its_own() -> None:
    """Blocks count from each document's start; over a global batch their levels are stratified block by block."""
    sequences = cut([5] * 40, 14)  # behind their start tokens 6 tokens and EOS: blocks of 4 and 3, twice a sequence
    assert sequences.read(0)[2].tolist() == [0] * 7 + [1] * 7
    batches = Loader(Mixture([sequences], [1.0], 0), Block(4), PROCESS, 4, 1, 0)
    for n in range(20):
        counts = torch.zeros(4, 4, dtype=torch.long)  # (sample, block): masked tokens
        for b, rows in enumerate(batches.rows(n)):
            document, block = (getattr(rows, k).reshape(-1)[rows.source] for k in ("document", "block"))
            counts[b].index_add_(0, document * 2 + block, torch.ones_like(block))
        sizes = torch.tensor([3, 3, 3, 3])
        levels = stratified_levels(0, 4 * n, 4, batch=4, groups=4)
        assert counts.tolist() == (1 + (levels * sizes).floor().long()).tolist()
        for g in range(4):
            assert sorted((levels[:, g] * 4).floor().long().tolist()) == [0, 1, 2, 3]


def test_complementary_masks_are_complementary_in_every_block() -> None:
    sequences = cut([11] * 20, 13)
    batches = Loader(Mixture([sequences], [1.0], 0), Block(4), PROCESS, 8, 8, 0, complementary=True)
    pairs = whole = 0
    for n in range(6):
        rows = batches.rows(n)[0]
        noised = torch.zeros(8, rows.ids.shape[1], dtype=torch.bool)
        noised.view(-1)[rows.source] = True
        for k, block in ((k, block) for k in range(0, 8, 2) for block in range(1, 3)):
            a, b = (noised[x, 4 * block : 4 * block + 4] for x in (k, k + 1))
            assert torch.equal(a, ~b) or bool(a.all() and b.all()), "everything noised has no complement"
            pairs, whole = pairs + 1, whole + int(a.all() and b.all())
    assert 0 < whole < pairs / 2


def test_errors_of_batches() -> None:
    batches = loader(batch=12)
    with pytest.raises(ValueError, match=r"8 processes do not divide a batch of 12; use one of \[1, 2, 3, 4, 6\]"):
        batches.rows(0, 0, 8)
    with pytest.raises(ValueError, match="even batch"):
        loader(batch=7, complementary=True)
    with pytest.raises(ValueError, match="form = 'count'"):
        loader(form="rate", complementary=True)
    with pytest.raises(ValueError, match="the full layout has no blocks that could grow"):
        loader(growth=Growth((2, 4), 8))
    for changes in ({"batch": 0}, {"micro_batch": 0}):
        with pytest.raises(ValueError, match="at least 1 sequence"):
            replace(batches, **changes)  # type: ignore[arg-type]
