"""One record per optimizer step: a line of JSON, and the same numbers to TensorBoard where it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..runtime import write_atomic


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
