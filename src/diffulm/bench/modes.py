"""The ways of generating that are set side by side: the AR parent's, the released samplers', ours.

Each is a function of a job that returns new tokens (B, n) and tells the meter when its first tokens stand. What it
cannot do on a checkpoint it refuses with a ValueError, which becomes the reason in the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..denoiser import HFDenoiser
from ..hub import Model
from ..layout import Block
from ..sampling import Canvas, Draw, EndOfText
from ..sampling.caches import BLOCK
from ..sampling.fill import completions, seeds_of, unmask
from ..tokenizer import special_tokens
from .baselines import generate_cached, sample_random_order, sample_top_k
from .meter import Meter

#: Tokens that prompt look-up guesses from earlier text (transformers' own example).
LOOK_UP = 10


@dataclass(frozen=True)
class Job:
    """Prompts (B, P) int64, each with its start token; new tokens wanted; seed; ids that end a text, none: nothing
    does, and every mode writes all `tokens`."""

    prompts_BP: Tensor
    tokens: int
    seed: int
    ends: tuple[int, ...] = ()

    def canvas(self, mask: int) -> Canvas:
        """The prompts, each with `tokens` masks behind it."""
        B, P = self.prompts_BP.shape
        editable_BL = (torch.arange(P + self.tokens, device=self.prompts_BP.device) >= P).expand(B, -1)
        ids_BL = torch.nn.functional.pad(self.prompts_BP, (0, self.tokens), value=mask)
        return Canvas(ids_BL, editable_BL.clone(), torch.ones_like(editable_BL))


Run = Callable[[Job, Meter], Tensor]


@dataclass(frozen=True)
class Mode:
    """A row of the table. group: what --modes chooses by; family: the curve of the plot it belongs to."""

    name: str
    group: str
    family: str
    run: Run


GROUPS = ("parent", "released", "exact", "policies", "caches")


def modes(model: Model, parent: HFDenoiser | None, draw: Draw, policies: Sequence[str]) -> list[Mode]:
    """All modes, in the order of the table. All draw alike but for what the name says."""
    one, many = "steps = tokens", "adaptive, cached"
    rows: list[tuple[str, str, str, Run]] = [
        ("AR generate", "parent", "AR parent", autoregressive(parent, draw)),
        ("AR bare loop, greedy", "parent", "AR parent", bare_loop(parent)),
        ("AR with look-up", "parent", "AR parent", autoregressive(parent, draw, look_up=LOOK_UP)),
        ("released A (random)", "released", "released samplers", released(model, draw, order="random")),
        ("released B (top-k)", "released", "released samplers", released(model, draw, order="top-k")),
        ("confidence", "exact", one, ours(model, draw, "confidence")),
        ("ancestral", "exact", one, ours(model, draw, "ancestral")),
        ("first-hitting", "exact", one, ours(model, draw, "first-hitting")),
        ("confidence, settled stop", "exact", one, ours(model, draw, "confidence", settle=True)),
        *((name, "policies", name.partition(":")[0], ours(model, draw, name)) for name in policies),
    ]
    if isinstance(model.layout, Block):
        rows.append(("confidence, no cache", "caches", one, ours(model, draw, "confidence", cache=None)))
    else:
        rows += [
            ("confidence, in blocks", "caches", one, ours(model, draw, "confidence", block=BLOCK)),
            ("confidence, prefix", "caches", one, ours(model, draw, "confidence", block=BLOCK, cache="prefix")),
            ("confidence, dual", "caches", one, ours(model, draw, "confidence", block=BLOCK, cache="dual")),
        ]
        rows += [(f"{p}, dual", "caches", many, ours(model, draw, p, block=BLOCK, cache="dual")) for p in policies[:1]]
    return [Mode(*row) for row in rows]


def ours(
    model: Model, draw: Draw, policy: str, *, block: int | None = None, cache: str | None = "none", settle: bool = False
) -> Run:
    """The denoising loop with as many steps as tokens. cache None: not even the exact one of a block checkpoint."""

    def run(job: Job, meter: Meter) -> Tensor:
        if settle and not job.ends:
            raise ValueError("nothing ends early when every mode writes all tokens; give --no-to-length")
        special, P = special_tokens(model.tokenizer), job.prompts_BP.shape[1]
        limit = int(model.config["trained_length"])
        canvas = completions(job.prompts_BP[:, 1:].tolist(), job.tokens, special, model.layout, limit).to(model.device)
        ids_BL = canvas.ids
        for step in unmask(
            model, canvas, steps=job.tokens, tokens=job.tokens, policy=policy, draw=draw, block=block, cache=cache,
            seeds=seeds_of(job.seed, len(ids_BL)), end=EndOfText(job.ends, settle) if job.ends else None,
        ):  # fmt: skip
            ids_BL = step.ids
            if math.isnan(meter.first) and bool((step.committed_upto > P).all()):
                meter.stands()
        return ids_BL[:, P : P + job.tokens]

    return run


def released(model: Model, draw: Draw, *, order: str) -> Run:
    """The released algorithm with T = tokens. The mask token is never drawn, or some texts could not be scored."""

    def run(job: Job, meter: Meter) -> Tensor:
        if getattr(model.layout, "source", None) != "previous":
            raise ValueError("the released samplers read a token from the row before it; this checkpoint does not")
        mask, P, device = model.process.mask_token_id, job.prompts_BP.shape[1], job.prompts_BP.device
        canvas = job.canvas(mask)
        meter.seen = lambda ids_BL: bool((ids_BL[:, P] != mask).all())
        settings: dict[str, Any] = {
            "steps": job.tokens, "suppress_mask": True,
            "generator": torch.Generator(device).manual_seed(job.seed),
        }  # fmt: skip
        with model.denoiser.precision.context(device.type):
            if order == "random":
                settings |= {"temperature": draw.temperature, "top_p": draw.top_p}
                out = sample_random_order(model.denoiser.model, canvas.ids, canvas.editable, mask, **settings)
            else:
                settings |= {"temperature": draw.temperature or 1.0, "greedy": draw.temperature == 0}
                out = sample_top_k(model.denoiser.model, canvas.ids, canvas.editable, mask, **settings)
        return out[:, P:]

    return run


def autoregressive(parent: HFDenoiser | None, draw: Draw, *, look_up: int | None = None) -> Run:
    """transformers' `generate` with its cache; look_up: drafts of so many tokens copied from earlier text."""

    def run(job: Job, meter: Meter) -> Tensor:
        denoiser = _given(parent)
        model: Any = denoiser.model
        device = job.prompts_BP.device
        settings: dict[str, Any] = {
            "max_new_tokens": job.tokens, "eos_token_id": list(job.ends) or None, "pad_token_id": (*job.ends, 0)[0],
            "do_sample": draw.temperature > 0, "prompt_lookup_num_tokens": look_up,
        }  # fmt: skip
        if draw.temperature > 0:
            settings |= {"temperature": draw.temperature, "top_p": draw.top_p or 1.0, "top_k": 0}
        kind = type(model.generation_config)
        model.generation_config = kind()  # else its settings fill whatever is None here
        meter.seen = lambda ids_BR: meter.forwards > 0
        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(gpus), denoiser.precision.context(device.type):
            torch.manual_seed(job.seed)
            out: Tensor = model.generate(
                job.prompts_BP, attention_mask=torch.ones_like(job.prompts_BP), generation_config=kind(**settings)
            )
        return out[:, job.prompts_BP.shape[1] :]

    return run


def bare_loop(parent: HFDenoiser | None) -> Run:
    """The least that cached greedy decoding takes (baselines.py)."""

    def run(job: Job, meter: Meter) -> Tensor:
        denoiser = _given(parent)
        meter.seen = lambda ids_BR: meter.forwards > 0
        with denoiser.precision.context(job.prompts_BP.device.type):
            out = generate_cached(denoiser.model, job.prompts_BP, job.tokens, ends=job.ends)
        return out[:, job.prompts_BP.shape[1] :]

    return run


def _given(parent: HFDenoiser | None) -> HFDenoiser:
    if parent is None:
        raise ValueError("there is no AR parent; give --parent")
    return parent
