"""From likelihoods and metrics to the dictionary behind report.json."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from .. import __version__, runtime
from .likelihood import Estimate, Window, paired_gain


def build_report(
    recipe: Any,
    scores: dict[str, Estimate],
    windows: Sequence[Window],
    *,
    arms: dict[str, list[dict[str, Any]]],
    few: Sequence[Window],
    overlap: float,
    samples: dict[str, Any],
    dtype: str,
    command: str,
    total_seconds: float,
    peak_memory_bytes: int,
) -> dict[str, Any]:
    """The numbers of a run; the keys are part of the contract (docs/reference).

    `scores` by "parent", "parent_continued", "before", "after"; `arms`: the metrics of each training run; `overlap`:
    largest share of held-out 13-grams found in the training text of a source.
    """
    import torch

    adapted = arms["adapted"]
    gain, gain_stderr = paired_gain(scores["before"], scores["after"], windows)
    hidden = ("by_level", "grad_norm")
    report: dict[str, Any] = {
        "recipe": recipe.name,
        "layout": recipe.model.layout,
        "block_size": recipe.model.block_size,
        "ar_weight": recipe.noise.ar_weight,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "machine": runtime.describe_machine(),
        "tokens": adapted[-1]["tokens"] if adapted else 0,
        "seconds": adapted[-1]["seconds"] if adapted else 0.0,
        "total_seconds": round(total_seconds, 1),
        "peak_memory_bytes": peak_memory_bytes,
        "versions": {
            "diffulm": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        "command": command,
        "heldout": {
            "documents": len({w.document for w in windows}),
            "windows": len(windows),
            "tokens": sum(len(w.ids) for w in windows),
            "bytes": round(sum(w.bytes for w in windows)),
            "overlap_13gram": overlap,
        },
        "gain": {"nats_per_token": gain, "stderr": finite(gain_stderr)},
        "train": {arm: [{k: v for k, v in r.items() if k not in hidden} for r in rows] for arm, rows in arms.items()},
        "samples": samples,
        "projection": project(adapted, parent_level(scores["parent"], windows, few)),
    }
    for what, estimate in scores.items():
        report[what] = describe(estimate, what, recipe.model.parent)
    return report


def describe(estimate: Estimate, what: str, parent: str) -> dict[str, Any]:
    exact = what.startswith("parent")
    return {
        "name": parent if what == "parent" else what,
        "bits_per_byte": estimate.bits_per_byte,
        "stderr": finite(estimate.stderr),
        "nats_per_token": estimate.nats_per_token,
        "stderr_nats_per_token": finite(estimate.stderr_nats_per_token),
        "draws": estimate.draws,
        "seed": estimate.seed,
        "forwards": estimate.forwards,
        "kind": "exact" if exact else "NELBO",
        "by_level": [{"level": a, "nats_per_masked_token": b} for a, b, _ in estimate.by_level],
    }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def parent_level(parent: Estimate, windows: Sequence[Window], few: Sequence[Window]) -> float:
    """The parent's nats per token on the windows that the in-loop evaluation uses."""
    chosen = [i for i, w in enumerate(windows) if w in few]
    return sum(parent.per_window[i] for i in chosen) / max(1, sum(len(windows[i].ids) for i in chosen))


def project(rows: list[dict[str, Any]], parent: float) -> dict[str, Any]:
    """Where the held-out curve points: the excess over the parent, as a power law of tokens, fitted in logarithms.

    Two confounds are said aloud: the points are few, and the learning rate falls to its end with the budget, which
    flattens the last ones. No number is given beyond a thousand times the largest published budget.
    """
    points = [[r["tokens"], r["heldout"]] for r in rows if r.get("heldout") is not None]
    out: dict[str, Any] = {"parent_level_nats": parent, "points": points, "fit": None, "tokens_to_parent": None}
    late = [(t, y - parent) for t, y in points[len(points) // 3 :] if y > parent]
    out["statement"] = "Too few held-out points to say where the curve leads."
    if len(late) >= 3:
        x, y = np.log([t for t, _ in late]), np.log([e for _, e in late])
        slope, level = np.polyfit(x, y, 1)
        out["fit"] = {"a": parent, "b": float(np.exp(level)), "c": float(-slope)}
        out["statement"] = "The held-out curve did not fall over the last evaluations: it points nowhere yet."
        if slope < -0.01:
            log_tokens = (math.log(0.1) - level) / slope
            known = log_tokens < math.log(2.1e14)
            out["tokens_to_parent"] = math.exp(log_tokens) if known else None
            amount = f"about {math.exp(log_tokens):.1e} tokens" if known else "more tokens than any run has used"
            out["statement"] = (
                f"The excess over the parent falls as tokens^-{-slope:.2f}; drawn on, it would come within 0.1 nats "
                f"per token after {amount}. This is an extrapolation over many orders of magnitude from {len(late)} "
                "points of one run, the last ones flattened by its falling learning rate; the "
                "published adaptations used 6.5e10 to 2.1e11 tokens (arXiv 2410.17891)."
            )
    return out
