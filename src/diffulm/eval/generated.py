"""Tasks in which a model writes: documents to prompts, prompts to texts, texts to metrics, metrics to the report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import extract, infilling, packaged
from .compare import accuracy, paired_accuracy, published
from .execute import run
from .generate import Ask, Writer, Written
from .generation_tasks import GENERATION, Generation
from .harness import Document, with_template
from .measures import pass_at_k
from .packaged import Prompt
from .store import content_key
from .tasks import read_records


@dataclass(frozen=True)
class Built:
    """A task with its records, before a model is opened. one: lm-eval's task object where it makes the prompts."""

    task: Generation
    shots: int
    records: list[dict[str, Any]] = field(default_factory=list)
    one: Any = None


@dataclass
class Session:
    """What one model wrote for a task: documents by way ("" where there is one way), and what that took."""

    documents: dict[str, list[Document]]
    texts: int = 0
    tokens: int = 0
    forwards: int = 0
    cut: int = 0
    seconds: float = 0.0


def build(name: str, folder: Path | None, fewshot: int | None, *, execute: bool) -> Built:
    """A task by name. ValueError for files that are missing or wrong, too many shots, or code that may not be run."""
    task = GENERATION[name]
    shots = task.shots if fewshot is None else fewshot
    if task.program is not None and not execute:
        raise ValueError(
            f"{name} runs code that a model wrote; give --allow-code-execution where that can do no harm (a container "
            "without secrets), or leave it out"
        )
    if folder is None and not task.hub:
        raise ValueError(f"{name} is read from a local file; give --data-dir with {task.file} in it")
    if task.packaged:
        return Built(task, shots, one=packaged.build(task, folder, shots))
    assert folder is not None
    records = read_records(task, folder)
    if shots and task.prompt is None:
        if fewshot is None or task.hole is None:
            raise AssertionError(f"{name} has no exemplars")
        shots = 0  # a hole has no exemplars
    if task.prompt is not None:
        task.prompt(records[0], shots)  # more shots than exemplars are found before a model is opened
    return Built(task, shots, records)


def prompts(built: Built, writer: Writer, limit: int | None, *, chat: bool) -> list[Prompt]:
    """The documents of a task as the model is asked for them; its parent gets the same strings."""
    task, tokenizer = built.task, writer.rater.tokenizer
    if task.hole is not None:
        return infilling.prompts(task, built.records[:limit], writer)

    def template(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return with_template(tokenizer, history, add_generation_prompt)

    if built.one is not None:
        return packaged.prompts(built.one, task, limit, template if chat else None)
    assert task.prompt is not None
    found = []
    for i, record in enumerate(built.records[:limit]):
        text = task.prompt(record, built.shots)
        text = template([{"role": "user", "content": text}]) if chat else text
        found.append(Prompt(f"{task.name}/{i}", record, text, task.until))
    return found


def measure(task: Generation, items: Sequence[Prompt], writer: Writer) -> Session:
    """Every document's texts and metrics with one model."""
    began, found = time.perf_counter(), Session({})
    label = writer.rater.label
    cap = writer.how.max_tokens or task.cap
    for way in infilling.ways(writer) if task.hole is not None else [""]:
        writer.rater.label = f"{label} {way}".rstrip()
        if not way:
            writer.check(cap, task.name)
        asks = [
            infilling.asks(task, item, writer, way) if way else
            [Ask(item.text, cap, item.until, k) for k in range(writer.how.samples)]
            for item in items
        ]  # fmt: skip
        written = iter(writer.write([ask for several in asks for ask in several]))
        documents = []
        for item, several in zip(items, asks, strict=True):
            texts = [next(written) for _ in several]
            documents.append(judged(task, item, texts, writer, way))
            found.texts += len(texts)
            found.tokens += sum(text.tokens for text in texts)
            found.forwards += sum(text.forwards for text in texts)
            found.cut += sum(text.cut > 0 or item.cut > 0 for text in texts)
        found.documents[way] = documents
    writer.rater.label = label
    found.seconds = time.perf_counter() - began
    return found


def judged(task: Generation, item: Prompt, written: Sequence[Written], writer: Writer, way: str) -> Document:
    """A document's metrics, each the mean over its samples, and those of several samples together."""
    texts = [text.text for text in written]
    if way and writer.model is None:
        texts = [task.whole(text) for text in texts]
    answers = [task.answer(item.record, text) for text in texts]
    n = len(texts)
    if task.measure is not None:
        assert item.hole is not None
        each = task.measure([item.hole[0]] * n, texts)
        metrics = {name: sum(one[name] for one in each) / n for name in each[0]}
    else:
        right = [answer is not None and verdict(task, item, answer, writer) for answer in answers]
        metrics = {task.metric: sum(right) / n}
        if n > 1 and task.program is not None:
            metrics |= {f"pass@{k}": pass_at_k(n, sum(right), k) for k in sorted({k for k in (10, 100, n) if k <= n})}
        elif n > 1:
            voted = extract.majority(answers) if task.vote else None
            metrics[f"majority@{n}"] = float(voted is not None and verdict(task, item, voted, writer))
            metrics[f"hit@{n}"] = float(any(right))
    judges = [item.judge(text) for text in texts]
    metrics |= {name: sum(one[name] for one in judges) / n for name in judges[0]}
    kept = [
        {"text": text, "answer": None if answer == text else answer, "tokens": one.tokens, "forwards": one.forwards}
        for text, answer, one in zip(texts, answers, written, strict=True)
    ]
    return Document(item.id, metrics, texts=kept)


def verdict(task: Generation, item: Prompt, answer: str, writer: Writer) -> bool:
    """Whether an answer is right; a program is run once and its end is kept."""
    if task.program is None:
        assert task.right is not None
        return task.right(item.record, answer)
    assert writer.how.execute
    program = task.program(item.record, answer)
    key, store = content_key("run", program), writer.rater.store
    if store.get(key) is None:
        outcome = run(program)
        store.put({key: {"how": outcome.how, "said": outcome.said[-300:]}})
    return bool(store.get(key)["how"] == "passed")


# -------------------------------------------------------------------------------------------------------- report


def report(
    built: Built, mine: Session, theirs: Session | None, writer: Writer, model: str, parent: str | None
) -> dict[str, Any]:
    """One task as the report holds it: figures by metric (and way), with the parent's and the paired comparison."""
    task = built.task
    figures: dict[str, Any] = {}
    for way in dict.fromkeys([*mine.documents, *(theirs.documents if theirs else [])]):
        sides = [s.documents.get(way) if s else None for s in (mine, theirs)]
        for metric in next(d for d in sides if d)[0].metrics:
            a, b = ([d.metrics[metric] for d in side] if side else None for side in sides)
            figure: dict[str, Any] = {}
            if a is not None:
                figure["model"] = accuracy(a)
            if b is not None:
                figure["parent"] = accuracy(b)
            if a is not None and b is not None:
                figure["paired"] = paired_accuracy(a, b, seed=writer.rater.scorer.seed)
            figures[f"{metric}, {way}" if way else metric] = figure
    return {
        "task": task.name,
        "metric": task.metric,
        "remark": task.remark,
        "documents": len(next(iter(mine.documents.values()))),
        "samples": writer.how.samples,
        "shots": built.shots,
        "max_tokens": writer.how.max_tokens or task.cap,
        "figures": figures,
        "cost": {name: cost(side) for name, side in (("model", mine), ("parent", theirs)) if side is not None},
        "published": {
            "model": published(model, task.name),
            "parent": None if parent is None else published(parent, task.name),
        },
    }


def cost(session: Session) -> dict[str, Any]:
    """Texts, and the mean tokens and forwards of one; texts whose prompt was cut; seconds of this run."""
    n = max(1, session.texts)
    per_text = {"tokens": session.tokens / n, "forwards": session.forwards / n}
    return {"texts": session.texts, **per_text, "cut": session.cut, "seconds": round(session.seconds, 1)}
