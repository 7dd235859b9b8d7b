"""Likelihoods: windows, the bound, exact parents, standard errors; all on the same windows and masks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffulm
from diffulm.eval.likelihood import (
    Estimate,
    Window,
    cut_windows,
    paired_gain,
    ratio_stderr,
    score_windows,
)
from diffulm.hub import Model
from diffulm.layout import Block, Causal, Full, Rows
from diffulm.tokenizer import encode, special_tokens

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n",
    "A masked diffusion model reveals its tokens in any order. " * 4,
    "é ü €",
]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    """Float64: differences are then mistakes and not rounding."""
    torch.set_num_threads(1)
    return diffulm.load(checkpoint, dtype="float64")


@pytest.fixture(scope="module")
def windows(model: Model) -> list[Window]:
    documents = [encode(model.tokenizer, text) for text in TEXTS]
    return cut_windows(documents, [float(len(t.encode())) for t in TEXTS], 32)


def score(model: Model, windows: list[Window], **changes: Any) -> Estimate:
    special = special_tokens(model.tokenizer)
    return score_windows(model.denoiser, model.layout, model.process, windows, special, **changes)


# ------------------------------------------------------------------------------------------------------- windows


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=12), st.integers(2, 12), st.one_of(st.none(), st.integers(0, 30)))
def test_windows_cut_documents_and_share_their_bytes(sizes: list[int], length: int, limit: int | None) -> None:
    documents = [[1000 * d + i for i in range(n)] for d, n in enumerate(sizes)]
    weights = [3.5 * n for n in sizes]
    everything = cut_windows(documents, weights, length)
    for d, ids in enumerate(documents):
        mine = [w for w in everything if w.document == d]
        assert [i for w in mine for i in w.ids] == ids, "in order, nothing twice"
        assert all(len(w.ids) == length - 1 for w in mine[:-1]) and all(0 < len(w.ids) < length for w in mine)
        assert sum(w.bytes for w in mine) == pytest.approx(weights[d])
    limited = cut_windows(documents, weights, length, limit=limit)
    assert limited == everything[:limit]
    # The first window of every document comes before the second of any.
    order = [w.ids[0] % 1000 // (length - 1) for w in everything]
    assert order == sorted(order)


# ------------------------------------------------------------------------------------------------------ the bound


def test_the_bound_does_not_depend_on_batch_or_neighbours(model: Model, windows: list[Window]) -> None:
    """Windows of different lengths (padding), batch sizes 1 to all: nats of every window within 1e-10."""
    assert len({len(w.ids) for w in windows}) > 3
    expected = score(model, windows, draws=4, batch=1)
    assert len(expected.per_window) == len(windows) and expected.forwards == 4 * len(windows)
    for batch in (2, 3, 100):
        other = score(model, windows, draws=4, batch=batch)
        assert np.abs(np.subtract(other.per_window, expected.per_window)).max() < 1e-10
        assert other.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-12)
        assert [n for *_, n in other.by_level] == [n for *_, n in expected.by_level]
    # Masks go by the window's place, so the first windows by themselves are the first windows of all.
    alone = score(model, windows[:2], draws=4)
    assert np.abs(np.subtract(alone.per_window, expected.per_window[:2])).max() < 1e-10


def test_totals(model: Model, windows: list[Window]) -> None:
    got = score(model, windows, draws=2)
    size = sum(len(t.encode()) for t in TEXTS)
    assert got.tokens == sum(len(w.ids) for w in windows) and got.skipped == 0 and got.bytes == pytest.approx(size)
    assert got.nats == pytest.approx(sum(got.per_window)) and got.nats_per_token == pytest.approx(got.nats / got.tokens)
    assert got.bits_per_byte == pytest.approx(got.nats / math.log(2) / size)
    assert sum(n for *_, n in got.by_level) > 0 and all(0 < level <= 1 for level, *_ in got.by_level)


class Recorder:
    """A denoiser that keeps the rows it is asked about."""

    def __init__(self, value: float = 1.0) -> None:
        self.rows: list[Rows] = []
        self.value = value

    def __call__(self, rows: Rows, *, cache: Any = None) -> Tensor:
        raise NotImplementedError

    def nll(self, rows: Rows) -> Tensor:
        self.rows.append(rows)
        return torch.full((len(rows.source),), self.value)


def test_one_seed_gives_all_models_the_same_masks(model: Model, windows: list[Window]) -> None:
    special = special_tokens(model.tokenizer)
    asked = []
    for value, seed in ((1.0, 0), (2.0, 0), (1.0, 1)):
        recorder = Recorder(value)
        score_windows(recorder, Full(), model.process, windows, special, draws=4, seed=seed)
        asked.append([rows.ids.tolist() for rows in recorder.rows])
    assert asked[0] == asked[1] != asked[2]


def test_even_draws_come_in_complementary_pairs(model: Model) -> None:
    special, recorder = special_tokens(model.tokenizer), Recorder()
    window = Window(tuple(range(5, 25)), 0, 20.0)
    score_windows(recorder, Full(), model.process, [window], special, draws=8, batch=8)
    (rows,) = recorder.rows
    noised = (rows.ids == special.mask)[:, 1:]
    for k in range(0, 8, 2):
        assert bool(noised[k].all() & noised[k + 1].all()) or bool((noised[k] ^ noised[k + 1]).all())
    # One pair in each quarter of the levels.
    assert [int((int(n) - 1) / 20 * 4) for n in noised[::2].sum(1)] == [0, 1, 2, 3]


@pytest.mark.parametrize("draws", [1, 2, 3, 4, 5])
def test_the_bound_is_unbiased_for_any_number_of_draws(model: Model, draws: int) -> None:
    """A denoiser whose nats are a steep function of the noise level; n = 6 tokens, the mean over levels is known."""
    special, n = special_tokens(model.tokenizer), 6

    class ByLevel(Recorder):
        def nll(self, rows: Rows) -> Tensor:
            return rows.level.double() ** 2

    windows = [Window(tuple(range(5, 5 + n)), w, float(n)) for w in range(1500)]
    got = score_windows(ByLevel(), Full(), model.process, windows, special, draws=draws, batch=1000)
    truth = sum(n * (c / n) ** 2 for c in range(1, n + 1)) / n
    assert truth > 2.5 and abs(got.nats / len(windows) - truth) < 4 * np.std(got.per_window) / math.sqrt(len(windows))


def test_block_layout_is_scored_too(model: Model, windows: list[Window]) -> None:
    special = special_tokens(model.tokenizer)
    layout = Block(4)
    one = score_windows(model.denoiser, layout, model.process, windows[:4], special, draws=2, batch=1)
    all_ = score_windows(model.denoiser, layout, model.process, windows[:4], special, draws=2, batch=8)
    assert np.abs(np.subtract(one.per_window, all_.per_window)).max() < 1e-10


def test_natural_mask_tokens_are_left_out_on_both_sides(model: Model, parent: Path) -> None:
    special = special_tokens(model.tokenizer)
    assert special.mask is not None
    ids = (5, special.mask, 6, 7, special.mask, 8)
    windows = [Window(ids, d, 6.0) for d in range(3)]
    noisy = score(model, windows, draws=2)
    exact = score_windows(Recorder(), Causal(), None, windows, special)
    assert (noisy.tokens, noisy.skipped) == (exact.tokens, exact.skipped) == (12, 6) and exact.nats == 12.0
    other = replace(noisy, per_window=tuple(x - 1 for x in noisy.per_window))
    assert paired_gain(noisy, other, windows)[0] == pytest.approx(3 / 12), "per token that was scored"


def test_errors_of_scoring(model: Model, windows: list[Window]) -> None:
    with pytest.raises(ValueError, match="no text to score"):
        score(model, [])
    with pytest.raises(ValueError, match="draws must be at least 1"):
        score(model, windows, draws=0)


# ------------------------------------------------------------------------------------------------------- the parent


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_parents_nats_are_transformers_own_loss(parent: Path, windows: list[Window], batch: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from diffulm.denoiser import HFDenoiser

    stock = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float64).eval()
    special = special_tokens(AutoTokenizer.from_pretrained(parent))
    expected = []
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([[special.bos, *window.ids]])
            expected.append(float(stock(input_ids=ids, labels=ids).loss) * len(window.ids))
    got = score_windows(HFDenoiser(stock, None), Causal(), None, windows, special, batch=batch, draws=7)
    assert got.forwards == len(windows), "exact: one forward each, whatever the draws"
    # transformers computes its loss in float32
    assert got.per_window == pytest.approx(expected, rel=2e-6) and got.nats == pytest.approx(sum(expected), rel=1e-6)


# ------------------------------------------------------------------------------------------------- standard errors


def test_the_standard_error_is_the_spread_over_fresh_texts() -> None:
    """Documents with correlated windows of different sizes: against the true spread, jackknife and bootstrap."""
    rng = np.random.default_rng(0)

    def texts(documents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counts = rng.integers(1, 6, documents)
        cluster = np.repeat(np.arange(documents), counts)
        below = rng.integers(5, 50, len(cluster)).astype(float)
        level = 3 + rng.normal(0, 0.5, documents)[cluster] + rng.normal(0, 0.2, len(cluster))
        return level * below, below, cluster

    n = 80
    samples = [texts(n) for _ in range(600)]
    true = np.std([a.sum() / b.sum() for a, b, _ in samples])
    assert np.mean([ratio_stderr(*s) for s in samples]) == pytest.approx(true, rel=0.1)
    above, below, cluster = samples[0]
    got = ratio_stderr(above, below, cluster)
    sums = np.array([[above[cluster == d].sum(), below[cluster == d].sum()] for d in range(n)])
    left_out = np.array([(sums.sum(0) - row)[0] / (sums.sum(0) - row)[1] for row in sums])
    jackknife = math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
    drawn = [sums[rng.integers(0, n, n)].sum(0) for _ in range(2000)]
    assert got == pytest.approx(jackknife, rel=0.05)
    assert got == pytest.approx(float(np.std([a / b for a, b in drawn])), rel=0.12)
    # Windows taken as independent would claim a much smaller error.
    assert ratio_stderr(above, below, np.arange(len(above))) < 0.8 * got


def test_one_document_has_no_standard_error() -> None:
    assert math.isnan(ratio_stderr(np.ones(3), np.ones(3), np.zeros(3)))
    assert ratio_stderr(np.array([2.0, 4.0]), np.array([1.0, 2.0]), np.arange(2)) == 0.0, "equal ratios do not spread"


def test_paired_gain(model: Model, windows: list[Window]) -> None:
    """Of two estimates that share their hard windows, the difference is known far better than either."""
    rng = np.random.default_rng(0)
    tokens = np.array([len(w.ids) for w in windows], dtype=float)
    hard = rng.normal(5, 2, len(windows)) * tokens
    gains = (0.5 + rng.normal(0, 0.01, len(windows))) * tokens
    base = score(model, windows, draws=1)
    before, after = replace(base, per_window=tuple(hard)), replace(base, per_window=tuple(hard - gains))
    gain, stderr = paired_gain(before, after, windows)
    assert gain == pytest.approx(gains.sum() / tokens.sum()) and abs(gain - 0.5) < 4 * stderr
    clusters = np.array([w.document for w in windows])
    assert stderr == pytest.approx(ratio_stderr(gains, tokens, clusters)) and stderr < 0.02
    assert paired_gain(base, base, windows) == (0.0, 0.0)


# --------------------------------------------------------------------------------- nelbo and score, the public ones


def test_nelbo_cuts_scores_and_sums(model: Model) -> None:
    got = diffulm.nelbo(model, TEXTS, draws=4, seed=5)
    documents = [encode(model.tokenizer, t) for t in TEXTS]
    windows = cut_windows(documents, [float(len(t.encode())) for t in TEXTS], 64)
    assert len(windows) > len(TEXTS), "one document has a second window"
    assert got == score(model, windows, draws=4, seed=5)
    assert got.tokens == sum(map(len, documents)) and got.bytes == pytest.approx(sum(len(t.encode()) for t in TEXTS))
    assert got.stderr > 0 and got.seed == 5 and got.forwards == 4 * len(windows)
    assert diffulm.nelbo(model, [*TEXTS, ""], draws=4, seed=5).nats == got.nats, "an empty text adds nothing"
    assert math.isnan(diffulm.nelbo(model, TEXTS[:1]).stderr)
    with pytest.raises(ValueError, match="no text to score"):
        diffulm.nelbo(model, ["", ""])


def brute_force(model: Model, context: str, continuation: str) -> float:
    """The count form over every mask of the continuation, through `Model.logits`."""
    special = special_tokens(model.tokenizer)
    given = encode(model.tokenizer, context)
    ids = encode(model.tokenizer, context + continuation)
    n, total = len(ids) - len(given), 0.0
    for mask in itertools.product([False, True], repeat=n):
        if not any(mask):
            continue
        x = torch.tensor([[special.bos, *ids]])
        places = [1 + len(given) + i for i in range(n) if mask[i]]
        x[0, places] = int(special.mask or 0)
        log_p = model.logits(x)[0].double().log_softmax(-1)
        nats = -sum(float(log_p[p, ids[p - 1]]) for p in places)
        total += nats / (sum(mask) * math.comb(n, sum(mask)))
    return total


@pytest.mark.parametrize(
    ("context", "continuation"), [("The quick", " brown fox"), ("", "dog"), ("def add(a, b):", "\n ret"), ("x", "y")]
)
def test_short_continuations_are_enumerated(model: Model, context: str, continuation: str) -> None:
    got = diffulm.score(model, context, continuation)
    n = len(encode(model.tokenizer, context + continuation)) - len(encode(model.tokenizer, context))
    assert 1 <= n <= 7 and got.tokens == n and got.forwards == 2**n - 1
    assert got.nats == pytest.approx(brute_force(model, context, continuation), abs=1e-10)
    assert got.stderr == 0.0 and got.bits_per_byte == pytest.approx(got.nats / math.log(2) / len(continuation.encode()))
    assert diffulm.score(model, context, continuation, batch=1, seed=3).nats == pytest.approx(got.nats, abs=1e-10)


def test_long_continuations_are_estimated_around_the_truth(model: Model) -> None:
    context, continuation = "The quick brown", " fox jumps over the"
    exact = diffulm.score(model, context, continuation, draws=2**16)
    n = exact.tokens
    assert 5 <= n <= 14 and exact.forwards == 2**n - 1
    draws = [diffulm.score(model, context, continuation, draws=17, seed=s) for s in range(30)]
    assert all(d.forwards == 17 and d.stderr > 0 for d in draws)
    values = np.array([d.nats for d in draws])
    assert abs(values.mean() - exact.nats) < 4 * values.std(ddof=1) / math.sqrt(len(values))
    # The stated error is honest, or too large: the levels are stratified and it takes the pairs as independent.
    stated = np.mean([d.stderr_nats_per_token * n for d in draws])
    assert values.std(ddof=1) < 1.3 * stated


def test_only_the_continuation_is_masked(model: Model) -> None:
    asked: list[Tensor] = []
    real = model.denoiser.nll

    class Spy:
        def nll(self, rows: Rows) -> Tensor:
            asked.append(rows.ids)
            return real(rows)

    context, continuation = "The quick brown", " fox jumps"
    spied = replace(model, denoiser=Spy())  # type: ignore[arg-type]
    spied_device = type("M", (Model,), {"device": torch.device("cpu")})
    spied.__class__ = spied_device
    got = diffulm.score(spied, context, continuation, draws=9)
    ids = torch.cat(asked)
    masked = ids == model.process.mask_token_id
    start = 1 + len(encode(model.tokenizer, context))
    assert got.tokens == ids.shape[1] - start and not masked[:, :start].any() and bool(masked.any(1).all())


def test_errors_of_score(model: Model) -> None:
    with pytest.raises(ValueError, match="no tokens of its own"):
        diffulm.score(model, "The quick", "")
    with pytest.raises(ValueError, match="the model was trained on 63; shorten the context"):
        diffulm.score(model, "word " * 60, "end")
    with pytest.raises(ValueError, match="draws must be at least 1"):
        diffulm.score(model, "a", "b", draws=0)
    # The mask token spelt out is ordinary text, as in prepared data.
    assert diffulm.score(model, "The dog", " <|mask|>", draws=3).tokens > 3
    blocks = replace(model, config={**model.config, "layout": "block", "block_size": 4, "source": "own"})
    # A block of one token is exact: one forward, each token after clean ones.
    one = replace(model, config={**model.config, "layout": "block", "block_size": 1, "source": "own"})
    several = diffulm.score(blocks, "The quick", " brown fox", draws=64)
    alone = diffulm.score(one, "The quick", " brown fox", draws=64)
    assert alone.forwards == 1 and alone.stderr == 0 and several.tokens == alone.tokens > several.forwards // 15


def test_a_space_at_the_end_of_the_context_leaves_nothing_unscored(model: Model) -> None:
    """ "fox " + "jumps" are the tokens of "fox" + " jumps": the continuation is what the context alone lacks."""
    one = diffulm.score(model, "The quick brown fox", " jumps over", draws=5)
    other = diffulm.score(model, "The quick brown fox ", "jumps over", draws=5)
    assert one.tokens == other.tokens and one.nats == other.nats
