"""The shipped recipes: the paper's numbers, written out once more here, and two steps of each on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from diffulm.adapt import adapt
from diffulm.data.sources import open_source
from diffulm.job.arm import as_source
from diffulm.layout import Annealing
from diffulm.train.config import Recipe, load_recipe
from diffulm.train.optim import learning_rate

from .conftest import CORPUS, build_parent, build_tokenizer

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))
#: Recipes whose parent is a GPT-2; all others have a Llama.
GPT2 = {"claims-tiny", "diffugpt-m", "diffugpt-s"}


@dataclass(frozen=True)
class Row:
    """One column of the paper's settings. Steps, warm-up and annealing in optimizer steps; data: (path, weight)."""

    parent: str
    mask_token: str | None
    data: tuple[tuple[str, float | None], ...]
    steps: int
    batch: int
    length: int
    tokens: int
    billions: int
    rate: float
    decay: str
    warmup: int
    annealing: int
    betas: tuple[float, float]
    weight_decay: float
    lambada: str


FINEWEB = (("HuggingFaceFW/fineweb:sample-100BT", None),)
TINYLLAMA_MIX = (("cerebras/SlimPajama-627B", 0.693584), ("bigcode/starcoderdata", 0.306416))
PAPER = {
    "diffugpt-s": Row(
        "openai-community/gpt2", "-" * 12, FINEWEB, 1_000_000, 256, 512, 131_072_000_000, 131,
        3e-4, "cosine", 2_000, 10_000, (0.9, 0.999), 0.0, "45.0 in v1, 21.6 corrected (25.9)",
    ),
    "diffugpt-m": Row(
        "openai-community/gpt2-medium", None, FINEWEB, 160_000, 1280, 1024, 209_715_200_000, 210,
        3e-4, "cosine", 2_000, 10_000, (0.9, 0.999), 0.0, "60.5 in v1, 30.3 corrected (37.7)",
    ),
    "diffullama-7b": Row(
        "meta-llama/Llama-2-7b-hf", "ти", TINYLLAMA_MIX, 2_066, 60 * 4 * 64, 2048, 64_990_740_480, 65,
        2e-5, "constant", 0, 0, (0.9, 0.95), 0.1, "70.9 in v1, 53.9 corrected (68.8)",
    ),
}  # fmt: skip


def recipe_of(name: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.toml")


def header(name: str) -> str:
    """The comment a recipe begins with."""
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    return text[: re.search(r"^[^#\n]", text, re.MULTILINE).start()]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_parses_and_its_header_says_what_it_takes(name: str) -> None:
    recipe = recipe_of(name)
    assert recipe.name == name
    for entry in ("command", "hardware", "tokens", "expected"):
        assert re.search(rf"^# {entry}  +\S", header(name), re.MULTILINE), entry


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name: str) -> None:
    row, recipe = PAPER[name], recipe_of(name)
    model, data, noise, train = recipe.model, recipe.data, recipe.noise, recipe.train
    assert (model.parent, model.mask_token, model.source, model.layout) == (
        row.parent,
        row.mask_token,
        "previous",
        "full",
    )
    assert tuple((s.path, s.weight) for s in data.sources) == row.data
    assert (data.length, data.pack) == (row.length, "concat")
    assert (noise.form, noise.schedule, noise.t_min, noise.normalisation) == ("rate", "linear", 1e-3, "masked")
    assert not noise.complementary and model.initialise == "parent"
    assert (train.batch, train.steps, train.tokens, train.minutes) == (row.batch, row.steps, None, None)
    assert row.batch * row.steps * row.length == row.tokens and round(row.tokens / 1e9) == row.billions
    assert (train.learning_rate, train.decay, train.final_rate) == (row.rate, row.decay, 0.0)
    assert (train.betas, train.weight_decay, train.clip) == (row.betas, row.weight_decay, 1.0)
    assert row.batch % train.micro_batch == 0 and train.dtype == "autocast"


@pytest.mark.parametrize("name", PAPER)
def test_shares_of_the_budget_are_the_papers_steps(name: str) -> None:
    row, train = PAPER[name], recipe_of(name).train
    annealing = Annealing(round(train.annealing * row.steps))
    assert annealing.steps == row.annealing == train.annealing * row.steps
    if row.annealing:
        assert annealing.ratio(0) == 1e-4 and annealing.ratio(4_999) == 0.5 and annealing.ratio(10_000) == 1.0
    assert train.warmup * row.steps == row.warmup

    def rate(step: float) -> float:
        return learning_rate(train, step / row.steps)

    assert rate(row.warmup) == pytest.approx(row.rate)
    if row.warmup:
        assert rate(row.warmup / 2) == pytest.approx(row.rate / 2)
        assert rate((row.warmup + row.steps) / 2) == pytest.approx(row.rate / 2), "a cosine is at half in the middle"
        assert rate(row.steps) == pytest.approx(0, abs=1e-12)
    else:
        assert rate(0) == rate(row.steps / 2) == rate(row.steps) == row.rate


@pytest.mark.parametrize("name", PAPER)
def test_headers_say_what_it_costs_and_what_the_paper_scored(name: str) -> None:
    row, text = PAPER[name], re.sub(r"\s+#?\s*", " ", header(name))
    assert f"{row.tokens:,} = {row.steps:,} steps x " in text
    assert f"LAMBADA {row.lambada}" in text and "Derived, not measured" in text
    assert "Where the released code differs" in text and "Where this run differs" in text


@pytest.mark.parametrize("name", NAMES)
def test_no_header_says_one_process_of_what_several_can_train(name: str) -> None:
    recipe, text = recipe_of(name), re.sub(r"\s+#?\s*", " ", header(name))
    assert ("one process" in text) is (recipe.sft.lora_rank > 0)
    if "GPUs" in text or re.search(r"\d x (A100|H200|GH200)", text):
        assert "torchrun" in text or recipe.sft.lora_rank, "how to start it on several GPUs"


GPT2_MEDIUM = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family", "sizes", "gpu", "count", "words"),
    [
        ("diffugpt-s", "gpt2", {}, "a100-80", 8, "{GB} GB on each of 8; {hours} on 8 x A100"),
        ("diffugpt-s", "gpt2", {}, "h200", 1, "{GB} GB on one; {hours} on one H200"),
        ("diffugpt-m", "gpt2", GPT2_MEDIUM, "a100-80", 8, "and {largest} do; {hours} on 8 x A100"),
        ("diffugpt-m", "gpt2", {**GPT2_MEDIUM, "attn_pdrop": 0.0}, "a100-80", 8, "it is {GB} GB"),
        ("diffugpt-m", "gpt2", GPT2_MEDIUM, "h200", 1, "{hours} on one H200"),
        ("diffullama-7b", "llama", LLAMA_7B, "gh200", 64, "{GB} of {usable} GB on each of 64; {hours} on 64 GH200"),
        ("diffullama-7b", "llama", LLAMA_7B, "h200", 8, "{hours} on 8 H200"),
        ("gsm8k-diffullama", "llama", LLAMA_7B, "h100", 1, "{GB} GB by diffulm plan"),
        ("gsm8k-diffugpt", "gpt2", GPT2_MEDIUM, "a100-80", 8, "{hours} hours on 8 x A100-80G; {GB} GB on each"),
        ("countdown-diffugpt", "gpt2", GPT2_MEDIUM, "a100-80", 8, "{hours} hours on 8 x A100-80G; {GB} GB on each"),
    ],
)
def test_headers_say_what_plan_says(
    name: str, family: str, sizes: dict[str, Any], gpu: str, count: int, words: str
) -> None:
    import transformers

    from diffulm.train.plan import plan

    found = plan(recipe_of(name), transformers.AutoConfig.for_model(family, **sizes), gpu=gpu, count=count)
    assert found.hours is not None
    figures = {
        "GB": round(found.asked.total / 1e9), "usable": round(found.usable / 1e9), "hours": round(found.hours),
        "largest": found.asked.largest,
    }  # fmt: skip
    text = re.sub(r"\s+#?\s*", " ", header(name))
    for phrase in words.format(**figures).split("; "):
        assert phrase in text, phrase


def test_hub_data_sets_are_asked_for_by_name_and_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, **options: Any) -> datasets.Dataset:
        asked.append((name, config, options["split"]))
        return datasets.Dataset.from_dict({"text": ["some text"], "content": ["some code"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts = {}
    for name in PAPER:
        cache = tmp_path / name / "cache"  # what is streamed is kept beside it
        cache.mkdir(parents=True)
        for source in map(as_source, recipe_of(name).data.sources):
            texts[source.name] = [document.text for document in open_source(source, cache)()]
    assert asked == [
        ("HuggingFaceFW/fineweb", "sample-100BT", "train"),
        ("HuggingFaceFW/fineweb", "sample-100BT", "train"),
        ("cerebras/SlimPajama-627B", None, "train"),
        ("bigcode/starcoderdata", None, "train"),
    ]
    assert texts == {"fineweb": ["some text"], "slimpajama": ["some text"], "starcoder": ["some code"]}


def test_the_block_recipe_is_the_other_ones_text_and_found_by_name() -> None:
    from diffulm.cli.flags import find_recipe

    full, block = recipe_of("smollm2-cpu"), recipe_of("smollm2-block")
    assert find_recipe("smollm2-block") == block
    assert block.data == full.data and block.eval.prompts == full.eval.prompts and not block.eval.infills
    model = block.model
    assert (model.parent, model.layout, model.source) == (full.model.parent, "block", "launch")
    assert (model.block_size, block.noise.ar_weight) == (4, 0.5) and block.train.minutes == full.train.minutes


def test_make_demo_takes_a_recipe() -> None:
    for options, recipe in (([], "smollm2-block"), (["RECIPE=smollm2-cpu"], "smollm2-cpu")):
        command = ["make", "--dry-run", "demo", *options]
        lines = subprocess.run(command, cwd=RECIPES.parent, capture_output=True, text=True, check=True).stdout
        assert f" adapt smollm2-135m-instruct-q4 --recipe {recipe} --minutes 5 " in lines


# ------------------------------------------------------------------------------------------------ two steps of each

LENGTH = 128


def shrunk(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe on a tiny random parent and made-up text: parent, paths, length, batch, budget, dtype and compiling
    are replaced, and how much is scored; all else is the recipe's own."""
    tokenizer = build_tokenizer()
    if recipe.model.mask_token:
        tokenizer.add_tokens([recipe.model.mask_token])
    parent = build_parent(folder / "parent", "gpt2" if recipe.name in GPT2 else "llama", tokenizer=tokenizer)
    sources = []
    for source in recipe.data.sources:
        path = folder / f"{source.name}.jsonl"
        lines = [f"{CORPUS[i % 4]} {source.name} has {i} and {i * i}, {i**3 % 97}." for i in range(40)]
        path.write_text("".join(json.dumps({source.text_field: line}) + "\n" for line in lines), encoding="utf-8")
        sources.append(dataclasses.replace(source, path=str(path)))
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, parent=str(parent)),
        data=dataclasses.replace(recipe.data, sources=tuple(sources), length=LENGTH, workers=1),
        train=dataclasses.replace(
            recipe.train, batch=4, micro_batch=2, steps=2, tokens=None, minutes=None, dtype="float32", compile="off"
        ),
        eval=dataclasses.replace(
            recipe.eval, windows=2, draws=2, prompts=recipe.eval.prompts[:1], infills=recipe.eval.infills[:1],
            max_tokens=3, steps=2,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in NAMES if recipe_of(name).task == "adapt"])
def test_two_steps_of_every_recipe(name: str, tmp_path: Path) -> None:
    recipe = recipe_of(name)
    tiny = shrunk(recipe, tmp_path)
    report = adapt(tiny, tmp_path / "run", control=False, say=lambda text: None)
    rows = report["train"]["adapted"]
    assert [row["step"] for row in rows] == [1, 2] and report["tokens"] == 2 * 4 * LENGTH
    assert [row["learning_rate"] for row in rows] == [learning_rate(tiny.train, x) for x in (0.25, 0.75)]
    assert all(0 < row["loss"] < 100 for row in rows) and report["after"]["nats_per_token"] > 0
    config = json.loads((tmp_path / "run/model/config.json").read_text(encoding="utf-8"))
    block = recipe.model.layout == "block"
    assert config["model_type"] == ("gpt2" if name in GPT2 else "llama")
    # Block rows bring a mask of their own; the class stays what it was.
    assert config.get("is_causal", True) is block and config.get("block_size") == recipe.model.block_size
    diffusion = config["diffusion"]
    assert diffusion["tokens_seen"] == report["tokens"] and diffusion["source"] == recipe.model.source
    assert diffusion["mask_row_added"] is (recipe.model.mask_token is None)
    written = json.loads((tmp_path / "run/model/tokenizer_config.json").read_text(encoding="utf-8"))
    token = written["mask_token"]
    assert (token if isinstance(token, str) else token["content"]) == (recipe.model.mask_token or "<|mask|>")
