"""The main job: an autoregressive model and text in, a trained and measured diffusion model and a report out.

Stages, each kept when it is finished, so the same command resumes or says that it is done:

    init/        the converted checkpoint            data/        token shards of train and held-out text
    adapted/     checkpoints of the diffusion arm    continued/   checkpoints of the control arm
    model/       the diffusion model                 control/     the parent trained on the same text
    scores.json  likelihoods                         report.*     what came of it

The control arm trains the parent itself on the same text for the same budget: what the diffusion model is compared
with must have seen the text too.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import hub, runtime
from .data.prepare import prepare
from .data.sequences import Sequences
from .data.tokens import TokenStore
from .eval.autoregress import greedy
from .eval.likelihood import Estimate, Window, cut_windows, score_windows
from .eval.report import write_report
from .eval.summary import build_report
from .job.arm import as_source, convert_stage, diffusion_of, fit, open_arm, open_to_score, training_precision
from .job.folder import Run, Say, begin, finished, opened, read_state, stages, write_state
from .layout import Causal
from .sampling import generate, infill
from .tokenizer import encode, fingerprint, load_tokenizer
from .train.budget import BUDGET
from .train.config import Recipe, TrainConfig
from .train.flops import Shape, Work, flops_per_token
from .train.group import on_first_rank
from .train.loop import Progress
from .train.metrics import read_metrics

Stores = dict[str, tuple[TokenStore, TokenStore]]

# ------------------------------------------------------------------------------------------------------- the job


def adapt(
    recipe: Recipe,
    out: Path | str,
    *,
    command: str = "",
    control: bool = True,
    offline: bool = False,
    device: str | None = None,
    say: Say = print,
    on_step: Callable[[str, Progress], None] = lambda arm, progress: None,
) -> dict[str, Any]:
    """Run a recipe from parent to report; returns the report (also written to `out`).

    Under torchrun all processes train and score; the first one does the rest while the others wait, and it alone
    speaks. `out` is a folder that all of them see.

    Raises:
        ValueError: bad input, with the remedy; nothing is left half-written.
        KeyboardInterrupt: Ctrl-C, or SIGTERM while it trains (`train.group.Terminated`); the same call resumes.
    """
    if recipe.task != "adapt":
        raise ValueError(f"recipe {recipe.name!r} has task {recipe.task!r}; run it with diffulm.sft.sft")
    with opened(recipe, out, offline=offline, device=device, say=say, on_step=on_step) as run:
        return run_stages(run, command=command, control=control)


def run_stages(run: Run, *, command: str, control: bool) -> dict[str, Any]:
    """The stages in order; those but training and scoring on the first process alone (`alone`)."""
    recipe, out, alone = run.recipe, run.out, on_first_rank
    fresh = begin(run, control=control)
    if (done := finished(run)) is not None:
        if not alone((out / "report.html").is_file):  # killed while the report was written
            alone(lambda: write_report(done, out))
        return done
    with stages(run, "adapted", fresh=fresh) as seconds:
        alone(lambda: convert_stage(run))
        stores, data_report = data_stage(run)
        windows = heldout_windows(run, stores)
        scores = {"parent": score(run, "parent", windows, draws=1)}
        scores["before"] = score(run, "before", windows, draws=recipe.eval.draws)
        train_arm(run, "adapted", stores, windows)
        if control:
            train_arm(run, "continued", stores, windows)
        scores["after"] = score(run, "after", windows, draws=recipe.eval.draws)
        if control:
            scores["parent_continued"] = score(run, "parent_continued", windows, draws=1)
        samples = alone(lambda: sample_stage(run))

    def conclude() -> dict[str, Any]:
        report = build_report(
            recipe,
            scores,
            windows,
            arms={arm: read_metrics(out / arm) for arm in ("adapted", "continued")},
            few=few_windows(windows),
            overlap=max(source["ngram13"]["overlap"] for source in data_report["sources"].values()),
            samples=samples,
            dtype=str(training_precision(run)),
            command=command,
            total_seconds=seconds(),
            peak_memory_bytes=read_state(out)["peak_memory_bytes"],
        )
        write_measured(out / "model", report)
        write_report(report, out)
        return report

    return alone(conclude)


def write_measured(folder: Path, report: dict[str, Any]) -> None:
    """Put the measured numbers into the model card (once)."""
    card, heading = folder / "README.md", "## Measured"
    text = card.read_text(encoding="utf-8").split(heading)[0].rstrip()
    names = {"parent": "parent, exact", "before": "before training, bound", "after": "after training, bound"}
    rows = "\n".join(
        f"| {label} | {report[k]['bits_per_byte']:.3f} | {report[k]['nats_per_token']:.3f} |"
        for k, label in names.items()
    )
    table = f"| held-out text | bits per byte | nats per token |\n|---|---|---|\n{rows}\n"
    runtime.write_atomic(card, f"{text}\n\n{heading}\n\n{report['tokens']:,} tokens, {report['dtype']}.\n\n{table}")


# -------------------------------------------------------------------------------------------------------- stages


def data_stage(run: Run) -> tuple[Stores, dict[str, Any]]:
    """Token stores (train, held-out) of every source, and what preparing them reported."""
    tokenizer = load_tokenizer(run.out / "init")
    data = run.recipe.data
    sources = [as_source(s) for s in data.sources]
    run.say("preparing text: " + ", ".join(s.path for s in sources))
    report = on_first_rank(
        lambda: prepare(
            sources,
            tokenizer,
            run.out / "data",
            heldout_fraction=data.heldout_fraction,
            min_window=data.length,
            strict=data.strict,
            workers=data.workers,
            progress=sys.stderr.isatty(),
        )
    )
    print_ = fingerprint(tokenizer)
    stores = {
        s.name: (
            TokenStore.open(run.out / "data" / s.name / "train", tokenizer=print_),
            TokenStore.open(run.out / "data" / s.name / "heldout", tokenizer=print_),
        )
        for s in sources
    }
    for name, (train_store, held) in stores.items():
        run.say(
            f"  {name}: {train_store.tokens:,} tokens to train on, {held.tokens:,} held out ({len(held)} documents)"
        )
    for name, found in report["sources"].items():
        for what in ("invalid_utf8", "empty", "duplicates", "repeats_left_out"):
            if found[what]:
                run.say(f"  {name}: {found[what]} documents {_REMARKS[what]}")
    return stores, report


_REMARKS = {
    "invalid_utf8": "with invalid UTF-8, replaced (--strict refuses them)",
    "empty": "empty, skipped",
    "duplicates": "repeated, kept once",
    "repeats_left_out": "repeat held-out passages, left out of training",
}


def heldout_windows(run: Run, stores: Stores) -> list[Window]:
    """Held-out windows, an equal share of each source: the first window of every document before a second of any."""
    by_source = []
    for _, held in stores.values():
        documents = [held.document(i).tolist() for i in range(len(held))]
        sizes = [float(held.document_bytes(i)) for i in range(len(held))]
        by_source.append(cut_windows(documents, sizes, run.recipe.data.length, limit=run.recipe.eval.windows))
    if not any(by_source):
        raise ValueError(
            "no text is held out to measure with: a single document is trained on; give at least two documents "
            "(files, or lines of a jsonl file) and data.heldout_fraction above 0"
        )
    picked: list[Window] = []
    first = 0
    share = -(-run.recipe.eval.windows // len(by_source))
    for windows in by_source:
        picked += [dataclasses.replace(w, document=first + w.document) for w in windows[:share]]
        first += 1_000_000
    return picked[: run.recipe.eval.windows]


def parent_folder(run: Run) -> Path:
    """The parent as an ordinary folder with the run's start token: opened once per run from wherever it came."""
    folder = run.out / "parent"
    if not (folder / "config.json").is_file():
        model, tokenizer = hub.load_parent(run.recipe.model.parent, offline=run.offline)
        tokenizer.bos_token = load_tokenizer(run.out / "init").bos_token
        with runtime.atomic_folder(folder) as aside, hub.quiet_transformers():
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    return folder


_ARMS = {"parent": "parent", "before": "init", "after": "model", "parent_continued": "control"}


def score(run: Run, what: str, windows: list[Window], *, draws: int) -> Estimate:
    """Likelihood of the held-out windows under one of the four models; computed once, then read."""
    stored = on_first_rank(lambda: read_state(run.out).get(what))
    if stored:
        return Estimate(
            **{**stored, "by_level": tuple(map(tuple, stored["by_level"])), "per_window": tuple(stored["per_window"])}
        )
    causal = what.startswith("parent")
    folder = on_first_rank(lambda: parent_folder(run)) if what == "parent" else run.out / _ARMS[what]
    run.say(f"scoring {what.replace('_', ' ')} on {len(windows)} held-out windows")
    denoiser, special = open_to_score(run, folder, causal=causal)
    layout, process = (Causal(), None) if causal else diffusion_of(run, special)
    estimate = score_windows(
        denoiser, layout, process, windows, special, draws=draws, seed=run.recipe.train.seed, device=run.device
    )
    run.say(
        f"  {estimate.bits_per_byte:.3f} +- {estimate.stderr:.3f} bits/byte, {estimate.nats_per_token:.3f} nats/token"
    )
    write_state(run.out, **{what: dataclasses.asdict(estimate)})
    return estimate


def train_arm(run: Run, arm: str, stores: Stores, windows: list[Window]) -> None:
    """Train the diffusion arm or the control, resuming if it was begun, and write it as an ordinary folder."""
    final = run.out / ("model" if arm == "adapted" else "control")
    if (final / "config.json").is_file():
        return
    recipe, causal = run.recipe, arm == "continued"
    folder = parent_folder(run) if causal else run.out / "init"
    denoiser, tokenizer, special = open_arm(run, folder, causal=causal)
    layout, process = (Causal(), None) if causal else diffusion_of(run, special)
    run.say(f"training {'the parent on the same text (control)' if causal else 'the diffusion model'}")
    few = few_windows(windows)

    def heldout() -> float:
        estimate = score_windows(denoiser, layout, process, few, special, draws=2, seed=1, device=run.device)
        return estimate.nats_per_token

    sequences = [
        Sequences.cut(stores[s.name][0], recipe.data.length, special, pack=recipe.data.pack)
        for s in recipe.data.sources
    ]
    cost = flops_per_token(Shape.of(denoiser.model), Work.of(recipe, causal=causal))
    config = control_config(run) if causal else recipe.train
    made = fit(
        run, arm, folder, denoiser, sequences, layout, process, config=config, flops_per_token=cost, heldout=heldout
    )

    def write() -> None:
        if causal:
            hub.save_plain(final, denoiser.model, tokenizer, state_dict=made.weights)
        else:
            diffusion = {**denoiser.config.diffusion, "tokens_seen": made.tokens}
            text = card(run, made.tokens)
            hub.save(final, denoiser.model, tokenizer, diffusion, state_dict=made.weights, card=text)

    on_first_rank(write)


def control_config(run: Run) -> TrainConfig:
    """The control's training: causal throughout, with the diffusion arm's steps (equal text, equal updates)."""
    config = dataclasses.replace(run.recipe.train, annealing=0.0, block_sizes=())
    if (other := run.out / "adapted" / BUDGET).is_file():
        steps = runtime.read_json(other)["steps"]
        config = dataclasses.replace(config, minutes=None, tokens=None, steps=steps)
    return config


def few_windows(windows: list[Window]) -> list[Window]:
    """The windows of the in-loop evaluation: six at most, spread over all."""
    return windows[:: max(1, len(windows) // 6)][:6]


def card(run: Run, tokens: int) -> str:
    """What a model card says beyond the config."""
    texts = ", ".join(
        f"{' '.join((s.path, *s.more))}" + (f" (weight {s.weight:g})" if s.weight else "")
        for s in run.recipe.data.sources
    )
    return f"Recipe `{run.recipe.name}`, {tokens:,} tokens of: {texts}. \n"


def sample_stage(run: Run) -> dict[str, Any]:
    """Completions by parent and child, infills before and after; computed once."""
    stored = read_state(run.out).get("samples")
    if stored:
        found: dict[str, Any] = stored
        return found
    settings, blocks = run.recipe.eval, run.recipe.model.layout == "block"
    run.say("drawing samples")
    parent, _ = hub.open_model(parent_folder(run), dtype=torch.float32)
    tokenizer = load_tokenizer(run.out / "init")
    completions = [
        {"prompt": p, "parent": greedy(parent.to(run.device).eval(), tokenizer, p, settings.max_tokens)}
        for p in settings.prompts
    ]
    del parent
    # A block checkpoint does not see what stands after a hole.
    holes = () if blocks else settings.infills
    infills: list[dict[str, str]] = [{"prefix": a, "truth": t, "suffix": b} for a, t, b in holes]
    for what in ("before", "after"):
        model = hub.load(run.out / _ARMS[what], device=str(run.device), dtype="float32")
        for row in infills:
            length = len(encode(tokenizer, row["truth"]))
            row[what] = infill(model, row["prefix"], row["suffix"], length=length).fills[0]
        if what == "after":
            for row in completions:
                row["after"] = str(generate(model, row["prompt"], max_tokens=settings.max_tokens, steps=settings.steps))
    text = (
        f"greedy; {settings.max_tokens} tokens, the diffusion model in {settings.steps} steps, most confident first"
        + (", block after block" if blocks else "; infills have the true length in tokens, one token a step")
    )
    samples = {"completions": completions, "infills": infills, "settings": text}
    write_state(run.out, samples=samples)
    return samples
