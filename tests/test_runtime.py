"""Devices and processes: which GPU a process gets, and what is refused."""

from __future__ import annotations

import pytest
import torch

from diffulm import runtime


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that says it has two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return monkeypatch


@pytest.mark.parametrize("name", [None, "cuda"])
def test_each_process_of_a_node_gets_a_gpu(gpus: pytest.MonkeyPatch, name: str | None) -> None:
    for local in (0, 1):
        gpus.setenv("LOCAL_RANK", str(local))
        assert runtime.pick_device(name) == torch.device("cuda", local)
    gpus.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="this node has 2; start torchrun with --nproc-per-node 2"):
        runtime.pick_device(name)
    assert runtime.pick_device("cpu") == torch.device("cpu")


def test_one_gpu_for_all_processes_is_refused(gpus: pytest.MonkeyPatch) -> None:
    assert runtime.pick_device("cuda:1") == torch.device("cuda", 1)
    gpus.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="use --device cuda, a GPU for each"):
        runtime.pick_device("cuda:1")
