"""Conversations as training sequences: what a user or the template says is given, what the assistant says is noised.

Every answer of a conversation is a sample of its own: what stands before it is its context, what comes after is left
out, because attention in both directions would read the answer off the user's next words.

How long an answer is, the model learns from the end-of-text tokens behind it. A canvas has room for some number of
tokens, and the model has to say where in it the answer ends:

    one      the sample stops at the answer's end. Every canvas has then just the length of its answer, so the model
             learns nothing about ends, except to put one at the end of whatever room it is given.
    window   EOS up to the window (the paper's GSM8K fine-tune; LLaDA). All of them are noised: a short answer in a
             long window is mostly EOS, which is what the loss then sees and what confident decoding writes first.
    random   a room drawn anew for every sample, as many canvases between one and two times the answer as between two
             and four. Room and answer say nothing about each other, and no more EOS are spent than that takes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..runtime import generator, write_atomic
from ..template import RECIPE, last_turn, turn_ids
from ..tokenizer import SpecialTokens
from .conversations import SKIP_BAD, Conversation
from .packing import best_fit

EosPadding = Literal["one", "random", "window"]


@dataclass(frozen=True)
class Answers:
    """Tokenised answers with their contexts, one after the other, in memory: 4 bytes a token, so a million turns of 300
    tokens take 1.2 GB.

    ids: int32 (tokens,). starts: int64 (answers + 1,), where each sample begins in `ids`. contexts: int64 (answers,),
    how many of its tokens are given. conversation: int64 (answers,), which one it came from. sizes: int64 (answers,),
    UTF-8 bytes of the answer. where: the place it was read from, UTF-8 bytes (answers,); empty in files of older
    versions. No start tokens; an answer ends with its end token.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    contexts: NDArray[np.int64]
    conversation: NDArray[np.int64]
    sizes: NDArray[np.int64]
    where: NDArray[np.bytes_] = field(default_factory=lambda: np.empty(0, np.bytes_))

    def __len__(self) -> int:
        return len(self.contexts)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each answer, its end counted."""
        return np.diff(self.starts) - self.contexts

    def room(self, length: int) -> NDArray[np.int64]:
        """Tokens that a window has for each answer, behind the start token and the context; may be negative."""
        return length - 1 - self.contexts

    def too_long(self, length: int) -> NDArray[np.int64]:
        """Rows of the answers that do not fit a window with their context."""
        return np.flatnonzero(self.lengths > self.room(length))

    @property
    def longest(self) -> int:
        """Tokens of the shortest window that holds every answer."""
        return int((1 + self.contexts + self.lengths).max(initial=0))

    def in_window(self, length: int, *, truncate: bool = False) -> dict[str, int]:
        """How many answers can be used in a window, their tokens there, how many are left out of it and how many cut.

        truncate: what is too long loses its end, where its context leaves any room.
        """
        room, long = self.room(length), self.lengths > self.room(length)
        used = room > 0 if truncate else ~long
        tokens = np.minimum(self.lengths, room)[used].sum()
        return {
            "answers": int(used.sum()), "answer_tokens": int(tokens), "left_out": int((~used).sum()),
            "cut": int((long & used).sum()),
        }  # fmt: skip

    def place(self, i: int) -> str:
        """Where an answer was read from, and how many tokens it takes with its context."""
        where = bytes(self.where[i]).decode() if len(self.where) else f"answer {i + 1}"
        context, answer = int(self.contexts[i]), int(self.lengths[i])
        return f"{where}: {1 + context + answer} tokens (1 + context {context} + answer {answer})"

    def pair(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(context, answer) ids of one sample."""
        ids = self.ids[self.starts[i] : self.starts[i + 1]]
        return ids[: self.contexts[i]], ids[self.contexts[i] :]

    def save(self, path: Path) -> None:
        """Write the arrays as one .npz file, whole or not at all."""
        buffer = io.BytesIO()
        np.savez(buffer, **vars(self))
        write_atomic(path, buffer.getvalue())

    @classmethod
    def open(cls, path: Path) -> Answers:
        """Read what `save` wrote; ValueError when it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as found:
                names = [name for name in cls.__dataclass_fields__ if name != "where" or name in found]
                return cls(**{name: found[name] for name in names})
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(
                f"{path} is no file of tokenised conversations ({error}); delete it and run again"
            ) from error


def tokenise(
    conversations: Iterable[Conversation], tokenizer: Any, *, skip_bad: bool = False, problems: list[str] | None = None
) -> Answers:
    """Every answer of every conversation, through the tokenizer's chat template.

    Raises:
        ValueError: with the place it was read from, for a conversation that the template refuses or that spells out a
            special token, unless `skip_bad`, which adds the reason to `problems`.
    """
    ids: list[NDArray[np.int32]] = []
    contexts, owner, sizes, places = [], [], [], []
    for number, conversation in enumerate(conversations):
        made = []
        several = sum(message["role"] == "assistant" for message in conversation.messages) > 1
        try:
            for i, message in enumerate(conversation.messages):
                if message["role"] == "assistant":
                    turn = last_turn(tokenizer, conversation.messages[: i + 1], means=RECIPE)
                    where = conversation.where + (f", message {i + 1}" if several else "")
                    made.append((*turn_ids(tokenizer, turn), len(turn.answer.encode()), where))
        except ValueError as error:
            problem = f"{conversation.where}: {error}"
            if not skip_bad:
                raise ValueError(f"{problem} ({SKIP_BAD})") from error
            if problems is not None:
                problems.append(problem)
            continue
        for context, answer, size, where in made:
            ids.append(np.array([*context, *answer], np.int32))
            contexts.append(len(context))
            owner.append(number)
            sizes.append(size)
            places.append(where.encode(errors="replace"))
    starts = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    flat = np.concatenate(ids) if ids else np.empty(0, np.int32)
    given, owners, texts = (np.array(x, np.int64) for x in (contexts, owner, sizes))
    return Answers(flat, starts, given, owners, texts, np.array(places, np.bytes_))


@dataclass(frozen=True)
class Conversations:
    """Sequences of `length` tokens made of answers, for the loader: only answers and the EOS behind them are maskable.

    Several samples share a sequence, kept apart by a document mask. `answers` tokens of each sample are its answer,
    `extra` the EOS behind them; `skipped` and `truncated` count what did not fit.

    With eos_weight 1 the loss of training is the bound per token. With another it is a weighted mean over tokens:
    `weights` has mean 1 over all that is trained on (of several sources: `with_common_mean`), so that sum / count
    remains a mean, and gradients keep their size.
    """

    source: Answers
    length: int
    special: SpecialTokens
    eos_weight: float
    which: NDArray[np.int64]  # (samples,): row of `source`
    answers: NDArray[np.int64]  # (samples,)
    extra: NDArray[np.int64]  # (samples,)
    packs: list[NDArray[np.int64]] = field(repr=False)  # per sequence: its samples
    skipped: int = 0
    truncated: int = 0
    mean_weight: float = 1.0  # what `weights` are divided by: their mean over all that is trained on

    @classmethod
    def cut(
        cls,
        source: Answers,
        length: int,
        special: SpecialTokens,
        *,
        seed: int = 0,
        eos_padding: EosPadding = "random",
        eos_weight: float = 1.0,
        too_long: Literal["skip", "truncate"] = "skip",
        truncate_share: float = 0.0,
    ) -> Conversations:
        """Lay answers out in sequences; a function of its arguments, and what is drawn for a sample of (seed, index).

        Args:
            eos_padding: EOS tokens behind the answer's end: see the module.
            eos_weight: weight of these in the loss, beside 1 for the answer and its end; below 1 the model comes to
                think that answers are longer.
            too_long: what does not fit its window with its context is left out, or loses its end.
            truncate_share: share of the answers that are cut at a length drawn from 1..n, without an end: a canvas may
                be too short, and is then to be filled without haste.

        Raises:
            ValueError: no answer fits.
        """
        if length < 3 or not 0 <= truncate_share <= 1 or eos_weight < 0:
            raise ValueError(
                f"length {length} must be at least 3 tokens, truncate_share {truncate_share} a share, eos_weight "
                f"{eos_weight} not negative"
            )
        if eos_padding not in ("one", "random", "window"):
            raise ValueError(f"unknown eos_padding {eos_padding!r}: use one, random or window")
        # Row i is the same however many there are: the stream is read in order.
        u = generator(seed, -2, purpose="shuffle").random((len(source), 3))
        answers, room = source.lengths, source.room(length)
        long = answers > room
        fits = (room > 0) if too_long == "truncate" else ~long
        cut = long | (u[:, 0] < truncate_share)
        drawn = np.minimum(1 + (u[:, 1] * answers).astype(np.int64), room)
        answers = np.where(long, room, np.where(cut, drawn, answers))
        spare = np.maximum(room - answers, 0)
        if eos_padding == "random":  # uniform in the logarithm of the canvas
            extra = (answers * ((np.maximum(room, 1) / np.maximum(answers, 1)) ** u[:, 2] - 1)).astype(np.int64)
        else:
            extra = spare if eos_padding == "window" else np.zeros_like(spare)
        extra = np.where(cut, 0, np.clip(extra, 0, spare))
        which = np.flatnonzero(fits)
        if not len(which):
            first = f" (the first: {source.place(0)})" if len(source) else ""
            raise ValueError(
                f"none of {len(source)} answers fits a window of {length} tokens with its context{first}; raise "
                "data.length, or set sft.too_long = 'truncate'"
            )
        sizes = 1 + source.contexts + answers + extra
        bins, count = best_fit(sizes[which], length)
        packs = np.split(np.argsort(bins, kind="stable"), np.cumsum(np.bincount(bins, minlength=count))[:-1])
        made = cls(
            source, length, special, eos_weight, which, answers[which], extra[which], packs,
            skipped=len(source) - len(which), truncated=int((long & fits).sum()),
        )  # fmt: skip
        return with_common_mean([made], [1.0])[0]

    def __len__(self) -> int:
        return len(self.packs)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(ids, maskable, document, valid) of one sequence, each (length,)."""
        L = self.length
        ids = np.full(L, self.special.pad, dtype=np.int64)
        maskable, valid = np.zeros(L, dtype=bool), np.zeros(L, dtype=bool)
        document = np.full(L, len(self.packs[index]), dtype=np.int64)
        for k, (first, answer, behind, end) in enumerate(self._places(index)):
            sample = self.packs[index][k]
            context, text = self.source.pair(int(self.which[sample]))
            ids[first] = self.special.bos
            ids[first + 1 : answer] = context
            ids[answer:behind] = text[: behind - answer]
            ids[behind:end] = self.special.eos
            maskable[answer:end] = True
            valid[first:end] = True
            document[first:end] = k
        if self.special.mask is not None:
            maskable &= ids != self.special.mask  # natural occurrences of a reused mask token
        return ids, maskable, document, valid

    def weights(self, index: int) -> NDArray[np.float32] | None:
        """Factor of each token's weight in the loss, float32 (length,), over the mean; None where all are 1."""
        if self.eos_weight == 1:
            return None
        out = np.full(self.length, 1 / self.mean_weight, dtype=np.float32)
        for _, _, behind, end in self._places(index):
            out[behind:end] = self.eos_weight / self.mean_weight
        return out

    def _places(self, index: int) -> list[tuple[int, int, int, int]]:
        """(start token, first of the answer, first behind it, end) of each sample in a sequence."""
        out, at = [], 0
        for sample in self.packs[index].tolist():
            answer = at + 1 + int(self.source.contexts[self.which[sample]])
            behind = answer + int(self.answers[sample])
            end = behind + int(self.extra[sample])
            out.append((at, answer, behind, end))
            at = end
        return out


def with_common_mean(sequences: Sequence[Conversations], shares: Sequence[float]) -> list[Conversations]:
    """The sequences of a mixture with one mean of weights for all: a token weighs the same in every source.

    shares: how often a sequence of each source is drawn, on any scale.
    """
    weighed = tokens = 0.0
    for q, share in zip(sequences, shares, strict=True):
        answer, behind = int(q.answers.sum()), int(q.extra.sum())
        weighed += share * (answer + q.eos_weight * behind) / len(q)
        tokens += share * (answer + behind) / len(q)
    return [replace(q, mean_weight=weighed / tokens) for q in sequences]
