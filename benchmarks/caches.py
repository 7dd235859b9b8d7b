"""Approximate caches for full attention: rows computed, speed, and how many tokens stay the same.

    python benchmarks/caches.py [--model FOLDER] [--prompt 64] [--tokens 256] [--block 32] [--steps 256] [--batch 1]
        [--rounds 3] [--policy confidence] [--temperature 0] [--dtype float32] [--layers 30] [--threads N]

The same completions, block after block, without a cache, with `PrefixCache` and with `DualCache`; and once without
blocks (the whole completion at each step). The four take turns, so that a drift of the machine hits all of them alike.
Speed is that of new tokens (prompt excluded, no early stop), as a ratio to the uncached run in blocks. Two counts of
agreement. "whole text": the share of new tokens equal to that run's, place by place; one early difference changes what
follows, so it is the harsh count. "choices": the share of tokens which the uncached model, shown the canvas that the
cached one had reached, would have put there too (greedy draws only; in the round that warms up).

Without --model: a random model of SmolLM2-135M's shape, whose rows and speed mean something and whose agreement means
nothing. Prompts are text from the standard library, or random ids for the random model. Prints a table and JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffulm.denoiser import HFDenoiser
from diffulm.layout import Full, Rows
from diffulm.process import MaskedDiffusion
from diffulm.runtime import parse_precision
from diffulm.sampling import Canvas, Draw, DualCache, PrefixCache, agreement, denoise, policy_from_name
from diffulm.sampling.fill import steps_of_a_block
from diffulm.tokenizer import SpecialTokens, encode, special_tokens
from machine import describe
from sizes import SMALL, texts

KINDS: dict[str, Any] = {"no blocks": None, "uncached": None, "prefix": PrefixCache, "dual": DualCache}


@dataclass
class Counted:
    """A denoiser that counts its forwards and their rows."""

    inner: HFDenoiser
    forwards: int = 0
    rows: int = 0

    def __call__(self, rows: Rows, *, cache: Any = None) -> Tensor:
        self.forwards += 1
        self.rows += rows.ids.numel()
        out: Tensor = self.inner(rows, cache=cache)
        return out

    def nll(self, rows: Rows) -> Tensor:
        return self.inner.nll(rows)


@dataclass
class Found:
    """What one kind of run gave. `choices`: share of tokens that an uncached forward confirms, None under draws."""

    choices: float | None = None
    seconds: list[float] = field(default_factory=list)
    rows: int = 0
    forwards: int = 0
    tokens: Tensor | None = None


def subject(args: argparse.Namespace) -> tuple[HFDenoiser, SpecialTokens, Any, list[list[int]]]:
    """Denoiser, special tokens, layout and prompts."""
    if args.model:
        import pydoc_data.topics

        from diffulm.hub import load

        model = load(args.model, dtype=args.dtype)
        text = " ".join(pydoc_data.topics.topics.values())
        ids = encode(model.tokenizer, text[: 40 * args.prompt * args.batch], plain=True)
        prompts = [ids[b * args.prompt : (b + 1) * args.prompt] for b in range(args.batch)]
        return model.denoiser, special_tokens(model.tokenizer), model.layout, prompts
    size, precision = replace(SMALL, layers=args.layers), parse_precision(args.dtype)
    denoiser = HFDenoiser(size.build(dtype=precision.weights).eval(), size.mask, precision=precision)
    drawn = texts(1, size, args.batch, args.prompt)
    return denoiser, SpecialTokens(1, 2, 2, size.mask), Full("previous"), drawn.tolist()


def measure(args: argparse.Namespace) -> dict[str, Found]:
    """Every kind in turn, `rounds` times after one that warms up."""
    denoiser, special, layout, prompts = subject(args)
    canvas = Canvas.from_prompt(prompts, args.tokens, special).to(next(denoiser.parameters()).device)
    process = MaskedDiffusion(denoiser.mask_token_id or 0)
    out = {name: Found() for name in KINDS}
    for n in range(args.rounds + 1):
        for name, kind in KINDS.items():
            counted, block = Counted(denoiser), None if name == "no blocks" else args.block
            start = time.perf_counter()
            states = [canvas.ids]
            for step in denoise(
                counted, process, canvas, steps=steps_of_a_block(canvas, layout, block, args.steps),
                policy=policy_from_name(args.policy), draw=Draw(args.temperature), layout=layout, block=block,
                cache=kind and kind(denoiser.new_cache()),
            ):  # fmt: skip
                states.append(step.ids)
            found = out[name]
            found.tokens = states[-1][canvas.editable].view(args.batch, -1).cpu()  # waits for a GPU too
            if n:
                found.seconds.append(time.perf_counter() - start)
            elif args.temperature == 0:
                found.choices = confirmed(denoiser, layout, canvas, states)
            found.rows, found.forwards = counted.rows, counted.forwards
    return out


@torch.no_grad()
def confirmed(denoiser: HFDenoiser, layout: Full, canvas: Canvas, states: list[Tensor]) -> float:
    """The share of tokens, over the steps from each canvas to the next, that the model without a cache prefers."""
    same = count = 0
    for before, after in pairwise(states):
        new = before != after
        best = denoiser(layout.decoding_rows(before, canvas.valid, new)).argmax(-1)
        same, count = same + int((best == after[new]).sum()), count + len(best)
    return same / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    for name, default in (("prompt", 64), ("tokens", 256), ("block", 32), ("steps", 256), ("batch", 1), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--policy", default="confidence")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    found = measure(args)
    base = found["uncached"]
    assert base.tokens is not None
    result: dict[str, Any] = {"machine": describe(), "settings": vars(args), "kinds": {}}
    print(f"{'':<10} {'forwards':>8} {'rows':>9} {'tokens/s':>9} {'speed':>6} {'whole text':>10} {'choices':>8}")
    for name, one in found.items():
        assert one.tokens is not None
        ratio = statistics.median(b / a for a, b in zip(one.seconds, base.seconds, strict=True))
        choices = "-" if one.choices is None else f"{one.choices:.1%}"
        rate, same = one.tokens.numel() / statistics.median(one.seconds), agreement(base.tokens, one.tokens)
        print(f"{name:<10} {one.forwards:>8} {one.rows:>9} {rate:>9.1f} {ratio:>5.2f}x {same:>10.1%} {choices:>8}")
        result["kinds"][name] = {
            "forwards": one.forwards, "rows": one.rows, "seconds": one.seconds, "speed": ratio, "agreement": same,
            "choices": one.choices,
        }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
