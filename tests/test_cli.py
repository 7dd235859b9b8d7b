"""The command line: exit codes, one-line errors on stderr, JSON, and no torch before it is needed."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from diffulm import __version__, cli
from diffulm.cli.flags import Opening, command_line, print_json

from .test_adapt import write_text

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process: (exit code, stdout, stderr)."""
    torch.set_num_threads(1)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


def shell(*arguments: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diffulm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **kwargs)


FAST = ("--dtype", "float32", "--device", "cpu")


# ------------------------------------------------------------------------------------------------- imports, help

LAZY = """
import contextlib, io, sys
import diffulm
heavy = lambda: sorted({"torch", "transformers", "numpy", "datasets", "rich.console"} & set(sys.modules))
assert not heavy(), ("import diffulm", heavy())
from diffulm.cli import VERBS, main
for arguments in (["--help"], ["--version"], ["frobnicate"], *([verb, "--help"] for verb in VERBS)):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = main(arguments)
    assert code == (2 if arguments == ["frobnicate"] else 0), (arguments, code)
    assert not {"torch", "transformers"} & set(sys.modules), (arguments, heavy())
"""


def test_import_and_every_help_load_neither_torch_nor_transformers() -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def explained(described: Any) -> dict[str, str]:
    """The text that has to explain each flag of a verb: its own, or that of the dataclass which the flag stands in."""
    bases = [base for base in getattr(described, "__mro__", [described]) if "Args:" in (base.__doc__ or "")]
    text = "".join((base.__doc__ or "").split("Args:")[1] for base in bases)
    found = {}
    for name, kind in get_type_hints(described).items():
        if dataclasses.is_dataclass(kind):
            found |= explained(kind)
        elif name != "return":
            found[name] = text
    return found


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_every_verb_has_an_example_and_explains_every_flag(run: Run, verb: str) -> None:
    code, out, err = run(verb, "--help")
    assert code == 0 and not err and f"Example: diffulm {verb}" in out
    # A flag without a word of its own would show its name and default only; one of a dataclass must have no prefix.
    explanations = explained(cli.VERBS[verb])
    assert all(f"{name}: " in text for name, text in explanations.items()), explanations.keys()
    parameters = inspect.signature(cli.VERBS[verb]).parameters.values()
    wanted = explanations.keys() - {p.name for p in parameters if p.kind is p.POSITIONAL_ONLY}
    assert {name.replace("_", "-") for name in wanted} <= set(re.findall(r"--([a-z-]+)[ ,]", out))


def test_flags_of_a_dataclass_are_seen_by_the_test_above() -> None:
    names = explained(cli.VERBS["generate"])
    assert {"top_k", "adapter", "max_tokens"} <= names.keys() and "drawing" not in names
    chat = explained(cli.VERBS["chat"])["steps"]
    assert "Forward passes of an answer" in chat and "top_k: " in chat, "a text of its own, the others inherited"


def test_usage_lists_the_verbs(run: Run) -> None:
    code, out, err = run("--help")
    assert code == 0 and not err and all(f"  {verb}" in out for verb in cli.VERBS)
    assert run()[0] == 2
    assert run("--version") == (0, f"diffulm {__version__}\n", "")


def test_exit_codes_through_the_shell(tmp_path: Path) -> None:
    """What a program sees: one line on stderr, nothing on stdout."""
    missing = shell("generate", tmp_path / "none", "x")
    assert missing.returncode == 2 and missing.stdout == ""
    assert missing.stderr.startswith("diffulm generate: ") and missing.stderr.count("\n") == 1
    assert shell("generate").returncode == 2 and shell("--version").returncode == 0


# ------------------------------------------------------------------------------------------------ wrong usage


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit 2, nothing on stdout, one line on stderr that holds the words."""
    code, out, err = result
    assert (code, out) == (2, ""), result
    assert err.count("\n") == 1 and err.endswith("\n"), err
    for word in words:
        assert word in err, err


def test_a_misspelt_verb_is_corrected(run: Run) -> None:
    code, out, err = run("genrate", "x", "y")
    assert code == 2 and out == "" and err.startswith("diffulm: unknown verb 'genrate'; did you mean generate?\n")
    assert "did you mean" not in run("zzzzz")[2]


def test_unknown_and_missing_flags(run: Run) -> None:
    for arguments in (["adapt"], ["generate", "m"], ["generate", "m", "p", "--max-tokns", "3"], ["train"]):
        code, out, err = run(*arguments)
        assert code == 2 and out == "" and err
    assert "--max-tokens" in run("generate", "m", "p", "--max-tokns", "3")[2], "the nearest flag is named"
    code, out, err = run("generate", "m", "p", "--seed", "three")
    assert code == 2 and out == "" and "three" in err


def recipe(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_recipes_that_are_wrong(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for text, words in (
        ("[train]\nlearning_rte = 1.0", ["unknown key train.learning_rte; did you mean learning_rate?"]),
        ("[train]\nsteps = 'ten'", ["train.steps must be of type int, not 'ten'"]),
        ("[train\n", ["not valid TOML"]),
        ("[train]\nsteps = 2\ntokens = 9", ["give one budget, not steps and tokens"]),
    ):
        for verb in (["train", recipe(tmp_path, text)], ["adapt", "--recipe", recipe(tmp_path, text)]):
            refused(run(*verb, "--out", out), str(tmp_path / "mine.toml"), *words)
    refused(run("train", "smolm-cpu", "--out", out), "there is no recipe 'smolm-cpu'", "smollm2-cpu")
    refused(run("train", tmp_path / "none.toml", "--out", out), "there is no recipe")
    refused(run("train", recipe(tmp_path, "[model]\nparent = 'x'"), "--out", out), "--minutes, --tokens or --steps")
    refused(run("adapt", "--out", out, "--steps", "0"), "train.steps must be positive, not 0")
    refused(run("adapt", "--out", out, "--minutes", "-1"), "train.minutes must be positive")
    refused(run("adapt", "--out", out, "--steps", "3", "--tokens", "5"), "give one budget, not steps and tokens")
    assert not out.exists(), "nothing is left of a run that never began"


def test_models_that_are_not_there(run: Run, tmp_path: Path, parent: Path) -> None:
    refused(run("generate", tmp_path / "none", "x"), str(tmp_path / "none"))
    refused(run("convert", tmp_path / "none", tmp_path / "out"), str(tmp_path / "none"))
    refused(run("generate", "no-such/model", "x", "--offline"), "no-such/model")
    refused(run("generate", parent, "x"), "is not a diffusion checkpoint", "diffulm convert")
    (tmp_path / "empty").mkdir()
    refused(run("infill", tmp_path / "empty", "x<hole>"), "is not a model")
    assert not (tmp_path / "out").exists()


def test_values_that_make_no_sense(run: Run, checkpoint: Path) -> None:
    def generate(*flags: object) -> tuple[int, str, str]:
        return run("generate", checkpoint, "The quick", *FAST, *flags)

    refused(generate("--temperature", "-1"), "temperature must be 0 (greedy) or", "not -1.0")
    refused(generate("--steps", "0"), "steps must be at least 1, not 0")
    refused(generate("--max-tokens", "0"), "max_tokens must be at least 1, not 0")
    refused(generate("--policy", "nonsense"), "unknown policy 'nonsense'", "confidence, entropy")
    refused(generate("--policy", "threshold:x"), "threshold:TAU")
    refused(generate("--top-k", "0"), "top_k must be at least 1")
    refused(generate("--top-p", "1.5"), "top_p must lie in (0, 1]")
    refused(generate("--max-tokens", "500"), "the model was trained on 64", "shorten")
    refused(run("generate", checkpoint, "x", "--dtype", "float7"), "unknown dtype 'float7'")
    refused(run("generate", checkpoint, "x", "--device", "toaster"), "unknown device 'toaster'")
    if not torch.cuda.is_available():
        refused(run("generate", checkpoint, "x", "--device", "cuda"), "sees no CUDA GPU; use --device cpu")


def test_prompts_that_do_not_fit(run: Run, checkpoint: Path) -> None:
    refused(run("generate", checkpoint, "word " * 100, *FAST), "trained on 64", "shorten the text")
    refused(run("generate", checkpoint, "a <|mask|> b", *FAST), "holds the mask token '<|mask|>'")
    refused(run("infill", checkpoint, "a <|mask|> b <hole>", *FAST), "holds the mask token '<|mask|>'")


def test_holes_that_are_wrong(run: Run, checkpoint: Path) -> None:
    refused(run("infill", checkpoint, "no hole here", *FAST), "the text has no hole; write <hole> or <hole:N>")
    refused(run("infill", checkpoint, "", *FAST), "the text has no hole")
    refused(run("infill", checkpoint, "a <hole:0> b", *FAST), "a hole needs at least one token")
    refused(run("infill", checkpoint, "a <hole> b", "--length", "0", *FAST), "a hole needs at least one token")
    refused(run("infill", checkpoint, "a <hole:900> b", *FAST), "the model was trained on 64")
    refused(run("infill", checkpoint, "a <hole> b", "--steps", "0", *FAST), "steps must be at least 1")


def test_failures_are_not_bad_usage(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 1 and one line; 130 for Ctrl-C, which says that resuming is possible where it is."""
    import diffulm.sampling as sampling

    def broken(*a: Any, **k: Any) -> Any:
        raise RuntimeError("the roof is on fire")

    monkeypatch.setattr(sampling, "generate", broken)
    code, out, err = run("generate", checkpoint, "x", *FAST)
    assert (code, out) == (1, "") and err.count("\n") == 1 and "failed: RuntimeError: the roof is on fire" in err
    monkeypatch.setenv("DIFFULM_DEBUG", "1")
    with pytest.raises(RuntimeError):
        cli.main(["generate", str(checkpoint), "x", *FAST])

    def interrupted(*a: Any, **k: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "generate", interrupted)
    code, out, err = run("generate", checkpoint, "x", *FAST)
    assert (code, out) == (130, "") and err.strip() == "diffulm generate: interrupted"
    monkeypatch.setattr(sys.modules["diffulm.adapt"], "adapt", interrupted)
    code, out, err = run("adapt", "--steps", "1", "--out", "nowhere")
    assert (code, out) == (130, "") and err.strip() == "diffulm adapt: interrupted; the same command resumes"


def test_ctrl_c_inside_an_import_exits_130(tmp_path: Path) -> None:
    """namedtuple and dataclass run strings; CPython marks an interrupt that leaves one as unhandled (see cli.main)."""
    (tmp_path / "probe.py").write_text(
        "import sys\nfrom diffulm import cli\n"
        "def verb() -> None:\n    exec('raise KeyboardInterrupt')\n"
        "cli.VERBS = {'train': verb}\nsys.exit(cli.main(['train']))\n"
    )
    done = subprocess.run([sys.executable, "-m", "probe"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr.strip() == "diffulm train: interrupted; the same command resumes"


# ------------------------------------------------------------------------------------------------ right usage


def test_generate(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--max-tokens", "6", *FAST)
    code, out, _ = run("generate", checkpoint, "The quick", *flags)
    assert code == 0 and out.startswith("The quick") and out.endswith("\n")
    code, text, _ = run("generate", checkpoint, "The quick", *flags, "--json")
    found = json.loads(text)
    assert code == 0 and found["prompt"] == "The quick" and found["prompt"] + found["text"] + "\n" == out
    monkeypatch.setattr(sys, "stdin", io.StringIO("The quick"))
    assert run("generate", checkpoint, "-", *flags)[:2] == (0, out), "the prompt from standard input"
    draws = {run("generate", checkpoint, "A", *flags, "--temperature", "1", "--seed", str(s))[1] for s in (1, 1, 2)}
    assert len(draws) == 2, "one seed, one text"
    assert run("generate", checkpoint, "", *flags)[0] == 0, "from nothing but the start token"
    for kind in ("prefix", "dual"):
        assert run("generate", checkpoint, "The quick", *flags, "--cache", kind)[:2] == (0, out), "one block: exact"
        code, blocks, _ = run("generate", checkpoint, "The quick", *flags, "--cache", kind, "--block", "2")
        assert code == 0 and blocks.startswith("The quick")


def test_infill(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("infill", checkpoint, "def add(a, b):<hole:4> + b", *FAST)
    assert code == 0 and out.startswith("def add(a, b):") and out.endswith(" + b\n")
    code, text, _ = run("infill", checkpoint, "def add(a, b):<hole:4> + b", *FAST, "--json")
    found = json.loads(text)
    assert found["text"] + "\n" == out and found["text"] == "def add(a, b):" + found["fills"][0] + " + b"
    monkeypatch.setattr(sys, "stdin", io.StringIO("a <hole> b <hole:2> c"))
    code, text, _ = run("infill", checkpoint, "-", *FAST, "--length", "3", "--json")
    assert code == 0 and len(json.loads(text)["fills"]) == 2
    flags = ("--length", "auto", "--max-length", "5", "--must", "sum", "--must-not", "dog", "fox", "--json", *FAST)
    code, text, _ = run("infill", checkpoint, "def add(a, b):<hole> + b", *flags)
    found = json.loads(text)
    assert code == 0 and "sum" in found["fills"][0] and len(found["lengths"]) == 1
    assert 1 <= found["lengths"][0] <= 5 and found["forwards"] > found["lengths"][0]
    refused(
        run("infill", checkpoint, "a <hole> b", "--must", "a dog", "--must-not", "dog", *FAST), "'a dog' has to occ"
    )
    refused(run("infill", checkpoint, "a <hole> b", "--must", "dog " * 30, *FAST), "do not fit into the holes")
    cached = run("infill", checkpoint, "def add(a, b):<hole:4> + b", *FAST, "--block", "2", "--cache", "dual")
    assert cached[0] == 0 and cached[1].startswith("def add(a, b):")
    refused(run("infill", checkpoint, "a <hole:atuo> b", *FAST), "<hole:atuo> names no length")
    refused(run("infill", checkpoint, f"a <hole:{10**23}> b", *FAST), "the model was trained on")
    twice = run("infill", checkpoint, "a <hole> b", "--must", "dog", "--must=fox")
    refused(twice, "--must is given 2 times; give it once, with all its values behind it")


@pytest.mark.parametrize("verb", ["generate", "infill"])
def test_watching_goes_to_stderr(run: Run, checkpoint: Path, verb: str) -> None:
    plain = run(verb, checkpoint, "The <hole:3>", *FAST)
    watched = run(verb, checkpoint, "The <hole:3>", *FAST, "--watch")
    assert plain[:2] == watched[:2]


def test_convert_and_prepare(run: Run, parent: Path, tmp_path: Path) -> None:
    out = tmp_path / "init"
    code, text, _ = run("convert", parent, out, "--length", "64", "--json")
    found = json.loads(text)
    assert code == 0 and found["mask_token"] == "<|mask|>" and (out / "config.json").is_file()
    assert json.loads((out / "config.json").read_text())["diffusion"]["trained_length"] == 64
    refused(run("convert", parent, out), "already holds something; choose a new folder")
    refused(run("convert", out, tmp_path / "again"), "is a diffusion checkpoint already")
    refused(run("convert", parent, tmp_path / "x", "--length", "64", "--mask-token", "<none>"), "no token '<none>'")
    refused(run("convert", parent, tmp_path / "x", "--length", "9999"), "beyond the parent's 128 positions")
    lines = write_text(tmp_path)
    code, text, _ = run("prepare", lines, "--tokenizer", out, "--out", tmp_path / "data", "--heldout", "0.2", "--json")
    report = json.loads(text)
    splits = report["sources"]["text"]
    assert code == 0 and splits["train"]["documents"] + splits["heldout"]["documents"] <= 40
    assert run("prepare", lines, "--tokenizer", out, "--out", tmp_path / "data", "--heldout", "0.2")[0] == 0
    (tmp_path / "empty.txt").write_text("")
    refused(run("prepare", tmp_path / "empty.txt", "--tokenizer", out, "--out", tmp_path / "d2"), "has no text")
    refused(run("prepare", tmp_path / "no.txt", "--tokenizer", out, "--out", tmp_path / "d2"), "no file or folder")
    refused(run("prepare", "--tokenizer", out, "--out", tmp_path / "d2"), "there is no text")


def test_train_and_adapt(run: Run, parent: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path)
    path = recipe(
        tmp_path,
        f"""
        [model]
        parent = {json.dumps(str(parent))}
        [data]
        length = 32
        heldout_fraction = 0.2
        sources = [{{ name = "text", path = {json.dumps(str(text))} }}]
        [train]
        dtype = "float32"
        compile = "off"
        steps = 50
        [eval]
        windows = 4
        draws = 2
        """,
    )
    out = tmp_path / "run"
    code, stdout, _ = run("train", path, "--out", out, "--steps", "2", "--json", "--device", "cpu")
    report = json.loads(stdout)
    assert code == 0 and report["recipe"] == "mine" and len(report["train"]["adapted"]) == 2
    assert "parent_continued" not in report and (out / "model" / "config.json").is_file()
    code, again, err = run("train", path, "--out", out, "--steps", "2", "--json", "--device", "cpu")
    assert code == 0 and json.loads(again) == report and "is finished" in err
    refused(run("train", path, "--out", out, "--steps", "3"), "other settings (train.steps differ)")
    refused(run("adapt", "--recipe", path, "--out", out, "--steps", "2"), "control differ")
    code, stdout, _ = run("adapt", parent, "--recipe", path, "--out", tmp_path / "two", "--steps", "2", "--text", text)
    assert code == 0 and "bits/byte" in stdout and "report.html" in stdout
    assert (tmp_path / "two" / "control" / "config.json").is_file()


def test_several_texts_train_in_proportion_to_their_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One body of text, not one equal share for each path."""
    seen: list[Any] = []
    monkeypatch.setattr("diffulm.cli.training.run_adapt", lambda recipe, out, **_: seen.append(recipe))
    assert cli.main(["adapt", "m", "--text", "big.txt", "small.jsonl", "--steps", "1", "--out", str(tmp_path)]) == 0
    (source,) = seen[0].data.sources
    assert (source.path, source.more, source.weight) == ("big.txt", ("small.jsonl",), None)


# ------------------------------------------------------------------------------------------------ how verbs end


def test_json_on_stdout_is_text_as_it_is_or_escaped_where_it_must_be(capsys: pytest.CaptureFixture[str]) -> None:
    for value, shown in (("\u00e9", '"\u00e9"'), ("\u00e9\ud800", '"\\u00e9\\ud800"')):
        print_json(value)
        out = capsys.readouterr().out
        assert out == shown + "\n" and json.loads(out) == value


def test_a_report_names_the_command_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/diffulm", "eval", "my model", "--tasks", "piqa"])
    assert command_line() == "diffulm eval 'my model' --tasks piqa"


def test_a_fine_tune_ends_with_its_figures_and_its_page(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = {"nats_per_token": 2.0, "stderr_nats_per_token": 0.1, "bits_per_byte": 0.5, "answers": 3}
    report = {
        "before": score, "after": score, "answers": {what: {"heldout": []} for what in ("before", "after")},
        "model": "somewhere/adapter",
    }  # fmt: skip
    monkeypatch.setattr("diffulm.sft.sft", lambda recipe, out, **_: report)
    path = recipe(tmp_path, "task = 'sft'\n[train]\nsteps = 2")
    code, out, _ = run("train", path, "--out", tmp_path / "run")
    last = out.splitlines()[-1]
    assert code == 0 and last == f"report: {tmp_path / 'run' / 'report.html'}   result: somewhere/adapter"
    assert "after  2.000 ± 0.100 nats/token" in out
    assert json.loads(run("train", path, "--out", tmp_path / "run", "--json")[1]) == report


def test_the_papers_protocol_runs_code_only_where_that_is_allowed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def measured(*_: Any, **settings: Any) -> Any:
        asked.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr("diffulm.eval.paper.evaluate", measured)
    monkeypatch.setattr(Opening, "open", lambda self, reference: None)
    common = ("eval", "m", "--protocol", "paper", "--tasks", "humaneval_infilling", "--data-dir", tmp_path)
    refused(run(*common, "--limit", "3"), "enough")
    refused(run(*common, "--allow-code-execution"), "enough")
    assert [settings["execute"] for settings in asked] == [False, True] and asked[0]["limit"] == 3
