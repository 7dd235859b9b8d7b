"""The middle sentence of five (ROCStories; the cloze validation file that the paper used), by ROUGE."""

from __future__ import annotations

from .. import extract
from ..measures import rouge
from ..schemas import Record, check_text, check_within
from .task import Generation


def _story(r: Record) -> Record:
    check_text(r, *(f"InputSentence{i}" for i in range(1, 5)))
    right = check_within(r["AnswerRightEnding"], ["1", "2"], "AnswerRightEnding")
    check_text(r, f"RandomFifthSentenceQuiz{right}")
    return r


def sentences(record: Record) -> list[str]:
    """The five sentences, with the right ending."""
    given = [record[f"InputSentence{i}"] for i in range(1, 5)]
    return [s.strip() for s in (*given, record[f"RandomFifthSentenceQuiz{record['AnswerRightEnding']}"])]


def _hole(record: Record) -> tuple[str, str, str]:
    one, two, three, four, five = sentences(record)
    return f"{one} {two}", f" {three}", f" {four} {five}"


TASKS = [
    Generation(
        "rocstories", "roc_cloze/cloze_test_val__spring2016.jsonl.gz", _story, "rougeL", hole=_hole, measure=rouge,
        whole=extract.first_sentence, cap=24,
        remark="1,871 stories; the paper scored the first 1,000 (--limit 1000), with the true length alone",
    )
]  # fmt: skip
