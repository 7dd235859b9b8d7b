"""Training checkpoints: written aside, fsynced, renamed; the newest whole one wins; no pickle.

`step-00000120/` holds `model.safetensors`, `optimizer.safetensors` and, written last, `state.json` with the step, the
budget, the recipe and the checksums of all three. A checkpoint whose checksum does not fit is passed over, aloud.
"""

from __future__ import annotations

import json
import shutil
import zlib
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

from ..runtime import atomic_folder, log, rank_and_world

_FILES = ("model.safetensors", "optimizer.safetensors")
#: Whole tensors on rank 0, whatever the sharding. Not flatten_optimizer_state_dict: torch 2.13 writes such a dict but
#: cannot read it back together with full_state_dict.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def full_model_state(module: nn.Module) -> dict[str, Tensor]:
    """The whole module's weights on rank 0, gathered from all ranks, each tensor once (tied ones are one)."""
    state: dict[str, Any] = get_model_state_dict(module, options=_WHOLE)
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
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, keep: int
) -> Path:
    """Write the checkpoint of `state["step"]` and delete all but the newest `keep`.

    Called by every rank; rank 0 writes.
    """
    model_state = full_model_state(module)
    moments: dict[str, Any] = get_optimizer_state_dict(module, optimizer, options=_WHOLE)
    tensors = {
        f"{name}.{what}": value.contiguous()
        for name, values in moments.get("state", {}).items()
        for what, value in values.items()
    }
    path = folder / f"step-{state['step']:08d}"
    if rank_and_world()[0] == 0:
        for leftover in folder.glob(".step-*.tmp"):  # of a killed run
            shutil.rmtree(leftover)
        with atomic_folder(path) as aside:
            save_file(model_state, aside / _FILES[0])
            save_file(tensors, aside / _FILES[1])
            whole = {**state, "optimizer": moments["param_groups"]}
            sums = {name: _crc32(aside / name) for name in _FILES}
            sums["state.json"] = zlib.crc32(json.dumps(whole).encode())
            (aside / "state.json").write_text(json.dumps({**whole, "crc32": sums}), encoding="utf-8")
        # Newer ones than this are damaged (the run went on from before them) and must not push out whole ones.
        for old in [p for p in checkpoints(folder) if p <= path][:-keep]:
            shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Complete-looking checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """(folder, state) of the newest whole checkpoint, or None. Damaged ones are named in a warning and passed over."""
    for path in reversed(checkpoints(folder)):
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            sums = state.pop("crc32")
            now = {name: _crc32(path / name) for name in _FILES}
            now["state.json"] = zlib.crc32(json.dumps(state).encode())
            wrong = [name for name in now if now[name] != sums[name]]
            if not wrong:
                return path, state
            reason = f"{', '.join(wrong)} changed or cut short"
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
        log.warning("checkpoint %s is damaged (%s); trying the one before it", path.name, reason)
    return None


def restore(path: Path, state: dict[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint back, bit for bit, whatever the world size now is."""
    weights: dict[str, Any] = load_file(path / _FILES[0])
    # Compared here: with full_state_dict torch fills up what is missing with what the module has.
    here = {name: value.shape for name, value in module.state_dict().items()}
    needed = {name for name, _ in module.named_parameters()}
    other = (needed - weights.keys()) | {name for name in weights if weights[name].shape != here.get(name)}
    if other:
        raise ValueError(f"{path} belongs to another model: {', '.join(sorted(other)[:3])} differ")
    set_model_state_dict(module, weights, options=_WHOLE)
    moments: dict[str, Any] = {}
    for key, value in load_file(path / _FILES[1]).items():
        name, what = key.rsplit(".", 1)
        moments.setdefault(name, {})[what] = value
    everything: dict[str, Any] = {"state": moments, "param_groups": state["optimizer"]}
    set_optimizer_state_dict(module, optimizer, everything, options=_WHOLE)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value
