"""`--protocol paper`: the released scripts' tasks (paper_tasks.py) under their arithmetic (protocol.py)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table as Terminal

from ..hub import Model
from ..layout import Full
from ..tokenizer import decode
from .compare import published
from .evaluate import provenance
from .execute import check_allowed, passed
from .generation_tasks.code import checked
from .measures import ROUGE, rouge
from .page import Block, Prose, Table
from .paper_tasks import CHOICES, CODE, FILES, LONG, ORDER, Joiner, Question
from .protocol import PaperProtocol, Text, losses, raw, sampler_b, temperature_of
from .rate import Progress, silent
from .schemas import Record
from .scoreboard import run_blocks
from .store import Store, content_key, fingerprint
from .tasks import check_limit, read_records

#: Questions that go through the model before their results are kept.
CHUNK = 16
#: Stories that the script writes.
STORIES = 1000
#: LAMBADA in the first version of arXiv 2410.17891, hits counted twice, per cent; by the last part of a model's name.
LAMBADA_V1 = {"diffugpt-s": 45.0, "diffugpt-m": 60.5, "diffullama": 70.9}


@dataclass
class Runner:
    """A model under the protocol, with what it has scored already."""

    model: Model
    protocol: PaperProtocol
    store: Store
    label: str = ""
    on_progress: Progress = silent

    def __post_init__(self) -> None:
        layout = self.model.layout
        if not isinstance(layout, Full):
            raise ValueError(
                f"the paper's protocol is one of full attention, this checkpoint is {layout.name}; leave out "
                "--protocol paper"
            )
        self.layout = layout
        self.denoiser = raw(self.model.denoiser, self.protocol)
        self.join = Joiner(self.model.tokenizer, self.protocol, int(self.model.config["trained_length"]))
        self.weights = fingerprint(self.model.denoiser)

    @property
    def temperature(self) -> float:
        """Of sampler B outside LAMBADA, as the rules are now."""
        given = self.protocol.temperature
        return temperature_of(str(self.model.denoiser.config.model_type)) if given is None else given

    def each(self, groups: Sequence[Sequence[Text]], job: Callable[[list[Text]], list[Any]], how: str) -> list[Any]:
        """job's results for every group of texts, from the store where they are known."""
        # The rules as they are now: LAMBADA may have changed them (`leaked_steps`).
        settled = replace(self.protocol, temperature=self.temperature)
        rules = [self.weights, str(self.model.denoiser.precision), asdict(settled), how]
        keys = [content_key(*rules, [asdict(text) for text in group]) for group in groups]
        missing = [i for i, key in enumerate(keys) if self.store.get(key) is None]
        began = time.perf_counter()
        for at in range(0, len(missing), CHUNK):
            part = missing[at : at + CHUNK]
            results = iter(job([text for i in part for text in groups[i]]))
            self.store.put({keys[i]: [next(results) for _ in groups[i]] for i in part})
            done = at + len(part)
            left = (time.perf_counter() - began) / done * (len(missing) - done)
            self.on_progress(self.label, len(groups) - len(missing) + done, len(groups), left)
        return [self.store.get(key) for key in keys]

    def scores(self, groups: Sequence[Sequence[Text]]) -> list[list[float]]:
        """Scores of the options of every question."""
        return self.each(
            groups,
            lambda texts: losses(
                self.denoiser, self.layout, self.model.process.mask_token_id, texts, self.protocol,
                device=self.model.device,
            ),
            "scores",
        )  # fmt: skip

    def written(self, texts: Sequence[Text], steps: int, temperature: float) -> list[list[int]]:
        """What sampler B writes into every text."""
        found = self.each(
            [[text] for text in texts],
            lambda part: sampler_b(
                self.denoiser, self.layout, self.model.process.mask_token_id, part, self.protocol, steps=steps,
                temperature=temperature, device=self.model.device,
            ),
            f"written {steps} {temperature}",
        )  # fmt: skip
        return [one for (one,) in found]


def evaluate(
    model: Model,
    names: Sequence[str],
    folder: Path,
    protocol: PaperProtocol | None = None,
    *,
    limit: int | None = None,
    out: Path | None = None,
    execute: bool = False,
    command: str = "",
    on_progress: Progress = silent,
) -> dict[str, Any]:
    """Tasks (of `ORDER`, in that order) from local files under the protocol; returns settings, a row for each task, and
    how they came about.

    out: a folder whose scores.jsonl keeps results, so that the same call goes on. execute: code that was written may be
    run. ValueError for an unknown task, a missing or wrong file, code that may not be run, and a text that does not fit
    the model.
    """
    protocol = PaperProtocol() if protocol is None else protocol
    if not names:
        raise ValueError(f"there is no task; give some of {', '.join(ORDER)}")
    unknown = next((name for name in names if name not in ORDER), None)
    if unknown is not None:
        raise ValueError(f"the paper's protocol has no task {unknown!r}; it has {', '.join(ORDER)}")
    check_limit(limit)
    chosen = [name for name in ORDER if name in names]
    if CODE in chosen:
        check_allowed(CODE, execute)
    records = {name: read_records(FILES[name], folder)[:limit] for name in chosen}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    runner = Runner(model, protocol, Store(None if out is None else out / "scores.jsonl"), "", on_progress)
    settings = {**asdict(protocol), "temperature": runner.temperature}
    rows = []
    for name in chosen:
        runner.label, at = f"paper, {name}", time.perf_counter()
        if name == "lambada":
            row, last = _lambada(runner, [r["text"] for r in records[name]])
            if protocol.leaked_steps:
                runner.protocol = replace(protocol, rates=last, temperature=1.0)
        elif name == "roc":
            row = _roc(runner, [r["sentences"] for r in records[name][:STORIES]])
        elif name == CODE:
            row = _code(runner, records[name])
        else:
            row = _choices(runner, [CHOICES[name](r) for r in records[name]])
        rows.append(
            {
                "task": name,
                **row,
                "published": _given(model.name, name, protocol),
                "seconds": round(time.perf_counter() - at, 1),
            }
        )
    return {
        "model": {"name": model.name, **model.config},
        "settings": {**settings, "limit": limit, "dtype": str(model.denoiser.precision)},
        "tasks": rows,
        **provenance(command, began),
    }


def _given(model: str, task: str, protocol: PaperProtocol) -> float | None:
    """What the paper says of a model of this name, per cent, if anything."""
    if task == "lambada" and protocol.lambada_double_count:
        return LAMBADA_V1.get(model.rstrip("/").rpartition("/")[2].lower())
    return published(model, "lambada_standard" if task == "lambada" else task)


def _accuracy(hits: Sequence[bool], times: int = 1) -> dict[str, float | None]:
    """Hits over documents, each hit counted `times`, with the standard error over documents."""
    p, n = sum(hits) / len(hits), len(hits)
    return {"value": times * p, "stderr": times * math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None}


def _choices(runner: Runner, questions: Sequence[Question]) -> dict[str, Any]:
    groups = [runner.join.options(question) for question in questions]
    scores = runner.scores(groups)
    hits = [min(range(len(s)), key=s.__getitem__) == q.gold for q, s in zip(questions, scores, strict=True)]
    cut = sum(any(text.cut for text in group) for group in groups)
    return {
        "documents": len(hits), "figures": {"acc": _accuracy(hits)}, "steps": runner.protocol.rates, "truncated": cut,
    }  # fmt: skip


def _lambada(runner: Runner, lines: Sequence[str]) -> tuple[dict[str, Any], int]:
    """(row, tokens of the last line's word)."""
    texts = [runner.join.last_word(line) for line in lines]
    hits = [False] * len(lines)
    sizes = [text.end - text.start for text in texts]
    for size in sorted(set(sizes) - {0}):  # as many steps as tokens: those of one size go together
        mine = [i for i, n in enumerate(sizes) if n == size]
        for i, ids in zip(mine, runner.written([texts[i] for i in mine], size, 1.0), strict=True):
            hits[i] = decode(runner.model.tokenizer, ids).strip() == lines[i].split()[-1]
    times = 2 if runner.protocol.lambada_double_count else 1
    row = {
        "documents": len(hits), "figures": {"acc": _accuracy(hits, times)}, "steps": None,
        "truncated": sum(text.cut > 0 for text in texts),
    }  # fmt: skip
    return row, max(1, sizes[-1])


def _roc(runner: Runner, stories: Sequence[Sequence[str]]) -> dict[str, Any]:
    texts = [runner.join.middle(sentences) for sentences in stories]
    p = runner.protocol
    written = [decode(runner.model.tokenizer, ids) for ids in runner.written(texts, p.rates, runner.temperature)]
    scored = rouge([sentences[2] for sentences in stories], written)
    figures = {}
    for name in ROUGE:
        values = [one[name] for one in scored]
        mean, n = sum(values) / len(values), len(values)
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
        figures[name] = {"value": mean, "stderr": error}
    return {
        "documents": len(stories), "figures": figures, "steps": p.rates,
        "truncated": sum(text.cut > 0 for text in texts),
    }  # fmt: skip


def _code(runner: Runner, records: Sequence[Record]) -> dict[str, Any]:
    p, texts, kept = runner.protocol, [], []
    for record in records:
        if (text := runner.join.line(record)) is not None:
            texts.append(text)
            kept.append(record)
    if not kept:
        raise ValueError(f"every program of {CODE} has more than {LONG:,} tokens; set skip_long=False")
    # Decoded by itself, as the script does.
    lines = [decode(runner.model.tokenizer, ids) for ids in runner.written(texts, p.rates, runner.temperature)]
    hits = [passed(checked(record, line), runner.store) for record, line in zip(kept, lines, strict=True)]
    return {
        "documents": len(hits), "figures": {"pass@1": _accuracy(hits)}, "steps": p.rates,
        "truncated": sum(text.cut > 0 for text in texts), "left_out": len(records) - len(kept),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ as tables

HEADER = ("Task", "Metric", "Documents", "Score", "Draws or steps", "Cut", "Published")
CAVEAT = (
    "Scores by the released scripts' arithmetic (arXiv 2410.17891), for comparison with the published ones only: they "
    "are biased where the table of defects in eval/protocol.py says so. That the published scores come out on the "
    "released weights could not be checked without them."
)


def table_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row for each figure, in per cent."""
    rows: list[tuple[str, ...]] = []
    for task in report["tasks"]:
        steps = "tokens of the word" if task["steps"] is None else str(task["steps"])
        for metric, figure in task["figures"].items():
            error = "" if figure["stderr"] is None else f" ± {100 * figure['stderr']:.1f}"
            given = task["published"] if metric in ("acc", "pass@1") else None
            rows.append(
                (
                    task["task"], metric, f"{task['documents']:,}", f"{100 * figure['value']:.1f}{error}", steps,
                    f"{task['truncated']:,}", "-" if given is None else f"{given:.1f}",
                )
            )  # fmt: skip
    return rows


def summary(report: Mapping[str, Any]) -> list[Terminal]:
    """The table for the terminal."""
    table = Terminal(*HEADER, box=None, pad_edge=False)
    for row in table_rows(report):
        table.add_row(*row)
    return [table]


def blocks(report: Mapping[str, Any]) -> list[Block]:
    """The report as headings, sentences and tables; every switch is stated."""
    fields = [(name, str(value)) for name, value in report["settings"].items()]
    said = [CAVEAT]
    for task in report["tasks"]:
        if task["task"] == CODE:
            said.append("Code was run under resource limits, which are no security boundary.")
        if left_out := task.get("left_out"):
            said.append(f"{left_out:,} programs of {CODE} have more than {LONG:,} tokens and enter no score.")
    return [
        Prose("The paper's protocol", "heading"), Table(HEADER, table_rows(report)), Prose(" ".join(said)),
        Table(("Rule", "Value"), fields), *run_blocks(report, {}),
    ]  # fmt: skip
