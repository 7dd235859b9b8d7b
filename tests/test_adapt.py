"""The main job on a tiny parent: report keys, a model that works, resuming, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import diffulm
from diffulm.adapt import adapt
from diffulm.job import arm as arm_module
from diffulm.job.folder import MARKER, claim
from diffulm.train.config import DataConfig, EvalConfig, ModelConfig, Recipe, SourceConfig, TrainConfig
from diffulm.train.metrics import CLOCK, read_metrics

from .conftest import CORPUS

job_module: Any = sys.modules["diffulm.adapt"]  # `diffulm.adapt` is the function


def write_text(folder: Path, documents: int = 40) -> Path:
    """A jsonl file of short documents, all different."""
    path = folder / "text.jsonl"
    lines = [
        CORPUS[i % 4] + f" This is number {i} of {documents}, and {i * i} is its square." for i in range(documents)
    ]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return path


def tiny_recipe(parent: Path, text: Path, **train: Any) -> Recipe:
    budget = {"batch": 4, "micro_batch": 2, "learning_rate": 2e-2, "steps": 6, "dtype": "float32", "compile": "off"}
    return Recipe(
        name="tiny",
        model=ModelConfig(parent=str(parent)),
        data=DataConfig(sources=(SourceConfig("text", str(text)),), length=32, heldout_fraction=0.2),
        train=TrainConfig(**{**budget, **train}),
        eval=EvalConfig(
            windows=6, draws=2, prompts=("The quick",), infills=(("def add(a, b):\n", "    return", " a + b"),),
            max_tokens=5, steps=3,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def recipe(parent: Path, text: Path) -> Recipe:
    return tiny_recipe(parent, text, annealing=0.5)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """(folder, report, what was said) of one whole run with the control arm."""
    out, said = tmp_path_factory.mktemp("runs") / "one", []
    report = adapt(recipe, out, command="diffulm adapt tiny", say=said.append)
    return out, report, said


Finished = tuple[Path, dict[str, Any], list[str]]


def test_the_report_has_every_number_of_the_contract(finished: Finished, recipe: Recipe) -> None:
    out, report, _ = finished
    assert json.loads((out / "report.json").read_text()) == report
    for what in ("parent", "parent_continued", "before", "after"):
        row = report[what]
        for key in ("bits_per_byte", "stderr", "nats_per_token", "stderr_nats_per_token"):
            assert isinstance(row[key], float) and math.isfinite(row[key]) and row[key] > 0, (what, key)
        assert row["kind"] == ("exact" if what.startswith("parent") else "NELBO")
    assert report["recipe"] == "tiny" and report["dtype"] == "float32" and report["command"] == "diffulm adapt tiny"
    assert report["tokens"] == 6 * 4 * 32 and 0 < report["seconds"] <= report["total_seconds"] + 0.1
    assert report["peak_memory_bytes"] > 2**26 and report["threads"] == torch.get_num_threads()
    assert {"diffulm", "torch", "transformers", "python"} <= report["versions"].keys() and "cores" in report["machine"]
    held = report["heldout"]
    assert held["windows"] == 6 == held["documents"] and held["tokens"] > 100 and 0 <= held["overlap_13gram"] <= 1
    assert (report["parent"]["draws"], report["after"]["draws"]) == (1, 2)
    assert report["after"]["forwards"] == 12 and report["after"]["seed"] == recipe.train.seed
    assert all(row["level"] > 0 for row in report["after"]["by_level"])
    gain = report["before"]["nats_per_token"] - report["after"]["nats_per_token"]
    assert report["gain"]["nats_per_token"] == pytest.approx(gain) and report["gain"]["stderr"] > 0
    assert [r["step"] for r in report["train"]["adapted"]] == [1, 2, 3, 4, 5, 6]
    assert [r["annealing"] for r in report["train"]["adapted"]] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert len(report["projection"]["points"]) == 6 and report["projection"]["statement"]
    for name in ("report.md", "report.html"):
        assert f"{report['after']['bits_per_byte']:.3f}" in (out / name).read_text(encoding="utf-8")


def test_training_helped(parent: Path, text: Path, tmp_path: Path) -> None:
    """Enough steps that the order of the text does not decide it."""
    report = adapt(tiny_recipe(parent, text, annealing=0.5, steps=30), tmp_path / "run", say=lambda line: None)
    assert report["after"]["bits_per_byte"] < report["before"]["bits_per_byte"] - 0.2
    assert report["parent_continued"]["bits_per_byte"] < report["parent"]["bits_per_byte"] - 0.2


def test_the_control_saw_the_same(finished: Finished) -> None:
    out = finished[0]
    adapted, control = read_metrics(out / "adapted"), read_metrics(out / "continued")
    assert len(adapted) == len(control) == 6
    for a, b in zip(adapted, control, strict=True):
        assert (a["step"], a["tokens"], a["learning_rate"]) == (b["step"], b["tokens"], b["learning_rate"])
    assert all(r["annealing"] == 1.0 for r in control), "the parent's attention stays causal"


def test_samples(finished: Finished, recipe: Recipe) -> None:
    samples = finished[1]["samples"]
    (completion,), (infill,) = samples["completions"], samples["infills"]
    assert completion["prompt"] == "The quick" and {"parent", "after"} <= completion.keys()
    assert infill["truth"] == "    return" and {"before", "after"} <= infill.keys() and "3 steps" in samples["settings"]


def test_the_model_is_an_ordinary_checkpoint_that_generates(finished: Finished, recipe: Recipe) -> None:
    from transformers import AutoModelForCausalLM

    out, report, _ = finished
    model = diffulm.load(out / "model", dtype="float32")
    assert isinstance(diffulm.generate(model, "The quick", max_tokens=4), str)
    assert model.config["tokens_seen"] == report["tokens"] and model.config["trained_length"] == 32
    assert model.parent == recipe.model.parent and "tiny" in (out / "model" / "README.md").read_text()
    stock = AutoModelForCausalLM.from_pretrained(out / "model")
    assert stock.config.is_causal is False and stock.config.mask_token_id == model.process.mask_token_id
    control = AutoModelForCausalLM.from_pretrained(out / "control")
    assert getattr(control.config, "is_causal", True) is not False, "the control stays autoregressive"
    weights = {k: v.clone() for k, v in stock.state_dict().items()}
    before = AutoModelForCausalLM.from_pretrained(out / "init").state_dict()
    assert all(not torch.equal(weights[k], before[k]) for k in weights), "every tensor was trained"


def test_the_same_call_again_is_done_without_work(
    finished: Finished, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report, _ = finished
    for name in ("convert_stage", "data_stage", "score", "train_arm", "sample_stage"):
        monkeypatch.setattr(job_module, name, lambda *a, **k: pytest.fail("work was done"))
    said: list[str] = []
    assert adapt(recipe, out, say=said.append) == report
    assert len(said) == 1 and "is finished" in said[0] and "report.html" in said[0]


def test_it_says_what_it_does(finished: Finished) -> None:
    said = "\n".join(finished[2])
    for word in ("converting", "preparing text", "tokens to train on", "scoring parent", "training the diffusion model",
                 "training the parent on the same text", "bits/byte", "drawing samples"):  # fmt: skip
        assert word in said


def test_other_settings_in_the_same_folder_are_refused_by_name(finished: Finished, recipe: Recipe) -> None:
    out = finished[0]
    train = dataclasses.replace(recipe.train, learning_rate=1e-2, seed=5)
    with pytest.raises(ValueError, match=r"other settings \(train.learning_rate, train.seed differ\)"):
        adapt(dataclasses.replace(recipe, train=train), out, say=lambda s: None)
    with pytest.raises(ValueError, match=r"\(name differ\)"):
        adapt(dataclasses.replace(recipe, name="other"), out, say=lambda s: None)
    with pytest.raises(ValueError, match=r"\(control differ\)"):
        adapt(recipe, out, control=False, say=lambda s: None)


def test_a_folder_that_holds_something_else_is_refused_untouched(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="no diffulm run; choose another --out"):
        adapt(recipe, tmp_path, say=lambda s: None)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="no diffulm run"):
        adapt(recipe, tmp_path / "thesis.tex", say=lambda s: None)


NUMBERS = ("bits_per_byte", "stderr", "nats_per_token", "by_level", "forwards", "seed")


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what a clock or a path decides."""
    arms = {
        arm: [{k: v for k, v in row.items() if k not in CLOCK} for row in rows] for arm, rows in report["train"].items()
    }
    scores = {k: {n: report[k][n] for n in NUMBERS} for k in ("parent", "before", "after", "parent_continued")}
    return {"train": arms, "gain": report["gain"], "samples": report["samples"], "heldout": report["heldout"], **scores}


def weights_of(out: Path, what: str) -> bytes:
    return (out / what / "model.safetensors").read_bytes()


STAGES = [
    "convert",
    "data_stage",
    "score",
    "train_arm",
    "parent_folder",
    "sample_stage",
    "build_report",
    "write_report",
]


@pytest.mark.parametrize(
    ("stage", "when"),
    [
        pytest.param(stage, when, marks=() if (stage, when) == ("score", "after") else pytest.mark.slow)
        for stage in STAGES
        for when in ("before", "after")
    ],
)
def test_interrupted_anywhere_the_same_call_finishes_the_same(
    finished: Finished, recipe: Recipe, tmp_path: Path, stage: str, when: str
) -> None:
    """Ctrl-C at either end of every stage, over and over until it is through: the numbers of an undisturbed run."""
    expected = finished[1]
    out = tmp_path / "run"
    place = arm_module if stage == "convert" else job_module
    real: Callable[..., Any] = getattr(place, stage)
    interruptions = 0
    for attempt in range(12):
        calls = 0

        def once(*a: Any, after: int = attempt, **k: Any) -> Any:
            nonlocal calls
            calls += 1
            if when == "before" and calls > after:
                raise KeyboardInterrupt
            done = real(*a, **k)
            if when == "after" and calls > after:
                raise KeyboardInterrupt
            return done

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, stage, once)
            try:
                report = adapt(recipe, out, command="diffulm adapt tiny", say=lambda s: None)
                break
            except KeyboardInterrupt:
                interruptions += 1
    assert interruptions >= 1 and figures(report) == figures(expected)
    for what in ("model", "control"):
        assert weights_of(out, what) == weights_of(finished[0], what)


def test_a_report_half_written_is_written_again(finished: Finished, recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    (out / "report.html").unlink()
    (out / "report.md").unlink()
    assert adapt(recipe, out, say=lambda s: None) == finished[1]
    assert (out / "report.html").read_bytes() == (finished[0] / "report.html").read_bytes()
    assert (out / "report.md").is_file()


def test_leftovers_of_a_kill_are_no_obstacle(recipe: Recipe, finished: Finished, tmp_path: Path) -> None:
    """The marker half written; a folder aside; both are gone when the run goes on."""
    out = tmp_path / "run"
    out.mkdir()
    (out / f".{MARKER}.123.tmp").write_text('{"rec')
    claim(out, recipe, True)
    (out / ".init.123.tmp").mkdir()
    claim(out, recipe, True)
    assert [p.name for p in out.iterdir()] == [MARKER]


def test_a_single_document_leaves_nothing_to_measure_with(parent: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("One long text. " * 50)
    with pytest.raises(ValueError, match="give at least two documents"):
        adapt(tiny_recipe(parent, path), tmp_path / "run", say=lambda s: None)


def test_text_shorter_than_a_window(parent: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"shorter than one window.*; add text"):
        adapt(tiny_recipe(parent, path), tmp_path / "run", say=lambda s: None)


def test_without_the_control_arm(recipe: Recipe, finished: Finished, tmp_path: Path) -> None:
    report = adapt(recipe, tmp_path / "run", control=False, say=lambda s: None)
    assert "parent_continued" not in report and not (tmp_path / "run" / "control").exists()
    assert report["after"]["bits_per_byte"] == finished[1]["after"]["bits_per_byte"]


def test_block_layout_end_to_end(parent: Path, text: Path, tmp_path: Path) -> None:
    base = tiny_recipe(parent, text, steps=2)
    model = ModelConfig(parent=str(parent), layout="block", source="own", block_size=4)
    evaluation = EvalConfig(windows=4, draws=2)
    recipe = dataclasses.replace(base, model=model, eval=evaluation)
    report = adapt(recipe, tmp_path / "run", control=False, say=lambda s: None)
    assert report["tokens"] == 2 * 4 * 32 and math.isfinite(report["after"]["bits_per_byte"])


def test_a_budget_in_minutes_is_kept_and_shared_by_the_control(parent: Path, text: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(parent, text, steps=None, minutes=0.003)
    report = adapt(recipe, tmp_path / "run", say=lambda s: None)
    steps = [
        json.loads((tmp_path / "run" / arm / "budget.json").read_text())["steps"] for arm in ("adapted", "continued")
    ]
    assert steps[0] == steps[1] == len(report["train"]["adapted"]) == len(report["train"]["continued"])


def test_bad_input_leaves_nothing_a_corrected_command_would_trip_over(parent: Path, tmp_path: Path) -> None:
    wrong_model = Recipe(model=ModelConfig(parent=str(tmp_path / "nowhere")), train=TrainConfig(steps=1))
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    data = DataConfig(sources=(SourceConfig("text", str(empty)),), length=16)
    wrong_text = Recipe(model=ModelConfig(parent=str(parent)), data=data, train=TrainConfig(steps=1))
    for recipe in (wrong_model, wrong_text):
        with pytest.raises(ValueError, match=r"check the path|has no text"):
            adapt(recipe, tmp_path / "run", say=lambda _: None)
        assert not (tmp_path / "run").exists()
