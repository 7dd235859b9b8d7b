"""Turn an autoregressive language model into a masked diffusion language model, train it, measure it, use it.

Names are imported when they are first used: `import diffulm` itself loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "load": "hub",
    "Model": "hub",
    "convert": "convert",
    "adapt": "adapt",
    "train": "train.loop",
    "generate": "sampling",
    "infill": "sampling",
    "Chat": "sampling.chat",
    "denoise": "sampling",
    "Canvas": "sampling",
    "Draw": "sampling",
    "Step": "sampling",
    "Ancestral": "sampling",
    "RandomOrder": "sampling",
    "TopConfidence": "sampling",
    "Entropy": "sampling",
    "Margin": "sampling",
    "Threshold": "sampling",
    "Factor": "sampling",
    "EntropyBound": "sampling",
    "FirstHitting": "sampling",
    "Remask": "sampling",
    "EndOfText": "sampling",
    "score": "eval.likelihood",
    "nelbo": "eval.likelihood",
    "Estimate": "eval.likelihood",
    "MaskedDiffusion": "process",
    "Linear": "schedule",
    "Cosine": "schedule",
    "Polynomial": "schedule",
    "diffusion_loss": "objective",
    "Recipe": "train.config",
    "load_recipe": "train.config",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'diffulm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Names that are a function and a module of one name (convert, adapt, train): the package offers the function.

    Importing a submodule sets it as an attribute of its package, which would replace the function of that name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
