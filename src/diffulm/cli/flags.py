"""What the verbs share: flags, recipes by name, what is printed at the end, the view of `--watch`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import tyro

from ..train.config import Recipe, load_recipe

if TYPE_CHECKING:
    from ..hub import Model

Reference: TypeAlias = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
PromptText: TypeAlias = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
RecipeName: TypeAlias = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
OutFolder: TypeAlias = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
Texts: TypeAlias = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
PolicyName: TypeAlias = Annotated[str, tyro.conf.arg(metavar="POLICY")]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How tokens are drawn.

    Args:
        steps: Forward passes at most (default: one per token).
        policy: confidence, entropy, margin, random, first-hitting, ancestral, threshold:TAU, threshold:TAU:confident,
            factor:F, entropy-bound:GAMMA, remask:ETA or remask:ETA:rescale (numbers may be left out).
        temperature: 0 is greedy.
        top_k: Draw among the k most probable tokens.
        top_p: Draw among the most probable tokens that hold this much probability.
        seed: Seed of all draws.
    """

    steps: int | None = None
    policy: PolicyName = "confidence"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """For `generate`, `infill` and `Chat`."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Opening:
    """How the model is opened.

    Args:
        adapter: LoRA in peft's format to merge into the model: a folder or Hub id.
        device: cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or autocast.
        offline: Never ask the Hub.
    """

    adapter: str | None = None
    device: str | None = None
    dtype: str = "auto"
    offline: bool = False

    def arguments(self) -> dict[str, Any]:
        """For `load`, and for a job that opens the model itself."""
        return dataclasses.asdict(self)

    def open(self, reference: str) -> Model:
        """The model by folder or Hub id."""
        from ..hub import load

        return load(reference, **self.arguments())


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


def command_line() -> str:
    """The command as it was given, quoted for a shell: a report says how it was made."""
    return f"diffulm {shlex.join(sys.argv[1:])}"


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a lone surrogate, or a narrow terminal: escapes say the same
        text = json.dumps(value)
    print(text)


def finish(report: Any, parts: Iterable[Any], out: Path | None, *, as_json: bool, more: str = "") -> None:
    """The end of a verb that reports: the report as JSON, or its sentences and tables and where its page lies."""
    if as_json:
        print_json(report)
        return
    from rich.console import Console

    console = Console(highlight=False)
    for part in parts:
        console.print(part, markup=False)
    if out is not None:
        console.print(f"report: {out / 'report.html'}{more}", markup=False, soft_wrap=True)


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
