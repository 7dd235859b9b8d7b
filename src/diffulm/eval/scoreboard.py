"""The report of `diffulm eval`: one dictionary as a terminal table, report.json, report.md and report.html."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table as Terminal
from rich.text import Text

from .page import Block, Curve, Plot, Prose, Table, keep

TASK_HEADER = (
    "Task",
    "Metric",
    "Documents",
    "Model",
    "Parent",
    "Model - parent",
    "p (McNemar)",
    "Undecided",
    "Published",
)
WRITTEN_HEADER = ("Task", "Metric", "Documents", "Shots", "Model", "Parent", "Model - parent", "p", "Published")
TEXT_HEADER = ("Text", "Documents", "Model, bits/byte", "Parent, bits/byte", "Model - parent", "Word perplexity")


def write(report: Mapping[str, Any], out: Path) -> None:
    """report.json, report.md and report.html in a folder, each whole or not at all."""
    keep(report, f"diffulm eval: {report['model']['name']}", blocks(report), out)


def summary(report: Mapping[str, Any]) -> list[Terminal]:
    """Tables for the terminal."""
    tables = []
    # A terminal is 80 columns wide: intervals, undecided documents and published numbers stand in the report.
    short = [(*row[:5], row[5].partition(" [")[0], row[6]) for row in task_rows(report)]
    brief = [(*row[:3], *row[4:6], row[6].partition(" [")[0], row[7])
             for row in written_rows(report) if row[1].replace(", ", "").count(",") == 0]  # fmt: skip
    written = (*WRITTEN_HEADER[:3], *WRITTEN_HEADER[4:8])
    for header, rows in ((TASK_HEADER[:7], short), (written, brief), (TEXT_HEADER, text_rows(report))):
        if rows:
            table = Terminal(*header, box=None, pad_edge=False)
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            tables.append(table)
    return tables


def percent(figure: Mapping[str, Any] | None) -> str:
    """An accuracy with its standard error, in per cent."""
    if figure is None:
        return "-"
    error = figure.get("stderr")
    return f"{100 * figure['value']:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def task_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row for each metric of each task."""
    rows: list[tuple[str, ...]] = []
    for task in report["tasks"]:
        for metric, figure in task["figures"].items():
            paired, given = figure.get("paired"), task["published"]
            if metric == "perplexity":
                sides = [f"{figure[side]['value']:.4g}" if side in figure else "-" for side in ("model", "parent")]
                rows.append((task["task"], "perplexity", f"{task['documents']:,}", *sides, "-", "-", "-", "-"))
                continue
            gap = "-" if paired is None else f"{100 * paired['difference']:+.1f} [{_interval(paired)}]"
            known = [f"{given[side]:.1f}" if given.get(side) is not None else "-" for side in ("model", "parent")]
            shown = metric == task["metric"] and known != ["-", "-"]
            rows.append(
                (
                    task["task"], metric, f"{task['documents']:,}", percent(figure["model"]),
                    percent(figure.get("parent")), gap, "-" if paired is None else f"{paired['p']:.2g}",
                    f"{task['undecided'] / task['documents']:.1%}", " / ".join(known) if shown else "-",
                )
            )  # fmt: skip
    return rows


def written_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row for each metric of each task in which the models write."""
    rows: list[tuple[str, ...]] = []
    for task in report.get("generation", []):
        for metric, figure in task["figures"].items():
            paired, given = figure.get("paired"), task["published"]
            known = [f"{given[side]:.1f}" if given.get(side) is not None else "-" for side in ("model", "parent")]
            shown = metric.partition(",")[0] == task["metric"] and metric.endswith((task["metric"], "oracle"))
            rows.append(
                (
                    task["task"], metric, f"{task['documents']:,}", str(task["shots"]), percent(figure.get("model")),
                    percent(figure.get("parent")),
                    "-" if paired is None else f"{100 * paired['difference']:+.1f} [{_interval(paired)}]",
                    "-" if paired is None else f"{paired['p']:.2g}",
                    " / ".join(known) if shown and known != ["-", "-"] else "-",
                )
            )  # fmt: skip
    return rows


def written_blocks(report: Mapping[str, Any]) -> list[Block]:
    """What was written: the table, how, and what it took."""
    s, tasks = report["settings"], report["generation"]
    how = s["writing"]
    said = [
        "In per cent (ROUGE: F-measure) ± one standard error over documents; a document with several texts counts "
        "once. Prompts and stop strings are the same for both models, and so is the most tokens a text may have; it "
        "ends at an end-of-text or start token. The diffusion model fills that many masks by the policy "
        f"{how['policy']}, {how['steps'] or 'as many steps as tokens'}{' steps' if how['steps'] else ''}; the parent "
        f"writes from left to right. Temperature {how['temperature']:g}, seed {s['seed']}"
        + (f", {how['samples']} texts a document" if how["samples"] > 1 else "")
        + (f", the first {s['limit']:,} documents of each task" if s["limit"] else "")
        + ". A name behind a comma is lm-eval's own filter, or how long a hole was: oracle, told the true number of "
        "tokens; auto, not told; fim, the parent's own infilling tokens.",
        "p: exact McNemar test, where documents have fractions a test of random sign flips; no correction for the "
        "number of tasks. Published: arXiv 2410.17891, model / parent, other prompts and lengths."
        if report["parent"]
        else "",
    ]
    said += [f"{t['task']}: {t['remark']}." for t in tasks if t["remark"]]
    if how["execute"]:
        said.append("Code was run under resource limits, which are no security boundary.")
    cost = [
        (
            t["task"], side, f"{found['texts']:,}", str(t["max_tokens"]), f"{found['tokens']:.1f}",
            f"{found['forwards']:.1f}", f"{found['cut']:,}", f"{found['seconds']:,}",
        )
        for t in tasks
        for side, found in t["cost"].items()
    ]  # fmt: skip
    header = ("Task", "By", "Texts", "Most tokens", "Tokens", "Forwards", "Prompts cut", "Seconds")
    return [
        Prose("Written texts", "heading"), Table(WRITTEN_HEADER, written_rows(report)),
        Prose(" ".join(filter(None, said))), Table(header, cost),
    ]  # fmt: skip


def _interval(paired: Mapping[str, Any]) -> str:
    return f"{100 * paired['low']:+.1f}, {100 * paired['high']:+.1f}"


def _bits(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    return f"{figure['bits_per_byte']:.4f}" + (f" ± {figure['stderr']:.4f}" if figure["stderr"] is not None else "")


def text_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row for each text."""
    rows: list[tuple[str, ...]] = []
    for text in report["texts"]:
        paired = text.get("paired")
        error = "" if paired is None or paired["stderr"] is None else f" ± {paired['stderr']:.4f}"
        gap = "-" if paired is None else f"{paired['difference']:+.4f}{error}"
        words = [f"{text[side]['word_perplexity']:.4g}" for side in ("model", "parent") if side in text]
        row = (text["text"], f"{text['documents']:,}", _bits(text["model"]), _bits(text.get("parent")), gap)
        rows.append((*row, " / ".join(words)))
    return rows


def blocks(report: Mapping[str, Any]) -> list[Block]:
    """The report as headings, sentences and tables."""
    settings, parent = report["settings"], report["parent"]
    beside = f" beside its parent {parent['name']}, through identical prompts" if parent else ""
    found: list[Block] = [Prose(f"{report['model']['name']}{beside}.")]
    if report["tasks"]:
        found += [Prose("Tasks", "heading"), Table(TASK_HEADER, task_rows(report)), Prose(_how(report))]
        remarks = [f"{t['task']}: {t['remark']}." for t in report["tasks"] if t["remark"] and settings["data"] != "Hub"]
        remarks += [
            f"{t['task']}: {t['truncated']:,} of {t['options']:,} options had their context cut at the front to "
            f"fit {settings['length'] - 1} tokens."
            for t in report["tasks"]
            if t["truncated"]
        ]
        found += [Prose(" ".join(remarks))] if remarks else []
        cost = [
            (
                t["task"], f"{t['options']:,}", f"{t['forwards']:,}", f"{t['forwards'] / t['options']:.1f}",
                f"{t['seconds']:,}",
            )
            for t in report["tasks"]
        ]  # fmt: skip
        found += [Prose("Cost", "heading"), Table(("Task", "Options", "Sequences", "Per option", "Seconds"), cost)]
        found += draws_plots(report)
    if report.get("generation"):
        found += written_blocks(report)
    if report["texts"]:
        found += [Prose("Texts", "heading"), Table(TEXT_HEADER, text_rows(report)), Prose(_windows(report))]
    more = {"Guidance of the model's likelihoods of options": settings["guidance"]} if "guidance" in settings else {}
    return found + run_blocks(report, more)


def run_blocks(report: Mapping[str, Any], more: Mapping[str, Any]) -> list[Block]:
    """How a report came about (`evaluate.provenance`), behind `more` facts."""
    facts = {**more, "Machine": report["machine"], "Precision": report["settings"]["dtype"], **report["versions"]}
    found: list[Block] = [Prose("Run", "heading"), Table(("", ""), [(str(a), str(b)) for a, b in facts.items()])]
    return [*found, Prose(report["command"], "code")] if report["command"] else found


def draws_plots(report: Mapping[str, Any]) -> list[Block]:
    """Accuracy against masks an option, four tasks to a plot, with one standard error over documents."""
    curves: list[Curve] = []
    for task in report["tasks"]:
        points = [*task["by_draws"], {"draws": report["settings"]["draws"], **task["figures"][task["metric"]]["model"]}]
        if len(points) > 2 and all(point["stderr"] is not None for point in points):
            values = [(float(point["draws"]), 100 * point["value"]) for point in points]
            errors = tuple(100 * point["stderr"] for point in points)
            curves.append(Curve(task["task"], values, "o-", len(curves) % 4, errors))
    said = "Estimates with fewer masks are parts of the same draws, several of them averaged for each document."
    plots: list[Block] = [
        Plot("Accuracy against masks an option", "masks", "per cent", curves[i : i + 4], log_x=True)
        for i in range(0, len(curves), 4)
    ]
    return [*plots, Prose(said)] if plots else []


def _how(report: Mapping[str, Any]) -> str:
    s = report["settings"]
    guidance = s.get("guidance")
    said = [
        f"Accuracy in per cent ± one standard error over documents, {s['fewshot']} shots, prompts of lm-eval"
        + (" in the chat template" if s["chat_template"] else "")
        + f"; documents from {'the Hub' if s['data'] == 'Hub' else 'local files'}"
        + (f", the first {s['limit']:,} of each task" if s["limit"] else "")
        + ". acc_norm divides the log-likelihood by characters.",
        (
            "Diffusion scores are bounds in the count form"
            if guidance is None
            else f"Diffusion scores are of the count form under guidance {guidance:g}, which bounds no likelihood"
        )
        + f", at most {s['draws']} masks an option, seed {s['seed']}"
        + (f", stopped where the order was clear at {s['confidence']:.0%}" if s["confidence"] else "")
        + "; undecided: documents whose two best options lie within two standard errors of the masks.",
    ]
    if report["parent"]:
        said.append(
            "Model - parent: paired over the same documents, with the 95 % interval of a bootstrap over documents; p: "
            "exact McNemar test, without correction for the number of tasks. The parent's likelihoods are exact."
        )
    if any(v is not None for t in report["tasks"] for v in t["published"].values()):
        said.append(
            "Published: arXiv 2410.17891, model / parent; other prompts, estimator and splits, so no test "
            "compares them."
        )
    return " ".join(said)


def _windows(report: Mapping[str, Any]) -> str:
    s = report["settings"]
    return (
        f"Each document is cut into windows of {s['length'] - 1} tokens behind a start token; nothing is seen across "
        f"windows or documents (no sliding). {s['window_draws']} masks a window; ± one standard error, clustered by "
        "document. The model's figures are upper bounds (NELBO), the parent's are exact. Word perplexity: per "
        "white-space word, each line end counted as one."
    )
