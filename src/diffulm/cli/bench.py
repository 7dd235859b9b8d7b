"""Verbs that measure speed: bench."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import tyro

from .flags import Reference, command_line, finish

What: TypeAlias = Annotated[Literal["generate"], tyro.conf.Positional]


def bench(
    what: What,
    model: Reference,
    /,
    *,
    parent: str | None = None,
    prompts: Path | None = None,
    prompt_tokens: int = 32,
    lengths: tuple[str, ...] = ("64", "256"),
    batch: tuple[str, ...] = ("1", "8"),
    modes: tuple[str, ...] = (),
    policies: tuple[str, ...] = (),
    repeats: int = 3,
    temperature: float = 0.95,
    top_p: float = 0.9,
    to_length: bool = True,
    seed: int = 0,
    out: Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
    threads: int | None = None,
    offline: bool = False,
    json: bool = False,
) -> None:
    """Measure speed: `generate` sets our ways of writing text beside the AR parent's and the released samplers'.

    Example: diffulm bench generate runs/demo/model --lengths 64,256 --batch 1,8 --out runs/bench

    Args:
        what: What is measured: generate.
        model: Diffusion checkpoint: a folder or Hub id.
        parent: AR model that runs beside it and scores all texts (default: the one the checkpoint names).
        prompts: Text file with a prompt on each line (default: help texts of the standard library).
        prompt_tokens: Tokens kept of each prompt; shorter ones are left out.
        lengths: Numbers of new tokens; those beyond the trained length are left out.
        batch: Numbers of texts that are written together.
        modes: Groups of modes (default all): parent, released, exact, policies, caches.
        policies: Adaptive policies, as for generate --policy (default: several of threshold, factor, entropy-bound).
        repeats: Counted runs of each mode, all modes in turn.
        temperature: Of every draw; 0 is greedy. 0.95 with top-p 0.9 is what the released samplers were published with.
        top_p: Draw among the most probable tokens that hold this much probability.
        to_length: Every mode writes all tokens; --no-to-length: all stop at the end-of-text token.
        seed: Seed of all draws.
        out: Folder for report.json, report.md, report.html and the plots.
        device: cpu, cuda or mps.
        dtype: auto, float32, bfloat16, float64 or autocast; the parent gets the same.
        threads: CPU threads (default: torch's own choice).
        offline: Never ask the Hub.
        json: Print the report as JSON on stdout.
    """
    import torch
    from rich.console import Console

    from ..bench.generate import Plan
    from ..bench.generate import bench as job
    from ..bench.table import summary, write

    assert what == "generate"
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads must be at least 1, not {threads}")
        torch.set_num_threads(threads)
    chosen = {"groups": tuple(split(modes)), "policies": tuple(split(policies))}
    plan = Plan(
        numbers("lengths", lengths), numbers("batch", batch), repeats=repeats, prompts=prompts,
        prompt_tokens=prompt_tokens, temperature=temperature, top_p=top_p, to_length=to_length, seed=seed,
        **{name: value for name, value in chosen.items() if value},
    )  # fmt: skip
    notes = Console(stderr=True, highlight=False)
    report = job(
        model, plan, parent=parent, device=device, dtype=dtype, offline=offline,
        command=command_line(), say=lambda line: notes.print(line, markup=False, soft_wrap=True),
    )  # fmt: skip
    if out is not None:
        write(report, out)
    finish(report, summary(report), out, as_json=json)


def split(words: Sequence[str]) -> list[str]:
    """What stands between commas or spaces."""
    return [part for word in words for part in word.split(",") if part]


def numbers(name: str, words: Sequence[str]) -> tuple[int, ...]:
    """Different whole numbers, with commas or spaces between them. ValueError for anything else."""
    try:
        return tuple(dict.fromkeys(int(part) for part in split(words)))
    except ValueError:
        raise ValueError(f"--{name} takes whole numbers such as 64,256, not {' '.join(words)}") from None
