"""One process is a group of its own; several are tried in test_parallel.py."""

from __future__ import annotations

import pytest

from diffulm.train.group import is_first, on_first_rank, process_group, rank_and_world


def test_one_process_does_its_own_work() -> None:
    assert on_first_rank(lambda: 5) == 5 and rank_and_world() == (0, 1) and is_first()
    with pytest.raises(ValueError, match="mine"), process_group():
        raise ValueError("mine")
