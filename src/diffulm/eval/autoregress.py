"""The parent's own way to write: from left to right, its keys and values kept where its family can, several prompts
together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import hub
from ..denoiser import ALIBI, Cache, HFDenoiser
from ..layout import Causal
from ..rows import Held, Rows
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
    (sample, token), so a text depends neither on its neighbours nor on its place. A family that cannot decode from a
    cache (ALiBi) computes every text anew for each token: slower, and the same texts.
    """
    new: list[list[int]] = [[] for _ in contexts]
    active = [b for b in range(len(contexts)) if caps[b] > 0]
    cache = None if denoiser.config.model_type in ALIBI else denoiser.new_cache()
    while active:
        texts = [[*contexts[b], *new[b]] for b in active]
        if cache is None:
            logits = _recomputed(denoiser, texts, pad, device)
        else:
            rows = _wanting(texts, pad)
            width = rows.ids.shape[1]
            if cache.held is None:
                rows = replace(rows, keep=width)
            else:
                rows = replace(rows.window(torch.tensor([len(text) - 1 for text in texts]), 1), keep=1)
            logits = denoiser(rows.to(device), cache=cache)
        log_probs = logits.log_softmax(-1)
        point = torch.tensor([uniforms(seeds[b], len(new[b]), purpose="token", n=1)[0] for b in active])
        for b, token in zip(active, draw(log_probs, point.to(log_probs.device)).tolist(), strict=True):
            new[b].append(token)
        left = [i for i, b in enumerate(active) if len(new[b]) < caps[b] and not finished(b, new[b])]
        if len(left) < len(active):
            active = [active[i] for i in left]
            if cache is not None:
                _keep(cache, left, device)
    return new


def _wanting(texts: Sequence[Sequence[int]], pad: int) -> Rows:
    """Rows of texts that want the token behind each: one column more than the longest has, which nothing sees."""
    ids_BL = torch.full((len(texts), max(map(len, texts)) + 1), pad)
    length_B1 = torch.tensor([[len(text)] for text in texts])
    for row, text in zip(ids_BL, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    at_L = torch.arange(ids_BL.shape[1])
    return Causal().decoding_rows(ids_BL, at_L < length_B1, at_L == length_B1)


def _recomputed(
    denoiser: HFDenoiser, texts: Sequence[Sequence[int]], pad: int, device: torch.device | str
) -> torch.Tensor:
    """(B, V) logits of the token behind each text without a cache: texts of one length together, so that no row is
    padding, of which ALiBi knows nothing."""
    same: dict[int, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        same[len(text)].append(i)
    found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    for members in same.values():
        rows = _wanting([texts[i] for i in members], pad)
        # The last column only stands for the wanted token: causal attention hides it from all others.
        rows = replace(rows, valid=torch.ones_like(rows.valid), plain=True)
        for i, row in zip(members, denoiser(rows.to(device)), strict=True):
            found[i] = row
    return torch.stack(found)


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
