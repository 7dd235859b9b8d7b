"""Models of given sizes with random weights, which benchmarks time, and random texts for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig


@dataclass(frozen=True)
class Size:
    """A Llama: rows of its vocabulary with one for the mask, and the shape of its layers."""

    vocab: int
    width: int
    layers: int
    hidden: int
    heads: int
    kv: int
    tied: bool

    @property
    def mask(self) -> int:
        return self.vocab - 1

    def build(self, *, causal: bool = False, dtype: torch.dtype = torch.float32) -> Any:
        """The model with random weights, the same every time."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.width, intermediate_size=self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv,
            max_position_embeddings=8192, tie_word_embeddings=self.tied,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        )  # fmt: skip
        config.is_causal = causal
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


SIZES = {
    "tiny": Size(513, 64, 2, 172, 2, 2, True),
    "135m": Size(49153, 576, 30, 1536, 9, 3, True),
    "7b": Size(32001, 4096, 32, 11008, 32, 32, False),
}
#: SmolLM2-135M's shape, what most benchmarks take.
SMALL = SIZES["135m"]


def texts(n: int, size: Size, batch: int, length: int) -> Tensor:
    """(batch, length) random ids without special ones, the same for the same `n`."""
    return torch.randint(3, size.mask - 1, (batch, length), generator=torch.Generator().manual_seed(n))
