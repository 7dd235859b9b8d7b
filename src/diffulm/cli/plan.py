"""Verbs that look before a run: plan, doctor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .flags import RecipeName, find_recipe, print_json


def plan(
    recipe: RecipeName,
    /,
    *,
    gpu: str = "h200",
    count: int = 8,
    mfu: float = 0.4,
    price: float | None = None,
    config: Path | None = None,
    slurm: Path | None = None,
    gpus_per_node: int = 8,
    out: str | None = None,
    offline: bool = False,
    json: bool = False,
) -> None:
    """Memory, time and cost of a recipe on given GPUs, before running it.

    Example: diffulm plan diffullama-7b --gpu h200 --count 64 --config llama-2-7b/config.json

    Args:
        recipe: Recipe file, or the name of a shipped one.
        gpu: a100-40, a100-80, h100, h200, b200, gh200, l40s, mi300x, rtx3090, rtx4090, or cpu (measured here).
        count: GPUs.
        mfu: Share of the peak that the model's operations reach: assumed, 0.3 to 0.5 is usual.
        price: Of one GPU for one hour.
        config: config.json of the parent, or its folder, where the parent cannot be had from here.
        slurm: File for a batch script that runs the recipe.
        gpus_per_node: GPUs in a node, for the script.
        out: Folder of the run, for the script (default: runs/RECIPE).
        offline: Never ask the Hub or the package index.
        json: Print the plan as JSON.
    """
    from .. import hub
    from ..train.plan import plan as job
    from ..train.slurm import slurm_script

    chosen = find_recipe(recipe)
    found = job(
        chosen, hub.parent_config(chosen.model.parent, config=config, offline=offline), gpu=gpu, count=count, mfu=mfu,
        price=price,
    )  # fmt: skip
    if slurm is not None:
        script = slurm_script(
            recipe, name=chosen.name, file=slurm.name, count=count, hours=found.hours,
            out=out or f"runs/{chosen.name}", stopping=found.stopping, gpus_per_node=gpus_per_node,
        )  # fmt: skip
        slurm.write_text(script, encoding="utf-8")
    if json:
        print_json(found.as_dict())
        return
    print("\n".join(_plan_lines(found)))
    if slurm is not None:
        print(f"\nwrote {slurm}: sbatch {slurm}")


def _plan_lines(found: Any) -> Iterator[str]:
    from ..train.slurm import torchrun_waits

    shape, asked = found.shape, found.asked
    lora = found.trained < shape.parameters
    sizes = f"{shape.parameters / 1e9:.3g}B parameters" + (f", a LoRA of {found.trained / 1e6:.3g}M" if lora else "")
    yield f"{found.recipe}: {found.parent}, {sizes}, {found.count} x {found.gpu}"
    yield ""
    yield f"memory per GPU, {found.precision}, micro-batch {asked.micro_batch}" + (
        ", activation checkpointing" if asked.checkpointing else ""
    )
    for name, size in asked.parts.items():
        yield f"  {name:<20} {size / 1e9:>8.2f} GB"
    yield f"  {'together':<20} {asked.total / 1e9:>8.2f} GB of {found.usable / 1e9:.0f} usable"
    for choice in found.choices:
        how = "with" if choice.checkpointing else "without"
        yield f"  largest micro-batch {how} activation checkpointing: {choice.largest or 'none fits'}"
    yield ""
    yield (
        f"speed at an assumed MFU of {found.mfu:.0%}: {found.tokens_per_second:,.0f} tokens/s "
        f"({found.flops_per_token / 1e9:.3g} GFLOP per token, peak {found.peak_flops / 1e12:.3g} TFLOP/s each)"
    )
    if found.hours is None:
        yield "time: the recipe has no budget; set train.steps or train.tokens"
    else:
        tokens = f" for {found.tokens / 1e9:.3g}B tokens" if found.tokens else ""
        yield f"time{tokens}: {found.hours:,.1f} hours, {found.hours * found.count:,.0f} GPU-hours" + (
            f", cost {found.cost:,.0f}" if found.cost is not None else ""
        )
    yield (
        f"checkpoint: {found.checkpoint_bytes / 1e9:.3g} GB ({'trained ' * lora}weights and two moments), every "
        f"{found.interval / 60:,.0f} minutes"
    )
    yield "  sqrt(2 x writing time at 1 GB/s x time between failures at one per 50,000 GPU-hours): Young/Daly"
    yield (
        f"stopping: {found.stopping:,.0f} s, for the step under way ({found.step_seconds:,.0f} s) and a checkpoint"
        + (
            f"; torchrun --shutdown-timeout {torchrun_waits(found.stopping)}, or it kills after 30 s"
            if found.count > 1
            else ""
        )
    )
    for line in found.advice:
        yield f"note: {line}"


def doctor(*, json: bool = False) -> None:
    """What this machine has, which dtype the probe chooses, and what is missing.

    Example: diffulm doctor

    Args:
        json: Print the findings as JSON.
    """
    from rich.console import Console

    from .diagnosis import diagnose

    found = diagnose()
    if json:
        print_json(found)
        return
    console = Console(highlight=False)
    for name, value in found.items():
        if name == "warnings":
            continue
        console.print(f"{name.replace('_', ' '):<18} {_shown(name, value)}", markup=False, soft_wrap=True)
    for warning in found["warnings"]:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
    if not found["warnings"]:
        console.print("nothing is missing")


def _shown(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(name, part)}" for key, part in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float) and name == "seconds":
        return f"{value * 1e3:.1f} ms"
    if isinstance(value, int) and ("memory" in name or "bytes" in name):
        return f"{value / 1e9:.1f} GB"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
