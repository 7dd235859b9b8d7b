"""Sharded checkpoints through torch.distributed.checkpoint (DCP): every process writes what it holds.

A folder of `__<process>_<n>.distcp` files and `.metadata`, which any number of processes reads back. The index is a
pickle: open only checkpoints that you trust.
"""

from __future__ import annotations

import json
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .group import rank_and_world

INDEX = ".metadata"
_SHARDED = StateDictOptions(strict=False)
#: The group of the checkpoints' own messages (made at first use). Written in the background, they would otherwise
#: meet the messages of training; and on a GPU machine they would go through NCCL.
_group: list[Any] = []


def group() -> Any:
    """The process group of checkpoints; None without one."""
    if rank_and_world()[1] == 1:
        return None
    if not _group:
        _group.append(dist.new_group(backend="gloo"))
    return _group[0]


def begin(
    aside: Path,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    finish: Callable[[list[dict[str, Any]], dict[str, int]], None],
    background: Background | None,
) -> None:
    """Write the shards into the folder `aside`; then rank 0 calls `finish(param_groups, checksums)`.

    With a background all that is done at return is a copy of the state in memory.
    """
    # In this order: a forward without backward (held-out text) leaves the root gathered, and its gathered parameters
    # are not the optimizer's; asking for the model's state shards it again.
    weights = get_model_state_dict(module, options=_SHARDED)
    moments: dict[str, Any] = get_optimizer_state_dict(module, optimizers, options=_SHARDED)
    tensors = {"model": weights, "optim": moments["state"]}
    arguments: dict[str, Any] = {
        "storage_writer": dcp.FileSystemWriter(aside),  # which also calls fsync
        "process_group": group(),
    }
    first = rank_and_world()[0] == 0

    def complete(write: Callable[[], Any]) -> None:
        try:
            with causes():
                write()
            sums = _checksums(aside)
            if first:
                finish(moments["param_groups"], sums)
        except BaseException:
            if first:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    if background is None:
        complete(lambda: dcp.save(tensors, **arguments))
    else:
        written: Any = dcp.async_save(tensors, **arguments)
        background.start(lambda: complete(written.result))


class Background:
    """One checkpoint at a time, written while training goes on."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        assert self._running is None, "wait first"
        self._running = self._thread.submit(work)

    def wait(self) -> None:
        """Return when the one under way is on disk; its error is raised here."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


def read(path: Path, param_groups: list[dict[str, Any]], module: nn.Module, optimizers: Any) -> None:
    """Put the shards back, bit for bit, whatever the world size now is. ValueError for another model's, untouched."""
    reader = dcp.FileSystemReader(path)
    stored = {
        name.removeprefix("model."): tuple(entry.size)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("model.") and hasattr(entry, "size")
    }
    weights: dict[str, Any] = get_model_state_dict(module, options=_SHARDED)
    check_model(path, stored, module, {name: tuple(value.shape) for name, value in weights.items()})
    moments: dict[str, Any] = get_optimizer_state_dict(module, optimizers, options=_SHARDED)
    tensors = {"model": weights, "optim": moments["state"]}
    fill(tensors, reader)
    set_model_state_dict(module, tensors["model"], options=_SHARDED)
    everything: dict[str, Any] = {"state": tensors["optim"], "param_groups": param_groups}
    set_optimizer_state_dict(module, optimizers, everything, options=_SHARDED)


def fill(tensors: dict[str, Any], reader: Any) -> None:
    """Read into tensors, sharded or not, what a DCP reader finds under their names. Called by every process."""
    with warnings.catch_warnings(), causes():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is no accident
        dcp.load(tensors, storage_reader=reader, process_group=group())


def check_model(path: Path, stored: dict[str, Any], module: nn.Module, here: dict[str, Any]) -> None:
    """ValueError when a checkpoint's names and shapes are not those of this model's state."""
    needed = {name for name, _ in module.named_parameters()}
    other = (needed - stored.keys()) | {name for name in stored if stored[name] != here.get(name)}
    if other:
        raise ValueError(f"{path} belongs to another model: {', '.join(sorted(other)[:3])} differ")


def _checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of every file, each computed by the process that wrote it (the first one: the index too)."""
    rank = rank_and_world()[0]
    mine = [p for p in folder.iterdir() if p.name.startswith(f"__{rank}_") or (rank == 0 and p.name == INDEX)]
    sums = {p.name: crc32(p) for p in mine}
    return dict(gather(list(sums.items())))


def gather(mine: list[Any]) -> list[Any]:
    """The lists of all processes, joined."""
    world = rank_and_world()[1]
    if world == 1:
        return mine
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, mine, group=group())
    return [item for part in everyone for item in part]


def crc32(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def crc32_of_state(state: dict[str, Any]) -> int:
    """CRC-32 of a state as it stands in state.json."""
    return zlib.crc32(json.dumps(state).encode())


@contextmanager
def causes() -> Iterator[None]:
    """DCP wraps what went wrong in a process, in a BaseException; this raises the cause itself (a full disk, say)."""
    try:
        yield
    except dcp.CheckpointException as error:
        for cause, _ in error.failures.values():
            raise cause from error
        raise RuntimeError(str(error)) from error
