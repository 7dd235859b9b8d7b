"""Quality of free text: figures counted by hand, a judge that is exact, and the trick that is named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import diffulm
from diffulm import cli
from diffulm.denoiser import HFDenoiser
from diffulm.eval import quality
from diffulm.eval.page import drawn, markdown
from diffulm.eval.quality import (
    Sampling,
    distinct_n,
    flags,
    judge_rater,
    longest_repeat,
    measure,
    repeated_share,
    suspicious,
    unigram_entropy,
    write,
    write_by_parent,
)
from diffulm.eval.store import Store
from diffulm.hub import Model, load_parent
from diffulm.runtime import uniforms

from ..conftest import CORPUS, build_parent, build_tokenizer

QUICK = Sampling(step_counts=(2, 6), samples=3, max_tokens=8, prompt_tokens=4, batch=2)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    torch.set_num_threads(1)
    return diffulm.load(checkpoint, dtype="float64")


def test_figures_by_hand() -> None:
    text = [1, 2, 1, 2, 1, 2, 3]
    shares = [3 / 7, 3 / 7, 1 / 7]
    assert unigram_entropy(text) == pytest.approx(-sum(s * math.log(s) for s in shares), abs=1e-12)
    assert distinct_n(text, 1) == 3 / 7
    assert distinct_n(text, 2) == 3 / 6  # 12 21 23
    # Four 4-grams, 1212 2121 1212 2123: one has been there before.
    assert repeated_share(text) == pytest.approx(1 / 4)
    assert longest_repeat(text) == 4  # 1212 at 0 and at 2
    assert (unigram_entropy([7, 7, 7]), distinct_n([7, 7, 7], 2), longest_repeat([7, 7, 7])) == (0.0, 0.5, 2)
    assert (longest_repeat([1, 2, 3]), longest_repeat([1]), longest_repeat([])) == (0, 0, 0)
    assert math.isnan(unigram_entropy([])) and math.isnan(distinct_n([1], 2)) and math.isnan(repeated_share([1, 2, 3]))


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_repeat_by_trying_all(seed: int) -> None:
    text = torch.randint(0, 3, (30,), generator=torch.Generator().manual_seed(seed)).tolist()
    longest = max(n for n in range(30) for i in range(31 - n) for j in range(i) if text[i : i + n] == text[j : j + n])
    assert longest_repeat(text) == longest


def test_the_judge_is_exact(model: Model, parent: Path) -> None:
    """Its nats are those of the stock model, summed token by token behind the prompt."""
    judge = judge_rater(str(parent), model)
    report = measure(model, judge, QUICK, judge_name="parent", documents=CORPUS)
    reference, tokenizer = load_parent(str(parent), dtype=torch.float64)
    stock = HFDenoiser(reference, None).model
    prompts = [diffulm.tokenizer.encode(tokenizer, text, plain=True)[:4] for text in CORPUS][:3]
    texts, _ = write(model, prompts, 6, QUICK)
    # The checkpoint's start token: conversion takes the one that suits the parent.
    start, nats, tokens = diffulm.tokenizer.special_tokens(model.tokenizer).bos, 0.0, 0
    for prompt, text in zip(prompts, texts, strict=True):
        before = diffulm.tokenizer.encode(tokenizer, tokenizer.decode(prompt), plain=True)
        whole = diffulm.tokenizer.encode(
            tokenizer, diffulm.tokenizer.decode(model.tokenizer, prompt + text), plain=True
        )
        shared = 0
        while shared < len(before) and before[shared] == whole[shared]:
            shared += 1
        ids = [start, *whole]
        table = stock(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
        nats -= sum(float(table[i - 1, ids[i]]) for i in range(1 + shared, len(ids)))
        tokens += len(whole) - shared
    row = next(r for r in report["rows"] if r["kind"] == "conditional" and r["steps"] == 6)
    assert row["nats_per_token"]["value"] == pytest.approx(nats / tokens, abs=1e-10)
    assert row["perplexity"] == pytest.approx(math.exp(nats / tokens))


def test_a_row_for_every_step_count(model: Model, parent: Path) -> None:
    seen: list[str] = []
    judge = judge_rater(str(parent), model)
    report = measure(model, judge, QUICK, documents=CORPUS, on_progress=lambda label, *_: seen.append(label))
    kinds = [(row["kind"], row["steps"]) for row in report["rows"]]
    assert kinds == [
        ("text", None), ("unconditional", 2), ("unconditional", 6), ("conditional", 2), ("conditional", 6),
    ]  # fmt: skip
    assert len(seen) == 4
    for row in report["rows"]:
        assert row["texts"] == 3 and row["tokens"]["value"] <= 8
        assert 0 <= row["entropy"]["value"] <= math.log(8)
        if row["kind"] != "text":
            assert 0 < row["forwards"] <= row["steps"], "no more forwards than steps"
    json.dumps(report, allow_nan=False)
    page = markdown("quality", drawn(quality.blocks(report)))
    assert "Repeated 4" in page and "unconditional" in page and quality.summary(report)[0].row_count == 5
    again = measure(model, judge, QUICK, documents=CORPUS)
    same = [{k: v for k, v in row.items() if k != "seconds"} for row in report["rows"]]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in again["rows"]] == same, "one seed, one table"


def test_a_text_depends_on_its_place_and_the_seed_alone(model: Model) -> None:
    alone = [write(model, [[]] * 3, 4, Sampling(samples=3, max_tokens=8, batch=b))[0] for b in (1, 3)]
    assert alone[0] == alone[1]
    assert write(model, [[]] * 3, 4, Sampling(samples=3, max_tokens=8, seed=1))[0] != alone[0]


def test_the_parents_texts_stand_beside(model: Model, parent: Path) -> None:
    """Token by token by the stock model: drawn from its softmax at the temperature, from the same prompts."""
    seen: list[str] = []
    how, judge = (
        Sampling(step_counts=(2,), samples=3, max_tokens=8, prompt_tokens=4, top_p=None),
        judge_rater(str(parent), model),
    )
    report = measure(
        model, judge, how, parent=judge, parent_name="llama", documents=CORPUS,
        on_progress=lambda label, *_: seen.append(label),
    )  # fmt: skip
    assert [(row["kind"], row["by"], row["steps"]) for row in report["rows"]] == [
        ("text", "documents", None), ("unconditional", "model", 2), ("unconditional", "parent", None),
        ("conditional", "model", 2), ("conditional", "parent", None),
    ]  # fmt: skip
    assert seen[1] == "unconditional, the parent" and report["parent"] == {"name": "llama"}
    stock = HFDenoiser(load_parent(str(parent), dtype=torch.float64)[0], None).model
    special = diffulm.tokenizer.special_tokens(model.tokenizer)
    prompts = [diffulm.tokenizer.encode(model.tokenizer, text, plain=True)[:4] for text in CORPUS][:3]
    texts, forwards = write_by_parent(judge, prompts, how)
    steps = 0
    for place, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        ids = [special.bos, *prompt]
        for k in range(8):
            chance = stock(torch.tensor([ids])).logits[0, -1].detach().softmax(-1).cumsum(-1)
            ids.append(int((chance <= uniforms(place, k, purpose="token", n=1)[0]).sum()))
            steps += 1
            if ids[-1] in (special.eos, special.bos):
                break
        assert text == [token for token in ids[5:] if token not in (special.eos, special.bos)]
    row = next(r for r in report["rows"] if (r["kind"], r["by"]) == ("conditional", "parent"))
    assert forwards == steps and row["forwards"] == steps / 3 and row["tokens"]["value"] <= 8
    page = markdown("quality", drawn(quality.blocks(report)))
    assert "unconditional, parent" in page and "llama" in page
    assert quality.summary(report)[0].row_count == 5


def test_a_parent_with_another_tokenizer_reads_the_same_prompts(model: Model, tmp_path: Path) -> None:
    other = build_parent(tmp_path, tokenizer=build_tokenizer(size=300))
    parent = judge_rater(str(other), model)
    assert parent.tokenizer is not model.tokenizer
    ids = diffulm.tokenizer.encode(model.tokenizer, CORPUS[0], plain=True)
    whole, none = quality.prompts_for(parent, model, [ids[:6], []], QUICK)
    decode = diffulm.tokenizer.decode
    assert none == [] and decode(parent.tokenizer, whole) == decode(model.tokenizer, ids[:6])
    (cut,) = quality.prompts_for(parent, model, [ids[:6]], Sampling(max_tokens=60))
    assert cut == whole[-3:], "the front goes where 63 tokens leave no room"


def test_it_goes_on_where_it_was(model: Model, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of model and parent, and the judge's scores: what an interrupted run had is kept, and not done again."""
    path = tmp_path / "scores.jsonl"

    def run(how: Sampling = QUICK) -> Any:
        both = judge_rater(str(parent), model, store=Store(path))
        report = measure(model, both, how, parent=both, documents=CORPUS)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in report["rows"]]

    whole = run()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))
    assert run() == whole and sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)
    assert path.read_bytes().startswith(b"".join(lines[: len(lines) // 2]))

    def never(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("nothing is left to do")

    for name in ("unmask", "continue_ids"):
        monkeypatch.setattr(quality, name, never)
    monkeypatch.setattr("diffulm.eval.estimate.Scorer.scores", lambda self, questions: never() if questions else [])
    assert run() == whole
    for other in ({"seed": 1}, {"temperature": 0.5}, {"top_p": 0.5}, {"max_tokens": 7}, {"policy": "confidence"}):
        with pytest.raises(AssertionError, match="nothing is left"):
            run(replace(QUICK, **other))


def test_text_ends_before_its_end_token(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    eos = model.tokenizer.eos_token_id
    monkeypatch.setattr(quality, "Draw", lambda *a: lambda log_probs, u: torch.full((len(log_probs),), eos))
    texts, _ = write(model, [[]] * 2, 4, QUICK)
    assert texts == [[], []]


def row(nats: float, entropy: float, *, error: float | None = 0.01, kind: str = "unconditional", steps: Any = 4) -> Any:
    return {
        "kind": kind, "by": "documents" if kind == "text" else "model", "steps": steps,
        "nats_per_token": {"value": nats, "stderr": error},
        "entropy": {"value": entropy, "stderr": error},
    }  # fmt: skip


def test_lower_perplexity_with_lower_entropy_is_flagged() -> None:
    good, narrow = row(4.0, 4.0), row(3.0, 3.0, steps=8)
    assert suspicious(narrow, good) and not suspicious(good, narrow)
    assert not suspicious(row(3.0, 4.1), good), "lower perplexity alone is what is wanted"
    assert not suspicious(row(4.1, 3.0), good), "lower entropy alone shows"
    assert not suspicious(row(3.0, 3.98), good), "within two standard errors of the difference"
    assert suspicious(row(3.0, 3.98, error=None), row(4.0, 4.0, error=None))
    (said,) = flags([good, narrow])
    assert said.startswith("unconditional text in 8 steps has lower perplexity than unconditional text in 4 steps")
    human = row(3.5, 3.9, kind="text", steps=None)
    assert len(flags([human, narrow])) == 1 and "the documents' own text" in flags([human, narrow])[0]
    assert not flags([good, row(3.0, 3.0, kind="conditional")]), "other texts"
    assert not flags([good, {**narrow, "entropy": None}])


def test_bad_input(model: Model, parent: Path) -> None:
    for wrong in (
        {"step_counts": ()}, {"step_counts": (0,)}, {"samples": 0}, {"max_tokens": 0}, {"policy": "best"},
        {"top_p": 0.0}, {"temperature": -1.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"must|unknown policy"):
            Sampling(**wrong)
    judge = judge_rater(str(parent), model)
    with pytest.raises(ValueError, match="no document has 12 tokens"):
        measure(model, judge, QUICK, documents=["short"])
    with pytest.raises(ValueError, match="the model was trained on 64"):
        measure(model, judge, Sampling(step_counts=(1,), samples=1, max_tokens=64))


def test_the_verb(checkpoint: Path, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    common = ["eval", str(checkpoint), "--device", "cpu", "--dtype", "float32"]
    asked = ["--judge", str(parent), "--step-counts", "2", "4", "--samples", "2", "--max-tokens", "6"]
    out = tmp_path / "out"
    assert cli.main([*common, "--tasks", f"quality,{text}", *asked, "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(r["kind"], r["steps"]) for r in report["rows"]] == [
        ("text", None), *((kind, steps) for kind in ("unconditional", "conditional") for steps in (2, 4))
    ]  # fmt: skip
    assert json.loads((out / "report.json").read_text()) == report and (out / "report.html").is_file()
    assert report["command"].startswith("diffulm ") and report["machine"] and report["versions"]["diffulm"]
    assert report["settings"]["temperature"] == 1.0 and report["parent"] is None
    kept = (out / "scores.jsonl").read_bytes()
    assert cli.main([*common, "--tasks", f"quality,{text}", *asked, "--out", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (out / "scores.jsonl").read_bytes() == kept, "nothing was computed anew"
    assert [r["perplexity"] for r in again["rows"]] == [r["perplexity"] for r in report["rows"]]
    assert cli.main([*common, "--tasks", "quality"]) == 2
    assert "give --judge or --parent" in capsys.readouterr().err
    assert cli.main([*common, "--tasks", "quality,piqa", *asked]) == 2
    assert "'piqa' is no text" in capsys.readouterr().err


def test_the_verb_takes_its_numbers_as_they_are(
    checkpoint: Path, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 is no "not given"; --steps is one step count; --limit is of documents; the parent writes where it is named."""
    text = tmp_path / "texts.jsonl"
    lines = [
        "The quick brown fox jumps over the lazy dog. " * 8,
        "It does so every day, and the dog does not mind. " * 8,
    ]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    common = ["eval", str(checkpoint), "--tasks", f"quality,{text}", "--device", "cpu", "--dtype", "float32", "--json"]
    asked = ["--parent", str(parent), "--steps", "3", "--samples", "2", "--max-tokens", "6", "--temperature", "0"]
    assert cli.main([*common, *asked, "--limit", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["temperature"] == 0.0 and report["settings"]["judge"] == str(parent)
    assert [(r["kind"], r["by"], r["steps"]) for r in report["rows"]] == [
        ("text", "documents", None), *((kind, by, steps) for kind in ("unconditional", "conditional")
                                       for by, steps in (("model", 3), ("parent", None)))
    ]  # fmt: skip
    assert report["rows"][0]["texts"] == 1, "one document"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--samples", "0"], "samples must be at least 1, not 0"),
        (["--steps", "0"], "step counts must be numbers of steps, at least 1 each"),
        (["--steps", "4", "--step-counts", "4"], "--steps 64 is short for --step-counts 64; leave one of them out"),
        (["--limit", "3"], "--limit: without effect on quality without texts; leave it out"),
        (["--fewshot", "0"], "--fewshot: without effect on quality; leave it out"),
        (["--draws", "0"], "--draws: without effect"),
        (
            ["--confidence", "0.9", "--chat-template"],
            "--confidence, --chat-template: without effect on quality; leave them",
        ),
        (["--guidance", "2"], "--guidance: without effect"),
        (["--allow-code-execution"], "--allow-code-execution: without effect"),
        (["--lambada-double-count"], "--lambada-double-count: without effect"),
    ],
)
def test_the_verb_refuses_what_it_would_pass_over(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a model is opened, which is not there."""
    assert cli.main(["eval", "nowhere/at/all", "--tasks", "quality", "--judge", "gpt2", *flags]) == 2
    assert words in capsys.readouterr().err
