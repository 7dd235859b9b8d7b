"""Filling holes: anywhere in a text, several at once, of unknown length, with words that must or must not occur."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..layout import Block
from ..tokenizer import SpecialTokens, decode, encode, encode_after, special_tokens
from . import words
from .canvas import Canvas
from .constraints import Banned
from .draw import Draw
from .fill import Model, Watch, checked, filled, given_ids, seeds_of, unmask
from .guidance import forwards_of_a_step
from .policies import Policy, TopConfidence
from .search import TOGETHER, Spellings, length_scores, place, shortest
from .step import Step

_HOLE = re.compile(r"<hole(?::(\d+|auto))?>")
#: Fills tried before a banned word is given up on.
TRIES = 8


class Infilling(str):
    """The whole text, holes filled. `fills`: the filled pieces in order; `lengths`: the tokens of each hole;
    `forwards`: forward passes used, search included."""

    fills: tuple[str, ...]
    lengths: tuple[int, ...]
    forwards: int

    def __new__(cls, text: str, fills: Sequence[str] = (), lengths: Sequence[int] = (), forwards: int = 0) -> Infilling:
        self = super().__new__(cls, text)
        self.fills, self.lengths, self.forwards = tuple(fills), tuple(lengths), forwards
        return self


def infill(
    model: Model,
    prefix: str,
    suffix: str | None = None,
    *,
    length: int | Literal["auto"] = 8,
    max_length: int = 16,
    must: Sequence[str] = (),
    must_not: Sequence[str] = (),
    steps: int | None = None,
    policy: str | Policy = "confidence",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    guidance: float | None = None,
    watch: Watch | None = None,
) -> Infilling:
    """Fill one hole between prefix and suffix, or every `<hole>` / `<hole:N>` of a text given as `prefix` alone.

    Returns the whole text (a str) with `.fills`. A hole takes exactly `length` (or N) tokens. What was given is never
    altered: the result is prefix + fill + suffix, character for character. A space at the end of what stands before
    a hole is generated with the hole's first word, because tokenizers join it to the word.

    length "auto" (or `<hole:auto>`): the length in 1..max_length whose greedy fill is likeliest per token, given both
    sides (search.py). Several such holes are searched one by one, from the left, the others masked. It costs the
    forwards of filling every length, several in a batch; `.forwards` counts them.

    must: words (any strings) of which each has to occur in a fill. They are put where the model finds them likeliest
    and then are given text. must_not: strings that the result must not hold, where any character of them is filled in.
    The tokens that hold one are never drawn, nor the token that would complete a usual spelling; another spelling, or
    one whose tokens are revealed together, is found in the finished text and banned before it is filled again, one
    token a step.

    guidance: the scale of classifier-free guidance by the given text, placed words included (guidance.py); 1 is none.
    Lengths and places are searched without it, by likelihood.

    Raises:
        ValueError: no hole, a hole of no tokens, a text longer than the model was trained on, or constraints that
            contradict each other, do not fit or cannot be kept.
    """
    words.check_words(must, must_not)
    text = Holed.read(model, prefix, suffix, length)
    if isinstance(model.layout, Block) and (any(p.strip() for p in text.pieces[1:]) or must or None in text.lengths):
        raise ValueError(
            "a checkpoint of the block layout does not see what stands after a hole; use generate, or a model with "
            "full attention (recipe smollm2-cpu)"
        )
    bans = words.banned(model.tokenizer, must_not)
    spellings = [words.spellings(model.tokenizer, word, must_not) for word in must]
    for spelling in (one for several in spellings for one in several):
        given_ids(model, list(spelling))
    lengths, used = _lengths(model, text, max_length, spellings, bans)
    canvas, hole_BL = text.canvas(model, [lengths])
    checked(canvas, model.config)
    canvas, _, placing = place(model, canvas, spellings, hole_BL)
    used += placing
    steps = int(canvas.editable.sum()) or 1 if steps is None else steps
    draw = Draw(temperature, top_k, top_p)

    def fill(bans: Banned | None, again: bool) -> list[int]:
        """Tokens behind the start token; after a first try one token a step, so that every ban holds."""
        nonlocal used
        how = (int(canvas.editable.sum()), TopConfidence()) if again else (steps, policy)
        ids, forwards = _filled(model, canvas, *how, draw, seed, watch, bans, guidance)
        used += forwards
        return ids[0, 1:].tolist()

    fills = _without(model, text, lengths, canvas, must_not, bans, fill)
    shown = "".join(p + f for p, f in zip(text.pieces, [*fills, ""], strict=True))
    for word in must:
        if not any(word in " " * p.endswith(" ") + fill for p, fill in zip(text.pieces, fills, strict=False)):
            raise ValueError(f"{word!r} did not come out whole; give its hole more tokens, or another seed")
    return Infilling(shown, fills, lengths, used)


def _without(
    model: Model, text: Holed, lengths: Sequence[int], canvas: Canvas, must_not: Sequence[str], bans: Banned | None,
    fill: Callable[[Banned | None, bool], list[int]],
) -> list[str]:  # fmt: skip
    """The fills, made again while they hold a word of `must_not`, the spelling that came up being banned too."""
    for tried in range(TRIES):
        ids = fill(bans, tried > 0)
        fills = _fills(model, ids, text, lengths)
        word = words.forbidden(text.pieces, fills, must_not)
        if word is None:
            return fills
        spelling = words.spelling_at(model.tokenizer, ids, canvas.editable[0, 1:].tolist(), word)
        if spelling is None or bans is None:
            break
        bans = words.also(bans, spelling)
    raise ValueError(f"no fill without {word!r} was found; change the length, the seed or the text around the hole")


@dataclass(frozen=True)
class Holed:
    """A text with holes: the pieces around them, the tokens of each piece, and the holes' lengths, None: not known.

    A space that ends the piece before a hole is none of its tokens.
    """

    pieces: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    lengths: tuple[int | None, ...]

    @classmethod
    def read(cls, model: Model, prefix: str, suffix: str | None, length: int | str) -> Holed:
        """One hole between prefix and suffix, or those marked in `prefix`. ValueError as `infill` says."""
        pieces, lengths = [prefix, suffix or ""], [str(length)]
        if suffix is None:
            marks = list(_HOLE.finditer(prefix))
            if not marks:
                raise ValueError("the text has no hole; write <hole> or <hole:N> where N tokens are to be filled in")
            lengths = [m.group(1) or str(length) for m in marks]
            edges = [0, *[e for m in marks for e in m.span()], len(prefix)]
            pieces = [prefix[edges[i] : edges[i + 1]] for i in range(0, len(edges), 2)]
        if not all(n == "auto" or n.lstrip("-").isdigit() for n in lengths):
            raise ValueError(f"the length of a hole is a number of tokens or 'auto', not {length!r}")
        counts = [None if n == "auto" else int(n) for n in lengths]
        if any(n is not None and n < 1 for n in counts):
            raise ValueError("a hole needs at least one token; write <hole:N> with N >= 1")
        tokens = []
        for k, piece in enumerate(pieces):
            kept = piece.removesuffix(" ") if k < len(lengths) else piece
            ids = encode(model.tokenizer, kept) if k == 0 else encode_after(model.tokenizer, kept)
            tokens.append(tuple(given_ids(model, ids)))
        return cls(tuple(pieces), tuple(tokens), tuple(counts))

    @property
    def given(self) -> int:
        """Tokens of the pieces and the start token."""
        return 1 + sum(len(tokens) for tokens in self.tokens)

    def starts(self, lengths: Sequence[int]) -> list[int]:
        """Place of each hole's first token, the start token not counted."""
        at, out = 0, []
        for tokens, length in zip(self.tokens, lengths, strict=False):
            out.append(at + len(tokens))
            at = out[-1] + length
        return out

    def canvas(self, model: Model, choices: Sequence[Sequence[int]]) -> tuple[Canvas, Tensor]:
        """(canvas, hole of each position, int64 (B, L), -1: given): a sample for each choice of lengths."""
        special: SpecialTokens = special_tokens(model.tokenizer)
        samples: list[list[int | None]] = []
        for lengths in choices:
            sample: list[int | None] = []
            for tokens, length in zip(self.tokens, [*lengths, 0], strict=True):
                sample += [*tokens, *[None] * length]
            samples.append(sample)
        canvas = Canvas.from_holes(samples, special)
        hole_BL = torch.full_like(canvas.ids, -1)
        for b, lengths in enumerate(choices):
            for k, (at, length) in enumerate(zip(self.starts(lengths), lengths, strict=True)):
                hole_BL[b, 1 + at : 1 + at + length] = k
        return canvas.to(model.device), hole_BL


def _lengths(
    model: Model, text: Holed, most: int, spellings: Sequence[Spellings], bans: Banned | None
) -> tuple[list[int], int]:
    """(tokens of each hole, forwards): unknown ones are searched from the left, those to their right at the middle."""
    if most < 1:
        raise ValueError(f"max_length must be at least 1 token, not {most}")
    limit, forwards = int(model.config["trained_length"]), 0
    lengths = [(1 + most) // 2 if n is None else n for n in text.lengths]
    alone = len(lengths) == 1  # with several holes nobody knows yet which one a word goes to
    least = max(1, sum(shortest(several) for several in spellings)) if alone else 1
    for k in (k for k, n in enumerate(text.lengths) if n is None):
        room = limit - text.given - sum(n for other, n in enumerate(lengths) if other != k)
        choices = [[*lengths[:k], n, *lengths[k + 1 :]] for n in range(least, min(most, room) + 1)]
        if not choices:
            raise ValueError(
                f"a hole of unknown length needs {least} to {most} tokens, and {max(0, room)} of the model's {limit} "
                "are left; shorten the text, raise max_length or drop a word"
            )
        scores: list[float] = []
        for i in range(0, len(choices), TOGETHER):
            canvas, hole_BL = text.canvas(model, choices[i : i + TOGETHER])
            canvas = replace(canvas, editable=hole_BL.to(model.device) == k)
            nats_B, used = length_scores(model, canvas, spellings if alone else [], hole_BL, bans)
            scores += nats_B.tolist()
            forwards += used
        lengths = choices[max(range(len(choices)), key=scores.__getitem__)]
    return lengths, forwards


def _filled(
    model: Model, canvas: Canvas, steps: int, policy: str | Policy, draw: Draw, seed: int, watch: Watch | None,
    bans: Banned | None, guidance: float | None,
) -> tuple[Tensor, int]:  # fmt: skip
    """(tokens (1, L), forwards) of a fill as the user asked for it."""
    forwards, each = 0, forwards_of_a_step(guidance)

    def counting(canvas: Canvas, step: Step) -> None:
        nonlocal forwards
        forwards += each * (len(step.log_probs) > 0)
        if watch is not None:
            watch(canvas, step)

    seeds = seeds_of(seed, len(canvas.ids))
    made = unmask(model, canvas, steps=steps, policy=policy, draw=draw, seeds=seeds, banned=bans, guidance=guidance)
    return filled(canvas, made, counting), forwards


def _fills(model: Model, ids: list[int], text: Holed, lengths: Sequence[int]) -> list[str]:
    """Text of each hole, without the space that belongs to the piece before it."""
    fills = []
    for piece, at, length in zip(text.pieces, text.starts(lengths), lengths, strict=False):
        # Decoded behind its context: a first piece by itself may lose its space.
        before = decode(model.tokenizer, ids[:at])
        fill = decode(model.tokenizer, ids[: at + length])
        fill = fill[len(before) :] if fill.startswith(before) else decode(model.tokenizer, ids[at : at + length])
        fills.append(fill.removeprefix(" ") if piece.endswith(" ") else fill)
    return fills
