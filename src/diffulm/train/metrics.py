"""One record per optimizer step: a line of JSON, and the same numbers to TensorBoard where it is asked for."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from ..runtime import write_atomic
from .plan import GPUS

#: Keys of a record that a clock decides: the rest of it is the same in every run of a recipe.
CLOCK = ("seconds", "tokens_per_second", "tflops", "mfu")
#: Words in a device's name that mean another speed than the table's; of the A100 all kinds are equally fast.
VARIANTS = {"pcie", "nvl", "ti", "d", "super", "laptop"}


class Metrics:
    """Appends records to `metrics.jsonl` in `folder`. On resume, records of steps to be run again are dropped."""

    def __init__(self, folder: Path, *, from_step: int = 0, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [r for r in read_metrics(folder) if r["step"] <= from_step]
        write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self.board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, record: dict[str, Any]) -> None:
        """One step's numbers; `step` counts completed optimizer steps from 1."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.board is not None:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key != "step":
                    self.board.add_scalar(key, value, record["step"])

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Records so far; a last line cut short by a kill is left out."""
    path = folder / "metrics.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [r for r in records if isinstance(r, dict) and "step" in r]


def throughput(
    tokens_per_second: float, flops_per_token: float | None, *, world: int, peak: float | None
) -> dict[str, float]:
    """`tflops`: the model's operations in 10^12 per second and process; `mfu`: that over `peak`, where both are known.

    `tokens_per_second` is that of all processes together; operations are counted by `flops.flops_per_token`.
    """
    if flops_per_token is None:
        return {}
    each = tokens_per_second * flops_per_token / world
    found = {"tflops": each / 1e12} | ({"mfu": each / peak} if peak else {})
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 operations per second of a device; None for a CPU, and for a GPU that the plan's table lacks."""
    return _peak_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _peak_by_name(name: str) -> float | None:
    words = set(re.findall("[a-z0-9]+", name.lower().replace("rtx ", "rtx")))
    for key, gpu in GPUS.items():
        model = key.split("-")[0]  # a100-40 and a100-80 differ in memory alone
        if model in words and "mig" not in words and (model == "a100" or not words & VARIANTS):
            return gpu.flops
    return None


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None
