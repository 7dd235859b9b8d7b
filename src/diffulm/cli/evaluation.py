"""Verbs that measure: eval."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from .flags import Reference, print_json


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
    fewshot: int = 0,
    chat_template: bool = False,
    adapter: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    offline: bool = False,
    json: bool = False,
) -> None:
    """Score tasks and texts by likelihood, with the AR parent beside the model.

    Example: diffulm eval runs/demo/model --tasks piqa,hellaswag,wikitext2 --data-dir data --parent gpt2 --out runs/eval

    Args:
        model: Diffusion checkpoint: a folder or Hub id.
        tasks: Tasks, texts (wikitext2, or any txt or jsonl file), or all; commas or spaces between them.
        parent: AR model to put beside it, through identical prompts (folder, GGUF file, embedded default or Hub id).
        data_dir: Folder with the tasks' local files (default: take them from the Hub).
        out: Folder of results and report; the same command again goes on where it was.
        limit: Documents of each task at most (of each subject of MMLU).
        draws: Masks per option (default 128) and per window of a text (default 8).
        confidence: Draw only until the best option is clear at this confidence, such as 0.99 (for accuracies).
        seed: Seed of the masks.
        fewshot: Exemplars in each prompt.
        chat_template: Write the prompts in the tokenizer's chat template.
        adapter: LoRA in peft's format to merge into the model: a folder or Hub id.
        device: cpu, cuda or mps.
        dtype: auto, float32, bfloat16, float64 or autocast; the parent gets the same.
        offline: Never ask the Hub.
        json: Print the report as JSON on stdout.
    """
    from ..eval.evaluate import Plan

    plan = Plan(
        tasks, data_dir, limit=limit, draws=draws, seed=seed, fewshot=fewshot, chat=chat_template, confidence=confidence
    )
    run_evaluate(
        model, plan, parent=parent, out=out, adapter=adapter, device=device, dtype=dtype, offline=offline, as_json=json
    )


def run_evaluate(model: str, plan: Any, *, out: Path | None, offline: bool, as_json: bool, **settings: Any) -> None:
    """`eval` with progress on stderr and tables at the end."""
    from rich.console import Console

    from ..eval.evaluate import evaluate as job
    from ..eval.scoreboard import summary
    from ..render import progress_line

    console, notes = Console(highlight=False), Console(stderr=True, highlight=False)

    def on_progress(label: str, done: int, of: int, left: float) -> None:
        line = f"  {label}: " + progress_line(step=done, steps=of, left=left).removeprefix("step ")
        if notes.is_terminal:
            notes.print(line, end="\n" if done == of else "\r", markup=False, soft_wrap=True)
        elif done == of or done == 0:
            notes.print(line, markup=False, soft_wrap=True)

    command = "diffulm " + " ".join(shlex.quote(a) for a in sys.argv[1:])
    report = job(model, plan, out=out, offline=offline, command=command, on_progress=on_progress, **settings)
    if as_json:
        print_json(report)
        return
    for table in summary(report):
        console.print(table)
    if out is not None:
        console.print(f"report: {out / 'report.html'}", markup=False, soft_wrap=True)
