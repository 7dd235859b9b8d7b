"""Scores of options: exact where they can be, batched like alone, with shared noise, honest errors."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffulm
from diffulm.denoiser import HFDenoiser
from diffulm.eval.estimate import Request, Scorer, batches
from diffulm.eval.masks import FEWER, Tally, every_mask, paired_masks, plan_masks, spread, student
from diffulm.hub import Model, load_parent
from diffulm.layout import Block, Causal, Full, Rows
from diffulm.process import MaskedDiffusion
from diffulm.tokenizer import SpecialTokens, special_tokens

from .. import toy

TOY = SpecialTokens(bos=0, eos=0, pad=0, mask=toy.MASK)
P = toy.joint()


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    torch.set_num_threads(1)
    return diffulm.load(checkpoint, dtype="float64")


def scorer(model: Model, **changes: Any) -> Scorer:
    settings: dict[str, Any] = {"draws": 9, "length": 64, **changes}
    return Scorer(model.denoiser, model.layout, model.process, special_tokens(model.tokenizer), **settings)


def questions(count: int, *, options: int = 3, seed: int = 0) -> list[tuple[str, list[Request]]]:
    """Random token ids; options of one question have different lengths."""
    rng = np.random.default_rng(seed)
    made = []
    for q in range(count):
        context = (0, *rng.integers(5, 200, rng.integers(3, 20)).tolist())
        group = [Request(context, tuple(rng.integers(5, 200, 1 + 3 * o + q % 3).tolist())) for o in range(options)]
        made.append((f"question {q}", group))
    return made


# ------------------------------------------------------------------------------------------------------- the truth


def toy_scorer(table: toy.Table, draws: int = 7, **changes: Any) -> Scorer:
    return Scorer(table, toy.LAYOUT, toy.PROCESS, TOY, 4, draws=draws, **changes)


@pytest.mark.parametrize("n", [1, 2])
def test_enumerated_continuations_are_the_exact_conditional(n: int) -> None:
    """The perfect denoiser of a joint: the score of the last n tokens is -log p(last n | first ones)."""
    for text in toy.TEXTS:
        given = P[text[: 3 - n]].sum()
        ((got,),) = toy_scorer(toy.Table.exact(P)).scores([("q", [Request(text[: 3 - n], text[3 - n :])])])
        assert got.nats == pytest.approx(-math.log(P[text] / given), abs=1e-12)
        assert (got.forwards, got.stderr, got.tokens) == (2**n - 1, 0.0, n)


def test_sampled_scores_are_unbiased_and_their_error_is_honest(model: Model) -> None:
    """Seven tokens: the truth is enumerable (127 masks), 17 are drawn."""
    question = [("q", [Request((0, 40, 50, 60), (70, 80, 90, 100, 110, 120, 130))])]
    ((exact,),) = scorer(model, draws=127).scores(question)
    drawn = [scorer(model, draws=17, seed=s).scores(question)[0][0] for s in range(40)]
    values = np.array([d.nats for d in drawn])
    assert exact.stderr == 0 and exact.forwards == 127 and all(d.forwards == 17 for d in drawn)
    assert abs(values.mean() - exact.nats) < 4 * values.std(ddof=1) / math.sqrt(len(values))
    stated = math.sqrt(np.mean([d.stderr**2 for d in drawn]))
    assert 0.6 * values.std(ddof=1) < stated < 1.8 * values.std(ddof=1)


def test_counts_of_pairs_are_uniform_and_complementary() -> None:
    for n in (2, 3, 4, 5, 8):
        seen = np.zeros(n + 1)
        for seed in range(400):
            masks = paired_masks(n, 3, np.random.default_rng(seed))
            assert (masks[::2] ^ masks[1::2]).all()
            np.add.at(seen, masks.sum(1), 1)
        assert seen[0] == seen[n] == 0 and seen[1:n] / 2400 == pytest.approx(1 / (n - 1), rel=0.25)


def test_spread_of_neighbours() -> None:
    rng = np.random.default_rng(0)
    level = np.linspace(0, 5, 20)
    means = [(level + rng.normal(0, 1, 20)).mean() for _ in range(3000)]
    stated = np.mean([spread(level + rng.normal(0, 1, 20)) for _ in range(3000)])
    assert stated == pytest.approx(np.var(means), rel=0.15), "a trend over the strata is no error"
    assert math.isnan(spread(np.ones(1)))


# ----------------------------------------------------------------------------------------------- batches, neighbours


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_batched_is_alone(checkpoint: Path, dtype: str, tolerance: float) -> None:
    opened = diffulm.load(checkpoint, dtype=dtype)
    some = questions(4)
    for layout in (Full(), Block(4)):
        together = replace(scorer(opened, budget=300), layout=layout).scores(some)
        alone = [replace(scorer(opened, budget=1), layout=layout).scores([q])[0] for q in some]
        gaps = [a.nats - b.nats for a, b in zip(itertools.chain(*together), itertools.chain(*alone), strict=True)]
        assert np.abs(gaps).max() < tolerance
        assert [s.forwards for s in itertools.chain(*together)] == [s.forwards for s in itertools.chain(*alone)]


def test_batches_keep_to_the_budget_and_to_like_lengths() -> None:
    lengths = [5, 50, 49, 7, 6, 50, 48, 300]
    made = list(batches(lengths, 100))
    assert sorted(itertools.chain(*made)) == list(range(len(lengths))), "every job once, also one beyond the budget"
    for part in made:
        size = [lengths[i] for i in part]
        assert len(part) == 1 or (max(size) * len(part) <= 100 and min(size) >= 0.85 * max(size))


class Recorder:
    """Keeps the rows it is asked about; every masked token costs one nat."""

    def __init__(self) -> None:
        self.rows: list[Rows] = []

    def __call__(self, rows: Rows, *, cache: Any = None) -> Tensor:
        raise NotImplementedError

    def nll(self, rows: Rows) -> Tensor:
        self.rows.append(rows)
        return torch.ones(len(rows.source))


def masks_of(requests: list[Request], *, name: str = "q", seed: int = 0, draws: int = 9) -> list[list[list[bool]]]:
    """The masks each option is scored with, over its continuation."""
    found = []
    for request in requests:
        recorder = Recorder()
        one = Scorer(recorder, Full(), toy.PROCESS, TOY, 64, draws=draws, seed=seed, budget=1000)
        one.scores([(name, [request])])
        (rows,) = recorder.rows
        masked = rows.ids == toy.MASK
        assert not masked[:, : len(request.context)].any(), "only the continuation is masked"
        found.append(masked[:, len(request.context) :].tolist())
    return found


def test_the_options_of_a_question_share_their_noise() -> None:
    one, other, short = Request((0, 1), (4,) * 8), Request((0, 1, 2, 2), (5,) * 8), Request((0, 1), (5,) * 7)
    first, second, third = masks_of([one, other, short])
    assert first == second, "equal lengths: the same masks, whatever the tokens"
    assert [sum(m) / 8 for m in first] != [sum(m) / 7 for m in third] and len(first) == len(third)
    assert all(abs(sum(a) - sum(b)) <= 1 for a, b in zip(first, third, strict=True)), "the same quantiles"
    assert masks_of([one], name="another") != [first] != masks_of([one], seed=1)


# --------------------------------------------------------------------------------------------------- block layouts


def test_block_scores_add_up_block_by_block(model: Model) -> None:
    """Blocks of 4; a continuation over two blocks: each enumerated by itself, and the sum of both scored apart."""
    context, answer = (0, 30, 31, 32), (40, 41, 42, 43, 44, 45)
    blocks = replace(scorer(model, draws=15), layout=Block(4))
    ((whole,),) = blocks.scores([("q", [Request(context, answer)])])
    ((first,),) = blocks.scores([("q", [Request(context, answer[:4])])])
    ((second,),) = blocks.scores([("q", [Request(context + answer[:4], answer[4:])])])
    assert whole.nats == pytest.approx(first.nats + second.nats, abs=1e-10)
    assert (whole.forwards, first.forwards, second.forwards) == (15, 15, 3)


# ------------------------------------------------------------------------------------------------------ the parent


@pytest.fixture(scope="module")
def exact(parent: Path) -> Scorer:
    opened, tokenizer = load_parent(str(parent), dtype=torch.float64)
    return Scorer(HFDenoiser(opened.eval(), None), Causal(), None, special_tokens(tokenizer), 64)


def test_the_parent_is_transformers_own_log_likelihood(exact: Scorer) -> None:
    some = questions(5)
    assert isinstance(exact.denoiser, HFDenoiser)
    for (_, group), scores in zip(some, exact.scores(some), strict=True):
        for request, got in zip(group, scores, strict=True):
            ids = torch.tensor([[*request.context, *request.continuation]])
            with torch.no_grad():
                log_p = exact.denoiser.model(input_ids=ids).logits[0].log_softmax(-1)
            n = len(request.continuation)
            expected = -float(sum(log_p[-n - 1 + i, request.continuation[i]] for i in range(n)))
            assert got.nats == pytest.approx(expected, abs=1e-9) and (got.stderr, got.forwards) == (0.0, 1)
            right = (log_p[-n - 1 : -1].argmax(-1) == torch.tensor(request.continuation)).all()
            assert exact.greedy([request]) == [bool(right)]


# ---------------------------------------------------------------------------------------------------------- greedy


def greedy_text(model: Model, context: tuple[int, ...], n: int) -> tuple[int, ...]:
    """One token per forward, the surest first, through the public `logits`."""
    ids = torch.tensor([[*context, *[model.process.mask_token_id] * n]])
    left = list(range(len(context), ids.shape[1]))
    while left:
        best, token = model.logits(ids)[0, left].log_softmax(-1).max(-1)
        k = int(best.argmax())
        ids[0, left[k]] = token[k]
        left.pop(k)
    return tuple(ids[0, len(context) :].tolist())


def test_greedy_is_what_the_model_would_write(model: Model, exact: Scorer) -> None:
    context = (0, 30, 31, 32)
    text = greedy_text(model, context, 4)
    wrong = (*text[:-1], text[-1] + 1)
    for budget in (1, 1000):
        requests = [Request(context, text), Request(context, wrong), Request((0, 5, 6), (7,))]
        assert scorer(model, budget=budget).greedy(requests)[:2] == [True, False]
    only = Scorer(exact.denoiser, Causal(), None, exact.special, 64)
    with torch.no_grad():
        step = int(exact.denoiser.model(input_ids=torch.tensor([context])).logits[0, -1].argmax())  # type: ignore[attr-defined]
    assert only.greedy([Request(context, (step,)), Request(context, (step + 1,))]) == [True, False]


# -------------------------------------------------------------------------------------------------- sequential draws


class Levels:
    """A masked token costs its id in nats, more where more is masked: easy and hard questions by choice of ids."""

    def nll(self, rows: Rows) -> Tensor:
        shares = rows.level
        return rows.target.double() * (1 + 0.5 * shares)

    def __call__(self, rows: Rows, *, cache: Any = None) -> Tensor:
        raise NotImplementedError


def test_student_quantiles() -> None:
    """Table values of t at 95 and 99 %."""
    for z, freedom, t in ((1.645, 4, 2.132), (1.645, 10, 1.812), (2.326, 4, 3.747), (2.326, 30, 2.457)):
        assert student(z, freedom) == pytest.approx(t, rel=0.04)
    assert student(2.0, math.inf) == 2.0


def test_sequential_draws_stop_where_the_answer_is_clear() -> None:
    rng = np.random.default_rng(0)
    context = (0, 1)
    easy = [Request(context, (10,) * 12), Request(context, (90,) * 12), Request(context, (80,) * 12)]
    mixed = [tuple(rng.permutation(np.arange(40, 52)).tolist()) for _ in range(2)]
    hard = [Request(context, mixed[0]), Request(context, mixed[1]), Request(context, (900,) * 12)]
    one = Scorer(Levels(), Full(), toy.PROCESS, TOY, 64, draws=128, confidence=0.99)
    (clear, close) = one.scores([("easy", easy), ("hard", hard)])
    assert [s.forwards for s in clear] == [7, 7, 7]
    assert close[0].forwards == close[1].forwards > 100 and close[2].forwards == 7, "the hopeless option is dropped"
    ((plain, *_), _) = replace(one, confidence=None).scores([("easy", easy), ("hard", hard)])
    assert plain.forwards == 127 and plain.nats == pytest.approx(clear[0].nats, rel=0.02)
    enumerated = replace(one, draws=8).scores([("q", [Request(context, (5, 6)), Request(context, (5, 6))])])
    assert [s.forwards for s in enumerated[0]] == [3, 3], "a tie of enumerated options draws nothing more"


# -------------------------------------------------------------------------------------------------------- refusals


def test_refusals_and_truncation(model: Model) -> None:
    one = scorer(model, length=10)
    with pytest.raises(ValueError, match="a continuation has no tokens"):
        one.scores([("q", [Request((0,), ())])])
    with pytest.raises(ValueError, match="a continuation has 10 tokens and the model was trained on 9"):
        one.scores([("q", [Request((0,), (5,) * 10)])])
    with pytest.raises(ValueError, match="needs the start token"):
        one.scores([("q", [Request((), (5,))])])
    long, cut = Request((0, *range(20, 40)), (5, 6)), Request((0, *range(33, 40)), (5, 6))
    ((a,), (b,)) = one.scores([("q", [long]), ("q", [cut])])
    assert a.nats == b.nats and (a.truncated, b.truncated) == (13, 0), "the start token and the nearest tokens stay"
    with pytest.raises(ValueError, match="draws must be at least 1"):
        scorer(model, draws=0)
    with pytest.raises(ValueError, match="confidence must lie between"):
        scorer(model, confidence=1.0)
    with pytest.raises(ValueError, match="give it the layout Causal"):
        Scorer(model.denoiser, Full(), None, special_tokens(model.tokenizer), 64)
    with pytest.raises(ValueError, match="nothing to score"):
        plan_masks(0, 5, np.random.default_rng(0))


def test_a_reused_mask_token_is_not_scored(model: Model) -> None:
    one = scorer(model, skip=7, draws=3)
    ((got,),) = one.scores([("q", [Request((0, 30), (40, 7, 41))])])
    assert (got.tokens, got.skipped, got.forwards) == (2, 1, 3)
    with pytest.raises(ValueError, match="nothing but the mask token"):
        one.scores([("q", [Request((0, 30), (7,))])])


def test_estimates_with_fewer_draws_come_from_the_masks_that_were_scored() -> None:
    """Strided pairs of one run average to the run; looked-up plans average to the exact value."""
    rng = np.random.default_rng(0)
    n, pairs = 9, 32
    cost = rng.random(2**n)

    def nats(masks: np.ndarray) -> np.ndarray:
        return cost[masks @ 2 ** np.arange(n - 1, -1, -1)] * masks.sum(1)

    sampled, exact = Tally(n), Tally(n, enumerated=True)
    masks, _ = plan_masks(n, 2 * pairs + 1, rng)
    sampled.add(masks, nats(masks), first=True)
    for draws in (17, 33):  # 8 pairs in 4 strides, 16 pairs in 2
        found = sampled.fewer(draws)
        assert found is not None and len(set(found)) == 2 * pairs // (draws - 1)
        assert np.mean(found) == pytest.approx(sampled.nats)
    assert sampled.fewer(2 * pairs + 3) is None
    # Pairs lie in order of their strata: the mean over the starts leans to neither end.
    steep = Tally(40, rounds=[np.arange(63.0) ** 2])
    for draws in (4, 8, 16):
        assert np.mean(steep.fewer(draws) or [0.0]) == pytest.approx(steep.nats, rel=0.05)
    all_masks, _ = every_mask(n)
    exact.add(all_masks, nats(all_masks), first=True)
    assert exact.fewer(2**n) == [exact.known] * FEWER
    found = [value for draws in range(65, 200, 2) for value in exact.fewer(draws) or []]
    assert len(set(found)) > 100 and abs(np.mean(found) - exact.known) < 4 * np.std(found) / len(found) ** 0.5


# --------------------------------------------------------------------------------------------------------- guidance


def guided_by_hand(model: HFDenoiser, context: tuple[int, ...], answer: tuple[int, ...], scale: float) -> float:
    """The count form over every mask of the answer, the guided law of each token written out; nats."""
    mask, total, n = toy.SPECIAL.mask, 0.0, len(answer)
    assert mask is not None
    for hidden, weight in zip(*every_mask(n), strict=True):
        shown = [mask if h else t for h, t in zip(hidden, answer, strict=True)]
        laws = []
        for before in (list(context), [context[0], *[mask] * (len(context) - 1)]):
            with torch.no_grad():
                logits = model.model(torch.tensor([before + shown])).logits[0]
            logits[:, mask] = -math.inf
            laws.append(logits.log_softmax(-1))
        for j in np.flatnonzero(hidden):
            row = len(context) + int(j) - 1
            mixed = torch.where(laws[0][row].isneginf(), -math.inf, scale * laws[0][row] + (1 - scale) * laws[1][row])
            total -= float(mixed.log_softmax(-1)[answer[j]]) * weight
    return total


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.8])
def test_guided_scores_are_those_of_the_guided_law(scale: float) -> None:
    """Options and contexts of several lengths in one batch, one context of the start token alone."""
    denoiser = toy.tiny_denoiser("llama", torch.float64)
    asked = [((0, 5, 6, 7), (8, 9)), ((0, 4), (10, 11, 12)), ((0, 9, 9, 9, 3), (5,)), ((0,), (6, 7))]
    plain = Scorer(denoiser, Full(), MaskedDiffusion(toy.VOCAB - 1), toy.SPECIAL, 16, draws=7)
    guided = replace(plain, guidance=scale)
    found = guided.scores([(str(i), [Request(*pair)]) for i, pair in enumerate(asked)])
    for (score,), (context, answer) in zip(found, asked, strict=True):
        assert score.nats == pytest.approx(guided_by_hand(denoiser, context, answer, scale), abs=1e-10)
        assert score.forwards == (2 ** len(answer) - 1) * (2 if scale == 1.8 else 1)
    same = plain.scores([(str(i), [Request(*pair)]) for i, pair in enumerate(asked)])
    gaps = [abs(a.nats - b.nats) for (a,), (b,) in zip(found, same, strict=True)]
    assert gaps[3] < 1e-10, "there is nothing to be guided by"
    assert max(gaps) < 1e-10 if scale == 1.0 else min(gaps[:3]) > 1e-3


def test_guided_scores_of_the_table_toy() -> None:
    """p(c | a, b)^s p(c | a)^(1 - s), normalised; the first token stands for the start token, which is never masked."""
    table = toy.Table.exact(P)
    for a, b, c in toy.TEXTS:
        ((got,),) = toy_scorer(table, guidance=2.5).scores([("", [Request((a, b), (c,))])])
        law = table.rows[a, b, toy.MASK][2] ** 2.5 * table.rows[a, toy.MASK, toy.MASK][2] ** -1.5
        assert got.nats == pytest.approx(-math.log(law[c] / law.sum()), abs=1e-12)


def test_guided_greedy_answers_are_those_of_the_guided_law(model: Model) -> None:
    """The two ends: scale 1 is the plain model, scale 0 one that does not see its context."""
    requests = [Request((0, *range(20, 30)), (40 + i,)) for i in range(30)]
    blind = [Request((0, *range(50, 60)), (40 + i,)) for i in range(30)]
    plain, guided = scorer(model), scorer(model, guidance=0.0)
    assert guided.greedy(requests) == guided.greedy(blind)
    assert scorer(model, guidance=1.0).greedy(requests) == plain.greedy(requests)
    nats = [[s[0].nats for s in one.scores([("", [r]) for r in requests])] for one in (plain, guided)]
    assert max(abs(a - b) for a, b in zip(*nats, strict=True)) > 0.01


def test_guidance_is_for_full_attention_alone(model: Model) -> None:
    with pytest.raises(ValueError, match="needs a checkpoint with full attention"):
        replace(scorer(model), layout=Block(4), guidance=2.0)
    with pytest.raises(ValueError, match="scale must be 0 or a positive number"):
        scorer(model, guidance=-1.0).scores([("", [Request((0, 5), (6,))])])
