"""The parent's own way to write: from left to right, its keys and values kept, several prompts together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import hub
from ..denoiser import Cache, HFDenoiser
from ..layout import Causal
from ..rows import Held
from ..runtime import uniforms
from ..sampling import Draw
from ..tokenizer import decode, encode, special_tokens

#: finished(sample, its new tokens): nothing after them is wanted.
Finished = Callable[[int, list[int]], bool]


@torch.no_grad()
def continue_ids(
    denoiser: HFDenoiser,
    contexts: Sequence[Sequence[int]],
    caps: Sequence[int],
    *,
    draw: Draw,
    seeds: Sequence[int],
    finished: Finished = lambda sample, new: False,
    pad: int = 0,
    device: torch.device | str = "cpu",
) -> list[list[int]]:
    """At most `caps` new tokens for each context (start token included), each by itself the same as beside the others.

    A sample is done, and leaves the batch, at its cap or when `finished` says so. Randomness is one seeded uniform per
    (sample, token), so a text depends neither on its neighbours nor on its place.
    """
    new: list[list[int]] = [[] for _ in contexts]
    active = [b for b in range(len(contexts)) if caps[b] > 0]
    cache = denoiser.new_cache()
    while active:
        texts = [[*contexts[b], *new[b]] for b in active]
        width = max(map(len, texts))
        # One column more than the longest text: the token that is wanted.
        ids_BL = torch.full((len(texts), width + 1), pad)
        length_B = torch.tensor([len(text) for text in texts])
        for row, text in zip(ids_BL, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        at_L = torch.arange(width + 1)
        rows = Causal().decoding_rows(ids_BL, at_L < length_B[:, None], at_L == length_B[:, None])
        if cache.held is None:
            rows = replace(rows, keep=width + 1)
        else:
            rows = replace(rows.window(length_B - 1, 1), keep=1)
        log_probs = denoiser(rows.to(device), cache=cache).log_softmax(-1)
        point = torch.tensor([uniforms(seeds[b], len(new[b]), purpose="token", n=1)[0] for b in active])
        for b, token in zip(active, draw(log_probs, point.to(log_probs.device)).tolist(), strict=True):
            new[b].append(token)
        left = [i for i, b in enumerate(active) if len(new[b]) < caps[b] and not finished(b, new[b])]
        if len(left) < len(active):
            active = [active[i] for i in left]
            _keep(cache, left, device)
    return new


def _keep(cache: Cache, samples: Sequence[int], device: torch.device | str) -> None:
    """Forget the samples that are done."""
    chosen = torch.tensor(list(samples), dtype=torch.long, device=device)
    if cache.held is not None and len(chosen):
        fields = (getattr(cache.held, name)[chosen] for name in ("position", "stream", "block", "document", "valid"))
        cache.held = Held(*fields)
        cache.keys_and_values.batch_select_indices(chosen)


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompt: str, max_tokens: int, *, ends: Sequence[int] = ()) -> str:
    """The parent's most probable continuation, token by token, through transformers (any family), up to an
    end-of-text or start token or one of `ends`.
    """
    special = special_tokens(tokenizer)
    stops = {special.eos, special.bos, *ends}
    ids = torch.tensor([[special.bos, *encode(tokenizer, prompt)]], device=model.device)
    with hub.quiet_transformers():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=special.pad,
            eos_token_id=sorted(stops),
        )
    new = out[0, ids.shape[1] :].tolist()
    return decode(tokenizer, new[: next((i for i, token in enumerate(new) if token in stops), len(new))])
