"""The released scripts' own arithmetic (arXiv 2410.17891; HKUNLP/DiffuLLaMA at c17e897), with a switch for each defect.

Not the way to score a model (`likelihood.py`, `estimate.py` are): it is here so that scores can be compared with the
published ones under the rules that made those. Whether the published scores come out on the released weights cannot be
checked without the weights. What is checked, against plain loops on tiny models, is the arithmetic.

    field of PaperProtocol       released  what the scripts do, and the number of the defect in our list
    lambada_double_count         v1        a hit is counted twice: all LAMBADA scores of the paper's first version (1)
    leaked_steps                 unknown   LAMBADA leaves its steps (tokens of the last line's last word) and its
                                           temperature of 1 to every task after it, as main() runs them (2)
    n_plus_one                   yes       a draw that masks nothing counts as a loss of 0, so a score is scaled by the
                                           chance of a mask, n / (n + 1) for many rates: short options win (4)
    shared_noise                 no        the options of a question have masks of their own; True: the same numbers (5)
    mask_by_id                   yes       what equals the mask token counts as masked, natural occurrences in the
                                           prompt too (6)
    extra_bos                    yes       pieces are tokenised with special tokens (HellaSwag, PIQA), so a tokenizer
                                           that adds a start token puts one before the option, where it is scored (7)
    no_start                     yes       nothing but the tokenizer's own start token begins a text: none for GPT-2,
                                           none in WinoGrande, SIQA and infilling. False: ours, once
    unweighted                   yes       the mean over rates of the mean loss; False: that of 1/t times it, which the
                                           paper states and the script adds up and drops (11)
    rerank                       yes       sampler B ranks committed tokens again, by the score of a token newly drawn
                                           for them, and so commits more than planned (13)
    skip_long                    yes       code of more than 1,000 tokens is not filled and enters no score, though the
                                           data set's own scorer wants every program; False: filled like the others
    mask_may_be_drawn            yes       the mask token is an ordinary prediction, in scores and samples (16)

Without a switch: a breakpoint in WinoGrande's loop (3) and names that do not exist (8, 14) stop the scripts; the AR
baselines' length limit in characters (9) and their sums beside means (10) are those of other scripts, and our AR
baselines are capped in tokens and scored like the model; TriviaQA's script reads SQuAD, which no local file holds;
sampler B's cutoff floor(n t / T) is exact in integers here and float32 in the script, which for T = n < 60 gives other
numbers at 43 pairs (n, t), the first at n = 22;
sampler B's draw in the model's dtype without a seed (5, 17) is a seeded one in float64 here; the transformers of their
time may tidy spaces in what it decodes (it would change 19 of the 1,033 true lines of code, some into wrong ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..denoiser import HFDenoiser
from ..layout import Denoiser, Full, NoisedBatch
from ..runtime import generator, uniforms
from ..sampling import Draw
from .store import content_key

#: Score of a position that competes for nothing, above any log-probability.
NEVER = float("inf")


@dataclass(frozen=True)
class PaperProtocol:
    """Rules of a run; the defaults are those of the scripts as they stand (see the table above).

    rates: noise levels of a score, and steps of sampler B outside LAMBADA. temperature: of sampler B outside LAMBADA;
    None: what the scripts have for the model's family (`temperature_of`). seed: of masks and draws (the scripts have
    none).
    """

    lambada_double_count: bool = False
    leaked_steps: bool = False
    n_plus_one: bool = True
    shared_noise: bool = False
    mask_by_id: bool = True
    extra_bos: bool = True
    no_start: bool = True
    unweighted: bool = True
    rerank: bool = True
    skip_long: bool = True
    mask_may_be_drawn: bool = True
    rates: int = 32
    temperature: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rates < 1:
            raise ValueError(f"rates (--draws) must be at least 1, not {self.rates}")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be a positive number under the protocol, not {self.temperature}")
        if self.mask_by_id and not self.mask_may_be_drawn:
            raise ValueError(
                "mask_by_id scores natural mask tokens, which have probability 0 unless mask_may_be_drawn; "
                "switch both off or neither"
            )


def temperature_of(family: str) -> float:
    """Sampler B's temperature outside LAMBADA in the scripts, by a config's model_type: the one for DiffuLLaMA divides
    logits by 0.9, the one for DiffuGPT by 0.95, which is taken for every other family."""
    return 0.9 if family == "llama" else 0.95


def raw(denoiser: Denoiser, protocol: PaperProtocol) -> Denoiser:
    """The denoiser as the scripts use it: the mask column not suppressed (a toy is what it is)."""
    if protocol.mask_may_be_drawn and isinstance(denoiser, HFDenoiser):
        return HFDenoiser(denoiser.model, None, precision=denoiser.precision)
    return denoiser


def masked_share(tokens: int, rates: int) -> float:
    """Mean over the rates of the chance that a draw masks any of `tokens`: n / (n + 1) as the rates grow in number."""
    return 1 - sum((1 - t / rates) ** tokens for t in range(1, rates + 1)) / rates


@dataclass(frozen=True)
class Text:
    """Token ids with a stretch that is scored or written, ids[start:end]; the rest is given.

    key: seeds its noise. cut: tokens that were cut from its ends to fit the model.
    """

    ids: tuple[int, ...]
    start: int
    end: int
    key: str = ""
    cut: int = 0


def fitted(text: Text, length: int) -> Text:
    """The text without as many of its first tokens as it is too long, all but one of those before the stretch; then of
    its last. ValueError when that is not enough."""
    cut = len(text.ids) - length
    if cut <= 0:
        return text
    front = min(cut, max(0, text.start - 1))
    if cut - front > len(text.ids) - text.end:
        raise ValueError(
            f"a text of {len(text.ids)} tokens cannot be cut to the {length} the model was trained on; leave its task "
            "out, or take a model with longer windows"
        )
    ids = text.ids[front : len(text.ids) - (cut - front)]
    return Text(ids, text.start - front, text.end - front, text.key, cut)


def _key(name: str) -> int:
    return int(content_key(name), 16)


# -------------------------------------------------------------------------------------------------------------- scores


@torch.no_grad()
def losses(
    denoiser: Denoiser,
    layout: Full,
    mask_token_id: int,
    texts: Sequence[Text],
    protocol: PaperProtocol,
    *,
    budget: int = 4096,
    device: torch.device | str = "cpu",
) -> list[float]:
    """Score of each text's stretch, float64 nats: the lowest option of a question is the answer.

    For t = T..1 the tokens of the stretch are masked with probability t / T each, on their own; the score is the mean
    over t of the mean loss of the masked tokens. A text's first token is never scored under the shift.
    budget: tokens of a forward, padding included.
    """
    T = protocol.rates
    jobs = [(i, k) for i in range(len(texts)) for k in range(T)]
    jobs.sort(key=lambda job: len(texts[job[0]].ids))
    sums, counts = np.zeros((len(texts), T)), np.zeros((len(texts), T))
    at = 0
    while at < len(jobs):
        part = jobs[at : at + 1]
        while at + len(part) < len(jobs):
            longest = len(texts[jobs[at + len(part)][0]].ids)
            if (len(part) + 1) * longest > budget:
                break
            part.append(jobs[at + len(part)])
        at += len(part)
        batch = _noised(texts, part, mask_token_id, protocol, layout.offset)
        rows = layout.training_rows(batch)
        nll_N = denoiser.nll(rows.to(device)).cpu().double()
        owner_N = rows.source // batch.ids_BL.shape[1]
        total_B = torch.zeros(len(part), dtype=torch.float64).index_add_(0, owner_N, nll_N)
        for (i, k), total, n in zip(part, total_B.tolist(), batch.noised_BL.sum(1).tolist(), strict=True):
            sums[i, k], counts[i, k] = total, n
    return [_loss(text, s, c, protocol, mask_token_id, layout.offset) for text, s, c in zip(texts, sums, counts)]


def _noised(
    texts: Sequence[Text], jobs: Sequence[tuple[int, int]], mask: int, protocol: PaperProtocol, offset: int
) -> NoisedBatch:
    """One row of the batch for each (text, rate): what is masked, and in noised_BL what is scored."""
    B, L = len(jobs), max(len(texts[i].ids) for i, _ in jobs)
    x0_BL = torch.zeros(B, L, dtype=torch.long)
    valid_BL, masked_BL = torch.zeros(B, L, dtype=torch.bool), torch.zeros(B, L, dtype=torch.bool)
    for b, (i, k) in enumerate(jobs):
        text = texts[i]
        x0_BL[b, : len(text.ids)] = torch.tensor(text.ids)
        valid_BL[b, : len(text.ids)] = True
        u = uniforms(protocol.seed, _key(text.key), k, purpose="eval", n=text.end - text.start)
        masked_BL[b, text.start : text.end] = torch.from_numpy(u < (protocol.rates - k) / protocol.rates)
    ids_BL = x0_BL.masked_fill(masked_BL, mask)
    scored_BL = (ids_BL == mask) & valid_BL if protocol.mask_by_id else masked_BL.clone()
    scored_BL[:, :offset] = False
    zeros_BL = torch.zeros_like(x0_BL)
    return NoisedBatch(x0_BL, ids_BL, scored_BL, scored_BL, scored_BL.float(), zeros_BL, valid_BL, zeros_BL)


def _loss(
    text: Text, sums_T: np.ndarray, counts_T: np.ndarray, protocol: PaperProtocol, mask: int, offset: int
) -> float:
    """From the summed loss and the number of scored tokens of each rate to the score."""
    T = protocol.rates
    weight_T = np.ones(T) if protocol.unweighted else T / np.arange(T, 0, -1)
    mean = float((weight_T * sums_T / np.maximum(counts_T, 1)).sum() / T)
    n = text.end - max(text.start, offset)
    # Where a natural mask token is scored in every draw, no draw is empty.
    never_empty = n < 1 or (protocol.mask_by_id and mask in text.ids[offset:])
    return mean if protocol.n_plus_one or never_empty else mean / masked_share(n, T)


# ------------------------------------------------------------------------------------------------------------ sampler B


@torch.no_grad()
def sampler_b(
    denoiser: Denoiser,
    layout: Full,
    mask_token_id: int,
    texts: Sequence[Text],
    protocol: PaperProtocol,
    *,
    steps: int,
    temperature: float,
    device: torch.device | str = "cpu",
) -> list[list[int]]:
    """Tokens of each text's stretch in exactly `steps` forwards: the "top-k" sampler of the released trainer.

    Of n tokens, those below the floor(n t / T)-th lowest score stay masked after step t = T - 1 .. 1; a score is the
    log-probability of the drawn token. `rerank`: committed positions are scored again, by tokens drawn and thrown away,
    and take the places of masked ones among the lowest.

    Why this is no policy: a policy ranks by the predictions of masked positions, since the one loop asks for no others;
    `rerank` needs those of committed positions too. Without it, with as many steps as tokens and temperature 1, this is
    `TopConfidence("drawn")`, and draws the same tokens by the same uniforms (tests/eval/test_protocol.py).
    """
    if steps < 1:
        raise ValueError(f"sampler B needs at least one step, not {steps}")
    B, L = len(texts), max(len(text.ids) for text in texts)
    ids_BL = torch.zeros(B, L, dtype=torch.long)
    valid_BL, hole_BL = torch.zeros(B, L, dtype=torch.bool), torch.zeros(B, L, dtype=torch.bool)
    for b, text in enumerate(texts):
        ids_BL[b, : len(text.ids)] = torch.tensor(text.ids)
        valid_BL[b, : len(text.ids)] = True
        hole_BL[b, text.start : text.end] = True
    # Under the shift nothing predicts a first token: the scripts leave what stands there.
    hole_BL[:, : layout.offset] = False
    seeds = [sample_seed(protocol, text) for text in texts]
    masked_BL, wanted_B1 = hole_BL.clone(), hole_BL.sum(1, keepdim=True)
    canvas_BL = ids_BL.masked_fill(masked_BL, mask_token_id)
    for k in range(steps):
        rows = layout.decoding_rows(canvas_BL, valid_BL, hole_BL)
        log_probs_NV = denoiser(rows.to(device)).cpu().double().div(temperature).log_softmax(-1)
        u_BL = torch.from_numpy(np.stack([uniforms(seed, k, purpose="token", n=L) for seed in seeds]))
        token_N = Draw(1.0)(log_probs_NV, u_BL[hole_BL])
        score_N = log_probs_NV.gather(1, token_N[:, None])[:, 0]
        filled_BL = canvas_BL.masked_scatter(masked_BL, token_N[masked_BL[hole_BL]])
        if k + 1 == steps:
            break
        score_BL = torch.full((B, L), NEVER, dtype=torch.float64).masked_scatter(hole_BL, score_N)
        if not protocol.rerank:
            score_BL = score_BL.masked_fill(~masked_BL, NEVER)
        border_B1 = score_BL.sort(1).values.gather(1, wanted_B1 * (steps - 1 - k) // steps)
        masked_BL = masked_BL & (score_BL < border_B1)
        canvas_BL = filled_BL.masked_fill(masked_BL, mask_token_id)
    return [row[text.start : text.end] for row, text in zip(filled_BL.tolist(), texts, strict=True)]


def sample_seed(protocol: PaperProtocol, text: Text) -> int:
    """Seed of a text's draws."""
    return int(generator(protocol.seed, _key(text.key), purpose="token").integers(2**62))
