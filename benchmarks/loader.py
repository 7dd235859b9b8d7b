"""What data costs: batches from small and very large stores, packing, and preparing text.

    python benchmarks/loader.py --out loader.json              # loader: time per batch against the store's size
    python benchmarks/loader.py --prepare TEXT... --workers 2  # prepare: MB/s per core with the embedded tokenizer

Loader: a batch of 16 sequences of 512 tokens is located, read, noised and laid out, from stores of 10^4 to 10^8
sequences whose tokens are made up as they are read (so that no disk is measured), beside what an epoch's permutation as
an array costs (`before`: how samples were ordered until the keyed permutation). A step of training to compare with:
benchmarks/train_step.py; SmolLM2-135M at 300 tokens/s needs 27 s for such a batch.

Prepare is measured in processor time of this process and its children, so that other work beside it counts less.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffulm.data.loader import Loader, Mixture, Sequences
from diffulm.layout import Full
from diffulm.process import MaskedDiffusion
from diffulm.runtime import peak_memory_bytes
from diffulm.tokenizer import SpecialTokens
from machine import describe

LENGTH, BATCH = 512, 16


@dataclass
class MadeUp:
    """A token store of documents with 0 to 2 windows, as a real one is read: by document and offset."""

    count: int

    @property
    def lengths(self) -> np.ndarray:
        return 16 + np.arange(self.count, dtype=np.int64) * 2654435761 % (2 * LENGTH - 16)

    def document(self, i: int, start: int = 0, n: int | None = None) -> np.ndarray:
        length = 16 + (i * 2654435761) % (2 * LENGTH - 16)
        return np.arange(start, length if n is None else min(length, start + n), dtype=np.int64) % 1000 + 10


def loader_row(documents: int, batches: int) -> dict[str, Any]:
    special = SpecialTokens(bos=0, eos=1, pad=2, mask=3)
    start = time.perf_counter()
    sequences = Sequences.cut(MadeUp(documents), LENGTH, special)  # type: ignore[arg-type]
    packed = time.perf_counter() - start
    mixture = Mixture([sequences], [1.0], 0)
    loader = Loader(mixture, Full(), MaskedDiffusion(3), BATCH, BATCH, 0)
    loader.rows(0)
    located, whole = [], []
    for n in range(1, batches + 1):
        start = time.perf_counter()
        mixture.locate(range(n * BATCH, (n + 1) * BATCH))
        located.append(time.perf_counter() - start)
        start = time.perf_counter()
        loader.rows(n)
        whole.append(time.perf_counter() - start)
    return {
        "documents": documents, "sequences": len(sequences), "packing_seconds": packed,
        "locate_ms": 1e3 * float(np.median(located)), "batch_ms": 1e3 * float(np.median(whole)),
        "before": before(len(sequences)), "peak_memory_MB": peak_memory_bytes() / 1e6,
    }  # fmt: skip


def before(size: int) -> dict[str, float]:
    """A permutation of the epoch, and the arrays of owners and slots that were built for every micro-batch."""
    start = time.perf_counter()
    np.random.default_rng(0).permutation(size)
    permutation = time.perf_counter() - start
    start = time.perf_counter()
    np.repeat(np.arange(1), [size])
    np.concatenate([np.arange(size)])
    return {"epoch_ms": 1e3 * permutation, "micro_batch_ms": 1e3 * (time.perf_counter() - start)}


def processor_seconds() -> float:
    return sum(
        use.ru_utime + use.ru_stime
        for use in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def prepare_row(paths: list[str], workers: int, limit: int | None) -> dict[str, Any]:
    from diffulm import hub
    from diffulm.data.prepare import prepare
    from diffulm.data.sources import Source
    from diffulm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(hub.embedded_default())
    with tempfile.TemporaryDirectory() as folder:
        start, used = time.perf_counter(), processor_seconds()
        source = Source("text", paths[0], more=tuple(paths[1:]), limit_bytes=limit)
        found = prepare([source], tokenizer, Path(folder) / "out", workers=workers, progress=False)["sources"]["text"]
        wall, used = time.perf_counter() - start, processor_seconds() - used
    size = (found["train"]["bytes"] + found["heldout"]["bytes"]) / 1e6
    return {
        "workers": workers, "MB": size, "tokens": found["train"]["tokens"] + found["heldout"]["tokens"],
        "seconds": wall, "processor_seconds": used, "MB_per_core_second": size / used, "MB_per_second": size / wall,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[10**4, 10**6, 10**7])
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--prepare", nargs="+", default=[], metavar="TEXT", help="paths of text: measure prepare")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit-bytes", type=int, default=None)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": describe()}
    if args.prepare:
        result["prepare"] = prepare_row(args.prepare, args.workers, args.limit_bytes)
        print(json.dumps(result["prepare"]))
    else:
        result["loader"] = []
        print("documents  sequences  pack s  locate ms  batch ms  before: epoch ms, each micro-batch ms   peak MB")
        for documents in args.documents:
            row = loader_row(documents, args.batches)
            result["loader"].append(row)
            print(
                f"{documents:>9.0e}  {row['sequences']:>9,}  {row['packing_seconds']:6.2f}  {row['locate_ms']:9.3f}  "
                f"{row['batch_ms']:8.2f}  {row['before']['epoch_ms']:16.1f} {row['before']['micro_batch_ms']:22.1f}  "
                f"{row['peak_memory_MB']:8.0f}"
            )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
