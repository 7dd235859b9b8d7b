"""Records of local files, checked and brought to the schema that lm-eval's packaged tasks read.

Each function takes a record as a JSON object and returns it, or one in the packaged schema; KeyError, TypeError or
ValueError say what is wrong. Label bases are those of the files: 0-based numbers, 1-based strings, letters, booleans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Record = dict[str, Any]


def check_text(record: Record, *names: str) -> None:
    """TypeError unless these fields of a record are texts; KeyError where one is missing."""
    for name in names:
        if not isinstance(record[name], str):
            raise TypeError(f"{name} must be text, not {type(record[name]).__name__}")


def check_texts(values: Any, name: str, least: int = 2) -> list[str]:
    """The values of the field `name`; TypeError unless they are a list of at least so many texts."""
    if not isinstance(values, list) or len(values) < least or not all(isinstance(v, str) for v in values):
        raise TypeError(f"{name} must be a list of at least {least} texts")
    return values


def check_within(value: Any, allowed: Sequence[Any], name: str) -> Any:
    """The value of the field `name`; ValueError unless it is one of the allowed, and of the same type."""
    # True == 1 in Python: the type is part of a label base
    if not any(type(value) is type(other) and value == other for other in allowed):
        raise ValueError(f"{name} is {value!r}, not one of {', '.join(map(repr, allowed))}")
    return value


def hellaswag(r: Record) -> Record:
    check_text(r, "activity_label", "ctx_a", "ctx_b")
    check_within(r["label"], [str(i) for i in range(len(check_texts(r["endings"], "endings")))], "label")
    return r


def winogrande(r: Record) -> Record:
    check_text(r, "sentence", "option1", "option2")
    check_within(r["answer"], ["1", "2"], "answer")
    if r["sentence"].count("_") < 1:
        raise ValueError("sentence has no blank (_)")
    return r


def piqa(r: Record) -> Record:
    check_text(r, "goal", "sol1", "sol2")
    check_within(r["label"], [0, 1], "label")
    return r


def siqa(r: Record) -> Record:
    check_text(r, "context", "question", "answerA", "answerB", "answerC")
    check_within(r["label"], ["1", "2", "3"], "label")
    return r


def lettered(r: Record) -> Record:
    """ARC, OpenBookQA, CommonsenseQA as on the Hub: the key is looked up among the labels, never computed."""
    texts = check_texts(r["choices"]["text"], "choices.text")
    labels = check_texts(r["choices"]["label"], "choices.label")
    if len(texts) != len(labels):
        raise ValueError("choices.text and choices.label differ in length")
    check_within(r["answerKey"], labels, "answerKey")
    return r


def asked(r: Record) -> Record:
    check_text(r, "question")
    return lettered(r)


def commonsense(r: Record) -> Record:
    if r["choices"]["label"] != ["A", "B", "C", "D", "E"]:
        raise ValueError("choices.label must be A to E")
    return asked(r)


def numbered(question: str, prefix: str = "") -> Callable[[Record], Record]:
    """Records of query, choices, gold (0-based) in the Hub's schema; labels are the indices."""

    def adapt(r: Record) -> Record:
        check_text(r, "query")
        choices = check_texts(r["choices"], "choices")
        gold = check_within(r["gold"], list(range(len(choices))), "gold")
        if not r["query"].startswith(prefix):
            raise ValueError(f"query does not begin with {prefix!r}")
        labels = [str(i) for i in range(len(choices))]
        text = r["query"].removeprefix(prefix)
        return {question: text, "choices": {"text": choices, "label": labels}, "answerKey": labels[gold]}

    return adapt


def boolq(r: Record) -> Record:
    check_text(r, "passage", "question")
    return {**r, "label": int(check_within(r["answer"], [False, True], "answer"))}


def copa(r: Record) -> Record:
    check_text(r, "premise", "choice1", "choice2")
    check_within(r["question"], ["cause", "effect"], "question")
    check_within(r["label"], [0, 1], "label")
    return r


def sciq(r: Record) -> Record:
    check_text(r, "support", "question", "distractor1", "distractor2", "distractor3", "correct_answer")
    return r


def mmlu(r: Record) -> Record:
    check_text(r, "subject", "split", "question")
    check_within(r["answer"], list(range(len(check_texts(r["choices"], "choices", 4)))), "answer")
    return r


def winograd(r: Record) -> Record:
    check_text(r, "continuation")
    check_within(r["gold"], list(range(len(check_texts(r["context_options"], "context_options")))), "gold")
    return r


def lambada_openai(r: Record) -> Record:
    check_text(r, "context", "continuation")
    if not r["continuation"].strip():
        raise ValueError("continuation is empty")
    return r


def line(r: Record) -> Record:
    if " " not in r["text"]:
        raise ValueError("a line needs a context and a last word")
    return r
