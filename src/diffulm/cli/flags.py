"""What the verbs share: names of their arguments, recipes by name, JSON on stdout, the view of `--watch`."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import tyro

from ..train.config import Recipe, load_recipe

Reference: TypeAlias = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
PromptText: TypeAlias = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
RecipeName: TypeAlias = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
OutFolder: TypeAlias = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
Texts: TypeAlias = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
PolicyName: TypeAlias = Annotated[str, tyro.conf.arg(metavar="POLICY")]


def find_recipe(name: str) -> Recipe:
    """A recipe by path, or by the name of a shipped one."""
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        return load_recipe(path)
    for folder in (Path(str(resources.files("diffulm"))) / "recipes", Path(__file__).parents[3] / "recipes"):
        if (folder / f"{name}.toml").is_file():
            return load_recipe(folder / f"{name}.toml")
    raise ValueError(
        f"there is no recipe {name!r}; give the path of a .toml file, or a shipped name such as smollm2-cpu"
    )


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, ensure_ascii=False))


class Watching:
    """The `watch` callback of a verb: draws each step on stderr, or None when not asked for."""

    def __init__(self, model: Any, wanted: bool) -> None:
        self.model, self.view = model, None
        if wanted:
            from ..render import DenoisingView

            self.view = DenoisingView()

    def __enter__(self) -> Callable[[Any, Any], None] | None:
        if self.view is None:
            return None
        self.view.__enter__()
        return self.draw

    def __exit__(self, *exception: Any) -> None:
        if self.view is not None:
            self.view.__exit__(*exception)

    def draw(self, canvas: Any, step: Any) -> None:
        from ..sampling import pieces_for_view

        assert self.view is not None
        self.view.update(step=step.index + 1, steps=step.steps, pieces=pieces_for_view(self.model, canvas, step))
