"""How good generated tokens are, as far as counting can tell: likelihood under the AR parent, entropy, diversity.

One number alone can be gamed: text that repeats itself is likely, random text is diverse. So they stand together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..denoiser import HFDenoiser
from ..eval.likelihood import ratio_stderr
from ..eval.masks import student
from ..eval.quality import distinct_n, unigram_entropy
from ..layout import Causal

#: Texts that go through the parent together.
TOGETHER = 8


@torch.no_grad()
def nats_under_parent(parent: HFDenoiser, prompts_BP: Tensor, texts: Sequence[Sequence[int]]) -> list[float]:
    """-log p(text | prompt) of each text in nats, summed over its tokens; prompts with their start token."""
    found: list[float] = []
    for at in range(0, len(texts), TOGETHER):
        part, given_BP = texts[at : at + TOGETHER], prompts_BP[at : at + TOGETHER]
        B, P = given_BP.shape
        ids_BL = torch.zeros(B, P + max(map(len, part)), dtype=torch.long, device=given_BP.device)
        ids_BL[:, :P] = given_BP
        for b, text in enumerate(part):
            ids_BL[b, P : P + len(text)] = torch.tensor(list(text))
        end_B1 = torch.tensor([[P + len(text)] for text in part], device=ids_BL.device)
        at_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        valid_BL = at_L < end_B1
        rows = Causal().decoding_rows(ids_BL, valid_BL, valid_BL & (at_L >= P))
        nats_N = parent.nll(rows).cpu().double()
        owner_N = (rows.source // ids_BL.shape[1]).cpu()
        found += torch.zeros(B, dtype=torch.float64).index_add_(0, owner_N, nats_N).tolist()
    return found


def interval(above: Sequence[float], below: Sequence[float], prompts: Sequence[int]) -> dict[str, Any] | None:
    """sum(above) / sum(below) with the half-width of its 95 % interval, prompts being the independent draws.

    None without a finite value; half-width None with fewer than two prompts.
    """
    known = [i for i, (a, b) in enumerate(zip(above, below, strict=True)) if math.isfinite(a) and b]
    if not known:
        return None
    a, b, cluster = (np.array([float(x[i]) for i in known]) for x in (above, below, prompts))
    error, n = ratio_stderr(a, b, cluster), len(np.unique(cluster))
    half = student(1.96, n - 1) * error if n > 1 else None
    return {"value": float(a.sum() / b.sum()), "half_width": half, "prompts": n}


def describe(
    parent: HFDenoiser | None, prompts_BP: Tensor, texts: Sequence[Sequence[int]], prompts: Sequence[int]
) -> dict[str, Any]:
    """Quality of texts: nats per token under the parent (None without one), unigram entropy, distinct-2.

    prompts_BP (B, P): each text's prompt with its start token; prompts: which prompt that is. Entropy and distinct-2
    are means over texts.
    """
    ones = [1.0] * len(texts)
    nats = None if parent is None else nats_under_parent(parent, prompts_BP, texts)
    return {
        "nats_per_token_under_parent": nats and interval(nats, [len(text) for text in texts], prompts),
        "unigram_entropy": interval([unigram_entropy(text) for text in texts], ones, prompts),
        "distinct_2": interval([distinct_n(text, 2) for text in texts], ones, prompts),
    }
