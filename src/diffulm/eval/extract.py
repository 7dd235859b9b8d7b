"""What a written text answers: numbers, letters, names, equations. Functions of text, tested on golden outputs."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])-)?(?:\$\s?)?"
    r"(?:(?P<whole>\d+)(?: and)? (?=\d+/\d+(?![\d/]|\.\d)))?"  # the 3 of "3 1/2"
    r"(?P<top>\d[\d,]*(?:\.\d+)?|\.\d+)(?:/(?P<bottom>\d+)(?!\d|\.\d))?"
)
#: What may stand between the first number of an equation and its result, and what makes it an equation.
_SUM, _SIGN = re.compile(r"(?:[-+*/x×÷][ (]*|[\d $)%=]|[.,](?=\d))*"), re.compile(r"[-+*/x×÷]")

_MARKED = re.compile(r"####\s*([^\n]*)")
_BOXED = re.compile(r"boxed\s*\{((?:[^{}\n]|\{[^{}\n]*\})*)")
_SAID = re.compile(r"answer is:?(.*?)(?=answer is|\n|\Z)", re.IGNORECASE)
#: A line "Answer: 42 ..." of one statement. The whole solution may stand there too, whose first number is not its
#: answer: it has an equation or several sentences.
_LINE = re.compile(r"\banswer[* ]*:[* ]*([-$\d](?:[^\n=.]|\.(?=\d))*)\.?[* ]*$", re.IGNORECASE | re.MULTILINE)

_MINUS = dict.fromkeys(map(ord, "\u2212\u2013\u2011\ufe63\uff0d"), "-")  # the minus sign, and what is taken for it
_FRACTION = re.compile(
    r"((?<=\d)\s*)?(?:\\[dt]?frac\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}|(?P<one>[\u00bc-\u00be\u2150-\u215e]))"
)


def _plain(text: str) -> str:
    r"""A text with minus signs, fractions and LaTeX's digits in ASCII: "\frac{3}{4}" is "3/4", "1{,}200" is "1,200"."""

    def spelt_out(found: re.Match[str]) -> str:
        value = f"{found['top']}/{found['bottom']}"
        if found["one"]:
            value = unicodedata.normalize("NFKC", found["one"]).replace("\u2044", "/")
        return value if found[1] is None else f" {value}"  # behind a digit: "3½" is "3 1/2"

    return _FRACTION.sub(spelt_out, text.translate(_MINUS).replace("{,}", ",").replace("\\$", "$"))


def _value(found: re.Match[str]) -> Fraction:
    """The value of a match of `_NUMBER`. Of "5 7/2", which is no mixed number, that is the 5."""
    top, bottom = Fraction(found["top"].replace(",", "")), int(found["bottom"] or 1)
    value = top / bottom if bottom else top
    if found["whole"]:
        value = int(found["whole"]) + (value if top < bottom else Fraction(0))
    return -value if found["sign"] else value


def number(text: str) -> Fraction | None:
    """The first number of a text: "1,200" and "$1200.00" are 1200, "3 1/2" is 7/2, "5-3" begins with 5; None: none."""
    found = _NUMBER.search(_plain(text))
    return None if found is None else _value(found)


def stated(text: str) -> Fraction | None:
    """The first number of a statement, or where an equation begins with it ("3 * 59 = 177") its result; None: none."""
    text = _plain(text)
    found = _NUMBER.search(text)
    if found is None:
        return None
    run = _SUM.match(text, found.end())
    left, equals, _ = run.group().rpartition("=") if run else ("", "", "")
    if equals and _SIGN.search(left):
        found = _NUMBER.match(text[found.end() + len(left) + 1 :].lstrip()) or found
    return _value(found)


def gsm8k_answer(text: str) -> str | None:
    r"""The final number of a solution, as its shortest decimal or fraction; None where there is no number.

    In this order: what is stated behind the first "####" (the data's own mark, Cobbe et al., arXiv 2110.14168), in the
    last \boxed{...} (MATH's mark, arXiv 2103.03874), behind the first "answer is" (chain-of-thought prompts, arXiv
    2201.11903), in the last line "Answer: ..." of one statement, the last number of the text.
    """
    text = _plain(text)
    for mark, which in ((_MARKED, 0), (_BOXED, -1), (_SAID, 0), (_LINE, -1)):
        found = mark.findall(text)
        value = stated(found[which]) if found else None
        if value is not None:
            return spelt(value)
    every = list(_NUMBER.finditer(text))
    return spelt(_value(every[-1])) if every else None


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
