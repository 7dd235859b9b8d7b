"""Tables and plots of the claims study, from its result files into docs/concepts/claims.md (`claims.py report`).

The prose of that page is written by hand; what stands between `<!-- NAME -->` and `<!-- end NAME -->` is replaced.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from countdown import wilson
from diffulm.eval.likelihood import ratio_stderr
from diffulm.runtime import write_atomic

Result = dict[str, Any]
PAGE = Path(__file__).resolve().parents[1] / "docs" / "concepts" / "claims.md"
#: 97.5% points of Student's t with 1, 2, ... degrees of freedom.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
#: Training tokens of DiffuLLaMA and DiffuGPT-S (arXiv 2410.17891).
PUBLISHED = (6.5e10, 1.31e11)


def load(folder: Path) -> list[Result]:
    """All results of one study."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


# ---------------------------------------------------------------------------------------------------- comparisons


def gain(worse: Result, better: Result) -> tuple[float, float]:
    """Nats per token by which `better` lies below `worse`, same windows and masks; its standard error by document."""
    assert worse["window_tokens"] == better["window_tokens"] and worse["documents"] == better["documents"]
    tokens = np.array(worse["window_tokens"], dtype=float)
    nats = np.array(worse["estimate"]["per_window"]) - np.array(better["estimate"]["per_window"])
    return float(nats.sum() / tokens.sum()), ratio_stderr(nats, tokens, np.array(worse["documents"]))


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error); nan for a single value."""
    a = np.array(values)
    return float(a.mean()), float(a.std(ddof=1) / math.sqrt(len(a))) if len(a) > 1 else math.nan


def significant(values: Sequence[float]) -> str:
    """Whether the mean of paired differences differs from 0 at 5% (Student's t)."""
    mean, error = over_seeds(values)
    if math.isnan(error):
        return "one seed"
    return "yes" if abs(mean) > T975[len(values) - 2] * error else "no"


def comparison(results: list[Result], budget: int) -> str:
    """A table of arms: the bound over seeds, and the difference to the full recipe seed by seed."""
    arms: dict[str, dict[int, Result]] = defaultdict(dict)
    for result in results:
        if result["budget"] == budget:
            arms[result["arm"]][result["seed"]] = result
    full = arms["full"]
    lines = [
        "| arm | seeds | nats/token | bits/byte | worse than the full recipe by, nats/token | differs at 5% |",
        "|---|---|---|---|---|---|",
    ]
    for arm, runs in sorted(arms.items(), key=lambda item: over_seeds(nats(item[1].values()))[0]):
        mean, error = over_seeds(nats(runs.values()))
        single = next(iter(runs.values()))
        shown = f"{mean:.3f} +- {error if len(runs) > 1 else single['estimate']['stderr_nats_per_token']:.3f}"
        bits = over_seeds([r["estimate"]["bits_per_byte"] for r in runs.values()])[0]
        paired = [gain(runs[s], full[s]) for s in sorted(runs.keys() & full.keys())]
        differences = [d for d, _ in paired]
        cell, verdict = "", ""
        if arm != "full" and paired:
            spread = over_seeds(differences)[1] if len(paired) > 1 else paired[0][1]
            cell = f"{over_seeds(differences)[0]:+.3f} +- {spread:.3f}"
            verdict = significant(differences) if len(paired) > 1 else f"{abs(differences[0]) / spread:.1f} s.e."
        kind = " (exact)" if arm == "ar-continued" else ""
        lines.append(f"| {arm}{kind} | {len(runs)} | {shown} | {bits:.3f} | {cell} | {verdict} |")
    return "\n".join(lines)


def curves(results: list[Result], budget: int) -> str:
    """Held-out nats per token after so many tokens, mean over seeds, an arm a column."""
    arms: dict[str, list[Result]] = defaultdict(list)
    for r in results:
        if r["budget"] == budget and r["arm"] != "parent":
            arms[r["arm"]].append(r)
    names = sorted(arms, key=lambda a: over_seeds(nats(arms[a]))[0])
    lines = ["| tokens | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for k, (tokens, _) in enumerate(arms[names[0]][0]["curve"]):
        cells = [f"{np.mean([r['curve'][k][1] for r in arms[a]]):.3f}" for a in names]
        lines.append(f"| {tokens:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def nats(results: Any) -> list[float]:
    return [r["estimate"]["nats_per_token"] for r in results]


def budgets(results: list[Result]) -> list[int]:
    return sorted({r["budget"] for r in results if r["arm"] != "parent"})


# -------------------------------------------------------------------------------------------------- extrapolation


def fit_power(points: Sequence[tuple[float, float]], reached: float = math.inf) -> dict[str, Any] | None:
    """y = floor + b * tokens^-c, and what every acceptable floor would say at the published budgets.

    The floor is profiled on a grid below the lowest value `reached` in the run; for each, b and c by least squares of
    the logarithms. Acceptable: a sum of squares
    within the 95% likelihood-ratio region (chi-square with 1 degree of freedom, errors taken as independent). None
    with fewer than five points.
    """
    if len(points) < 5:
        return None
    x, y = np.log([p[0] for p in points]), np.array([p[1] for p in points])
    tried = []
    for floor in np.linspace(0.0, min(y.min(), reached) - 1e-3, 400):
        slope, level = np.polyfit(x, np.log(y - floor), 1)
        misfit = float(((floor + np.exp(level + slope * x) - y) ** 2).sum())
        tried.append((misfit, float(floor), float(np.exp(level)), float(-slope)))
    best = min(tried)
    kept = [t for t in tried if len(y) * math.log(t[0] / best[0]) < 3.841]
    found: dict[str, Any] = {"points": len(points), "floor": best[1], "b": best[2], "c": best[3]}
    found["floors"] = [min(t[1] for t in kept), max(t[1] for t in kept)]
    for tokens in PUBLISHED:
        at = [t[1] + t[2] * tokens ** -t[3] for t in kept]
        found[f"at {tokens:.3g}"] = [min(at), max(at)]
    return found


def plateau(result: Result) -> list[tuple[float, float]]:
    """The held-out points of the middle: the first three tenths hold warm-up, annealing and the first steep fall; in
    the last fifth (wsd) the rate falls."""
    train = result["recipe"]["train"]
    first = max(train["warmup"], train["annealing"], 0.3) * result["budget"]
    last = (0.8 if train["decay"] == "wsd" else 1.0) * result["budget"]
    return [(t, y) for t, y in result["curve"] if first < t <= last]


def extrapolations(results: list[Result]) -> str:
    lines = [
        "| arm | tokens | points | fit: floor + b N^-c | c | the floor may lie in | at 6.5e10 tokens | at 1.31e11 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        # From scratch such budgets end on the plateau of token frequencies: a power law through it would be certain and
        # wrong.
        found = None if r["arm"] == "scratch" else fit_power(plateau(r), min(y for _, y in r["curve"]))
        if found is None:
            continue
        low, high = found["floors"]
        at = [f"{a:.2f} to {b:.2f}" for a, b in (found[f"at {n:.3g}"] for n in PUBLISHED)]
        lines.append(
            f"| {r['arm']} | {r['budget']:,} | {found['points']} | {found['floor']:.2f} + {found['b']:.3g} N^-c | "
            f"{found['c']:.3f} | {low:.2f} to {high:.2f} | {at[0]} | {at[1]} |"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ countdown


def countdown_table(results: list[Result]) -> str:
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for r in results:
        groups[(r["numbers"], r["largest"], r["train"]["steps"], r["arm"])].append(r)
    lines = [
        "| puzzles | arm | seeds | accuracy | 95% interval | nats per answer token |",
        "|---|---|---|---|---|---|",
    ]
    order = sorted(groups.items(), key=lambda g: (g[0][:3], -np.mean([r["accuracy"] for r in g[1]])))
    for (numbers, largest, steps, arm), runs in order:
        mean, error = over_seeds([r["accuracy"] for r in runs])
        low, high = wilson(sum(r["hits"] for r in runs), sum(r["test"] for r in runs))
        if len(runs) > 2:  # the wider of what puzzles and what seeds leave open
            half = T975[len(runs) - 2] * error
            low, high = max(0.0, min(low, mean - half)), min(1.0, max(high, mean + half))
        loss = over_seeds([r["nats_per_token"] for r in runs])[0]
        size = f"{numbers} numbers to {largest}, {steps * runs[0]['train']['batch']:,} seen"
        lines.append(
            f"| {size} | {arm} | {len(runs)} | {100 * mean:.1f}% | {100 * low:.1f} to {100 * high:.1f}% | {loss:.4f} |"
        )
    return "\n".join(lines)


def countdown_samples(results: list[Result]) -> str:
    lines = ["| arm (seed 0) | puzzle | answer | right |", "|---|---|---|---|"]
    for r in results:
        if r["seed"] == 0:
            for given, said, ok in r["samples"][:3]:
                lines.append(f"| {r['arm']} | `{given}` | `{said or ' '}` | {'yes' if ok else 'no'} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- page


def plot(results: list[Result], title: str, path: Path) -> None:
    """Held-out bound against tokens, a line per arm (mean over seeds), the spread over seeds shaded."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    curves: dict[str, list[list[list[float]]]] = defaultdict(list)
    for r in results:
        if r["arm"] != "parent":
            curves[r["arm"]].append(r["curve"])
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        axes = figure.subplots()
        for arm, runs in sorted(curves.items()):
            runs = [run for run in runs if len(run) == len(runs[0])]
            x = [point[0] for point in runs[0]]
            y = np.array([[point[1] for point in run] for run in runs])
            (line,) = axes.plot(x, y.mean(0), "-o", markersize=3, label=f"{arm} ({len(runs)})")
            if len(runs) > 1:
                axes.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.15)
        axes.set(title=title, xlabel="tokens", ylabel="held-out nats per token")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, fontsize="small")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def fill(page: str, name: str, text: str) -> str:
    """`page` with what stands between the marks of `name` replaced. ValueError without the marks."""
    start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    if start not in page or end not in page:
        raise ValueError(f"the page has no marks {start} and {end}; put them where the table belongs")
    head, rest = page.split(start, 1)
    return f"{head}{start}\n{text}\n{end}{rest.split(end, 1)[1]}"


def write(results: Path) -> None:
    """Replace all tables of the page and draw the plots."""
    page = PAGE.read_text(encoding="utf-8")
    for name in ("tiny", "smollm2"):
        found = load(results / name)
        tables = "\n\n".join(
            f"Budget {b:,} tokens an arm.\n\n{comparison(found, b)}\n\nIn-loop evaluation (fewer windows, the same for "
            f"all arms):\n\n{curves(found, b)}"
            for b in budgets(found)
        )
        page = fill(page, name, tables)
        if found:
            plot(found, f"{name}: held-out bound against tokens", PAGE.with_name(f"claims-{name}.svg"))
    page = fill(page, "curve", extrapolations(load(results / "smollm2")))
    puzzles = load(results / "countdown")
    page = fill(page, "countdown", countdown_table(puzzles))
    page = fill(page, "samples", countdown_samples(puzzles))
    write_atomic(PAGE, page)
