"""The denoising of one text as an animated SVG (the picture of the README).

python examples/picture.py runs/full/model "def add(a, b):<hole:6>\\n" docs/denoising.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

import diffulm
from diffulm.render import frames_to_svg
from diffulm.sampling import Canvas, Step, pieces_for_view


def main(folder: str, text: str, out: str) -> None:
    model = diffulm.load(folder, dtype="float32")
    frames: list[list[tuple[str, str]]] = []

    def watch(canvas: Canvas, step: Step) -> None:
        frames.append(pieces_for_view(model, canvas, step))

    filled = diffulm.infill(model, text.encode().decode("unicode_escape"), watch=watch)
    Path(out).write_text(frames_to_svg(frames, title="text condensing out of masks"), encoding="utf-8")
    print(filled)


if __name__ == "__main__":
    main(*sys.argv[1:4])
