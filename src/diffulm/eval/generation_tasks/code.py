"""Programs judged by their tests: HumanEval, MBPP, and a line of a HumanEval solution to be filled in."""

from __future__ import annotations

import re

from .. import extract
from ..schemas import Record, check_text, check_texts
from .task import Generation

_BLOCK = re.compile(r"```(?:python)?\n(.*?)(?:```|\Z)", re.DOTALL)


def _human(r: Record) -> Record:
    check_text(r, "task_id", "prompt", "entry_point", "test")
    return r


def _human_hole(r: Record) -> Record:
    check_text(r, "suffix", "canonical_solution")
    if not r["canonical_solution"].strip():
        raise ValueError("canonical_solution is empty")
    return _human(r)


def _mbpp(r: Record) -> Record:
    check_text(r, "text", "code", "test_setup_code")
    if type(r["task_id"]) is not int:
        raise TypeError("task_id must be a whole number")
    tests = [test.replace("\r\n", "\n") for test in check_texts(r["test_list"], "test_list", 3)]
    return {**r, "code": r["code"].replace("\r\n", "\n"), "test_list": tests, "is_fewshot": True}


def _part(r: Record) -> str:
    """MBPP's splits by number: 11-510 are scored, 2-4 shown (as lm-eval does)."""
    return "scored" if 11 <= r["task_id"] <= 510 else "shown" if r["task_id"] in (2, 3, 4) else ""


def checked(record: Record, answer: str) -> str:
    """A HumanEval program: what was given, what was written, the record's tests."""
    return f"{record['prompt']}{answer}{record.get('suffix', '')}\n{record['test']}\ncheck({record['entry_point']})\n"


def tested(record: Record, answer: str) -> str:
    """An MBPP program."""
    return "\n".join([answer, record["test_setup_code"], *record["test_list"], ""])


def _code(record: Record, text: str) -> str:
    """What stands in a fence, if there is one."""
    found = _BLOCK.search(text)
    return found.group(1) if found else text


_NO_FUNCTIONS = {"metric_list": [{"metric": "exact_match"}], "filter_list": None, "unsafe_code": False}

TASKS = [
    Generation(
        "humaneval", "humaneval/HumanEval.jsonl.gz", _human, "pass@1", packaged="humaneval/humaneval.yaml",
        program=checked, changes=_NO_FUNCTIONS, cap=256,
    ),
    Generation(
        "mbpp", "mbpp/mbpp_full.jsonl.gz", _mbpp, "pass@1", _code, packaged="mbpp/mbpp.yaml", program=tested,
        changes=_NO_FUNCTIONS, role=_part, shots=3, cap=256,
    ),
    Generation(
        "humaneval_infilling", "humaneval_infilling/HumanEval-SingleLineInfilling.jsonl.gz", _human_hole, "pass@1",
        hole=lambda r: (r["prompt"], r["canonical_solution"], r["suffix"]), program=checked,
        whole=extract.first_line, cap=24,
        remark="156 of the 1,033 lines are the last of their function and have nothing behind them",
    ),
]  # fmt: skip
