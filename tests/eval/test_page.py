"""eval.page: a report as three files, of which the JSON comes last."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from diffulm.eval import page
from diffulm.eval.page import Block, Curve, Plot, Prose, Table, keep

BLOCKS: list[Block] = [
    Prose("All is <b>well</b>."),
    Table(("", "Figure"), [("before", "1.0 | 2")]),
    Plot("Loss", "tokens", "nats", [Curve("a", [(1.0, 2.0), (2.0, 1.0)])]),
    Prose("diffulm eval m", "code"),
]


def test_three_files_of_one_report(tmp_path: Path) -> None:
    report = {"name": "\u00e4", "value": 1.5}
    shown = keep(report, "A title", BLOCKS, tmp_path / "new" / "folder")
    out = tmp_path / "new" / "folder"
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "report.md"]
    assert (out / "report.json").read_text("utf-8") == '{\n "name": "\u00e4",\n "value": 1.5\n}\n'
    html, text = (out / "report.html").read_text("utf-8"), (out / "report.md").read_text("utf-8")
    assert "<h1>A title</h1>" in html and "&lt;b&gt;" in html and text.startswith("# A title\n")
    (plot,) = (block for block in shown if isinstance(block, Plot))
    assert plot.svg.startswith("<svg") and plot.svg in html, "the plots come back drawn"


@pytest.mark.parametrize(("low", "high"), [(12.0, 26.0), (0.5, 18.0), (3.0, 9000.0)])
def test_a_logarithmic_axis_has_a_few_plain_numbers(low: float, high: float, tmp_path: Path) -> None:
    plot = Plot("Speed", "tokens/s", "nats", [Curve("a", [(low, 2.0), (high, 1.0)])], log_x=True)
    (drawn,) = keep({}, "t", [plot], tmp_path)
    assert isinstance(drawn, Plot)
    axis = drawn.svg[: drawn.svg.index("tokens/s")]
    numbers = [float(n) for n in re.findall(r"<text[^>]*>([\d.]+)</text>", axis)]
    assert 3 <= len(numbers) <= 14 and all(low / 2 <= n <= 2 * high for n in numbers), numbers
    assert "tspan" not in axis, "no powers"


def test_the_json_is_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a report.json a run is finished."""
    written: list[str] = []
    monkeypatch.setattr(page, "write_atomic", lambda path, data: written.append(path.name))
    keep({}, "t", BLOCKS, tmp_path)
    assert written == ["report.md", "report.html", "report.json"]


@pytest.mark.parametrize(("bad", "error"), [(math.nan, ValueError), (math.inf, ValueError), ({1}, TypeError)])
def test_what_is_no_json_is_refused_before_anything_is_written(bad: Any, error: type, tmp_path: Path) -> None:
    with pytest.raises(error):
        keep({"value": bad}, "t", BLOCKS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lone_surrogate_does_not_lose_the_report(tmp_path: Path) -> None:
    keep({"answer": "a\ud800"}, "t", [Prose("a\ud800")], tmp_path)
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == {"answer": "a\ud800"}
    assert "a\\ud800" in (tmp_path / "report.html").read_text("utf-8")
