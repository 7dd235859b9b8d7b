"""The whole suite on a tiny model, as a user would run it: every task, text and figure, twice."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import diffulm
from diffulm.convert import convert
from diffulm.eval import paper, paper_tasks, quality
from diffulm.eval.evaluate import Plan, evaluate
from diffulm.eval.generate import How
from diffulm.eval.generation_tasks import GENERATION
from diffulm.eval.protocol import PaperProtocol
from diffulm.eval.tasks import TASKS, TEXTS, documents_of

pytest.importorskip("lm_eval", reason="needs the extra eval")
pytest.importorskip("rouge_score", reason="needs the extra eval")

from .test_generation_tasks import MBPP
from .test_generation_tasks import variants as asked_variants
from .test_generation_tasks import write as write_asked
from .test_harness import variants as scored_variants
from .test_tasks import GOLDEN, mmlu_records
from .test_tasks import write as write_scored

#: The target that the suite is held to: seconds of one core, whatever else the machine does.
SECONDS = 180
ARTICLES = " \n = One = \n \n The quick brown fox jumps over the lazy dog . \n = Two = \n \n " + "It does so . " * 20


@pytest.fixture(scope="module")
def checkpoint(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny parent converted, with windows in which exemplars have some room."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("suite") / "model"
    convert(str(parent), folder, trained_length=128)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with all of the catalogue: twelve invented records of each task, in the formats of the files."""
    path = tmp_path_factory.mktemp("data")
    for name in GOLDEN:
        write_scored(path, name, scored_variants(name, 12))
    write_scored(path, "mmlu", mmlu_records())
    for name, task in GENERATION.items():
        shown = [{**MBPP, "task_id": i} for i in (2, 3, 4)] if name == "mbpp" else []
        write_asked(path, name, shown + asked_variants(name, 12))
        if task.shown.endswith(".gz"):
            write_asked(path, name, asked_variants(name, 6), task.shown)
    for file in TEXTS.values():
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_bytes(gzip.compress(ARTICLES.encode()))
    return path


def numbers(value: Any) -> Iterator[float]:
    """Every number in a report."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value


@pytest.mark.slow
def test_the_whole_suite_in_three_minutes(checkpoint: Path, parent: Path, folder: Path, tmp_path: Path) -> None:
    began = sum(os.times()[:4])
    names = ("all", "generation", *TEXTS)
    plan = Plan(names, folder, limit=3, draws=8, how=How(max_tokens=6, steps=3, execute=True))
    common: dict[str, Any] = {"parent": str(parent), "out": tmp_path, "dtype": "float32", "device": "cpu"}
    report = evaluate(str(checkpoint), plan, **common)
    kept = (tmp_path / "scores.jsonl").read_bytes()
    again = evaluate(str(checkpoint), plan, **common)
    model = diffulm.load(checkpoint, dtype="float32", device="cpu")
    how = quality.Sampling(step_counts=(2, 4), samples=4, max_tokens=8, prompt_tokens=8)
    judge = quality.judge_rater(str(parent), model)
    free = quality.measure(model, judge, how, documents=documents_of("wikitext2", folder))
    rules, out = PaperProtocol(rates=4), tmp_path / "paper"
    released = paper.evaluate(model, paper_tasks.ORDER, folder, rules, limit=3, out=out, execute=True)
    written = (out / "scores.jsonl").read_bytes()
    released_again = paper.evaluate(model, paper_tasks.ORDER, folder, rules, limit=3, out=out, execute=True)
    seconds = sum(os.times()[:4]) - began

    # Every task of the catalogue, with figures of both models.
    assert [task["task"] for task in report["tasks"]] == list(TASKS)
    assert [task["task"] for task in report["generation"]] == list(GENERATION)
    assert [text["text"] for text in report["texts"]] == list(TEXTS)
    for task in (*report["tasks"], *report["generation"]):
        assert task["documents"] == (114 if task["task"] == "mmlu" else 3) and task["left_out"] == 0
        main = [name for name in task["figures"] if name.partition(",")[0] == task["metric"]]
        assert main, task["task"]
        for name, figure in task["figures"].items():
            for side in ("model", "parent"):
                assert math.isfinite(figure[side]["value"]), (task["task"], name)
            if name != "perplexity":
                assert all(figure[side]["stderr"] is not None for side in ("model", "parent"))
                assert math.isfinite(figure["paired"]["difference"])
    for text in report["texts"]:
        assert text["model"]["bits_per_byte"] > 0 < text["parent"]["bits_per_byte"] and text["paired"]
    assert [(row["kind"], row["steps"]) for row in free["rows"]] == [
        ("text", None), ("unconditional", 2), ("unconditional", 4), ("conditional", 2), ("conditional", 4)
    ]  # fmt: skip
    assert all(row["perplexity"] and row["entropy"] for row in free["rows"])
    assert [row["task"] for row in released["tasks"]] == list(paper_tasks.ORDER)
    assert all(row["documents"] == 3 and row["figures"] for row in released["tasks"])
    for found in (report, free, released):
        json.dumps(found, allow_nan=False)
        assert all(math.isfinite(value) for value in numbers(found))

    # The same again adds nothing and says the same.
    assert (tmp_path / "scores.jsonl").read_bytes() == kept and (out / "scores.jsonl").read_bytes() == written
    for part in ("tasks", "generation"):
        assert [t["figures"] for t in again[part]] == [t["figures"] for t in report[part]]
    assert [t["model"] for t in again["texts"]] == [t["model"] for t in report["texts"]]
    assert [t["figures"] for t in released_again["tasks"]] == [t["figures"] for t in released["tasks"]]

    # Every document, both models side by side.
    lines = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().split("\n") if line]
    for name in (*TASKS, *GENERATION):
        mine = [line for line in lines if line["task"] == name]
        ways = 2 if name in GENERATION and GENERATION[name].hole else 1
        assert len(mine) == (114 if name == "mmlu" else 3 * ways)
        assert all({"model", "parent"} <= line.keys() for line in mine), name
    assert "Written texts" in (tmp_path / "report.md").read_text() and (tmp_path / "report.html").is_file()
    assert seconds < SECONDS, f"the suite took {seconds:.0f} s of a core"
