"""Measures of a chat model: the bound on held-out answers, answers to prompts and held-out questions, a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data.chat import Answers
from .eval.autoregress import greedy
from .eval.estimate import Request, Scorer
from .eval.likelihood import ratio_stderr
from .eval.page import Block, Prose, Table, keep
from .eval.summary import finite
from .hub import Model, load_parent
from .layout import Denoiser, Layout
from .process import MaskedDiffusion
from .render import duration
from .sampling import Draw, EndOfText
from .sampling.chat import Chat
from .sampling.fill import completions, filled, unmask
from .template import open_turn
from .tokenizer import SpecialTokens, decode, encode, special_tokens

#: Bins of the histogram of where answers end.
BINS = 8
#: Who answers, and under what name; the parent's answers are there where someone asked for them.
SIDES = (("parent", "AR parent"), ("before", "Before"), ("after", "After"))


@dataclass(frozen=True)
class Answered:
    """A question with its answer: token ids, the conversation they are of, UTF-8 bytes of the answer."""

    request: Request
    conversation: tuple[int, int]
    size: int


def pick_heldout(stores: Sequence[Answers], special: SpecialTokens, length: int, limit: int) -> list[Answered]:
    """At most `limit` answers that fit a window of `length` tokens, an equal share of each store: the first of every
    conversation before a second of any. ValueError when there is none, with the first that is too long.
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
        if long := [held.place(int(i)) for held in stores for i in held.too_long(length)[:1]]:
            raise ValueError(
                f"no answer that is held out to measure with fits the window of {length} tokens with its context (the "
                f"first: {long[0]}); raise data.length, shorten the answers, or give more conversations"
            )
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


def answer_prompts_by_parent(
    parent: str, child: Any, prompts: Sequence[str], max_tokens: int, *, device: torch.device, dtype: torch.dtype
) -> list[dict[str, str]]:
    """The AR parent's greedy answers, from left to right, to the text that the child is given.

    Args:
        parent: model reference; ValueError where it is not on this machine: it is not fetched for this.
        child: tokenizer of the diffusion model, whose chat template is asked.
    """
    stock, tokenizer = load_parent(parent, dtype=dtype, offline=True)
    stock = stock.to(device).eval()
    out = []
    for prompt in prompts:
        turn = open_turn(child, [{"role": "user", "content": prompt}])
        end = encode(tokenizer, turn.end)
        # A template of the fine-tune's own may end answers with a token that the parent does not have.
        ends = end if len(end) == 1 else ()
        out.append({"prompt": prompt, "answer": greedy(stock, tokenizer, turn.context, max_tokens, ends=ends)})
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
        made = unmask(
            model, canvas, steps=steps, tokens=room, policy="confidence", draw=Draw(0.0), seeds=[0], end=EndOfText(ends)
        )
        new = filled(canvas, made)[0, 1 + len(context) :][:room].tolist()
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
            f"{what:<6} {_with_error(bound['nats_per_token'], bound['stderr_nats_per_token'])} nats/token, "
            f"{bound['bits_per_byte']:.3f} bits/byte of {bound['answers']} held-out answers"
        )
        if rows := report["answers"][what]["heldout"]:
            lines[-1] += f"; exact {sum(r['exact'] for r in rows)} of {len(rows)}"
    return "\n".join(lines)


def write_sft_report(report: dict[str, Any], out: Path) -> dict[str, Any]:
    """report.md, report.html and, last, report.json in the folder `out`; returns what report.json holds, in which a
    standard error that is unknown is null.
    """
    bounds = {what: dict(report[what]) for what in ("before", "after")}
    for bound in bounds.values():
        bound["stderr_nats_per_token"] = finite(bound["stderr_nats_per_token"])
    report = report | bounds
    keep(report, f"Fine-tuning: {report['recipe']['name']}", list(blocks(report)), out)
    return report


def blocks(report: Mapping[str, Any]) -> Iterator[Block]:
    """The report of a fine-tune in the order in which a person asks."""
    recipe, before, after = report["recipe"], report["before"], report["after"]
    yield Prose(
        f"A token of a held-out answer now costs at most {after['nats_per_token']:.3f} nats; it was "
        f"{before['nats_per_token']:.3f} before fine-tuning."
    )
    yield Prose("Held-out answers", "heading")
    rows = [
        (what, _with_error(bound["nats_per_token"], bound["stderr_nats_per_token"]), f"{bound['bits_per_byte']:.3f}")
        for what, bound in (("before", before), ("after", after))
    ]
    yield Table(("", "Nats per token", "Bits per byte"), rows)
    yield Prose(
        "The bound of -log p(answer and its end | what stands before it) on a canvas that ends with the answer (its "
        f"length is given), by complementary masks, {after['draws']} draws. {after['answers']} answers, "
        f"{after['tokens']:,} tokens. ± is one standard error, clustered by conversation. Lower is better."
    )
    yield from _questions(report["answers"])
    yield from _whole_answers(report["answers"], recipe["eval"])
    yield Prose("Data", "heading")
    counts = [
        (name, f"{n['train']['answers']:,}", f"{n['train']['answer_tokens']:,}", f"{n['heldout']['answers']:,}",
         f"{n['bad']:,}", f"{n['train']['left_out']:,}", f"{n['train']['cut']:,}", f"{n['heldout']['left_out']:,}")
        for name, n in report["data"].items()
    ]  # fmt: skip
    header = ("Source", "Answers to train on", "Their tokens", "Answers held out", "Bad rows left out")
    yield Table((*header, "Too long, left out", "Too long, cut", "Held out, too long"), counts)
    yield from _left_out(report["data"], recipe)
    yield Prose("What it took", "heading")
    facts = [
        ("Steps", f"{len(report['train']):,} of {recipe['train']['batch']} x {recipe['data']['length']} tokens"),
        ("Whole job", duration(report["seconds"])), ("Precision", report["dtype"]), ("Result", report["model"]),
    ]  # fmt: skip
    yield Table(("", ""), facts)
    if report["command"]:
        yield Prose(report["command"], "code")


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _left_out(data: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[Block]:
    """Where the first bad rows and the first answers that are too long stand, of the sources that have any."""
    length = recipe["data"]["length"]
    for name, count in data.items():
        if bad := [problem for problem in count["problems"] if problem not in count["too_long"]]:
            yield Prose(f"Bad rows of {name}, the first: {'; '.join(bad)}.")
        if count["too_long"]:
            among = " (among the bad rows)" if count["too_long"][0] in count["problems"] else ""
            yield Prose(
                f"Too long in {name} for a window of {length} tokens with their context{among}, the first: "
                f"{'; '.join(count['too_long'])}."
            )


def _sides(answered: Mapping[str, Any], kind: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """(name, rows) of everyone who answered prompts ("prompts") or held-out questions ("heldout")."""
    found = [(name, (answered.get(side) or {}).get(kind) or []) for side, name in SIDES]
    return [(name, rows) for name, rows in found if rows]


def _questions(answered: Mapping[str, Any]) -> Iterator[Block]:
    """Exact match on held-out questions, and where the answers to them end."""
    if not (sides := _sides(answered, "heldout")):
        return
    rows = sides[0][1]
    exact = ", ".join(f"{name} {sum(row['exact'] for row in found)}" for name, found in sides)
    yield Prose("Held-out questions", "heading")
    yield Prose(
        f"Exact, of {len(rows)}: {exact}. How many answers end in each eighth of their room (the last: or never):"
    )
    ends = [("Truth", histogram(rows, "true_end")), *((name, histogram(found, "end")) for name, found in sides)]
    header = ("Answers that end in eighth", *(str(i + 1) for i in range(BINS)))
    yield Table(header, [(name, *map(str, counts)) for name, counts in ends])


def _whole_answers(answered: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[Block]:
    """What everyone answers to the recipe's prompts."""
    if not (sides := _sides(answered, "prompts")):
        return
    yield Prose("Answers, whole", "heading")
    rows = [
        (row["prompt"], *(found[i]["answer"] or "(nothing)" for _, found in sides)) for i, row in enumerate(sides[0][1])
    ]
    yield Table(("Prompt", *(name for name, _ in sides)), rows, samples=True)
    yield Prose(
        f"Greedy, at most {settings['max_tokens']} tokens; the diffusion model in at most {settings['steps']} steps."
    )
