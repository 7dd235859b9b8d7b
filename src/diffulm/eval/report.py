"""The report of `diffulm adapt`: one dictionary of numbers, written as report.json, report.md and report.html.

One list of blocks is built from the dictionary and drawn twice, so that the two texts cannot disagree. Losses are in
nats per token and bits per byte. A NELBO is always called an upper bound, never a likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table as Terminal
from rich.text import Text

from ..render import duration
from .page import Block, Curve, Plot, Prose, Table, keep

WELL_ABOVE = 1.2  # bits per byte of the diffusion model over its parent's: beyond it the text is plainly not fluent
MODELS = (
    ("parent", "Parent"),
    ("parent_continued", "Parent trained on, same text and budget (control)"),
    ("before", "Diffusion, before training"),
    ("after", "Diffusion, after training"),
)
DIFFUSION = ("before", "after")


def write_report(report: dict[str, Any], out: Path) -> None:
    """Write report.md, report.html and, last, report.json into the folder `out` (made if absent), each atomically.

    Raises ValueError, before anything is written, for a number that is not finite and where parent, before or after has
    no bits_per_byte; TypeError for a value that JSON does not have; OSError if a file cannot be written.
    """
    lacking = [k for k in ("parent", *DIFFUSION) if (report.get(k) or {}).get("bits_per_byte") is None]
    if lacking:
        raise ValueError(
            f"the report lacks bits_per_byte of {', '.join(lacking)}: it compares parent, before and after"
        )
    _require_finite(report, "report")
    keep(report, f"diffulm adapt: {report['parent'].get('name', 'report')}", list(_blocks(report)), out)


def summary(report: dict[str, Any]) -> Terminal:
    """The figures that matter as a short table for the terminal."""
    caption = Text(f"{_gain(report)} NELBO = upper bound.".strip())
    table = Terminal("model", "bits/byte", "nats/token", "kind", title="Held-out text", caption=caption)
    for name, bits, nats, kind in _scores(report):
        table.add_row(*map(Text, (name, bits, nats, kind)))
    return table


def _require_finite(value: Any, place: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {value}; every number of a report must be finite (null where there is none)")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _require_finite(inner, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _require_finite(inner, f"{place}[{i}]")


# ---- what the report says ----


def _blocks(report: Mapping[str, Any]) -> Iterator[Block]:
    """The report in the order in which a person asks."""
    yield Prose(_verdict(report))
    yield Prose("Held-out loss", "heading")
    yield Table(("Model", "Bits per byte", "Nats per token", "Kind"), _scores(report))
    yield Prose(_held_out(report))
    samples = report.get("samples") or {}
    if samples.get("completions"):
        yield Prose("Completions", "heading")
        rows = [_texts(row, "prompt", "parent", "after") for row in samples["completions"]]
        yield Table(("Prompt", "Parent", "Diffusion, after training"), rows, samples=True)
    if samples.get("infills"):
        yield Prose("Infilling", "heading")
        rows = [
            (f"{row.get('prefix', '')}[…]{row.get('suffix', '')}", *_texts(row, "truth", "before", "after"))
            for row in samples["infills"]
        ]
        yield Table(("Text with a hole […]", "Truth", "Before training", "After training"), rows, samples=True)
    if samples.get("settings"):
        yield Prose(f"Sampling: {samples['settings']}")
    yield Prose("Training", "heading")
    yield from _training(report)
    yield from _projection(report)
    yield Prose("What it took", "heading")
    yield Table(("", ""), _facts(report))
    if report.get("command"):
        yield Prose(str(report["command"]), "code")


def _texts(row: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    return tuple(str(row.get(key) or "(empty)") for key in keys)


def _number(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _scores(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    for key, name in MODELS:
        score = report.get(key)
        if score:
            bits = _number(score.get("bits_per_byte"), score.get("stderr"))
            nats = _number(score.get("nats_per_token"), score.get("stderr_nats_per_token"))
            kind = str(score.get("kind", "NELBO" if key in DIFFUSION else "exact"))
            rows.append((name, bits, nats, "NELBO, an upper bound" if kind == "NELBO" else kind))
    return rows


def _gain(report: Mapping[str, Any]) -> str:
    """One sentence on the paired difference before - after, with its standard error; empty where there is none."""
    gain = report.get("gain") or {}
    nats, error = gain.get("nats_per_token"), gain.get("stderr")
    if nats is None:
        return ""
    size = f"{_number(abs(nats), error)} nats per token, paired on the same masks"
    if error is not None and abs(nats) <= 2 * error:
        return f"Training made no measurable difference ({_number(nats, error)} nats per token, positive is better)."
    return f"Training {'lowered' if nats > 0 else 'RAISED'} the diffusion loss by {size}."


def _verdict(report: Mapping[str, Any]) -> str:
    """The outcome in plain words, from the numbers alone."""
    parent, before, after = report["parent"], report["before"], report["after"]
    control, seconds = report.get("parent_continued") or {}, report.get("seconds")
    spent = "This training" if seconds is None else f"{_spoken(seconds)} of training"
    tokens = f" on {report['tokens']:,} tokens" if report.get("tokens") is not None else ""
    said = [
        f"{parent.get('name', 'The parent')} became a masked diffusion model. {spent}{tokens} followed.",
        _gain(report),
    ]
    start, end, exact = (score["bits_per_byte"] for score in (before, after, parent))
    said.append(f"Held-out text now costs it at most {end:.3f} bits per byte; it was {start:.3f} before training.")
    gap = end - exact
    said.append(
        f"The parent needs {exact:.3f}. The diffusion figure is a NELBO, an upper bound and not an exact likelihood, "
        "while the parent's is exact, so the comparison is conservative: "
        + (
            f"the true gap is at most about {gap:.3f} bits per byte."
            if gap > 0
            else f"the diffusion model is ahead by at least about {-gap:.3f} bits per byte."
        )
    )
    if start > exact and end < start and gap > 0:
        said.append(f"Training has covered {(start - end) / (start - exact):.0%} of the way down to the parent.")
    if control.get("bits_per_byte") is not None:
        said.append(
            f"The parent itself, trained on the same text for the same budget, went from {exact:.3f} to "
            f"{control['bits_per_byte']:.3f}: that is what the text alone does, without diffusion."
        )
    if end > WELL_ABOVE * exact:
        where = f" ({report['machine']})" if report.get("machine") else ""
        how = "" if report.get("layout") == "block" else " under full attention"
        said.append(f"{spent}{where} is far from enough for fluent text{how}: expect broken sentences.")
    return " ".join(filter(None, said))


def _spoken(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _held_out(report: Mapping[str, Any]) -> str:
    held, after = report.get("heldout") or {}, report["after"]
    counts = [
        f"{held[key]:,} {key}" for key in ("documents", "windows", "tokens", "bytes") if held.get(key) is not None
    ]
    said = [f"Held out: {', '.join(counts)}."] if counts else []
    if held.get("overlap_13gram") is not None:
        said.append(f"{held['overlap_13gram']:.1%} of its 13-grams occur in the training text.")
    if after.get("draws") is not None:
        of = [f"{after['draws']:,} mask draws per window"]
        of += [f"{after['forwards']:,} forward passes"] if after.get("forwards") is not None else []
        of += [f"seed {after['seed']}"] if after.get("seed") is not None else []
        said.append(f"NELBO from {', '.join(of)}.")
    if report.get("block_size"):
        size = report["block_size"]
        said.append(f"It is the sum of the bounds of blocks of {size} tokens, each given the clean text before it.")
    return " ".join([*said, "± is one standard error. Lower is better."])


def _training(report: Mapping[str, Any]) -> Iterator[Block]:
    train = report.get("train") or {}
    arms = [(name, train.get(key) or []) for key, name in (("adapted", "Diffusion"), ("continued", "Parent (control)"))]
    rows = []
    for name, steps in arms:
        losses, speeds = ([y for _, y in _points(steps, None, key)] for key in ("loss", "tokens_per_second"))
        if losses:
            count, tokens = (f"{steps[-1][k]:,}" if steps[-1].get(k) is not None else "-" for k in ("step", "tokens"))
            tenth = max(1, len(losses) // 10)
            first, last = (_number(sum(part) / tenth) for part in (losses[:tenth], losses[-tenth:]))
            speed = f"{sorted(speeds)[len(speeds) // 2]:,.0f}" if speeds else "-"
            for key, form in (("tflops", "{:.3g} TFLOP/s"), ("mfu", "MFU {:.0%}")):
                if values := sorted(y for _, y in _points(steps, None, key)):
                    speed += f", {form.format(values[len(values) // 2])}"
            rows.append((name, count, tokens, first, last, speed))
    if rows:
        yield Table(("Arm", "Steps", "Tokens", "Loss, first tenth", "Loss, last tenth", "Tokens/s, median"), rows)
        share = report.get("ar_weight")
        more = f" plus {share:g} times the next-token loss of the clean copy" if share else ""
        yield Prose(f"Losses in nats per token; the diffusion loss is a noisy bound{more}, the parent's is exact.")
    yield from _plots(report, arms)
    old, new = (dict(_points(report[key].get("by_level"), "level", "nats_per_masked_token")) for key in DIFFUSION)
    if old or new:
        levels = [(f"{level:g}", _number(old.get(level)), _number(new.get(level))) for level in sorted({*old, *new})]
        yield Table(("Share of tokens masked", "Before, nats per masked token", "After"), levels)


def _points(rows: Sequence[Mapping[str, Any]] | None, x: str | None, y: str) -> list[tuple[float, float]]:
    """(row[x], row[y]) of the rows that have both; the row's number where x is None."""
    pairs = [(i if x is None else row.get(x), row.get(y)) for i, row in enumerate(rows or [])]
    return [(a, b) for a, b in pairs if isinstance(a, int | float) and isinstance(b, int | float)]


def _plots(report: Mapping[str, Any], arms: list[tuple[str, Sequence[Mapping[str, Any]]]]) -> Iterator[Plot]:
    """The plots that have something to show."""
    loss = []
    for i, (name, steps) in enumerate(arms):
        points = _points(steps, "tokens", "loss")
        span = max(1, len(points) // 10)  # the loss of a step is noisy: a mean over a tenth of the run
        near = [points[max(0, k - span + 1) : k + 1] for k in range(len(points))]
        mean = [(points[k][0], sum(y for _, y in part) / len(part)) for k, part in enumerate(near)]
        loss += [Curve("", points, ".", i), Curve(name, mean, "-", i)]
        loss.append(Curve(f"{name}, held out", _points(steps, "tokens", "heldout"), "D--", 2 + i))
    level = [
        Curve(f"{key} training", _points(report[key].get("by_level"), "level", "nats_per_masked_token"), "o-", i)
        for i, key in enumerate(DIFFUSION)
    ]
    speed = [
        Curve(name, _points(steps, "seconds", "tokens_per_second"), "-", i) for i, (name, steps) in enumerate(arms)
    ]
    ratio = [Curve("Diffusion", _points(arms[0][1], "tokens", "annealing"))]
    for plot in (
        Plot("Training loss", "tokens", "nats per token", loss),
        Plot("Loss by noise level", "share of tokens masked", "nats per masked token", level),
        Plot("Annealing of the attention", "tokens", "share of later tokens in sight", ratio),
        Plot("Throughput", "seconds of training", "tokens per second", speed, from_zero=True),
    ):
        curves = [curve for curve in plot.curves if curve.points]
        if curves:
            yield replace(plot, curves=curves)


def _projection(report: Mapping[str, Any]) -> Iterator[Block]:
    """What budget the curve points to; nothing where the run was too short for any statement."""
    found = report.get("projection") or {}
    said, target = [str(found.get("statement") or "")], found.get("tokens_to_parent")
    if target is not None:
        said.append(f"Tokens to reach the parent, extrapolated: {target:.2g}.")
        if report.get("tokens") and report.get("seconds"):
            said.append(f"At this run's speed that takes {duration(target * report['seconds'] / report['tokens'])}.")
    if found.get("fit"):
        said.append(f"Fitted constants: {', '.join(f'{name} = {value:.4g}' for name, value in found['fit'].items())}.")
    points = [(float(x), float(y)) for x, y in found.get("points") or []]
    if not points and not any(said):
        return
    yield Prose("Budget", "heading")
    if any(said):
        yield Prose(" ".join(filter(None, said)))
    if points:
        curves, parent = [Curve("diffusion, held out", points, "o-")], found.get("parent_level_nats")
        if parent is not None:
            curves.append(Curve("parent, exact", [(points[0][0], parent), (points[-1][0], parent)], "--", 1))
        yield Plot("Held-out loss against tokens", "tokens", "nats per token", curves)


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Time, memory, machine and versions, as far as they are known."""
    facts: dict[str, tuple[str, Callable[[Any], str]]] = {
        "Training time of each arm": ("seconds", duration),
        "Whole job": ("total_seconds", duration),
        "Tokens trained on": ("tokens", "{:,}".format),
        "Peak memory": ("peak_memory_bytes", lambda count: f"{count / 1e9:.2f} GB"),
        "Machine": ("machine", str),
        "Threads": ("threads", str),
        "Precision": ("dtype", str),
        "Recipe": ("recipe", str),
    }
    known = [(name, form(report[key])) for name, (key, form) in facts.items() if report.get(key) is not None]
    return known + [(str(name), str(version)) for name, version in (report.get("versions") or {}).items()]
