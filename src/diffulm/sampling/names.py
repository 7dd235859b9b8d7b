"""Policies by the names that the command line takes."""

from __future__ import annotations

from collections.abc import Callable

from .policies import (
    Ancestral,
    Entropy,
    EntropyBound,
    Factor,
    FirstHitting,
    Margin,
    Policy,
    RandomOrder,
    Remask,
    Threshold,
    TopConfidence,
)

POLICIES: dict[str, Callable[..., Policy]] = {
    "confidence": TopConfidence,
    "entropy": Entropy,
    "margin": Margin,
    "random": RandomOrder,
    "first-hitting": FirstHitting,
    "ancestral": Ancestral,
    "threshold": Threshold,
    "factor": Factor,
    "entropy-bound": EntropyBound,
    "remask": Remask,
}
#: How those that take a number, and perhaps a word behind it, are written.
WRITTEN = {
    "threshold": "threshold:TAU or threshold:TAU:confident with TAU in (0, 1]",
    "factor": "factor:F with F > 0",
    "entropy-bound": "entropy-bound:GAMMA with GAMMA >= 0 nats",
    "remask": "remask:ETA or remask:ETA:rescale with ETA in [0, 1]",
}


def policy_from_name(name: str) -> Policy:
    """A policy as the command line writes it: a name of `POLICIES`, and for those in `WRITTEN` `:NUMBER[:WORD]`.

    ValueError, saying what can be written, for anything else.
    """
    kind, *values = name.split(":")
    if kind not in POLICIES or (values and kind not in WRITTEN):
        raise ValueError(f"unknown policy {name!r}: use {', '.join(POLICIES)}, threshold:TAU, ... (--help lists them)")
    try:
        return POLICIES[kind](*(float(value) for value in values[:1]), *values[1:])
    except (TypeError, ValueError) as error:
        raise ValueError(f"policy {name!r}: write {WRITTEN[kind]}") from error
