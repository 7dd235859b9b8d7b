"""The named opponents in sampling: the released samplers re-created in our own words, and two autoregressive loops.

`diffulm bench` times these functions beside ``diffulm``'s own. The first two follow the *structure* of the samplers of
DiffuGPT / DiffuLLaMA (arXiv 2410.17891), costs and defects included, and are nobody's text. Kept as released:

* every forward sees the whole canvas and gives logits over the whole vocabulary at all ``B * L`` positions;
* a dense ``[B, 1, L, L]`` additive mask of zeros goes with every forward, which rules the flash kernels out;
* at every step a token is drawn at every position, known and committed ones too (with top-p: a full sort of each row);
* temperature, top-p, softmax and the draw in the model's dtype, not in float64;
* the shift is undone afterwards: position 0 is put in front, the last prediction is dropped;
* always ``steps`` forwards, also when nothing is masked any more; no cache, no stop at the end of the text;
* the mask token may be drawn like any other, and then stays (``suppress_mask`` turns that off);
* the confidence sampler ranks what it has committed along with the rest (``rank`` turns that off).

Left out, because it would only slow them down: the first forward's autograd graph (released without ``no_grad``), the
printing, and ``Categorical``'s validation. The released functions drop position 0 of their result; here it stays.

Models are HF causal LMs: made bidirectional with ``config.is_causal = False`` for the samplers, as they are for the
autoregressive loops (transformers >= 5.2). All of them put the model in evaluation mode.

Shape suffixes: B batch, L length, P prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor


@torch.no_grad()
def sample_random_order(
    model: Any,
    ids_BL: Tensor,
    editable_BL: Tensor,
    mask_token_id: int,
    *,
    steps: int = 64,
    temperature: float = 0.95,
    top_p: float | None = 0.9,
    suppress_mask: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sampler A: positions in random order, in exactly ``steps`` forwards.

    The first forward sees every editable position masked. Before each later one, of t = steps - 1 .. 1, a masked
    position commits the token drawn after the previous forward with probability 1 / (t + 1): 1 / ``steps`` of all in
    each. What is left takes its token from the last forward.

    Args:
        model: bidirectional HF model.
        ids_BL: int64 canvas; what stands at editable positions does not matter.
        editable_BL: bool, True where a token is wanted; never at position 0.
        mask_token_id: id of the mask.
        steps: forwards.
        temperature: divides the logits; 0.95 is the released value for GPT-2, 0.9 for Llama.
        top_p: mass that is kept of each distribution; None keeps all.
        suppress_mask: never draw the mask token (not as released).
        generator: random numbers, on the model's device; None takes torch's own.

    Returns:
        int64 canvas with every editable position filled.

    Raises:
        ValueError: the model is causal, position 0 is editable, shapes differ, or steps or temperature is not positive.
    """
    _check_canvas(model, ids_BL, editable_BL, steps, temperature)
    model.eval()
    mask_B1LL = _zero_mask(model, ids_BL)
    masked_BL = editable_BL.clone()
    canvas_BL = ids_BL.masked_fill(masked_BL, mask_token_id)

    def propose() -> Tensor:
        tokens_BL, _ = _draw_everywhere(
            model, canvas_BL, mask_B1LL, temperature, top_p, mask_token_id if suppress_mask else None, False, generator
        )
        return torch.where(masked_BL, tokens_BL, canvas_BL)

    filled_BL = propose()
    for t in range(steps - 1, 0, -1):
        u_BL = torch.rand(canvas_BL.shape, device=canvas_BL.device, generator=generator)
        masked_BL = masked_BL & (u_BL >= 1 / (t + 1))
        canvas_BL = filled_BL.masked_fill(masked_BL, mask_token_id)
        filled_BL = propose()
    return filled_BL


@torch.no_grad()
def sample_top_k(
    model: Any,
    ids_BL: Tensor,
    editable_BL: Tensor,
    mask_token_id: int,
    *,
    steps: int = 64,
    temperature: float = 1.0,
    greedy: bool = False,
    rank: Literal["all", "masked"] = "all",
    suppress_mask: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sampler B, "top-k": the positions whose drawn token is likeliest first, in exactly ``steps`` forwards.

    Of n editable positions of a sample, floor(n * t / steps) should still be masked after step t = steps - 1 .. 1:
    those whose token, drawn after the previous forward, has the lowest log-probability. As released, committed
    positions compete with the scores of newly drawn tokens; where one of them is among the lowest, one masked position
    more is committed than planned. No top-p.

    Args:
        model, ids_BL, editable_BL, mask_token_id, steps, temperature, suppress_mask, generator: as for sampler A.
        greedy: the most probable token in place of a drawn one (released for GSM8K only).
        rank: positions that compete for staying masked: "all" editable ones as released, or only the "masked" ones,
            which keeps exactly floor(n * t / steps).

    Returns:
        int64 canvas with every editable position filled.

    Raises:
        ValueError: as for sampler A, or an unknown ``rank``.
    """
    if rank not in ("all", "masked"):
        raise ValueError(f"rank must be 'all' (as released) or 'masked', not {rank!r}")
    _check_canvas(model, ids_BL, editable_BL, steps, temperature)
    model.eval()
    mask_B1LL = _zero_mask(model, ids_BL)
    masked_BL = editable_BL.clone()
    canvas_BL = ids_BL.masked_fill(masked_BL, mask_token_id)
    wanted_B1 = editable_BL.sum(1, keepdim=True)

    def propose() -> tuple[Tensor, Tensor]:
        tokens_BL, scores_BL = _draw_everywhere(
            model, canvas_BL, mask_B1LL, temperature, None, mask_token_id if suppress_mask else None, greedy, generator
        )
        return torch.where(masked_BL, tokens_BL, canvas_BL), scores_BL

    filled_BL, scores_BL = propose()
    for t in range(steps - 1, 0, -1):
        ranked_BL = scores_BL.masked_fill(~(editable_BL if rank == "all" else masked_BL), float("inf"))
        place_BL = ranked_BL.argsort(dim=1, stable=True).argsort(dim=1)
        masked_BL = masked_BL & (place_BL < wanted_B1 * t // steps)
        canvas_BL = filled_BL.masked_fill(masked_BL, mask_token_id)
        filled_BL, scores_BL = propose()
    return filled_BL


@torch.no_grad()
def generate_recomputing(model: Any, ids_BP: Tensor, new_tokens: int) -> Tensor:
    """Greedy autoregressive decoding as a bare loop without a cache: the whole text through the model for each token.

    Every forward gives logits at all positions, of which the last row is used.

    Args:
        model: causal HF model (the parent).
        ids_BP: int64 prompts of equal length, at least one token.
        new_tokens: tokens to add; nothing ends earlier.

    Returns:
        int64 ``[B, P + new_tokens]``.

    Raises:
        ValueError: the model is bidirectional, the prompt is empty, or new_tokens is not positive.
    """
    _check_prompt(model, ids_BP, new_tokens)
    model.eval()
    for _ in range(new_tokens):
        logits_BLV = model(ids_BP, use_cache=False).logits
        ids_BP = torch.cat([ids_BP, logits_BLV[:, -1:].argmax(-1)], 1)
    return ids_BP


@torch.no_grad()
def generate_cached(model: Any, ids_BP: Tensor, new_tokens: int, *, ends: Sequence[int] = ()) -> Tensor:
    """Greedy autoregressive decoding as a bare loop with transformers' cache: the prompt once, then token by token.

    What a well-kept AR decoder does at the least: one row of logits per forward, nothing of ``generate`` around it.
    Arguments and errors as for ``generate_recomputing``, with ``ends``: ids that end a text. Once every text holds one
    the loop stops, so the result may be shorter; what a text has behind its first end is to be dropped.
    """
    _check_prompt(model, ids_BP, new_tokens)
    model.eval()
    parts, cache, fed_BP = [ids_BP], None, ids_BP
    stop, ended_B1 = torch.tensor(list(ends), device=ids_BP.device), torch.zeros_like(ids_BP[:, :1], dtype=torch.bool)
    for _ in range(new_tokens):
        out = model(fed_BP, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, fed_BP = out.past_key_values, out.logits.argmax(-1)
        parts.append(fed_BP)
        if len(stop):
            ended_B1 = ended_B1 | torch.isin(fed_BP, stop)
            if bool(ended_B1.all()):
                break
    return torch.cat(parts, 1)


def _draw_everywhere(
    model: Any,
    canvas_BL: Tensor,
    mask_B1LL: Tensor,
    temperature: float,
    top_p: float | None,
    suppressed: int | None,
    greedy: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """One forward: (token, its log-probability) for every position, the shift undone; position 0 keeps its token."""
    logits_BLV = model(canvas_BL, attention_mask=mask_B1LL, use_cache=False).logits / temperature
    if suppressed is not None:
        logits_BLV[..., suppressed] = float("-inf")
    if top_p is not None:
        logits_BLV = _nucleus(logits_BLV, top_p)
    log_probs_BLV = logits_BLV.log_softmax(-1)
    if greedy:
        scores_BL, tokens_BL = log_probs_BLV.max(-1)
    else:
        drawn_N1 = log_probs_BLV.exp().flatten(0, 1).multinomial(1, generator=generator)
        tokens_BL = drawn_N1.view(canvas_BL.shape)
        scores_BL = log_probs_BLV.gather(-1, tokens_BL[..., None])[..., 0]
    tokens_BL = torch.cat([canvas_BL[:, :1], tokens_BL[:, :-1]], 1)
    return tokens_BL, torch.cat([scores_BL[:, :1], scores_BL[:, :-1]], 1)


def _nucleus(logits_BLV: Tensor, top_p: float) -> Tensor:
    """The logits with the tail beyond ``top_p`` of the mass at -inf; the token that crosses the border stays."""
    ordered_BLV, order_BLV = logits_BLV.sort(dim=-1, descending=True)
    mass_BLV = ordered_BLV.softmax(-1).cumsum(-1)
    dropped_BLV = torch.zeros_like(mass_BLV, dtype=torch.bool)
    dropped_BLV[..., 1:] = mass_BLV[..., :-1] > top_p
    return logits_BLV.masked_fill(torch.zeros_like(dropped_BLV).scatter(-1, order_BLV, dropped_BLV), float("-inf"))


def _zero_mask(model: Any, ids_BL: Tensor) -> Tensor:
    B, L = ids_BL.shape
    return torch.zeros(B, 1, L, L, dtype=model.dtype, device=ids_BL.device)


def _check_canvas(model: Any, ids_BL: Tensor, editable_BL: Tensor, steps: int, temperature: float) -> None:
    if getattr(model.config, "is_causal", True) is not False:
        raise ValueError("the samplers need a bidirectional model; set config.is_causal = False, or convert the parent")
    if ids_BL.shape != editable_BL.shape or ids_BL.ndim != 2:
        raise ValueError(f"ids {tuple(ids_BL.shape)} and editable {tuple(editable_BL.shape)} must both be (B, L)")
    if bool(editable_BL[:, 0].any()):
        raise ValueError("position 0 is editable, but under the shift nothing predicts it; put a start token there")
    if steps < 1 or temperature <= 0:
        raise ValueError(f"steps must be at least 1 and temperature above 0, not {steps} and {temperature}")


def _check_prompt(model: Any, ids_BP: Tensor, new_tokens: int) -> None:
    if getattr(model.config, "is_causal", True) is False:
        raise ValueError("this model is bidirectional; the autoregressive loops need its parent")
    if ids_BP.ndim != 2 or not ids_BP.shape[1]:
        raise ValueError(f"prompts must be (B, P) with P >= 1, not {tuple(ids_BP.shape)}; put a start token first")
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, not {new_tokens}")
