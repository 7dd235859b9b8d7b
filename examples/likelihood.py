"""How likely is a text? The bound of a diffusion model with its standard error, and one continuation.

python examples/likelihood.py runs/demo/model
"""

from __future__ import annotations

import sys

import diffulm


def main(folder: str) -> None:
    model = diffulm.load(folder)
    texts = ["The with statement wraps a block in methods of a context manager.", "A list is a mutable sequence."]
    bound = diffulm.nelbo(model, texts, draws=16)
    print(f"{bound.bits_per_byte:.3f} +- {bound.stderr:.3f} bits per byte (upper bound, {bound.forwards} forwards)")
    for word in (" list", " banana"):
        found = diffulm.score(model, "The sorted() function returns a new", word)
        print(f"-log p({word!r}) <= {found.nats:.2f} nats over {found.tokens} tokens")


if __name__ == "__main__":
    main(sys.argv[1])
