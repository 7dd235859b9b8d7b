"""Questions with short answers and many spellings of each: TriviaQA without passages, Natural Questions."""

from __future__ import annotations

from .. import extract
from ..schemas import Record, check_text, check_texts
from .task import Generation


def _trivia(r: Record) -> Record:
    check_text(r, "question")
    check_texts(r["answer"]["aliases"], "answer.aliases", 1)
    check_texts(r["answer"]["normalized_aliases"], "answer.normalized_aliases", 1)
    return r


def _open(r: Record) -> Record:
    check_text(r, "question")
    check_texts(r["answer"], "answer", 1)
    return r


def aliases(record: Record) -> set[str]:
    """The normalised spellings of a record's answer."""
    answer = record["answer"]
    given = [*answer["normalized_aliases"], *answer["aliases"]] if isinstance(answer, dict) else answer
    return {extract.normalised(alias) for alias in given} - {""}


TASKS = [
    Generation(
        name, file, adapt, "alias_match", lambda record, text: extract.short_answer(text),
        lambda record, answer: answer in aliases(record), packaged, shots=2, split="validation", cap=32, vote=True,
        hub=True,
    )
    for name, file, adapt, packaged in (
        ("triviaqa", "triviaqa/rc_wikipedia_nocontext_validation.jsonl.gz", _trivia, "triviaqa/default.yaml"),
        ("nq_open", "nq_open/validation.jsonl.gz", _open, "nq_open/nq_open.yaml"),
    )
]  # fmt: skip
