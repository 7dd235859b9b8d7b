"""What the thread that makes batches does to them for a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from diffulm.train.step import prefetched

from .tiny import make_loader


@pytest.mark.parametrize("device", [None, torch.device("cpu"), torch.device("cuda", 1)])
def test_batches_are_pinned_for_a_gpu_and_for_nothing_else(
    monkeypatch: pytest.MonkeyPatch, device: torch.device | None
) -> None:
    """On the process's own GPU: a new thread's is the first one."""
    pinned: list[torch.Tensor] = []
    entered: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    monkeypatch.setattr(torch.cuda, "device", lambda d: entered.append(d) or nullcontext())
    loader = make_loader()
    with prefetched(lambda n: loader.rows(n), 2, device) as rows:
        found = rows(0)
    expected = loader.rows(0)
    tensors = [value for micro in expected for value in vars(micro).values() if isinstance(value, torch.Tensor)]
    if device is None or device.type == "cpu":
        assert not pinned and not entered
    else:
        assert entered and set(entered) == {device}
        assert len(pinned) >= len(tensors) and all(torch.equal(a, b) for a, b in zip(pinned, tensors, strict=False))
    for one, other in zip(found, expected, strict=True):
        assert vars(one).keys() == vars(other).keys()
        for key, value in vars(one).items():
            there = getattr(other, key)
            assert torch.equal(value, there) if isinstance(value, torch.Tensor) else value == there, key
