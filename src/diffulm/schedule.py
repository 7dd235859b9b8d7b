"""Noise schedules: how likely a token is still clean at time t.

t = 0 is clean, t = 1 is fully masked. A schedule gives alpha(t), the probability that a token is still clean,
and the weight of the masked cross-entropy in the continuous-time bound, -alpha'(t) / (1 - alpha(t))
(continuous-time objective of arXiv 2410.17891; MD4, arXiv 2406.04329). Linear: alpha = 1 - t and the weight is 1/t.
Adding a schedule is adding one class here and naming it in `SCHEDULES`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Schedule(Protocol):
    """alpha(t) and the loss weight; `t` is a float tensor in (0, 1], any shape, and so is the result."""

    def alpha(self, t: Tensor) -> Tensor: ...

    def weight(self, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Linear:
    """alpha(t) = 1 - t: a token is masked with probability t (the paper's schedule)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def weight(self, t: Tensor) -> Tensor:
        return 1 / t


@dataclass(frozen=True)
class Cosine:
    """alpha(t) = 1 - cos(pi/2 (1 - t)): more of the time is spent at light noise (MD4)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - (math.pi / 2 * (1 - t)).cos()

    def weight(self, t: Tensor) -> Tensor:
        return math.pi / 2 * (math.pi / 2 * (1 - t)).tan()


@dataclass(frozen=True)
class Polynomial:
    """alpha(t) = 1 - t**power (MD4); power = 1 is `Linear`."""

    power: float = 2.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ValueError(f"the power of a polynomial schedule must be positive, not {self.power}")

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t**self.power

    def weight(self, t: Tensor) -> Tensor:
        return self.power / t


def schedule_from_name(name: str) -> Schedule:
    """`linear`, `cosine`, `polynomial` or `polynomial:POWER`, as written in recipes and config.json."""
    kind, _, power = name.partition(":")
    if kind == "polynomial":
        try:
            return Polynomial(float(power)) if power else Polynomial()
        except ValueError as error:
            raise ValueError(f"schedule {name!r}: write polynomial:POWER with a positive number") from error
    if kind in ("linear", "cosine") and not power:
        return Linear() if kind == "linear" else Cosine()
    raise ValueError(f"unknown schedule {name!r}: use linear, cosine or polynomial:POWER")


def schedule_name(schedule: Schedule) -> str:
    """The inverse of `schedule_from_name`."""
    if isinstance(schedule, Polynomial):
        return "polynomial:" + repr(float(schedule.power)).removesuffix(".0")
    return type(schedule).__name__.lower()
