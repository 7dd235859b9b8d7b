"""The wheel builds, holds the recipes, and works where the source tree is not."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_builds_and_runs(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path / "dist"), str(ROOT)], check=True)
    (wheel,) = (tmp_path / "dist").glob("diffulm-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "diffulm/recipes/smollm2-cpu.toml" in names and "diffulm/train/loop.py" in names
    assert not [n for n in names if n.startswith("tests/")]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    code = "import diffulm, diffulm.cli as c; print(diffulm.__file__); print(c.find_recipe('smollm2-cpu').name)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    where, recipe = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path) and recipe == "smollm2-cpu"
