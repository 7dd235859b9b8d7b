"""Text in, text out: completions over the one loop. Holes are filled in infill.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..denoiser import HFDenoiser
from ..model import Model as Opened
from ..process import MaskedDiffusion
from ..schedule import schedule_from_name
from ..tokenizer import SpecialTokens, decode, encode, special_tokens
from .caches import BLOCK
from .canvas import Canvas
from .draw import Draw
from .end import EndOfText
from .fill import Model, Watch, completions, filled, given_ids, seeds_of, unmask
from .policies import Policy
from .step import Step


def generate(
    model: Model,
    prompt: str | Sequence[str],
    *,
    max_tokens: int = 32,
    steps: int | None = None,
    policy: str | Policy = "confidence",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    block: int | None = None,
    cache: Literal["none", "prefix", "dual"] = "none",
    guidance: float | None = None,
    watch: Watch | None = None,
) -> str | list[str]:
    """Complete a prompt (or several at once, of any lengths); returns the new text only.

    The whole completion of `max_tokens` tokens is denoised together, or block after block where the checkpoint was
    trained so (or `block` says so); it ends before the first end-of-text token and before the first of the `stop`
    strings. A text whose end is reached costs no further forward. Greedy unless a temperature is given: in confidence
    order that is the usual choice for conditional text. `steps` defaults to one token a step; with blocks they are
    dealt out evenly, each block getting at least one.

    cache "prefix" or "dual" (caches.py) computes fewer rows for a checkpoint with full attention, and approximately;
    `block` is then 32 unless given. A checkpoint of the block layout always uses its own cache, which is exact.

    guidance: the scale of classifier-free guidance by the prompt (guidance.py), 1 being none; two forwards a step, full
    attention, no cache.

    Raises:
        ValueError: prompt and completion are longer than the model was trained on, the prompt holds the mask token, or
            the cache or the guidance is not for this checkpoint.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    special = special_tokens(model.tokenizer)
    encoded = [given_ids(model, encode(model.tokenizer, text)) for text in prompts]
    canvas = completions(encoded, max_tokens, special, model.layout, int(model.config["trained_length"]))
    canvas = canvas.to(model.device)
    if block is None and cache != "none":
        block = BLOCK
    made = unmask(
        model, canvas, steps=max_tokens if steps is None else steps, tokens=max_tokens, policy=policy,
        draw=Draw(temperature, top_k, top_p), seeds=seeds_of(seed, len(prompts)),
        end=EndOfText((special.eos, special.bos)), block=block, cache=cache, guidance=guidance,
    )  # fmt: skip
    ids = filled(canvas, made, watch)
    texts = []
    for given, row in zip(encoded, ids.tolist(), strict=True):
        new = row[1 + len(given) : 1 + len(given) + max_tokens]
        texts.append(_ended(model, given, new, special, [stop] if isinstance(stop, str) else stop))
    return texts[0] if isinstance(prompt, str) else texts


def generate_ids(
    model: Any,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_tokens: int | None = None,
    max_new_tokens: int | None = None,
    generation_config: Any = None,
    steps: int | None = None,
    policy: str | Policy = "confidence",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    **unused: Any,
) -> Tensor:
    """Completion for plain transformers users (custom_generate): (B, L) ids in, (B, L + max_tokens) ids out.

    Prompts of unequal lengths are padded, on either side, and `attention_mask` says where. The number of new tokens is
    max_tokens, max_new_tokens, generation_config.max_new_tokens or 32. Greedy unless a temperature is given. As in
    transformers, what follows an end-of-text token is that token (not so under `Remask`).
    """
    diffusion = getattr(model.config, "diffusion", None)
    if diffusion is None:
        raise ValueError("this model is no diffusion checkpoint: its config has no `diffusion` entry")
    bos, mask = model.config.bos_token_id, model.config.mask_token_id
    ends = model.config.eos_token_id
    ends = tuple(ends) if isinstance(ends, list) else (ends,)
    eos = ends[0]
    special = SpecialTokens(eos if bos is None else bos, eos, eos, mask)
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = [row[keep].tolist() for row, keep in zip(input_ids, valid.bool(), strict=True)]
    prompts = [row[1:] if row[:1] == [special.bos] else row for row in rows]
    asked = (max_tokens, max_new_tokens, getattr(generation_config, "max_new_tokens", None), 32)
    count = next(n for n in asked if n is not None)
    denoiser = HFDenoiser(model.eval(), mask, mask_row_added=bool(diffusion.get("mask_row_added", True)))
    process = MaskedDiffusion(mask, schedule_from_name(diffusion["schedule"]), diffusion["t_min"])
    own = Opened(denoiser, None, process, diffusion, "custom_generate")
    canvas = completions(prompts, count, special, own.layout, int(diffusion["trained_length"])).to(input_ids.device)
    made = unmask(
        own, canvas, steps=count if steps is None else steps, tokens=count, policy=policy,
        draw=Draw(temperature, top_k, top_p), seeds=range(seed, seed + len(rows)), end=EndOfText(ends),
    )  # fmt: skip
    ids = filled(canvas, made)
    new = [row[1 + len(prompt) : 1 + len(prompt) + count] for row, prompt in zip(ids, prompts, strict=True)]
    return torch.cat([input_ids, torch.stack(new)], 1)


def _ended(model: Model, given: list[int], new: list[int], special: SpecialTokens, stop: Sequence[str]) -> str:
    """Text of the new tokens up to the first end-of-text token or stop string."""
    for end in (special.eos, special.bos):
        if end in new:
            new = new[: new.index(end)]
    before = decode(model.tokenizer, given)
    whole = decode(model.tokenizer, given + new)
    text = whole[len(before) :] if whole.startswith(before) else decode(model.tokenizer, new)
    cuts = [text.index(word) for word in stop if word and word in text]
    return text[: min(cuts)] if cuts else text


def pieces_for_view(model: Model, canvas: Canvas, step: Step, sample: int = 0) -> list[tuple[str, str]]:
    """(text, state) of one sample for `render.DenoisingView`: given, held, new or masked."""
    out = []
    ids, new = step.ids[sample].tolist(), step.revealed[sample].tolist()
    editable, valid = canvas.editable[sample].tolist(), canvas.valid[sample].tolist()
    mask = model.process.mask_token_id
    end = sum(valid)
    for i, text in enumerate(_texts(model, ids[1:end]), 1):
        state = "masked" if ids[i] == mask else "new" if new[i] else "held" if editable[i] else "given"
        out.append(("" if state == "masked" else text, state))
    return out


def _texts(model: Model, ids: list[int]) -> list[str]:
    """What each token adds to the text of those before it; a character of several tokens stands at its last one."""
    texts = []
    context, start = 0, 0  # the first token of the last text, and the first that is not shown yet
    for i in range(len(ids)):
        before, text = decode(model.tokenizer, ids[context:start]), decode(model.tokenizer, ids[context : i + 1])
        text = text[len(before) :] if text.startswith(before) else decode(model.tokenizer, ids[start : i + 1])
        ends = i + 1 == len(ids) or ids[i + 1] == model.process.mask_token_id
        if text.endswith("\ufffd") and not ends and i - start < 3:  # a character has at most 4 bytes
            texts.append("")
        else:
            texts.append(text)
            context, start = start, i + 1
    return texts
