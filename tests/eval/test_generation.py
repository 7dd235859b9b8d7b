"""Infilling tasks, and every task in which a model writes end to end: reports, refusals, a killed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffulm import cli
from diffulm.eval import infilling
from diffulm.eval.generate import Writer
from diffulm.eval.generation_tasks import GENERATION

pytest.importorskip("lm_eval", reason="needs the extra eval")

from ..conftest import build_tokenizer
from ..families import save_parent
from .test_generation_tasks import STORY, STORY_PREFIX, folder, writer

__all__ = ["folder", "writer"]  # fixtures


# -------------------------------------------------------------------------------------------------------- infilling


def test_fitted_keeps_what_is_near() -> None:
    tokenizer = build_tokenizer()
    prefix, suffix = "The quick brown fox. " * 9, "It jumps over the dog. " * 9
    for length in (30, 60, 1000):
        before, behind, cut = infilling.fitted(tokenizer, length, 8, prefix, suffix)
        assert prefix.endswith(before) and suffix.startswith(behind)
        used = len(tokenizer(before)["input_ids"]) + len(tokenizer(behind)["input_ids"])
        assert used + 9 <= length and (cut == 0) == (length == 1000)
        assert length == 1000 or used + 9 >= length - 4, "the room is used"
    assert infilling.fitted(tokenizer, 40, 8, prefix, "")[0], "a side that needs nothing leaves its room to the other"
    with pytest.raises(ValueError, match="a hole of 39 tokens leaves no room in the 40"):
        infilling.fitted(tokenizer, 40, 39, prefix, suffix)


def test_a_parent_with_infilling_tokens_is_asked_with_them(parent: Path, writer: Writer) -> None:
    from dataclasses import replace

    from diffulm.eval.rate import parent_rater

    rater = parent_rater(str(parent), writer.rater)
    above = Writer(rater, writer.how)
    assert infilling.ways(writer) == infilling.ways(above) == ["oracle", "auto"], "no such tokens"
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(infilling.FIM_TOKENS[0])})
    above = Writer(replace(rater, tokenizer=tokenizer), writer.how)
    assert infilling.ways(above) == ["oracle", "auto", "fim"]
    task = GENERATION["rocstories"]
    (item,) = infilling.prompts(task, [STORY], writer)
    (ask,) = infilling.asks(task, item, above, "fim")
    p, s, m = (tokenizer.convert_tokens_to_ids(name) for name in infilling.FIM_TOKENS[0])
    assert ask.ids is not None and tokenizer.decode(ask.ids[1 : ask.ids.index(s)]) == STORY_PREFIX
    assert ask.ids[0] == p and ask.ids[-1] == m and ask.cap == task.cap
    # Where the text fills the window, the far end of the prefix makes room for the three, and none of them is cut.
    (full,) = infilling.asks(task, replace(item, text=STORY_PREFIX * 9), above, "fim")
    context, cut = above._context(full)
    assert full.ids is not None and context[1:] == list(full.ids) and context[1] == p and cut == 0
    assert len(context) + full.cap == above.rater.scorer.length
    (oracle,) = infilling.asks(task, item, above, "oracle")
    assert oracle.cap == len(tokenizer(" Ann flew kite 3.")["input_ids"]) and oracle.length is None
    (mine,) = infilling.asks(task, item, writer, "oracle")
    assert mine.length == oracle.cap and mine.prompt == oracle.prompt == item.text


# ------------------------------------------------------------------------------------------------------- end to end

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


def test_eval_beside_the_parent(run: Run, checkpoint: Path, parent: Path, folder: Path, tmp_path: Path) -> None:
    """Every task on a tiny model; two samples; figures are means of the documents; the same again costs nothing."""
    fixed = ["--data-dir", folder, "--parent", parent, "--dtype", "float32", "--device", "cpu", "--limit", 2]
    how = ["--max-tokens", 6, "--samples", 2, "--temperature", "1.0", "--steps", 3, "--allow-code-execution"]
    code, text, err = run("eval", checkpoint, "--tasks", "generation", *fixed, *how, "--out", tmp_path, "--json")
    assert code == 0, err
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [t["task"] for t in report["generation"]] == list(GENERATION)
    lines = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().split("\n") if line]
    for task in report["generation"]:
        ways = ["oracle", "auto"] if GENERATION[task["task"]].hole else [""]
        for way in ways:
            mine = [line for line in lines if line["task"] == task["task"] and line.get("way", "") == way]
            assert len(mine) == 2 and all(len(line[s]["texts"]) == 2 for line in mine for s in ("model", "parent"))
            for metric in mine[0]["model"]["metrics"]:
                figure = task["figures"][f"{metric}, {way}" if way else metric]
                for side in ("model", "parent"):
                    values = [line[side]["metrics"][metric] for line in mine]
                    assert figure[side]["value"] == pytest.approx(np.mean(values))
                assert figure["paired"]["difference"] == pytest.approx(
                    figure["model"]["value"] - figure["parent"]["value"]
                )
        assert task["cost"]["parent"]["tokens"] <= task["cost"]["parent"]["forwards"] + 1e-9
        assert task["cost"]["model"]["texts"] == 4 * len(ways)
    kept = (tmp_path / "scores.jsonl").read_bytes()
    code, again, _ = run("eval", checkpoint, "--tasks", "generation", *fixed, *how, "--out", tmp_path, "--json")
    assert code == 0 and (tmp_path / "scores.jsonl").read_bytes() == kept, "nothing was written anew"
    assert [t["figures"] for t in json.loads(again)["generation"]] == [t["figures"] for t in report["generation"]]
    markdown = (tmp_path / "report.md").read_text()
    assert "Written texts" in markdown and "no security boundary" in markdown and "rougeL, oracle" in markdown
    code, table, _ = run("eval", checkpoint, "--tasks", "triviaqa", *fixed, *how)
    assert code == 0 and "alias_match" in table and "remove_whitespace" not in table, "lm-eval's own: in the report"


def test_what_cannot_be_evaluated(run: Run, checkpoint: Path, folder: Path) -> None:
    def refused(words: str, *arguments: object) -> None:
        code, out, err = run("eval", checkpoint, "--data-dir", folder, "--dtype", "float32", *arguments)
        assert (code, out) == (2, "") and words in err, err

    refused("humaneval runs code that a model wrote", "--tasks", "humaneval")
    refused("3 samples at temperature 0", "--tasks", "gsm8k", "--samples", 3)
    refused("unknown policy 'best'", "--tasks", "gsm8k", "--policy", "best")
    refused("gsm8k is written in 256 tokens and the model was trained on 64", "--tasks", "gsm8k")
    refused("gsm8k has 6 exemplars, not 9", "--tasks", "gsm8k", "--fewshot", 9)
    refused("a hole of 63 tokens leaves no room", "--tasks", "rocstories", "--max-tokens", 63)


def test_a_block_checkpoint_writes_but_does_not_fill(run: Run, parent: Path, folder: Path, tmp_path: Path) -> None:
    from diffulm.convert import convert

    convert(str(parent), tmp_path / "block", trained_length=64, layout="block", block_size=4, source="own")
    fixed = ["--data-dir", folder, "--dtype", "float32", "--limit", 2, "--max-tokens", 6, "--json"]
    code, text, err = run("eval", tmp_path / "block", "--tasks", "countdown3", *fixed)
    assert code == 0 and json.loads(text)["generation"][0]["cost"]["model"]["texts"] == 2, err
    code, _, err = run("eval", tmp_path / "block", "--tasks", "rocstories", *fixed)
    assert code == 2 and "does not see what stands behind a hole" in err


def test_a_parent_without_a_cache_stands_beside(run: Run, folder: Path, tmp_path: Path) -> None:
    """ALiBi: the parent's texts are computed without one, prompts of different lengths together."""
    from diffulm.convert import convert

    save_parent(tmp_path / "bloom", "bloom")
    convert(str(tmp_path / "bloom"), tmp_path / "model", trained_length=64)
    fixed = ["--data-dir", folder, "--dtype", "float32", "--device", "cpu", "--limit", 3, "--max-tokens", 4, "--json"]
    code, text, err = run(
        "eval", tmp_path / "model", "--tasks", "triviaqa", "--parent", tmp_path / "bloom", "--fewshot", 0, *fixed
    )
    assert code == 0, err
    assert json.loads(text)["generation"][0]["cost"]["parent"]["texts"] == 3


KILLED = """
import sys, time
from diffulm import cli
from diffulm.eval import generate, rate
generate.TOGETHER = 1
real = rate.Store.put
def slow(self, entries):
    real(self, entries)
    time.sleep(0.5)
rate.Store.put = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle; the same command keeps what was there and ends as if nothing had happened."""

    def arguments(out: Path) -> list[str]:
        fixed = ["eval", str(checkpoint), "--tasks", "gsm8k,rocstories", "--data-dir", str(folder), "--max-tokens", "6"]
        more = ["--temperature", "1", "--samples", "2", "--dtype", "float64", "--device", "cpu"]
        return [*fixed, *more, "--out", str(out)]

    out = tmp_path / "killed"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments(out)], stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and child.poll() is None:
        if (out / "scores.jsonl").is_file() and (out / "scores.jsonl").read_bytes().count(b"\n") >= 10:
            break
        time.sleep(0.05)
    assert child.poll() is None, "killed too late"
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = (out / "scores.jsonl").read_bytes()
    assert 10 <= kept.count(b"\n") < 24 and not (out / "report.json").exists()
    assert cli.main(arguments(out)) == 0
    lines = (out / "scores.jsonl").read_bytes()
    assert lines.startswith(kept[: kept.rfind(b"\n") + 1])
    assert cli.main(arguments(tmp_path / "whole")) == 0
    assert sorted(lines.split(b"\n")) == sorted((tmp_path / "whole" / "scores.jsonl").read_bytes().split(b"\n"))
    killed, whole = ((tmp_path / name / "documents.jsonl").read_text() for name in ("killed", "whole"))
    assert killed == whole
