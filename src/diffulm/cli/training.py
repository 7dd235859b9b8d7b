"""Verbs that make checkpoints: adapt, convert, prepare, train, export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from ..train.config import Recipe, SourceConfig
from .flags import OutFolder, RecipeName, Reference, Texts, command_line, find_recipe, finish, print_json


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
    skip_bad: bool = False,
    control: bool = True,
    seed: int | None = None,
    device: str | None = None,
    offline: bool = False,
    json: bool = False,
) -> None:
    """Make a diffusion model of an AR model: convert, train, measure, report (the main job).

    Example: diffulm adapt smollm2-135m-instruct-q4 --recipe smollm2-block --minutes 5 --out runs/demo

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
        skip_bad: Leave out and count bad rows of conversations instead of stopping at them (recipes of task "sft").
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
    if skip_bad:
        chosen = skipping_bad(chosen)
    run_adapt(chosen, out, control=control, device=device, offline=offline, as_json=json)


def skipping_bad(recipe: Recipe) -> Recipe:
    """The recipe with `--skip-bad`. ValueError for one that reads no conversations."""
    if recipe.task != "sft":
        raise ValueError(
            "--skip-bad leaves out bad rows of conversations, for a recipe of task 'sft'; "
            f"recipe {recipe.name!r} has task {recipe.task!r}: drop the flag"
        )
    return dataclasses.replace(recipe, sft=dataclasses.replace(recipe.sft, skip_bad=True))


def run_adapt(recipe: Recipe, out: Path, *, control: bool, device: str | None, offline: bool, as_json: bool) -> None:
    """`adapt` with live progress and a table at the end."""
    from rich.console import Console

    from ..render import progress_line
    from ..runtime import under_torchrun

    console = Console(stderr=as_json, highlight=False)
    first = under_torchrun()[0] == 0  # of several processes one speaks
    last: dict[str, int] = {}

    def on_step(arm: str, p: Any) -> None:
        line = "  " + progress_line(
            step=p.step, steps=p.steps, tokens=p.tokens, tokens_per_second=p.tokens_per_second, loss=p.loss, left=p.left
        )  # fmt: skip
        line += f"  epoch {p.epoch:.2f}" if p.epoch > 1 else ""
        line += f"  held-out {p.heldout:.3f}" if p.heldout is not None else ""
        if console.is_terminal:
            console.print(line, end="\n" if p.heldout is not None or p.step == p.steps else "\r", soft_wrap=True)
        elif p.heldout is not None or p.step == p.steps or p.step - last.get(arm, -99) >= 10:
            console.print(line, soft_wrap=True)
            last[arm] = p.step

    shown: Any
    common: dict[str, Any] = {
        "command": command_line(), "offline": offline, "device": device, "on_step": on_step,
        "say": lambda s: console.print(s, markup=False, soft_wrap=True),
    }  # fmt: skip
    if recipe.task == "sft":
        from .. import answers
        from ..sft import sft

        report = sft(recipe, out, **common)
        shown, result = answers.summary(report), f"result: {report['model']}"
    else:
        from ..adapt import adapt as job
        from ..eval.report import summary

        report = job(recipe, out, control=control, **common)
        shown, result = summary(report), f"model: {out / 'model'}"
    if first:
        finish(report, [shown], out, as_json=as_json, more=f"   {result}")


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
    from ..convert import convert as job

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
    tokenizer: str,
    out: Path | None = None,
    text_field: str = "text",
    subset: str | None = None,
    split: str = "train",
    limit_documents: int | None = None,
    limit_bytes: int | None = None,
    heldout: float = 0.05,
    strict: bool = False,
    workers: int = 1,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Turn text into token shards, with a held-out split by document.

    Example: diffulm prepare book.txt notes.jsonl --tokenizer runs/init --out data

    Args:
        text: txt, jsonl, parquet, folder, Hub data set, builtin:topics or builtin:stdlib.
        out: Folder for the shards (a dry run needs none).
        tokenizer: Model whose tokenizer is used (folder, GGUF file, embedded default or Hub id).
        text_field: Field that holds the text (jsonl, parquet, data sets).
        subset: Configuration of a Hub data set.
        split: Split of a Hub data set.
        limit_documents: Documents after which reading ends.
        limit_bytes: UTF-8 bytes of text after which reading ends.
        heldout: Share of documents held out.
        strict: Refuse invalid UTF-8 instead of replacing and counting it.
        workers: Processes.
        dry_run: Only say how many documents, bytes and tokens there are, and how long it would take.
        json: Print the statistics as JSON.
    """
    from .. import hub
    from ..data.estimate import describe, estimate
    from ..data.prepare import prepare as job
    from ..data.sources import Source
    from ..tokenizer import load_tokenizer

    if not text:
        raise ValueError("there is no text; give at least one file, folder or data set")
    folder, gguf = hub.resolve(tokenizer)
    loaded = load_tokenizer(folder, **({"gguf_file": gguf} if gguf else {}))
    source = Source(
        "text", text[0], text_field=text_field, more=tuple(text[1:]), subset=subset, split=split,
        limit_documents=limit_documents, limit_bytes=limit_bytes,
    )  # fmt: skip
    if dry_run:
        found = estimate([source], loaded, workers=workers)
        print_json(found) if json else print("\n".join(describe("text", found["text"])))
        return
    if out is None:
        raise ValueError("there is no folder to write to; give --out FOLDER, or --dry-run to write nothing")
    sources = [source]
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
    skip_bad: bool = False,
    device: str | None = None,
    offline: bool = False,
    json: bool = False,
) -> None:
    """Run a recipe: convert, prepare, train the diffusion arm, score; no control arm. Resumes exactly.

    Example: diffulm train recipes/smollm2-cpu.toml --minutes 5 --out runs/mine

    On several GPUs or machines: torchrun --nproc-per-node 8 -m diffulm train RECIPE --out DIR (docs/guides/scale.md).

    Args:
        recipe: Recipe file, or the name of a shipped one.
        out: Folder of the run.
        minutes: Budget in minutes instead of the recipe's.
        steps: Budget in optimizer steps instead of the recipe's.
        skip_bad: Leave out and count bad rows of conversations instead of stopping at them (recipes of task "sft").
        device: cpu, cuda or mps.
        offline: Never ask the Hub or the package index.
        json: Print the report as JSON on stdout.
    """
    adapt(
        out=out, recipe=recipe, minutes=minutes, steps=steps, skip_bad=skip_bad, control=False, device=device,
        offline=offline, json=json,
    )  # fmt: skip


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
    from ..export import export as job

    print(f"{out}: {job(model, out, form=format, adapter=adapter, offline=offline)}")
