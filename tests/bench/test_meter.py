"""What a run cost is what was really computed."""

from __future__ import annotations

import sys
import time

import pytest
import torch
from torch import Tensor, nn

from diffulm.bench.meter import Meter, measured

CPU = torch.device("cpu")


class Backbone(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


def test_forwards_rows_and_the_first_token() -> None:
    model, other = Backbone(), Backbone()

    def work(meter: Meter) -> Tensor:
        meter.seen = lambda ids: ids.shape[1] == 1
        model(torch.zeros(2, 5))
        time.sleep(0.02)
        other(input_ids=torch.zeros(2, 1))
        time.sleep(0.02)
        return model(torch.zeros(2, 1))

    out, meter = measured(work, [model, other], CPU)
    assert out.shape == (2, 1) and (meter.forwards, meter.rows) == (3, 14)
    assert 0.02 <= meter.first < meter.seconds - 0.015, "the first forward that saw it, not a later one"
    model(torch.zeros(2, 5))
    assert meter.forwards == 3, "the hooks are gone"


def test_what_says_nothing_stands_at_the_end_and_what_says_it_twice_at_the_first() -> None:
    _, silent = measured(lambda meter: (time.sleep(0.01), torch.zeros(1))[1], [], CPU)
    assert silent.first >= 0.01 and silent.forwards == 0

    def twice(meter: Meter) -> Tensor:
        meter.stands()
        time.sleep(0.02)
        meter.stands()
        return torch.zeros(1)

    meter = measured(twice, [], CPU)[1]
    assert meter.first < meter.seconds - 0.015


def test_hooks_go_when_a_run_fails() -> None:
    model = Backbone()

    def fails(meter: Meter) -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        measured(fails, [model], CPU)
    assert not model._forward_pre_hooks


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_is_that_of_the_run_and_not_of_earlier_ones() -> None:
    def work(megabytes: int) -> int:
        _, meter = measured(lambda _: torch.ones(megabytes * 250_000).sum(), [], CPU)
        if meter.memory is None:
            pytest.skip("this system lets nobody reset the peak")
        return meter.memory

    assert 190e6 < work(200) < 260e6
    assert 40e6 < work(50) < 100e6, "the first run's peak is forgotten"
