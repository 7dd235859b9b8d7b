"""Before a hole is filled: how long it is, and where words stand that have to occur."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .caches import Uncached
from .canvas import Canvas
from .constraints import Banned
from .denoise import denoise
from .draw import Draw
from .fill import Model
from .policies import TopConfidence

#: Lengths tried in one batch: bounds the logits in memory.
TOGETHER = 8

Spellings = Sequence[tuple[int, ...]]


def greedy_log_prob(model: Model, canvas: Canvas, banned: Banned | None) -> tuple[Tensor, int]:
    """((B,) float64 nats, forwards): log-probability of the fill found greedily, most confident token first.

    It is the product of what each token had when it was revealed: the exact probability with which sampling one token a
    step in that order (a function of what stands) gives this fill, so a likelihood and no estimate.
    """
    total_B = torch.zeros(len(canvas.ids), dtype=torch.float64, device=canvas.ids.device)
    forwards = 0
    for step in denoise(
        model.denoiser, model.process, canvas, steps=max(1, int(canvas.editable.sum(1).max())), policy=TopConfidence(),
        draw=Draw(0.0), layout=model.layout, banned=banned,
    ):  # fmt: skip
        forwards += 1
        chosen_N = step.log_probs.gather(1, step.ids[step.predicted][:, None])[:, 0].double()
        chosen_N = torch.where(step.revealed[step.predicted], chosen_N, 0.0)
        total_B += torch.zeros_like(step.ids, dtype=torch.float64).masked_scatter(step.predicted, chosen_N).sum(1)
    return total_B, forwards


def length_scores(
    model: Model, canvas: Canvas, words: Sequence[Spellings], hole_BL: Tensor, banned: Banned | None
) -> tuple[Tensor, int]:
    """((B,) nats per token, forwards) of canvases that differ in how long one hole is; words are placed in it first.

    Per token: the sum would prefer the shortest hole always, since each token more costs something.
    """
    length_B = canvas.editable.sum(1)
    canvas, placed_B, used = place(model, canvas, words, hole_BL)
    filled_B, forwards = greedy_log_prob(model, canvas, banned)
    return (placed_B + filled_B) / length_B, used + forwards


def place(model: Model, canvas: Canvas, words: Sequence[Spellings], hole_BL: Tensor) -> tuple[Canvas, Tensor, int]:
    """(canvas, (B,) float64 nats, forwards): every word put where the model finds it likeliest, and given from then on.

    One forward a word, the longest first; its place and spelling are those of the highest sum of log-probabilities
    among the places that leave room for the others. A word lies within one hole (`hole_BL`: int64, hole of each
    position). ValueError where it does not fit.
    """
    total_B = torch.zeros(len(canvas.ids), dtype=torch.float64, device=canvas.ids.device)
    words = sorted(words, key=shortest, reverse=True)
    for k, spellings in enumerate(words):
        free = canvas.editable
        rows = Uncached().rows(model.layout, canvas, free, free, canvas.ids.shape[1])
        with torch.no_grad():
            log_probs = model.denoiser(rows).log_softmax(-1).double()
        first = 0
        ids, editable = canvas.ids.clone(), canvas.editable.clone()
        for b in range(len(ids)):
            at_N = free[b].nonzero()[:, 0].tolist()
            mine = log_probs[first : first + len(at_N)]
            first += len(at_N)
            runs = _runs(at_N, hole_BL[b].tolist())
            nats, start, spelling = _best_place(mine, at_N, runs, spellings, [shortest(w) for w in words[k + 1 :]])
            ids[b, start : start + len(spelling)] = torch.tensor(spelling, device=ids.device)
            editable[b, start : start + len(spelling)] = False
            total_B[b] += nats
        canvas = replace(canvas, ids=ids, editable=editable)
    return canvas, total_B, len(words)


def shortest(spellings: Spellings) -> int:
    """Fewest tokens of a word."""
    return min(len(spelling) for spelling in spellings)


def _runs(at: Sequence[int], hole: Sequence[int]) -> list[range]:
    """Free positions of a sample as unbroken stretches within one hole."""
    out: list[range] = []
    for i in at:
        if out and out[-1].stop == i and hole[i] == hole[i - 1]:
            out[-1] = range(out[-1].start, i + 1)
        else:
            out.append(range(i, i + 1))
    return out


def _best_place(
    log_probs_NV: Tensor, at: Sequence[int], runs: Sequence[range], spellings: Spellings, others: Sequence[int]
) -> tuple[float, int, tuple[int, ...]]:
    """(nats, first position, spelling) of the likeliest place; `others` are lengths that must still fit."""
    row = {position: n for n, position in enumerate(at)}
    found: list[tuple[float, int, tuple[int, ...]]] = []
    for spelling in spellings:
        nats_Nm = log_probs_NV[:, list(spelling)].tolist()
        for r, run in enumerate(runs):
            rest = [len(other) for i, other in enumerate(runs) if i != r]
            for start in range(run.start, run.stop - len(spelling) + 1):
                if fits([*rest, start - run.start, run.stop - start - len(spelling)], others):
                    nats = sum(nats_Nm[row[start + j]][j] for j in range(len(spelling)))
                    found.append((nats, start, spelling))
    if not found:
        raise ValueError(
            f"the words that have to occur need {sum(others) + shortest(spellings)} tokens and do not fit into the "
            "holes; make a hole longer, or drop a word"
        )
    return max(found, key=lambda place: (place[0], -place[1]))


def fits(room: Sequence[int], needs: Sequence[int]) -> bool:
    """Whether stretches of `room` tokens can take all of `needs`, each need in one piece."""
    if not needs:
        return True
    return any(
        fits([n - needs[0] if i == k else n for i, n in enumerate(room)], needs[1:])
        for k in range(len(room))
        if room[k] >= needs[0] and room[k] not in room[:k]
    )
