"""Released checkpoints: read to the bit, written back to the bit, refused in one line when something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffulm
from diffulm import cli, hub, released, weights
from diffulm.tokenizer import encode, load_tokenizer

from . import released_files as files

IDS = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(0))
REAL = pytest.mark.skipif(not files.GPT2.is_dir(), reason="the real GPT-2 tokenizer is not in this checkout")


def opened(folder: Path, **options: Any) -> hub.Model:
    return hub.load(folder, **{"device": "cpu", "dtype": "float32", **options})


def difference(model: hub.Model, plain: Tensor, *, shift: bool = True) -> float:
    """Largest difference to a forward written out by hand; the mask's column is ours alone."""
    got = model.logits(IDS)
    assert got[..., model.process.mask_token_id].isneginf().all()
    if shift:  # token i is read from row i - 1
        got, plain = got[:, 1:], plain[:, :-1]
    kept = [i for i in range(plain.shape[-1]) if i != model.process.mask_token_id]
    return float((got - plain)[..., kept].abs().max())


WRITERS: dict[str, tuple[Callable[[Path], files.Weights], Callable[[files.Weights, Tensor], Tensor]]] = {
    "diffugpt-s": (files.write_diffugpt, files.gpt_forward),
    "diffugpt-m": (lambda f: files.write_diffugpt(f, medium=True, shards=3), files.gpt_forward),
    "diffullama": (lambda f: files.write_diffullama(f, shards=2), files.llama_forward),
    "diffullama-wrapped": (
        lambda f: files.write_diffullama(f, wrapped=True),
        lambda w, ids: files.llama_forward(w, ids, files.WRAPPED),
    ),
    "dream": (files.write_dream, lambda w, ids: files.llama_forward(w, ids, kv=2, theta=1e6, eps=1e-6)),
    "llada": (files.write_llada, lambda w, ids: files.llama_forward(w, ids, files.LLADA, theta=5e5)),
    "llada-gqa": (
        lambda f: files.write_llada(f, kv=2),
        lambda w, ids: files.llama_forward(w, ids, files.LLADA, kv=2, theta=5e5),
    ),
    **{
        f"a2d-{family}": (
            lambda f, family=family: files.write_a2d(f, family),  # type: ignore[misc]
            lambda w, ids: files.llama_forward(w, ids, kv=2),
        )
        for family in ("llama", "qwen2", "qwen3")
    },
}


# ------------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("name", WRITERS)
def test_logits_equal_a_forward_written_out(name: str, tmp_path: Path) -> None:
    write, forward = WRITERS[name]
    plain = forward(write(tmp_path), IDS)
    model = opened(tmp_path)
    assert difference(model, plain, shift=not name.startswith(("llada", "a2d"))) < 1e-5
    # Dropout is 0.1 in GPT-2's config: a model left in training mode would differ from itself.
    assert model.logits(IDS).equal(model.logits(IDS)) and not model.denoiser.model.training


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    w = files.write_diffugpt(tmp_path)
    model = opened(tmp_path)
    for key in ("denoise_model.h.1.mlp.c_fc.bias", "denoise_model.ln_f.weight", "denoise_model.wpe.weight"):
        assert difference(model, files.gpt_forward({**w, key: w[key] * 1.01}, IDS)) > 1e-4
    unshifted = model.logits(IDS)[:, 1:] - files.gpt_forward(w, IDS)[:, 1:]
    assert unshifted[..., : files.gpt_config(1)["bos_token_id"]].abs().max() > 0.1


@REAL
@pytest.mark.parametrize(("medium", "mask", "rows"), [(False, 10541, 50257), (True, 50257, 50258)])
def test_the_real_tokenizer_gives_the_published_mask_ids(medium: bool, mask: int, rows: int, tmp_path: Path) -> None:
    plain = files.gpt_forward(files.write_diffugpt(tmp_path, medium=medium, real=True), IDS)
    model = opened(tmp_path)
    assert model.process.mask_token_id == model.tokenizer.mask_token_id == mask
    assert model.denoiser.model.get_input_embeddings().num_embeddings == rows  # type: ignore[operator]
    assert difference(model, plain) < 1e-5


@pytest.mark.parametrize(
    ("name", "mask", "added", "source", "length"),
    [
        ("diffugpt-s", files.HYPHENS, False, "previous", 48),
        ("diffugpt-m", "[¨M¨]", True, "previous", 48),
        ("diffullama", "ти", False, "previous", 64),
        ("llada", "<|mdm_mask|>", True, "own", 64),
        ("dream", "<|mask|>", True, "previous", 64),
        ("a2d-qwen3", "<|mask|>", True, "own", 64),
    ],
)
def test_conventions(name: str, mask: str, added: bool, source: str, length: int, tmp_path: Path) -> None:
    WRITERS[name][0](tmp_path)
    model = opened(tmp_path)
    assert model.tokenizer.mask_token == mask
    assert model.config["mask_row_added"] is added and model.config["source"] == source
    assert model.config["trained_length"] == length and model.parent == str(tmp_path)


def test_the_trained_length_is_the_files_own() -> None:
    gpt, llama = released.CONVENTIONS["diffugpt"], released.CONVENTIONS["diffullama"]
    task = {"task_specific_params": {"text-generation": {"max_length": 512}}}
    assert released.trained_length(task, {"n_positions": 1024}, gpt) == 512
    assert released.trained_length({"max_length": 700}, {"n_positions": 1024}, gpt) == 700
    assert released.trained_length({}, {"n_positions": 1024}, gpt) == 1024
    assert released.trained_length({}, {"max_position_embeddings": 4096}, llama) == 2048
    assert released.trained_length(task, {"n_positions": 100}, gpt) == 100


@pytest.mark.parametrize("held", ["embedding", "head", "both", "unequal"])
def test_a_tied_matrix_under_either_name(held: str, tmp_path: Path) -> None:
    w = files.write_diffugpt(tmp_path)
    plain = files.gpt_forward(w, IDS)
    table = w["embed_tokens.weight"]
    if held != "embedding":
        w["lm_head.weight"] = table.clone() + (1 if held == "unequal" else 0)
    if held == "head":
        del w["embed_tokens.weight"]
    # Buffers of older transformers may lie beside the weights.
    w["denoise_model.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    files.write_weights(tmp_path, w)
    assert difference(opened(tmp_path), plain) < 1e-5


def test_a_head_that_differs_from_its_tied_embedding_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    w = files.write_diffugpt(tmp_path)
    for change, said in ((0.0, False), (1.0, True)):
        w["lm_head.weight"] = w["embed_tokens.weight"] + change
        files.write_weights(tmp_path, w)
        caplog.clear()
        with caplog.at_level("WARNING"):
            opened(tmp_path)
        assert ("embed_tokens.weight and lm_head.weight differ though they are tied" in caplog.text) == said


def test_another_format_is_told_which_known_one_is_closest(parent: Path, tmp_path: Path, capsys: Any) -> None:
    assert "closest is DiffuLLaMA, whose tokenizer has the mask token 'ти', and this one has none" in refused(
        capsys, parent
    )
    files.write_diffugpt(tmp_path / "gpt")
    w = {f"transformer.{k}": v for k, v in load_file(tmp_path / "gpt" / "model.safetensors").items()}
    files.write_weights(tmp_path / "gpt", w)
    assert "closest is DiffuGPT, whose weights begin with denoise_model., and this folder has transformer." in refused(
        capsys, tmp_path / "gpt"
    )
    config = json.loads((tmp_path / "gpt" / "config.json").read_text())
    (tmp_path / "gpt" / "config.json").write_text(json.dumps({**config, "model_type": "LLaDA_2"}))
    assert "closest is LLaDA with model_type 'llada', and this config.json says 'LLaDA_2'" in refused(
        capsys, tmp_path / "gpt"
    )


def test_reused_mask_tokens_stay_ordinary_text(tmp_path: Path) -> None:
    """Thirteen hyphens are one token. Cut out as a special token, twelve of them would be the mask."""
    files.write_diffugpt(tmp_path / "gpt")
    model = opened(tmp_path / "gpt")
    text = f"the {files.HYPHENS}- the"
    before = encode(model.tokenizer, text)
    assert model.tokenizer.convert_tokens_to_ids(files.HYPHENS + "-") in before
    assert model.process.mask_token_id not in before
    hub.save(tmp_path / "ours", model.denoiser.model, model.tokenizer, model.config)
    assert encode(load_tokenizer(tmp_path / "ours"), text) == before
    assert encode(opened(tmp_path / "ours").tokenizer, text) == before
    files.write_diffullama(tmp_path / "llama")
    llama = opened(tmp_path / "llama").tokenizer
    assert llama.convert_tokens_to_ids("тит") in encode(llama, "тит")


def test_no_code_of_a_folder_is_run_and_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run remote code"))
    for name in ("dream", "llada"):
        WRITERS[name][0](tmp_path / name)
        opened(tmp_path / name)
    (tmp_path / "dream" / "config.json").unlink()
    with pytest.raises(ValueError, match="no usable tokenizer"):
        load_tokenizer(tmp_path / "dream")  # without a stock config there is only the folder's own code


# ---------------------------------------------------------------------------------------------- through the one loop


@pytest.mark.parametrize("name", WRITERS)
def test_text_through_the_one_loop(name: str, tmp_path: Path) -> None:
    WRITERS[name][0](tmp_path)
    model = opened(tmp_path)
    text = diffulm.generate(model, "the", max_tokens=6, steps=3, temperature=1.0, policy="random", seed=1)
    assert isinstance(text, str)
    filled = diffulm.infill(model, "the ", " the", length=3)
    assert filled.startswith("the ") and filled.endswith(" the")
    assert model.tokenizer.mask_token not in str(text) + filled


@pytest.mark.parametrize("name", ["diffugpt-s", "diffullama"])
def test_the_released_sampler_gives_valid_text(name: str, tmp_path: Path) -> None:
    """The algorithm the authors released, re-created as a baseline, on a checkpoint as they released it."""
    baseline = pytest.importorskip("diffulm.bench.baselines")
    WRITERS[name][0](tmp_path)
    model = opened(tmp_path)
    canvas = IDS.clone()
    editable = torch.ones_like(canvas, dtype=torch.bool)
    editable[:, :5] = False
    out = baseline.sample_random_order(
        model.denoiser.model, canvas, editable, model.process.mask_token_id, steps=8, suppress_mask=True,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert out[:, :5].equal(canvas[:, :5]) and not (out == model.process.mask_token_id).any()
    text = model.tokenizer.decode(out[0])
    assert isinstance(text, str) and text


def test_an_a2d_block_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files.write_a2d(tmp_path / "block", "qwen3", block_size=4)
    model = opened(tmp_path / "block")
    assert model.layout.name == "block" and model.layout.size == 4
    files.write_a2d(tmp_path / "full", "qwen3")
    with caplog.at_level("INFO", logger="diffulm"):
        opened(tmp_path / "full")
    assert "does not say how the model was trained; read as full attention" in caplog.text


# ------------------------------------------------------------------------------------------------------ written back


def as_bytes(folder: Path) -> dict[str, tuple[str, bytes]]:
    found: dict[str, tuple[str, bytes]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {k: (str(v.dtype), v.view(torch.uint8).numpy().tobytes()) for k, v in load_file(file).items()}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["diffugpt-s", "diffugpt-m", "diffullama"])
def test_a_round_trip_is_bit_exact(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if name == "diffullama":
        files.write_diffullama(tmp_path / "in", dtype=dtype)
    else:
        files.write_diffugpt(tmp_path / "in", medium=name.endswith("m"), dtype=dtype)
    assert cli.main(["export", str(tmp_path / "in"), str(tmp_path / "out"), "--format", "released"]) == 0
    assert as_bytes(tmp_path / "out") == as_bytes(tmp_path / "in")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"diffusion", "is_causal", "mask_token_id"} & set(config)
    a, b = opened(tmp_path / "in"), opened(tmp_path / "out")
    assert b.logits(IDS).equal(a.logits(IDS)) and b.process == a.process
    assert {**b.config, "parent": ""} == {**a.config, "parent": ""}
    text = f"the {files.HYPHENS}- тит"
    assert encode(a.tokenizer, text) == encode(b.tokenizer, text)


def test_shards_are_written_with_an_index(tmp_path: Path) -> None:
    w = files.gpt_weights(300)
    state = {weights.file_names("diffugpt", k)[0]: k for k in ("transformer.wte.weight", "transformer.ln_f.bias")}
    stock = {name: w[key] for key, name in state.items()}
    weights.write(tmp_path, "gpt2", stock, tied=True, shard="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() and len(weights.weight_files(tmp_path)) == 2
    assert {k: v[...].tolist() for k, v in weights.stored(tmp_path).items()} == {k: w[k].tolist() for k in state}


@pytest.mark.parametrize("name", ["diffugpt-s", "dream", "llada", "a2d-qwen3"])
def test_any_of_them_becomes_an_ordinary_folder(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    WRITERS[name][0](tmp_path / "in")
    assert cli.main(["export", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    a, b = opened(tmp_path / "in"), opened(tmp_path / "out")
    assert b.logits(IDS).equal(a.logits(IDS)) and b.config == a.config
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.is_causal is False


def test_our_own_checkpoint_in_the_released_format(tmp_path: Path) -> None:
    from diffulm.convert import convert

    from .conftest import build_parent

    convert(str(build_parent(tmp_path / "parent", "gpt2")), tmp_path / "ours", trained_length=64)
    assert cli.main(["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--format", "released"]) == 0
    a, b = opened(tmp_path / "ours"), opened(tmp_path / "out")
    assert "embed_tokens.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert b.logits(IDS).equal(a.logits(IDS)) and b.config["trained_length"] == 64


# --------------------------------------------------------------------------------------------------------- bad input


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, verb: str = "generate") -> str:
    """Exit 2, one line on stderr; returns it."""
    rest = ["the", "--dtype", "float32", "--device", "cpu"] if verb == "generate" else []
    capsys.readouterr()
    code = cli.main([verb, str(arguments[0]), *rest, *map(str, arguments[1:])])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1, (code, out, err)
    return err


def damage(folder: Path, change: Callable[[files.Weights], object]) -> None:
    w = load_file(folder / "model.safetensors")
    change(w)
    save_file(w, folder / "model.safetensors", {"format": "pt"})


def test_missing_unknown_and_misshapen_keys_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_diffugpt(tmp_path)

    def change(w: files.Weights) -> None:
        del w["denoise_model.h.1.ln_2.bias"], w["embed_tokens.weight"]
        w["denoise_model.time_embed.weight"] = torch.ones(2)
        w["denoise_model.ln_f.weight"] = torch.ones(files.WIDTH + 1)

    damage(tmp_path, change)
    err = refused(capsys, tmp_path)
    assert "missing: denoise_model.h.1.ln_2.bias, embed_tokens.weight or lm_head.weight" in err
    assert "unknown: denoise_model.time_embed.weight" in err and "ln_f.weight is (33,), not (32,)" in err


@pytest.mark.parametrize(
    ("name", "key", "shown"),
    [
        ("diffullama", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("llada", "model.transformer.blocks.0.ff_out.weight", "model.transformer.blocks.0.ff_out.weight"),
        ("llada", "model.transformer.ff_out.weight", "model.transformer.ff_out.weight"),
        ("a2d-qwen3", "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_keys_are_named_as_the_file_names_them(
    name: str, key: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    w = WRITERS[name][0](tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    files.write_weights(tmp_path, {k: v for k, v in w.items() if k != key})
    assert f"(missing: {shown})" in refused(capsys, tmp_path)


def test_a_pickle_is_refused_with_a_command_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w = files.write_diffugpt(tmp_path / "a folder")
    (tmp_path / "a folder" / "model.safetensors").unlink()
    torch.save(w, tmp_path / "a folder" / "pytorch_model.bin")
    err = refused(capsys, tmp_path / "a folder")
    assert "holds pytorch_model.bin, a pickle, and only safetensors are read; convert it with: python -c" in err
    command = err.split("convert it with: ")[1].replace("python ", f"{sys.executable} ", 1)
    subprocess.run(command, shell=True, check=True)
    assert difference(opened(tmp_path / "a folder"), files.gpt_forward(w, IDS)) < 1e-5


def test_nothing_truncated_or_incomplete_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_diffugpt(tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is in the index but not there" in refused(capsys, tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    one = tmp_path / "model-00001-of-00002.safetensors"
    one.write_bytes(one.read_bytes()[:-50])
    assert "is damaged: download or save it again" in refused(capsys, tmp_path)
    one.unlink()
    assert "has no .safetensors weights" in refused(capsys, tmp_path)


def test_a_tokenizer_without_the_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_diffugpt(tmp_path / "gpt")
    vocabulary = json.loads((tmp_path / "gpt" / "vocab.json").read_text())
    del vocabulary[files.HYPHENS], vocabulary[files.HYPHENS + "-"]
    files.write_json(tmp_path / "gpt" / "vocab.json", vocabulary)
    (tmp_path / "gpt" / "merges.txt").write_text("#version: 0.2\nt h\n")
    err = refused(capsys, tmp_path / "gpt")
    assert "none of the mask tokens of DiffuGPT ('[¨M¨]', '------------')" in err

    # DiffuGPT-M's tokenizer beside DiffuGPT-S's weights: not the hyphens then, but an error.
    files.write_diffugpt(tmp_path / "mixed")
    rows = files.gpt_tokenizer(tmp_path / "mixed", medium=True) - 2
    assert f"'[¨M¨]' has id {rows}, and the model has {rows} rows" in refused(capsys, tmp_path / "mixed")

    files.write_llada(tmp_path / "llada")
    config = json.loads((tmp_path / "llada" / "config.json").read_text())
    files.write_json(tmp_path / "llada" / "config.json", {**config, "mask_token_id": 7})
    assert "config says mask_token_id 7, but '<|mdm_mask|>' is 400" in refused(capsys, tmp_path / "llada")

    # A Llama without a mask token is a parent, not a DiffuLLaMA.
    files.write_diffullama(tmp_path / "llama")
    files.write_llama_tokenizer(tmp_path / "llama", mask=None)
    assert "is not a diffusion checkpoint" in refused(capsys, tmp_path / "llama")


@pytest.mark.parametrize(
    "other", [{"rope": False}, {"include_qkv_bias": True}, {"layer_norm_type": "default"}, {"scale_logits": True}]
)
def test_a_llada_that_is_no_llama(other: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_llada(tmp_path, **other)
    assert f"this LLaDA is no Llama ({next(iter(other))} = " in refused(capsys, tmp_path)


def test_what_the_released_format_has_no_place_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(folder: Path) -> str:
        return refused(capsys, folder, tmp_path / "out", "--format", "released", verb="export")

    files.write_llada(tmp_path / "llada")
    assert "means full attention and the shift" in wrong(tmp_path / "llada")
    files.write_dream(tmp_path / "dream")
    assert "knows gpt2 and llama models, not qwen2" in wrong(tmp_path / "dream")
    files.write_diffullama(tmp_path / "llama", wrapped=True)
    shutil.copy(tmp_path / "llama" / "config.json", tmp_path / "keep.json")
    files.write_llama_tokenizer(tmp_path / "llama", mask="▁the")
    assert "told from its parent by the mask token 'ти'" in wrong(tmp_path / "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    assert "already holds something" in wrong(tmp_path / "llama")


def test_an_unknown_a2d_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_a2d(tmp_path, "qwen3")
    config = json.loads((tmp_path / "config.json").read_text())
    files.write_json(tmp_path / "config.json", {**config, "model_type": "a2d-mamba"})
    assert "A2D models of mamba are not known" in refused(capsys, tmp_path)


# ------------------------------------------------------------------------------------------------------------ memory

_MEASURE = """
import sys, torch
torch.set_num_threads(1)
from diffulm import hub
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
hub.load(sys.argv[1], device="cpu", dtype="bfloat16")  # imports and caches
before = anonymous()
model = hub.load(sys.argv[2], device="cpu", dtype="bfloat16")
print(anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="measured through Linux's /proc")
@pytest.mark.parametrize("name", ["diffullama", "diffugpt"])
def test_weights_stay_mapped_to_their_file(name: str, tmp_path: Path) -> None:
    """Opened in the file's own dtype, and probed, a checkpoint takes no memory of its own."""
    write = files.write_diffullama if name == "diffullama" else files.write_diffugpt
    write(tmp_path / "small", dtype=torch.bfloat16)
    w = write(tmp_path / "big", dtype=torch.bfloat16)
    key = "model.embed_tokens.weight" if name == "diffullama" else "embed_tokens.weight"
    rows = 1_000_000
    for k in [k for k in (key, "lm_head.weight") if k in w]:
        w[k] = torch.zeros(rows, files.WIDTH, dtype=torch.bfloat16)
    w[key][:1000] = torch.randn(1000, files.WIDTH)
    # The probe looks at tokens all over the vocabulary.
    w[key][:: rows // 64] = torch.randn(len(w[key][:: rows // 64]), files.WIDTH)
    w[key][torch.linspace(0, rows - 1, 32).long()] = torch.randn(32, files.WIDTH).bfloat16()
    files.write_weights(tmp_path / "big", w)
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "small"), str(tmp_path / "big")],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert size > 60e6 and int(done.stdout) < 0.1 * size, (size, done.stdout)
