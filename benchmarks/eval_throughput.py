"""Scoring options and draws together, in batches of like length, against one option and draw at a time.

    python benchmarks/eval_throughput.py MODEL --data-dir DIR [--tasks piqa,copa] [--limit 4] [--draws 31] [--rounds 2]
        [--dtype float32] [--threads N] [--out FILE]

Both sides score the same masks of the same documents, in turns; the ratio is paired by round. The largest difference of
an option's nats between them is printed too.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace

import torch

import diffulm
from diffulm.eval.rate import diffusion_scorer
from likelihood_estimators import documents
from machine import describe, scoring_arguments

#: Tokens a forward may hold: one sequence, and what `diffulm eval` takes.
ALONE, TOGETHER = 1, 4096


def main() -> None:
    parser = scoring_arguments(__doc__, tasks="piqa,copa", limit=4)
    parser.add_argument("--draws", type=int, default=31)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = diffulm.load(args.model, dtype=args.dtype)
    questions = documents(model, args.tasks.split(","), args.data_dir, args.limit)
    scorer = diffusion_scorer(model, draws=args.draws)
    replace(scorer, budget=TOGETHER).scores(questions[:1])  # warm-up
    seconds: dict[int, list[float]] = {ALONE: [], TOGETHER: []}
    nats: dict[int, list[float]] = {}
    sequences = 0
    for turn in range(args.rounds):
        for budget in (ALONE, TOGETHER) if turn % 2 == 0 else (TOGETHER, ALONE):
            began = time.perf_counter()
            scores = replace(scorer, budget=budget).scores(questions)
            seconds[budget].append(time.perf_counter() - began)
            nats[budget] = [s.nats for group in scores for s in group]
            sequences = sum(s.forwards for group in scores for s in group)
    ratios = [a / b for a, b in zip(seconds[ALONE], seconds[TOGETHER], strict=True)]
    gap = max(abs(a - b) for a, b in zip(nats[ALONE], nats[TOGETHER], strict=True))
    result = {
        "tasks": args.tasks, "documents": len(questions), "sequences": sequences, "draws": args.draws,
        "dtype": str(model.denoiser.precision), "seconds_alone": seconds[ALONE], "seconds_together": seconds[TOGETHER],
        "ratio": statistics.median(ratios), "largest_difference_nats": gap, "machine": describe(),
    }  # fmt: skip
    print(
        f"{sequences} sequences of {len(questions)} documents, {result['dtype']}: alone "
        f"{sequences / statistics.median(seconds[ALONE]):.1f} a second, together "
        f"{sequences / statistics.median(seconds[TOGETHER]):.1f}; {result['ratio']:.2f}x ({min(ratios):.2f} to "
        f"{max(ratios):.2f}); largest difference {gap:.1e} nats"
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
