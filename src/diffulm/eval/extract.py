"""What a written text answers: numbers, letters, names, equations. Functions of text, tested on golden outputs."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction

_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\$\s?)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+(?!\d|\.\d))?")
_MARKED = re.compile(r"####\s*([^\n]*)")
_SAID = re.compile(r"answer is:?(.*?)(?=answer is|\n|\Z)", re.IGNORECASE)


def number(text: str) -> Fraction | None:
    """The first number of a text: "1,200" and "$1200.00" are 1200, "-3/4" is -3/4, "5-3" begins with 5; None: none."""
    found = _NUMBER.search(text)
    if found is None:
        return None
    digits = re.sub(r"[\s$,]", "", found.group())
    top, _, bottom = digits.partition("/")
    if bottom and int(bottom) == 0:
        return Fraction(top)
    return Fraction(top) / Fraction(bottom or 1)


def gsm8k_answer(text: str) -> str | None:
    """The final number of a solution, as its shortest decimal or fraction; None where there is no number.

    In this order: the number behind the first "####" (the data's own mark, Cobbe et al., arXiv 2110.14168), the first
    one behind "answer is" (chain-of-thought prompts, arXiv 2201.11903), the last number of the text.
    """
    for mark in (_MARKED, _SAID):
        found = mark.search(text)
        if found is not None:
            value = number(found.group(1))
            if value is not None:
                return spelt(value)
    every = [m.group() for m in _NUMBER.finditer(text)]
    value = number(every[-1]) if every else None
    return None if value is None else spelt(value)


def spelt(value: Fraction | float | int) -> str:
    """A number in one spelling, so that equal numbers are equal texts; floats to six decimals."""
    exact = Fraction(value).limit_denominator(10**6)
    if exact.denominator == 1:
        return str(exact.numerator)
    return f"{float(exact):.6f}".rstrip("0")


def letter_answer(text: str, letters: str = "ABCDE") -> str | None:
    """The option that is named: behind the last "answer is", else the first letter that stands by itself."""
    alone = re.compile(rf"(?<![A-Za-z])\(?([{letters}])(?![A-Za-z'])")
    said = [found for m in _SAID.finditer(text) if (found := alone.search(m.group(1)))]
    found = said[-1] if said else alone.search(text)
    return found.group(1) if found else None


_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))


def normalised(text: str) -> str:
    """A name as TriviaQA's evaluation compares it: lower case, no punctuation, no articles, single spaces.

    Joshi et al. (arXiv 1705.03551), whose own script gives the data's `normalized_aliases`.
    """
    text = text.replace("_", " ").lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def short_answer(text: str) -> str | None:
    """The normalised first line of a text; None where nothing is left of it."""
    lines = text.strip().split("\n")
    return normalised(lines[0]) or None


def majority(answers: Sequence[str | None]) -> str | None:
    """The commonest answer, of equally common ones the earliest; texts without an answer do not vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


# ------------------------------------------------------------------------------------------------------ Countdown

_EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


def equations(text: str) -> str | None:
    """The first line of a text without spaces, cut before what is no chain of equations; None without one."""
    line = re.sub(r"\s+", "", text.strip().split("\n")[0]).replace("x", "*").replace("×", "*").replace("÷", "/")
    kept: list[str] = []
    for part in line.split(","):
        if not _EQUATION.fullmatch(part):
            break
        kept.append(part)
    return ",".join(kept) or None


def reaches(chain: str, numbers: Iterable[int], target: int) -> bool:
    """Whether equations lead from the numbers to the target: each one true, every operand one that is there, and used
    once, the last result the target. Every given number has to be used, as in the puzzles' own solutions."""
    pool = Counter(numbers)
    result: int | None = None
    for part in chain.split(","):
        found = _EQUATION.fullmatch(part)
        if found is None:
            return False
        left, sign, right, said = int(found[1]), found[2], int(found[3]), int(found[4])
        for operand in (left, right):
            if pool[operand] < 1:
                return False
            pool[operand] -= 1
        true = {"+": left + right == said, "-": left - right == said, "*": left * right == said,
                "/": right != 0 and left == said * right}[sign]  # fmt: skip
        if not true:
            return False
        pool[said] += 1
        result = said
    return result == target and sum(pool.values()) == 1


# ---------------------------------------------------------------------------------------------- where a fill ends

_SENTENCE = re.compile(r"\s*.*?[.!?]+[\"'”’)]*(?=\s|\Z)")


def first_sentence(text: str) -> str:
    """A text up to the end of its first sentence or line."""
    line = text.split("\n")[0]
    found = _SENTENCE.match(line)
    return found.group() if found else line


def first_line(text: str) -> str:
    """A text up to and with its first line break."""
    line, end, _ = text.partition("\n")
    return line + end
