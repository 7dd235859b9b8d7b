"""What benchmarks share: what a result says of its machine (kind, never a name), and arguments of those of scores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffulm.runtime import machine


def describe() -> dict[str, Any]:
    """Processor kind, threads, GPU, versions."""
    facts = machine()
    return {key: facts[key] for key in ("cpu", "threads", "gpu", "python", "torch")}


def scoring_arguments(doc: str | None, *, tasks: str, limit: int) -> argparse.ArgumentParser:
    """What benchmarks of scores take: a checkpoint, tasks and their files, how many documents, threads, a file."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", default=tasks)
    parser.add_argument("--limit", type=int, default=limit)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    return parser
