"""From logits to a proposed token: temperature, top-k, top-p, and the inverse of the cumulative distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Rows drawn at a time on a CPU: so many float64 rows stay in its cache. An accelerator takes more.
CHUNK = 4
#: Tokens among which the cut of top_p is looked for before the whole vocabulary is sorted.
NUCLEUS = 1024


@dataclass(frozen=True)
class Draw:
    """How a token is drawn. temperature 0 is greedy (the most probable token); top_k and top_p cut the tail first.

    The cumulative sum is float64: in float32 the noise of a 50,000-token sum acts like a lower temperature
    (arXiv 2409.02908).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")

    def probs(self, log_probs_NV: Tensor) -> Tensor:
        """(N, V) float64 probabilities that tokens are drawn from (temperature > 0)."""
        logits = log_probs_NV.double()
        # The best token is put at 0 first: divided by a tiny temperature, all of a row could become -inf.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        probs = logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            probs = nucleus(probs, self.top_p)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs

    def __call__(self, log_probs_NV: Tensor, uniform_N: Tensor) -> Tensor:
        """(N,) int64 tokens; `uniform_N` float64 in [0, 1), one per row: a row's token depends on nothing else."""
        if self.temperature == 0:
            return log_probs_NV.argmax(-1)
        drawn = torch.empty(len(log_probs_NV), dtype=torch.long, device=log_probs_NV.device)
        chunk = CHUNK if drawn.device.type == "cpu" else 16 * CHUNK
        for i in range(0, len(drawn), chunk):
            cumulative = self.probs(log_probs_NV[i : i + chunk]).cumsum(-1)
            total = cumulative[:, -1:].contiguous()
            # First token whose cumulative mass exceeds u: a token of mass 0 never does.
            point = uniform_N[i : i + chunk, None].to(cumulative) * total
            token = torch.searchsorted(cumulative, point, right=True)
            # Rounding may put the point on the total itself; then the last token with mass is meant.
            last = torch.searchsorted(cumulative, total)
            drawn[i : i + chunk] = torch.minimum(token, last)[:, 0]
        return drawn


def nucleus(probs_NV: Tensor, mass: float) -> Tensor:
    """Probabilities with 0 for what is not among the most probable tokens that hold `mass`; ties keep the lower id.

    A token stays while the mass before it is below `mass`: at least one always does. Sorting the vocabulary takes
    longer than all else in a draw, so a few of the best tokens are sorted first. Their cut is the cut of all
    when it falls above the last of them.
    """
    few = min(NUCLEUS, probs_NV.shape[-1])
    tokens = probs_NV.topk(few, dim=-1).indices.sort(dim=-1).values
    ordered, order = probs_NV.gather(-1, tokens).sort(dim=-1, descending=True, stable=True)
    order = tokens.gather(-1, order)
    kept = (ordered.cumsum(-1) - ordered) < mass
    last = kept.sum(-1, keepdim=True) - 1
    if not bool((ordered.gather(-1, last) > ordered[:, -1:]).all()):
        ordered, order = probs_NV.sort(dim=-1, descending=True, stable=True)
        kept = (ordered.cumsum(-1) - ordered) < mass
    return torch.zeros_like(probs_NV).scatter(-1, order, ordered.where(kept, 0.0))
