"""Verbs that measure: eval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .flags import Opening, PolicyName, Reference, command_line, finish

if TYPE_CHECKING:
    from ..eval.generate import How


@dataclass(frozen=True)
class OpeningBoth(Opening):
    """How the models are opened.

    Args:
        dtype: auto, float32, bfloat16, float64 or autocast; the parent gets the same.
    """


@dataclass(frozen=True)
class Writing:
    """How texts are written.

    Args:
        max_tokens: Tokens of a written text at most, for model and parent alike (default: each task's own).
        steps: Forward passes for a written text at most (default: one per token); a parent takes one per token.
        policy: Order in which written tokens are revealed, as in generate (default: confidence; quality: ancestral).
        temperature: Of written texts; 0 is greedy.
        samples: Texts for each document (default 1): majority vote, hit@N and pass@k are reported beside the mean; of
            quality, texts for each step count (default 16).
        allow_code_execution: Run the programs of humaneval, mbpp and humaneval_infilling, under resource limits that
            are no security boundary.
    """

    max_tokens: int | None = None
    steps: int | None = None
    policy: PolicyName | None = None
    temperature: float = 0.0
    samples: int | None = None
    allow_code_execution: bool = False

    def how(self) -> How:
        """For tasks whose answers are written."""
        from ..eval.generate import How

        return How(
            self.max_tokens, self.steps, self.policy or "confidence", self.temperature, self.samples or 1,
            self.allow_code_execution,
        )  # fmt: skip

    def quality(self) -> dict[str, Any]:
        """For free text: what was asked for; the rest is `Sampling`'s own."""
        given = {"max_tokens": self.max_tokens, "policy": self.policy, "temperature": self.temperature or None}
        return {"samples": self.samples or 16, **{name: value for name, value in given.items() if value is not None}}


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
    guidance: float | None = None,
    seed: int = 0,
    fewshot: int | None = None,
    chat_template: bool = False,
    judge: str | None = None,
    step_counts: tuple[int, ...] = (16, 64),
    protocol: Literal["none", "paper"] = "none",
    lambada_double_count: bool = False,
    json: bool = False,
    writing: Writing,
    opening: OpeningBoth,
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
        guidance: Scale of guidance of the model's likelihoods by the context: 1 is none (full attention, two forwards
            for each mask; not of written texts, never of the parent).
        seed: Seed of the masks, and of texts.
        fewshot: Exemplars in each prompt (default: none for likelihoods, each task's own number for written tasks).
        chat_template: Write the prompts in the tokenizer's chat template.
        judge: AR model under which quality takes the perplexity (default: the parent).
        step_counts: Numbers of steps with which quality writes.
        protocol: paper: the released scripts' arithmetic, biases included (lambada, hellaswag, humaneval_infilling,
            roc, winogrande, siqa, piqa), for comparison with published scores.
        lambada_double_count: Count LAMBADA's hits twice, as the paper's first version did (protocol paper).
        json: Print the report as JSON on stdout.
    """
    from ..eval.evaluate import Plan

    names = tuple(part for given in tasks for part in given.split(",") if part)
    ending: dict[str, Any] = {"out": out, "as_json": json}
    if protocol == "paper":
        rules = {"seed": seed, "rates": draws or 32, "lambada_double_count": lambada_double_count}
        run_paper(model, names, data_dir, rules, opening, limit=limit, execute=writing.allow_code_execution, **ending)
    elif "quality" in names:
        asked = {"step_counts": step_counts, "seed": seed, **writing.quality()}
        run_quality(model, judge or parent, names, data_dir, asked, opening, **ending)
    else:
        plan = Plan(
            tasks, data_dir, limit=limit, draws=draws, seed=seed, fewshot=fewshot, chat=chat_template,
            confidence=confidence, guidance=guidance, how=writing.how(),
        )  # fmt: skip
        run_evaluate(model, plan, parent, opening, **ending)


def run_evaluate(
    model: str, plan: Any, parent: str | None, opening: Opening, *, out: Path | None, as_json: bool
) -> None:
    """`eval` with progress on stderr and tables at the end."""
    from ..eval.evaluate import evaluate as job
    from ..eval.scoreboard import summary

    report = job(
        model, plan, parent=parent, out=out, command=command_line(), on_progress=progress(), **opening.arguments()
    )
    finish(report, summary(report), out, as_json=as_json)


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
    model: str, names: tuple[str, ...], folder: Path | None, rules: dict[str, Any], opening: Opening, *,
    limit: int | None, execute: bool, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """`eval --protocol paper`."""
    from ..eval import paper
    from ..eval.page import keep
    from ..eval.protocol import PaperProtocol

    if folder is None:
        raise ValueError("the paper's protocol reads local files; give --data-dir")
    report = paper.evaluate(
        opening.open(model), names, folder, PaperProtocol(**rules), limit=limit, out=out, execute=execute,
        on_progress=progress(),
    )  # fmt: skip
    if out is not None:
        keep(report, "The paper's protocol", paper.blocks(report), out)
    finish(report, paper.summary(report), out, as_json=as_json)


def run_quality(
    model: str, judge: str | None, names: tuple[str, ...], folder: Path | None, asked: dict[str, Any],
    opening: Opening, *, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """`eval --tasks quality`, behind it the texts whose beginnings are prompts."""
    from ..eval import quality
    from ..eval.page import keep
    from ..eval.tasks import documents_of, find_texts

    if judge is None:
        raise ValueError("quality needs an AR model that reads the texts; give --judge or --parent")
    others = find_texts([name for name in names if name != "quality"])
    documents = [text for name in others for text in documents_of(name, folder)]
    loaded = opening.open(model)
    rater = quality.judge_rater(judge, loaded, offline=opening.offline)
    how = quality.Sampling(**asked)
    report = quality.measure(loaded, rater, how, judge_name=judge, documents=documents, on_progress=progress())
    if out is not None:
        keep(report, "Quality of free text", quality.blocks(report), out)
    flags = [f"warning: {flag}" for flag in report["flags"]]
    finish(report, [*quality.summary(report), *flags], out, as_json=as_json)
