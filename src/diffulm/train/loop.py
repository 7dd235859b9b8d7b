"""The training loop: accumulate, sum, divide once by the global count, clip, step.

Batches and held-out evaluation are handed in as functions; the loop knows neither data nor sampling. Its whole state
is weights, optimizer moments and the step number: batch n, its noise and the seed of dropout are functions of n.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .. import runtime
from ..denoiser import HFDenoiser
from ..layout import Rows
from ..objective import LEVEL_BINS, diffusion_loss
from ..runtime import log
from . import checkpoint
from .config import TrainConfig
from .metrics import Metrics
from .optim import build_optimizer, learning_rate

WARM_UP_MICRO, TIMED_MICRO = 3, 5
BUDGET = "budget.json"


class Batches(Protocol):
    """What the loop needs of data: the micro-batches of one rank, and the count the global batch is divided by."""

    def rows(self, n: int, rank: int = 0, world: int = 1) -> list[Rows]: ...


@dataclass(frozen=True)
class Budget:
    """Steps to run, tokens per step, and how it was found; stored in every checkpoint and reused on resume."""

    steps: int
    tokens_per_step: int
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Progress:
    """Handed to `report` after each step. `loss` in nats per token; `left` seconds, estimated."""

    step: int
    steps: int
    tokens: int
    tokens_per_second: float
    loss: float
    learning_rate: float
    left: float
    heldout: float | None


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
    rank, world = runtime.rank_and_world()
    micros = (rows for n in range(WARM_UP_MICRO + TIMED_MICRO) for rows in batches.rows(n, rank, world))
    seconds = []
    denoiser.train()
    for rows in itertools.islice(micros, WARM_UP_MICRO + TIMED_MICRO):
        start = time.perf_counter()
        diffusion_loss(denoiser, rows.to(device)).sum.backward()
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    timed = seconds[min(WARM_UP_MICRO, len(seconds) - 1) :]
    update = _time_update(denoiser)
    denoiser.zero_grad(set_to_none=True)
    per_batch = len(batches.rows(0, rank, world)) * sum(timed) / len(timed) + update
    speed = per_step / per_batch
    steps = max(1, round(config.minutes * 60 / per_batch))
    log.info("timed %.0f tokens/s: %g minutes are %d steps", speed, config.minutes, steps)
    return Budget(steps, per_step, speed)


def plan_budget(folder: Path, find: Callable[[], Budget]) -> Budget:
    """The budget stored in a run's folder, or the one found now: a resumed run keeps its number of steps."""
    path = folder / BUDGET
    rank, world = runtime.rank_and_world()
    # Ranks time differently, and one may look for the file after another wrote it: rank 0 decides for all.
    found = Budget(**runtime.read_json(path)) if rank == 0 and path.is_file() else None
    if not _any_rank([found is not None])[0]:
        found = find()
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            runtime.write_atomic(path, json.dumps(dataclasses.asdict(found)))
    if world > 1:
        import torch.distributed as dist

        everyone = [found]
        dist.broadcast_object_list(everyone)
        found = everyone[0]
    assert found is not None
    return found


def _time_update(module: nn.Module) -> float:
    """Seconds of clipping and an AdamW update of these parameters, at rate 0: no weight changes."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.grad is not None], lr=0.0, fused=True)
    optimizer.step()  # allocates the moments
    device = next(module.parameters()).device
    _synchronise(device)
    start = time.perf_counter()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    _synchronise(device)
    return time.perf_counter() - start


def train(
    denoiser: HFDenoiser,
    batches: Batches,
    config: TrainConfig,
    out: Path,
    *,
    budget: Budget,
    settings: dict[str, Any],
    anneal_ratio: Callable[[int], float] = lambda _: 1.0,
    heldout: Callable[[], float] | None = None,
    normalisation: Any = "nelbo",
    report: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Train to the end of the budget, resuming from the newest whole checkpoint in `out`.

    Args:
        denoiser: FSDP-sharded or not.
        batches: global batch n as micro-batches of rows.
        out: folder of checkpoints and metrics.jsonl.
        budget: steps to run (`plan_budget` finds it once and keeps it).
        settings: recipe and whatever else must agree between a checkpoint and a resume; compared and stored.
        heldout: called without gradient a few times a run; nats per token.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint of the last completed step was written first.
        ValueError: the checkpoint in `out` was made with other settings.
    """
    rank, world = runtime.rank_and_world()
    optimizer = build_optimizer(denoiser, config)
    found = checkpoint.latest(out)
    step, seconds = 0, 0.0
    saved = 0  # the step of the newest checkpoint
    if found:
        path, state = found
        check_settings(state["settings"], settings, path)
        checkpoint.restore(path, state, denoiser, optimizer)
        step, seconds = state["step"], state["seconds"]
        saved = step
        if step < budget.steps:
            log.info("resuming at step %d of %d", step, budget.steps)
    metrics = Metrics(out, from_step=step, tensorboard=config.tensorboard) if rank == 0 else None

    def save() -> None:
        nonlocal saved
        saved = step
        state = {"step": step, "seconds": seconds, "budget": vars(budget), "settings": settings}
        checkpoint.save(out, denoiser, optimizer, state, keep=config.keep)

    every = max(1, budget.steps // max(1, config.heldout_evaluations))
    saved_at = time.monotonic()
    denoiser.train()
    with _interruptions() as interrupted:
        while step < budget.steps:
            late = rank == 0 and time.monotonic() - saved_at > config.checkpoint_minutes * 60
            stop, due = _any_rank([bool(interrupted), late])  # ranks must agree, or one waits for the others for ever
            if stop:
                break
            if due and step > saved:
                save()
                saved_at = time.monotonic()
            started = time.perf_counter()
            rate = learning_rate(config, (step + 0.5) / budget.steps)  # the middle of the step: never 0 at either end
            done = train_step(
                denoiser, optimizer, batches.rows(step, rank, world), step, rate, config, normalisation, interrupted
            )
            if done is None:
                break
            loss, grad_norm, by_level = done
            step += 1
            took = time.perf_counter() - started
            seconds += took
            score = None
            if heldout is not None and (step % every == 0 or step == budget.steps):
                denoiser.eval()
                with torch.no_grad():
                    score = heldout()
                denoiser.train()
            speed = budget.tokens_per_step / took
            if metrics:
                metrics.write({
                    "step": step, "tokens": step * budget.tokens_per_step, "seconds": round(seconds, 3), "loss": loss,
                    "learning_rate": rate, "annealing": anneal_ratio(step - 1), "tokens_per_second": round(speed, 1),
                    "grad_norm": grad_norm, "heldout": score, "by_level": by_level,
                })  # fmt: skip
                left = (budget.steps - step) * seconds / step
                report(Progress(step, budget.steps, step * budget.tokens_per_step, speed, loss, rate, left, score))
        if step > saved:
            save()
        stop = _any_rank([bool(interrupted)])[0]
    if metrics:
        metrics.close()
    if stop or step < budget.steps:
        raise KeyboardInterrupt


def train_step(
    denoiser: HFDenoiser,
    optimizer: torch.optim.Optimizer,
    micros: list[Rows],
    step: int,
    rate: float,
    config: TrainConfig,
    normalisation: Any = "nelbo",
    interrupted: list[int] | tuple[()] = (),
) -> tuple[float, float, list[list[float]]] | None:
    """One optimizer step; (loss per token, gradient norm, nats and count per noise level), or None if interrupted.

    The count is summed over all micro-batches and ranks first, and every loss sum is divided by it: accumulation
    and data parallelism change nothing.
    """
    device = next(denoiser.parameters()).device
    torch.manual_seed(config.seed * 1_000_003 + step)  # dropout, where a parent has it
    world = runtime.rank_and_world()[1]
    count = sum(rows.maskable if normalisation == "nelbo" else rows.noised for rows in micros)
    totals = torch.tensor([count], dtype=torch.float64)
    by_level = torch.zeros(LEVEL_BINS, 2, device=device)
    _all_reduce(totals, device)
    count = max(1, int(totals[0]))
    optimizer.zero_grad(set_to_none=True)
    sums = []
    for rows in micros:
        loss = diffusion_loss(denoiser, rows.to(device), normalisation=normalisation)
        # FSDP averages gradients over the ranks; times the world size makes it a sum.
        (loss.sum * (world / count)).backward()
        sums.append(loss.sum.detach())
        by_level += loss.by_level
        if interrupted and world == 1:
            optimizer.zero_grad(set_to_none=True)
            return None
    norm = nn.utils.clip_grad_norm_(denoiser.parameters(), config.clip)
    norm_value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(norm_value):
        raise FloatingPointError(
            f"the gradient of step {step + 1} is not finite; lower train.learning_rate or train.clip"
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    total = torch.cat([torch.stack(sums).sum().cpu().double()[None], by_level.cpu().double().flatten()])
    _all_reduce(total, device)
    levels = [[round(float(a), 4), int(b)] for a, b in total[1:].view(LEVEL_BINS, 2)]
    return float(total[0]) / count, norm_value, levels


def check_settings(stored: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """ValueError that names the keys in which a checkpoint and this run differ."""
    different = [
        f"{k}: {stored.get(k)!r} there, {now.get(k)!r} here" for k in {**stored, **now} if stored.get(k) != now.get(k)
    ]
    if different:
        raise ValueError(
            f"{path.parent} was trained with other settings ({'; '.join(different[:4])}); use another --out"
        )


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM fill, so that a step is never cut in half; a second Ctrl-C ends at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        # torchrun follows a Ctrl-C with a SIGTERM of its own: that is no second wish.
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)
        log.warning("stopping after this micro-batch; a checkpoint follows (again to stop at once)")

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals go elsewhere
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _any_rank(flags: list[bool]) -> list[bool]:
    """Each flag, True on all ranks when any rank raised it."""
    if runtime.rank_and_world()[1] == 1:
        return flags
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    values = torch.tensor(flags, dtype=torch.float32)
    _all_reduce(values, device)
    return [bool(v) for v in values > 0]


def _all_reduce(values: torch.Tensor, device: torch.device) -> None:
    if runtime.rank_and_world()[1] > 1:
        import torch.distributed as dist

        moved = values.to(device)
        dist.all_reduce(moved)
        values.copy_(moved)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
