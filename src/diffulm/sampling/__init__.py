"""Sampling: canvases, draws, policies and the one denoising loop."""

from .caches import BlockCache, DualCache, PrefixCache, Uncached, agreement
from .canvas import Canvas
from .constraints import Banned
from .denoise import denoise
from .draw import Draw
from .end import EndOfText
from .guidance import EverySample, Guided
from .infill import Infilling, infill
from .names import policy_from_name
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
from .step import Step
from .text import generate, generate_ids, pieces_for_view

__all__ = [
    "Ancestral", "Banned", "BlockCache", "Canvas", "Draw", "DualCache", "EndOfText", "Entropy", "EntropyBound",
    "EverySample", "Factor", "FirstHitting", "Guided", "Infilling", "Margin", "Policy", "PrefixCache", "RandomOrder",
    "Remask", "Step", "Threshold", "TopConfidence", "Uncached", "agreement", "denoise", "generate", "generate_ids",
    "infill", "pieces_for_view", "policy_from_name",
]  # fmt: skip
