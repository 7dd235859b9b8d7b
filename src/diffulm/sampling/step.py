"""What one step of the loop knows: the canvas, the predictions, the random numbers, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..runtime import uniforms


@dataclass(frozen=True)
class Step:
    """One step from time t down to s. Given to the policy with the canvas before it, yielded with the canvas after.

    index: place in the grid of `steps` steps. Steps that change nothing are not yielded, so indices may skip.
    ids (B, L) int64. masked, eligible, predicted (B, L) bool: masked when the step began; of these the ones that may be
    revealed; and the ones that were predicted, which is all of them, or under a blind policy (policies.py) those it
    reveals and none when it is asked. log_probs (N, V): the model's log-probabilities at the predicted positions in
    row-major order. draw: log-probabilities and uniforms to tokens. uniforms: "token", "reveal" and "order", (B, L)
    float64. alpha_t: probability that a token is clean at t; reveal_prob: (alpha_s - alpha_t) / (1 - alpha_t).
    committed_upto (B,): leading positions without a mask, which will not change unless the policy masks again.
    revealed (B, L) bool: the positions this step gave a token; none when the policy is asked.
    """

    index: int
    steps: int
    s: float
    t: float
    ids: Tensor
    masked: Tensor
    eligible: Tensor
    predicted: Tensor
    log_probs: Tensor
    draw: Callable[[Tensor, Tensor], Tensor]
    uniforms: Mapping[str, Tensor]
    reveal_prob: float
    alpha_t: float
    committed_upto: Tensor
    revealed: Tensor

    @cached_property
    def proposal(self) -> Tensor:
        """(B, L) int64: the token drawn for each predicted position, ids elsewhere. Drawn when first asked for:
        most rules rank without it, and then only what they reveal is drawn."""
        return self._filled(self.predicted, self.log_probs)

    def filled(self, where_BL: Tensor) -> Tensor:
        """The canvas with the proposed token at every position of `where_BL`, all of them predicted."""
        if "proposal" in vars(self):
            return torch.where(where_BL, self.proposal, self.ids)
        return self._filled(where_BL, self.log_probs[where_BL[self.predicted]])

    def _filled(self, where_BL: Tensor, log_probs_NV: Tensor) -> Tensor:
        if not len(log_probs_NV):
            return self.ids
        return self.ids.masked_scatter(where_BL, self.draw(log_probs_NV, self.uniforms["token"][where_BL]))


class Uniforms(Mapping[str, Tensor]):
    """The random numbers of one step, (B, L) float64 for each purpose, made when first asked for.

    A number depends on (seed of the sample, step, purpose, position) and on nothing else.
    """

    def __init__(self, seeds: Sequence[int], step: int, length: int, device: torch.device) -> None:
        self.seeds, self.step, self.length, self.device = seeds, step, length, device
        self.made: dict[str, Tensor] = {}

    def __getitem__(self, purpose: str) -> Tensor:
        if purpose not in tuple(self):
            raise KeyError(purpose)
        if purpose not in self.made:
            rows = [uniforms(seed, self.step, purpose=purpose, n=self.length) for seed in self.seeds]
            self.made[purpose] = torch.from_numpy(np.stack(rows)).to(self.device)
        return self.made[purpose]

    def __iter__(self) -> Iterator[str]:
        return iter(("token", "reveal", "order"))

    def __len__(self) -> int:
        return 3


def committed(masked: Tensor) -> Tensor:
    """(B,) length of the leading stretch without a mask."""
    L = masked.shape[1]
    first = masked.long().argmax(1)
    return torch.where(masked.any(1), first, L)
