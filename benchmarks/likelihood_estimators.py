"""How many forwards a multiple-choice decision needs: our estimator against the released one and LLaDA's count form.

    python benchmarks/likelihood_estimators.py MODEL --data-dir DIR [--tasks piqa,hellaswag,arc_easy] [--limit 100]
        [--pool 16 | --reference 1024] [--repeats 20] [--seed 0] [--dtype auto] [--threads N] [--out FILE]

Each estimator decides --repeats times by fresh masks at several costs. Its *agreement* is the share of decisions that
pick the option that the reference picks (by nats, not divided by length), its *variance* that of the difference
between an option's nats and those of the first option, over the repeats. Estimators:

    released  one Bernoulli mask for each of T rates t/T, the mean cross-entropy of the masked tokens, unweighted, an
              empty mask counted as zero (arXiv 2410.17891's evaluation); times n + 1, so that lengths compare as nats
    count     LLaDA's count form: counts on a systematic grid, one random set for each
    ours      `plan_masks`: full mask once, pairs, strata, enumeration; noise shared by the options
    rounds    ours with sequential draws (confidence 0.99, 0.95, 0.9): cost is the mean over options

The marks are the released estimator's agreement and variance at 32 draws; `ratio` is 32 over the sequences per option
at which an estimator reaches a mark (log-linear between its costs), by tokens of the longest option. All see the same
documents.

A forward of a large model on a small machine costs too much to be spent anew for each estimator, so every mask's nats
are kept. With --pool R, masks of options of more than 8 tokens come from R random orders of their tokens (an order and
its reverse are both among them, so complements are too): the first l tokens of an order are a set of l. The reference
is then exact over these R x n sets, and every estimator draws from them alone. Shorter options have all their masks
and the exact bound. With --pool 0 masks are unrestricted and the reference is ours with --reference masks.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffulm
from diffulm.eval import harness
from diffulm.eval.estimate import Request, Round, Scorer
from diffulm.eval.masks import Option, every_mask
from diffulm.eval.rate import Rater, diffusion_scorer
from diffulm.eval.tasks import TASKS
from diffulm.runtime import generator
from machine import describe, scoring_arguments

COSTS = (4, 8, 16, 32, 64)
MARK = 32
CONFIDENCES = (0.9, 0.95, 0.99)
#: Options of at most this many tokens have all their masks in the reference.
ENUMERATED = 8
BINS = ((1, 4), (5, 8), (9, 20), (21, 40), (41, 10_000))
Questions = list[tuple[str, list[Request]]]


def documents(model: Any, names: list[str], folder: Path, limit: int) -> Questions:
    """The questions of tasks as lm-eval builds them."""
    rater = Rater(diffusion_scorer(model), model.tokenizer, "")
    lm = harness.language_model(rater)
    made = []
    for name in names:
        for one in harness.build(TASKS[name], folder, 0):
            one.set_config("num_fewshot", 0)
            with harness.quiet():
                one.build_all_requests(limit=limit)
            groups = defaultdict(list)
            for instance in one.instances:
                context, answer = lm._encode_pair(*instance.args)
                groups[instance.doc_id].append(rater.request(context, answer, 1.0))
            made += [(f"{name}/{d}", group) for d, group in groups.items()]
    return made


class Orders:
    """A generator whose uniform matrices (n, M) are columns of a fixed pool: each draw is one of the pool's orders."""

    def __init__(self, rng: np.random.Generator, pool: int) -> None:
        self.rng, self.pool = rng, pool

    def random(self, shape: tuple[int, int] | None = None) -> Any:
        if shape is None:
            return self.rng.random()
        n, draws = shape
        return orders(n, self.pool)[:, self.rng.integers(self.pool, size=draws)]


@lru_cache
def orders(n: int, pool: int) -> np.ndarray:
    """Uniform numbers whose columns rank n tokens, (n, pool); further tokens leave the first ones' as they are."""
    rows = [generator(0, i, purpose="eval").random(pool // 2) for i in range(n)]
    return np.stack([np.concatenate([row, 1 - row]) for row in rows])


@dataclass(frozen=True)
class Remembering(Scorer):
    """A scorer that never scores the same mask twice; pool: orders that long options take their masks from."""

    pool: int = 0
    known: dict[Any, float] = field(default_factory=dict)

    def _random(self, key: int, turn: int, segment: int, n: int) -> Any:
        rng = super()._random(key, turn, segment, n)
        return Orders(rng, self.pool) if self.pool and n > ENUMERATED else rng

    def _run(self, rounds: Sequence[Round]) -> None:
        missing: dict[tuple[int, ...], tuple[Option, list[np.ndarray]]] = {}
        for one in rounds:
            text = tuple(one.option.ids)
            for mask in one.masks[0]:
                if (text, mask.tobytes()) not in self.known:
                    self.known[text, mask.tobytes()] = math.nan  # asked for once
                    missing.setdefault(text, (one.option, []))[1].append(mask)
        fresh = [Round(o, [np.array(masks)], np.zeros((len(masks), 1))) for o, masks in missing.values()]
        super()._run(fresh)
        for one in fresh:
            for mask, nats in zip(one.masks[0], one.nats[:, 0], strict=True):
                self.known[tuple(one.option.ids), mask.tobytes()] = float(nats)
        for one in rounds:
            one.nats[:, 0] = [self.known[tuple(one.option.ids), mask.tobytes()] for mask in one.masks[0]]


def simple(kind: str, n: int, cost: int, rng: np.random.Generator | Orders) -> tuple[np.ndarray, np.ndarray]:
    """Masks (M, n) and weights (M,) of the released estimator or of LLaDA's."""
    grid = rng.random()
    rank = rng.random((n, cost)).T.argsort(1).argsort(1)
    if kind == "released":  # a Bernoulli mask: a binomial number of tokens, the first of a random order
        each = np.random.default_rng(int(grid * 2**53)).random((cost, n))
        counts = (each < (np.arange(cost, 0, -1) / cost)[:, None]).sum(1)
        weights = np.where(counts > 0, (n + 1) / np.maximum(1, counts), 0) / cost
    else:
        counts = 1 + (np.arange(cost) * n / cost + grid * n).astype(int) % n
        weights = n / counts / cost
    return rank < counts[:, None], weights


Found = list[list[float]]  # nats of every option of every question


def simply(scorer: Remembering, questions: Questions, kind: str, cost: int, repeat: int) -> tuple[Found, float]:
    """(nats, sequences per option) of an estimator without pairs or enumeration."""
    rounds: list[list[tuple[Round, np.ndarray]]] = []
    for q, (_, group) in enumerate(questions):
        options: list[tuple[Round, np.ndarray]] = []
        for o, request in enumerate(group):
            option: Option = scorer.option(request)
            n = len(option.places[0])
            rng: Any = generator(scorer.seed, q, o, repeat, cost, purpose="eval")
            masks, weights = simple(kind, n, cost, Orders(rng, scorer.pool) if n > ENUMERATED and scorer.pool else rng)
            keep = masks.any(1)  # an empty mask costs no forward, though the released code makes it
            options.append((Round(option, [masks[keep]], np.zeros((int(keep.sum()), 1))), weights[keep]))
        rounds.append(options)
    scorer._run([one for options in rounds for one, _ in options if len(one.nats)])
    return [[float(one.nats[:, 0] @ w) for one, w in options] for options in rounds], float(cost)


def ours(scorer: Scorer, questions: Questions) -> tuple[Found, float]:
    """(nats, sequences per option) of `Scorer`."""
    scores = scorer.scores(questions)
    return [[s.nats for s in group] for group in scores], float(np.mean([s.forwards for g in scores for s in g]))


def exact(scorer: Remembering, questions: Questions) -> tuple[Found, float]:
    """(nats, sequences per option) over all masks of a short option, and over the pool's of a long one."""
    rounds = []
    for _, group in questions:
        options = []
        for option in map(scorer.option, group):
            n = len(option.places[0])
            if n <= ENUMERATED:
                masks, weights = every_mask(n)
            else:
                rank, counts = orders(n, scorer.pool).T.argsort(1).argsort(1), np.arange(1, n + 1)
                masks = (rank[None] < counts[:, None, None]).reshape(-1, n)
                weights = np.repeat(1 / counts, scorer.pool) / scorer.pool
            options.append((Round(option, [masks], np.zeros((len(masks), 1))), weights))
        rounds.append(options)
    for options in rounds:
        scorer._run([one for one, _ in options])
    cost = float(np.mean([len(w) for options in rounds for _, w in options]))
    return [[float(one.nats[:, 0] @ w) for one, w in options] for options in rounds], cost


def curve(
    scorer: Remembering, questions: Questions, truth: list[int], kind: str, repeats: int
) -> list[tuple[float, float, float]]:
    """(sequences per option, agreement with the reference, variance of a margin), by rising cost."""
    settings: list[Any] = list(CONFIDENCES if kind == "rounds" else COSTS)
    points = []
    for setting in settings:
        found, costs = [], []
        for repeat in range(repeats):
            if kind in ("released", "count"):
                nats, cost = simply(scorer, questions, kind, setting, repeat)
            else:
                fresh = replace(scorer, seed=scorer.seed + 1 + repeat)
                changes = {"draws": setting} if kind == "ours" else {"draws": 128, "confidence": setting}
                nats, cost = ours(replace(fresh, **changes), questions)
            found.append(nats)
            costs.append(cost)
        agreement = np.mean([[int(np.argmin(o)) == t for o, t in zip(nats, truth, strict=True)] for nats in found])
        margins = np.array([[v - o[0] for o in nats for v in o[1:]] for nats in found])
        variance = float(margins.var(0, ddof=1).mean()) if repeats > 1 else math.nan
        points.append((float(np.mean(costs)), float(agreement), variance))
    return points


def cost_at(points: list[tuple[float, float]], mark: float) -> float | None:
    """Sequences per option at which a curve first reaches the mark; None where it does not."""
    best = -math.inf
    for (c0, a0), (c1, a1) in zip([(points[0][0], -math.inf), *points], points, strict=False):
        best = max(best, a0)
        if a1 >= mark:
            if best == -math.inf or a1 <= best or best >= mark:
                return c1
            share = (mark - best) / (a1 - best)
            return float(math.exp(math.log(c0) + share * (math.log(c1) - math.log(c0))))
    return None


def ratios(curves: dict[str, list[tuple[float, float, float]]]) -> dict[str, dict[str, float | None]]:
    """By measure and estimator: MARK over the sequences per option at which it does as well as the released one."""
    mark = next(point for point in curves["released"] if point[0] == MARK)
    found: dict[str, dict[str, float | None]] = {"agreement": {}, "variance": {}}
    for kind, points in curves.items():
        costs = {
            "agreement": cost_at([(c, a) for c, a, _ in points], mark[1]),
            "variance": cost_at([(c, -math.log(v + 1e-12)) for c, _, v in points], -math.log(mark[2] + 1e-12)),
        }
        for measure, cost in costs.items():
            found[measure][kind] = None if cost is None else MARK / cost
    return found


def main() -> None:
    parser = scoring_arguments(__doc__, tasks="piqa,hellaswag,arc_easy", limit=100)
    parser.add_argument("--pool", type=int, default=16, help="even number of orders; 0: unrestricted masks")
    parser.add_argument("--reference", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=40, help="leave out documents with a longer option")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = diffulm.load(args.model, dtype=args.dtype)
    if model.layout.name != "full":
        parser.error("the released estimator knows the full layout only; give a checkpoint of that layout")
    questions = documents(model, args.tasks.split(","), args.data_dir, args.limit)
    longest = [max(len(r.continuation) for r in group) for _, group in questions]
    questions = [q for q, n in zip(questions, longest, strict=True) if n <= args.max_tokens]
    longest = [n for n in longest if n <= args.max_tokens]
    plain = diffusion_scorer(model, seed=args.seed)
    scorer = Remembering(**{f.name: getattr(plain, f.name) for f in fields(plain)}, pool=args.pool)
    if args.pool:
        parts = []
        for i, question in enumerate(questions):
            parts.append(exact(scorer, [question]))
            print(f"reference {i + 1}/{len(questions)}", end="\r", file=sys.stderr, flush=True)
        found, reference_cost = [p[0][0] for p in parts], float(np.mean([p[1] for p in parts]))
    else:
        found, reference_cost = ours(replace(scorer, draws=args.reference), questions)
    truth = [int(np.argmin(group)) for group in found]
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "model", "data_dir")}
    result: dict[str, Any] = {
        "settings": settings,
        "machine": describe(),
        "reference_sequences_per_option": reference_cost,
        "forwards_made": len(scorer.known),
        "bins": [],
    }  # fmt: skip
    for low, high in (*BINS, (1, 10_000)):
        chosen = [i for i, n in enumerate(longest) if low <= n <= high]
        if not chosen:
            continue
        part, right = [questions[i] for i in chosen], [truth[i] for i in chosen]
        curves = {
            kind: curve(scorer, part, right, kind, args.repeats) for kind in ("released", "count", "ours", "rounds")
        }
        entry = {"tokens": [low, high], "documents": len(chosen), "curves": curves, "ratio": ratios(curves)}
        result["bins"].append(entry)
        name = "all" if (low, high) == (1, 10_000) else f"{low}-{high if high < 10_000 else ''}"
        print(f"{name:>6} tokens, {len(chosen):4} documents")
        for measure, row in ratios(curves).items():
            shown = "  ".join(f"{k} {'-' if r is None else f'{r:.2f}x'}" for k, r in row.items())
            print(f"       same {measure:>9} as 32 released draws with fewer sequences: {shown}")
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
