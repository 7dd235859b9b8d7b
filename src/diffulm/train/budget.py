"""How long to train: a budget in steps, tokens or minutes becomes steps, once, and is kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import runtime
from ..denoiser import HFDenoiser
from ..objective import diffusion_loss
from ..runtime import log
from .config import TrainConfig
from .group import on_first_rank, rank_and_world
from .optim import build_optimizers, set_rate
from .step import Batches

WARM_UP_MICRO, TIMED_MICRO = 3, 5
BUDGET = "budget.json"


@dataclass(frozen=True)
class Budget:
    """Steps to run, tokens per step, and how it was found; stored in every checkpoint and reused on resume."""

    steps: int
    tokens_per_step: int
    tokens_per_second: float | None = None


def find_budget(
    config: TrainConfig, batches: Batches, denoiser: HFDenoiser, *, length: int, device: torch.device
) -> Budget:
    """The budget in optimizer steps.

    Minutes become steps by timing: 3 micro-batches to warm up and 5 timed, forward, backward and one optimizer
    update per global batch; the gradients are thrown away and no weight changes.
    """
    per_step = config.batch * length
    if config.steps is not None:
        return Budget(config.steps, per_step)
    if config.tokens is not None:
        return Budget(max(1, config.tokens // per_step), per_step)
    if config.minutes is None:
        raise ValueError("the recipe has no budget; set train.steps, train.tokens or train.minutes")
    rank, world = rank_and_world()
    micros = (rows for n in range(WARM_UP_MICRO + TIMED_MICRO) for rows in batches.rows(n, rank, world))
    seconds = []
    denoiser.train()
    for rows in itertools.islice(micros, WARM_UP_MICRO + TIMED_MICRO):
        start = time.perf_counter()
        diffusion_loss(denoiser, rows.to(device)).sum.backward()
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    timed = seconds[min(WARM_UP_MICRO, len(seconds) - 1) :]
    update = _time_update(denoiser, config)
    denoiser.zero_grad(set_to_none=True)
    per_batch = len(batches.rows(0, rank, world)) * sum(timed) / len(timed) + update
    speed = per_step / per_batch
    steps = max(1, round(config.minutes * 60 / per_batch))
    log.info("timed %.0f tokens/s: %g minutes are %d steps", speed, config.minutes, steps)
    return Budget(steps, per_step, speed)


def plan_budget(folder: Path, find: Callable[[], Budget]) -> Budget:
    """The budget stored in a run's folder, or the one found now: a resumed run keeps its number of steps."""
    path = folder / BUDGET

    def stored() -> Budget | None:
        return Budget(**runtime.read_json(path)) if path.is_file() else None

    def store() -> Budget:
        folder.mkdir(parents=True, exist_ok=True)
        runtime.write_atomic(path, json.dumps(dataclasses.asdict(found)))
        return found

    # Processes time differently, and one may look for the file after another wrote it: rank 0 decides for all.
    if (there := on_first_rank(stored)) is not None:
        return there
    found = find()
    return on_first_rank(store)


def _time_update(denoiser: HFDenoiser, config: TrainConfig) -> float:
    """Seconds of clipping and an update of these parameters, at rate 0: no weight changes."""
    optimizers = build_optimizers(denoiser, config)
    device = next(denoiser.parameters()).device
    for optimizer in optimizers:
        set_rate(optimizer, 0.0)
        optimizer.step()  # allocates the moments
    _synchronise(device)
    start = time.perf_counter()
    nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
