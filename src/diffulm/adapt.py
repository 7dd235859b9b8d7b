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
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import hub, runtime
from .convert import convert
from .data.loader import ORDER, Loader, Mixture, Sequences
from .data.prepare import prepare
from .data.sources import Source
from .data.tokens import TokenStore
from .denoiser import HFDenoiser
from .eval.likelihood import Estimate, Window, cut_windows, score_windows
from .eval.report import write_report
from .eval.summary import build_report
from .layout import Annealing, Block, Causal, Full, Growth
from .process import MaskedDiffusion
from .sampling import generate, infill
from .schedule import schedule_from_name
from .tokenizer import SpecialTokens, decode, encode, fingerprint, load_tokenizer, special_tokens
from .train.budget import BUDGET, find_budget, plan_budget
from .train.checkpoint import full_model_state
from .train.config import Recipe, SourceConfig, differing_keys, to_dict
from .train.flops import Shape, Work, flops_per_token
from .train.loop import Progress, train
from .train.metrics import read_metrics
from .train.parallel import check_world, parallelize

MARKER = "adapt.json"
Say = Callable[[str], None]


@dataclass
class Run:
    """What the stages of one run share."""

    recipe: Recipe
    out: Path
    offline: bool
    say: Say
    on_step: Callable[[str, Progress], None]
    device: torch.device
    compile: bool


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

    Under torchrun all processes train; the first one does the rest while the others wait, and it alone speaks. `out`
    is a folder that all of them see.

    Raises:
        ValueError: bad input, with the remedy; nothing is left half-written.
        KeyboardInterrupt: Ctrl-C, or SIGTERM while it trains (`runtime.Terminated`); the same call resumes.
    """
    if recipe.task != "adapt":
        raise ValueError(f"recipe {recipe.name!r} has task {recipe.task!r}; run it with diffulm.sft.sft")
    where = runtime.pick_device(device)
    with runtime.process_group(where) as (rank, world):
        if rank:
            say, on_step = (lambda _: None), (lambda arm, progress: None)
        run = Run(recipe, Path(out), offline, say, on_step, where, compile=False)
        return run_stages(run, command=command, control=control, world=world)


def run_stages(run: Run, *, command: str, control: bool, world: int) -> dict[str, Any]:
    """The stages in order; those but training on the first process alone (`alone`)."""
    recipe, out, alone = run.recipe, run.out, runtime.on_first_rank

    def begin() -> bool:
        check_world(recipe.train, world)
        return claim(out, recipe, control)

    fresh = alone(begin)
    if alone((out / "report.json").is_file):
        return alone(lambda: finished_report(run))
    if world > 1:
        run.say(f"{world} processes on {run.device.type}")
    wants = recipe.train.compile
    auto = wants == "auto" and (run.device.type == "cuda" or alone(runtime.can_compile))
    run.compile = wants == "on" or auto
    started = time.perf_counter() - float(read_state(out).get("seconds_before", 0))
    try:
        alone(lambda: convert_stage(run))
        stores, data_report = data_stage(run)
        windows = heldout_windows(run, stores)
        parent = alone(lambda: score(run, "parent", windows, draws=1))
        before = alone(lambda: score(run, "before", windows, draws=recipe.eval.draws))
        train_arm(run, "adapted", stores, windows)
        if control:
            train_arm(run, "continued", stores, windows)
        continued = alone(lambda: score(run, "parent_continued", windows, draws=1)) if control else None
        after = alone(lambda: score(run, "after", windows, draws=recipe.eval.draws))
        samples = alone(lambda: sample_stage(run))
    except ValueError:
        if is_first() and fresh and not (out / "adapted").exists():  # nothing that a corrected command would trip over
            shutil.rmtree(out)
        raise
    finally:
        peak = max(runtime.peak_memory_bytes(), int(read_state(out).get("peak_memory_bytes", 0)))
        if out.exists():
            write_state(out, seconds_before=time.perf_counter() - started, peak_memory_bytes=peak)
    scores = {"parent": parent, "before": before, "after": after}
    if continued:
        scores["parent_continued"] = continued

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
            total_seconds=time.perf_counter() - started,
            peak_memory_bytes=peak,
        )
        write_measured(out / "model", report)
        write_report(report, out)
        return report

    return alone(conclude)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return runtime.rank_and_world()[0] == 0


def finished_report(run: Run) -> dict[str, Any]:
    """The report of a run that is done."""
    out = run.out
    report: dict[str, Any] = runtime.read_json(out / "report.json")
    if not (out / "report.html").is_file():  # killed while the report was written
        write_report(report, out)
    run.say(f"{out} is finished; its report is {out / 'report.md'} (another --out starts afresh)")
    return report


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


def claim(out: Path, recipe: Recipe, control: bool) -> bool:
    """Make `out` ours, and say whether it is new; else it was begun by the same recipe. ValueError otherwise."""
    wanted = {"recipe": json.loads(json.dumps(to_dict(recipe))), "control": control}
    marker = out / MARKER
    for leftover in out.glob(".*.tmp") if marker.is_file() else ():  # of a killed run
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if marker.is_file():
        there = runtime.read_json(marker)
        keys = [*differing_keys(there["recipe"], wanted["recipe"])] + ["control"] * (there["control"] != control)
        if keys:
            raise ValueError(
                f"{out} holds a run with other settings ({', '.join(keys[:5])} differ); choose another --out"
            )
        return False
    # A marker half written by a killed run is ours.
    if out.exists() and (not out.is_dir() or any(not p.match(f".{MARKER}.*.tmp") for p in out.iterdir())):
        raise ValueError(f"{out} already holds something that is no diffulm run; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    runtime.write_atomic(marker, json.dumps(wanted, indent=1))
    return True


def read_state(out: Path) -> dict[str, Any]:
    path = out / "scores.json"
    return runtime.read_json(path) if path.is_file() else {}


def write_state(out: Path, **values: Any) -> None:
    if not is_first():
        return
    runtime.write_atomic(out / "scores.json", json.dumps({**read_state(out), **values}, indent=1))


# -------------------------------------------------------------------------------------------------------- stages


def convert_stage(run: Run) -> None:
    model = run.recipe.model
    if (run.out / "init" / "config.json").is_file():
        return
    run.say(f"converting {model.parent}")
    done = convert(
        model.parent, run.out / "init", initialise=model.initialise, seed=run.recipe.train.seed,
        mask_token=model.mask_token, source=model.source, layout=model.layout,
        block_size=model.block_size, schedule=run.recipe.noise.schedule, t_min=run.recipe.noise.t_min,
        trained_length=run.recipe.data.length, offline=run.offline,
    )  # fmt: skip
    nll = ", ".join(f"{k} {v:.2f}" for k, v in done.start_nll.items())
    run.say(f"  mask {done.mask_token} = {done.mask_token_id} ({done.mask_row}), start {done.start_token}")
    if nll:
        run.say(f"  the parent's nats/token behind each candidate start: {nll}")


def data_stage(run: Run) -> tuple[dict[str, tuple[TokenStore, TokenStore]], dict[str, Any]]:
    """Token stores (train, held-out) of every source, and what preparing them reported."""
    tokenizer = load_tokenizer(run.out / "init")
    data = run.recipe.data
    sources = [as_source(s) for s in data.sources]
    run.say("preparing text: " + ", ".join(s.path for s in sources))
    report = runtime.on_first_rank(
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


def as_source(config: SourceConfig) -> Source:
    weight = 1.0 if config.weight is None else config.weight
    return Source(
        config.name, config.path, weight, config.text_field, tuple(config.exclude), tuple(config.more), config.subset,
        config.split, config.limit_documents, config.limit_bytes,
    )  # fmt: skip


def heldout_windows(run: Run, stores: dict[str, tuple[TokenStore, TokenStore]]) -> list[Window]:
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


def open_arm(run: Run, folder: Path, *, causal: bool) -> tuple[HFDenoiser, Any, SpecialTokens]:
    """(denoiser in float32, tokenizer, special tokens) of a checkpoint, for training or exact scoring."""
    precision = training_precision(run)
    model, _ = hub.open_model(folder, dtype=precision.weights)
    tokenizer = load_tokenizer(folder)
    # The parent has no mask token, but what the child leaves out of the score is left out for it too.
    special = special_tokens(load_tokenizer(run.out / "init"))
    added = bool(getattr(model.config, "diffusion", {}).get("mask_row_added", True)) if not causal else True
    denoiser = HFDenoiser(
        model.to(run.device), None if causal else special.mask, mask_row_added=added, precision=precision
    )
    return denoiser.eval(), tokenizer, special


def training_precision(run: Run) -> runtime.Precision:
    """The recipe's dtype, or the one measured here; asked once and stored, so that a resume computes the same."""
    state = read_state(run.out)
    stored = state.get("dtype")
    if state.get("threads", torch.get_num_threads()) != torch.get_num_threads():
        run.say(f"this run began with {state['threads']} threads: resumed with others it is not the same bit for bit")
    name = stored or run.recipe.train.dtype
    if name == "auto":
        config = runtime.read_json(run.out / "init" / "config.json")
        width = int(config.get("hidden_size") or config.get("n_embd") or 512)
        hidden = int(config.get("intermediate_size") or config.get("n_inner") or 4 * width)
        rows = run.recipe.train.micro_batch * run.recipe.data.length
        choice, seconds = runtime.probe_precision(width, hidden, rows=rows, device=run.device, train=True)
        name = "autocast" if choice.autocast is not None else str(choice.weights).removeprefix("torch.")
        times = ", ".join(f"{k} {v * 1e3:.0f} ms" for k, v in seconds.items())
        run.say(f"dtype {choice}" + (f" (measured: {times})" if times else ""))
    if stored is None:
        write_state(run.out, dtype=name, threads=torch.get_num_threads())
    return runtime.parse_precision(name)


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
    stored = read_state(run.out).get(what)
    if stored:
        return Estimate(
            **{**stored, "by_level": tuple(map(tuple, stored["by_level"])), "per_window": tuple(stored["per_window"])}
        )
    causal = what.startswith("parent")
    folder = parent_folder(run) if what == "parent" else run.out / _ARMS[what]
    run.say(f"scoring {what.replace('_', ' ')} on {len(windows)} held-out windows")
    denoiser, _, special = open_arm(run, folder, causal=causal)
    layout, process = (Causal(), None) if causal else diffusion_of(run, special)
    estimate = score_windows(
        denoiser, layout, process, windows, special, draws=draws, seed=run.recipe.train.seed, device=run.device
    )
    run.say(
        f"  {estimate.bits_per_byte:.3f} +- {estimate.stderr:.3f} bits/byte, {estimate.nats_per_token:.3f} nats/token"
    )
    write_state(run.out, **{what: dataclasses.asdict(estimate)})
    return estimate


def diffusion_of(run: Run, special: SpecialTokens) -> tuple[Full | Block, MaskedDiffusion]:
    model, noise = run.recipe.model, run.recipe.noise
    assert special.mask is not None
    process = MaskedDiffusion(special.mask, schedule_from_name(noise.schedule), noise.t_min)
    if model.layout == "full":
        return Full(model.source), process  # type: ignore[arg-type]
    return Block(model.block_size or 8, model.source, noise.ar_weight), process  # type: ignore[arg-type]


def train_arm(run: Run, arm: str, stores: dict[str, tuple[TokenStore, TokenStore]], windows: list[Window]) -> None:
    """Train the diffusion arm or the control, resuming if it was begun, and write it as an ordinary folder."""
    final = run.out / ("model" if arm == "adapted" else "control")
    if (final / "config.json").is_file():
        return
    recipe, causal = run.recipe, arm == "continued"
    folder = parent_folder(run) if causal else run.out / "init"
    denoiser, tokenizer, special = open_arm(run, folder, causal=causal)
    layout, process = (Causal(), None) if causal else diffusion_of(run, special)
    config = recipe.train
    if causal:
        config = dataclasses.replace(config, annealing=0.0)
        if (other := run.out / "adapted" / BUDGET).is_file():  # the same budget in tokens: equal text, equal updates
            steps = runtime.read_json(other)["steps"]
            config = dataclasses.replace(config, minutes=None, tokens=None, steps=steps)
    run.say(f"training {'the parent on the same text (control)' if causal else 'the diffusion model'}")
    cost = flops_per_token(Shape.of(denoiser.model), Work.of(recipe, causal=causal))
    parallelize(
        denoiser, denoiser.precision, compile=run.compile,
        activation_checkpointing=config.activation_checkpointing, replicas=config.replicas,
    )  # fmt: skip
    loader = build_loader(run, stores, special, layout, process)
    budget = plan_budget(
        run.out / arm, lambda: find_budget(config, loader, denoiser, length=recipe.data.length, device=run.device)
    )
    annealing = Annealing(round(config.annealing * budget.steps), config.seed)
    growth = Growth(config.block_sizes, budget.steps) if config.block_sizes and not causal else None
    loader = dataclasses.replace(loader, annealing=annealing, growth=growth)
    passes = loader.mixture.epochs(budget.steps * config.batch)
    if passes > 1:
        better = ": more text would serve better" if passes > 4 else ""
        run.say(f"  a source of text is passed over {passes:.1f} times in this budget (epochs){better}")
    few = few_windows(windows)

    def heldout() -> float:
        estimate = score_windows(denoiser, layout, process, few, special, draws=2, seed=1, device=run.device)
        return estimate.nats_per_token

    settings = {"recipe": json.loads(json.dumps(to_dict(recipe))), "arm": arm, "order": ORDER}
    train(
        denoiser, loader, config, run.out / arm, budget=budget, settings=settings, anneal_ratio=annealing.ratio,
        epochs=loader.mixture.epochs, heldout=heldout, normalisation=recipe.noise.normalisation,
        flops_per_token=cost, report=lambda p: run.on_step(arm, p),
    )  # fmt: skip
    weights = {k.removeprefix("model."): v for k, v in full_model_state(denoiser).items()}
    seen = budget.steps * budget.tokens_per_step

    def write() -> None:
        if causal:
            with runtime.atomic_folder(final) as aside, hub.quiet_transformers():
                denoiser.model.save_pretrained(aside, state_dict=weights)  # type: ignore[operator]
                tokenizer.save_pretrained(aside)
        else:
            diffusion = {**denoiser.config.diffusion, "tokens_seen": seen}
            hub.save(final, denoiser.model, tokenizer, diffusion, state_dict=weights, card=card(run, seen))

    runtime.on_first_rank(write)


def few_windows(windows: list[Window]) -> list[Window]:
    """The windows of the in-loop evaluation: six at most, spread over all."""
    return windows[:: max(1, len(windows) // 6)][:6]


def build_loader(
    run: Run,
    stores: dict[str, tuple[TokenStore, TokenStore]],
    special: SpecialTokens,
    layout: Full | Block | Causal,
    process: MaskedDiffusion | None,
) -> Loader:
    recipe = run.recipe
    sequences = [
        Sequences.cut(stores[s.name][0], recipe.data.length, special, pack=recipe.data.pack)
        for s in recipe.data.sources
    ]
    given = [s.weight for s in recipe.data.sources]
    weights = [float(len(q)) if w is None else w for q, w in zip(sequences, given, strict=True)]
    mixture = Mixture(sequences, weights, recipe.train.seed)
    return Loader(
        mixture, layout, process, recipe.train.batch, recipe.train.micro_batch, recipe.train.seed,
        form=recipe.noise.form, complementary=recipe.noise.complementary, fixed_shapes=run.device.type == "cuda",
    )  # fmt: skip


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


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompt: str, max_tokens: int) -> str:
    """The parent's most probable continuation, token by token, through transformers."""
    special = special_tokens(tokenizer)
    ids = torch.tensor([[special.bos, *encode(tokenizer, prompt)]], device=model.device)
    with hub.quiet_transformers():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=special.pad,
        )
    new = out[0, ids.shape[1] :].tolist()
    for end in (special.eos, special.bos):
        if end in new:
            new = new[: new.index(end)]
    return decode(tokenizer, new)
