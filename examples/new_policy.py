"""A decoding rule of your own: one function from a step to the positions that hold a token after it.

python examples/new_policy.py runs/demo/model
"""

from __future__ import annotations

import sys

import torch

import diffulm
from diffulm.sampling import Step


def left_to_right(step: Step) -> torch.Tensor:
    """Reveal the leftmost masked position of each sample."""
    first = step.masked.long().argmax(1)
    chosen = torch.zeros_like(step.masked)
    chosen[torch.arange(len(first)), first] = True
    return ~step.masked | (chosen & step.masked)


def main(folder: str) -> None:
    model = diffulm.load(folder)
    for name, policy in (("left to right", left_to_right), ("most confident first", diffulm.TopConfidence())):
        print(f"{name}: {diffulm.generate(model, 'The with statement', max_tokens=12, policy=policy)!r}")


if __name__ == "__main__":
    main(sys.argv[1])
