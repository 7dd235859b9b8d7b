"""A training step: ours against the released code's structure, a plain HF Trainer, and a compiled AR step.

    python benchmarks/train_step.py [--shape 135m] [--layers N] [--length 512] [--micro-batch 2] [--dtype autocast]
        [--device cpu] [--rounds 7] [--only NAME ...] [--no-head]
    python benchmarks/train_step.py --device cuda --length 2048 --micro-batch 8                     # 135M on a GPU
    python benchmarks/train_step.py --device cuda --shape 7b --layers 24 --length 2048 --micro-batch 2 --no-head \\
        --only "diffulm compiled" "AR compiled"                    # blocks of a 7B, as many as fit: its MFU

One process, the same random weights, dtype, threads and micro-batch for all, random texts; contenders take turns, so
that a drift of the machine hits all alike. One step = one micro-batch forward and backward, clipping and one optimizer
update (the least favourable case for us: everything that is not the model counts in full). Ours is the step of
`diffulm.train` with its loader and prefetch. "AR compiled" is next-token
training of the same model by transformers' own forward and loss, compiled as one graph, with fused AdamW: the speed
that people are used to. It predicts at all rows where diffusion wants the noised half.

Prints a table and JSON: tokens/s (median), ratios paired by round (median, minimum, maximum), TFLOP/s by the counted
operations (`diffulm.train.flops`) and where the device's peak is known MFU, peak memory of CUDA; and of head + loss,
times and peak memory, the latter measured in a process of its own (CPU only).
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffulm.data.loader import Loader, Mixture, Sequences
from diffulm.denoiser import ChunkedNLL, HFDenoiser
from diffulm.layout import Full
from diffulm.process import MaskedDiffusion
from diffulm.runtime import parse_precision, pick_device
from diffulm.tokenizer import SpecialTokens
from diffulm.train.config import TrainConfig
from diffulm.train.flops import Shape, Work, flops_per_token
from diffulm.train.metrics import peak_flops
from diffulm.train.optim import build_optimizers
from diffulm.train.parallel import parallelize
from diffulm.train.step import prefetched, train_step
from machine import describe
from naive import CLIP_NORM, HFTrainerBaseline, NaiveTrainer, naive_head
from sizes import SIZES, Size, texts

RATE, STEPS = 1e-5, 10_000
NAIVE, AR = "naive (released structure)", "AR compiled"


@dataclass(frozen=True)
class Setting:
    """What all contenders share."""

    size: Size
    dtype: str
    batch: int
    length: int
    device: torch.device

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.dtype == "autocast" else None

    def texts(self, n: int) -> torch.Tensor:
        """(batch, length) random ids."""
        return texts(n, self.size, self.batch, self.length)


Step = Callable[[int], None]


@dataclass(frozen=True)
class Texts:
    """A token store of random documents, each as long as a window."""

    at: Setting
    count: int = 4096

    @property
    def lengths(self) -> np.ndarray:
        return np.full(self.count, self.at.length - 1)

    def document(self, i: int, start: int = 0, n: int | None = None) -> np.ndarray:
        ids: np.ndarray = texts(i, self.at.size, 1, self.at.length - 1)[0].numpy()
        return ids[start : None if n is None else start + n]


def ours(at: Setting, stack: ExitStack, *, compile: bool) -> Step:
    """One step of the product: `train_step` on rows that are noised and laid out ahead of it."""
    precision, size = parse_precision(at.dtype), at.size
    denoiser = HFDenoiser(size.build().to(at.device), size.mask, precision=precision).train()
    parallelize(denoiser, precision, compile=compile)
    config = TrainConfig(batch=at.batch, micro_batch=at.batch, learning_rate=RATE, clip=CLIP_NORM)
    optimizers = build_optimizers(denoiser, config)
    store: Any = Texts(at)
    sequences = Sequences.cut(store, at.length, SpecialTokens(0, 1, 1, size.mask))
    loader = Loader(
        Mixture([sequences], [1.0], 0), Full(), MaskedDiffusion(size.mask), at.batch, at.batch, 0,
        fixed_shapes=at.device.type == "cuda",
    )  # fmt: skip
    rows_of = stack.enter_context(prefetched(loader.rows, STEPS, at.device))

    def step(n: int) -> None:
        train_step(denoiser, optimizers, rows_of(n), n, RATE, config)

    return step


def naive(at: Setting, stack: ExitStack) -> Step:
    trainer = NaiveTrainer(at.size.build().to(at.device), at.size.mask, autocast=at.autocast, lr=RATE)

    def step(n: int) -> None:
        trainer.micro_batch(at.texts(n))
        trainer.update()

    return step


def autoregressive(at: Setting, stack: ExitStack) -> Step:
    """Next-token training of the same model, as well as plain PyTorch and transformers do it."""
    model = at.size.build(causal=True).to(at.device).train()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def step(n: int) -> None:
        ids = at.texts(n).to(at.device)
        with torch.autocast(at.device.type, at.autocast, enabled=at.autocast is not None):
            loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


#: The stack closes what a contender keeps open: a thread that makes its rows.
CONTENDERS: dict[str, Callable[[Setting, ExitStack], Step]] = {
    NAIVE: naive,
    "diffulm eager": partial(ours, compile=False),
    "diffulm compiled": partial(ours, compile=True),
    AR: autoregressive,
}


def seconds_of(step: Step, n: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(n)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def step_times(at: Setting, names: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, by contender; they take turns, and their first two steps are not counted."""
    found: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        steps = {name: CONTENDERS[name](at, stack) for name in names}
        for n in range(rounds + 2):
            for name, step in steps.items():
                took = seconds_of(step, n, at.device)
                if n >= 2:  # the first two build kernels and optimizer state
                    found[name].append(took)
    return found


def operations(at: Setting, name: str) -> float:
    """Counted operations per token of text; the released structure's by what it needs to, not by what it does."""
    with torch.device("meta"):
        shape = Shape.of(at.size.build())
    wanted = at.length - 1 if name == AR else at.length / 2
    return flops_per_token(shape, Work(at.length, at.length, at.length**2, wanted))


def ratios(base: list[float], values: list[float]) -> tuple[float, str]:
    """How much faster than `base`: median and range by round, or of the medians where they did not take turns."""
    if len(base) != len(values):
        return statistics.median(base) / statistics.median(values), "not paired"
    paired = [a / b for a, b in zip(base, values)]
    return statistics.median(paired), f"{min(paired):.2f}..{max(paired):.2f}"


def step_table(at: Setting, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Print tokens/s and ratios; the same as JSON has it."""
    peak = peak_flops(at.device)
    out: dict[str, Any] = {}
    against = [name for name in (NAIVE, AR) if name in seconds]
    print(f"{'step':<28} {'tokens/s':>9} {'TFLOP/s':>8} {'MFU':>6}  " + ", ".join(f"ratio to {n}" for n in against))
    for name, values in seconds.items():
        speed = at.batch * at.length / statistics.median(values)
        done = speed * operations(at, name)
        row: dict[str, Any] = {"tokens_per_second": speed, "flops": done, "seconds": values}
        if peak:
            row["mfu"] = done / peak
        texts = []
        for base in against:
            ratio, spread = ratios(seconds[base], values)
            row[f"ratio to {base}"] = ratio
            texts.append(f"{ratio:.2f} ({spread})")
        share = f"{done / peak:6.1%}" if peak else f"{'-':>6}"
        print(f"{name:<28} {speed:9.0f} {done / 1e12:8.3f} {share}  " + ", ".join(texts))
        out[name] = row
    return out


def head_inputs(at: Setting) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden, weight, labels, mask) as the head of a step gets them."""
    hidden = torch.randn(at.batch, at.length, at.size.width, dtype=at.autocast or torch.float32, requires_grad=True)
    weight = torch.randn(at.size.vocab, at.size.width).mul_(0.02).requires_grad_()
    return hidden, weight, at.texts(0), torch.rand(at.batch, at.length) < 0.5


def head_memory(which: str, at: Setting) -> int:
    """Bytes by which peak memory grows over forward and backward of head + loss.

    Weight and inputs exist before. The weight's gradient (V x D float32, a fixed state of training: it becomes
    weight.grad) is counted here and subtracted by the caller, for both sides.
    """
    hidden, weight, labels, mask = head_inputs(at)
    small = torch.randn(64, 64)
    (small @ small).sum()
    # getrusage would report the peak of the process this one was forked from; Linux can start its own count anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_kilobytes()
    if which == "naive":
        with torch.autocast("cpu", at.autocast, enabled=at.autocast is not None):
            loss = naive_head(hidden, weight, labels, mask, torch.full((at.batch,), 0.5))
    else:
        from types import SimpleNamespace

        rows = mask.flatten().nonzero()[:, 0]
        picked = hidden.flatten(0, 1)[rows]
        everywhere = torch.ones(len(rows), dtype=torch.bool)
        nll = ChunkedNLL.apply(
            picked, weight, None, labels.flatten()[rows], everywhere, at.size.mask, SimpleNamespace()
        )
        loss = nll.sum() / labels.numel()
    loss.backward()
    return (_peak_kilobytes() - before) * 1024


def _peak_kilobytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def head_times(at: Setting, rounds: int) -> dict[str, float]:
    """Median seconds of head + loss, forward and backward, four ways, in turns; on the CPU."""
    from types import SimpleNamespace

    hidden, weight, labels, mask = head_inputs(at)
    rows = mask.flatten().nonzero()[:, 0]
    target, everywhere = labels.flatten()[rows], torch.ones(len(rows), dtype=torch.bool)
    column = torch.zeros(at.size.vocab).index_fill_(0, torch.tensor([at.size.mask]), float("-inf"))

    def released() -> torch.Tensor:
        with torch.autocast("cpu", at.autocast, enabled=at.autocast is not None):
            return naive_head(hidden, weight, labels, mask, torch.full((at.batch,), 0.5))

    def plain() -> torch.Tensor:
        logits = hidden.flatten(0, 1)[rows] @ weight.to(hidden.dtype).T
        return torch.nn.functional.cross_entropy(logits.float() + column, target, reduction="sum")

    def fused() -> torch.Tensor:
        return torch.nn.functional.linear_cross_entropy(
            hidden.flatten(0, 1)[rows], weight.to(hidden.dtype), target, linear_bias=column.to(hidden.dtype),
            reduction="sum", options=torch.nn.LinearCrossEntropyOptions(),
        )  # fmt: skip

    def chunked() -> torch.Tensor:
        picked = hidden.flatten(0, 1)[rows]
        return ChunkedNLL.apply(picked, weight, None, target, everywhere, at.size.mask, SimpleNamespace()).sum()

    ways = {
        "released: all rows, full logits": released, "masked rows, full logits": plain,
        "masked rows, torch linear_cross_entropy": fused, "masked rows, ChunkedNLL (ours)": chunked,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(rounds + 1):
        for name, way in ways.items():
            hidden.grad = weight.grad = None
            start = time.perf_counter()
            way().backward()
            if n:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def head_report(at: Setting, rounds: int, command: list[str]) -> dict[str, Any]:
    """Print memory and times of head + loss; the same as JSON has it."""
    memory = {}
    for which in ("naive", "ours"):
        done = subprocess.run([*command, "--head", which], capture_output=True, text=True, check=True)
        memory[which] = int(done.stdout)
    gradient = at.size.vocab * at.size.width * 4
    above = {which: value - gradient for which, value in memory.items()}
    for which, value in memory.items():
        print(f"head + loss, {which}: {above[which] / 1e6:.0f} MB above the weight gradient, {value / 1e6:.0f} with it")
    print(
        f"memory ratio {above['ours'] / above['naive']:.3f} ({memory['ours'] / memory['naive']:.3f} with the gradient)"
    )
    times = head_times(at, rounds)
    for name, took in times.items():
        print(f"head + loss, {name}: {took * 1e3:.0f} ms")
    return {"head_memory_bytes": memory, "head_seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", choices=tuple(SIZES), default="135m")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--dtype", choices=("autocast", "float32"), default="autocast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=tuple(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--no-head", action="store_true", help="leave out head + loss and the HF Trainer")
    parser.add_argument("--head", choices=("naive", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SIZES[args.shape]
    size = replace(size, layers=args.layers or size.layers)
    at = Setting(size, args.dtype, args.micro_batch, args.length, pick_device(args.device))
    if args.head:
        print(head_memory(args.head, at))
        return
    seconds = step_times(at, args.only, args.rounds)
    result: dict[str, Any] = {"machine": describe(), "arguments": {k: v for k, v in vars(args).items() if k != "head"}}
    if at.device.type == "cuda":
        result["cuda_peak_bytes"] = torch.cuda.max_memory_allocated()
        print(f"peak memory of all of them together: {result['cuda_peak_bytes'] / 1e9:.1f} GB")
    gc.collect()  # the contenders are gone, and so are their weights
    if not args.no_head and at.device.type == "cpu":
        bf16 = at.autocast is not None
        trainer = HFTrainerBaseline(size.build(), size.mask, bf16=bf16, batch_size=at.batch, lr=RATE)
        steps = max(3, args.rounds // 2)
        trainer.run(list(texts(0, size, at.batch * (steps + 2), at.length)), steps, warmup=2)
        seconds["HF Trainer (own turn)"] = list(trainer.step_seconds)
    result["steps"] = step_table(at, seconds)
    if not args.no_head and at.device.type == "cpu":
        command = [sys.executable, __file__, "--shape", args.shape, "--dtype", args.dtype]
        command += ["--length", str(at.length), "--micro-batch", str(at.batch)]
        result |= head_report(at, args.rounds, command)
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result))


if __name__ == "__main__":
    main()
