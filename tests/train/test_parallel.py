"""Two gloo processes under torchrun train as one process does, and their checkpoints fit each other.

This file is also the program that torchrun starts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffulm import runtime
from diffulm.denoiser import HFDenoiser
from diffulm.layout import Annealing
from diffulm.train.checkpoint import full_model_state
from diffulm.train.config import TrainConfig
from diffulm.train.loop import Budget, Progress, find_budget, plan_budget
from diffulm.train.metrics import read_metrics
from diffulm.train.parallel import layers_of, parallelize

from .tiny import CONFIG, LENGTH, make_denoiser, make_loader, run

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def job(out: Path, *, family: str, stop: int = 0, minutes: bool = False, micro: int = 2) -> None:
    """5 steps in float64, annealed, with held-out values; on one process or on what torchrun describes."""
    rank, _ = runtime.rank_and_world()
    config = replace(CONFIG, steps=None if minutes else 5, minutes=0.002 if minutes else None, micro_batch=micro)
    config = replace(config, checkpoint_minutes=0.0 if stop else 9.0)
    denoiser = make_denoiser("float64", family=family)
    parallelize(denoiser, denoiser.precision, compile=False)
    annealing = Annealing(3, seed=1)
    batches = make_loader(config, annealing=annealing)
    held = make_loader(replace(config, seed=99)).rows(0)

    def heldout() -> float:
        return sum(float((denoiser.nll(rows) * rows.weight).sum()) for rows in held)

    def report(p: Progress) -> None:  # rank 0 only: the other rank must agree to stop
        if p.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    def find() -> Budget:
        return find_budget(config, batches, denoiser, length=LENGTH, device=torch.device("cpu"))

    budget = plan_budget(out, find)
    if minutes:
        save_ranks(out, {"budget": vars(budget)})
        budget = replace(budget, steps=2)
    try:
        run(
            out, config, denoiser=denoiser, batches=batches, budget=budget, heldout=heldout, report=report,
            anneal_ratio=annealing.ratio,
        )  # fmt: skip
    except KeyboardInterrupt:
        save_ranks(out, {"interrupted": True})
        return
    finally:
        state = full_model_state(denoiser)
        if rank == 0:
            save_file(state, out / "final.safetensors")


def save_ranks(out: Path, value: Any) -> None:
    (out / f"rank-{runtime.rank_and_world()[0]}.json").write_text(json.dumps(value))


def two(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The job on two processes; all of stdout and stderr on failure."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
            "tests.train.test_parallel", str(out), *flags,
        ],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def compare(one: Path, other: Path, *, steps: Sequence[int] = range(1, 6)) -> None:
    a, b = load_file(one / "final.safetensors"), load_file(other / "final.safetensors")
    assert a.keys() == b.keys() and len(a) > 10
    for name in a:
        assert a[name].dtype == torch.float64 and (a[name] - b[name]).abs().max() < 1e-10, name
    mine, theirs = read_metrics(one), read_metrics(other)
    assert [r["step"] for r in mine] == [r["step"] for r in theirs] == list(steps)
    for x, y in zip(mine, theirs, strict=True):
        for key in ("loss", "grad_norm", "heldout"):
            assert x[key] == pytest.approx(y[key], rel=1e-10), key
        assert (x["tokens"], x["learning_rate"], x["annealing"]) == (y["tokens"], y["learning_rate"], y["annealing"])
        assert [n for _, n in x["by_level"]] == [n for _, n in y["by_level"]], "the counts of both ranks"
        for (p, _), (q, _) in zip(x["by_level"], y["by_level"], strict=True):
            assert p == pytest.approx(q, abs=1e-2)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    job(folder, family="llama")
    return folder


def test_two_processes_train_as_one(one: Path, tmp_path: Path) -> None:
    two(tmp_path, "--micro", "1")
    compare(one, tmp_path)


def test_two_processes_train_as_one_with_gpt2(tmp_path: Path) -> None:
    job(tmp_path / "one", family="gpt2")
    two(tmp_path / "two", "--family", "gpt2")
    compare(tmp_path / "one", tmp_path / "two")


def test_a_checkpoint_of_two_resumes_on_one(one: Path, tmp_path: Path) -> None:
    """Only rank 0 gets the signal; both stop after the same step."""
    two(tmp_path, "--stop", "3")
    assert all(json.loads((tmp_path / f"rank-{r}.json").read_text()) == {"interrupted": True} for r in (0, 1))
    assert (tmp_path / "step-00000003").is_dir() and len(read_metrics(tmp_path)) == 3
    job(tmp_path, family="llama")
    compare(one, tmp_path)


def test_a_checkpoint_of_one_resumes_on_two(one: Path, tmp_path: Path) -> None:
    job(tmp_path, family="llama", stop=2)
    assert (tmp_path / "step-00000002").is_dir() and len(read_metrics(tmp_path)) == 2
    two(tmp_path)
    compare(one, tmp_path)


def test_ranks_agree_on_a_budget_in_minutes(tmp_path: Path) -> None:
    two(tmp_path, "--minutes")
    budgets = [json.loads((tmp_path / f"rank-{rank}.json").read_text())["budget"] for rank in (0, 1)]
    assert budgets[0] == budgets[1] == json.loads((tmp_path / "budget.json").read_text())
    assert len(read_metrics(tmp_path)) == 2


def test_teardown_is_quiet(tmp_path: Path) -> None:
    """Exit with sharded modules alive aborts at random; three runs in a row end in order."""
    for k in range(3):
        done = two(tmp_path / str(k), "--stop", "1")
        assert "terminate called" not in done.stderr and "SIGABRT" not in done.stderr


def test_layers_are_found() -> None:
    for family in ("llama", "gpt2", "qwen3"):
        layers = layers_of(make_denoiser(family=family).backbone)
        assert layers is not None and len(layers) == 2
    assert layers_of(torch.nn.Linear(1, 1)) is None
    assert isinstance(make_denoiser(), HFDenoiser) and isinstance(CONFIG, TrainConfig)


def main(arguments: list[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", default="llama")
    parser.add_argument("--stop", type=int, default=0)
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--minutes", action="store_true")
    with runtime.process_group():
        job(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
