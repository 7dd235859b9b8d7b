"""What a result says about the machine it was measured on: kind, never a name."""

from __future__ import annotations

from typing import Any

from diffulm.runtime import machine


def describe() -> dict[str, Any]:
    """Processor kind, threads, GPU, versions."""
    facts = machine()
    return {key: facts[key] for key in ("cpu", "threads", "gpu", "python", "torch")}
