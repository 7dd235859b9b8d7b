"""Block after block: the cache changes nothing, the law is the model's, no forward is spent on a commit alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffulm.denoiser import HFDenoiser
from diffulm.layout import Block, Full, NoisedBatch, Rows
from diffulm.sampling import (
    Ancestral,
    BlockCache,
    Canvas,
    Draw,
    EndOfText,
    Entropy,
    EntropyBound,
    FirstHitting,
    Policy,
    RandomOrder,
    Remask,
    Threshold,
    TopConfidence,
    denoise,
)
from diffulm.sampling.denoise import regions
from diffulm.sampling.fill import completions, steps_of_a_block

from ..families import random_model
from ..toy import LAYOUT as OWN
from ..toy import PROCESS as TOY_PROCESS
from ..toy import SPECIAL, L, Table, joint
from .test_shortcuts import COMPLETIONS, MASK, PROCESS, Counter

HOLES: list[list[int | None]] = [
    [3, 4, None, 6, None, *[None] * 9], [8, None, None, None, 10, 11, 3, 4, 5], [None] * 6, [3, 4, 5, 6, 7, 8, 9, None]
]  # fmt: skip


def model(family: str = "llama", seed: int = 3) -> HFDenoiser:
    """A causal model in float64 whose predictions depend on every token they may see."""
    built = random_model(family, seed=seed)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6)
    return HFDenoiser(built.double().eval(), MASK)


def fill(denoiser: Any, texts: Any, policy: Policy, *, cached: bool, layout: Any, steps: int = 4, **more: Any) -> Any:
    canvas = Canvas.from_holes(texts, SPECIAL)
    cache = BlockCache(denoiser.new_cache()) if cached else None
    counter = Counter(denoiser)
    out = list(denoise(
        counter, PROCESS, canvas, steps=steps, policy=policy, draw=Draw(1.0), layout=layout, cache=cache, **more
    ))  # fmt: skip
    return out, counter, canvas


POLICIES: list[Policy] = [
    Ancestral(), RandomOrder(), TopConfidence(), Entropy(), Threshold(0.5), EntropyBound(1.0), FirstHitting(),
    Remask(0.3),
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("source", ["own", "launch"])
def test_the_cache_changes_no_token(policy: Policy, source: Any) -> None:
    denoiser = model()
    for texts in (COMPLETIONS, HOLES):
        bare, uncached, _ = fill(denoiser, texts, policy, cached=False, layout=Block(4, source))
        kept, counter, canvas = fill(denoiser, texts, policy, cached=True, layout=Block(4, source))
        assert [s.ids.tolist() for s in bare] == [s.ids.tolist() for s in kept]
        assert not (kept[-1].ids == MASK).any() and torch.equal(
            kept[-1].ids[~canvas.editable], canvas.ids[~canvas.editable]
        )
        assert counter.forwards == uncached.forwards
        # Without padding: slots belong to samples, so a sample that waits for others keeps its place in the batch.
        assert sum(counter.used) < sum(uncached.used), "fewer rows are computed"


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "phi3", "olmo2", "gpt_neox"])
def test_the_cache_is_exact_in_every_family(family: str) -> None:
    denoiser = model(family)
    bare, kept = (fill(denoiser, COMPLETIONS, Entropy(), cached=c, layout=Block(4, "launch"))[0] for c in (False, True))
    for a, b in zip(bare, kept, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert (a.log_probs - b.log_probs)[:, :MASK].abs().max() < 1e-10


def whole_rows(layout: Block, canvas: Canvas, wanted: torch.Tensor) -> Rows:
    """Every row of training: both streams of the whole canvas, later blocks and all."""
    zeros = torch.zeros_like(canvas.ids)
    groups = layout.groups(canvas.ids.shape[1]).expand_as(zeros)
    return layout.training_rows(
        NoisedBatch(canvas.ids, canvas.ids, wanted, wanted, wanted.float(), zeros, canvas.valid, groups)
    )


def rows_needed(layout: Block, valid: list[bool], wanted: list[bool]) -> int:
    """Of one sample, counted one by one: the asked blocks' tokens, their launch rows, all before the last of them."""
    asked = sorted({i // layout.size for i, is_wanted in enumerate(wanted) if is_wanted})
    noisy = sum(is_valid and i // layout.size in asked for i, is_valid in enumerate(valid))
    launch = sum(k > 0 for k in asked) if layout.source == "launch" else 0
    return noisy + launch + (asked[-1] * layout.size if asked else 0)


def first_block(wanted: torch.Tensor, size: int) -> torch.Tensor:
    """The wanted positions of each sample's first block that has any."""
    block = torch.arange(wanted.shape[1]) // size
    return wanted & (block == torch.where(wanted, block, 99).amin(1, keepdim=True))


#: Finished text before the last block, and blocks that are all masks: one behind the wanted, or several wanted.
LEFT_OUT = [*COMPLETIONS, *HOLES, [*range(3, 16), None], [3, None, 4, 5, 6, 7, 8, 9, None, 10], [3, None]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma", "olmo2", "gpt_neox"])
@pytest.mark.parametrize("source", ["own", "launch"])
def test_only_rows_that_a_prediction_needs_are_computed(family: str, source: Any) -> None:
    """Against all rows of training, in float64: unequal lengths, samples that want nothing, one block and several."""
    denoiser, canvas = model(family), Canvas.from_holes(LEFT_OUT, SPECIAL)
    one = first_block(canvas.editable, 4)
    none = one.clone()
    none[::2] = False
    for size, wanted in ((4, canvas.editable), (4, one), (4, none), (3, canvas.editable), (32, canvas.editable)):
        layout = Block(size, source)
        rows = layout.decoding_rows(canvas.ids, canvas.valid, wanted)
        needed = [rows_needed(layout, *x) for x in zip(canvas.valid.tolist(), wanted.tolist(), strict=True)]
        assert rows.valid.sum(1).tolist() == needed and rows.ids.shape[1] == max(needed)
        assert rows.target.tolist() == canvas.ids[wanted].tolist()
        with torch.no_grad():
            found, expected = denoiser(rows), denoiser(whole_rows(layout, canvas, wanted))
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("source", ["own", "launch"])
def test_the_rows_of_an_empty_cache_are_the_uncached_ones(source: Any) -> None:
    """The exact cache's first forward computes neither more nor less, and predicts the same."""
    denoiser, layout = model(), Block(4, source)
    for text in LEFT_OUT:
        canvas = Canvas.from_holes([text], SPECIAL)
        wanted = first_block(canvas.editable, 4)
        plain = layout.decoding_rows(canvas.ids, canvas.valid, wanted)
        cached = layout.cached_rows(canvas.ids, canvas.valid, wanted, torch.zeros(1, dtype=torch.long))

        def facts(rows: Rows) -> list[tuple[int, ...]]:
            columns = (rows.position, rows.stream, rows.block, rows.ids)
            return sorted(zip(*(x[rows.valid].tolist() for x in columns), strict=True))

        assert facts(plain) == facts(cached)
        with torch.no_grad():
            torch.testing.assert_close(denoiser(plain), denoiser(cached), rtol=1e-11, atol=1e-11)


def test_an_uncached_run_grows_with_the_text() -> None:
    """Blocks of 4 on 33 positions, one token a step: the early blocks must not pay for the late ones."""
    _, counter, _ = fill(model(), [[None] * 32], TopConfidence(), cached=False, layout=Block(4), steps=4)
    width = [r for _, r in counter.shapes]
    assert width == [4] * 3 + [n for start in range(4, 32, 4) for n in [start + 4] * 4] + [33]


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    denoiser = model()
    together, _, _ = fill(denoiser, COMPLETIONS, Threshold(0.3), cached=True, layout=Block(4), seeds=[7, 8, 9, 10])
    for b, text in enumerate(COMPLETIONS):
        alone, _, _ = fill(denoiser, [text], Threshold(0.3), cached=True, layout=Block(4), seeds=[7 + b])
        n = len(text) + 1
        assert torch.equal(alone[-1].ids[0, :n], together[-1].ids[b, :n])


def test_no_forward_only_commits() -> None:
    """One token a step: as many forwards as tokens; the finished block rides along with the next one's first."""
    _, counter, _ = fill(model(), [[5, *[None] * 10]], TopConfidence(), cached=True, layout=Block(4), steps=4)
    assert counter.forwards == 10
    # 1 + 1 + 10 tokens from position 0: blocks 0..3 (two holes), 4..7, 8..11.
    assert [r for _, r in counter.shapes] == [4, 4, 8, 4, 4, 4, 8, 4, 4, 4]


def test_an_end_of_text_spares_the_blocks_behind_it() -> None:
    denoiser = model()
    plain, counter, canvas = fill(denoiser, COMPLETIONS, TopConfidence(), cached=True, layout=Block(4))
    new = plain[-1].ids[canvas.editable].reshape(len(COMPLETIONS), 10)
    token = int(new[0, 2])
    short, fewer, _ = fill(
        denoiser, COMPLETIONS, TopConfidence(), cached=True, layout=Block(4), end=EndOfText((token,))
    )
    assert not (short[-1].ids == MASK).any()
    for b, row in enumerate(short[-1].ids[canvas.editable].reshape(len(COMPLETIONS), 10).tolist()):
        want = new[b].tolist()
        stop = want.index(token) if token in want else 10
        assert row == want[:stop] + [token if stop < 10 else row[-1]] * (10 - stop)
    ended = [token in row for row in new.tolist()]
    assert ended[0]
    assert sum(w for w in fewer.wanted) < sum(counter.wanted)


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_one_token_a_step_reproduces_the_joint(block: int) -> None:
    """Enumerated over the draws of an exact denoiser: any order inside blocks, left to right between them."""
    p = joint()
    canvas = Canvas(torch.full((1, L), 3), torch.ones(1, L, dtype=torch.bool), torch.ones(1, L, dtype=torch.bool))
    found = np.zeros_like(p)

    def walk(forced: list[int], probability: float) -> None:
        """Depth first over the token of every draw."""
        drawn: list[float] = []

        def draw(log_probs: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            if len(drawn) == len(forced):
                raise UndecidedError(log_probs[0].exp().tolist()[:3])
            drawn.append(1)
            return torch.full((len(log_probs),), forced[len(drawn) - 1])

        try:
            *_, last = denoise(
                Table.exact(p),
                TOY_PROCESS,
                canvas,
                steps=min(block, L),
                policy=Entropy(),
                draw=draw,
                layout=OWN,  # type: ignore[arg-type]
                block=block,
            )
            found[tuple(last.ids[0].tolist())] += probability
        except UndecidedError as branch:
            for token, chance in enumerate(branch.chances):
                walk([*forced, token], probability * chance)

    walk([], 1.0)
    assert np.abs(found - p).max() < 1e-12


class UndecidedError(Exception):
    """A draw that has not been decided yet."""

    def __init__(self, chances: list[float]) -> None:
        self.chances = chances


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 15), st.integers(0, 2**31))
def test_regions_partition_the_holes_left_to_right(B: int, n: int, size: int, seed: int) -> None:
    editable = torch.from_numpy(np.random.default_rng(seed).random((B, n)) < 0.5)
    found = regions(editable, size)
    total = sum((r.long() for r in found), torch.zeros(B, n, dtype=torch.long))
    assert torch.equal(total, editable.long()), "every hole once"
    for b, (earlier, later) in itertools.product(range(B), itertools.pairwise(found)):
        a, z = earlier[b].nonzero().flatten(), later[b].nonzero().flatten()
        if len(z):
            assert len(a) and int(a.max()) < int(z.min()), "no sample waits"
    for region, b in itertools.product(found, range(B)):
        assert len(set((region[b].nonzero().flatten() // size).tolist())) <= 1, "one block a sample"


def test_what_makes_no_sense_is_refused() -> None:
    denoiser = model()
    with pytest.raises(ValueError, match="blocks of 8 tokens: this layout decodes 4 at a time"):
        fill(denoiser, COMPLETIONS, Entropy(), cached=True, layout=Block(4), block=8)
    with pytest.raises(ValueError, match=r"no cache of it is exact.*PrefixCache"):
        fill(denoiser, COMPLETIONS, Entropy(), cached=True, layout=Full("own"))
    with pytest.raises(ValueError, match="ALiBi"):
        HFDenoiser(random_model("bloom"), MASK).new_cache()


@pytest.mark.parametrize("block", [1, 3, 4, 7, 16])
def test_as_many_steps_as_tokens_are_one_token_a_step_in_every_block(block: int) -> None:
    """Blocks of unequal size, for they count from position 0: a full one must not hurry for the sake of a short one."""
    for texts in (COMPLETIONS, HOLES, [[5, *[None] * 10]]):
        canvas = Canvas.from_holes(texts, SPECIAL)
        holes = int(canvas.editable.sum(1).max())
        steps = steps_of_a_block(canvas, Full(), block, holes)
        found, _, _ = fill(model(), texts, TopConfidence(), cached=False, layout=Full(), block=block, steps=steps)
        assert max(int(step.revealed.sum(1).max()) for step in found) == 1
        assert 1 <= steps_of_a_block(canvas, Full(), block, -(-holes // 2)) <= 1 + steps // 2
    assert steps_of_a_block(canvas, Full(), None, 7) == 7
    assert steps_of_a_block(canvas, Block(4), None, 10) == 4


def test_full_attention_in_blocks_fills_them_in_turn() -> None:
    """Semi-autoregressive order for a checkpoint with full attention: the later blocks are seen as masks."""
    steps, _, canvas = fill(model(), [[None] * 9], Entropy(), cached=False, layout=Full("previous"), block=3, steps=3)
    first_masked = [int((s.ids[0] == MASK).long().argmax()) if (s.ids == MASK).any() else 10 for s in steps]
    assert first_masked == sorted(first_masked) and len(steps) == 9
    revealed = [int(s.revealed.nonzero()[0, 1]) for s in steps]
    assert [sorted(revealed[:2]), sorted(revealed[2:5]), sorted(revealed[5:8])] == [[1, 2], [3, 4, 5], [6, 7, 8]]
    assert canvas.ids.shape[1] == 10


def test_a_completion_ends_with_a_whole_block() -> None:
    """Prompts of 1 to 5 tokens, blocks of 4: each canvas is a multiple of 4 unless the trained length forbids."""
    prompts = [[3] * n for n in range(1, 6)]
    for limit, ends in ((100, [8, 8, 12, 12, 12]), (11, [8, 8, 11, 11, 11])):
        canvas = completions(prompts, 5, SPECIAL, Block(4), limit)
        assert canvas.valid.sum(1).tolist() == ends
        assert canvas.editable.sum(1).tolist() == [end - 1 - len(p) for end, p in zip(ends, prompts, strict=True)]
    with pytest.raises(ValueError, match="the canvas has 11 tokens with its start token, the model was trained on 10"):
        completions(prompts, 5, SPECIAL, Block(4), 10)
    assert completions(prompts, 5, SPECIAL, Full(), 100).editable.sum(1).tolist() == [5] * 5
