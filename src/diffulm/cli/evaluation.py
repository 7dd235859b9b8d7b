"""Verbs that measure: eval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .flags import Opening, PolicyName, Reference, command_line, finish

if TYPE_CHECKING:
    from ..eval.generate import How


#: What quality writes where --samples and --step-counts do not say: a quick look, not the paper's 64 texts.
QUALITY_SAMPLES, QUALITY_STEPS = 16, (16, 64)


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
        steps: Forward passes for a written text at most (default: one per token; quality: in place of --step-counts); a
            parent takes one per token.
        policy: Order in which written tokens are revealed, as in generate (default: confidence; quality: ancestral).
        temperature: Of written texts; 0 is greedy (default: 0; quality: 1; protocol paper: the scripts' 0.95, 0.9 for a
            Llama).
        samples: Texts for each document (default 1): majority vote, hit@N and pass@k are reported beside the mean; of
            quality, texts for each step count (default 16).
        allow_code_execution: Run the programs of humaneval, mbpp and humaneval_infilling, under resource limits that
            are no security boundary.
    """

    max_tokens: int | None = None
    steps: int | None = None
    policy: PolicyName | None = None
    temperature: float | None = None
    samples: int | None = None
    allow_code_execution: bool = False

    def how(self) -> How:
        """For tasks whose answers are written."""
        from ..eval.generate import How

        asked = given(
            max_tokens=self.max_tokens, steps=self.steps, policy=self.policy, temperature=self.temperature,
            samples=self.samples,
        )  # fmt: skip
        return How(**asked, execute=self.allow_code_execution)

    def quality(self, step_counts: tuple[int, ...] | None) -> dict[str, Any]:
        """For free text: what was asked for; the rest is the verb's own, then `Sampling`'s. ValueError for both
        --steps and --step-counts."""
        if self.steps is not None and step_counts is not None:
            raise ValueError("--steps 64 is short for --step-counts 64; leave one of them out")
        if self.steps is not None:
            step_counts = (self.steps,)
        asked = given(
            step_counts=step_counts, samples=self.samples, max_tokens=self.max_tokens, policy=self.policy,
            temperature=self.temperature,
        )  # fmt: skip
        return {"step_counts": QUALITY_STEPS, "samples": QUALITY_SAMPLES, **asked}


def given(**flags: Any) -> dict[str, Any]:
    """The flags that were given; a flag that was left out is None."""
    return {name: value for name, value in flags.items() if value is not None}


def refuse_idle(where: str, flags: Mapping[str, Any]) -> None:
    """ValueError for flags that were given and that nothing reads there."""
    idle = [f"--{name.replace('_', '-')}" for name, value in given(**flags).items() if value is not False]
    if idle:
        raise ValueError(f"{', '.join(idle)}: without effect {where}; leave {'it' if len(idle) == 1 else 'them'} out")


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
    step_counts: tuple[int, ...] | None = None,
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
            text that goes on from their beginnings; the parent's own texts beside.
        parent: AR model to put beside it, through identical prompts (folder, GGUF file, embedded default or Hub id).
        data_dir: Folder with the tasks' local files (default: take them from the Hub).
        out: Folder of results and report; the same command again goes on where it was.
        limit: Documents of each task or text at most (of each subject of MMLU).
        draws: Masks per option (default 128) and per window of a text (default 8); protocol paper: noise rates, and
            steps of a text (default 32).
        confidence: Draw only until the best option is clear at this confidence, such as 0.99 (for accuracies).
        guidance: Scale of guidance of the model's likelihoods by the context: 1 is none (full attention, two forwards
            for each mask; not of written texts, never of the parent).
        seed: Seed of the masks, and of texts.
        fewshot: Exemplars in each prompt (default: none for likelihoods, each task's own number for written tasks).
        chat_template: Write the prompts in the tokenizer's chat template.
        judge: AR model under which quality takes the perplexity (default: the parent).
        step_counts: Numbers of steps with which quality writes (default: 16 64).
        protocol: paper: the released scripts' arithmetic, biases included (lambada, hellaswag, humaneval_infilling,
            roc, winogrande, siqa, piqa), for comparison with published scores.
        lambada_double_count: Count LAMBADA's hits twice, as the paper's first version did (protocol paper alone).
        json: Print the report as JSON on stdout.
    """
    from ..eval.evaluate import Plan

    names = tuple(part for word in tasks for part in word.split(",") if part)
    ending: dict[str, Any] = {"out": out, "as_json": json}
    scored = {
        "confidence": confidence, "guidance": guidance, "fewshot": fewshot, "chat_template": chat_template,
    }  # fmt: skip
    free, released = {"judge": judge, "step_counts": step_counts}, {"lambada_double_count": lambada_double_count}
    if protocol == "paper":
        written = {name: getattr(writing, name) for name in ("max_tokens", "steps", "policy", "samples")}
        refuse_idle("under --protocol paper", {"parent": parent, **scored, **free, **written})
        rules = given(seed=seed, rates=draws, temperature=writing.temperature, **released)
        run_paper(model, names, data_dir, rules, opening, limit=limit, execute=writing.allow_code_execution, **ending)
    elif "quality" in names:
        refuse_idle(
            "on quality",
            {**scored, **released, "draws": draws, "allow_code_execution": writing.allow_code_execution},
        )
        if set(names) == {"quality"}:
            refuse_idle("on quality without texts", {"limit": limit})
        asked = {"seed": seed, **writing.quality(step_counts)}
        run_quality(model, judge, parent, names, data_dir, asked, opening, limit=limit, **ending)
    else:
        refuse_idle("without --protocol paper", released)
        refuse_idle("without the task quality", free)
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
    protocol = PaperProtocol(**rules)  # before the model is opened: what is wrong is found at once
    report = paper.evaluate(
        opening.open(model), names, folder, protocol, limit=limit, out=out, execute=execute, command=command_line(),
        on_progress=progress(),
    )  # fmt: skip
    if out is not None:
        keep(report, "The paper's protocol", paper.blocks(report), out)
    finish(report, paper.summary(report), out, as_json=as_json)


def run_quality(
    model: str, judge: str | None, parent: str | None, names: tuple[str, ...], folder: Path | None,
    asked: dict[str, Any], opening: Opening, *, limit: int | None, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """`eval --tasks quality`, behind it the texts whose beginnings are prompts."""
    from ..eval import quality
    from ..eval.page import keep
    from ..eval.store import Store
    from ..eval.tasks import check_limit, documents_of, find_texts

    reader = parent if judge is None else judge
    if reader is None:
        raise ValueError("quality needs an AR model that reads the texts; give --judge or --parent")
    check_limit(limit)
    how = quality.Sampling(**asked)
    others = find_texts([name for name in names if name != "quality"])
    documents = [text for name in others for text in documents_of(name, folder)[:limit]]
    loaded = opening.open(model)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    store = Store(None if out is None else out / "scores.jsonl")
    raters = {
        name: quality.judge_rater(name, loaded, offline=opening.offline, store=store)
        for name in dict.fromkeys([reader, parent])
        if name is not None
    }
    beside: dict[str, Any] = {} if parent is None else {"parent": raters[parent], "parent_name": parent}
    report = quality.measure(
        loaded, raters[reader], how, judge_name=reader, documents=documents, command=command_line(),
        on_progress=progress(), **beside,
    )  # fmt: skip
    if out is not None:
        keep(report, "Quality of free text", quality.blocks(report), out)
    flags = [f"warning: {flag}" for flag in report["flags"]]
    finish(report, [*quality.summary(report), *flags], out, as_json=as_json)
