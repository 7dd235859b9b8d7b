"""How likely a text is: the bound of the diffusion model, the exact figure of its parent, on the same windows.

A document is cut into windows of trained_length - 1 tokens, each behind a start token, context reset at each. The
bound is estimated in the count form with quantiles stratified over a window's draws and every mask paired with its
complement. Standard errors are clustered by document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..hub import Model
from ..layout import Block, Causal, Denoiser, Layout, NoisedBatch, Rows
from ..objective import LEVEL_BINS, diffusion_loss
from ..process import MaskedDiffusion
from ..runtime import generator, uniforms
from ..tokenizer import SpecialTokens, encode, special_tokens
from .estimate import Request, Scorer


@dataclass(frozen=True)
class Window:
    """Tokens of one window without the start token; `bytes`: UTF-8 bytes of their text."""

    ids: tuple[int, ...]
    document: int
    bytes: float


@dataclass(frozen=True)
class Estimate:
    """A likelihood in nats (an upper bound for diffusion, exact for a parent) with its cost.

    stderr is in bits per byte, stderr_nats_per_token in nats per token, both clustered by document (nan with fewer
    than two). by_level: (level, nats per masked token, count) per tenth of noise. skipped: natural occurrences of
    a reused mask token, left out on both sides.
    """

    nats: float
    tokens: int
    nats_per_token: float
    bits_per_byte: float
    stderr: float
    forwards: int
    seed: int
    bytes: float = 0.0
    draws: int = 1
    stderr_nats_per_token: float = math.nan
    skipped: int = 0
    by_level: tuple[tuple[float, float, int], ...] = ()
    per_window: tuple[float, ...] = ()


def cut_windows(
    documents: Sequence[Sequence[int]], sizes: Sequence[float], length: int, *, limit: int | None = None
) -> list[Window]:
    """Windows of length - 1 tokens. With a limit: the first window of every document before any second one.

    `sizes` are the documents' UTF-8 bytes; a window's share is in proportion to its tokens, so that all windows of a
    document add up to its bytes exactly.
    """
    room = length - 1
    ranked = []
    for d, ids in enumerate(documents):
        for k, start in enumerate(range(0, len(ids), room)):
            piece = tuple(int(i) for i in ids[start : start + room])
            ranked.append((k, d, Window(piece, d, sizes[d] * len(piece) / len(ids))))
    ranked.sort(key=lambda entry: entry[:2])
    return [window for *_, window in ranked[:limit]]


def score_windows(
    denoiser: Denoiser,
    layout: Layout | Causal,
    process: MaskedDiffusion | None,
    windows: Sequence[Window],
    special: SpecialTokens,
    *,
    draws: int = 4,
    seed: int = 0,
    batch: int = 4,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Estimate:
    """Likelihood of windows: the bound with `draws` noise draws each, or exact when `process` is None (layout Causal).

    The same seed gives the same masks for any model, so two models can be compared window by window.
    """
    if not windows:
        raise ValueError("there is no text to score; give at least one document that is not empty")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    draws = 1 if process is None else draws
    jobs = [(w, k) for w in range(len(windows)) for k in range(draws)]
    jobs.sort(key=lambda job: len(windows[job[0]].ids))  # equal lengths together: little padding
    nats = np.zeros(len(windows))
    levels = torch.zeros(LEVEL_BINS, 2)
    tokens = np.zeros(len(windows), dtype=np.int64)
    forwards = 0
    for at in range(0, len(jobs), batch):
        part = jobs[at : at + batch]
        rows, maskable = _rows(layout, process, windows, part, special, draws, seed)
        with torch.no_grad():
            nll = denoiser.nll(rows.to(device)).cpu().double() * rows.weight.double()
        owner = rows.source // rows.ids.shape[1]
        sums = torch.zeros(len(part), dtype=torch.float64).index_add_(0, owner, nll)
        for (w, _), value, n in zip(part, sums.tolist(), maskable, strict=True):
            nats[w] += value / draws
            tokens[w] = n
        levels += _by_level(rows, nll)
        forwards += len(part)
        progress(at + len(part), len(jobs))
    skipped = sum(len(w.ids) for w in windows) - int(tokens.sum())
    return summarise(windows, nats, tokens, forwards=forwards, seed=seed, draws=draws, by_level=levels, skipped=skipped)


def _by_level(rows: Rows, weighted_nll: Tensor) -> Tensor:
    known = _Known(torch.where(rows.weight > 0, weighted_nll.float() / rows.weight, 0))
    return diffusion_loss(known, rows).by_level


@dataclass(frozen=True)
class _Known:
    """A denoiser whose nats are known already."""

    values: Tensor

    def __call__(self, rows: Rows, *, cache: Any = None) -> Tensor:
        raise AssertionError("only nats are known")

    def nll(self, rows: Rows) -> Tensor:
        return self.values


def _rows(
    layout: Any,
    process: MaskedDiffusion | None,
    windows: Sequence[Window],
    jobs: Sequence[tuple[int, int]],
    special: SpecialTokens,
    draws: int,
    seed: int,
) -> tuple[Rows, list[int]]:
    """Rows of a batch of (window, draw), and the scored tokens of each."""
    if isinstance(layout, Block):
        layout = replace(layout, ar_weight=0.0)  # a term of training, not of the bound
    L = 1 + max(len(windows[w].ids) for w, _ in jobs)
    x0_BL = torch.full((len(jobs), L), special.pad)
    valid_BL = torch.zeros(len(jobs), L, dtype=torch.bool)
    for b, (w, _) in enumerate(jobs):
        ids = windows[w].ids
        x0_BL[b, 0] = special.bos
        x0_BL[b, 1 : 1 + len(ids)] = torch.tensor(ids)
        valid_BL[b, : 1 + len(ids)] = True
    maskable_BL = valid_BL.clone()
    maskable_BL[:, 0] = False
    if special.mask is not None:
        maskable_BL &= x0_BL != special.mask
    group_BL = torch.zeros_like(x0_BL)
    zeros_BL = torch.zeros_like(x0_BL)
    counts = maskable_BL.sum(1).tolist()
    if process is None:
        none_BL = torch.zeros_like(maskable_BL)
        batch = NoisedBatch(x0_BL, x0_BL, none_BL, maskable_BL, none_BL.float(), zeros_BL, valid_BL, group_BL)
        return layout.training_rows(batch), counts
    groups = 1
    if isinstance(layout, Block):
        group_BL = layout.groups(L).expand_as(x0_BL).contiguous()
        groups = int(group_BL.max()) + 1
    # Draws 2k and 2k + 1 are a mask and its complement; pairs are stratified over the levels. An odd number of draws
    # is stratified without pairs: a pair more in one stratum than in another would bias the bound.
    each = 2 if draws % 2 == 0 else 1
    strata = draws // each
    level_BG = torch.stack(
        [torch.from_numpy((k // each + uniforms(seed, w, purpose="level", n=groups)) / strata) for w, k in jobs]
    )
    seeds = [int(generator(seed, w, k // each, purpose="noise").integers(2**62)) for w, k in jobs]
    mirror_B = torch.tensor([k % each == 1 for _, k in jobs])
    ids_BL, noised_BL, weight_BL = process.corrupt(x0_BL, maskable_BL, group_BL, level_BG, seeds, mirror_B=mirror_B)
    batch = NoisedBatch(x0_BL, ids_BL, noised_BL, maskable_BL, weight_BL, zeros_BL, valid_BL, group_BL)
    return layout.training_rows(batch), counts


def summarise(
    windows: Sequence[Window],
    nats_W: np.ndarray,
    tokens_W: np.ndarray,
    *,
    forwards: int,
    seed: int,
    draws: int = 1,
    by_level: Tensor | None = None,
    skipped: int = 0,
) -> Estimate:
    """Totals and ratios with standard errors clustered by document."""
    documents = np.array([w.document for w in windows])
    bytes_W = np.array([w.bytes for w in windows])
    nats, tokens, size = float(nats_W.sum()), int(tokens_W.sum()), float(bytes_W.sum())
    levels = [] if by_level is None else [
        (k / (LEVEL_BINS - 1), float(a / n), int(n)) for k, (a, n) in enumerate(by_level) if n > 0 and k > 0
    ]  # fmt: skip
    return Estimate(
        nats=nats,
        tokens=tokens,
        nats_per_token=nats / max(1, tokens),
        bits_per_byte=nats / math.log(2) / max(1.0, size),
        stderr=ratio_stderr(nats_W / math.log(2), bytes_W, documents),
        forwards=forwards,
        seed=seed,
        bytes=size,
        draws=draws,
        stderr_nats_per_token=ratio_stderr(nats_W, tokens_W.astype(float), documents),
        skipped=skipped,
        by_level=tuple(levels),
        per_window=tuple(float(x) for x in nats_W),
    )


def ratio_stderr(above: np.ndarray, below: np.ndarray, cluster: np.ndarray) -> float:
    """Standard error of sum(above) / sum(below) with whole clusters as the independent draws; nan for one cluster."""
    ids = np.unique(cluster)
    if len(ids) < 2:
        return math.nan
    ratio = above.sum() / below.sum()
    residual = np.array([(above[cluster == c] - ratio * below[cluster == c]).sum() for c in ids])
    return float(math.sqrt((residual**2).sum() * len(ids) / (len(ids) - 1)) / below.sum())


def paired_gain(before: Estimate, after: Estimate, windows: Sequence[Window]) -> tuple[float, float]:
    """(nats per token gained, its standard error) between two estimates on the same windows and masks."""
    assert before.tokens == after.tokens, "the estimates are of different texts"
    tokens = np.array([float(len(w.ids)) for w in windows])
    tokens *= before.tokens / tokens.sum()  # less the natural mask tokens that neither scored
    gain = np.array(before.per_window) - np.array(after.per_window)
    return float(gain.sum() / tokens.sum()), ratio_stderr(gain, tokens, np.array([w.document for w in windows]))


def nelbo(model: Model, texts: Sequence[str], *, draws: int = 8, seed: int = 0, batch: int = 4) -> Estimate:
    """The bound of texts under a diffusion model (continuous-time objective of arXiv 2410.17891, count form).

    Each document is cut into windows of trained_length - 1 tokens behind a start token.
    """
    special = special_tokens(model.tokenizer)
    documents = [encode(model.tokenizer, text, plain=True) for text in texts]
    sizes = [float(len(text.encode())) for text in texts]
    windows = cut_windows(documents, sizes, int(model.config["trained_length"]))
    return score_windows(
        model.denoiser,
        model.layout,
        model.process,
        windows,
        special,
        draws=draws,
        seed=seed,
        batch=batch,
        device=model.device,
    )


def score(
    model: Model, context: str, continuation: str, *, draws: int = 128, seed: int = 0, batch: int = 16
) -> Estimate:
    """Bound of -log p(continuation | context); only continuation tokens are masked. Several at once: eval.estimate.

    Exact over masks when 2^n - 1 <= draws for n tokens (of a block, in a block layout). The same seed gives all
    continuations the same noise. bits_per_byte counts the continuation's bytes. ValueError for an empty continuation or
    one that does not fit the trained length.
    """
    special = special_tokens(model.tokenizer)
    joined = encode(model.tokenizer, context + continuation, plain=True)
    if special.mask in joined:
        raise ValueError(f"the text holds the mask token {model.tokenizer.mask_token!r} itself; remove it")
    alone = encode(model.tokenizer, context, plain=True)
    # Tokens may straddle the edge ("fox " + "jumps" is "fox", " jumps"): what differs belongs to the continuation.
    shared = next((i for i, (a, b) in enumerate(zip(joined, alone)) if a != b), min(len(joined), len(alone)))
    if len(joined) == shared:
        raise ValueError(
            "the continuation has no tokens of its own; give at least one character that is not joined to the context"
        )
    limit = int(model.config["trained_length"])
    if len(joined) + 1 > limit:
        raise ValueError(
            f"context and continuation have {len(joined)} tokens, the model was trained on {limit - 1}; "
            "shorten the context"
        )
    scorer = Scorer(
        model.denoiser, model.layout, model.process, special, limit, draws=draws, seed=seed,
        budget=batch * (len(joined) + 1), device=model.device,
    )  # fmt: skip
    request = Request((special.bos, *joined[:shared]), tuple(joined[shared:]))
    ((got,),) = scorer.scores([("", [request])])
    size, n = len(continuation.encode()), got.tokens
    return Estimate(
        got.nats, n, got.nats / n, got.nats / math.log(2) / size, got.stderr / math.log(2) / size, got.forwards, seed,
        bytes=size, draws=draws, stderr_nats_per_token=got.stderr / n,
    )  # fmt: skip
