"""Verbs that write text: generate, infill."""

from __future__ import annotations

import sys
from typing import Literal

from .flags import Drawing, Opening, PromptText, Reference, Watching, print_json


def generate(
    model: Reference,
    prompt: PromptText,
    /,
    *,
    max_tokens: int = 32,
    stop: tuple[str, ...] = (),
    block: int | None = None,
    cache: Literal["none", "prefix", "dual"] = "none",
    guidance: float | None = None,
    watch: bool = False,
    json: bool = False,
    drawing: Drawing,
    opening: Opening,
) -> None:
    """Complete a prompt with a diffusion model.

    Example: diffulm generate runs/demo/model "The with statement" --max-tokens 24 --watch

    Args:
        model: Diffusion checkpoint: a folder or Hub id.
        prompt: Text to go on from ("-": read it from standard input).
        max_tokens: Tokens denoised together; the text ends at the first end-of-text token.
        stop: Strings before which the text ends.
        block: Tokens filled together, block after block (default: the checkpoint's own; with a cache, 32).
        cache: prefix or dual keep what stands outside the block, approximately (full attention); none: exact.
        guidance: Scale of guidance by the prompt: 1 is none, more follows it closer, at two forwards a step (full
            attention, no cache).
        watch: Show the denoising (on stderr).
        json: Print JSON.
    """
    from ..sampling import generate as job

    loaded = opening.open(model)
    prompt = sys.stdin.read() if prompt == "-" else prompt
    with Watching(loaded, watch) as view:
        text = job(
            loaded, prompt, max_tokens=max_tokens, stop=stop, block=block, cache=cache, guidance=guidance, watch=view,
            **drawing.arguments(),
        )  # fmt: skip
    assert isinstance(text, str)
    if json:
        print_json({"prompt": prompt, "text": text})
    else:
        print(prompt + text)


def infill(
    model: Reference,
    text: PromptText,
    /,
    *,
    length: int | Literal["auto"] = 8,
    max_length: int = 16,
    must: tuple[str, ...] = (),
    must_not: tuple[str, ...] = (),
    block: int | None = None,
    cache: Literal["none", "prefix", "dual"] = "none",
    guidance: float | None = None,
    watch: bool = False,
    json: bool = False,
    drawing: Drawing,
    opening: Opening,
) -> None:
    """Fill the holes of a text: each <hole> takes --length tokens, <hole:N> takes N, <hole:auto> as many as fit best.

    Example: diffulm infill runs/full/model "def add(a, b):<hole:6> + b" --watch

    Args:
        model: Diffusion checkpoint: a folder or Hub id.
        text: Text with holes ("-": read it from standard input).
        length: Tokens of a hole that names no number; auto searches 1 to --max-length for the likeliest fill.
        max_length: Most tokens of a hole whose length is searched.
        must: Words that have to occur in a fill; they are put where the model finds them likeliest.
        must_not: Words that no fill may hold.
        block: Tokens filled together, block after block (default: all holes at once; with a cache, 32).
        cache: prefix or dual keep what stands outside the block, approximately (full attention); none: exact.
        guidance: Scale of guidance by the given text: 1 is none, more follows it closer, at two forwards a step (full
            attention, no cache).
        watch: Show the denoising (on stderr).
        json: Print JSON.
    """
    from ..sampling import infill as job

    loaded = opening.open(model)
    text = sys.stdin.read() if text == "-" else text
    with Watching(loaded, watch) as view:
        filled = job(
            loaded, text, length=length, max_length=max_length, must=must, must_not=must_not, block=block, cache=cache,
            guidance=guidance, watch=view, **drawing.arguments(),
        )  # fmt: skip
    if json:
        print_json({
            "text": str(filled), "fills": list(filled.fills), "lengths": list(filled.lengths),
            "forwards": filled.forwards,
        })  # fmt: skip
    else:
        print(filled)
