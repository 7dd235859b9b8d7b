"""Machine matters: device, dtype, seeds, logging, atomic files.

Nothing here knows about diffusion. Imported by every layer above, imports none of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

log = logging.getLogger("diffulm")

#: What a seeded uniform is used for. Each purpose has its own stream, so that adding a draw to one
#: never shifts another (design: one uniform per sample, position, step and purpose).
PURPOSES = ("token", "reveal", "order", "accept", "residual", "noise", "level", "anneal", "shuffle", "eval")


def generator(seed: int, *key: int, purpose: str) -> np.random.Generator:
    """A counter-based generator for one purpose: the same key gives the same numbers on any machine and process.

    `Generator.random(n)` reads the stream in order, so the first n numbers do not depend on how many follow:
    a sample's noise does not change with the padding or with the samples beside it.
    """
    words = hashlib.blake2b(repr((seed, purpose, *key)).encode(), digest_size=16).digest()
    assert purpose in PURPOSES, purpose
    return np.random.Generator(np.random.Philox(key=int.from_bytes(words, "little")))


def uniforms(seed: int, *key: int, purpose: str, n: int) -> np.ndarray:
    """`n` float64 uniforms in [0, 1) of one stream (see `generator`)."""
    return generator(seed, *key, purpose=purpose).random(n)


# ---------------------------------------------------------------------------------------------- device and dtype


@dataclass(frozen=True)
class Precision:
    """How numbers are held and multiplied: `weights` dtype, and the autocast dtype or None."""

    weights: torch.dtype
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        weights = str(self.weights).removeprefix("torch.")
        return (
            weights if self.autocast is None else f"{weights} + autocast({str(self.autocast).removeprefix('torch.')})"
        )

    def context(self, device_type: str) -> contextlib.AbstractContextManager[Any]:
        """The autocast context of a forward pass (no context when nothing is cast)."""
        if self.autocast is None:
            return contextlib.nullcontext()
        import torch

        return torch.autocast(device_type, self.autocast)


def under_torchrun() -> tuple[int, int]:
    """(rank, world size) that torchrun's environment announces, before the group is joined and after it is left."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def pick_device(name: str | None = None) -> torch.device:
    """The named device, else CUDA, else CPU. ValueError when the named one is absent.

    Under torchrun "cuda" is one GPU for each process of this node. Apple's GPU is used only when it is named: it has
    no float64, in which tokens are drawn, and is untested.
    """
    import torch

    if (name is None or name == "cuda") and torch.cuda.is_available():
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise ValueError(
                f"more processes than GPUs: this node has {there}; start torchrun with --nproc-per-node {there}"
            )
        return torch.device("cuda", local)
    if name is None:
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: use cpu, mps, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but this torch sees no CUDA GPU; use --device cpu")
    if device.type == "cuda" and under_torchrun()[1] > 1:
        raise ValueError(f"device {name!r} is one GPU for all processes; use --device cuda, a GPU for each")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' was asked for, but this torch sees no Apple GPU; use --device cpu")
    return device


def parse_precision(text: str) -> Precision:
    """`float32`, `bfloat16`, `float64` (weights and products) or `autocast` (float32 weights, bfloat16 products)."""
    import torch

    table = {
        "float32": Precision(torch.float32),
        "float64": Precision(torch.float64),
        "bfloat16": Precision(torch.bfloat16),
        "autocast": Precision(torch.float32, torch.bfloat16),
    }
    if text not in table:
        raise ValueError(f"unknown dtype {text!r}: use auto, {', '.join(table)}")
    return table[text]


def probe_precision(
    width: int, hidden: int, *, rows: int, device: torch.device, train: bool, seconds: float = 1.0
) -> tuple[Precision, dict[str, float]]:
    """The fastest precision for this machine, measured on one feed-forward block of the model's real widths.

    bfloat16 is 2.3x faster than float32 on a CPU with AMX and several times slower in the backward pass on one
    without, so the choice is measured and never assumed. For training, float32 master weights are kept
    (a bfloat16 weight cannot hold an update of 1e-4 of itself), hence only plain float32 and autocast compete.
    Returns the choice and the seconds each candidate took (minimum over repeats). On CUDA: autocast to train,
    bfloat16 to generate, without a probe.
    """
    import torch

    if device.type == "cuda":
        return (parse_precision("autocast" if train else "bfloat16")), {}
    if device.type != "cpu":
        return parse_precision("float32"), {}
    names = ("float32", "autocast") if train else ("float32", "bfloat16")
    best: dict[str, float] = dict.fromkeys(names, float("inf"))
    blocks: dict[str, tuple[Precision, Any, Any]] = {}
    with torch.random.fork_rng(devices=[]):
        for name in names:
            precision = parse_precision(name)
            block = torch.nn.Sequential(
                torch.nn.Linear(width, hidden, bias=False), torch.nn.SiLU(), torch.nn.Linear(hidden, width, bias=False)
            ).to(precision.weights)
            blocks[name] = precision, block, torch.randn(rows, width, dtype=precision.weights)
    deadline = time.perf_counter() + seconds
    while True:
        for name, (precision, block, x) in blocks.items():
            start = time.perf_counter()
            with precision.context("cpu"), torch.set_grad_enabled(train):
                y = block(x)
            if train:
                y.float().square().mean().backward()
            best[name] = min(best[name], time.perf_counter() - start)
        if time.perf_counter() > deadline:
            break
    return parse_precision(min(best, key=best.__getitem__)), best


def can_compile() -> bool:
    """Whether torch.compile builds CPU kernels here: tried on three numbers, since a compiler is not enough."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        return False
    import torch

    try:
        torch.compile(lambda x: (x * 2).sin().sum())(torch.ones(3))
    except Exception as error:  # headers, setuptools, the linker: whatever it is, eager works
        log.warning("torch.compile does not work here (%s); going on without it", type(error).__name__)
        return False
    return True


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far, bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, Any]:
    """What a result may say of the machine, without its name or paths.

    Processor (kind and architecture), cores this process may use, threads of torch, memory in bytes, GPU (name or
    None), versions.
    """
    import importlib.metadata
    import platform

    import torch

    cpu = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        names = [x.split(":", 1)[1].strip() for x in facts.read_text().split("\n") if x.startswith("model name")]
        cpu = names[0] if names else cpu
    there = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    return {
        "cpu": cpu,
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if there else None,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "datasets")},
    }


def describe_machine() -> str:
    """Some facts of `machine` in one line: architecture, cores, threads, GPU."""
    facts = machine()
    gpu = facts["gpu"] or "no GPU"
    return f"{facts['architecture']}, {facts['cores']} cores, {facts['threads']} threads, {gpu}"


# ------------------------------------------------------------------------------------------------- atomic files


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut (a no-op where folders cannot be opened)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write aside, fsync, rename: a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all: yields a folder aside, renamed to `path` when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            shutil.rmtree(path)
        aside.replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    fsync_folder(path.parent)


def read_json(path: Path) -> Any:
    """Parsed JSON; ValueError that names the file when it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or delete it") from error


def cache_folder() -> Path:
    """Where fetched models are kept: $DIFFULM_CACHE, else the platform's user cache folder."""
    if "DIFFULM_CACHE" in os.environ:
        return Path(os.environ["DIFFULM_CACHE"])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "diffulm"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "diffulm"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "diffulm"
