"""The claims study: puzzles and their checker, what the arms change, tables and fits."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffulm.layout import Annealing, Causal, Full
from diffulm.process import MaskedDiffusion
from diffulm.tokenizer import SpecialTokens
from diffulm.train.config import load_recipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import claims  # noqa: E402
import claims_report  # noqa: E402
import countdown  # noqa: E402

SPELL = {c: i for i, c in enumerate("0123456789+-*/=,:")}
SPECIAL = SpecialTokens(bos=17, eos=18, pad=19, mask=20)


@given(st.integers(0, 10**6), st.sampled_from([(3, 9), (3, 20), (3, 99), (4, 99)]))
def test_puzzles_are_solved_by_their_solutions_and_fit(index: int, kind: tuple[int, int]) -> None:
    puzzle = countdown.make_puzzle(0, index, *kind)
    assert countdown.is_solution(puzzle.given, puzzle.solution)
    batches = stream(numbers=kind[0], largest=kind[1])
    prompt, answer = batches.encode(puzzle)
    assert len(prompt) + len(answer) <= batches.length
    assert SPECIAL.eos in answer, "the end is part of the answer"


@pytest.mark.parametrize(
    "answer",
    [
        "", "44-15=29", "44-15=29,79-29=51", "44-15=28,79-28=51", "44-15=29,79-29=50,50-0=50", "79-44=35,35+15=50,",
        "44-15=29,79-29=50 ", "15-44=29,79-29=50", "79-79=0,44+15=59", "50-0=50", "79/44=1,1*15=50",
    ],
)  # fmt: skip
def test_wrong_answers_are_wrong(answer: str) -> None:
    assert countdown.is_solution("15,44,79,50", "44-15=29,79-29=50")
    assert countdown.is_solution("15,44,79,50", "79-44=35,35+15=50"), "any way to the target counts"
    assert not countdown.is_solution("15,44,79,50", answer)


def test_released_test_sets_agree_with_the_checker() -> None:
    folder = claims.BOOKS.parents[1] / "countdown"
    if not folder.is_dir():
        pytest.skip("the development data is not here")
    for numbers in (3, 4, 5):
        puzzles = countdown.read_puzzles(folder / f"cd{numbers}_test.jsonl.gz", 1000)
        assert all(countdown.is_solution(p.given, p.solution) for p in puzzles)


def stream(
    *, process: MaskedDiffusion | None = None, numbers: int = 3, largest: int = 20, **more: Any
) -> countdown.Puzzles:
    layout = Causal() if process is None else Full("previous")
    return countdown.Puzzles(SPELL, SPECIAL, layout, process, 8, 0, numbers, largest, **more)


def test_only_answers_are_noised_and_test_puzzles_never_seen() -> None:
    batches = stream(process=MaskedDiffusion(20), annealing=Annealing(4, 0))
    (rows,) = batches.rows(1)
    prompts = [len(batches.encode(batches._puzzle(i))[0]) for i in range(8, 16)]
    B, L = 8, batches.length
    masked = (rows.ids.reshape(B, L) == 20).nonzero().tolist()
    assert masked and all(i >= prompts[b] for b, i in masked)
    assert rows.maskable == 8 * batches.answer_length
    seen = {batches._puzzle(i).key for i in range(64)}
    avoiding = dataclasses.replace(batches, avoid=frozenset(list(seen)[:20]))
    assert not {avoiding._puzzle(i).key for i in range(64)} & avoiding.avoid
    (causal,) = stream().rows(1)
    assert len(causal.source) == 8 * batches.answer_length and not (causal.ids == 20).any()


def test_the_right_answer_is_read_off_a_perfect_model() -> None:
    """A denoiser that knows every solution answers all; one that knows none answers nothing right."""
    process = MaskedDiffusion(20)
    batches = stream(process=process)
    puzzles = [countdown.make_puzzle(5, i, 3, 20) for i in range(6)]
    x0 = torch.full((6, batches.length), SPECIAL.pad)
    for b, puzzle in enumerate(puzzles):
        prompt, answer = batches.encode(puzzle)
        x0[b, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)

    class Oracle:
        def __init__(self, shift: int) -> None:
            self.shift = shift

        def __call__(self, rows: Any, *, cache: Any = None) -> torch.Tensor:
            own = rows.source + 1  # the shift: row i - 1 predicts token i
            wanted = (x0.reshape(-1)[own] + self.shift) % 17 if self.shift else x0.reshape(-1)[own]
            return torch.nn.functional.one_hot(wanted, 21).double() * 30

    for shift, right in ((0, 6), (1, 0)):
        said = countdown.answers(Oracle(shift), batches, puzzles)  # type: ignore[arg-type]
        assert sum(countdown.is_solution(p.given, a) for p, a in zip(puzzles, said, strict=True)) == right


def test_a_score_does_not_see_the_annealing_of_training() -> None:
    from diffulm.denoiser import HFDenoiser

    from .train.tiny import make_denoiser

    denoiser: HFDenoiser = make_denoiser()
    process = MaskedDiffusion(20)
    puzzles = [countdown.make_puzzle(5, i, 3, 20) for i in range(6)]
    annealed, plain = (stream(process=process, annealing=a) for a in (Annealing(100, 0), None))
    assert countdown.answer_nats(denoiser, annealed, puzzles) == countdown.answer_nats(denoiser, plain, puzzles)
    assert annealed.rows(0)[0].annealed is not None and plain.rows(0)[0].annealed is None


def test_wilson_interval_holds_the_rate() -> None:
    low, high = countdown.wilson(30, 100)
    assert (round(low, 3), round(high, 3)) == (0.219, 0.396), "the textbook's figures"
    assert countdown.wilson(0, 50)[0] == pytest.approx(0) and countdown.wilson(50, 50)[1] == pytest.approx(1)


@pytest.mark.parametrize("arm", sorted(claims.ARMS))
@pytest.mark.parametrize("name", ["claims-tiny", "claims-smollm2"])
def test_an_arm_changes_one_thing(name: str, arm: str) -> None:
    base = load_recipe(claims.RECIPES / f"{name}.toml")
    recipe = claims.recipe_of(base, arm, 3, 1024)
    assert (recipe.train.seed, recipe.train.tokens) == (3, 1024)
    changed = {
        table
        for table in ("model", "data", "noise", "train", "eval")
        if getattr(recipe, table) != getattr(claims.recipe_of(base, "full", 3, 1024), table)
    }
    assert changed == set(claims.ARMS[arm])


def test_results_name_no_folder() -> None:
    recipe = claims.on_books(load_recipe(claims.RECIPES / "claims-tiny.toml"))
    assert all(not s["path"].startswith("/") for s in claims.shareable(recipe)["data"]["sources"])
    for path in claims.RESULTS.rglob("*.json"):
        assert '"/' not in path.read_text(), f"{path.name} holds a machine's path"


def fake(arm: str, seed: int, nats: list[float], budget: int = 1000) -> dict[str, Any]:
    return {
        "arm": arm, "seed": seed, "budget": budget, "documents": [0, 0, 1, 1], "window_tokens": [10, 10, 10, 5],
        "estimate": {
            "nats_per_token": sum(nats) / 35, "bits_per_byte": sum(nats) / 70, "stderr_nats_per_token": 0.5,
            "per_window": nats,
        },
    }  # fmt: skip


def test_comparison_is_paired() -> None:
    base = [10.0, 20.0, 5.0, 40.0]
    worse = [x + 3.5 for x in base]
    assert claims_report.gain(fake("a", 0, worse), fake("full", 0, base)) == pytest.approx((0.4, 0.4 / 7), abs=0.3)
    results = [fake("full", s, [x + s for x in base]) for s in range(3)]
    results += [fake("scratch", s, [x + s + 7 + s / 10 for x in base]) for s in range(3)]
    table = claims_report.comparison(results, 1000)
    assert "| scratch | 3 |" in table and "+0.811 +- 0.007 | yes |" in table
    assert table.index("| full |") < table.index("| scratch |"), "the best comes first"
    assert claims_report.significant([0.1, -0.1, 0.05]) == "no"
    with pytest.raises(AssertionError):
        claims_report.gain(fake("a", 0, base), {**fake("b", 0, base), "window_tokens": [1, 1, 1, 1]})


def test_the_fit_finds_what_made_the_points() -> None:
    x = np.array([1e4, 2e4, 4e4, 8e4, 16e4, 32e4])
    found = claims_report.fit_power([(t, 2.0 + 300 * t**-0.5) for t in x])
    assert found is not None
    assert found["floor"] == pytest.approx(2.0, abs=0.02) and found["c"] == pytest.approx(0.5, abs=0.01)
    noisy = np.random.default_rng(0).normal(0, 0.05, len(x))
    wide = claims_report.fit_power([(t, 2.0 + 300 * t**-0.5 + e) for t, e in zip(x, noisy, strict=True)])
    assert wide is not None
    low, high = wide["at 6.5e+10"]
    assert low <= 2.0 <= high and high - low > 0.1, "noise widens what the extrapolation may say"
    assert claims_report.fit_power([(1, 1.0)] * 4) is None


def test_the_plateau_leaves_out_warm_up_annealing_and_decay() -> None:
    recipe = {"train": {"warmup": 0.05, "annealing": 0.3, "decay": "wsd"}}
    curve = [(100.0 * k, 1.0) for k in range(1, 11)]
    kept = claims_report.plateau({"recipe": recipe, "budget": 1000, "curve": curve})
    assert [t for t, _ in kept] == [400, 500, 600, 700, 800]


def test_filling_the_page() -> None:
    page = "a\n<!-- x -->\nold\n<!-- end x -->\nb"
    assert claims_report.fill(page, "x", "new") == "a\n<!-- x -->\nnew\n<!-- end x -->\nb"
    with pytest.raises(ValueError, match="no marks"):
        claims_report.fill(page, "y", "new")
    assert math.isnan(claims_report.over_seeds([1.0])[1])


@pytest.mark.slow
def test_both_studies_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A parent, three arms and two fine-tunings in miniature; a second call finds everything done."""
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(claims, "BOOKS", tmp_path / "no-books")
    monkeypatch.setattr(
        claims, "TINY", {**claims.TINY, "n_layer": 1, "n_embd": 32, "n_positions": 64, "vocab_size": 300}
    )
    monkeypatch.setattr(claims, "PARENT_TOKENS", 4096)
    few = [countdown.make_puzzle(-1, i, 3, 9) for i in range(30)]
    monkeypatch.setattr(claims, "test_puzzles", lambda numbers, largest: few)
    base = load_recipe(claims.RECIPES / "claims-tiny.toml")
    runs = tmp_path / "runs"
    budget = 2048
    base = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, parent=str(runs / "tiny" / "parent")),
        data=dataclasses.replace(base.data, length=32, sources=base.data.sources[:1]),
        train=dataclasses.replace(base.train, tokens=budget, heldout_evaluations=2),
        eval=dataclasses.replace(base.eval, windows=4, draws=2),
    )
    recipe_file = tmp_path / "recipes"
    recipe_file.mkdir()
    shown = (claims.RECIPES / "claims-tiny.toml").read_text().replace("tokens = 524288", f"tokens = {budget}")
    (recipe_file / "claims-tiny.toml").write_text(shown)
    monkeypatch.setattr(claims, "RECIPES", recipe_file)
    claims.make_parent(base, runs)
    arms = ["full", "scratch", "ar-continued"]
    claims.study("tiny", base, arms, [0, 1], None, runs)
    found = claims_report.load(tmp_path / "results" / "tiny")
    assert {(r["arm"], r["seed"]) for r in found} == {(a, s) for a in arms for s in (0, 1)} | {("parent", 0)}
    assert all(r["tokens"] == budget for r in found if r["arm"] != "parent")
    table = claims_report.comparison(found, budget)
    assert "| ar-continued (exact) | 2 |" in table and "| scratch | 2 |" in table
    capsys.readouterr()
    claims.study("tiny", base, arms, [0, 1], None, runs)
    assert capsys.readouterr().out.strip() == "tiny: 6 of 6 arms are done"
    for _ in range(2):
        claims.countdown_study(["ar-parent", "diffusion-scratch", "diffusion-adapted"], [0], 3, 3, 9, runs)
    puzzles = claims_report.load(tmp_path / "results" / "countdown")
    assert {r["arm"] for r in puzzles} == {"ar-parent", "diffusion-scratch", "diffusion-adapted"}
    assert all(r["test"] == 30 and 0 <= r["accuracy"] <= 1 and r["puzzles"] == 192 for r in puzzles)
    assert capsys.readouterr().out.count("right,") == 3
