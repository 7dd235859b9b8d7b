"""The folder of a run: whose it is, what its stages have found so far, and whether it is finished.

Stages keep what they make, so the same call goes on where an earlier one was stopped. Small results are kept in
`scores.json`; that the whole run is done is said by `report.json`, which is written last.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import runtime
from ..train.config import Recipe, TrainConfig, differing_keys, to_dict
from ..train.group import is_first, on_first_rank, process_group
from ..train.loop import Progress
from ..train.parallel import check_world

MARKER = "adapt.json"
Say = Callable[[str], None]
OnStep = Callable[[str, Progress], None]


@dataclass
class Run:
    """What the stages of one run share.

    `offline`: never ask the Hub. `say` gets a line for people, `on_step` the arm's name and its progress. `compile`:
    whether layers are compiled here. `world`: processes that train together.
    """

    recipe: Recipe
    out: Path
    offline: bool
    say: Say
    on_step: OnStep
    device: torch.device
    compile: bool = False
    world: int = 1


@contextlib.contextmanager
def opened(
    recipe: Recipe, out: Path | str, *, offline: bool, device: str | None, say: Say, on_step: OnStep
) -> Iterator[Run]:
    """A run for the length of the block, in the process group where torchrun describes one.

    All processes train; the first one does the rest while the others wait, and it alone speaks. ValueError for a
    device that is not there.
    """
    where = runtime.pick_device(device)
    with process_group(where) as (rank, world):
        if rank:
            say, on_step = (lambda _: None), (lambda arm, progress: None)
        yield Run(recipe, Path(out), offline, say, on_step, where, world=world)


def begin(run: Run, *, control: bool = False) -> bool:
    """Claim the run's folder, and say whether it is new. ValueError also where its processes cannot share a batch."""

    def first() -> bool:
        check_world(run.recipe.train, run.world)
        return claim(run.out, run.recipe, control)

    return on_first_rank(first)


def claim(out: Path, recipe: Recipe, control: bool) -> bool:
    """Make `out` ours, and say whether it is new; else it was begun by the same recipe. ValueError otherwise."""
    wanted: dict[str, Any] = {"recipe": as_json(recipe), "control": control}
    marker = out / MARKER
    for leftover in out.glob(".*.tmp") if marker.is_file() else ():  # of a killed run
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if marker.is_file():
        there = runtime.read_json(marker)
        keys = [*differing_keys(there["recipe"], wanted["recipe"])] + ["control"] * (there["control"] != control)
        if keys:
            raise ValueError(
                f"{out} holds a run with other settings ({', '.join(keys[:5])} differ); choose another --out"
            )
        return False
    # A marker half written by a killed run is ours.
    if out.exists() and (not out.is_dir() or any(not p.match(f".{MARKER}.*.tmp") for p in out.iterdir())):
        raise ValueError(f"{out} already holds something that is no diffulm run; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    runtime.write_atomic(marker, json.dumps(wanted, indent=1))
    return True


def finished(run: Run) -> dict[str, Any] | None:
    """The report of a run that is done, aloud; None of one that is not. The same in all processes."""

    def read() -> dict[str, Any] | None:
        if not (run.out / "report.json").is_file():
            return None
        run.say(f"{run.out} is finished; its report is {run.out / 'report.html'} (another --out starts afresh)")
        report: dict[str, Any] = runtime.read_json(run.out / "report.json")
        return report

    return on_first_rank(read)


@contextlib.contextmanager
def stages(run: Run, arm: str, *, fresh: bool) -> Iterator[Callable[[], float]]:
    """Around the stages of a run; yields its clock: seconds so far, those of interrupted calls included.

    Seconds and peak memory are kept however the block ends. Where bad input ends it and `arm` has trained nothing, a
    `fresh` folder is taken away again: a corrected command would trip over it.
    """
    if run.world > 1:
        run.say(f"{run.world} processes on {run.device.type}")
    run.compile = compiles(run.recipe.train, run.device)
    started = time.perf_counter() - float(read_state(run.out).get("seconds_before", 0))
    try:
        yield lambda: time.perf_counter() - started
    except ValueError:
        if is_first() and fresh and not (run.out / arm).exists():
            shutil.rmtree(run.out, ignore_errors=True)
        raise
    finally:
        if run.out.exists():
            peak = max(runtime.peak_memory_bytes(), int(read_state(run.out).get("peak_memory_bytes", 0)))
            write_state(run.out, seconds_before=time.perf_counter() - started, peak_memory_bytes=peak)


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether layers are compiled: as the config says, and if "auto" on CUDA and where a compiler works."""
    if config.compile != "auto":
        return config.compile == "on"
    return device.type == "cuda" or on_first_rank(runtime.can_compile)


def read_state(out: Path) -> dict[str, Any]:
    """What the stages of a run have kept in `scores.json` so far."""
    path = out / "scores.json"
    return runtime.read_json(path) if path.is_file() else {}


def write_state(out: Path, **values: Any) -> None:
    """Keep some more, or other values of what is there; only the first process writes."""
    if is_first():
        runtime.write_atomic(out / "scores.json", json.dumps({**read_state(out), **values}, indent=1))


def as_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON has it: lists for tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(to_dict(recipe)))
    return plain
