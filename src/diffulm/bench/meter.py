"""What one run costs: seconds, forwards, rows, the moment its first tokens stand, memory above what stood before."""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Meter:
    """Counts of one run. seconds and first (until the first new token of every text stands) are nan while unknown.

    rows: tokens that went through the backbone, all samples and padding included. memory: bytes, None where the
    platform does not tell. seen: what a run may set to say, from the ids (B, R) of a forward that is about to begin,
    whether the first tokens stand.
    """

    forwards: int = 0
    rows: int = 0
    seconds: float = math.nan
    first: float = math.nan
    memory: int | None = None
    seen: Callable[[Tensor], bool] | None = None
    began: float = 0.0

    def stands(self) -> None:
        """The first tokens stand now; later calls change nothing."""
        if math.isnan(self.first):
            self.first = time.perf_counter() - self.began

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-forward hook of a backbone."""
        ids_BR = args[0] if args else kwargs["input_ids"]
        if math.isnan(self.first) and self.seen is not None and self.seen(ids_BR):
            self.stands()
        self.forwards += 1
        self.rows += ids_BR.numel()


def measured(
    work: Callable[[Meter], Tensor], backbones: Sequence[nn.Module], device: torch.device
) -> tuple[Tensor, Meter]:
    """What `work` returns, and what it cost in forwards of the backbones. A GPU is waited for on both sides."""
    meter = Meter()
    with contextlib.ExitStack() as stack:
        for backbone in backbones:
            handle = backbone.register_forward_pre_hook(meter.forward, with_kwargs=True)
            stack.callback(handle.remove)
        peak = stack.enter_context(peak_memory(device))
        _wait(device)
        meter.began = time.perf_counter()
        out = work(meter)
        _wait(device)
        meter.seconds = time.perf_counter() - meter.began
        meter.memory = peak()
    if math.isnan(meter.first):
        meter.first = meter.seconds  # what does not stream is there at the end
    return out, meter


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yields a function that gives the peak since the block began, bytes above what was in use then.

    CUDA: tensors. Linux: resident memory of the process, whose high-water mark is reset. Elsewhere None.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or what earlier runs left in the heap would be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")
        resting = _resident("VmRSS")
    except (OSError, KeyError, TypeError, AttributeError):  # no /proc, or another C library than glibc
        yield lambda: None
        return
    yield lambda: max(0, _resident("VmHWM") - resting)


def _resident(name: str) -> int:
    """A line of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)[name].split()[0])
