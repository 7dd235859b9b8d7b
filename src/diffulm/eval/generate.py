"""A model under evaluation that writes: prompts to texts, kept as they are done, the same for a model and its parent.

A diffusion model fills as many masks as a text may have tokens; a parent writes from left to right up to as many. Both
texts end before the first end-of-text or start token and before the first stop string. A text depends on the prompt,
the settings and the seed, not on the texts beside it: a killed run goes on where it was.
"""

from __future__ import annotations

import bisect
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..denoiser import HFDenoiser
from ..sampling import Draw, EndOfText, policy_from_name
from ..sampling.fill import completions, unmask
from ..tokenizer import decode, encode, encode_after
from .autoregress import continue_ids
from .estimate import batches
from .rate import Rater
from .store import content_key, pack, unpack

#: Prompts in one batch at most: a killed run loses no more texts than these.
TOGETHER = 16


@dataclass(frozen=True)
class How:
    """How texts are written. max_tokens: None takes each task's own; steps: None is one token a forward. A parent has
    neither steps nor policy. execute: code that was written may be run."""

    max_tokens: int | None = None
    steps: int | None = None
    policy: str = "confidence"
    temperature: float = 0.0
    samples: int = 1
    execute: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "steps", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1, not {value}")
        policy_from_name(self.policy)
        Draw(self.temperature)
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.samples} samples at temperature 0 are one and the same text; give --temperature 0.7, say"
            )


@dataclass(frozen=True)
class Ask:
    """A prompt to continue by at most `cap` tokens; the text ends before the first of `until`.

    suffix, length: a hole before `suffix`, of that many tokens or of as many as fit best ("auto": at most `cap`).
    ids: the prompt in tokens, where it is no plain text (infilling tokens). sample: which of several texts.
    """

    prompt: str
    cap: int
    until: tuple[str, ...] = ()
    sample: int = 0
    suffix: str | None = None
    length: int | str | None = None
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Written:
    """A text, its tokens (up to its end, with those of its stop string; the whole hole), the forwards until then, and
    the tokens of its prompt that were cut at the front to fit the model."""

    text: str
    tokens: int
    forwards: int
    cut: int = 0


@dataclass
class Writer:
    """A rater's model that writes. model: the opened checkpoint, None for a parent."""

    rater: Rater
    how: How
    model: Any = None

    def check(self, cap: int, name: str) -> None:
        """ValueError where texts of so many tokens do not fit the model."""
        length = self.rater.scorer.length
        if cap > length - 2:
            raise ValueError(
                f"{name} is written in {cap} tokens and the model was trained on {length} with its start token; give "
                f"--max-tokens {max(1, length // 2)} or less"
            )

    def holds_mask(self, ask: Ask) -> bool:
        """Whether what a diffusion model would be given holds its mask token: a canvas takes that for a hole."""
        process = self.rater.scorer.process
        if process is None:
            return False
        given = self._context(ask)[0]
        if ask.length is not None:  # what stands around a hole is read as `infill` reads it
            tokenizer = self.rater.tokenizer
            given = encode(tokenizer, ask.prompt.removesuffix(" ")) + encode_after(tokenizer, ask.suffix or "")
        return process.mask_token_id in given

    def write(self, asks: Sequence[Ask]) -> list[Written]:
        """The text of each, from the store where it is known. ValueError for what the model cannot write."""
        rater, keys = self.rater, [self._key(ask) for ask in asks]
        missing = {key: ask for key, ask in zip(keys, asks, strict=True) if rater.store.get(key) is None}
        contexts = {key: self._context(ask) for key, ask in missing.items()}
        groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for key, ask in missing.items():
            groups[self._together(ask)].append(key)
        cost = {key: (len(contexts[key][0]) + ask.cap) * ask.cap for key, ask in missing.items()}
        done, spent, began = len(asks) - len(missing), 0, time.perf_counter()
        rater.on_progress(rater.label, done, len(asks), math.nan)
        for kind, members in groups.items():
            lengths = [len(contexts[key][0]) + missing[key].cap for key in members]
            alone = self.model is not None and kind[0]
            for batch in batches(lengths, rater.scorer.budget):
                size = 1 if alone else TOGETHER
                for at in range(0, len(batch), size):
                    part = [members[i] for i in batch[at : at + size]]
                    texts = self._batch([missing[key] for key in part], [contexts[key][0] for key in part])
                    rater.store.put({
                        key: pack(Written(*text, contexts[key][1])) for key, text in zip(part, texts, strict=True)
                    })  # fmt: skip
                    done, spent = done + len(part), spent + sum(cost[key] for key in part)
                    left = (time.perf_counter() - began) * (sum(cost.values()) - spent) / spent
                    rater.on_progress(rater.label, done, len(asks), left)
        return [unpack(Written, rater.store.get(key)) for key in keys]

    def _key(self, ask: Ask) -> str:
        scorer, hole = self.rater.scorer, [ask.suffix, ask.length, ask.ids]
        # A policy may be random where the tokens are not, and go by the schedule.
        how = [] if self.model is None else [self.how.steps, self.how.policy, repr(scorer.process)]
        seed = scorer.seed if how or self.how.temperature else 0
        settings = [*how, self.how.temperature, seed, self.ends]
        return content_key(self.rater.text_key, "text", settings, ask.prompt, ask.cap, ask.until, ask.sample, hole)

    def _seed(self, ask: Ask) -> int:
        """Of a text's random numbers: by what is asked, so that neither place nor neighbours matter."""
        return int(content_key(self.rater.scorer.seed, ask.prompt, ask.suffix, ask.length, ask.sample), 16) % 2**60

    def _together(self, ask: Ask) -> tuple[Any, ...]:
        """Asks that differ in this are not written in one batch."""
        return (ask.length is not None, ask.cap if self.model is not None else 0)

    def _context(self, ask: Ask) -> tuple[list[int], int]:
        """(ids behind a start token, as many as fit before the text; tokens cut at the front)."""
        ids = self.rater.encode(ask.prompt) if ask.ids is None else list(ask.ids)
        context = list(self.rater.request(ids, (), 0.0).context)
        cut = max(0, len(context) + ask.cap - self.rater.scorer.length)
        return (context[:1] + context[1 + cut :] if cut else context), cut

    def _batch(self, asks: Sequence[Ask], contexts: Sequence[Sequence[int]]) -> list[tuple[str, int, int]]:
        """(text, tokens, forwards) of each."""
        if self.model is None:
            return self._from_left(asks, contexts)
        if asks[0].length is not None:
            return [self._fill(ask) for ask in asks]
        return self._denoised(asks, contexts)

    # ------------------------------------------------------------------------------------------------- three ways

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text, of a model and its parent alike."""
        return (self.rater.scorer.special.eos, self.rater.scorer.special.bos)

    def ended(self, ask: Ask, context: Sequence[int], new: Sequence[int]) -> tuple[str, int, bool]:
        """(text, its tokens, whether it came to an end) of new tokens."""
        tokenizer, kept = self.rater.tokenizer, list(new)
        first = next((i for i, token in enumerate(kept) if token in self.ends), len(kept))
        over, kept = first < len(kept), kept[:first]
        # Decoded behind a little context: a first piece by itself may lose its space.
        behind = list(context[-8:])
        before = decode(tokenizer, behind)

        def text(n: int) -> str:
            whole = decode(tokenizer, behind + kept[:n])
            return whole[len(before) :] if whole.startswith(before) else decode(tokenizer, kept[:n])

        def stops(n: int) -> list[int]:
            return [found.index(word) for found in [text(n)] for word in ask.until if word in found]

        if not (cuts := stops(first)):
            return text(first), first, over
        # The stop string's last token, wherever the model has gone on to.
        return text(first)[: min(cuts)], bisect.bisect_left(range(first), True, key=lambda n: bool(stops(n))), True

    def _from_left(self, asks: Sequence[Ask], contexts: Sequence[Sequence[int]]) -> list[tuple[str, int, int]]:
        scorer = self.rater.scorer
        assert isinstance(scorer.denoiser, HFDenoiser)
        written = continue_ids(
            scorer.denoiser, contexts, [ask.cap for ask in asks], draw=Draw(self.how.temperature),
            seeds=[self._seed(ask) for ask in asks], pad=scorer.special.pad, device=scorer.device,
            finished=lambda b, new: self.ended(asks[b], contexts[b], new)[2],
        )  # fmt: skip
        return [
            (*self.ended(ask, context, new)[:2], len(new))
            for ask, context, new in zip(asks, contexts, written, strict=True)
        ]

    def _denoised(self, asks: Sequence[Ask], contexts: Sequence[Sequence[int]]) -> list[tuple[str, int, int]]:
        scorer, cap = self.rater.scorer, asks[0].cap
        assert scorer.process is not None
        prompts = [list(context[1:]) for context in contexts]
        canvas = completions(prompts, cap, scorer.special, scorer.layout, scorer.length).to(scorer.device)
        ids, starts = canvas.ids, [len(context) for context in contexts]
        policy, forwards, over = policy_from_name(self.how.policy), [0] * len(asks), [False] * len(asks)

        def new(b: int, upto: int) -> list[int]:
            found: list[int] = ids[b, starts[b] : min(upto, starts[b] + cap)].tolist()
            return found

        for step in unmask(
            self.model, canvas, steps=self.how.steps or cap, tokens=cap, policy=policy, end=EndOfText(self.ends),
            draw=Draw(self.how.temperature), seeds=[self._seed(ask) for ask in asks],
        ):  # fmt: skip
            ids = step.ids
            took_part, upto = step.predicted.any(1).tolist(), step.committed_upto.tolist()
            for b in (b for b, done in enumerate(over) if not done):
                forwards[b] += bool(len(step.log_probs)) and took_part[b]
                # What stands without a mask before it stays: a stop string in it ends the text, and so does the cap,
                # behind which a last block may go on.
                over[b] = getattr(policy, "remasks", None) is False and (
                    upto[b] >= starts[b] + cap or self.ended(asks[b], contexts[b], new(b, upto[b]))[2]
                )
            if all(over):
                break
        mask = scorer.process.mask_token_id
        found = []
        for b, ask in enumerate(asks):
            tokens = new(b, ids.shape[1])
            tokens = tokens[: tokens.index(mask)] if mask in tokens else tokens
            found.append((*self.ended(ask, contexts[b], tokens)[:2], forwards[b]))
        return found

    def _fill(self, ask: Ask) -> tuple[str, int, int]:
        from ..sampling import infill

        length: Any = ask.length
        filled = infill(
            self.model, ask.prompt, ask.suffix or "", length=length, max_length=ask.cap, steps=self.how.steps,
            policy=self.how.policy, temperature=self.how.temperature, seed=self._seed(ask),
        )  # fmt: skip
        return filled.fills[0], filled.lengths[0], filled.forwards
