"""A reused mask token in a task's text: counted, and left out of the scores of model and parent alike."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import diffulm
from diffulm.convert import convert
from diffulm.eval import quality
from diffulm.eval.evaluate import Plan, evaluate
from diffulm.eval.generate import Ask, How, Writer
from diffulm.eval.rate import Rater, diffusion_scorer, parent_rater

pytest.importorskip("lm_eval", reason="needs the extra eval")

from ..conftest import CORPUS, build_parent, build_tokenizer
from .test_generation_tasks import STORY
from .test_generation_tasks import write as write_asked
from .test_tasks import write as write_scored

#: An ordinary token of the tests' tokenizer: " dog".
TOKEN = "Ġdog"


@pytest.fixture(scope="module")
def reusing(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny parent converted with " dog" for its mask token."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reusing") / "llama"
    convert(str(parent), folder, trained_length=64, mask_token=TOKEN)
    return folder


def goal(text: str, *options: str) -> dict[str, Any]:
    return {"goal": text, "sol1": options[0], "sol2": options[1], "label": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    asked = ["who flew", "who saw the dog", "who fed a dog and why", "who fell"]
    write_asked(path, "nq_open", [{"question": text, "answer": ["Ann"]} for text in asked])
    stories = [STORY, {**STORY, "InputSentence2": "She saw a dog."}, {**STORY, "InputSentence4": "She saw a dog."}]
    # The truth is told by its length alone, so a mask token in it is no obstacle.
    stories.append({**STORY, "InputSentence3": "She saw a dog."})
    write_asked(path, "rocstories", stories)
    write_scored(path, "piqa", [
        goal("Feed it", "milk", "ink"), goal("Feed a dog", "milk", "ink"), goal("Pet a", "dog", "cup"),
        goal("Walk a", "dog out", "cup"),
    ])  # fmt: skip
    return path


def test_documents_with_the_mask_token_are_left_out_on_both_sides(
    reusing: Path, parent: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = Plan(("nq_open", "rocstories", "piqa"), folder, fewshot=0, draws=3, how=How(max_tokens=4))
    out = tmp_path / "out"
    with caplog.at_level(logging.WARNING, "diffulm"):
        report = evaluate(str(reusing), plan, parent=str(parent), out=out, dtype="float32", device="cpu")
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert said == [
        f"{name}: left out on both sides because of the mask token: {count} documents"
        for name, count in (("nq_open", 2), ("rocstories", 2), ("piqa", 1))
    ]
    found = {task["task"]: task for task in (*report["generation"], *report["tasks"])}
    counts = {name: (task["documents"], task["left_out"]) for name, task in found.items()}
    assert counts == {"nq_open": (2, 2), "rocstories": (2, 2), "piqa": (3, 1)}
    assert all("mask token, which is ordinary text here" in task["remark"] for task in found.values())
    lines = [json.loads(line) for line in (out / "documents.jsonl").read_text().split("\n") if line]
    kept = {name: {line["id"] for line in lines if line["task"] == name} for name in found}
    assert kept == {
        "nq_open": {"nq_open/0", "nq_open/3"},
        "rocstories": {"rocstories/0", "rocstories/3"},
        "piqa": {"piqa/0", "piqa/1", "piqa/3"},
    }
    for line in lines:
        assert line["model"].keys() == line["parent"].keys() and line["parent"]["metrics"], "both sides, every document"
        if line["id"] == "piqa/3":
            assert [[s["skipped"] for s in line[side]["scores"]] for side in ("model", "parent")] == [[1, 0]] * 2
    for task in found.values():
        assert all({"model", "parent", "paired"} <= figure.keys() for figure in task["figures"].values())


def test_nothing_is_left_of_some_tasks(reusing: Path, folder: Path) -> None:
    write_asked(folder, "nq_open", [{"question": "who saw the dog", "answer": ["Ann"]}])
    write_scored(folder, "piqa", [goal("Pet a", "dog", "cup")])
    for name, words in (
        ("nq_open", r"every prompt of nq_open holds the mask token 'Ġdog'; leave the task out"),
        ("piqa", "every question of piqa has an option that is the mask token alone; leave the task out"),
    ):
        plan = Plan((name,), folder, fewshot=0, draws=3, how=How(max_tokens=4))
        with pytest.raises(ValueError, match=words):
            evaluate(str(reusing), plan, dtype="float32", device="cpu")


def test_a_token_of_one_vocabulary_is_not_skipped_in_another(reusing: Path, parent: Path, tmp_path: Path) -> None:
    """A parent with another tokenizer scores the token that happens to have the mask token's number."""
    model = diffulm.load(reusing, dtype="float32")
    child = Rater(diffusion_scorer(model), model.tokenizer, "model")
    assert child.scorer.skip == model.process.mask_token_id
    assert parent_rater(str(parent), child).scorer.skip == child.scorer.skip
    other = build_parent(tmp_path / "other", tokenizer=build_tokenizer(size=380))
    assert parent_rater(str(other), child).scorer.skip is None


def test_only_what_the_model_is_given_counts(reusing: Path) -> None:
    """A front that is cut away anyway, and a hole's truth, may hold the token; a parent may hold it anywhere."""
    model = diffulm.load(reusing, dtype="float32")
    writer = Writer(Rater(diffusion_scorer(model), model.tokenizer, "model"), How(), model)
    assert writer.holds_mask(Ask("who saw the dog", 4)) and not writer.holds_mask(Ask("who saw it", 4))
    assert not writer.holds_mask(Ask("a dog" + " it runs" * 60, 4))
    assert writer.holds_mask(Ask("It", 4, suffix=" saw a dog", length=4))
    assert not writer.holds_mask(Ask("It", 4, suffix=" saw a cat", length=4))
    exact = replace(writer.rater, scorer=replace(writer.rater.scorer, process=None, layout=diffulm.layout.Causal()))
    assert not Writer(exact, How()).holds_mask(Ask("who saw the dog", 4))


def test_quality_counts_the_documents_that_it_leaves_out(reusing: Path, parent: Path) -> None:
    model = diffulm.load(reusing, dtype="float32")
    how = quality.Sampling(step_counts=(2,), samples=2, max_tokens=4, prompt_tokens=8)
    judge = quality.judge_rater(str(parent), model)
    texts = ["The lazy dog and the quick brown fox jump over it. It does so every day.", *CORPUS[1:3]]
    report = quality.measure(model, judge, how, documents=texts)
    assert report["flags"][0] == "left out because they hold the mask token: 1 documents"
    assert not any("left out" in flag for flag in quality.measure(model, judge, how, documents=CORPUS[1:3])["flags"])
    with pytest.raises(ValueError, match="and no mask token among them"):
        quality.measure(model, judge, how, documents=texts[:1])
