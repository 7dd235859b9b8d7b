"""The verb: one run, one table, what was left out and why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from diffulm import cli, hub
from diffulm.bench import generate, table
from diffulm.bench.generate import Plan, bench, read_prompts, until_end
from diffulm.bench.modes import GROUPS
from diffulm.convert import convert

from ..conftest import build_parent, build_tokenizer

FAST: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
PLAN = Plan((8, 200), (1, 2), ("threshold:0.5",), repeats=2, prompt_tokens=6)


@pytest.fixture(scope="module")
def report(checkpoint: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return bench(str(checkpoint), PLAN, **FAST)


def rows(cell: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["mode"]: row for row in cell["rows"]}


def test_a_table_for_each_batch_and_length(report: dict[str, Any], parent: Path) -> None:
    assert [(c["batch"], c["length"]) for c in report["cells"]] == [(1, 8), (2, 8)]
    assert report["lengths_left_out"] == [
        {"length": 200, "reason": "more than the trained length of 64 with 7 tokens before it"}
    ]
    assert report["parent"] == str(parent) and report["parent_left_out"] == ""
    for cell in report["cells"]:
        out = {one["mode"]: one["reason"] for one in cell["left_out"]}
        assert ("AR with look-up" in out) == (cell["batch"] == 2)
        assert {row["group"] for row in cell["rows"]} == set(GROUPS)
        for name, row in rows(cell).items():
            assert name not in out and row["tokens"] == [8 * cell["batch"]] * 2, name
            speeds = sorted(n / s for n, s in zip(row["tokens"], row["seconds"], strict=True))
            spread = row["tokens_per_second"]
            assert (spread["low"], spread["high"]) == pytest.approx(speeds) and len(speeds) == 2
            assert row["first_token_seconds"]["high"] <= max(row["seconds"])
            assert row["quality"]["nats_per_token_under_parent"]["prompts"] == 2 * cell["batch"]
        bare = rows(cell)["AR bare loop, greedy"]
        assert bare["rows_per_forward"] == cell["batch"] * (7 + 7) / 8 and bare["tokens_per_forward"] == 1
    json.dumps(report, allow_nan=False)


def test_modes_take_turns_in_alternating_order_on_the_same_prompts(checkpoint: Path, monkeypatch: Any) -> None:
    said: list[str] = []
    jobs: list[Any] = []
    plain = generate.measured
    monkeypatch.setattr(
        generate, "measured", lambda work, *rest: (jobs.append((work.func, work.args[0])), plain(work, *rest))[1]
    )
    plan = Plan((8,), (2,), repeats=3, prompt_tokens=6, groups=("exact",))
    bench(str(checkpoint), plan, **FAST, say=said.append)
    order = [re.sub(r"^  (\d)/3 (.*): .*", r"\1 \2", line) for line in said[1:]]
    names = ["confidence", "ancestral", "first-hitting"]
    assert order == [f"{r + 1} {n}" for r in range(3) for n in (names if r % 2 == 0 else names[::-1])]
    for r in range(3):
        part = [job for _, job in jobs[3 * r : 3 * r + 3]]
        assert all(torch.equal(job.prompts_BP, part[0].prompts_BP) and job.seed == r for job in part)
    assert not torch.equal(jobs[0][1].prompts_BP, jobs[3][1].prompts_BP), "other prompts in the next repeat"


def test_tokens_behind_an_end_count_nowhere() -> None:
    new = torch.tensor([[5, 6, 1, 1], [1, 5, 6, 7], [5, 6, 7, 8]])
    assert until_end(new, (1,)) == [[5, 6, 1], [1], [5, 6, 7, 8]] and until_end(new, ()) == new.tolist()


def test_prompts(checkpoint: Path, tmp_path: Path) -> None:
    model = hub.load(checkpoint, **FAST)
    given = tmp_path / "prompts.txt"
    given.write_text(
        "The quick brown fox jumps over the lazy dog.\n\nno\ndef add(a, b): return a + b\n", encoding="utf-8"
    )
    ids, short = read_prompts(model, Plan(prompts=given, prompt_tokens=5))
    assert ids.shape == (2, 6) and short == 1 and (ids[:, 0] == ids[0, 0]).all()
    assert model.tokenizer.decode(ids[0, 1:]) == "The quick brown fox jumps"[: len(model.tokenizer.decode(ids[0, 1:]))]
    ids, short = read_prompts(model, Plan((8,), (1, 4), repeats=3, prompt_tokens=9))
    assert ids.shape == (12, 10) and short == 0, "as many as the largest batch and all repeats take"
    with pytest.raises(ValueError, match="no prompt has 50 tokens; give longer lines"):
        read_prompts(model, Plan(prompts=given, prompt_tokens=50))
    with pytest.raises(ValueError, match="cannot be read as text"):
        read_prompts(model, Plan(prompts=tmp_path / "none.txt"))
    given.write_text(f"the {model.tokenizer.mask_token} quick brown fox", encoding="utf-8")
    ids, _ = read_prompts(model, Plan(prompts=given, prompt_tokens=4))
    assert model.process.mask_token_id not in ids, "the name of a special token is ordinary text in a prompt"


def test_a_parent_that_is_gone_or_wrong(parent: Path, tmp_path: Path) -> None:
    convert(str(parent), tmp_path / "model", trained_length=64)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["diffusion"]["parent"] = str(tmp_path / "gone")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    plan = Plan((8,), (1,), repeats=1, prompt_tokens=4, groups=("parent", "exact"))
    found = bench(str(tmp_path / "model"), plan, **FAST)
    assert "gone" in found["parent_left_out"] and found["parent"] is None
    (cell,) = found["cells"]
    assert {one["mode"] for one in cell["left_out"]} >= {"AR generate", "AR bare loop, greedy", "AR with look-up"}
    assert all(row["quality"]["nats_per_token_under_parent"] is None for row in cell["rows"])
    assert any("No parent:" in line for line in table.captions(found)) and table.pareto(cell) is None
    with pytest.raises(ValueError, match="is no model folder"):
        bench(str(tmp_path / "model"), plan, parent=str(tmp_path / "gone"), **FAST)
    other = build_parent(tmp_path / "other", tokenizer=build_tokenizer(size=300))
    with pytest.raises(ValueError, match="another tokenizer"):
        bench(str(tmp_path / "model"), plan, parent=str(other), **FAST)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lengths": (0,)}, "--lengths takes numbers from 1 on, not 0"),
        ({"batches": ()}, "--batch takes numbers from 1 on, not none"),
        ({"repeats": 0}, "--repeats"),
        ({"groups": ("mine",)}, "unknown modes mine: use parent, released"),
        ({"policies": ("threshold:2",)}, "threshold"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_wrong_plans(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Plan(**settings)


def test_the_report_as_files(report: dict[str, Any], tmp_path: Path) -> None:
    table.write(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    markdown = (tmp_path / "report.md").read_text()
    for words in ("Batch 2, 8 new tokens", "nats/token under the parent", "released A (random)", "Left out: AR with"):
        assert words in markdown, words
    assert "Every mode writes all tokens" in markdown and "Length 200 left out" in markdown
    svgs = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert svgs == ["pareto-batch-1-tokens-8.svg", "pareto-batch-2-tokens-8.svg"]
    text = (tmp_path / svgs[0]).read_text()
    assert text.startswith("<svg") and all(f">{name}<" in text for name in ("AR parent", "threshold", "new tokens/s"))


def test_intervals_and_every_point_are_in_the_plot(report: dict[str, Any]) -> None:
    cell = report["cells"][1]
    plot = table.pareto(cell)
    assert plot is not None and plot.log_x and sum(len(c.points) for c in plot.curves) == len(cell["rows"])
    for curve in plot.curves:
        assert len(curve.errors) == len(curve.points) and min(curve.errors) > 0


def test_from_the_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["bench", "generate", str(checkpoint), "--lengths", "6", "--batch", "1,2", "--prompt-tokens", "5"]
    common += ["--repeats", "1", "--dtype", "float32", "--device", "cpu", "--threads", "1"]
    assert cli.main([*common, "--modes", "parent,policies", "--policies", "factor:1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["mode"] for row in found["cells"][0]["rows"]] == [
        "AR generate", "AR bare loop, greedy", "AR with look-up", "factor:1"
    ]  # fmt: skip
    assert cli.main([*common, "--modes", "exact", "--no-to-length", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "first-hitting" in out and "Every mode stops at the end" in out and "report.html" in out
    assert (tmp_path / "out" / "report.json").is_file()
    for wrong, words in (
        (["--lengths", "many"], "--lengths takes whole numbers"),
        (["--lengths", "900"], "trained length of 64"),
        (["--threads", "0"], "--threads must be at least 1"),
    ):
        at = common.index(wrong[0])
        assert cli.main([*common[:at], *wrong, *common[at + 2 :]]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and words in captured.err and captured.err.count("\n") == 1
    assert cli.main(["bench", "train", str(checkpoint)]) == 2
