"""Sampling: canvases, draws, policies and the one denoising loop."""

from .canvas import Canvas
from .denoise import Step, denoise
from .draw import Draw
from .policies import Ancestral, Entropy, Margin, Policy, RandomOrder, Threshold, TopConfidence
from .text import Infilling, generate, generate_ids, infill, pieces_for_view, policy_from_name

__all__ = [
    "Ancestral", "Canvas", "Draw", "Entropy", "Infilling", "Margin", "Policy", "RandomOrder", "Step", "Threshold",
    "TopConfidence", "denoise", "generate", "generate_ids", "infill", "pieces_for_view", "policy_from_name",
]  # fmt: skip
