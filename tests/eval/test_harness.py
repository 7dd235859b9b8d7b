"""`diffulm eval` end to end on tiny models: the parent against lm-eval's own, resume, reports, the command line."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffulm
from diffulm import cli
from diffulm.eval import harness
from diffulm.eval.evaluate import Plan, evaluate
from diffulm.eval.rate import Question, Rater, diffusion_scorer, parent_rater
from diffulm.eval.store import Store, content_key, fingerprint
from diffulm.eval.tasks import TASKS
from diffulm.hub import Model

pytest.importorskip("lm_eval", reason="needs the extra eval")

from .test_tasks import GOLDEN, mmlu_records, write

WORDS = ["fox", "dog", "order", "model", "day", "the", "lazy", "return", "masked", "left"]


def variants(name: str, count: int) -> list[dict[str, Any]]:
    """Records like the golden one with other words at the end of their texts, no two alike."""
    rng = np.random.default_rng(len(name))

    def other(value: Any, key: str, i: int) -> Any:
        if isinstance(value, dict):
            return {k: other(v, k, i) for k, v in value.items()}
        if isinstance(value, list) and key != "label":
            return [other(v, key, i) for v in value]
        fixed = key in ("label", "answer", "answerKey", "gold", "id") or (name == "copa" and key == "question")
        return value if fixed or not isinstance(value, str) else f"{value} {rng.choice(WORDS)} {i}"

    return [other(GOLDEN[name][0], "", i) for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with every task, 12 records each."""
    path = tmp_path_factory.mktemp("data")
    for name in GOLDEN:
        write(path, name, variants(name, 12))
    write(path, "mmlu", mmlu_records())
    (path / "notes.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    torch.set_num_threads(1)
    return diffulm.load(checkpoint, dtype="float32")


def rater(model: Model, **changes: Any) -> Rater:
    return Rater(diffusion_scorer(model, draws=7), model.tokenizer, "model", **changes)


# ------------------------------------------------------------------------------------------------------ the parent


@pytest.mark.parametrize("name", GOLDEN)
def test_the_parent_is_lm_evals_own_model(model: Model, parent: Path, folder: Path, name: str) -> None:
    """Document by document: the same log-likelihoods, flags and metrics as HFLM with the start token added."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    mine = parent_rater(str(parent), rater(model))
    mine.scorer = replace(mine.scorer, length=128)  # as many positions as lm-eval gives it
    stock = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32).eval()
    start = model.tokenizer.bos_token_id

    class Started(HFLM):
        """HFLM behind a start token, which this tokenizer does not add by itself."""

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            behind = [(text, ids if ids[:1] == [start] else [start, *ids], answer) for text, ids, answer in requests]
            return super()._loglikelihood_tokens(behind, *args, **kwargs)

    made = []
    for lm in (harness.language_model(mine), Started(pretrained=stock, tokenizer=mine.tokenizer, batch_size=4)):
        (one,) = harness.build(TASKS[name], folder, 0)
        one.set_config("num_fewshot", 0)
        with harness.quiet():
            one.build_all_requests()
            made.append([lm.loglikelihood(one.instances, disable_tqdm=True), one])
    (ours, one), (theirs, _) = made
    assert len(ours) >= 12 and max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)) < 1e-3
    if one.OUTPUT_TYPE == "loglikelihood":
        assert [a[1] for a in ours] == [bool(b[1]) for b in theirs]
    by_document: dict[int, list[int]] = {}
    for i, request in enumerate(one.instances):
        by_document.setdefault(request.doc_id, []).append(i)
    for d, own in by_document.items():
        document = list(one.task_docs)[d]
        scored = [one.process_results(document, [found[i] for i in own]) for found in (ours, theirs)]
        assert scored[0] == pytest.approx(scored[1], abs=1e-3)


def test_parent_and_child_get_the_same_tokens(model: Model, parent: Path) -> None:
    child = rater(model)
    above = parent_rater(str(parent), child)
    text = "The quick <|mask|> fox"
    assert above.request(above.encode(text), (5,), 1.0) == child.request(child.encode(text), (5,), 1.0)
    assert above.scorer.length == child.scorer.length and above.scorer.process is None
    assert child.scorer.special.mask not in child.encode(text), "a mask token spelt out is text"


# -------------------------------------------------------------------------------------------------------- contract


def test_the_language_model_answers_in_order_and_groups_by_question(model: Model) -> None:
    from lm_eval.api.instance import Instance

    lm = harness.language_model(rater(model))
    made = [
        Instance("loglikelihood", {}, (f"The {w}", f" {o}"), i, ("t", d, 1))
        for d, w in enumerate(["fox", "dog"])
        for i, o in enumerate(["jumps over", "is", "reveals its"])
    ]
    made += [Instance("loglikelihood", {}, ("", "dog"), 0, ("t", 2, 1))]
    answers = lm.loglikelihood(made)
    alone = [lm.loglikelihood(made[3:6]), lm.loglikelihood(made[:3])]
    assert [a[0] for a in answers[:6]] == pytest.approx([a[0] for a in alone[1] + alone[0]], abs=1e-4)
    assert answers[6][0] == pytest.approx(-diffulm.score(model, "", "dog").nats, abs=1e-4)
    assert all(value < 0 for value, _ in answers) and set(lm.details) == {("t", 0), ("t", 1), ("t", 2)}
    (rolling,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("The dog. " * 30,), 0, ("t", 0, 1))])
    assert rolling < -100
    with pytest.raises(ValueError, match="t, document 7: an option is empty"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("a", ""), 0, ("t", 7, 1))])
    with pytest.raises(ValueError, match="asks for generated text"):
        lm.generate_until([])


def test_chat_template(model: Model) -> None:
    one = rater(model, chat=True)
    lm = harness.language_model(one)
    history = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="has no chat template; leave out --chat-template"):
        lm.apply_chat_template(history)
    try:
        opening = model.tokenizer.bos_token
        model.tokenizer.chat_template = opening + "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        text = lm.apply_chat_template(history)
        assert text == f"{opening}[user] hi"
        ids = one.encode(text)
        start = one.scorer.special.bos
        assert ids[0] == start and one.request(ids, (5,), 1.0).context.count(start) == 1, "one start token, not two"
    finally:
        model.tokenizer.chat_template = None


# ---------------------------------------------------------------------------------------------------------- resume


def test_a_store_keeps_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    store = Store(path)
    store.put({"a": {"x": 1.5}})
    store.put({"b": [1, None]})
    with path.open("ab") as file:
        file.write(b'{"key": "c", "val')
    again = Store(path)
    assert again.values == {"a": {"x": 1.5}, "b": [1, None]} and again.get("c") is None
    again.put({"c": 3})
    assert Store(path).values["c"] == 3
    path.write_bytes(b"{}\n")
    with pytest.raises(ValueError, match="line 1 is damaged"):
        Store(path)


def test_keys_depend_on_what_a_score_depends_on(model: Model) -> None:
    one = rater(model)
    assert one.model_key == rater(model).model_key != Rater(diffusion_scorer(model, draws=8), None, "").model_key
    before = fingerprint(model.denoiser)
    weight = next(model.denoiser.parameters())
    with torch.no_grad():
        weight.mul_(2)
        assert fingerprint(model.denoiser) != before
        weight.div_(2)
    assert fingerprint(model.denoiser) == before and content_key("a", "b") != content_key("ab")


def questions(one: Rater, count: int) -> list[Question]:
    return [
        Question(tuple(one.request(one.encode(f"The {i} fox"), one.encode(f" {w}"), 3.0) for w in WORDS[:3]))
        for i in range(count)
    ]


def test_known_questions_are_not_scored_again(model: Model, tmp_path: Path) -> None:
    calls: list[int] = []
    one = rater(model, store=Store(tmp_path / "s.jsonl"))
    real = one.scorer.denoiser.nll

    class Counting:
        def nll(self, rows: Any) -> Any:
            calls.append(len(rows.ids))
            return real(rows)

    all_ = questions(one, 5)
    part = one.rate(all_[:3])
    again = rater(model, store=Store(tmp_path / "s.jsonl"))
    object.__setattr__(again.scorer, "denoiser", Counting())
    assert again.rate(all_[:3]) == part and not calls, "strict JSON gives the same numbers back"
    whole = again.rate(all_)
    assert calls and whole[:3] == part
    fresh = rater(model).rate(all_)
    gaps = [a.nats - b.nats for (x, _), (y, _) in zip(whole, fresh, strict=True) for a, b in zip(x, y, strict=True)]
    assert np.abs(gaps).max() < 1e-4


def test_progress_tells_what_is_left(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffulm.eval.rate.CHUNK", 2)
    seen: list[tuple[str, int, int, float]] = []
    one = rater(model, on_progress=lambda *a: seen.append(a))
    one.rate(questions(one, 5))
    assert [(label, done, of) for label, done, of, _ in seen] == [("model", n, 5) for n in (0, 2, 4, 5)]
    assert math.isnan(seen[0][3]) and seen[1][3] > seen[2][3] > seen[3][3] == 0


KILLED = """
import sys, time
from pathlib import Path
from diffulm import cli
from diffulm.eval import rate
rate.CHUNK = 1
real = rate.Store.put
def slow(self, entries):
    real(self, entries)
    time.sleep(0.5)
rate.Store.put = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_killed_run_goes_on(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle; the same command keeps what was there and ends as if nothing had happened."""

    def arguments(out: Path) -> list[str]:
        fixed = ["eval", str(checkpoint), "--tasks", "piqa", "--data-dir", str(folder), "--draws", "7"]
        return [*fixed, "--dtype", "float32", "--device", "cpu", "--out", str(out)]

    out = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments(out)], stderr=subprocess.DEVNULL, env=environment
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and child.poll() is None:
        if (out / "scores.jsonl").is_file() and (out / "scores.jsonl").read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.05)
    assert child.poll() is None, "killed too late"
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = (out / "scores.jsonl").read_bytes()
    assert 3 <= kept.count(b"\n") < 12 and not (out / "report.json").exists()
    assert cli.main(arguments(out)) == 0
    lines = (out / "scores.jsonl").read_bytes()
    assert lines.startswith(kept[: kept.rfind(b"\n") + 1]) and lines.count(b"\n") == 12
    assert cli.main(arguments(tmp_path / "whole")) == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("killed", "whole")]
    for report in reports:
        for task in report["tasks"]:
            task.pop("seconds")
    assert reports[0]["tasks"] == reports[1]["tasks"]


# ---------------------------------------------------------------------------------------------- reports, command line

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


def test_eval_beside_the_parent(run: Run, checkpoint: Path, parent: Path, folder: Path, tmp_path: Path) -> None:
    tasks = [f"{','.join(GOLDEN)},mmlu", str(folder / "notes.txt")]
    fixed = ["--data-dir", folder, "--parent", parent, "--draws", "7", "--dtype", "float32", "--device", "cpu"]
    code, text, err = run("eval", checkpoint, "--tasks", *tasks, *fixed, "--out", tmp_path, "--json")
    assert code == 0, err
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert [t["task"] for t in report["tasks"]] == [*GOLDEN, "mmlu"]
    lines = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().split("\n") if line]
    for task in report["tasks"]:
        mine = [line for line in lines if line["task"] == task["task"]]
        assert task["documents"] == len(mine) == (114 if task["task"] == "mmlu" else 12)
        figure = task["figures"][task["metric"]]
        for side in ("model", "parent"):
            values = [line[side]["metrics"][task["metric"]] for line in mine]
            assert figure[side]["value"] == pytest.approx(np.mean(values))
        assert figure["paired"]["difference"] == pytest.approx(figure["model"]["value"] - figure["parent"]["value"])
        assert all(s["forwards"] == 1 and s["stderr"] == 0 for line in mine for s in line["parent"]["scores"])
    (notes,) = report["texts"]
    assert notes["text"] == "notes.txt" and notes["model"]["bits_per_byte"] > 0 < notes["parent"]["bits_per_byte"]
    assert "  parent, mmlu: 114/114" in err and "left 0:00" in err
    markdown, html = ((tmp_path / name).read_text() for name in ("report.md", "report.html"))
    assert "identical prompts" in markdown and "| hellaswag | acc\\_norm | 12 |" in markdown and "<table>" in html
    code, table, _ = run("eval", checkpoint, "--tasks", *tasks, *fixed, "--out", tmp_path)
    assert code == 0 and "hellaswag" in table and "report.html" in table


def test_nelbo_of_a_text_is_the_bound_of_its_windows(checkpoint: Path, folder: Path) -> None:
    plan = Plan((str(folder / "notes.txt"),), draws=8)
    report = evaluate(str(checkpoint), plan, dtype="float64", device="cpu")
    text = (folder / "notes.txt").read_text()
    expected = diffulm.nelbo(diffulm.load(checkpoint, dtype="float64"), [text], draws=8)
    got = report["texts"][0]["model"]
    assert got["tokens"] == expected.tokens and got["forwards"] == expected.forwards
    assert got["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=0.03), "other masks, the same text"
    assert report["texts"][0]["words"] == 270 and got["stderr"] is None, "one document"


def test_few_shots_and_sequential_draws(run: Run, checkpoint: Path, folder: Path) -> None:
    fixed = ["--data-dir", folder, "--dtype", "float32", "--device", "cpu", "--json"]
    code, text, _ = run("eval", checkpoint, "--tasks", "boolq", *fixed, "--fewshot", "2", "--confidence", "0.9")
    report = json.loads(text)
    assert code == 0 and report["tasks"][0]["documents"] == 4 and report["settings"]["fewshot"] == 2
    assert report["parent"] is None and "paired" not in report["tasks"][0]["figures"]["acc"]
    assert report["tasks"][0]["truncated"] > 0, "two exemplars do not fit 64 tokens, and the report says so"


def test_guidance_is_said_and_costs_two_forwards(run: Run, checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    def scored(*options: str) -> dict[str, Any]:
        code, text, _ = run(
            "eval", checkpoint, "--tasks", "boolq", "--data-dir", folder, "--dtype", "float32", "--device", "cpu",
            "--draws", "8", "--json", "--out", tmp_path / "-".join(options), *options,
        )  # fmt: skip
        assert code == 0
        return dict(json.loads(text))

    plain, guided = scored(), scored("--guidance", "2")
    assert "guidance" not in plain["settings"] and guided["settings"]["guidance"] == 2
    assert guided["tasks"][0]["forwards"] == 2 * plain["tasks"][0]["forwards"]
    page = (tmp_path / "--guidance-2/report.md").read_text()
    assert "| Guidance of the model's likelihoods of options | 2.0 |" in page
    assert guided["model"]["kind"] == "guided score" and plain["model"]["kind"] == "NELBO"
    assert "under guidance 2, which bounds no likelihood" in page and "scores are bounds" not in page


def test_what_cannot_be_evaluated(run: Run, checkpoint: Path, parent: Path, folder: Path, tmp_path: Path) -> None:
    def refused(words: str, *arguments: object) -> None:
        code, out, err = run("eval", *arguments)
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1, err

    data = ("--data-dir", folder)
    refused("unknown task 'pica'; did you mean piqa?", checkpoint, "--tasks", "pica", *data)
    refused("is no folder; give the one that holds", checkpoint, "--tasks", "piqa", "--data-dir", tmp_path / "none")
    refused("there is no file", checkpoint, "--tasks", "piqa", "--data-dir", tmp_path)
    refused("need local files; give --data-dir", checkpoint, "--tasks", "piqa", "--offline")
    refused("is not a diffusion checkpoint", parent, "--tasks", "piqa", *data)
    refused("draws must be at least 1, not 0", checkpoint, "--tasks", "piqa", *data, "--draws", "0")
    refused("limit must be at least 1, not 0", checkpoint, "--tasks", "piqa", *data, "--limit", "0")
    refused("fewshot must not be negative", checkpoint, "--tasks", "piqa", *data, "--fewshot", "-1")
    refused("piqa has 8 exemplars, not 9", checkpoint, "--tasks", "piqa", *data, "--fewshot", "9")
    (tmp_path / "empty.txt").write_text("")
    float32 = ("--dtype", "float32", "--device", "cpu")
    code, out, err = run("eval", checkpoint, "--tasks", tmp_path / "empty.txt", *float32)
    assert (code, out) == (2, "") and "empty.txt has no text; give another file" in err
    refused(
        "confidence must lie between 0.5 and 1", checkpoint, "--tasks", "piqa", *data, *float32, "--confidence", "2"
    )
    long = {**GOLDEN["piqa"][0], "sol1": "word " * 90}
    write(tmp_path, "piqa", [long])
    code, out, err = run("eval", checkpoint, "--tasks", "piqa", "--data-dir", tmp_path, *float32)
    assert (code, out) == (2, "") and "the model was trained on 63 behind its start token" in err


def test_accuracy_against_draws(model: Model, folder: Path, tmp_path: Path) -> None:
    """What fewer masks would have said is kept beside the scores, averaged over parts of the same draws, and drawn."""
    plan = Plan(("piqa", "arc_easy"), folder, draws=65)
    out = tmp_path / "out"
    report = evaluate(str(model.name), plan, out=out, dtype="float32")
    for task in report["tasks"]:
        assert [point["draws"] for point in task["by_draws"]] == [4, 8, 16, 32, 64]
        assert all(0 <= point["value"] <= 1 and point["stderr"] >= 0 for point in task["by_draws"])
    assert "Accuracy against masks an option" in (out / "report.html").read_text()
    documents = harness.run(harness.language_model(rater(model)), harness.build(TASKS["piqa"], folder, 0), limit=3)
    assert len(documents) == 3 and all(set(d.fewer) == {4} for d in documents)
    for document in documents:
        for draws, metrics in document.fewer.items():
            sides = [score.fewer[str(draws)] for score in document.scores]
            gold = [int(min(range(len(sides)), key=lambda o: sides[o][r]) == 0) for r in range(len(sides[0]))]
            share = sum(gold) / len(gold)
            assert metrics["acc"] in (share, 1 - share)
