"""How good a model's free text is, at several step counts: likelihood under a named judge beside diversity.

No figure stands alone. Text that repeats itself is likely under any judge, so a sampler that narrows its law lowers the
perplexity and the entropy together: a known way for bad samplers to look good (arXiv 2409.02908 shows it for draws in
float32). Where one setting has both lower than another, the report says so. The AR parent's own texts, drawn alike,
stand beside. The functions of token lists at the top are for benchmarks too.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from rich.table import Table as Terminal

from ..denoiser import HFDenoiser
from ..hub import Model
from ..sampling import Draw, EndOfText, policy_from_name
from ..sampling.fill import completions, unmask
from ..tokenizer import decode, encode, special_tokens
from .autoregress import continue_ids
from .estimate import Request
from .evaluate import provenance
from .likelihood import ratio_stderr
from .page import Block, Prose, Table
from .rate import Question, Rater, diffusion_scorer, parent_rater
from .scoreboard import run_blocks
from .store import Store, content_key

# ------------------------------------------------------------------------------------------------ of one list of tokens


def unigram_entropy(text: Sequence[int]) -> float:
    """Entropy of a text's own token frequencies in nats; nan for no text. It grows with length: compare equal ones."""
    share = np.array(list(Counter(text).values())) / max(1, len(text))
    return float(-(share * np.log(share)).sum()) if len(text) else math.nan


def distinct_n(text: Sequence[int], n: int) -> float:
    """Different n-grams over all n-grams of a text, in (0, 1]; nan with fewer than n tokens."""
    grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repeated_share(text: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that the text has had before, in [0, 1); nan with fewer than n tokens."""
    return 1 - distinct_n(text, n)


def longest_repeat(text: Sequence[int]) -> int:
    """Tokens of the longest stretch that occurs twice, at places that may overlap ("a a a" repeats 2)."""
    low, high = 0, max(0, len(text) - 1)
    while low < high:  # what repeats at one length repeats at every shorter one
        middle = (low + high + 1) // 2
        low, high = (middle, high) if distinct_n(text, middle) < 1 else (low, middle - 1)
    return low


# ---------------------------------------------------------------------------------------------------------- of a model


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn; the defaults are the paper's for the small model, with 64 texts as there.

    step_counts: each gives a row, from the same seeds. max_tokens: length of a text; it ends before its first
    end-of-text token. prompt_tokens: tokens of a document that serve as prompt for conditional texts.
    """

    step_counts: tuple[int, ...] = (16, 64, 256)
    samples: int = 64
    max_tokens: int = 128
    prompt_tokens: int = 16
    policy: str = "ancestral"
    temperature: float = 1.0
    top_p: float | None = 0.9
    seed: int = 0
    batch: int = 8

    def __post_init__(self) -> None:
        named = {name: getattr(self, name) for name in ("samples", "max_tokens", "prompt_tokens", "batch")}
        low = next((name for name, value in named.items() if value < 1), None)
        if low is not None:
            raise ValueError(f"{low} must be at least 1, not {named[low]}")
        if not self.step_counts or min(self.step_counts) < 1:
            raise ValueError("step counts must be numbers of steps, at least 1 each; give 16 64 256, say")
        policy_from_name(self.policy)
        Draw(self.temperature, None, self.top_p)


def judge_rater(reference: str, model: Model, *, offline: bool = False, store: Store | None = None) -> Rater:
    """An AR model by name that reads texts (the judge) or writes them (the parent), by its own tokenizer where that
    differs, behind its start token. store: keeps its scores, and the texts of `measure`."""
    child = Rater(diffusion_scorer(model, draws=1), model.tokenizer, "judge", Store() if store is None else store)
    return parent_rater(reference, child, offline=offline)


def measure(
    model: Model,
    judge: Rater,
    how: Sampling,
    *,
    judge_name: str = "judge",
    parent: Rater | None = None,
    parent_name: str = "parent",
    documents: Sequence[str] = (),
    command: str = "",
    on_progress: Callable[[str, int, int, float], None] = lambda label, done, of, left: None,
) -> dict[str, Any]:
    """Texts from nothing, and from the beginnings of documents where some are given, at every step count.

    With documents a row "text" holds what they go on with themselves, cut to the same length: the figures of human
    text under the same judge. With a parent (`judge_rater`) each kind has a row of its texts, from the same prompts, of
    as many tokens at most, drawn at the same temperature and top-p. Texts and scores are kept in the judge's store: the
    same call goes on with it. Returns settings, rows, flags and how they came about; ValueError where a text does not
    fit the model or no document is long enough.
    """
    entered, store = time.perf_counter(), judge.store
    special = special_tokens(model.tokenizer)
    starts: dict[str, list[list[int]]] = {"unconditional": [[]] * how.samples}
    rows, said = [], list[str]()
    if documents:
        ids = [encode(model.tokenizer, text, plain=True) for text in documents]
        least = how.prompt_tokens + how.max_tokens
        enough = [one[:least] for one in ids if len(one) >= least]
        long = [one for one in enough if special.mask not in one]
        if len(long) < len(enough):
            said.append(f"left out because they hold the mask token: {len(enough) - len(long):,} documents")
        if not long:
            raise ValueError(
                f"no document has {least} tokens (prompt and continuation) and no mask token among them; give longer "
                "ones, or lower max_tokens"
            )
        chosen = [long[i % len(long)] for i in range(how.samples)]
        starts["conditional"] = [one[: how.prompt_tokens] for one in chosen]
        human = long[: how.samples]
        prompts, truth = [one[: how.prompt_tokens] for one in human], [one[how.prompt_tokens :] for one in human]
        given = {"kind": "text", "by": "documents", "steps": None}
        rows.append({**given, **_figures(model.tokenizer, judge, prompts, truth)})
    last: list[int | None] = [] if parent is None else [None]  # None: by the parent
    jobs = [(kind, steps) for kind in starts for steps in (*how.step_counts, *last)]
    began = time.perf_counter()
    for done, (kind, steps) in enumerate(jobs):
        at = time.perf_counter()
        prompts, tokenizer = starts[kind], model.tokenizer
        if steps is not None:
            texts, forwards = write(model, prompts, steps, how, store)
        else:
            assert parent is not None
            prompts, tokenizer = prompts_for(parent, model, prompts, how), parent.tokenizer
            texts, forwards = write_by_parent(parent, prompts, how, store)
        cost = {"forwards": forwards / len(texts), "seconds": round(time.perf_counter() - at, 2)}
        row = {"kind": kind, "by": "parent" if steps is None else "model", "steps": steps}
        rows.append({**row, **_figures(tokenizer, judge, prompts, texts), **cost})
        left = (time.perf_counter() - began) / (done + 1) * (len(jobs) - done - 1)
        label = "the parent" if steps is None else f"{steps} steps"
        on_progress(f"{kind}, {label}", done + 1, len(jobs), left)
    settings = {
        "judge": judge_name, "samples": how.samples, "max_tokens": how.max_tokens, "policy": how.policy,
        "prompt_tokens": how.prompt_tokens, "temperature": how.temperature, "top_p": how.top_p, "seed": how.seed,
        "dtype": str(model.denoiser.precision),
    }  # fmt: skip
    return {
        "model": {"name": model.name, **model.config},
        "parent": None if parent is None else {"name": parent_name},
        "settings": settings,
        "rows": rows,
        "flags": [*said, *flags(rows)],
        **provenance(command, entered),
    }


#: (prompts, a seed for each) -> the new tokens of each text up to its end, and its forwards.
Job = Callable[[list[Sequence[int]], list[int]], list[tuple[list[int], int]]]


def write(
    model: Model, prompts: Sequence[Sequence[int]], steps: int, how: Sampling, store: Store | None = None
) -> tuple[list[list[int]], int]:
    """(new tokens of each text up to its end, forwards summed over texts); a text depends on its place and the seed,
    and comes from the store where it is known."""
    special = special_tokens(model.tokenizer)
    ends = EndOfText((special.eos, special.bos))

    def job(part: list[Sequence[int]], seeds: list[int]) -> list[tuple[list[int], int]]:
        canvas = completions(part, how.max_tokens, special, model.layout, int(model.config["trained_length"]))
        canvas = canvas.to(model.device)
        ids, forwards = canvas.ids, [0] * len(part)
        for step in unmask(
            model, canvas, steps=steps, tokens=how.max_tokens, policy=how.policy, end=ends,
            draw=Draw(how.temperature, None, how.top_p), seeds=seeds,
        ):  # fmt: skip
            ids = step.ids
            forwards = [n + took for n, took in zip(forwards, step.predicted.any(1).tolist(), strict=True)]
        rows = [row[1 + len(p) : 1 + len(p) + how.max_tokens] for row, p in zip(ids.tolist(), part, strict=True)]
        return [(_ended(row, ends.tokens), n) for row, n in zip(rows, forwards, strict=True)]

    key = Rater(diffusion_scorer(model, draws=1), model.tokenizer, "model").text_key
    return _kept(store, [key, steps, how.policy, repr(model.process), ends.tokens], prompts, how, job)


def prompts_for(parent: Rater, model: Model, prompts: Sequence[Sequence[int]], how: Sampling) -> list[list[int]]:
    """The model's prompts in the parent's tokens: as they are, or the same text where its tokenizer is another, without
    its front where that leaves no room for the text."""
    if parent.tokenizer is model.tokenizer:
        return [list(given) for given in prompts]
    room = parent.scorer.length - 1 - how.max_tokens
    ids = [parent.encode(decode(model.tokenizer, list(given))) if given else [] for given in prompts]
    return [given[max(0, len(given) - room) :] for given in ids]


def write_by_parent(
    parent: Rater, prompts: Sequence[Sequence[int]], how: Sampling, store: Store | None = None
) -> tuple[list[list[int]], int]:
    """What `write` gives, by the AR parent from left to right: a forward for each token, its end-of-text included."""
    scorer = parent.scorer
    assert isinstance(scorer.denoiser, HFDenoiser)
    denoiser, ends = scorer.denoiser, (scorer.special.eos, scorer.special.bos)

    def job(part: list[Sequence[int]], seeds: list[int]) -> list[tuple[list[int], int]]:
        written = continue_ids(
            denoiser, [(scorer.special.bos, *given) for given in part], [how.max_tokens] * len(part), seeds=seeds,
            draw=Draw(how.temperature, None, how.top_p), finished=lambda b, new: new[-1] in ends,
            pad=scorer.special.pad, device=scorer.device,
        )  # fmt: skip
        return [(_ended(new, ends), len(new)) for new in written]

    return _kept(store, [parent.text_key, ends], prompts, how, job)


def _ended(new: list[int], ends: tuple[int, ...]) -> list[int]:
    """New tokens up to the first that ends a text."""
    return new[: next((i for i, token in enumerate(new) if token in ends), len(new))]


def _kept(
    store: Store | None, who: Sequence[Any], prompts: Sequence[Sequence[int]], how: Sampling, job: Job
) -> tuple[list[list[int]], int]:
    """(each text, forwards of all) from the store, and from the job where it lacks them, `batch` at a time.

    who: what a text depends on beside its prompt, its place, the seed and the way it is drawn.
    """
    store = Store() if store is None else store
    drawn = [how.max_tokens, how.temperature, how.top_p, how.seed]
    keys = [content_key("free text", who, drawn, list(given), place) for place, given in enumerate(prompts)]
    missing = [place for place, key in enumerate(keys) if store.get(key) is None]
    for at in range(0, len(missing), how.batch):
        part = missing[at : at + how.batch]
        found = job([prompts[place] for place in part], [how.seed * 1_000_003 + place for place in part])
        store.put({
            keys[place]: {"ids": ids, "forwards": n} for place, (ids, n) in zip(part, found, strict=True)
        })  # fmt: skip
    values = [store.get(key) for key in keys]
    return [value["ids"] for value in values], sum(value["forwards"] for value in values)


def _figures(
    tokenizer: Any, judge: Rater, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Figures of texts that follow prompts: value and standard error over texts; None where there is none."""
    kept = [(list(given), list(text)) for given, text in zip(prompts, texts, strict=True) if text]
    asked = [_question(tokenizer, judge, given, text) for given, text in kept]
    scores = [rated[0] for rated, _ in judge.rate([q for q in asked if q is not None])]
    nats, tokens = np.array([s.nats for s in scores]), np.array([float(s.tokens) for s in scores])
    per_token = float(nats.sum() / tokens.sum()) if len(scores) else math.nan
    error = ratio_stderr(nats, tokens, np.arange(len(scores))) if len(scores) else math.nan
    of_text: dict[str, Callable[[Sequence[int]], float]] = {
        "entropy": unigram_entropy,
        **{f"distinct_{n}": lambda text, n=n: distinct_n(text, n) for n in (1, 2, 3)},  # type: ignore[misc]
        "repeated_4": repeated_share,
        "longest_repeat": longest_repeat,
        "tokens": len,
    }
    found = {name: _mean([figure(text) for _, text in kept]) for name, figure in of_text.items()}
    return {
        "texts": len(texts),
        "empty": len(texts) - len(kept),
        "nats_per_token": _figure(per_token, error),
        "perplexity": None if math.isnan(per_token) else math.exp(min(per_token, 700.0)),
        **found,
    }


def _question(tokenizer: Any, judge: Rater, given: list[int], text: list[int]) -> Question | None:
    """The text as the judge reads it behind its prompt, at most one window long; None where nothing is left to read."""
    before = decode(tokenizer, given) if given else ""
    whole = judge.encode(decode(tokenizer, given + text))
    prompt = judge.encode(before)
    # Tokens may straddle the edge; what differs belongs to the text.
    shared = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    new = whole[shared:][: judge.scorer.length - 1]
    return Question((Request((judge.scorer.special.bos, *whole[:shared]), tuple(new)),)) if new else None


def _mean(values: Sequence[float]) -> dict[str, float | None] | None:
    known = np.array([v for v in values if not math.isnan(v)], dtype=float)
    if not len(known):
        return None
    return _figure(float(known.mean()), float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else None)


def _figure(value: float, error: float | None) -> dict[str, float | None] | None:
    if math.isnan(value):
        return None
    return {"value": value, "stderr": None if error is None or math.isnan(error) else error}


# ------------------------------------------------------------------------------------------------------------ the trick


def suspicious(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether `row` looks better than `other` by saying less: lower perplexity, and entropy lower by two standard
    errors of the difference (by anything where there are none)."""
    pairs = [(side["nats_per_token"], side["entropy"]) for side in (row, other)]
    if any(figure is None for pair in pairs for figure in pair):
        return False
    (nats, entropy), (nats_other, entropy_other) = pairs
    doubt = 2 * math.hypot(entropy["stderr"] or 0.0, entropy_other["stderr"] or 0.0)
    return nats["value"] < nats_other["value"] and entropy["value"] < entropy_other["value"] - doubt


def flags(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for every two settings of which one has lower perplexity with lower entropy."""
    found = []
    for pair in combinations(rows, 2):
        # From nothing and from a prompt are different texts; human text is the measure of both.
        if len({row["kind"] for row in pair} - {"text"}) > 1:
            continue
        for row, other in (pair, pair[::-1]):
            if suspicious(row, other):
                found.append(
                    f"{_name(row)} has lower perplexity than {_name(other)} with lower entropy "
                    f"({row['entropy']['value']:.2f} against {other['entropy']['value']:.2f} nats): "
                    "it says less, which is no sign of better text"
                )
    return found


def _name(row: Mapping[str, Any]) -> str:
    if row["by"] == "documents":
        return "the documents' own text"
    return f"{row['kind']} text " + ("of the parent" if row["by"] == "parent" else f"in {row['steps']} steps")


# ------------------------------------------------------------------------------------------------------------ as tables

HEADER = (
    "Text", "Steps", "Forwards", "Perplexity", "Entropy, nats", "Distinct-1", "Distinct-2", "Distinct-3",
    "Repeated 4-grams", "Longest repeat", "Tokens",
)  # fmt: skip


def table_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row for each kind of text and step count."""

    def cell(figure: Mapping[str, Any] | None, digits: int) -> str:
        if figure is None:
            return "-"
        error = "" if figure["stderr"] is None else f" ± {figure['stderr']:.{digits}f}"
        return f"{figure['value']:.{digits}f}{error}"

    names = (("entropy", 2), ("distinct_1", 2), ("distinct_2", 2), ("distinct_3", 2), ("repeated_4", 3))
    return [
        (
            f"{row['kind']}, parent" if row["by"] == "parent" else row["kind"],
            "-" if row["steps"] is None else f"{row['steps']}",
            f"{row['forwards']:.1f}" if "forwards" in row else "-",
            "-" if row["perplexity"] is None else f"{row['perplexity']:.4g}",
            *(cell(row[name], digits) for name, digits in names),
            cell(row["longest_repeat"], 1), cell(row["tokens"], 1),
        )
        for row in report["rows"]
    ]  # fmt: skip


def summary(report: Mapping[str, Any]) -> list[Terminal]:
    """The table for the terminal, without standard errors; flags are printed below it by the caller."""
    table = Terminal(*HEADER, box=None, pad_edge=False)
    for row in table_rows(report):
        table.add_row(*(cell.partition(" ±")[0] for cell in row))
    return [table]


def blocks(report: Mapping[str, Any]) -> list[Block]:
    """The report as headings, sentences and tables."""
    s = report["settings"]
    said = (
        f"{s['samples']} texts of at most {s['max_tokens']} tokens, policy {s['policy']}, temperature "
        f"{s['temperature']}, top-p {s['top_p']}, seed {s['seed']}. Perplexity: of all tokens of {s['judge']}, which "
        "reads each text behind its prompt; entropy, distinct-n and repeats: of the model's own tokens, means over "
        "texts ± one standard error. They change with length: compare texts of one length."
    )
    if report["parent"]:
        said += (
            f" The parent, {report['parent']['name']}, writes as many texts from left to right behind the same "
            "prompts, of as many tokens at most, at the same temperature and top-p; figures of tokens are of its own "
            "vocabulary."
        )
    found: list[Block] = [Prose("Quality of free text", "heading"), Table(HEADER, table_rows(report)), Prose(said)]
    return [*found, *(Prose(f"Warning: {flag}.") for flag in report["flags"]), *run_blocks(report, {})]
