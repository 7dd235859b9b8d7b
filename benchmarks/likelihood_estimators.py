"""How many forwards a multiple-choice decision needs: our estimator against the released one and LLaDA's count form.

    python benchmarks/likelihood_estimators.py MODEL --data-dir DIR [--tasks piqa,hellaswag,arc_easy] [--limit 100]
        [--reference 1024] [--repeats 4] [--seed 0] [--dtype auto] [--threads N] [--out FILE]

The reference is ours with --reference masks (all masks of a short option). Each estimator then decides --repeats times
by fresh masks at several costs, and its *agreement* is the share of documents for which it picks the option that the
reference picks (by nats, not divided by length). Estimators:

    released  one Bernoulli mask for each of T rates t/T, the mean cross-entropy of the masked tokens, unweighted, an
              empty mask counted as zero (arXiv 2410.17891's evaluation); times n, so that lengths compare as nats
    count     LLaDA's count form: counts on a systematic grid, one random set for each
    ours      `plan_masks`: full mask once, pairs, strata, enumeration; noise shared by the options
    rounds    ours with sequential draws (confidence 0.99, 0.95, 0.9): cost is the mean over options

The released estimator's agreement at 32 draws is the mark; `ratio` is 32 over the sequences per option at which an
estimator reaches it (log-linear between its costs), by tokens of the longest option. All see the same documents.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffulm
from diffulm.eval import harness
from diffulm.eval.estimate import Request, Round, Scorer
from diffulm.eval.masks import Option
from diffulm.eval.rate import Rater, diffusion_scorer
from diffulm.eval.tasks import TASKS
from diffulm.runtime import generator
from machine import describe

COSTS = (4, 8, 16, 32, 64)
MARK = 32
CONFIDENCES = (0.9, 0.95, 0.99)
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
            with harness._quiet():
                one.build_all_requests(limit=limit)
            groups = defaultdict(list)
            for instance in one.instances:
                context, answer = lm._encode_pair(*instance.args)
                groups[instance.doc_id].append(rater.request(context, answer, 1.0))
            made += [(f"{name}/{d}", group) for d, group in groups.items()]
    return made


def simple(kind: str, n: int, cost: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Masks (M, n) and weights (M,) of the released estimator or of LLaDA's."""
    if kind == "released":
        masks = rng.random((cost, n)) < (np.arange(cost, 0, -1) / cost)[:, None]
        counts = masks.sum(1)
        weights = np.where(counts > 0, n / np.maximum(1, counts), 0) / cost
    else:
        counts = 1 + (np.arange(cost) * n / cost + rng.random() * n).astype(int) % n
        masks = rng.random((cost, n)).argsort(1).argsort(1) < counts[:, None]
        weights = n / counts / cost
    return masks, weights


def picks_simple(scorer: Scorer, questions: Questions, kind: str, cost: int, repeat: int) -> tuple[list[int], float]:
    """(picked option of each question, sequences per option) of an estimator without pairs or enumeration."""
    rounds: list[list[tuple[Round, np.ndarray]]] = []
    for q, (_, group) in enumerate(questions):
        options: list[tuple[Round, np.ndarray]] = []
        for o, request in enumerate(group):
            option: Option = scorer.option(request)
            rng = generator(scorer.seed, q, o, repeat, cost, purpose="eval")
            masks, weights = simple(kind, len(option.places[0]), cost, rng)
            keep = masks.any(1)  # an empty mask costs no forward, though the released code makes it
            options.append((Round(option, [masks[keep]], np.zeros((int(keep.sum()), 1))), weights[keep]))
        rounds.append(options)
    scorer._run([one for options in rounds for one, _ in options if len(one.nats)])
    return [int(np.argmin([float(one.nats[:, 0] @ w) for one, w in options])) for options in rounds], float(cost)


def picks(scorer: Scorer, questions: Questions) -> tuple[list[int], float]:
    """(picked option of each question, sequences per option) of `Scorer`."""
    scores = scorer.scores(questions)
    spent = [s.forwards for group in scores for s in group]
    return [int(np.argmin([s.nats for s in group])) for group in scores], float(np.mean(spent))


def curve(scorer: Scorer, questions: Questions, truth: list[int], kind: str, repeats: int) -> list[tuple[float, float]]:
    """(sequences per option, agreement with the reference), by rising cost."""
    settings: list[Any] = list(CONFIDENCES if kind == "rounds" else COSTS)
    points = []
    for setting in settings:
        found, costs = [], []
        for repeat in range(repeats):
            if kind in ("released", "count"):
                picked, cost = picks_simple(scorer, questions, kind, setting, repeat)
            else:
                fresh = replace(scorer, seed=scorer.seed + 1 + repeat)
                changes = {"draws": setting} if kind == "ours" else {"draws": 128, "confidence": setting}
                picked, cost = picks(replace(fresh, **changes), questions)
            found.append(np.mean([a == b for a, b in zip(picked, truth, strict=True)]))
            costs.append(cost)
        points.append((float(np.mean(costs)), float(np.mean(found))))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", default="piqa,hellaswag,arc_easy")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--reference", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = diffulm.load(args.model, dtype=args.dtype)
    if model.layout.name != "full":
        parser.error("the released estimator knows the full layout only; give a checkpoint of that layout")
    questions = documents(model, args.tasks.split(","), args.data_dir, args.limit)
    scorer = diffusion_scorer(model, seed=args.seed)
    truth, reference_cost = picks(replace(scorer, draws=args.reference), questions)
    longest = [max(len(r.continuation) for r in group) for _, group in questions]
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "model", "data_dir")}
    result: dict[str, Any] = {
        "settings": settings,
        "machine": describe(),
        "reference_sequences_per_option": reference_cost,
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
        mark = dict(curves["released"])[float(MARK)]
        costs = {kind: cost_at(points, mark) for kind, points in curves.items()}
        ratios = {kind: None if cost is None else MARK / cost for kind, cost in costs.items()}
        entry = {"tokens": [low, high], "documents": len(chosen), "mark": mark, "curves": curves, "ratio": ratios}
        result["bins"].append(entry)
        name = "all" if (low, high) == (1, 10_000) else f"{low}-{high if high < 10_000 else ''}"
        shown = "  ".join(f"{k} {'-' if r is None else f'{r:.2f}x'}" for k, r in ratios.items())
        print(f"{name:>6} tokens, {len(chosen):4} documents, agreement {mark:.3f}: {shown}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
