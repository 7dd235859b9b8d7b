"""LoRA adapters: whatever their keys are called, the merged weight is W + B A alpha / r; a misfit is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

from diffulm import adapters, cli, hub
from diffulm.convert import convert
from diffulm.denoiser import HFDenoiser
from diffulm.train import checkpoint
from diffulm.train.optim import build_optimizers

from . import released_files as files
from .conftest import build_parent
from .families import FAMILIES, POSITIONS, random_model, save_parent
from .train import tiny

IDS = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(0))
W, INNER = files.WIDTH, files.INNER
#: All linear modules of a layer, (out, in), as the authors' recipe targets them.
LINEAR = {
    "self_attn.q_proj": (W, W), "self_attn.k_proj": (W, W), "self_attn.v_proj": (W, W), "self_attn.o_proj": (W, W),
    "mlp.gate_proj": (INNER, W), "mlp.up_proj": (INNER, W), "mlp.down_proj": (W, INNER),
}  # fmt: skip
CONVERTED = [name for name, family in FAMILIES.items() if family.becomes != "refused"]
#: Their stacks of experts run in no float64.
STACKED = ("qwen3_moe", "deepseek_v3", "gpt_oss")
#: (family, tied), of which a few are no slow tests.
CASES = [
    pytest.param(name, tied, marks=[] if name in ("llama", "gpt2", "gemma3_text", "deepseek_v3") else pytest.mark.slow)
    for name in CONVERTED
    for tied in ((True, False) if name in ("llama", "gpt2", "qwen2") else (True,))
]
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
    # With a head of zeros every token is as likely as any, and greedy decoding takes the first: <unk>, or
    # the first that brings the space in front of a hole.
    files.write_adapter(tmp_path / "mute", {}, prefix="", whole={"lm_head.weight": 0 * w["lm_head.weight"]})
    fast = ["--dtype", "float32", "--device", "cpu", "--json"]
    for extra, expected in ([], False), (["--adapter", mute], True):
        assert cli.main(["generate", base, "the", "--max-tokens", "5", *fast, *extra]) == 0
        assert ("<unk>" * 5 in capsys.readouterr().out) == expected
        assert cli.main(["infill", base, "the <hole:3> the", *fast, *extra]) == 0
        assert ("the <unk><unk> the" in capsys.readouterr().out) == expected
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


def trained(folder: Path, out: Path, dtype: str = "float64", **options: Any) -> tuple[hub.Model, Tensor]:
    """A checkpoint whose LoRA and mask row were trained a little, written to `out`; its logits on IDS with masks."""
    model = opened(folder, dtype=dtype)
    mask = model.process.mask_token_id
    ids, inner = masked(mask), model.denoiser.model
    before = model.logits(ids)
    config = adapters.add_lora(inner, mask, rank=2, alpha=6.0, **options)
    assert torch.equal(model.logits(ids), before), "it begins as its base"
    learns = {name: parameter for name, parameter in inner.named_parameters() if parameter.requires_grad}
    begun = {name: parameter.detach().clone() for name, parameter in learns.items()}
    optimizer = torch.optim.AdamW(learns.values(), lr=0.1)
    rows = model.layout.decoding_rows(ids, torch.ones_like(ids).bool(), ids == mask)
    rows = dataclasses.replace(rows, target=IDS[ids == mask])
    for _ in range(3):
        optimizer.zero_grad()
        model.denoiser.nll(rows).mean().backward()
        optimizer.step()
    for name, parameter in learns.items():
        assert not torch.equal(parameter, begun[name]), name
        # In steps of 1/256, float32 holds all of it and B A exactly: to write and to merge it costs no rounding.
        parameter.data = (parameter.data * 256).round() / 256
    adapters.write_lora(out, config, inner.state_dict(), {**model.config, "tokens_seen": 7}, base=str(folder))
    return model, model.logits(ids)


def masked(mask: int) -> Tensor:
    ids = IDS.clone()
    ids[:, 3:9] = mask
    return ids


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # from inside peft
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_a_lora_made_here_is_merged_here_and_by_peft(family: str, tied: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    save_parent(tmp_path / "parent", family, tie_word_embeddings=tied)
    convert(str(tmp_path / "parent"), tmp_path / "base", trained_length=POSITIONS // 2)
    dtype, rounding = ("float32", 1e-5) if family in STACKED else ("float64", 1e-9)
    _, logits = trained(tmp_path / "base", tmp_path / "lora", dtype)
    plain = opened(tmp_path / "base", dtype=dtype)
    ids = masked(plain.process.mask_token_id)
    assert float((plain.logits(ids) - logits)[:, 1:].nan_to_num(neginf=0, nan=0).abs().max()) > 0.1
    merged = opened(tmp_path / "base", dtype=dtype, adapter=tmp_path / "lora")
    torch.testing.assert_close(merged.logits(ids), logits, rtol=rounding, atol=rounding)
    theirs: Any = peft.PeftModel.from_pretrained(plain.denoiser.model, str(tmp_path / "lora"))
    theirs.merge_and_unload()
    torch.testing.assert_close(plain.logits(ids), logits, rtol=1e-5, atol=1e-5)
    assert (
        cli.main(["export", str(tmp_path / "base"), str(tmp_path / "whole"), "--adapter", str(tmp_path / "lora")]) == 0
    )
    torch.testing.assert_close(opened(tmp_path / "whole", dtype=dtype).logits(ids), logits, rtol=1e-5, atol=1e-5)
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


@pytest.mark.parametrize("padding", [None, 0, 5, 8])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_trained_row_is_looked_up_as_its_table_is(padding: int | None, scaled: bool) -> None:
    """Also where the table's class scales what it finds, or has a padding row, whose gradient torch drops."""
    table: Any = torch.nn.Embedding(9, 4, padding)
    if scaled:
        table = GemmaTextScaledWordEmbedding(9, 4, padding, embed_scale=3.0)
        torch.nn.init.normal_(table.weight)
    ids, weight = torch.tensor([[5, 0, 5], [8, 5, 2]]), table.weight.detach().clone()
    expected = table(ids).detach()
    row = adapters.TrainedRow(table.requires_grad_(False), 5)
    assert torch.equal(row(ids), expected) and row.weight is table.weight and row(ids[:0]).shape == (0, 3, 4)
    row(ids).sum().backward()
    assert row.row.grad is not None and row.row.grad.tolist() == [3 * (3.0 if scaled else 1.0)] * 4
    with torch.no_grad():
        weight[5] = row.row.add_(1.0)
        moved = row(ids)
        table.weight.copy_(weight)
        assert torch.equal(moved, table(ids)) and not torch.equal(moved, expected)


def modules_of_lora(model: Any) -> set[str]:
    """Last names of the modules that have a LoRA, which are all of the parameters trained but one."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum(name.endswith(".row") for name in names) == 1
    return {name.split(".lora_")[0].rpartition(".")[2] for name in names if not name.endswith(".row")}


QKVO = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
#: All that have a LoRA in mixtures of experts: neither experts nor routers.
OF_EXPERTS = {
    "qwen3_moe": QKVO, "gpt_oss": QKVO, "llama4_text": QKVO | MLP,
    "deepseek_v3": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
}  # fmt: skip


@pytest.mark.parametrize("family", OF_EXPERTS)
def test_a_mixture_of_experts_has_a_lora_in_what_peft_can_carry(family: str) -> None:
    model = random_model(family)
    adapters.add_lora(model, 63, rank=2, alpha=4.0)
    assert modules_of_lora(model) == OF_EXPERTS[family]
    model = random_model(family)
    adapters.add_lora(model, 63, rank=2, alpha=4.0, targets=("layers.1.self_attn.o_proj",))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 1


@pytest.mark.parametrize(
    ("family", "targets", "unfit"),
    [
        ("qwen3_moe", ("q_proj", "gate_proj", "up_proj", "down_proj"), MLP),  # of the experts, in older files
        ("qwen3_moe", ("experts",), {"experts"}),
        ("qwen3_moe", ("gate",), {"gate"}),
        ("deepseek_v3", ("gate_proj", "up_proj", "down_proj"), MLP),
        ("deepseek_v3", ("o_proj", "down_proj"), {"down_proj"}),
        ("llama4_text", ("router",), {"router"}),
        ("gpt_oss", ("gate_up_proj",), {"gate_up_proj"}),
        ("llama", ("lm_head", "q_proj"), {"lm_head"}),
        ("gpt2", ("proj",), {"proj"}),
    ],
)
def test_targets_that_cannot_have_a_lora_are_refused_at_once(
    family: str, targets: tuple[str, ...], unfit: set[str]
) -> None:
    model = random_model(family)
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=f"fits no module of {family} that can have a LoRA; choose among ") as caught:
        adapters.add_lora(model, 63, rank=2, alpha=4.0, targets=targets)
    named = str(caught.value).split(" fits ")[0]
    assert {target for target in targets if repr(target) in named} == unfit
    assert [(name, type(module)) for name, module in model.named_modules()] == before, "nothing is half done"


def test_a_model_without_linear_modules_has_no_lora() -> None:
    with pytest.raises(ValueError, match=r"peft can give no module of llama a LoRA .*; set sft.lora_rank = 0"):
        adapters.add_lora(random_model("llama", num_hidden_layers=0), 63, rank=2, alpha=4.0)


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


# ------------------------------------------------------------------------------------------------------- checkpoints

OFTEN = dataclasses.replace(tiny.CONFIG, steps=4, checkpoint_minutes=0.0, keep=100)


def of_lora(seed: int = 1, rank: int = 2, **changes: Any) -> HFDenoiser:
    denoiser = tiny.make_denoiser("float32", **changes)
    adapters.add_lora(denoiser.model, tiny.VOCABULARY - 1, rank=rank, alpha=4.0, seed=seed)
    return denoiser


@pytest.mark.parametrize(("tied", "behind"), [(True, False), (False, True)])
def test_a_checkpoint_of_a_lora_is_what_is_trained_and_resumes_to_the_same(
    tied: bool, behind: bool, tmp_path: Path
) -> None:
    config = dataclasses.replace(OFTEN, async_checkpoint=behind)
    whole = tiny.run(tmp_path / "whole", config, denoiser=of_lora(tie_word_embeddings=tied))
    half = tmp_path / "whole" / "step-00000002"
    names = {name for name, parameter in whole.named_parameters() if parameter.requires_grad}
    assert load_file(half / "model.safetensors").keys() == names and len(names) == 2 * 14 + 1
    shutil.copytree(half, tmp_path / "cut" / half.name)
    other = of_lora(seed=2, tie_word_embeddings=tied)
    assert not tiny.same_weights(whole, other)
    assert tiny.same_weights(tiny.run(tmp_path / "cut", config, denoiser=other), whole)
    newest = "step-00000004/optimizer.safetensors"
    assert (tmp_path / "cut" / newest).read_bytes() == (tmp_path / "whole" / newest).read_bytes()


def test_a_checkpoint_that_holds_the_frozen_weights_too_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of earlier versions do; the weights in it win, as they did."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_TRAINED", checkpoint._WHOLE)
        whole = tiny.run(tmp_path / "whole", OFTEN, denoiser=of_lora())
    half = tmp_path / "whole" / "step-00000002"
    assert load_file(half / "model.safetensors").keys() == tiny.weights(whole).keys()
    shutil.copytree(half, tmp_path / "cut" / half.name)
    assert tiny.same_weights(tiny.run(tmp_path / "cut", OFTEN, denoiser=of_lora(seed=5)), whole)


def test_a_checkpoint_of_another_lora_is_refused_untouched(tmp_path: Path) -> None:
    """Other shapes, no LoRA, a LoRA for what was trained whole, or some of the frozen weights."""
    tiny.run(tmp_path / "lora", OFTEN, denoiser=of_lora())
    tiny.run(tmp_path / "plain", OFTEN)
    some = shutil.copytree(tmp_path / "lora" / "step-00000004", tmp_path / "some" / "step-00000004")
    whole = of_lora().state_dict()
    frozen = "model.model.norm.weight"
    save_file(load_file(some / "model.safetensors") | {frozen: whole[frozen]}, some / "model.safetensors")
    state = json.loads((some / "state.json").read_text())
    lora, plain = (tmp_path / name / some.name for name in ("lora", "plain"))
    wrong = ((lora, of_lora(rank=3)), (lora, tiny.make_denoiser("float32")), (plain, of_lora()), (some, of_lora()))
    for folder, denoiser in wrong:
        before = tiny.weights(denoiser)
        with pytest.raises(ValueError, match="belongs to another model"):
            checkpoint.restore(folder, state, denoiser, build_optimizers(denoiser, OFTEN))
        assert tiny.same_weights(before, denoiser)
