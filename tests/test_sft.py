"""Fine-tuning: conversations in, a better model of answers out; all weights or a LoRA, either layout."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffulm import answers, cli, hub
from diffulm.adapt import adapt
from diffulm.answers import histogram, same
from diffulm.convert import convert
from diffulm.data.chat import Answers, Conversations, tokenise
from diffulm.data.conversations import Conversation, read_conversations
from diffulm.data.sources import Source
from diffulm.sft import answer_share, sft, split_digits
from diffulm.template import open_turn
from diffulm.tokenizer import decode, encode, load_tokenizer, special_tokens
from diffulm.train.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    Recipe,
    SftConfig,
    SourceConfig,
    TrainConfig,
    load_recipe,
)
from diffulm.train.flops import Shape, Work, flops_per_token

from .conftest import build_parent, build_tokenizer
from .dialogues import chat_tokenizer, talk, write_jsonl
from .train.test_parallel import torchrun

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # from inside peft


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sft")
    build_parent(root / "ar", tokenizer=chat_tokenizer(size=380))
    build_parent(root / "bare", tokenizer=build_tokenizer(size=380))
    convert(str(root / "ar"), root / "full", trained_length=64)
    convert(str(root / "ar"), root / "block", layout="block", source="own", block_size=4, trained_length=64)
    return {name: root / name for name in ("ar", "bare", "full", "block")}


def talks(path: Path, n: int = 40) -> Path:
    """Questions with one of two answers, so that little training tells."""
    rows = [{"messages": talk(f"Is {i} odd?", "It is odd." if i % 2 else "No, even.")} for i in range(n)]
    return write_jsonl(path, rows)


def recipe_of(parent: Path, data: Path, **sft_options: Any) -> Recipe:
    return Recipe(
        name="tiny", task="sft", model=ModelConfig(str(parent)),
        data=DataConfig((SourceConfig("talks", str(data)),), length=64, heldout_fraction=0.2),
        train=TrainConfig(
            batch=4, micro_batch=2, steps=6, learning_rate=5e-3, dtype="float32", compile="off", heldout_evaluations=2
        ),
        eval=EvalConfig(windows=6, draws=8, prompts=("Is 3 odd?",), max_tokens=8, steps=4),
        sft=SftConfig(**{"answers": 3, **sft_options}),
    )  # fmt: skip


def quiet(text: str) -> None:
    """Nobody listens."""


@pytest.mark.parametrize("kind", ["full", "block", "ar"])
def test_all_weights(kind: str, parents: Any, tmp_path: Path) -> None:
    recipe = recipe_of(parents[kind], talks(tmp_path / "talks.jsonl"))
    report = sft(recipe, tmp_path / "run", device="cpu", say=quiet)
    assert [row["step"] for row in report["train"]] == list(range(1, 7))
    gain = report["before"]["nats_per_token"] - report["after"]["nats_per_token"]
    assert gain > 0.3 and report["before"]["answers"] == report["after"]["answers"] == 6
    config = json.loads((tmp_path / "run/model/config.json").read_text())["diffusion"]
    assert config["layout"] == ("block" if kind == "block" else "full") and config["tokens_seen"] == 6 * 4 * 64
    if kind != "ar":
        assert config["parent"] == str(parents["ar"]), "the dict of the parent checkpoint is kept"
        old, new = (load_file(f / "model.safetensors") for f in (parents[kind], tmp_path / "run/init"))
        assert all(torch.equal(old[key], new[key]) for key in old)
    answered = report["answers"]
    assert [row["prompt"] for row in answered["after"]["prompts"]] == ["Is 3 odd?"]
    assert len(answered["before"]["heldout"]) == len(answered["after"]["heldout"]) == 3
    text = (tmp_path / "run/report.md").read_text()
    assert "| before |" in text and "## Held-out questions" in text and "| Is 3 odd? |" in text
    # The same call reads what is there; another recipe is refused.
    said: list[str] = []
    assert sft(recipe, tmp_path / "run", device="cpu", say=said.append) == report and "is finished" in said[0]
    other = dataclasses.replace(recipe, sft=SftConfig(answers=2))
    with pytest.raises(ValueError, match="other settings"):
        sft(other, tmp_path / "run", device="cpu", say=quiet)


@pytest.mark.slow
def test_two_processes_train_and_score_as_one(parents: Any, tmp_path: Path) -> None:
    """The bound on held-out answers is taken by all processes, over a sharded model."""
    data = talks(tmp_path / "talks.jsonl")
    one = sft(recipe_of(parents["full"], data), tmp_path / "one", device="cpu", say=quiet)
    done = torchrun(2, "tests.test_sft", str(parents["full"]), str(data), str(tmp_path / "two"))
    assert done.stdout.count("scoring after on 6 held-out answers") == 1, "and one of them alone speaks"
    two = json.loads((tmp_path / "two/report.json").read_text())
    for what in ("before", "after"):
        assert two[what]["nats_per_token"] == pytest.approx(one[what]["nats_per_token"], rel=1e-4), what
        assert two[what]["tokens"] == one[what]["tokens"]
    assert [row["loss"] for row in two["train"]] == pytest.approx([row["loss"] for row in one["train"]], rel=1e-3)
    assert two["answers"]["before"] == one["answers"]["before"]


def test_an_interrupted_run_ends_as_an_uninterrupted_one(parents: Any, tmp_path: Path) -> None:
    recipe = recipe_of(parents["full"], talks(tmp_path / "talks.jsonl"), eos_weight=0.5, truncate_share=0.2)
    whole = sft(recipe, tmp_path / "whole", device="cpu", say=quiet)

    def stop(arm: str, progress: Any) -> None:
        if progress.step == 3:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        sft(recipe, tmp_path / "cut", device="cpu", say=quiet, on_step=stop)
    again = sft(recipe, tmp_path / "cut", device="cpu", say=quiet)
    assert again["after"] == whole["after"] and [r["loss"] for r in again["train"]] == [
        r["loss"] for r in whole["train"]
    ]


@pytest.mark.parametrize("kind", ["full", "block"])
def test_a_lora_is_a_peft_folder_that_merges(kind: str, parents: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    recipe = recipe_of(parents[kind], talks(tmp_path / "talks.jsonl"), lora_rank=4, lora_alpha=8.0)
    report = sft(recipe, tmp_path / "run", device="cpu", say=quiet)
    assert report["before"]["nats_per_token"] - report["after"]["nats_per_token"] > 0.1
    adapter = tmp_path / "run/adapter"
    assert report["model"] == str(adapter) and not (tmp_path / "run/model").exists()
    assert json.loads((adapter / "diffusion.json").read_text())["layout"] == kind
    weights = load_file(adapter / "adapter_model.safetensors")
    mask = hub.load(parents[kind], device="cpu", dtype="float32").process.mask_token_id
    (row,) = [value for key, value in weights.items() if "trainable_tokens_delta" in key]
    before = load_file(parents[kind] / "model.safetensors")["model.embed_tokens.weight"]
    assert row.shape == (1, 32) and not torch.equal(row[0], before[mask]), "the mask row is trained"
    assert cli.main(["export", str(tmp_path / "run/init"), str(tmp_path / "merged"), "--adapter", str(adapter)]) == 0
    merged = load_file(tmp_path / "merged/model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(merged[mask], row[0])
    kept = torch.arange(len(before)) != mask
    assert torch.equal(merged[kept], before[kept]), "and no other"


def test_a_recipe_by_the_command_line_and_chat_with_what_came_out(
    parents: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    talks(tmp_path / "talks.jsonl")
    (tmp_path / "r.toml").write_text(f"""
task = "sft"
[model]
parent = "{parents["bare"]}"
[data]
length = 64
heldout_fraction = 0.2
sources = [{{ name = "talks", path = "{tmp_path / "talks.jsonl"}" }}]
[train]
batch = 4
dtype = "float32"
compile = "off"
steps = 2
[eval]
windows = 2
[sft]
chat_template = "{{% for m in messages %}}[{{{{ m.role }}}}]\\n{{{{ m.content }}}}{{{{ eos_token }}}}{{% endfor %}}"
""")
    assert load_recipe(tmp_path / "r.toml").sft.eos_padding == "random"
    assert cli.main(["train", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert "nats/token" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("Is 3 odd?\n"))
    flags = ("--max-tokens", "4", "--dtype", "float32", "--device", "cpu")
    assert cli.main(["chat", str(tmp_path / "run/model"), *flags]) == 0, "the template went with the model"


# ------------------------------------------------------------------------------------------------------ operations


def test_the_operations_of_a_run_are_in_its_records(parents: Any, tmp_path: Path) -> None:
    """Of answers alone tokens are noised, and a LoRA's frozen weights get no gradient: both cost less."""
    data, tflop = talks(tmp_path / "talks.jsonl"), []
    for name, options in (("whole", {}), ("lora", {"lora_rank": 2})):
        report = sft(recipe_of(parents["full"], data, **options), tmp_path / name, device="cpu", say=quiet)
        tflop.append([row["tflops"] / row["tokens_per_second"] for row in report["train"]])
    shape = Shape.of(hub.load(parents["full"], device="cpu", dtype="float32").denoiser.model)
    recipe = recipe_of(parents["full"], data)
    least, text = (flops_per_token(shape, Work.of(recipe, noised=share)) / 1e12 for share in (0.0, 1.0))
    share = (tflop[0][0] - least) / (text - least)
    assert 0.1 < share < 0.9 and tflop[0] == pytest.approx([tflop[0][0]] * 6, rel=2e-3)
    frozen = flops_per_token(shape, Work.of(recipe, noised=share), frozen=True) / 1e12
    assert tflop[1] == pytest.approx([frozen] * 6, rel=2e-3) and frozen < least


def test_the_share_of_answers_is_that_of_what_may_be_noised(parents: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(parents["full"])
    special, sequences = special_tokens(tokenizer), []
    for name, texts in (("a", ("It is odd.", "No.")), ("b", ("Let me think about that for a while.", "Yes, I do."))):
        rows = [{"messages": talk(f"Is {i} odd?", texts[i % 2])} for i in range(20)]
        read = read_conversations(Source(name, str(write_jsonl(tmp_path / f"{name}.jsonl", rows))))
        sequences.append(Conversations.cut(tokenise(read.conversations, tokenizer), 64, special))
    parts = [sum(q.read(i)[1].mean() for i in range(len(q))) / len(q) for q in sequences]
    assert abs(parts[0] - parts[1]) > 0.02
    sources = [SimpleNamespace(weight=w) for w in (1.0, 3.0)]
    run: Any = SimpleNamespace(recipe=SimpleNamespace(data=SimpleNamespace(sources=sources)))
    assert answer_share(run, sequences) == pytest.approx((parts[0] + 3 * parts[1]) / 4, rel=1e-12)


# ------------------------------------------------------------------------------------------------------- bad input


def test_a_template_is_needed_and_nothing_is_left_behind(parents: Any, tmp_path: Path) -> None:
    data = talks(tmp_path / "talks.jsonl")
    with pytest.raises(ValueError, match=r"no chat template.*sft\.chat_template .*sft\.plain_template") as error:
        sft(recipe_of(parents["bare"], data), tmp_path / "run", device="cpu", say=quiet)
    assert "--" not in str(error.value), "train and adapt have no such flags"
    with pytest.raises(ValueError, match=r"template that was given is not valid Jinja, line 1: ") as error:
        sft(recipe_of(parents["bare"], data, chat_template="{% for"), tmp_path / "run", device="cpu", say=quiet)
    assert "talks.jsonl" not in str(error.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"beyond the model's 128 positions"):
        recipe = recipe_of(parents["full"], data)
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, length=256))
        sft(recipe, tmp_path / "run", device="cpu", say=quiet)


def test_bad_rows_are_named_or_counted_aloud(parents: Any, tmp_path: Path) -> None:
    path = talks(tmp_path / "talks.jsonl")
    with path.open("a") as file:
        file.write('{"messages": []}\n' + json.dumps({"messages": talk("a</s>", "b")}) + "\n")
    with pytest.raises(ValueError, match=r"talks\.jsonl, line 41: there are no messages"):
        sft(recipe_of(parents["full"], path), tmp_path / "run", device="cpu", say=quiet)
    said: list[str] = []
    report = sft(recipe_of(parents["full"], path, skip_bad=True), tmp_path / "run", device="cpu", say=said.append)
    assert report["data"]["talks"]["bad"] == 2 and any("2 bad rows left out" in line for line in said)


@pytest.fixture
def long_talks(tmp_path: Path) -> Path:
    """40 conversations that fit 64 tokens; behind them 19 that do not, and one whose second answer does not."""
    path = talks(tmp_path / "talks.jsonl")
    with path.open("a") as file:
        file.write("".join(json.dumps({"messages": talk(f"{i}?", "long " * 90)}) + "\n" for i in range(19)))
        file.write(json.dumps({"messages": talk("Is 1 odd?", "Yes.", "Is 3?", "Yes, " * 90)}) + "\n")
    return path


def rescored(run: Path, split: str) -> int:
    """Answers of a split that fit 64 tokens, counted from what is stored."""
    found = Answers.open(run / f"data/talks/{split}.npz")
    return sum(1 + sum(map(len, found.pair(i))) <= 64 for i in range(len(found)))


def test_an_answer_longer_than_the_window_stops_before_training(parents: Any, long_talks: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"talks\.jsonl, line 4\d: \d+ tokens \(1 \+ context \d+ \+ answer") as error:
        sft(recipe_of(parents["full"], long_talks), tmp_path / "run", device="cpu", say=quiet)
    for words in ("window has 64", "20 of 61 answers of source 'talks'", "data.length (to ", "'skip'", "--skip-bad"):
        assert words in str(error.value), words
    assert not (tmp_path / "run").exists()
    # So it is where the only one is held out.
    rows = [json.loads(line) for line in long_talks.read_text().splitlines()]
    read = read_conversations(Source("talks", str(long_talks)), heldout_fraction=0.2).conversations
    held = [i for i, one in enumerate(read) if one.heldout and i >= 40]
    fewer = write_jsonl(tmp_path / "fewer.jsonl", [*rows[:40], rows[held[0]]])
    with pytest.raises(ValueError, match=r"fewer\.jsonl, line 41: .*; 1 of 41 answers"):
        sft(recipe_of(parents["full"], fewer), tmp_path / "run", device="cpu", say=quiet)


@pytest.mark.parametrize(
    "options", [{"too_long": "skip"}, {"too_long": "truncate"}, {"skip_bad": True}], ids=["skip", "truncate", "bad"]
)
def test_answers_that_are_too_long_are_counted_where_one_allows_them(
    options: Any, parents: Any, long_talks: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    recipe = recipe_of(parents["full"], long_talks, **options)
    recipe = dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, windows=50))
    report = sft(recipe, tmp_path / "run", device="cpu", say=said.append)
    found, text = report["data"]["talks"], (tmp_path / "run/report.md").read_text("utf-8")
    train, heldout = found["train"], found["heldout"]
    assert heldout["answers"] == report["before"]["answers"] == rescored(tmp_path / "run", "heldout")
    assert heldout["left_out"] > 0 == heldout["cut"]
    assert train["left_out"] + train["cut"] + heldout["left_out"] == 20
    # The conversation of two answers has a context without room for a second: cut where one may, that is left out.
    assert train["left_out"] == 1 and train["cut"] > 9 if options.get("too_long") == "truncate" else train["cut"] == 0
    assert train["answers"] == rescored(tmp_path / "run", "train") + train["cut"]
    assert len(found["too_long"]) == 3 and all("talks.jsonl, line " in place for place in found["too_long"])
    assert all(place.rpartition("/")[2] in text for place in found["too_long"])
    assert f"| {train['left_out']} | {train['cut']} | {heldout['left_out']} |" in text
    assert any("longer than the window of 64 tokens" in line and found["too_long"][0] in line for line in said)
    bad = "skip_bad" in options
    assert found["bad"] == (20 if bad else 0) and (found["too_long"][0] in found["problems"]) == bad
    assert ("(among the bad rows)" in text) == bad
    before = json.loads((tmp_path / "run/data/conversations.json").read_text())["talks"]
    assert before["bad"] == 0, "what depends on the window is not kept: a resumed run counts it once"


def test_where_nothing_fits_or_is_held_out_the_error_says_so(parents: Any, long_talks: Path, tmp_path: Path) -> None:
    lines = long_talks.read_text().splitlines(keepends=True)
    (tmp_path / "long.jsonl").write_text("".join(lines[40:59]))
    for options in ({"too_long": "skip"}, {"skip_bad": True}):
        with pytest.raises(ValueError, match=r"'talks' has no answer to train on .*the first: .*long\.jsonl, line \d"):
            sft(recipe_of(parents["full"], tmp_path / "long.jsonl", **options), tmp_path / "run", say=quiet)
    recipe = recipe_of(parents["full"], long_talks, too_long="skip")
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, heldout_fraction=0.0))
    with pytest.raises(ValueError, match="no answer is held out to measure with; give at least two"):
        sft(recipe, tmp_path / "other", device="cpu", say=quiet)


def test_held_out_answers_of_which_none_fits_are_named(parents: Any) -> None:
    tokenizer = load_tokenizer(parents["full"])
    held = tokenise([Conversation(tuple(talk("a", "long " * 90)), "t.jsonl, line 3")], tokenizer)
    with pytest.raises(ValueError, match=r"no answer that is held out .* window of 64 .*t\.jsonl, line 3: \d+ tokens"):
        answers.pick_heldout([held], special_tokens(tokenizer), 64, 8)


def as_toml(recipe: Path, parent: Path, data: Path) -> Path:
    recipe.write_text(f"""
task = "sft"
model = {{ parent = "{parent}" }}
data = {{ length = 64, heldout_fraction = 0.2, sources = [{{ name = "talks", path = "{data}" }}] }}
train = {{ batch = 4, dtype = "float32", compile = "off", steps = 2 }}
eval = {{ windows = 2, draws = 2 }}
""")
    return recipe


@pytest.mark.parametrize("verb", ["train", "adapt"])
def test_bad_rows_are_left_out_by_a_flag(
    verb: str, parents: Any, long_talks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with long_talks.open("a") as file:
        file.write('{"messages": []}\n')
    recipe = str(as_toml(tmp_path / "r.toml", parents["full"], long_talks))
    command = [verb, *([recipe] if verb == "train" else ["--recipe", recipe]), "--out", str(tmp_path / "run")]
    assert cli.main([*command, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "talks.jsonl, line 61: there are no messages" in error and "--skip-bad" in error
    assert cli.main([*command, "--device", "cpu", "--skip-bad"]) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["recipe"]["sft"]["skip_bad"] and report["data"]["talks"]["bad"] == 21
    # Text has no such rows.
    other = [verb, *(["smollm2-cpu"] if verb == "train" else ["--recipe", "smollm2-cpu"]), "--out", str(tmp_path / "o")]
    assert cli.main([*other, "--skip-bad"]) == 2 and not (tmp_path / "o").exists()
    assert "bad rows of conversations, for a recipe of task 'sft'" in capsys.readouterr().err


def test_each_task_has_its_own_job(parents: Any, tmp_path: Path) -> None:
    recipe = recipe_of(parents["full"], tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="task 'sft'"):
        adapt(recipe, tmp_path / "run")
    with pytest.raises(ValueError, match="task 'adapt'"):
        sft(Recipe(), tmp_path / "run")
    with pytest.raises(ValueError, match=r"the table \[sft\] has no effect with task = 'adapt'"):
        dataclasses.replace(recipe, task="adapt")
    with pytest.raises(ValueError, match="never cut across sequences"):
        dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, pack="concat"))


@pytest.mark.parametrize(
    "bad",
    [{"truncate_share": 1.5}, {"eos_weight": -1.0}, {"lora_rank": -1}, {"chat_template": "{", "plain_template": True}],
)
def test_settings_that_cannot_be(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sft"):
        SftConfig(**bad)


# ---------------------------------------------------------------------------------------------------------- GSM8K


def test_digits_are_split_in_the_saved_tokenizer_too(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(size=400)
    tokenizer.add_tokens(["12"])
    text = "There are 120 foxes, 0 1 2 and 12 dogs: <<120+12=132>>"
    split_digits(tokenizer)
    split_digits(tokenizer)  # once is enough
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for one in (tokenizer, again):
        pieces = [one.convert_ids_to_tokens(i) for i in encode(one, text.replace("12", "34"))]
        assert all(len(p.strip("Ġ")) == 1 for p in pieces if any(c.isdigit() for c in p))
        assert one.decode(encode(one, text)) == text


def test_a_held_out_question_ends_with_a_whole_block(parents: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block cut short invites the end; what was written in the rest of the last block is not looked at."""
    model, seen = hub.load(parents["block"], device="cpu", dtype="float32"), []

    def unmask(model: Any, canvas: Any, *, tokens: int, **more: Any) -> Any:
        seen.append((canvas.ids.shape[1], tokens))
        return [SimpleNamespace(ids=torch.where(canvas.editable, 9, canvas.ids))]

    monkeypatch.setattr(answers, "unmask", unmask)
    question = answers.Answered(answers.Request((0, 5, 6), (7, 8, 1)), (0, 0), 3)
    (row,) = answers.answer_heldout(model, [question], 64, 6, 6)
    size = model.layout.size
    assert seen == [(-(-9 // size) * size, 6)] and seen[0][0] > 9 and row["room"] == row["end"] == 6


def test_the_parents_answers_are_its_greedy_ones(parents: Any) -> None:
    """Behind the text that the child is given, against a loop without a cache."""
    child, prompts = load_tokenizer(parents["block"]), ("Is 3 odd?", "Name a")
    stock, tokenizer = hub.load_parent(str(parents["ar"]))
    special, found = special_tokens(tokenizer), answers.answer_prompts_by_parent(
        str(parents["ar"]), child, prompts, 6, device=torch.device("cpu"), dtype=torch.float32
    )  # fmt: skip
    for prompt, entry in zip(prompts, found, strict=True):
        turn = open_turn(child, [{"role": "user", "content": prompt}])
        ids = [special.bos, *encode(tokenizer, turn.context)]
        ends, new = {special.bos, special.eos, *encode(tokenizer, turn.end)}, list[int]()
        with torch.no_grad():
            while len(new) < 6 and not ends & {*new}:
                new.append(int(stock(torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert entry == {"prompt": prompt, "answer": decode(tokenizer, [t for t in new if t not in ends])}


def test_a_parent_that_is_not_here_is_left_out_aloud(parents: Any, tmp_path: Path) -> None:
    moved = shutil.copytree(parents["full"], tmp_path / "child")
    config = json.loads((moved / "config.json").read_text())
    for parent, why in ((tmp_path / "gone", "gone"), (parents["full"], "is a diffusion model itself")):
        config["diffusion"]["parent"] = str(parent)
        (moved / "config.json").write_text(json.dumps(config))
        said: list[str] = []
        report = sft(recipe_of(moved, talks(tmp_path / "talks.jsonl")), tmp_path / why[:4], say=said.append)
        assert "parent" not in report["answers"]
        assert any("AR parent's answers are left out" in line and why in line for line in said)


def test_exact_match_and_where_answers_end() -> None:
    assert same("<<1+1=2>> #### 1,200", "<<600*2=1200>> #### 1200") and not same("1200", "#### 1200")
    assert same(" yes\n", "yes") and not same("yes.", "yes")
    rows = [{"end": 0, "room": 16}, {"end": 5, "room": 16}, {"end": 16, "room": 16}]
    assert histogram(rows, "end") == [1, 0, 1, 0, 0, 0, 0, 1]


RECIPES = Path(__file__).parents[1] / "recipes"
SFT_RECIPES = [path.stem for path in sorted(RECIPES.glob("*.toml")) if 'task = "sft"' in path.read_text("utf-8")]


def test_the_papers_numbers_of_gsm8k() -> None:
    gpt, llama = (load_recipe(RECIPES / f"gsm8k-{name}.toml") for name in ("diffugpt", "diffullama"))
    for recipe in (gpt, llama):
        assert recipe.data.length == 256 and recipe.eval.steps == 64 and recipe.sft.eos_padding == "window"
        noise = recipe.noise
        assert (noise.form, noise.t_min, noise.normalisation) == ("rate", 1e-3, "masked")
    assert (gpt.train.batch, gpt.train.learning_rate, gpt.train.steps) == (128, 3e-4, 200 * 380_000 // 128)
    assert gpt.train.warmup * gpt.train.steps == 2000 and gpt.sft.split_digits and not gpt.sft.lora_rank
    assert (llama.sft.lora_rank, llama.train.learning_rate, llama.sft.split_digits) == (16, 1e-4, False)


def test_the_mixture_of_the_guide_is_a_recipe(tmp_path: Path) -> None:
    guide = (RECIPES.parent / "docs/guides/sft.md").read_text("utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "r.toml").write_text('task = "sft"\n' + block, encoding="utf-8")
    assert [source.weight for source in load_recipe(tmp_path / "r.toml").data.sources] == [0.4, 0.3, 0.3]


@pytest.mark.parametrize("name", SFT_RECIPES)
def test_two_steps_of_every_recipe(name: str, tmp_path: Path) -> None:
    """On a tiny random parent: its kind, paths, length, batch, budget, dtype and how much is measured are replaced."""
    recipe = load_recipe(RECIPES / f"{name}.toml")
    tokenizer = chat_tokenizer(size=380)
    tokenizer.add_tokens(["======", "========"])
    build_parent(tmp_path / "ar", "gpt2" if name == "gsm8k-diffugpt" else "llama", tokenizer=tokenizer)
    convert(str(tmp_path / "ar"), tmp_path / "parent", trained_length=64)
    rows = [{"instruction": f"{i} and {i}?", "output": f"<<{i}+{i}={2 * i}>> #### {2 * i}"} for i in range(40)]
    source = SourceConfig("sums", str(write_jsonl(tmp_path / "sums.jsonl", rows)))
    tiny = dataclasses.replace(
        recipe,
        model=ModelConfig(str(tmp_path / "parent")),
        data=dataclasses.replace(recipe.data, sources=(source,), length=96, heldout_fraction=0.2),
        train=dataclasses.replace(
            recipe.train, batch=4, micro_batch=2, steps=2, minutes=None, dtype="float32", compile="off"
        ),
        eval=dataclasses.replace(
            recipe.eval, windows=2, draws=2, prompts=recipe.eval.prompts[:1], max_tokens=8, steps=2
        ),
        sft=dataclasses.replace(recipe.sft, answers=2),
    )
    report = sft(tiny, tmp_path / "run", device="cpu", say=quiet)
    assert [row["step"] for row in report["train"]] == [1, 2] and len(report["answers"]["after"]["heldout"]) == 2
    if name.startswith("gsm8k"):
        asked = report["answers"]["after"]["heldout"][0]
        separator = "======" if name == "gsm8k-diffugpt" else "========"
        start = load_tokenizer(tmp_path / "run/init").bos_token
        assert asked["question"].endswith(f"?{start}{separator}") and asked["truth"].startswith("<<")


if __name__ == "__main__":
    sft(recipe_of(Path(sys.argv[1]), Path(sys.argv[2])), sys.argv[3], device="cpu", say=print)
