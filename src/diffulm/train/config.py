"""A recipe: a TOML file that fully determines a run. One dataclass per table, a unit per field.

No torch here: the command line builds its flags from these classes.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    """The parent, and what conversion makes of it."""

    parent: str = "smollm2-135m-instruct-q4"
    """Embedded default's name, local folder, GGUF file or Hub id of an autoregressive model."""
    initialise: Literal["parent", "random"] = "parent"
    """Weights to begin from; random: the parent's shape and tokenizer alone (the from-scratch control)."""
    mask_token: str | None = None
    """Existing token to reuse as the mask; none: the tokenizer's own, else a new row."""
    source: Literal["previous", "own", "launch"] = "previous"
    """Row that predicts a token: previous (the paper's shift), own, launch (block layout)."""
    layout: Literal["full", "block"] = "full"
    """Who sees whom: full (the paper) or block (clean context)."""
    block_size: int | None = None
    """Tokens per block (block layout)."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of text."""

    name: str
    """Folder name of its token shards."""
    path: str
    """builtin:topics, builtin:stdlib, a txt / jsonl / parquet file or folder, or a Hub data set."""
    weight: float | None = None
    """Share of the mixture, in sequences, relative to the other sources; none (in all of them): by their sizes."""
    more: tuple[str, ...] = ()
    """Further paths of the same body of text."""
    text_field: str = "text"
    """Field that holds the text (jsonl, parquet, data sets)."""
    exclude: tuple[str, ...] = ()
    """Patterns of document ids never used."""


@dataclass(frozen=True)
class DataConfig:
    """Text and how it is cut."""

    sources: tuple[SourceConfig, ...] = (SourceConfig("topics", "builtin:topics"),)
    """The mixture."""
    length: int = 512
    """Tokens per sequence, the start token included."""
    pack: Literal["documents", "concat"] = "documents"
    """documents: same-document mask; concat: joined by EOS and cut, as the paper's released code."""
    heldout_fraction: float = 0.05
    """Share of documents never trained on, chosen by a hash of their text."""
    workers: int = 1
    """Processes that tokenise."""
    strict: bool = False
    """Refuse invalid UTF-8 instead of replacing and counting it."""


@dataclass(frozen=True)
class NoiseConfig:
    """The objective."""

    form: Literal["count", "rate"] = "count"
    """count: number of masked tokens uniform on 1..n (default); rate: each masked with probability 1 - alpha(t)."""
    schedule: str = "linear"
    """linear, cosine or polynomial:POWER; only the rate form uses it."""
    t_min: float = 1e-3
    """Smallest time the rate form draws."""
    normalisation: Literal["nelbo", "masked"] = "nelbo"
    """Tokens the loss is divided by: all maskable ones, or the noised ones as in the released code."""
    complementary: bool = False
    """Every sequence twice per batch, with complementary masks."""
    ar_weight: float = 0.0
    """Weight of next-token cross-entropy on clean rows (block layout)."""

    def __post_init__(self) -> None:
        if self.form == "count" and self.schedule != "linear":
            raise ValueError(
                f"noise.schedule = {self.schedule!r} has no effect with noise.form = 'count'; "
                "leave it out or set noise.form = 'rate'"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation and budget."""

    batch: int = 4
    """Sequences per optimizer step, over all processes."""
    micro_batch: int = 2
    """Sequences per forward pass on one process."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    warmup: float = 0.05
    """Share of the budget over which the rate rises linearly."""
    decay: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine to final_rate; wsd: constant, then linear to final_rate over the last 20% of the budget."""
    final_rate: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    annealing: float = 0.0
    """Share of the budget over which causal attention opens to full."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging constants."""
    weight_decay: float = 0.0
    """AdamW's decay, on matrices only."""
    clip: float = 1.0
    """Largest global gradient norm."""
    steps: int | None = None
    """Budget in optimizer steps; give exactly one of steps, tokens, minutes."""
    tokens: int | None = None
    """Budget in tokens (sequences x length)."""
    minutes: float | None = None
    """Budget in minutes of training on this machine; turned into tokens once, after a short timing."""
    seed: int = 0
    """Seed of order, noise and attention annealing."""
    dtype: Literal["auto", "float32", "autocast", "float64"] = "auto"
    """auto: measured on this machine in a second."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the layers; auto: where a C++ compiler is, or on CUDA."""
    checkpoint_minutes: float = 2.0
    """Minutes between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    heldout_evaluations: int = 6
    """Held-out evaluations during the run, with fixed noise."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard (extra `track`)."""

    def __post_init__(self) -> None:
        budgets = [name for name in ("steps", "tokens", "minutes") if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(f"train: give one budget, not {' and '.join(budgets)}")
        for name in ("steps", "tokens", "minutes"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"train.{name} must be positive, not {getattr(self, name)}")
        for name in ("warmup", "annealing", "final_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train.{name} is a share of the budget and lies in [0, 1], not {getattr(self, name)}")
        if self.learning_rate <= 0 or self.clip <= 0 or self.keep < 1 or self.batch < 1 or self.micro_batch < 1:
            raise ValueError("train: learning_rate, clip, keep, batch and micro_batch must be positive")


@dataclass(frozen=True)
class EvalConfig:
    """What `adapt` measures before and after."""

    windows: int = 24
    """Held-out windows scored, at most; one per document before a second of any."""
    draws: int = 4
    """Noise draws per window for the bound."""
    prompts: tuple[str, ...] = ()
    """Completed by parent and child."""
    infills: tuple[tuple[str, str, str], ...] = ()
    """(prefix, hidden text, suffix)."""
    max_tokens: int = 24
    """Tokens of each completion."""
    steps: int = 24
    """Denoising steps of each sample."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run."""

    name: str = "unnamed"
    """Shown in reports."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        weights = [source.weight is None for source in self.data.sources]
        if any(weights) and not all(weights):
            raise ValueError("data.sources: give every source a weight, or none (then their sizes decide)")
        if self.model.layout == "full" and self.noise.ar_weight:
            raise ValueError("noise.ar_weight needs clean rows: set model.layout = 'block' or leave it out")
        if self.model.layout == "block" and self.train.annealing:
            raise ValueError("train.annealing opens causal attention to full; the block layout has none: leave it out")


def load_recipe(path: Path | str) -> Recipe:
    """A recipe from a TOML file. ValueError names the file, the key, and the nearest key there is."""
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no recipe {path}; the shipped ones are in recipes/") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    try:
        recipe = from_dict(Recipe, data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return recipe if "name" in data else dataclasses.replace(recipe, name=path.stem)


def from_dict(kind: Any, data: Any, where: str = "") -> Any:
    """A dataclass from parsed TOML, checked: unknown keys and wrong types are errors."""
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the recipe'} must be a table, not {data!r}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for key, value in data.items():
        name = f"{where}.{key}" if where else key
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            raise ValueError(
                f"unknown key {name}" + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(fields)}")
            )
        values[key] = _convert(hints[key], value, name)
    missing = [
        n
        for n, f in fields.items()
        if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where or 'recipe'} needs {', '.join(missing)}")
    return kind(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, not {value!r}")
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise ValueError(f"{where} must have {len(args)} entries, not {len(value)}")
        return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} must be one of {', '.join(map(str, args))}, not {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in args if a is not type(None)]
        return _convert(kinds[0], value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where} must be of type {hint.__name__}, not {value!r}")
    return value


def to_dict(recipe: Any) -> dict[str, Any]:
    """The recipe as plain JSON values: saved beside every checkpoint."""
    out: dict[str, Any] = dataclasses.asdict(recipe)
    return out
