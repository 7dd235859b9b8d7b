"""A model and a canvas: what a loaded checkpoint's process, layout and caches make of the one loop.

All that writes text goes through `unmask`: completions, holes, chat, evaluation, benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..denoiser import HFDenoiser
from ..layout import Block, Denoiser, Layout
from ..process import MaskedDiffusion
from ..tokenizer import SpecialTokens
from .caches import BlockCache, Caching, DualCache, PrefixCache
from .canvas import Canvas
from .constraints import Bans
from .denoise import denoise, regions
from .draw import Draw
from .end import EndOfText
from .guidance import EverySample, Guided
from .names import policy_from_name
from .policies import Policy
from .step import Step


class Model(Protocol):
    """What text needs of a loaded model; `hub.load` gives one."""

    @property
    def denoiser(self) -> Denoiser: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def process(self) -> MaskedDiffusion: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def device(self) -> torch.device: ...


Watch = Callable[[Canvas, Step], None]


def unmask(
    model: Model,
    canvas: Canvas,
    *,
    steps: int,
    policy: str | Policy,
    draw: Draw,
    seeds: Sequence[int],
    tokens: int | None = None,
    end: EndOfText | None = None,
    block: int | None = None,
    cache: str | None = "none",
    banned: Bans | None = None,
    guidance: float | None = None,
) -> Iterator[Step]:
    """The steps in which a model fills a canvas: the one loop under the checkpoint's own process, layout and cache.

    Args:
        steps: forwards that `tokens` tokens (default: all of the canvas) may take; blocks get their shares.
        seeds: one per sample.
        cache: "none" (a block checkpoint still uses its exact one), "prefix", "dual"; None: not even that.
        guidance: scale of classifier-free guidance by what the canvas gives (guidance.py).

    Raises, before the first step is asked for:
        ValueError: the canvas is longer than the model was trained on, or a cache or guidance is not for it.
    """
    check_length(canvas.ids.shape[1], int(model.config["trained_length"]))
    denoiser: Denoiser = model.denoiser
    kept = None if cache is None else caching_from_name(cache, denoiser, model.layout)
    if guidance is not None:
        EverySample().check(model.layout)
        if kept is not None:
            raise ValueError("guidance cannot decode from a cache; use cache none, or leave the guidance out")
        denoiser = Guided.by_canvas(denoiser, guidance, model.process.mask_token_id, canvas)
        kept = EverySample()
    return denoise(
        denoiser, model.process, canvas, steps=steps_of_a_block(canvas, model.layout, block, steps, tokens),
        policy=policy_from_name(policy) if isinstance(policy, str) else policy, draw=draw, layout=model.layout,
        cache=kept, seeds=seeds, end=end, block=block, banned=banned,
    )  # fmt: skip


def filled(canvas: Canvas, steps: Iterator[Step], watch: Watch | None = None) -> Tensor:
    """Tokens of a canvas after all steps, (B, L); `watch` sees each of them."""
    ids = canvas.ids
    for step in steps:
        ids = step.ids
        if watch is not None:
            watch(canvas, step)
    return ids


def seeds_of(seed: int, samples: int) -> list[int]:
    """A seed for each sample of a batch."""
    return [seed * 1_000_003 + b for b in range(samples)]


def completions(
    prompts: Sequence[Sequence[int]], max_tokens: int, special: SpecialTokens, layout: Layout, limit: int
) -> Canvas:
    """The canvas of completions; in a block layout each sample ends with a whole block, where `limit` allows.

    A block cut short by the canvas is one that training shows only at the end of a text, so it would invite that end.
    ValueError, before anything is built, when prompt and completion have more than `limit` tokens.
    """
    check_length(1 + max(map(len, prompts), default=0) + max_tokens, limit)
    canvas = Canvas.from_prompt(prompts, max_tokens, special)  # checks its arguments
    if not isinstance(layout, Block):
        return canvas
    ends = [1 + len(prompt) + max_tokens for prompt in prompts]
    whole = [max(end, min(limit, -(-end // layout.size) * layout.size)) for end in ends]
    return Canvas.from_holes([[*p, *[None] * (n - 1 - len(p))] for p, n in zip(prompts, whole, strict=True)], special)


def steps_of_a_block(canvas: Canvas, layout: Layout, block: int | None, steps: int, tokens: int | None = None) -> int:
    """Steps of each block that deal out `steps` over `tokens` (default: those of the canvas to fill) by tokens, rounded
    up for the largest block.

    A smaller block takes no more steps than it has tokens: as many steps as tokens are one token a step in each.
    """
    size = block or getattr(layout, "size", None)
    if size is None:
        return steps
    largest = max((int(r.sum(1).max()) for r in regions(canvas.editable, size)), default=1)
    tokens = int(canvas.editable.sum(1).max()) if tokens is None else tokens
    return -(-steps * largest // max(1, tokens))


def caching_from_name(name: str, denoiser: Denoiser, layout: Layout) -> Caching | None:
    """What forwards keep: the block layout its exact cache, "prefix" and "dual" an approximate one, "none" nothing.

    ValueError for another name, a layout that has an exact cache, or a denoiser that keeps no keys and values.
    """
    kinds: dict[str, Callable[[Any], Caching]] = {"prefix": PrefixCache, "dual": DualCache}
    if name != "none" and name not in kinds:
        raise ValueError(f"unknown cache {name!r}: use none, prefix or dual")
    if not isinstance(denoiser, HFDenoiser):
        if name != "none":
            raise ValueError("this denoiser keeps no keys and values; decode with cache none")
        return None
    if name == "none":
        return BlockCache(denoiser.new_cache()) if isinstance(layout, Block) else None
    chosen = kinds[name](denoiser.new_cache())
    chosen.check(layout)
    return chosen


def check_length(length: int, limit: int) -> None:
    """ValueError when a canvas of `length` tokens, start token included, is longer than the trained length `limit`."""
    if length > limit:
        raise ValueError(
            f"the canvas has {length} tokens with its start token, the model was trained on {limit}; "
            "shorten the text or the holes"
        )


def given_ids(model: Model, ids: list[int]) -> list[int]:
    """The tokens of given text; ValueError when the mask token is one of them."""
    if model.process.mask_token_id in ids:
        raise ValueError(
            f"the text holds the mask token {model.tokenizer.mask_token!r} itself; remove it, or mark holes with <hole>"
        )
    return ids
