"""Golden outputs: what a text answers, and when equations, letters and names count as the same."""

from __future__ import annotations

from fractions import Fraction

import pytest

from diffulm.eval import extract
from diffulm.eval.measures import pass_at_k, rouge

#: (text as models write it, the number it answers)
NUMBERS = [
    ("She has 3 + 4 = 7 left.\n#### 7", "7"),
    ("#### 1,200", "1200"),
    ("#### $18.00", "18"),
    ("#### -5 dollars", "-5"),
    ("<<16-3-4=9>> <<9*2=18>> #### 18", "18"),
    ("#### 3\n\nQuestion: and 4?\n#### 4", "3"),
    ("#### none, the answer is 8", "8"),
    ("So 20 - 12 = 8. The answer is 8.", "8"),
    ("The answer is: $2,125,000.", "2125000"),
    ("the final answer is 0.50", "0.5"),
    ("The answer is about 3 to 4", "3"),
    ("It takes 3/4 of an hour. The answer is 3/4.", "0.75"),
    ("He pays 5-3 = 2", "2"),
    ("that is 16-3-4=9", "9"),
    ("minus five is -5", "-5"),
    ("2 bolts, then 1 bolt: 3", "3"),
    ("1/3", "0.333333"),
    ("no number here", None),
    ("", None),
    ("####", None),
]


@pytest.mark.parametrize(("text", "answer"), NUMBERS)
def test_numbers(text: str, answer: str | None) -> None:
    assert extract.gsm8k_answer(text) == answer


def test_equal_numbers_are_equal_texts() -> None:
    assert {extract.spelt(x) for x in (43, 43.0, Fraction(86, 2))} == {"43"}
    assert extract.spelt(0.1 + 0.2) == "0.3" and extract.spelt(-2.50) == "-2.5"
    assert extract.number("7/0") == 7, "no division by zero"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (" B.", "B"),
        ("(C)", "C"),
        ("A slope is -2. The answer is B.", "B"),
        ("The answer is A. No: the answer is (D).", "D"),
        ("Because x=4, C", "C"),
        ("An apple", None),
        ("", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert extract.letter_answer(text) == letter


def test_names() -> None:
    assert extract.normalised("The  Sunset_Boulevard!") == "sunset boulevard"
    assert extract.normalised("Campbell-Bannerman") == "campbell bannerman"
    assert extract.short_answer(" The Beatles\nQuestion: who") == "beatles"
    assert extract.short_answer(" the.") is None and extract.short_answer("") is None


def test_majority() -> None:
    assert extract.majority(["a", "b", "b", None, None, None]) == "b"
    assert extract.majority(["a", "b"]) == "a", "the earliest of equally common ones"
    assert extract.majority([None, None]) is None


@pytest.mark.parametrize(
    ("chain", "right"),
    [
        ("44-15=29,79-29=50", True),
        ("79+15=94,94-44=50", True),
        ("44-15=28,79-29=50", False),  # untrue
        ("44-15=29,79-28=51", False),  # 28 is not there, and 51 no target
        ("44-15=29,79-29=50,50-0=50", False),  # 0 is not there
        ("79-29=50", False),  # 29 is not given
        ("44+44=88", False),  # 44 is there once
        ("50-0=50", False),
        ("", False),
    ],
)
def test_countdown(chain: str, right: bool) -> None:
    assert extract.reaches(chain, [15, 44, 79], 50) is right


def test_countdown_divides_without_rest_and_uses_every_number() -> None:
    assert extract.reaches("36/9=4,20+4=24", [9, 36, 20], 24)
    assert not extract.reaches("36/8=4,20+4=24", [8, 36, 20], 24)
    assert not extract.reaches("20+4=24", [20, 4, 7], 24), "7 is left over"
    assert not extract.reaches("5/0=0", [5, 0], 0)


def test_equations() -> None:
    assert extract.equations(" 44 - 15 = 29, 79-29=50\n\nNumbers") == "44-15=29,79-29=50"
    assert extract.equations("6 x 7 = 42, 42 ÷ 2 = 21, and so on") == "6*7=42,42/2=21"
    assert extract.equations("none") is None and extract.equations("") is None


def test_ends_of_fills() -> None:
    assert extract.first_sentence(" He ran. She left.") == " He ran."
    assert extract.first_sentence(' "Go!" he said. Then') == ' "Go!"'
    assert extract.first_sentence(" It cost 3.50 dollars. So") == " It cost 3.50 dollars."
    assert extract.first_sentence(" no end\nhere.") == " no end"
    assert extract.first_line("  x = 1\n  y = 2\n") == "  x = 1\n" and extract.first_line("x") == "x"


def test_pass_at_k_is_unbiased() -> None:
    """By enumeration: over all choices of k of n samples."""
    from itertools import combinations

    for n, right, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (4, 1, 4)):
        marks = [i < right for i in range(n)]
        drawn = [any(part) for part in combinations(marks, k)]
        assert pass_at_k(n, right, k) == pytest.approx(sum(drawn) / len(drawn))
    with pytest.raises(ValueError, match="pass@3 needs at least 3 samples, there are 2; raise --samples"):
        pass_at_k(2, 1, 3)


def test_rouge() -> None:
    pytest.importorskip("rouge_score", reason="needs the extra eval")
    same, half, none = rouge(["the cat sat down"] * 3, ["The cat sat down.", "the cat ran off", "dogs"])
    assert same == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert half == {"rouge1": 0.5, "rouge2": pytest.approx(1 / 3), "rougeL": 0.5}
    assert none == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
