"""Before a hole is filled: how long it is, and where words stand that have to occur."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .caches import Uncached
from .canvas import Canvas
from .constraints import Bans, Opening
from .denoise import denoise
from .draw import Draw
from .fill import Model
from .policies import TopConfidence

#: Lengths tried in one batch: bounds the logits in memory.
TOGETHER = 8

Spellings = Sequence[tuple[int, ...]]


def greedy_log_prob(model: Model, canvas: Canvas, banned: Bans | None) -> tuple[Tensor, int]:
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
    model: Model, canvas: Canvas, words: Sequence[Spellings], hole_BL: Tensor, opening: Opening
) -> tuple[Tensor, int]:
    """((B,) nats per token, forwards) of canvases that differ in how long one hole is; words are placed in it first.

    Per token: the sum would prefer the shortest hole always, since each token more costs something.
    """
    length_B = canvas.editable.sum(1)
    canvas, placed_B, used = place(model, canvas, words, hole_BL, opening)
    filled_B, forwards = greedy_log_prob(model, canvas, opening)
    return (placed_B + filled_B) / length_B, used + forwards


def place(
    model: Model, canvas: Canvas, words: Sequence[Spellings], hole_BL: Tensor, opening: Opening
) -> tuple[Canvas, Tensor, int]:
    """(canvas, (B,) float64 nats, forwards): every word put where the model finds it likeliest, and given from then on.

    One forward a word, the longest first; its place and spelling are those of the highest sum of log-probabilities
    among the places that leave room for the others. A word lies within one hole (`hole_BL`: int64, hole of each
    position), and where a hole has to open with some token (`opening`), a word there does. ValueError where it does not
    fit.
    """
    opens, places = frozenset(opening.tokens.tolist()), opening.places_BL.tolist()
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
            runs = [(run, places[b][run.start]) for run in _runs(at_N, hole_BL[b].tolist())]
            others = [need(word, opens) for word in words[k + 1 :]]
            nats, start, spelling = _best_place(mine, at_N, runs, spellings, others, opens)
            ids[b, start : start + len(spelling)] = torch.tensor(spelling, device=ids.device)
            editable[b, start : start + len(spelling)] = False
            total_B[b] += nats
        canvas = replace(canvas, ids=ids, editable=editable)
    return canvas, total_B, len(words)


def shortest(spellings: Spellings) -> int:
    """Fewest tokens of a word."""
    return min(len(spelling) for spelling in spellings)


#: Tokens of a word's shortest spelling, and of its shortest that may open a hole (None: there is none).
Need = tuple[int, int | None]


def need(spellings: Spellings, opens: frozenset[int]) -> Need:
    """What a word needs of a hole, of which some open with one of certain tokens."""
    return shortest(spellings), min((len(spelling) for spelling in spellings if spelling[0] in opens), default=None)


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
    log_probs_NV: Tensor, at: Sequence[int], runs: Sequence[tuple[range, bool]], spellings: Spellings,
    others: Sequence[Need], opens: frozenset[int],
) -> tuple[float, int, tuple[int, ...]]:  # fmt: skip
    """(nats, first position, spelling) of the likeliest place; `others` must still fit. A run that says True has to
    open with one of `opens`."""
    row = {position: n for n, position in enumerate(at)}
    found: list[tuple[float, int, tuple[int, ...]]] = []
    for spelling in spellings:
        nats_Nm = log_probs_NV[:, list(spelling)].tolist()
        for r, (run, spaced) in enumerate(runs):
            rest = [(len(other), spaced) for i, (other, spaced) in enumerate(runs) if i != r]
            first = run.start if not spaced or spelling[0] in opens else run.start + 1
            for start in range(first, run.stop - len(spelling) + 1):
                left = start - run.start, spaced and start > run.start
                if fits([*rest, left, (run.stop - start - len(spelling), False)], others):
                    nats = sum(nats_Nm[row[start + j]][j] for j in range(len(spelling)))
                    found.append((nats, start, spelling))
    if not found:
        raise ValueError(
            f"the words that have to occur need {shortest(spellings) + sum(n for n, _ in others)} tokens and do not "
            "fit into the holes; make a hole longer (behind a space its first token brings the space), or drop a word"
        )
    return max(found, key=lambda place: (place[0], -place[1]))


def fits(room: Sequence[tuple[int, bool]], needs: Sequence[Need]) -> bool:
    """Whether stretches can take all of `needs`, each need in one piece.

    A stretch is its number of tokens and whether something that may open a hole has to come first in it: a word so
    spelt, or a token that is left.
    """
    if not needs:
        return all(n > 0 or not spaced for n, spaced in room)
    (short, opener), *others = needs

    def taken(k: int, after: tuple[int, bool]) -> bool:
        return fits([after if i == k else other for i, other in enumerate(room)], others)

    for k, (n, spaced) in enumerate(room):
        if room[k] in room[:k]:
            continue
        if n >= short and taken(k, (n - short, spaced)):
            return True
        if spaced and opener is not None and n >= opener and taken(k, (n - opener, False)):
            return True
    return False
