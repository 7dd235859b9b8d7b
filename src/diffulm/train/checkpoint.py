"""Training checkpoints: written aside, fsynced, renamed; the newest whole one wins.

`step-00000120/` holds `model.safetensors`, `optimizer.safetensors` and, written last, `state.json` with the step, the
budget, the recipe and the checksums of all files. A checkpoint whose checksum does not fit is passed over, aloud.
Weights that are not trained (a LoRA's base) are left out: they are those of the folder that the run began from.
Several processes write shards in the place of the two files (`shards`); each form can be read back by any number of
processes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..runtime import atomic_folder, fsync_folder, log, write_atomic
from . import shards
from .group import on_first_rank, rank_and_world
from .shards import Background, crc32, crc32_of_state

_FILES = ("model.safetensors", "optimizer.safetensors")
#: Whole tensors on rank 0, whatever the sharding. Not flatten_optimizer_state_dict: torch 2.13 writes such a dict but
#: cannot read it back together with full_state_dict.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
_TRAINED = dataclasses.replace(_WHOLE, ignore_frozen_params=True)


def full_model_state(module: nn.Module) -> dict[str, Tensor]:
    """The whole module's weights on rank 0, gathered from all ranks, each tensor once (tied ones are one)."""
    return _each_once(module, _WHOLE)


def _each_once(module: nn.Module, options: StateDictOptions) -> dict[str, Tensor]:
    state: dict[str, Any] = get_model_state_dict(module, options=options)
    seen: set[int] = set()
    unique = {}
    tied = _tied_names(module)
    for name, value in state.items():
        if name in tied or (value.numel() and value.data_ptr() in seen):
            continue
        seen.add(value.data_ptr())
        unique[name] = value.contiguous()
    return unique


def _tied_names(module: nn.Module) -> set[str]:
    """Parameter names that are second names of a parameter (a tied head)."""
    first: dict[int, str] = {}
    again = set()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            again.add(name)
    return again


def save(
    folder: Path,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    state: dict[str, Any],
    *,
    keep: int,
    background: Background | None = None,
) -> Path:
    """Write the checkpoint of `state["step"]` and delete all but the newest `keep`. Called by every process.

    With a background it returns while the checkpoint is still being written (an earlier one is waited for).
    """
    state = {**state}  # the caller's goes on changing
    path = folder / f"step-{state['step']:08d}"
    if background is not None:
        background.wait()
    if rank_and_world()[1] > 1:
        _save_shards(path, module, optimizers, state, keep, background)
    else:
        _save_whole(path, module, optimizers, state, keep, background)
    return path


def _save_whole(
    path: Path, module: nn.Module, optimizers: Any, state: dict[str, Any], keep: int, background: Background | None
) -> None:
    model_state = _each_once(module, _TRAINED)
    moments: dict[str, Any] = get_optimizer_state_dict(module, optimizers, options=_WHOLE)
    tensors = {
        f"{name}.{what}": value.contiguous()
        for name, values in moments.get("state", {}).items()
        for what, value in values.items()
    }
    state["optimizer"] = [{**group} for group in moments["param_groups"]]

    def write() -> None:
        _remove_leftovers(path.parent)
        with atomic_folder(path) as aside:
            save_file(model_state, aside / _FILES[0])
            save_file(tensors, aside / _FILES[1])
            _write_state(aside, state, {name: crc32(aside / name) for name in _FILES})
        _prune(path, keep)

    if background is None:
        write()
        return
    # Training goes on in these tensors (on the CPU; from a GPU they have just been copied).
    model_state = {name: value.clone() for name, value in model_state.items()}
    tensors = {name: value.clone() for name, value in tensors.items()}
    background.start(write)


def _save_shards(
    path: Path, module: nn.Module, optimizers: Any, state: dict[str, Any], keep: int, background: Background | None
) -> None:
    aside = path.with_name(f".{path.name}.tmp")  # one name for all processes

    def prepare() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        aside.mkdir()

    def finish(param_groups: list[dict[str, Any]], sums: dict[str, int]) -> None:
        _write_state(aside, {**state, "optimizer": param_groups}, sums)
        if path.exists():
            shutil.rmtree(path)
        aside.replace(path)
        fsync_folder(path.parent)
        _prune(path, keep)

    on_first_rank(prepare)
    shards.begin(aside, module, optimizers, finish, background)


def _write_state(aside: Path, state: dict[str, Any], sums: dict[str, int]) -> None:
    sums = {**sums, "state.json": crc32_of_state(state)}
    write_atomic(aside / "state.json", json.dumps({**state, "crc32": sums}))


def _remove_leftovers(folder: Path) -> None:
    for leftover in folder.glob(".step-*.tmp"):  # of a killed run
        shutil.rmtree(leftover)


def _prune(newest: Path, keep: int) -> None:
    """Newer ones than this are damaged (the run went on from before them) and must not push out whole ones."""
    for old in [p for p in checkpoints(newest.parent) if p <= newest][:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Complete-looking checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """(folder, state) of the newest whole checkpoint, or None. Damaged ones are named in a warning and passed over.

    Called by every process: each reads a share of the files.
    """
    for path in reversed(on_first_rank(lambda: checkpoints(folder))):
        state, reason = on_first_rank(lambda path=path: _read_state(path))  # type: ignore[misc]
        if state is not None:
            sums = state.pop("crc32")
            reason = _damage(path, sums)
            if not reason:
                return path, state
        log.warning("checkpoint %s is damaged (%s); trying the one before it", path.name, reason)
    return None


def _read_state(path: Path) -> tuple[dict[str, Any] | None, str]:
    """(state.json with its checksums, "") or (None, what is wrong with it)."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        sums = state["crc32"]
        if sums["state.json"] != crc32_of_state({k: v for k, v in state.items() if k != "crc32"}):
            return None, "state.json changed"
        if not {*_FILES} <= sums.keys() and shards.INDEX not in sums:
            return None, "state.json names no weights"
        return state, ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return None, f"{type(error).__name__}: {error}"


def _damage(path: Path, sums: dict[str, int]) -> str:
    """The files that are not what was written, in words; "" when all are."""
    rank, world = rank_and_world()
    wrong = []
    for name in itertools.islice(sorted(sums.keys() - {"state.json"}), rank, None, world):
        try:
            if crc32(path / name) != sums[name]:
                wrong.append(f"{name} changed or cut short")
        except OSError as error:
            wrong.append(f"{type(error).__name__}: {error}")
    return ", ".join(shards.gather(wrong))


def restore(path: Path, state: dict[str, Any], module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put a checkpoint back, bit for bit, whatever the world size now is. ValueError for another model's."""
    if (path / shards.INDEX).is_file():
        shards.read(path, state["optimizer"], module, optimizers)
        return
    weights: dict[str, Any] = load_file(path / _FILES[0])
    # Compared here: with full_state_dict torch fills up what is missing with what the module has.
    here = {name: value.shape for name, value in module.state_dict().items()}
    stored = {name: value.shape for name, value in weights.items()}
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    if not frozen & stored.keys():  # else it is an older one, which holds them all
        stored |= {name: here[name] for name in frozen}
    shards.check_model(path, stored, module, here)
    set_model_state_dict(module, weights, options=_WHOLE)
    moments: dict[str, Any] = {}
    for key, value in load_file(path / _FILES[1]).items():
        name, what = key.rsplit(".", 1)
        moments.setdefault(name, {})[what] = value
    everything: dict[str, Any] = {"state": moments, "param_groups": state["optimizer"]}
    set_optimizer_state_dict(module, optimizers, everything, options=_WHOLE)
