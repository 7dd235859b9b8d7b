"""The examples run, on a tiny checkpoint; the commands of the README run, on the embedded default."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path = ROOT) -> str:
    # A real model gains from threads, which the tests of tiny ones switch off.
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=env
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_new_policy(checkpoint: Path) -> None:
    assert "left to right" in run(sys.executable, "examples/new_policy.py", str(checkpoint))


def test_likelihood(checkpoint: Path) -> None:
    out = run(sys.executable, "examples/likelihood.py", str(checkpoint))
    assert re.search(r"\d\.\d+ \+- \d\.\d+ bits per byte", out) and out.count("-log p(") == 2


def test_picture(checkpoint: Path, tmp_path: Path) -> None:
    run(sys.executable, "examples/picture.py", str(checkpoint), "def add(a, b):<hole:6>\\n", str(tmp_path / "out.svg"))
    assert ET.parse(tmp_path / "out.svg").getroot().tag.endswith("svg")


def commands() -> list[str]:
    """Lines of the README's shell blocks that call diffulm."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("diffulm ")]


def test_readme_commands(tmp_path: Path) -> None:
    """Every diffulm command of the README, in order, in an empty folder; training cut to two steps, and less scored."""
    found = commands()
    assert any(line.startswith("diffulm adapt") for line in found), "the README shows the main job"
    for line in found:
        words = shlex.split(re.sub(r"--minutes \S+", "--steps 2", line), comments=True)
        if "--recipe" in words:
            at = words.index("--recipe") + 1
            recipe = (ROOT / f"recipes/{words[at]}.toml").read_text(encoding="utf-8")
            words[at] = str(tmp_path / f"{words[at]}.toml")
            Path(words[at]).write_text(re.sub(r"(?m)^windows = \d+", "windows = 4", recipe), encoding="utf-8")
        out = run(str(Path(sys.executable).parent / "diffulm"), *words[1:], cwd=tmp_path)
        assert out.strip()
    report = json.loads((tmp_path / "runs/demo/report.json").read_text(encoding="utf-8"))
    assert report["after"]["bits_per_byte"] > report["parent"]["bits_per_byte"] > 0
    assert (tmp_path / "runs/demo/report.html").stat().st_size > 10_000


def test_readme_python(checkpoint: Path, tmp_path: Path) -> None:
    """The Python blocks of the README, with the tiny checkpoint in place of the demo's model."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        run(sys.executable, "-c", re.sub(r'"runs/\w+/model"', repr(str(checkpoint)), block), cwd=tmp_path)
