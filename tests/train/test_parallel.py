"""Two gloo processes under torchrun train as one process does, and their checkpoints fit each other.

This file is also the program that torchrun starts.
"""

from __future__ import annotations

import json
import os
import shutil
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
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from diffulm.denoiser import HFDenoiser
from diffulm.layout import Annealing
from diffulm.runtime import can_compile
from diffulm.train.budget import Budget, find_budget, plan_budget
from diffulm.train.checkpoint import full_model_state, latest, restore
from diffulm.train.config import TrainConfig
from diffulm.train.group import Terminated, process_group, rank_and_world
from diffulm.train.loop import Progress
from diffulm.train.metrics import read_metrics
from diffulm.train.optim import build_optimizers
from diffulm.train.parallel import check_world, layers_of, parallelize

from .tiny import CONFIG, LENGTH, make_denoiser, make_loader, run, same_weights, weights

ROOT = Path(__file__).parents[2]


def job(
    out: Path, *, family: str = "llama", stop: int = 0, minutes: bool = False, micro: int = 2, dtype: str = "float64",
    recompute: bool = False, replicas: int = 1, load: bool = False, fail: bool = False, compile: bool = False,
    **config: Any,
) -> None:  # fmt: skip
    """Some annealed steps with held-out values, on one process or on what torchrun describes.

    stop: interrupted after that step. load: nothing is trained; the newest checkpoint is read and written back.
    """
    rank, _ = rank_and_world()
    settings = {"steps": None if minutes else 5, "minutes": 0.002 if minutes else None, "micro_batch": micro}
    settings["checkpoint_minutes"] = 0.0 if stop else 9.0
    settings = replace(CONFIG, **{**settings, **config})
    denoiser = make_denoiser(dtype, family=family)
    parallelize(denoiser, denoiser.precision, compile=compile, activation_checkpointing=recompute, replicas=replicas)
    if load:
        write_loaded(out, denoiser, settings)
        return
    annealing = Annealing(3, seed=1)
    batches = make_loader(settings, annealing=annealing)
    held = make_loader(replace(settings, seed=99)).rows(0)

    def heldout() -> float:
        if fail and rank == 1:
            raise ValueError("this process has had enough")
        return sum(float((denoiser.nll(rows) * rows.weight).sum()) for rows in held)

    def report(p: Progress) -> None:  # rank 0 only: the other rank must agree to stop
        if p.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    def find() -> Budget:
        return find_budget(settings, batches, denoiser, length=LENGTH, device=torch.device("cpu"))

    budget = plan_budget(out, find)
    if minutes:
        save_ranks(out, {"budget": vars(budget)})
        budget = replace(budget, steps=2)
    try:
        run(
            out, settings, denoiser=denoiser, batches=batches, budget=budget, heldout=heldout, report=report,
            anneal_ratio=annealing.ratio,
        )  # fmt: skip
    except Terminated:
        save_ranks(out, {"interrupted": True})
    state = full_model_state(denoiser)
    if rank == 0:
        save_file(state, out / "final.safetensors")


def write_loaded(out: Path, denoiser: HFDenoiser, config: TrainConfig) -> None:
    """loaded.safetensors: weights and moments of the newest checkpoint as this many processes read them."""
    optimizers = build_optimizers(denoiser, config)
    found = latest(out)
    assert found is not None
    restore(*found, denoiser, optimizers)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    moments = get_optimizer_state_dict(denoiser, optimizers, options=whole).get("state", {})
    values = {f"{name}.{k}": v for name, state in moments.items() for k, v in state.items()}  # type: ignore[union-attr]
    if rank_and_world()[0] == 0:
        save_file(values, out / "loaded-moments.safetensors")
    weights = full_model_state(denoiser)
    if rank_and_world()[0] == 0:
        save_file(weights, out / "loaded.safetensors")


def save_ranks(out: Path, value: Any) -> None:
    (out / f"rank-{rank_and_world()[0]}.json").write_text(json.dumps(value))


def several(processes: int, jobs: dict[Path, dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    """Jobs one after the other under one torchrun; all of stdout and stderr on failure."""
    return torchrun(
        processes, "tests.train.test_parallel", json.dumps({str(out): options for out, options in jobs.items()})
    )


def torchrun(processes: int, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A test module as a program of several processes; AssertionError with stdout and stderr when it fails."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            "-m", module, *arguments,
        ],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def two(out: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return several(2, {out: options})


def difference(one: Path, other: Path, file: str = "final") -> float:
    """The largest between the weights of two runs."""
    a, b = (load_file(path / f"{file}.safetensors") for path in (one, other))
    assert a.keys() == b.keys() and len(a) > 10 and all(a[k].dtype == b[k].dtype for k in a)
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def compare(
    one: Path,
    other: Path,
    *,
    steps: Sequence[int] = range(1, 6),
    weights: float = 1e-10,
    rel: float = 1e-10,
    norm: float | None = None,
) -> None:
    """Weights, and every step's figures, are the same but for rounding; `norm`: relative, of gradients (`rel`)."""
    assert difference(one, other) < weights
    mine, theirs = read_metrics(one), read_metrics(other)
    assert [r["step"] for r in mine] == [r["step"] for r in theirs] == list(steps)
    for x, y in zip(mine, theirs, strict=True):
        for key in ("loss", "grad_norm", "heldout"):
            assert (x[key] is None) == (y[key] is None), key
            close = norm if norm and key == "grad_norm" else rel
            assert x[key] is None or x[key] == pytest.approx(y[key], rel=close), key
        assert (x["tokens"], x["learning_rate"], x["annealing"]) == (y["tokens"], y["learning_rate"], y["annealing"])
        assert [n for _, n in x["by_level"]] == [n for _, n in y["by_level"]], "the counts of both ranks"
        for (p, _), (q, _) in zip(x["by_level"], y["by_level"], strict=True):
            assert p == pytest.approx(q, abs=max(1e-2, rel * abs(q)))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    job(folder)
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one(one: Path, tmp_path: Path) -> None:
    """In float64, step by step within 1e-10; whatever is recomputed, replicated, or written in the background."""
    job(tmp_path / "gpt2", family="gpt2")
    several(2, {
        tmp_path / "plain": {"micro": 1},
        tmp_path / "recomputed": {"recompute": True},
        tmp_path / "replicated": {"replicas": 2},
        tmp_path / "background": {"async_checkpoint": True, "checkpoint_minutes": 0.0},
        tmp_path / "two of gpt2": {"family": "gpt2", "recompute": True},
    })  # fmt: skip
    for name in ("plain", "recomputed", "replicated", "background"):
        compare(one, tmp_path / name)
    compare(tmp_path / "gpt2", tmp_path / "two of gpt2")
    assert not list((tmp_path / "background").glob(".*"))
    assert sorted(p.name for p in (tmp_path / "background" / "step-00000005").iterdir()) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp", "state.json",
    ]  # fmt: skip


TWENTY = {"steps": 20, "dtype": "float32", "learning_rate": 1e-3}


@pytest.mark.slow
def test_twenty_steps_in_float32(tmp_path: Path) -> None:
    """Two processes = one, also recomputed and replicated; with autocast and Muon (bfloat16 inside) more loosely."""
    variants: dict[str, dict[str, Any]] = {
        "plain": {}, "recomputed": {"recompute": True}, "replicated": {"replicas": 2},
        "autocast": {"dtype": "autocast"}, "muon": {"optimizer": "muon"},
    }  # fmt: skip
    several(2, {tmp_path / name: {**TWENTY, **variant} for name, variant in variants.items()})
    job(tmp_path / "one", **TWENTY)
    for name in ("plain", "recomputed", "replicated"):
        compare(tmp_path / "one", tmp_path / name, steps=range(1, 21), weights=1e-4, rel=1e-3)
    moved = difference(tmp_path / "one", start(tmp_path / "start"))
    assert moved > 50 * 1e-4, "training must have moved the weights by far more than the tolerance"
    # A gradient's norm in bfloat16 differs by 1% to 3%, by the kernels of the CPU; a factor forgotten is 100%.
    for name, rel, norm in (("autocast", 5e-3, 0.1), ("muon", 0.02, 0.02)):
        alone = tmp_path / f"{name} alone"
        job(alone, **{**TWENTY, **variants[name]})
        compare(alone, tmp_path / name, steps=range(1, 21), weights=moved, rel=rel, norm=norm)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch.compile
def test_compiled_layers_of_two_processes(tmp_path: Path) -> None:
    """Compiling, recomputing and sharding together change nothing but rounding, and torch compiles to the end."""
    if not can_compile():
        pytest.skip("torch.compile does not work here")
    few = {**TWENTY, "steps": 4, "compile": True}
    job(tmp_path / "one", **{**few, "compile": False})
    # In one process, so that their variants add up: they are more than torch allows by itself.
    done = several(2, {tmp_path / "plain": few, tmp_path / "recomputed": {**few, "recompute": True}})
    for name in ("plain", "recomputed"):
        compare(tmp_path / "one", tmp_path / name, steps=range(1, 5), weights=1e-4, rel=1e-3)
    assert "recompile_limit" not in done.stdout + done.stderr


def start(folder: Path) -> Path:
    """The weights that every float32 job begins from."""
    folder.mkdir()
    save_file(full_model_state(make_denoiser("float32")), folder / "final.safetensors")
    return folder


@pytest.mark.slow
def test_four_processes_as_two_replicas_of_two_shards(one: Path, tmp_path: Path) -> None:
    several(4, {tmp_path / "four": {"replicas": 2}, tmp_path / "plain": {"micro": 1}})
    compare(one, tmp_path / "four")
    compare(one, tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_of_two_resumes_on_one_and_back(tmp_path: Path, optimizer: str) -> None:
    """Only rank 0 gets the signal; both stop after the same step. Loaded elsewhere: the same bits."""
    expected, out, back = tmp_path / "one", tmp_path / "out", tmp_path / "back"
    choice = {"optimizer": optimizer, "async_checkpoint": optimizer == "muon"}
    job(expected, **choice)
    two(out, stop=3, **choice)
    assert all(json.loads((out / f"rank-{r}.json").read_text()) == {"interrupted": True} for r in (0, 1))
    assert (out / "step-00000003" / ".metadata").is_file() and len(read_metrics(out)) == 3
    job(out, load=True, **choice)
    assert difference(out, rename(out), "loaded") == 0
    shutil.copytree(out, back)
    job(back, stop=4, **choice)
    assert (back / "step-00000004" / "model.safetensors").is_file()
    job(back, load=True, **choice)
    alone = rename(back, also=("loaded-moments",))
    several(2, {back: {"load": True, **choice}})
    assert difference(back, alone, "loaded") == 0 == difference(back, alone, "loaded-moments")
    several(2, {back: choice})
    job(out, **choice)
    for folder in (out, back):
        if optimizer == "adamw":
            compare(expected, folder)
        else:  # bfloat16 inside: a gradient that differs in the last bit may round otherwise
            compare(expected, folder, weights=1e-2, rel=0.02)


def rename(folder: Path, also: Sequence[str] = ()) -> Path:
    """A folder beside it whose "loaded" is what it holds now: final weights, or what was loaded."""
    other = folder.with_name(folder.name + " before")
    other.mkdir()
    source = "loaded" if also else "final"
    shutil.copy(folder / f"{source}.safetensors", other / "loaded.safetensors")
    for name in also:
        shutil.copy(folder / f"{name}.safetensors", other / f"{name}.safetensors")
    return other


@pytest.mark.slow
def test_ranks_agree_on_a_budget_in_minutes(tmp_path: Path) -> None:
    two(tmp_path, minutes=True)
    budgets = [json.loads((tmp_path / f"rank-{rank}.json").read_text())["budget"] for rank in (0, 1)]
    assert budgets[0] == budgets[1] == json.loads((tmp_path / "budget.json").read_text())
    assert len(read_metrics(tmp_path)) == 2


@pytest.mark.slow
def test_teardown_is_quiet(tmp_path: Path) -> None:
    """Exit with sharded modules alive aborts at random; three runs in a row end in order."""
    for k in range(3):
        done = two(tmp_path / str(k), stop=1)
        assert "terminate called" not in done.stderr and "SIGABRT" not in done.stderr


def test_layers_are_found() -> None:
    for family in ("llama", "gpt2", "qwen3"):
        layers = layers_of(make_denoiser(family=family).backbone)
        assert layers is not None and len(layers) == 2
    assert layers_of(torch.nn.Linear(1, 1)) is None
    assert isinstance(make_denoiser(), HFDenoiser) and isinstance(CONFIG, TrainConfig)


@pytest.mark.slow
def test_the_error_of_the_process_that_failed_is_the_one_that_is_seen(tmp_path: Path) -> None:
    """The other one, waiting for it, would report a broken connection; it ends in silence."""
    with pytest.raises(AssertionError) as caught:
        two(tmp_path, fail=True)
    text = str(caught.value)
    assert text.count("ValueError: this process has had enough") == 1
    assert "connection to another process broke" not in text and "[rank0]" not in text


def test_worlds_that_do_not_fit_are_refused_with_those_that_do() -> None:
    config = replace(CONFIG, batch=12)
    check_world(config, 1), check_world(config, 4), check_world(replace(config, replicas=2), 6)
    check_world(replace(config, replicas=8), 1)
    with pytest.raises(
        ValueError, match=r"8 processes do not divide train.batch = 12; start 1, 2, 3, 4 or 6, or set train.batch = 16"
    ):
        check_world(config, 8)
    with pytest.raises(ValueError, match=r"train.replicas = 4 does not divide 6 processes; use 1, 2, 3 or 6"):
        check_world(replace(config, replicas=4), 6)


def test_a_model_that_cannot_recompute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = make_denoiser()
    monkeypatch.setattr(type(denoiser.model), "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="cannot compute its activations again"):
        parallelize(denoiser, denoiser.precision, compile=False, activation_checkpointing=True)


def test_recomputing_keeps_less_and_changes_no_bit(tmp_path: Path) -> None:
    """What backward keeps shrinks; the trained weights are the same bits, dropout included."""
    kept, trained = [], []
    for recompute in (False, True):
        denoiser = make_denoiser("float32", family="gpt2")
        for module in denoiser.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        parallelize(denoiser, denoiser.precision, compile=False, activation_checkpointing=recompute)
        sizes: list[int] = []
        denoiser.train()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):  # type: ignore[misc]
            denoiser.nll(make_loader().rows(0)[0]).sum()
        kept.append(sum(sizes))
        trained.append(weights(run(tmp_path / str(recompute), denoiser=denoiser)))
    assert kept[1] < kept[0] / 2
    assert same_weights(*trained)


def main(arguments: list[str]) -> None:
    with process_group():
        for out, options in json.loads(arguments[0]).items():
            job(Path(out), **options)


if __name__ == "__main__":
    main(sys.argv[1:])
