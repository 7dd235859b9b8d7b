"""The paper's claims as commands: the same recipe trained in arms that differ by one thing each.

    python benchmarks/claims.py tiny                          # parent, then every arm x 3 seeds
    python benchmarks/claims.py countdown                     # puzzles: task accuracy
    python benchmarks/claims.py smollm2 --arms full,scratch   # the embedded default; arms can be added any day
    python benchmarks/claims.py report                        # tables and plots from all results so far

Every arm is `diffulm train` on the study's recipe (recipes/claims-tiny.toml, recipes/claims-smollm2.toml) with the
change ARMS names: a lab changes that one file. An arm that was killed resumes; a finished one is a small JSON file
under benchmarks/results/claims and is not run again. Seeds are the training seed: order, noise, annealing and, in the
from-scratch arm, the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

import claims_report
import countdown
import machine
from diffulm import runtime
from diffulm.adapt import data_stage, heldout_windows, score, train_arm
from diffulm.convert import convert
from diffulm.data.sources import open_source
from diffulm.denoiser import HFDenoiser
from diffulm.eval.likelihood import Estimate
from diffulm.job.arm import as_source, convert_stage
from diffulm.job.folder import Run, claim, compiles, read_state
from diffulm.layout import Annealing, Causal, Full
from diffulm.process import MaskedDiffusion
from diffulm.tokenizer import load_tokenizer, special_tokens
from diffulm.train.config import Recipe, SourceConfig, TrainConfig, load_recipe, to_dict
from diffulm.train.flops import Shape, Work, flops_per_token
from diffulm.train.loop import Budget, Progress, train
from diffulm.train.metrics import read_metrics

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent / "recipes"
RESULTS = HERE / "results" / "claims"
#: Development text, where it is there.
BOOKS = HERE.parents[1] / "shared" / "data" / "text" / "gutenberg_train.jsonl.gz"

#: The tiny study's parent: GPT-2's shape, 1.1 million parameters, no dropout.
TINY: dict[str, Any] = {
    "n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 128, "vocab_size": 2048,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
PARENT_TOKENS = 3_145_728

#: What each arm changes in its study's recipe.
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {},
    "scratch": {"model": {"initialise": "random"}, "train": {"annealing": 0.0}},
    "no-shift": {"model": {"source": "own"}},
    "no-annealing": {"train": {"annealing": 0.0}},
    "rate-form": {"noise": {"form": "rate"}},
    "complementary": {"noise": {"complementary": True}},
    "ar-continued": {},
}


def recipe_of(base: Recipe, arm: str, seed: int, tokens: int | None = None) -> Recipe:
    """The study's recipe with one arm's change, one seed and, if given, another budget."""
    changed = {table: dataclasses.replace(getattr(base, table), **values) for table, values in ARMS[arm].items()}
    recipe = dataclasses.replace(base, name=f"{base.name}/{arm}", **changed)
    train = dataclasses.replace(recipe.train, seed=seed)
    if tokens is not None:
        train = dataclasses.replace(train, tokens=tokens, steps=None, minutes=None)
    return dataclasses.replace(recipe, train=train)


def run_arm(recipe: Recipe, arm: str, out: Path, data: Path, *, keep: bool = False) -> dict[str, Any]:
    """Train and score one arm through the stages of the main job; returns its result. Its model stays in `out`.

    `data`: token shards shared by all arms (their tokenizers agree). The scoring noise has one seed for all, so that
    arms are compared on the same masks.
    """
    device = runtime.pick_device(None)
    started = time.monotonic()

    def say(text: str) -> None:
        print(text, flush=True)

    def on_step(_: str, p: Progress) -> None:
        if p.heldout is not None or p.step % max(1, p.steps // 20) == 0:
            line = f"  {arm} {p.step}/{p.steps}  {p.tokens_per_second:.0f} tok/s  loss {p.loss:.3f}"
            held = "" if p.heldout is None else f"  held-out {p.heldout:.3f}"
            say(f"{line}  {p.left:.0f} s left{held}")

    claim(out, recipe, False)
    run = Run(recipe, out, False, say, on_step, device, compiles(recipe.train, device))
    convert_stage(run)
    data.mkdir(parents=True, exist_ok=True)
    if not (out / "data").exists():
        (out / "data").symlink_to(data.resolve(), target_is_directory=True)
    stores, _ = data_stage(run)
    windows = heldout_windows(run, stores)
    causal = arm == "ar-continued"
    which, scored = ("continued", "parent_continued") if causal else ("adapted", "after")
    train_arm(run, which, stores, windows)
    estimate = score(run, scored, windows, draws=1 if causal else recipe.eval.draws)
    rows = read_metrics(out / which)
    result = {
        "arm": arm,
        "seed": recipe.train.seed,
        "tokens": rows[-1]["tokens"],
        "estimate": as_json(estimate),
        "documents": [w.document for w in windows],
        "window_tokens": [len(w.ids) for w in windows],
        "curve": [[r["tokens"], round(r["heldout"], 5)] for r in rows if r["heldout"] is not None],
        "train_seconds": round(rows[-1]["seconds"], 1),
        "seconds": round(time.monotonic() - started, 1),
        "dtype": read_state(out).get("dtype"),
        "machine": machine.describe(),
        "recipe": shareable(recipe),
    }
    if not keep:  # the parent's run keeps everything
        for leftover in out.iterdir():
            if leftover.name != "model":
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
    return result


def shareable(recipe: Recipe) -> dict[str, Any]:
    """The recipe with files by name: results go into the repository, this machine's folders do not."""
    out = to_dict(recipe)
    for source in out["data"]["sources"]:
        source["path"] = Path(source["path"]).name if "/" in source["path"] else source["path"]
    return out


def as_json(estimate: Estimate) -> dict[str, Any]:
    """An estimate with five decimals, NaN as null."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return None if math.isnan(value) else round(value, 5)
        return [short(v) for v in value] if isinstance(value, (list, tuple)) else value

    return {k: short(v) for k, v in dataclasses.asdict(estimate).items()}


def result_path(study: str, arm: str, tokens: int, seed: int) -> Path:
    return RESULTS / study / f"{arm}-{tokens}-{seed}.json"


def study(name: str, base: Recipe, arms: list[str], seeds: list[int], tokens: int | None, runs: Path) -> None:
    """Run what is not there yet, one JSON file per arm and seed."""
    budget = tokens or base.train.tokens
    assert budget is not None, "a study's budget is in tokens: equal for all arms on any machine"
    todo = [(arm, seed) for seed in seeds for arm in arms if not result_path(name, arm, budget, seed).is_file()]
    print(f"{name}: {len(arms) * len(seeds) - len(todo)} of {len(arms) * len(seeds)} arms are done", flush=True)
    for k, (arm, seed) in enumerate(todo):
        print(f"[{k + 1}/{len(todo)}] {arm}, seed {seed}, {budget:,} tokens", flush=True)
        result = run_arm(
            recipe_of(base, arm, seed, budget), arm, runs / name / f"{arm}-{budget}-{seed}", runs / name / "data"
        )
        path = result_path(name, arm, budget, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        runtime.write_atomic(path, json.dumps({"study": name, "budget": budget, **result}) + "\n")
        e = result["estimate"]
        print(f"  {arm}: {e['nats_per_token']:.3f} nats/token, {e['bits_per_byte']:.3f} bits/byte", flush=True)


def on_books(base: Recipe) -> Recipe:
    """The recipe on the development text where that is; else on its own, the text that is always there."""
    if not BOOKS.is_file():
        return base
    books = SourceConfig("books", str(BOOKS))
    return dataclasses.replace(base, data=dataclasses.replace(base.data, sources=(books,)))


def make_parent(base: Recipe, runs: Path) -> None:
    """The tiny study's parent, a GPT-2 of 4 layers x 128: tokenizer and weights trained here on the study's text."""
    folder = Path(base.model.parent)
    if (folder / "config.json").is_file():
        return
    blank = runs / "tiny" / "blank"
    if not (blank / "config.json").is_file():
        write_blank(base, blank)
    print(f"the parent: {PARENT_TOKENS:,} tokens of next-token training", flush=True)
    recipe = dataclasses.replace(recipe_of(base, "ar-continued", 0, PARENT_TOKENS), name="claims-tiny/parent")
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, parent=str(blank)))
    out = runs / "tiny" / "pretraining"
    result = run_arm(recipe, "ar-continued", out, runs / "tiny" / "data", keep=True)
    path = result_path("tiny", "parent", PARENT_TOKENS, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    runtime.write_atomic(path, json.dumps({"study": "tiny", "budget": PARENT_TOKENS, **result, "arm": "parent"}) + "\n")
    (out / "control").rename(folder)
    shutil.rmtree(out)


def write_blank(base: Recipe, folder: Path) -> None:
    """A random GPT-2 and a byte-level BPE of 2,048 tokens learnt from the study's text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    texts = (
        document.text for source in base.data.sources for document in open_source(as_source(source), folder.parent)()
    )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY["vocab_size"], special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator((text[i : i + 100_000] for text in texts for i in range(0, len(text), 1_000_000)), trainer)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, pad_token=end)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**TINY, bos_token_id=0, eos_token_id=0))
    with runtime.atomic_folder(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


# ------------------------------------------------------------------------------------------------------ countdown

#: (starting weights, causal, source, annealing): AR and diffusion fine-tuning, as in the paper's tables 3 and 7.
COUNTDOWN: dict[str, tuple[str, bool, Literal["previous", "own"], float]] = {
    "ar-scratch": ("random", True, "previous", 0.0),
    "ar-parent": ("parent", True, "previous", 0.0),
    "diffusion-scratch": ("random", False, "previous", 0.0),
    "diffusion-parent": ("parent", False, "previous", 0.3),
    "diffusion-parent-no-shift": ("parent", False, "own", 0.3),
    "diffusion-parent-no-annealing": ("parent", False, "previous", 0.0),
    "diffusion-adapted": ("adapted", False, "previous", 0.0),
}


def countdown_arm(
    arm: str, seed: int, config: TrainConfig, numbers: int, largest: int, tiny: Path, out: Path
) -> dict[str, Any]:
    """Fine-tune one arm on puzzles, answer the test puzzles, check the answers by arithmetic."""
    weights, causal, source, annealing = COUNTDOWN[arm]
    folder = countdown_start(arm, seed, tiny, out)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if causal and weights == "random":
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(model.config)
    tokenizer = load_tokenizer(folder)
    special = special_tokens(tokenizer)
    process = None if causal else MaskedDiffusion(tokenizer.mask_token_id)
    denoiser = HFDenoiser(model, special.mask, mask_row_added=True)
    tests = test_puzzles(numbers, largest)
    batches = countdown.Puzzles(
        countdown.spelling(tokenizer), special, Causal() if causal else Full(source), process, config.batch, seed,
        numbers, largest, avoid=frozenset(p.key for p in tests),
    )  # fmt: skip
    assert config.steps is not None
    anneal = Annealing(round(annealing * config.steps), seed)
    batches = dataclasses.replace(batches, annealing=None if causal else anneal)
    budget = Budget(config.steps, config.batch * batches.length)

    def report(p: Progress) -> None:
        if p.step % max(1, p.steps // 10) == 0:
            print(f"  {arm} {p.step}/{p.steps}  loss {p.loss:.4f}  {p.left:.0f} s left", flush=True)

    settings = {"arm": arm, "seed": seed, "numbers": numbers, "largest": largest}
    length = batches.length
    work = Work(length, length, length**2, batches.answer_length / (1 if causal else 2))
    train(
        denoiser, batches, config, out / "train", budget=budget, settings=settings, anneal_ratio=anneal.ratio,
        flops_per_token=flops_per_token(Shape.of(model), work), report=report,
    )  # fmt: skip
    denoiser.eval()
    said = countdown.answers(denoiser, batches, tests)
    hits = [countdown.is_solution(p.given, a) for p, a in zip(tests, said, strict=True)]
    rows = read_metrics(out / "train")
    shutil.rmtree(out)
    return {
        "arm": arm, "seed": seed, "puzzles": config.batch * config.steps, "numbers": numbers, "largest": largest,
        "test": len(tests), "hits": sum(hits), "accuracy": sum(hits) / len(hits),
        "interval": countdown.wilson(sum(hits), len(hits)),
        "nats_per_token": round(countdown.answer_nats(denoiser, batches, tests[:256]), 5),
        "samples": [[p.given, a, bool(ok)] for p, a, ok in zip(tests[:8], said, hits, strict=False)],
        "train_seconds": round(rows[-1]["seconds"], 1), "machine": machine.describe(),
        "train": {"batch": config.batch, "steps": config.steps, "learning_rate": config.learning_rate},
    }  # fmt: skip


def countdown_start(arm: str, seed: int, tiny: Path, out: Path) -> Path:
    """The folder an arm begins from: the tiny parent, its conversion, or the tiny study's adapted model."""
    weights, causal, source, _ = COUNTDOWN[arm]
    if causal:
        return tiny / "parent"
    if weights == "adapted":
        folder = tiny / f"full-{load_recipe(RECIPES / 'claims-tiny.toml').train.tokens}-0" / "model"
        if not (folder / "config.json").is_file():
            raise ValueError(f"there is no adapted tiny model in {folder}; run `claims.py tiny --arms full` first")
        return folder
    folder = out / "start"
    if not (folder / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        convert(
            str(tiny / "parent"), folder, initialise=weights, seed=seed, source=source, trained_length=64, offline=True
        )
    return folder


def test_puzzles(numbers: int, largest: int, limit: int = 500) -> list[countdown.Puzzle]:
    """The released test set where the development data is and the numbers are its; else puzzles of another stream."""
    released = BOOKS.parents[1] / "countdown" / f"cd{numbers}_test.jsonl.gz"
    if largest == 99 and released.is_file():
        return countdown.read_puzzles(released, limit)
    return [countdown.make_puzzle(-1, i, numbers, largest) for i in range(limit)]


def countdown_study(arms: list[str], seeds: list[int], steps: int, numbers: int, largest: int, runs: Path) -> None:
    """Run what is not there yet."""
    config = TrainConfig(
        batch=64, micro_batch=64, learning_rate=1e-3, steps=steps, dtype="float32", checkpoint_minutes=0.5, keep=1,
        heldout_evaluations=1,
    )  # fmt: skip
    for seed in seeds:
        for arm in arms:
            path = RESULTS / "countdown" / f"{arm}-{numbers}x{largest}-{steps}-{seed}.json"
            if path.is_file():
                continue
            print(f"countdown: {arm}, seed {seed}, {steps * config.batch:,} puzzles", flush=True)
            out = runs / "countdown" / path.stem
            result = countdown_arm(arm, seed, config, numbers, largest, runs / "tiny", out)
            path.parent.mkdir(parents=True, exist_ok=True)
            runtime.write_atomic(path, json.dumps({"study": "countdown", **result}) + "\n")
            print(f"  {arm}: {result['hits']}/{result['test']} right, {result['nats_per_token']:.4f} nats", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["tiny", "countdown", "smollm2", "report"])
    parser.add_argument("--arms", default="", help="comma-separated; default: the study's")
    parser.add_argument("--seeds", type=int, default=None, help="how many (default 3; smollm2: 1)")
    parser.add_argument("--tokens", type=int, default=None, help="budget of each arm instead of the recipe's")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="scratch folder")
    parser.add_argument("--steps", type=int, default=600, help="countdown: updates of 64 puzzles")
    parser.add_argument("--numbers", type=int, default=3, help="countdown: numbers in a puzzle")
    parser.add_argument("--largest", type=int, default=9, help="countdown: the largest number")
    arguments = parser.parse_args()
    if arguments.study == "report":
        claims_report.write(RESULTS)
        return
    puzzles, tiny = arguments.study == "countdown", arguments.study == "tiny"
    known = list(COUNTDOWN if puzzles else ARMS)
    default = known if puzzles or tiny else ["full", "scratch", "no-shift", "no-annealing"]
    arms = arguments.arms.split(",") if arguments.arms else default
    if unknown := set(arms) - set(known):
        parser.error(f"unknown arms {sorted(unknown)}; known: {', '.join(known)}")
    seeds = list(range(arguments.seeds or (1 if arguments.study == "smollm2" else 3)))
    base = load_recipe(RECIPES / f"claims-{'tiny' if puzzles else arguments.study}.toml")
    if puzzles or tiny:
        base = on_books(base)
        make_parent(base, arguments.runs)
    if puzzles:
        countdown_study(arms, seeds, arguments.steps, arguments.numbers, arguments.largest, arguments.runs)
    else:
        study(arguments.study, base, arms, seeds, arguments.tokens, arguments.runs)


if __name__ == "__main__":
    main()
