"""The Countdown fine-tune: its puzzles, its recipe, two steps of it on a tiny model, its answers judged."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from diffulm.data.conversations import format_of
from diffulm.sft import sft
from diffulm.tokenizer import encode, load_tokenizer
from diffulm.train.config import Recipe, load_recipe

from .conftest import build_parent, build_tokenizer

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "puzzles.py"


@pytest.fixture(scope="module")
def script() -> Any:
    """examples/puzzles.py as a module."""
    spec = importlib.util.spec_from_file_location("puzzles", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe() -> Recipe:
    return load_recipe(ROOT / "recipes" / "countdown-diffugpt.toml")


def test_the_settings_and_what_the_header_says_of_them() -> None:
    asked, text = recipe(), (ROOT / "recipes" / "countdown-diffugpt.toml").read_text(encoding="utf-8")
    train, data = asked.train, asked.data
    assert (asked.task, train.batch, data.length, asked.eval.steps) == ("sft", 1024, 64, 20)
    assert train.steps == -(-500_000 * 600 // 1024) and train.learning_rate == 3e-4
    assert f"{train.steps * train.batch * data.length:,} = {train.steps:,} steps x 1024 x 64" in text
    assert round(train.warmup * train.steps) == 2000
    assert asked.sft.eos_padding == "window" and asked.sft.split_digits and asked.noise.form == "rate"


def test_puzzles_are_different_solvable_and_fit_the_window(script: Any) -> None:
    made = list(script.puzzles(3000, 4, 0, set()))
    assert len({p.key for p in made}) == 3000 and all(script.is_solution(p.given, p.solution) for p in made)
    # Start token, puzzle, start token and separator, solution, end: at most a token a character.
    assert max(4 + len(p.given) + len(p.solution) for p in made) <= recipe().data.length
    avoid = {p.key for p in made[:100]}
    others = list(islice(script.puzzles(200, 4, 0, avoid), 100))
    assert [p.given for p in others] == [p.given for p in made[100:200]], "what is avoided is left out, no more"
    assert format_of({"input": "1,2,3", "output": "1+2=3"}) == "input/output"


def test_two_steps_of_the_recipe(script: Any, tmp_path: Path) -> None:
    lines = subprocess.run(
        [sys.executable, str(SCRIPT), "60"], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    (tmp_path / "puzzles.jsonl").write_text(lines)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["======"])  # a token of GPT-2's
    parent = build_parent(tmp_path / "parent", "gpt2", tokenizer=tokenizer)
    asked = recipe()
    (source,) = asked.data.sources
    tiny = dataclasses.replace(
        asked,
        model=dataclasses.replace(asked.model, parent=str(parent)),
        data=dataclasses.replace(
            asked.data, heldout_fraction=0.2,
            sources=(dataclasses.replace(source, path=str(tmp_path / "puzzles.jsonl")),),
        ),
        train=dataclasses.replace(
            asked.train, batch=4, micro_batch=2, steps=2, dtype="float32", compile="off", heldout_evaluations=1
        ),
        eval=dataclasses.replace(asked.eval, windows=4, draws=2, steps=2),
        sft=dataclasses.replace(asked.sft, answers=3),
    )  # fmt: skip
    report = sft(tiny, tmp_path / "run", device="cpu", say=lambda text: None)
    assert [row["step"] for row in report["train"]] == [1, 2] and all(0 < r["loss"] < 100 for r in report["train"])
    counts = report["data"]["countdown"]
    assert counts["train"]["answers"] + counts["heldout"]["answers"] == 60
    saved = load_tokenizer(tmp_path / "run/model")
    assert len(encode(saved, "15,44")) == 5, "a token for every digit"
    heldout = report["answers"]["after"]["heldout"]
    assert len(heldout) == 3 and all(row["question"].endswith("======") for row in heldout)
    # True answers in place of the model's are solved, its own (after two steps) are judged and not.
    assert script.solved(tmp_path / "run/report.json") == (0, 3)
    for row in heldout:
        row["answer"] = row["truth"]
    (tmp_path / "other.json").write_text(json.dumps(report))
    said = subprocess.run(
        [sys.executable, str(SCRIPT), "--score", str(tmp_path / "other.json")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.startswith("solved 3 of 3 held-out puzzles")
