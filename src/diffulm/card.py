"""The two texts that every checkpoint carries: its model card, and the sampler for plain transformers."""

from __future__ import annotations

from typing import Any

GENERATE = '''"""For plain transformers: model.generate(ids, custom_generate=FOLDER, trust_remote_code=True)."""


def generate(inputs=None, *, model, input_ids=None, **kwargs):
    """Denoise a completion. Arguments of diffulm.sampling.generate_ids: max_tokens, steps, seed, temperature, ..."""
    from diffulm.sampling import generate_ids

    return generate_ids(model, inputs if input_ids is None else input_ids, **kwargs)
'''


def model_card(config: Any, diffusion: dict[str, Any], extra: str) -> str:
    """The README.md of a checkpoint."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in diffusion.items())
    # A block checkpoint does not see what stands after a hole.
    block = diffusion.get("layout") == "block"
    fill = "" if block else '\nprint(diffulm.infill(model, "The sky is ", " today.", length=4))'
    blocks = f"\n\nIt writes from left to right in blocks of {diffusion.get('block_size')} tokens." if block else ""
    return f"""---
library_name: transformers
tags: [masked-diffusion, diffulm]
---
# A masked diffusion language model

Converted from `{diffusion.get("parent", "?")}` ({config.model_type}) with diffulm, as in arXiv 2410.17891.{blocks}

```python
import diffulm
model = diffulm.load("path/to/this/folder")
print(diffulm.generate(model, "Once upon a time", max_tokens=32)){fill}
```

| key | value |
|---|---|
{rows}

{extra}"""
