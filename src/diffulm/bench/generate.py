"""`diffulm bench generate`: every way of generating in one run, on the same prompts, in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import hub, runtime
from ..denoiser import HFDenoiser
from ..eval.evaluate import versions
from ..sampling import Draw, policy_from_name
from ..sampling.fill import given_ids
from ..tokenizer import decode, encode, fingerprint, special_tokens
from .meter import Meter, measured
from .modes import GROUPS, Job, Mode, modes
from .quality import describe

#: Tokens of the run that warms a mode up.
WARM_UP = 8
POLICIES = (
    "threshold:0.9", "threshold:0.6", "threshold:0.3", "factor:1", "factor:2", "factor:4", "entropy-bound:0.1",
    "entropy-bound:1", "entropy-bound:8",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is to be measured. lengths: new tokens; prompts: a file, one a line; to_length: nothing ends a text."""

    lengths: tuple[int, ...] = (64, 256)
    batches: tuple[int, ...] = (1, 8)
    policies: tuple[str, ...] = POLICIES
    groups: tuple[str, ...] = GROUPS
    repeats: int = 3
    prompts: Path | None = None
    prompt_tokens: int = 32
    temperature: float = 0.95
    top_p: float = 0.9
    to_length: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"lengths": self.lengths, "batch": self.batches, "repeats": (self.repeats,)}
        for name, values in (counts | {"prompt-tokens": (self.prompt_tokens,)}).items():
            if not values or min(values) < 1:
                raise ValueError(f"--{name} takes numbers from 1 on, not {', '.join(map(str, values)) or 'none'}")
        if unknown := set(self.groups) - set(GROUPS):
            raise ValueError(f"unknown modes {', '.join(sorted(unknown))}: use {', '.join(GROUPS)}")
        for name in self.policies:
            policy_from_name(name)
        Draw(self.temperature, None, self.top_p)


@dataclass
class Runs:
    """The counted runs of one mode: what each cost, how many tokens it gave, and the texts with their prompts."""

    meters: list[Meter] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)


def bench(
    reference: str,
    plan: Plan,
    *,
    parent: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    offline: bool = False,
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a checkpoint's ways of generating beside its AR parent's; returns the report (table.py draws it).

    parent: default the one that the checkpoint names; where that cannot be opened, its rows and the likelihoods are
    left out with the reason. ValueError for a parent of another tokenizer, prompts that are too short or hold the
    mask token, or when no length fits the trained length.
    """
    began = time.perf_counter()
    model = hub.load(reference, device=device, dtype=dtype, offline=offline)
    limit, start = int(model.config["trained_length"]), 1 + plan.prompt_tokens
    lengths = [n for n in plan.lengths if start + n <= limit]
    if not lengths:
        raise ValueError(
            f"{start} tokens of prompt and start token and {min(plan.lengths)} new ones are more than the trained "
            f"length of {limit}; give smaller --lengths or --prompt-tokens"
        )
    above, reason = open_parent(parent, model, offline=offline)
    prompts_NP, dropped = read_prompts(model, plan)
    found = modes(model, above, Draw(plan.temperature, None, plan.top_p), plan.policies)
    chosen = [mode for mode in found if mode.group in plan.groups]
    cells = []
    for batch in plan.batches:
        for length in lengths:
            say(f"batch {batch}, {length} tokens")
            cells.append(cell(chosen, model, above, prompts_NP, plan, batch, length, say))
    return {
        "model": {"name": reference, **model.config},
        "parent": None if above is None else parent or model.parent,
        "parent_left_out": reason,
        "settings": {
            **asdict(plan), "prompts": str(plan.prompts) if plan.prompts else "standard library",
            "prompts_used": len(prompts_NP), "prompts_too_short": dropped, "dtype": str(model.denoiser.precision),
            "warm_up_tokens": WARM_UP,
        },
        "lengths_left_out": [
            {"length": n, "reason": f"more than the trained length of {limit} with {start} tokens before it"}
            for n in plan.lengths if n not in lengths
        ],
        "cells": cells,
        "machine": runtime.describe_machine(),
        "device": str(model.device),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "command": command,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def open_parent(reference: str | None, model: hub.Model, *, offline: bool) -> tuple[HFDenoiser | None, str]:
    """(the AR parent in the model's own precision, "") or (None, why not). ValueError when the named one is wrong."""
    precision = model.denoiser.precision
    try:
        stock, tokenizer = hub.load_parent(reference or model.parent, dtype=precision.weights, offline=offline)
        if fingerprint(tokenizer) != fingerprint(model.tokenizer):
            raise ValueError(
                f"{reference or model.parent} has another tokenizer than the checkpoint, so their tokens cannot be "
                "compared; give the model that it was made from as --parent"
            )
    except ValueError as error:
        if reference is not None:
            raise
        return None, f"the parent that the checkpoint names could not be opened ({error}); give --parent"
    return HFDenoiser(stock.to(model.device).eval(), None, precision=precision), ""


def read_prompts(model: hub.Model, plan: Plan) -> tuple[Tensor, int]:
    """((prompts, 1 + prompt_tokens) ids with the start token, how many lines were too short).

    Without a file: pieces of the standard library's help texts, as many as the largest batch and all repeats take.
    """
    n = plan.prompt_tokens
    if plan.prompts is None:
        import pydoc_data.topics

        most = max(plan.batches) * plan.repeats
        text = " ".join(pydoc_data.topics.topics.values())[: 40 * n * most]
        ids = encode(model.tokenizer, text, plain=True)
        pieces = [ids[i : i + n] for i in range(0, len(ids), n)][:most]
    else:
        try:
            lines = plan.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts {plan.prompts} cannot be read as text ({error})") from error
        pieces = [encode(model.tokenizer, line, plain=True)[:n] for line in lines if line.strip()]
    kept = [given_ids(model, piece) for piece in pieces if len(piece) == n]
    if not kept:
        raise ValueError(f"no prompt has {n} tokens; give longer lines or a smaller --prompt-tokens")
    start = special_tokens(model.tokenizer).bos
    return torch.tensor([[start, *piece] for piece in kept], device=model.device), len(pieces) - len(kept)


def cell(
    chosen: Sequence[Mode],
    model: hub.Model,
    parent: HFDenoiser | None,
    prompts_NP: Tensor,
    plan: Plan,
    batch: int,
    length: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """All modes at one batch size and length: warmed up, then `repeats` times in turn, forwards and backwards.

    Repeat r of every mode continues the same prompts with the same seed.
    """
    special = special_tokens(model.tokenizer)
    ends = () if plan.to_length else tuple(dict.fromkeys((special.eos, special.bos)))
    backbones = [model.denoiser.backbone, *([] if parent is None else [parent.backbone])]
    left_out, found = [], {}
    for mode in chosen:
        try:
            mode.run(Job(prompts_NP[_turn(0, batch, len(prompts_NP))], min(length, WARM_UP), plan.seed, ends), Meter())
            found[mode.name] = Runs()
        except ValueError as error:
            left_out.append({"mode": mode.name, "reason": str(error)})
    active = [mode for mode in chosen if mode.name in found]
    for r in range(plan.repeats):
        which = _turn(r, batch, len(prompts_NP))
        job = Job(prompts_NP[which], length, plan.seed + r, ends)
        for mode in active if r % 2 == 0 else reversed(active):
            new_BN, meter = measured(partial(mode.run, job), backbones, model.device)
            runs, texts = found[mode.name], until_end(new_BN, ends)
            runs.meters.append(meter)
            runs.tokens.append(sum(map(len, texts)))
            runs.texts += texts
            runs.prompts += which
            say(f"  {r + 1}/{plan.repeats} {mode.name}: {meter.seconds:.2f} s")
    rows = []
    for mode in active:
        runs = found[mode.name]
        rows.append({
            "mode": mode.name, "group": mode.group, "family": mode.family, **cost(runs, batch),
            "quality": describe(parent, prompts_NP[runs.prompts], runs.texts, runs.prompts),
            "first_text": decode(model.tokenizer, runs.texts[0]),
        })  # fmt: skip
    return {"batch": batch, "length": length, "rows": rows, "left_out": left_out}


def _turn(r: int, batch: int, prompts: int) -> list[int]:
    """Which prompts repeat r continues; a short list begins again."""
    return [(r * batch + b) % prompts for b in range(batch)]


def until_end(new_BN: Tensor, ends: Sequence[int]) -> list[list[int]]:
    """Each text's tokens up to its first end and with it; what is behind is padding."""
    texts = []
    for row in new_BN.tolist():
        first = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        texts.append(row[:first])
    return texts


def cost(runs: Runs, batch: int) -> dict[str, Any]:
    """Medians with smallest and largest over the repeats; counts are totals per forward."""
    forwards, rows = sum(m.forwards for m in runs.meters), sum(m.rows for m in runs.meters)
    memory = [m.memory for m in runs.meters if m.memory is not None]
    speeds = [n / m.seconds for n, m in zip(runs.tokens, runs.meters, strict=True)]
    return {
        "tokens_per_second": spread(speeds),
        "first_token_seconds": spread([m.first for m in runs.meters]),
        "seconds": [m.seconds for m in runs.meters],
        "tokens": runs.tokens,
        "forwards": [m.forwards for m in runs.meters],
        "rows_per_forward": rows / forwards,
        "tokens_per_forward": sum(runs.tokens) / forwards / batch,
        "peak_memory_bytes": max(memory) if memory else None,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    assert all(map(math.isfinite, values))
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}
