"""Bytes of a training step on one GPU, by part, before there is a GPU.

Weights, gradients and moments follow from the shape. What the backward pass needs is found by running one and two
layers on fake tensors, which have shapes and no storage (FakeTensorMode), and adding up what autograd keeps: so it
holds for any family that transformers has, with its real attention kernels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .. import hub
from ..denoiser import CHUNK, HFDenoiser
from ..layout import Full, NoisedBatch
from ..objective import diffusion_loss
from ..runtime import Precision
from .flops import Shape, Work
from .parallel import checkpoint_layers


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps: for each sequence and layer, each sequence, each layer, and once."""

    sequence_layer: int
    sequence: int
    layer: int
    once: int

    def of(self, sequences: int, layers: int) -> int:
        """What grows with the sequences."""
        return sequences * (self.sequence_layer * layers + self.sequence)

    def weights(self, layers: int) -> int:
        """What does not: autocast's copies of weights."""
        return self.layer * layers + self.once


@dataclass(frozen=True)
class MemoryModel:
    """Bytes per GPU of a recipe's step. `shards`: GPUs that a copy of the model is spread over (1: none)."""

    config: Any
    shape: Shape
    work: Work
    precision: Precision
    optimizer: str
    shards: int
    dense_mask: bool

    @cached_property
    def kept(self) -> Kept:
        return self._measure(checkpointing=False)

    @cached_property
    def kept_with_checkpointing(self) -> Kept:
        return self._measure(checkpointing=True)

    def parts(self, sequences: int, *, checkpointing: bool) -> dict[str, int]:
        """Bytes by part for a micro-batch of `sequences`; their sum is the peak, but for the allocator's waste."""
        kept = self.kept_with_checkpointing if checkpointing else self.kept
        weight = self.precision.weights.itemsize
        compute = (self.precision.autocast or self.precision.weights).itemsize
        own = -(-self.shape.parameters * weight // self.shards)
        hidden = self.shape.matrix if self.optimizer == "muon" else 0  # Muon: one moment in place of two
        layers = self.shape.layers
        found = {
            "parameters": own,
            "gradients": own,
            "optimizer": -(-(2 * self.shape.parameters - hidden) * weight // self.shards),
            "activations": kept.of(sequences, layers),
        }
        if self.dense_mask:
            found["attention mask"] = sequences * self.work.pairs * (weight + (compute if compute != weight else 0))
        copies = self.shape.matrix * compute if compute != weight and self.shards == 1 else 0
        if copies and not checkpointing:
            found["copies of weights"] = kept.weights(layers)
        if self.shards > 1:
            # Two layers are gathered at a time; the gradients of one wait for their reduction. Embeddings and head
            # belong to the root, which stays whole from the forward pass to the end of the backward pass.
            root = self.shape.parameters - self.shape.layer * layers
            found["gathered weights"] = 2 * self.shape.layer * compute + root * weight
            found["whole gradients"] = self.shape.layer * (compute + weight) + root * weight
        # One of these at a time. A layer's backward pass needs gradients of its intermediates, and with checkpointing
        # what it has computed again; autocast then keeps its copies through the forward pass alone.
        one = sequences * self.kept.sequence_layer
        passing = {
            "head": self.head(sequences),
            "backward of a layer": one + one // 8 if checkpointing else one // 4,
            "copies of weights": copies if checkpointing else 0,
        }
        largest = max(passing, key=passing.__getitem__)
        return {**found, largest: found.get(largest, 0) + passing[largest]}

    def head(self, sequences: int) -> int:
        """The head's backward pass: gradients of hidden states and of its weight, and one chunk of logits."""
        wanted = int(self.work.wanted * sequences)
        wide = max(4, self.precision.weights.itemsize)
        compute = (self.precision.autocast or self.precision.weights).itemsize
        chunk = min(CHUNK, self.shape.vocabulary)
        narrow = compute if compute != wide else 0
        one = wanted * chunk * (wide + narrow) + chunk * self.shape.width * compute
        return (self.shape.head + wanted * self.shape.width) * wide + one

    def largest(self, memory: float, *, limit: int, checkpointing: bool) -> int:
        """Sequences that fit into `memory` bytes, `limit` at most; 0: not even one."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if sum(self.parts(middle, checkpointing=checkpointing).values()) <= memory:
                low = middle
            else:
                high = middle - 1
        return low

    def _measure(self, *, checkpointing: bool) -> Kept:
        one, two, three, four = (
            self._saved(layers, sequences, checkpointing) for layers, sequences in ((1, 1), (2, 1), (1, 2), (2, 2))
        )
        both = (four - three) - (two - one)
        layer, sequence = two - one - both, three - one - both
        return Kept(both, sequence, layer, one - both - layer - sequence)

    def _saved(self, layers: int, sequences: int, checkpointing: bool) -> int:
        """Bytes that a forward pass leaves for the backward pass, weights and inputs apart."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        rows = some_rows(self.work, sequences)
        found: dict[int, int] = {}
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = hub.skeleton(self.config, layers=layers, dtype=self.precision.weights)
            denoiser = HFDenoiser(model.train(), None, precision=self.precision)
            if checkpointing:
                checkpoint_layers(denoiser)
            own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    found[storage._cdata] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = diffusion_loss(denoiser, rows).sum
            del loss
        return sum(found.values())


def some_rows(work: Work, sequences: int) -> Any:
    """Rows of the shape that a recipe's have, for the model's own attention; their content means nothing."""
    ids = torch.zeros(sequences, work.rows, dtype=torch.long)
    noised = torch.zeros(sequences, work.rows, dtype=torch.bool)
    noised[:, 1 : 1 + int(work.wanted)] = True
    everything = torch.ones_like(noised)
    batch = NoisedBatch(ids, ids, noised, everything, noised.float(), ids, everything, ids)
    return dataclasses.replace(Full().training_rows(batch), plain=True)
