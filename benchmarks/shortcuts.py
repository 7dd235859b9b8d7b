"""Exact shortcuts for full attention: forwards and time saved. And temperature against diversity.

    python benchmarks/shortcuts.py speed [--model FOLDER | --layers 30] [--tokens 256] [--steps 256 1024] [--batch 1]
        [--rounds 3] [--limit N] [--dtype float32] [--threads N]
    python benchmarks/shortcuts.py temperature --model FOLDER [--parent FOLDER] [--tokens 64] [--samples 16] [--batch 8]
        [--temperatures 0.5 0.7 0.9 1.0 1.1] [--top-p P] [--dtype float32] [--threads N]

speed: texts from nothing, by three loops in turn. "plain" spends a forward on every step and predicts all masked
positions; "ancestral" is the same sampler through `denoise`, which asks the policy first and leaves out forwards that
reveal nothing; "first-hitting" is its limit, one token a step. Plain and ancestral use the same random numbers, so
their tokens are the same (agreement; in float32 ties may fall otherwise). Without --model: a random model of
SmolLM2-135M's shape with --layers layers. --limit N makes about N forwards of each run, spread evenly over it, and
takes the others to be as long as these on average; how many there are does not depend on what the model says.

temperature: one token a step in random order, scored by the AR parent (default: the one the checkpoint names). As in
figure 5 of arXiv 2410.17891 a lower temperature should buy likelihood with diversity. Print tables and JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from caches import subject
from diffulm import hub
from diffulm.bench.generate import open_parent
from diffulm.bench.quality import describe as quality
from diffulm.layout import Full, Rows
from diffulm.process import MaskedDiffusion
from diffulm.sampling import Ancestral, Canvas, Draw, FirstHitting, Policy, agreement, denoise
from diffulm.sampling.step import Uniforms
from diffulm.tokenizer import special_tokens
from machine import describe


class Counted:
    """A denoiser that counts its forwards and makes one in `every`; the rest give even predictions over `width` tokens.

    Without a model it makes none: how many forwards a blind policy takes does not depend on what they say.
    """

    def __init__(self, inner: Any = None, width: int = 1, every: int = 1) -> None:
        self.inner, self.width, self.every = inner, width, every
        self.forwards, self.made, self.seconds = 0, 0, 0.0

    def __call__(self, rows: Rows, *, cache: Any = None) -> Tensor:
        self.forwards += 1
        if self.inner is None or (self.forwards - 1) % self.every:
            return torch.zeros(len(rows.source), self.width, device=rows.ids.device)
        self.made += 1
        start = time.perf_counter()
        out: Tensor = self.inner(rows, cache=cache)
        if out.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        return out

    def nll(self, rows: Rows) -> Tensor:
        raise NotImplementedError


@torch.no_grad()
def plain(denoiser: Counted, process: MaskedDiffusion, canvas: Canvas, steps: int, layout: Full, draw: Draw) -> Tensor:
    """Ancestral sampling as the textbook has it: a forward at every step while anything is masked."""
    ids, masked, L = canvas.ids, canvas.editable, canvas.ids.shape[1]
    for k in range(steps):
        if not bool(masked.any()):
            break
        log_probs = denoiser(layout.decoding_rows(ids, canvas.valid, masked)).log_softmax(-1)
        u = Uniforms(range(len(ids)), k, L, ids.device)
        t, s = (torch.tensor(1 - i / steps, dtype=torch.float64) for i in (k, k + 1))
        shown = masked & ((u["reveal"] < float(process.reveal_prob(s, t))) | (k + 1 == steps))
        ids = ids.masked_scatter(shown, draw(log_probs[shown[masked]], u["token"][shown]))
        masked = masked & ~shown
    return ids


def through_the_loop(policy: Policy) -> Callable[..., Tensor]:
    """The same arguments as `plain`, by `denoise`."""

    def run(
        denoiser: Counted, process: MaskedDiffusion, canvas: Canvas, steps: int, layout: Full, draw: Draw
    ) -> Tensor:
        *_, last = denoise(denoiser, process, canvas, steps=steps, policy=policy, draw=draw, layout=layout)
        ids: Tensor = last.ids
        return ids

    return run


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and forwards of the three loops at each number of steps."""
    args.prompt = 1
    denoiser, special, layout, _ = subject(args)
    if not isinstance(layout, Full):
        raise SystemExit("the shortcuts are those of full attention; give a checkpoint of the full layout")
    mask = denoiser.mask_token_id or 0
    process, draw = MaskedDiffusion(mask), Draw(1.0)
    canvas = Canvas.unconditional(args.batch, args.tokens, special).to(next(denoiser.parameters()).device)
    found: dict[str, Any] = {}
    for steps in args.steps:
        kinds = {"plain": plain, "ancestral": through_the_loop(Ancestral())}
        if steps >= args.tokens:
            kinds["first-hitting"] = through_the_loop(FirstHitting())
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        forwards, texts = {}, {}
        for name, run in kinds.items():
            counted = Counted()
            run(counted, process, canvas, steps, layout, draw)
            forwards[name] = counted.forwards
        for n in range(args.rounds + 1):
            for name, run in kinds.items():
                # The first round warms up: two forwards of each loop.
                limit = args.limit or forwards[name] if n else 2
                counted = Counted(denoiser, denoiser.head.weight.shape[0], -(-forwards[name] // limit))
                start = time.perf_counter()
                texts[name] = run(counted, process, canvas, steps, layout, draw)
                if n:
                    around = time.perf_counter() - start - counted.seconds
                    seconds[name].append(around + counted.seconds / counted.made * counted.forwards)
        print(f"T = {steps}, {args.tokens} tokens: {'forwards':>8} {'seconds':>8}  speed (smallest..largest)")
        for name in kinds:
            ratios = [a / b for a, b in zip(seconds["plain"], seconds[name], strict=True)]
            spread = f"({min(ratios):.2f}..{max(ratios):.2f})"
            middle = statistics.median(seconds[name])
            print(f"  {name:<24} {forwards[name]:>8} {middle:>8.2f}  {statistics.median(ratios):.2f}x {spread}")
        same = None if args.limit else agreement(texts["plain"], texts["ancestral"])
        if same is not None:
            print(f"  tokens of ancestral equal to plain: {same:.1%}")
        found[str(steps)] = {"forwards": forwards, "seconds": seconds, "agreement": same}
    return found


def temperature(args: argparse.Namespace) -> dict[str, Any]:
    """Likelihood under the parent and diversity at each temperature, from the same random numbers."""
    model = hub.load(args.model, dtype=args.dtype)
    parent, reason = open_parent(args.parent, model, offline=True)
    if parent is None:
        raise SystemExit(reason)
    special, found = special_tokens(model.tokenizer), {}
    header = ("temperature", "nats/token under the parent", "unigram entropy", "distinct-2")
    print("  ".join(f"{name:>15}" for name in header))
    for value in args.temperatures:
        texts: list[list[int]] = []
        for at in range(0, args.samples, args.batch):
            n = min(args.batch, args.samples - at)
            canvas = Canvas.unconditional(n, args.tokens, special).to(model.device)
            *_, last = denoise(
                model.denoiser, model.process, canvas, steps=args.tokens, policy=FirstHitting(),
                draw=Draw(value, None, args.top_p), layout=model.layout, seeds=range(at, at + n),
            )  # fmt: skip
            texts += last.ids[:, 1:].tolist()
        starts = torch.full((len(texts), 1), special.bos, device=model.device)
        found[str(value)] = quality(parent, starts, texts, range(len(texts)))
        cells = [f"{one['value']:.3f} ± {one['half_width'] or 0:.3f}" for one in found[str(value)].values()]
        print("  ".join(f"{cell:>{max(15, len(name))}}" for cell, name in zip((f"{value:g}", *cells), header)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="what", required=True)
    fast, warm = verbs.add_parser("speed"), verbs.add_parser("temperature")
    for verb, tokens, batch in ((fast, 256, 1), (warm, 64, 8)):
        verb.add_argument("--model", required=verb is warm)
        verb.add_argument("--tokens", type=int, default=tokens)
        verb.add_argument("--batch", type=int, default=batch)
        verb.add_argument("--dtype", default="float32")
        verb.add_argument("--threads", type=int)
    fast.add_argument("--layers", type=int, default=30)
    fast.add_argument("--steps", type=int, nargs="+", default=[256, 1024])
    fast.add_argument("--rounds", type=int, default=3)
    fast.add_argument("--limit", type=int)
    warm.add_argument("--parent")
    warm.add_argument("--samples", type=int, default=16)
    warm.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 0.7, 0.9, 1.0, 1.1])
    warm.add_argument("--top-p", type=float)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    found = speed(args) if args.what == "speed" else temperature(args)
    print(json.dumps({"machine": describe(), "settings": vars(args), "found": found}))


if __name__ == "__main__":
    main()
