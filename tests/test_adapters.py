"""LoRA adapters: whatever their keys are called, the merged weight is W + B A alpha / r; a misfit is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffulm import adapters, cli, hub
from diffulm.convert import convert

from . import released_files as files
from .conftest import build_parent

IDS = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(0))
W, INNER = files.WIDTH, files.INNER
#: All linear modules of a layer, (out, in), as the authors' recipe targets them.
LINEAR = {
    "self_attn.q_proj": (W, W), "self_attn.k_proj": (W, W), "self_attn.v_proj": (W, W), "self_attn.o_proj": (W, W),
    "mlp.gate_proj": (INNER, W), "mlp.up_proj": (INNER, W), "mlp.down_proj": (W, INNER),
}  # fmt: skip
ALL = {f"layers.{i}.{name}": shape for i in range(files.LAYERS) for name, shape in LINEAR.items()}


def opened(folder: Path, **options: Any) -> hub.Model:
    return hub.load(folder, **{"device": "cpu", "dtype": "float32", **options})


def merged(w: files.Weights, pieces: files.Weights, prefix: str, scale: float) -> files.Weights:
    """The arithmetic, by hand, on a bare Llama's names."""
    out = dict(w)
    for name in ALL:
        a, b = (pieces[f"base_model.model.{prefix}{name}.lora_{side}.weight"] for side in "AB")
        out[f"model.{name}.weight"] = w[f"model.{name}.weight"] + scale * b @ a
    if "base_model.model.embed_tokens.weight" in pieces:
        out["model.embed_tokens.weight"] = pieces["base_model.model.embed_tokens.weight"]
    return out


def close(model: hub.Model, plain: Tensor) -> bool:
    kept = [i for i in range(plain.shape[-1]) if i != model.process.mask_token_id]
    return float((model.logits(IDS)[:, 1:] - plain[:, :-1])[..., kept].abs().max()) < 2e-5


@pytest.mark.parametrize("prefix", ["denoise_model.", "model."])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_gsm_adapter_is_merged(prefix: str, rslora: bool, tmp_path: Path) -> None:
    """All linear modules and the embedding, under the names of the authors' wrapper or of a bare Llama."""
    w = files.write_diffullama(tmp_path / "base")
    whole = {"embed_tokens.weight": files.Draw(9, torch.float32)(*w["model.embed_tokens.weight"].shape)}
    pieces = files.write_adapter(tmp_path / "lora", ALL, prefix=prefix, whole=whole, use_rslora=rslora)
    scale = 4 / (math.sqrt(2) if rslora else 2)
    model = opened(tmp_path / "base", adapter=tmp_path / "lora")
    assert close(model, files.llama_forward(merged(w, pieces, prefix, scale), IDS))
    assert not close(model, files.llama_forward(w, IDS)), "the comparison can fail"
    assert not close(model, files.llama_forward(merged(w, pieces, prefix, scale * 1.05), IDS))
    assert model.config["adapter"] == str(tmp_path / "lora")
    # The base stays as it was: merging writes to memory, not through the mapping to the file.
    assert close(opened(tmp_path / "base"), files.llama_forward(w, IDS))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # from inside peft
def test_peft_merges_to_the_same(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    files.write_diffullama(tmp_path / "base")
    files.write_adapter(tmp_path / "lora", ALL, prefix="model.")
    theirs = opened(tmp_path / "base")
    peft.PeftModel.from_pretrained(theirs.denoiser.model, str(tmp_path / "lora")).merge_and_unload()
    ours = opened(tmp_path / "base", adapter=tmp_path / "lora")
    torch.testing.assert_close(ours.logits(IDS), theirs.logits(IDS), rtol=1e-5, atol=1e-5)


def test_gpt2_holds_its_projections_the_other_way_round(tmp_path: Path) -> None:
    w = files.write_diffugpt(tmp_path / "base")
    modules = {"h.0.attn.c_attn": (3 * W, W), "h.1.mlp.c_proj": (W, 4 * W), "h.1.attn.c_proj": (W, W)}
    pieces = files.write_adapter(tmp_path / "lora", modules, prefix="denoise_model.", fan_in_fan_out=True)
    for name in modules:
        a, b = (pieces[f"base_model.model.denoise_model.{name}.lora_{side}.weight"] for side in "AB")
        w[f"denoise_model.{name}.weight"] = w[f"denoise_model.{name}.weight"] + 2 * (b @ a).T
    assert close(opened(tmp_path / "base", adapter=tmp_path / "lora"), files.gpt_forward(w, IDS))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # from inside peft
def test_other_kinds_of_adapter_are_merged_by_peft(tmp_path: Path) -> None:
    """DoRA under the wrapper's names, against peft under the stock ones."""
    peft = pytest.importorskip("peft")
    files.write_diffullama(tmp_path / "base")
    plain = opened(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["q_proj", "down_proj"])
    wrapped = peft.get_peft_model(plain.denoiser.model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    wrapped.save_pretrained(tmp_path / "lora", save_embedding_layers=False)  # "auto" would ask the Hub
    w = {k: v.clone() for k, v in load_file(tmp_path / "lora" / "adapter_model.safetensors").items()}
    renamed = {k.replace("base_model.model.model.", "base_model.model.denoise_model."): v for k, v in w.items()}
    files.write_weights(tmp_path / "lora", renamed, stem="adapter_model")
    wrapped.merge_and_unload()
    ours = opened(tmp_path / "base", adapter=tmp_path / "lora")
    torch.testing.assert_close(ours.logits(IDS), plain.logits(IDS), rtol=1e-5, atol=1e-5)
    assert not ours.logits(IDS).equal(opened(tmp_path / "base").logits(IDS))


def test_without_peft_a_plain_lora_merges_and_others_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    files.write_diffullama(tmp_path / "base")
    files.write_adapter(tmp_path / "lora", ALL, prefix="denoise_model.")
    opened(tmp_path / "base", adapter=tmp_path / "lora")
    files.write_adapter(tmp_path / "dora", ALL, prefix="denoise_model.", use_dora=True)
    with pytest.raises(ValueError, match=r"is no plain LoRA, which needs peft to merge; pip install 'diffulm\[lora\]'"):
        opened(tmp_path / "base", adapter=tmp_path / "dora")


# -------------------------------------------------------------------------------------------------- the command line


def test_generate_infill_and_export_take_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w = files.write_diffullama(tmp_path / "base")
    base, mute, lora = str(tmp_path / "base"), str(tmp_path / "mute"), str(tmp_path / "lora")
    # With a head of zeros every token is as likely as any, and greedy decoding takes the first: <unk>.
    files.write_adapter(tmp_path / "mute", {}, prefix="", whole={"lm_head.weight": 0 * w["lm_head.weight"]})
    fast = ["--dtype", "float32", "--device", "cpu", "--json"]
    for extra, expected in ([], False), (["--adapter", mute], True):
        assert cli.main(["generate", base, "the", "--max-tokens", "5", *fast, *extra]) == 0
        assert ("<unk>" * 5 in capsys.readouterr().out) == expected
        assert cli.main(["infill", base, "the <hole:3> the", *fast, *extra]) == 0
        assert ("the <unk><unk><unk> the" in capsys.readouterr().out) == expected
    pieces = files.write_adapter(tmp_path / "lora", ALL, prefix="denoise_model.")
    assert cli.main(["export", base, str(tmp_path / "out"), "--format", "released", "--adapter", lora]) == 0
    plain = files.llama_forward(merged(w, pieces, "denoise_model.", 2), IDS)
    assert close(opened(tmp_path / "out"), plain)


def refused(capsys: pytest.CaptureFixture[str], base: Path, adapter: object) -> str:
    capsys.readouterr()
    code = cli.main(["generate", str(base), "the", "--dtype", "float32", "--device", "cpu", "--adapter", str(adapter)])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1, (code, out, err)
    return err


def test_an_adapter_that_does_not_fit_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_diffullama(tmp_path / "base")
    files.write_diffugpt(tmp_path / "gpt")
    files.write_adapter(tmp_path / "lora", ALL, prefix="denoise_model.")
    assert "does not fit its base: it changes denoise_model.layers" in refused(
        capsys, tmp_path / "gpt", tmp_path / "lora"
    )
    files.write_adapter(tmp_path / "wide", {"layers.0.mlp.up_proj": (INNER, W + 2)}, prefix="denoise_model.")
    err = refused(capsys, tmp_path / "base", tmp_path / "wide")
    assert "model.layers.0.mlp.up_proj.weight is (64, 32) there and (64, 34) in the adapter" in err
    files.write_adapter(tmp_path / "deep", {"layers.7.mlp.up_proj": (INNER, W)}, prefix="denoise_model.")
    assert "it changes denoise_model.layers.7.mlp.up_proj" in refused(capsys, tmp_path / "base", tmp_path / "deep")
    table = {"embed_tokens.weight": torch.ones(7, W)}
    files.write_adapter(tmp_path / "rows", {}, prefix="", whole=table)
    assert "model.embed_tokens.weight is" in refused(capsys, tmp_path / "base", tmp_path / "rows")


def test_half_a_lora_a_pickle_and_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_diffullama(tmp_path / "base")
    pieces = files.write_adapter(tmp_path / "half", ALL, prefix="denoise_model.")
    del pieces["base_model.model.denoise_model.layers.1.mlp.up_proj.lora_B.weight"]
    files.write_weights(tmp_path / "half", pieces, stem="adapter_model")
    assert "has one half of a LoRA without the other" in refused(capsys, tmp_path / "base", tmp_path / "half")
    (tmp_path / "half" / "adapter_model.safetensors").unlink()
    torch.save(pieces, tmp_path / "half" / "adapter_model.bin")
    assert "holds adapter_model.bin, a pickle" in refused(capsys, tmp_path / "base", tmp_path / "half")
    assert "is no adapter: it has no adapter_config.json" in refused(capsys, tmp_path / "base", tmp_path / "base")
    assert "could not be had from the Hub" in refused(capsys, tmp_path / "base", "no/such-adapter")
    # Given as the model, it says what it is.
    assert cli.main(["generate", str(tmp_path / "half"), "the"]) == 2
    assert "is an adapter, not a model; give the base as the model and this as --adapter" in capsys.readouterr().err


def test_an_embedding_of_its_own_needs_an_untied_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w = files.write_diffugpt(tmp_path / "base")
    table = {"embed_tokens.weight": w["embed_tokens.weight"] + 1}
    files.write_adapter(tmp_path / "lora", {}, prefix="", whole=table)
    assert "its base ties embedding and head" in refused(capsys, tmp_path / "base", tmp_path / "lora")


def test_damaged_adapter_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_diffullama(tmp_path / "base")
    files.write_adapter(tmp_path / "lora", ALL, prefix="model.")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"})[:-3])
    assert "is not valid JSON" in refused(capsys, tmp_path / "base", tmp_path / "lora")


# --------------------------------------------------------------------------------------------------------- training


def trained(folder: Path, out: Path, **options: Any) -> tuple[hub.Model, Tensor]:
    """A checkpoint whose LoRA and mask row were moved by hand, written to `out`; its logits on IDS with masks."""
    model = opened(folder, dtype="float64")
    mask = model.process.mask_token_id
    inner: Any = model.denoiser.model
    config = adapters.add_lora(inner, mask, rank=2, alpha=6.0, **options)
    for name, parameter in inner.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.data += 0.3 * noise.double()
    adapters.write_lora(out, config, inner.state_dict(), {**model.config, "tokens_seen": 7}, base=str(folder))
    return model, model.logits(masked(mask))


def masked(mask: int) -> Tensor:
    ids = IDS.clone()
    ids[:, 3:9] = mask
    return ids


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # from inside peft
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_lora_made_here_is_merged_here_and_by_peft(family: str, tied: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    build_parent(tmp_path / "parent", family, tie_word_embeddings=tied)
    convert(str(tmp_path / "parent"), tmp_path / "base", trained_length=64)
    _, logits = trained(tmp_path / "base", tmp_path / "lora")
    plain = opened(tmp_path / "base", dtype="float64")
    ids = masked(plain.process.mask_token_id)
    assert float((plain.logits(ids) - logits)[:, 1:].nan_to_num(neginf=0, nan=0).abs().max()) > 0.1
    merged = opened(tmp_path / "base", dtype="float64", adapter=tmp_path / "lora")
    torch.testing.assert_close(merged.logits(ids), logits, rtol=1e-6, atol=1e-6)
    theirs: Any = peft.PeftModel.from_pretrained(plain.denoiser.model, str(tmp_path / "lora"))
    theirs.merge_and_unload()
    torch.testing.assert_close(plain.logits(ids), logits, rtol=1e-5, atol=1e-5)
    assert (
        cli.main(["export", str(tmp_path / "base"), str(tmp_path / "whole"), "--adapter", str(tmp_path / "lora")]) == 0
    )
    torch.testing.assert_close(opened(tmp_path / "whole", dtype="float64").logits(ids), logits, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "lora/diffusion.json").read_text())["tokens_seen"] == 7
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert sum(v.numel() for v in written.values()) < 0.25 * sum(p.numel() for p in plain.denoiser.parameters())


def test_only_the_lora_and_the_mask_row_are_trained(tmp_path: Path) -> None:
    build_parent(tmp_path / "parent")
    convert(str(tmp_path / "parent"), tmp_path / "base", trained_length=64)
    model = opened(tmp_path / "base")
    adapters.add_lora(model.denoiser.model, model.process.mask_token_id, rank=2, alpha=4.0, targets=("q_proj",))
    names = {name for name, p in model.denoiser.named_parameters() if p.requires_grad}
    assert all(".q_proj.lora_" in name or name.endswith(".row") for name in names)
    assert sum(name.endswith(".row") for name in names) == 1
    before = opened(tmp_path / "base").logits(masked(model.process.mask_token_id))
    torch.testing.assert_close(model.logits(masked(model.process.mask_token_id)), before)  # it begins as the base
    wanted = masked(model.process.mask_token_id) == model.process.mask_token_id
    rows = model.layout.decoding_rows(masked(model.process.mask_token_id), torch.ones_like(IDS).bool(), wanted)
    model.denoiser.nll(rows).sum().backward()
    for name, parameter in model.denoiser.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert moved == (parameter.requires_grad and "lora_A" not in name), (
            name
        )  # B is 0 at first, so A has no gradient


def test_a_lora_that_cannot_be_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_parent(tmp_path / "parent")
    convert(str(tmp_path / "parent"), tmp_path / "base", trained_length=64)
    inner: Any = opened(tmp_path / "base").denoiser.model
    with pytest.raises(ValueError, match=r"sft.lora_targets = \['c_attn'\] fits no module of llama"):
        adapters.add_lora(inner, 1, rank=2, alpha=4.0, targets=("c_attn",))
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'diffulm\[lora\]'"):
        adapters.add_lora(inner, 1, rank=2, alpha=4.0)


def test_rows_of_another_base_are_refused(tmp_path: Path) -> None:
    build_parent(tmp_path / "parent")
    convert(str(tmp_path / "parent"), tmp_path / "base", trained_length=64)
    trained(tmp_path / "base", tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": [9999]}))
    with pytest.raises(ValueError, match="does not fit its base"):
        opened(tmp_path / "base", adapter=tmp_path / "lora")
