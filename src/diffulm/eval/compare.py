"""Two models on the same documents: is one better, or is it chance? And what others have published."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..runtime import generator
from .likelihood import Estimate, ratio_stderr
from .masks import Score

RESAMPLES = 10_000

#: In per cent, arXiv 2410.17891, by the last part of a model's name: tables 1 (LAMBADA: the corrected column; stories:
#: ROUGE-L at the true length) and 2 (the tasks in context, few-shot and with reasoning).
#: Other prompts and another estimator than ours (docs/concepts/paper.md): beside ours, never compared by a test.
PUBLISHED = {
    "diffugpt-s": {
        "lambada_standard": 21.6, "hellaswag": 33.4, "winogrande": 50.8, "siqa": 37.0, "piqa": 57.7, "triviaqa": 2.0,
        "rocstories": 12.6, "humaneval_infilling": 0.3,
    },
    "diffugpt-m": {
        "lambada_standard": 30.3, "hellaswag": 37.2, "winogrande": 52.6, "siqa": 39.0, "piqa": 59.6, "triviaqa": 3.8,
        "rocstories": 17.0, "humaneval_infilling": 2.9,
    },
    "diffullama": {
        "lambada_standard": 53.9, "hellaswag": 58.7, "winogrande": 56.4, "siqa": 43.2, "piqa": 63.3, "triviaqa": 20.9,
        "rocstories": 21.2, "humaneval_infilling": 15.5, "mawps": 31.3, "mawps_cot": 28.7, "sat_math": 23.6,
        "sat_math_cot": 9.5,
    },
    "gpt2": {
        "lambada_standard": 25.9, "hellaswag": 29.9, "winogrande": 48.5, "siqa": 35.7, "piqa": 62.1, "triviaqa": 4.0,
        "rocstories": 7.4, "humaneval_infilling": 1.6,
    },
    "gpt2-medium": {
        "lambada_standard": 37.7, "hellaswag": 38.3, "winogrande": 50.7, "siqa": 37.7, "piqa": 67.4, "triviaqa": 6.7,
        "rocstories": 8.2, "humaneval_infilling": 2.6,
    },
    "llama-2-7b-hf": {
        "lambada_standard": 68.8, "hellaswag": 74.9, "winogrande": 67.1, "siqa": 44.8, "piqa": 78.3, "triviaqa": 45.4,
        "rocstories": 10.5, "humaneval_infilling": 1.7, "mawps": 63.5, "sat_math": 24.5,
    },
}  # fmt: skip


def published(model: str, task: str) -> float | None:
    """The accuracy in per cent that the paper gives for a model of this name, if any."""
    return PUBLISHED.get(model.rstrip("/").rpartition("/")[2].lower(), {}).get(task)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value: documents that only one of two models has right fall to either side by a coin."""
    n, k = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, float(2 * tail / 2**n))


def accuracy(values: Sequence[float]) -> dict[str, float | None]:
    """Mean over documents and its standard error: sample deviation / sqrt(n), for 0/1 values sqrt(p (1 - p) / (n - 1)).

    A document whose value is a mean over several texts of it counts once: clustered by document.
    """
    mean, n = float(np.mean(values)), len(values)
    return {"value": mean, "stderr": float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None}


def by_draws(documents: Sequence[Any], metric: str) -> list[dict[str, Any]]:
    """Accuracy with fewer masks an option, by rising draws, over documents that have estimates for all of them."""
    counts = set.intersection(*(set(d.fewer) for d in documents)) if documents else set[int]()
    return [{"draws": k, **accuracy([d.fewer[k][metric] for d in documents])} for k in sorted(counts)]


def paired_accuracy(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> dict[str, Any]:
    """a - b over the same documents: difference, 95 % interval (bootstrap over documents), two-sided p-value.

    p: exact McNemar where a document is right or wrong; else the share of random sign flips of the documents'
    differences whose mean is as large, the difference itself counted among them.
    """
    gap = np.subtract(a, b)
    n = len(gap)
    counts = [int((gap > 0).sum()), int((gap < 0).sum())]
    rng = generator(seed, purpose="eval")
    if set(np.unique([a, b])) <= {0.0, 1.0}:
        drawn = rng.multinomial(n, [counts[0] / n, counts[1] / n, 1 - sum(counts) / n], size=RESAMPLES)
        resampled, p = (drawn[:, 0] - drawn[:, 1]) / n, mcnemar(*counts)
    else:
        resampled = np.array([gap[rng.integers(n, size=n)].mean() for _ in range(RESAMPLES)])
        flipped = np.array([abs((gap * (2 * rng.integers(2, size=n) - 1)).mean()) for _ in range(RESAMPLES)])
        p = float((1 + (flipped >= abs(gap.mean()) - 1e-12).sum()) / (1 + RESAMPLES))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {
        "difference": float(gap.mean()),
        "low": float(low),
        "high": float(high),
        "only_model": counts[0],
        "only_parent": counts[1],
        "p": p,
    }


def undecided(scores: Sequence[Score]) -> bool:
    """Whether the two best options lie within two standard errors of the masks (those taken as independent)."""
    if len(scores) < 2:
        return False
    first, second = sorted(scores, key=lambda s: s.nats)[:2]
    noise = math.hypot(first.stderr, second.stderr)
    return noise != 0 and not second.nats - first.nats > 2 * noise


def text_figures(documents: Sequence[Estimate], words: int) -> dict[str, Any]:
    """Totals over documents. word_perplexity: nats per white-space word, each line end counted as one (WikiText)."""
    nats, tokens = np.array([d.nats for d in documents]), np.array([float(d.tokens) for d in documents])
    size, cluster = np.array([d.bytes for d in documents]), np.arange(len(documents))
    bits = ratio_stderr(nats / math.log(2), size, cluster)
    per_token = ratio_stderr(nats, tokens, cluster)
    return {
        "nats_per_token": float(nats.sum() / tokens.sum()),
        "stderr_nats_per_token": None if math.isnan(per_token) else per_token,
        "bits_per_byte": float(nats.sum() / math.log(2) / size.sum()),
        "stderr": None if math.isnan(bits) else bits,
        "token_perplexity": math.exp(min(700.0, nats.sum() / tokens.sum())),
        "word_perplexity": math.exp(min(700.0, nats.sum() / max(1, words))),
        "tokens": int(tokens.sum()),
        "forwards": sum(d.forwards for d in documents),
        "skipped": sum(d.skipped for d in documents),
    }


def paired_texts(model: Sequence[Estimate], parent: Sequence[Estimate]) -> dict[str, float | None]:
    """Bits per byte of the model above the parent's, and the standard error of that over documents."""
    gap = (np.array([m.nats for m in model]) - np.array([p.nats for p in parent])) / math.log(2)
    size = np.array([m.bytes for m in model])
    error = ratio_stderr(gap, size, np.arange(len(gap)))
    return {"difference": float(gap.sum() / size.sum()), "stderr": None if math.isnan(error) else error}


def task_figures(
    documents: Mapping[str, Mapping[str, float]], other: Mapping[str, Mapping[str, float]] | None, *, seed: int
) -> dict[str, Any]:
    """Every accuracy of a task: value and standard error, the parent's, and the paired comparison."""
    figures: dict[str, Any] = {}
    for metric in next(iter(documents.values())):
        mine = [d[metric] for d in documents.values()]
        theirs = None if other is None else [other[key][metric] for key in documents]
        if metric == "perplexity":  # lm-eval's name for the log-likelihood of a document's target
            found: dict[str, Any] = {"model": {"value": math.exp(min(700.0, -float(np.mean(mine))))}}
            if theirs is not None:
                found["parent"] = {"value": math.exp(min(700.0, -float(np.mean(theirs))))}
        else:
            found = {"model": accuracy(mine)}
            if theirs is not None:
                found |= {"parent": accuracy(theirs), "paired": paired_accuracy(mine, theirs, seed=seed)}
        figures[metric] = found
    return figures
