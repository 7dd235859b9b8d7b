"""benchmarks/length_cost.py: the fits, the three ways, and a run of seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import length_cost
    finally:
        sys.path.remove(str(BENCHMARKS))
    return length_cost


def test_exponents_are_found(benchmark: ModuleType) -> None:
    cells = [
        {"model": model, "parameters": size, "layout": "full", "length": n, "peak_bytes": None,
         "seconds": 1e-6 * size**0.5 * n**1.5, "operations": float(size * n)}
        for model, size in (("a", 100), ("b", 1000)) for n in (256, 512, 1024)
    ]  # fmt: skip
    by_length, by_size = benchmark.exponents(cells[:-1])
    assert [(r["model"], r["longest"]) for r in by_length] == [("a", 1024), ("b", 512)]
    for row in by_length:
        assert [row["seconds"], row["seconds_last"]] == pytest.approx([1.5, 1.5]) and row["peak_bytes"] is None
        assert row["operations"] == pytest.approx(1)
    assert [r["length"] for r in by_size] == [256, 512], "only where every model was measured"
    assert all(r["seconds"] == pytest.approx(0.5) and r["operations"] == pytest.approx(1) for r in by_size)
    assert benchmark.slope([256], [1.0]) is None


def test_the_ways_are_what_they_are_called(benchmark: ModuleType) -> None:
    denoiser = benchmark.build_denoiser(32, 1, "float32", torch.device("cpu"))
    for way, rows, masked in (("full", 256, False), ("full, packed", 256, True), ("block of 32", 512, True)):
        made = benchmark.rows_of(way, 256)
        mask = denoiser.attention_mask(made)
        assert made.ids.shape == (1, rows) and (mask is not None) == masked
        assert mask is None or mask.shape == (1, 1, rows, rows)
        assert 0.4 < made.noised / made.maskable < 0.6 and len(made.source) == made.noised


def test_a_run_writes_its_tables_and_says_what_it_leaves_out(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--max-length", "512", "--sizes", "32x1", "64x1", "--device", "cpu", "--out", str(tmp_path / "cost")]
    benchmark.main([*words, "--seconds", "5"])
    found = json.loads((tmp_path / "cost.json").read_text())
    assert [(c["model"], c["layout"], c["length"]) for c in found["cells"]] == [
        (model, way, n) for model in ("32x1", "64x1") for way in benchmark.WAYS for n in (256, 512)
    ]
    assert all(c["seconds"] > 0 and c["tokens_per_second"] == c["length"] / c["seconds"] for c in found["cells"])
    assert len(found["by_length"]) == len(found["by_size"]) == 6
    text = (tmp_path / "cost.md").read_text()
    assert "| 64x1 | 0.3M | block of 32 | 512 |" in text and "Exponents of the length" in text
    benchmark.main([*words, "--seconds", "0.0001"])
    assert "64x1 full: 512 tokens and more left out" in capsys.readouterr().out
    lengths = [(c["model"], c["length"]) for c in json.loads((tmp_path / "cost.json").read_text())["cells"]]
    assert set(lengths) == {("32x1", 256), ("32x1", 512), ("64x1", 256)}, "the first size is measured to the end"
