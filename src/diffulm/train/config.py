"""A recipe: a TOML file that fully determines a run. One dataclass per table, a unit per field.

No torch here: the command line builds its flags from these classes.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
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
    subset: str | None = None
    """Configuration of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set."""
    limit_documents: int | None = None
    """Documents after which reading ends."""
    limit_bytes: int | None = None
    """UTF-8 bytes of text after which reading ends."""


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
    block_sizes: tuple[int, ...] = ()
    """Growing tokens per block, each for an equal share of the budget; the last is model.block_size (block layout)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices of the layers, with AdamW for embeddings, head, norms and biases."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging constants."""
    weight_decay: float = 0.0
    """Decay of the weights, on matrices only."""
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
    activation_checkpointing: bool = False
    """Keep only the layers' inputs for the backward pass and compute the rest again: less memory, a third more work."""
    replicas: int = 1
    """Copies of the sharded model (HSDP), each over processes / replicas; one process ignores it."""
    max_skipped: int = 10
    """Steps in a row, skipped because loss or gradient is not finite, that end the run."""
    checkpoint_minutes: float = 2.0
    """Minutes between checkpoints."""
    async_checkpoint: bool = False
    """Write checkpoints while training goes on; takes a copy of weights and moments in host memory."""
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
        for name in ("learning_rate", "clip", "keep", "batch", "micro_batch", "replicas", "max_skipped"):
            if getattr(self, name) <= 0:
                raise ValueError(f"train.{name} must be positive, not {getattr(self, name)}")


@dataclass(frozen=True)
class SftConfig:
    """Fine-tuning on conversations (task = "sft")."""

    chat_template: str | None = None
    """Jinja file, or the template itself (it holds a brace); none: the tokenizer's own."""
    plain_template: bool = False
    """Use a plain template (User:, Assistant:) where the tokenizer has none."""
    split_digits: bool = False
    """Every digit a token of its own, in the tokenizer saved with the model (the paper's GSM8K, GPT-2)."""
    skip_bad: bool = False
    """Leave out and count what is no conversation, or too long an answer, instead of stopping at it (--skip-bad)."""
    too_long: Literal["error", "skip", "truncate"] = "error"
    """Answers that do not fit the window with their context: stop, leave them out and count them, or cut them at its
    end (the held-out ones are left out)."""
    truncate_share: float = 0.0
    """Share of the answers cut at a random length, without an end."""
    eos_padding: Literal["one", "random", "window"] = "random"
    """End-of-text tokens behind an answer: none but its end, a random number, or up to the window (the paper)."""
    eos_weight: float = 1.0
    """Weight in the loss of the end-of-text tokens behind an answer's end."""
    lora_rank: int = 0
    """Rank of a LoRA to train instead of all weights; 0: all weights."""
    lora_alpha: float = 16.0
    """Its scale: updates are multiplied by alpha / rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the modules that get one; none: every linear module but the head and routers."""
    answers: int = 0
    """Held-out questions answered before and after: exact match, and where answers end."""

    def __post_init__(self) -> None:
        if not 0 <= self.truncate_share <= 1:
            raise ValueError(f"sft.truncate_share is a share and lies in [0, 1], not {self.truncate_share}")
        if self.eos_weight < 0 or self.lora_rank < 0 or self.answers < 0 or self.lora_alpha <= 0:
            raise ValueError("sft: eos_weight, lora_rank and answers must not be negative, lora_alpha positive")
        if self.chat_template is not None and self.plain_template:
            raise ValueError("sft: give chat_template or plain_template, not both")


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
    task: Literal["adapt", "sft"] = "adapt"
    """adapt: an autoregressive model to diffusion, on text; sft: fine-tuning on conversations."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sft: SftConfig = field(default_factory=SftConfig)

    def __post_init__(self) -> None:
        if self.task == "adapt" and self.sft != SftConfig():
            raise ValueError("the table [sft] has no effect with task = 'adapt'; set task = 'sft' or leave it out")
        if self.task == "sft" and self.data.pack != "documents":
            raise ValueError("conversations are never cut across sequences: leave data.pack out with task = 'sft'")
        weights = [source.weight is None for source in self.data.sources]
        if any(weights) and not all(weights):
            raise ValueError("data.sources: give every source a weight, or none (then their sizes decide)")
        if self.model.layout == "full" and self.noise.ar_weight:
            raise ValueError("noise.ar_weight needs clean rows: set model.layout = 'block' or leave it out")
        if self.model.layout == "block" and self.train.annealing:
            raise ValueError("train.annealing opens causal attention to full; the block layout has none: leave it out")
        check_block_sizes(self)


def check_block_sizes(recipe: Recipe) -> None:
    """ValueError unless the block sizes of a recipe grow to the one it decodes with."""
    size, sizes = recipe.model.block_size, recipe.train.block_sizes
    if recipe.model.layout != "block":
        if sizes:
            raise ValueError("train.block_sizes needs blocks: set model.layout = 'block' or leave it out")
        return
    if size is not None and size > recipe.data.length:
        raise ValueError(
            f"model.block_size = {size} is more than data.length = {recipe.data.length}: no block would ever be whole; "
            "choose a smaller block or longer sequences"
        )
    if not sizes:
        return
    if sizes[0] < 1 or any(a >= b for a, b in itertools.pairwise(sizes)):
        raise ValueError(f"train.block_sizes must grow from at least 1 token, as in [4, 8, 16], not {list(sizes)}")
    if sizes[-1] != size:
        raise ValueError(
            f"train.block_sizes ends with {sizes[-1]} but model.block_size is {size or 'not set'}: the model is "
            f"evaluated and decoded with the last size, so set model.block_size = {sizes[-1]}"
        )


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


#: Keys that say how a machine carries a run out and how often it reports, not what it computes (rounding apart): a
#: resume may change them.
MACHINE = (
    "data.workers", "train.micro_batch", "train.activation_checkpointing", "train.replicas", "train.max_skipped",
    "train.checkpoint_minutes", "train.async_checkpoint", "train.keep", "train.heldout_evaluations",
    "train.tensorboard",
)  # fmt: skip


def differing_keys(there: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two recipes (as `to_dict` gives them) ask for different results, with both values.

    A key that the older recipe lacks stands for its default.
    """
    default = _flat(json.loads(json.dumps(to_dict(Recipe()))))
    one, two = ({**default, **_flat(recipe)} for recipe in (there, here))
    return {
        key: (one.get(key), two.get(key))
        for key in {**two, **one}
        if one.get(key) != two.get(key) and key not in MACHINE
    }


def _flat(tables: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat
