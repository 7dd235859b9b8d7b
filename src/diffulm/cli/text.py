"""Verbs that write text: generate, infill."""

from __future__ import annotations

import sys
from typing import Literal

from .flags import PolicyName, PromptText, Reference, Watching, print_json


def generate(
    model: Reference,
    prompt: PromptText,
    /,
    *,
    max_tokens: int = 32,
    steps: int | None = None,
    policy: PolicyName = "confidence",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: tuple[str, ...] = (),
    seed: int = 0,
    block: int | None = None,
    cache: Literal["none", "prefix", "dual"] = "none",
    guidance: float | None = None,
    watch: bool = False,
    adapter: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    offline: bool = False,
    json: bool = False,
) -> None:
    """Complete a prompt with a diffusion model.

    Example: diffulm generate runs/demo/model "The with statement" --max-tokens 24 --watch

    Args:
        model: Diffusion checkpoint: a folder or Hub id.
        prompt: Text to go on from ("-": read it from standard input).
        max_tokens: Tokens denoised together; the text ends at the first end-of-text token.
        steps: Forward passes at most (default: one per token).
        policy: confidence, entropy, margin, random, first-hitting, ancestral, threshold:TAU, threshold:TAU:leftmost,
            factor:F, entropy-bound:GAMMA, remask:ETA or remask:ETA:rescale (numbers may be left out).
        temperature: 0 is greedy.
        top_k: Draw among the k most probable tokens.
        top_p: Draw among the most probable tokens that hold this much probability.
        stop: Strings before which the text ends.
        seed: Seed of all draws.
        block: Tokens filled together, block after block (default: the checkpoint's own; with a cache, 32).
        cache: prefix or dual keep what stands outside the block, approximately (full attention); none: exact.
        guidance: Scale of guidance by the prompt: 1 is none, more follows it closer, at two forwards a step (full
            attention, no cache).
        watch: Show the denoising (on stderr).
        adapter: LoRA in peft's format to merge into the model: a folder or Hub id.
        device: cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or autocast.
        offline: Never ask the Hub.
        json: Print JSON.
    """
    from ..hub import load
    from ..sampling import generate as job

    loaded = load(model, device=device, dtype=dtype, adapter=adapter, offline=offline)
    prompt = sys.stdin.read() if prompt == "-" else prompt
    with Watching(loaded, watch) as view:
        text = job(
            loaded, prompt, max_tokens=max_tokens, steps=steps, policy=policy, temperature=temperature, top_k=top_k,
            top_p=top_p, stop=stop, seed=seed, block=block, cache=cache, guidance=guidance, watch=view,
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
    steps: int | None = None,
    policy: PolicyName = "confidence",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    guidance: float | None = None,
    watch: bool = False,
    adapter: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    offline: bool = False,
    json: bool = False,
) -> None:
    """Fill the holes of a text: each <hole> takes --length tokens, <hole:N> takes N, <hole:auto> as many as fit best.

    Example: diffulm infill runs/demo/model "def add(a, b):<hole:6> + b" --watch

    Args:
        model: Diffusion checkpoint: a folder or Hub id.
        text: Text with holes ("-": read it from standard input).
        length: Tokens of a hole that names no number; auto searches 1 to --max-length for the likeliest fill.
        max_length: Most tokens of a hole whose length is searched.
        must: Words that have to occur in a fill; they are put where the model finds them likeliest.
        must_not: Words that no fill may hold.
        steps: Forward passes at most (default: one per token).
        policy: confidence, entropy, margin, random, first-hitting, ancestral, threshold:TAU, threshold:TAU:leftmost,
            factor:F, entropy-bound:GAMMA, remask:ETA or remask:ETA:rescale (numbers may be left out).
        temperature: 0 is greedy.
        top_k: Draw among the k most probable tokens.
        top_p: Draw among the most probable tokens that hold this much probability.
        seed: Seed of all draws.
        guidance: Scale of guidance by the given text: 1 is none, more follows it closer, at two forwards a step (full
            attention).
        watch: Show the denoising (on stderr).
        adapter: LoRA in peft's format to merge into the model: a folder or Hub id.
        device: cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or autocast.
        offline: Never ask the Hub.
        json: Print JSON.
    """
    from ..hub import load
    from ..sampling import infill as job

    loaded = load(model, device=device, dtype=dtype, adapter=adapter, offline=offline)
    text = sys.stdin.read() if text == "-" else text
    with Watching(loaded, watch) as view:
        filled = job(
            loaded, text, length=length, max_length=max_length, must=must, must_not=must_not, steps=steps,
            policy=policy, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, guidance=guidance, watch=view,
        )  # fmt: skip
    if json:
        print_json({
            "text": str(filled), "fills": list(filled.fills), "lengths": list(filled.lengths),
            "forwards": filled.forwards,
        })  # fmt: skip
    else:
        print(filled)
