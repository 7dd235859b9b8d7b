"""Recipes: every mistake in the file is named, with the key and what would be right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffulm.denoiser import HFDenoiser
from diffulm.train.checkpoint import checkpoints
from diffulm.train.config import (
    MACHINE,
    NoiseConfig,
    Recipe,
    SourceConfig,
    TrainConfig,
    differing_keys,
    from_dict,
    load_recipe,
    to_dict,
)

from .tiny import CONFIG, make_denoiser, make_loader, run, same_weights


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


def changed(key: str, value: Any) -> dict[str, Any]:
    """The default recipe as JSON has it, with another value of one dotted key."""
    recipe: dict[str, Any] = json.loads(json.dumps(to_dict(Recipe())))
    table, name = key.split(".")
    assert recipe[table][name] != value
    recipe[table][name] = value
    return recipe


#: Another value of every key that a resume may change.
OF_THE_MACHINE = {
    "data.workers": 16, "train.micro_batch": 1, "train.activation_checkpointing": True, "train.replicas": 2,
    "train.max_skipped": 3, "train.checkpoint_minutes": 60.0, "train.async_checkpoint": True, "train.keep": 5,
    "train.heldout_evaluations": 50, "train.tensorboard": True,
}  # fmt: skip


def test_a_resume_may_change_what_is_the_machines_and_the_guide_lists_it() -> None:
    plain = json.loads(json.dumps(to_dict(Recipe())))
    assert set(OF_THE_MACHINE) == set(MACHINE)
    guide = (RECIPES.parent / "docs" / "guides" / "scale.md").read_text(encoding="utf-8")
    listed = guide[guide.index("Of these a resume may change") : guide.index("Anything else that differs")]
    for key, value in OF_THE_MACHINE.items():
        assert not differing_keys(plain, changed(key, value)), key
        assert f"`{key.removeprefix('train.')}`" in listed, key
    # Compiled layers compute other bits; text and scores made before a resume would not fit those after it.
    for key, value in {"train.compile": "off", "data.strict": True, "eval.prompts": ["x"], "eval.draws": 9}.items():
        assert list(differing_keys(plain, changed(key, value))) == [key]


def test_how_often_held_out_text_is_scored_moves_no_weight(tmp_path: Path) -> None:
    """Though scoring draws random numbers and the parent has dropout; also where a resume changes it."""
    rows = make_loader().rows(99)[0]

    def trained(name: str, evaluations: int, *, stop: bool = False) -> HFDenoiser:
        def heldout() -> float:
            if stop:
                raise KeyboardInterrupt
            return float(denoiser.nll(rows).mean() + 0 * torch.rand(()))

        denoiser = make_denoiser("float32", attention_dropout=0.1)
        config = replace(CONFIG, heldout_evaluations=evaluations, checkpoint_minutes=1e-9)
        return run(tmp_path / name, config, denoiser=denoiser, heldout=heldout)

    seldom = trained("seldom", 1)
    assert same_weights(seldom, trained("often", 8))
    with pytest.raises(KeyboardInterrupt):
        trained("changed", 2, stop=True)
    assert [path.name for path in checkpoints(tmp_path / "changed")][-1] == "step-00000003"
    assert same_weights(seldom, trained("changed", 8))
