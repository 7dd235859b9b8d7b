"""The block recipe through the main job: growing blocks, packed documents, both sources, all that follows training."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import diffulm
from diffulm import cli
from diffulm.adapt import adapt
from diffulm.data.loader import Loader
from diffulm.layout import Block, NoisedBatch
from diffulm.sampling import Canvas
from diffulm.tokenizer import encode, special_tokens
from diffulm.train.config import EvalConfig, ModelConfig, NoiseConfig, Recipe
from diffulm.train.metrics import read_metrics

from .test_adapt import tiny_recipe, weights_of, write_text

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
job_module: Any = sys.modules["diffulm.adapt"]  # `diffulm.adapt` is the function


def block_recipe(parent: Path, text: Path, source: Any = "own", **train: Any) -> Recipe:
    """Blocks of 1, then 2, then 4 tokens, two steps each; documents of about 25 tokens packed into sequences of 48."""
    base = tiny_recipe(parent, text, checkpoint_minutes=0.0)
    return dataclasses.replace(
        base,
        model=ModelConfig(parent=str(parent), layout="block", source=source, block_size=4),
        data=dataclasses.replace(base.data, length=48),
        train=dataclasses.replace(base.train, **{"block_sizes": (1, 2, 4), **train}),
        noise=NoiseConfig(ar_weight=0.5, complementary=True),
        eval=EvalConfig(windows=6, draws=2, prompts=("The quick",), max_tokens=6, steps=6),
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_text(tmp_path_factory.mktemp("text"))


Finished = tuple[Path, dict[str, Any], dict[str, list[int]]]


@pytest.fixture(scope="module", params=["own", "launch"])
def finished(
    request: pytest.FixtureRequest, parent: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """(folder, report, block sizes of every step trained and of every evaluation) of one whole run."""
    out = tmp_path_factory.mktemp("blocks") / request.param
    sizes: dict[str, list[int]] = {"trained": [], "scored": []}
    rows, scored = Loader.rows, job_module.score_windows

    def note_rows(self: Loader, n: int, *a: Any, **k: Any) -> Any:
        layout = self.layout_at(n)
        assert isinstance(layout, Block)
        sizes["trained"].append(layout.size)
        return rows(self, n, *a, **k)

    def note_scores(denoiser: Any, layout: Any, *a: Any, **k: Any) -> Any:
        if isinstance(layout, Block):
            sizes["scored"].append(layout.size)
        return scored(denoiser, layout, *a, **k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "rows", note_rows)
        patch.setattr(job_module, "score_windows", note_scores)
        report = adapt(block_recipe(parent, text, request.param), out, control=False, say=lambda _: None)
    return out, report, sizes


def test_blocks_grow_and_everything_measured_has_the_last_size(finished: Finished) -> None:
    out, report, sizes = finished
    assert sizes["trained"] == [1, 1, 2, 2, 4, 4]
    assert set(sizes["scored"]) == {4} and len(sizes["scored"]) == 6 + 2, "six in the run, before and after"
    config = json.loads((out / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["block_size"] == config["diffusion"]["block_size"] == 4
    assert report["after"]["bits_per_byte"] < report["before"]["bits_per_byte"] - 0.05
    assert [row["heldout"] is not None for row in report["train"]["adapted"]] == [True] * 6
    assert all(math.isfinite(row["loss"]) for row in report["train"]["adapted"])


def test_the_report_and_the_card_say_what_it_is(finished: Finished) -> None:
    out, report, _ = finished
    assert (report["layout"], report["block_size"], report["ar_weight"]) == ("block", 4, 0.5)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "sum of the bounds of blocks of 4 tokens" in text and "plus 0.5 times the next-token loss" in text
    samples = report["samples"]
    assert "block after block" in samples["settings"] and samples["infills"] == []
    assert samples["completions"][0]["prompt"] == "The quick" and isinstance(samples["completions"][0]["after"], str)
    card = (out / "model" / "README.md").read_text(encoding="utf-8")
    assert "in blocks of 4 tokens" in card and "diffulm.infill" not in card and "diffulm.generate" in card


def test_the_model_opens_writes_and_is_measured(finished: Finished, tmp_path: Path) -> None:
    out, _, _ = finished
    model = diffulm.load(out / "model", dtype="float32", device="cpu")
    assert isinstance(model.layout, Block) and model.layout.size == 4
    one = diffulm.generate(model, ["The quick", "def"], max_tokens=7)
    assert one == [diffulm.generate(model, p, max_tokens=7) for p in ("The quick", "def")]
    assert diffulm.generate(model, "The quick", max_tokens=7, steps=2) != ""
    with pytest.raises(ValueError, match="does not see what stands after a hole; use generate"):
        diffulm.infill(model, "The ", " fox", length=3)
    assert diffulm.infill(model, "The quick <hole:4>").startswith("The quick"), "a hole at the end"
    with pytest.raises(ValueError, match="block"):
        model.logits(torch.tensor([[0, 5, 6]]))
    assert diffulm.score(model, "The quick", " brown fox", draws=15).nats > 0
    path = tmp_path / "held.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.", encoding="utf-8")
    flags = ("--device", "cpu", "--dtype", "float32")
    for line in (["generate", out / "model", "The quick", "--max-tokens", 5], ["eval", out / "model", "--tasks", path]):
        assert cli.main([*map(str, line), *flags]) == 0
    assert cli.main(["infill", str(out / "model"), "The <hole:3> fox", *flags]) == 2


def test_what_was_trained_is_what_is_decoded_from(finished: Finished) -> None:
    """A text whose third block is half given: logits of the training rows, of the canvas, and from the cache, equal."""
    model = diffulm.load(finished[0] / "model", dtype="float64", device="cpu")
    special, layout = special_tokens(model.tokenizer), model.layout
    ids = encode(model.tokenizer, "def add(a, b):\n    return a + b")[:11]
    canvas = Canvas.from_holes([[*ids[:9], None, None]], special)  # 1 + 9 given: positions 10 and 11 of 8..11
    x0 = torch.tensor([[special.bos, *ids]])
    assert isinstance(layout, Block) and special.mask is not None
    nothing_B = torch.zeros(1, dtype=torch.long)
    uncached = layout.decoding_rows(canvas.ids, canvas.valid, canvas.editable)
    cached = layout.cached_rows(canvas.ids, canvas.valid, canvas.editable, nothing_B)
    # In training other blocks are noised at the same time, and another document stands before this one.
    before = torch.full((1, 6), ids[0])
    both = torch.cat([before, x0], 1)
    noised = torch.cat([before > 0, (x0 != special.bos) & (torch.arange(12) % 4 > 1)], 1)
    noised[0, 0] = noised[0, 6] = False
    document = torch.tensor([[0] * 6 + [1] * 12])
    yes = torch.ones_like(noised)
    batch = noised_batch(both, noised, special.mask, document, yes, layout)
    trained = layout.training_rows(batch)
    found = [model.denoiser(rows) for rows in (uncached, cached)]
    n = int(noised.sum())  # behind them are the clean rows' own predictions, if the layout has any
    found.append(model.denoiser(trained)[n - 2 : n])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-10)


def noised_batch(
    x0: torch.Tensor, noised: torch.Tensor, mask: int, document: torch.Tensor, valid: torch.Tensor, layout: Block
) -> Any:
    groups = layout.noise_groups(document)
    return NoisedBatch(x0, x0.masked_fill(noised, mask), noised, noised, noised.float(), document, valid, groups)


def test_resuming_while_blocks_grow(finished: Finished, parent: Path, text: Path, tmp_path: Path) -> None:
    """Killed one step after every checkpoint, and there is one after every step: weights and records bit for bit."""
    out, _, _ = finished
    recipe, kills, seen = block_recipe(parent, text, out.name), 0, 0

    def killed(arm: str, progress: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            raise KeyboardInterrupt

    for _ in range(8):
        seen = 0
        try:
            adapt(recipe, tmp_path / "run", control=False, say=lambda _: None, on_step=killed)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills == 5 and weights_of(tmp_path / "run", "model") == weights_of(out, "model")
    keys = ("step", "loss", "heldout", "grad_norm", "learning_rate")
    one, two = ([[r[k] for k in keys] for r in read_metrics(x / "adapted")] for x in (out, tmp_path / "run"))
    assert one == two


def test_other_block_sizes_are_another_run(finished: Finished, parent: Path, text: Path) -> None:
    out = finished[0]
    with pytest.raises(ValueError, match=r"other settings \(train.block_sizes differ\)"):
        adapt(block_recipe(parent, text, out.name, block_sizes=(2, 4)), out, control=False, say=lambda _: None)


# -------------------------------------------------------------------------------------------------- the benchmark


def test_every_arm_of_the_benchmark_is_a_recipe_and_the_table_holds_it(tmp_path: Path) -> None:
    sys.path.insert(0, str(BENCHMARKS))
    import block_recipes
    from diffulm.train.config import load_recipe

    base = load_recipe(BENCHMARKS.parent / "recipes" / "smollm2-block.toml")
    estimate = {"nats_per_token": 4.25, "stderr_nats_per_token": 0.125}
    row = {"prompt": "A", "text": " bc", "tokens": 4, "nats": 10.0, "entropy": 1.0, "distinct_2": 0.5}
    empty = {"prompt": "B", "text": "", "tokens": 0, "nats": None, "entropy": None, "distinct_2": None}
    recipes = {}
    for arm in block_recipes.ARMS:
        recipes[arm] = block_recipes.recipe_of(base, arm, 1, 1024)
        assert (recipes[arm].train.tokens, recipes[arm].train.minutes, recipes[arm].train.seed) == (1024, None, 1)
        result = {"arm": arm, "budget": 1024, "seed": 1, "estimate": estimate, "next_token": estimate,
                  "completions": [row, empty], "train_seconds": 3.0}  # fmt: skip
        (tmp_path / f"{arm}-1024-1.json").write_text(json.dumps(result), encoding="utf-8")
    settings = {json.dumps(settings_of(r)) for r in recipes.values()}
    assert len(settings) == len(recipes), "no two arms are the same"
    table = block_recipes.table(tmp_path)
    for arm in block_recipes.ARMS:
        assert f"| {arm} | 1,024 | 1 | 4.250 ± 0.125 | 4.250 ± 0.125 | 2.500 | 1.00 | 0.50 | 4 | 3 |" in table
    assert "'A': ' bc'" in table


def settings_of(recipe: Recipe) -> Any:
    return [vars(recipe.model), vars(recipe.noise), vars(recipe.train)]
