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
from diffulm.layout import Block, Full
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
        rows, both = (sum(b * r for b, r in c.shapes) for c in (counter, uncached))
        assert rows < both, "fewer rows are computed"


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "phi3", "olmo2", "gpt_neox"])
def test_the_cache_is_exact_in_every_family(family: str) -> None:
    denoiser = model(family)
    bare, kept = (fill(denoiser, COMPLETIONS, Entropy(), cached=c, layout=Block(4, "launch"))[0] for c in (False, True))
    for a, b in zip(bare, kept, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert (a.log_probs - b.log_probs)[:, :MASK].abs().max() < 1e-10


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
    for limit, ends in ((100, [8, 8, 12, 12, 12]), (10, [8, 8, 10, 10, 11])):
        canvas = completions(prompts, 5, SPECIAL, Block(4), limit)
        assert canvas.valid.sum(1).tolist() == ends
        assert canvas.editable.sum(1).tolist() == [end - 1 - len(p) for end, p in zip(ends, prompts, strict=True)]
    assert completions(prompts, 5, SPECIAL, Full(), 100).editable.sum(1).tolist() == [5] * 5
