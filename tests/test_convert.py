"""Conversion: where the mask token lives, what the checkpoint says, and that a refusal leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffulm import hub
from diffulm.convert import choose_start_token, convert
from diffulm.denoiser import HFDenoiser
from diffulm.layout import Causal
from diffulm.tokenizer import MASK_TOKEN, encode, load_tokenizer

from .conftest import build_parent, build_tokenizer


def weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def run(parent: Path, out: Path, **kwargs: Any) -> Any:
    return convert(str(parent), out, **{"trained_length": 64, **kwargs})


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def tables(state: dict[str, Tensor]) -> list[str]:
    return [k for k in ("model.embed_tokens.weight", "lm_head.weight") if k in state]


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_row_at_the_mean_embedding(tmp_path: Path, tied: bool) -> None:
    parent = build_parent(tmp_path / "parent", tie_word_embeddings=tied)
    done = run(parent, tmp_path / "child")
    old, new, n = weights(parent), weights(tmp_path / "child"), len(build_tokenizer())
    assert (done.mask_token, done.mask_token_id, done.mask_row) == (MASK_TOKEN, n, "new row")
    assert tables(new) == tables(old) and len(tables(new)) == (1 if tied else 2), "tied stays tied"
    for key, value in old.items():
        assert new[key][: len(value)].equal(value), f"{key} must not change"
        if key in tables(old):
            assert new[key].shape == (n + 1, 32)
            torch.testing.assert_close(new[key][n], value.double().mean(0).float())
        else:
            assert new[key].shape == value.shape
    assert config_of(tmp_path / "child")["vocab_size"] == n + 1
    assert config_of(tmp_path / "child")["diffusion"]["mask_row_added"] is True


def test_a_spare_padded_row_is_used_and_the_vocabulary_does_not_grow(tmp_path: Path) -> None:
    n = len(build_tokenizer())
    parent = build_parent(tmp_path / "parent", vocab=n + 8, tie_word_embeddings=False)
    done = run(parent, tmp_path / "child")
    old, new = weights(parent), weights(tmp_path / "child")
    assert (done.mask_token_id, done.mask_row) == (n, "spare padded row")
    for key in tables(old):
        assert new[key].shape == old[key].shape
        rest = torch.arange(n + 8) != n
        assert new[key][rest].equal(old[key][rest])
        torch.testing.assert_close(new[key][n], old[key][:n].double().mean(0).float())


def test_tokens_without_a_row_get_one_too(tmp_path: Path) -> None:
    """A tokenizer that names more tokens than the model has rows: every row made is the mean, none is random."""
    n = len(build_tokenizer())
    parent = build_parent(tmp_path / "parent", vocab=n - 3)
    done = run(parent, tmp_path / "child")
    old, new = weights(parent)["model.embed_tokens.weight"], weights(tmp_path / "child")["model.embed_tokens.weight"]
    assert done.mask_token_id == n and len(new) == n + 1 and new[: n - 3].equal(old)
    torch.testing.assert_close(new[n - 3 :], old.double().mean(0).float().expand(4, -1))


def test_the_tokenizers_own_mask_token(tmp_path: Path) -> None:
    parent = build_parent(tmp_path / "parent", tokenizer=build_tokenizer(mask="[MASK]"))
    done = run(parent, tmp_path / "child")
    assert (done.mask_token, done.mask_token_id, done.mask_row) == ("[MASK]", 2, "the tokenizer's own")
    old, new = weights(parent), weights(tmp_path / "child")
    assert old.keys() == new.keys() and all(new[k].equal(old[k]) for k in old), "no weight changes"


def test_an_existing_token_is_reused_as_the_mask(tmp_path: Path) -> None:
    parent = build_parent(tmp_path / "parent")
    token = build_tokenizer().convert_ids_to_tokens(300)
    done = run(parent, tmp_path / "child", mask_token=token)
    assert (done.mask_token, done.mask_token_id, done.mask_row) == (token, 300, "existing token reused")
    assert config_of(tmp_path / "child")["diffusion"]["mask_row_added"] is False
    assert all(weights(tmp_path / "child")[k].equal(v) for k, v in weights(parent).items())
    # It is ordinary text too: clean rows may predict it, noisy rows may not.
    model = hub.load(tmp_path / "child", device="cpu", dtype="float32")
    ids = torch.tensor([[0, 5, 300, 9]])
    wanted = torch.tensor([[False, True, True, True]])
    with torch.no_grad():
        clean = model.denoiser(Causal().decoding_rows(ids, torch.ones_like(wanted), wanted))
    assert clean[:, 300].isfinite().all() and model.logits(ids)[:, :, 300].isneginf().all()


def test_what_the_checkpoint_says(tmp_path: Path) -> None:
    parent = build_parent(tmp_path / "parent", "qwen3")
    done = run(parent, tmp_path / "child", source="own", schedule="polynomial:2", t_min=0.01, trained_length=32)
    before, config = config_of(parent), config_of(tmp_path / "child")
    assert config["model_type"] == before["model_type"] and config["architectures"] == before["architectures"]
    assert config["is_causal"] is False and "block_size" not in config and "auto_map" not in config
    tokenizer = load_tokenizer(tmp_path / "child")
    assert config["mask_token_id"] == tokenizer.mask_token_id == done.mask_token_id
    assert tokenizer.bos_token == done.start_token
    assert config["diffusion"] == {
        "format": 1, "process": "absorbing", "schedule": "polynomial:2", "t_min": 0.01, "source": "own",
        "layout": "full", "trained_length": 32, "parent": str(parent), "tokens_seen": 0, "mask_row_added": True,
    }  # fmt: skip
    files = {str(p.relative_to(tmp_path / "child")) for p in (tmp_path / "child").rglob("*") if p.is_file()}
    assert {"README.md", "custom_generate/generate.py", "model.safetensors", "tokenizer.json"} <= files
    assert not [f for f in files if f.endswith((".bin", ".pt", ".tmp"))]
    card = (tmp_path / "child" / "README.md").read_text()
    assert str(parent) in card and "| source | own |" in card and card.startswith("---\n")


def test_the_start_token_is_the_one_the_parent_predicts_best_behind(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    model, tokenizer = hub.load_parent(str(build_parent(tmp_path / "parent")))
    found = choose_start_token(model, tokenizer)
    assert set(found) == {"<s>", "</s>"}
    texts = [encode(tokenizer, topics[name])[:63] for name in ("assignment", "lambda", "with", "yield")]
    for name, nll in found.items():
        ids = torch.tensor([[tokenizer.convert_tokens_to_ids(name), *text] for text in texts])
        with torch.no_grad():
            logits = model(ids).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert nll == pytest.approx(float(expected), rel=1e-4)
    assert tokenizer.bos_token == min(found, key=found.__getitem__)
    assert model.config.bos_token_id == tokenizer.bos_token_id
    # With one candidate there is nothing to measure.
    alone = build_tokenizer(bos=None)
    assert choose_start_token(model, alone) == {} and alone.bos_token == alone.eos_token


# ------------------------------------------------------------------------------------------------------ refusals


def change_config(folder: Path, **keys: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **keys}))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickle_only(folder: Path) -> None:
    torch.save(weights(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_a_key(folder: Path) -> None:
    from safetensors.torch import save_file

    state = weights(folder)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def with_a_key_too_many(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {**weights(folder), "model.layers.7.extra": torch.zeros(3)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def no_end_token(folder: Path) -> None:
    build_tokenizer(eos=None).save_pretrained(folder)


def garbage_gguf(folder: Path) -> None:
    empty(folder)
    (folder / "model.gguf").write_bytes(b"GGUF" + b"\0" * 100)


DAMAGE = {
    "empty folder": (empty, r"is not a model: it has no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"only complete safetensors"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"cannot be opened as a causal"),
    "no such family": (lambda f: change_config(f, model_type="nonesuch"), r"cannot be opened as a causal.*nonesuch"),
    "no causal LM": (lambda f: change_config(f, model_type="t5"), r"cannot be opened as a causal"),
    "truncated": (truncate, r"only complete safetensors"),
    "pickle": (pickle_only, r"only complete safetensors"),
    "missing key": (without_a_key, r"missing keys in the weights: model.layers.1.mlp.up_proj.weight"),
    "unexpected key": (with_a_key_too_many, r"unexpected keys in the weights: model.layers.7.extra"),
    "wrong shape": (lambda f: change_config(f, intermediate_size=65), r"mismatch"),
    "no tokenizer": (no_tokenizer, r"no usable tokenizer .*save_pretrained"),
    "no end token": (no_end_token, r"no end-of-text token; set one"),
    "garbage GGUF": (garbage_gguf, r"cannot be opened as a causal"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_parent_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    parent = build_parent(tmp_path / "parent")
    damage(parent)
    with pytest.raises(ValueError, match=message):
        run(parent, tmp_path / "out" / "child")
    assert [p.name for p in tmp_path.iterdir()] == ["parent"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_token": "<nonesuch>"}, r"no token '<nonesuch>' to reuse as the mask; leave --mask-token out"),
        ({"mask_token": "</s>"}, r"already starts, ends or pads texts; choose another"),
        ({"trained_length": 129}, r"trained_length 129 is beyond the parent's 128 positions; choose at most 128"),
        ({"schedule": "sine"}, r"unknown schedule 'sine'"),
        ({"source": "launch"}, r"full layout reads source"),
        ({"layout": "block", "source": "own"}, r"needs a block size"),
        ({"layout": "block", "source": "previous", "block_size": 4}, r"block layout reads source"),
        ({"layout": "tree"}, r"'tree' is not known"),
        ({"t_min": 1.0}, r"t_min must lie in"),
        ({"trained_length": 0}, r"trained_length"),
        ({"block_size": 4}, r"block_size"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(
    parent: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(parent, tmp_path / "out" / "child", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_mask_token_beyond_the_rows_is_refused(tmp_path: Path) -> None:
    n = len(build_tokenizer())
    parent = build_parent(tmp_path / "parent", vocab=n - 3)
    with pytest.raises(ValueError, match=r"beyond the model's embedding rows; choose another"):
        run(parent, tmp_path / "child", mask_token=build_tokenizer().convert_ids_to_tokens(n - 1))
    late = build_tokenizer()
    late.add_special_tokens({"mask_token": "[M]"})
    late.save_pretrained(parent)
    with pytest.raises(ValueError, match=r"mask token has id \d+, beyond the model's embedding rows; name another"):
        run(parent, tmp_path / "child")
    assert [p.name for p in tmp_path.iterdir()] == ["parent"]


def test_what_stands_in_the_way_stays(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "child").mkdir()
    (tmp_path / "child" / "mine.txt").write_text("mine")
    for out in (tmp_path / "child", tmp_path / "child" / "mine.txt"):
        with pytest.raises(ValueError, match=r"already holds something; choose a new folder"):
            run(parent, out)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["mine.txt"]
    (tmp_path / "child" / "mine.txt").unlink()
    run(parent, tmp_path / "child")  # an empty folder is a new folder


def test_a_diffusion_checkpoint_is_not_converted_again(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a diffusion checkpoint already; train it, or convert its parent"):
        run(checkpoint, tmp_path / "child")
    assert not list(tmp_path.iterdir())


def test_a_kill_while_writing_leaves_no_checkpoint(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "model_card", stop)
    with pytest.raises(KeyboardInterrupt):
        run(parent, tmp_path / "child")
    assert not list(tmp_path.iterdir())


def test_conversion_is_deterministic(parent: Path, checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    run(parent, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_the_parent_inside_the_child(parent: Path, checkpoint: Path) -> None:
    """Under the causal pattern the child gives its parent's logits: conversion adds a row, and nothing else."""
    model, _ = hub.load_parent(str(parent))
    child = hub.load(checkpoint, device="cpu", dtype="float32")
    ids = torch.randint(2, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    wanted = torch.ones_like(ids, dtype=torch.bool)
    wanted[:, 0] = False
    rows = Causal().decoding_rows(ids, torch.ones_like(wanted), wanted)
    with torch.no_grad():
        ours = HFDenoiser(child.denoiser.model, None)(rows)[:, : model.config.vocab_size]
        torch.testing.assert_close(ours, HFDenoiser(model, None)(rows), rtol=1e-5, atol=1e-5)


def test_the_from_scratch_control_has_the_parents_shape_and_none_of_its_weights(parent: Path, tmp_path: Path) -> None:
    weights = {}
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        convert(str(parent), tmp_path / name, initialise="random", seed=seed, trained_length=64)
        model, _ = hub.open_model(tmp_path / name, dtype=torch.float32)
        weights[name] = model.state_dict()
    convert(str(parent), tmp_path / "child", trained_length=64)
    child, _ = hub.open_model(tmp_path / "child", dtype=torch.float32)
    matrices = [k for k, v in child.state_dict().items() if v.ndim == 2]
    assert weights["a"].keys() == child.state_dict().keys() and matrices
    for k in matrices:
        assert torch.equal(weights["a"][k], weights["again"][k]), "one seed, one model"
        assert not torch.isclose(weights["a"][k], child.state_dict()[k]).any(1).all()
        assert not torch.equal(weights["a"][k], weights["b"][k])
    said = json.loads((tmp_path / "a" / "config.json").read_text())["diffusion"]
    assert (
        said["initialise"] == "random"
        and "initialise" not in json.loads((tmp_path / "child" / "config.json").read_text())["diffusion"]
    )
    with pytest.raises(ValueError, match="initialise must be 'parent' or 'random'"):
        convert(str(parent), tmp_path / "c", initialise="zeros")
    assert not (tmp_path / "c").exists()
