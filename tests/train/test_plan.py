"""What a step costs, before it is run: operations, bytes, hours, money."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from diffulm import adapters, hub
from diffulm.cli import main
from diffulm.denoiser import HFDenoiser
from diffulm.layout import Block, Causal, Full, NoisedBatch
from diffulm.objective import diffusion_loss
from diffulm.runtime import parse_precision
from diffulm.train.config import DataConfig, ModelConfig, Recipe, SftConfig, TrainConfig
from diffulm.train.flops import Shape, Work, flops_per_token
from diffulm.train.memory import MemoryModel, some_rows
from diffulm.train.optim import build_optimizers
from diffulm.train.parallel import parallelize
from diffulm.train.plan import FAILURES, GPUS, WRITE_SPEED, checkpoint_interval, find_gpu, plan
from diffulm.train.slurm import slurm_script, torchrun_waits

from ..conftest import tiny_config
from ..families import FAMILIES, random_model

SIZES = {
    "narrow": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "vocab": 1000},
    "deep": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "vocab": 500},
    "wide head": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "vocab": 12000},
}


def config_of(size: str, **changes: Any) -> Any:
    return tiny_config("llama", **{**SIZES[size], **changes})


# ------------------------------------------------------------------------------------------------------ operations


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("kind", ["full", "block", "causal"])
def test_operations_are_those_that_torch_counts(family: str, kind: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config(family, vocab=200)
    config._attn_implementation = "eager"  # torch does not count the CPU's fused attention
    model = hub.skeleton(config)
    model.config.is_causal = kind != "full" and kind != "block"
    denoiser = HFDenoiser(model.train(), 199)
    B, L = 3, 32
    ids = torch.randint(2, 150, (B, L))
    noised = torch.zeros(B, L, dtype=torch.bool)
    noised[:, 1::2] = True
    everything = torch.ones_like(noised)
    everything[:, 0] = False
    zeros = torch.zeros_like(ids)
    batch = NoisedBatch(ids, ids, noised, everything, noised.float(), zeros, torch.ones_like(noised), zeros)
    layout: Any = {"full": Full(), "block": Block(8, "launch"), "causal": Causal()}[kind]
    rows = layout.training_rows(batch)
    shape = Shape.of(model)
    R, N = rows.ids.shape[1], len(rows.source)
    with FlopCounterMode(display=False) as counter:
        loss = diffusion_loss(denoiser, rows).sum
        forward = counter.get_total_flops()
        loss.backward()
    assert forward == pytest.approx(shape.forward(B * R, B * R * R, N), rel=1e-3)
    assert counter.get_total_flops() == pytest.approx(shape.executed(B * R, B * R * R, N), rel=1e-3)
    recipe = Recipe(
        model=ModelConfig(layout="block" if kind == "block" else "full", source="launch" if kind == "block" else "own",
                          block_size=8 if kind == "block" else None),
        data=DataConfig(length=L),
    )  # fmt: skip
    work = Work.of(recipe, causal=kind == "causal")
    assert (work.rows, work.pairs) == (R, R * R) and abs(work.wanted - N / B) <= 0.5
    assert flops_per_token(shape, work) * L * B == pytest.approx(shape.train(B * R, B * R * R, N), rel=0.02)


def test_frozen_weights_cost_a_product_less() -> None:
    """As with a LoRA: gradients pass through every layer to the embedding, and stop at no weight."""
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config("llama", vocab=200, tie_word_embeddings=False)
    config._attn_implementation = "eager"  # torch does not count the CPU's fused attention
    model = hub.skeleton(config).train().requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    rows = some_rows(Work(32, 32, 32**2, 16), 3)
    with FlopCounterMode(display=False) as counter:
        diffusion_loss(HFDenoiser(model, None), rows).sum.backward()
    shape, sizes = Shape.of(model), (3 * 32, 3 * 32**2, len(rows.source))
    again = shape.executed(*sizes) - shape.train(*sizes)  # the head's logits
    assert counter.get_total_flops() - again == pytest.approx(shape.train(*sizes, frozen=True), rel=1e-3)
    assert shape.train(*sizes, frozen=True) < 0.8 * shape.train(*sizes)


def test_experts_count_as_often_as_they_are_asked() -> None:
    import transformers as tf

    sizes = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 8,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8,
    }  # fmt: skip
    with torch.device("meta"):
        shape = Shape.of(hub.skeleton(tf.Qwen3MoeConfig(**sizes)))
    attention = 32 * 32 * 2 + 32 * 16 * 2
    assert shape.matrix == 2 * (attention + 8 * 32 + 2 * 3 * 32 * 16)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.becomes != "refused"])
def test_operations_of_every_family(family: str) -> None:
    """As they are by default torch counts neither the CPU's fused attention nor grouped products of experts."""
    from torch.utils.flop_counter import FlopCounterMode

    model = random_model(family, attn_implementation="eager", experts_implementation="eager")
    if family == "llama4_text":  # transformers multiplies every row with all experts; the plan counts the chosen ones
        model.config.num_experts_per_tok = model.config.num_local_experts
    B, R = 2, 48
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(2, 60, (B, R)))
    assert counter.get_total_flops() == pytest.approx(Shape.of(model).forward(B * R, B * R * R, B * R), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- bytes


def memory_of(config: Any, length: int, dtype: str, optimizer: str = "adamw", shards: int = 1) -> MemoryModel:
    with torch.device("meta"):
        shape = Shape.of(hub.skeleton(config))
    work = Work(length, length, length**2, length / 2)
    return MemoryModel(config, shape, work, parse_precision(dtype), optimizer, shards, False)


def tracked(config: Any, length: int, sequences: int, dtype: str, checkpointing: bool) -> dict[str, int]:
    """Bytes at the peak of two accumulated micro-batches, moments present, as torch's MemTracker sees them."""
    from torch.distributed._tools.mem_tracker import MemTracker

    model = hub.skeleton(config)
    denoiser = HFDenoiser(model.train(), None, precision=parse_precision(dtype))
    parallelize(denoiser, denoiser.precision, compile=False, activation_checkpointing=checkpointing)
    (optimizer,) = build_optimizers(denoiser, TrainConfig())
    rows = some_rows(Work(length, length, length**2, length / 2), sequences)
    tracker = MemTracker()
    tracker.track_external(denoiser, optimizer)
    with tracker:
        for step in range(2):
            for _ in range(2 if step else 1):
                diffusion_loss(denoiser, rows).sum.backward()
                tracker.reset_mod_stats()
            optimizer.step()
            if not step:
                optimizer.zero_grad()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {str(key).rsplit(".", 1)[-1]: value for key, value in peak.items()}


@pytest.mark.parametrize("dtype", ["float32", "autocast"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_are_those_that_torch_tracks(size: str, dtype: str, checkpointing: bool) -> None:
    config = config_of(size)
    parts = memory_of(config, 128, dtype).parts(4, checkpointing=checkpointing)
    peak = tracked(config, 128, 4, dtype, checkpointing)
    assert parts["parameters"] == peak["PARAM"] and parts["gradients"] == peak["GRAD"]
    assert parts["optimizer"] == pytest.approx(peak["OPT"], rel=1e-3)  # torch counts its step numbers too
    assert sum(parts.values()) == pytest.approx(peak["Total"], rel=0.1)


LLAMA = {
    "7B": ({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32}, 6_738_415_616),
    "70B": ({"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
             "num_key_value_heads": 8}, 68_976_648_192),
}  # fmt: skip


@pytest.mark.parametrize("name", LLAMA)
def test_large_models_from_their_shape_alone(name: str) -> None:
    sizes, published = LLAMA[name]
    config = tiny_config("llama", vocab=32000, tie_word_embeddings=False, max_position_embeddings=4096, **sizes)
    with torch.device("meta"):
        model = hub.skeleton(config)
        real = sum(p.numel() * p.itemsize for p in model.parameters())
    memory = memory_of(config, 2048, "autocast", shards=64)
    assert memory.shape.parameters == published and real == 4 * published
    parts = memory.parts(1, checkpointing=True)
    assert parts["parameters"] == parts["gradients"] == -(-real // 64)
    assert parts["optimizer"] == -(-2 * real // 64)
    assert memory.shape.layers == sizes["num_hidden_layers"]
    # 34 B R D bytes a layer is what a plain layer keeps (arXiv 2205.05198); SwiGLU and float32 streams keep more.
    kept = memory.kept.sequence_layer / (2048 * sizes["hidden_size"])
    assert 34 < kept < 110
    assert memory.kept_with_checkpointing.sequence_layer == 2048 * sizes["hidden_size"] * 4


def test_more_sequences_take_more_and_the_largest_that_fits_is_found() -> None:
    memory = memory_of(config_of("narrow"), 64, "float32")
    sizes = [sum(memory.parts(n, checkpointing=False).values()) for n in range(1, 9)]
    assert sizes == sorted(sizes)
    for limit in (3, 8):
        assert memory.largest(sizes[4], limit=limit, checkpointing=False) == min(5, limit)
    assert memory.largest(sizes[0] - 1, limit=8, checkpointing=False) == 0
    assert (
        memory_of(config_of("narrow"), 64, "float32", "muon").parts(1, checkpointing=False)["optimizer"]
        < (memory.parts(1, checkpointing=False)["optimizer"])
    )


def kept_bytes(model: Any, length: int, sequences: int) -> int:
    """What a forward pass of training leaves for the backward pass, weights apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    alive = []  # or an address might be given twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        diffusion_loss(
            HFDenoiser(model.train(), None), some_rows(Work(length, length, length**2, length / 2), sequences)
        )
    return sum(found.values())


@pytest.mark.parametrize("size", SIZES)
def test_a_lora_keeps_hardly_less_than_full_training(size: str) -> None:
    """So `LoraMemory` counts its activations as those of full training."""
    model = hub.skeleton(config_of(size))
    full = kept_bytes(model, 64, 2)
    adapters.add_lora(model, 0, rank=8, alpha=16)
    assert 0.8 * full < kept_bytes(model, 64, 2) <= full


# ------------------------------------------------------------------------------------------------------- the plan


def tiny_recipe(**train: Any) -> Recipe:
    settings = {"batch": 64, "micro_batch": 2, "steps": 100, "dtype": "autocast", **train}
    return Recipe(data=DataConfig(length=64, pack="concat"), train=TrainConfig(**settings))


def test_hours_cost_and_checkpoints_follow_from_the_operations() -> None:
    config = config_of("narrow")
    found = plan(tiny_recipe(), config, gpu="h100", count=8, mfu=0.5, price=2.0)
    assert found.tokens == 64 * 64 * 100
    assert found.tokens_per_second == pytest.approx(8 * 989e12 * 0.5 / found.flops_per_token)
    assert found.hours == pytest.approx(found.tokens / found.tokens_per_second / 3600)
    assert found.cost == pytest.approx(found.hours * 8 * 2)
    assert found.checkpoint_bytes == 12 * found.shape.parameters
    assert plan(tiny_recipe(), config, gpu="h100", count=16, mfu=0.5).hours == pytest.approx(found.hours / 2)
    assert plan(tiny_recipe(steps=None, minutes=30.0), config, gpu="h100", count=1).hours == 0.5
    assert plan(tiny_recipe(steps=None), config, gpu="h100", count=1).hours is None


def lora_recipe(**train: Any) -> Recipe:
    recipe = dataclasses.replace(tiny_recipe(**train), data=DataConfig(length=64), task="sft")
    return dataclasses.replace(recipe, sft=SftConfig(lora_rank=8))


def test_a_lora_is_planned_by_what_it_trains() -> None:
    config = config_of("narrow")
    lora = plan(lora_recipe(), config, gpu="h100", count=1)
    full = plan(dataclasses.replace(lora_recipe(), sft=SftConfig()), config, gpu="h100", count=1)
    # Rank x (inputs + outputs) of four attention and three MLP products in each layer, and the mask token's row.
    D, H, KV = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    layer = 8 * (2 * (D + D) + 2 * (D + KV) + 3 * (D + H))
    assert lora.trained == config.num_hidden_layers * layer + D and full.trained == full.shape.parameters
    assert lora.shape == full.shape, "the model's own, without the LoRA"
    parts, whole = lora.asked.parts, full.asked.parts
    assert parts["gradients"] == 4 * lora.trained and parts["optimizer"] == 8 * lora.trained
    assert parts["parameters"] == whole["parameters"] + 4 * lora.trained
    assert parts["activations"] == whole["activations"]
    assert parts["head"] == whole["head"] - 4 * lora.shape.head, "no gradient of a frozen head"
    assert lora.checkpoint_bytes == 12 * lora.trained and full.checkpoint_bytes == 12 * full.shape.parameters
    recipe = lora_recipe()
    assert lora.flops_per_token == flops_per_token(lora.shape, Work.of(recipe), frozen=True) < full.flops_per_token
    muon = plan(lora_recipe(optimizer="muon"), config, gpu="h100", count=1)
    assert muon.asked.parts["optimizer"] == 4 * lora.trained


def test_a_lora_is_not_planned_for_more_than_one_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"sft\.lora_rank = 8: a LoRA is trained in one process; give --count 1, or"):
        plan(lora_recipe(), config_of("narrow"), gpu="h100", count=2)
    config = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, **LLAMA["7B"][0]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["plan", "gsm8k-diffullama", "--config", str(tmp_path)]
    assert main(words) == 2 and "give --count 1" in capsys.readouterr().err
    assert main([*words, "--count", "1"]) == 0
    shown = capsys.readouterr().out
    assert "6.74B parameters, a LoRA of 40M, 1 x h200" in shown and "0.48 GB (trained weights and two" in shown
    assert "shutdown-timeout" not in shown, "no torchrun, no patience of its"


def test_the_interval_loses_least() -> None:
    """Time lost per hour = writing / interval + failures x interval / 2."""
    size, gpus = 80e9, 64

    def lost(interval: float) -> float:
        return size / WRITE_SPEED / interval + FAILURES * gpus / 3600 * interval / 2

    best = checkpoint_interval(size, gpus)
    assert all(lost(best) < lost(best * factor) for factor in (0.5, 0.9, 1.1, 2))


def test_the_largest_micro_batch_fits_and_one_more_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("narrow")
    monkeypatch.setitem(GPUS, "toy", dataclasses.replace(GPUS["h100"], memory=40e6))
    found = plan(tiny_recipe(micro_batch=64), config, gpu="toy", count=1)
    plain, again = found.choices
    assert 1 < plain.largest < again.largest
    memory = memory_of(config, 64, "autocast")
    for choice in found.choices:
        sizes = [sum(memory.parts(choice.largest + n, checkpointing=choice.checkpointing).values()) for n in (0, 1)]
        assert sizes[0] <= found.usable and (sizes[1] > found.usable or choice.largest == 64)
    assert f"set it to {plain.largest} or less" in found.advice[0]
    monkeypatch.setitem(GPUS, "toy", dataclasses.replace(GPUS["h100"], memory=1e6))
    assert "not even one sequence" in plan(tiny_recipe(), config, gpu="toy", count=1).advice[0]


def test_shards_divide_what_is_sharded_and_masks_are_counted_where_they_are_dense() -> None:
    config = config_of("narrow")
    one, eight = (plan(tiny_recipe(), config, gpu="h100", count=n).asked.parts for n in (1, 8))
    assert eight["optimizer"] == -(-one["optimizer"] // 8) and eight["activations"] == one["activations"]
    assert "gathered weights" in eight and "gathered weights" not in one
    hsdp = plan(tiny_recipe(replicas=2), config, gpu="h100", count=8).asked.parts
    assert hsdp["optimizer"] == -(-one["optimizer"] // 4)
    packed = dataclasses.replace(tiny_recipe(), data=DataConfig(length=64, pack="documents"))
    assert "attention mask" not in plan(packed, config, gpu="h100", count=1).asked.parts
    assert plan(packed, config, gpu="cpu", count=1).asked.parts["attention mask"] == 2 * 64 * 64 * 6
    assert find_gpu("cpu", parse_precision("float32")).flops > 1e8


def test_bad_questions() -> None:
    config = config_of("narrow")
    with pytest.raises(ValueError, match=r"unknown GPU 'h300'; known: a100-40, .*cpu"):
        plan(tiny_recipe(), config, gpu="h300", count=1)
    with pytest.raises(ValueError, match="7 processes do not divide"):
        plan(tiny_recipe(), config, gpu="h100", count=7)
    with pytest.raises(ValueError, match="MFU"):
        plan(tiny_recipe(), config, gpu="h100", count=1, mfu=1.2)
    longer = dataclasses.replace(tiny_recipe(), data=DataConfig(length=256))
    with pytest.raises(ValueError, match=r"data\.length = 256 is more than the parent's 128 positions"):
        plan(longer, config, gpu="h100", count=1)


@pytest.mark.parametrize("place", ["folder", "file"])
def test_the_verb_prints_a_plan_and_writes_a_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    sizes, published = LLAMA["7B"]
    config = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, **sizes}
    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    where = tmp_path if place == "folder" else tmp_path / "config.json"
    script = tmp_path / "job.sh"
    words = ["plan", "diffullama-7b", "--gpu", "h200", "--count", "64", "--price", "3", "--config", str(where)]
    assert main([*words, "--json", "--slurm", str(script)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shape"]["parameters"] == published and 20 < found["hours"] < 50
    assert found["cost"] == pytest.approx(found["hours"] * 64 * 3)
    text = script.read_text()
    assert "--nodes=8" in text and "--nproc-per-node=8" in text and "--signal=B:TERM@300" in text
    assert "-m diffulm train diffullama-7b --out runs/diffullama-7b" in text
    assert "--shutdown-timeout=240 " in text and "\nexport TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n" in text
    assert 50 < found["step_seconds"] < 60 and found["stopping"] == pytest.approx(found["step_seconds"] + 80.9, abs=0.1)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "stopping: 134 s, for the step under way (53 s) and a checkpoint; torchrun --shutdown-timeout 240" in shown
    assert "memory per GPU" in shown and "largest micro-batch" in shown and "Young/Daly" in shown


def test_the_verb_says_what_to_do_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "diffullama-7b", "--offline"]) == 2
    assert "give --config FOLDER_OR_JSON" in capsys.readouterr().err
    assert main(["plan", "diffullama-7b", "--config", str(tmp_path)]) == 2
    assert "give a folder with the model's config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "nothing-known"}')
    assert main(["plan", "diffullama-7b", "--config", str(tmp_path)]) == 2
    assert "no config of a model that transformers knows" in capsys.readouterr().err
    sizes = {**LLAMA["7B"][0], "num_hidden_layers": 2}
    config = {"model_type": "llama", "vocab_size": 99, "max_position_embeddings": 4096, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["plan", "diffullama-7b", "--config", str(tmp_path), "--count", "20"]
    assert main([*words, "--slurm", str(tmp_path / "job.sh")]) == 2
    assert "do not fill nodes of 8" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ the script


def script_for(stopping: float, hours: float = 30.0) -> str:
    return slurm_script("r", name="r", file="job.sh", count=16, hours=hours, out="runs/r", stopping=stopping)


@pytest.mark.parametrize(("stopping", "waits"), [(0, 240), (160, 240), (161, 300), (503, 780), (7000, 10500)])
def test_long_steps_and_checkpoints_are_given_their_time(stopping: float, waits: int) -> None:
    text = script_for(stopping)
    assert torchrun_waits(stopping) == waits >= 1.5 * stopping
    assert f"--shutdown-timeout={waits} " in text and f"--signal=B:TERM@{waits + 60}\n" in text


def test_a_job_is_longer_than_its_notice() -> None:
    assert "--time=02:00:00" in script_for(10, hours=0.1) and "--time=06:00:00" in script_for(10000, hours=0.1)
    with pytest.raises(ValueError, match=r"take 14 hours; .* take more GPUs or a smaller train\.batch"):
        script_for(14 * 3600)


#: Slurm's commands as the script calls them: every call is a line of the log. `srun` answers SIGTERM as the real one
#: does, by killing its step; the step itself ends in order when `scancel` signals it.
SLURM = {
    "scontrol": 'if [ "$1" = show ]; then echo node1; fi',
    "squeue": 'echo "$STATE"',
    "scancel": 'kill -TERM "$(cat "$BOX/step")"',
    "srun": """
[ -z "$FAILS" ] || exit "$FAILS"
bash -c 'trap "echo checkpoint >> $BOX/log; exit 143" TERM; echo $$ > $BOX/step; while :; do sleep 0.05; done' &
step=$!
trap 'kill -KILL $step; exit 137' TERM
wait $step""",
}


def run_script(box: Path, *, state: str = "RUNNING", fails: str = "", stop: bool = False) -> tuple[int, list[str]]:
    """(exit code, calls in order) of the generated script among stand-ins; `stop`: Slurm's SIGTERM to it."""
    box.mkdir()
    for name, body in SLURM.items():
        (box / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "$BOX/log"\n{body}\n')
        (box / name).chmod(0o755)
    (box / "job.sh").write_text(script_for(100))
    own = {"BOX": str(box), "PATH": f"{box}:{os.environ['PATH']}", "STATE": state, "FAILS": fails}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
    job = subprocess.Popen(["bash", str(box / "job.sh")], env={**os.environ, **own, **slurm})
    try:
        while stop and job.poll() is None and not ((box / "step").is_file() and (box / "step").read_text()):
            time.sleep(0.02)
        if stop:
            job.send_signal(signal.SIGTERM)
        return job.wait(60), (box / "log").read_text().splitlines()
    finally:
        job.kill()


def test_a_job_told_to_stop_writes_its_checkpoint_and_is_put_back(tmp_path: Path) -> None:
    code, calls = run_script(tmp_path / "box", stop=True)
    assert code == 0 and "srun --kill-on-bad-exit=1 torchrun --nnodes=2" in calls[1]
    assert calls[-3:] == ["scancel --signal=TERM 7.0", "checkpoint", "scontrol requeue 7"]


def test_a_cancelled_job_and_a_failed_one_are_not_put_back(tmp_path: Path) -> None:
    code, calls = run_script(tmp_path / "cancelled", state="COMPLETING", stop=True)
    assert code == 0 and calls[-1] == "checkpoint"
    for name in ("2", "1"):  # bad input, a crash
        code, calls = run_script(tmp_path / name, fails=name)
        assert code == int(name) and not any("requeue" in call for call in calls)


# ----------------------------------------------------------------------------------------------------------- doctor


def test_the_doctor_finds_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIFFULM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("diffulm.runtime.can_compile", lambda: False)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "x").write_bytes(b"12345")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cache_bytes"] == 5 and not found["embedded_model"] and found["torch"] == torch.__version__
    assert found["cores"] >= 1 and found["dtype"]["train"].startswith("float32") and found["seconds"]
    assert any("C++ compiler" in w for w in found["warnings"]) and any("not fetched" in w for w in found["warnings"])
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "warning: torch.compile does not work" in shown and "free disk bytes" in shown
