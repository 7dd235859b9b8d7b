"""The report of a fine-tune: figures, where answers end, and what was answered, on a page and in Markdown."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from diffulm.answers import SIDES, blocks, summary, write_sft_report
from diffulm.eval.page import Table


def bound(nats: float, error: float = 0.02) -> dict[str, Any]:
    return {
        "nats": 100 * nats, "tokens": 1234, "nats_per_token": nats, "stderr_nats_per_token": error, "answers": 6,
        "draws": 8, "bits_per_byte": nats / 4,
    }  # fmt: skip


def answered(text: str, end: int, exact: bool) -> dict[str, Any]:
    row = {"question": "q", "answer": text, "truth": "yes", "end": end, "true_end": 3, "room": 16, "exact": exact}
    return {"prompts": [{"prompt": "Is <3> odd?", "answer": text}], "heldout": [row, dict(row, exact=False)]}


@pytest.fixture
def report() -> dict[str, Any]:
    recipe = {
        "name": "tiny", "train": {"batch": 4}, "data": {"length": 64}, "eval": {"max_tokens": 16, "steps": 8}
    }  # fmt: skip
    count = {"answers": 4321, "answer_tokens": 98765, "conversations": 4000, "left_out": 0, "cut": 0}
    return {
        "recipe": recipe, "command": "diffulm train tiny", "before": bound(3.456), "after": bound(2.345),
        "data": {
            "talks": {"train": count, "heldout": {**count, "answers": 77}, "bad": 2, "problems": [], "too_long": []}
        },
        "answers": {"before": answered("", 16, False), "after": answered("It is odd.\n\nYes | no.", 4, True)},
        "train": [{"step": 1}, {"step": 2}], "dtype": "float32", "seconds": 61.0, "model": "runs/sft/model",
    }  # fmt: skip


def test_the_page_and_the_markdown_say_what_the_report_holds(report: dict[str, Any], tmp_path: Path) -> None:
    write_sft_report(report, tmp_path / "run")
    assert json.loads((tmp_path / "run/report.json").read_text("utf-8")) == report
    html, text = ((tmp_path / f"run/report.{kind}").read_text("utf-8") for kind in ("html", "md"))
    assert "| before | 3.456 ± 0.020 | 0.864 |" in text and "| after | 2.345 ± 0.020 | 0.586 |" in text
    assert '<td data-label="Answers to train on">4,321</td>' in html and "runs/sft/model" in html
    for shown in (html, text):
        for words in ("Fine-tuning: tiny", "1,234 tokens", "98,765", "Before 0, After 1", "(nothing)", "1:01"):
            assert words in shown, words
    assert "Is &lt;3&gt; odd?" in html and "It is odd.\n\nYes | no." in html, "answers stand there whole"
    assert "It is odd.<br><br>Yes \\| no." in text
    assert re.findall("<h2>(.*?)</h2>", html) == re.findall("^## (.*)$", text, re.MULTILINE)


def test_where_answers_end(report: dict[str, Any]) -> None:
    (ends,) = (b for b in blocks(report) if isinstance(b, Table) and len(b.header) == 9)
    assert [(row[0], [int(n) for n in row[1:]]) for row in ends.rows] == [
        ("Truth", [0, 2, 0, 0, 0, 0, 0, 0]), ("Before", [0, 0, 0, 0, 0, 0, 0, 2]), ("After", [0, 0, 2, 0, 0, 0, 0, 0])
    ]  # fmt: skip


def test_what_was_left_out_and_where(report: dict[str, Any], tmp_path: Path) -> None:
    """Of answers that are too long, and of other bad rows; in Markdown and on the page."""
    data = report["data"]["talks"]
    text = write_sft_report(report, tmp_path / "none") and (tmp_path / "none/report.md").read_text("utf-8")
    assert "| talks | 4,321 | 98,765 | 77 | 2 | 0 | 0 | 0 |" in text and "the first" not in text
    data["train"] |= {"left_out": 1200, "cut": 31}
    data["heldout"]["left_out"] = 5
    data |= {"too_long": ["a.jsonl, line 8: 99 tokens", "a.jsonl, line 9: 98 tokens"], "problems": ["line 3: empty"]}
    for among in (False, True):
        data["problems"] += data["too_long"] if among else []
        write_sft_report(report, tmp_path / f"some{among}")
        html, text = ((tmp_path / f"some{among}/report.{kind}").read_text("utf-8") for kind in ("html", "md"))
        assert "| Bad rows left out | Too long, left out | Too long, cut | Held out, too long |" in text
        assert "| 2 | 1,200 | 31 | 5 |" in text and '<td data-label="Held out, too long">5</td>' in html
        assert "Bad rows of talks, the first: line 3: empty." in text
        words = "a window of 64 tokens with their context" + " (among the bad rows)" * among
        assert f"{words}, the first: a.jsonl, line 8: 99 tokens; a.jsonl, line 9" in text and words in html


def samples(report: dict[str, Any]) -> Table:
    (found,) = (b for b in blocks(report) if isinstance(b, Table) and b.samples)
    return found


def test_the_parents_answers_stand_beside_where_there_are_any(report: dict[str, Any]) -> None:
    assert samples(report).header == ("Prompt", "Before", "After")
    report["answers"]["parent"] = {"prompts": [{"prompt": "Is <3> odd?", "answer": "Indeed."}]}
    assert samples(report).header == ("Prompt", *(name for _, name in SIDES))
    assert samples(report).rows[0][1:3] == ("Indeed.", "(nothing)")
    report["answers"]["parent"] = None
    assert samples(report).header == ("Prompt", "Before", "After")


def test_without_questions_and_prompts(report: dict[str, Any], tmp_path: Path) -> None:
    report["answers"] = {what: {"prompts": [], "heldout": []} for what in ("before", "after")}
    write_sft_report(report, tmp_path)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "## Data" in text and "Held-out questions" not in text and "whole" not in text


def test_one_conversation_has_no_standard_error(report: dict[str, Any], tmp_path: Path) -> None:
    report["after"] = bound(2.345, math.nan)
    write_sft_report(report, tmp_path)
    kept = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert kept["after"]["stderr_nats_per_token"] is None and "2.345 nats/token" in summary(kept)
    assert "| after | 2.345 | 0.586 |" in (tmp_path / "report.md").read_text("utf-8")
    assert math.isnan(report["after"]["stderr_nats_per_token"]), "the caller's report is left alone"
