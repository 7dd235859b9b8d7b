"""Words that have to occur, or must not: as tokens before the fill, as text after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ..tokenizer import decode, encode, encode_after
from .constraints import Banned


def check_words(must: Sequence[str], must_not: Sequence[str]) -> None:
    """ValueError for an empty word, and for a word that has to occur and holds one that must not."""
    if "" in (*must, *must_not):
        raise ValueError("a word that must or must not occur is empty; give its characters")
    for word in must:
        for other in must_not:
            if other in word:
                raise ValueError(f"{word!r} has to occur and holds {other!r}, which must not; drop one of them")


def spellings(tokenizer: Any, word: str, must_not: Sequence[str] = ()) -> list[tuple[int, ...]]:
    """Tokens of a word behind other text, with and without a space in front; none that spells a word of `must_not`."""
    texts = [word] if word[0].isspace() else [" " + word, word]
    found = [tuple(encode_after(tokenizer, text)) for text in texts if not any(other in text for other in must_not)]
    return list(dict.fromkeys(found))


def banned(tokenizer: Any, must_not: Sequence[str]) -> Banned | None:
    """What keeps words out of a fill: every token whose text holds one, and their usual spellings in several tokens.

    Other spellings in several tokens exist; `spelling_at` finds one that came up, to be banned as well.
    """
    if not must_not:
        return None
    tokens = {
        i for i, text in enumerate(_token_texts(tokenizer, len(tokenizer))) if any(word in text for word in must_not)
    }
    usual = {tuple(encode(tokenizer, word)) for word in must_not}
    usual |= {spelling for word in must_not for spelling in spellings(tokenizer, word)}
    tokens |= {spelling[0] for spelling in usual if len(spelling) == 1}
    return Banned(tuple(sorted(tokens)), tuple(sorted(s for s in usual if len(s) > 1)))


def opening(tokenizer: Any, bans: Banned | None) -> tuple[int, ...]:
    """The tokens that begin with a space and are not banned; () where none of them is more than spaces."""
    texts = _token_texts(tokenizer, len(tokenizer))
    never = frozenset(bans.tokens if bans is not None else ())
    found = [i for i, text in enumerate(texts) if text.startswith(" ") and i not in never]
    return tuple(found) if any(texts[i].strip() for i in found) else ()


@lru_cache(maxsize=2)  # about a second for 50,000 tokens, and a fill asks every time
def _token_texts(tokenizer: Any, size: int) -> list[str]:
    """Text of each of the `size` tokens behind a letter: some tokenizers drop the space of a token that comes first."""
    letter = encode(tokenizer, "a")
    first = len(decode(tokenizer, letter))
    several = [[*letter, i] for i in range(size)]
    return [text[first:] for text in tokenizer.batch_decode(several, clean_up_tokenization_spaces=False)]


def also(bans: Banned, spelling: tuple[int, ...]) -> Banned:
    """The bans and one more spelling."""
    if len(spelling) == 1:
        return replace(bans, tokens=(*bans.tokens, *spelling))
    return replace(bans, sequences=(*bans.sequences, spelling))


def forbidden(pieces: Sequence[str], fills: Sequence[str], must_not: Sequence[str]) -> str | None:
    """A word of `must_not` that a filled text holds, with one character of a fill at least; None when there is none."""
    whole, filled = "", []
    for piece, fill in zip(pieces, [*fills, ""], strict=True):
        filled.append((len(whole) + len(piece), len(whole) + len(piece) + len(fill)))
        whole += piece + fill
    for word in must_not:
        at = whole.find(word)
        while at >= 0:
            if any(at < end and at + len(word) > start for start, end in filled):
                return word
            at = whole.find(word, at + 1)
    return None


def spelling_at(tokenizer: Any, ids: Sequence[int], filled: Sequence[bool], word: str) -> tuple[int, ...] | None:
    """The tokens that spell `word` in `ids`, at its first place that touches a filled token; None: nowhere."""
    ends = [len(decode(tokenizer, list(ids[:n]))) for n in range(len(ids) + 1)]
    whole = decode(tokenizer, list(ids))
    at = whole.find(word)
    while at >= 0:
        touched = [i for i in range(len(ids)) if ends[i] < at + len(word) and ends[i + 1] > at]
        if any(filled[i] for i in touched):
            return tuple(ids[i] for i in range(touched[0], touched[-1] + 1))
        at = whole.find(word, at + 1)
    return None
