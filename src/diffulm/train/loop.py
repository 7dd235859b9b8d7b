"""The training loop: steps, checkpoints, records, held-out values; exact resume and orderly interruptions.

Batches and held-out evaluation are handed in as functions; the loop knows neither data nor sampling. Its whole state
is weights, optimizer moments and the step number: batch n, its noise and the seed of dropout are functions of n.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from ..denoiser import HFDenoiser
from ..runtime import log
from . import checkpoint
from .budget import Budget
from .config import TrainConfig, differing_keys
from .group import Terminated, rank_and_world
from .metrics import Metrics, finite, peak_flops, throughput
from .optim import build_optimizers, learning_rate
from .shards import Background
from .step import Batches, any_rank, prefetched, train_step


@dataclass(frozen=True)
class Progress:
    """Handed to `report` after each step. `loss` in nats per token; `left` seconds, estimated; `epoch`: passes so far
    over the text (over its most repeated source)."""

    step: int
    steps: int
    tokens: int
    tokens_per_second: float
    loss: float
    learning_rate: float
    left: float
    heldout: float | None
    epoch: float = 0.0


def train(
    denoiser: HFDenoiser,
    batches: Batches,
    config: TrainConfig,
    out: Path,
    *,
    budget: Budget,
    settings: dict[str, Any],
    anneal_ratio: Callable[[int], float] = lambda _: 1.0,
    epochs: Callable[[int], float] = lambda _: 0.0,
    heldout: Callable[[], float] | None = None,
    normalisation: Any = "nelbo",
    flops_per_token: float | None = None,
    report: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Train to the end of the budget, resuming from the newest whole checkpoint in `out`.

    A step whose loss or gradient is not finite is skipped: counted, but no weight moves.

    Args:
        denoiser: FSDP-sharded or not.
        batches: global batch n as micro-batches of rows.
        out: folder of checkpoints and metrics.jsonl, shared by all processes.
        budget: steps to run (`plan_budget` finds it once and keeps it).
        settings: recipe and whatever else must agree between a checkpoint and a resume; compared and stored.
        epochs: passes over the text in a number of sequences; recorded.
        heldout: called without gradient a few times a run; nats per token.
        flops_per_token: operations (`flops.flops_per_token`), from which the metrics have TFLOP/s and MFU.

    Raises:
        KeyboardInterrupt: Ctrl-C, or SIGTERM (`group.Terminated`); a checkpoint of the last completed step was
            written first.
        FloatingPointError: `config.max_skipped` steps in a row were skipped.
        ValueError: the checkpoint in `out` was made with other settings.
    """
    rank, world = rank_and_world()
    optimizers = build_optimizers(denoiser, config)
    state = _resume(out, denoiser, optimizers, settings, budget)
    step, saved = state["step"], state["step"]  # `saved`: the step of the newest checkpoint
    metrics = Metrics(out, from_step=step, tensorboard=config.tensorboard) if rank == 0 else None
    every = max(1, budget.steps // max(1, config.heldout_evaluations))
    device = next(denoiser.parameters()).device
    peak = peak_flops(device)
    saved_at = time.monotonic()
    denoiser.train()
    with (
        _writer(config) as background,
        _interruptions() as interrupted,
        prefetched(lambda n: batches.rows(n, rank, world), budget.steps, device) as rows_of,
    ):
        while step < budget.steps:
            late = rank == 0 and time.monotonic() - saved_at > config.checkpoint_minutes * 60
            stop, due = any_rank([bool(interrupted), late])  # ranks must agree, or one waits for the others for ever
            if stop:
                break
            if due and step > saved:
                checkpoint.save(out, denoiser, optimizers, state, keep=config.keep, background=background)
                saved, saved_at = step, time.monotonic()
            started = time.perf_counter()
            rate = learning_rate(config, (step + 0.5) / budget.steps)  # the middle of the step: never 0 at either end
            done = train_step(denoiser, optimizers, rows_of(step), step, rate, config, normalisation, interrupted)
            if done is None:
                break
            took = time.perf_counter() - started
            step += 1
            row = 0 if done.finite else state["skipped_in_a_row"] + 1
            state |= {
                "step": step, "seconds": state["seconds"] + took,
                "skipped": state["skipped"] + (not done.finite), "skipped_in_a_row": row,
            }  # fmt: skip
            score = None
            if heldout is not None and (step % every == 0 or step == budget.steps):
                denoiser.eval()
                with torch.no_grad():
                    score = heldout()
                denoiser.train()
            if metrics:
                speed, epoch = budget.tokens_per_step / took, epochs(step * config.batch)
                metrics.write({
                    "step": step, "tokens": step * budget.tokens_per_step, "seconds": round(state["seconds"], 3),
                    "loss": finite(done.loss), "learning_rate": rate, "annealing": anneal_ratio(step - 1),
                    "tokens_per_second": round(speed, 1), "grad_norm": finite(done.grad_norm), "heldout": score,
                    "epoch": round(epoch, 4), "skipped": state["skipped"], "by_level": done.by_level,
                    **throughput(speed, flops_per_token, world=world, peak=peak),
                })  # fmt: skip
                left = (budget.steps - step) * state["seconds"] / step
                tokens = step * budget.tokens_per_step
                report(Progress(step, budget.steps, tokens, speed, done.loss, rate, left, score, epoch))
            if row:
                _on_skipped(row, step, config, out)
        if step > saved:
            checkpoint.save(out, denoiser, optimizers, state, keep=config.keep, background=background)
    by_term, by_hand = any_rank([signal.SIGTERM in interrupted, signal.SIGINT in interrupted])
    if metrics:
        metrics.close()
    if by_term and not by_hand:
        raise Terminated
    if by_hand or step < budget.steps:
        raise KeyboardInterrupt


def _resume(
    out: Path, denoiser: HFDenoiser, optimizers: list[Optimizer], settings: dict[str, Any], budget: Budget
) -> dict[str, Any]:
    """The state of the newest whole checkpoint, its weights and moments put back; else that of a beginning."""
    start = {"step": 0, "seconds": 0.0, "skipped": 0, "skipped_in_a_row": 0}
    found = checkpoint.latest(out)
    if found:
        path, stored = found
        check_settings(stored["settings"], settings, path)
        checkpoint.restore(path, stored, denoiser, optimizers)
        start |= {name: stored[name] for name in start if name in stored}
        if start["step"] < budget.steps:
            log.info("resuming at step %d of %d", start["step"], budget.steps)
    return {**start, "budget": vars(budget), "settings": settings}


@contextmanager
def _writer(config: TrainConfig) -> Iterator[Background | None]:
    """The background of checkpoints, if they are written in one; at the end the last of them is on disk."""
    if not config.async_checkpoint:
        yield None
        return
    background = Background()
    try:
        yield background
    except BaseException:
        try:
            background.wait()
        except Exception as error:  # the first error is the one to hear of
            log.warning("the checkpoint under way was lost: %s", error)
        raise
    background.wait()


def _on_skipped(row: int, step: int, config: TrainConfig, out: Path) -> None:
    """Say that a step was skipped; FloatingPointError when too many were, one after the other."""
    if row < config.max_skipped:
        log.warning("step %d skipped: its loss or gradient is not finite (%d in a row)", step, row)
        return
    raise FloatingPointError(
        f"loss or gradient was not finite in {row} steps in a row ({step - row + 1} to {step}), and no weight moved; "
        "lower train.learning_rate or train.clip and start in another folder, or go further back by deleting the "
        f"newest checkpoints of {out}"
    )


def check_settings(stored: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """ValueError that names the keys in which a checkpoint and this run differ (keys of the machine may)."""
    different: dict[str, tuple[Any, Any]] = {}
    for key in {**stored, **now}:
        there, here = stored.get(key), now.get(key)
        if key == "recipe" and isinstance(there, dict) and isinstance(here, dict):
            different |= differing_keys(there, here)
        elif there != here:
            different[key] = there, here
    if different:
        named = "; ".join(f"{k}: {there!r} there, {here!r} here" for k, (there, here) in list(different.items())[:5])
        raise ValueError(f"{path.parent} was trained with other settings ({named}); use another --out")


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
    except Exception:
        if rank_and_world()[1] > 1:  # torchrun's SIGTERM, which follows, must not cut off what this process has to say
            before.pop(signal.SIGTERM, None)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
