"""Recipes: every mistake in the file is named, with the key and what would be right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffulm.train.config import NoiseConfig, Recipe, SourceConfig, TrainConfig, from_dict, load_recipe, to_dict


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def without_none(value: Any) -> Any:
    """TOML has no null: a key that is not set is left out."""
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value] if isinstance(value, list) else value


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_load(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert from_dict(Recipe, without_none(json.loads(json.dumps(to_dict(recipe))))) == recipe, "JSON and back"


def test_defaults_tables_and_types(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(
            tmp_path,
            """
            [model]
            parent = "somewhere"
            [data]
            length = 64
            sources = [
              { name = "a", path = "a.txt", weight = 1.0 },
              { name = "b", path = "b.jsonl", weight = 2, exclude = ["x*"] },
            ]
            [train]
            learning_rate = 1
            betas = [0.9, 0.95]
            steps = 10
            [eval]
            infills = [["a", "b", "c"]]
            """,
        )
    )
    assert recipe.name == "mine", "an unnamed recipe has its file's name"
    assert recipe.data.sources == (SourceConfig("a", "a.txt", 1.0), SourceConfig("b", "b.jsonl", 2.0, exclude=("x*",)))
    assert recipe.train == TrainConfig(learning_rate=1.0, betas=(0.9, 0.95), steps=10)
    assert isinstance(recipe.train.learning_rate, float), "an integer where a float is meant"
    assert recipe.eval.infills == (("a", "b", "c"),) and recipe.noise == NoiseConfig()


BLOCKS = "[model]\nlayout = 'block'\nsource = 'own'\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nlearning_rte = 1", "unknown key train.learning_rte; did you mean learning_rate?"),
        ("[trian]\nsteps = 1", "unknown key trian; did you mean train?"),
        ("[train]\nzzz = 1", "unknown key train.zzz; known: batch, micro_batch"),
        ("[train]\nsteps = 'ten'", "train.steps must be of type int, not 'ten'"),
        ("[train]\nsteps = 1.5", "train.steps must be of type int, not 1.5"),
        ("[train]\nsteps = true", "train.steps must be of type int, not True"),
        ("[train]\nlearning_rate = '1e-4'", "train.learning_rate must be of type float"),
        ("[train]\nbetas = [0.9]", "train.betas must have 2 entries, not 1"),
        ("[train]\nbetas = 0.9", "train.betas must be a list"),
        ("[train]\ndecay = 'linear'", "train.decay must be one of cosine, wsd, constant, not 'linear'"),
        ("[noise]\ncomplementary = 1", "noise.complementary must be of type bool"),
        ("[data]\nsources = [{ name = 'a' }]", "data.sources[0] needs path"),
        ("[data]\nsources = [3]", "data.sources[0] must be a table, not 3"),
        ("[data]\nsources = [{ name = 'a', path = 'b', wieght = 1.0 }]", "did you mean weight?"),
        ("train = 3", "train must be a table, not 3"),
        ("[train]\nsteps = 3\nminutes = 1.0", "train: give one budget, not steps and minutes"),
        ("[train]\nsteps = 0", "train.steps must be positive, not 0"),
        ("[train]\nminutes = -1", "train.minutes must be positive, not -1"),
        ("[train]\nwarmup = 1.5", "train.warmup is a share of the budget and lies in [0, 1], not 1.5"),
        ("[train]\nmicro_batch = 0", "must be positive"),
        ("[noise]\nschedule = 'cosine'", "noise.schedule = 'cosine' has no effect with noise.form = 'count'"),
        (
            "[data]\nsources = [{ name = 'a', path = 'b', weight = 1.0 }, { name = 'c', path = 'd' }]",
            "give every source a weight, or none",
        ),
        ("[noise]\nar_weight = 1.0", "noise.ar_weight needs clean rows"),
        ("[model]\nlayout = 'block'\n[train]\nannealing = 0.1", "train.annealing opens causal attention"),
        ("[train]\nblock_sizes = [4, 8]", "train.block_sizes needs blocks: set model.layout = 'block'"),
        (
            BLOCKS + "block_size = 8\n[train]\nblock_sizes = [4, 4, 8]",
            "must grow from at least 1 token, as in [4, 8, 16]",
        ),
        (BLOCKS + "block_size = 8\n[train]\nblock_sizes = [16, 8]", "train.block_sizes must grow"),
        (BLOCKS + "block_size = 8\n[train]\nblock_sizes = [0, 8]", "train.block_sizes must grow"),
        (BLOCKS + "block_size = 8\n[train]\nblock_sizes = [2, 4]", "ends with 4 but model.block_size is 8"),
        (BLOCKS + "[train]\nblock_sizes = [2, 4]", "model.block_size is not set: the model is evaluated and decoded"),
        (BLOCKS + "block_size = 8\n[train]\nblock_sizes = [2.5, 8]", "train.block_sizes[0] must be of type int"),
        (BLOCKS + "block_size = 1024", "model.block_size = 1024 is more than data.length = 512"),
        ("[train\nsteps = 3", "is not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        load_recipe(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_blocks_that_grow(tmp_path: Path) -> None:
    text = BLOCKS + "block_size = 16\n[train]\nblock_sizes = [1, 4, 16]\n[noise]\nar_weight = 0.5\ncomplementary = true"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.train.block_sizes == (1, 4, 16) and recipe.model.block_size == 16
    assert from_dict(Recipe, without_none(json.loads(json.dumps(to_dict(recipe))))) == recipe


def test_a_recipe_that_is_not_there_and_one_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no recipe"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not valid TOML"):
        load_recipe(tmp_path / "binary.toml")
