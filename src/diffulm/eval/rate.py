"""A scorer at work on many questions: in order of size, kept as they are done, with the time that is left."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..denoiser import HFDenoiser
from ..hub import Model, load_parent
from ..layout import Causal
from ..runtime import generator
from ..tokenizer import encode, special_tokens
from ..tokenizer import fingerprint as same_text
from .estimate import Request, Scorer
from .likelihood import Estimate, cut_windows, score_windows
from .masks import Score
from .store import Store, content_key, fingerprint, pack, unpack

#: Questions that go through the model before their results are kept: a killed run loses no more.
CHUNK = 32

#: on_progress(label, done, of, seconds left)
Progress = Callable[[str, int, int, float], None]


def silent(label: str, done: int, of: int, left: float) -> None:
    """No progress."""


@dataclass(frozen=True)
class Question:
    """Options to be compared, and whether the greedy answer is wanted too (LAMBADA)."""

    requests: tuple[Request, ...]
    greedy: bool = False


@dataclass
class Rater:
    """One model under evaluation.

    label: what its progress is called; chat: names of special tokens in a text are those tokens (a chat template writes
    them), else ordinary text.
    """

    scorer: Scorer
    tokenizer: Any
    label: str
    store: Store = field(default_factory=Store)
    chat: bool = False
    on_progress: Progress = silent
    text_key: str = ""
    model_key: str = ""

    def __post_init__(self) -> None:
        s = self.scorer
        weights = fingerprint(s.denoiser) if hasattr(s.denoiser, "named_parameters") else ""
        mask = None if s.process is None else s.process.mask_token_id
        precision = str(getattr(s.denoiser, "precision", ""))
        # What a written text depends on, and what a score does.
        self.text_key = content_key(weights, precision, mask, s.length, repr(s.layout), s.special.bos, self.chat)
        guided = [] if s.guidance is None else [s.guidance]
        self.model_key = content_key(self.text_key, s.draws, s.seed, s.confidence, s.skip, *guided)

    def encode(self, text: str) -> list[int]:
        """Ids of a text by itself."""
        return encode(self.tokenizer, text, plain=not self.chat)

    def request(self, context: Sequence[int], continuation: Sequence[int], size: float) -> Request:
        """A request behind the start token; a context that brings its own (a chat template) gets no second one."""
        start = self.scorer.special.bos
        lead = () if list(context[:1]) == [start] else (start,)
        return Request((*lead, *context), tuple(continuation), size)

    def rate(self, questions: Sequence[Question]) -> list[tuple[list[Score], bool | None]]:
        """(score of each option, greedy answer or None) of each question, from the store where they are known."""
        keys = [
            content_key(self.model_key, q.greedy, [[r.context, r.continuation] for r in q.requests]) for q in questions
        ]
        missing = {key: q for key, q in zip(keys, questions, strict=True) if self.store.get(key) is None}
        cost = {key: sum(len(r.context) + len(r.continuation) for r in q.requests) for key, q in missing.items()}
        order = sorted(missing, key=cost.__getitem__, reverse=True)  # the longest first: memory fails at once, or never
        done, total, spent, began = len(keys) - len(order), len(keys), 0, time.perf_counter()
        self.on_progress(self.label, done, total, math.nan)
        for at in range(0, len(order), CHUNK):
            part = order[at : at + CHUNK]
            # Noise goes by the question itself, so a score depends neither on its place nor on its neighbours.
            scores = self.scorer.scores([(self._noise(missing[key]), missing[key].requests) for key in part])
            asked = [key for key in part if missing[key].greedy]
            written = dict(zip(asked, self.scorer.greedy([missing[key].requests[0] for key in asked]), strict=True))
            self.store.put(
                {
                    key: {"scores": [pack(s) for s in rated], "greedy": written.get(key)}
                    for key, rated in zip(part, scores, strict=True)
                }
            )
            spent += sum(cost[key] for key in part)
            left = (time.perf_counter() - began) * (sum(cost.values()) - spent) / spent
            self.on_progress(self.label, done + at + len(part), total, left)
        found = [self.store.get(key) for key in keys]
        return [([unpack(Score, s) for s in value["scores"]], value["greedy"]) for value in found]

    @staticmethod
    def _noise(question: Question) -> str:
        return content_key([[r.context, r.continuation] for r in question.requests])

    def texts(self, documents: Sequence[str], *, draws: int, batch: int = 4) -> list[Estimate]:
        """The likelihood of each document by itself: windows of length - 1 tokens behind a start token.

        A document's noise depends on its text alone. Documents without tokens are left out.
        """
        done: list[Estimate] = []
        sizes = [len(text.encode()) for text in documents]
        began, spent = time.perf_counter(), 0
        for i, (text, size) in enumerate(zip(documents, sizes, strict=True)):
            ids = self.encode(text)
            if not ids:
                continue
            key = content_key(self.model_key, "text", draws, text)
            if self.store.get(key) is None:
                self.store.put({key: pack(self._text(ids, float(size), key=text, draws=draws, batch=batch))})
                spent += size
            done.append(unpack(Estimate, self.store.get(key)))
            left = (time.perf_counter() - began) / spent * sum(sizes[i + 1 :]) if spent else math.nan
            self.on_progress(self.label, i + 1, len(documents), left)
        return done

    def _text(self, ids: list[int], size: float, *, key: str, draws: int, batch: int) -> Estimate:
        s = self.scorer
        seed = int(generator(s.seed, int(content_key(key), 16), purpose="eval").integers(2**31))
        windows = cut_windows([ids], [size], s.length)
        special = dataclasses.replace(s.special, mask=s.skip)
        return score_windows(
            s.denoiser, s.layout, s.process, windows, special, draws=draws, seed=seed, batch=batch, device=s.device
        )


def diffusion_scorer(model: Model, **settings: Any) -> Scorer:
    """The scorer of a loaded checkpoint; settings: draws, seed, confidence, guidance, budget."""
    special = special_tokens(model.tokenizer)
    skip = None if model.config.get("mask_row_added", True) else special.mask
    length = int(model.config["trained_length"])
    return Scorer(
        model.denoiser, model.layout, model.process, special, length, skip=skip, device=model.device, **settings
    )


def parent_rater(reference: str, child: Rater, *, offline: bool = False) -> Rater:
    """The AR parent beside a child: the same texts, start token, windows, seed and precision, scored exactly.

    A tokenizer that cuts texts otherwise than the child's is used as it is, with its own start token. What the child
    skips, a reused mask token, is a token of that vocabulary alone.
    """
    scorer: Any = child.scorer
    precision = scorer.denoiser.precision
    model, tokenizer = load_parent(reference, dtype=precision.weights, offline=offline)
    special, skip = special_tokens(tokenizer), None
    if same_text(tokenizer) == same_text(child.tokenizer):
        tokenizer, special, skip = child.tokenizer, dataclasses.replace(scorer.special, mask=None), scorer.skip
    denoiser = HFDenoiser(model.to(scorer.device).eval(), None, precision=precision)
    exact = dataclasses.replace(
        scorer, denoiser=denoiser, layout=Causal(), process=None, special=special, confidence=None, guidance=None,
        skip=skip,
    )  # fmt: skip
    return dataclasses.replace(child, scorer=exact, tokenizer=tokenizer, label="parent")
