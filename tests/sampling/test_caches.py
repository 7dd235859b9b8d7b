"""Approximate caches: what they compute, where they are exact, and the one case in which they are exact throughout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffulm.layout import Block, Full
from diffulm.sampling import (
    Ancestral,
    Canvas,
    Draw,
    DualCache,
    EndOfText,
    Entropy,
    FirstHitting,
    Policy,
    PrefixCache,
    RandomOrder,
    Remask,
    Step,
    Threshold,
    TopConfidence,
    agreement,
    denoise,
)

from ..toy import SPECIAL, tiny_denoiser
from .test_blocks import HOLES
from .test_shortcuts import COMPLETIONS, MASK, PROCESS, TEXTS, Counter, context

KINDS = [PrefixCache, DualCache]
SOURCES = ["previous", "own"]
POLICIES: list[Policy] = [
    Ancestral(), RandomOrder(), TopConfidence(), Entropy(), Threshold(0.4), FirstHitting(), Remask(0.3),
]  # fmt: skip


def fill(denoiser: Any, texts: Any, policy: Policy, kind: Any, *, block: int | None, **more: Any) -> Any:
    """(steps, counter, canvas) of a run with a cache of some kind, None: without."""
    counter, canvas = Counter(denoiser), Canvas.from_holes(texts, SPECIAL)
    options = {"steps": 18, "draw": Draw(1.0), "layout": Full("previous")} | more
    cache = None if kind is None else kind(denoiser.new_cache())
    return list(denoise(counter, PROCESS, canvas, policy=policy, cache=cache, block=block, **options)), counter, canvas


def rows(counter: Counter) -> int:
    return sum(b * r for b, r in counter.shapes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_with_the_whole_canvas_as_one_block_nothing_is_approximate(kind: Any, source: Any, policy: Policy) -> None:
    """Unequal prompts, several holes: every row is computed anew at every step, so tokens and logits are the same."""
    denoiser, layout = context(), Full(source)
    for texts in (TEXTS, COMPLETIONS, HOLES):
        n = 1 + max(map(len, texts))
        bare, _, _ = fill(denoiser, texts, policy, None, block=n, layout=layout)
        kept, _, _ = fill(denoiser, texts, policy, kind, block=n, layout=layout)
        assert len(bare) == len(kept) > 0
        for a, b in zip(bare, kept, strict=True):
            assert torch.equal(a.ids, b.ids)
            assert len(a.log_probs) == len(b.log_probs)
            if len(a.log_probs):
                assert (a.log_probs - b.log_probs)[:, :MASK].abs().max() < 1e-10


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "olmo2", "cohere"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_first_predictions_of_a_block_are_exact(family: str, kind: Any) -> None:
    """And later ones are not, or this test would prove nothing. Under the shift, whose first token is the trap."""
    denoiser, layout = tiny_denoiser(family, torch.float64), Full("previous")
    steps, counter, canvas = fill(denoiser, COMPLETIONS, TopConfidence(), kind, block=4, steps=4, draw=Draw(0.0))
    assert len(steps) == counter.forwards
    ids, worst = canvas.ids, {True: [0.0], False: [0.0]}
    for step in steps:
        exact = denoiser(layout.decoding_rows(ids, canvas.valid, step.predicted)).log_softmax(-1)
        worst[step.index == 0].append(float((exact - step.log_probs)[:, :MASK].abs().max()))
        ids = step.ids
    assert len(worst[True]) > 3 and max(worst[True]) < 1e-10
    assert max(worst[False]) > 1e-3, "predictions beside held rows are approximate"


@pytest.mark.parametrize("source", SOURCES)
def test_which_rows_are_computed(source: Any) -> None:
    """One sample, a prompt of 5, blocks of 4 from position 0: holes at 6..13, so blocks 4..7, 8..11 and 12..13."""
    text: list[list[int | None]] = [[3, 4, 5, 6, 7, *[None] * 8]]
    shapes = {}
    for kind in (None, *KINDS):
        _, counter, _ = fill(context(), text, TopConfidence(), kind, block=4, steps=4, layout=Full(source))
        assert not (counter.seen[-1] == MASK).all()
        shapes[kind] = [r for _, r in counter.shapes]
    shift = 1 if source == "previous" else 0
    assert shapes[None] == [14] * 8
    assert shapes[DualCache] == [14, 4 + shift, 14, *[4 + shift] * 3, 14, 2 + shift]
    assert shapes[PrefixCache] == [14, 10 + shift, 14, *[6 + shift] * 3, 14, 2 + shift]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), block=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_batch_is_filled_whole_and_a_sample_does_not_depend_on_its_neighbours(
    kind: Any, data: st.DataObject, block: int, seed: int
) -> None:
    """Ragged prompts and holes anywhere; the finished text has no mask and what was given stands."""
    token = st.one_of(st.none(), st.integers(3, 20))
    one = st.lists(token, min_size=1, max_size=12).filter(lambda x: None in x)
    texts = data.draw(st.lists(one, min_size=1, max_size=3))
    policy = data.draw(st.sampled_from([TopConfidence(), Threshold(0.3), Ancestral()]))
    denoiser, seeds = _SHARED, [seed + b for b in range(len(texts))]
    *_, last = fill(denoiser, texts, policy, kind, block=block, seeds=seeds, steps=5)[0]
    canvas = Canvas.from_holes(texts, SPECIAL)
    assert not (last.ids == MASK).any()
    assert torch.equal(last.ids[~canvas.editable], canvas.ids[~canvas.editable])
    for b, text in enumerate(texts):
        *_, alone = fill(denoiser, [text], policy, kind, block=block, seeds=[seed + b], steps=5)[0]
        assert torch.equal(alone.ids[0], last.ids[b, : len(text) + 1])


_SHARED = context()


def test_fewer_rows_are_computed_and_dual_computes_fewest() -> None:
    bare, prefix, dual = (
        rows(fill(_SHARED, COMPLETIONS, TopConfidence(), kind, block=4, steps=4)[1]) for kind in (None, *KINDS)
    )
    assert dual < prefix < bare


def test_samples_without_a_hole_in_this_turn_leave_the_batch() -> None:
    """Slots are per sample, but each block's first forward fills them anew: for the samples that have such a block."""
    texts: list[list[int | None]] = [[3, *[None] * 11], [4, 5, None]]
    _, counter, _ = fill(_SHARED, texts, TopConfidence(), DualCache, block=4, steps=4)
    assert counter.shapes == [(2, 13), (2, 5), (1, 13), *[(1, 5)] * 3, (1, 13), *[(1, 5)] * 3, (1, 13)]


def test_an_end_of_text_spares_blocks_here_too() -> None:
    plain, counter, canvas = fill(_SHARED, COMPLETIONS, TopConfidence(), DualCache, block=4)
    token = int(plain[-1].ids[canvas.editable].reshape(len(COMPLETIONS), 10)[0, 2])
    short, fewer, _ = fill(_SHARED, COMPLETIONS[:1], TopConfidence(), DualCache, block=4, end=EndOfText((token,)))
    assert not (short[-1].ids == MASK).any()
    assert fewer.forwards < counter.forwards


def test_agreement_is_counted() -> None:
    a, b = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 9, 4]])
    assert (agreement(a, b), agreement(a, a), agreement(a, a + 1)) == (0.75, 1.0, 0.0)
    for wrong in (a[:, :2], a[:0]):
        with pytest.raises(ValueError, match="compare runs of one canvas"):
            agreement(a, wrong) if len(wrong) else agreement(wrong, wrong)


def test_a_cache_of_another_layout_is_refused() -> None:
    for kind in KINDS:
        with pytest.raises(ValueError, match="block layout needs no approximate cache"):
            fill(_SHARED, COMPLETIONS, Entropy(), kind, block=4, layout=Block(4))


def test_steps_are_those_of_the_loop() -> None:
    """A cached run yields the same kind of steps: predictions at what was masked in the block, nothing else."""
    found: list[Step] = fill(_SHARED, HOLES, Entropy(), DualCache, block=4, steps=4)[0]
    for step in found:
        assert len(step.log_probs) == int(step.predicted.sum())
        assert not (step.predicted & ~step.masked).any()
