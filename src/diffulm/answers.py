"""Measures of a chat model: the bound on held-out answers, answers to prompts and held-out questions, a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data.chat import Answers
from .eval.estimate import Request, Scorer
from .eval.likelihood import ratio_stderr
from .hub import Model
from .layout import Denoiser, Layout
from .process import MaskedDiffusion
from .runtime import write_atomic
from .sampling import Draw, EndOfText
from .sampling.chat import Chat
from .sampling.text import caching_from_name, completions, run
from .tokenizer import SpecialTokens, decode, special_tokens

#: Bins of the histogram of where answers end.
BINS = 8


@dataclass(frozen=True)
class Answered:
    """A question with its answer: token ids, the conversation they are of, UTF-8 bytes of the answer."""

    request: Request
    conversation: tuple[int, int]
    size: int


def pick_heldout(stores: Sequence[Answers], special: SpecialTokens, length: int, limit: int) -> list[Answered]:
    """At most `limit` answers that fit a window of `length` tokens, an equal share of each store: the first of every
    conversation before a second of any. ValueError when there is none.
    """
    share = -(-limit // len(stores))
    picked: list[Answered] = []
    for number, held in enumerate(stores):
        turns: dict[int, int] = {}
        ranked = []
        for i in range(len(held)):
            context, answer = held.pair(i)
            owner = int(held.conversation[i])
            if 1 + len(context) + len(answer) <= length:
                request = Request((special.bos, *context.tolist()), tuple(answer.tolist()))
                turns[owner] = turns.get(owner, 0) + 1
                ranked.append((turns[owner], i, Answered(request, (number, owner), int(held.sizes[i]))))
        picked += [entry for *_, entry in sorted(ranked, key=lambda r: r[:2])[:share]]
    if not picked:
        raise ValueError(
            "no answer is held out to measure with; give at least two conversations that fit data.length, and "
            "data.heldout_fraction above 0"
        )
    return picked[:limit]


def response_bound(
    denoiser: Denoiser,
    layout: Layout,
    process: MaskedDiffusion,
    special: SpecialTokens,
    requests: Sequence[Answered],
    *,
    length: int,
    draws: int,
    seed: int,
    skip: int | None,
    device: torch.device,
) -> dict[str, Any]:
    """The bound of -log p(answer and its end | context): nats per token and bits per byte, errors by conversation.

    The canvas ends with the answer, which tells a model that sees all of it how long the answer is: compare such
    figures with each other, and not with a parent's likelihood.

    `skip`: a reused mask token, whose natural occurrences are not scored.
    """
    scorer = Scorer(denoiser, layout, process, special, length, draws=draws, seed=seed, skip=skip, device=device)
    scores = [group[0] for group in scorer.scores([(str(i), [r.request]) for i, r in enumerate(requests)])]
    nats, tokens = np.array([s.nats for s in scores]), np.array([float(s.tokens) for s in scores])
    owners = np.unique(np.array([r.conversation for r in requests]), axis=0, return_inverse=True)[1].reshape(-1)
    return {
        "nats": float(nats.sum()), "tokens": int(tokens.sum()), "nats_per_token": float(nats.sum() / tokens.sum()),
        "stderr_nats_per_token": ratio_stderr(nats, tokens, owners), "answers": len(requests), "draws": draws,
        "bits_per_byte": float(nats.sum() / np.log(2) / max(1, sum(r.size for r in requests))),
    }  # fmt: skip


def answer_prompts(model: Model, prompts: Sequence[str], max_tokens: int, steps: int) -> list[dict[str, str]]:
    """Greedy answers to user messages, each a conversation of its own."""
    chat = Chat(model, max_tokens=max_tokens, steps=steps)
    out = []
    for prompt in prompts:
        chat.reset()
        out.append({"prompt": prompt, "answer": "".join(chat.say(prompt))})
    return out


def answer_heldout(
    model: Model, questions: Sequence[Answered], length: int, max_tokens: int, steps: int
) -> list[dict[str, Any]]:
    """Greedy answers to held-out questions: the text, the true one, and where each ends, tokens."""
    special = special_tokens(model.tokenizer)
    out = []
    for question in questions:
        context, truth = list(question.request.context[1:]), list(question.request.continuation)
        room = min(max_tokens, length - 1 - len(context))
        canvas = completions([context], room, special, model.layout, length).to(model.device)
        ends = (truth[-1], special.eos, special.bos)
        cache = caching_from_name("none", model.denoiser, model.layout)
        end_of_text = EndOfText(ends)
        ids = run(model, canvas, steps, "confidence", Draw(0.0), 0, None, end_of_text, cache=cache, tokens=room)
        new = ids[0, 1 + len(context) :][:room].tolist()
        end = next((i for i, token in enumerate(new) if token in ends), len(new))
        texts = decode(model.tokenizer, new[:end]), decode(model.tokenizer, truth[:-1])
        out.append(
            {"question": decode(model.tokenizer, context), "answer": texts[0], "truth": texts[1], "end": end,
             "true_end": len(truth) - 1, "room": room, "exact": same(*texts)}
        )  # fmt: skip
    return out


def same(answer: str, truth: str) -> bool:
    """Exact match: of what stands behind the last #### where the truth has one (GSM8K), else of the whole."""
    if "####" in truth:
        truth = truth.rpartition("####")[2]
        answer = answer.rpartition("####")[2] if "####" in answer else ""
        answer, truth = answer.replace(",", ""), truth.replace(",", "")
    return answer.strip() == truth.strip()


def histogram(rows: Sequence[dict[str, Any]], key: str) -> list[int]:
    """How many answers end in each eighth of their room; those that do not end are in the last."""
    out = [0] * BINS
    for row in rows:
        out[min(BINS - 1, row[key] * BINS // max(1, row["room"]))] += 1
    return out


def summary(report: dict[str, Any]) -> str:
    """The result in a few lines."""
    lines = []
    for what in ("before", "after"):
        bound = report[what]
        lines.append(
            f"{what:<6} {bound['nats_per_token']:.3f} +- {bound['stderr_nats_per_token']:.3f} nats/token, "
            f"{bound['bits_per_byte']:.3f} bits/byte of {bound['answers']} held-out answers"
        )
        if rows := report["answers"][what]["heldout"]:
            lines[-1] += f"; exact {sum(r['exact'] for r in rows)} of {len(rows)}"
    return "\n".join(lines)


def write_sft_report(report: dict[str, Any], out: Path) -> None:
    """report.md and, last, report.json."""
    recipe = report["recipe"]
    parts = [
        f"# Fine-tuning: {recipe['name']}", f"`{report['command']}`" if report["command"] else "",
        "The bound is of -log p(answer and its end | what stands before it) on a canvas that ends with the answer (its "
        "length is given), by complementary masks.",
        "| | nats per token | bits per byte |\n|---|---|---|\n" + "\n".join(
            f"| {what} | {report[what]['nats_per_token']:.3f} +- {report[what]['stderr_nats_per_token']:.3f} | "
            f"{report[what]['bits_per_byte']:.3f} |" for what in ("before", "after")
        ),
        f"{report['after']['answers']} held-out answers, {report['after']['tokens']:,} tokens; {len(report['train'])} "
        f"steps of {recipe['train']['batch']} sequences of {recipe['data']['length']} tokens, {report['dtype']}.",
    ]  # fmt: skip
    for name, count in report["data"].items():
        parts.append(
            f"{name}: {count['train']['answers']:,} answers to train on ({count['train']['answer_tokens']:,} tokens), "
            f"{count['heldout']['answers']:,} held out, {count['bad']} bad rows left out."
        )
    answered = report["answers"]
    if rows := answered["after"]["heldout"]:
        exact = [sum(row["exact"] for row in answered[what]["heldout"]) for what in ("before", "after")]
        parts.append(
            f"## Held-out questions\n\nExact: {exact[0]} before, {exact[1]} after, of {len(rows)}. How many answers "
            "end in each eighth of their room (the last: or never):"
        )
        ends = ("truth", rows, "true_end"), ("before", answered["before"]["heldout"], "end"), ("after", rows, "end")
        table = [" | ".join(["", *(str(i + 1) for i in range(BINS))]), "---|" * (BINS + 1)]
        table += [" | ".join([label, *map(str, histogram(found, key))]) for label, found, key in ends]
        parts.append("\n".join(f"|{line}" for line in table))
    if answered["after"]["prompts"]:
        parts.append("## Answers, whole")
        for before, after in zip(answered["before"]["prompts"], answered["after"]["prompts"], strict=True):
            parts.append(f"**{before['prompt']}**")
            parts += [f"{what}:\n\n{_quoted(row['answer'])}" for what, row in (("before", before), ("after", after))]
    write_atomic(out / "report.md", "\n\n".join(part for part in parts if part) + "\n")
    write_atomic(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False))


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}" for line in (text or "(nothing)").split("\n"))
