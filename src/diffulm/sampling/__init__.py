"""Sampling: canvases, draws, policies and the one denoising loop."""

from .canvas import Canvas
from .denoise import denoise
from .draw import Draw
from .end import EndOfText
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
from .text import Infilling, generate, generate_ids, infill, pieces_for_view

__all__ = [
    "Ancestral", "Canvas", "Draw", "EndOfText", "Entropy", "EntropyBound", "Factor", "FirstHitting", "Infilling",
    "Margin", "Policy", "RandomOrder", "Remask", "Step", "Threshold", "TopConfidence", "denoise", "generate",
    "generate_ids", "infill", "pieces_for_view", "policy_from_name",
]  # fmt: skip
