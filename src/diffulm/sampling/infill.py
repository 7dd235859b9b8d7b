"""Filling holes: anywhere in a text, several at once, of unknown length, with words that must or must not occur."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from ..layout import Block
from ..tokenizer import SpecialTokens, decode, encode, encode_after, special_tokens
from . import words
from .caches import BLOCK
from .canvas import Canvas
from .constraints import Banned, Opening
from .draw import Draw
from .fill import Model, Watch, check_length, filled, given_ids, seeds_of, unmask
from .guidance import forwards_of_a_step
from .policies import Policy, TopConfidence
from .search import TOGETHER, Spellings, fits, length_scores, need, place
from .step import Step

_HOLE = re.compile(r"<hole(?::([^<>\n]*))?>")
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
    block: int | None = None,
    cache: Literal["none", "prefix", "dual"] = "none",
    guidance: float | None = None,
    watch: Watch | None = None,
) -> Infilling:
    """Fill one hole between prefix and suffix, or every `<hole>` / `<hole:N>` of a text given as `prefix` alone.

    Returns the whole text (a str) with `.fills`. A hole takes exactly `length` (or N) tokens. What was given is never
    altered: the result is prefix + fill + suffix, character for character, and that is what the tokens decode to. A
    space at the end of what stands before a hole is generated with the hole's first word, because tokenizers join it to
    the word: such a hole begins with a token that begins with a space. Where no token may, or nothing else stands
    before the hole, the space is a token of the given text.

    length "auto" (or `<hole:auto>`): the length in 1..max_length whose greedy fill is likeliest per token, given both
    sides (search.py). Several such holes are searched one by one, from the left, the others masked. It costs the
    forwards of filling every length, several in a batch; `.forwards` counts them.

    must: words (any strings) of which each has to occur in a fill. They are put where the model finds them likeliest
    and then are given text. must_not: strings that the result must not hold, where any character of them is filled in.
    The tokens that hold one are never drawn, nor the token that would complete a usual spelling; another spelling, or
    one whose tokens are revealed together, is found in the finished text and banned before it is filled again, one
    token a step.

    block, cache: fill so many tokens together, block after block; "prefix" or "dual" (caches.py) then compute fewer
    rows, approximately, for full attention, in blocks of 32 unless `block` says otherwise. Searches go without.

    guidance: the scale of classifier-free guidance by the given text, placed words included (guidance.py); 1 is none.
    Lengths and places are searched without it, by likelihood.

    Raises:
        ValueError: no hole, a hole of no tokens or one that names no number of them, a text longer than the model was
            trained on, or constraints that contradict each other, do not fit or cannot be kept.
    """
    words.check_words(must, must_not)
    bans = words.banned(model.tokenizer, must_not)
    text = Holed.read(model, prefix, suffix, length, bans)
    if isinstance(model.layout, Block) and (any(p.strip() for p in text.pieces[1:]) or must or None in text.lengths):
        raise ValueError(
            "a checkpoint of the block layout does not see what stands after a hole; use generate, or a model with "
            "full attention (recipe smollm2-cpu)"
        )
    spellings = [words.spellings(model.tokenizer, word, must_not) for word in must]
    for spelling in (one for several in spellings for one in several):
        given_ids(model, list(spelling))
    lengths, used = _lengths(model, text, max_length, spellings, bans)
    check_length(text.given + sum(lengths), int(model.config["trained_length"]))
    canvas, hole_BL = text.canvas(model, [lengths])
    canvas, _, placing = place(model, canvas, spellings, hole_BL, text.opening(hole_BL, bans))
    if block is None and cache != "none":
        block = BLOCK
    used += placing
    tokens = int(canvas.editable.sum()) or 1
    steps = tokens if steps is None else steps
    draw = Draw(temperature, top_k, top_p)

    def fill(bans: Banned | None, again: bool) -> list[int]:
        """Tokens behind the start token; after a first try one token a step, so that every ban holds."""
        nonlocal used
        made = unmask(
            model, canvas, steps=tokens if again else steps, policy=TopConfidence() if again else policy, draw=draw,
            seeds=seeds_of(seed, 1), block=block, cache=cache, banned=text.opening(hole_BL, bans), guidance=guidance,
        )  # fmt: skip
        ids, forwards = _counted(canvas, made, watch, forwards_of_a_step(guidance))
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

    A space that ends the piece before a hole is none of its tokens where the hole is `spaced`: then the hole begins
    with one of the tokens `opens`, all of which bring the space.
    """

    pieces: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    lengths: tuple[int | None, ...]
    spaced: tuple[bool, ...]
    opens: tuple[int, ...]

    @classmethod
    def read(
        cls, model: Model, prefix: str, suffix: str | None, length: int | str, bans: Banned | None = None
    ) -> Holed:
        """One hole between prefix and suffix, or those marked in `prefix`. ValueError as `infill` says."""
        pieces, lengths = [prefix, suffix or ""], [str(length)]
        if suffix is None:
            marks = list(_HOLE.finditer(prefix))
            if not marks:
                raise ValueError("the text has no hole; write <hole> or <hole:N> where N tokens are to be filled in")
            for mark in marks:
                if mark.group(1) not in (None, "auto") and not mark.group(1).isdecimal():
                    raise ValueError(
                        f"{mark.group()} names no length: write <hole>, <hole:N> for N tokens or <hole:auto>"
                    )
            lengths = [m.group(1) or str(length) for m in marks]
            edges = [0, *[e for m in marks for e in m.span()], len(prefix)]
            pieces = [prefix[edges[i] : edges[i + 1]] for i in range(0, len(edges), 2)]
        if not all(n == "auto" or n.lstrip("-").isdigit() for n in lengths):
            raise ValueError(f"the length of a hole is a number of tokens or 'auto', not {length!r}")
        counts = [None if n == "auto" else int(n) for n in lengths]
        if any(n is not None and n < 1 for n in counts):
            raise ValueError("a hole needs at least one token; write <hole:N> with N >= 1")
        # At the very beginning there is no context behind which every tokenizer keeps the space of a token.
        spaced = [piece.endswith(" ") and (k > 0 or piece != " ") for k, piece in enumerate(pieces[:-1])]
        opens = words.opening(model.tokenizer, bans) if any(spaced) else ()
        spaced = [here and bool(opens) for here in spaced]
        tokens = []
        for k, piece in enumerate(pieces):
            kept = piece.removesuffix(" ") if k < len(spaced) and spaced[k] else piece
            ids = encode(model.tokenizer, kept) if k == 0 else encode_after(model.tokenizer, kept)
            tokens.append(tuple(given_ids(model, ids)))
        return cls(tuple(pieces), tuple(tokens), tuple(counts), tuple(spaced), opens)

    def opening(self, hole_BL: Tensor, bans: Banned | None) -> Opening:
        """What may be drawn where, on canvases whose holes are `hole_BL`."""
        before_BL = torch.cat([torch.full_like(hole_BL[:, :1], -1), hole_BL[:, :-1]], 1)
        begins_BL = (hole_BL >= 0) & (hole_BL != before_BL)
        spaced = torch.tensor(self.spaced, device=hole_BL.device)
        opens = torch.tensor(self.opens, dtype=torch.long, device=hole_BL.device)
        return Opening(begins_BL & spaced[hole_BL.clamp(min=0)], opens, bans)

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
        return canvas.to(model.device), hole_BL.to(model.device)


def _lengths(
    model: Model, text: Holed, most: int, spellings: Sequence[Spellings], bans: Banned | None
) -> tuple[list[int], int]:
    """(tokens of each hole, forwards): unknown ones are searched from the left, those to their right at the middle."""
    if most < 1:
        raise ValueError(f"max_length must be at least 1 token, not {most}")
    limit, forwards = int(model.config["trained_length"]), 0
    lengths = [(1 + most) // 2 if n is None else n for n in text.lengths]
    alone = len(lengths) == 1  # with several holes nobody knows yet which one a word goes to
    least = 1
    if alone:
        opens = frozenset(text.opens)
        needs = [need(several, opens) for several in spellings]
        least = next(n for n in count(1) if fits([(n, text.spaced[0])], needs))
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
            canvas = replace(canvas, editable=hole_BL == k)
            opening = text.opening(hole_BL, bans)
            nats_B, used = length_scores(model, canvas, spellings if alone else [], hole_BL, opening)
            scores += nats_B.tolist()
            forwards += used
        lengths = choices[max(range(len(choices)), key=scores.__getitem__)]
    return lengths, forwards


def _counted(canvas: Canvas, steps: Iterator[Step], watch: Watch | None, each: int) -> tuple[Tensor, int]:
    """(tokens (1, L), forwards) of a fill whose steps take `each` forwards."""
    forwards = 0

    def counting(canvas: Canvas, step: Step) -> None:
        nonlocal forwards
        forwards += each * (len(step.log_probs) > 0)
        if watch is not None:
            watch(canvas, step)

    return filled(canvas, steps, counting), forwards


def _fills(model: Model, ids: list[int], text: Holed, lengths: Sequence[int]) -> list[str]:
    """Text of each hole, without the space that belongs to the piece before it."""
    fills = []
    holes = zip(text.spaced, text.starts(lengths), lengths, strict=True)
    for spaced, at, length in holes:
        # Decoded behind its context: a first piece by itself may lose its space.
        before = decode(model.tokenizer, ids[:at])
        fill = decode(model.tokenizer, ids[: at + length])
        fill = fill[len(before) :] if fill.startswith(before) else decode(model.tokenizer, ids[at : at + length])
        fills.append(fill.removeprefix(" ") if spaced else fill)
    return fills
