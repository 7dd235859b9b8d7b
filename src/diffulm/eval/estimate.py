"""How likely a continuation is after a context: many questions with several options each, in few forwards.

For a diffusion model the score is the bound in the count form (docs/concepts/paper.md): only tokens of the continuation
are masked, the number of masked tokens is stratified, every mask is paired with its complement, the full mask is
scored once, and short continuations are enumerated. The options of one question share their noise, so that what
differs between them is the options. A block layout sums the bounds of its blocks, each after clean earlier ones.
An autoregressive parent is exact. Sequences of equal length go through the model together.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..layout import Block, Causal, Denoiser, NoisedBatch, Rows
from ..process import MaskedDiffusion
from ..runtime import generator
from ..sampling.guidance import EverySample, Guided, forwards_of_a_step
from ..tokenizer import SpecialTokens
from .masks import Option, Score, Tally, contenders, enumerable, paired_masks, plan_masks

#: Masks of the first round of sequential draws; each later round doubles what has been drawn.
FIRST_ROUND = 8


@dataclass(frozen=True)
class Request:
    """Token ids of a context (its start token included) and of the continuation to score.

    size: characters of the continuation, by which length-normalised accuracy divides.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    size: float = 1.0


@dataclass
class Round:
    """Masks of one option to be scored, by segment (M_s, n_s), and where their nats go, (M, S)."""

    option: Option
    masks: list[np.ndarray]
    nats: np.ndarray


@dataclass(frozen=True)
class Scorer:
    """A model with an estimator: `scores` rates options of questions, `greedy` says what the model would write.

    Args:
        process: None for an autoregressive parent (layout Causal), which is scored exactly.
        length: positions the model was trained on; longer contexts lose their first tokens (counted in the score).
        draws: masks per option at most (in a block layout: per block of it); with fewer than 2^n - 1 for n tokens they
            are sampled.
        budget: tokens per forward, padding included.
        confidence: draw in rounds and go on only for options that may yet be the best at this one-sided confidence
            (0.99, say). None: all draws for every option. Stopping where it looks decided biases a score slightly: use
            it for accuracies.
        skip: a reused mask token, whose natural occurrences are not scored.
        guidance: scale of classifier-free guidance by the context (sampling/guidance.py), full attention only; None:
            none. A guided score ranks options; it bounds no likelihood, and costs two forwards.
    """

    denoiser: Denoiser
    layout: Any
    process: MaskedDiffusion | None
    special: SpecialTokens
    length: int
    draws: int = 128
    seed: int = 0
    budget: int = 4096
    confidence: float | None = None
    skip: int | None = None
    guidance: float | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, not {self.draws}")
        if self.confidence is not None and not 0.5 < self.confidence < 1:
            raise ValueError(f"confidence must lie between 0.5 and 1, not {self.confidence}")
        if (self.process is None) != isinstance(self.layout, Causal):
            raise ValueError("a model without a process is an autoregressive parent: give it the layout Causal")
        if self.guidance is not None:
            EverySample().check(self.layout)

    def scores(self, questions: Sequence[tuple[str, Sequence[Request]]]) -> list[list[Score]]:
        """Scores of the options of each (name, options); the name seeds the noise that its options share.

        ValueError for an option without tokens and for one that does not fit the model's length.
        """
        options = [[self.option(request) for request in requests] for _, requests in questions]
        alive = [list(range(len(group))) for group in options]
        for turn in itertools.count():
            rounds = [
                self._round(name, group[i], turn)
                for (name, _), group, left in zip(questions, options, alive, strict=True)
                for i in left
                if not group[i].enumerated and self._pairs(turn) >= (turn > 0)
            ]
            if not rounds:
                break
            self._run(rounds)
            for one in rounds:
                self._settle(one, first=turn == 0)
            if self.confidence is None or self.process is None:
                break
            alive = [
                contenders(group, left, self.confidence) if left else left
                for group, left in zip(options, alive, strict=True)
            ]
        draws = self.draws if self.confidence is None and self.process is not None else 0
        return [[option.score(self.seed, draws) for option in group] for group in options]

    def option(self, request: Request) -> Option:
        """A request as a sequence that fits, with the positions that count; ValueError where there are none."""
        wanted = len(request.continuation)
        if wanted == 0:
            raise ValueError("a continuation has no tokens; every option needs at least one")
        if not request.context:
            raise ValueError("a context has no tokens; it needs the start token at least")
        room = self.length - wanted
        if room < 1:
            raise ValueError(
                f"a continuation has {wanted} tokens and the model was trained on {self.length - 1} behind its start "
                "token; leave this task out or take a model with longer windows"
            )
        context = list(request.context)
        cut = max(0, len(context) - room)
        if cut:  # the start token stays
            context = context[:1] + context[1 + cut :]
        ids = [*context, *request.continuation]
        places = [i for i in range(len(context), len(ids)) if ids[i] != self.skip]
        if not places:
            raise ValueError("a continuation is nothing but the mask token, which cannot be scored; leave it out")
        size = self.layout.size if isinstance(self.layout, Block) else len(ids)
        parts = [np.array(list(part)) for _, part in itertools.groupby(places, key=lambda i: i // size)]
        return Option(
            ids, parts, cut, wanted - len(places), request.size or 1.0, [Tally(len(part)) for part in parts],
            start=len(context),
        )  # fmt: skip

    def _total(self, turn: int) -> int:
        return self.draws if self.confidence is None else min(self.draws, FIRST_ROUND * 2**turn)

    def _pairs(self, turn: int) -> int:
        """New pairs of a later round; none when the draws are spent."""
        return (self._total(turn) - self._total(turn - 1)) // 2 if turn else 0

    def _round(self, name: str, option: Option, turn: int) -> Round:
        if self.process is None:
            masks = [np.ones((1, len(part)), dtype=bool) for part in option.places]
        else:
            key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
            masks = []
            for s, tally in enumerate(option.tallies):
                rng = self._random(key, turn, s, tally.n)
                if turn == 0:
                    tally.enumerated = enumerable(tally.n, self._total(0))
                    masks.append(plan_masks(tally.n, self._total(0), rng)[0])
                elif tally.enumerated:
                    masks.append(np.zeros((0, tally.n), dtype=bool))
                else:
                    masks.append(paired_masks(tally.n, self._pairs(turn), rng))
        return Round(option, masks, np.zeros((max(map(len, masks)), len(masks))))

    def _random(self, key: int, turn: int, segment: int, n: int) -> np.random.Generator:
        """Noise of a question's round; options of any number of tokens n get the same stream."""
        return generator(self.seed, key, turn, segment, purpose="eval")

    def _settle(self, one: Round, *, first: bool) -> None:
        one.option.forwards += len(one.nats) * forwards_of_a_step(self.guidance)
        for s, (tally, masks) in enumerate(zip(one.option.tallies, one.masks, strict=True)):
            if self.process is None:
                tally.known, tally.enumerated = float(one.nats[0, s]), True
            elif len(masks):
                tally.add(masks, one.nats[: len(masks), s], first=first)

    # ------------------------------------------------------------------------------------------------- forwards

    def _run(self, rounds: Sequence[Round]) -> None:
        """Fill in the nats of every mask, sequences of like length together."""
        jobs = [(one, m) for one in rounds for m in range(len(one.nats))]
        jobs.sort(key=lambda job: -len(job[0].option.ids))
        for batch in batches([len(one.option.ids) for one, _ in jobs], self.budget):
            part = [jobs[j] for j in batch]
            noised = [
                np.concatenate([p[k[m]] for p, k in zip(o.option.places, o.masks) if m < len(k)]) for o, m in part
            ]
            segment = [
                np.concatenate([np.full(k[m].sum(), s) for s, k in enumerate(o.masks) if m < len(k)]) for o, m in part
            ]
            rows = self._rows([one.option.ids for one, _ in part], noised)
            denoiser = self._guided([one.option for one, _ in part], rows)
            with torch.no_grad():
                nll = denoiser.nll(rows.to(self.device)).cpu().double().numpy()
            ends = np.cumsum([len(x) for x in noised])
            for (one, m), values, where in zip(part, np.split(nll, ends[:-1]), segment, strict=True):
                np.add.at(one.nats[m], where, values)

    def _rows(self, texts: Sequence[Sequence[int]], noised: Sequence[np.ndarray]) -> Rows:
        """Rows of a batch: the given positions are masked and wanted (clean and wanted for a parent), in order."""
        B, L = len(texts), max(map(len, texts))
        x0_BL = torch.full((B, L), self.special.pad)
        valid_BL, noised_BL = torch.zeros(B, L, dtype=torch.bool), torch.zeros(B, L, dtype=torch.bool)
        for b, (ids, places) in enumerate(zip(texts, noised, strict=True)):
            x0_BL[b, : len(ids)] = torch.tensor(ids)
            valid_BL[b, : len(ids)] = True
            noised_BL[b, torch.from_numpy(places)] = True
        zeros_BL = torch.zeros_like(x0_BL)
        layout, group_BL, ids_BL = self.layout, zeros_BL, x0_BL
        if isinstance(layout, Block):
            layout = replace(layout, ar_weight=0.0)
            group_BL = layout.groups(L).expand(B, L).contiguous()
        if self.process is not None:
            ids_BL = x0_BL.masked_fill(noised_BL, self.process.mask_token_id)
        batch = NoisedBatch(x0_BL, ids_BL, noised_BL, noised_BL, noised_BL.float(), zeros_BL, valid_BL, group_BL)
        rows: Rows = layout.training_rows(batch)
        return rows

    def _guided(self, options: Sequence[Option], rows: Rows) -> Denoiser:
        """The denoiser, guided by each option's context (the start token is never masked) where a scale says so."""
        given_BL = torch.zeros(rows.ids.shape, dtype=torch.bool)
        for b, option in enumerate(options):
            given_BL[b, 1 : option.start] = True
        # Without any context the guided law is the plain one.
        if self.guidance is None or self.process is None or not bool(given_BL.any()):
            return self.denoiser
        return Guided(self.denoiser, self.guidance, self.process.mask_token_id, given_BL.to(self.device))

    def greedy(self, requests: Sequence[Request]) -> list[bool]:
        """Whether the model, told the number of tokens, would write exactly the continuation.

        A parent takes the most probable token from left to right. A diffusion model starts from all masks and reveals
        one token per forward, each time the one it is most sure of (block by block in a block layout).
        """
        options = [self.option(request) for request in requests]
        segments = [[list(p) for p in o.places] if self.process else [list(np.concatenate(o.places))] for o in options]
        active = list(range(len(options)))
        wrong: set[int] = set()
        while active:
            for batch in batches([len(options[i].ids) for i in active], self.budget):
                self._reveal([active[j] for j in batch], options, segments, wrong)
            active = [i for i in active if i not in wrong and segments[i]]
        return [i not in wrong for i in range(len(options))]

    def _reveal(
        self, part: Sequence[int], options: Sequence[Option], segments: list[list[list[int]]], wrong: set[int]
    ) -> None:
        """One forward: take the surest token of each text, or all tokens of a parent's; note which are wrong."""
        places = [np.array(segments[i][0]) for i in part]
        # Masks are set where later segments are still unknown, too: no block sees a later one.
        rows = self._rows([options[i].ids for i in part], places)
        denoiser = self._guided([options[i] for i in part], rows)
        with torch.no_grad():
            logits = denoiser(rows.to(self.device)).float().cpu()
        best, token = logits.log_softmax(-1).max(-1)
        right = token == rows.target
        ends = np.cumsum([len(p) for p in places])
        for i, sure, hit in zip(
            part, np.split(best.numpy(), ends[:-1]), np.split(right.numpy(), ends[:-1]), strict=True
        ):
            if self.process is None:
                segments[i].clear()
                if not hit.all():
                    wrong.add(i)
                continue
            k = int(sure.argmax())
            if not hit[k]:
                wrong.add(i)
            segments[i][0].pop(k)
            if not segments[i][0]:
                segments[i].pop(0)


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of at most `budget` tokens with padding; the longest first, little padding in any."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    part: list[int] = []
    for i in order:
        if part and ((len(part) + 1) * lengths[part[0]] > budget or lengths[i] < 0.85 * lengths[part[0]]):
            yield part
            part = []
        part.append(i)
    if part:
        yield part
