"""How a report is kept: a list of blocks as Markdown and as one self-contained HTML page, plots as inline SVG."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..render import visible
from ..runtime import write_atomic

NO_PLOTS = "There are no plots, because matplotlib is not installed: pip install 'diffulm[plot]'"


@dataclass(frozen=True)
class Prose:
    text: str
    kind: str = "paragraph"  # or "heading", "code"


@dataclass(frozen=True)
class Table:
    header: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    samples: bool = False  # cells are text of a model: spaces and line breaks count


@dataclass(frozen=True)
class Curve:
    name: str
    points: list[tuple[float, float]]
    look: str = "-"  # a matplotlib format string: lines and markers
    colour: int = 0  # index into COLOURS
    errors: tuple[float, ...] = ()  # half-widths of the points' intervals, along y


@dataclass(frozen=True)
class Plot:
    title: str
    x: str
    y: str
    curves: list[Curve]
    from_zero: bool = False  # the y axis
    log_x: bool = False
    svg: str = ""  # filled in by `_drawn`


Block = Prose | Table | Plot


COLOURS = ("#3b82f6", "#f97316", "#16a34a", "#c026d3")  # legible on white and on black
INK = "#010203"  # stands for the page's own text colour until the SVG is written


def keep(report: Mapping[str, Any], title: str, blocks: Sequence[Block], out: Path) -> list[Block]:
    """Write report.md, report.html and, last, report.json into the folder `out` (made if absent), each whole or not at
    all: where there is a report.json, there is all of it. Returns the blocks with their plots drawn.

    Raises ValueError (a number that is not finite) and TypeError (a value that JSON does not have) before anything is
    written; OSError if a file cannot be.
    """
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    shown = drawn(blocks)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("md", markdown(title, shown)), ("html", page(title, shown)), ("json", text)):
        # A lone surrogate in a sample must not lose the report; what it becomes is its escape, in JSON too.
        write_atomic(out / f"report.{name}", content.encode("utf-8", "backslashreplace"))
    return shown


def drawn(blocks: Sequence[Block]) -> list[Block]:
    """The blocks with every plot drawn, or one remark in place of all plots where matplotlib is absent."""
    svgs = _svgs([block for block in blocks if isinstance(block, Plot)])
    if svgs is not None:
        left = iter(svgs)
        return [replace(block, svg=next(left)) if isinstance(block, Plot) else block for block in blocks]
    first = next((i for i, block in enumerate(blocks) if isinstance(block, Plot)), None)
    kept = [Prose(NO_PLOTS) if i == first else block for i, block in enumerate(blocks)]
    return [block for block in kept if not isinstance(block, Plot)]


def _svgs(plots: Sequence[Plot]) -> list[str] | None:
    """One <svg> element for each plot, in the colour of the text around it; None without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
    except ImportError:
        return None
    inks = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    svgs = []
    for plot in plots:
        # the salt keeps the ids of two plots on one page apart, and the bytes the same from run to run
        style: dict[Any, Any] = {
            "svg.fonttype": "none",
            "svg.hashsalt": plot.title,
            "font.size": 10,
            "text.usetex": False,
        }
        style.update(dict.fromkeys(inks, INK))
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(5.2, 3.1), layout="constrained")
            axes = figure.subplots()
            for curve in plot.curves:
                lone = len(curve.points) == 1 and not curve.errors  # a line through one point is not seen
                look = "o" if lone else curve.look
                alpha, colour = 0.35 if look == "." else 1.0, COLOURS[curve.colour]
                x, y = zip(*curve.points, strict=True)
                axes.plot(x, y, look, color=colour, alpha=alpha, label=curve.name or None)
                if curve.errors:
                    axes.errorbar(x, y, yerr=curve.errors, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.6)
            axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
            if plot.log_x:
                axes.set_xscale("log")
                low, high = axes.get_xlim()
                # Within one decade a logarithmic locator would number every step of it, one over the other.
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(6))
                axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes.xaxis.set_minor_formatter(NullFormatter())
            else:
                axes.xaxis.set_major_locator(MaxNLocator(6))
            if plot.x == "tokens":
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            if plot.from_zero:
                axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.2)
            if sum(bool(curve.name) for curve in plot.curves) > 1:
                axes.legend(frameon=False, fontsize="small")
            stream = io.StringIO()
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        svg = re.sub(r"<metadata>.*?</metadata>\s*", "", stream.getvalue(), flags=re.DOTALL)
        svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])  # figure_1, axes_1, ... are the same in each
        svgs.append(svg.replace(INK, "currentColor").replace("<svg", '<svg role="img"', 1).strip())
    return svgs


def markdown(title: str, blocks: Sequence[Block]) -> str:
    parts = [f"# {_escaped(title)}"]
    for block in blocks:
        if isinstance(block, Table):
            rows = [block.header, ("---",) * len(block.header)]
            lines = [*map(_row, rows[:1]), "|" + "|".join(rows[1]) + "|", *map(_row, block.rows)]
            parts.append("\n".join(lines))
        elif isinstance(block, Plot):
            parts.append(f"*Plot in report.html: {_escaped(block.title)}*")
        elif block.kind == "code":
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
            parts.append(f"{fence}\n{visible(block.text, newline=chr(10))}\n{fence}")
        else:
            parts.append(("## " if block.kind == "heading" else "") + _escaped(block.text))
    return "\n\n".join(parts) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cell, newline="<br>") for cell in cells) + " |"


def _escaped(text: str, *, newline: str = " ") -> str:
    """Text that Markdown, tables and HTML inside it show as it is."""
    safe = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(visible(text, newline="\n"), quote=False))
    return safe.replace("\n", newline)


def page(title: str, blocks: Sequence[Block]) -> str:
    parts = [f"<h1>{_text(title)}</h1>"]
    for block in blocks:
        if isinstance(block, Table):
            head = "".join(f"<th>{_text(cell)}</th>" for cell in block.header)
            rows = []
            for row in block.rows:
                pairs = zip(block.header, row, strict=True)
                rows.append("".join(f'<td data-label="{_text(name)}">{_text(cell)}</td>' for name, cell in pairs))
            body = "".join(f"<tr>{row}</tr>" for row in rows)
            top = f"<thead><tr>{head}</tr></thead>" if any(block.header) else ""
            kind = "samples" if block.samples else "figures"
            parts.append(f'<div class="{kind}"><table>{top}<tbody>{body}</tbody></table></div>')
        elif isinstance(block, Plot):
            parts.append(f"<figure>{block.svg}</figure>")
        else:
            tag = {"paragraph": "p", "heading": "h2", "code": "pre"}[block.kind]
            parts.append(f"<{tag}>{_text(block.text)}</{tag}>")
    return PAGE.format(title=_text(title), style=STYLE, body="\n".join(parts))


def _text(text: str) -> str:
    return html.escape(visible(text, newline="\n"))


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
h1 + p { font-size: 1.1rem; border-left: 4px solid #3b82f6; padding-left: 1rem; }
.figures { overflow-x: auto; } table { border-collapse: collapse; } .samples table { width: 100%; table-layout: fixed; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); }
.figures td { font-variant-numeric: tabular-nums; } .figures thead + tbody td + td { white-space: nowrap; }
.samples td { white-space: pre-wrap; overflow-wrap: anywhere; }
figure { display: inline-block; margin: 1rem 1rem 0 0; width: 28rem; max-width: 100%; }
svg { width: 100%; height: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem; border: 1px solid var(--line); }
@media (max-width: 44rem) {
  .samples thead { display: none; } .samples td { display: block; border: 0; }
  .samples td::before { content: attr(data-label); display: block; font-size: .8rem; opacity: .7; }
  .samples tr { display: block; border-bottom: 1px solid var(--line); padding: .6rem 0; }
}
"""
