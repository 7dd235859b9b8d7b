"""`diffulm eval`: tasks and texts for a diffusion model, and for its AR parent through identical prompts."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__, hub, runtime
from . import harness
from .compare import paired_texts, published, task_figures, text_figures, undecided
from .likelihood import Estimate
from .rate import Progress, Rater, diffusion_scorer, parent_rater, silent
from .scoreboard import write
from .store import Store, pack
from .tasks import TASKS, documents_of, find_tasks

#: Masks per option, and per window of a text, where --draws does not say.
DRAWS, WINDOW_DRAWS = 128, 8


@dataclass(frozen=True)
class Plan:
    """What is to be measured, the same for both models. `folder`: local files; None takes tasks from the Hub."""

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    draws: int | None = None
    seed: int = 0
    fewshot: int = 0
    chat: bool = False
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, not {self.limit}")
        if self.draws is not None and self.draws < 1:
            raise ValueError(f"draws must be at least 1, not {self.draws}")
        if self.fewshot < 0:
            raise ValueError(f"fewshot must not be negative, not {self.fewshot}")
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"--data-dir {self.folder} is no folder; give the one that holds the tasks' files")


@dataclass
class Measured:
    """One model's results: documents by task, likelihoods by text, seconds by either."""

    tasks: dict[str, list[harness.Document]]
    texts: dict[str, list[Estimate]]
    seconds: dict[str, float]


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
    plan = replace(plan, names=tuple(find_tasks(plan.names)))
    if offline and plan.folder is None and any(name in TASKS for name in plan.names):
        raise ValueError("without the Hub tasks need local files; give --data-dir, or leave out --offline")
    # Files are read and prompts built before a model is opened: what is wrong there is found in seconds.
    built = build(plan)
    texts = {name: documents_of(name, plan.folder)[: plan.limit] for name in plan.names if name not in TASKS}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    store = Store(None if out is None else out / "scores.jsonl")
    began = time.perf_counter()
    loaded = hub.load(model, device=device, dtype=dtype, adapter=adapter, offline=offline)
    scorer = diffusion_scorer(loaded, draws=plan.draws or DRAWS, seed=plan.seed, confidence=plan.confidence)
    child = Rater(scorer, loaded.tokenizer, "model", store, plan.chat, on_progress)
    mine = measure(child, plan, built, texts, say)
    theirs = None
    if parent is not None:
        above = parent_rater(parent, child, offline=offline)
        theirs = measure(above, plan, build(plan), texts, say)
    report = {
        "model": {"name": model, "kind": "NELBO", **loaded.config},
        "parent": None if parent is None else {"name": parent, "kind": "exact"},
        "settings": {
            "draws": plan.draws or DRAWS, "window_draws": plan.draws or WINDOW_DRAWS, "seed": plan.seed,
            "fewshot": plan.fewshot, "limit": plan.limit, "chat_template": plan.chat, "confidence": plan.confidence,
            "data": "local files" if plan.folder else "Hub", "dtype": str(loaded.denoiser.precision),
            "length": scorer.length,
        },
        "tasks": [task_report(name, mine, theirs, plan.seed, model, parent) for name in mine.tasks],
        "texts": [text_report(name, texts[name], mine, theirs) for name in mine.texts],
        "machine": runtime.describe_machine(),
        "versions": versions(),
        "command": command,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    if out is not None:
        keep_documents(out, mine, theirs)
        write(report, out)
    return report


def build(plan: Plan) -> dict[str, list[Any]]:
    """Task objects, fresh for each model: lm-eval keeps a model's answers in them."""
    return {name: harness.build(TASKS[name], plan.folder, plan.fewshot) for name in plan.names if name in TASKS}


def measure(
    rater: Rater, plan: Plan, built: dict[str, list[Any]], texts: dict[str, list[str]], say: Callable[[str], None]
) -> Measured:
    """All tasks and texts with one model."""
    who, done = rater.label, Measured({}, {}, {})
    for name in plan.names:
        rater.label = f"{who}, {Path(name).name}"
        began = time.perf_counter()
        if name in built:
            model = harness.language_model(rater)
            done.tasks[name] = harness.run(
                model, built[name], fewshot=plan.fewshot, limit=plan.limit, chat=plan.chat
            )  # fmt: skip
        else:
            # A parent is exact with any number of draws.
            done.texts[name] = rater.texts(texts[name], draws=plan.draws or WINDOW_DRAWS)
            if not done.texts[name]:
                raise ValueError(f"{name} has no text; give another file")
        done.seconds[name] = time.perf_counter() - began
        say(f"{rater.label}: done")
    return done


def task_report(
    name: str, mine: Measured, theirs: Measured | None, seed: int, model: str, parent: str | None
) -> dict[str, Any]:
    """One task as the report holds it."""
    documents = mine.tasks[name]
    other = None if theirs is None else {d.id: d.metrics for d in theirs.tasks[name]}
    scores = [s for d in documents for s in d.scores]
    return {
        "task": name,
        "metric": TASKS[name].metric,
        "remark": TASKS[name].remark,
        "documents": len(documents),
        "figures": task_figures({d.id: d.metrics for d in documents}, other, seed=seed),
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
    """documents.jsonl: every document's metrics and scores, of both models side by side."""

    def side(document: harness.Document) -> dict[str, Any]:
        return {"metrics": document.metrics, "scores": [pack(score) for score in document.scores]}

    lines = []
    for name, documents in mine.tasks.items():
        other = {} if theirs is None else {d.id: side(d) for d in theirs.tasks[name]}
        for document in documents:
            line: dict[str, Any] = {"task": name, "id": document.id, "model": side(document)}
            if document.id in other:
                line["parent"] = other[document.id]
            lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    runtime.write_atomic(out / "documents.jsonl", "".join(lines))


def versions() -> dict[str, str]:
    """Versions that a score may depend on."""
    found = {"diffulm": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "lm_eval"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
