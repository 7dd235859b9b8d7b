"""Forwards that are left out change nothing: every shortcut against a plain loop that knows none."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffulm.denoiser import Cache
from diffulm.layout import Full, Rows
from diffulm.process import MaskedDiffusion
from diffulm.runtime import uniforms
from diffulm.sampling import (
    Ancestral,
    Canvas,
    Draw,
    DualCache,
    EndOfText,
    Entropy,
    EntropyBound,
    Factor,
    FirstHitting,
    Margin,
    Policy,
    RandomOrder,
    Remask,
    Step,
    Threshold,
    TopConfidence,
    denoise,
)
from diffulm.sampling.step import committed
from diffulm.schedule import Cosine, Linear, Polynomial

from ..toy import LAYOUT as OWN
from ..toy import MASK as TOY_MASK
from ..toy import PROCESS as TOY_PROCESS
from ..toy import SPECIAL, VOCAB, L, Noise, Table, joint, tiny_denoiser

assert SPECIAL.mask is not None
MASK: int = SPECIAL.mask
PROCESS = MaskedDiffusion(MASK)
LAYOUT = Full("previous")
#: Completion, a hole inside, a hole at the start, several holes; unequal lengths.
TEXTS: list[list[int | None]] = [
    [3, 4, 5, 6, 7, *[None] * 9],
    [8, 9, None, None, None, 10, 11, 3, 4],
    [None, None, None, None, 12, 13],
    [5, None, None, 6, 7, None, 8, *[None] * 10, 9],
]
COMPLETIONS: list[list[int | None]] = [[*prompt, *[None] * 10] for prompt in ([3, 4, 5, 6, 7], [1, 0, 8], [], [9])]
POLICIES: list[Policy] = [
    Ancestral(), RandomOrder(), TopConfidence(), TopConfidence("drawn"), Entropy(), Margin(), Threshold(0.4),
    Factor(1.5), EntropyBound(1.0), Remask(0.3), Remask(0.5, "rescale"),
]  # fmt: skip


class Counter:
    """Counts forwards, and the samples, positions, rows without padding, and predictions they were spent on."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser
        self.shapes: list[tuple[int, int]] = []
        self.used: list[int] = []
        self.wanted: list[int] = []
        self.seen: list[torch.Tensor] = []

    def __call__(self, rows: Rows, *, cache: object = None) -> torch.Tensor:
        self.shapes.append(tuple(rows.ids.shape))  # type: ignore[arg-type]
        self.used.append(int(rows.valid.sum()))
        self.wanted.append(len(rows.source))
        self.seen.append(rows.ids.clone())
        out: torch.Tensor = self.denoiser(rows, cache=cache)
        return out

    @property
    def forwards(self) -> int:
        return len(self.shapes)


def context(seed: int = 5) -> Any:
    """Predictions that depend on every token a row sees: whatever is left out wrongly shows in the text."""
    return tiny_denoiser("llama", torch.float64, seed=seed)


@torch.no_grad()
def plain(
    denoiser: Any, process: MaskedDiffusion, canvas: Canvas, *, steps: int, policy: Any, draw: Draw, layout: Full,
    seeds: list[int],
) -> list[torch.Tensor]:  # fmt: skip
    """The loop as the definition has it: a whole forward at every step, every position drawn. The ids after each."""
    n = canvas.ids.shape[1]
    ids, out = canvas.ids.clone(), []
    for k in range(steps):
        masked = canvas.editable & (ids == process.mask_token_id)
        if not masked.any() and not isinstance(policy, Remask):
            out.append(ids)
            continue
        s, t = torch.tensor(1 - (k + 1) / steps).double(), torch.tensor(1 - k / steps).double()
        log_probs = denoiser(layout.decoding_rows(ids, canvas.valid, masked)).log_softmax(-1)
        u = {
            name: torch.from_numpy(np.stack([uniforms(seed, k, purpose=name, n=n) for seed in seeds]))
            for name in ("token", "reveal", "order")
        }
        tokens = ids.clone()
        if masked.any():
            tokens[masked] = draw(log_probs, u["token"][masked])
        step = Step(
            k, steps, float(s), float(t), ids, masked, masked, masked, log_probs, lambda *_, x=tokens[masked]: x, u,
            float(process.reveal_prob(s, t)), float(process.schedule.alpha(t)), committed(masked), masked & False,
        )  # fmt: skip
        holds = policy(step) if k + 1 < steps else torch.ones_like(masked)
        ids = torch.where(masked & holds, tokens, ids).masked_fill(canvas.editable & ~holds, process.mask_token_id)
        out.append(ids)
    return out


def on_grid(found: list[Step], canvas: Canvas, steps: int) -> list[torch.Tensor]:
    """The ids after every step of the grid, from those that were yielded."""
    at, ids, out = {step.index: step.ids for step in found}, canvas.ids, []
    for k in range(steps):
        ids = at.get(k, ids)
        out.append(ids)
    return out


def canvas_of(texts: Iterable[list[int | None]]) -> Canvas:
    return Canvas.from_holes(list(texts), SPECIAL)


def run(denoiser: Any, canvas: Canvas, *, policy: Any, steps: int = 6, **options: Any) -> list[Step]:
    given = {"draw": Draw(), "layout": LAYOUT, "process": PROCESS} | options
    return list(denoise(denoiser, given.pop("process"), canvas, steps=steps, policy=policy, **given))


# ------------------------------------------------------------------------------------- the same tokens, step by step


@pytest.mark.parametrize(
    ("policy", "schedule"),
    [*((policy, Linear()) for policy in POLICIES), (Ancestral(), Cosine()), (Ancestral(), Polynomial(2.0)),
     (Remask(0.3), Cosine()), (RandomOrder(), Polynomial(2.0))],
    ids=str,
)  # fmt: skip
def test_the_loop_gives_the_tokens_of_the_plain_loop(policy: Policy, schedule: Any) -> None:
    """Unequal prompts and holes in one batch, fewer and far more steps than holes; at every step of the grid."""
    model, canvas, process = context(), canvas_of(TEXTS), MaskedDiffusion(MASK, schedule)
    for steps, draw in [(1, Draw()), (4, Draw(0.8, top_p=0.9)), (30, Draw())]:
        counted, seeds = Counter(model), [7, 8, 9, 10]
        options: dict[str, Any] = {"draw": draw, "layout": LAYOUT, "seeds": seeds, "steps": steps, "policy": policy}
        expected = plain(model, process, canvas, **options)
        found = run(counted, canvas, process=process, **options)
        for k, (a, b) in enumerate(zip(on_grid(found, canvas, steps), expected, strict=True)):
            assert torch.equal(a, b), k
        assert counted.forwards <= len(found) <= steps


@given(st.integers(1, 40), st.integers(0, 999), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_on_the_toy_it_is_bit_for_bit_so(steps: int, seed: int, batch: int) -> None:
    """The three-token table gives equal numbers whatever the batch, so not even a tie may part the two."""
    table = Table.inconsistent()
    yes = torch.ones(batch, L, dtype=torch.bool)
    canvas = Canvas(torch.full((batch, L), TOY_MASK), yes, yes)
    for policy in (Ancestral(), RandomOrder(), Remask(0.4), Entropy()):
        options: dict[str, Any] = {
            "draw": Draw(), "layout": OWN, "seeds": list(range(seed, seed + batch)), "steps": steps, "policy": policy,
        }  # fmt: skip
        expected = plain(table, TOY_PROCESS, canvas, **options)
        found = run(table, canvas, process=TOY_PROCESS, **options)
        assert all(torch.equal(a, b) for a, b in zip(on_grid(found, canvas, steps), expected, strict=True))


# ------------------------------------------------------------------------------------------------- forwards, counted


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 80), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_ancestral_takes_at_most_min_steps_holes_forwards(holes: list[int], steps: int, seed: int) -> None:
    """Of a sample; of a batch, one wherever any of its samples changes, spent on those alone and only there."""
    canvas = canvas_of([[3, *[None] * n] for n in holes])
    counted = Counter(Noise(VOCAB, MASK))
    seeds = list(range(seed, seed + len(holes)))
    found = run(counted, canvas, policy=Ancestral(), steps=steps, seeds=seeds)
    assert counted.forwards == len(found) <= min(steps, sum(holes))
    spent = [0] * len(holes)
    for step, (samples, length), wanted in zip(found, counted.shapes, counted.wanted, strict=True):
        changed = step.revealed.any(1)
        assert samples == int(changed.sum())
        assert length == max(2 + n for n, c in zip(holes, changed.tolist(), strict=True) if c)
        assert wanted == int(step.revealed.sum()) > 0  # the head runs where a token is revealed
        spent = [a + int(c) for a, c in zip(spent, changed.tolist(), strict=True)]
    for b, n in enumerate(holes):
        alone = Counter(Noise(VOCAB, MASK))
        run(alone, canvas_of([[3, *[None] * n]]), policy=Ancestral(), steps=steps, seeds=[seeds[b]])
        assert alone.forwards == spent[b] <= min(steps, n)


def test_a_fine_grid_costs_little() -> None:
    """2,000 steps over 9 holes: at most 9 forwards, where a loop without the shortcut needs as many as steps."""
    counted = Counter(Noise(VOCAB, MASK))
    found = run(counted, canvas_of(TEXTS[:1]), policy=Ancestral(), steps=2000)
    assert counted.forwards == len(found) <= 9
    assert not (found[-1].ids == MASK).any()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_first_hitting_takes_exactly_as_many_forwards_as_holes(holes: list[int], more: int) -> None:
    counted, longest = Counter(Noise(VOCAB, MASK)), max(holes)
    found = run(counted, canvas_of([[3, *[None] * n] for n in holes]), policy=FirstHitting(), steps=longest + more)
    assert counted.forwards == len(found) == longest
    for step, (samples, _) in zip(found, counted.shapes, strict=True):
        assert step.revealed.sum(1).tolist() == [int(n > step.index) for n in holes]
        assert samples == sum(n > step.index for n in holes)  # finished samples have left


def test_first_hitting_orders_are_uniform() -> None:
    """All six orders of three holes, over 3,000 seeds."""
    yes = torch.ones(3000, L, dtype=torch.bool)
    canvas = Canvas(torch.full((3000, L), TOY_MASK), yes, yes)
    found = run(Table.exact(joint()), canvas, policy=FirstHitting(), steps=L, process=TOY_PROCESS, layout=OWN)
    orders = torch.stack([step.revealed.long().argmax(1) for step in found], 1).tolist()
    counts = np.array([orders.count(list(order)) for order in itertools.permutations(range(L))])
    assert float(((counts - 500) ** 2 / 500).sum()) < 20.5  # 99.9% point at 5 degrees of freedom


def test_predictions_are_used_again_while_nothing_changes() -> None:
    """A policy without promises that reveals at every fourth step only: four steps share one forward."""
    counted, canvas = Counter(Noise(VOCAB, MASK)), canvas_of(TEXTS[:2])

    def patient(step: Step) -> torch.Tensor:
        return TopConfidence()(step) if step.index % 4 == 3 else ~step.masked

    found = run(counted, canvas, policy=patient, steps=16, draw=Draw())
    assert [step.index for step in found] == [3, 7, 11, 15]
    assert counted.forwards == 4
    for step in found:  # drawn with the numbers of their own step all the same
        u = step.uniforms["token"][step.predicted]
        assert torch.equal(step.proposal[step.predicted], Draw()(step.log_probs, u))
    expected = plain(
        Noise(VOCAB, MASK), PROCESS, canvas, steps=16, policy=patient, draw=Draw(), layout=LAYOUT, seeds=[0, 1]
    )
    assert torch.equal(found[-1].ids, expected[-1])


def test_the_last_step_reveals_what_a_blind_policy_leaves() -> None:
    class Never:
        blind = True

        def __call__(self, step: Step) -> torch.Tensor:
            assert len(step.log_probs) == 0  # asked before the forward
            return ~step.masked

    counted = Counter(Noise(VOCAB, MASK))
    (only,) = run(counted, canvas_of(TEXTS), policy=Never(), steps=7)
    assert (only.index, counted.forwards) == (6, 1)
    assert not (only.ids == MASK).any()


def test_finished_samples_leave_the_batch_and_so_does_their_padding() -> None:
    counted = Counter(Noise(VOCAB, MASK))
    texts: list[list[int | None]] = [[3] * 12 + [None], [None] * 3, [4, None, None]]
    run(counted, canvas_of(texts), policy=TopConfidence(), steps=9)
    assert counted.shapes == [(3, 14), (2, 4), (1, 4)]
    kept = Counter(Noise(VOCAB, MASK))
    run(kept, canvas_of(texts), policy=TopConfidence(), steps=9, cache=DualCache(Cache(None)))
    assert kept.shapes == [(3, 14)] * 3  # a cache's slots belong to samples: the batch stays whole


@dataclasses.dataclass
class TakesBack:
    """Confidence, but at step 2 it masks the last position of every sample again; `remasks` as given, or unsaid."""

    remasks: bool | None = None

    def __call__(self, step: Step) -> torch.Tensor:
        holds = TopConfidence()(step)
        if step.index == 2:
            holds[:, 3] = False
        return holds


def test_a_finished_sample_is_finished_alone_and_in_a_batch() -> None:
    """Three tokens are in place after two steps beside a longer text: the policy no longer decides about them."""
    short: list[int | None] = [3, None, None]
    long: list[int | None] = [3, *[None] * 7]
    alone = run(Noise(VOCAB, MASK), canvas_of([short]), policy=TakesBack(), steps=9)
    together = run(Noise(VOCAB, MASK), canvas_of([short, long]), policy=TakesBack(), steps=9)
    assert len(alone) == 2
    assert together[-1].ids[0, :4].tolist() == alone[-1].ids[0].tolist()
    assert not any((step.ids[0, :4] == MASK).any() for step in together[1:])
    said = run(Noise(VOCAB, MASK), canvas_of([short]), policy=TakesBack(remasks=True), steps=9)
    assert [int((step.ids == MASK).sum()) for step in said] == [1, 0, 1, 0]


def test_remask_goes_on_while_nothing_is_masked() -> None:
    """One hole, alone: what a neighbour in the batch would keep going must go on by itself too."""
    policy, steps, seeds = Remask(0.5), 30, list(range(40))
    together = run(Noise(VOCAB, MASK), canvas_of([[3, None]] * 40), policy=policy, steps=steps, seeds=seeds)
    revealed = torch.stack([step.revealed.any(1) for step in together]).sum(0)
    for seed in seeds:
        alone = run(Noise(VOCAB, MASK), canvas_of([[3, None]]), policy=policy, steps=steps, seeds=[seed])
        assert alone[-1].ids[0].tolist() == together[-1].ids[seed].tolist()
        assert sum(bool(step.revealed.any()) for step in alone) == int(revealed[seed])
    assert int((revealed > 1).sum()) > 5


# ------------------------------------------------------------------------------------------------------- early stop


def until_end(ids: list[int], start: int, ends: tuple[int, ...]) -> list[int]:
    new = ids[start:]
    cuts = [new.index(end) for end in ends if end in new]
    return new[: min(cuts)] if cuts else new


def texts_of(found: list[Step], ends: tuple[int, ...]) -> list[list[int]]:
    starts = [1 + sum(token is not None for token in text) for text in COMPLETIONS]
    return [
        until_end(row[: 11 + start - 1], start, ends) for row, start in zip(found[-1].ids.tolist(), starts, strict=True)
    ]


KEEPING = [policy for policy in POLICIES if not isinstance(policy, Remask)]


@pytest.mark.parametrize("policy", KEEPING, ids=str)
def test_the_text_is_that_without_early_stop(policy: Policy) -> None:
    """Prompts of unequal lengths, one of them with end tokens inside; ends are common here: 2 of 24 tokens."""
    ends, saved = (1, 0), 0
    for seed in range(4):
        model, seeds = context(seed), [seed, 50 + seed, 100 + seed, 150 + seed]
        whole, cut = Counter(model), Counter(model)
        options: dict[str, Any] = {"policy": policy, "steps": 10, "seeds": seeds, "draw": Draw(1.5)}
        without = run(whole, canvas_of(COMPLETIONS), **options)
        early = run(cut, canvas_of(COMPLETIONS), **options, end=EndOfText(ends))
        assert texts_of(early, ends) == texts_of(without, ends)
        assert not (early[-1].ids == MASK).any()
        saved += sum(n for n, _ in whole.shapes) - sum(n for n, _ in cut.shapes)
        upto = torch.zeros(4, dtype=torch.long)
        for before, after in itertools.pairwise(early):  # what a stream has shown never changes
            for b, n in enumerate(before.committed_upto.tolist()):
                assert before.ids[b, :n].tolist() == after.ids[b, :n].tolist()
            assert (after.committed_upto >= upto).all()
            upto = after.committed_upto
    assert saved > 0


def scripted(tokens: list[int], order: list[int] | None = None) -> Noise:
    """Says `tokens` behind a start token and one given token; surest of them in `order`, else from left to right."""
    noise = Noise(VOCAB, MASK)
    for rank, i in enumerate(order or range(len(tokens))):
        noise.logits[2 + i, :MASK] = 0.0
        noise.logits[2 + i, tokens[i]] = 12.0 - rank
    return noise


def test_a_sample_ends_with_its_text_and_costs_nothing_more() -> None:
    """Left to right by confidence: the end stands third, so three forwards of eight, and the rest is filled with it."""
    noise, canvas = scripted([5, 6, 1, 7, 8, 9, 5, 6]), canvas_of([[3, *[None] * 8]])
    counted = Counter(noise)
    found = run(counted, canvas, policy=TopConfidence(), steps=8, draw=Draw(0.0), end=EndOfText((1,)))
    assert counted.forwards == len(found) == 3
    assert found[-1].ids[0].tolist() == [0, 3, 5, 6, *[1] * 6]
    assert found[-1].revealed.sum() == 1
    assert found[-1].committed_upto.tolist() == [10]
    none = run(noise, canvas, policy=TopConfidence(), steps=8, draw=Draw(0.0))
    assert none[-1].ids[0].tolist() == [0, 3, 5, 6, 1, 7, 8, 9, 5, 6]


def test_an_end_with_masks_before_it_ends_nothing_unless_it_settles() -> None:
    """The end at the fourth place is committed first, but the text before it is not there yet."""
    noise = scripted([5, 6, 7, 1, 8, 9], order=[3, 5, 4, 2, 1, 0])
    canvas = canvas_of([[3, *[None] * 6]])
    options: dict[str, Any] = {"policy": TopConfidence(), "steps": 6, "draw": Draw(0.0)}
    exact, settled = Counter(noise), Counter(noise)
    a = run(exact, canvas, **options, end=EndOfText((1,)))
    b = run(settled, canvas, **options, end=EndOfText((1,), settle=True))
    assert (exact.forwards, settled.forwards) == (6, 4)
    assert a[-1].ids.tolist() == b[-1].ids.tolist() == [[0, 3, 5, 6, 7, 1, 1, 1]]
    assert b[0].ids.tolist() == [[0, 3, MASK, MASK, MASK, 1, 1, 1]]
    assert a[0].ids.tolist() == [[0, 3, MASK, MASK, MASK, 1, MASK, MASK]]
    assert settled.wanted == [6, 3, 2, 1]


def test_given_end_tokens_end_nothing() -> None:
    """A chat prompt is full of them."""
    canvas = canvas_of([[1, 0, 1, None, None, None]])
    found = run(scripted([5] * 5), canvas, policy=TopConfidence(), steps=3, draw=Draw(0.0), end=EndOfText((1, 0)))
    assert len(found) == 3
    assert found[-1].ids.tolist() == [[0, 1, 0, 1, 5, 5, 5]]


@pytest.mark.parametrize("policy", [Remask(0.3), TakesBack(), TakesBack(remasks=True)], ids=str)
def test_nothing_stops_early_where_a_token_may_be_taken_back(policy: Any) -> None:
    canvas, noise = canvas_of([[3, *[None] * 8]]), scripted([5, 1, *[6] * 6])
    options: dict[str, Any] = {"policy": policy, "steps": 12, "draw": Draw(0.0)}
    with_end = run(noise, canvas, **options, end=EndOfText((1,)))
    without = run(noise, canvas, **options)
    assert [step.ids.tolist() for step in with_end] == [step.ids.tolist() for step in without]


def test_an_end_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token id"):
        EndOfText(())
