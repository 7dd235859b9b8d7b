"""Measures of written texts: ROUGE, pass@k. The only file that imports rouge_score."""

from __future__ import annotations

import math
from collections.abc import Sequence

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(truths: Sequence[str], texts: Sequence[str]) -> list[dict[str, float]]:
    """ROUGE-1, -2 and -L of each text against its truth: F-measure in [0, 1], words not stemmed.

    The package rouge-score (Lin 2004), with the defaults of `evaluate`, through which the paper scored. ValueError
    without the package.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError("ROUGE needs rouge-score; pip install 'diffulm[eval]'") from error
    scorer = RougeScorer(list(ROUGE), use_stemmer=False)
    return [
        {name: float(found.fmeasure) for name, found in scorer.score(truth, text).items()}
        for truth, text in zip(truths, texts, strict=True)
    ]


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that one of k samples drawn from `samples`, `right` of them right, is right: unbiased for pass@k.

    1 - C(n - c, k) / C(n, k), Chen et al. (arXiv 2107.03374), equation 1. ValueError for k > n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {samples}; raise --samples")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)
