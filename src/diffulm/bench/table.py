"""The report of `diffulm bench generate`: one dictionary as terminal tables, JSON, Markdown, a page and plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table as Terminal
from rich.text import Text

from ..eval.page import Block, Curve, Plot, Prose, Table, keep
from ..runtime import write_atomic
from ..sampling.caches import BLOCK

HEADER = (
    "Mode", "Tokens/s", "First token, s", "Forwards", "Rows/forward", "Tokens/forward", "Peak, MB",
    "nats/token under the parent", "Unigram entropy", "Distinct-2",
)  # fmt: skip
SHORT = ("Mode", "tok/s", "first", "fwd", "rows/f", "tok/f", "MB", "NLL", "H1", "D2")
#: Look and colour of a curve by family; the first ones in order where a family has no place of its own.
LOOKS = {
    "AR parent": ("s", 1), "released samplers": ("X", 3), "steps = tokens": ("o", 0), "adaptive, cached": ("*", 0),
    "threshold": ("^-", 2), "factor": ("v-", 0), "entropy-bound": ("D-", 3),
}  # fmt: skip


def write(report: Mapping[str, Any], out: Path) -> None:
    """report.json, report.md, report.html and an SVG for each plot in a folder, each whole or not at all."""
    parts = keep(report, f"diffulm bench generate: {report['model']['name']}", list(blocks(report)), out)
    plots = [part for part in parts if isinstance(part, Plot)]
    for part, entry in zip(plots, (c for c in report["cells"] if pareto(c) is not None), strict=False):
        write_atomic(out / f"pareto-batch-{entry['batch']}-tokens-{entry['length']}.svg", part.svg + "\n")


def summary(report: Mapping[str, Any]) -> Iterator[Terminal | str]:
    """Tables for the terminal, and what stands around them."""
    for entry in report["cells"]:
        yield title(entry)
        table = Terminal(*SHORT, box=None, pad_edge=False)
        for row in cells(entry, short=True):
            table.add_row(*(Text(value) for value in row))
        yield table
        yield from left_out(entry)
    yield from captions(report)


def blocks(report: Mapping[str, Any]) -> Iterator[Block]:
    """The report as headings, sentences, tables and plots."""
    for entry in report["cells"]:
        yield Prose(title(entry), "heading")
        yield Table(HEADER, cells(entry))
        yield from map(Prose, left_out(entry))
        if (plot := pareto(entry)) is not None:
            yield plot
    yield Prose("How it was measured", "heading")
    yield from map(Prose, captions(report))
    facts = [
        ("Machine", report["machine"]), ("Device", report["device"]), ("Precision", report["settings"]["dtype"]),
        ("Date", report["date"]), *report["versions"].items(),
    ]  # fmt: skip
    yield Table(("", ""), [(str(a), str(b)) for a, b in facts])
    if report["command"]:
        yield Prose(report["command"], "code")


def title(entry: Mapping[str, Any]) -> str:
    return f"Batch {entry['batch']}, {entry['length']} new tokens"


def left_out(entry: Mapping[str, Any]) -> list[str]:
    """A sentence for each mode that could not run."""
    return [f"Left out: {one['mode']}: {one['reason']}." for one in entry["left_out"]]


def cells(entry: Mapping[str, Any], *, short: bool = False) -> list[tuple[str, ...]]:
    """A row of text for each mode; short: the spread as half the range, no intervals."""

    def quality(figure: Mapping[str, Any] | None, digits: int) -> str:
        if figure is None:
            return "-"
        half = "" if short or figure["half_width"] is None else f" ± {figure['half_width']:.{digits}f}"
        return f"{figure['value']:.{digits}f}{half}"

    rows: list[tuple[str, ...]] = []
    for row in entry["rows"]:
        speed, memory = row["tokens_per_second"], row["peak_memory_bytes"]
        spread = f" ±{(speed['high'] - speed['low']) / 2 / speed['median']:.0%}"
        spread = spread if short else f" ({speed['low']:.1f}..{speed['high']:.1f})"
        rows.append((
            row["mode"], f"{speed['median']:.1f}{spread}", f"{row['first_token_seconds']['median']:.3f}",
            f"{sum(row['forwards']) / len(row['forwards']):.0f}", f"{row['rows_per_forward']:.1f}",
            f"{row['tokens_per_forward']:.2f}", "-" if memory is None else f"{memory / 1e6:.0f}",
            quality(row["quality"]["nats_per_token_under_parent"], 2), quality(row["quality"]["unigram_entropy"], 2),
            quality(row["quality"]["distinct_2"], 2),
        ))  # fmt: skip
    return rows


def captions(report: Mapping[str, Any]) -> list[str]:
    """What the columns mean and how the runs were made."""
    s = report["settings"]
    stop = (
        "Every mode writes all tokens: end-of-text tokens end nothing, on any side (weak models would stop at once)."
        if s["to_length"]
        else "Every mode stops at the end of a text except the released samplers, which know no end; tokens behind it "
        "count nowhere. Settled stop: what is behind an end is given up while masks remain before it."
    )
    short = f" ({s['prompts_too_short']} shorter ones left out)" if s["prompts_too_short"] else ""
    greedy = s["temperature"] == 0
    how = "greedy" if greedy else f"temperature {s['temperature']:g}, top-p {s['top_p']:g}"
    said = [
        f"{stop} Prompts of {s['prompt_tokens']} tokens{short} from {s['prompts']}; tokens/s counts new tokens alone. "
        f"All sides in {s['dtype']}, {how} unless the mode says otherwise"
        f"{'' if greedy else ' (released B: no top-p)'}; diffusion modes take at most as many steps as tokens.",
        f"Speed: median (smallest..largest; in the terminal ± half of that range) of {s['repeats']} runs in turn, the "
        f"order reversed every time, after a warm-up of {s['warm_up_tokens']} tokens. First token: until the first new "
        "token of every text stands. Forwards: mean of a run. Rows/forward: of the whole batch, padding included. "
        "Tokens/forward: of each text. Peak memory: above what is in use before the run.",
        "AR: the parent by transformers' generate, by a bare loop with its cache, by generate with prompt look-up. "
        "Released: the samplers of arXiv 2410.17891, written anew from their structure, the mask token never drawn. "
        f"In blocks, prefix, dual: {BLOCK} tokens at a time, without a cache and with the approximate ones.",
        "Quality: negative log-likelihood of the new tokens under the AR parent given the prompt (nats/token under the "
        "parent: not of the model itself); entropy of a text's own token frequencies (nats) and its share of different "
        "token pairs, means over texts. ± is the half-width of the 95 % interval over prompts.",
    ]
    if report["parent_left_out"]:
        said.append(f"No parent: {report['parent_left_out']}.")
    said += [f"Length {n['length']} left out: {n['reason']}." for n in report["lengths_left_out"]]
    return said


def pareto(entry: Mapping[str, Any]) -> Plot | None:
    """Quality against speed, a curve for each family of modes; None without likelihoods."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for row in entry["rows"]:
        if (nats := row["quality"]["nats_per_token_under_parent"]) is not None:
            point = row["tokens_per_second"]["median"], nats["value"], nats["half_width"] or 0.0
            curves.setdefault(row["family"], []).append(point)
    if not curves:
        return None
    return Plot(
        title(entry),
        "new tokens/s",
        "nats/token under the parent",
        [
            Curve(name, [p[:2] for p in points], *LOOKS.get(name, ("P", 1)), errors=tuple(p[2] for p in points))
            for name, points in curves.items()
        ],
        log_x=True,
    )
