"""Tasks in which a model writes: documents to prompts, prompts to texts, texts to metrics, metrics to the report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import extract, infilling, packaged
from .compare import accuracy, paired_accuracy, published
from .execute import check_allowed, passed
from .generate import Ask, Writer, Written
from .generation_tasks import GENERATION, Generation
from .harness import Document, with_template
from .measures import pass_at_k
from .packaged import Prompt
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
    if task.program is not None:
        check_allowed(name, execute)
    if folder is None and not task.hub:
        raise ValueError(f"{name} is read from a local file; give --data-dir with {task.file} in it")
    if task.packaged:
        return Built(task, shots, one=packaged.build(task, folder, shots))
    assert folder is not None
    if shots and task.prompt is None:
        raise ValueError(f"{name} shows no exemplars; leave it out, or --fewshot {shots}")
    records = read_records(task, folder)
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


def asks_of(task: Generation, item: Prompt, writer: Writer, way: str) -> list[Ask]:
    """What a model is asked for one document, once for each sample."""
    if way:
        return infilling.asks(task, item, writer, way)
    cap = writer.how.max_tokens or task.cap
    return [Ask(item.text, cap, item.until, k) for k in range(writer.how.samples)]


def givable(task: Generation, items: Sequence[Prompt], writer: Writer) -> list[Prompt]:
    """The documents whose given text does not hold the model's mask token. A reused one may occur in any text, and is
    left out of scores on both sides (as it is of training). ValueError where no document is left."""
    way = infilling.ways(writer)[0] if task.hole is not None else ""
    kept = [item for item in items if not writer.holds_mask(asks_of(task, item, writer, way)[0])]
    if items and not kept:
        raise ValueError(
            f"every prompt of {task.name} holds the mask token {writer.rater.tokenizer.mask_token!r}; leave the task "
            "out, or change --fewshot"
        )
    return kept


def measure(task: Generation, items: Sequence[Prompt], writer: Writer) -> Session:
    """Every document's texts and metrics with one model."""
    began, found = time.perf_counter(), Session({})
    label = writer.rater.label
    cap = writer.how.max_tokens or task.cap
    for way in infilling.ways(writer) if task.hole is not None else [""]:
        writer.rater.label = f"{label} {way}".rstrip()
        if not way:
            writer.check(cap, task.name)
        asks = [asks_of(task, item, writer, way) for item in items]
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
    """Whether an answer is right."""
    if task.program is None:
        assert task.right is not None
        return task.right(item.record, answer)
    assert writer.how.execute
    return passed(task.program(item.record, answer), writer.rater.store)


# -------------------------------------------------------------------------------------------------------- report


def report(
    built: Built, mine: Session, theirs: Session | None, writer: Writer, model: str, parent: str | None,
    left_out: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """One task as the report holds it: figures by metric (and way), with the parent's and the paired comparison.

    left_out: documents that `givable` left out.
    """
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
        "remark": with_left_out(task.remark, left_out),
        "left_out": left_out,
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


def with_left_out(remark: str, left_out: int) -> str:
    """A task's remark, with the documents that the mask token keeps out of the scores of both models."""
    said = f"left out on both sides because of the mask token, which is ordinary text here: {left_out:,} documents"
    return "; ".join(filter(None, [remark, said if left_out else ""]))


def cost(session: Session) -> dict[str, Any]:
    """Texts, and the mean tokens and forwards of one; texts whose prompt was cut; seconds of this run."""
    n = max(1, session.texts)
    per_text = {"tokens": session.tokens / n, "forwards": session.forwards / n}
    return {"texts": session.texts, **per_text, "cut": session.cut, "seconds": round(session.seconds, 1)}
