"""What `diffulm doctor` finds: the machine, versions, caches, and what to do about what is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from .. import hub, runtime

#: The embedded default's widths (SmolLM2-135M), on which the dtype is probed.
_WIDTH, _HIDDEN, _ROWS = 576, 576 * 8 // 3, 1024
_SPARE = 5_000_000_000


def diagnose() -> dict[str, Any]:
    """Findings as plain values: bytes, seconds, and `warnings`, sentences that end with a remedy."""
    device = runtime.pick_device()
    machine = runtime.machine()
    cache = runtime.cache_folder()
    choice, seconds = runtime.probe_precision(_WIDTH, _HIDDEN, rows=_ROWS, device=device, train=True)
    generate, more = runtime.probe_precision(_WIDTH, _HIDDEN, rows=64, device=device, train=False, seconds=0.5)
    free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
    found: dict[str, Any] = {
        **machine,
        "compile": runtime.can_compile(),
        "dtype": {"train": str(choice), "generate": str(generate)},
        "seconds": {**{f"train {k}": v for k, v in seconds.items()}, **{f"generate {k}": v for k, v in more.items()}},
        "cache": str(cache),
        "cache_bytes": size_of(cache),
        "free_disk_bytes": free,
        "embedded_model": (cache / hub.EMBEDDED / "config.json").is_file(),
    }
    return {**found, "warnings": _warnings(found)}


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _warnings(found: dict[str, Any]) -> list[str]:
    out = []
    if not found["compile"]:
        out.append("torch.compile does not work, training is about a tenth slower; install a C++ compiler (g++)")
    if not found["embedded_model"]:
        out.append(f"the default model is not fetched yet (93 MB); `diffulm convert {hub.EMBEDDED} FOLDER` fetches it")
    if found["free_disk_bytes"] < _SPARE:
        out.append("less than 5 GB of disk are free; a run of the default model takes about 4, so free some")
    if found["memory_bytes"] and found["memory_bytes"] < 6_000_000_000:
        out.append("less than 6 GB of memory: set train.micro_batch = 1, and close other programs")
    if os.environ.get("OMP_NUM_THREADS") and found["threads"] < found["cores"] and not found["gpu"]:
        out.append(f"OMP_NUM_THREADS holds torch to {found['threads']} of {found['cores']} cores; unset it")
    return out
