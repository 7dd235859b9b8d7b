"""Checkpoints: bit-identical back, the newest whole one wins, and nothing is half-written."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from diffulm.train import checkpoint
from diffulm.train.checkpoint import checkpoints, full_model_state, latest, restore, save
from diffulm.train.config import Recipe, to_dict
from diffulm.train.metrics import read_metrics
from diffulm.train.optim import build_optimizers
from diffulm.train.step import train_step

from .tiny import CONFIG, make_denoiser, make_loader, numbers, run, same_weights, weights

#: A checkpoint at every step, and all of them kept.
OFTEN = replace(CONFIG, checkpoint_minutes=0.0, keep=100)


def trained(dtype: str = "float32", steps: int = 2, **changes: Any) -> tuple[Any, list[torch.optim.Optimizer]]:
    denoiser = make_denoiser(dtype, **changes)
    optimizers = build_optimizers(denoiser, CONFIG)
    for step in range(steps):
        assert train_step(denoiser, optimizers, make_loader().rows(step), step, 1e-2, CONFIG)
    return denoiser, optimizers


def moments(denoiser: Any, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    names = {p: name for name, p in denoiser.named_parameters()}
    return {
        f"{names[p]}.{k}": v
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for k, v in state.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "autocast"])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_restore_are_bit_identical(tmp_path: Path, dtype: str, tied: bool) -> None:
    one, optimizers = trained(dtype, tie_word_embeddings=tied)
    optimizers[0].param_groups[0]["lr"] = 0.123456789
    path = save(tmp_path, one, optimizers, {"step": 2, "seconds": 1.5, "settings": {"a": [1, None]}}, keep=2)
    two = make_denoiser(dtype, seed=9, tie_word_embeddings=tied)
    other = build_optimizers(two, CONFIG)
    found = latest(tmp_path)
    assert found is not None and found[0] == path
    assert {k: found[1][k] for k in ("step", "seconds", "settings")} == {
        "step": 2, "seconds": 1.5, "settings": {"a": [1, None]},
    }  # fmt: skip
    assert not same_weights(one, two)
    restore(*found, two, other)
    assert same_weights(one, two) and (two.head.weight is two.model.get_input_embeddings().weight) == tied
    a, b = moments(one, optimizers), moments(two, other)
    assert a.keys() == b.keys() and len(a) == 3 * len(weights(one))
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    settings = [
        [{k: v for k, v in (g | {"betas": [*g["betas"]]}).items() if k != "params"} for g in o.param_groups]
        for o in (optimizers[0], other[0])
    ]
    assert settings[0] == settings[1] and settings[1][0]["lr"] == 0.123456789
    # and what follows is the same too
    for denoiser, used in ((one, optimizers), (two, other)):
        assert train_step(denoiser, used, make_loader().rows(2), 2, 1e-2, CONFIG)
    assert same_weights(one, two)


def test_the_files_are_plain_and_every_tensor_is_there_once(tmp_path: Path) -> None:
    denoiser, optimizers = trained()
    path = save(tmp_path, denoiser, optimizers, {"step": 2}, keep=1)
    assert sorted(p.name for p in path.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert full_model_state(denoiser).keys() == weights(denoiser).keys(), "a tied head is no second tensor"
    assert json.loads((path / "state.json").read_text())["step"] == 2


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def raise_step(path: Path) -> None:
    """One digit, and the file is still valid JSON."""
    text = path.read_text()
    assert '"step": 8' in text
    path.write_text(text.replace('"step": 8', '"step": 9'))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated model": lambda p: truncate(p / "model.safetensors"),
    "flipped model": lambda p: flip(p / "model.safetensors"),
    "flipped moments": lambda p: flip(p / "optimizer.safetensors"),
    "empty moments": lambda p: (p / "optimizer.safetensors").write_bytes(b""),
    "no model": lambda p: (p / "model.safetensors").unlink(),
    "no state": lambda p: (p / "state.json").unlink(),
    "truncated state": lambda p: truncate(p / "state.json"),
    "flipped state": lambda p: raise_step(p / "state.json"),
    "binary state": lambda p: (p / "state.json").write_bytes(b"\xff\x00"),
    "list state": lambda p: (p / "state.json").write_text("[1]"),
    "nothing": lambda p: [f.unlink() for f in p.iterdir()] and None,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a checkpoint of each of its 8 steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(folder, OFTEN)
    assert [p.name for p in checkpoints(folder)] == [f"step-{k:08d}" for k in range(1, 9)]
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over_aloud(
    finished: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(finished, OFTEN)
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    DAMAGE[damage](out / "step-00000008")
    with caplog.at_level(logging.WARNING):
        found = latest(out)
    assert found is not None and found[0].name == "step-00000007" and found[1]["step"] == 7
    assert "step-00000008 is damaged" in caplog.text and "trying the one before it" in caplog.text
    assert same_weights(run(out, OFTEN), expected), "step 8 again, from step 7"
    found = latest(out)
    assert found is not None and found[0].name == "step-00000008"
    assert numbers(out) == numbers(finished)


def test_several_damaged_ones_and_none_left(finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for path in checkpoints(out)[3:]:
        flip(path / "model.safetensors")
    found = latest(out)
    assert found is not None and found[0].name == "step-00000003" and caplog.text.count("is damaged") == 5
    for path in checkpoints(out):
        truncate(path / "state.json")
    caplog.clear()
    assert latest(out) is None and caplog.text.count("is damaged") == 8
    assert same_weights(run(out, OFTEN), run(finished, OFTEN)), "from the start, and all warnings were said"
    assert latest(tmp_path / "nowhere") is None


def test_the_newest_are_kept_and_a_damaged_one_pushes_none_out(tmp_path: Path) -> None:
    denoiser, optimizers = trained()
    for step in (1, 2, 3, 4):
        save(tmp_path, denoiser, optimizers, {"step": step}, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    # A run that went on from step 4 because step 9 is damaged, keeping one:
    (tmp_path / "step-00000009").mkdir()
    save(tmp_path, denoiser, optimizers, {"step": 5}, keep=1)
    found = latest(tmp_path)
    assert found is not None and found[1]["step"] == 5
    save(tmp_path, denoiser, optimizers, {"step": 10}, keep=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000010"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    denoiser, optimizers = trained()
    (tmp_path / ".step-00000001.12345.tmp").mkdir()
    (tmp_path / ".step-00000001.12345.tmp" / "model.safetensors").write_bytes(b"half")
    assert latest(tmp_path) is None
    save(tmp_path, denoiser, optimizers, {"step": 1}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("file", [1, 2])
def test_a_full_disk_leaves_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: int
) -> None:
    """The disk fills up in the first or second file of the checkpoint of step 6."""
    real, calls = checkpoint.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 10 + file:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(checkpoint, "save_file", full)
        run(tmp_path / "a", OFTEN)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "metrics.jsonl", *[f"step-{k:08d}" for k in range(1, 6)],
    ]  # fmt: skip
    assert same_weights(run(tmp_path / "a", OFTEN), run(tmp_path / "b", OFTEN))
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


def test_a_resume_with_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    def settings(arm: str = "adapted", **changes: Any) -> dict[str, Any]:
        return {"recipe": json.loads(json.dumps(to_dict(Recipe(train=replace(CONFIG, **changes))))), "arm": arm}

    run(tmp_path, settings=settings())
    with pytest.raises(ValueError) as caught:
        run(tmp_path, settings=settings("continued", learning_rate=0.5, betas=(0.9, 0.95)))
    assert str(caught.value).endswith(
        "was trained with other settings (train.learning_rate: 0.01 there, 0.5 here; train.betas: [0.9, 0.999] there, "
        "[0.9, 0.95] here; arm: 'adapted' there, 'continued' here); use another --out"
    )
    # What only says how the machine does it may change, and a recipe older than a key has the key's default.
    run(tmp_path, settings=settings(micro_batch=1, replicas=2, activation_checkpointing=True, async_checkpoint=True))
    older = settings()
    del older["recipe"]["train"]["optimizer"]
    run(tmp_path, settings=older)


@pytest.mark.parametrize("changes", [{"hidden_size": 16}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}])
def test_a_model_of_another_shape_is_refused_untouched(tmp_path: Path, changes: dict[str, int]) -> None:
    run(tmp_path)
    other = make_denoiser("float32", **changes)
    before = weights(other)
    with pytest.raises(ValueError, match="belongs to another model"):
        run(tmp_path, denoiser=other)
    assert same_weights(before, other)


# ------------------------------------------------------------------------------------- background, shards

ASYNC = replace(OFTEN, async_checkpoint=True)


def state_of(path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Weights and moments of a checkpoint, put into a fresh model."""
    denoiser = make_denoiser("float32", seed=5, **changes)
    optimizers = build_optimizers(denoiser, CONFIG)
    restore(path, json.loads((path / "state.json").read_text()), denoiser, optimizers)
    return weights(denoiser) | moments(denoiser, optimizers)


def test_writing_in_the_background_changes_nothing(tmp_path: Path) -> None:
    """A checkpoint at every step while training goes on: each holds its own step, and the end is the same."""
    expected = run(tmp_path / "a", OFTEN)
    assert same_weights(run(tmp_path / "b", ASYNC), expected)
    found = []
    for one, two in zip(checkpoints(tmp_path / "a"), checkpoints(tmp_path / "b"), strict=True):
        found.append(state_of(one))
        assert same_weights(found[-1], state_of(two)) and len(found[-1]) == 4 * len(weights(expected))
    assert len(found) == 8 and not same_weights(found[0], found[1])


def test_a_disk_that_fills_up_in_the_background_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a checkpoint written behind the training ends the run as it is; the ones before it stay."""
    real, calls = checkpoint.save_file, []

    def full(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(checkpoint, "save_file", full)
        run(tmp_path / "a", ASYNC)
    assert [p.name for p in sorted((tmp_path / "a").glob("*step*"))] == [f"step-0000000{k}" for k in (1, 2, 3)]
    assert same_weights(run(tmp_path / "a", ASYNC), run(tmp_path / "b", ASYNC))


shards_of_one = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints in the form that several processes write."""
    monkeypatch.setattr(checkpoint, "_save_whole", checkpoint._save_shards)


@shards_of_one
def test_shards_hold_the_same(tmp_path: Path, sharded: None) -> None:
    expected = run(tmp_path / "shards", OFTEN)
    (newest,) = checkpoints(tmp_path / "shards")[-1:]
    assert sorted(p.name for p in newest.iterdir()) == [".metadata", "__0_0.distcp", "state.json"]
    assert same_weights({k: v for k, v in state_of(newest).items() if k in weights(expected)}, expected)
    other = run(tmp_path / "again", ASYNC)
    assert same_weights(other, expected)
    for one, two in zip(*(checkpoints(tmp_path / name) for name in ("shards", "again")), strict=True):
        assert same_weights(state_of(one), state_of(two))


@shards_of_one
@pytest.mark.parametrize("damage", ["truncated", "flipped", "no index", "truncated index", "no shard"])
def test_a_damaged_shard_is_passed_over_aloud(
    finished: Path, tmp_path: Path, damage: str, sharded: None, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(tmp_path, OFTEN)
    newest = tmp_path / "step-00000008"
    shard, index = newest / "__0_0.distcp", newest / ".metadata"
    {
        "truncated": lambda: truncate(shard), "flipped": lambda: flip(shard), "no index": index.unlink,
        "truncated index": lambda: truncate(index), "no shard": shard.unlink,
    }[damage]()  # fmt: skip
    assert same_weights(run(tmp_path, OFTEN), expected), "step 8 again, from step 7"
    assert "step-00000008 is damaged" in caplog.text and "trying the one before it" in caplog.text
    assert numbers(tmp_path) == numbers(finished)


@shards_of_one
def test_shards_of_another_shape_are_refused_untouched(tmp_path: Path, sharded: None) -> None:
    run(tmp_path)
    other = make_denoiser("float32", hidden_size=16)
    before = weights(other)
    with pytest.raises(ValueError, match="belongs to another model"):
        run(tmp_path, denoiser=other)
    assert same_weights(before, other)


@shards_of_one
@pytest.mark.parametrize("config", [OFTEN, ASYNC])
def test_a_disk_that_is_full_of_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any, sharded: None
) -> None:
    """DCP wraps the error; what ends the run is the disk's own, and the checkpoints before it stay."""
    real, calls = FileSystemWriter.write_data, []

    def full(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(FileSystemWriter, "write_data", full)
        run(tmp_path / "a", config)
    assert [p.name for p in sorted((tmp_path / "a").glob("*step*"))] == [f"step-0000000{k}" for k in (1, 2, 3)]
    assert same_weights(run(tmp_path / "a", config), run(tmp_path / "b", config))


# ----------------------------------------------------------------------------------------------------- Muon

MUON = replace(OFTEN, optimizer="muon", learning_rate=3e-3)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_muon_resumes_exactly(tmp_path: Path, asynchronous: bool) -> None:
    config = replace(MUON, async_checkpoint=asynchronous)
    expected = run(tmp_path / "a", config)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in checkpoints(tmp_path / "b")[3:]:
        shutil.rmtree(path)
    assert same_weights(run(tmp_path / "b", config), expected)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert not same_weights(run(tmp_path / "c", replace(config, optimizer="adamw")), expected)


# --------------------------------------------------------------------------------------------------- kill -9

KILLS, STEPS = 24, 60
LONG = replace(OFTEN, steps=STEPS, keep=2)


def victim(out: Path, config: Any) -> None:
    """What the process that is killed does."""
    run(out, config)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["files", "background"])
def test_kill_9_at_random_moments(tmp_path: Path, how: str) -> None:
    """24 kills, checkpoint writes included (there is one after every step): bit for bit the undisturbed run."""
    config = replace(LONG, async_checkpoint=how == "background")
    began = time.monotonic()
    expected = run(tmp_path / "a", config)
    took = time.monotonic() - began
    out, rng = tmp_path / "b", random.Random(how)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    aside = kills = 0
    while kills < KILLS or (aside < 3 and kills < 10 * KILLS):  # where disks are fast, few fall into a write
        done = len(read_metrics(out))
        process = server.Process(target=victim, args=(out, config))
        process.start()
        while process.is_alive() and len(read_metrics(out)) <= done:  # let it get somewhere
            time.sleep(0.002)
        time.sleep(took / STEPS * 2 * rng.random())
        process.kill()
        process.join()
        if process.exitcode == 0:  # done before it was struck: begin again
            assert same_weights(run(out, config), expected)
            shutil.rmtree(out)
            continue
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        aside += any(out.glob(".step-*.tmp"))
    assert aside >= 3, "kills must fall into the writing of checkpoints too"
    assert same_weights(run(out, config), expected)
    assert numbers(out) == numbers(tmp_path / "a") and not list(out.glob(".*.tmp"))
