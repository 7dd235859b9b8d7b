"""Floating-point operations of a step, counted from a model's shape: what MFU and `diffulm plan` are made of.

A multiply-add is two operations. Counted are the products: every weight matrix with every row, attention (both
products, all pairs of rows, visible or not: the convention of PaLM, arXiv 2204.02311, appendix B), and the head with
the wanted rows only. A backward pass is two forward passes. Norms, activations and softmax are left out (about 1%).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .config import Recipe


@dataclass(frozen=True)
class Shape:
    """What of a model decides its cost. Numbers of weights, tied ones once."""

    parameters: int
    matrix: int  # in the layers, multiplied with every row (of experts, those a row is sent to)
    layer: int  # in one layer, all of them
    head: int  # vocabulary x width
    layers: int
    width: int
    vocabulary: int
    attended: int  # heads x the mean width of their keys and values, of one layer

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """The shape of a transformers causal LM, whose weights may be on the meta device."""
        config: Any = model.config
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        head = model.get_output_embeddings().weight  # type: ignore[operator]
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        stack = max(lists, key=len)
        # Biases of stacked experts have two dimensions and are no product.
        inside = [p for name, p in stack.named_parameters() if p.ndim >= 2 and not name.endswith("bias")]
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            matrix=round(sum(_used(p, config) for p in inside if id(p) not in tables)),
            layer=max(sum(p.numel() for p in one.parameters()) for one in stack),
            head=head.numel(),
            layers=len(stack),
            width=head.shape[1],
            vocabulary=head.shape[0],
            attended=_attended(config),
        )

    def forward(self, rows: int, pairs: int, wanted: float) -> float:
        """Operations of a forward pass over `rows` rows with `pairs` pairs of rows, predicting at `wanted` of them."""
        return 2.0 * self.matrix * rows + 4.0 * self.layers * self.attended * pairs + 2.0 * self.head * wanted

    def train(self, rows: int, pairs: int, wanted: float, *, frozen: bool = False) -> float:
        """Forward and backward, without anything that is computed twice to save memory.

        `frozen`: the weights get no gradient of their own, which saves one product with each of them (a LoRA; its own
        small products are left out).
        """
        return 3 * self.forward(rows, pairs, wanted) - (self.forward(rows, 0, wanted) if frozen else 0.0)

    def executed(self, rows: int, pairs: int, wanted: float, *, checkpointing: bool = False) -> float:
        """As `train`, with what our step computes twice: the head's logits, and checkpointed layers."""
        again = self.forward(rows, pairs, 0) if checkpointing else 0.0
        return self.train(rows, pairs, wanted) + again + 2.0 * self.head * wanted


def _used(weight: nn.Parameter, config: Any) -> float:
    """Numbers of a weight that one row meets: all, or its share of a stack of experts (experts, in, out)."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    if weight.ndim == 3 and experts and chosen and weight.shape[0] == experts:
        return weight.numel() * chosen / experts
    return float(weight.numel())


def _attended(config: Any) -> int:
    """Of latent attention (DeepSeek's) `head_dim` is but the part of a key that turns with the position."""
    heads = int(config.num_attention_heads)
    if (still := getattr(config, "qk_nope_head_dim", None)) is not None:
        return heads * (still + config.qk_rope_head_dim + config.v_head_dim) // 2
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)


@dataclass(frozen=True)
class Work:
    """What one sequence of a recipe costs: rows, pairs of rows, wanted rows (their mean over noise), tokens."""

    tokens: int
    rows: int
    pairs: int
    wanted: float

    @classmethod
    def of(cls, recipe: Recipe, *, causal: bool = False, noised: float = 1.0) -> Work:
        """For the diffusion arm of a recipe, or (`causal`) for its control arm.

        `noised`: share of the tokens that may be noised; what is given beside them (contexts of answers) is not.
        """
        length = recipe.data.length
        if causal:
            return cls(length, length, length**2, length - 1)
        # Both forms mask half of the tokens on average (the rate form with the linear schedule).
        wanted = noised * length / 2
        rows = length
        if recipe.model.layout == "block":
            size = recipe.model.block_size or 8
            rows = 2 * length + ((length - 1) // size if recipe.model.source == "launch" else 0)
            wanted += noised * (length - 1) if recipe.noise.ar_weight else 0
        return cls(length, rows, rows**2, wanted)


def flops_per_token(shape: Shape, work: Work, *, frozen: bool = False) -> float:
    """Operations of training per token of text. Times tokens/s, over a device's peak, this is the MFU."""
    return shape.train(work.rows, work.pairs, work.wanted, frozen=frozen) / work.tokens
