"""A training step of the block layout, its attention dense and in tiles, beside a step of the full layout.

    python benchmarks/block_attention.py [--rounds 5] [--length 512] [--block-size 4] [--dtype autocast]

SmolLM2-135M's shape with random weights, one sequence a step, forward and backward; one process, the contenders in
turns. Prints seconds (median), tokens/s, the ratio to the dense block step paired by round (median, minimum, maximum),
and the share of all pairs of rows that the tiles compute.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from typing import Any

import torch

from diffulm.attention import share_computed, tiles_of
from diffulm.denoiser import HFDenoiser
from diffulm.layout import Block, Full, NoisedBatch, Rows
from diffulm.runtime import parse_precision
from sizes import SMALL, texts


def rows_of(layout: Full | Block, length: int) -> Rows:
    """One sequence, half of its tokens noised."""
    x0 = texts(0, SMALL, 1, length)
    zeros, yes = torch.zeros_like(x0), torch.ones_like(x0, dtype=torch.bool)
    maskable = yes.clone()
    maskable[:, 0] = False
    noised = maskable & (torch.rand(x0.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    group = layout.noise_groups(zeros) if isinstance(layout, Block) else zeros
    ids = x0.masked_fill(noised, SMALL.mask)
    return layout.training_rows(NoisedBatch(x0, ids, noised, maskable, noised.float(), zeros, yes, group))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--block-size", type=int, default=4)
    parser.add_argument("--dtype", default="autocast")
    args = parser.parse_args()
    denoiser = HFDenoiser(SMALL.build(), SMALL.mask, precision=parse_precision(args.dtype)).train()
    block = rows_of(Block(args.block_size, "launch", 0.5), args.length)
    contenders = {
        "block, dense": (block, False), "block, tiles": (block, True), "full": (rows_of(Full(), args.length), False)
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for n in range(args.rounds + 1):
        for name, (rows, tiled) in contenders.items() if n % 2 else reversed(contenders.items()):
            denoiser.tiled = tiled
            denoiser.zero_grad(set_to_none=True)
            began = time.perf_counter()
            (denoiser.nll(rows) * rows.weight).sum().backward()
            if n:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    dense, mask = seconds["block, dense"], denoiser.attention_mask(block)
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "settings": vars(args), "rows": block.ids.shape[1],
        "share_of_pairs": round(share_computed(tiles_of(mask), mask), 3),
        "steps": {
            name: {
                "seconds": round(statistics.median(took), 3),
                "tokens_per_second": round(args.length / statistics.median(took), 1),
                "ratio": [round(f(a / b for a, b in zip(dense, took, strict=True)), 3)
                          for f in (statistics.median, min, max)],
            }
            for name, took in seconds.items()
        },
    }  # fmt: skip
    for name, step in result["steps"].items():
        speed, (middle, low, high) = step["tokens_per_second"], step["ratio"]
        print(f"{name:14} {step['seconds']:7.3f} s {speed:8.1f} tok/s  {middle:.2f} ({low:.2f} to {high:.2f})")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
