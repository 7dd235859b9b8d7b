"""What a training step costs against sequence length and model size, and the exponents fitted to it.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/length_cost.py        # 3 to 6 minutes on one core

A step is forward, backward, clipping and one AdamW update of a random Llama on one sequence, in three ways: the full
layout on one document (no mask: the fast kernels), the full layout on packed documents, and the block layout (twice the
rows). The last two need a mask: a dense one on the CPU, FlexAttention on CUDA.

The first of --sizes (64x1: width 64, one layer) is measured at every length up to --max-length, however long a step
takes: it is small so that 8192 tokens, 16384 rows in the block layout, are reached on a laptop. The other sizes end at
the length that, at four times the one before, would leave no time for a warm-up and one timed step within --seconds.

Peak memory is what a step takes beyond weights and moments: gradients, activations, mask and logits. Exponents are
slopes of least squares in log-log, over all lengths and between the last two; `operations` has that of the counted
products (`diffulm.train.flops`), which time would follow if all of them ran equally fast. Writes OUT.md and OUT.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffulm.denoiser import HFDenoiser
from diffulm.layout import Block, Full, NoisedBatch, Rows
from diffulm.objective import diffusion_loss
from diffulm.process import MaskedDiffusion
from diffulm.runtime import parse_precision, pick_device
from diffulm.train.config import TrainConfig
from diffulm.train.flops import Shape
from diffulm.train.optim import build_optimizers
from machine import describe

VOCAB, MASK, HEAD_WIDTH = 4097, 4096, 32
SHORTEST, DOCUMENT = 256, 100  # tokens of the shortest sequence, and of a packed document
WAYS: dict[str, Full | Block] = {"full": Full(), "full, packed": Full(), "block of 32": Block(32)}


def build_denoiser(width: int, layers: int, dtype: str, device: torch.device) -> HFDenoiser:
    """A random bidirectional Llama in training mode."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    heads = max(1, width // HEAD_WIDTH)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=1 << 20,
        tie_word_embeddings=True,
    )  # fmt: skip
    config.is_causal = False
    precision = parse_precision(dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=precision.weights)
    return HFDenoiser(model.to(device), MASK, precision=precision).train()


def rows_of(way: str, length: int) -> Rows:
    """One sequence, half of it noised."""
    layout, packed = WAYS[way], "packed" in way
    x0 = torch.randint(0, MASK, (1, length), generator=torch.Generator().manual_seed(length))
    document = torch.arange(length)[None] // DOCUMENT if packed else torch.zeros_like(x0)
    maskable = torch.ones_like(x0, dtype=torch.bool)
    maskable[:, 0] = False
    maskable[:, 1:] &= document[:, 1:] == document[:, :-1]
    group = layout.noise_groups(document) if isinstance(layout, Block) else torch.zeros_like(x0)
    levels = torch.full((1, int(group.max()) + 1), 0.5)
    ids, noised, weight = MaskedDiffusion(MASK).corrupt(x0, maskable, group, levels, [length])
    everywhere = torch.ones_like(maskable)
    return layout.training_rows(NoisedBatch(x0, ids, noised, maskable, weight, document, everywhere, group))


def measure(denoiser: HFDenoiser, optimizer: Any, rows: Rows, seconds: float) -> tuple[float, int, int | None]:
    """(median seconds of a step, steps timed, bytes taken at the peak): one to warm up, then 1 to 5 within the time."""
    device = next(denoiser.parameters()).device
    rows = rows.to(device)
    taken: list[float] = []
    began = time.perf_counter()
    before = 0
    for n in range(6):
        if n > 1 and time.perf_counter() - began + taken[-1] > seconds:
            break
        if n == 1:
            before = reset_peak(device)
        start = time.perf_counter()
        loss = diffusion_loss(denoiser, rows)
        (loss.sum / loss.count).backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    peak = peak_bytes(device)
    return statistics.median(taken[1:]), len(taken) - 1, None if peak is None else peak - before


def reset_peak(device: torch.device) -> int:
    """Start the count of peak memory anew; bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is not in use
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device) or 0


def peak_bytes(device: torch.device) -> int | None:
    """Largest memory since `reset_peak`; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def cells(sizes: list[str], longest: int, seconds: float, dtype: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """The first size at every way and length, the others at those that the time allows."""
    for size in sizes:
        width, layers = map(int, size.split("x"))
        denoiser = build_denoiser(width, layers, dtype, device)
        (optimizer,) = build_optimizers(denoiser, TrainConfig(learning_rate=1e-5))
        shape = Shape.of(denoiser.model)
        for way in WAYS:
            length, last = SHORTEST, 0.0
            while length <= longest:
                if size != sizes[0] and 4 * last * 2 > seconds:
                    print(f"{size} {way}: {length} tokens and more left out (--seconds {seconds:g})", flush=True)
                    break
                rows = rows_of(way, length)
                last, steps, peak = measure(denoiser, optimizer, rows, seconds)
                count = rows.ids.shape[1]
                row = {
                    "model": size, "parameters": shape.parameters, "layout": way, "length": length, "rows": count,
                    "seconds": last, "steps": steps, "tokens_per_second": length / last, "peak_bytes": peak,
                    "operations": shape.train(count, count**2, len(rows.source)),
                }  # fmt: skip
                print(f"{size} {way} {length}: {last * 1e3:.0f} ms", flush=True)
                yield row
                length *= 2
        del denoiser, optimizer


def slope(x: list[float], y: list[float]) -> float | None:
    """The exponent k of y = c x^k by least squares in logarithms; None from fewer than two points."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(x) > 1 and min(y) > 0 else None


def exponents(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Fits against length (for each model and layout) and against parameters (for each layout and length)."""
    by_length, by_size = [], []
    for model, way in dict.fromkeys((r["model"], r["layout"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["layout"]) == (model, way)]
        found: dict[str, Any] = {"model": model, "layout": way, "longest": mine[-1]["length"]}
        for key in ("seconds", "operations", "peak_bytes"):
            points = [(r["length"], r[key]) for r in mine if r[key]]
            for name, some in ((key, points), (f"{key}_last", points[-2:])):
                found[name] = slope([x for x, _ in some], [y for _, y in some])
        by_length.append(found)
    models = len({r["model"] for r in rows})
    for way, length in sorted({(r["layout"], r["length"]) for r in rows}):
        mine = [r for r in rows if (r["layout"], r["length"]) == (way, length)]
        if len(mine) == models > 1:
            size = [r["parameters"] for r in mine]
            fits = {key: slope(size, [r[key] for r in mine]) for key in ("seconds", "operations")}
            by_size.append({"layout": way, "length": length, **fits})
    return by_length, by_size


def markdown(result: dict[str, Any]) -> str:
    """Three tables: what was measured, exponents of length, exponents of size."""
    machine = result["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, threads: {machine['threads']}"
    said = [f"Cost of a training step on one sequence; {result['dtype']}, torch {machine['torch']}, {where}.", ""]
    head: tuple[str, ...] = ("model", "parameters", "layout", "tokens", "ms a step", "tokens/s", "GFLOP/s", "peak MB")
    said += table(head, [
        (r["model"], f"{r['parameters'] / 1e6:.1f}M", r["layout"], r["length"], f"{r['seconds'] * 1e3:,.0f}",
         f"{r['tokens_per_second']:,.0f}", f"{r['operations'] / r['seconds'] / 1e9:,.1f}",
         "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:,.0f}")
        for r in result["cells"]
    ])  # fmt: skip
    head = ("model", "layout", "up to", "time", "its last doubling", "operations", "last", "memory", "last")
    keys = [f"{key}{end}" for key in ("seconds", "operations", "peak_bytes") for end in ("", "_last")]
    said += ["", "Exponents of the length:", ""]
    said += table(
        head, [(r["model"], r["layout"], r["longest"], *(number(r[k]) for k in keys)) for r in result["by_length"]]
    )
    if result["by_size"]:
        said += ["", "Exponents of the parameters, embeddings included:", ""]
        said += table(("layout", "tokens", "time", "operations"), [
            (r["layout"], r["length"], number(r["seconds"]), number(r["operations"])) for r in result["by_size"]
        ])  # fmt: skip
    return "\n".join(said) + "\n"


def number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ("---",) * len(head), *rows)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-length", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=8.0, help="for one model (but the first), layout and length")
    parser.add_argument("--sizes", nargs="+", default=["64x1", "64x2", "128x4", "256x6"], help="width x layers")
    parser.add_argument("--dtype", choices=("float32", "autocast", "bfloat16"), default="float32")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "length-cost")
    args = parser.parse_args(arguments)
    found = list(cells(args.sizes, args.max_length, args.seconds, args.dtype, pick_device(args.device)))
    by_length, by_size = exponents(found)
    result = {
        "machine": describe(), "dtype": args.dtype, "cells": found, "by_length": by_length, "by_size": by_size,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
