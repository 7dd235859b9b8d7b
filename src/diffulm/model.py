"""A diffusion model that has been opened, and the `diffusion` dict that says what it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .denoiser import HFDenoiser
from .layout import Full, layout_from_config
from .process import MaskedDiffusion
from .runtime import log

#: Of the `diffusion` dict; an older one is upgraded when it is opened.
FORMAT = 1


@dataclass
class Model:
    """A loaded diffusion model. `config` is the checkpoint's `diffusion` dict, `parent` the model it came from."""

    denoiser: HFDenoiser
    tokenizer: Any
    process: MaskedDiffusion
    config: dict[str, Any]
    name: str

    @property
    def parent(self) -> str:
        return str(self.config.get("parent", ""))

    @property
    def layout(self) -> Any:
        return layout_from_config(self.config)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @torch.no_grad()
    def logits(self, ids_BL: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L, V) float32 logits: position i scores the clean token at i, the mask column is -inf.

        Under the shift nothing predicts position 0: its logits are those of position 1's source and mean nothing.
        `attention_mask` is (B, L), 1 on real tokens. ValueError for layouts other than full.
        """
        layout = self.layout
        if not isinstance(layout, Full):
            raise ValueError(f"logits of a whole sequence need the full layout; this checkpoint is {layout.name}")
        ids_BL = ids_BL.to(self.device)
        valid_BL = torch.ones_like(ids_BL, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if bool((valid_BL[:, 1:] & ~valid_BL[:, :-1]).any()):
            raise ValueError("pad on the right: positions count from 0, so padding in front would shift them")
        if ids_BL.shape[1] <= layout.offset:
            raise ValueError("under the shift a sequence needs at least two tokens: the start token and one more")
        wanted_BL = torch.ones_like(ids_BL, dtype=torch.bool)
        wanted_BL[:, : layout.offset] = False
        logits_NV = self.denoiser(layout.decoding_rows(ids_BL, valid_BL.to(self.device), wanted_BL))
        logits_BLV = logits_NV.view(len(ids_BL), -1, logits_NV.shape[-1])
        return torch.cat([logits_BLV[:, : layout.offset], logits_BLV], 1)


def check_mask(mask: Any, model: Any, tokenizer: Any, *, name: str) -> None:
    """ValueError unless the id is a row of the model and the tokenizer's mask token."""
    rows = model.get_input_embeddings().num_embeddings
    if not isinstance(mask, int) or not 0 <= mask < rows or tokenizer.mask_token_id != mask:
        raise ValueError(
            f"{name}: mask_token_id {mask} does not fit the {rows} embedding rows and the tokenizer's mask token "
            f"{tokenizer.mask_token_id}; convert the parent again"
        )


def upgrade(diffusion: dict[str, Any], *, name: str) -> dict[str, Any]:
    """The `diffusion` dict in today's format; an older one is brought up to date in memory, aloud."""
    version = diffusion.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(
            f"{name}: checkpoint format {version!r} is newer than this diffulm knows ({FORMAT}); upgrade diffulm"
        )
    defaults = {"process": "absorbing", "schedule": "linear", "t_min": 1e-3, "source": "previous", "layout": "full"}
    missing = [key for key in defaults if key not in diffusion]
    if missing or version < FORMAT:
        log.warning(
            "%s: format %s read as %s, with defaults for %s", name, version, FORMAT, ", ".join(missing) or "nothing"
        )
    if diffusion.get("process", "absorbing") != "absorbing":
        raise ValueError(f"{name}: process {diffusion['process']!r} is not known; this diffulm knows absorbing")
    return {**defaults, **diffusion, "format": FORMAT}
