"""Verbs that measure: eval."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from .flags import PolicyName, Reference, print_json


def evaluate(
    model: Reference,
    /,
    *,
    tasks: tuple[str, ...],
    parent: str | None = None,
    data_dir: Path | None = None,
    out: Path | None = None,
    limit: int | None = None,
    draws: int | None = None,
    confidence: float | None = None,
    seed: int = 0,
    fewshot: int | None = None,
    chat_template: bool = False,
    max_tokens: int | None = None,
    steps: int | None = None,
    policy: PolicyName | None = None,
    temperature: float = 0.0,
    samples: int | None = None,
    allow_code_execution: bool = False,
    judge: str | None = None,
    step_counts: tuple[int, ...] = (16, 64),
    protocol: Literal["none", "paper"] = "none",
    lambada_double_count: bool = False,
    adapter: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    offline: bool = False,
    json: bool = False,
) -> None:
    """Score tasks and texts by likelihood or by what the model writes, with the AR parent beside it.

    Example: diffulm eval runs/demo/model --tasks piqa,hellaswag,wikitext2 --data-dir data --parent gpt2 --out runs/eval

    Args:
        model: Diffusion checkpoint: a folder or Hub id.
        tasks: Tasks, texts (wikitext2, or any txt or jsonl file), all (scored by likelihood) or generation (written);
            commas or spaces between them. quality: perplexity and diversity of free text, and, with texts behind it, of
            text that goes on from their beginnings.
        parent: AR model to put beside it, through identical prompts (folder, GGUF file, embedded default or Hub id).
        data_dir: Folder with the tasks' local files (default: take them from the Hub).
        out: Folder of results and report; the same command again goes on where it was.
        limit: Documents of each task at most (of each subject of MMLU).
        draws: Masks per option (default 128) and per window of a text (default 8).
        confidence: Draw only until the best option is clear at this confidence, such as 0.99 (for accuracies).
        seed: Seed of the masks, and of texts.
        fewshot: Exemplars in each prompt (default: none for likelihoods, each task's own number for written tasks).
        chat_template: Write the prompts in the tokenizer's chat template.
        max_tokens: Tokens of a written text at most, for model and parent alike (default: each task's own).
        steps: Forward passes for a written text at most (default: one per token); a parent takes one per token.
        policy: Order in which written tokens are revealed, as in generate (default: confidence; quality: ancestral).
        temperature: Of written texts; 0 is greedy.
        samples: Texts for each document (default 1): majority vote, hit@N and pass@k are reported beside the mean; of
            quality, texts for each step count (default 16).
        allow_code_execution: Run the programs of humaneval, mbpp and humaneval_infilling, under resource limits that
            are no security boundary.
        judge: AR model under which quality takes the perplexity (default: the parent).
        step_counts: Numbers of steps with which quality writes.
        protocol: paper: the released scripts' arithmetic, biases included (lambada, hellaswag, roc, winogrande, siqa,
            piqa), for comparison with published scores.
        lambada_double_count: Count LAMBADA's hits twice, as the paper's first version did (protocol paper).
        adapter: LoRA in peft's format to merge into the model: a folder or Hub id.
        device: cpu, cuda or mps.
        dtype: auto, float32, bfloat16, float64 or autocast; the parent gets the same.
        offline: Never ask the Hub.
        json: Print the report as JSON on stdout.
    """
    from ..eval.evaluate import Plan
    from ..eval.generate import How

    names = tuple(part for given in tasks for part in given.split(",") if part)
    settings: dict[str, Any] = {"adapter": adapter, "device": device, "dtype": dtype, "offline": offline}
    if protocol == "paper":
        if data_dir is None:
            raise ValueError("the paper's protocol reads local files; give --data-dir")
        rules = {"seed": seed, "rates": draws or 32, "lambada_double_count": lambada_double_count}
        run_paper(model, names, data_dir, rules, limit=limit, out=out, as_json=json, **settings)
        return
    if "quality" in names:
        if (reference := judge or parent) is None:
            raise ValueError("quality needs an AR model that reads the texts; give --judge or --parent")
        asked = {"step_counts": step_counts, "samples": samples or 16, "seed": seed}
        given = {"max_tokens": max_tokens, "policy": policy, "temperature": temperature or None}
        asked |= {name: value for name, value in given.items() if value is not None}
        run_quality(model, reference, names, data_dir, asked, out=out, as_json=json, **settings)
        return
    how = How(max_tokens, steps, policy or "confidence", temperature, samples or 1, allow_code_execution)
    plan = Plan(
        tasks, data_dir, limit=limit, draws=draws, seed=seed, fewshot=fewshot, chat=chat_template,
        confidence=confidence, how=how,
    )  # fmt: skip
    run_evaluate(model, plan, parent=parent, out=out, as_json=json, **settings)


def run_evaluate(model: str, plan: Any, *, out: Path | None, offline: bool, as_json: bool, **settings: Any) -> None:
    """`eval` with progress on stderr and tables at the end."""
    from rich.console import Console

    from ..eval.evaluate import evaluate as job
    from ..eval.scoreboard import summary

    console = Console(highlight=False)
    command = "diffulm " + " ".join(shlex.quote(a) for a in sys.argv[1:])
    report = job(model, plan, out=out, offline=offline, command=command, on_progress=progress(), **settings)
    if as_json:
        print_json(report)
        return
    for table in summary(report):
        console.print(table)
    if out is not None:
        console.print(f"report: {out / 'report.html'}", markup=False, soft_wrap=True)


def progress() -> Callable[[str, int, int, float], None]:
    """One line on stderr for each thing that is being measured, with the time that is left."""
    from rich.console import Console

    from ..render import progress_line

    notes = Console(stderr=True, highlight=False)

    def show(label: str, done: int, of: int, left: float) -> None:
        line = f"  {label}: " + progress_line(step=done, steps=of, left=left).removeprefix("step ")
        if notes.is_terminal:
            notes.print(line, end="\n" if done == of else "\r", markup=False, soft_wrap=True)
        elif done == of or done == 0:
            notes.print(line, markup=False, soft_wrap=True)

    return show


def run_paper(
    model: str, names: tuple[str, ...], folder: Path, rules: dict[str, Any], *, limit: int | None, out: Path | None,
    as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """`eval --protocol paper`."""
    from ..eval import paper
    from ..eval.protocol import PaperProtocol
    from ..hub import load

    report = paper.evaluate(
        load(model, **settings), names, folder, PaperProtocol(**rules), limit=limit, out=out, on_progress=progress()
    )
    show(report, paper.summary(report), paper.blocks(report), "The paper's protocol", out, as_json)


def run_quality(
    model: str, judge: str, names: tuple[str, ...], folder: Path | None, asked: dict[str, Any], *, out: Path | None,
    as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """`eval --tasks quality`, behind it the texts whose beginnings are prompts."""
    from ..eval import quality
    from ..eval.tasks import documents_of, find_texts
    from ..hub import load

    others = find_texts([name for name in names if name != "quality"])
    documents = [text for name in others for text in documents_of(name, folder)]
    loaded = load(model, **settings)
    rater = quality.judge_rater(judge, loaded, offline=settings["offline"])
    how = quality.Sampling(**asked)
    report = quality.measure(loaded, rater, how, judge_name=judge, documents=documents, on_progress=progress())
    show(report, quality.summary(report), quality.blocks(report), "Quality of free text", out, as_json)


def show(
    report: dict[str, Any], tables: list[Any], blocks: list[Any], title: str, out: Path | None, as_json: bool
) -> None:
    """A report on the terminal or as JSON; with a folder also report.json, report.md and report.html there."""
    from rich.console import Console

    from ..eval.scoreboard import keep

    if out is not None:
        keep(report, title, blocks, out)
    if as_json:
        print_json(report)
        return
    console = Console(highlight=False)
    for item in (*tables, *(f"warning: {flag}" for flag in report.get("flags", []))):
        console.print(item)
    if out is not None:
        console.print(f"report: {out / 'report.html'}", markup=False, soft_wrap=True)
