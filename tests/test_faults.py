"""Kills and interruptions at random moments of a real command; the same command finishes as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from diffulm.train.checkpoint import checkpoints, latest
from diffulm.train.metrics import CLOCK, read_metrics

from .test_adapt import weights_of, write_text

pytestmark = pytest.mark.slow
STEPS = 150


def write_recipe(folder: Path, parent: Path, *, steps: int = STEPS) -> Path:
    """checkpoint_minutes is nearly nothing: most moments of the run lie in or beside the writing of a checkpoint."""
    text = write_text(folder)
    path = folder / "tiny.toml"
    path.write_text(
        f"""
        [model]
        parent = {json.dumps(str(parent))}
        [data]
        length = 32
        heldout_fraction = 0.2
        sources = [{{ name = "text", path = {json.dumps(str(text))} }}]
        [train]
        steps = {steps}
        dtype = "float32"
        compile = "off"
        learning_rate = 3e-3
        checkpoint_minutes = 1e-9
        heldout_evaluations = 3
        [eval]
        windows = 4
        draws = 2
        prompts = ["The quick"]
        max_tokens = 4
        steps = 2
        """
    )
    return path


def start(recipe: Path, out: Path, *, verb: str = "train") -> subprocess.Popen[str]:
    arguments = [verb, str(recipe)] if verb == "train" else [verb, "--recipe", str(recipe)]
    command = [sys.executable, "-m", "diffulm", *arguments, "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def launch(recipe: Path, out: Path, *flags: str, processes: int = 2) -> subprocess.Popen[str]:
    """`train` under torchrun, on the CPU."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        *flags,
    ]
    command += ["-m", "diffulm", "train", str(recipe), "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks, in order."""
    tasks = Path(f"/proc/{launcher.pid}/task")
    return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


def finish(recipe: Path, out: Path, *, verb: str = "train") -> tuple[int, str]:
    process = start(recipe, out, verb=verb)
    text, _ = process.communicate(timeout=900)
    return process.returncode, text


def figures(out: Path) -> dict[str, Any]:
    """The report without times, paths and memory."""
    report = json.loads((out / "report.json").read_text())
    train = {
        arm: [{k: v for k, v in row.items() if k not in CLOCK} for row in rows] for arm, rows in report["train"].items()
    }
    kept = ("parent", "parent_continued", "before", "after", "gain", "samples", "heldout", "tokens", "dtype")
    return {"train": train, **{k: report[k] for k in kept if k in report}}


@pytest.fixture(scope="module")
def whole(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """(recipe, folder of an undisturbed run, seconds it took)."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder, parent)
    began = time.monotonic()
    code, text = finish(recipe, folder / "run")
    assert code == 0, text
    assert len(read_metrics(folder / "run" / "adapted")) == STEPS
    return recipe, folder / "run", time.monotonic() - began


Whole = tuple[Path, Path, float]


def same(out: Path, expected: Path) -> None:
    assert figures(out) == figures(expected)
    assert weights_of(out, "model") == weights_of(expected, "model")
    last = checkpoints(out / "adapted")[-1]
    for name in ("model", "optimizer"):
        a = load_file(last / f"{name}.safetensors")
        b = load_file(expected / "adapted" / last.name / f"{name}.safetensors")
        assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_kill_9_at_random_moments(whole: Whole, tmp_path: Path, record_property: Any) -> None:
    """At least 12 kills while it trains, at random places of its code, most in the writing of checkpoints."""
    recipe, expected, _ = whole
    out, rng = tmp_path / "run", random.Random(0)
    adapted = out / "adapted"
    kills: list[int] = []
    aside = 0
    for _ in range(60):
        process = start(recipe, out)
        steps = len(read_metrics(adapted))
        try:
            # Let it get somewhere, then strike at a moment that has nothing to do with what it is doing.
            deadline = time.monotonic() + 300
            while process.poll() is None and len(read_metrics(adapted)) <= steps and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(rng.random() * 0.15)
            if process.poll() is not None:  # done before it was struck: begin again
                assert process.returncode == 0
                shutil.rmtree(out)
                continue
        finally:
            process.kill()
            process.communicate()
        if process.returncode == -signal.SIGKILL:
            kills.append(len(read_metrics(adapted)))
            aside += bool(list(adapted.glob(".step-*.tmp")))
        if len(kills) >= 12 and aside and latest(adapted):
            break
    assert len(kills) >= 10, f"only {kills}: the run is too short for the test to say anything"
    assert aside, "no kill fell into the writing of a checkpoint"
    assert latest(adapted) is not None
    code, text = finish(recipe, out)
    assert code == 0, text
    same(out, expected)
    assert not list(adapted.glob(".step-*.tmp")) and not list(out.glob(".*.tmp")), "leftovers of the kills are gone"
    record_property("kills", kills)


def test_kill_9_in_any_stage(whole: Whole, tmp_path: Path) -> None:
    """From the first second on: convert, prepare, scoring, samples, report."""
    recipe, expected, seconds = whole
    out, rng = tmp_path / "run", random.Random(1)
    kills = 0
    for k in range(14):
        process = start(recipe, out)
        try:
            process.wait(timeout=0.5 + rng.random() * (1.5 + k * seconds / 10))
            break
        except subprocess.TimeoutExpired:
            kills += 1
        finally:
            process.kill()
            process.communicate()
    assert kills >= 3
    code, text = finish(recipe, out)
    assert code == 0, text
    same(out, expected)
    assert {p.name for p in out.iterdir()} == {p.name for p in expected.iterdir()}


#: What the stages say, in order; Ctrl-C follows after a random moment.
SAID = (
    "converting", "preparing text", "scoring parent", "scoring before", "training the diffusion", "11/150", "91/150",
    "scoring after", "drawing samples",
)  # fmt: skip


def test_ctrl_c_in_every_stage(whole: Whole, tmp_path: Path) -> None:
    """Exit 130 and one line that says so, never a traceback; in the end the numbers of the undisturbed run."""
    recipe, expected, _ = whole
    out, rng = tmp_path / "run", random.Random(2)
    interrupted: list[str] = []
    for k in range(len(SAID)):
        seen, struck = "", ""
        with start(recipe, out) as process:
            assert process.stdout is not None
            for line in process.stdout:
                seen += line
                # A resumed run has passed some stages: strike at the first of those that are left.
                if not struck and (struck := next((said for said in SAID[k:] if said in line), "")):
                    time.sleep(rng.random() * 0.05)
                    process.send_signal(signal.SIGINT)
        assert "Traceback" not in seen, seen
        if struck and process.returncode != 0:
            assert process.returncode == 130, seen
            assert seen.rstrip().endswith("diffulm train: interrupted; the same command resumes"), seen
            interrupted.append(struck)
        elif struck:  # done before it was struck: begin again
            shutil.rmtree(out)
    assert len(interrupted) >= 6 and len(set(interrupted)) >= 5, interrupted
    code, text = finish(recipe, out)
    assert code == 0, text
    same(out, expected)


def test_sigterm_while_training_checkpoints_and_resumes(whole: Whole, tmp_path: Path) -> None:
    recipe, expected, _ = whole
    out = tmp_path / "run"
    process = start(recipe, out)
    while process.poll() is None and len(read_metrics(out / "adapted")) < 5:
        time.sleep(0.02)
    process.terminate()
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 143 and "the same command resumes" in text
    done = len(read_metrics(out / "adapted"))
    found = latest(out / "adapted")
    assert found is not None and found[1]["step"] == done >= 5
    assert finish(recipe, out)[0] == 0
    same(out, expected)


def test_both_arms_of_adapt(parent: Path, tmp_path: Path) -> None:
    """Ctrl-C and kills in `adapt`, whose control arm trains second."""
    recipe, rng = write_recipe(tmp_path, parent, steps=40), random.Random(3)
    code, text = finish(recipe, tmp_path / "one", verb="adapt")
    assert code == 0, text
    out = tmp_path / "two"
    stops = 0
    for k in range(8):
        arm = out / ("adapted" if k < 3 else "continued")
        steps = len(read_metrics(arm))
        if steps >= 39:  # a signal would meet Python itself starting, which dies of it as any program does
            continue
        process = start(recipe, out, verb="adapt")
        while process.poll() is None and len(read_metrics(arm)) <= steps:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGINT if k % 2 else signal.SIGKILL)
            stops += 1
        process.communicate(timeout=300)
        assert process.returncode in (0, 130, -signal.SIGKILL)
    assert stops >= 4
    assert finish(recipe, out, verb="adapt")[0] == 0
    assert figures(out) == figures(tmp_path / "one")
    for what in ("model", "control"):
        assert weights_of(out, what) == weights_of(tmp_path / "one", what)


# ---------------------------------------------------------------------------------------------- two processes


def wait_for_steps(out: Path, more: int, process: subprocess.Popen[str]) -> None:
    steps = len(read_metrics(out / "adapted"))
    deadline = time.monotonic() + 300
    while process.poll() is None and len(read_metrics(out / "adapted")) < steps + more and time.monotonic() < deadline:
        time.sleep(0.02)


def near(out: Path, expected: Path) -> None:
    """Two processes against one: the same up to rounding."""
    mine, theirs = read_metrics(out / "adapted"), read_metrics(expected / "adapted")
    assert [r["step"] for r in mine] == list(range(1, STEPS + 1))
    for a, b in zip(mine, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3), a["step"]
        assert a["epoch"] == b["epoch"]
    report, other = (json.loads((path / "report.json").read_text()) for path in (out, expected))
    assert report["after"]["bits_per_byte"] == pytest.approx(other["after"]["bits_per_byte"], rel=5e-3)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found through /proc")
def test_torchrun_starts_again_what_was_killed(whole: Whole, tmp_path: Path) -> None:
    """Either process killed in turn; the survivor says what happened, and the run ends as if nothing had been."""
    recipe, expected, _ = whole
    out = tmp_path / "run"
    process = launch(recipe, out, "--max-restarts", "2")
    for victim in (1, 0):
        wait_for_steps(out, 8, process)
        os.kill(workers(process)[victim], signal.SIGKILL)
        time.sleep(1)
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text
    assert text.count("the connection to another process broke") == 2, text
    assert text.count("resuming at step") == 2, "and rank 0 alone says so"
    assert (out / "adapted" / f"step-{STEPS:08d}" / ".metadata").is_file()
    near(out, expected)


def test_sigterm_to_torchrun_checkpoints_and_one_process_goes_on(whole: Whole, tmp_path: Path) -> None:
    recipe, expected, _ = whole
    out = tmp_path / "run"
    process = launch(recipe, out)
    wait_for_steps(out, 8, process)
    process.terminate()
    text, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and text.count("interrupted; the same command resumes") == 1, text
    found = latest(out / "adapted")
    assert found is not None and found[1]["step"] == len(read_metrics(out / "adapted")) >= 8
    code, text = finish(recipe, out)
    assert code == 0, text
    near(out, expected)


def test_a_world_that_does_not_fit_is_refused_once_and_leaves_nothing(parent: Path, tmp_path: Path) -> None:
    text, _ = launch(write_recipe(tmp_path, parent), tmp_path / "run", processes=3).communicate(timeout=300)
    assert text.count("diffulm train: 3 processes do not divide train.batch = 4; start 1 or 2, or set") == 1, text
    said = [line for line in text.splitlines() if not line.startswith("[W")]  # torch's own warnings: of sockets, say
    assert "do not divide" in said[0] and not (tmp_path / "run").exists()
