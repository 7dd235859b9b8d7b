"""Variants of the block recipe at an equal number of tokens: how well each predicts, and what it writes.

    python benchmarks/block_recipes.py own-4 launch-4 own-4-ar0     # train and score these; more can be added any day
    python benchmarks/block_recipes.py report                       # the table of all results so far

Every arm is the recipe (smollm2-block, or --recipe FILE) with the change ARMS names, through the stages of the main job
without its control arm. An arm that was killed resumes; a finished one is a JSON file under benchmarks/results/block
and is not run again. Tokens are equal, time is not: a block sequence has twice the rows of a full one.

Per arm: the held-out bound (blockwise: smaller blocks have a tighter one by construction), the next-token loss of the
same weights on the same text (does the parent's skill survive), and completions of 12 fixed prompts, one token a step,
most confident first, with nats per token under the parent, entropy of their tokens and distinct-2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from claims import as_json, run_arm
from diffulm import hub, runtime
from diffulm.adapt import heldout_windows
from diffulm.bench.quality import nats_under_parent
from diffulm.data.tokens import TokenStore
from diffulm.denoiser import HFDenoiser
from diffulm.eval.autoregress import greedy
from diffulm.eval.likelihood import Window, score_windows
from diffulm.eval.quality import distinct_n, unigram_entropy
from diffulm.layout import Causal
from diffulm.sampling import generate
from diffulm.tokenizer import encode, fingerprint, load_tokenizer, special_tokens
from diffulm.train.config import Recipe, load_recipe

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "block"
#: About 5 minutes of the full recipe on two cores.
TOKENS = 90_112
NEW_TOKENS = 64

#: What each arm changes in the recipe.
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {
        "model": {"layout": "full", "source": "previous", "block_size": None},
        "noise": {"ar_weight": 0.0},
        "train": {"annealing": 0.3, "block_sizes": ()},
    },
    "own-1": {"model": {"source": "own", "block_size": 1}},
    "own-4": {"model": {"source": "own"}},
    "own-8": {"model": {"source": "own", "block_size": 8}},
    "own-16": {"model": {"source": "own", "block_size": 16}},
    "own-32": {"model": {"source": "own", "block_size": 32}},
    "launch-4": {"model": {"source": "launch"}},
    "launch-16": {"model": {"source": "launch", "block_size": 16}},
    "own-4-ar0": {"model": {"source": "own"}, "noise": {"ar_weight": 0.0}},
    "own-4-ar0.1": {"model": {"source": "own"}, "noise": {"ar_weight": 0.1}},
    "own-4-ar1": {"model": {"source": "own"}, "noise": {"ar_weight": 1.0}},
    "launch-4-ar0": {"model": {"source": "launch"}, "noise": {"ar_weight": 0.0}},
    "own-4-complementary": {"model": {"source": "own"}, "noise": {"complementary": True}},
    "grow-1-2-4": {"train": {"block_sizes": (1, 2, 4)}},
    "grow-4-8-16": {"model": {"block_size": 16}, "train": {"block_sizes": (4, 8, 16)}},
    "grow-4-8-16-32": {"model": {"block_size": 32}, "train": {"block_sizes": (4, 8, 16, 32)}},
}

#: Half prose about Python, half code, as the recipe's text; then plain English, which it has little of.
PROMPTS = (
    "The with statement is used to",
    "A dictionary maps",
    "A list comprehension is",
    "When an exception is raised,",
    "def read_json(path):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\n\n\ndef list_files(folder):\n",
    "for i in range(10):\n    if i % 2 == 0:\n",
    "The capital of France is",
    "Once upon a time there was",
    "Water boils when",
    "The best way to learn a language is",
)


def recipe_of(base: Recipe, arm: str, seed: int, tokens: int) -> Recipe:
    """The recipe with one arm's change, a seed and the budget."""
    model, noise, train = ({**vars(getattr(base, k)), **ARMS[arm].get(k, {})} for k in ("model", "noise", "train"))
    train |= {"seed": seed, "tokens": tokens, "steps": None, "minutes": None}
    return dataclasses.replace(
        base, name=f"{base.name}/{arm}", model=type(base.model)(**model), noise=type(base.noise)(**noise),
        train=type(base.train)(**train),
    )  # fmt: skip


def held_out(recipe: Recipe, tokenizer: Any, data: Path) -> list[Window]:
    """The windows that the arm's bound was measured on."""
    mark = fingerprint(tokenizer)
    stores = {s.name: TokenStore.open(data / s.name / "heldout", tokenizer=mark) for s in recipe.data.sources}
    run: Any = SimpleNamespace(recipe=recipe)
    return heldout_windows(run, {name: (store, store) for name, store in stores.items()})


def next_token_loss(denoiser: Any, windows: list[Window], special: Any, device: Any) -> dict[str, Any]:
    """The same weights as an autoregressive model: exact nats of the windows under causal attention."""
    return as_json(score_windows(denoiser, Causal(), None, windows, special, device=device))


def completions(write: Callable[[str], str], tokenizer: Any, parent: HFDenoiser) -> list[dict[str, Any]]:
    """What is written behind each prompt, token for token as the parent reads it again."""
    special, found = special_tokens(tokenizer), []
    device = next(parent.parameters()).device
    for prompt in PROMPTS:
        text = write(prompt)
        given = encode(tokenizer, prompt)
        new = encode(tokenizer, prompt + text)[len(given) :]
        one = {"prompt": prompt, "text": text, "tokens": len(new), "nats": None, "entropy": None, "distinct_2": None}
        if new:
            prompt_BP = torch.tensor([[special.bos, *given]], device=device)
            (nats,) = nats_under_parent(parent, prompt_BP, [new])
            one |= {"nats": round(nats, 4), "entropy": round(unigram_entropy(new), 4)}
        if len(new) > 1:
            one["distinct_2"] = round(distinct_n(new, 2), 4)
        found.append(one)
    return found


def score_arm(recipe: Recipe, folder: Path, data: Path, parent: HFDenoiser) -> dict[str, Any]:
    """Next-token loss and completions of a trained arm."""
    model = hub.load(folder, dtype="float32")
    windows = held_out(recipe, model.tokenizer, data)
    return {
        "next_token": next_token_loss(model.denoiser, windows, special_tokens(model.tokenizer), model.device),
        "completions": completions(
            lambda prompt: str(generate(model, prompt, max_tokens=NEW_TOKENS, steps=NEW_TOKENS)),
            model.tokenizer,
            parent,
        ),
    }


def score_parent(recipe: Recipe, tokenizer: Any, data: Path, parent: HFDenoiser) -> dict[str, Any]:
    """The same of the parent, greedy; `tokenizer` an arm's, whose start token is the one the parent likes best."""
    windows, special = held_out(recipe, tokenizer, data), special_tokens(tokenizer)
    return {
        "next_token": next_token_loss(parent, windows, special, next(parent.parameters()).device),
        "completions": completions(lambda p: greedy(parent.model, tokenizer, p, NEW_TOKENS), tokenizer, parent),
    }


def open_parent(recipe: Recipe) -> HFDenoiser:
    """The parent in float32."""
    model, _ = hub.load_parent(recipe.model.parent)
    return HFDenoiser(model.float().to(runtime.pick_device(None)).eval(), None).eval()


def study(base: Recipe, arms: list[str], seeds: list[int], tokens: int, runs: Path, results: Path) -> None:
    """Train and score what is not there yet, one JSON file per arm and seed."""
    parent: HFDenoiser | None = None
    results.mkdir(parents=True, exist_ok=True)
    todo = [(arm, seed) for seed in seeds for arm in arms]
    for k, (arm, seed) in enumerate(todo):
        recipe, name = recipe_of(base, arm, seed, tokens), f"{arm}-{tokens}-{seed}"
        path, out = results / f"{name}.json", runs / name
        result: dict[str, Any] = runtime.read_json(path) if path.is_file() else {}
        if "completions" in result:
            continue
        print(f"[{k + 1}/{len(todo)}] {arm}, seed {seed}, {tokens:,} tokens", flush=True)
        if not result:
            result = {"budget": tokens, **run_arm(recipe, arm, out, runs / "data")}
            runtime.write_atomic(path, json.dumps(result) + "\n")
        parent = parent or open_parent(base)
        result |= score_arm(recipe, out / "model", runs / "data", parent)
        reference = results / "parent.json"
        if not reference.is_file():
            found = score_parent(recipe, load_tokenizer(out / "model"), runs / "data", parent)
            runtime.write_atomic(reference, json.dumps(found) + "\n")
        runtime.write_atomic(path, json.dumps(result) + "\n")


def table(results: Path) -> str:
    """All results as a Markdown table, then every text."""
    lines = [
        "| arm | tokens | seed | bound, nats/token | next token, nats/token | written: nats/token under the parent "
        "| entropy | distinct-2 | tokens | training, s |",
        "|" + "---|" * 10,
    ]
    texts: list[str] = []
    if (results / "parent.json").is_file():
        parent = runtime.read_json(results / "parent.json")
        lines.append(f"| the parent, greedy | - | - | - | {number(parent['next_token'])} | {written(parent)} | - |")
        texts += said("the parent, greedy", parent)
    found = [runtime.read_json(path) for path in sorted(results.glob("*-*-*.json"))]
    found = [one for one in found if "completions" in one]
    for one in sorted(found, key=lambda r: (r["budget"], list(ARMS).index(r["arm"]), r["seed"])):
        lines.append(
            f"| {one['arm']} | {one['budget']:,} | {one['seed']} | {number(one['estimate'])} "
            f"| {number(one['next_token'])} | {written(one)} | {one['train_seconds']:.0f} |"
        )
        texts += said(f"{one['arm']}, {one['budget']:,} tokens, seed {one['seed']}", one)
    return "\n".join([*lines, *texts])


def written(result: dict[str, Any]) -> str:
    """Four cells: nats per token under the parent, entropy, distinct-2 (means over texts), tokens."""
    rows = [row for row in result["completions"] if row["nats"] is not None]
    count = sum(row["tokens"] for row in rows)
    nats = sum(row["nats"] for row in rows) / count if count else math.nan
    return f"{nats:.3f} | {mean(rows, 'entropy'):.2f} | {mean(rows, 'distinct_2'):.2f} | {count}"


def said(title: str, result: dict[str, Any]) -> list[str]:
    """The texts themselves."""
    return [f"\n{title}", *(f"  {row['prompt']!r}: {row['text']!r}" for row in result["completions"])]


def number(estimate: dict[str, Any]) -> str:
    """Nats per token with the standard error."""
    error = estimate["stderr_nats_per_token"]
    return f"{estimate['nats_per_token']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def mean(rows: list[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", metavar="ARM", help=f"report, or some of: {', '.join(ARMS)}")
    parser.add_argument("--recipe", type=Path, default=HERE.parent / "recipes" / "smollm2-block.toml")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="budget of each arm")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--runs", type=Path, default=Path("runs/block"), help="scratch folder")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.arms != ["report"]:
        if unknown := sorted(set(arguments.arms) - set(ARMS)):
            parser.error(f"unknown arms {unknown}; known: {', '.join(ARMS)}")
        seeds = list(range(arguments.seeds))
        base = load_recipe(arguments.recipe)
        study(base, arguments.arms, seeds, arguments.tokens, arguments.runs, arguments.results)
    print(table(arguments.results))


if __name__ == "__main__":
    main()
