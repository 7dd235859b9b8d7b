"""`diffulm eval`: tasks and texts for a diffusion model, and for its AR parent through identical prompts."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__, hub, runtime
from . import generated, harness
from .compare import by_draws, paired_texts, published, task_figures, text_figures, undecided
from .generate import How, Writer
from .generation_tasks import GENERATION
from .likelihood import Estimate
from .packaged import Prompt
from .rate import Progress, Rater, diffusion_scorer, parent_rater, silent
from .scoreboard import write
from .store import Store, pack
from .tasks import TASKS, check_limit, documents_of, find_tasks

#: Masks per option, and per window of a text, where --draws does not say.
DRAWS, WINDOW_DRAWS = 128, 8


@dataclass(frozen=True)
class Plan:
    """What is to be measured, the same for both models. `folder`: local files; None takes tasks from the Hub. fewshot:
    None is each task's own: none where likelihoods are compared, `Generation.shots` where a model writes. guidance:
    scale of classifier-free guidance by the context, in the scores of options alone; None: none."""

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    draws: int | None = None
    seed: int = 0
    fewshot: int | None = None
    chat: bool = False
    confidence: float | None = None
    guidance: float | None = None
    how: How = field(default_factory=How)

    def __post_init__(self) -> None:
        check_limit(self.limit)
        if self.draws is not None and self.draws < 1:
            raise ValueError(f"draws must be at least 1, not {self.draws}")
        if self.fewshot is not None and self.fewshot < 0:
            raise ValueError(f"fewshot must not be negative, not {self.fewshot}")
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"--data-dir {self.folder} is no folder; give the one that holds the tasks' files")


@dataclass
class Measured:
    """One model's results: documents by task, likelihoods by text, seconds by either, what was written by task."""

    tasks: dict[str, list[harness.Document]]
    texts: dict[str, list[Estimate]]
    seconds: dict[str, float]
    written: dict[str, generated.Session] = field(default_factory=dict)


def evaluate(
    model: str,
    plan: Plan,
    *,
    parent: str | None = None,
    out: Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
    adapter: str | None = None,
    offline: bool = False,
    command: str = "",
    on_progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a checkpoint, and its parent where one is named, on the same documents; returns the report.

    With `out`: results go to scores.jsonl there as they are known (the same call again goes on), then documents.jsonl,
    report.json, report.md and report.html. ValueError for what cannot be measured: unknown tasks and
    wrong files before a model is opened, an option that does not fit when its turn comes.
    """
    plan = replace(plan, names=tuple(find_tasks(plan.names, list(GENERATION))))
    if offline and plan.folder is None and any(name in TASKS or name in GENERATION for name in plan.names):
        raise ValueError("without the Hub tasks need local files; give --data-dir, or leave out --offline")
    # Files are read and prompts built before a model is opened: what is wrong there is found in seconds.
    built = build(plan)
    to_write = {
        name: generated.build(name, plan.folder, plan.fewshot, execute=plan.how.execute)
        for name in plan.names
        if name in GENERATION
    }
    given = [name for name in plan.names if name not in TASKS and name not in GENERATION]
    texts = {name: documents_of(name, plan.folder)[: plan.limit] for name in given}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    store = Store(None if out is None else out / "scores.jsonl")
    began = time.perf_counter()
    loaded = hub.load(model, device=device, dtype=dtype, adapter=adapter, offline=offline)
    scorer = diffusion_scorer(
        loaded, draws=plan.draws or DRAWS, seed=plan.seed, confidence=plan.confidence, guidance=plan.guidance
    )
    child = Rater(scorer, loaded.tokenizer, "model", store, plan.chat, on_progress)
    writer = Writer(child, plan.how, loaded)
    asked = {name: generated.prompts(one, writer, plan.limit, chat=plan.chat) for name, one in to_write.items()}
    kept = {name: generated.givable(GENERATION[name], items, writer) for name, items in asked.items()}
    left_out = warned({name: len(asked[name]) - len(items) for name, items in kept.items()})
    mine = measure(writer, plan, built, texts, kept, say)
    theirs = None
    if parent is not None:
        above = parent_rater(parent, child, offline=offline)
        theirs = measure(Writer(above, plan.how), plan, build(plan), texts, kept, say)
    left_out |= warned(leave_out(mine, theirs))
    guided = {} if plan.guidance is None else {"guidance": plan.guidance}
    report = {
        "model": {"name": model, "kind": "NELBO" if plan.guidance is None else "guided score", **loaded.config},
        "parent": None if parent is None else {"name": parent, "kind": "exact"},
        "settings": {
            "draws": plan.draws or DRAWS, "window_draws": plan.draws or WINDOW_DRAWS, "seed": plan.seed,
            "fewshot": plan.fewshot or 0, "limit": plan.limit, "chat_template": plan.chat,
            "confidence": plan.confidence, "data": "local files" if plan.folder else "Hub",
            "dtype": str(loaded.denoiser.precision), "length": scorer.length,
        } | guided | ({"writing": asdict(plan.how)} if to_write else {}),
        "tasks": [task_report(name, mine, theirs, plan.seed, model, parent, left_out[name]) for name in mine.tasks],
        "generation": [
            generated.report(
                to_write[name], mine.written[name], theirs.written[name] if theirs else None, writer, model, parent,
                left_out[name],
            )
            for name in mine.written
        ],
        "texts": [text_report(name, texts[name], mine, theirs) for name in mine.texts],
        **provenance(command, began),
    }  # fmt: skip
    if out is not None:
        keep_documents(out, mine, theirs)
        write(report, out)
    return report


def build(plan: Plan) -> dict[str, list[Any]]:
    """Task objects, fresh for each model: lm-eval keeps a model's answers in them."""
    return {name: harness.build(TASKS[name], plan.folder, plan.fewshot or 0) for name in plan.names if name in TASKS}


def measure(
    writer: Writer, plan: Plan, built: dict[str, list[Any]], texts: dict[str, list[str]],
    asked: dict[str, list[Prompt]], say: Callable[[str], None],
) -> Measured:  # fmt: skip
    """All tasks and texts with one model."""
    rater = writer.rater
    who, done = rater.label, Measured({}, {}, {})
    for name in plan.names:
        rater.label = f"{who}, {Path(name).name}"
        began = time.perf_counter()
        if name in built:
            model = harness.language_model(rater)
            done.tasks[name] = harness.run(
                model, built[name], fewshot=plan.fewshot or 0, limit=plan.limit, chat=plan.chat
            )  # fmt: skip
        elif name in asked:
            done.written[name] = generated.measure(GENERATION[name], asked[name], writer)
        else:
            # A parent is exact with any number of draws.
            done.texts[name] = rater.texts(texts[name], draws=plan.draws or WINDOW_DRAWS)
            if not done.texts[name]:
                raise ValueError(f"{name} has no text; give another file")
        done.seconds[name] = time.perf_counter() - began
        say(f"{rater.label}: done")
    return done


def leave_out(mine: Measured, theirs: Measured | None) -> dict[str, int]:
    """Take documents that have no scores (`harness.Document`) from both sides; how many, by task. ValueError where none
    is left."""
    counts = {}
    for name, documents in mine.tasks.items():
        kept = [d for d in documents if d.scores]
        if not kept:
            raise ValueError(f"every question of {name} has an option that is the mask token alone; leave the task out")
        mine.tasks[name], counts[name] = kept, len(documents) - len(kept)
        if theirs is not None:
            ids = {d.id for d in kept}
            theirs.tasks[name] = [d for d in theirs.tasks[name] if d.id in ids]
    return counts


def warned(left_out: dict[str, int]) -> dict[str, int]:
    """Documents left out, by task, said aloud."""
    for name, count in left_out.items():
        if count:
            runtime.log.warning("%s: left out on both sides because of the mask token: %d documents", name, count)
    return left_out


def task_report(
    name: str, mine: Measured, theirs: Measured | None, seed: int, model: str, parent: str | None, left_out: int
) -> dict[str, Any]:
    """One task as the report holds it."""
    documents = mine.tasks[name]
    other = None if theirs is None else {d.id: d.metrics for d in theirs.tasks[name]}
    scores = [s for d in documents for s in d.scores]
    return {
        "task": name,
        "metric": TASKS[name].metric,
        "remark": generated.with_left_out(TASKS[name].remark, left_out),
        "left_out": left_out,
        "documents": len(documents),
        "figures": task_figures({d.id: d.metrics for d in documents}, other, seed=seed),
        "by_draws": by_draws(documents, TASKS[name].metric),
        "undecided": sum(undecided(d.scores) for d in documents),
        "options": len(scores),
        "forwards": sum(s.forwards for s in scores),
        "truncated": sum(s.truncated > 0 for s in scores),
        "skipped_tokens": sum(s.skipped for s in scores),
        "seconds": round(mine.seconds[name], 1),
        "published": {
            "model": published(model, name),
            "parent": None if parent is None else published(parent, name),
        },
    }


def text_report(name: str, documents: Sequence[str], mine: Measured, theirs: Measured | None) -> dict[str, Any]:
    """One text as the report holds it."""
    words = sum(len(text.split()) + text.count("\n") for text in documents)
    found: dict[str, Any] = {
        "text": Path(name).name, "documents": len(mine.texts[name]), "words": words,
        "model": text_figures(mine.texts[name], words), "seconds": round(mine.seconds[name], 1),
    }  # fmt: skip
    if theirs is not None:
        found["parent"] = text_figures(theirs.texts[name], words)
        found["paired"] = paired_texts(mine.texts[name], theirs.texts[name])
    return found


def keep_documents(out: Path, mine: Measured, theirs: Measured | None) -> None:
    """documents.jsonl: every document's metrics, scores and texts, of both models side by side."""

    def sides(measured: Measured | None) -> dict[tuple[str, str, str], Any]:
        """By (task, way of infilling, document)."""
        if measured is None:
            return {}
        found: dict[tuple[str, str, str], Any] = {
            (name, "", d.id): {"metrics": d.metrics, "scores": [pack(score) for score in d.scores]}
            for name, documents in measured.tasks.items()
            for d in documents
        }
        for name, session in measured.written.items():
            for way, documents in session.documents.items():
                found |= {(name, way, d.id): {"metrics": d.metrics, "texts": d.texts} for d in documents}
        return found

    model, parent = sides(mine), sides(theirs)
    lines = []
    for task, way, document in {**model, **parent}:
        line = {"task": task, **({"way": way} if way else {}), "id": document}
        for name, side in (("model", model), ("parent", parent)):
            if (task, way, document) in side:
                line[name] = side[task, way, document]
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    runtime.write_atomic(out / "documents.jsonl", "".join(lines))


def provenance(command: str, began: float) -> dict[str, Any]:
    """How a report came about: machine, versions, command, and seconds since `began` (`time.perf_counter`)."""
    return {
        "machine": runtime.describe_machine(), "versions": versions(), "command": command,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions that a score may depend on."""
    found = {"diffulm": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "lm_eval"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
