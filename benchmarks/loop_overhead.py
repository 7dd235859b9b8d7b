"""What the denoising loop costs beside the model: everything in a step that is not the forward.

    python benchmarks/loop_overhead.py [--rounds 7] [--rows 16 256] [--dtype float32] [--threads N]

One step of `denoise` with a stub in place of the model (its logits lie ready), against a forward of a random model of
SmolLM2-135M's shape (V = 49153) over the same rows: a start token and `rows` masks, of which one is revealed. The two
take turns, so that a drift of the machine hits both; the loop's time includes setting up the iterator, which a real
run pays once. A blind policy is set against the forward it would ask for, with the head on one row. The stub's
predictions are flat, the dear case for top_p. Prints a table and JSON: milliseconds (median) and the loop's share of a
step, loop / (loop + forward), by round (median, minimum, maximum).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from diffulm.denoiser import HFDenoiser
from diffulm.layout import Full, Rows
from diffulm.process import MaskedDiffusion
from diffulm.runtime import parse_precision
from diffulm.sampling import (
    Ancestral,
    Canvas,
    Draw,
    Entropy,
    EntropyBound,
    Factor,
    FirstHitting,
    Margin,
    Policy,
    RandomOrder,
    Threshold,
    TopConfidence,
    denoise,
)
from machine import describe
from sizes import SMALL

VOCAB, MASK = SMALL.vocab, SMALL.mask
GREEDY = Draw(0.0)
#: Name, policy, draw. With the stub's predictions each reveals one token or few; only the last draws all of them.
CASES: list[tuple[str, Policy, Draw]] = [
    ("confidence, greedy", TopConfidence(), GREEDY),
    ("confidence, temperature 1", TopConfidence(), Draw()),
    ("confidence, top_p 0.9", TopConfidence(), Draw(top_p=0.9)),
    ("entropy, greedy", Entropy(), GREEDY),
    ("margin, greedy", Margin(), GREEDY),
    ("threshold 0.9, greedy", Threshold(), GREEDY),
    ("factor 1, greedy", Factor(), GREEDY),
    ("entropy bound 0.1, greedy", EntropyBound(), GREEDY),
    ("random, temperature 1", RandomOrder(), Draw()),
    ("first-hitting, temperature 1", FirstHitting(), Draw()),
    ("ancestral, temperature 1", Ancestral(), Draw()),
    ("confidence of the drawn, temperature 1", TopConfidence("drawn"), Draw()),
]


class Stub:
    """Logits that lie ready, as if the forward had taken no time."""

    def __init__(self, rows: int) -> None:
        self.logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
        self.logits[:, MASK] = float("-inf")

    def __call__(self, rows: Rows, *, cache: Any = None) -> torch.Tensor:
        return self.logits[: len(rows.source)]

    def nll(self, rows: Rows) -> torch.Tensor:
        raise NotImplementedError("sampling asks for logits alone")


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(model: HFDenoiser, rows: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of forward and loop by round, for every case."""
    ids = torch.full((1, rows + 1), MASK)
    ids[0, 0] = 1
    masked = ids == MASK
    canvas, layout, process, stub = (
        Canvas(ids, masked, torch.ones_like(masked)),
        Full(),
        MaskedDiffusion(MASK),
        Stub(rows),
    )
    one = masked & (torch.arange(rows + 1) == rows)
    wanted = {
        False: layout.decoding_rows(ids, canvas.valid, masked),
        True: layout.decoding_rows(ids, canvas.valid, one),
    }

    def forward(blind: bool) -> None:
        with torch.no_grad():
            model(wanted[blind])

    def step(policy: Policy, draw: Draw) -> None:
        next(denoise(stub, process, canvas, steps=rows, policy=policy, draw=draw, layout=layout))

    out: dict[str, dict[str, Any]] = {name: {"forward": [], "loop": []} for name, _, _ in CASES}
    for n in range(rounds + 1):
        forwards = {blind: seconds(partial(forward, blind)) for blind in (False, True)}
        for name, policy, draw in CASES:
            loop = seconds(partial(step, policy, draw))
            if n:  # the first round warms up
                out[name]["forward"].append(forwards[bool(getattr(policy, "blind", False))])
                out[name]["loop"].append(loop)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "autocast"), default="float32")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    precision = parse_precision(args.dtype)
    model = HFDenoiser(SMALL.build(dtype=precision.weights).eval(), MASK, precision=precision)
    result: dict[str, Any] = {"machine": describe(), "dtype": args.dtype, "vocabulary": VOCAB, "rows": {}}
    for rows in args.rows:
        cases = measure(model, rows, args.rounds)
        print(f"{rows} rows: {'':<32} {'forward':>8} {'loop':>8}  share of the step (median, min..max)")
        for name, case in cases.items():
            shares = [a / (a + b) for a, b in zip(case["loop"], case["forward"], strict=True)]
            case["share"] = statistics.median(shares)
            forward, loop = (statistics.median(case[key]) * 1e3 for key in ("forward", "loop"))
            spread = f"({min(shares):.1%}..{max(shares):.1%})"
            print(f"  {name:<40} {forward:5.1f} ms {loop:5.1f} ms  {case['share']:6.1%} {spread}")
        result["rows"][rows] = cases
    print(json.dumps(result))


if __name__ == "__main__":
    main()
