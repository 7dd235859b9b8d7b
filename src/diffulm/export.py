"""A checkpoint written in another form, with the weights in the dtype that they have."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from . import hub, released, runtime, weights


def export(
    path_or_id: str | Path, out: Path | str, *, form: str, adapter: str | Path | None = None, offline: bool = False
) -> str:
    """Write a checkpoint in another form to the new folder `out`; says in words what it wrote.

    Args:
        path_or_id: whatever `hub.load` opens.
        form: "hf", our own folder, which plain transformers opens; "released", the format of DiffuGPT and DiffuLLaMA.
        adapter: a LoRA in peft's format, merged.

    Raises:
        ValueError: `out` holds something, or the released format has no place for the model.
    """
    out = Path(out)
    if form not in ("hf", "released"):
        raise ValueError(f"unknown format {form!r}: use hf or released")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already holds something; choose a new folder")
    model = hub.load(path_or_id, device="cpu", dtype="stored", adapter=adapter, offline=offline)
    inner: Any = model.denoiser.model
    if form == "hf":
        hub.save(out, inner, model.tokenizer, model.config)
        return "an ordinary Hugging Face folder"
    config = released.write_config(inner.config.to_dict(), model.config, str(model.tokenizer.mask_token))
    family = str(config["model_type"])
    with runtime.atomic_folder(out) as aside, hub.quiet_transformers(), hub.silent(logging.getLogger("transformers")):
        weights.write(aside, family, inner.state_dict(), tied=bool(config["tie_word_embeddings"]))
        model.tokenizer.save_pretrained(aside)
        runtime.write_atomic(aside / "config.json", json.dumps(config, indent=2) + "\n")
    return f"the released format of {released.CONVENTIONS[released.FAMILIES[family]].name}"
