"""Layouts: who sees whom, by a predicate written a second time; and what follows for the bound, by enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffulm.layout import Block, Causal, Full, Growth, NoisedBatch, Rows, layout_from_config, noise_share, visible
from diffulm.objective import diffusion_loss
from diffulm.process import MaskedDiffusion

from .toy import MASK, TEXTS, Table, joint, masks
from .toy import L as LENGTH
from .toy import V as WORDS

#: (stream, place in the sequence, position in its document, block): what a row is. A launch row is a noisy copy of the
#: token before its block; "nothing" fills up the launch rows of a sample that needs fewer.
Row = tuple[str, int, int, int]


@st.composite
def batches(draw: st.DrawFn, size: int | None = None) -> tuple[NoisedBatch, int]:
    """(a noised batch of two samples with packed documents and padding, a block size)."""
    length = draw(st.integers(2, 10))
    size = size or draw(st.integers(1, length + 1))
    documents, valid = torch.zeros(2, length, dtype=torch.long), torch.ones(2, length, dtype=torch.bool)
    for b in range(2):
        cuts = draw(st.lists(st.integers(1, length - 1), max_size=2))
        for cut in cuts:
            documents[b, cut:] += 1
        end = draw(st.integers(1, length))
        valid[b, end:] = False
        documents[b, end:] = 9
    maskable = valid.clone()
    maskable[:, 0] = False
    maskable[:, 1:] &= documents[:, 1:] == documents[:, :-1]
    noised = maskable & torch.tensor(draw(st.lists(st.booleans(), min_size=2 * length, max_size=2 * length))).view(
        2, -1
    )
    x0 = 10 + torch.arange(2 * length).view(2, -1)
    group = torch.tensor([places_of(documents[b].tolist(), size)[1] for b in range(2)])
    ids = x0.masked_fill(noised, MASK)
    return NoisedBatch(x0, ids, noised, maskable, noised * 1.5, documents, valid, group), size


def places_of(documents: list[int], size: int) -> tuple[list[int], list[int]]:
    """(position in its own document, number of its block in the sequence) of each token, counted one by one."""
    position: list[int] = []
    group: list[int] = []
    for p, document in enumerate(documents):
        position.append(position[-1] + 1 if p and documents[p - 1] == document else 0)
        group.append((group[-1] if p else -1) + (position[-1] % size == 0))
    return position, group


def what_rows_are(layout: Block, documents: list[int]) -> list[Row]:
    """Noisy tokens, launch rows, clean tokens, in the order the layout promises."""
    position, _ = places_of(documents, layout.size)
    tokens = [(p, at, at // layout.size) for p, at in enumerate(position)]
    rows: list[Row] = [("noisy", *token) for token in tokens]
    if layout.source == "launch":
        opens = [(p - 1, at - 1, block) for p, at, block in tokens if at and at % layout.size == 0]
        rows += [("launch", *token) for token in opens]
        rows += [("nothing", 0, 0, 0)] * ((len(documents) - 1) // layout.size - len(opens))
    return rows + [("clean", *token) for token in tokens]


def sees(query: Row, key: Row) -> bool:
    """The block relation of the design's table, in words: clean is causal; noisy sees its block and earlier clean."""
    (q, _, q_at, q_block), (k, _, k_at, k_block) = query, key
    if q == "clean":
        return k == "clean" and k_at <= q_at
    if k == "clean":
        return k_block < q_block
    return k_block == q_block


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(["own", "launch"]), st.sampled_from([0.0, 0.5]))
def test_block_visibility_sources_and_targets(case: tuple[NoisedBatch, int], source: Any, ar_weight: float) -> None:
    batch, size = case
    layout = Block(size, source, ar_weight)
    rows = layout.training_rows(batch)
    B, length = batch.x0_BL.shape
    what_B = [what_rows_are(layout, batch.document_BL[b].tolist()) for b in range(B)]
    assert rows.ids.shape == (B, len(what_B[0])) and len(what_B[0]) == len(what_B[1])
    seen = visible(rows)
    for b, what in enumerate(what_B):
        document, valid = batch.document_BL[b].tolist(), batch.valid_BL[b].tolist()
        for r, row in enumerate(what):
            stream, place, at, block = row
            if stream == "nothing":
                assert not rows.valid[b, r] and seen[b, :, r].nonzero()[:, 0].tolist() == [r]
                continue
            assert rows.position[b, r] == at and rows.block[b, r] == block
            assert rows.document[b, r] == document[place] and rows.valid[b, r] == valid[place]
            # The token a launch row copies is finished by the time its block is decoded, so it is the clean one.
            assert rows.ids[b, r] == (batch.ids_BL if stream == "noisy" else batch.x0_BL)[b, place]
            assert rows.stream[b, r] == (0 if stream == "clean" else 1)
            for k, key in enumerate(what):
                if key[0] != "nothing":
                    expected = k == r or (sees(row, key) and document[place] == document[key[1]] and valid[key[1]])
                    assert bool(seen[b, r, k]) == expected, (row, key)

    # Each noised token once, read from the row the layout names; then the clean rows, each predicting the next.
    wanted = []
    at_B = [places_of(batch.document_BL[b].tolist(), size)[0] for b in range(B)]
    for b, i in batch.noised_BL.nonzero().tolist():
        at = at_B[b][i]
        if source == "own":
            row = ("noisy", i, at, at // size)
        elif at % size:
            row = ("noisy", i - 1, at - 1, at // size)
        else:
            row = ("launch", i - 1, at - 1, at // size)
        wanted.append((b, row, int(batch.x0_BL[b, i]), 1.5))
    if ar_weight:
        wanted += [
            (b, ("clean", i - 1, at_B[b][i] - 1, (at_B[b][i] - 1) // size), int(batch.x0_BL[b, i]), ar_weight)
            for b, i in batch.maskable_BL.nonzero().tolist()
        ]
    places = [divmod(s, rows.ids.shape[1]) for s in rows.source.tolist()]
    assert [(b, what_B[b][r]) for b, r in places] == [w[:2] for w in wanted]
    assert rows.target.tolist() == [w[2] for w in wanted] and rows.weight.tolist() == [w[3] for w in wanted]
    assert rows.noised == int(batch.noised_BL.sum()) and rows.maskable == int(batch.maskable_BL.sum())
    # A row that predicts never sees its target, and always sees all that is known of its block.
    for (b, r), (_, row, target, _) in zip(places, wanted, strict=True):
        keys = seen[b, r].nonzero()[:, 0].tolist()
        assert target not in rows.ids[b, keys].tolist()
        place, what = target - 10 - b * length, what_B[b]
        own = [k for k in range(len(what)) if what[k][0] == "noisy" and what[k][3] == at_B[b][place] // size]
        same = [k for k in own if batch.document_BL[b, what[k][1]] == batch.document_BL[b, place]]
        assert row[0] == "clean" or set(same) <= set(keys)
    assert layout.noise_groups(batch.document_BL).equal(batch.group_BL)


@settings(max_examples=40, deadline=None)
@given(batches(size=4))
def test_one_stream_visibility(case: tuple[NoisedBatch, int]) -> None:
    batch, _ = case
    B, length = batch.x0_BL.shape
    later = torch.rand(length, length, generator=torch.Generator().manual_seed(0)) < 0.4
    annealed = NoisedBatch(**{**vars(batch), "annealed_LL": later})
    relations = {
        "full": (Full().training_rows(batch), lambda q, k: True),
        "causal": (Causal().training_rows(batch), lambda q, k: k <= q),
        "annealed": (Full().training_rows(annealed), lambda q, k: k <= q or bool(later[q, k])),
    }
    for name, (rows, relation) in relations.items():
        seen = visible(rows)
        for b, q, k in itertools.product(range(B), range(length), range(length)):
            together = batch.document_BL[b, q] == batch.document_BL[b, k] and batch.valid_BL[b, k]
            assert bool(seen[b, q, k]) == (q == k or bool(together and relation(q, k))), name
        assert rows.plain == all(
            bool(batch.valid_BL[b].all()) and len(batch.document_BL[b].unique()) == 1 for b in range(B)
        )
    for source, back in (("previous", 1), ("own", 0)):
        rows = Full(source).training_rows(batch)  # type: ignore[arg-type]
        expected = [b * length + i - back for b, i in batch.noised_BL.nonzero().tolist()]
        assert rows.source.tolist() == expected and rows.target.equal(batch.x0_BL[batch.noised_BL])
        assert rows.ids.equal(batch.ids_BL)


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from([Full(), Full("own"), Block(2, "own"), Block(2, "launch", 0.3)]), st.data())
def test_the_row_trained_is_the_row_decoded_from(
    case: tuple[NoisedBatch, int], layout: Full | Block, data: st.DataObject
) -> None:
    """Training noises every block at once; decoding meets block g with all before it finished and all after it masked.
    For the tokens of block g: the same row, position, and (position, token) pairs in sight."""
    batch, size = case
    zeros = torch.zeros_like(batch.document_BL)
    batch = NoisedBatch(**{**vars(batch), "document_BL": zeros, "valid_BL": torch.ones_like(batch.valid_BL)})
    length = batch.x0_BL.shape[1]
    if isinstance(layout, Block):
        layout = Block(size, layout.source, layout.ar_weight)
        g = data.draw(st.integers(0, (length - 1) // size))
        here = (torch.arange(length) // size == g).expand_as(batch.noised_BL)
        before = (torch.arange(length) // size < g).expand_as(here)
        canvas = torch.where(before, batch.x0_BL, torch.where(here, batch.ids_BL, MASK))
        wanted = batch.noised_BL & here
    else:
        canvas, wanted = batch.ids_BL, batch.noised_BL
    trained, decoded = layout.training_rows(batch), layout.decoding_rows(canvas, batch.valid_BL, wanted)
    whole = layout.name == "full"  # decoding leaves out rows of other blocks, so there a row has another number
    assert decoded.pattern == trained.pattern
    assert not whole or trained.ids.shape == decoded.ids.shape

    def facts(rows: Rows) -> dict[tuple[int, int], Any]:
        """(sample, position of the target) -> the row it is read from and what that row sees."""
        R, found = rows.ids.shape[1], {}
        seen = visible(rows)
        for source, target in zip(rows.source.tolist(), rows.target.tolist(), strict=True):
            b, r = divmod(source, R)
            if rows.stream[b, r] == 0:
                continue  # the clean rows' own next-token loss
            keys = seen[b, r].nonzero()[:, 0]
            sight = sorted(zip(rows.position[b, keys].tolist(), rows.ids[b, keys].tolist(), strict=True))
            found[(b, target)] = (r if whole else None, int(rows.position[b, r]), int(rows.block[b, r]), sight)
        return found

    a = facts(trained)
    # Targets of decoding are the masks on the canvas; name them by position instead.
    b, i = wanted.nonzero(as_tuple=True)
    named = decoded.__class__(**{**vars(decoded), "target": batch.x0_BL[b, i]})
    assert facts(named) == {key: value for key, value in a.items() if key[1] in batch.x0_BL[wanted].tolist()}


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(["own", "launch"]), st.sampled_from([0.0, 0.3]))
def test_a_packed_document_is_trained_as_the_text_that_is_decoded(
    case: tuple[NoisedBatch, int], source: Any, ar_weight: float
) -> None:
    """Wherever in a sequence a document begins, its rows are those it has alone: positions, blocks, what is in sight,
    levels. (Alone, the row trained is the row decoded from: the test above.)"""
    batch, size = case
    layout = Block(size, source, ar_weight)
    together = facts_of(layout.training_rows(batch))
    apart: dict[Any, Any] = {}
    for b in range(len(batch.x0_BL)):
        length = int(batch.valid_BL[b].sum())
        for document in batch.document_BL[b, :length].unique():
            here = (batch.document_BL[b] == document).nonzero()[:, 0]
            start, stop = int(here[0]), min(int(here[-1]) + 1, length)
            cut = {k: v[b : b + 1, start:stop] for k, v in vars(batch).items() if k != "annealed_LL"}
            alone = NoisedBatch(**cut | {"group_BL": layout.groups(stop - start)[None]})
            apart |= facts_of(layout.training_rows(alone))
    assert together == apart


def facts_of(rows: Rows) -> dict[tuple[int, int], Any]:
    """(target, stream of its row) -> position and block of that row, its weight and level, and the rows in sight."""
    R, found = rows.ids.shape[1], {}
    seen = visible(rows)
    numbers = zip(rows.source.tolist(), rows.target.tolist(), rows.weight.tolist(), rows.level.tolist(), strict=True)
    for source, target, weight, level in numbers:
        b, r = divmod(source, R)
        keys = seen[b, r].nonzero()[:, 0]
        sight = sorted(
            zip(*(x[b, keys].tolist() for x in (rows.position, rows.stream, rows.block, rows.ids)), strict=True)
        )
        row = int(rows.position[b, r]), int(rows.block[b, r])
        assert (target, int(rows.stream[b, r])) not in found
        found[(target, int(rows.stream[b, r]))] = (row, weight, level, sight)
    return found


def test_a_prompt_that_ends_inside_a_block_is_a_state_of_training() -> None:
    """Of 4 tokens the first j are given and the rest masked: every such mask of every block is drawn, often."""
    layout, length = Block(4), 12
    x0 = torch.arange(10, 10 + length)[None].repeat(2000, 1)
    yes, zeros = torch.ones_like(x0, dtype=torch.bool), torch.zeros_like(x0)
    groups = layout.noise_groups(zeros)
    levels = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maskable = yes.clone()
    maskable[:, 0] = False
    _, noised, _ = MaskedDiffusion(MASK).corrupt(x0, maskable, groups, levels, range(2000))
    for block in (1, 2):
        patterns = noised[:, 4 * block : 4 * block + 4].long() @ torch.tensor([8, 4, 2, 1])
        for j, pattern in enumerate((15, 7, 3, 1)):
            expected = 1 / 4 / math.comb(4, j)  # one of the C(4, j) masks of its count, which has probability 1/4
            found = float((patterns == pattern).float().mean())
            assert found == pytest.approx(expected, abs=4 * math.sqrt(expected / 2000))


# ------------------------------------------------------------------------------------------ the bound, by enumeration


@dataclass(frozen=True)
class Sighted:
    """The toy's table as a denoiser of any layout: it predicts from exactly what the source row sees.

    Position 0 carries a start token that the table does not know. `shift`: rows predict the token after them.
    """

    table: Table
    shift: bool

    def __call__(self, rows: Rows, *, cache: object = None) -> Tensor:
        R, out = rows.ids.shape[1], []
        seen = visible(rows)
        for source in rows.source.tolist():
            b, r = divmod(source, R)
            known = [MASK] * LENGTH
            for k in seen[b, r].nonzero()[:, 0].tolist():
                if rows.position[b, k] > 0 and rows.ids[b, k] != MASK:
                    known[int(rows.position[b, k]) - 1] = int(rows.ids[b, k])
            target = int(rows.position[b, r]) + int(self.shift or rows.stream[b, r] == 0) - 1
            assert known[target] == MASK, "the answer is in sight"
            out.append(torch.from_numpy(self.table.rows[tuple(known)][target]))
        return torch.stack(out).log() if out else torch.zeros(0, WORDS, dtype=torch.float64)

    def nll(self, rows: Rows) -> Tensor:
        return -self(rows).gather(1, rows.target[:, None])[:, 0]


def every_noise(layout: Full | Block, text: tuple[int, ...]) -> Iterator[tuple[float, NoisedBatch]]:
    """(probability, batch) of every count-form mask of a text behind a start token: levels of groups independent."""
    length = LENGTH + 1
    group = layout.groups(length) if isinstance(layout, Block) else torch.zeros(length, dtype=torch.long)
    members = [[i for i in range(1, length) if group[i] == g] for g in range(int(group.max()) + 1)]
    choices = []
    for inside in members:
        n = len(inside)
        subsets = [s for k in range(1, n + 1) for s in itertools.combinations(inside, k)] or [()]
        choices.append([(s, 1 / (n * math.comb(n, len(s))) if n else 1.0, n / len(s) if n else 0.0) for s in subsets])
    x0 = torch.tensor([[WORDS + 1, *text]])
    yes = torch.ones_like(x0, dtype=torch.bool)
    maskable = yes.clone()
    maskable[:, 0] = False
    for combination in itertools.product(*choices):
        noised, weight = torch.zeros_like(yes), torch.zeros(x0.shape)
        for subset, _, w in combination:
            for i in subset:
                noised[0, i], weight[0, i] = True, w
        ids = x0.masked_fill(noised, MASK)
        batch = NoisedBatch(x0, ids, noised, maskable, weight, torch.zeros_like(x0), yes, group[None])
        yield math.prod(p for _, p, _ in combination), batch


def bound(layout: Full | Block, table: Table, text: tuple[int, ...]) -> float:
    denoiser = Sighted(table, shift=layout.source != "own")
    return sum(p * loss64(denoiser, layout.training_rows(batch)) for p, batch in every_noise(layout, text))


def loss64(denoiser: Sighted, rows: Rows) -> float:
    """`diffusion_loss` before it goes to float32 (weights 3/2 and 3 are exact there)."""
    total = float((denoiser.nll(rows) * rows.weight.double()).sum())
    assert diffusion_loss(denoiser, rows).sum.item() == pytest.approx(total, rel=1e-5, abs=1e-6)
    return total


P = joint()
EXACT, WRONG = Table.exact(P), Table.inconsistent()


LAYOUTS: list[Full | Block] = [Full("previous"), Full("own")]
LAYOUTS += [Block(size, "own") for size in (1, 2, 3, 4, 9)] + [Block(size, "launch") for size in (1, 2, 3, 4, 9)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_bound_of_the_exact_table_is_the_likelihood_in_every_layout(layout: Full | Block) -> None:
    for text in TEXTS[::4]:
        assert bound(layout, EXACT, text) == pytest.approx(-math.log(P[text]), abs=1e-12)


@pytest.mark.parametrize("source", ["own", "launch"])
def test_one_block_is_the_count_form_and_blocks_of_one_are_the_chain_rule(source: Any) -> None:
    """Of an inconsistent table, for which the two differ."""
    gaps = []
    for text in TEXTS[::4]:
        count = sum(
            WRONG.cross_entropy(text, m) * (LENGTH / sum(m)) / (LENGTH * math.comb(LENGTH, sum(m))) for m in masks()
        )
        chain = WRONG.order_nll(text, tuple(range(LENGTH)))
        assert bound(Block(LENGTH + 1, source), WRONG, text) == pytest.approx(count, abs=1e-12)
        assert bound(Full("own"), WRONG, text) == pytest.approx(count, abs=1e-12)
        assert bound(Block(1, source), WRONG, text) == pytest.approx(chain, abs=1e-12)
        gaps.append(abs(count - chain))
    assert max(gaps) > 0.05


@pytest.mark.parametrize("source", ["own", "launch"])
def test_the_autoregressive_part_is_the_chain_rule(source: Any) -> None:
    """ar_weight adds that share of the parent's own loss, whatever the noise."""
    for text in TEXTS[::9]:
        chain = WRONG.order_nll(text, tuple(range(LENGTH)))
        for _, batch in every_noise(Block(2, source), text):
            plain, both = (
                loss64(Sighted(WRONG, source != "own"), Block(2, source, w).training_rows(batch)) for w in (0.0, 0.25)
            )
            assert both - plain == pytest.approx(0.25 * chain, abs=1e-12)


def test_levels_are_the_share_of_each_group_that_is_noised() -> None:
    yes = torch.ones(1, 6, dtype=torch.bool)
    x0, group = torch.arange(6)[None], torch.tensor([[0, 0, 0, 1, 1, 1]])
    noised = torch.tensor([[False, True, False, True, True, False]])
    maskable = torch.tensor([[False, True, True, True, True, True]])
    batch = NoisedBatch(x0, x0, noised, maskable, yes * 1.0, x0 * 0, yes, group)
    assert noise_share(batch)[0].tolist() == pytest.approx([0.5] * 3 + [2 / 3] * 3)
    assert Block(3).training_rows(batch).level.tolist() == pytest.approx([0.5, 2 / 3, 2 / 3])


# --------------------------------------------------------------------------------------------------- padded, errors


def some_rows() -> Rows:
    x0 = torch.randint(4, 9, (2, 6), generator=torch.Generator().manual_seed(0))
    yes, zeros = torch.ones_like(x0, dtype=torch.bool), torch.zeros_like(x0)
    ids, noised, weight = MaskedDiffusion(MASK).corrupt(x0, yes, zeros, torch.tensor([[0.5], [0.9]]), [1, 2])
    return Full("own").training_rows(NoisedBatch(x0, ids, noised, yes, weight, zeros, yes, zeros))


def test_padded_rows_weigh_nothing() -> None:
    rows = some_rows()
    n = len(rows.source)
    assert rows.padded(n) is rows
    more = rows.padded(n + 5)
    for name in ("source", "target", "weight", "level"):
        assert getattr(more, name)[:n].equal(getattr(rows, name)) and len(getattr(more, name)) == n + 5
    assert not more.weight[n:].any() and (more.noised, more.maskable) == (rows.noised, rows.maskable)
    with pytest.raises(AssertionError):
        rows.padded(n - 1)


def test_rows_move_as_a_whole() -> None:
    rows = some_rows().to("meta")
    assert {t.device.type for t in vars(rows).values() if isinstance(t, Tensor)} == {"meta"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Full("launch"), r"full layout reads source 'previous' or 'own', not 'launch'"),  # type: ignore[arg-type]
        (lambda: Block(4, "previous"), r"block layout reads source 'own' or 'launch', not 'previous'"),  # type: ignore[arg-type]
        (lambda: Block(0), r"block size must be at least 1 token, not 0"),
        (lambda: Block(4, "own", -1.0), r"ar_weight must not be negative"),
        (lambda: layout_from_config({"layout": "tree"}), r"'tree' is not known .* knows full and block"),
        (lambda: layout_from_config({"layout": "block"}), r"needs a block size"),
        (lambda: layout_from_config({"source": "launch"}), r"not 'launch'"),
    ],
)
def test_wrong_layouts_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 9, 100])
@pytest.mark.parametrize("sizes", [(4,), (4, 8), (1, 2, 4, 8)])
def test_blocks_grow_in_equal_shares_and_end_at_the_last_size(steps: int, sizes: tuple[int, ...]) -> None:
    growth = Growth(sizes, steps)
    found = [growth.size(step) for step in range(steps)]
    assert found == sorted(found) and found[-1] == sizes[-1] == growth.size(steps) == growth.size(10 * steps)
    counts = [found.count(size) for size in sizes]
    assert max(counts) - min(counts) <= 1 and sum(counts) == steps


def test_layouts_come_from_the_config() -> None:
    assert layout_from_config({}) == Full("previous")
    assert layout_from_config({"layout": "full", "source": "own"}) == Full("own")
    assert layout_from_config({"layout": "block", "block_size": 4}) == Block(4, "own")
    assert layout_from_config({"layout": "block", "block_size": 4, "source": "launch"}) == Block(4, "launch")


def test_under_the_shift_nothing_predicts_position_0() -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    yes = torch.ones_like(ids, dtype=torch.bool)
    with pytest.raises(ValueError, match="begin the canvas with the start token"):
        Full("previous").decoding_rows(ids, yes, yes)
    assert Full("own").decoding_rows(ids, yes, yes).source.tolist() == [0, 1, 2, 3]
