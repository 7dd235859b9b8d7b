"""The AR parent through this package against lm-eval's own HF model, document by document, on every task.

    python benchmarks/parent_parity.py MODEL --data-dir DIR [--tasks all] [--limit 200] [--tiny] [--threads N]
        [--out FILE]

MODEL is a diffusion checkpoint whose parent can be opened (`diffulm adapt` leaves it in `parent/` beside `model/`; give
--parent otherwise). Both sides see the same start token, in float32. With --tiny the weights are those of a small
random Llama with MODEL's tokenizer and as many positions as the parent: what is compared is texts, token cuts, batches
and metrics, which do not depend on the weights, in a minute in place of an hour.

The table has, for each task: documents, options, the largest difference of an option's log-likelihood in nats, and the
documents whose metrics (acc, acc_norm, ...) are not the same. A last column tells how many documents lm-eval scores
otherwise when it puts no start token in front, as it does for tokenizers that add none.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM

import diffulm
from diffulm.denoiser import HFDenoiser
from diffulm.eval import harness
from diffulm.eval.rate import Rater, diffusion_scorer, parent_rater
from diffulm.eval.tasks import TASKS
from machine import describe, scoring_arguments


class Started(HFLM):
    """lm-eval's HF model behind a start token."""

    start: int

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        behind = [(t, ids if ids[:1] == [self.start] else [self.start, *ids], answer) for t, ids, answer in requests]
        return super()._loglikelihood_tokens(behind, *args, **kwargs)


def tiny(rater: Rater) -> Any:
    """A random Llama in the place of the parent's weights; returns it as an HF model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(rater.tokenizer) + 8, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=rater.scorer.length, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rater.scorer = replace(rater.scorer, denoiser=HFDenoiser(model, None))
    return model


def compare(name: str, folder: Path, limit: int, ours: Any, theirs: list[Any]) -> dict[str, Any]:
    """One task (all its parts together)."""
    row: dict[str, Any] = {"task": name, "documents": 0, "options": 0, "largest": 0.0, "differ": 0, "without_start": 0}
    for one in harness.build(TASKS[name], folder, 0):
        one.set_config("num_fewshot", 0)
        with harness.quiet():
            one.build_all_requests(limit=limit)
            found = [lm.loglikelihood(one.instances, disable_tqdm=True) for lm in (ours, *theirs)]
        members: dict[int, list[int]] = defaultdict(list)
        for i, request in enumerate(one.instances):
            members[request.doc_id].append(i)
        documents = list(one.task_docs)
        for d, own in members.items():
            # Likelihoods of all, decisions of the tasks that make one.
            metrics = [one.process_results(documents[d], [side[i] for i in own]) for side in found]
            decisions = [{k: v for k, v in m.items() if "perplexity" not in k} for m in metrics]
            row["differ"] += decisions[0] != decisions[1]
            row["without_start"] += decisions[1] != decisions[2]
        row["documents"] += len(members)
        row["options"] += len(one.instances)
        gaps = [abs(a[0] - b[0]) for a, b in zip(found[0], found[1], strict=True)]
        row["largest"] = max(row["largest"], *gaps)
        if row["documents"] >= limit:
            break  # the parts of MMLU: as many subjects as the limit needs
    return row


def main() -> None:
    parser = scoring_arguments(__doc__, tasks="all", limit=200)
    parser.add_argument("--parent")
    parser.add_argument("--length", type=int, default=1024, help="positions both sides use")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = diffulm.load(args.model, dtype="float32")
    child = Rater(diffusion_scorer(loaded), loaded.tokenizer, "")
    rater = parent_rater(args.parent or str(Path(args.model).parent / "parent"), child)
    rater.scorer = replace(rater.scorer, length=args.length)
    stock = tiny(rater) if args.tiny else rater.scorer.denoiser.model  # type: ignore[attr-defined]
    settings: Any = {"pretrained": stock, "tokenizer": rater.tokenizer, "batch_size": 8, "max_length": args.length}
    started, plain = Started(**settings), HFLM(**settings)
    started.start = rater.scorer.special.bos
    names = list(TASKS) if args.tasks == "all" else args.tasks.split(",")
    rows = []
    print(f"{'task':18} {'documents':>9} {'options':>8} {'largest':>9} {'differ':>6} {'no start':>8}")
    for name in names:
        row = compare(name, args.data_dir, args.limit, harness.language_model(rater), [started, plain])
        rows.append(row)
        print(
            f"{name:18} {row['documents']:9} {row['options']:8} {row['largest']:9.1e} {row['differ']:6} "
            f"{row['without_start']:8}",
            flush=True,
        )
    if args.out:
        settings = {"limit": args.limit, "length": args.length, "tiny": args.tiny}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"settings": settings, "machine": describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
