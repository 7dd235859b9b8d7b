"""What would give wrong results without an error is refused, or kept out of the figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import diffulm
from diffulm.eval.likelihood import Window, score_windows
from diffulm.layout import Block
from diffulm.tokenizer import special_tokens


@pytest.fixture(scope="module")
def blocks(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny parent as a block checkpoint."""
    folder = tmp_path_factory.mktemp("blocks") / "model"
    diffulm.convert(str(parent), folder, layout="block", block_size=4, source="own", trained_length=32)
    return folder


def test_a_block_checkpoint_does_not_fill_holes_it_cannot_see_behind(blocks: Path) -> None:
    model = diffulm.load(blocks, dtype="float32")
    assert isinstance(diffulm.generate(model, "The dog", max_tokens=8), str)
    with pytest.raises(ValueError, match="does not see what stands after a hole"):
        diffulm.infill(model, "The", " dog", length=8)
    assert str(diffulm.infill(model, "The dog", "", length=8)).startswith("The dog")
    with pytest.raises(ValueError, match="blocks of 8 tokens: this layout decodes 4"):
        diffulm.generate(model, "The dog", max_tokens=8, block=8)


def test_the_ar_term_of_training_is_not_in_the_bound(blocks: Path) -> None:
    model = diffulm.load(blocks, dtype="float64")
    special = special_tokens(model.tokenizer)
    windows = [Window(tuple(range(5, 25)), 0, 20.0), Window(tuple(range(9, 21)), 1, 12.0)]
    plain, with_ar = (
        score_windows(model.denoiser, Block(4, "own", ar_weight=w), model.process, windows, special) for w in (0.0, 1.0)
    )
    assert plain == with_ar and plain.nats > 0


def test_padding_in_front_is_refused(checkpoint: Path) -> None:
    model = diffulm.load(checkpoint, dtype="float32")
    ids = torch.tensor([[0, 5, 6, 7], [0, 5, 6, 1]])
    right = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    assert model.logits(ids, right).shape[:2] == ids.shape
    with pytest.raises(ValueError, match="pad on the right"):
        model.logits(ids, right.flip(1))
    with pytest.raises(ValueError, match="at least two tokens"):
        model.logits(ids[:, :1])


def test_functions_stay_functions_after_their_modules_are_imported() -> None:
    import diffulm.adapt
    import diffulm.convert
    import diffulm.train.loop

    assert all(callable(f) for f in (diffulm.adapt, diffulm.convert, diffulm.train))
