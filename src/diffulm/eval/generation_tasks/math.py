"""Word problems: GSM8K, MAWPS, SVAMP, ASDiv with lm-eval's prompts, and the SAT's multiple choice.

`_cot` tasks show solutions with their reasoning (the exemplars of arXiv 2201.11903, as lm-eval packages them), the
others the same exemplars' answers alone.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from .. import extract
from ..schemas import Record, check_text
from .task import Generation, shown_first

_COT = "gsm8k/gsm8k-cot.yaml"
_ENDS = ["Q:", "\n\n", "</s>", "<|im_end|>"]


def _gsm8k(r: Record) -> Record:
    check_text(r, "question", "answer")
    if extract.gsm8k_answer(r["answer"]) is None:
        raise ValueError("answer has no number")
    return r


def _equations(r: Record) -> Record:
    check_text(r, "instruction", "output")
    return _gsm8k({"question": r["instruction"], "answer": r["output"]})


def _solved(question: str, value: Any) -> Record:
    """A problem in GSM8K's schema."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"the answer must be a number, not {value!r}")
    return {"question": question, "answer": f"#### {extract.spelt(value)}"}


def _mawps(r: Record) -> Record:
    check_text(r, "input")
    return _solved(r["input"], r["target"])


def _svamp(r: Record) -> Record:
    check_text(r, "Body", "Question")
    body = r["Body"].rstrip()
    return _solved(f"{body}{'' if body.endswith('.') else '.'} {r['Question']}", r["Answer"])


def _asdiv(r: Record) -> Record:
    check_text(r, "body", "question", "answer")
    return {"question": f"{r['body']} {r['question']}", "answer": f"#### {r['answer'].split(' (')[0]}"}


def _answer(record: Record, text: str) -> str | None:
    return extract.gsm8k_answer(text)


def _same(record: Record, answer: str) -> bool:
    return extract.gsm8k_answer(record["answer"]) == answer


def brief(samples: list[Record]) -> list[Record]:
    """Exemplars of reasoning with their last sentence alone, which gives the answer."""
    return [{**s, "target": re.split(r"(?<=[.?!])\s+(?=The answer is)", s["target"])[-1]} for s in samples]


def _words(name: str, file: str, adapt: Any, **more: Any) -> list[Generation]:
    """The task with brief answers, and the one with reasoning."""
    cot = Generation(
        f"{name}_cot", file, adapt, "exact_match", _answer, _same, _COT, shots=8, shown="packaged", vote=True,
        changes={"generation_kwargs": {"until": _ENDS, "do_sample": False}}, **more,
    )  # fmt: skip
    return [replace(cot, name=name, changes={**cot.changes, "fewshot_config": brief}, shots=4, cap=32), cot]


_GSM8K = Generation(
    "gsm8k", "gsm8k/test.jsonl.gz", _gsm8k, "exact_match", _answer, _same, "gsm8k/gsm8k.yaml", shots=5,
    shown="gsm8k/train.jsonl.gz", vote=True, hub=True,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ SAT

_EXEMPLARS = [
    ("If $3x+2=14$, what is the value of $x$?", ["3", "4", "5", "6"], "Subtract 2: $3x=12$. Divide by 3: $x=4$.", "B"),
    ("What is the slope of the line $y=7-2x$?", ["$-7$", "$-2$", "$2$", "$7$"],
     "In $y=mx+b$ the slope is the factor of $x$, which is $-2$ here.", "B"),
    ("A jar has 3 red and 9 blue marbles. What is the probability of drawing a red one?",
     ["$\\frac{1}{4}$", "$\\frac{1}{3}$", "$\\frac{2}{3}$", "$\\frac{3}{4}$"],
     "There are 12 marbles and 3 are red: $\\frac{3}{12}=\\frac{1}{4}$.", "A"),
    ("The price of a coat rises from 80 to 100 dollars. By what percentage does it rise?",
     ["$15 \\%$", "$20 \\%$", "$25 \\%$", "$80 \\%$"], "It rises by 20 dollars of 80: $\\frac{20}{80}=0.25$.", "C"),
]  # fmt: skip


def _sat(r: Record) -> Record:
    check_text(r, "question", "label")
    options = r["options"]
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) for o in options):
        raise TypeError("options must be a list of at least 2 texts")
    if r["label"] not in list("ABCDE"[: len(options)]):
        raise ValueError(f"label is {r['label']!r}, not a letter of the {len(options)} options")
    return r


def _asked(question: str, options: list[str]) -> str:
    return f"Question: {question}\nOptions: {' '.join(options)}\nAnswer:"


def _sat_prompt(record: Record, shots: int, *, reasons: bool) -> str:
    shown = [
        _asked(q, [f"({x}){o}" for x, o in zip("ABCD", options)]) + f"{' ' + why if reasons else ''} The answer is {x}."
        for q, options, why, x in _EXEMPLARS
    ]
    passage = f"{record['passage']} " if record.get("passage") else ""
    return "\n\n".join(
        [*shown_first(shown, shots, "sat_math"), _asked(passage + record["question"], record["options"])]
    )


_SAT = Generation(
    "sat_math", "sat_math/agieval_v1.jsonl.gz", _sat, "exact_match", lambda record, text: extract.letter_answer(text),
    lambda record, answer: answer == record["label"], shots=4, until=("\n\n", "Question:"), cap=32, vote=True,
    prompt=lambda record, shots: _sat_prompt(record, shots, reasons=False),
)  # fmt: skip

TASKS = [
    _GSM8K,
    Generation(
        "gsm8k_cot", _GSM8K.file, _gsm8k, "exact_match", _answer, _same, _COT, shots=8, shown="packaged", vote=True,
        hub=True,
    ),
    replace(
        _GSM8K, name="gsm8k_equations", file="gsm8k/diffullama_gsm_test.jsonl.gz", adapt=_equations,
        shown="gsm8k/train_equations.jsonl.gz", hub=False, cap=128,
        remark="solutions as bare equations, the paper's own test file",
    ),
    *_words("mawps", "mawps/test.jsonl.gz", _mawps),
    *_words("svamp", "svamp/test.jsonl.gz", _svamp),
    *_words(
        "asdiv", "asdiv/test.jsonl.gz", _asdiv,
        remark="56 of the 2,215 answers are no numbers (a name, yes, a time) and count as wrong",
    ),
    _SAT,
    replace(
        _SAT, name="sat_math_cot", cap=256, prompt=lambda record, shots: _sat_prompt(record, shots, reasons=True)
    ),
]  # fmt: skip
