"""The command line: one function per verb, its flags from the signature, heavy imports inside.

Exit code 0 done, 1 failed, 2 bad usage or input, 130 interrupted (the same command resumes where it says so).
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import tyro

from .train.config import Recipe, SourceConfig, load_recipe

# Positional arguments, with the names the help shows.
Reference: TypeAlias = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
PromptText: TypeAlias = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
RecipeName: TypeAlias = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
OutFolder: TypeAlias = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
Texts: TypeAlias = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
PolicyName: TypeAlias = Annotated[str, tyro.conf.arg(metavar="POLICY")]


def find_recipe(name: str) -> Recipe:
    """A recipe by path, or by the name of a shipped one."""
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        return load_recipe(path)
    for folder in (Path(str(resources.files("diffulm"))) / "recipes", Path(__file__).parents[2] / "recipes"):
        if (folder / f"{name}.toml").is_file():
            return load_recipe(folder / f"{name}.toml")
    raise ValueError(
        f"there is no recipe {name!r}; give the path of a .toml file, or a shipped name such as smollm2-cpu"
    )


def adapt(
    model: Reference = "",
    /,
    *,
    out: Path,
    recipe: str = "smollm2-cpu",
    minutes: float | None = None,
    tokens: int | None = None,
    steps: int | None = None,
    text: tuple[str, ...] = (),
    text_field: str = "text",
    strict: bool = False,
    control: bool = True,
    seed: int | None = None,
    device: str | None = None,
    offline: bool = False,
    json: bool = False,
) -> None:
    """Make a diffusion model of an AR model: convert, train, measure, report (the main job).

    Example: diffulm adapt smollm2-135m-instruct-q4 --minutes 5 --out runs/demo

    The same command again resumes, or says that it is done.

    Args:
        model: Embedded default's name, folder, GGUF file or Hub id (default: the recipe's).
        out: Folder of the run.
        recipe: Recipe file, or the name of a shipped one.
        minutes: Training budget of each arm, in minutes on this machine.
        tokens: The budget in tokens instead.
        steps: The budget in optimizer steps instead.
        text: Text to train on instead of the recipe's: txt, jsonl, parquet, folder or Hub data set; several allowed.
        text_field: Field that holds the text.
        strict: Refuse invalid UTF-8 instead of replacing and counting it.
        control: Also train the parent on the same text for the same budget.
        seed: Seed of order and noise.
        device: cpu, cuda or mps (default: the best there is).
        offline: Never ask the Hub or the package index.
        json: Print the report as JSON on stdout.
    """
    chosen = find_recipe(recipe)
    if model:
        chosen = dataclasses.replace(chosen, model=dataclasses.replace(chosen.model, parent=model))
    budgets: dict[str, Any] = {"minutes": minutes, "tokens": tokens, "steps": steps}
    if any(v is not None for v in budgets.values()):
        chosen = dataclasses.replace(chosen, train=dataclasses.replace(chosen.train, **budgets))
    elif all(getattr(chosen.train, name) is None for name in budgets):
        raise ValueError("there is no budget; give --minutes, --tokens or --steps")
    if seed is not None:
        chosen = dataclasses.replace(chosen, train=dataclasses.replace(chosen.train, seed=seed))
    if text:
        sources = (SourceConfig("text", text[0], text_field=text_field, more=tuple(text[1:])),)
        chosen = dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, sources=sources))
    if strict:
        chosen = dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, strict=True))
    run_adapt(chosen, out, control=control, device=device, offline=offline, as_json=json)


def run_adapt(recipe: Recipe, out: Path, *, control: bool, device: str | None, offline: bool, as_json: bool) -> None:
    """`adapt` with live progress and a table at the end."""
    from rich.console import Console

    from .adapt import adapt as job
    from .eval.report import summary
    from .render import progress_line

    console = Console(stderr=as_json, highlight=False)
    last: dict[str, int] = {}

    def on_step(arm: str, p: Any) -> None:
        line = "  " + progress_line(
            step=p.step, steps=p.steps, tokens=p.tokens, tokens_per_second=p.tokens_per_second, loss=p.loss, left=p.left
        ) + (f"  held-out {p.heldout:.3f}" if p.heldout is not None else "")  # fmt: skip
        if console.is_terminal:
            console.print(line, end="\n" if p.heldout is not None or p.step == p.steps else "\r")
        elif p.heldout is not None or p.step == p.steps or p.step - last.get(arm, -99) >= 10:
            console.print(line)
            last[arm] = p.step

    command = "diffulm " + " ".join(shlex.quote(a) for a in sys.argv[1:])
    report = job(
        recipe, out, command=command, control=control, offline=offline, device=device,
        say=lambda s: console.print(s, markup=False, soft_wrap=True), on_step=on_step,
    )  # fmt: skip
    if as_json:
        print(json.dumps(report))
    else:
        console.print(summary(report))
        console.print(f"report: {out / 'report.html'}   model: {out / 'model'}", markup=False)


def convert(
    model: Reference,
    out: OutFolder,
    /,
    *,
    mask_token: str | None = None,
    source: Literal["previous", "own", "launch"] = "previous",
    layout: Literal["full", "block"] = "full",
    block_size: int | None = None,
    length: int = 1024,
    offline: bool = False,
    json: bool = False,
) -> None:
    """Turn an AR checkpoint into a diffusion checkpoint, without training.

    Example: diffulm convert smollm2-135m-instruct-q4 runs/init

    Args:
        model: Embedded default's name, folder, GGUF file or Hub id.
        out: New folder for the checkpoint.
        mask_token: Existing token to reuse as the mask (default: the tokenizer's own, else a new row).
        source: Row that predicts a token: previous (the paper's shift), own, launch (block layout).
        layout: full (the paper) or block.
        block_size: Tokens per block (block layout).
        length: Tokens of the windows it will be trained on.
        offline: Never ask the Hub or the package index.
        json: Print what was decided as JSON.
    """
    from .convert import convert as job

    done = job(
        model, out, mask_token=mask_token, source=source, layout=layout, block_size=block_size, trained_length=length,
        offline=offline,
    )  # fmt: skip
    if json:
        print_json(dataclasses.asdict(done))
    else:
        print(f"{out}: mask {done.mask_token} = {done.mask_token_id} ({done.mask_row}), start {done.start_token}")
        for change in done.attention:
            print(f"  {change}")


def prepare(
    text: Texts,
    /,
    *,
    out: Path,
    tokenizer: str,
    text_field: str = "text",
    heldout: float = 0.05,
    strict: bool = False,
    workers: int = 1,
    json: bool = False,
) -> None:
    """Turn text into token shards, with a held-out split by document.

    Example: diffulm prepare book.txt notes.jsonl --tokenizer runs/init --out data

    Args:
        text: txt, jsonl, parquet, folder, Hub data set, builtin:topics or builtin:stdlib.
        out: Folder for the shards.
        tokenizer: Model whose tokenizer is used (folder, GGUF file, embedded default or Hub id).
        text_field: Field that holds the text (jsonl, parquet, data sets).
        heldout: Share of documents held out.
        strict: Refuse invalid UTF-8 instead of replacing and counting it.
        workers: Processes.
        json: Print the statistics as JSON.
    """
    from . import hub
    from .data.prepare import prepare as job
    from .data.sources import Source
    from .tokenizer import load_tokenizer

    if not text:
        raise ValueError("there is no text; give at least one file, folder or data set")
    folder, gguf = hub.resolve(tokenizer)
    loaded = load_tokenizer(folder, **({"gguf_file": gguf} if gguf else {}))
    sources = [Source("text", text[0], text_field=text_field, more=tuple(text[1:]))]
    report = job(sources, loaded, out, heldout_fraction=heldout, strict=strict, workers=workers)
    if json:
        print_json(report)
        return
    for name, found in report["sources"].items():
        for split in ("train", "heldout"):
            n = found[split]
            print(f"{name}/{split}: {n['documents']:,} documents, {n['tokens']:,} tokens, {n['bytes']:,} bytes")
        for what in ("invalid_utf8", "empty", "duplicates"):
            if found[what]:
                print(f"  {what.replace('_', ' ')}: {found[what]} documents")


def train(
    recipe: RecipeName,
    /,
    *,
    out: Path,
    minutes: float | None = None,
    steps: int | None = None,
    device: str | None = None,
    offline: bool = False,
    json: bool = False,
) -> None:
    """Run a recipe: convert, prepare, train the diffusion arm, score; no control arm. Resumes exactly.

    Example: diffulm train recipes/smollm2-cpu.toml --minutes 5 --out runs/mine

    Args:
        recipe: Recipe file, or the name of a shipped one.
        out: Folder of the run.
        minutes: Budget in minutes instead of the recipe's.
        steps: Budget in optimizer steps instead of the recipe's.
        device: cpu, cuda or mps.
        offline: Never ask the Hub or the package index.
        json: Print the report as JSON on stdout.
    """
    adapt(
        out=out, recipe=recipe, minutes=minutes, steps=steps, control=False, device=device, offline=offline, json=json
    )


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
    from .eval.evaluate import Plan

    plan = Plan(
        tasks, data_dir, limit=limit, draws=draws, seed=seed, fewshot=fewshot, chat=chat_template, confidence=confidence
    )
    run_evaluate(
        model, plan, parent=parent, out=out, adapter=adapter, device=device, dtype=dtype, offline=offline, as_json=json
    )


def run_evaluate(model: str, plan: Any, *, out: Path | None, offline: bool, as_json: bool, **settings: Any) -> None:
    """`eval` with progress on stderr and tables at the end."""
    from rich.console import Console

    from .eval.evaluate import evaluate as job
    from .eval.scoreboard import summary
    from .render import progress_line

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


def generate(
    model: Reference,
    prompt: PromptText,
    /,
    *,
    max_tokens: int = 32,
    steps: int | None = None,
    policy: PolicyName = "confidence",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: tuple[str, ...] = (),
    seed: int = 0,
    block: int | None = None,
    cache: Literal["none", "prefix", "dual"] = "none",
    watch: bool = False,
    adapter: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    offline: bool = False,
    json: bool = False,
) -> None:
    """Complete a prompt with a diffusion model.

    Example: diffulm generate runs/demo/model "The with statement" --max-tokens 24 --watch

    Args:
        model: Diffusion checkpoint: a folder or Hub id.
        prompt: Text to go on from ("-": read it from standard input).
        max_tokens: Tokens denoised together; the text ends at the first end-of-text token.
        steps: Forward passes at most (default: one per token).
        policy: confidence, entropy, margin, random, first-hitting, ancestral, threshold:TAU, threshold:TAU:leftmost,
            factor:F, entropy-bound:GAMMA, remask:ETA or remask:ETA:rescale (numbers may be left out).
        temperature: 0 is greedy.
        top_k: Draw among the k most probable tokens.
        top_p: Draw among the most probable tokens that hold this much probability.
        stop: Strings before which the text ends.
        seed: Seed of all draws.
        block: Tokens filled together, block after block (default: the checkpoint's own; with a cache, 32).
        cache: prefix or dual keep what stands outside the block, approximately (full attention); none: exact.
        watch: Show the denoising (on stderr).
        adapter: LoRA in peft's format to merge into the model: a folder or Hub id.
        device: cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or autocast.
        offline: Never ask the Hub.
        json: Print JSON.
    """
    from .hub import load
    from .sampling import generate as job

    loaded = load(model, device=device, dtype=dtype, adapter=adapter, offline=offline)
    prompt = sys.stdin.read() if prompt == "-" else prompt
    with Watching(loaded, watch) as view:
        text = job(
            loaded, prompt, max_tokens=max_tokens, steps=steps, policy=policy, temperature=temperature, top_k=top_k,
            top_p=top_p, stop=stop, seed=seed, block=block, cache=cache, watch=view,
        )  # fmt: skip
    assert isinstance(text, str)
    if json:
        print_json({"prompt": prompt, "text": text})
    else:
        print(prompt + text)


def infill(
    model: Reference,
    text: PromptText,
    /,
    *,
    length: int | Literal["auto"] = 8,
    max_length: int = 16,
    must: tuple[str, ...] = (),
    must_not: tuple[str, ...] = (),
    steps: int | None = None,
    policy: PolicyName = "confidence",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    watch: bool = False,
    adapter: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    offline: bool = False,
    json: bool = False,
) -> None:
    """Fill the holes of a text: each <hole> takes --length tokens, <hole:N> takes N, <hole:auto> as many as fit best.

    Example: diffulm infill runs/demo/model "def add(a, b):<hole:6> + b" --watch

    Args:
        model: Diffusion checkpoint: a folder or Hub id.
        text: Text with holes ("-": read it from standard input).
        length: Tokens of a hole that names no number; auto searches 1 to --max-length for the likeliest fill.
        max_length: Most tokens of a hole whose length is searched.
        must: Words that have to occur in a fill; they are put where the model finds them likeliest.
        must_not: Words that no fill may hold.
        steps: Forward passes at most (default: one per token).
        policy: confidence, entropy, margin, random, first-hitting, ancestral, threshold:TAU, threshold:TAU:leftmost,
            factor:F, entropy-bound:GAMMA, remask:ETA or remask:ETA:rescale (numbers may be left out).
        temperature: 0 is greedy.
        top_k: Draw among the k most probable tokens.
        top_p: Draw among the most probable tokens that hold this much probability.
        seed: Seed of all draws.
        watch: Show the denoising (on stderr).
        adapter: LoRA in peft's format to merge into the model: a folder or Hub id.
        device: cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or autocast.
        offline: Never ask the Hub.
        json: Print JSON.
    """
    from .hub import load
    from .sampling import infill as job

    loaded = load(model, device=device, dtype=dtype, adapter=adapter, offline=offline)
    text = sys.stdin.read() if text == "-" else text
    with Watching(loaded, watch) as view:
        filled = job(
            loaded, text, length=length, max_length=max_length, must=must, must_not=must_not, steps=steps,
            policy=policy, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, watch=view,
        )  # fmt: skip
    if json:
        print_json({
            "text": str(filled), "fills": list(filled.fills), "lengths": list(filled.lengths),
            "forwards": filled.forwards,
        })  # fmt: skip
    else:
        print(filled)


def export(
    model: Reference,
    out: OutFolder,
    /,
    *,
    format: Literal["hf", "released"] = "hf",
    adapter: str | None = None,
    offline: bool = False,
) -> None:
    """Write a checkpoint in another form: an ordinary Hugging Face folder, or the released format.

    Example: diffulm export diffusionfamily/diffullama runs/gsm --adapter diffusionfamily/diffullama-gsm

    Args:
        model: Diffusion checkpoint: a folder or Hub id.
        out: New folder.
        format: hf (our own folder, which plain transformers opens) or released (that of DiffuGPT and DiffuLLaMA).
        adapter: LoRA in peft's format to merge into the model: a folder or Hub id.
        offline: Never ask the Hub.
    """
    from .export import export as job

    print(f"{out}: {job(model, out, form=format, adapter=adapter, offline=offline)}")


class Watching:
    """The `watch` callback of a verb: draws each step on stderr, or None when not asked for."""

    def __init__(self, model: Any, wanted: bool) -> None:
        self.model, self.view = model, None
        if wanted:
            from .render import DenoisingView

            self.view = DenoisingView()

    def __enter__(self) -> Callable[[Any, Any], None] | None:
        if self.view is None:
            return None
        self.view.__enter__()
        return self.draw

    def __exit__(self, *exception: Any) -> None:
        if self.view is not None:
            self.view.__exit__(*exception)

    def draw(self, canvas: Any, step: Any) -> None:
        from .sampling import pieces_for_view

        assert self.view is not None
        self.view.update(step=step.index + 1, steps=step.steps, pieces=pieces_for_view(self.model, canvas, step))


VERBS: dict[str, Callable[..., None]] = {
    "adapt": adapt,
    "convert": convert,
    "prepare": prepare,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "infill": infill,
    "export": export,
}
#: Verbs that go on where they were interrupted; eval does where it was given a folder.
RESUMING = ("adapt", "train", "prepare")


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, ensure_ascii=False))


def usage() -> str:
    lines = [f"  {name:<9} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return (
        "usage: diffulm VERB ...   (diffulm VERB --help for its flags)\n\n" + "\n".join(lines)
        + "\n\nexample: diffulm adapt smollm2-135m-instruct-q4 --minutes 5 --out runs/demo"
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version", "version"):
        from . import __version__

        print(f"diffulm {__version__}")
        return 0
    if arguments[0] not in VERBS:
        import difflib

        near = difflib.get_close_matches(arguments[0], VERBS, n=1)
        print(
            f"diffulm: unknown verb {arguments[0]!r}" + (f"; did you mean {near[0]}?" if near else ""), file=sys.stderr
        )
        print(usage(), file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("diffulm").setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    verb = arguments[0]
    try:
        tyro.cli(VERBS[verb], prog=f"diffulm {verb}", args=arguments[1:])
    except SystemExit as error:
        return int(error.code or 0) if isinstance(error.code, int) or error.code is None else 2
    except ValueError as error:
        print(f"diffulm {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # An interrupt that passed through `exec` of a string (namedtuple, dataclass: any import) leaves CPython's
        # "unhandled" flag set though we caught it, and `python -m` would die of SIGINT in place of exiting 130. The
        # next `exec` clears the flag.
        exec("")
        print(
            f"\ndiffulm {verb}: interrupted"
            + ("; the same command resumes" if verb in RESUMING or {"eval", "--out"} <= {*arguments} else ""),
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if disk_is_full(error):
            print(
                f"diffulm {verb}: the disk is full; free some space and give the same command again: finished stages "
                "and the last checkpoint are kept",
                file=sys.stderr,
            )
            return 2
        if os.environ.get("DIFFULM_DEBUG"):
            raise
        print(f"diffulm {verb}: failed: {type(error).__name__}: {error} (DIFFULM_DEBUG=1 shows where)", file=sys.stderr)
        return 1
    return 0


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is the operating system's "no space left"."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error) or "code: 28" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def entry() -> None:
    """Console script."""
    sys.exit(main())
